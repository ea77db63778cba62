// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A traced child for tests: forked, stopped once, and spinning when it is resumed. Of the thread that made it: no other
//! can trace or wait for it. It dies with this value, or with that thread.

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::io;
use std::ptr::null_mut;

#[derive(Debug)]
pub(super) struct Tracee {
    pid: libc::pid_t,
    reaped: Cell<bool>,
}

/// What a wait for it said.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// It is stopped with this signal about to be delivered.
    Signal(c_int),
    /// It is dead and reaped.
    Gone,
}

impl Tracee {
    pub(super) fn spinning() -> Self {
        // SAFETY: the child of a process with threads makes only calls that a signal handler may make.
        let pid = unsafe { libc::fork() };
        assert!(pid >= 0, "fork: {}", io::Error::last_os_error());
        if pid == 0 {
            // SAFETY: takes no memory.
            let traced = unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) };
            if traced != 0 {
                // SAFETY: ends the process.
                unsafe { libc::_exit(1) };
            }
            // SAFETY: stops the process.
            unsafe { libc::raise(libc::SIGSTOP) };
            loop {
                std::hint::spin_loop();
            }
        }
        let tracee = Self { pid, reaped: Cell::new(false) };
        assert_eq!(tracee.wait(), Stop::Signal(libc::SIGSTOP), "is ptrace allowed here?");
        let exit_kill = libc::PTRACE_O_EXITKILL as usize as *mut c_void;
        tracee.ptrace(libc::PTRACE_SETOPTIONS, 0, exit_kill).unwrap();
        tracee
    }

    pub(super) fn pid(&self) -> libc::pid_t {
        self.pid
    }

    /// Lets it go on, without the signal that it stopped with.
    pub(super) fn resume(&self) {
        self.ptrace(libc::PTRACE_CONT, 0, null_mut()).unwrap();
    }

    /// Waits for its next stop, or its end.
    pub(super) fn wait(&self) -> Stop {
        let mut status = 0;
        // SAFETY: `status` is ours.
        let waited = unsafe { libc::waitpid(self.pid, &raw mut status, 0) };
        assert_eq!(waited, self.pid, "waitpid: {}", io::Error::last_os_error());
        if libc::WIFSTOPPED(status) {
            Stop::Signal(libc::WSTOPSIG(status))
        } else {
            self.reaped.set(true);
            Stop::Gone
        }
    }

    pub(super) fn kill(&self) {
        // SAFETY: takes plain numbers. The child is not reaped, so the id is its own.
        unsafe { libc::kill(self.pid, libc::SIGKILL) };
    }

    /// Reads a register set into `buffer`: its length.
    pub(super) fn register_set(&self, kind: usize, buffer: &mut [u8]) -> io::Result<usize> {
        self.transfer(libc::PTRACE_GETREGSET, kind, buffer)
    }

    /// Loads a register set. The kernel only reads `buffer`.
    pub(super) fn set_register_set(&self, kind: usize, buffer: &mut [u8]) -> io::Result<usize> {
        self.transfer(libc::PTRACE_SETREGSET, kind, buffer)
    }

    fn transfer(&self, request: libc::c_uint, kind: usize, buffer: &mut [u8]) -> io::Result<usize> {
        let mut iovec = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
        self.ptrace(request, kind, (&raw mut iovec).cast())?;
        Ok(iovec.iov_len)
    }

    fn ptrace(&self, request: libc::c_uint, address: usize, data: *mut c_void) -> io::Result<()> {
        // SAFETY: the callers above pass what the request wants: a number, or an iovec over a live buffer.
        let result = unsafe { libc::ptrace(request, self.pid, address as *mut c_void, data) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

impl Drop for Tracee {
    fn drop(&mut self) {
        if !self.reaped.get() {
            self.kill();
            // SAFETY: no status is asked for.
            unsafe { libc::waitpid(self.pid, null_mut(), 0) };
        }
    }
}
