// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! madvise, mincore and msync.

use super::map::{page_ceil, user_range};
use super::{Backing, Map, Mm, MmError, Trap, Vma, VmaFlags};
use crate::addr::{Access, Hva, HvaRange, PAGE_SIZE};
use crate::notifier::Event;
use crate::sync::{Arc, Weak};
use crate::table::index;

/// What a program may advise, as far as it has an effect here or none by right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Advice {
    /// No special treatment: takes [`Random`](Self::Random) back.
    Normal,
    /// Pages are accessed in no order: nothing is brought in ahead.
    Random,
    /// Children do not get these mappings.
    DontFork,
    /// Takes [`DontFork`](Self::DontFork) back.
    DoFork,
    /// Accepted and without effect: SEQUENTIAL, WILLNEED, (NO)HUGEPAGE, (DO|DONT)DUMP, COLD, PAGEOUT.
    NoEffect,
    /// The pages go; private ones read as at the start again.
    DontNeed,
    /// The pages of private anonymous memory may go. They go at once.
    Free,
    /// Pages of private memory may be merged with others of the same content; see [`ksm`](crate::ksm).
    Mergeable,
    /// Takes [`Mergeable`](Self::Mergeable) back: each page gets a frame of its own again.
    Unmergeable,
    /// The pages go from the shared object too: a hole.
    Remove,
    /// The pages are brought in for reading.
    PopulateRead,
    /// The pages are brought in for writing.
    PopulateWrite,
}

impl Advice {
    /// From the number of `madvise(2)`; `None` for numbers that Linux does not know, or that are not built in.
    pub fn from_raw(advice: i32) -> Option<Self> {
        Some(match advice {
            libc::MADV_NORMAL => Self::Normal,
            libc::MADV_RANDOM => Self::Random,
            libc::MADV_DONTFORK => Self::DontFork,
            libc::MADV_DOFORK => Self::DoFork,
            libc::MADV_DONTNEED => Self::DontNeed,
            libc::MADV_FREE => Self::Free,
            libc::MADV_MERGEABLE => Self::Mergeable,
            libc::MADV_UNMERGEABLE => Self::Unmergeable,
            libc::MADV_REMOVE => Self::Remove,
            libc::MADV_POPULATE_READ => Self::PopulateRead,
            libc::MADV_POPULATE_WRITE => Self::PopulateWrite,
            libc::MADV_SEQUENTIAL
            | libc::MADV_WILLNEED
            | libc::MADV_HUGEPAGE
            | libc::MADV_NOHUGEPAGE
            | libc::MADV_DODUMP
            | libc::MADV_DONTDUMP
            | libc::MADV_COLD
            | libc::MADV_PAGEOUT => Self::NoEffect,
            _ => return None,
        })
    }
}

