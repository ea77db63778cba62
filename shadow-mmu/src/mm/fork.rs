// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! fork: an address space like another one, whose private pages both have until one of them writes. After `dup_mmap`
//! (`kernel/fork.c`) and `copy_page_range` (`mm/memory.c`).
//!
//! What the child gets:
//! * every VMA but those of `MADV_DONTFORK`, and the break;
//! * the frames of private pages, by ptes of its own. The pte of either side is write-protected first; who writes gets a
//!   copy, and who is left alone with a frame gets its write access back without one ([`Mm::fault`]);
//! * no other pte. Pages of objects and of zeros are found again by the child's own faults;
//! * no listener (`mmu_notifier_mm_init`): a secondary of the parent knows nothing of the child.
//!
//! # Protocol
//! The family lock, then the parent's mmap lock for writing: no fault runs, none of its ptes changes. Ptes of a VMA are
//! write-protected inside one pair over that VMA, in the parent; a guest that could go on writing through an spte would write
//! what the child was promised to be its own (R21, I15). The child needs no pair: nobody listens, and until fork returns
//! nobody knows of it.
//!
//! A frame that somebody has pinned is copied at once (`copy_present_page`): a pin lets its holder write without asking
//! the pte, and what it writes belongs to the parent. Faults in flight hold pins too; then the copy is one too many.

use super::{Map, Mm, MmError, Pte, Vma, VmaFlags};
use crate::addr::{Access, Hva, HvaRange, PAGE_SIZE};
use crate::frame::{Fill, OutOfFrames};
use crate::mm::Backing;
use crate::notifier::Event;
use crate::sync::Arc;
use crate::table::Table;
use std::ops::Range;

/// A leaf table of the parent with something for the child: its first page, the table, the entries to look at.
type Leaf<'a> = (u64, &'a Table, Range<usize>);

/// Whether the child needs the ptes of `vma` that map private pages: no fault of its own would find those again
/// (`vma_needs_copy`).
fn needs_copy(vma: &Vma) -> bool {
    match vma.backing {
        Backing::Anonymous | Backing::Object { .. } => !vma.is_shared(),
        // Not inherited at all: `adopt` says so with `DONT_FORK`.
        Backing::Adopted { .. } => false,
    }
}

impl Map {
    fn inherited(&self) -> impl Iterator<Item = &Vma> {
        self.vmas.iter().filter(|vma| !vma.flags.contains(VmaFlags::DONT_FORK))
    }

    fn forked(&self) -> Self {
        let mut child = Self { brk_start: self.brk_start, brk: self.brk, ..Self::default() };
        for vma in self.inherited() {
            child.vmas.insert(vma.clone());
            child.traps.inherit(&self.traps, vma.range);
        }
        child
    }
}

impl Mm {
    /// A child of this address space. Costs time for the leaf tables there are, not for the addresses that are mapped.
    ///
    /// # Errors
    /// [`MmError::NoMemory`]: too few frames for the child's page tables, or this space was [reaped](Self::reap). There is
    /// no child then, and this space has lost nothing.
    pub fn fork(&self) -> Result<Arc<Self>, MmError> {
        let mut family = self.family.lock();
        let map = self.map.write();
        if self.is_reaped() {
            return Err(MmError::NoMemory);
        }
        // From here on, an error drops the child, which gives everything back that it has by then.
        let child = Self::new_in(Arc::clone(&self.pool), Arc::clone(&self.family), self.faults.clone())?;
        *child.map.write() = map.forked();
        child.generations.begin_at(self.generation());
        child.sharing.inherit(&self.sharing);
        for vma in map.inherited().filter(|vma| needs_copy(vma)) {
            self.copy_page_range(&child, vma.range)?;
        }
        family.retain(|member| member.strong_count() > 0);
        family.push(Arc::downgrade(&child));
        // From here on it is scanned for itself (`ksm_fork`).
        child.enter_as(&self.sharing);
        Ok(child)
    }

    /// Shares the private pages of `range` with `child`.
    fn copy_page_range(&self, child: &Self, range: HvaRange) -> Result<(), OutOfFrames> {
        let mut leaves: Vec<Leaf<'_>> = Vec::new();
        self.tables.for_each_leaf_table(range.page_numbers(), |page, table, entries| {
            let leaf = self.lock_table(page, table);
            if entries.clone().any(|at| leaf.get(at).is_anonymous() || leaf.get(at).is_ksm()) {
                leaves.push((page, table, entries));
            }
        });
        if leaves.is_empty() {
            return Ok(());
        }
        let _pair = self.notifiers.invalidate(range, Event::ProtectionPage);
        leaves.into_iter().try_for_each(|leaf| self.copy_leaf(child, leaf))
    }

