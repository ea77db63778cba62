// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Rings: what is in them and in which order, who stops when one is full, what becomes of one whose vCPU is gone (I36).

use super::*;
use shadow_mmu::iommu;
use shadow_mmu::shadow::{DirtyGfn, RING_LEAST};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use vm_memory::{Bytes, GuestAddress};

/// Entries of [`RING_LEAST`] that a vCPU may use before it must stop.
const SOFT_FULL: u64 = RING_LEAST as u64 / 2;

fn ring_of(machine: &Machine, id: usize) -> (Arc<DirtyRing>, Vcpu) {
    let (ring, end) = DirtyRing::new(RING_LEAST).unwrap();
    machine.shadow.add_dirty_ring(&ring);
    (ring, machine.vcpu(id, Fixed(16)).with_ring(end))
}

/// What was pushed and not harvested yet, as offsets from [`BASE`].
fn harvest(ring: &DirtyRing) -> Vec<u64> {
    let mut found = Vec::new();
    ring.harvest(|DirtyGfn { slot, page }| {
        assert_eq!(slot, SLOT);
        found.push(page - BASE.page());
    });
    found
}

#[test]
fn i36_entries_are_in_the_order_of_the_writes() {
    for ad in [AdBits::AfterFlush, AdBits::Unflushed, AdBits::None] {
        let machine = machine(ad, 300);
        let ((one, mut first), (two, mut second)) = (ring_of(&machine, 0), ring_of(&machine, 1));
        machine.shadow.enable_dirty_log(SLOT, ring_log()).unwrap();
        let mut random = Random(1);
        for _ in 0..30 {
            let mut expected = [Vec::new(), Vec::new()];
            for _ in 0..40 {
                let (n, by) = (random.below(300), random.below(2) as usize);
                [&mut first, &mut second][by].write(page(BASE, n), 1).unwrap();
                // The first to write a page has the entry; whoever follows needs no fault.
                if !expected.iter().any(|pages| pages.contains(&n)) {
                    expected[by].push(n);
                }
                second.read(page(BASE, random.below(300))).unwrap();
            }
            assert_eq!([harvest(&one), harvest(&two)], expected);
            // Harvested is not armed.
            first.write(page(BASE, expected[1][0]), 2).unwrap();
            assert_eq!([harvest(&one), harvest(&two)], [[0; 0]; 2]);
            assert_eq!(machine.shadow.reset_dirty_rings(), (expected[0].len() + expected[1].len()) as u64);
            assert_eq!(machine.shadow.reset_dirty_rings(), 0);
            machine.check();
        }
        assert_eq!(report(&machine), Vec::from_iter(0..0), "all of it was in the rings");
        drop((first, second));
        machine.finish();
    }
}

/// What was not harvested is not taken back: nobody has seen it.
#[test]
fn i36_a_reset_takes_back_what_was_harvested_and_no_more() {
    let machine = machine(AdBits::AfterFlush, 50);
    let (ring, mut vcpu) = ring_of(&machine, 0);
    machine.shadow.enable_dirty_log(SLOT, ring_log()).unwrap();
    (0..10).for_each(|n| vcpu.write(page(BASE, n), 1).unwrap());
    assert_eq!((machine.shadow.reset_dirty_rings(), ring.used()), (0, 10));
    assert_eq!(harvest(&ring), Vec::from_iter(0..10));
    (10..15).for_each(|n| vcpu.write(page(BASE, n), 1).unwrap());
    assert_eq!((machine.shadow.reset_dirty_rings(), ring.used()), (10, 5));
    assert!((0..10).all(|n| !machine.spte(page(BASE, n)).is_writable()));
    assert!((10..15).all(|n| machine.spte(page(BASE, n)).is_writable()), "nobody was told of them yet");
    // The same page again, in one harvest with what came before.
    (8..12).for_each(|n| vcpu.write(page(BASE, n), 2).unwrap());
    assert_eq!(harvest(&ring), [10, 11, 12, 13, 14, 8, 9]);
    drop(vcpu);
    machine.finish();
}

#[test]
fn i36_a_vcpu_stops_when_its_ring_is_soft_full_and_is_woken_by_the_reset() {
    let machine = machine(AdBits::AfterFlush, 300);
    let (ring, mut vcpu) = ring_of(&machine, 0);
    let woken = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&woken);
    ring.on_reset(move || _ = count.fetch_add(1, Ordering::SeqCst));
    machine.shadow.enable_dirty_log(SLOT, ring_log()).unwrap();
    for round in 1..4 {
        let mut n = 0;
        while !vcpu.mmu.is_ring_full() {
            vcpu.write(page(BASE, n), round).unwrap();
            n += 1;
        }
        assert_eq!((n, harvest(&ring).len() as u64), (SOFT_FULL, SOFT_FULL));
        assert!(vcpu.mmu.is_ring_full(), "harvested is not taken back");
        assert_eq!(woken.load(Ordering::SeqCst), round - 1);
        assert_eq!(machine.shadow.reset_dirty_rings(), SOFT_FULL);
        assert_eq!((vcpu.mmu.is_ring_full(), woken.load(Ordering::SeqCst)), (false, round));
        assert_eq!(machine.shadow.reset_dirty_rings(), 0);
        assert_eq!(woken.load(Ordering::SeqCst), round, "there was nothing to wake for");
    }
    drop(vcpu);
    machine.finish();
}

