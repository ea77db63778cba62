// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Interval notifiers and shared listeners, used as a driver uses them.
//!
//! The driver is a mirror in the manner of the kernel's `lib/test_hmm.c`: a table of frames under a lock of its own, filled by
//! look-ups in the address space and emptied by the callback.
#![cfg(feature = "mmu-notifier")]
#![allow(clippy::unwrap_used, reason = "what a test does not expect may end it")]

use shadow_mmu::addr::{Access, Hva, HvaRange, PAGE_SIZE, Pfn};
use shadow_mmu::frame::{FramePool, FreedFrames};
use shadow_mmu::mm::{Advice, Backing, FaultRequest, MapFlags, Mm};
use shadow_mmu::notifier::interval::{Collision, IntervalNotifier, IntervalSubscription};
use shadow_mmu::notifier::{self, Event, Invalidation, Misuse, MmuNotifier, WouldBlock};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

const BASE: Hva = Hva(0x7000_0000);
const RW: Access = Access::READ.union(Access::WRITE);

fn span(from: u64, to: u64) -> HvaRange {
    HvaRange { start: Hva(BASE.0 + from * PAGE_SIZE), end: Hva(BASE.0 + to * PAGE_SIZE) }
}

fn space() -> Arc<Mm> {
    let mm = Mm::new(Arc::new(FramePool::new(256 * PAGE_SIZE, FreedFrames::Poison).unwrap())).unwrap();
    mm.mmap(BASE, 16 * PAGE_SIZE, RW, MapFlags::PRIVATE | MapFlags::FIXED, Backing::Anonymous).unwrap();
    mm
}

/// Watches a thread that must not come to its end.
#[track_caller]
fn assert_waits<T>(thread: &JoinHandle<T>, what: &str) {
    std::thread::sleep(Duration::from_millis(40));
    assert!(!thread.is_finished(), "{what}");
}

#[derive(Debug, Default)]
struct Mirror {
    frames: Mutex<BTreeMap<u64, Pfn>>,
    told: AtomicUsize,
    refuses: AtomicBool,
}

impl IntervalNotifier for Mirror {
    fn invalidate(&self, invalidation: &Invalidation, collision: Collision<'_>) -> Result<(), WouldBlock> {
        self.told.fetch_add(1, Ordering::SeqCst);
        if self.refuses.load(Ordering::SeqCst) {
            return Err(WouldBlock);
        }
        let mut frames = self.frames.lock().unwrap();
        collision.set_seq();
        frames.retain(|page, _| !invalidation.range.page_numbers().contains(page));
        Ok(())
    }
}

impl Mirror {
    fn told(&self) -> usize {
        self.told.load(Ordering::SeqCst)
    }

    /// Mirrors one page (`dmirror_range_fault`). Returns how often it had to begin again.
    fn fault(&self, mm: &Mm, subscription: &IntervalSubscription, hva: Hva) -> usize {
        for attempt in 0.. {
            let begun = subscription.read_begin().unwrap();
            let pfn = mm.fault(&FaultRequest::one_page(hva, RW)).unwrap().required().pfn;
            let mut frames = self.frames.lock().unwrap();
            if !subscription.read_retry(begun) {
                frames.insert(hva.page(), pfn);
                return attempt;
            }
        }
        unreachable!()
    }

    fn get(&self, hva: Hva) -> Option<Pfn> {
        self.frames.lock().unwrap().get(&hva.page()).copied()
    }
}

fn subscribe(mm: &Mm, range: HvaRange) -> (Arc<Mirror>, IntervalSubscription) {
    let mirror = Arc::<Mirror>::default();
    let subscription = mm.insert_interval(range, Arc::clone(&mirror) as _).unwrap();
    (mirror, subscription)
}

