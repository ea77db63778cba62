// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! mmap, munmap, mprotect and brk, with the checks and errors of Linux in Linux's order.

use super::vma::{MAX_MAP_COUNT, MMAP_MIN_ADDR};
use super::{Backing, MMAP_BASE, Map, Mm, MmError, Object, Vma, VmaFlags};
use crate::addr::{Access, Hva, HvaRange, PAGE_SIZE, TASK_SIZE};
use crate::notifier::Event;

bitflags::bitflags! {
    /// Flags of mmap, with Linux's numbers.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct MapFlags: u32 {
        /// Writes go to the object.
        const SHARED = 0x01;
        /// Writes go to a copy.
        const PRIVATE = 0x02;
        /// Exactly at the address; what is there goes.
        const FIXED = 0x10;
        /// No object.
        const ANONYMOUS = 0x20;
        /// The main stack. (It does not grow: it is mapped as large as it may get, and costs what is touched.)
        const GROWSDOWN = 0x0100;
        /// Not counted against the memory limit.
        const NORESERVE = 0x4000;
        /// Brought in at once, as far as memory allows.
        const POPULATE = 0x8000;
        /// Exactly at the address, if nothing is there.
        const FIXED_NOREPLACE = 0x10_0000;
    }
}

/// `[addr, addr + len)` with the length rounded up to pages, as every call but mmap wants it.
///
/// # Errors
/// `Invalid` for an address inside a page, or a range that leaves the user half.
pub(super) fn user_range(addr: Hva, len: u64) -> Result<HvaRange, MmError> {
    let len = page_ceil(len).ok_or(MmError::Invalid)?;
    let end = addr.checked_add(len).ok_or(MmError::Invalid)?;
    if !addr.is_page_aligned() || end.0 > TASK_SIZE {
        return Err(MmError::Invalid);
    }
    Ok(HvaRange { start: addr, end })
}

/// `len` rounded up to whole pages.
pub(super) fn page_ceil(len: u64) -> Option<u64> {
    Some(len.checked_add(PAGE_SIZE - 1)? & !(PAGE_SIZE - 1))
}

impl Mm {
    /// Maps `len` bytes of `backing` with rights `prot`, at `addr` if the flags say so, else near it, else anywhere.
    /// Returns where. Without [`MapFlags::SHARED`] writes are private.
    /// What this process has mapped already is taken in by [`adopt`](Self::adopt) alone.
    ///
    /// # Errors
    /// As mmap(2): [`MmError`].
    pub fn mmap(
        &self,
        addr: Hva,
        len: u64,
        prot: Access,
        flags: MapFlags,
        backing: Backing,
    ) -> Result<Hva, MmError> {
        let both = MapFlags::SHARED | MapFlags::PRIVATE;
        if len == 0 || flags.contains(both) || flags.contains(MapFlags::SHARED | MapFlags::GROWSDOWN) {
            return Err(MmError::Invalid);
        }
        if matches!(backing, Backing::Adopted { .. }) {
            // Frame numbers of memory that only `adopt` may promise anything of.
            return Err(MmError::Invalid);
        }
        let len = page_ceil(len).ok_or(MmError::NoMemory)?;
        if len > TASK_SIZE {
            return Err(MmError::NoMemory);
        }
        if let Backing::Object { offset, .. } = &backing {
            if !offset.is_multiple_of(PAGE_SIZE) {
                return Err(MmError::Invalid);
            }
            offset.checked_add(len).ok_or(MmError::Invalid)?;
        }
        let mut vma_flags = VmaFlags::empty();
        vma_flags.set(VmaFlags::SHARED, flags.contains(MapFlags::SHARED));
        vma_flags.set(VmaFlags::NORESERVE, flags.contains(MapFlags::NORESERVE));
        vma_flags.set(VmaFlags::STACK, flags.contains(MapFlags::GROWSDOWN));
        let backing = match backing {
            Backing::Anonymous if flags.contains(MapFlags::SHARED) => {
                Backing::Object { object: Object::shared_memory(&self.pool, len / PAGE_SIZE), offset: 0 }
            }
            backing => backing,
        };

        let mut map = self.map.write();
        let range = self.place(&map, addr, len, flags)?;
        let mut vma = Vma { range, prot, flags: vma_flags, backing };
        self.flag_if_any_merges(&mut vma);
        if map.vmas.count() + map.vmas.splits_at(range) >= MAX_MAP_COUNT {
            return Err(MmError::NoMemory);
        }
        if vma.is_accounted() {
            self.check_overcommit(range.page_count())?;
        }
        self.unmap(&mut map, range, Event::Unmap);
        map.vmas.insert(vma);
        drop(map);
        if flags.contains(MapFlags::POPULATE) {
            self.populate(range, Access::READ | prot & Access::WRITE);
        }
        Ok(range.start)
    }

