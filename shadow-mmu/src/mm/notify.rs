// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A pte changes its frame: the macros of `include/linux/mmu_notifier.h` around that. (Those for aging are in `age`.)
//!
//! Both are called with the page-table lock held, inside a pair over the page, in this order: clear and flush the old pte,
//! then tell of the new one, then store it.
//!
//! `invalidate_page`, the kernel's third way to say that a page is gone, has no caller here. Until 4.13 the kernel sent it
//! from reclaim and write-back, after the page-table lock was dropped; between the two a new page could come to the address
//! while secondaries still wrote the old one (R7). Everything here that takes a page away opens a pair instead. The op
//! stays, for a primary that is written after an older kernel: [`Notifiers::invalidate_page`](crate::notifier::Notifiers).

use super::{LockedLeaf, Mm, Pte};
use crate::addr::{Hva, HvaRange};
use crate::table::index;

impl Mm {
    /// Clears the pte at `hva` and has devices flush that walk these tables themselves (`ptep_clear_flush_notify`).
    /// Returns what was there.
    pub(super) fn ptep_clear_flush_notify(&self, leaf: &LockedLeaf<'_>, hva: Hva) -> Pte {
        let at = index(hva.page(), 1);
        let old = leaf.get(at);
        leaf.set(at, Pte::NONE);
        self.notifiers.invalidate_range(HvaRange::page(hva));
        old
    }

    /// Stores `pte` at `hva`, where the old pte was cleared under the same hold of the lock (`set_pte_at_notify`).
    ///
    /// Secondaries first: the new pte may be writable, and what is written through it must not be missed by one that still
    /// has the old frame (R8; the kernel had it the other way round until 3.7).
    pub(super) fn set_pte_at_notify(&self, leaf: &LockedLeaf<'_>, hva: Hva, pte: Pte) {
        self.notifiers.change_pte(hva, pte);
        leaf.set(index(hva.page(), 1), pte);
    }
}

#[cfg(all(test, feature = "mmu-notifier"))]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed test may panic")]
    use super::*;
    use crate::addr::{Access, PAGE_SIZE};
    use crate::frame::{FramePool, FreedFrames};
    use crate::mm::{Backing, FaultRequest, MapFlags};
    use crate::notifier::MmuNotifier;
    use crate::sync::{Arc, Mutex, Weak};

    /// Looks at the pte whenever it hears of it: without its lock, which the caller holds.
    #[derive(Debug)]
    struct Looker {
        mm: Weak<Mm>,
        seen: Mutex<Vec<(&'static str, Pte)>>,
    }

    impl Looker {
        fn look(&self, op: &'static str, hva: Hva) {
            let mm = self.mm.upgrade().unwrap();
            self.seen.lock().push((op, mm.pte_unlocked(hva)));
        }
    }

    impl MmuNotifier for Looker {
        fn change_pte(&self, hva: Hva, new: Pte) {
            assert!(new.is_writable());
            self.look("change_pte", hva);
        }
        fn clear_flush_young(&self, range: HvaRange) -> bool {
            self.look("clear_flush_young", range.start);
            false
        }
    }

    #[test]
    fn r8_secondaries_hear_of_a_new_pte_before_it_is_there_and_of_aging_after_it() {
        let pool = FramePool::new(16 * PAGE_SIZE, FreedFrames::Poison).unwrap();
        let mm = Mm::new(Arc::new(pool)).unwrap();
        let looker = Arc::new(Looker { mm: Arc::downgrade(&mm), seen: Mutex::default() });
        mm.register(looker.clone()).unwrap();
        let rw = Access::READ | Access::WRITE;
        let at = mm.mmap(Hva(0), PAGE_SIZE, rw, MapFlags::PRIVATE, Backing::Anonymous).unwrap();
        for access in [Access::READ, rw] {
            drop(mm.fault(&FaultRequest::one_page(at, access)).unwrap());
        }
        let copy = mm.lookup(at).unwrap().0;
        assert!(copy.is_writable() && copy.is_young());
        assert!(mm.ptep_clear_flush_young_notify(at));
        assert_eq!(*looker.seen.lock(), [("change_pte", Pte::NONE), ("clear_flush_young", copy.old())]);
        mm.release();
    }
}
