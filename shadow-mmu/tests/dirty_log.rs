// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The dirty log is exact, where nothing runs beside it: each report names the pages that were written since they were armed,
//! and no other; by every method, on every kind of CPU, into the bitmap with either kind of arming. The same with writers
//! that run is in `oracle`, rings are in `rings`, forced races in `races`, and what changes without a vCPU in `elsewhere`.
// What a test does not expect may end it.
#![cfg(feature = "mmu-notifier")]
#![allow(clippy::unwrap_used)]

mod common;
#[path = "dirty_log/elsewhere.rs"]
mod elsewhere;
#[path = "dirty_log/oracle.rs"]
mod oracle;
#[path = "dirty_log/races.rs"]
mod races;
#[path = "dirty_log/rings.rs"]
mod rings;

use common::{
    Machine, READ, RW, Random, TestFile, Vcpu, WATCH, bitmap_log, page, pages, ring_log, wait_until,
};
use shadow_mmu::addr::{Access, Gfn, Hva, PAGE_SIZE};
use shadow_mmu::mm::MapFlags;
use shadow_mmu::shadow::DirtyMethod::{DirtyBit, WriteProtect};
use shadow_mmu::shadow::FaultAroundPolicy::{Adaptive, Fixed, Off};
use shadow_mmu::shadow::{
    AdBits, DirtyLogConfig, DirtyLogError, DirtyMethod, DirtyPages, DirtyRecords, DirtyRing, FaultCause,
    Initially, Memslot, ProtectOn, SlotAccess, SlotError,
};
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};

/// Aligned to 2 MiB.
const BASE: Hva = Hva(0x7000_0000);
/// The slot of a [`Machine`].
const SLOT: Gfn = Gfn(0);
/// Every way in which a log can see writes.
const WAYS: [(DirtyMethod, AdBits); 5] = [
    (DirtyBit, AdBits::AfterFlush),
    (DirtyBit, AdBits::Unflushed),
    (WriteProtect, AdBits::AfterFlush),
    (WriteProtect, AdBits::Unflushed),
    (WriteProtect, AdBits::None),
];

/// A machine with `count` pages of private memory at [`BASE`], all brought in and none mapped by the shadow map.
fn machine(ad: AdBits, count: u64) -> Machine {
    let machine = Machine::with_ad_bits(4096, ad);
    machine.map_at(BASE, count, RW, MapFlags::PRIVATE);
    (0..count).for_each(|n| machine.poke(page(BASE, n), n));
    machine
}

/// The pages as offsets from [`BASE`], of a slot in which it is at `first`.
fn offsets(dirty: &DirtyPages, first: u64) -> Vec<u64> {
    assert_eq!(dirty.iter().count() as u64, dirty.count());
    dirty.iter().map(|page| page - first).collect()
}

/// What the log of the machine's slot reports.
fn report(machine: &Machine) -> Vec<u64> {
    offsets(&machine.shadow.get_dirty_log(SLOT).unwrap(), BASE.page())
}

#[test]
fn i32_i34_reports_are_exact_by_every_method() {
    const PAGES: u64 = 900;
    for (method, ad) in WAYS {
        for seed in 0..2 {
            let machine = machine(ad, PAGES);
            let mut vcpus = [machine.vcpu(0, Fixed(16)), machine.vcpu(1, Adaptive)];
            let mut random = Random(seed);
            machine.shadow.enable_dirty_log(SLOT, bitmap_log(method, ProtectOn::Get)).unwrap();
            for round in 0..40 {
                let mut written = BTreeSet::new();
                for _ in 0..[0, 5, 200][round % 3] {
                    let n = random.below(PAGES);
                    let vcpu = &mut vcpus[random.below(2) as usize];
                    if random.below(2) == 0 {
                        vcpu.write(page(BASE, n), 1).unwrap();
                        written.insert(n);
                    } else {
                        vcpu.read(page(BASE, n)).unwrap();
                    }
                }
                // Leaves that go tell the log, and aging takes no mark of a write.
                match random.below(4) {
                    0 => machine.mm.mprotect(BASE, pages(PAGES), READ).unwrap(),
                    1 => _ = machine.mm.age(),
                    2 => drop(machine.mm.fork().unwrap()),
                    _ => {}
                }
                machine.mm.mprotect(BASE, pages(PAGES), RW).unwrap();
                assert_eq!(report(&machine), Vec::from_iter(written), "{method:?} {ad:?} round {round}");
                machine.check();
            }
            machine.shadow.disable_dirty_log(SLOT).unwrap();
            machine.finish();
        }
    }
}

