// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Single promises of generations, and what they leave open: what a cached translation hides, tables that are passed over,
//! frames that several share, more than one shadow map or slot.

use super::*;
use crate::common::{bitmap_log, vcpu_of};
use shadow_mmu::addr::Gfn;
use shadow_mmu::shadow::{DirtyMethod, Memslot, ProtectOn, SlotAccess};

const A: u64 = 1 << 5;
const NOBODY: [u64; 0] = [];

fn passes(n: u8) -> Option<PageAge> {
    Some(PageAge::Passes(n))
}

/// `count` pages of private memory at [`BASE`], written, and found young by one pass.
fn written(ad: AdBits, count: u64) -> Machine {
    let machine = Machine::with_ad_bits(2048, ad);
    machine.map_at(BASE, count, RW, MapFlags::PRIVATE);
    (0..count).for_each(|n| machine.poke(page(BASE, n), n));
    assert_eq!((machine.mm.age().young, machine.mm.age().young), (count, 0));
    machine
}

/// A pass, and which pages it found.
fn found(machine: &Machine) -> Vec<u64> {
    let pass = machine.mm.age();
    let ages = machine.ages();
    let young: Vec<u64> = (ages.iter())
        .filter(|&(_, &age)| age == PageAge::Passes(0))
        .map(|(page, _)| page - BASE.page())
        .collect();
    assert_eq!(pass.young, young.len() as u64);
    young
}

/// Without flushes a pass sees no page that nobody touched, and misses only what some CPU had cached.
#[test]
fn without_flushes_only_what_was_cached_is_missed() {
    let machine = written(AdBits::Unflushed, 64);
    let mut vcpu = machine.vcpu(0, Off);
    let touch = |vcpu: &mut Vcpu, pages: &[u64]| {
        pages.iter().for_each(|&n| vcpu.write(page(BASE, n), 1).unwrap());
    };
    touch(&mut vcpu, &[1, 5, 9]);
    assert_eq!(found(&machine), [1, 5, 9]);
    // 5 is cached with A and D set: the CPU does not look at its leaf again. 6 is not.
    touch(&mut vcpu, &[5, 6]);
    let flushed = machine.tlb.flushed.load(Ordering::SeqCst);
    assert_eq!(found(&machine), [6]);
    assert_eq!(machine.tlb.flushed.load(Ordering::SeqCst), flushed, "aging flushes nothing here");
    assert_eq!(machine.age_of(page(BASE, 5)), passes(1));
    machine.tlb.flush_everything();
    touch(&mut vcpu, &[5, 6]);
    assert_eq!(found(&machine), [5, 6]);
    machine.finish();
}

/// The other way round: where A needs it, a pass flushes what it found, and nothing else.
#[test]
fn where_marks_need_flushes_a_pass_flushes_what_it_found() {
    for ad in [AdBits::AfterFlush, AdBits::None] {
        let machine = written(ad, 64);
        let mut vcpu = machine.vcpu(0, Off);
        (0..64).for_each(|n| assert_eq!(vcpu.read(page(BASE, n)), Ok(n)));
        assert_eq!(machine.mm.age().young, 64);
        for round in 0..5 {
            let before = machine.tlb.flushed.load(Ordering::SeqCst);
            vcpu.read(page(BASE, round)).unwrap();
            assert_eq!(found(&machine), [round]);
            assert_eq!(machine.tlb.flushed.load(Ordering::SeqCst) - before, 1);
        }
        machine.finish();
    }
}

/// Sets A behind the back of the table's link, as a CPU does that was on its way when the link's mark was cleared.
#[test]
fn a_table_that_nobody_went_through_is_passed_over_but_for_every_sixteenth_pass() {
    let machine = written(AdBits::AfterFlush, 8);
    let mut vcpu = machine.vcpu(0, Off);
    vcpu.read(BASE).unwrap();
    let is_marked = || machine.link_entry(BASE).load(Ordering::SeqCst) & A != 0;
    assert!(is_marked());
    assert_eq!(found(&machine), [0]);
    assert!(is_marked(), "something was young: the next look may find more");
    assert_eq!(found(&machine), NOBODY);
    assert!(!is_marked());
    // One that was on its way then is found by the second look.
    machine.leaf_entry(page(BASE, 1)).fetch_or(A, Ordering::SeqCst);
    assert_eq!(found(&machine), [1]);
    assert_eq!(found(&machine), NOBODY);
    // The way of an access sets the mark again, whichever page of the table it is for.
    vcpu.read(page(BASE, 3)).unwrap();
    assert!(is_marked());
    assert_eq!(found(&machine), [3]);
    assert_eq!([found(&machine), found(&machine)], [NOBODY; 2]);
    machine.leaf_entry(BASE).fetch_or(A, Ordering::SeqCst);
    let mut seen = Vec::new();
    while machine.mm.generation() < 2 * FULL_LOOK {
        if !found(&machine).is_empty() {
            seen.push(machine.mm.generation());
        }
    }
    assert_eq!(seen, [FULL_LOOK]);
    machine.finish();
}

