// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Model checks of shadow-mmu: its own sources run under checkers that decide who runs when.
//!
//! * `tests/shuttle.rs`: the whole crate under [shuttle](https://docs.rs/shuttle), over software vCPUs that walk the sptes.
//!   One scenario for each race of the contract; schedules are drawn at random (half of them) and by PCT.
//! * `tests/loom.rs`: the small protocols under [loom](https://docs.rs/loom), which tries every schedule within bounds, and
//!   every value that the memory model lets a load return.
//! * `mutants/`: changes that break one rule each. Every test runs its scenario with the mutants that it must find.
//!   `build.rs` weaves them, and the checker's locks, into copies of the sources; the sources know nothing of it.
//!
//! # Which race is where
//! Numbers are those of the contract; a test's name begins with them.
//!
//! | races | where |
//! | --- | --- |
//! | R1 to R6, R12, R13, R29, R30 | `shuttle/faults.rs`; R1, R4 to R6 also `loom/sequence.rs` |
//! | R11 | `shuttle/entries.rs`, `loom/entries.rs`; of what is aged or logged: `shuttle/aging.rs`, `loom/tracking.rs` |
//! | R8, R9, R17, R18, R19, R23 | `shuttle/lifetimes.rs`; R17 also `loom/sequence.rs`, R18 also `loom/listeners.rs` |
//! | R15, R24 | `shuttle/slots.rs` |
//! | R16, R20, R20b | `shuttle/dirty.rs`; what logs are made of: `loom/records.rs` |
//! | R21, R22 at fork | `shuttle/changes.rs` |
//! | R32, R33 | `shuttle/intervals.rs`, `shuttle/iotlb.rs`, `loom/listeners.rs` |
//! | R9, R10, R10b, R22, R26, R27, R28 of page sharing | `shuttle/merging.rs`, `shuttle/shared.rs`; R26 also `loom/frames.rs` |
//! | who learns of D when the scanner takes it | `shuttle/written.rs`, `loom/tracking.rs` |
//!
//! No scenario: R7 (a fault of `invalidate_page` that no listener can mend), R11b (needs translations that change under a gfn),
//! R14 (huge pages), R25 (MMIO sptes), R31 (it costs time, and breaks nothing).
//!
//! Not mutants, for nothing can tell them from the code: to look for pins before W is taken (both under one hold of the page-table
//! lock); not to look for pins at all (who has a page pinned to write it has left D in the pte, which stays there while he does);
//! to compare before W is taken (what was written since it was hashed has D, and is left alone); `orig_pte` with D (whoever
//! writes sets W too, which is not in it).
//!
//! # What the checkers do not see
//! * shuttle runs one task at a time, so weak memory orders are loom's business alone; and loom's light fence is as strong as
//!   its heavy one, where the real one leaves the ordering to `membarrier(2)`.
//! * Frames are copied and zeroed by plain accesses, in one step. The words that CPUs and devices use are atomics.
//!
//! # Settings
//! | variable | meaning |
//! | --- | --- |
//! | `UMBRA_SCHEDULES` | schedules of each shuttle scenario; 1000 |
//! | `UMBRA_SEED` | a number that the seeds are drawn from; 0. The same number gives the same schedules |
//! | `UMBRA_SHUTTLE_REPLAY` | `scenario:schedule`: that scenario runs that one schedule and nothing else |
//! | `UMBRA_MUTANT` | a mutant's name: the tests run with it as if it were the code, to see what it does; `none`: without any |
//!
//! `scripts/soak model` runs the scenarios for long.

use std::env;
use std::fmt::Debug;

/// How a test explores.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exploration {
    /// Draws schedules.
    Draw {
        /// How many.
        schedules: usize,
        /// From which seed.
        seed: u64,
    },
    /// Runs one schedule, as shuttle printed it.
    Replay(String),
    /// Does nothing: another scenario is replayed.
    Skip,
}

impl Exploration {
    /// What the environment says for `scenario`.
    ///
    /// # Panics
    /// If a variable is set to something that makes no sense.
    pub fn of(scenario: &str) -> Self {
        Self::from_settings(scenario, |name| env::var(name).ok())
    }

    fn from_settings(scenario: &str, setting: impl Fn(&str) -> Option<String>) -> Self {
        if let Some(replay) = setting("UMBRA_SHUTTLE_REPLAY") {
            let Some((name, schedule)) = replay.split_once(':') else {
                panic!("UMBRA_SHUTTLE_REPLAY is `scenario:schedule`, not {replay:?}");
            };
            return if name == scenario { Self::Replay(schedule.trim().to_owned()) } else { Self::Skip };
        }
        let number = |name: &str, default: u64| match setting(name) {
            None => default,
            Some(text) => {
                text.parse().unwrap_or_else(|error| panic!("{name} is a number, not {text:?}: {error}"))
            }
        };
        // Each scenario draws its own schedules.
        let seed = scenario.bytes().fold(number("UMBRA_SEED", 0), |seed, byte| {
            (seed ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3).rotate_left(23)
        });
        Self::Draw { schedules: number("UMBRA_SCHEDULES", 1000) as usize, seed }
    }
}

/// What a test does about mutants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mutants {
    /// Looks for those that it must find.
    LookFor,
    /// Looks for none.
    None,
    /// Runs this one as if it were the code.
    AsCode(String),
}

impl Mutants {
    /// What the environment says.
    pub fn of_environment() -> Self {
        match env::var("UMBRA_MUTANT") {
            Err(_) => Self::LookFor,
            Ok(name) if name == "none" => Self::None,
            Ok(name) => Self::AsCode(name),
        }
    }

    /// Those of `mutants` to look for, and that of `all` to run as if it were the code.
    ///
    /// # Panics
    /// If there is no mutant of that name.
    pub fn choose<'a, M: Copy + Debug>(&self, mutants: &'a [M], all: &[M]) -> (&'a [M], Option<M>) {
        match self {
            Self::LookFor => (mutants, None),
            Self::None => (&[], None),
            Self::AsCode(name) => {
                let mutant = all.iter().find(|mutant| format!("{mutant:?}") == *name);
                assert!(mutant.is_some(), "UMBRA_MUTANT names no mutant of tests/models/mutants: {name}");
                (&[], mutant.copied())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scenarios_draw_different_schedules_and_the_same_each_time() {
        let of = |scenario| Exploration::from_settings(scenario, |_| None);
        assert_eq!(of("r1"), of("r1"));
        assert_ne!(of("r1"), of("r2"));
    }

    #[test]
    fn a_replay_is_for_one_scenario() {
        let of = |scenario| Exploration::from_settings(scenario, |_| Some("r1:91".into()));
        assert_eq!(of("r1"), Exploration::Replay("91".into()));
        assert_eq!(of("r11"), Exploration::Skip);
    }
}
