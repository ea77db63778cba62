// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Signals: every one at itself, at neighbours, with no place for a frame, and frames that nobody wrote but the attacker.

use core::arch::naked_asm;

use super::attempt::{self, Catcher, Outcome, Regs, SIGBUS, SIGFPE, SIGILL, SIGSEGV, SIGTRAP};
use super::bystander::pid;
use super::rt::out::outln;
use super::rt::sys::{self, Errno, PROT_NONE, PROT_RW, SigAction};
use super::{Verdict, broken};

const SIGPROCMASK: usize = 14;
const SIGALTSTACK: usize = 131;
const GETTID: usize = 186;
const TGKILL: usize = 234;
const GETPPID: usize = 110;
const SIGKILL: u32 = 9;
const SIGSTOP: u32 = 19;
const SIG_DFL: usize = 0;
const SIG_IGN: usize = 1;

fn call(number: usize, args: [usize; 6]) -> Result<usize, Errno> {
    // SAFETY: the calls of this file touch no memory that Rust knows.
    unsafe { sys::syscall(number, args) }
}

fn me() -> [usize; 2] {
    [pid(), call(GETTID, [0; 6]).unwrap_or(0)]
}

pub fn dispose(signal: u32, handler: usize) -> Result<usize, Errno> {
    let action = SigAction { handler, flags: 0, restorer: 0, mask: 0 };
    // SAFETY: it runs nothing of this program.
    unsafe { sys::rt_sigaction(signal as usize, &action) }
}

/// Blocks all that can be blocked.
pub fn block_all() {
    let all = u64::MAX;
    let _ = call(SIGPROCMASK, [2, &raw const all as usize, 0, 8, 0, 0]);
}

/// `signals`: each to itself, ignored, blocked, and caught.
pub fn signals(catcher: &Catcher) -> Verdict {
    let [pid, tid] = me();
    let mut came = 0;
    for signal in 1..=64 {
        let raise = || catcher.call(TGKILL, [pid, tid, signal as usize, 0, 0, 0]);
        if [SIGKILL, SIGSTOP].contains(&signal) {
            if dispose(signal, SIG_IGN).is_ok() || attempt::catch(signal).is_ok() {
                return broken(format_args!("signal {signal} can be ignored or caught"));
            }
            continue;
        }
        if dispose(signal, SIG_IGN).is_err() {
            return broken(format_args!("signal {signal} cannot be ignored"));
        }
        let ignored = raise();
        if !matches!(ignored, Outcome::Returned(0)) {
            return broken(format_args!("signal {signal}, ignored: {ignored}"));
        }
        if attempt::catch(signal).is_err() {
            return broken(format_args!("signal {signal} cannot be caught"));
        }
        let caught = raise();
        if !caught.is_signal(signal) {
            return broken(format_args!("signal {signal}, caught: {caught}"));
        }
        came += 1;
    }
    outln!("signals: {came} ignored and caught");
    Ok(())
}

/// `neighbours`: signals to whoever has a number near its own.
pub fn neighbours(_: &Catcher) -> Verdict {
    const ESRCH: Errno = Errno(3);
    let [pid, tid] = me();
    let parent = call(GETPPID, [0; 6]).unwrap_or(0);
    let mut own = 0;
    for base in [pid, parent] {
        for near in base.saturating_sub(64).max(1)..base + 64 {
            for group in [pid, near, parent] {
                match call(TGKILL, [group, near, 0, 0, 0, 0]) {
                    Ok(_) if group == pid => own += usize::from(near != tid),
                    Err(ESRCH) => {}
                    other => {
                        let answer = other.map_or(-1, |value| value as isize);
                        return broken(format_args!("a signal to thread {near} of {group} answers {answer}"));
                    }
                }
            }
            if near != pid && call(62, [near, 0, 0, 0, 0, 0]) != Err(ESRCH) && own == 0 {
                return broken(format_args!("a signal to process {near} is not refused"));
            }
        }
    }
    // The bystander's thread may be met twice by group, and again near the parent.
    if own > 4 {
        return broken(format_args!("{own} other threads are within reach"));
    }
    outln!("neighbours: nobody but its own threads");
    Ok(())
}

/// `raise N`: with the default action.
pub fn raise(signal: u32) -> Verdict {
    if ![SIGKILL, SIGSTOP].contains(&signal) && dispose(signal, SIG_DFL).is_err() {
        return broken(format_args!("signal {signal} has no default"));
    }
    let [pid, tid] = me();
    let result = call(TGKILL, [pid, tid, signal as usize, 0, 0, 0]);
    outln!("raise: signal {signal} {}", if result.is_ok() { "is ignored" } else { "is refused" });
    Ok(())
}

