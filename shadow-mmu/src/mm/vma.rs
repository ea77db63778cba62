// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Virtual memory areas: which addresses are mapped, to what, with which rights. Everything here is under the mmap lock.

use super::object::Object;
use crate::addr::{Access, Hva, HvaRange, PAGE_SIZE, Pfn, TASK_SIZE};
use crate::sync::Arc;
use std::collections::BTreeMap;

/// Mappings an address space may have, as `vm.max_map_count`.
pub const MAX_MAP_COUNT: usize = 65530;
/// Lowest address that is given out or may be asked for, as `vm.mmap_min_addr`.
pub const MMAP_MIN_ADDR: u64 = 0x1_0000;

bitflags::bitflags! {
    /// What else is true of a VMA.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct VmaFlags: u32 {
        /// Writes go to the object, for all to see.
        const SHARED = 1;
        /// Not counted against the memory limit when mapped (`MAP_NORESERVE`).
        const NORESERVE = 2;
        /// The main thread's stack.
        const STACK = 4;
        /// The heap that brk moves.
        const HEAP = 8;
        /// The guest said that it will access this at random: no pages are brought in ahead.
        const RANDOM = 16;
        /// Not writable even if asked for later (mapping of something that is read-only).
        const MAY_NOT_WRITE = 32;
        /// Not for children (`MADV_DONTFORK`).
        const DONT_FORK = 64;
        /// Its pages may be merged with others of the same content (`MADV_MERGEABLE`).
        const MERGEABLE = 128;
    }
}

/// What a VMA shows.
#[derive(Debug, Clone)]
pub enum Backing {
    /// Zeros, then what was written.
    Anonymous,
    /// An object, from a byte offset that is a multiple of the page size.
    Object {
        /// What is mapped.
        object: Arc<Object>,
        /// Where in it the VMA starts.
        offset: u64,
    },
    /// An adopted mapping of the host (see [`watch`](super::watch)).
    Adopted {
        /// The frame number, beyond the pool's, of the VMA's first page.
        first: Pfn,
    },
}

impl Backing {
    /// The backing of an address `bytes` further on.
    pub(super) fn advanced(&self, bytes: u64) -> Self {
        match self {
            Self::Anonymous => Self::Anonymous,
            Self::Object { object, offset } => {
                Self::Object { object: Arc::clone(object), offset: offset.wrapping_add(bytes) }
            }
            Self::Adopted { first } => {
                Self::Adopted { first: Pfn(first.0.wrapping_add((bytes / PAGE_SIZE) as u32)) }
            }
        }
    }

    fn continues_as(&self, len: u64, next: &Self) -> bool {
        match (self, next) {
            (Self::Anonymous, Self::Anonymous) => true,
            (Self::Object { object: a, offset: at }, Self::Object { object: b, offset: then }) => {
                Arc::ptr_eq(a, b) && at.wrapping_add(len) == *then
            }
            // Two mappings may be neighbours by number and by address. One VMA that shows both is as good as two.
            (Self::Adopted { first }, Self::Adopted { first: then }) => {
                u64::from(first.0) + len / PAGE_SIZE == u64::from(then.0)
            }
            _ => false,
        }
    }
}

/// A run of addresses with one backing and one set of rights.
#[derive(Debug, Clone)]
pub struct Vma {
    /// Where it is. Never empty.
    pub range: HvaRange,
    /// What an access may do; empty for `PROT_NONE`.
    pub prot: Access,
    /// What else is true of it.
    pub flags: VmaFlags,
    /// What it shows.
    pub backing: Backing,
}

impl Vma {
    /// The part of this VMA in `range`, which must lie within it.
    fn part(&self, range: HvaRange) -> Self {
        Self { range, backing: self.backing.advanced(range.start.0 - self.range.start.0), ..self.clone() }
    }

    /// Which page of its object is at `hva`; `None` for anonymous and for adopted memory.
    pub fn object_page(&self, hva: Hva) -> Option<(&Arc<Object>, u64)> {
        match &self.backing {
            Backing::Anonymous | Backing::Adopted { .. } => None,
            Backing::Object { object, offset } => {
                Some((object, (offset + (hva.page_floor().0 - self.range.start.0)) / PAGE_SIZE))
            }
        }
    }

    /// The frame number of the page at `hva`, if the VMA shows an adopted mapping.
    pub fn adopted_pfn(&self, hva: Hva) -> Option<Pfn> {
        match self.backing {
            Backing::Adopted { first } => {
                Some(Pfn(first.0 + ((hva.0 - self.range.start.0) / PAGE_SIZE) as u32))
            }
            _ => None,
        }
    }

    /// Whether writes go to an object.
    pub fn is_shared(&self) -> bool {
        self.flags.contains(VmaFlags::SHARED)
    }

    /// Whether the rights of the VMA allow `access`. On x86 everything that can be written or executed can be read.
    pub fn allows(&self, access: Access) -> bool {
        let mut rights = self.prot;
        if !rights.is_empty() {
            rights |= Access::READ;
        }
        rights.contains(access)
    }

