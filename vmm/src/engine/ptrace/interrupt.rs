// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Interrupting a tracee: SIGURG to the thread that runs the guest.
//!
//! * A signal to a tracee stops it before it is delivered, whatever the disposition, unless the tracee blocks it: it must
//!   not block SIGURG. A signal that comes before the tracee is resumed is pending and stops it at once, so there is
//!   no gap between entering and running.
//! * One that comes after the tracee stopped for another reason stays pending: the tracee stops once more, later, with
//!   nobody asking. The engine swallows that stop (resumes without the signal) and goes on. So nothing is taken back.
//! * The ids are those of one tracee, for the life of the vCPU. If the tracee is killed, the vCPU's thread may have reaped
//!   it when a sender is at it, and the ids may be another's by then. That does no harm: a process that is not
//!   traced ignores SIGURG by default, and another thread of the child swallows it. This is why it is SIGURG.
//! * Not a real-time signal: it needs no place in a queue, and of several one is pending.

use super::cpu_time;
use super::tracee::Tracee;
use crate::engine::kick::Interrupt;
use std::io;
use std::time::Duration;

/// How a vCPU that is a tracee is interrupted.
#[derive(Debug)]
pub(super) struct TraceeInterrupt {
    process: libc::pid_t,
    thread: libc::pid_t,
}

impl TraceeInterrupt {
    /// The signal whose stops the engine swallows.
    pub(super) const SIGNAL: libc::c_int = libc::SIGURG;

    /// For this thread of the traced child `process`.
    pub(super) const fn new(process: libc::pid_t, thread: libc::pid_t) -> Self {
        Self { process, thread }
    }

    /// Signals the tracee. One that is gone needs none: whoever waits for it learns that.
    fn signal(&self) -> io::Result<()> {
        // SAFETY: takes plain numbers.
        let result = unsafe { libc::syscall(libc::SYS_tgkill, self.process, self.thread, Self::SIGNAL) };
        if result == 0 {
            return Ok(());
        }
        match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            error => Err(error),
        }
    }
}

impl Interrupt for TraceeInterrupt {
    fn entering(&self) {}

    fn send(&self) {
        if let Err(error) = self.signal() {
            log::warn!("cannot signal thread {} of process {}: {error}", self.thread, self.process);
        }
    }

    fn take_back(&self) {}

    fn cpu_time_outside(&self) -> Duration {
        cpu_time::of_thread(Tracee { pid: self.process, tid: self.thread })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Kick;
    use crate::engine::kick::{Kicker, Requests, RunState};
    use crate::engine::ptrace::testing::Spinning;
    use crate::engine::ptrace::tracee::{Resume, Stop};
    use shadow_mmu::inject::Faults;
    use std::sync::Arc;

    fn kicker_of(tracee: Tracee) -> Kicker {
        let state = Arc::new(RunState::new(TraceeInterrupt::new(tracee.pid, tracee.tid)));
        let lease = state.begin_lease();
        Kicker { state, lease, faults: Faults::default() }
    }

    #[test]
    fn a_kick_stops_a_tracee_that_spins() {
        let Some(tracee) = Spinning::new() else { return };
        let kicker = kicker_of(*tracee);
        for _ in 0..100 {
            kicker.state.enter(Requests::empty()).unwrap();
            std::thread::scope(|scope| {
                scope.spawn(|| kicker.kick());
                tracee.resume(Resume::Engine).unwrap();
                assert_eq!(tracee.wait().unwrap(), Stop::Signal(libc::SIGURG));
            });
            kicker.state.leave();
            assert_eq!(kicker.state.enter(Requests::empty()), Err(Requests::KICK));
            kicker.state.take(Requests::KICK);
        }
    }

    #[test]
    fn a_kick_before_the_tracee_is_resumed_is_not_lost() {
        let Some(tracee) = Spinning::new() else { return };
        let kicker = kicker_of(*tracee);
        kicker.state.enter(Requests::empty()).unwrap();
        kicker.kick();
        tracee.resume(Resume::Engine).unwrap();
        assert_eq!(tracee.wait().unwrap(), Stop::Signal(libc::SIGURG));
        kicker.state.leave();
    }

    #[test]
    fn a_tracee_that_is_gone_is_no_error() {
        let Some(tracee) = Spinning::new() else { return };
        let interrupt = TraceeInterrupt::new(tracee.pid, tracee.tid);
        tracee.kill();
        assert!(matches!(tracee.wait().unwrap(), Stop::Gone(_)));
        interrupt.signal().unwrap();
        let nobody = TraceeInterrupt::new(0, 0).signal().unwrap_err();
        assert_eq!(nobody.raw_os_error(), Some(libc::EINVAL));
    }
}
