// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What came out of the dirty rings and nobody has asked for yet.
//!
//! Rings are emptied when one is full and when a vCPU ends; who reports asks when an interval ends, which may be an hour
//! later. A guest chooses which pages it writes, so what is remembered until then has a limit, the same as the shadow map's
//! own bitmap has: so many parts of 128 MiB with a bit a page, and beyond them a part counts as written as a whole.

use shadow_mmu::shadow::DirtyPages;
use std::collections::BTreeSet;

/// Pages of a part.
const PART: u64 = 1 << 15;
/// Parts with a bit a page that are always granted.
const PARTS_LEAST: usize = 256;
/// Beyond that, as many as frames of the guest divided by this. A part's bits fill a page, so that is 1/64 of its memory.
const FRAMES_A_PART: usize = 64;

/// Pages that vCPUs wrote, from their rings.
#[derive(Debug)]
pub(super) struct RingPages {
    pages: DirtyPages,
    /// Parts that have a bit a page; never more than `limit`.
    parts: BTreeSet<u64>,
    limit: usize,
}

impl RingPages {
    /// None yet, of a guest with this many frames.
    pub(super) fn new(frames: usize) -> Self {
        let limit = (frames / FRAMES_A_PART).max(PARTS_LEAST);
        Self { pages: DirtyPages::default(), parts: BTreeSet::new(), limit }
    }

    /// Adds a page, or the part that it is in.
    pub(super) fn insert(&mut self, page: u64) {
        let part = page / PART;
        if self.parts.contains(&part) {
            self.pages.insert(page);
        } else if self.parts.len() < self.limit {
            self.parts.insert(part);
            self.pages.insert(page);
        } else {
            self.pages.add_whole(part * PART..(part + 1) * PART);
        }
    }

    /// All that were added since the last time.
    pub(super) fn take(&mut self) -> DirtyPages {
        self.parts.clear();
        std::mem::take(&mut self.pages)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_writes_everywhere_does_not_make_it_grow() {
        let mut pages = RingPages::new(1024);
        // Every second part, so that no two are one run.
        let written: Vec<u64> = (0..PARTS_LEAST as u64 * 20).map(|n| 2 * n * PART + 7).collect();
        written.iter().for_each(|&page| pages.insert(page));
        written.iter().for_each(|&page| pages.insert(page + 1));
        assert_eq!(pages.parts.len(), PARTS_LEAST);
        let told = pages.take();
        assert!(written.iter().all(|&page| told.contains(page) && told.contains(page + 1)), "none is lost");
        assert_eq!(told.whole_runs().count(), PARTS_LEAST * 19);
        // What has bits is known by the page.
        assert!(!told.contains(written[PARTS_LEAST - 1] + 2) && told.contains(written[PARTS_LEAST] + 2));
        assert_eq!(told.runs().count(), PARTS_LEAST * 20);
        assert!(pages.take().is_empty());
    }

    #[test]
    fn a_large_guest_is_granted_more_and_each_interval_begins_anew() {
        let mut pages = RingPages::new(1 << 20);
        for _ in 0..2 {
            (0..1 << 14).for_each(|part| pages.insert(part * PART));
            let told = pages.take();
            assert_eq!((told.count(), told.whole_runs().count()), (1 << 14, 0));
        }
    }
}