impl Mm {
    /// Advises on `[addr, addr + len)`. A hole does not keep the rest from being done.
    ///
    /// # Errors
    /// As madvise(2): [`MmError`].
    pub fn madvise(&self, addr: Hva, len: u64, advice: Advice) -> Result<(), MmError> {
        // Past the user half nothing is mapped; only what no range can be is invalid.
        let range = match user_range(addr, len) {
            Err(_)
                if addr.is_page_aligned()
                    && page_ceil(len).is_some_and(|len| addr.checked_add(len).is_some()) =>
            {
                return Err(MmError::NoMemory);
            }
            range => range?,
        };
        if range.is_empty() {
            return Ok(());
        }
        match advice {
            Advice::NoEffect => self.whole(&self.map.read(), range),
            Advice::Normal => self.change_flags(range, |vma| Ok(vma.flags - VmaFlags::RANDOM)),
            Advice::Random => self.change_flags(range, |vma| Ok(vma.flags | VmaFlags::RANDOM)),
            Advice::DontFork => self.change_flags(range, |vma| Ok(vma.flags | VmaFlags::DONT_FORK)),
            // Nobody would watch the mapping for the child (as Linux keeps VM_IO from children).
            Advice::DoFork => self.change_flags(range, |vma| match vma.backing {
                Backing::Adopted { .. } => Err(MmError::Invalid),
                Backing::Anonymous | Backing::Object { .. } => Ok(vma.flags - VmaFlags::DONT_FORK),
            }),
            // What cannot be merged stays as it is, without an error.
            Advice::Mergeable => self.change_flags(range, |vma| Ok(vma.flags | vma.mergeable())),
            Advice::Unmergeable => {
                let mut map = self.map.write();
                // First, and under the lock: whoever merges looks at the flag under it too (R27).
                self.unmerge_locked(&map, range)?;
                self.change_flags_locked(&mut map, range, |vma| Ok(vma.flags - VmaFlags::MERGEABLE))
            }
            Advice::DontNeed | Advice::Free => self.discard(range, advice),
            Advice::Remove => self.punch(range),
            Advice::PopulateRead | Advice::PopulateWrite => {
                self.whole(&self.map.read(), range)?;
                let write = advice == Advice::PopulateWrite;
                let access = if write { Access::READ | Access::WRITE } else { Access::READ };
                for page in range.page_numbers() {
                    let request = super::FaultRequest::one_page(Hva(page * PAGE_SIZE), access);
                    self.fault(&request).map_err(|error| match error {
                        super::FaultError::NoMapping | super::FaultError::OutOfMemory => MmError::NoMemory,
                        super::FaultError::NoAccess => MmError::Invalid,
                        super::FaultError::BusError => MmError::Fault,
                        super::FaultError::Poisoned => MmError::Poisoned,
                    })?;
                }
                Ok(())
            }
        }
    }

    fn whole(&self, map: &Map, range: HvaRange) -> Result<(), MmError> {
        if map.vmas.covers(range) { Ok(()) } else { Err(MmError::NoMemory) }
    }

    fn change_flags(
        &self,
        range: HvaRange,
        change: fn(&Vma) -> Result<VmaFlags, MmError>,
    ) -> Result<(), MmError> {
        self.change_flags_locked(&mut self.map.write(), range, change)
    }

    pub(super) fn change_flags_locked(
        &self,
        map: &mut Map,
        range: HvaRange,
        change: fn(&Vma) -> Result<VmaFlags, MmError>,
    ) -> Result<(), MmError> {
        let parts: Vec<_> =
            map.vmas.overlapping(range).map(|vma| (vma.range.intersect(range), change(vma))).collect();
        for (part, flags) in parts {
            let flags = flags?;
            if map.vmas.count() + map.vmas.splits_at(part) > super::vma::MAX_MAP_COUNT {
                return Err(MmError::NoMemory);
            }
            for mut piece in map.vmas.remove(part) {
                piece.flags = flags;
                map.vmas.insert(piece);
            }
        }
        self.whole(map, range)
    }

    fn discard(&self, range: HvaRange, advice: Advice) -> Result<(), MmError> {
        let map = self.map.read();
        // Poison goes with the page. None is set while the lock is held, and few spaces have any.
        let mut poisoned = Vec::new();
        let mut result = Ok(());
        for vma in map.vmas.overlapping(range) {
            if advice == Advice::Free && (vma.is_shared() || vma.object_page(vma.range.start).is_some()) {
                result = Err(MmError::Invalid);
                break;
            }
            let part = vma.range.intersect(range);
            self.zap(part, Event::Clear);
            if map.is_poisoned(part) {
                poisoned.push(part);
            }
        }
        let result = result.and_then(|()| self.whole(&map, range));
        drop(map);
        for part in poisoned {
            self.untrap(part, Trap::Poison);
        }
        result
    }