/// What no ring takes is in the bitmap: behind the last entry, of a vCPU without a ring, of a device.
#[test]
fn i37_what_no_ring_takes_is_in_the_bitmap() {
    for ad in [AdBits::AfterFlush, AdBits::None] {
        let machine = machine(ad, 300);
        let (ring, mut vcpu) = ring_of(&machine, 0);
        machine.shadow.enable_dirty_log(SLOT, ring_log()).unwrap();
        for _ in 0..3 {
            // It does not stop when it should.
            (0..200).for_each(|n| vcpu.write(page(BASE, n), 1).unwrap());
            machine.vcpu(1, Off).write(page(BASE, 250), 1).unwrap();
            let view = iommu::view(&machine.mm).unwrap();
            view.write_obj(1u64, GuestAddress(page(BASE, 260).0)).unwrap();
            drop(view);
            assert_eq!(report(&machine), Vec::from_iter((u64::from(RING_LEAST)..200).chain([250, 260])));
            assert_eq!(harvest(&ring), Vec::from_iter(0..u64::from(RING_LEAST)));
            assert_eq!(machine.shadow.reset_dirty_rings(), u64::from(RING_LEAST));
            assert!((0..300).all(|n| !machine.spte(page(BASE, n)).is_writable()), "all of it is armed");
        }
        drop(vcpu);
        machine.finish();
    }
}

#[test]
fn a_ring_goes_when_neither_vcpu_nor_collector_has_it() {
    let machine = machine(AdBits::AfterFlush, 10);
    let (ring, mut vcpu) = ring_of(&machine, 0);
    machine.shadow.enable_dirty_log(SLOT, ring_log()).unwrap();
    vcpu.write(BASE, 1).unwrap();
    drop(vcpu);
    // The collector still has what a dead vCPU wrote.
    assert_eq!(machine.shadow.reset_dirty_rings(), 0);
    assert_eq!(harvest(&ring), [0]);
    assert_eq!(machine.shadow.reset_dirty_rings(), 1);
    assert!(!machine.spte(BASE).is_writable());
    let weak = Arc::downgrade(&ring);
    drop(ring);
    assert!(weak.upgrade().is_some());
    machine.shadow.reset_dirty_rings();
    assert!(weak.upgrade().is_none());
    machine.finish();
}

/// Entries of a slot that is gone, is no longer logged, or was replaced by a smaller one: they are taken back, and touch
/// nothing.
#[test]
fn entries_outlive_their_slot() {
    const PART: u64 = 32768;
    let machine = Machine::without_slot(512);
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    machine.map_at(BASE, 2 * PART, RW, flags);
    let slot = |pages| Memslot { gfn: SLOT, pages, hva: BASE, access: SlotAccess::ReadWrite };
    let (ring, end) = DirtyRing::new(RING_LEAST).unwrap();
    machine.shadow.add_dirty_ring(&ring);
    let mut vcpu = machine.vcpu(0, Off).with_ring(end);
    let replacements: [fn(&Machine); 3] = [
        |_| {},
        |machine| machine.shadow.disable_dirty_log(SLOT).unwrap(),
        |machine| {
            machine.shadow.remove_slot(SLOT).unwrap();
            let (hva, access) = (BASE, SlotAccess::ReadWrite);
            machine.shadow.add_slot(Memslot { gfn: SLOT, pages: 10, hva, access }).unwrap();
            machine.shadow.enable_dirty_log(SLOT, ring_log()).unwrap();
        },
    ];
    for replace in replacements {
        machine.shadow.add_slot(slot(2 * PART)).unwrap();
        machine.shadow.enable_dirty_log(SLOT, ring_log()).unwrap();
        for n in [0, 9, 10, PART - 1, PART, PART + 70] {
            vcpu.write(Hva(pages(n)), n).unwrap();
        }
        assert_eq!(ring.harvest(|_| {}), 6);
        replace(&machine);
        assert_eq!(machine.shadow.reset_dirty_rings(), 6);
        machine.check();
        machine.shadow.remove_slot(SLOT).unwrap();
        machine.shadow.reset_dirty_rings();
    }
    drop(vcpu);
    machine.finish();
}
