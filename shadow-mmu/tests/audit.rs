// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The audit finds what it says it finds: each invariant is broken on purpose, by a word stored into a table of the shadow
//! map behind its back, and the audit names that invariant, at that guest frame, and no other.
// What a test does not expect may end it.
#![cfg(feature = "mmu-notifier")]
#![allow(clippy::unwrap_used)]

mod common;

use common::{Machine, READ, RW, RX, page, pages};
use shadow_mmu::addr::{Access, Gfn, Gpa, Hva, HvaRange, Pfn};
use shadow_mmu::frame::Fill;
use shadow_mmu::mm::MapFlags;
use shadow_mmu::notifier::Event;
use shadow_mmu::shadow::FaultAroundPolicy::Off;
use shadow_mmu::shadow::{AuditReport, FaultCause, FaultOutcome, Memslot, SlotAccess, Spte};
use shadow_mmu::table::index;
use std::sync::atomic::{AtomicU64, Ordering};

const BASE: Hva = Hva(0x7000_0000);
const WRITE: u64 = 1 << 1;
const DIRTY: u64 = 1 << 6;
const HOST_WRITABLE: u64 = 1 << 9;
const MMU_WRITABLE: u64 = 1 << 10;
const MMU_PRESENT: u64 = 1 << 11;

/// Eight pages, of which the vCPU has written 0 to 3 and read 4 (the zero frame).
fn machine(prot: Access) -> Machine {
    let machine = Machine::new(128);
    machine.map_at(BASE, 8, RW, MapFlags::PRIVATE);
    let mut vcpu = machine.vcpu(0, Off);
    (0..4).for_each(|n| vcpu.write(page(BASE, n), n).unwrap());
    vcpu.read(page(BASE, 4)).unwrap();
    if prot != RW {
        machine.mm.mprotect(BASE, pages(8), prot).unwrap();
        (0..4).for_each(|n| assert_eq!(vcpu.read(page(BASE, n)), Ok(n)));
        vcpu.read(page(BASE, 4)).unwrap();
    }
    machine.check();
    machine
}

/// The entry for the page at `at`; its leaf table must be there.
fn entry(machine: &Machine, at: Hva) -> &AtomicU64 {
    let gfn = Gpa(at.0).gfn();
    let path = machine.shadow.walk(gfn);
    let (level, above) = path[2];
    assert_eq!(level, 2);
    &machine.pool.words(Spte(above).pfn())[index(gfn.0, 1)]
}

/// Stores `spte` for the page at `at`, and keeps the count of leaves (I43) right.
fn plant(machine: &Machine, at: Hva, spte: Spte) {
    let old = Spte(entry(machine, at).swap(spte.0, Ordering::SeqCst));
    if old == Spte::NONE {
        machine.shadow.stats().pages_4k.fetch_add(1, Ordering::SeqCst);
    }
}

fn change(machine: &Machine, at: Hva, bits: impl FnOnce(u64) -> u64) {
    let entry = entry(machine, at);
    entry.store(bits(entry.load(Ordering::SeqCst)), Ordering::SeqCst);
}

/// The audit finds `invariants` broken (in the order in which it looks), all of them at `at`.
#[track_caller]
fn finds(machine: &Machine, at: Hva, invariants: &[u8]) {
    let report = machine.shadow.audit(&machine.mm);
    let found: Vec<(u8, Gfn)> = report.violations.iter().map(|one| (one.invariant, one.gfn)).collect();
    let expected: Vec<(u8, Gfn)> = invariants.iter().map(|&number| (number, Gpa(at.0).gfn())).collect();
    assert_eq!(found, expected, "{:#?}", report.violations);
    for violation in report.violations {
        let text = violation.to_string();
        assert!(text.starts_with(&format!(
            "I{} broken at guest frame {:#x} (",
            violation.invariant,
            at.page()
        )));
    }
}

fn other_frame(machine: &Machine) -> Pfn {
    machine.pool.alloc(Fill::Zeros).unwrap()
}

#[test]
fn a_sound_map_has_no_violations_and_its_leaves_are_counted() {
    for prot in [RW, READ, RX, Access::all()] {
        let machine = machine(prot);
        let clean = AuditReport { leaves: 5, violations: Vec::new() };
        assert_eq!(machine.shadow.audit(&machine.mm), clean);
        machine.finish();
    }
}

#[test]
fn i2_a_leaf_between_start_and_end() {
    let machine = machine(RW);
    let at = page(BASE, 1);
    let spte = machine.spte(at);
    let pair = machine.mm.notifiers().invalidate(HvaRange::pages_from(BASE, 2), Event::Clear);
    finds(&machine, at, &[]);
    plant(&machine, at, spte);
    finds(&machine, at, &[2]);
    drop(pair);
    finds(&machine, at, &[]);
    machine.finish();
}

#[test]
fn i13_a_leaf_for_another_frame() {
    let machine = machine(RW);
    let at = page(BASE, 2);
    let (spte, other) = (machine.spte(at), other_frame(&machine));
    plant(&machine, at, Spte::leaf(other, RW));
    finds(&machine, at, &[13]);
    plant(&machine, at, spte);
    machine.pool.put(other);
    machine.finish();
}

