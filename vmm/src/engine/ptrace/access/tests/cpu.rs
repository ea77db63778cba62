// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Runs the table on the CPU and compares what it says of each fault with what the decoder makes of it.
//!
//! In a forked child, because the pages, the handlers and the registers are the process's: the child makes system calls
//! and writes to shared memory, nothing else. A case is entered by a signal whose handler puts the case's registers in
//! its frame, and left by the one that the instruction causes, whose handler puts the saved ones back.

use super::*;
use std::ffi::c_void;
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

const PAGE: u64 = 4096;
const CODE: u64 = 0x2000_0000;
const CODE_BYTES: u64 = 512 * PAGE;
/// The two pages that the operands are in; more follow, which can be reached.
const FIRST: u64 = 0x3000_0000;
const SECOND: u64 = FIRST + PAGE;
const ARENA_BYTES: u64 = 16 * PAGE;
const SLOT: u64 = 64;
/// `int3` is there. What memory is filled with, so that returns and jumps end well.
const STOP: u64 = CODE;

const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
const R: i32 = libc::PROT_READ;
const NO: i32 = libc::PROT_NONE;
const RIGHTS: [[i32; 2]; 6] = [[NO, NO], [RW, NO], [NO, RW], [R, R], [RW, R], [R, RW]];

/// One run: what goes in and what came out.
#[derive(Clone, Copy)]
struct Run {
    case: usize,
    regs: Regs,
    rights: [i32; 2],
    /// Where the bytes end that can be fetched.
    fetchable: u64,
    after: After,
}

#[derive(Clone, Copy, Default, Debug)]
struct After {
    signal: i32,
    trap: i64,
    error_code: i64,
    addr: u64,
    regs: Regs,
}

/// What the child and its handlers share with the parent.
struct Shared {
    current: usize,
    done: usize,
    gregs: [i64; 23],
    fpu: [u8; FPU_BYTES],
    runs: [Run; MAX_RUNS],
}

/// x87, MXCSR and XMM in a signal frame; what the kernel notes behind them stays.
const FPU_BYTES: usize = 416;
const MAX_RUNS: usize = 4096;

static SHARED: AtomicPtr<Shared> = AtomicPtr::new(ptr::null_mut());

fn shared() -> &'static mut Shared {
    // SAFETY: the test set it to a mapping of that size that it never unmaps, before the child was forked; parent and
    // child, code and handlers take turns.
    unsafe { &mut *SHARED.load(Ordering::Relaxed) }
}

fn map(addr: u64, bytes: u64, rights: i32, flags: i32) -> *mut u8 {
    let flags = flags | libc::MAP_ANONYMOUS;
    // SAFETY: new memory: no address is asked for, or with NOREPLACE.
    let at = unsafe { libc::mmap(addr as *mut c_void, bytes as usize, rights, flags, -1, 0) };
    assert_ne!(at, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
    at.cast()
}

fn protect(addr: u64, bytes: u64, rights: i32) {
    // SAFETY: memory of this test's own, to which there are no references.
    let failed = unsafe { libc::mprotect(addr as *mut c_void, bytes as usize, rights) };
    assert_eq!(failed, 0);
}

fn copy(from: &[u8], to: u64) {
    // SAFETY: memory of this test's own, mapped for writing.
    unsafe { ptr::copy_nonoverlapping(from.as_ptr(), to as *mut u8, from.len()) };
}

fn context(of: *mut c_void) -> &'static mut libc::ucontext_t {
    // SAFETY: the kernel's third argument to an SA_SIGINFO handler, on whose stack nobody else looks at it.
    unsafe { &mut *of.cast() }
}

fn fpu(context: &mut libc::ucontext_t) -> &mut [u8; FPU_BYTES] {
    // SAFETY: the frame's FPU state is at least 512 bytes long and there whenever SSE is.
    unsafe { &mut *context.uc_mcontext.fpregs.cast() }
}

/// The general registers in the order of the kernel's frame: r8 to r15, then these.
fn frame(regs: &mut Regs) -> [&mut u64; 18] {
    let Regs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rbp,
        rsp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip,
        rflags,
        ..
    } = regs;
    [r8, r9, r10, r11, r12, r13, r14, r15, rdi, rsi, rbp, rbx, rdx, rax, rcx, rsp, rip, rflags]
}

