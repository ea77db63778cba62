// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest memory as devices and other rust-vmm code see it: vm-memory's [`Iommu`] over an [`Mm`], with a device IOTLB.
//!
//! A [`GuestView`] is a `GuestMemory` whose addresses are those of the address space. Its IOTLB is a secondary MMU like the
//! shadow map: it asks the `Mm` for what it misses, keeps the translation, and loses it through the notifier. An address space
//! has one IOTLB, shared by its views ([`notifier::get`]).
//!
//! # Protocol
//! One readers-writer lock guards translations and [windows](crate::notifier::windows). An access holds it for reading from
//! its translation to its last byte, so `invalidate_range_start` and every other removal, which take it for writing, return
//! when no access is left that uses what they removed. A miss is filled without the lock, under the rule of sequence and retry.
//! No frame is pinned beyond the fill (I23). The lock is a leaf: nothing is waited for under it but the copy.
//!
//! Therefore *an access must be short, and must not reach back*: while the slices of one are alive, no other access of any
//! view by the same thread (it is refused), no call that changes an address space, no wait for one. Nor is there an access
//! inside a pair or a callback (refused too). Data of a slow file goes through a buffer. And a slice must not outlive the
//! iterator that it came from: vm-memory's types would allow it.
//!
//! # Aging
//! A translation is there because an access needed it since the last aging, so being there is being young. Clearing young
//! removes it, and counts as a removal (I5, R13).

use crate::addr::{Access, Hva, HvaRange, PAGE_SHIFT, PAGE_SIZE};
use crate::frame::{FrameMemory, WriteHook, WriteSink};
use crate::mm::{FaultRequest, Mm, Pinned, Pte};
use crate::notifier::windows::{Sequence, Windows};
use crate::notifier::{
    self, Invalidation, Misuse, MmuNotifier, Shared, WouldBlock, WrittenPages, YoungPages,
};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Arc, RwLock, RwLockReadGuard, thread, thread_local};
use std::cell::Cell;
use std::fmt;
use std::ops::{Deref, Range};
use vm_memory::iommu::{Error, IotlbFails, IotlbIterator, IovaRange};
use vm_memory::{GuestAddress, Iommu, IommuMemory, Iotlb, Permissions};

/// Pages that the IOTLB holds before it starts anew: 64 MiB of memory, a few hundred KiB of translations.
const CAPACITY: u64 = 16384;
/// Pages of one access at most, so that what one fill brings in is there together, and pins no more than that.
const LONGEST: u64 = CAPACITY / 4;

thread_local! {
    /// Whether this thread is in an access, of any address space: two spaces may have one lock order or another.
    static ACCESSING: Cell<bool> = const { Cell::new(false) };
}

/// vm-memory's view of an address space: `Bytes<GuestAddress>` over its addresses.
pub type GuestView = IommuMemory<FrameMemory, DeviceIotlb>;

/// A view of `mm`.
///
/// # Errors
/// [`Misuse::Released`].
pub fn view(mm: &Arc<Mm>) -> Result<GuestView, Misuse> {
    let cache = notifier::get(mm, Cache::default)?;
    let writes = WriteHook::new(Arc::new(DeviceWrites(Arc::clone(mm))));
    Ok(IommuMemory::new(mm.pool().memory().clone(), DeviceIotlb { mm: Arc::clone(mm), cache }, true, writes))
}

/// Tells the address space what devices write, right after they have: by then no log can report the page, and arm it, without
/// having been told of this write.
#[derive(Debug)]
struct DeviceWrites(Arc<Mm>);

impl WriteSink for DeviceWrites {
    fn written(&self, addr: u64, len: usize) {
        self.0.written(HvaRange::new(Hva(addr), Hva(addr.saturating_add(len as u64))));
    }
}

/// Counters of an IOTLB.
#[derive(Debug, Default)]
pub struct IotlbStats {
    /// Translations that were all there.
    pub hits: AtomicU64,
    /// Pages that the address space was asked for.
    pub fills: AtomicU64,
    /// Fills that began again because of an invalidation.
    pub retries: AtomicU64,
}

/// Translates addresses of an [`Mm`] to offsets in its pool's file.
#[derive(Debug)]
pub struct DeviceIotlb {
    mm: Arc<Mm>,
    cache: Shared<Cache>,
}

/// What `Cache::translations` guards.
#[derive(Debug, Default)]
struct Translations {
    iotlb: Iotlb,
    /// Pages filled in since the IOTLB was empty: no fewer than it holds.
    filled: u64,
    windows: Windows,
}

/// The IOTLB of an address space: the part that the notifier calls. It does not know the `Mm`, so it cannot call it.
#[derive(Debug, Default)]
struct Cache {
    translations: RwLock<Translations>,
    seq: Sequence,
    stats: IotlbStats,
}

