// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tracees that are gone: how that is learned, and what is said of it.
//!
//! The kernel tells it once, to the tracer that waits. Before there is anything to wait for, requests fail with ESRCH already, and
//! attaching with EPERM. So who learns how a thread ended keeps it for the others ([`Service::why`](super::service::Service::why)).

use super::tracee::{Stop, Tracee};
use libc::c_int;
use std::io;
use std::time::{Duration, Instant};

/// A tracee is gone, and this is why.
#[derive(Debug, Clone, thiserror::Error)]
#[error("the guest's process {0}")]
struct Ended(String);

/// Why a tracee is gone, for one that umbra did not end itself.
pub(super) fn gone(status: c_int) -> io::Error {
    io::Error::other(Ended(if libc::WIFSIGNALED(status) {
        let signal = libc::WTERMSIG(status);
        format!("was ended by signal {signal}, from outside umbra (by hand, or by the OOM killer)")
    } else {
        format!("ended by itself, status {status:#x}")
    }))
}

fn how_it_ended(error: &io::Error) -> Option<&Ended> {
    error.get_ref()?.downcast_ref()
}

/// Whether `error` tells how a tracee ended.
pub(super) fn is_end(error: &io::Error) -> bool {
    how_it_ended(error).is_some()
}

/// Whether `error` is that the tracee is gone, or about to be.
pub(super) fn is_of_its_end(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ESRCH) || is_end(error)
}

impl Tracee {
    /// How it ended, if it has; for its tracer.
    pub(super) fn ended(self) -> Option<io::Error> {
        let mut status = 0;
        // SAFETY: the status is ours.
        match unsafe { libc::waitpid(self.tid, &raw mut status, libc::__WALL | libc::WNOHANG) } {
            0 => None,
            // It was waited for before.
            -1 => Some(io::Error::other(Ended("has ended".to_owned()))),
            _ => (!libc::WIFSTOPPED(status)).then(|| gone(status)),
        }
    }

    /// The same after `error`, which it gave. Of one that is being killed ptrace says that there is none (ESRCH), or that it must not
    /// be attached to (EPERM), some time before there is anything to wait for.
    pub(super) fn ended_with(self, error: &io::Error) -> Option<io::Error> {
        const PATIENCE: Duration = Duration::from_secs(1);
        if let Some(ended) = how_it_ended(error) {
            return Some(io::Error::other(ended.clone()));
        }
        let began = Instant::now();
        loop {
            let ended = self.ended();
            let may_be_dying = matches!(error.raw_os_error(), Some(libc::ESRCH | libc::EPERM));
            if ended.is_some() || !may_be_dying || began.elapsed() > PATIENCE {
                return ended;
            }
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    /// Waits until it exists no more: it ends already.
    pub(super) fn wait_until_gone(self) {
        while let Ok(stop) = self.wait() {
            if let Stop::Gone(_) = stop {
                return;
            }
        }
    }
}
