// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The list of listeners: registration, pairs, the end of a listener and of the address space; and intervals. A listener has a
//! cell of loom's that its ops use and that is taken back when no op may run any more.

use crate::addr::{Hva, HvaRange};
use crate::exhaust::{Preemptions, exhaust, refute};
use crate::mutant::M;
use crate::notifier::interval::{Collision, IntervalNotifier, IntervalSubscription};
use crate::notifier::{Event, Invalidation, MmuNotifier, Notifiers, WouldBlock};
use crate::sequence::Mmu;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Arc, Mutex, RwLock};
use loom::cell::UnsafeCell;

/// What its ops use. Starts without their ends are counted.
#[derive(Debug)]
struct Probe {
    used: UnsafeCell<()>,
    open: AtomicU64,
}

// SAFETY: loom checks each access to the cell; that they are ordered is what the models are about.
unsafe impl Sync for Probe {}
// SAFETY: as above.
unsafe impl Send for Probe {}

impl Probe {
    fn new() -> Arc<Self> {
        Arc::new(Self { used: UnsafeCell::new(()), open: AtomicU64::new(0) })
    }

    /// No op runs, nor will one.
    fn free(&self) {
        self.used.with_mut(|_| ());
    }
}

impl MmuNotifier for Probe {
    fn release(&self) {
        self.used.with(|_| ());
    }
    fn invalidate_range_start(&self, _: &Invalidation) -> Result<(), WouldBlock> {
        self.used.with(|_| ());
        self.open.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
    fn invalidate_range_end(&self, _: &Invalidation) {
        self.used.with(|_| ());
        let before = self.open.fetch_sub(1, Ordering::Relaxed);
        assert!(before > 0, "an end without its start (I9)");
    }
}

const RANGE: HvaRange = HvaRange { start: Hva(0x1000), end: Hva(0x2000) };

/// An address space: the mmap lock and the listeners.
#[derive(Default)]
struct Space {
    mmap_lock: RwLock<()>,
    notifiers: Notifiers,
}

impl Space {
    fn pair(&self) {
        let _mapped = self.mmap_lock.read();
        drop(self.notifiers.invalidate(RANGE, Event::Clear));
    }
}

fn spawn<R: 'static>(
    space: &Arc<Space>,
    run: impl FnOnce(&Space) -> R + 'static,
) -> loom::thread::JoinHandle<R> {
    let space = Arc::clone(space);
    loom::thread::spawn(move || run(&space))
}

/// A pair, in which the page goes, and a registration with the mmap lock held; then a fault (I9).
fn register() {
    register_and_fault(|space, mmu| {
        let _exclusive = space.mmap_lock.write();
        space.notifiers.register_locked(mmu).unwrap();
    });
}

/// The same without the lock.
fn register_unlocked() {
    register_and_fault(|space, mmu| {
        space.notifiers.register_locked(mmu).unwrap();
    });
}

fn register_and_fault(register: fn(&Space, Arc<Mmu>)) {
    let space = Arc::new(Space::default());
    let mmu = Mmu::new();
    let taker = {
        let mmu = Arc::clone(&mmu);
        spawn(&space, move |space| {
            let _mapped = space.mmap_lock.read();
            let _pair = space.notifiers.invalidate(RANGE, Event::Clear);
            mmu.set_pte(0);
        })
    };
    register(&space, mmu.clone());
    mmu.fault();
    taker.join().unwrap();
    mmu.check();
}

#[test]
fn i9_a_registration_and_a_pair() {
    exhaust("register", Preemptions::Any, register, &[]);
    refute("register_unlocked", Preemptions::Any, register_unlocked);
}

/// A pair, and an unregister, behind which the listener is freed (I7).
fn unregister() {
    let space = Arc::new(Space::default());
    let probe = Probe::new();
    let subscription = space.notifiers.register_locked(probe.clone()).unwrap();
    let pair = spawn(&space, Space::pair);
    space.notifiers.unregister(&subscription).unwrap();
    probe.free();
    pair.join().unwrap();
}