extern "C" fn enter(_: i32, _: *mut libc::siginfo_t, frame_of: *mut c_void) {
    let (shared, context) = (shared(), context(frame_of));
    shared.fpu = *fpu(context);
    shared.gregs = context.uc_mcontext.gregs;
    let mut regs = shared.runs[shared.current].regs;
    for (register, value) in context.uc_mcontext.gregs.iter_mut().zip(frame(&mut regs)) {
        *register = *value as i64;
    }
}

extern "C" fn leave(signal: i32, _: *mut libc::siginfo_t, frame_of: *mut c_void) {
    let (shared, context) = (shared(), context(frame_of));
    let gregs = &context.uc_mcontext.gregs;
    let run = &mut shared.runs[shared.current];
    run.after = After {
        signal,
        trap: gregs[libc::REG_TRAPNO as usize],
        error_code: gregs[libc::REG_ERR as usize],
        addr: gregs[libc::REG_CR2 as usize] as u64,
        regs: run.regs,
    };
    for (register, value) in frame(&mut run.after.regs).into_iter().zip(gregs) {
        *register = *value as u64;
    }
    *fpu(context) = shared.fpu;
    context.uc_mcontext.gregs = shared.gregs;
}

fn handle(signal: i32, handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut c_void)) {
    // SAFETY: all zeroes is an action with an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: in the child, whose handlers are this test's.
    let failed = unsafe { libc::sigaction(signal, &action, ptr::null_mut()) };
    assert_eq!(failed, 0);
}

fn child(stack: *mut u8) -> ! {
    // Files that this process closes are to be closed: tests beside this one look at the other end.
    // SAFETY: closes descriptors of a process that uses none.
    unsafe { libc::close_range(0, libc::c_uint::MAX, 0) };
    let stack = libc::stack_t { ss_sp: stack.cast(), ss_flags: 0, ss_size: 0x10000 };
    // SAFETY: memory for the handlers alone.
    unsafe { libc::sigaltstack(&stack, ptr::null_mut()) };
    handle(libc::SIGUSR1, enter);
    for signal in [libc::SIGSEGV, libc::SIGBUS, libc::SIGTRAP, libc::SIGILL, libc::SIGFPE] {
        handle(signal, leave);
    }
    const ARCH_SET_GS: i32 = 0x1001;
    // SAFETY: nothing in a process of the host's C library uses gs.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, GS_BASE) };
    // SAFETY: no arguments.
    let (pid, tid) = (std::process::id(), unsafe { libc::gettid() });
    for current in 0..shared().done {
        let rights = shared().runs[current].rights;
        shared().current = current;
        protect(FIRST, ARENA_BYTES, RW);
        for addr in (FIRST..FIRST + ARENA_BYTES).step_by(8) {
            copy(&STOP.to_ne_bytes(), addr);
        }
        protect(FIRST, PAGE, rights[0]);
        protect(SECOND, PAGE, rights[1]);
        // SAFETY: a signal to this thread; its handler and the one that ends the run leave everything as it was.
        unsafe { libc::syscall(libc::SYS_tgkill, pid, tid, libc::SIGUSR1) };
    }
    // SAFETY: leaves without the parent's exit handlers.
    unsafe { libc::_exit(0) }
}

/// Where an operand can be: within the second page, at the end of the first, in both.
fn places(case: &Case) -> Vec<u64> {
    let mut places = vec![SECOND + 64, SECOND - case.size.next_multiple_of(case.align)];
    if case.size > case.align {
        places.push(SECOND - (case.size / 2).next_multiple_of(case.align));
    }
    places
}

fn fs_base() -> u64 {
    const ARCH_GET_FS: i32 = 0x1003;
    let mut base = 0_u64;
    // SAFETY: writes eight bytes to `base`.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_GET_FS, &mut base) };
    base
}

