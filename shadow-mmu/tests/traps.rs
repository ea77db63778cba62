// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Traps: what an access of a trapped page comes to, what becomes of a trap when its mapping changes, and that no vCPU gets past
//! one that is set while it runs. `mm_model` runs them in scripts of everything.
// What a test does not expect may end it.
#![cfg(feature = "mmu-notifier")]
#![allow(clippy::unwrap_used)]

mod common;

use common::{Machine, READ, RW, Random, StopOnDrop, TestFile, page, pages};
use shadow_mmu::addr::{Access, Hva, HvaRange};
use shadow_mmu::iommu;
use shadow_mmu::ksm::{CandidateAccess, Domain, Ksm, KsmSettings};
use shadow_mmu::mm::{
    Advice, Backing, FaultError, FaultRequest, MapFlags, MmError, Object, RemapFlags, Trap,
};
use shadow_mmu::shadow::FaultAroundPolicy::{Adaptive, Fixed, Off};
use shadow_mmu::shadow::VcpuMmu;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use vm_memory::{Bytes, GuestAddress};

const BASE: Hva = Hva(0x7000_0000);
const ALL: [(Trap, FaultError); 3] = [
    (Trap::Bus, FaultError::BusError),
    (Trap::Poison, FaultError::Poisoned),
    (Trap::Revoke, FaultError::NoAccess),
];

fn one(at: Hva) -> HvaRange {
    HvaRange::page(at)
}

/// A machine with `count` pages at [`BASE`], the n-th beginning with n + 1.
fn machine(count: u64) -> Machine {
    let machine = Machine::new(256);
    machine.map_at(BASE, count, RW, MapFlags::PRIVATE);
    (0..count).for_each(|n| machine.poke(page(BASE, n), n + 1));
    machine
}

#[test]
fn every_access_is_refused_as_the_trap_says_until_it_is_lifted() {
    for (trap, error) in ALL {
        let machine = machine(3);
        let at = page(BASE, 1);
        let mut vcpu = machine.vcpu(0, Fixed(4));
        assert_eq!(vcpu.read(at), Ok(2));
        assert_eq!(machine.mm.trap(one(at), trap), 1);
        assert!(!machine.spte(at).is_present(), "{trap:?} left a leaf (I2)");
        machine.check();
        machine.check_tlb(0);
        for access in [READ, RW] {
            assert_eq!(vcpu.fault(at, access).map(drop), Err(error), "{trap:?}");
        }
        let view = iommu::view(&machine.mm).unwrap();
        assert!(view.read_obj::<u64>(GuestAddress(at.0)).is_err(), "a device reads past {trap:?}");
        assert_eq!((vcpu.read(BASE), vcpu.read(page(BASE, 2))), (Ok(1), Ok(3)), "the neighbours");
        assert_eq!(machine.mm.trapped(at), Some(trap));
        let other = ALL.into_iter().map(|(other, _)| other).find(|other| *other != trap).unwrap();
        assert_eq!(machine.mm.untrap(one(at), other), 0, "{other:?} is another trap than {trap:?}");
        assert_eq!(machine.mm.untrap(one(at), trap), 1);
        let left = if trap == Trap::Poison { 0 } else { 2 };
        assert_eq!(vcpu.read(at), Ok(left), "{trap:?}");
        assert_eq!(view.read_obj::<u64>(GuestAddress(at.0)).unwrap(), left);
        vcpu.write(at, 9).unwrap();
        machine.check();
        drop((view, vcpu));
        machine.finish();
    }
}

#[test]
fn the_mapping_is_asked_before_the_trap() {
    let machine = machine(1);
    machine.mm.mprotect(BASE, pages(1), READ).unwrap();
    machine.mm.trap(one(BASE), Trap::Poison);
    let mut vcpu = machine.vcpu(0, Off);
    assert_eq!(vcpu.write(BASE, 1), Err(FaultError::NoAccess));
    assert_eq!(vcpu.read(BASE), Err(FaultError::Poisoned));
    assert_eq!(machine.mm.trap(one(page(BASE, 5)), Trap::Bus), 0, "nothing is mapped there");
    assert_eq!(vcpu.read(page(BASE, 5)), Err(FaultError::NoMapping));
    drop(vcpu);
    machine.finish();
}