#[test]
fn a_subscriber_hears_of_its_range_and_of_no_other() {
    let mm = space();
    let (mirror, subscription) = subscribe(&mm, span(2, 4));
    assert_eq!(subscription.range(), span(2, 4));
    drop(mm.notifiers().invalidate(span(0, 2), Event::Clear));
    drop(mm.notifiers().invalidate(span(4, 9), Event::Clear));
    assert_eq!(mirror.told(), 0);
    drop(mm.notifiers().invalidate(span(0, 3), Event::Clear));
    drop(mm.notifiers().invalidate(span(3, 4), Event::Clear));
    assert_eq!(mirror.told(), 2);
    drop(subscription);
    drop(mm.notifiers().invalidate(span(0, 9), Event::Clear));
    assert_eq!(mirror.told(), 2, "a subscription that ended");
}

#[test]
fn i13_a_mirrored_page_goes_when_the_primary_changes() {
    let mm = space();
    let (mirror, subscription) = subscribe(&mm, span(0, 16));
    assert_eq!(mirror.fault(&mm, &subscription, BASE), 0);
    let old = mirror.get(BASE).unwrap();
    assert_eq!(Some(old), mm.lookup(BASE).map(|(pte, _)| pte.pfn()));
    mm.madvise(BASE, PAGE_SIZE, Advice::DontNeed).unwrap();
    assert_eq!(mirror.get(BASE), None);
    mirror.fault(&mm, &subscription, BASE);
    assert_eq!(mirror.get(BASE), mm.lookup(BASE).map(|(pte, _)| pte.pfn()));
}

/// A look-up that began before an invalidation must not be used after it (R1, R5), whenever it ended.
#[test]
fn r1_what_was_looked_up_before_an_invalidation_is_refused_after_it() {
    let mm = space();
    let (_mirror, subscription) = subscribe(&mm, span(0, 4));
    let begun = subscription.read_begin().unwrap();
    assert!(!subscription.read_retry(begun));
    let pair = mm.notifiers().invalidate(span(0, 1), Event::Clear);
    assert!(subscription.read_retry(begun));
    drop(pair);
    assert!(subscription.read_retry(begun));
    let begun = subscription.read_begin().unwrap();
    drop(mm.notifiers().invalidate(span(8, 9), Event::Clear));
    assert!(!subscription.read_retry(begun), "another range does not collide");
    drop(mm.notifiers().invalidate(span(3, 9), Event::Clear));
    assert!(subscription.read_retry(begun));
}

/// `read_begin` sleeps while its own range is invalidated, and only then.
#[test]
fn a_look_up_begins_after_the_invalidation_of_its_range() {
    let mm = space();
    let (_other_mirror, other) = subscribe(&mm, span(8, 12));
    let (mirror, subscription) = subscribe(&mm, span(0, 4));
    let pair = mm.notifiers().invalidate(span(0, 1), Event::Clear);
    assert!(!other.read_retry(other.read_begin().unwrap()), "the other range is free");
    let reader = {
        let (mm, mirror) = (Arc::clone(&mm), Arc::clone(&mirror));
        std::thread::spawn(move || mirror.fault(&mm, &subscription, BASE))
    };
    assert_waits(&reader, "a look-up began inside the invalidation of its range");
    // A second pair that overlaps the first one, and is not the one that the reader waits for, keeps it waiting.
    let second = mm.notifiers().invalidate(span(8, 9), Event::Clear);
    drop(pair);
    assert_waits(&reader, "the collision is over when no pair is open");
    drop(second);
    assert_eq!(reader.join().unwrap(), 0);
}

#[test]
fn r32_a_subscription_that_begins_inside_a_pair_collides_with_it() {
    let mm = space();
    // So that the layer is on, and one that is hit, so that the second kind of insertion is taken too.
    let (_first, hit) = subscribe(&mm, span(0, 1));
    for range in [span(12, 13), span(0, 1)] {
        let pair = mm.notifiers().invalidate(range, Event::Unmap);
        let (mirror, subscription) = subscribe(&mm, span(4, 8));
        let reader = {
            let (mm, mirror) = (Arc::clone(&mm), Arc::clone(&mirror));
            std::thread::spawn(move || (mirror.fault(&mm, &subscription, span(4, 5).start), subscription))
        };
        assert_waits(&reader, "began to look up inside a pair that it does not know");
        drop(pair);
        let (_, subscription) = reader.join().unwrap();
        drop(mm.notifiers().invalidate(span(4, 5), Event::Clear));
        assert_eq!(mirror.told(), 1, "from now on it is told");
        drop(subscription);
    }
    drop(hit);
}