/// With arming by clear a report changes nothing, and what is cleared is exactly what was named, within the pages given.
#[test]
fn i32_reports_and_clears_apart() {
    const PAGES: u64 = 500;
    for (method, ad) in WAYS {
        let machine = machine(ad, PAGES);
        let mut vcpu = machine.vcpu(0, Fixed(16));
        let mut random = Random(11);
        machine.shadow.enable_dirty_log(SLOT, bitmap_log(method, ProtectOn::Clear)).unwrap();
        let mut pending = BTreeSet::new();
        for round in 0..60 {
            for _ in 0..20 {
                let n = random.below(PAGES);
                vcpu.write(page(BASE, n), 1).unwrap();
                pending.insert(n);
            }
            for _ in 0..2 {
                assert_eq!(
                    report(&machine),
                    Vec::from_iter(pending.clone()),
                    "{method:?} {ad:?} round {round}"
                );
            }
            // Pages that were not written, too: clearing what is clear does nothing.
            let named: BTreeSet<u64> = (0..PAGES).filter(|_| random.below(3) > 0).collect();
            let (start, end) = (random.below(5) * 64, 320 + random.below(5) * 64);
            let dirty: DirtyPages = named.iter().map(|n| BASE.page() + n).collect();
            let range = BASE.page() + start..BASE.page() + end;
            machine.shadow.clear_dirty_log(SLOT, range, &dirty).unwrap();
            pending.retain(|n| !named.contains(n) || !(start..end).contains(n));
            assert_eq!(report(&machine), Vec::from_iter(pending.clone()), "{method:?} {ad:?} round {round}");
            machine.check();
        }
        machine.finish();
    }
}

/// Nothing is armed at first, and everything there is is reported; pages that come later are reported when they are written.
#[test]
fn i35_a_log_that_begins_with_every_page() {
    for (method, ad) in WAYS {
        let machine = machine(ad, 70);
        let mut vcpu = machine.vcpu(0, Off);
        (0..10).for_each(|n| vcpu.write(page(BASE, n), n).unwrap());
        machine.map_at(page(BASE, 70), 10, RW, MapFlags::PRIVATE);
        let initially = Initially::AllDirty;
        let config = DirtyLogConfig { initially, ..bitmap_log(method, ProtectOn::Clear) };
        let flushed = machine.tlb.flushed.load(Ordering::SeqCst);
        machine.shadow.enable_dirty_log(SLOT, config).unwrap();
        assert_eq!(machine.tlb.flushed.load(Ordering::SeqCst), flushed, "nothing is armed");
        machine.check();
        assert_eq!(report(&machine), Vec::from_iter(0..70));
        vcpu.write(page(BASE, 75), 1).unwrap();
        let all = machine.shadow.get_dirty_log(SLOT).unwrap();
        assert_eq!(offsets(&all, BASE.page()), Vec::from_iter((0..70).chain([75])));
        machine.shadow.clear_dirty_log(SLOT, 0..1 << 35, &all).unwrap();
        assert_eq!(report(&machine), Vec::from_iter(0..0));
        [3, 69].iter().for_each(|&n| vcpu.write(page(BASE, n), 7).unwrap());
        assert_eq!(report(&machine), [3, 69]);
        machine.check();
        machine.finish();
    }
}

/// After enabling nothing is writable, and after disabling W comes back without asking the primary.
#[test]
fn i35_a_log_comes_and_goes() {
    for (method, ad) in WAYS {
        let machine = machine(ad, 20);
        let mut vcpu = machine.vcpu(0, Off);
        (0..20).for_each(|n| vcpu.write(page(BASE, n), n).unwrap());
        for round in 0..3 {
            machine.shadow.enable_dirty_log(SLOT, bitmap_log(method, ProtectOn::Get)).unwrap();
            let armed = |n| match method {
                WriteProtect => !machine.spte(page(BASE, n)).is_writable(),
                DirtyBit => !machine.spte(page(BASE, n)).is_dirty(),
            };
            assert!((0..20).all(armed), "{method:?} {ad:?}");
            assert_eq!(report(&machine), Vec::from_iter(0..0), "what came before is not reported");
            vcpu.write(page(BASE, round), 1).unwrap();
            machine.check();
            // Not asked for: it goes with the log.
            machine.shadow.disable_dirty_log(SLOT).unwrap();
            let faults = vcpu.faults;
            (0..20).for_each(|n| vcpu.write(page(BASE, n), n).unwrap());
            let expected = if method == WriteProtect { 19 } else { 0 };
            assert_eq!(vcpu.faults - faults, expected);
            assert!((0..20).all(|n| machine.spte(page(BASE, n)).is_writable()));
        }
        let fast = machine.shadow.stats().pf_fast.load(Ordering::SeqCst);
        assert_eq!(fast, if method == WriteProtect { 3 * 20 } else { 0 });
        machine.finish();
    }
}

