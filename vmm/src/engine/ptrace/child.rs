// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest's process: how it comes to be, and what is left in it when a guest may run there.
//!
//! 1. A thread of umbra, which serves the process from then on, forks. The new process gets the pool as its descriptor 0 and all
//!    others closed, a session of its own, SIGKILL for when that thread ends, asks to be traced, and executes a program of three
//!    bytes from memory ([`boot`]): nothing of umbra's memory, environment or arguments is in it any more.
//! 2. That program's one system call maps the stub; the stub's unmaps everything else: the program, its stack, the vDSO.
//! 3. It gives up privileges, and a filter refuses whatever is not the engine's ([`filter`]).
//!
//! Its first two threads never run guest code. The second, the worker, makes all others, and unmaps for threads of umbra that trace
//! none. The first does nothing any more: a process's first thread can be waited for only when all others have been, so who makes a
//! call with it would not learn that the process was killed while another tracer waits for the caller.

use super::StubFrames;
use super::boot;
use super::error::{EXEC, PtraceError, SEIZE, TRACE, UNMAP};
use super::filter;
use super::gone::gone;
use super::stub::{self, LIST, MAP_FLAGS, POOL_FD, STUB, STUB_END};
use super::tracee::{Stop, Tracee};
use libc::{c_char, c_int, pid_t};
use shadow_mmu::addr::{LINUX_TASK_SIZE, PAGE_SIZE};
use shadow_mmu::frame::FramePool;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

fn checked(result: c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The highest descriptor that is open, if /proc says.
fn highest_descriptor() -> Option<RawFd> {
    let open = std::fs::read_dir("/proc/self/fd").ok()?;
    open.filter_map(|fd| fd.ok()?.file_name().to_str()?.parse().ok()).max()
}

/// Marks every descriptor from `first` on, to `highest` at least, to be closed by exec.
fn close_on_exec(first: RawFd, highest: RawFd) {
    // SAFETY: changes a flag of descriptors of this process, which is about to execute something else.
    let result =
        unsafe { libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    if result == 0 {
        return;
    }
    // Before Linux 5.11.
    // SAFETY: takes a number.
    let most = unsafe { libc::sysconf(libc::_SC_OPEN_MAX) }.clamp(1024, 1 << 20) as RawFd;
    // Those that were opened before the limit was lowered are above it.
    for fd in first..most.max(highest + 1) {
        // SAFETY: as above.
        unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
    }
}

/// Blocks all signals for the calling thread, which is for nothing else than to serve the process. But for SIGTRAP, by which the
/// process tells its tracer that it has executed: one that is blocked is told by the first fault.
fn block_signals() {
    // SAFETY: a sigset_t is a bit map, and zeros are an empty one.
    let mut all: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: fills in a set of ours.
    unsafe { libc::sigfillset(&raw mut all) };
    // SAFETY: changes a set of ours.
    unsafe { libc::sigdelset(&raw mut all, libc::SIGTRAP) };
    // SAFETY: reads a set of ours, and changes the mask of this thread alone.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const all, std::ptr::null_mut()) };
}

/// What the new process does between fork and exec. Async-signal-safe.
fn become_guest(
    parent: pid_t,
    pool: RawFd,
    program: RawFd,
    highest: RawFd,
) -> io::Result<std::convert::Infallible> {
    // SAFETY: takes numbers. The signal is for the end of the thread that forked, which serves this process.
    checked(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) })?;
    // SAFETY: takes nothing.
    if unsafe { libc::getppid() } != parent {
        return Err(io::Error::from_raw_os_error(libc::ECHILD));
    }
    // Signals of the terminal are for umbra. Fails only for the first of a group, which this process is not.
    // SAFETY: takes nothing.
    unsafe { libc::setsid() };
    // SAFETY: takes numbers.
    checked(unsafe { libc::dup2(pool, POOL_FD as RawFd) })?;
    close_on_exec(POOL_FD as RawFd + 1, highest);
    // SAFETY: takes numbers.
    if unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) } != 0 {
        // Told from a failed exec by a number that that cannot give.
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    let (arguments, environment) = ([boot::NAME.as_ptr(), std::ptr::null()], [std::ptr::null::<c_char>()]);
    // SAFETY: both arrays end with a null pointer; it comes back only with an error.
    unsafe { libc::fexecve(program, arguments.as_ptr(), environment.as_ptr()) };
    Err(io::Error::last_os_error())
}