#[test]
fn r32_an_insertion_that_waits_can_be_taken_back() {
    let mm = space();
    let (_first, hit) = subscribe(&mm, span(0, 1));
    let pair = mm.notifiers().invalidate(span(0, 1), Event::Unmap);
    let (mirror, subscription) = subscribe(&mm, span(0, 8));
    drop(subscription);
    drop(pair);
    drop(mm.notifiers().invalidate(span(0, 1), Event::Clear));
    assert_eq!(mirror.told(), 0);
    drop(hit);
}

#[test]
fn i7_a_removal_waits_for_the_invalidation_that_is_on() {
    let mm = space();
    let (mirror, subscription) = subscribe(&mm, span(0, 4));
    let pair = mm.notifiers().invalidate(span(0, 1), Event::Clear);
    let removal = std::thread::spawn(move || drop(subscription));
    assert_waits(&removal, "removed while its range was invalidated");
    drop(pair);
    removal.join().unwrap();
    drop(mm.notifiers().invalidate(span(0, 1), Event::Clear));
    assert_eq!(mirror.told(), 1);
}

/// Counts pairs, to see that a refused one is balanced.
#[derive(Debug, Default)]
struct Balance(AtomicUsize, AtomicUsize);

impl MmuNotifier for Balance {
    fn invalidate_range_start(&self, _: &Invalidation) -> Result<(), WouldBlock> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn invalidate_range_end(&self, _: &Invalidation) {
        self.1.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn i10_r23_a_subscriber_that_would_block_refuses_the_pair_before_the_list_is_asked() {
    let mm = space();
    let (mirror, subscription) = subscribe(&mm, span(0, 4));
    let balance = Arc::<Balance>::default();
    mm.register(Arc::clone(&balance) as _).unwrap();
    mirror.refuses.store(true, Ordering::SeqCst);
    assert!(mm.notifiers().invalidate_nonblock(span(0, 1), Event::Unmap).is_err());
    assert_eq!((balance.0.load(Ordering::SeqCst), balance.1.load(Ordering::SeqCst)), (0, 0));
    // No window was left open: neither a look-up nor a removal waits.
    assert!(!subscription.read_retry(subscription.read_begin().unwrap()));
    mirror.refuses.store(false, Ordering::SeqCst);
    drop(mm.notifiers().invalidate_nonblock(span(0, 1), Event::Unmap).unwrap());
    assert_eq!((balance.0.load(Ordering::SeqCst), balance.1.load(Ordering::SeqCst)), (1, 1));
    drop(subscription);
}

#[test]
fn i8_the_end_of_the_space_empties_the_mirror_and_lets_its_readers_go() {
    let mm = space();
    let (mirror, subscription) = subscribe(&mm, span(0, 16));
    mirror.fault(&mm, &subscription, BASE);
    let begun = subscription.read_begin().unwrap();
    mm.release();
    assert_eq!(mirror.get(BASE), None);
    assert!(subscription.read_retry(begun));
    assert_eq!(subscription.read_begin(), Err(Misuse::Released), "nobody would tell of what changes now");
    let late = mm.insert_interval(span(0, 1), Arc::<Mirror>::default());
    assert_eq!(late.err(), Some(Misuse::Released));
    drop((mm, subscription));
}

/// Mirrors and changes at once: whenever the mirror has a page outside of pairs, it is the primary's.
#[test]
fn r1_r5_a_mirror_is_true_in_a_storm_of_changes() {
    let mm = space();
    let (mirror, subscription) = subscribe(&mm, span(0, 16));
    let (over, begun) = (AtomicBool::new(false), std::sync::Barrier::new(2));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            begun.wait();
            for round in 0.. {
                if over.load(Ordering::Relaxed) {
                    return;
                }
                mirror.fault(&mm, &subscription, span(round % 16, 16).start);
            }
        });
        // On a busy machine a thread may take longer to start than the changes take.
        begun.wait();
        for round in 0..4000 {
            let at = span(round * 7 % 16, 16).start;
            mm.madvise(at, PAGE_SIZE, Advice::DontNeed).unwrap();
            // No pair is open and none can open while the mmap lock is held for writing.
            let map = mm.mmap_write_lock();
            for (&page, &pfn) in mirror.frames.lock().unwrap().iter() {
                assert_eq!(map.pte(Hva(page * PAGE_SIZE)).counted_frame(), Some(pfn), "page {page:#x}");
            }
        }
        over.store(true, Ordering::Relaxed);
    });
    drop(subscription);
}

