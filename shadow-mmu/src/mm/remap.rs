// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! mremap: shrink, grow in place, move. After `mm/mremap.c`.

use super::map::{page_ceil, user_range};
use super::vma::MAX_MAP_COUNT;
use super::{Backing, MMAP_BASE, Map, Mm, MmError, Pte, Vma, VmaFlags};
use crate::addr::{Hva, HvaRange, PAGE_SIZE, TASK_SIZE};
use crate::frame::OutOfFrames;
use crate::notifier::Event;
use crate::table::index;

bitflags::bitflags! {
    /// Flags of mremap, with Linux's numbers.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct RemapFlags: u32 {
        /// The mapping may move.
        const MAYMOVE = 1;
        /// It moves to exactly the new address; what is there goes.
        const FIXED = 2;
        /// The old addresses stay mapped, empty.
        const DONTUNMAP = 4;
    }
}

impl Mm {
    /// Changes the size or the place of the mapping at `old`. Returns where it is.
    ///
    /// # Errors
    /// As mremap(2): [`MmError`].
    pub fn mremap(
        &self,
        old: Hva,
        old_len: u64,
        new_len: u64,
        flags: RemapFlags,
        new: Hva,
    ) -> Result<Hva, MmError> {
        let fixed = flags.contains(RemapFlags::FIXED);
        let keep = flags.contains(RemapFlags::DONTUNMAP);
        if (fixed || keep) && !flags.contains(RemapFlags::MAYMOVE) || !old.is_page_aligned() {
            return Err(MmError::Invalid);
        }
        let (Some(mut old_len), Some(new_len)) = (page_ceil(old_len), page_ceil(new_len)) else {
            return Err(MmError::Invalid);
        };
        if new_len == 0 || new_len > TASK_SIZE || keep && old_len != new_len {
            return Err(MmError::Invalid);
        }
        // Without MREMAP_FIXED the new address is a hint, and checked all the same (`check_mremap_params`).
        let target = if fixed || keep {
            let target = user_range(new, new_len)?;
            let source = HvaRange { start: old, end: old.checked_add(old_len).ok_or(MmError::Invalid)? };
            // Also when the old length is 0: an address strictly inside the target would lose its mapping to it.
            if source.end > target.start && target.end > source.start {
                return Err(MmError::Invalid);
            }
            Some(target).filter(|_| fixed)
        } else {
            None
        };
        let mut map = self.map.write();
        if map.vmas.find(old).is_none() {
            return Err(MmError::Fault);
        }
        // What can be neither moved nor grown is refused before anything goes (`check_prep_vma`, since 6.17).
        if target.is_some() || keep || new_len > old_len {
            self.resizable(&map, old, old_len.min(new_len), new_len)?;
        }
        // The part that is cut off goes first, whatever it is made of.
        if old_len > new_len {
            let tail = HvaRange {
                start: Hva(old.0 + new_len),
                end: old.checked_add(old_len).filter(|end| end.0 <= TASK_SIZE).ok_or(MmError::Invalid)?,
            };
            if let Some(target) = target {
                self.clear_target(&mut map, target)?;
            }
            self.unmap(&mut map, tail, Event::Unmap);
            old_len = new_len;
        } else if let Some(target) = target {
            self.clear_target(&mut map, target)?;
        }
        if target.is_none() && !keep && old_len == new_len {
            return Ok(old);
        }
        let vma = self.resizable(&map, old, old_len, new_len)?;
        let source = HvaRange { start: old, end: Hva(old.0 + old_len) };
        if target.is_none() && !keep && vma.range.end == source.end && old_len > 0 {
            let added =
                HvaRange { start: source.end, end: old.checked_add(new_len).ok_or(MmError::NoMemory)? };
            if added.end.0 <= TASK_SIZE && map.vmas.is_free(added) {
                let backing = vma.backing.advanced(vma.range.len());
                map.vmas.insert(Vma { range: added, backing, ..vma });
                return Ok(old);
            }
        }
        if !flags.contains(RemapFlags::MAYMOVE) {
            return Err(MmError::NoMemory);
        }
        let target = match target {
            Some(target) => target,
            None => {
                let hint = Some(new).filter(|new| keep && new.0 != 0 && new.is_page_aligned());
                let free = |start: &Hva| {
                    start
                        .checked_add(new_len)
                        .is_some_and(|end| map.vmas.is_free(HvaRange { start: *start, end }))
                };
                let start = hint
                    .filter(free)
                    .or_else(|| map.vmas.find_free(new_len, MMAP_BASE))
                    .ok_or(MmError::NoMemory)?;
                HvaRange { start, end: Hva(start.0 + new_len) }
            }
        };
        self.move_mapping(&mut map, &vma, source, target, flags)?;
        Ok(target.start)
    }

