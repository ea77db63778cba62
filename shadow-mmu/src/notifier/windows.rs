// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Sequence and windows: how a secondary MMU that looks pages up without its lock knows whether it may install them.
//! `mmu_invalidate_seq`, `mmu_invalidate_in_progress` and `mmu_invalidate_retry_gfn` of `virt/kvm/kvm_main.c`.
//!
//! # Protocol
//! The secondary has one lock, under which it installs and removes translations. [`Windows`] lives under that lock;
//! [`Sequence`] beside it.
//!
//! ```text
//! fault                                            pair
//! F1  snapshot = sequence                          start  lock: open the window; remove; flush; unlock
//! F2  look the page up (slots, primary MMU)               the primary changes its ptes
//! F3  lock: must_retry? then to F1                 end    lock: sequence += 1; close the window; unlock
//!     install; unlock
//! ```
//! * *Install inside a window*: refused, the window is seen at F3 (R1).
//! * *Look-up before the end, install behind it*: refused, F1 came before the end's step of the sequence (R1, R3, R4, R5). This is
//!   why F1 comes before F2 (R2), and why the step is made at the end: a look-up inside the window may still find the old pte.
//! * *Sequence and window change under the lock*, so F3 sees the window still open or the sequence gone on, never neither (I4).
//! * *Every other removal* steps the sequence in the section of the lock that it removes in (I5, R13).
//!
//! Windows are kept exactly, where KVM keeps the hull of all: so no fault waits for a window that its page is not in (R6). The
//! sequence is one for all pages, as in KVM: an end makes whatever was being looked up begin again, once.

use crate::sync::atomic::{AtomicU64, Ordering};
use std::ops::Range;

/// Counts ended windows and every other removal.
#[derive(Debug, Default)]
pub struct Sequence(AtomicU64);

/// The sequence as a fault found it at its beginning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Snapshot(u64);

impl Sequence {
    /// Where a fault begins: before it looks at anything else (I3).
    pub fn snapshot(&self) -> Snapshot {
        // Acquire: nothing that the fault looks up is read before.
        Snapshot(self.0.load(Ordering::Acquire))
    }

    /// Something was removed outside of any pair. The caller holds the lock for writing.
    pub fn removed(&self) {
        self.0.fetch_add(1, Ordering::AcqRel);
    }
}

/// Ranges of page numbers between their start and their end. Under the secondary's lock.
#[derive(Debug, Default)]
pub struct Windows {
    open: Vec<Range<u64>>,
    /// The primary is gone: one window over everything, for ever (R17).
    released: bool,
}

impl Windows {
    /// The start of a pair. The caller holds the lock for writing.
    pub fn open(&mut self, pages: Range<u64>) {
        self.open.push(pages);
    }

    /// The end of a pair over the same pages. The caller holds the lock for writing. False if there was no such start.
    #[must_use]
    pub fn close(&mut self, pages: &Range<u64>, sequence: &Sequence) -> bool {
        // The sequence first, for a reader without the lock: it must not see the window closed and the sequence as before (R3).
        sequence.removed();
        let found = self.open.iter().position(|window| window == pages);
        if let Some(at) = found {
            self.open.swap_remove(at);
        }
        found.is_some()
    }

    /// The primary goes. The caller holds the lock for writing.
    pub fn release(&mut self, sequence: &Sequence) {
        self.released = true;
        sequence.removed();
    }

    /// Whether the primary is gone.
    pub fn is_released(&self) -> bool {
        self.released
    }

    /// Whether some of `pages` are between a start and its end.
    pub fn contains(&self, pages: &Range<u64>) -> bool {
        self.open.iter().any(|window| window.start < pages.end && pages.start < window.end)
    }

    /// Whether what was looked up since `begun` must not be installed for `pages`. The caller holds the lock.
    #[must_use]
    pub fn must_retry(&self, begun: Snapshot, sequence: &Sequence, pages: &Range<u64>) -> bool {
        self.released || begun != sequence.snapshot() || self.contains(pages)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_refuses_its_own_pages_and_its_end_refuses_everyone_who_began_before() {
        let (sequence, mut windows) = (Sequence::default(), Windows::default());
        let before = sequence.snapshot();
        windows.open(10..20);
        assert!(windows.must_retry(before, &sequence, &(19..20)));
        assert!(!windows.must_retry(before, &sequence, &(20..21)), "another page may be installed meanwhile");
        assert!(windows.close(&(10..20), &sequence));
        assert!(windows.must_retry(before, &sequence, &(20..21)));
        assert!(!windows.must_retry(sequence.snapshot(), &sequence, &(10..20)));
    }

    #[test]
    fn r6_equal_windows_close_one_by_one() {
        let (sequence, mut windows) = (Sequence::default(), Windows::default());
        windows.open(0..4);
        windows.open(0..4);
        assert!(windows.close(&(0..4), &sequence));
        assert!(windows.contains(&(3..9)));
        assert!(windows.close(&(0..4), &sequence));
        assert!(!windows.contains(&(0..4)) && !windows.close(&(0..4), &sequence));
    }

    #[test]
    fn r17_after_release_nothing_is_installed() {
        let (sequence, mut windows) = (Sequence::default(), Windows::default());
        windows.release(&sequence);
        assert!(windows.must_retry(sequence.snapshot(), &sequence, &(0..1)));
    }
}