/// The translations of one access. While it lives they stay true.
pub struct AccessGuard<'a> {
    translations: RwLockReadGuard<'a, Translations>,
}

impl fmt::Debug for AccessGuard<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AccessGuard").finish_non_exhaustive()
    }
}

impl Deref for AccessGuard<'_> {
    type Target = Iotlb;
    fn deref(&self) -> &Iotlb {
        &self.translations.iotlb
    }
}

impl Drop for AccessGuard<'_> {
    fn drop(&mut self) {
        ACCESSING.with(|accessing| accessing.set(false));
    }
}

fn bytes(range: HvaRange) -> (GuestAddress, usize) {
    (GuestAddress(range.start.0), range.len() as usize)
}

impl Cache {
    /// The translations of `length` bytes from `iova` on, if all are there.
    fn look_up(
        &self,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<IotlbIterator<AccessGuard<'_>>, IotlbFails> {
        let translations = self.translations.read();
        ACCESSING.with(|accessing| accessing.set(true));
        Iotlb::lookup(AccessGuard { translations }, iova, length, access)
    }

    /// The translations of `range` are out of date, and so is what is being looked up. Outside of any pair.
    fn remove(&self, range: HvaRange) {
        let mut translations = self.translations.write();
        forget(&mut translations.iotlb, range);
        self.seq.removed();
    }

    /// Drops the translations of `range`; whether there were any. What is being looked up stays good.
    fn age(&self, range: HvaRange) -> bool {
        // Most of what is aged no device has touched.
        if !has_any(&self.translations.read().iotlb, range) {
            return false;
        }
        let mut translations = self.translations.write();
        let had = has_any(&translations.iotlb, range);
        forget(&mut translations.iotlb, range);
        if had {
            self.seq.removed();
        }
        had
    }
}

fn forget(iotlb: &mut Iotlb, range: HvaRange) {
    let (base, length) = bytes(range);
    // vm-memory's map does not take empty ranges.
    if length > 0 {
        iotlb.invalidate_mapping(base, length);
    }
}

/// Whether all of `range` is translated for writing.
fn is_writable(iotlb: &Iotlb, range: HvaRange) -> bool {
    let (base, length) = bytes(range);
    Iotlb::lookup(iotlb, base, length, Permissions::Write).is_ok()
}

/// Whether some byte of `range` is translated.
fn has_any(iotlb: &Iotlb, range: HvaRange) -> bool {
    let (base, length) = bytes(range);
    match Iotlb::lookup(iotlb, base, length, Permissions::No) {
        Ok(_) => length > 0,
        Err(fails) => fails.misses.iter().map(|miss| miss.length).sum::<usize>() < length,
    }
}

impl MmuNotifier for Cache {
    fn release(&self) {
        let mut translations = self.translations.write();
        translations.windows.release(&self.seq);
        translations.iotlb.invalidate_all();
    }

    fn invalidate_range_start(&self, invalidation: &Invalidation) -> Result<(), WouldBlock> {
        // Waits for accesses, which are short; so also where it may not sleep for long.
        let mut translations = self.translations.write();
        translations.windows.open(invalidation.range.page_numbers());
        forget(&mut translations.iotlb, invalidation.range);
        Ok(())
    }

    fn invalidate_range_end(&self, invalidation: &Invalidation) {
        let pages = invalidation.range.page_numbers();
        if !self.translations.write().windows.close(&pages, &self.seq) {
            log::error!("end without start for {}", invalidation.range);
        }
    }

    fn invalidate_page(&self, hva: Hva) {
        self.remove(HvaRange::page(hva));
    }

    /// The frame changes: whether the new one may be used is asked when it is needed.
    fn change_pte(&self, hva: Hva, _: Pte) {
        self.remove(HvaRange::page(hva));
    }

    fn clear_flush_young(&self, range: HvaRange) -> bool {
        self.age(range)
    }

    fn clear_young(&self, range: HvaRange) -> bool {
        self.age(range)
    }

    /// Most ranges no device has touched; that is asked first.
    fn test_clear_young(&self, young: &mut YoungPages) {
        let range = young.range();
        if !has_any(&self.translations.read().iotlb, range) {
            return;
        }
        for page in range.page_numbers() {
            if self.age(HvaRange::page(Hva(page << PAGE_SHIFT))) {
                young.add(page);
            }
        }
    }

    /// A translation for writing marks the page once, when it is made; so it goes, and the next write makes another.
    fn test_clear_dirty(&self, pages: &mut WrittenPages) {
        let range = pages.range();
        if !has_any(&self.translations.read().iotlb, range) {
            return;
        }
        for page in range.page_numbers() {
            let at = HvaRange::page(Hva(page << PAGE_SHIFT));
            let writes = pages.is_asked(page) && is_writable(&self.translations.read().iotlb, at);
            if writes && self.age(at) {
                pages.add(page);
            }
        }
    }