    /// Where a new mapping goes (`get_unmapped_area`).
    fn place(&self, map: &Map, addr: Hva, len: u64, flags: MapFlags) -> Result<HvaRange, MmError> {
        if flags.intersects(MapFlags::FIXED | MapFlags::FIXED_NOREPLACE) {
            let end = addr.checked_add(len).filter(|end| end.0 <= TASK_SIZE).ok_or(MmError::NoMemory)?;
            if !addr.is_page_aligned() {
                return Err(MmError::Invalid);
            }
            if addr.0 < MMAP_MIN_ADDR {
                return Err(MmError::NotPermitted);
            }
            let range = HvaRange { start: addr, end };
            if flags.contains(MapFlags::FIXED_NOREPLACE) && map.vmas.overlapping(range).next().is_some() {
                return Err(MmError::Exists);
            }
            return Ok(range);
        }
        if addr.0 != 0 {
            // A hint is rounded down to a page, and up to the lowest address there is (`round_hint_to_min`).
            let hint = Hva(addr.page_floor().0.max(MMAP_MIN_ADDR));
            if let Some(end) = hint.checked_add(len).filter(|end| end.0 <= TASK_SIZE) {
                let range = HvaRange { start: hint, end };
                if map.vmas.is_free(range) {
                    return Ok(range);
                }
            }
        }
        let start = map.vmas.find_free(len, MMAP_BASE).ok_or(MmError::NoMemory)?;
        Ok(HvaRange { start, end: Hva(start.0 + len) })
    }

    /// Refuses what can never fit (`__vm_enough_memory`, the heuristic mode): more private writable pages in one call than
    /// the pool has frames. Beyond that memory is promised freely; who touches more than there is gets
    /// [`OutOfMemory`](super::FaultError::OutOfMemory).
    pub(super) fn check_overcommit(&self, pages: u64) -> Result<(), MmError> {
        if pages > self.pool.frame_count() as u64 { Err(MmError::NoMemory) } else { Ok(()) }
    }

    /// Removes every mapping of `range`, with its pages. The caller holds the mmap lock for writing.
    pub(super) fn unmap(&self, map: &mut Map, range: HvaRange, event: Event) {
        if map.vmas.remove(range).is_empty() {
            return;
        }
        map.traps.take(range, |_| true);
        self.zap(range, event);
        self.free_empty_tables(range);
    }

    /// Removes every mapping in `[addr, addr + len)`. Holes are no error.
    ///
    /// # Errors
    /// As munmap(2): [`MmError`].
    pub fn munmap(&self, addr: Hva, len: u64) -> Result<(), MmError> {
        let range = user_range(addr, len)?;
        if range.is_empty() {
            return Err(MmError::Invalid);
        }
        let mut map = self.map.write();
        // Only a hole in the middle of one VMA makes more VMAs than it removes.
        if map.vmas.splits_at(range) == 2
            && map.vmas.overlapping(range).count() == 1
            && map.vmas.count() >= MAX_MAP_COUNT
        {
            return Err(MmError::NoMemory);
        }
        self.unmap(&mut map, range, Event::Unmap);
        Ok(())
    }

    /// Gives every mapping in `[addr, addr + len)` the rights `prot`.
    ///
    /// # Errors
    /// As mprotect(2): [`MmError`]. At a hole the mappings before it have been changed already.
    pub fn mprotect(&self, addr: Hva, len: u64, prot: Access) -> Result<(), MmError> {
        if !addr.is_page_aligned() {
            return Err(MmError::Invalid);
        }
        if len == 0 {
            return Ok(());
        }
        let range = user_range(addr, len).map_err(|_| MmError::NoMemory)?;
        let mut map = self.map.write();
        if map.vmas.find(range.start).is_none() {
            return Err(MmError::NoMemory);
        }
        let touched: Vec<HvaRange> =
            map.vmas.overlapping(range).map(|vma| vma.range.intersect(range)).collect();
        let mut expected = range.start;
        for part in touched {
            if part.start != expected {
                return Err(MmError::NoMemory);
            }
            expected = part.end;
            self.protect_part(&mut map, part, prot)?;
        }
        if expected == range.end { Ok(()) } else { Err(MmError::NoMemory) }
    }