    fn clear_target(&self, map: &mut Map, target: HvaRange) -> Result<(), MmError> {
        if map.vmas.count() + 2 > MAX_MAP_COUNT {
            return Err(MmError::NoMemory);
        }
        self.unmap(map, target, Event::Unmap);
        Ok(())
    }

    /// The one VMA that `[old, old + old_len)` lies in, if it may become `new_len` long (`vma_to_resize`).
    fn resizable(&self, map: &Map, old: Hva, old_len: u64, new_len: u64) -> Result<Vma, MmError> {
        let vma = map.vmas.find(old).ok_or(MmError::Fault)?.clone();
        if old_len == 0 && !vma.is_shared() {
            return Err(MmError::Invalid);
        }
        if old_len > vma.range.end.0 - old.0 {
            return Err(MmError::Fault);
        }
        if new_len > old_len && matches!(vma.backing, Backing::Adopted { .. }) {
            // As VM_DONTEXPAND and VM_PFNMAP: behind an adopted mapping there is nothing to grow into.
            return Err(MmError::Fault);
        }
        if vma.is_accounted() && new_len > old_len {
            self.check_overcommit((new_len - old_len) / PAGE_SIZE)?;
        }
        Ok(vma)
    }

    /// Moves the pages of `source`, which lies in `vma`, to `target` (`move_vma`). An old length of 0 makes a second
    /// mapping of shared memory and moves nothing.
    fn move_mapping(
        &self,
        map: &mut Map,
        vma: &Vma,
        source: HvaRange,
        target: HvaRange,
        flags: RemapFlags,
    ) -> Result<(), MmError> {
        if map.vmas.count() + 3 > MAX_MAP_COUNT {
            return Err(MmError::NoMemory);
        }
        let backing = vma.backing.advanced(source.start.0 - vma.range.start.0);
        if !source.is_empty() {
            if let Err(OutOfFrames) = self.move_ptes(source, target.start) {
                // What was moved goes back; the tables it goes back to are still there.
                self.move_ptes(HvaRange::pages_from(target.start, source.page_count()), source.start)?;
                self.free_empty_tables(target);
                return Err(MmError::NoMemory);
            }
            map.traps.move_to(source, target.start);
            if !flags.contains(RemapFlags::DONTUNMAP) {
                map.vmas.remove(source);
                self.free_empty_tables(source);
            }
        }
        let flags = vma.flags - (VmaFlags::HEAP | VmaFlags::STACK);
        map.vmas.insert(Vma { range: target, prot: vma.prot, flags, backing });
        Ok(())
    }

    /// Moves each pte of `source` to the same place from `to` on, inside a pair over the *old* range: the new one has no
    /// translation that could be stale (`move_page_tables`). The caller holds the mmap lock for writing.
    fn move_ptes(&self, source: HvaRange, to: Hva) -> Result<(), OutOfFrames> {
        let _pair = self.notifiers.invalidate(source, Event::Unmap);
        let mut moved = Vec::new();
        self.for_each_leaf(source, |base, leaf, entries| {
            for at in entries {
                let pte = leaf.get(at);
                if pte.is_present() {
                    moved.push((Hva(base.0 + at as u64 * PAGE_SIZE), pte));
                }
            }
        });
        for (hva, pte) in moved {
            let new = Hva(to.0 + (hva.0 - source.start.0));
            // One leaf at a time: the two may share a lock.
            self.lock_leaf_or_new(new)?.set(index(new.page(), 1), pte);
            self.written(HvaRange::page(hva));
            self.written(HvaRange::page(new));
            if let Some(leaf) = self.lock_leaf(hva) {
                leaf.set(index(hva.page(), 1), Pte::NONE);
            }
        }
        Ok(())
    }
}