/// `blocked-fault`: a fault whose signal is blocked ends the program.
pub fn blocked_fault(_: &Catcher) -> Verdict {
    block_all();
    // SAFETY: nothing is there.
    unsafe { (8 as *const u64).read_volatile() };
    broken(format_args!("a fault with all signals blocked goes on"))
}

#[unsafe(naked)]
extern "C" fn fault_without_stack() {
    naked_asm!("mov rsp, rdi", "mov rax, [8]", "ret")
}

/// `no-altstack`: a fault where neither stack can take the frame ends the program.
pub fn no_altstack(catcher: &Catcher) -> Verdict {
    let stack = [0x5000_usize, 0, 0x4000];
    let _ = call(SIGALTSTACK, [stack.as_ptr() as usize, 0, 0, 0, 0, 0]);
    let outcome = catcher.run(
        fault_without_stack as *const () as usize,
        &Regs { rdi: 0x8000_0000_0000_0000, ..Regs::default() },
    );
    broken(format_args!("a fault without a stack: {outcome}"))
}

#[unsafe(naked)]
extern "C" fn on_stack() {
    // Runs on the stack of rdi, and sets another meanwhile.
    naked_asm!("xchg rsp, rdi", "push rdi", "mov rdi, rsi", "xor esi, esi", "syscall", "pop rsp", "ret")
}

/// `altstack`: signal stacks that are none, that are in use, and of every kind of memory.
pub fn altstack(catcher: &Catcher) -> Verdict {
    let mut old = [0_usize; 3];
    let _ = call(SIGALTSTACK, [0, old.as_mut_ptr() as usize, 0, 0, 0, 0]);
    // SAFETY: the kernel has written it.
    let old = unsafe { (&raw const old).read_volatile() };
    let set = |stack: [usize; 3]| call(SIGALTSTACK, [stack.as_ptr() as usize, 0, 0, 0, 0, 0]);
    for stack in [[0, 7, 0x4000], [0, 0, 100], [0, 0xffff, 0x1_0000]] {
        if set(stack).is_ok() {
            return broken(format_args!("sigaltstack takes {stack:x?}"));
        }
    }
    // Not where the real stack may be: that would be in use.
    for base in [0, usize::MAX - 0x4000, 1 << 47, 0xffff_8000_0000_0000, 1 << 63] {
        if set([base, 0, 0x4000]).is_ok() && set([0, 2, 0]).is_err() {
            return broken(format_args!("a signal stack at {base:#x} cannot be given up"));
        }
    }
    if set(old).is_err() {
        return broken(format_args!("the signal stack cannot be set again"));
    }
    // While on it, another one is refused (EPERM).
    let other = [old[0] + 0x4000, 0, 0x4000];
    let regs =
        Regs { rax: SIGALTSTACK, rdi: old[0] + 0x2000, rsi: other.as_ptr() as usize, ..Regs::default() };
    let outcome = catcher.run(on_stack as *const () as usize, &regs);
    if !matches!(outcome, Outcome::Returned(value) if value as isize == -1) {
        return broken(format_args!("sigaltstack on the signal stack: {outcome}"));
    }
    let faulted = catcher.load(8);
    if !faulted.is_signal(SIGSEGV) {
        return broken(format_args!("a fault after all that: {faulted}"));
    }
    outln!("altstack: what is none is refused, and faults still arrive");
    Ok(())
}

/// Words of a `ucontext`, up to the signal mask.
const CONTEXT: usize = 38;
const UC_FLAGS: usize = 0;
/// Places of registers: REG_RSP and so on, behind flags, link and stack.
const RSP: usize = 5 + 15;
const RIP: usize = 5 + 16;
const EFL: usize = 5 + 17;
const CSGSFS: usize = 5 + 18;
const FPSTATE: usize = 5 + 23;

#[unsafe(naked)]
extern "C" fn sigreturn_piece() {
    // rdi: the frame; rsi: 1 where its rsp is to be the real one.
    naked_asm!(
        "test esi, esi",
        "jz 2f",
        "mov [rdi + 160], rsp",
        "2:",
        "mov rsp, rdi",
        "mov eax, 15",
        "syscall",
        "ud2"
    )
}

#[unsafe(naked)]
extern "C" fn end() {
    naked_asm!("nop", "nop", "ret")
}

#[unsafe(naked)]
extern "C" fn trap() {
    // The same bytes in 32-bit code.
    naked_asm!("ud2", "ud2", "ud2", "ud2")
}

/// Returns through a frame that is harmless but for what `change` does to it. `real_stack` is 1 where it gets the rsp of now.
fn sigreturn_frames(catcher: &Catcher, change: impl Fn(&mut [usize; CONTEXT]), real_stack: usize) -> Outcome {
    let mut frame = [0; CONTEXT];
    frame[UC_FLAGS] = 6;
    frame[RIP] = end as *const () as usize;
    frame[EFL] = 0x202;
    frame[CSGSFS] = 0x33 | 0x2b << 48;
    change(&mut frame);
    let regs = Regs { rdi: frame.as_mut_ptr() as usize, rsi: real_stack, ..Regs::default() };
    catcher.run(sigreturn_piece as *const () as usize, &regs)
}

