// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Written: which leaves the CPU has set D in since that was cleared, for who asks page by page
//! ([`MmuNotifier::test_clear_dirty`](crate::notifier::MmuNotifier::test_clear_dirty)).
//!
//! Under `mmu_lock` for reading: leaves are changed by one atomic operation each, and neither a report of a dirty log, nor whoever
//! removes leaves, comes in between. A log that goes by D is told of what is taken, as of a leaf that is removed. Where the CPU
//! sets no D ([`AdBits::None`]), it came with W, and W goes with it.
//!
//! Always flushed, and before the lock goes: a CPU that has the leaf cached as dirty does not set D again, and a write that is
//! missed is not tolerated here. What D said is the caller's; A stays.

use super::gather::Gather;
use super::{Core, entry};
use crate::addr::Gfn;
use crate::notifier::WrittenPages;

impl Core {
    /// Adds every page that is asked about and has a leaf with D, and clears that.
    pub(super) fn collect_dirty(&self, pages: &mut WrittenPages) {
        let ad = self.ad_bits();
        let _stable = self.windows.read();
        // Under the lock: a log that begins meanwhile must hear of D.
        let slots = self.slots.read().clone();
        let mut gather = Gather::new(self.tlb.as_ref());
        for (slot, gfns) in slots.parts_of(pages.range()) {
            self.tables.for_each_leaf_table(gfns, |base, table, entries| {
                let mut at = entries.start;
                while at < entries.end {
                    let page = slot.hva_of(Gfn(base + at as u64)).page();
                    // As far as one word of the question goes.
                    let next = (at + 64 - (page % 64) as usize).min(entries.end);
                    let mut asked = pages.asked_from(page) & !0 >> (64 - (next - at));
                    if asked == 0 || !table[at..next].chunks(8).any(entry::is_any_dirty) {
                        asked = 0;
                    }
                    while asked != 0 {
                        let bit = asked.trailing_zeros() as usize;
                        asked &= asked - 1;
                        if let Some(old) = entry::clear_written(&table[at + bit], ad) {
                            let gfn = Gfn(base + (at + bit) as u64);
                            if let Some(log) = slots.log_of(gfn) {
                                log.removed(gfn, old);
                            }
                            pages.add(page + bit as u64);
                            gather.add(gfn, 1, old);
                        }
                    }
                    at = next;
                }
            });
        }
        self.finish(gather);
    }
}
