// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the waits of a plan go by: the host's clock, or in deterministic mode the guest's. There the thread that is delayed keeps
//! the baton, so nobody does anything meanwhile, and the wait is a jump of virtual time.

use crate::deterministic::VirtualClock;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// The host's clock, until another is given.
#[derive(Debug, Default)]
pub struct Waits(OnceLock<Arc<VirtualClock>>);

impl Waits {
    /// From here on waits go by `clock`. The first that is given counts.
    pub fn go_by(&self, clock: &Arc<VirtualClock>) {
        let _ = self.0.set(Arc::clone(clock));
    }

    /// Whether waits are jumps of virtual time.
    pub fn are_virtual(&self) -> bool {
        self.0.get().is_some()
    }

    /// The calling thread waits for `time`.
    pub fn sleep(&self, time: Duration) {
        match self.0.get() {
            Some(clock) => clock.pass(time),
            None => std::thread::sleep(time),
        }
    }
}