/// One frame with these flags.
pub fn frame_with_flags(catcher: &Catcher, flags: usize) -> Outcome {
    sigreturn_frames(catcher, |frame| frame[EFL] = flags, 1)
}

/// `sigreturn`: frames with segments, flags, addresses and FPU state that no kernel would write.
pub fn sigreturn(catcher: &Catcher) -> Verdict {
    let mut tried = 0;
    let mut judge = |what: &str, value: usize, outcome: Outcome| {
        tried += 1;
        let signals = [SIGSEGV, SIGILL, SIGBUS, SIGTRAP, SIGFPE];
        match outcome {
            Outcome::Returned(_) => Ok(()),
            caught if signals.iter().any(|&signal| caught.is_signal(signal)) => Ok(()),
            other => broken(format_args!("a frame with {what} {value:#x}: {other}")),
        }
    };
    for bit in 0..64 {
        let value = 0x202 | 1 << bit;
        judge("flags", value, sigreturn_frames(catcher, |frame| frame[EFL] = value, 1))?;
    }
    judge("flags", usize::MAX, sigreturn_frames(catcher, |frame| frame[EFL] = usize::MAX, 1))?;
    for selector in [0, 3, 0x8, 0x10, 0x18, 0x1b, 0x20, 0x23, 0x28, 0x2b, 0x30, 0x33, 0x53, 0x63, 0xffff] {
        for (what, shift) in [("cs", 0), ("gs", 16), ("fs", 32), ("ss", 48)] {
            for flags in [0, 2, 6] {
                let outcome = sigreturn_frames(
                    catcher,
                    |frame| {
                        frame[UC_FLAGS] = flags;
                        frame[RIP] = trap as *const () as usize;
                        frame[CSGSFS] = frame[CSGSFS] & !(0xffff << shift) | selector << shift;
                    },
                    1,
                );
                judge(what, selector, outcome)?;
            }
        }
    }
    let wild = [
        0,
        8,
        1 << 47,
        (1 << 47) - 4096,
        1 << 62,
        1 << 63,
        0xffff_8000_0000_0000,
        0xffff_ffff_8000_0000,
        usize::MAX,
    ];
    for address in wild {
        for (what, place, real) in [("rip", RIP, 1), ("rsp", RSP, 0), ("fpstate", FPSTATE, 1)] {
            judge(what, address, sigreturn_frames(catcher, |frame| frame[place] = address, real))?;
        }
    }
    // The frame itself somewhere else.
    for address in wild {
        let regs = Regs { rdi: address, ..Regs::default() };
        judge("address", address, catcher.run(sigreturn_piece as *const () as usize, &regs))?;
    }
    judge_fpu(catcher)?;
    outln!("sigreturn: {tried} frames");
    Ok(())
}

/// FPU states: random bytes of all lengths that a header may claim.
fn judge_fpu(catcher: &Catcher) -> Verdict {
    let Ok(area) = sys::map_anywhere(4 * 4096, PROT_RW) else { return broken(format_args!("no memory")) };
    // SAFETY: nothing of Rust's is there: an FPU state that runs into a page that cannot be read.
    let _ = unsafe { sys::mprotect(area + 3 * 4096, 4096, PROT_NONE) };
    let mut random = super::rt::random::Rng::new(5);
    for round in 0..200 {
        let at = area + (random.below(3 * 64) * 64);
        for word in 0..64 {
            if at + word * 8 < area + 3 * 4096 {
                // SAFETY: the mapping is this function's.
                unsafe { ((at + word * 8) as *mut u64).write_volatile(random.word()) };
            }
        }
        // FP_XSTATE_MAGIC1, a size, and features, where software keeps them; and a header behind.
        if at + 640 < area + 3 * 4096 && round % 2 == 0 {
            for (word, value) in
                [(58, 0x4650_5853 | 2696 << 32), (59, random.word()), (60, 2696), (64, random.word())]
            {
                // SAFETY: as above.
                unsafe { ((at + word * 8) as *mut u64).write_volatile(value) };
            }
        }
        let outcome = sigreturn_frames(
            catcher,
            |frame| {
                frame[UC_FLAGS] = 7;
                frame[FPSTATE] = at;
            },
            1,
        );
        let is_known =
            matches!(outcome, Outcome::Returned(_)) || outcome.is_refused() || outcome.is_signal(SIGFPE);
        if !is_known {
            return broken(format_args!("an FPU state of junk: {outcome}"));
        }
    }
    Ok(())
}