    /// mprotect of a range within one VMA.
    fn protect_part(&self, map: &mut Map, part: HvaRange, prot: Access) -> Result<(), MmError> {
        let Some(vma) = map.vmas.find(part.start) else { return Err(MmError::NoMemory) };
        if vma.prot == prot {
            return Ok(());
        }
        if prot.contains(Access::WRITE) && vma.flags.contains(VmaFlags::MAY_NOT_WRITE) {
            return Err(MmError::Access);
        }
        let after = Vma { prot, ..vma.clone() };
        if after.is_accounted() && !vma.is_accounted() {
            self.check_overcommit(part.page_count())?;
        }
        if map.vmas.count() + map.vmas.splits_at(part) > MAX_MAP_COUNT {
            return Err(MmError::NoMemory);
        }
        for piece in map.vmas.remove(part) {
            map.vmas.insert(Vma { prot, ..piece });
        }
        // Ptes without a page have nothing to lose, so the pair starts at the first that has one. What the new rights
        // give is taken by the next fault; what they do not give goes now.
        if let Some(first) = self.first_present(part) {
            let _pair =
                self.notifiers.invalidate(HvaRange { start: first, end: part.end }, Event::ProtectionVma);
            if !prot.contains(Access::WRITE) {
                self.for_each_leaf(part, |_, leaf, entries| {
                    for at in entries {
                        leaf.set(at, leaf.get(at).write_protected());
                    }
                });
            }
        }
        Ok(())
    }

    /// The first page of `range` that has a pte.
    pub(super) fn first_present(&self, range: HvaRange) -> Option<Hva> {
        let mut first = None;
        self.for_each_leaf(range, |base, leaf, mut entries| {
            if first.is_none() {
                first = entries
                    .find(|&at| leaf.get(at).is_present())
                    .map(|at| Hva(base.0 + at as u64 * PAGE_SIZE));
            }
        });
        first
    }

    /// Where the heap starts and, so far, ends. Set once, by whoever loads a program.
    pub fn set_brk_start(&self, start: Hva) {
        let mut map = self.map.write();
        let start = Hva(page_ceil(start.0).unwrap_or(start.0));
        map.brk_start = start;
        map.brk = start;
    }

    /// Where the heap starts; 0 before that was said.
    pub fn brk_start(&self) -> Hva {
        self.map.read().brk_start
    }

    /// Moves the end of the heap to `to` and returns where it is afterwards, which is where it was if that cannot be done.
    pub fn brk(&self, to: Hva) -> Hva {
        let mut map = self.map.write();
        let (old, new) = (page_ceil(map.brk.0), page_ceil(to.0));
        let (Some(old), Some(new)) = (old, new) else { return map.brk };
        if to < map.brk_start || new > MMAP_BASE.0 {
            return map.brk;
        }
        if new < old {
            let range = HvaRange { start: Hva(new), end: Hva(old) };
            if map.vmas.overlapping(range).next().is_none() {
                // Somebody has unmapped all of that part of the heap: the kernel does not move the break then.
                return map.brk;
            }
            self.unmap(&mut map, range, Event::Unmap);
        } else if new > old {
            let range = HvaRange { start: Hva(old), end: Hva(new) };
            // One page is kept free above the heap, as the kernel keeps the stack's guard gap.
            let with_guard = HvaRange { start: range.start, end: Hva(new + PAGE_SIZE) };
            let room = map.vmas.is_free(with_guard) && map.vmas.count() < MAX_MAP_COUNT;
            if !room || self.check_overcommit(range.page_count()).is_err() {
                return map.brk;
            }
            let prot = Access::READ | Access::WRITE;
            let mut vma = Vma { range, prot, flags: VmaFlags::HEAP, backing: Backing::Anonymous };
            self.flag_if_any_merges(&mut vma);
            map.vmas.insert(vma);
        }
        map.brk = to;
        to
    }

    /// Brings in the pages of `range`, as far as there is memory. Errors are left to the access that needs the page.
    pub(super) fn populate(&self, range: HvaRange, access: Access) {
        for page in range.page_numbers() {
            let request = super::FaultRequest::one_page(Hva(page * PAGE_SIZE), access);
            if self.fault(&request).is_err() {
                return;
            }
        }
    }
}
