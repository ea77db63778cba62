// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Other ways into a kernel: `int`, `sysenter`, 32-bit code, the vsyscall page, and code that changes under a call.

use core::arch::{global_asm, naked_asm};
use core::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use super::attempt::{Catcher, Outcome, Regs, SIGBUS, SIGSEGV, SIGTRAP};
use super::bystander::pid;
use super::rt::PAGE;
use super::rt::out::outln;
use super::rt::sys::{self, PROT_RW};
use super::rt::thread::Thread;
use super::{Verdict, broken};

const PROT_RX: usize = 5;
/// Numbers of 32-bit calls that would be seen: exit, fork, write, getpid, kill, mmap2, munmap, exit_group, and one too large.
const CALLS_32: [usize; 9] = [1, 2, 4, 20, 37, 192, 91, 252, 5000];
const ENOSYS: i32 = -38;

static TEXT: &[u8; 41] = b"broken: written by a call of 32-bit code\n";

/// A page of code that the guest writes itself.
fn code(bytes: impl Iterator<Item = u8>) -> Option<usize> {
    let page = sys::map_anywhere(PAGE, PROT_RW).ok()?;
    for (at, byte) in bytes.take(PAGE).enumerate() {
        // SAFETY: the page is new.
        unsafe { ((page + at) as *mut u8).write_volatile(byte) };
    }
    // SAFETY: nothing of Rust's is there.
    unsafe { sys::mprotect(page, PAGE, PROT_RX) }.ok().map(|_| page)
}

/// A 32-bit call's arguments: ebx and rdi, ecx and rsi, edx.
fn arguments(number: usize) -> Regs {
    let (rdi, rsi, rdx) = match number {
        1 | 252 => (95, 0, 0),
        37 => (pid(), 9, 0),
        _ => (1, TEXT.as_ptr() as usize, TEXT.len()),
    };
    Regs { rax: number, rdi, rsi, rdx, ..Regs::default() }
}

/// Whether a door was shut: a signal of the CPU's, or a call that does not exist.
fn is_shut(outcome: Outcome) -> bool {
    match outcome {
        Outcome::Returned(value) => value as i32 == ENOSYS,
        caught => caught.is_refused() || caught.is_signal(SIGTRAP),
    }
}

/// `int`: every vector; and that of Linux's 32-bit calls with calls that would be seen.
pub fn int(catcher: &Catcher) -> Verdict {
    let Some(page) = code((0..=255).flat_map(|vector| [0xcd, vector, 0xc3])) else {
        return broken(format_args!("no page for code"));
    };
    let (me, mut segv, mut trap, mut went) = (pid(), 0, 0, 0);
    for vector in 0..=255 {
        let numbers: &[usize] = if vector == 0x80 { &CALLS_32 } else { &[20] };
        for &number in numbers {
            let outcome = catcher.run(page + vector * 3, &arguments(number));
            // Nested PVM answers vector 0x1a, as `cpuid`.
            let goes_on = vector != 0x80 && matches!(outcome, Outcome::Returned(value) if value != me);
            went += usize::from(goes_on);
            if !is_shut(outcome) && !goes_on {
                return broken(format_args!("int {vector:#x} with eax {number}: {outcome}"));
            }
            segv += usize::from(outcome.is_signal(SIGSEGV));
            trap += usize::from(outcome.is_signal(SIGTRAP));
        }
    }
    outln!("int: {segv} times SIGSEGV, {trap} times SIGTRAP, {went} went on");
    Ok(())
}

#[unsafe(naked)]
extern "C" fn enter() {
    naked_asm!("mov rbp, rsp", "sysenter", "ret")
}

/// `sysenter`, with calls that would be seen.
pub fn sysenter(catcher: &Catcher) -> Verdict {
    for number in CALLS_32 {
        let outcome = catcher.run(enter as *const () as usize, &arguments(number));
        if !is_shut(outcome) {
            return broken(format_args!("sysenter with eax {number}: {outcome}"));
        }
    }
    outln!("sysenter: {} calls refused", CALLS_32.len());
    Ok(())
}

