// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The notifier ops of the shadow map, and the windows that faults check themselves against.
//! After `kvm_mmu_notifier_invalidate_range_start` and its neighbours in `virt/kvm/kvm_main.c`.

use super::{Core, State, gather::Gather};
use crate::addr::{Hva, HvaRange};
use crate::mm::Pte;
use crate::notifier::{Event, Invalidation, MmuNotifier, WouldBlock};
use crate::sync::atomic::Ordering;
use crate::table::LOWER_HALF_PAGES;
use std::ops::Range;

impl State {
    /// Whether a fault whose snapshot is `seq` must not install anything for `gfns` (`mmu_invalidate_retry_gfn`).
    /// `now` is the sequence, read with `mmu_lock` held.
    pub(super) fn must_retry(&self, seq: u64, now: u64, gfns: &Range<u64>) -> bool {
        seq != now || self.in_window(gfns)
    }

    /// Whether some of `gfns` is between a start and its end.
    pub(super) fn in_window(&self, gfns: &Range<u64>) -> bool {
        self.windows.iter().any(|window| window.start < gfns.end && gfns.start < window.end)
    }
}

impl Core {
    /// Counts a removal that is not inside a pair (I5). The caller holds `mmu_lock` for writing.
    fn removed(&self) {
        self.seq.fetch_add(1, Ordering::AcqRel);
    }

    /// Drops the leaves of one page, as a removal of its own.
    fn drop_page(&self, hva: Hva) {
        let slots = self.slots.read().clone();
        let _state = self.state.write();
        let mut gather = Gather::new(self.tlb.as_ref());
        for gfns in slots.gfns_of(HvaRange::page(hva)) {
            self.zap(gfns, &mut gather);
        }
        self.removed();
        self.finish(gather);
    }
}

impl MmuNotifier for Core {
    fn release(&self) {
        let mut state = self.state.write();
        // Both under the lock that faults install under: what was in flight finds one of the two (R17).
        state.released = true;
        self.removed();
        let mut gather = Gather::new(self.tlb.as_ref());
        self.zap(0..LOWER_HALF_PAGES, &mut gather);
        self.finish(gather);
    }

    fn invalidate_range_start(&self, invalidation: &Invalidation) -> Result<(), WouldBlock> {
        *self.active.lock() += 1;
        let slots = self.slots.read().clone();
        let mut hit = slots.gfns_of(invalidation.range).peekable();
        if hit.peek().is_none() {
            return Ok(());
        }
        let mut state = self.state.write();
        let mut gather = Gather::new(self.tlb.as_ref());
        for gfns in hit {
            state.windows.push(gfns.clone());
            self.zap(gfns, &mut gather);
        }
        // With the lock held: whoever comes next and finds nothing left to zap must not run ahead of this flush (R12).
        self.finish(gather);
        if invalidation.event == Event::Unmap {
            self.reclaim_tables_if_many();
        }
        Ok(())
    }

    fn invalidate_range_end(&self, invalidation: &Invalidation) {
        let slots = self.slots.read().clone();
        let mut hit = slots.gfns_of(invalidation.range).peekable();
        if hit.peek().is_some() {
            let mut state = self.state.write();
            // The sequence first, then the window; faults see both at once, because they look under the lock (I4).
            self.seq.fetch_add(1, Ordering::AcqRel);
            for gfns in hit {
                match state.windows.iter().position(|window| *window == gfns) {
                    Some(at) => {
                        state.windows.swap_remove(at);
                    }
                    // A listener that was registered inside the pair; registration excludes that (I9).
                    None => log::error!("end without start for guest frames {gfns:x?}"),
                }
            }
        }
        let mut active = self.active.lock();
        *active -= 1;
        if *active == 0 {
            self.idle.notify_all();
        }
    }

    fn invalidate_page(&self, hva: Hva) {
        self.drop_page(hva);
    }

    /// Maps nothing rather than the new frame: a leaf never changes its frame in place (I17), and inside somebody else's
    /// window the new frame could be gone by its end (R9).
    fn change_pte(&self, hva: Hva, _: Pte) {
        self.drop_page(hva);
    }

    fn clear_flush_young(&self, range: HvaRange) -> bool {
        self.clear_accessed(range, super::age::AfterClear::Flush)
    }

    fn clear_young(&self, range: HvaRange) -> bool {
        self.clear_accessed(range, super::age::AfterClear::LeaveStale)
    }

    fn test_young(&self, hva: Hva) -> bool {
        self.is_accessed(hva)
    }
}