#[test]
fn a_fault_brings_no_trapped_page_along() {
    // Pages that are there, and fresh ones.
    for there in [4, 0] {
        let machine = Machine::new(256);
        machine.map_at(BASE, 8, RW, MapFlags::PRIVATE);
        (0..there).for_each(|n| machine.poke(page(BASE, n), n + 1));
        machine.mm.trap(one(page(BASE, 3)), Trap::Revoke);
        let mut vcpu = machine.vcpu(0, Fixed(8));
        vcpu.write(page(BASE, 1), 7).unwrap();
        let present: Vec<u64> = (0..8).filter(|&n| machine.spte(page(BASE, n)).is_present()).collect();
        assert_eq!(present, [0, 1, 2], "what is beyond the trap comes by a fault of its own");
        machine.check();
        drop(vcpu);
        machine.finish();
    }
}

#[test]
fn pages_that_are_kept_alone_come_by_faults_of_their_own() {
    let machine = machine(16);
    let mut vcpu = VcpuMmu::new(Fixed(16));
    // From the middle of a page to the middle of another.
    vcpu.keep_alone(vec![HvaRange { start: Hva(page(BASE, 4).0 + 8), end: Hva(page(BASE, 5).0 + 8) }]);
    let fault = |vcpu: &mut VcpuMmu, n: u64| {
        machine.shadow.fault(vcpu, shadow_mmu::addr::Gpa(page(BASE, n).0), READ).unwrap();
        (0..16).filter(|&n| machine.spte(page(BASE, n)).is_present()).collect::<Vec<u64>>()
    };
    assert_eq!(fault(&mut vcpu, 0), [0, 1, 2, 3]);
    assert_eq!(fault(&mut vcpu, 5), [0, 1, 2, 3, 5]);
    assert_eq!(fault(&mut vcpu, 9), [0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]);
    vcpu.keep_alone(Vec::new());
    assert_eq!(fault(&mut vcpu, 4).len(), 16);
    machine.finish();
}

#[test]
fn a_trap_goes_with_its_mapping() {
    for (trap, error) in ALL {
        let machine = machine(4);
        machine.mm.trap(HvaRange::pages_from(BASE, 4), trap);
        machine.mm.munmap(BASE, pages(1)).unwrap();
        machine.map_at(BASE, 2, RW, MapFlags::PRIVATE);
        let mut vcpu = machine.vcpu(0, Off);
        let mut read = |n| vcpu.read(page(BASE, n));
        assert_eq!([read(0), read(1), read(2), read(3)], [Ok(0), Ok(0), Err(error), Err(error)], "{trap:?}");
        drop(vcpu);
        machine.finish();
    }
}

#[test]
fn a_trap_moves_with_its_mapping() {
    for (trap, error) in ALL {
        for keep in [RemapFlags::empty(), RemapFlags::DONTUNMAP] {
            let machine = machine(4);
            let to = page(BASE, 64);
            machine.mm.trap(one(page(BASE, 2)), trap);
            let flags = RemapFlags::MAYMOVE | RemapFlags::FIXED | keep;
            machine.mm.mremap(page(BASE, 1), pages(2), pages(2), flags, to).unwrap();
            let mut vcpu = machine.vcpu(0, Fixed(4));
            assert_eq!((vcpu.read(to), vcpu.read(page(to, 1))), (Ok(2), Err(error)), "{trap:?} {keep:?}");
            let old = if keep.is_empty() { Err(FaultError::NoMapping) } else { Ok(0) };
            assert_eq!(vcpu.read(page(BASE, 2)), old, "{trap:?} {keep:?}");
            machine.mm.untrap(one(page(to, 1)), trap);
            assert_eq!(vcpu.read(page(to, 1)), Ok(if trap == Trap::Poison { 0 } else { 3 }));
            machine.check();
            drop(vcpu);
            machine.finish();
        }
    }
}