#[test]
fn i13_a_leaf_where_the_primary_has_no_page_no_mapping_or_the_guest_no_slot() {
    let machine = Machine::without_slot(128);
    machine.map_at(BASE, 4, RW, MapFlags::PRIVATE);
    let slot = Memslot { gfn: Gfn(0), pages: 8, hva: BASE, access: SlotAccess::ReadWrite };
    machine.shadow.add_slot(slot).unwrap();
    machine.vcpu(0, Off).write(Hva(0), 1).unwrap();
    let other = other_frame(&machine);
    // Guest frame 2 is mapped and empty, 6 is not mapped, 10 is in no slot.
    for gfn in [2, 6, 10] {
        let at = Hva(pages(gfn));
        plant(&machine, at, Spte::leaf(other, READ));
        finds(&machine, at, &[13]);
        plant(&machine, at, Spte::NONE);
        machine.shadow.stats().pages_4k.fetch_sub(1, Ordering::SeqCst);
    }
    machine.pool.put(other);
    machine.finish();
}

#[test]
fn i14_a_right_that_the_slot_withholds() {
    let machine = Machine::without_slot(128);
    machine.map_at(BASE, 4, RW, MapFlags::PRIVATE);
    machine.poke(BASE, 1);
    let slot = Memslot { gfn: Gfn(0), pages: 8, hva: BASE, access: SlotAccess::ReadOnly };
    machine.shadow.add_slot(slot).unwrap();
    machine.vcpu(0, Off).read(Hva(0)).unwrap();
    plant(&machine, Hva(0), Spte::leaf(machine.spte(Hva(0)).pfn(), RW));
    finds(&machine, Hva(0), &[14]);
    machine.finish();
}

#[test]
fn i14_a_right_that_the_mapping_withholds() {
    for (prot, planted, times) in [
        // Of the mapping, and of its pte.
        (READ, RW, 2),
        (READ, RX, 1),
        (RW, Access::all(), 1),
        (RX, Access::all(), 2),
    ] {
        let machine = machine(prot);
        plant(&machine, BASE, Spte::leaf(machine.spte(BASE).pfn(), planted));
        finds(&machine, BASE, &[14].repeat(times));
        machine.finish();
    }
}

#[test]
fn i14_a_write_that_the_pte_withholds() {
    let machine = machine(READ);
    machine.mm.mprotect(BASE, pages(8), RW).unwrap();
    machine.vcpu(0, Off).read(BASE).unwrap();
    // The mapping is writable again; its ptes stay write-protected until the next write.
    finds(&machine, BASE, &[]);
    plant(&machine, BASE, Spte::leaf(machine.spte(BASE).pfn(), RW));
    finds(&machine, BASE, &[14]);
    machine.finish();
}

#[test]
fn i15_a_writable_leaf_of_a_shared_frame() {
    let machine = machine(RW);
    let frame = machine.pool.frame(machine.spte(BASE).pfn());
    frame.add_map();
    finds(&machine, BASE, &[15]);
    frame.remove_map();
    // The zero frame's pte is never writable, so that is I14 too.
    plant(&machine, page(BASE, 4), Spte::leaf(machine.mm.zero_frame(), RW));
    finds(&machine, page(BASE, 4), &[14, 15]);
    machine.finish();
}

#[test]
fn i16_states_that_no_leaf_may_have() {
    let illegal: [fn(u64) -> u64; 5] = [
        // MMU_WRITABLE without HOST_WRITABLE.
        |bits| bits & !(HOST_WRITABLE | WRITE | DIRTY),
        // W without MMU_WRITABLE.
        |bits| bits & !MMU_WRITABLE,
        // HOST_WRITABLE alone.
        |bits| bits & !(MMU_WRITABLE | WRITE),
        // D without HOST_WRITABLE.
        |bits| bits & !(HOST_WRITABLE | MMU_WRITABLE | WRITE) | DIRTY,
        // Not marked as a leaf.
        |bits| bits & !MMU_PRESENT,
    ];
    for bits in illegal {
        let machine = machine(RW);
        let at = page(BASE, 3);
        let spte = machine.spte(at);
        change(&machine, at, bits);
        finds(&machine, at, &[16]);
        plant(&machine, at, spte);
        machine.finish();
    }
    // Write-protected for tracking is a state that a leaf may have.
    let machine = machine(RW);
    change(&machine, page(BASE, 3), |bits| bits & !WRITE);
    finds(&machine, BASE, &[]);
    machine.finish();
}

/// A leaf for another frame, without the right that the next fault asks for: the fault finds it, and says so for good.
#[test]
fn i17_a_notification_that_was_missed() {
    let machine = machine(RW);
    let at = page(BASE, 2);
    let (mut vcpu, other) = (machine.vcpu(1, Off), other_frame(&machine));
    plant(&machine, at, Spte::leaf(other, READ));
    assert_eq!(vcpu.read(at), Ok(0), "the wrong frame, and now cached");
    let outcome = FaultOutcome { cause: FaultCause::Mapped, retries: 1 };
    assert_eq!(vcpu.fault(at, Access::WRITE), Ok(outcome));
    assert_eq!(vcpu.read(at), Ok(2), "mended, and flushed");
    finds(&machine, Hva(0), &[17]);
    machine.pool.put(other);
    // Nothing can make this map good again; only what it holds is looked at.
    let (pool, mm) = (machine.pool.clone(), machine.mm.clone());
    drop(machine);
    mm.munmap(BASE, pages(8)).unwrap();
    drop(mm);
    assert_eq!(pool.check_poison(), 0);
}