/// Starts the process, whose tracer the calling thread is from then on, and empties it: its worker. `stub` are frames of
/// `pool`, of which this fills in the first.
///
/// # Errors
/// [`PtraceError`]; no process is left then.
pub(super) fn start(pool: &FramePool, stub: StubFrames) -> Result<Tracee, PtraceError> {
    // The new process begins with the same, and has no tracer yet who would keep a signal from ending it.
    block_signals();
    let program = boot::file().map_err(PtraceError::child(EXEC))?;
    let (pool_fd, program_fd) = (pool.file().as_raw_fd(), program.as_raw_fd());
    let parent = std::process::id() as pid_t;
    let highest = highest_descriptor().unwrap_or_default();
    // What is named here is not executed: `become_guest` executes, or says why not.
    let mut command = Command::new("umbra-guest");
    // Nothing is opened for it: it closes all that it inherits.
    command.stdin(Stdio::inherit()).stdout(Stdio::inherit()).stderr(Stdio::inherit());
    // SAFETY: what runs between fork and exec makes system calls only, and allocates nothing.
    unsafe {
        command
            .pre_exec(move || become_guest(parent, pool_fd, program_fd, highest).map(|never| match never {}))
    };
    let child = command.spawn().map_err(|error| match error.raw_os_error() {
        Some(libc::ESRCH) => PtraceError::child(TRACE)(io::Error::from_raw_os_error(libc::EPERM)),
        _ => PtraceError::child(EXEC)(error),
    })?;
    let pid = child.id() as pid_t;
    let tracee = Tracee { pid, tid: pid };
    let worker = empty(tracee, pool, stub)
        .and_then(|()| tracee.new_thread().map_err(|source| PtraceError::Thread { source }))
        .inspect_err(|_| end(tracee))?;
    // It may be traced all the same, and then has to be waited for before the first thread can be.
    worker.seize().map_err(PtraceError::child(SEIZE)).inspect_err(|_| end(worker))?;
    Ok(worker)
}

/// Ends the process that `worker` is a thread of and waits for it, and for `worker` itself. All others that are traced must be gone
/// or be waited for by their tracers, or this waits as well. For the thread that started it.
pub(super) fn end(worker: Tracee) {
    let leader = Tracee { pid: worker.pid, tid: worker.pid };
    if leader.ended().is_some() {
        // Waited for: its number may be another's.
        return;
    }
    // SAFETY: takes numbers; the process is our child, and waited for below.
    unsafe { libc::kill(worker.pid, libc::SIGKILL) };
    worker.wait_until_gone();
    leader.wait_until_gone();
}

/// Makes the program that was just executed an empty process with the stub in it.
fn empty(tracee: Tracee, pool: &FramePool, stub: StubFrames) -> Result<(), PtraceError> {
    match tracee.wait().map_err(PtraceError::child("waiting for it"))? {
        Stop::Signal(libc::SIGTRAP) => {}
        Stop::Gone(status) => return Err(PtraceError::child("executing it")(gone(status))),
        other => {
            let what = io::Error::other(format!("it stopped with {other:?}"));
            return Err(PtraceError::child("executing it")(what));
        }
    }
    tracee.set_options().map_err(PtraceError::child("ptrace(PTRACE_SETOPTIONS)"))?;
    pool.write(stub.code, 0, &stub::page());
    for (at, rights, pfn) in
        [(STUB, libc::PROT_READ | libc::PROT_EXEC, stub.code), (LIST, libc::PROT_READ, stub.list)]
    {
        let arguments = [at, PAGE_SIZE, rights as u64, MAP_FLAGS as u64, POOL_FD, pfn.offset()];
        tracee
            .call_at(boot::CODE, libc::SYS_mmap, &arguments)
            .map_err(PtraceError::child("mapping the stub (mmap)"))?;
    }
    for (start, end) in [(0, STUB), (STUB_END, LINUX_TASK_SIZE)] {
        tracee.call(libc::SYS_munmap, &[start, end - start]).map_err(PtraceError::child(UNMAP))?;
    }
    let prctl = |what: c_int, argument: u64| tracee.call(libc::SYS_prctl, &[what as u64, argument, 0, 0, 0]);
    pool.write(stub.list, 0, boot::NAME.to_bytes_with_nul());
    prctl(libc::PR_SET_NAME, LIST).map_err(PtraceError::child("naming it"))?;
    prctl(libc::PR_SET_NO_NEW_PRIVS, 1).map_err(PtraceError::child("prctl(PR_SET_NO_NEW_PRIVS)"))?;
    pool.write(stub.list, 0, &filter::as_bytes());
    // Speculation is the guest's own affair: it has nothing in its process but itself. Before Linux 4.17 there is no such flag.
    let install =
        |flags| tracee.call(libc::SYS_seccomp, &[libc::SECCOMP_SET_MODE_FILTER as u64, flags, LIST]);
    install(libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW)
        .or_else(|_| install(0))
        .map_err(PtraceError::child("installing its filter (seccomp)"))?;
    pool.zero(stub.list);
    Ok(())
}
