// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `restart_syscall`: how a wait for a relative time goes on after an interruption that came to nothing, with what is left
//! of the time and not with all of it again (`struct restart_block`).

use super::errno::{Errno, SysResult};
use super::futex::{self, FutexWait};
use super::poll;
use super::thread::Thread;
use super::time::{self, Sleep};
use std::time::Instant;

/// The wait to go on with.
#[derive(Debug, Clone, Copy, Default)]
pub(super) enum Restart {
    /// There is none: `restart_syscall` fails with `EINTR`.
    #[default]
    None,
    /// `nanosleep`, `clock_nanosleep`.
    Sleep(Sleep),
    /// `futex` with a time-out.
    Futex(FutexWait),
    /// `poll`.
    Poll {
        /// The array in the guest's memory.
        fds: u64,
        /// Its length.
        count: u32,
        /// When the time is over.
        deadline: Option<Instant>,
    },
}

pub(super) fn restart_syscall(t: &mut Thread) -> SysResult {
    match std::mem::take(&mut t.restart) {
        Restart::None => Err(Errno::EINTR),
        Restart::Sleep(sleep) => time::sleep(t, sleep),
        Restart::Futex(wait) => futex::wait(t, wait),
        Restart::Poll { fds, count, deadline } => poll::poll_until(t, fds, count, deadline),
    }
}