/// A leaf that a fault gives back is young by the fault, not by a CPU that went through the link: the vCPU goes on from the
/// table that it remembers. The table is looked at all the same.
#[test]
fn a_page_that_tracking_gives_back_is_found_in_a_table_that_was_passed_over() {
    let machine = written(AdBits::Unflushed, 8);
    let mut vcpu = machine.vcpu(0, Off);
    machine.shadow.enable_dirty_log(Gfn(0), bitmap_log(DirtyMethod::WriteProtect, ProtectOn::Get)).unwrap();
    assert_eq!(vcpu.read(page(BASE, 1)), Ok(1));
    vcpu.read(BASE).unwrap();
    assert_eq!(found(&machine), [0, 1]);
    assert_eq!([found(&machine), found(&machine)], [NOBODY; 2]);
    vcpu.write(BASE, 9).unwrap();
    assert_eq!(found(&machine), [0]);
    machine.finish();
}

/// The other ops look at everything, whatever the links say.
#[test]
fn i49_the_ops_of_4x_pass_no_table_over() {
    let machine = written(AdBits::AfterFlush, 8);
    let mut vcpu = machine.vcpu(0, Off);
    vcpu.read(BASE).unwrap();
    (0..2).for_each(|_| _ = found(&machine));
    machine.leaf_entry(BASE).fetch_or(A, Ordering::SeqCst);
    assert!(machine.mm.test_young(BASE));
    assert!(machine.mm.ptep_clear_young_notify(BASE));
    machine.leaf_entry(BASE).fetch_or(A, Ordering::SeqCst);
    assert!(machine.mm.pmdp_clear_flush_young_notify(BASE));
    assert!(!machine.mm.test_young(BASE));
    machine.finish();
}

/// What the lost entry knew is told to the frame, which is this page's alone.
#[test]
fn an_access_is_found_though_its_leaf_was_lost_before_the_pass() {
    for ad in [AdBits::AfterFlush, AdBits::None] {
        let machine = written(ad, 8);
        let mut vcpu = machine.vcpu(0, Off);
        (0..8).for_each(|n| _ = vcpu.read(page(BASE, n)).unwrap());
        found(&machine);
        [2, 5].iter().for_each(|&n| _ = vcpu.read(page(BASE, n)).unwrap());
        assert!(!machine.pte(page(BASE, 2)).is_young(), "only the leaf says so");
        machine.mm.mprotect(BASE, pages(8), READ).unwrap();
        assert!(!machine.spte(page(BASE, 2)).is_leaf());
        assert_eq!(found(&machine), [2, 5]);
        assert_eq!(found(&machine), NOBODY, "and once only");
        assert_eq!(machine.age_of(page(BASE, 2)), passes(1));
        machine.finish();
    }
}

/// A mark that a frame kept from who had it mapped before says nothing of who has it now.
#[test]
fn a_page_that_comes_along_is_not_young_by_what_its_frame_was_told_before() {
    let machine = Machine::new(64);
    machine.map_at(BASE, 8, RW, MapFlags::SHARED);
    let mut vcpu = machine.vcpu(0, Fixed(8));
    (0..8).for_each(|n| vcpu.write(page(BASE, n), n).unwrap());
    machine.mm.madvise(BASE, pages(8), Advice::DontNeed).unwrap();
    assert_eq!(vcpu.read(BASE), Ok(0), "brings its neighbours along");
    assert_eq!(machine.ages().len(), 8);
    assert_eq!(found(&machine), [0]);
    machine.finish();
}