    /// The part of [`copy_page_range`](Self::copy_page_range) that lies in one table. Inside the pair.
    fn copy_leaf(&self, child: &Self, (page, table, entries): Leaf<'_>) -> Result<(), OutOfFrames> {
        // Both locks of two spaces: nobody else can hold the child's.
        let theirs = child.lock_leaf_or_new(Hva(page * PAGE_SIZE))?;
        let ours = self.lock_table(page, table);
        for at in entries {
            let pte = ours.get(at);
            if pte.is_ksm() && pte.is_zero() {
                // A fault of the child's own would find what the mapping shows, which may be a file.
                let zero = Pte::ksm_zero(child.zero_frame);
                theirs.set(at, zero.with_age_of(pte).old());
                child.sharing.gained(zero);
                continue;
            }
            if !pte.is_anonymous() {
                continue;
            }
            if pte.is_ksm() {
                // Nobody can write it, whoever has it pinned.
                self.pool.get(pte.pfn());
                self.pool.frame(pte.pfn()).add_map();
                theirs.set(at, pte.old());
                child.sharing.gained(pte);
                continue;
            }
            let frame = self.pool.frame(pte.pfn());
            // References first: they never go before their mapping does, and with the family lock held none of the family
            // adds a mapping. So the difference is never too small.
            let references = frame.ref_count();
            if references > frame.map_count() {
                let copy = self.pool.alloc(Fill::Overwritten)?;
                self.pool.copy(pte.pfn(), copy);
                self.pool.frame(copy).add_map();
                theirs.set(at, Pte::anonymous(copy).touched(Access::WRITE).old());
                continue;
            }
            self.pool.get(pte.pfn());
            frame.add_map();
            ours.set(at, pte.write_protected());
            theirs.set(at, pte.write_protected().old());
        }
        Ok(())
    }
}

#[cfg(all(test, feature = "mmu-notifier"))]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed test may panic")]
    use super::*;
    use crate::frame::{FramePool, FreedFrames};
    use crate::mm::{FaultRequest, MapFlags};
    use crate::notifier::{Invalidation, MmuNotifier, WouldBlock};
    use crate::sync::{Mutex, Weak};

    /// Looks at the first and the last pte of each pair, at its start and at its end: without their locks.
    #[derive(Debug)]
    struct Looker {
        mm: Weak<Mm>,
        seen: Mutex<Vec<(&'static str, HvaRange, [bool; 2])>>,
    }

    impl Looker {
        fn look(&self, op: &'static str, range: HvaRange) {
            let mm = self.mm.upgrade().unwrap();
            let writable = [range.start, Hva(range.end.0 - 1)].map(|at| mm.pte_unlocked(at).is_writable());
            self.seen.lock().push((op, range, writable));
        }
    }

    impl MmuNotifier for Looker {
        fn invalidate_range_start(&self, invalidation: &Invalidation) -> Result<(), WouldBlock> {
            self.look("start", invalidation.range);
            Ok(())
        }
        fn invalidate_range_end(&self, invalidation: &Invalidation) {
            self.look("end", invalidation.range);
        }
    }

    /// Otherwise a secondary could take up between the two what is about to be write-protected.
    #[test]
    fn r21_ptes_are_write_protected_between_start_and_end() {
        let pool = FramePool::new(64 * PAGE_SIZE, FreedFrames::Poison).unwrap();
        let mm = Mm::new(Arc::new(pool)).unwrap();
        let looker = Arc::new(Looker { mm: Arc::downgrade(&mm), seen: Mutex::default() });
        let rw = Access::READ | Access::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        let at = mm.mmap(Hva(0), 2048 * PAGE_SIZE, rw, flags, Backing::Anonymous).unwrap();
        let range = HvaRange::pages_from(at, 2048);
        for at in [range.start, Hva(range.end.0 - PAGE_SIZE)] {
            drop(mm.fault(&FaultRequest::one_page(at, rw)).unwrap());
        }
        mm.register(looker.clone()).unwrap();
        let child = mm.fork().unwrap();
        assert_eq!(*looker.seen.lock(), [("start", range, [true; 2]), ("end", range, [false; 2])]);
        drop(child);
        mm.release();
    }
}