/// A write fault in a logged slot is answered by the shadow map, and says what it was about.
#[test]
fn a_logged_write_needs_no_word_with_the_primary() {
    let machine = machine(AdBits::AfterFlush, 1);
    let mut vcpu = machine.vcpu(0, Off);
    vcpu.write(BASE, 1).unwrap();
    machine.mm.ptep_clear_young_notify(BASE);
    machine.shadow.enable_dirty_log(SLOT, bitmap_log(WriteProtect, ProtectOn::Get)).unwrap();
    for round in 1..4 {
        let outcome = vcpu.fault(BASE, Access::WRITE).unwrap();
        assert_eq!((outcome.cause, outcome.retries), (FaultCause::WriteProtect, 0));
        assert_eq!(machine.shadow.stats().pf_fast.load(Ordering::SeqCst), round);
        assert!(!machine.pte(BASE).is_young());
        assert_eq!(report(&machine), [0]);
    }
    machine.finish();
}

#[test]
fn every_mistake_has_its_error() {
    let machine = machine(AdBits::None, 4);
    let shadow = &machine.shadow;
    let (get, clear) = (bitmap_log(WriteProtect, ProtectOn::Get), bitmap_log(WriteProtect, ProtectOn::Clear));
    let missing = |gfn| DirtyLogError::Slot(SlotError::Missing(Gfn(gfn)));
    let (none, all) = (DirtyPages::default(), 0..1 << 35);
    // In the slot, but not where it starts.
    for gfn in [1, 1 << 40] {
        assert_eq!(shadow.enable_dirty_log(Gfn(gfn), get), Err(missing(gfn)));
        assert_eq!(shadow.disable_dirty_log(Gfn(gfn)), Err(missing(gfn)));
        assert_eq!(shadow.get_dirty_log(Gfn(gfn)).err(), Some(missing(gfn)));
        assert_eq!(shadow.clear_dirty_log(Gfn(gfn), all.clone(), &none), Err(missing(gfn)));
    }
    assert_eq!(shadow.disable_dirty_log(SLOT), Err(DirtyLogError::NotLogged(SLOT)));
    assert_eq!(shadow.get_dirty_log(SLOT).err(), Some(DirtyLogError::NotLogged(SLOT)));
    assert_eq!(shadow.clear_dirty_log(SLOT, all.clone(), &none), Err(DirtyLogError::NotLogged(SLOT)));
    let by_bit = bitmap_log(DirtyBit, ProtectOn::Get);
    assert_eq!(shadow.enable_dirty_log(SLOT, by_bit), Err(DirtyLogError::NoDirtyBit));
    let rings = DirtyLogConfig { records: DirtyRecords::Rings, ..by_bit };
    assert_eq!(shadow.enable_dirty_log(SLOT, rings), Err(DirtyLogError::RingsNeedFaults));
    let all_dirty = DirtyLogConfig { initially: Initially::AllDirty, ..get };
    assert_eq!(shadow.enable_dirty_log(SLOT, all_dirty), Err(DirtyLogError::AllDirtyNeedsClear));
    assert_eq!(DirtyRing::new(64).err(), Some(DirtyLogError::RingSize(64)));

    shadow.enable_dirty_log(SLOT, get).unwrap();
    assert_eq!(shadow.enable_dirty_log(SLOT, clear), Err(DirtyLogError::Logged(SLOT)));
    assert_eq!(shadow.clear_dirty_log(SLOT, all.clone(), &none), Err(DirtyLogError::ClearedByGet));
    shadow.disable_dirty_log(SLOT).unwrap();
    shadow.enable_dirty_log(SLOT, clear).unwrap();
    for bad in [1..64, 0..63, 32..64, 64..(1 << 35) + 64] {
        let error = DirtyLogError::Range { start: bad.start, end: bad.end };
        assert_eq!(shadow.clear_dirty_log(SLOT, bad, &none), Err(error));
    }
    shadow.clear_dirty_log(SLOT, all, &none).unwrap();
    machine.finish();
}

