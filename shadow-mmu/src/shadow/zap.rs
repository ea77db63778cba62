// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Removing leaves, and page tables that have none left.
//!
//! A table that became empty stays linked: the next fault beside it needs it again, and unlinking one needs the dearest
//! flush there is (a KVM that shadows guest tables goes on using the table it knows under an entry that it has cached, so
//! a table's frame may be reused only when everything was dropped). Empty tables are looked for when there are twice as many
//! tables as were left the last time, and then one full flush pays for all of them.

use super::gather::Gather;
use super::{Core, Memslots, Spte, entry};
use crate::addr::Gfn;
use crate::frame::FrameFlags;
use crate::sync::atomic::Ordering;
use crate::table::LOWER_HALF_PAGES;
use std::ops::Range;

/// Tables that are kept without a look: 1 MiB of them.
pub(super) const RECLAIM_LEAST: usize = 256;

impl Core {
    /// Removes every leaf in `gfns` and adds it to `gather`; its A and D go to the frame (I25), and to the log that `slots`
    /// have for it. The caller holds `mmu_lock` for writing.
    pub(super) fn zap(&self, slots: &Memslots, gfns: Range<u64>, gather: &mut Gather<'_>) {
        let (logged, mut zapped) = (slots.is_any_logged(), 0);
        self.tables.for_each_leaf_table(gfns, |base, table, entries| {
            for at in entries {
                let old = entry::take(&table[at]);
                if old == Spte::NONE {
                    continue;
                }
                self.hand_over_marks(old);
                let gfn = Gfn(base + at as u64);
                if logged && let Some(log) = slots.log_of(gfn) {
                    log.removed(gfn, old);
                }
                gather.add(gfn, 1, old);
                zapped += 1;
            }
        });
        self.stats.zapped.fetch_add(zapped, Ordering::Relaxed);
        self.stats.pages_4k.fetch_sub(zapped, Ordering::Relaxed);
    }

    /// Tells the frame what the CPU noted in a leaf that is lost.
    pub(super) fn hand_over_marks(&self, old: Spte) {
        if !self.pool.contains(old.pfn()) {
            // Of an adopted mapping: the host's kernel keeps marks of its own for it.
            return;
        }
        let mut flags = FrameFlags::empty();
        flags.set(FrameFlags::ACCESSED, old.is_young(self.ad_bits()));
        flags.set(FrameFlags::DIRTY | FrameFlags::WRITTEN, old.is_dirty());
        self.pool.hand_over_marks(old.pfn(), flags);
    }

    /// Flushes `gather` while the caller still holds `mmu_lock`.
    pub(super) fn finish(&self, mut gather: Gather<'_>) {
        if gather.flush() > 0 {
            self.stats.flushes.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Reclaims empty tables if there are many. The caller holds `mmu_lock` for writing.
    pub(super) fn reclaim_tables_if_many(&self) {
        if self.tables.count() >= self.reclaim_at.load(Ordering::Relaxed) {
            self.reclaim_tables();
        }
    }

    /// Frees every table without a leaf. The caller holds `mmu_lock` for writing. Returns how many there were.
    pub(super) fn reclaim_tables(&self) -> usize {
        let tables = self.tables.unlink_empty(0..LOWER_HALF_PAGES);
        if !tables.is_empty() {
            self.tlb.flush_all();
            self.tables.free_unlinked(&tables);
            self.stats.flushes.fetch_add(1, Ordering::Relaxed);
            self.stats.tables_reclaimed.fetch_add(tables.len() as u64, Ordering::Relaxed);
        }
        self.reclaim_at.store((2 * self.tables.count()).max(RECLAIM_LEAST), Ordering::Relaxed);
        tables.len()
    }
}
