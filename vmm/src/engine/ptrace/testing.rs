// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A traced child for tests of what needs no guest.

use super::tracee::{Stop, Tracee};
use crate::engine::EngineKind;
use crate::engine::testing::config;
use std::io;
use std::ops::Deref;

/// A process that is forked and stopped once, and spins when it is resumed. Of the thread that made it: no other can trace or wait for
/// it. It dies with this value, or with that thread.
#[derive(Debug)]
pub(super) struct Spinning(Tracee);

impl Spinning {
    /// `None`, and one line, where guests cannot be traced here ([`config`]).
    pub(super) fn new() -> Option<Self> {
        config(EngineKind::Ptrace)?;
        // SAFETY: the child of a process with threads makes only calls that a signal handler may make.
        let pid = unsafe { libc::fork() };
        assert!(pid >= 0, "fork: {}", io::Error::last_os_error());
        if pid == 0 {
            spin();
        }
        let child = Self(Tracee { pid, tid: pid });
        assert_eq!(child.wait().unwrap(), Stop::Signal(libc::SIGSTOP));
        child.set_options().unwrap();
        Some(child)
    }

    /// Ends it. A [`wait`](Tracee::wait) tells when it is gone.
    pub(super) fn kill(&self) {
        // SAFETY: takes plain numbers. The child is not reaped, so the id is its own.
        unsafe { libc::kill(self.pid, libc::SIGKILL) };
    }
}

impl Deref for Spinning {
    type Target = Tracee;

    fn deref(&self) -> &Tracee {
        &self.0
    }
}

impl Drop for Spinning {
    fn drop(&mut self) {
        if self.ended().is_none() {
            self.kill();
            self.wait_until_gone();
        }
    }
}

/// What the child does.
fn spin() -> ! {
    // Files that this process closes are to be closed: tests beside this one look at the other end.
    // SAFETY: closes descriptors of a process that uses none.
    unsafe { libc::close_range(0, libc::c_uint::MAX, 0) };
    // SAFETY: takes no memory.
    if unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) } != 0 {
        // SAFETY: ends the process.
        unsafe { libc::_exit(1) };
    }
    // SAFETY: stops the process.
    unsafe { libc::raise(libc::SIGSTOP) };
    loop {
        std::hint::spin_loop();
    }
}