/// All runs, with their code in place.
fn prepare() -> Vec<Run> {
    let fs_base = fs_base();
    let mut runs = Vec::new();
    for (index, case) in CASES.iter().enumerate() {
        for at in places(case) {
            for rights in RIGHTS {
                let slot = CODE + (runs.len() as u64 + 1) * SLOT;
                let shot = Shot::new(case, slot + case.setup.code.len() as u64, fs_base, at);
                copy(case.setup.code, slot);
                copy(&shot.code, shot.regs.rip);
                let regs = Regs { rip: slot, ..shot.regs };
                runs.push(Run { case: index, regs, rights, fetchable: slot + SLOT, after: After::default() });
            }
        }
    }
    // The same at the end of what can be fetched: all of the instruction, all but one byte of it, and so on.
    let mut pages = (CODE + CODE_BYTES / 2..CODE + CODE_BYTES).step_by(2 * PAGE as usize);
    for (index, case) in CASES
        .iter()
        .enumerate()
        .filter(|(_, case)| ["mov [rbx],rax", "push rax", "enter 32,0", "fnsave [rbx]"].contains(&case.name))
    {
        for have in 0..=case.code.len() as u64 {
            let page = pages.next().unwrap();
            let end = page + PAGE;
            let shot = Shot::new(case, end - have, fs_base, SECOND + 64);
            copy(&shot.code[..have as usize], end - have);
            let rights = [NO, NO];
            runs.push(Run { case: index, regs: shot.regs, rights, fetchable: end, after: After::default() });
        }
    }
    runs
}

#[test]
fn the_cpu_agrees() {
    let fixed = libc::MAP_PRIVATE | libc::MAP_FIXED_NOREPLACE;
    let code = map(CODE, CODE_BYTES, RW, fixed);
    map(FIRST, ARENA_BYTES, RW, fixed);
    let stack = map(0, 0x10000, RW, libc::MAP_PRIVATE);
    // SAFETY: the mapping above, of that size.
    unsafe { ptr::write_bytes(code, 0xcc, CODE_BYTES as usize) };
    SHARED.store(map(0, size_of::<Shared>() as u64, RW, libc::MAP_SHARED).cast(), Ordering::Relaxed);

    let runs = prepare();
    shared().runs[..runs.len()].copy_from_slice(&runs);
    shared().done = runs.len();
    protect(CODE, CODE_BYTES / 2, R | libc::PROT_EXEC);
    for page in (CODE + CODE_BYTES / 2..CODE + CODE_BYTES).step_by(2 * PAGE as usize) {
        protect(page, PAGE, R | libc::PROT_EXEC);
    }
    // SAFETY: the child only does what its handlers' comment says.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        child(stack);
    }
    let mut status = 0;
    // SAFETY: waits for the child just made.
    unsafe { libc::waitpid(pid, &mut status, 0) };
    assert_eq!(status, 0, "the child ended in run {}", shared().current);

    let mut wrong = Vec::new();
    let mut decoder = AccessDecoder::new();
    for run in &shared().runs[..runs.len()] {
        let (case, after) = (&CASES[run.case], &run.after);
        if after.signal == libc::SIGILL && case.setup.cpus == Cpus::Some {
            continue;
        }
        let rip = after.regs.rip;
        let in_code = run.regs.rip <= rip && rip < run.fetchable;
        let bytes = if in_code { (run.fetchable - rip).min(15) as usize } else { 0 };
        // SAFETY: the run's code, within the mapping, which nothing writes to any more.
        let bytes = unsafe { std::slice::from_raw_parts(rip as *const u8, bytes) };
        let cpu = match after.error_code {
            _ if after.trap != 14 => None,
            code if code & 16 != 0 => Some(Access::EXEC),
            code if code & 2 != 0 => Some(WRITE),
            _ => Some(READ),
        };
        let decoded = cpu.map(|_| decoder.access_at(bytes, &after.regs, after.addr));
        let faults = run.rights == [NO, NO] || run.rights == [R, R] && case.access == WRITE;
        // An instruction that loads and stores the same bytes (`movs` onto itself) stopped at the store. The engine
        // knows that the page can be read, and that it is one.
        let readable = run.rights[usize::from(after.addr >= SECOND)] != NO;
        let store_behind_load = (cpu, decoded, case.access) == (Some(WRITE), Some(READ), READ) && readable;
        if cpu != decoded && !store_behind_load || faults && cpu.is_none() {
            wrong.push(format!(
                "{} {:?}: CPU {cpu:?}, decoded {decoded:?}: {:x?}",
                case.name, run.rights, after
            ));
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), runs.len(), wrong.join("\n"));
}
