// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Young: which pages the CPU marked accessed. Leaves are changed by an atomic AND of one bit, under `mmu_lock` for
//! reading: nothing else of the entry can be lost (I48: lost W or D are never tolerated, a lost A is).

use super::gather::Gather;
use super::{Core, entry};
use crate::addr::{Gfn, Hva, HvaRange};

/// What follows the clearing of A bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AfterClear {
    /// A flush, so that the next access sets the bit again.
    Flush,
    /// Nothing: a CPU that has the translation cached may not set it again before it walks anew.
    LeaveStale,
}

impl Core {
    /// Clears A in every leaf of `range`; whether any was set.
    pub(super) fn clear_accessed(&self, range: HvaRange, after: AfterClear) -> bool {
        let slots = self.slots.read().clone();
        let _stable = self.windows.read();
        let mut gather = Gather::new(self.tlb.as_ref());
        let mut young = false;
        for gfns in slots.gfns_of(range) {
            self.tables.for_each_leaf_table(gfns, |base, table, entries| {
                for at in entries {
                    if let Some(old) = entry::clear_accessed(&table[at]) {
                        young = true;
                        if after == AfterClear::Flush {
                            gather.add(Gfn(base + at as u64), 1, old);
                        }
                    }
                }
            });
        }
        self.finish(gather);
        young
    }

    /// Whether some leaf of the page at `hva` has A. Changes nothing (I48).
    pub(super) fn is_accessed(&self, hva: Hva) -> bool {
        let slots = self.slots.read().clone();
        let _stable = self.windows.read();
        slots.gfns_of(HvaRange::page(hva)).any(|gfns| self.spte(Gfn(gfns.start)).is_accessed())
    }
}
