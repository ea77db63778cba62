// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Races of the log, each with its interleaving forced: by a gate in the flush, which runs with `mmu_lock` held, and by one
//! in a file that a fault reads. (R20, the order of W and its record, is under `mmu_lock` and so in the models.)

use super::*;
use shadow_mmu::mm::{Backing, Object};
use std::thread::ScopedJoinHandle;

#[track_caller]
fn assert_waits<T>(thread: &ScopedJoinHandle<'_, T>, what: &str) {
    std::thread::sleep(WATCH);
    assert!(!thread.is_finished(), "{what}");
}

/// One page that a vCPU has written and goes on writing through what it has cached.
fn written(method: DirtyMethod, ad: AdBits, protect: ProtectOn) -> (Machine, Vcpu) {
    let machine = machine(ad, 4);
    machine.shadow.enable_dirty_log(SLOT, bitmap_log(method, protect)).unwrap();
    let mut vcpu = machine.vcpu(0, Off);
    vcpu.write(BASE, 1).unwrap();
    (machine, vcpu)
}

/// Whoever is told of a page may copy it: by then no CPU writes it unseen.
#[test]
fn i32_r20b_nobody_is_told_before_the_flush() {
    for (method, ad) in WAYS {
        for protect in [ProtectOn::Get, ProtectOn::Clear] {
            let (machine, mut vcpu) = written(method, ad, protect);
            machine.tlb.flush.shut();
            std::thread::scope(|scope| {
                let arm = scope.spawn(|| {
                    let dirty = machine.shadow.get_dirty_log(SLOT).unwrap();
                    if protect == ProtectOn::Clear {
                        machine.shadow.clear_dirty_log(SLOT, 0..1 << 35, &dirty).unwrap();
                    }
                    offsets(&dirty, BASE.page())
                });
                machine.tlb.flush.wait_for_arrival();
                let faults = vcpu.faults;
                vcpu.write(BASE, 2).unwrap();
                assert_eq!(vcpu.faults, faults, "through what is cached");
                assert_waits(&arm, "the page was armed, and its flush is pending");
                machine.tlb.flush.open();
                assert_eq!(arm.join().unwrap(), [0]);
            });
            assert_eq!(report(&machine), Vec::from_iter(0..0));
            vcpu.write(BASE, 3).unwrap();
            assert_eq!(report(&machine), [0], "{method:?} {ad:?}");
            machine.finish();
        }
    }
}

/// The same for rings: a reset returns when nobody writes unseen.
#[test]
fn i32_r20b_a_reset_returns_after_its_flush() {
    let machine = machine(AdBits::AfterFlush, 4);
    let (ring, end) = DirtyRing::new(128).unwrap();
    machine.shadow.add_dirty_ring(&ring);
    machine.shadow.enable_dirty_log(SLOT, ring_log()).unwrap();
    let mut vcpu = machine.vcpu(0, Off).with_ring(end);
    vcpu.write(BASE, 1).unwrap();
    assert_eq!(ring.harvest(|_| {}), 1);
    machine.tlb.flush.shut();
    std::thread::scope(|scope| {
        let reset = scope.spawn(|| machine.shadow.reset_dirty_rings());
        machine.tlb.flush.wait_for_arrival();
        vcpu.write(BASE, 2).unwrap();
        assert_waits(&reset, "the entry's page can still be written unseen");
        machine.tlb.flush.open();
        assert_eq!(reset.join().unwrap(), 1);
    });
    vcpu.write(BASE, 3).unwrap();
    assert_eq!(ring.harvest(|_| {}), 1);
    drop(vcpu);
    machine.finish();
}

/// Aging took W and has not flushed yet: whoever arms the page finds no W, and must not return all the same.
#[test]
fn r16_a_page_that_tracking_has_taken_w_from_is_not_armed_before_its_flush() {
    let (machine, mut vcpu) = written(WriteProtect, AdBits::None, ProtectOn::Get);
    machine.tlb.flush.shut();
    std::thread::scope(|scope| {
        let aging = scope.spawn(|| machine.mm.age());
        machine.tlb.flush.wait_for_arrival();
        assert!(!machine.spte(BASE).is_writable());
        let arm = scope.spawn(|| report(&machine));
        assert_waits(&arm, "the CPU still has W cached");
        vcpu.write(BASE, 2).unwrap();
        machine.tlb.flush.open();
        assert_eq!(arm.join().unwrap(), [0]);
        assert_eq!(aging.join().unwrap().young, 4);
    });
    vcpu.write(BASE, 3).unwrap();
    assert_eq!(report(&machine), [0]);
    machine.finish();
}