    /// Whether it has pages of its own, which can be merged with others (`vma_ksm_compatible`).
    pub fn is_ksm_compatible(&self) -> bool {
        !self.is_shared() && !matches!(self.backing, Backing::Adopted { .. })
    }

    /// What lets its pages be merged: nothing, if they cannot be.
    pub(super) fn mergeable(&self) -> VmaFlags {
        if self.is_ksm_compatible() { VmaFlags::MERGEABLE } else { VmaFlags::empty() }
    }

    /// Whether its private pages count against the memory limit (`VM_ACCOUNT`).
    pub fn is_accounted(&self) -> bool {
        self.prot.contains(Access::WRITE) && !self.is_shared() && !self.flags.contains(VmaFlags::NORESERVE)
    }

    fn continues_as(&self, next: &Self) -> bool {
        self.range.end == next.range.start
            && self.prot == next.prot
            && self.flags == next.flags
            && self.backing.continues_as(self.range.len(), &next.backing)
    }

    /// What to call it in reports, as `/proc/self/maps` does.
    pub fn name(&self) -> &str {
        match (&self.backing, self.flags) {
            (_, flags) if flags.contains(VmaFlags::STACK) => "[stack]",
            (_, flags) if flags.contains(VmaFlags::HEAP) => "[heap]",
            (Backing::Object { object, .. }, _) => object.name(),
            (Backing::Adopted { .. }, _) => "[adopted]",
            _ => "",
        }
    }
}

/// All VMAs of an address space: disjoint, and no two neighbours that could be one.
#[derive(Debug, Default)]
pub struct VmaSet {
    /// By first address.
    vmas: BTreeMap<u64, Vma>,
    pages: u64,
    accounted: u64,
}

impl VmaSet {
    /// The number of VMAs.
    pub fn count(&self) -> usize {
        self.vmas.len()
    }
    /// Pages mapped in all.
    pub fn pages(&self) -> u64 {
        self.pages
    }
    /// Pages of VMAs that count against the memory limit.
    pub fn accounted_pages(&self) -> u64 {
        self.accounted
    }
    /// Every VMA, ascending.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &Vma> {
        self.vmas.values()
    }

    /// The VMA that holds `hva`.
    pub fn find(&self, hva: Hva) -> Option<&Vma> {
        let (_, vma) = self.vmas.range(..=hva.0).next_back()?;
        vma.range.contains(hva).then_some(vma)
    }

    /// The VMAs that have a part in `range`, ascending and whole.
    pub fn overlapping(&self, range: HvaRange) -> impl Iterator<Item = &Vma> {
        let first = self.find(range.start).map_or(range.start.0, |vma| vma.range.start.0);
        self.vmas.range(first..range.end.0.max(first)).map(|(_, vma)| vma)
    }

    /// Whether every page of `range` is mapped.
    pub fn covers(&self, range: HvaRange) -> bool {
        let mut at = range.start;
        for vma in self.overlapping(range) {
            if vma.range.start > at {
                return false;
            }
            at = vma.range.end;
        }
        at >= range.end
    }

    /// VMAs that a split at both ends of `range` would add.
    pub fn splits_at(&self, range: HvaRange) -> usize {
        [range.start, range.end]
            .iter()
            .filter(|&&at| self.find(at).is_some_and(|vma| vma.range.start < at))
            .count()
    }

    /// Puts `vma` where nothing is, and merges it with equal neighbours.
    ///
    /// # Panics
    /// In debug builds, if something is there.
    pub fn insert(&mut self, mut vma: Vma) {
        debug_assert!(self.overlapping(vma.range).next().is_none(), "{} is taken", vma.range);
        if let Some(before) = self.vmas.range(..vma.range.start.0).next_back().map(|(_, before)| before)
            && before.continues_as(&vma)
        {
            let before = before.range.start;
            if let Some(before) = self.take(before) {
                vma = Vma { range: HvaRange { start: before.range.start, end: vma.range.end }, ..before };
            }
        }
        if let Some(after) = self.vmas.get(&vma.range.end.0)
            && vma.continues_as(after)
        {
            let after = after.range;
            self.take(after.start);
            vma.range.end = after.end;
        }
        self.count_in(&vma);
        self.vmas.insert(vma.range.start.0, vma);
    }

    /// Takes out what lies in `range`, splitting VMAs that reach beyond it. Returns the parts taken, ascending.
    pub fn remove(&mut self, range: HvaRange) -> Vec<Vma> {
        let touched: Vec<Hva> = self.overlapping(range).map(|vma| vma.range.start).collect();
        let mut removed = Vec::with_capacity(touched.len());
        for start in touched {
            let Some(vma) = self.take(start) else { continue };
            let inside = vma.range.intersect(range);
            for rest in [
                HvaRange { start: vma.range.start, end: inside.start },
                HvaRange { start: inside.end, end: vma.range.end },
            ] {
                if !rest.is_empty() {
                    let rest = vma.part(rest);
                    self.count_in(&rest);
                    self.vmas.insert(rest.range.start.0, rest);
                }
            }
            removed.push(vma.part(inside));
        }
        removed
    }

    fn take(&mut self, start: Hva) -> Option<Vma> {
        let vma = self.vmas.remove(&start.0)?;
        self.pages -= vma.range.page_count();
        if vma.is_accounted() {
            self.accounted -= vma.range.page_count();
        }
        Some(vma)
    }

    fn count_in(&mut self, vma: &Vma) {
        self.pages += vma.range.page_count();
        if vma.is_accounted() {
            self.accounted += vma.range.page_count();
        }
    }

    /// Whether nothing is mapped in `range` and it lies in the space.
    pub fn is_free(&self, range: HvaRange) -> bool {
        range.start.0 >= MMAP_MIN_ADDR && range.end.0 <= TASK_SIZE && self.overlapping(range).next().is_none()
    }

    /// The highest free place for `len` bytes below `top` (`vm_unmapped_area`, top-down).
    pub fn find_free(&self, len: u64, top: Hva) -> Option<Hva> {
        let mut end = top;
        for vma in self.vmas.range(..top.0).rev().map(|(_, vma)| vma) {
            if vma.range.end < end && end.0 - vma.range.end.0 >= len {
                break;
            }
            end = vma.range.start.min(end);
        }
        let start = end.0.checked_sub(len)?;
        (start >= MMAP_MIN_ADDR).then_some(Hva(start))
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init, reason = "lists of ranges that happen to have one")]
mod tests {
    use super::*;

