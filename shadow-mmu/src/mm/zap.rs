// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Taking ptes out of a range (`unmap_page_range`), and page tables that became empty.

use super::merge::Merged;
use super::{Mm, Pte, count};
use crate::addr::{Hva, HvaRange, PAGE_SIZE};
use crate::notifier::{Event, InvalidateGuard};
use std::ops::Range;

impl Mm {
    /// Has every secondary let go of its translations of `range`. The ptes stay, so they are found again by the next fault.
    pub fn invalidate_secondaries(&self, range: HvaRange) {
        let _map = self.read_map();
        drop(self.notifiers.invalidate(range, Event::Clear));
    }

    /// Clears every pte of `range` inside one pair and frees what they held. The caller holds the mmap lock.
    pub(super) fn zap(&self, range: HvaRange, event: Event) {
        if !range.is_empty() {
            self.zap_in(range, self.notifiers.invalidate(range, event));
        }
    }

    /// Clears every pte of `range`, over which `pair` is open, ends that, and frees what they held. Returns how many frames
    /// became free. The caller holds the mmap lock.
    ///
    /// The frames go after the end: from the start on no secondary can reach them (I21), and the end may run devices'
    /// flushes that come before the free.
    pub(super) fn zap_in(&self, range: HvaRange, pair: InvalidateGuard<'_>) -> u64 {
        let mut frames = Vec::new();
        let mut cleared = 0;
        let mut merged = Merged::default();
        self.for_each_leaf(range, |base, leaf, entries| {
            // What is read there next are other bytes, but where nobody had ever written; a page of zeros that was merged may have
            // been written over a file's.
            let mut written = entries.start..entries.start;
            let tell = |run: &Range<usize>| {
                let at = |entry: usize| Hva(base.0 + entry as u64 * PAGE_SIZE);
                if !run.is_empty() {
                    self.written(HvaRange { start: at(run.start), end: at(run.end) });
                }
            };
            for at in entries {
                let pte = leaf.get(at);
                if !pte.is_present() {
                    continue;
                }
                leaf.set(at, Pte::NONE);
                frames.extend(pte.counted_frame());
                cleared += 1;
                merged.add(pte);
                if !pte.is_zero() || pte.is_ksm() {
                    if written.end != at {
                        tell(&written);
                        written.start = at;
                    }
                    written.end = at + 1;
                }
            }
            tell(&written);
        });
        drop(pair);
        frames.iter().for_each(|&pfn| self.pool.frame(pfn).remove_map());
        self.sharing.lost(merged);
        count(&self.stats.zapped_pages, cleared);
        self.pool.put_all(&frames) as u64
    }

    /// Frees page tables without an entry in `range`. The caller holds the mmap lock for writing, so nobody walks them.
    pub(super) fn free_empty_tables(&self, range: HvaRange) {
        let tables = self.tables.unlink_empty(range.page_numbers());
        self.tables.free_unlinked(&tables);
    }
}