#[test]
fn i7_an_unregister_and_a_pair() {
    exhaust("unregister", Preemptions::Any, unregister, &[M::UnregisterDoesNotWait]);
}

/// An unregister and the end of the address space; the listener is freed behind the latter (R18).
fn release() {
    let space = Arc::new(Space::default());
    let probe = Probe::new();
    let subscription = space.notifiers.register_locked(probe.clone()).unwrap();
    let leaver = spawn(&space, move |space| {
        // It may have been taken off by then.
        let _ = space.notifiers.unregister(&subscription);
    });
    space.notifiers.release().unwrap();
    probe.free();
    leaver.join().unwrap();
}

#[test]
fn r18_an_unregister_and_the_end_of_the_space() {
    exhaust("release", Preemptions::Any, release, &[M::ReleaseDoesNotWait, M::ReleaseOutsideSection]);
}

/// A device that maps one page under its own lock; the page's frame is a cell that is taken back when nobody uses it.
#[derive(Debug)]
struct Device {
    mapped: Mutex<bool>,
}

impl IntervalNotifier for Device {
    fn invalidate(&self, _: &Invalidation, collision: Collision<'_>) -> Result<(), WouldBlock> {
        let mut mapped = self.mapped.lock();
        collision.set_seq();
        *mapped = false;
        Ok(())
    }
}

impl Device {
    /// One try of the loop of `read_begin` and `read_retry`.
    fn map(&self, interval: &IntervalSubscription, pte: &Mutex<bool>) {
        let begun = interval.read_begin().unwrap();
        let present = *pte.lock();
        let mut mapped = self.mapped.lock();
        if present && !interval.read_retry(begun) {
            *mapped = true;
        }
    }
}

/// A device looks its page up and maps it; a pair takes the page away.
fn interval() {
    let space = Arc::new(Space::default());
    let pte = Arc::new(Mutex::new(true));
    let device = Arc::new(Device { mapped: Mutex::new(false) });
    let interval = space.notifiers.intervals_locked().unwrap().insert(RANGE, device.clone()).unwrap();
    let reader = {
        let (device, pte) = (Arc::clone(&device), Arc::clone(&pte));
        loom::thread::spawn(move || {
            device.map(&interval, &pte);
            interval
        })
    };
    {
        let _pair = space.notifiers.invalidate(RANGE, Event::Clear);
        *pte.lock() = false;
    }
    let interval = reader.join().unwrap();
    assert!(!*device.mapped.lock(), "a device has a page mapped that is gone (I42)");
    drop(interval);
}

#[test]
fn r33_a_device_maps_what_is_there() {
    exhaust(
        "interval",
        Preemptions::Any,
        interval,
        &[M::IntervalSetSeqForgotten, M::IntervalReadDoesNotWait],
    );
}

/// A device subscribes inside a pair (R32).
fn subscribe() {
    let space = Arc::new(Space::default());
    let pte = Arc::new(Mutex::new(true));
    space.notifiers.intervals_locked().unwrap();
    let device = Arc::new(Device { mapped: Mutex::new(false) });
    let reader = {
        let (device, pte) = (Arc::clone(&device), Arc::clone(&pte));
        spawn(&space, move |space| {
            let interval = space.notifiers.intervals().unwrap().insert(RANGE, device.clone()).unwrap();
            device.map(&interval, &pte);
            interval
        })
    };
    {
        let _pair = space.notifiers.invalidate(RANGE, Event::Clear);
        *pte.lock() = false;
    }
    let interval = reader.join().unwrap();
    assert!(!*device.mapped.lock(), "a device has a page mapped that is gone (I42)");
    drop(interval);
}

#[test]
fn r32_a_subscription_inside_a_pair() {
    exhaust("subscribe", Preemptions::Any, subscribe, &[M::IntervalInsertDoesNotCollide]);
}
