// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Virtual time: one number, nanoseconds since the start of the run, that only the baton moves.
//!
//! Deadlines all over umbra are [`Instant`]s. So virtual time is one too: an instant of the host's, read once when the run
//! begins and never told to the guest, and the nanoseconds since. Comparing and adding work as with the host's time, and there
//! is one kind of deadline.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The time of day at which every run starts: 1 January 2020, 00:00 UTC, in seconds since 1970.
pub const START: i64 = 1_577_836_800;

/// A clock that stands still until it is moved.
#[derive(Debug)]
pub struct VirtualClock {
    base: Instant,
    nanos: AtomicU64,
}

impl Default for VirtualClock {
    fn default() -> Self {
        Self { base: Instant::now(), nanos: AtomicU64::new(0) }
    }
}

impl VirtualClock {
    /// The time, for deadlines.
    pub fn now(&self) -> Instant {
        self.base + self.elapsed()
    }

    /// The time since the start.
    pub fn elapsed(&self) -> Duration {
        Duration::from_nanos(self.nanos.load(Ordering::Acquire))
    }

    /// The guest waits for `time` inside a call or a fault: a delay that a plan has for it. By the holder of the baton, which
    /// it keeps.
    pub fn pass(&self, time: Duration) {
        self.advance(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
    }

    /// Time goes on. By the holder of the baton.
    pub(super) fn advance(&self, nanos: u64) {
        self.nanos.fetch_add(nanos, Ordering::Release);
    }

    /// Time jumps to `to`; never back.
    pub(super) fn advance_to(&self, to: Instant) {
        let nanos = to.saturating_duration_since(self.base).as_nanos();
        self.nanos.fetch_max(u64::try_from(nanos).unwrap_or(u64::MAX), Ordering::AcqRel);
    }
}
