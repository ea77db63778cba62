// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Races of interval subscriptions: R32, and R33 with a device that maps one page of its interval, as a pfn cache does.

use crate::addr::{Access, Hva, HvaRange, Pfn};
use crate::cpu::{SoftTlb, tagged};
use crate::explore::explore;
use crate::faults::{drop_pages, reuse};
use crate::frame::FramePool;
use crate::machine::{Machine, RW, task};
use crate::mm::FaultRequest;
use crate::mutant::M;
use crate::notifier::interval::{Collision, IntervalNotifier, IntervalSubscription};
use crate::notifier::{Invalidation, WouldBlock};
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Arc, Mutex};

/// A device that reaches the page at `at` through a frame number of its own.
#[derive(Debug)]
pub(crate) struct Device {
    at: Hva,
    pool: Arc<FramePool>,
    tlb: Arc<SoftTlb>,
    mapped: Mutex<Option<Pfn>>,
    gone: AtomicBool,
}

impl Device {
    pub(crate) fn new(machine: &Machine, at: Hva) -> Arc<Self> {
        let (pool, tlb) = (Arc::clone(&machine.pool), Arc::clone(&machine.tlb));
        Arc::new(Self { at, pool, tlb, mapped: Mutex::new(None), gone: AtomicBool::new(false) })
    }

    pub(crate) fn subscribe(self: &Arc<Self>, machine: &Machine) -> IntervalSubscription {
        machine.mm.insert_interval(HvaRange::page(self.at), self.clone()).unwrap()
    }

    /// Looks the page up and maps it (`dmirror_range_fault` of `lib/test_hmm.c`).
    pub(crate) fn map(&self, machine: &Machine, interval: &IntervalSubscription) {
        self.map_for(machine, interval, RW);
    }

    /// The same for `access`.
    pub(crate) fn map_for(&self, machine: &Machine, interval: &IntervalSubscription, access: Access) {
        loop {
            let begun = interval.read_begin().unwrap();
            let Ok(pinned) = machine.mm.fault(&FaultRequest::one_page(self.at, access)) else { return };
            let pfn = pinned.required().pfn;
            drop(pinned);
            let mut mapped = self.mapped.lock();
            if !interval.read_retry(begun) {
                *mapped = Some(pfn);
                return;
            }
        }
    }

    /// Writes to the page, if it is mapped.
    fn write(&self, n: u64) {
        let mapped = self.mapped.lock();
        if let Some(pfn) = *mapped {
            if self.pool.frame(pfn).ref_count() == 0 {
                self.tlb.note(|| format!("a device reaches frame {:#x}, which is free (I21)", pfn.0));
            }
            self.pool.words(pfn)[0].store(tagged(self.at, n), Ordering::SeqCst);
        }
    }

    /// What it has mapped is what the primary has.
    pub(crate) fn check(&self, machine: &Machine) {
        if let Some(pfn) = *self.mapped.lock() {
            let pte = machine.mm.lookup(self.at).unwrap().0;
            machine.must(pte.is_present() && pte.pfn() == pfn, || {
                format!("a device has {pfn:?} mapped, and the primary has {pte:?} (I42)")
            });
        }
    }
}

impl IntervalNotifier for Device {
    fn invalidate(&self, _: &Invalidation, collision: Collision<'_>) -> Result<(), WouldBlock> {
        let mut mapped = self.mapped.lock();
        collision.set_seq();
        *mapped = None;
        if self.gone.load(Ordering::SeqCst) {
            self.tlb.note(|| "a callback runs when its subscription has ended (I7)".into());
        }
        Ok(())
    }
}

/// C: looks its page up. H: start, callback, clears the pte, end, frees the frame. C: maps it.
fn r33() {
    let machine = Machine::new();
    let (a, b) = (machine.map(1, RW), machine.map(1, RW));
    machine.poke(a, tagged(a, 1));
    let device = Device::new(&machine, a);
    let interval = device.subscribe(&machine);
    machine.race([
        task(|| {
            device.map(&machine, &interval);
            device.write(2);
        }),
        task(|| {
            drop_pages(&machine, a, 1);
            reuse(&machine, b);
        }),
    ]);
    device.check(&machine);
    drop(interval);
    machine.finish();
}

#[test]
fn r33_a_cached_frame_is_true_or_gone() {
    explore(
        "r33",
        r33,
        &[M::IntervalNoCollisionAtStart, M::IntervalSetSeqForgotten, M::IntervalReadDoesNotWait],
    );
}

/// H: start. I: subscribes inside the pair, looks its page up, whose pte is still there, and maps it. H: clears the pte.
fn r32() {
    let machine = Machine::new();
    let (a, b, c) = (machine.map(1, RW), machine.map(1, RW), machine.map(1, RW));
    machine.poke(a, tagged(a, 1));
    // So that the list of listeners knows of intervals before the race: then no lock keeps an insertion out of a pair.
    let first = Device::new(&machine, c).subscribe(&machine);
    let device = Device::new(&machine, a);
    let mut interval = None;
    machine.race([
        task(|| {
            let own = interval.insert(device.subscribe(&machine));
            device.map(&machine, own);
            device.write(2);
        }),
        task(|| {
            drop_pages(&machine, a, 1);
            reuse(&machine, b);
        }),
    ]);
    device.check(&machine);
    drop((interval, first));
    machine.finish();
}

#[test]
fn r32_a_subscription_made_inside_a_pair_collides_with_it() {
    explore("r32", r32, &[M::IntervalInsertDoesNotCollide]);
}

/// H: a pair, with a callback. U: ends the subscription; no callback runs then.
fn ended() {
    let machine = Machine::new();
    let a = machine.map(1, RW);
    machine.poke(a, tagged(a, 1));
    let device = Device::new(&machine, a);
    let interval = device.subscribe(&machine);
    machine.race([
        task(|| drop_pages(&machine, a, 1)),
        task(|| {
            drop(interval);
            device.gone.store(true, Ordering::SeqCst);
        }),
    ]);
    machine.finish();
}

#[test]
fn i7_no_callback_runs_when_a_subscription_has_ended() {
    explore("ended", ended, &[M::IntervalRemoveDoesNotWait]);
}