#[test]
fn discarding_takes_poison_away_and_no_other_trap() {
    for advice in [Advice::DontNeed, Advice::Free] {
        let machine = machine(3);
        for (n, (trap, _)) in (0..).zip(ALL) {
            machine.mm.trap(one(page(BASE, n)), trap);
        }
        machine.mm.madvise(BASE, pages(3), advice).unwrap();
        let mut vcpu = machine.vcpu(0, Off);
        let mut read = |n| vcpu.read(page(BASE, n));
        assert_eq!(
            [read(0), read(1), read(2)],
            [Err(FaultError::BusError), Ok(0), Err(FaultError::NoAccess)],
            "{advice:?}"
        );
        drop(vcpu);
        machine.finish();
    }
}

#[test]
fn populating_says_what_is_wrong_with_the_page() {
    let machine = machine(1);
    for (trap, error) in
        [(Trap::Bus, MmError::Fault), (Trap::Poison, MmError::Poisoned), (Trap::Revoke, MmError::Invalid)]
    {
        machine.mm.trap(one(BASE), trap);
        assert_eq!(machine.mm.madvise(BASE, pages(1), Advice::PopulateRead), Err(error));
    }
    assert_eq!(MmError::Poisoned.errno(), 133, "EHWPOISON");
    machine.finish();
}

#[test]
fn poison_of_one_space_is_not_that_of_the_object() {
    let machine = Machine::new(64);
    let file = Object::file(&machine.pool, TestFile::new(pages(2)));
    let map = |at, flags| {
        let backing = Backing::Object { object: Arc::clone(&file), offset: 0 };
        machine.mm.mmap(at, pages(2), READ, flags | MapFlags::FIXED, backing).unwrap();
    };
    map(BASE, MapFlags::PRIVATE);
    map(page(BASE, 8), MapFlags::PRIVATE);
    let mut vcpu = machine.vcpu(0, Off);
    assert_eq!(vcpu.read(BASE), Ok(TestFile::tag(0)));
    machine.mm.trap(one(BASE), Trap::Poison);
    assert_eq!(
        (vcpu.read(BASE), vcpu.read(page(BASE, 8))),
        (Err(FaultError::Poisoned), Ok(TestFile::tag(0)))
    );
    machine.mm.untrap(one(BASE), Trap::Poison);
    assert_eq!(vcpu.read(BASE), Ok(TestFile::tag(0)), "the file has it");
    drop((vcpu, file));
    machine.finish();
}

#[test]
fn a_child_inherits_the_traps_of_what_it_inherits() {
    for (trap, error) in ALL {
        let machine = machine(3);
        machine.mm.trap(HvaRange::pages_from(page(BASE, 1), 2), trap);
        machine.mm.madvise(page(BASE, 2), pages(1), Advice::DontFork).unwrap();
        let child = machine.fork().unwrap();
        let mut vcpu = child.vcpu(0, Fixed(4));
        assert_eq!((vcpu.read(BASE), vcpu.read(page(BASE, 1))), (Ok(1), Err(error)));
        assert_eq!(child.mm.trapped(page(BASE, 2)), None, "the child has no such mapping");
        // From then on each has its own.
        assert_eq!(child.mm.untrap(one(page(BASE, 1)), trap), 1);
        assert_eq!(vcpu.read(page(BASE, 1)), Ok(if trap == Trap::Poison { 0 } else { 2 }));
        assert_eq!(machine.vcpu(0, Off).read(page(BASE, 1)), Err(error));
        drop(vcpu);
        child.check();
        child.exit();
        machine.finish();
    }
}

