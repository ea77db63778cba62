// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The notifier ops of the shadow map, and the windows that faults check themselves against.
//! After `kvm_mmu_notifier_invalidate_range_start` and its neighbours in `virt/kvm/kvm_main.c`.

use super::age::AfterClear;
use super::{Core, gather::Gather};
use crate::addr::{Hva, HvaRange};
use crate::mm::Pte;
use crate::notifier::{Event, Invalidation, MmuNotifier, WouldBlock, WrittenPages, YoungPages};
use crate::table::LOWER_HALF_PAGES;

impl Core {
    /// Drops the leaves of one page, as a removal of its own.
    fn drop_page(&self, hva: Hva) {
        let _exclusive = self.windows.write();
        // Under the lock, for there is no pair that would keep them: a log that begins meanwhile must hear of D.
        let slots = self.slots.read().clone();
        let mut gather = Gather::new(self.tlb.as_ref());
        for gfns in slots.gfns_of(HvaRange::page(hva)) {
            self.zap(&slots, gfns, &mut gather);
        }
        self.seq.removed();
        self.finish(gather);
    }
}

impl MmuNotifier for Core {
    fn release(&self) {
        let slots = self.slots.read().clone();
        let mut windows = self.windows.write();
        // Under the lock that faults install under: what was in flight finds it (R17).
        windows.release(&self.seq);
        let mut gather = Gather::new(self.tlb.as_ref());
        self.zap(&slots, 0..LOWER_HALF_PAGES, &mut gather);
        self.finish(gather);
    }

    fn invalidate_range_start(&self, invalidation: &Invalidation) -> Result<(), WouldBlock> {
        *self.active.lock() += 1;
        let slots = self.slots.read().clone();
        let mut hit = slots.gfns_of(invalidation.range).peekable();
        if hit.peek().is_none() {
            return Ok(());
        }
        let mut windows = self.windows.write();
        let mut gather = Gather::new(self.tlb.as_ref());
        for gfns in hit {
            windows.open(gfns.clone());
            self.zap(&slots, gfns, &mut gather);
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
            let mut windows = self.windows.write();
            for gfns in hit {
                if !windows.close(&gfns, &self.seq) {
                    // A listener that was registered inside the pair; registration excludes that (I9).
                    log::error!("end without start for guest frames {gfns:x?}");
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
        self.clear_young_in(range, AfterClear::Flush)
    }

    fn clear_young(&self, range: HvaRange) -> bool {
        self.clear_young_in(range, AfterClear::LeaveStale)
    }

    fn test_young(&self, hva: Hva) -> bool {
        self.is_young(hva)
    }

    fn test_clear_young(&self, young: &mut YoungPages) {
        self.collect_young(young);
    }

    fn test_clear_dirty(&self, pages: &mut WrittenPages) {
        self.collect_dirty(pages);
    }

    fn written(&self, range: HvaRange) {
        self.log_writes(range);
    }
}
