// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Runs code that may end in a signal, and says how it ended.
//!
//! A thread that attempts something has a [`Catcher`]: a block of memory, aligned to its size, whose upper part is the thread's
//! signal stack. So the handler finds the block by its own stack pointer, whatever the attempt did to registers, segments
//! and flags; it never returns to the frame, but goes back to where the attempt began, and with that nothing of the attempt's
//! state is left. A signal outside an attempt ends the program with status 99.

use core::arch::{global_asm, naked_asm};

use super::rt::out::outln;
use super::rt::sys::{self, Errno, PROT_RW, SigAction};

/// Size and alignment of a block.
const BLOCK: usize = 0x1_0000;
/// Where the signal stack begins in it.
const SIGNAL_STACK: usize = 0x1000;

const SA_SIGINFO: usize = 4;
const SA_RESTORER: usize = 0x0400_0000;
const SA_ONSTACK: usize = 0x0800_0000;
const SA_NODEFER: usize = 0x4000_0000;

pub const SIGILL: u32 = 4;
pub const SIGTRAP: u32 = 5;
pub const SIGBUS: u32 = 7;
pub const SIGFPE: u32 = 8;
pub const SIGSEGV: u32 = 11;
pub const SIGSYS: u32 = 31;
/// What the CPU raises; and what a seccomp filter would, so that it is seen here and not taken for an end by itself.
const CAUGHT: [u32; 6] = [SIGILL, SIGTRAP, SIGBUS, SIGFPE, SIGSEGV, SIGSYS];

/// The registers that an attempt starts with. rbx, rbp and r12 to r15 are what rdi is, rcx what rsi is: the arguments of a
/// 32-bit call.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Regs {
    pub rax: usize,
    pub rdi: usize,
    pub rsi: usize,
    pub rdx: usize,
    pub r10: usize,
    pub r8: usize,
    pub r9: usize,
}

/// What a signal said.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Caught {
    pub signal: usize,
    pub code: isize,
    pub address: usize,
    pub rip: usize,
}

/// How an attempt ended.
#[derive(Clone, Copy)]
pub enum Outcome {
    /// Its code returned, with this in rax.
    Returned(usize),
    Caught(Caught),
}

impl Outcome {
    /// Whether it ended by a signal with which the CPU refuses.
    pub fn is_refused(self) -> bool {
        matches!(self, Self::Caught(caught) if [SIGILL, SIGBUS, SIGSEGV].contains(&(caught.signal as u32)))
    }

    pub fn is_signal(self, signal: u32) -> bool {
        matches!(self, Self::Caught(caught) if caught.signal == signal as usize)
    }
}

impl core::fmt::Display for Outcome {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Returned(value) => write!(f, "returned {value:#x}"),
            Self::Caught(Caught { signal, code, address, rip }) => {
                write!(f, "signal {signal}, code {code}, address {address:#x}, rip {rip:#x}")
            }
        }
    }
}

/// The lower end of a block. The assembly below knows the offsets.
#[repr(C)]
struct Block {
    rsp: usize,
    armed: usize,
    caught: Caught,
    rax: usize,
}

// attack_attempt(target, regs, block): 0 where the target returned, else the signal.
global_asm!(
    ".pushsection .text.attack_attempt, \"ax\", @progbits",
    ".globl attack_attempt, attack_handler",
    ".hidden attack_attempt, attack_handler",
    ".type attack_attempt, @function",
    "attack_attempt:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "push rdx",
    "mov [rdx], rsp",
    "mov qword ptr [rdx + 8], 1",
    "mov r11, rdi",
    "mov rax, [rsi]",
    "mov rdi, [rsi + 8]",
    "mov rdx, [rsi + 24]",
    "mov r10, [rsi + 32]",
    "mov r8, [rsi + 40]",
    "mov r9, [rsi + 48]",
    "mov rsi, [rsi + 16]",
    "mov rcx, rsi",
    "mov rbx, rdi",
    "mov rbp, rdi",
    "mov r12, rdi",
    "mov r13, rdi",
    "mov r14, rdi",
    "mov r15, rdi",
    "call r11",
    "push 0x202",
    "popfq",
    "pop rdx",
    "mov qword ptr [rdx + 8], 0",
    "mov [rdx + 48], rax",
    "xor eax, eax",
    "2:",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
    // Alignment checks may be on, which the kernel leaves to the handler.
    ".type attack_handler, @function",
    "attack_handler:",
    "push 0x202",
    "popfq",
    "mov rcx, rsp",
    "and rcx, -{block}",
    "cmp qword ptr [rcx + 8], 0",
    "je 3f",
    "mov qword ptr [rcx + 8], 0",
    "mov eax, edi",
    "mov [rcx + 16], rax",
    "movsxd rdx, dword ptr [rsi + 8]",
    "mov [rcx + 24], rdx",
    "mov rdx, [rsi + 16]",
    "mov [rcx + 32], rdx",
    // rip in the ucontext, which lies behind the return address.
    "mov rdx, [rsp + 8 + 168]",
    "mov [rcx + 40], rdx",
    "mov rsp, [rcx]",
    "pop rdx",
    "jmp 2b",
    "3:",
    "mov rsi, [rdx + 168]",
    "and rsp, -16",
    "call {unexpected}",
    "ud2",
    ".popsection",
    block = const BLOCK,
    unexpected = sym unexpected,
);