/// The tolerance: nobody can say whose access a shared frame was told of.
#[test]
fn an_access_to_a_shared_frame_whose_leaf_was_lost_is_missed_and_told_of_nobody_else() {
    let machine = written(AdBits::AfterFlush, 4);
    let mut vcpu = machine.vcpu(0, Off);
    (0..4).for_each(|n| _ = vcpu.read(page(BASE, n)).unwrap());
    found(&machine);
    vcpu.read(BASE).unwrap();
    // Takes the leaves, and from now on each frame is mapped twice.
    let child = machine.fork().unwrap();
    assert_eq!(found(&machine), NOBODY);
    assert_eq!(found(&child), NOBODY);
    vcpu.read(page(BASE, 1)).unwrap();
    machine.mm.mprotect(BASE, pages(4), READ).unwrap();
    drop(child.exit());
    // The mark from before is not taken for a new one when the frame is this page's alone again.
    assert_eq!(found(&machine), [1], "the fault of the access is the primary's own mark");
    assert_eq!(found(&machine), NOBODY);
    machine.finish();
}

#[test]
fn a_child_begins_with_its_parents_ages_and_has_its_own_from_then_on() {
    let machine = written(AdBits::AfterFlush, 4);
    let mut vcpu = machine.vcpu(0, Off);
    vcpu.read(page(BASE, 3)).unwrap();
    assert_eq!(found(&machine), [3]);
    let child = machine.fork().unwrap();
    assert_eq!((child.mm.generation(), child.ages()), (machine.mm.generation(), machine.ages()));
    let mut theirs = child.vcpu(0, Off);
    theirs.read(page(BASE, 1)).unwrap();
    assert_eq!(found(&child), [1]);
    assert_eq!([0, 1, 3].map(|n| child.age_of(page(BASE, n))), [passes(3), passes(0), passes(1)]);
    // The parent's are what they were.
    assert_eq!([1, 3].map(|n| machine.age_of(page(BASE, n))), [passes(2), passes(0)]);
    assert_eq!(found(&machine), NOBODY);
    drop(child.exit());
    machine.finish();
}

/// A write beside them gives zero pages frames of their own: they stay as old as they were, and as young.
#[test]
fn a_page_is_as_old_as_before_when_it_gets_another_frame() {
    let machine = Machine::new(256);
    machine.map_at(BASE, 16, RW, MapFlags::PRIVATE);
    let mut vcpu = machine.vcpu(0, Off);
    vcpu.read(page(BASE, 1)).unwrap();
    assert_eq!(found(&machine), [1]);
    assert_eq!(found(&machine), NOBODY);
    vcpu.read(page(BASE, 2)).unwrap();
    assert!(machine.pte(page(BASE, 2)).is_zero() && machine.pte(page(BASE, 2)).is_young());
    machine.vcpu(1, Fixed(16)).write(page(BASE, 9), 1).unwrap();
    machine.vcpu(1, Fixed(16)).write(page(BASE, 1), 1).unwrap();
    assert!(machine.pte(page(BASE, 2)).is_anonymous(), "the write brought it along");
    assert_eq!(machine.age_of(page(BASE, 2)), passes(0));
    assert_eq!(found(&machine), [1, 2, 9]);
    machine.finish();
}

/// Either map's CPUs, and either slot's, make a page young.
#[test]
fn every_shadow_map_and_every_slot_is_asked() {
    for ad in [AdBits::AfterFlush, AdBits::None] {
        let machine = written(ad, 700);
        let (second, tlb) = machine.second_shadow();
        // At guest frames that no table begins with, and the same memory twice.
        for gfn in [100, 5000] {
            let slot = Memslot { gfn: Gfn(gfn), pages: 700, hva: BASE, access: SlotAccess::ReadWrite };
            second.add_slot(slot).unwrap();
        }
        let mut first = machine.vcpu(0, Off);
        let mut other = vcpu_of(&second, &tlb, Off);
        let gfn = |first: u64, n: u64| Hva(pages(first + n));
        let mut random = Random(3);
        for _ in 0..40 {
            let mut touched = BTreeSet::new();
            for _ in 0..random.below(30) {
                let n = random.below(700);
                touched.insert(n);
                match random.below(3) {
                    0 => first.read(page(BASE, n)).unwrap(),
                    1 => other.read(gfn(100, n)).unwrap(),
                    _ => other.read(gfn(5000, n)).unwrap(),
                };
            }
            assert_eq!(found(&machine), Vec::from_iter(touched));
        }
        machine.check();
        let report = second.audit(&machine.mm);
        assert!(report.violations.is_empty(), "{:#?}", report.violations);
        drop((first, other, second));
        machine.finish();
    }
}