#[test]
fn a_trapped_page_is_not_merged() {
    let machine = Machine::new(256);
    machine.map_at(BASE, 4, RW, MapFlags::PRIVATE);
    machine.mm.madvise(BASE, pages(4), Advice::Mergeable).unwrap();
    (0..4).for_each(|n| machine.poke(page(BASE, n), 0x5a));
    machine.mm.trap(one(page(BASE, 1)), Trap::Revoke);
    let ksm = Ksm::new(Arc::clone(&machine.pool), KsmSettings::default()).unwrap();
    let member = ksm.enter(&machine.mm, Domain(0)).unwrap();
    (0..4).for_each(|_| _ = ksm.scan(1000));
    assert!(!machine.pte(page(BASE, 1)).is_ksm());
    assert!([0, 2, 3].iter().all(|&n| machine.pte(page(BASE, n)).is_ksm()), "the others are");
    machine.mm.untrap(one(page(BASE, 1)), Trap::Revoke);
    (0..4).for_each(|_| _ = ksm.scan(1000));
    assert!(machine.pte(page(BASE, 1)).is_ksm(), "lifted, it is like any other");
    assert_eq!(machine.vcpu(0, Off).read(page(BASE, 1)), Ok(0x5a));
    assert_eq!(ksm.audit(), []);
    drop((member, ksm));
    machine.finish();
}

#[test]
fn a_page_is_picked_among_those_that_are_there_and_not_trapped() {
    let machine = Machine::new(64);
    machine.map_at(BASE, 8, RW, MapFlags::PRIVATE);
    let ranges = [HvaRange::pages_from(BASE, 3), HvaRange::pages_from(page(BASE, 3), 5)];
    assert_eq!(machine.mm.pick_resident(&ranges, 7), None);
    [1, 2, 4, 6].into_iter().for_each(|n| machine.poke(page(BASE, n), 1));
    machine.mm.trap(one(page(BASE, 2)), Trap::Bus);
    let picked: Vec<_> = (0..4).map(|n| machine.mm.pick_resident(&ranges, n).unwrap()).collect();
    assert_eq!(picked, [1, 4, 6, 1].map(|n| page(BASE, n)));
    assert_eq!(machine.mm.pick_resident(&ranges[1..], u64::MAX), Some(page(BASE, 6)), "odd of two");
    machine.finish();
}

#[test]
fn one_bit_flips_and_nobody_is_told() {
    let machine = machine(2);
    let mut vcpu = machine.vcpu(0, Off);
    assert_eq!(vcpu.read(BASE), Ok(1));
    let (leaf, pte) = (machine.spte(BASE), machine.pte(BASE));
    // Bit 5 of word 0; bit 63 of word 511, counted round.
    assert!(machine.mm.flip_bit(Hva(BASE.0 + 100), 5));
    assert!(machine.mm.flip_bit(BASE, (512 + 511) * 64 + 63));
    assert_eq!((vcpu.read(BASE), vcpu.read(Hva(BASE.0 + 511 * 8))), (Ok(1 ^ 1 << 5), Ok(1 << 63)));
    assert_eq!((machine.spte(BASE), machine.pte(BASE)), (leaf, pte), "no mark, no fault");
    machine.mm.trap(one(page(BASE, 1)), Trap::Revoke);
    assert!(!machine.mm.flip_bit(page(BASE, 1), 0), "it is out of reach");
    assert!(!machine.mm.flip_bit(page(BASE, 9), 0), "nothing is there");
    drop(vcpu);
    machine.finish();
}

