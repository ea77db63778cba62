// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Loads and stores that may fault, and tell how.
//!
//! Each probe is one machine instruction with a known address. The handler of SIGSEGV and SIGBUS looks where
//! the fault happened: at a probe it puts what it learnt into the registers in which the probe returns its
//! result, and resumes behind it. So nothing is shared between threads. Anywhere else a fault is a bug, of
//! the guest or of what runs it.

use core::arch::global_asm;
use core::fmt;

use super::out::errln;
use super::sys::{self, Errno, SigAction};

/// Signals, and their codes for a bad access.
pub const SIGBUS: u32 = 7;
pub const SIGSEGV: u32 = 11;
/// Nothing is mapped there.
pub const SEGV_MAPERR: u32 = 1;
/// Something is mapped there, but not for this kind of access.
pub const SEGV_ACCERR: u32 = 2;
/// The memory has failed.
pub const BUS_MCEERR_AR: u32 = 4;
/// It is mapped, but lies behind the end of what is mapped.
pub const BUS_ADRERR: u32 = 2;

const SA_SIGINFO: usize = 4;
const SA_RESTORER: usize = 0x0400_0000;

global_asm!(
    ".pushsection .text.rt_probe, \"ax\", @progbits",
    ".globl rt_load, rt_load_at, rt_store, rt_store_at, rt_recover, rt_restorer",
    ".hidden rt_load, rt_load_at, rt_store, rt_store_at, rt_recover, rt_restorer",
    // rt_load(address, *value) -> (0, 0), or what the handler says
    ".type rt_load, @function",
    "rt_load:",
    "xor eax, eax",
    "xor edx, edx",
    "rt_load_at:",
    "mov rcx, [rdi]",
    "mov [rsi], rcx",
    "ret",
    // rt_store(address, value) -> (0, 0), or what the handler says
    ".type rt_store, @function",
    "rt_store:",
    "xor eax, eax",
    "xor edx, edx",
    "rt_store_at:",
    "mov [rdi], rsi",
    "rt_recover:",
    "ret",
    // The kernel has no return path of its own on x86-64: the handler returns here.
    ".type rt_restorer, @function",
    "rt_restorer:",
    "mov eax, 15",
    "syscall",
    "ud2",
    ".popsection",
);

/// What the probes return in rax and rdx.
#[repr(C)]
struct Raw {
    /// Zero, or the signal in the upper half, and in the lower `si_addr_lsb` and the code, 16 bits each.
    cause: u64,
    address: usize,
}

unsafe extern "C" {
    fn rt_load(address: usize, value: *mut u64) -> Raw;
    fn rt_store(address: usize, value: u64) -> Raw;
    static rt_load_at: u8;
    static rt_store_at: u8;
    static rt_recover: u8;
    static rt_restorer: u8;
}

/// How an access failed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// SIGSEGV or SIGBUS.
    pub signal: u32,
    /// `si_code`.
    pub code: u32,
    /// `si_addr`.
    pub address: usize,
    /// `si_addr_lsb`, where the code has one; otherwise 0.
    pub lsb: u32,
}

impl Fault {
    /// The name of the signal with its code.
    pub fn name(&self) -> &'static str {
        match (self.signal, self.code) {
            (SIGSEGV, SEGV_MAPERR) => "SIGSEGV MAPERR",
            (SIGSEGV, SEGV_ACCERR) => "SIGSEGV ACCERR",
            (SIGSEGV, _) => "SIGSEGV with another code",
            (SIGBUS, BUS_ADRERR) => "SIGBUS ADRERR",
            (SIGBUS, BUS_MCEERR_AR) => "SIGBUS MCEERR_AR",
            (SIGBUS, _) => "SIGBUS with another code",
            _ => "another signal",
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {:#x}", self.name(), self.address)
    }
}

impl Raw {
    fn check(&self) -> Result<(), Fault> {
        match self.cause {
            0 => Ok(()),
            cause => Err(Fault {
                signal: (cause >> 32) as u32,
                code: u32::from(cause as u16),
                address: self.address,
                lsb: u32::from((cause >> 16) as u16),
            }),
        }
    }
}

/// Loads 8 bytes.
///
/// # Safety
/// `install` must have been called. Nothing that Rust knows may be written meanwhile at the address.
pub unsafe fn load(address: usize) -> Result<u64, Fault> {
    let mut value = 0;
    // SAFETY: `value` can be written; a fault at `address` is what the handler is there for.
    unsafe { rt_load(address, &raw mut value) }.check().map(|()| value)
}

/// Stores 8 bytes.
///
/// # Safety
/// `install` must have been called. Nothing that Rust knows may lie at the address.
pub unsafe fn store(address: usize, value: u64) -> Result<(), Fault> {
    // SAFETY: the caller's promise; a fault at `address` is what the handler is there for.
    unsafe { rt_store(address, value) }.check()
}

/// Makes SIGSEGV and SIGBUS go to the handler, for all threads.
///
/// # Errors
/// What rt_sigaction answers.
pub fn install() -> Result<(), Errno> {
    let action = SigAction {
        handler: handle as *const () as usize,
        flags: SA_SIGINFO | SA_RESTORER,
        restorer: &raw const rt_restorer as usize,
        mask: 0,
    };
    for signal in [SIGSEGV, SIGBUS] {
        // SAFETY: `handle` touches only its arguments and, when the program is lost anyway, stderr.
        unsafe { sys::rt_sigaction(signal as usize, &action) }?;
    }
    Ok(())
}

/// The beginning of `siginfo_t` for a fault.
#[repr(C)]
struct SigInfo {
    signal: u32,
    errno: u32,
    code: u32,
    pad: u32,
    address: usize,
    lsb: u16,
}

impl SigInfo {
    /// `si_addr_lsb`, which only a failure of memory has.
    fn lsb(&self) -> u16 {
        if (self.signal, self.code) == (SIGBUS, BUS_MCEERR_AR) { self.lsb } else { 0 }
    }
}

/// The beginning of `ucontext_t`: flags, link and signal stack, then the registers.
#[repr(C)]
struct UContext {
    head: [u64; 5],
    registers: [u64; 23],
}
/// Places in `UContext::registers` (REG_RDX and so on of C's `sys/ucontext.h`).
const RDX: usize = 12;
const RAX: usize = 13;
const RIP: usize = 16;

extern "C" fn handle(signal: u32, info: &SigInfo, context: &mut UContext) {
    let at = context.registers[RIP] as usize;
    if at == &raw const rt_load_at as usize || at == &raw const rt_store_at as usize {
        context.registers[RAX] =
            u64::from(signal) << 32 | u64::from(info.lsb()) << 16 | u64::from(info.code as u16);
        context.registers[RDX] = info.address as u64;
        context.registers[RIP] = &raw const rt_recover as u64;
        return;
    }
    let fault = Fault { signal, code: info.code, address: info.address, lsb: info.lsb().into() };
    errln!("unexpected {fault}, instruction at {at:#x}");
    // With the default action restored the same instruction faults again and ends the process by the signal,
    // as it would have without this handler.
    let default = SigAction { handler: 0, flags: 0, restorer: 0, mask: 0 };
    // SAFETY: the default action runs nothing of ours.
    if unsafe { sys::rt_sigaction(signal as usize, &default) }.is_err() {
        sys::exit_group(1);
    }
}