// attack_far_*(rax number, rdi stack below 4 GiB, r8 32-bit entry, rsi, rdx: ebx and ecx there; r9 the code's selector).
// 32-bit code comes back through attack_far_back, with the low stack, on which the real one is kept.
global_asm!(
    ".pushsection .text.attack_far, \"ax\", @progbits",
    ".macro far_begin",
    "mov [rdi - 8], rsp",
    "lea rsp, [rdi - 8]",
    "mov ebp, esp",
    "mov ebx, esi",
    "mov ecx, edx",
    "mov edx, r10d",
    ".endm",
    "attack_far_return:",
    "far_begin",
    "push r9",
    "push r8",
    ".byte 0x48, 0xcb",
    "attack_far_jump:",
    "far_begin",
    "mov [rsp - 16], r8d",
    "mov [rsp - 12], r9w",
    ".byte 0xff, 0x6c, 0x24, 0xf0",
    "attack_far_call:",
    "far_begin",
    "mov [rsp - 64], r8d",
    "mov [rsp - 60], r9w",
    ".byte 0xff, 0x5c, 0x24, 0xc0",
    "ud2",
    "attack_far_iret:",
    "far_begin",
    "mov r11, rsp",
    "push 0x2b",
    "push r11",
    "push 0x202",
    "push r9",
    "push r8",
    "iretq",
    ".code32",
    "attack_far_int80:",
    "int 0x80",
    ".byte 0xea",
    ".long attack_far_back",
    ".word 0x33",
    "attack_far_sysenter:",
    "sysenter",
    ".byte 0xea",
    ".long attack_far_back",
    ".word 0x33",
    "attack_far_syscall:",
    // `syscall`, which some assemblers refuse in 32-bit code.
    ".byte 0x0f, 0x05",
    ".byte 0xea",
    ".long attack_far_back",
    ".word 0x33",
    ".code64",
    "attack_far_back:",
    "mov rsp, [rbp]",
    "ret",
    ".popsection",
);

unsafe extern "C" {
    fn attack_far_return();
    fn attack_far_jump();
    fn attack_far_call();
    fn attack_far_iret();
    fn attack_far_int80();
    fn attack_far_sysenter();
    fn attack_far_syscall();
}

/// `far-int`: to the 32-bit code segment, and `int 0x80` there.
pub fn far_int(catcher: &Catcher) -> Verdict {
    far(catcher, attack_far_int80, &[0x23])
}

/// `far-sysenter`: `sysenter` there.
pub fn far_sysenter(catcher: &Catcher) -> Verdict {
    far(catcher, attack_far_sysenter, &[0x23])
}

/// `far-syscall`: `syscall` there.
pub fn far_syscall(catcher: &Catcher) -> Verdict {
    far(catcher, attack_far_syscall, &[0x23])
}

/// `far-data`: to the data segment, and `syscall` in 32-bit code there.
pub fn far_data(catcher: &Catcher) -> Verdict {
    far(catcher, attack_far_syscall, &[0x2b])
}

/// `far-segments`: to segments that no program should have.
pub fn far_segments(catcher: &Catcher) -> Verdict {
    far(catcher, attack_far_int80, &[0x20, 0x1b, 0x2b, 0x0, 0x10, 0x8, 0x7, 0x63, 0xffff])
}

/// To each of `selectors` in four ways, and through `door` there.
fn far(catcher: &Catcher, door: unsafe extern "C" fn(), selectors: &[usize]) -> Verdict {
    const LOW: usize = 0x1000_0000;
    let flags = sys::MAP_PRIVATE | sys::MAP_FIXED_NOREPLACE;
    // SAFETY: it replaces nothing.
    if unsafe { sys::mmap(LOW, 4 * PAGE, PROT_RW, flags) } != Ok(LOW) {
        return broken(format_args!("no stack below 4 GiB"));
    }
    let ways: [unsafe extern "C" fn(); 4] =
        [attack_far_return, attack_far_jump, attack_far_call, attack_far_iret];
    let (mut tried, mut refused) = (0, 0);
    for (index, way) in ways.into_iter().enumerate() {
        for &selector in selectors {
            for number in CALLS_32 {
                let Regs { rdi, rsi, rdx, .. } = arguments(number);
                let regs = Regs {
                    rax: number,
                    rdi: LOW + 3 * PAGE,
                    rsi: rdi,
                    rdx: rsi,
                    r10: rdx,
                    r8: door as *const () as usize,
                    r9: selector,
                };
                let outcome = catcher.run(way as *const () as usize, &regs);
                if !is_shut(outcome) {
                    return broken(format_args!(
                        "call {number} in segment {selector:#x}, way {index}: {outcome}"
                    ));
                }
                tried += 1;
                refused += usize::from(outcome.is_refused());
            }
        }
    }
    outln!("far: {refused} of {tried} ended by a signal");
    Ok(())
}