/// The same between two who arm: a log that begins anew finds no W where the old one has just taken it, and the flush is
/// pending.
#[test]
fn r16_a_log_that_begins_anew_waits_for_the_flush_of_the_last_report() {
    for (method, ad) in WAYS {
        let (machine, mut vcpu) = written(method, ad, ProtectOn::Get);
        machine.tlb.flush.shut();
        std::thread::scope(|scope| {
            let last = scope.spawn(|| machine.shadow.get_dirty_log(SLOT));
            machine.tlb.flush.wait_for_arrival();
            let anew = scope.spawn(|| {
                machine.shadow.disable_dirty_log(SLOT).unwrap();
                machine.shadow.enable_dirty_log(SLOT, bitmap_log(method, ProtectOn::Get)).unwrap();
            });
            assert_waits(&anew, "the CPU can still write unseen");
            machine.tlb.flush.open();
            anew.join().unwrap();
            // Its log has ended, so what it took may be in neither.
            assert_eq!(last.join().unwrap(), Err(DirtyLogError::NotLogged(SLOT)));
        });
        vcpu.write(BASE, 3).unwrap();
        assert_eq!(report(&machine), [0], "{method:?} {ad:?}");
        machine.finish();
    }
}

/// A fault that began before the log was switched on does not give W behind its back.
#[test]
fn i35_a_fault_that_is_under_way_when_the_log_begins_is_logged() {
    for (method, ad) in WAYS {
        for initially in [Initially::Clean, Initially::AllDirty] {
            let machine = machine(ad, 4);
            let file = TestFile::new(4 * PAGE_SIZE);
            let object = Object::file(&machine.pool, file.clone());
            let backing = Backing::Object { object, offset: 0 };
            let at = page(BASE, 64);
            machine.mm.mmap(at, pages(4), RW, MapFlags::SHARED | MapFlags::FIXED, backing).unwrap();
            let mut vcpu = machine.vcpu(0, Off);
            file.read.shut();
            std::thread::scope(|scope| {
                let write = scope.spawn(|| vcpu.write(at, 1).unwrap());
                file.read.wait_for_arrival();
                let protect = ProtectOn::Clear;
                let config = DirtyLogConfig { initially, ..bitmap_log(method, protect) };
                machine.shadow.enable_dirty_log(SLOT, config).unwrap();
                file.read.open();
                write.join().unwrap();
            });
            assert!(report(&machine).contains(&64), "{method:?} {ad:?} {initially:?}");
            machine.check();
            machine.finish();
        }
    }
}

/// The log is switched on and off under a vCPU that writes: while it is on, no page has W that it does not know of.
#[test]
fn i33_i35_the_log_comes_and_goes_under_writers() {
    for (method, ad) in WAYS {
        let machine = machine(ad, 40);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let _stop = crate::common::StopOnDrop(&stop);
            for id in 0..2 {
                let (mut vcpu, mut random, stop) = (machine.vcpu(id, Fixed(8)), Random(id as u64), &stop);
                scope.spawn(move || {
                    while !stop.load(Ordering::SeqCst) {
                        let at = Hva(page(BASE, random.below(40)).0 + 8 * id as u64);
                        vcpu.access(at, Access::WRITE, |word| word.fetch_add(1, Ordering::SeqCst)).unwrap();
                    }
                });
            }
            for _ in 0..40 {
                machine.shadow.enable_dirty_log(SLOT, bitmap_log(method, ProtectOn::Get)).unwrap();
                // What is read now is no newer than the log.
                let words =
                    || (0..80).map(|n| machine.peek(Hva(page(BASE, n / 2).0 + 8 * (n % 2)))).collect();
                let before: Vec<u64> = words();
                std::thread::yield_now();
                let after: Vec<u64> = words();
                let dirty = report(&machine);
                for n in 0..40 {
                    let changed = (2 * n..2 * n + 2).any(|word| before[word] != after[word]);
                    assert!(!changed || dirty.contains(&(n as u64)), "page {n} is missing in {dirty:?}");
                }
                machine.check();
                machine.shadow.disable_dirty_log(SLOT).unwrap();
            }
        });
        machine.finish();
    }
}
