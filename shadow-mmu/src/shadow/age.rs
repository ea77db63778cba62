// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Young: which leaves were accessed since that was cleared. By A, or where the CPU sets none, by leaves that are
//! access-tracked ([`AdBits`]). Leaves are changed by one atomic operation under `mmu_lock` for reading, so nothing else of
//! them can be lost (I48).
//!
//! # Flush
//! After `clear_flush_young`, always. After the others where the CPU needs it: there a page that was not flushed would look
//! idle for as long as the CPU has it cached, however much it is used. Leaves are flushed in batches, and before `mmu_lock`
//! is let go: a leaf that was access-tracked has lost W, and whoever protects it next, and finds nothing to do, must not
//! return before our flush (R16).
//!
//! # Tables that are passed over
//! A CPU on its way to a leaf sets A in the link to its table. When a look at a whole table has found nothing young, A of the
//! link is cleared. When the next look finds it still clear, and again nothing young, the table is noted as idle, and passed
//! over until A of the link is set. Two looks, for a CPU may have set A of the link before it was cleared and set that of the
//! leaf after the first look was there; the second one finds it. What is missed is a CPU that takes longer than the time
//! between two passes from the link to the leaf, and on CPUs that keep links cached, one that got the link from its cache;
//! both until the next [`Look::Everything`]. The ops of 4.x, which answer for every page of their range, look at everything.

use super::gather::Gather;
use super::{AdBits, Core, ShadowMmu, entry};
use crate::addr::{Gfn, Hva, HvaRange};
use crate::notifier::{Look, YoungPages};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::table::{ENTRIES, Link};

/// What follows the clearing of A bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AfterClear {
    /// A flush, so that the next access sets the bit again.
    Flush,
    /// A flush only where no access would ever set the bit again.
    LeaveStale,
}

impl ShadowMmu {
    /// From now on, this is what the CPUs do with A and D, whatever [`Tlb::ad_bits`](super::Tlb::ad_bits) said. To be called
    /// before a guest runs; between the two that set A also later, by who flushes himself.
    pub fn set_ad_bits(&self, ad: AdBits) {
        self.core.ad_bits.store(ad as u32, Ordering::Relaxed);
    }
}

impl Core {
    /// What the CPUs do with A and D.
    pub(super) fn ad_bits(&self) -> AdBits {
        match self.ad_bits.load(Ordering::Relaxed) {
            n if n == AdBits::Unflushed as u32 => AdBits::Unflushed,
            n if n == AdBits::AfterFlush as u32 => AdBits::AfterFlush,
            _ => AdBits::None,
        }
    }

    fn must_flush(&self, after: AfterClear) -> bool {
        after == AfterClear::Flush || self.ad_bits() != AdBits::Unflushed
    }

    /// Clears young in every leaf of `range`; whether any was.
    pub(super) fn clear_young_in(&self, range: HvaRange, after: AfterClear) -> bool {
        let slots = self.slots.read().clone();
        let (ad, flush) = (self.ad_bits(), self.must_flush(after));
        let _stable = self.windows.read();
        let mut gather = Gather::new(self.tlb.as_ref());
        let mut young = false;
        for gfns in slots.gfns_of(range) {
            self.tables.for_each_leaf_table(gfns, |base, table, entries| {
                for at in entries {
                    if let Some(old) = entry::clear_young(&table[at], ad) {
                        young = true;
                        if flush {
                            gather.add(Gfn(base + at as u64), 1, old);
                        }
                    }
                }
            });
        }
        self.finish(gather);
        young
    }

    /// Adds every page of `young.range()` with a young leaf, and clears it.
    pub(super) fn collect_young(&self, young: &mut YoungPages) {
        let slots = self.slots.read().clone();
        let (ad, flush) = (self.ad_bits(), self.must_flush(AfterClear::LeaveStale));
        let skip = young.look() == Look::Marked && ad != AdBits::None;
        let _stable = self.windows.read();
        let mut gather = Gather::new(self.tlb.as_ref());
        for (slot, gfns) in slots.parts_of(young.range()) {
            self.tables.for_each_leaf_link(gfns, |base, link, table, entries| {
                let marks = Link(link.load(Ordering::Acquire));
                if skip && marks.is_idle() {
                    return;
                }
                let whole = entries.len() as u64 == ENTRIES;
                let mut any = false;
                let mut gfn = base + entries.start as u64;
                for some in table[entries].chunks(64) {
                    let mut bits = 0;
                    for (eight, first) in some.chunks(8).zip((0..).step_by(8)) {
                        if !entry::is_any_young(eight, ad) {
                            continue;
                        }
                        for (at, leaf) in (first..).zip(eight) {
                            if let Some(old) = entry::clear_young(leaf, ad) {
                                bits |= 1 << at;
                                if flush {
                                    gather.add(Gfn(gfn + at), 1, old);
                                }
                            }
                        }
                    }
                    if bits != 0 {
                        any = true;
                        young.add_run(slot.hva_of(Gfn(gfn)).page(), bits);
                    }
                    gfn += some.len() as u64;
                }
                if ad != AdBits::None && whole {
                    note(link, marks, any);
                }
            });
        }
        self.finish(gather);
    }

    /// Whether some leaf of the page at `hva` is young. Changes nothing (I48).
    pub(super) fn is_young(&self, hva: Hva) -> bool {
        let slots = self.slots.read().clone();
        let ad = self.ad_bits();
        let _stable = self.windows.read();
        slots.gfns_of(HvaRange::page(hva)).any(|gfns| self.spte(Gfn(gfns.start)).is_young(ad))
    }
}

/// Notes at the link of a table what a look at all of it came to, which began when the link was `seen`.
fn note(link: &AtomicU64, seen: Link, any_young: bool) {
    match (seen.is_accessed(), any_young) {
        // In use.
        (_, true) => {}
        // The first look that found nothing; a walk may be under way.
        (true, false) => _ = link.fetch_and(!(Link::ACCESSED | Link::IDLE), Ordering::AcqRel),
        // The second. A walk that begins now sets A.
        (false, false) => _ = link.fetch_or(Link::IDLE, Ordering::AcqRel),
    }
}
