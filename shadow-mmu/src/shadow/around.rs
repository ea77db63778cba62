// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How much a fault brings along.
//!
//! A fault costs an exit, tens of microseconds; installing one more leaf costs tens of nanoseconds. So a fault carries, besides
//! the page that must be there, a range of pages that may come. Which range is a guess about what the guest touches next:
//!
//! * *Adaptive*: a fault that continues a run, upward or downward, doubles that run's window, up to 2 MiB; one that continues
//!   none starts a run of a single page and halves the windows of the others. Since a window is never larger than what its run
//!   has used before, at most as much memory as was used is brought in for nothing. Several runs are followed at a time,
//!   because copying, merging and sorting walk several.
//! * Alone, a page brings only neighbours that are mapped already, from the 16 pages around it.
//! * A page that is found by a run's window never faults, so runs are followed by their edges.

use crate::addr::{Access, Hva, HvaRange, PAGE_SIZE};
use crate::mm::{Ahead, FaultRequest};

/// Pages in the largest window: 2 MiB, what one table covers.
const MOST_PAGES: u64 = 512;
/// Pages of which mapped ones come along with a page that continues no run (`fault_around_bytes`, 64 KiB).
const NEIGHBOURS: u64 = 16;
/// Runs followed at a time.
const RUNS: usize = 8;

/// What a fault may bring along.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FaultAroundPolicy {
    /// Nothing.
    Off,
    /// The naturally aligned block of this many pages (a power of two), new pages included.
    Fixed(u64),
    /// What the faults so far suggest.
    #[default]
    Adaptive,
}

#[derive(Debug, Clone, Copy, Default)]
struct Run {
    /// The pages right below and right above what the run has brought in.
    below: u64,
    above: u64,
    /// Size of its last window.
    pages: u64,
    /// When it was last continued.
    used: u64,
}

/// The memory of one vCPU's faults.
#[derive(Debug, Clone)]
pub struct FaultAround {
    policy: FaultAroundPolicy,
    runs: [Run; RUNS],
    faults: u64,
}

impl FaultAround {
    /// No faults seen yet.
    pub fn new(policy: FaultAroundPolicy) -> Self {
        Self { policy, runs: [Run::default(); RUNS], faults: 0 }
    }

    /// What to ask the primary for, for a fault at `hva`. Counts the fault.
    pub fn request(&mut self, hva: Hva, access: Access) -> FaultRequest {
        let page = hva.page();
        let (first, pages, ahead) = match self.policy {
            FaultAroundPolicy::Off => (page, 1, Ahead::MappedOnly),
            FaultAroundPolicy::Fixed(pages) => (page - page % pages.max(1), pages.max(1), Ahead::Populate),
            FaultAroundPolicy::Adaptive => match self.follow(page) {
                (_, 1) => (page - page % NEIGHBOURS, NEIGHBOURS, Ahead::MappedOnly),
                (first, pages) => (first, pages, Ahead::Populate),
            },
        };
        FaultRequest { hva, access, around: HvaRange::pages_from(Hva(first * PAGE_SIZE), pages), ahead }
    }

    /// First page and size of the window for a fault at `page`.
    fn follow(&mut self, page: u64) -> (u64, u64) {
        self.faults += 1;
        let now = self.faults;
        let hit = self.runs.iter_mut().find(|run| run.used > 0 && (run.above == page || run.below == page));
        if let Some(run) = hit {
            run.used = now;
            run.pages = (run.pages * 2).min(MOST_PAGES);
            return if run.above == page {
                run.above = page + run.pages;
                (page, run.pages)
            } else {
                // Downward: the window ends with the page.
                let first = (page + 1).saturating_sub(run.pages);
                run.below = first.saturating_sub(1);
                (first, page + 1 - first)
            };
        }
        self.runs.iter_mut().for_each(|run| run.pages = (run.pages / 2).max(1));
        let oldest = self.runs.iter_mut().min_by_key(|run| run.used);
        if let Some(run) = oldest {
            *run = Run { below: page.saturating_sub(1), above: page + 1, pages: 1, used: now };
        }
        (page, 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Faults taken, and pages brought in, when `pages` are touched in order and windows are filled.
    fn touch(around: &mut FaultAround, pages: impl Iterator<Item = u64>) -> (usize, usize) {
        let mut there = std::collections::BTreeSet::new();
        let mut faults = 0;
        for page in pages {
            if there.contains(&page) {
                continue;
            }
            faults += 1;
            let request = around.request(Hva(page * PAGE_SIZE), Access::WRITE);
            assert!(request.around.contains(request.hva), "the window holds its page");
            there.insert(page);
            if request.ahead == Ahead::Populate {
                there.extend(request.around.page_numbers());
            }
        }
        (faults, there.len())
    }

    #[test]
    fn a_sequential_touch_costs_a_handful_of_faults_in_either_direction() {
        let up = touch(&mut FaultAround::new(FaultAroundPolicy::Adaptive), 1000..11_000);
        let down = touch(&mut FaultAround::new(FaultAroundPolicy::Adaptive), (1000..11_000).rev());
        for (faults, brought) in [up, down] {
            assert!(faults <= 30, "{faults} faults");
            assert!(brought < 10_600, "{brought} pages brought in for 10000");
        }
    }

    #[test]
    fn a_random_touch_brings_in_next_to_nothing_unasked() {
        let mut seed = 1u64;
        let pages: Vec<u64> = (0..5000)
            .map(|_| {
                seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (seed >> 33) % (1 << 20)
            })
            .collect();
        let distinct = pages.iter().collect::<std::collections::BTreeSet<_>>().len();
        let (_, brought) = touch(&mut FaultAround::new(FaultAroundPolicy::Adaptive), pages.into_iter());
        assert!(brought <= distinct + distinct / 100, "{brought} pages for {distinct}");
    }

    #[test]
    fn two_interleaved_runs_are_both_followed() {
        let pages = (0..4000).flat_map(|page| [page, 1_000_000 + page]);
        let (faults, _) = touch(&mut FaultAround::new(FaultAroundPolicy::Adaptive), pages);
        assert!(faults <= 40, "{faults} faults");
    }

    #[test]
    fn the_first_and_the_last_page_are_no_special_case() {
        let mut around = FaultAround::new(FaultAroundPolicy::Adaptive);
        touch(&mut around, (0..3).rev());
        let last = crate::addr::TASK_SIZE / PAGE_SIZE - 1;
        touch(&mut around, [last - 2, last - 1, last].into_iter());
    }

    #[test]
    fn a_fixed_window_is_aligned() {
        let request = FaultAround::new(FaultAroundPolicy::Fixed(16)).request(Hva(0x25_000), Access::READ);
        assert_eq!(request.around.page_numbers(), 0x20..0x30);
    }
}