/// Logs of slots that begin and end anywhere, of which two show the same memory.
#[test]
fn every_slot_has_its_own_log() {
    for (method, ad) in WAYS {
        let machine = machine(ad, 300);
        machine.shadow.remove_slot(SLOT).unwrap();
        let slots = [(37, 130, 0), (1000, 300, 0), (1301, 91, 150)];
        for (gfn, pages, first) in slots {
            let (gfn, hva) = (Gfn(gfn), page(BASE, first));
            machine.shadow.add_slot(Memslot { gfn, pages, hva, access: SlotAccess::ReadWrite }).unwrap();
        }
        for gfn in [37, 1301] {
            machine.shadow.enable_dirty_log(Gfn(gfn), bitmap_log(method, ProtectOn::Clear)).unwrap();
        }
        let mut vcpu = machine.vcpu(0, Fixed(16));
        for gfn in [37, 37 + 129, 1000, 1299, 1301, 1301 + 64, 1301 + 90] {
            vcpu.write(Hva(pages(gfn)), 1).unwrap();
        }
        let get = |gfn| offsets(&machine.shadow.get_dirty_log(Gfn(gfn)).unwrap(), 0);
        assert_eq!((get(37), get(1301)), (vec![0, 129], vec![0, 64, 90]), "{method:?} {ad:?}");
        // The end of a slot is as good as a multiple of 64; more than that is not.
        let dirty: DirtyPages = [64, 90, 91, 5000].into_iter().collect();
        machine.shadow.clear_dirty_log(Gfn(1301), 64..91, &dirty).unwrap();
        assert!(machine.shadow.clear_dirty_log(Gfn(1301), 64..92, &dirty).is_err());
        assert_eq!((get(37), get(1301)), (vec![0, 129], vec![0]));
        // A slot goes with its log, and what comes to its place has none.
        machine.shadow.remove_slot(Gfn(37)).unwrap();
        let slot = Memslot { gfn: Gfn(37), pages: 64, hva: BASE, access: SlotAccess::ReadWrite };
        machine.shadow.add_slot(slot).unwrap();
        assert_eq!(machine.shadow.get_dirty_log(Gfn(37)).err(), Some(DirtyLogError::NotLogged(Gfn(37))));
        vcpu.write(Hva(pages(37)), 1).unwrap();
        machine.check();
        machine.finish();
    }
}

/// A guest that writes a page in each of very many parts of the log gets parts without bits of their own, not more memory.
#[test]
fn i37_a_guest_that_writes_far_apart_is_reported_by_the_part() {
    const PART: u64 = 32768;
    // Granted whatever the size of the pool.
    const WITH_BITS: u64 = 256;
    const PARTS: u64 = 300;
    let machine = Machine::new(4096);
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    let first = Hva(PART * PAGE_SIZE * 16);
    machine.map_at(first, PARTS * PART, RW, flags);
    let mut vcpu = machine.vcpu(0, Off);
    machine.shadow.enable_dirty_log(SLOT, bitmap_log(WriteProtect, ProtectOn::Get)).unwrap();
    let far = |part: u64| page(first, part * PART + 5);
    (0..PARTS).for_each(|part| vcpu.write(far(part), part).unwrap());
    let dirty = machine.shadow.get_dirty_log(SLOT).unwrap();
    assert!((0..PARTS).all(|part| dirty.contains(far(part).page())));
    assert_eq!(dirty.count(), WITH_BITS + (PARTS - WITH_BITS) * PART);
    machine.check();
    // What was reported is armed, and the bits that it took are granted to others.
    [7, 299].iter().for_each(|&part| vcpu.write(far(part), 1).unwrap());
    let dirty: Vec<u64> = machine.shadow.get_dirty_log(SLOT).unwrap().iter().collect();
    assert_eq!(dirty, [far(7).page(), far(299).page()]);
    machine.check();
    machine.finish();
}