#[test]
fn a_bit_of_a_page_that_others_have_flips_in_a_copy() {
    let machine = Machine::new(256);
    machine.map_at(BASE, 4, RW, MapFlags::PRIVATE);
    machine.mm.madvise(BASE, pages(4), Advice::Mergeable).unwrap();
    (0..2).for_each(|n| machine.poke(page(BASE, n), 0x5a));
    let ksm = Ksm::new(Arc::clone(&machine.pool), KsmSettings::default()).unwrap();
    let member = ksm.enter(&machine.mm, Domain(0)).unwrap();
    (0..4).for_each(|_| _ = ksm.scan(1000));
    let mut vcpu = machine.vcpu(0, Off);
    assert_eq!([0, 1, 2].map(|n| vcpu.read(page(BASE, n))), [Ok(0x5a), Ok(0x5a), Ok(0)]);
    assert!(machine.pte(BASE).is_ksm() && machine.pte(page(BASE, 2)).is_zero());
    let child = machine.fork().unwrap();
    assert!(machine.mm.flip_bit(BASE, 0) && machine.mm.flip_bit(page(BASE, 2), 0));
    assert_eq!([0, 1, 2, 3].map(|n| vcpu.read(page(BASE, n))), [Ok(0x5b), Ok(0x5a), Ok(1), Ok(0)]);
    assert_eq!([0, 2].map(|n| child.vcpu(0, Off).read(page(BASE, n))), [Ok(0x5a), Ok(0)], "the child's");
    assert_eq!(ksm.audit(), []);
    drop(vcpu);
    child.exit();
    drop((member, ksm));
    machine.finish();
}

#[test]
fn what_page_sharing_knows_of_a_page_stays_true_when_a_bit_flips() {
    // However far it has got with the page; where access copies, a quiet page is promoted without another look at its bytes.
    for access in [CandidateAccess::Normal, CandidateAccess::CopyOnAccess] {
        for scans in 0..5 {
            let machine = Machine::new(256);
            machine.map_at(BASE, 2, RW, MapFlags::PRIVATE);
            machine.mm.madvise(BASE, pages(2), Advice::Mergeable).unwrap();
            machine.poke(BASE, 0x77);
            let settings = KsmSettings { access, ..KsmSettings::default() };
            let ksm = Ksm::new(Arc::clone(&machine.pool), settings).unwrap();
            let member = ksm.enter(&machine.mm, Domain(0)).unwrap();
            (0..scans).for_each(|_| _ = ksm.scan(1));
            assert!(machine.mm.flip_bit(BASE, 3));
            // Its twin, were it not for the flip.
            machine.poke(page(BASE, 1), 0x77);
            for _ in 0..10 {
                ksm.scan(1);
                assert_eq!(ksm.audit(), [], "{access:?}, {scans} scans before it");
            }
            let mut vcpu = machine.vcpu(0, Off);
            assert_eq!((vcpu.read(BASE), vcpu.read(page(BASE, 1))), (Ok(0x7f), Ok(0x77)));
            drop((vcpu, member, ksm));
            machine.finish();
        }
    }
}

#[test]
fn a_page_that_may_not_be_written_keeps_its_bits() {
    let machine = Machine::new(64);
    let file = Object::file(&machine.pool, TestFile::new(pages(1)));
    let backing = Backing::Object { object: Arc::clone(&file), offset: 0 };
    let flags = MapFlags::PRIVATE | MapFlags::FIXED;
    machine.mm.mmap(BASE, pages(1), READ, flags, backing).unwrap();
    let mut vcpu = machine.vcpu(0, Off);
    assert_eq!(vcpu.read(BASE), Ok(TestFile::tag(0)));
    assert!(!machine.mm.flip_bit(BASE, 1), "it is the file's");
    assert_eq!(vcpu.read(BASE), Ok(TestFile::tag(0)));
    // Shared memory that this mapping only reads; others may write it.
    let flags = MapFlags::SHARED | MapFlags::FIXED;
    machine.mm.mmap(BASE, pages(1), RW, flags, Backing::Anonymous).unwrap();
    assert_eq!(vcpu.write(BASE, 7), Ok(()));
    machine.mm.mprotect(BASE, pages(1), READ).unwrap();
    assert!(!machine.mm.flip_bit(BASE, 1), "it may not be written here");
    assert_eq!(vcpu.read(BASE), Ok(7));
    drop((vcpu, file));
    machine.finish();
}

