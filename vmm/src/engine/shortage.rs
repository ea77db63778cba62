// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How long a vCPU puts up with a host that has no memory for what it needs next: by KVM the tables that KVM_RUN allocates before it
//! maps a page (`mmu_topup_memory_caches`), by ptrace the mapping of a page in the guest's process.
//!
//! Either fails with ENOMEM when the host has no page left at that moment; the host may find some the next moment. So it is tried
//! again, after pauses that double, and given up when ten were sat out, about a second: a host that is short for longer is not going
//! to run this guest. A pause that was cut short, because the vCPU was wanted, does not count.

use std::time::{Duration, Instant};

const FIRST: Duration = Duration::from_millis(1);
/// Pauses of 1, 2, 4, … 512 ms: 1.023 s.
const TRIES: u32 = 10;
/// How often who pauses looks whether it is wanted.
const LOOK: Duration = Duration::from_millis(2);

/// What to do after a failure for want of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// To try again, unless the vCPU is wanted for something else.
    Again,
    /// The host has been short for too long.
    GiveUp,
}

/// Pauses in a row that were sat out. A success ends the row: who has one makes a new value.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shortage {
    paused: u32,
}

impl Shortage {
    /// After one more failure for want of memory: sits a pause out, or as much of it as there is until `is_wanted`.
    pub(super) fn sit_out(&mut self, is_wanted: impl Fn() -> bool) -> Next {
        let Some(pause) = self.pause() else { return Next::GiveUp };
        log::debug!("the host has no memory for a vCPU; it is tried again in {pause:?}");
        self.wait(pause, is_wanted);
        Next::Again
    }

    /// How long to pause before the next try; `None`: it is not to be tried again.
    fn pause(self) -> Option<Duration> {
        (self.paused < TRIES).then(|| FIRST * 2u32.pow(self.paused))
    }

    /// Waits for `pause`, or until `is_wanted`, which is asked every [`LOOK`]: a kick sends no signal to a vCPU that is
    /// outside the guest.
    fn wait(&mut self, pause: Duration, is_wanted: impl Fn() -> bool) {
        let until = Instant::now() + pause;
        while !is_wanted() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                self.paused += 1;
                return;
            }
            std::thread::sleep(left.min(LOOK));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_about_a_second_in_all_and_end() {
        let pauses: Vec<_> = (0..).map_while(|paused| Shortage { paused }.pause()).collect();
        assert_eq!(pauses.len(), TRIES as usize);
        assert!(pauses.windows(2).all(|pair| pair[1] == 2 * pair[0]), "{pauses:?}");
        assert_eq!(pauses.iter().sum::<Duration>(), Duration::from_millis(1023));
        assert_eq!(Shortage { paused: TRIES }.sit_out(|| false), Next::GiveUp);
        let mut first = Shortage::default();
        assert_eq!((first.sit_out(|| false), first), (Next::Again, Shortage { paused: 1 }));
    }

    #[test]
    fn who_is_wanted_waits_no_longer_and_that_does_not_count() {
        let mut shortage = Shortage::default();
        // Would not come back within anybody's patience otherwise.
        shortage.wait(Duration::from_secs(1 << 20), || true);
        let looks = std::cell::Cell::new(0);
        shortage.wait(Duration::from_secs(1 << 20), || {
            looks.set(looks.get() + 1);
            looks.get() == 3
        });
        assert_eq!((looks.get(), shortage), (3, Shortage::default()));
        shortage.wait(FIRST, || false);
        assert_eq!(shortage, Shortage { paused: 1 });
    }
}
