// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The device IOTLB: what it translates, and what it loses when the address space changes.

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
