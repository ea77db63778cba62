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
use crate::notifier::{self, Invalidation, Misuse, MmuNotifier, Shared, WouldBlock, YoungPages};
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
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed test may panic")]
    use super::*;
    use crate::frame::{FramePool, FreedFrames};
    use crate::mm::{Advice, Backing, MapFlags};
    use crate::notifier::Event;
    use vm_memory::{Bytes, GuestMemory};

    const RW: Access = Access::READ.union(Access::WRITE);

    fn space() -> (Arc<Mm>, GuestView) {
        let pool = FramePool::new(64 * PAGE_SIZE, FreedFrames::Poison).unwrap();
        let mm = Mm::new(Arc::new(pool)).unwrap();
        let view = view(&mm).unwrap();
        (mm, view)
    }

    fn map(mm: &Mm, pages: u64, prot: Access) -> Hva {
        mm.mmap(Hva(0), pages * PAGE_SIZE, prot, MapFlags::PRIVATE, Backing::Anonymous).unwrap()
    }

    fn fills(view: &GuestView) -> u64 {
        view.iommu().stats().fills.load(Ordering::Relaxed)
    }

    #[test]
    fn bytes_cross_pages_and_come_back() {
        let (mm, view) = space();
        let at = map(&mm, 3, RW);
        let text: Vec<u8> = (0..PAGE_SIZE * 2).map(|n| n as u8).collect();
        view.write_slice(&text, GuestAddress(at.0 + 100)).unwrap();
        let mut back = vec![0; text.len()];
        view.read_slice(&mut back, GuestAddress(at.0 + 100)).unwrap();
        assert_eq!(back, text);
        assert_eq!(fills(&view), 3, "the second access found what the first had filled in");
    }

    #[test]
    fn rights_of_the_mapping_hold_for_us_too() {
        let (mm, view) = space();
        let at = map(&mm, 1, Access::READ);
        assert!(view.write_slice(b"x", GuestAddress(at.0)).is_err());
        assert_eq!(view.read_obj::<u64>(GuestAddress(at.0)).unwrap(), 0);
        assert!(
            view.write_slice(b"x", GuestAddress(at.0)).is_err(),
            "a translation for reading is none for writing"
        );
        let none = map(&mm, 1, Access::empty());
        assert!(view.read_obj::<u64>(GuestAddress(none.0)).is_err());
    }

    /// Notes what it is told was written.
    #[derive(Debug, Default)]
    struct Writes(crate::sync::Mutex<Vec<HvaRange>>);

    impl MmuNotifier for Writes {
        fn written(&self, range: HvaRange) {
            self.0.lock().push(range);
        }
    }

    #[test]
    fn a_write_through_a_view_is_told_to_who_logs() {
        let (mm, view) = space();
        let at = map(&mm, 3, RW);
        let writes = Arc::<Writes>::default();
        let subscription = mm.register(writes.clone()).unwrap();
        let told = || std::mem::take(&mut *writes.0.lock());
        view.write_slice(b"nobody logs", GuestAddress(at.0)).unwrap();
        assert_eq!(told(), []);
        let logging = mm.log_writes();
        view.write_slice(&[7; 0x1100], GuestAddress(at.0 + 0xf80)).unwrap();
        let pages: std::collections::BTreeSet<u64> =
            told().iter().flat_map(|range| range.page_numbers()).collect();
        assert_eq!(pages.into_iter().collect::<Vec<_>>(), [at.page(), at.page() + 1, at.page() + 2]);
        view.read_obj::<u64>(GuestAddress(at.0)).unwrap();
        assert_eq!(told(), [], "reading is not writing");
        mm.madvise(at, 2 * PAGE_SIZE, Advice::DontNeed).unwrap();
        assert_eq!(told(), [HvaRange::pages_from(at, 2)], "the next one reads zeros");
        drop(logging);
        view.write_obj(1u64, GuestAddress(at.0)).unwrap();
        assert_eq!(told(), []);
        mm.unregister(&subscription).unwrap();
    }

    #[test]
    fn wild_addresses_are_errors() {
        let (_mm, view) = space();
        for wild in [0, 1, 0xdead_beef_0000, u64::MAX - 3, u64::MAX] {
            assert!(view.read_obj::<u64>(GuestAddress(wild)).is_err(), "{wild:#x}");
        }
    }

    #[test]
    fn i13_what_is_taken_away_is_found_no_more() {
        let (mm, view) = space();
        let at = map(&mm, 2, RW);
        let address = GuestAddress(at.0);
        view.write_obj(7u64, address).unwrap();
        mm.madvise(at, PAGE_SIZE, Advice::DontNeed).unwrap();
        assert_eq!(view.read_obj::<u64>(address).unwrap(), 0);
        // Read through the zero frame; the write must get a frame of its own and the next read see it.
        view.write_obj(8u64, address).unwrap();
        assert_eq!(view.read_obj::<u64>(address).unwrap(), 8);
        mm.mprotect(at, PAGE_SIZE, Access::READ).unwrap();
        assert!(view.write_obj(9u64, address).is_err());
        mm.munmap(at, PAGE_SIZE).unwrap();
        assert!(view.read_obj::<u64>(address).is_err());
        assert_eq!(view.read_obj::<u64>(GuestAddress(at.0 + PAGE_SIZE)).unwrap(), 0);
    }

    #[test]
    fn i23_no_frame_is_held_between_accesses() {
        let (mm, view) = space();
        let free = mm.pool().free_frames();
        let at = map(&mm, 1, RW);
        view.write_obj(7u64, GuestAddress(at.0)).unwrap();
        mm.munmap(at, PAGE_SIZE).unwrap();
        assert_eq!(mm.pool().free_frames(), free);
    }

    #[test]
    fn young_is_what_was_accessed_since_it_was_cleared() {
        let (mm, view) = space();
        let at = map(&mm, 4, RW);
        let (notifiers, page) = (mm.notifiers(), HvaRange::page(at));
        view.read_obj::<u64>(GuestAddress(at.0)).unwrap();
        assert!(notifiers.test_young(at) && notifiers.test_young(at));
        assert!(!notifiers.test_young(Hva(at.0 + PAGE_SIZE)));
        assert!(notifiers.clear_young(HvaRange { start: at, end: Hva(at.0 + 4 * PAGE_SIZE) }));
        assert!(!notifiers.clear_flush_young(page) && !notifiers.test_young(at));
        view.read_obj::<u64>(GuestAddress(at.0)).unwrap();
        assert!(notifiers.clear_flush_young(page));
    }

    #[test]
    fn an_access_that_would_wait_for_its_own_thread_is_refused() {
        let ((mm, view), (other_mm, other)) = (space(), space());
        let (at, elsewhere) = (map(&mm, 1, RW), map(&other_mm, 1, RW));
        let address = GuestAddress(at.0);
        let outer = view.get_slices(address, 8, Permissions::Read).unwrap();
        assert!(view.read_obj::<u64>(address).is_err());
        assert!(other.read_obj::<u64>(GuestAddress(elsewhere.0)).is_err());
        drop(outer);
        assert_eq!(view.read_obj::<u64>(address).unwrap(), 0);
        assert_eq!(other.read_obj::<u64>(GuestAddress(elsewhere.0)).unwrap(), 0);
        let pair = mm.notifiers().invalidate(HvaRange::page(at), Event::Clear);
        assert!(view.read_obj::<u64>(address).is_err());
        drop(pair);
        assert_eq!(view.read_obj::<u64>(address).unwrap(), 0);
    }

    #[test]
    fn accesses_of_no_byte_and_of_too_many_come_to_an_end() {
        let (mm, view) = space();
        let at = map(&mm, 2, Access::READ);
        let mut both = [0; 2 * PAGE_SIZE as usize];
        view.read_slice(&mut both, GuestAddress(at.0)).unwrap();
        // Both pages are there for reading; a write of nothing at the border between them asks for nothing.
        assert!(view.check_range(GuestAddress(at.0 + PAGE_SIZE), 0, Permissions::Write));
        assert!(view.check_range(GuestAddress(0), 0, Permissions::Read));
        let longest = (LONGEST * PAGE_SIZE) as usize;
        assert!(!view.check_range(GuestAddress(at.0), longest + 1, Permissions::Read));
        let nothing = HvaRange { start: at, end: at };
        let notifiers = mm.notifiers();
        assert!(!notifiers.clear_young(nothing));
        notifiers.invalidate_page(Hva(u64::MAX));
        assert!(!notifiers.test_young(Hva(u64::MAX)) && notifiers.test_young(at));
    }

    /// A start waits for the access that is on, and what is written meanwhile is in the page that the primary still has.
    #[test]
    fn i2_a_start_returns_when_no_access_uses_the_range() {
        let (mm, view) = space();
        let at = map(&mm, 1, RW);
        view.write_obj(1u64, GuestAddress(at.0)).unwrap();
        let mut slices = view.get_slices(GuestAddress(at.0), 8, Permissions::Write).unwrap();
        let slice = slices.next().unwrap().unwrap();
        let started = {
            let mm = Arc::clone(&mm);
            std::thread::spawn(move || drop(mm.notifiers().invalidate(HvaRange::page(at), Event::Clear)))
        };
        std::thread::sleep(std::time::Duration::from_millis(40));
        assert!(!started.is_finished(), "the pair was open while an access was on");
        slice.copy_from(&[2u64]);
        drop(slices);
        started.join().unwrap();
        assert_eq!(view.read_obj::<u64>(GuestAddress(at.0)).unwrap(), 2);
    }

    #[test]
    fn views_share_one_iotlb_and_the_last_takes_it_off() {
        let (mm, view) = space();
        let other = super::view(&mm).unwrap();
        let at = map(&mm, 1, RW);
        view.write_obj(1u64, GuestAddress(at.0)).unwrap();
        assert_eq!(other.read_obj::<u64>(GuestAddress(at.0)).unwrap(), 1);
        assert_eq!(fills(&other), 1);
        drop(view);
        assert!(mm.notifiers().has_listeners());
        drop(other);
        assert!(!mm.notifiers().has_listeners());
    }

    #[test]
    fn i8_after_release_nothing_is_translated() {
        let (mm, view) = space();
        let at = map(&mm, 1, RW);
        view.write_obj(1u64, GuestAddress(at.0)).unwrap();
        mm.release();
        assert!(view.read_obj::<u64>(GuestAddress(at.0)).is_err());
        assert!(super::view(&mm).is_err(), "a space that is gone has no new views");
    }

    #[test]
    fn a_full_iotlb_starts_anew() {
        let pool = FramePool::new(64 * PAGE_SIZE, FreedFrames::Keep).unwrap();
        let mm = Mm::new(Arc::new(pool)).unwrap();
        let view = super::view(&mm).unwrap();
        let at = mm
            .mmap(Hva(0), (CAPACITY + 1) * PAGE_SIZE, Access::READ, MapFlags::PRIVATE, Backing::Anonymous)
            .unwrap();
        for page in 0..=CAPACITY {
            assert_eq!(view.read_obj::<u64>(GuestAddress(at.0 + page * PAGE_SIZE)).unwrap(), 0);
        }
        assert_eq!(view.iommu().cache.translations.read().filled, 1);
        assert_eq!(view.read_obj::<u64>(GuestAddress(at.0)).unwrap(), 0);
    }

    /// Not a test: prints what an access of 8 bytes costs through the IOTLB, and as one that faults and pins each time.
    #[test]
    #[ignore = "prints figures"]
    fn measure_an_access() {
        const PAGES: u64 = 64;
        const ACCESSES: u64 = 1_000_000;
        let pool = FramePool::new(256 * PAGE_SIZE, FreedFrames::Keep).unwrap();
        let mm = Mm::new(Arc::new(pool)).unwrap();
        let view = super::view(&mm).unwrap();
        let at = map(&mm, PAGES, RW);
        let nanoseconds = |access: &dyn Fn(Hva)| {
            let began = std::time::Instant::now();
            (0..ACCESSES).for_each(|n| access(Hva(at.0 + n % PAGES * PAGE_SIZE)));
            began.elapsed().as_nanos() as f64 / ACCESSES as f64
        };
        for _ in 0..3 {
            let cached = nanoseconds(&|hva| {
                view.read_obj::<u64>(GuestAddress(hva.0)).unwrap();
            });
            let pinned = nanoseconds(&|hva| {
                let page = mm.fault(&FaultRequest::one_page(hva, Access::READ)).unwrap();
                mm.pool().words(page.required().pfn)[0].load(Ordering::Relaxed);
            });
            println!("IOTLB {cached:.0} ns, fault and pin alone {pinned:.0} ns");
        }
    }
}