/// A listener that says when it is freed.
#[derive(Debug)]
struct Freed(mpsc::Sender<&'static str>);

impl MmuNotifier for Freed {
    fn release(&self) {
        self.0.send("released").unwrap();
    }
}

impl Drop for Freed {
    fn drop(&mut self) {
        self.0.send("freed").unwrap();
    }
}

#[test]
fn users_of_one_kind_share_a_listener_until_the_last_has_put_it() {
    let mm = space();
    let (sender, events) = mpsc::channel();
    let first = notifier::get(&mm, || Freed(sender.clone())).unwrap();
    let second = notifier::get(&mm, || -> Freed { panic!("there is one already") }).unwrap();
    assert!(std::ptr::eq(&*first, &*second));
    drop(first);
    assert!(mm.notifiers().has_listeners());
    drop(second);
    mm.notifiers().synchronize().unwrap();
    assert_eq!(events.try_iter().collect::<Vec<_>>(), ["freed"], "put calls no release");
    assert!(!mm.notifiers().has_listeners());
    // Another generation.
    drop(notifier::get(&mm, || Freed(sender)).unwrap());
    mm.notifiers().synchronize().unwrap();
    assert_eq!(events.try_iter().collect::<Vec<_>>(), ["freed"]);
}

#[test]
fn r19_a_put_listener_is_freed_when_its_ops_are_over() {
    let mm = space();
    let (sender, events) = mpsc::channel();
    let shared = notifier::get(&mm, || Freed(sender)).unwrap();
    // A pair is a read section; the put falls into it.
    let pair = mm.notifiers().invalidate(span(0, 1), Event::Clear);
    std::thread::scope(|scope| scope.spawn(|| drop(shared)).join().unwrap());
    assert_eq!(events.recv_timeout(Duration::from_millis(40)), Err(mpsc::RecvTimeoutError::Timeout));
    drop(pair);
    assert_eq!(events.recv_timeout(Duration::from_secs(60)), Ok("freed"));
}

#[test]
fn a_space_that_ends_first_releases_the_shared_listener() {
    let mm = space();
    let (sender, events) = mpsc::channel();
    let shared = notifier::get(&mm, || Freed(sender.clone())).unwrap();
    mm.release();
    assert_eq!(notifier::get(&mm, || Freed(sender)).err(), Some(Misuse::Released));
    drop(mm);
    drop(shared);
    let last = events.iter().take(3).collect::<Vec<_>>();
    assert_eq!(last, ["released", "freed", "freed"], "one was made in vain");
}

#[test]
fn users_come_and_go_on_many_threads() {
    let mm = space();
    let live = Arc::new(AtomicUsize::new(0));
    #[derive(Debug)]
    struct One(Arc<AtomicUsize>);
    impl MmuNotifier for One {}
    impl Drop for One {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::SeqCst);
        }
    }
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..300 {
                    let made = || {
                        live.fetch_add(1, Ordering::SeqCst);
                        One(Arc::clone(&live))
                    };
                    let shared = notifier::get(&mm, made).unwrap();
                    assert!(live.load(Ordering::SeqCst) > 0);
                    drop(mm.notifiers().invalidate(span(0, 1), Event::Clear));
                    drop(shared);
                }
            });
        }
    });
    mm.notifiers().synchronize().unwrap();
    assert_eq!(live.load(Ordering::SeqCst), 0);
}