unsafe extern "C" {
    fn attack_attempt(target: usize, regs: *const Regs, block: *mut Block) -> usize;
    fn attack_handler();
}

extern "C" fn unexpected(signal: u32, rip: usize) -> ! {
    outln!("attack: signal {signal} at {rip:#x}, outside any attempt");
    sys::exit_group(99)
}

/// Makes a signal come to the attempt of the thread that gets it.
pub fn catch(signal: u32) -> Result<(), Errno> {
    let action = SigAction {
        handler: attack_handler as *const () as usize,
        flags: SA_SIGINFO | SA_ONSTACK | SA_NODEFER | SA_RESTORER,
        // Never reached.
        restorer: attack_handler as *const () as usize,
        mask: 0,
    };
    // SAFETY: the handler leaves by a jump back to the attempt, which saved what the ABI wants kept.
    unsafe { sys::rt_sigaction(signal as usize, &action) }.map(drop)
}

/// Makes all that the CPU raises come to attempts.
pub fn install() -> Result<(), Errno> {
    CAUGHT.into_iter().try_for_each(catch)
}

/// A thread's way to attempt something; it stays with its thread.
pub struct Catcher(*mut Block);

impl Catcher {
    /// # Errors
    /// What mmap or sigaltstack answers.
    pub fn new() -> Result<Self, Errno> {
        const SIGALTSTACK: usize = 131;
        let block = sys::map_anywhere(2 * BLOCK, PROT_RW)?.next_multiple_of(BLOCK);
        let stack = [block + SIGNAL_STACK, 0, BLOCK - SIGNAL_STACK];
        // SAFETY: the new mapping's upper part is nobody else's.
        unsafe { sys::syscall(SIGALTSTACK, [stack.as_ptr() as usize, 0, 0, 0, 0, 0]) }?;
        Ok(Self(block as *mut Block))
    }

    /// Calls `target` with `regs`.
    pub fn run(&self, target: usize, regs: &Regs) -> Outcome {
        // SAFETY: the block is this thread's, and the handler is installed. What the target does to this program is the
        // attack's business.
        let signal = unsafe { attack_attempt(target, regs, self.0) };
        // SAFETY: as above; the attempt is over.
        let block = unsafe { self.0.read_volatile() };
        if signal == 0 { Outcome::Returned(block.rax) } else { Outcome::Caught(block.caught) }
    }

    /// Loads 8 bytes.
    pub fn load(&self, address: usize) -> Outcome {
        self.run(load as *const () as usize, &Regs { rdi: address, ..Regs::default() })
    }

    /// Stores 8 bytes.
    pub fn store(&self, address: usize, value: usize) -> Outcome {
        self.run(store as *const () as usize, &Regs { rdi: address, rsi: value, ..Regs::default() })
    }

    /// A system call of which nothing is known but that it must not hurt.
    pub fn call(&self, number: usize, args: [usize; 6]) -> Outcome {
        let [rdi, rsi, rdx, r10, r8, r9] = args;
        self.run(syscall as *const () as usize, &Regs { rax: number, rdi, rsi, rdx, r10, r8, r9 })
    }
}

#[unsafe(naked)]
extern "C" fn load() {
    naked_asm!("mov rax, [rdi]", "ret")
}

#[unsafe(naked)]
extern "C" fn store() {
    naked_asm!("mov [rdi], rsi", "ret")
}

#[unsafe(naked)]
pub extern "C" fn syscall() {
    naked_asm!("syscall", "ret")
}

/// Pieces of code by name, each followed by `ret`.
macro_rules! pieces {
    ($($name:literal: $($line:literal),+;)+) => {
        &[$(($name, {
            #[unsafe(naked)]
            extern "C" fn code() {
                core::arch::naked_asm!($($line,)+ "ret")
            }
            code
        })),+]
    };
}
pub(super) use pieces;

/// A piece of code, with its name.
pub type Piece = (&'static str, extern "C" fn());