    const PAGE: u64 = PAGE_SIZE;

    fn anonymous(pages: std::ops::Range<u64>, prot: Access) -> Vma {
        let range = HvaRange::new(Hva(pages.start * PAGE), Hva(pages.end * PAGE));
        Vma { range, prot, flags: VmaFlags::empty(), backing: Backing::Anonymous }
    }

    fn shape(set: &VmaSet) -> Vec<std::ops::Range<u64>> {
        set.iter().map(|vma| vma.range.page_numbers()).collect()
    }

    #[test]
    fn equal_neighbours_merge_on_both_sides() {
        let mut set = VmaSet::default();
        set.insert(anonymous(10..12, Access::READ));
        set.insert(anonymous(14..16, Access::READ));
        set.insert(anonymous(12..14, Access::READ));
        assert_eq!(shape(&set), vec![10..16]);
        set.insert(anonymous(16..17, Access::WRITE));
        assert_eq!(shape(&set), [10..16, 16..17]);
        assert_eq!((set.pages(), set.accounted_pages()), (7, 1));
    }

    #[test]
    fn a_hole_in_the_middle_splits_and_keeps_the_count() {
        let mut set = VmaSet::default();
        set.insert(anonymous(0x10..0x20, Access::WRITE));
        let removed = set.remove(HvaRange::new(Hva(0x14 * PAGE), Hva(0x18 * PAGE)));
        assert_eq!(removed.len(), 1);
        assert_eq!(shape(&set), [0x10..0x14, 0x18..0x20]);
        assert_eq!((set.pages(), set.accounted_pages()), (12, 12));
    }

    #[test]
    fn object_offsets_follow_a_split_and_allow_merging_again() {
        let pool = Arc::new(crate::frame::FramePool::new(PAGE, crate::frame::FreedFrames::Keep).unwrap());
        let object = Object::shared_memory(&pool, 64);
        let backing = Backing::Object { object: Arc::clone(&object), offset: 3 * PAGE };
        let mut set = VmaSet::default();
        set.insert(Vma { backing, ..anonymous(0x10..0x20, Access::READ) });
        let mut middle = set.remove(HvaRange::page(Hva(0x15 * PAGE)));
        let after = set.find(Hva(0x16 * PAGE)).unwrap();
        assert_eq!(after.object_page(Hva(0x16 * PAGE)).unwrap().1, 9);
        set.insert(middle.remove(0));
        assert_eq!(shape(&set), vec![0x10..0x20]);
    }

    #[test]
    fn free_places_are_found_from_the_top() {
        let mut set = VmaSet::default();
        set.insert(anonymous(0x90..0xa0, Access::READ));
        let top = Hva(0x100 * PAGE);
        assert_eq!(set.find_free(0x10 * PAGE, top), Some(Hva(0xf0 * PAGE)));
        assert_eq!(set.find_free(0x61 * PAGE, top), Some(Hva(0x2f * PAGE)));
        assert_eq!(set.find_free(0x1000 * PAGE, top), None);
    }

    #[test]
    fn covers_sees_holes() {
        let mut set = VmaSet::default();
        set.insert(anonymous(0x10..0x12, Access::READ));
        set.insert(anonymous(0x13..0x14, Access::READ));
        let pages =
            |range: std::ops::Range<u64>| HvaRange::new(Hva(range.start * PAGE), Hva(range.end * PAGE));
        assert!(set.covers(pages(0x10..0x12)));
        assert!(!set.covers(pages(0x10..0x14)));
        assert!(!set.covers(pages(0xf..0x11)));
        assert_eq!(set.splits_at(pages(0x11..0x14)), 1);
    }
}