#[test]
fn who_set_a_trap_finds_it_where_it_has_moved_and_lifts_no_other() {
    let machine = machine(8);
    machine.mm.trap_by(1, one(BASE), Trap::Revoke);
    machine.mm.trap_by(2, one(page(BASE, 1)), Trap::Revoke);
    let to = Hva(BASE.0 + (1 << 30));
    machine.mm.mremap(BASE, pages(1), pages(1), RemapFlags::MAYMOVE | RemapFlags::FIXED, to).unwrap();
    // Somebody else's, where the first one was set.
    machine.mm.mmap(BASE, pages(1), RW, MapFlags::PRIVATE | MapFlags::FIXED, Backing::Anonymous).unwrap();
    machine.mm.trap_by(3, one(BASE), Trap::Revoke);
    assert_eq!(machine.mm.untrap_by(1), 1);
    assert_eq!(machine.mm.trapped(to), None);
    assert_eq!(machine.mm.trapped(BASE), Some(Trap::Revoke));
    assert_eq!(machine.mm.trapped(page(BASE, 1)), Some(Trap::Revoke));
    assert_eq!((machine.mm.untrap_by(1), machine.mm.untrap_by(2), machine.mm.untrap_by(3)), (0, 1, 1));
    machine.finish();
}

#[test]
fn i2_no_vcpu_gets_past_a_trap_that_is_set_while_it_runs() {
    const PAGES: u64 = 16;
    let machine = machine(PAGES);
    // How often each page was trapped: odd while it is.
    let turns: Vec<AtomicU64> = (0..PAGES).map(|_| AtomicU64::new(0)).collect();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _stop = StopOnDrop(&stop);
        let (machine, turns, stop) = (&machine, &turns, &stop);
        let guests: Vec<_> = (0..3)
            .map(|id| {
                scope.spawn(move || {
                    let mut random = Random(id as u64);
                    let mut vcpu = machine.vcpu(id, [Off, Fixed(8), Adaptive][id]);
                    let mut refused = 0u64;
                    while !stop.load(Ordering::Relaxed) {
                        let n = random.below(PAGES);
                        let turn = turns[n as usize].load(Ordering::SeqCst);
                        let result = match random.below(2) {
                            0 => vcpu.write(page(BASE, n), n + 1),
                            _ => vcpu.read(page(BASE, n)).map(drop),
                        };
                        let same = turns[n as usize].load(Ordering::SeqCst) == turn;
                        assert!(
                            !same || turn % 2 == 0 || result.is_err(),
                            "page {n} was reached in its trap"
                        );
                        refused += u64::from(result.is_err());
                    }
                    refused
                })
            })
            .collect();
        let mut random = Random(99);
        let kinds = ALL.map(|(trap, _)| trap);
        for round in 0..400 {
            let n = random.below(PAGES);
            let trap = kinds[random.below(3) as usize];
            machine.mm.trap(one(page(BASE, n)), trap);
            turns[n as usize].fetch_add(1, Ordering::SeqCst);
            std::thread::yield_now();
            if round % 50 == 0 {
                machine.check();
            }
            turns[n as usize].fetch_add(1, Ordering::SeqCst);
            machine.mm.untrap(one(page(BASE, n)), trap);
        }
        stop.store(true, Ordering::Relaxed);
        let refused: u64 = guests.into_iter().map(|guest| guest.join().unwrap()).sum();
        assert!(refused > 0, "nobody ever came to a trap");
    });
    machine.check();
    machine.finish();
}

#[test]
fn a_fault_that_was_answered_before_the_trap_installs_nothing_after_it() {
    let machine = machine(1);
    // The answer, held while the trap is set.
    let pinned = machine.mm.fault(&FaultRequest::one_page(BASE, Access::READ)).unwrap();
    machine.mm.trap(one(BASE), Trap::Poison);
    assert_eq!(machine.pool.frame(pinned.required().pfn).ref_count(), 1, "the pin alone holds it");
    drop(pinned);
    assert_eq!(machine.vcpu(0, Off).read(BASE), Err(FaultError::Poisoned));
    machine.check();
    machine.finish();
}