#[test]
fn i21_a_leaf_of_a_free_frame() {
    let machine = machine(RW);
    let pfn = machine.spte(BASE).pfn();
    // As if the primary had freed the frame and kept the pte.
    machine.pool.frame(pfn).remove_map();
    machine.pool.put(pfn);
    finds(&machine, BASE, &[21]);
    assert_eq!(machine.pool.alloc(Fill::Overwritten), Ok(pfn), "a used frame goes out first");
    machine.pool.frame(pfn).add_map();
    finds(&machine, BASE, &[]);
    machine.finish();
}

#[test]
fn i43_a_leaf_that_is_not_counted_and_a_count_without_a_leaf() {
    let machine = machine(RW);
    let count = &machine.shadow.stats().pages_4k;
    for wrong in [4, 6] {
        let right = count.swap(wrong, Ordering::SeqCst);
        finds(&machine, Hva(0), &[43]);
        count.store(right, Ordering::SeqCst);
    }
    finds(&machine, BASE, &[]);
    machine.finish();
}

#[test]
fn several_violations_are_all_reported() {
    let machine = machine(READ);
    let sptes = [0, 1].map(|n| machine.spte(page(BASE, n)));
    plant(&machine, BASE, Spte::leaf(sptes[1].pfn(), READ));
    change(&machine, page(BASE, 1), |bits| bits | DIRTY);
    let report = machine.shadow.audit(&machine.mm);
    let found: Vec<(u8, u64)> = report.violations.iter().map(|one| (one.invariant, one.gfn.0)).collect();
    assert_eq!(found, [(13, BASE.page()), (16, BASE.page() + 1)]);
    (0..2).for_each(|n| plant(&machine, page(BASE, n as u64), sptes[n]));
    machine.finish();
}

/// What the audit of the primary has to say.
fn primary_says(machine: &Machine) -> Vec<String> {
    machine.mm.audit().violations.iter().map(ToString::to_string).collect()
}

#[test]
fn a_sound_address_space_has_no_violations_and_its_ptes_are_counted() {
    let machine = machine(RW);
    let audit = machine.mm.audit();
    assert_eq!((audit.ptes, audit.violations), (5, Vec::new()));
    // With frames that two spaces have, and after writes on either side.
    let child = machine.mm.fork().unwrap();
    machine.poke(page(BASE, 1), 7);
    assert_eq!((primary_says(&machine), child.audit().violations), (Vec::new(), Vec::new()));
    child.release();
    drop(child);
    machine.finish();
}

#[test]
fn i21_a_pte_of_a_free_frame_and_one_that_its_frame_does_not_count() {
    let machine = machine(RW);
    let pfn = machine.spte(BASE).pfn();
    let frame = machine.pool.frame(pfn);
    frame.remove_map();
    let said = primary_says(&machine);
    assert!(said.len() == 1 && said[0].ends_with("the frame says that no pte maps it"), "{said:?}");
    machine.pool.put(pfn);
    let said = primary_says(&machine);
    assert!(said.len() == 1 && said[0].ends_with("the frame is free"), "{said:?}");
    assert_eq!(machine.pool.alloc(Fill::Overwritten), Ok(pfn));
    frame.add_map();
    frame.add_map();
    let said = primary_says(&machine);
    assert!(said.len() == 1 && said[0].ends_with("the frame has 2 ptes and 1 references"), "{said:?}");
    frame.remove_map();
    assert_eq!(primary_says(&machine), [""; 0]);
    machine.finish();
}

#[test]
fn i43_tables_that_are_linked_and_not_counted_are_found_in_the_map() {
    let machine = machine(RW);
    let root = &machine.pool.words(machine.shadow.root())[index(page(BASE, 0).page(), 4)];
    let link = root.load(Ordering::SeqCst);
    // A large page; and nothing, where four tables were.
    for (wrong, tables) in [(link | 1 << 7, "which none may be"), (0, "4 tables are counted, 1 are linked")] {
        root.store(wrong, Ordering::SeqCst);
        let report = machine.shadow.audit(&machine.mm);
        assert_eq!(report.violations[0].invariant, 43);
        assert!(report.violations[0].what.ends_with(tables), "{:?}", report.violations);
    }
    root.store(link, Ordering::SeqCst);
    finds(&machine, BASE, &[]);
    machine.finish();
}

#[test]
fn i16_a_leaf_with_a_reserved_bit() {
    let machine = machine(RW);
    let at = page(BASE, 3);
    change(&machine, at, |bits| bits | 1 << 50);
    finds(&machine, at, &[16]);
    change(&machine, at, |bits| bits & !(1 << 50));
    machine.finish();
}