    /// MADV_REMOVE: a hole in shared memory. Every mapping of the object in this space and its family loses the pages first,
    /// and until the object has lost them too no fault may map one of them again: hence all their locks for writing.
    fn punch(&self, range: HvaRange) -> Result<(), MmError> {
        let family = self.family.lock();
        // Declared before their locks, hence dropped after them: it may be the last reference to a space that drops.
        let others: Vec<Arc<Self>> =
            family.iter().filter_map(Weak::upgrade).filter(|other| !std::ptr::eq(&**other, self)).collect();
        let map = self.map.write();
        let other_maps: Vec<_> = others.iter().map(|other| other.map.write()).collect();
        for vma in map.vmas.overlapping(range) {
            let part = vma.range.intersect(range);
            let Some((object, first)) = vma.object_page(part.start) else { return Err(MmError::Invalid) };
            // Whether it is writable now does not matter, only whether it may become so (`vma_is_shared_maywrite`).
            if !vma.is_shared() || vma.flags.contains(VmaFlags::MAY_NOT_WRITE) {
                return Err(MmError::Access);
            }
            let pages = first..first + part.page_count();
            let others = others.iter().map(|other| &**other).zip(other_maps.iter().map(|map| &**map));
            for (mm, map) in std::iter::once((self, &*map)).chain(others) {
                for there in map.vmas.iter().filter_map(|vma| mapped_part(vma, object, &pages)) {
                    mm.zap(there, Event::Clear);
                    // Also where no pte was: the object's bytes go.
                    mm.written(there);
                }
            }
            object.drop_pages(pages);
        }
        self.whole(&map, range)
    }

    /// For each page of `[addr, addr + len)`: 1 if it is in memory, else 0.
    ///
    /// # Errors
    /// As mincore(2): [`MmError`].
    pub fn mincore(&self, addr: Hva, len: u64) -> Result<Vec<u8>, MmError> {
        if !addr.is_page_aligned() {
            return Err(MmError::Invalid);
        }
        let range = user_range(addr, len).map_err(|_| MmError::NoMemory)?;
        let map = self.map.read();
        // Before anything is allocated by a length that the guest made up.
        self.whole(&map, range)?;
        let mut resident = Vec::with_capacity(range.page_count() as usize);
        for vma in map.vmas.overlapping(range) {
            for page in vma.range.intersect(range).page_numbers() {
                let hva = Hva(page * PAGE_SIZE);
                let mapped = self.lock_leaf(hva).is_some_and(|leaf| leaf.get(index(page, 1)).is_present());
                let cached = || {
                    let (object, at) = vma.object_page(hva)?;
                    object.cached_page(at).map(|pfn| self.pool.put(pfn))
                };
                resident.push(u8::from(mapped || cached().is_some()));
            }
        }
        Ok(resident)
    }

    /// Checks what msync(2) checks. Nothing is written back: a file mapping is private or it is memory.
    ///
    /// # Errors
    /// [`MmError`].
    pub fn msync(&self, addr: Hva, len: u64, flags: i32) -> Result<(), MmError> {
        let known = libc::MS_ASYNC | libc::MS_INVALIDATE | libc::MS_SYNC;
        let both = libc::MS_ASYNC | libc::MS_SYNC;
        if flags & !known != 0 || flags & both == both {
            return Err(MmError::Invalid);
        }
        let range = match user_range(addr, len) {
            Err(_) if addr.is_page_aligned() => return Err(MmError::NoMemory),
            range => range?,
        };
        self.whole(&self.map.read(), range)
    }
}

/// Where `vma` shows a part of `pages` of `object`.
fn mapped_part(vma: &Vma, object: &Arc<super::Object>, pages: &std::ops::Range<u64>) -> Option<HvaRange> {
    let (own, first) = vma.object_page(vma.range.start)?;
    if !Arc::ptr_eq(own, object) {
        return None;
    }
    let start = pages.start.max(first);
    let end = pages.end.min(first + vma.range.page_count());
    let at = |page: u64| Hva(vma.range.start.0 + (page - first) * PAGE_SIZE);
    (start < end).then(|| HvaRange { start: at(start), end: at(end) })
}
