// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Aging: whether a page was accessed since it was asked the last time. After `page_referenced_one` and
//! `include/linux/mmu_notifier.h`, whose names the helpers have.
//!
//! The primary's own mark says that a fault found the page through it; what a guest does through its spte only that
//! secondary's mark says. So both are asked, and *both are always cleared*: a helper that stopped at the first "young" would
//! leave a mark behind, and the page would look young once more (I12).
//!
//! # Locks
//! The mmap lock for reading, where the kernel holds the lock of the reverse map: the tables stay. Then the page-table
//! lock, from before the primary's mark is looked at until the last listener has answered, so that the page neither goes
//! nor changes its frame between the two halves of the answer. 2 MiB are one leaf table, hence one lock.
//!
//! A mark may be lost, of a page that is unmapped by a secondary while it stays mapped here: it goes to the frame then
//! ([`FrameFlags::ACCESSED`](crate::frame::FrameFlags::ACCESSED)), where these do not look, but the passes of
//! [generations](super::generations) do. Aging is a guess about the future, and may be wrong.

use super::Mm;
use crate::addr::{Hva, HvaRange, PAGE_SIZE};
use crate::notifier::Notifiers;
use crate::table::{ENTRIES, index};

/// The 2 MiB around `hva`: what one entry of the level above a leaf covers (`PMD_SIZE`).
fn pmd_range(hva: Hva) -> HvaRange {
    HvaRange::pages_from(Hva(hva.0 & !(ENTRIES * PAGE_SIZE - 1)), ENTRIES)
}

impl Mm {
    /// Whether the page at `hva` was accessed since the last clearing. Clears the marks, and has every secondary flush, so that
    /// the next access sets them again.
    pub fn ptep_clear_flush_young_notify(&self, hva: Hva) -> bool {
        self.clear_young(HvaRange::page(hva), Notifiers::clear_flush_young)
    }

    /// As [`ptep_clear_flush_young_notify`](Self::ptep_clear_flush_young_notify), of the 2 MiB around `hva`: whether any
    /// of its pages was accessed. Listeners are called once, for the whole range.
    pub fn pmdp_clear_flush_young_notify(&self, hva: Hva) -> bool {
        self.clear_young(pmd_range(hva), Notifiers::clear_flush_young)
    }

    /// As [`ptep_clear_flush_young_notify`](Self::ptep_clear_flush_young_notify), but secondaries may leave the flush out: an
    /// access through a translation that some CPU has cached may go unseen.
    pub fn ptep_clear_young_notify(&self, hva: Hva) -> bool {
        self.clear_young(HvaRange::page(hva), Notifiers::clear_young)
    }

    /// As [`pmdp_clear_flush_young_notify`](Self::pmdp_clear_flush_young_notify), but secondaries may leave the flush out.
    pub fn pmdp_clear_young_notify(&self, hva: Hva) -> bool {
        self.clear_young(pmd_range(hva), Notifiers::clear_young)
    }

    /// Whether the page at `hva` was accessed since the last clearing. Changes nothing (I48).
    pub fn test_young(&self, hva: Hva) -> bool {
        let _map = self.map.read();
        let leaf = self.lock_leaf(hva);
        leaf.as_ref().is_some_and(|leaf| leaf.get(index(hva.page(), 1)).is_young())
            || self.notifiers.test_young(hva)
    }

    /// Test-and-clear over `range`, which lies in one leaf table; `secondaries` is the listeners' half.
    fn clear_young(&self, range: HvaRange, secondaries: fn(&Notifiers, HvaRange) -> bool) -> bool {
        let _map = self.map.read();
        let leaf = self.lock_leaf(range.start);
        let mut young = false;
        if let Some(leaf) = &leaf {
            let first = index(range.start.page(), 1);
            for at in first..first + range.page_count() as usize {
                let pte = leaf.get(at);
                if pte.is_young() {
                    leaf.set(at, pte.old());
                    young = true;
                }
            }
        }
        // Not `||`: they are to clear theirs too.
        secondaries(&self.notifiers, range) | young
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed test may panic")]
    use super::*;

    #[test]
    fn a_pmd_range_is_aligned_and_holds_its_address() {
        for hva in [0, 0x1000, 0x1f_ffff, 0x20_0000, 0x7fff_ffff_e000] {
            let range = pmd_range(Hva(hva));
            assert!(range.contains(Hva(hva)) && range.start.0.is_multiple_of(2 << 20), "{range}");
            assert_eq!(range.len(), 2 << 20);
        }
    }
}