pub const VSYSCALL: usize = 0xffff_ffff_ff60_0000;

/// `vsyscall`: the page that old programs call, where the host may have one.
pub fn vsyscall(catcher: &Catcher) -> Verdict {
    let room = [0_usize; 8];
    let pointer = room.as_ptr() as usize;
    let regs = |rax| Regs { rax, rdi: pointer, rsi: pointer + 32, ..Regs::default() };
    let mut calls = 0;
    for offset in (0..PAGE).step_by(64).chain([1, 7, 9, 0x401, 0x407, 0x801, 0x809, PAGE - 1]) {
        for rax in [96, 201, 309, 39, 60, 231] {
            let outcome = catcher.run(VSYSCALL + offset, &regs(rax));
            if !(outcome.is_refused()
                || matches!(outcome, Outcome::Returned(value) if (-4095..0).contains(&(value as isize))))
            {
                return broken(format_args!("a call of the vsyscall page + {offset:#x}: {outcome}"));
            }
            calls += 1;
        }
        let stored = catcher.store(VSYSCALL + offset, 0);
        if !(stored.is_signal(SIGSEGV) || stored.is_signal(SIGBUS)) {
            return broken(format_args!("a store to the vsyscall page + {offset:#x}: {stored}"));
        }
    }
    // SAFETY: the local is here, and calls may have written it.
    let written =
        (0..8).any(|at| unsafe { (&raw const room).cast::<usize>().wrapping_add(at).read_volatile() } != 0);
    if written {
        return broken(format_args!("a call of the vsyscall page was answered"));
    }
    let read = matches!(catcher.load(VSYSCALL), Outcome::Returned(_));
    outln!("vsyscall: {calls} calls refused; it can {} read", if read { "be" } else { "not be" });
    Ok(())
}

static PAGE_AT: AtomicUsize = AtomicUsize::new(0);
static CHANGES: AtomicUsize = AtomicUsize::new(0);
static OVER: AtomicUsize = AtomicUsize::new(0);

extern "C" fn change(_: usize) {
    let page = PAGE_AT.load(Relaxed);
    while OVER.load(Relaxed) == 0 {
        // SAFETY: nothing of Rust's is in the page; who runs there catches what comes of it.
        let _ = unsafe { sys::mprotect(page, PAGE, PROT_RW) };
        // `syscall`, or what does nothing, or `int 0x80`.
        let bytes: u16 = [0x050f, 0x9090, 0x80cd][CHANGES.fetch_add(1, Relaxed) % 3];
        // SAFETY: the page is there, and this thread made it writable.
        unsafe { (page as *mut u16).write_volatile(bytes) };
        // SAFETY: as above.
        let _ = unsafe { sys::mprotect(page, PAGE, PROT_RX) };
        sys::sched_yield();
    }
}

/// `changing`: `syscall` in a page that another thread rewrites meanwhile.
pub fn changing(catcher: &Catcher) -> Verdict {
    const GETPID: usize = 39;
    let Some(page) = code([0x0f, 0x05, 0xc3].into_iter()) else {
        return broken(format_args!("no page for code"));
    };
    PAGE_AT.store(page, Relaxed);
    let Ok(thread) = Thread::spawn(change, 0) else { return broken(format_args!("no thread")) };
    let me = pid();
    let (mut calls, mut others) = (0, 0);
    let mut verdict = Ok(());
    for _ in 0..20_000 {
        let outcome = catcher.run(page, &Regs { rax: GETPID, ..Regs::default() });
        match outcome {
            Outcome::Returned(value) if value == me => calls += 1,
            Outcome::Returned(GETPID) => others += 1,
            _ if is_shut(outcome) => others += 1,
            _ => {
                verdict = broken(format_args!("a call from a page that changes: {outcome}"));
                break;
            }
        }
        if CHANGES.load(Relaxed) > 3000 {
            break;
        }
    }
    OVER.store(1, Relaxed);
    if thread.join().is_err() {
        return broken(format_args!("the thread's stack is gone"));
    }
    if calls + others == 0 {
        return broken(format_args!("nothing was tried"));
    }
    outln!("changing: calls are answered, and the rest is not");
    verdict
}