    fn test_young(&self, hva: Hva) -> bool {
        has_any(&self.translations.read().iotlb, HvaRange::page(hva))
    }
}

impl DeviceIotlb {
    /// Counters.
    pub fn stats(&self) -> &IotlbStats {
        &self.cache.stats
    }

    fn retry(&self) {
        self.cache.stats.retries.fetch_add(1, Ordering::Relaxed);
        thread::yield_now();
    }

    fn pin(&self, hva: Hva, access: Access) -> Result<Pinned<'_>, String> {
        let pinned = self
            .mm
            .fault(&FaultRequest::one_page(hva, access))
            .map_err(|error| format!("{error} at {hva}"))?;
        if pinned.pool().contains(pinned.required().pfn) {
            Ok(pinned)
        } else {
            // As get_user_pages refuses VM_PFNMAP: such a page is not the pool's, and cannot be reached through its file.
            Err(format!("{hva} is an adopted mapping of the host, which no device can reach"))
        }
    }

    /// Fills in `pages`, unless an invalidation came between: then the caller looks again.
    ///
    /// # Errors
    /// Why a page cannot be reached.
    fn fill(&self, pages: Range<u64>, access: Permissions) -> Result<(), String> {
        let begun = self.cache.seq.snapshot();
        if self.cache.translations.read().windows.contains(&pages) {
            // As a guest's fault: it would fetch the pages in vain, and hold what the pair needs to get on (R31).
            self.retry();
            return Ok(());
        }
        let mut wanted = Access::READ;
        wanted.set(Access::WRITE, access.has_write());
        let pinned = pages
            .clone()
            .map(|page| self.pin(Hva(page << PAGE_SHIFT), wanted))
            .collect::<Result<Vec<Pinned<'_>>, _>>()?;
        self.cache.stats.fills.fetch_add(pinned.len() as u64, Ordering::Relaxed);
        let mut translations = self.cache.translations.write();
        if translations.windows.is_released() {
            return Err("the address space is gone".into());
        }
        if translations.windows.must_retry(begun, &self.cache.seq, &pages) {
            drop(translations);
            self.retry();
            return Ok(());
        }
        if translations.filled + pinned.len() as u64 > CAPACITY {
            translations.iotlb.invalidate_all();
            translations.filled = 0;
        }
        translations.filled += pinned.len() as u64;
        for page in &pinned {
            let page = page.required();
            let target = GuestAddress(page.pfn.offset());
            // Write only for an access that writes, even where more is allowed: the fault of the first write marks the page
            // dirty in the primary.
            let set = translations.iotlb.set_mapping(
                GuestAddress(page.hva.0),
                target,
                PAGE_SIZE as usize,
                access | Permissions::Read,
            );
            debug_assert!(set.is_ok(), "vm-memory's IOTLB has no limit");
        }
        Ok(())
    }
}

impl Iommu for DeviceIotlb {
    type IotlbGuard<'a> = AccessGuard<'a>;

    /// # Errors
    /// [`Error::CannotResolve`]: not mapped, not allowed, out of memory, too long, or inside another access or a pair of this
    /// thread.
    fn translate(
        &self,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<IotlbIterator<AccessGuard<'_>>, Error> {
        let fail =
            |reason: String| Error::CannotResolve { iova_range: IovaRange { base: iova, length }, reason };
        if iova.0.checked_add(length as u64).is_none() {
            return Err(fail("wraps around".into()));
        }
        if length as u64 > LONGEST * PAGE_SIZE {
            return Err(fail(format!("longer than {LONGEST} pages: make it in pieces")));
        }
        // The lock would be taken twice, with a writer perhaps waiting in between; or a fill would wait for a pair that
        // waits for us.
        if ACCESSING.with(Cell::get) {
            return Err(fail("inside another access of this thread".into()));
        }
        if self.mm.notifiers().inside() {
            return Err(fail("inside a pair or a callback of this thread".into()));
        }
        // No byte needs no right, and no translation.
        let access = if length == 0 { Permissions::No } else { access };
        loop {
            let missing = match self.cache.look_up(iova, length, access) {
                Ok(found) => {
                    self.cache.stats.hits.fetch_add(1, Ordering::Relaxed);
                    return Ok(found);
                }
                Err(fails) => fails.misses.into_iter().chain(fails.access_fails),
            };
            for part in missing {
                let end = part.base.0 + part.length as u64;
                let pages = part.base.0 >> PAGE_SHIFT..end.div_ceil(PAGE_SIZE);
                self.fill(pages, access).map_err(fail)?;
            }
        }
    }
}

#[cfg(test)]
mod tests;
