// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Aging from the primary's side: its own marks and those of every secondary, in one answer (I12, I48, I49). What a
//! shadow map does with its marks is in `faults.rs`; random scripts are in `mm_model.rs`.
// What a test does not expect may end it.
#![cfg(feature = "mmu-notifier")]
#![allow(clippy::unwrap_used)]

mod common;

use common::{Gate, Machine, READ, RW, WATCH, page, pages};
use shadow_mmu::addr::{Hva, HvaRange};
use shadow_mmu::frame::FrameFlags;
use shadow_mmu::mm::{Advice, MapFlags, Mm};
use shadow_mmu::notifier::MmuNotifier;
use shadow_mmu::shadow::FaultAroundPolicy::Off;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// Aligned to 2 MiB.
const BASE: Hva = Hva(0x7000_0000);
const PMD_PAGES: u64 = 512;

/// A secondary with one mark for everything.
#[derive(Debug, Default)]
struct Marked {
    young: AtomicBool,
    asked: Mutex<Vec<(&'static str, HvaRange)>>,
    gate: Gate,
}

impl Marked {
    fn clear(&self, op: &'static str, range: HvaRange) -> bool {
        self.gate.pass_with(range);
        self.asked.lock().unwrap().push((op, range));
        self.young.swap(false, Ordering::SeqCst)
    }
    fn asked(&self) -> Vec<(&'static str, HvaRange)> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }
}

impl MmuNotifier for Marked {
    fn clear_flush_young(&self, range: HvaRange) -> bool {
        self.clear("clear_flush_young", range)
    }
    fn clear_young(&self, range: HvaRange) -> bool {
        self.clear("clear_young", range)
    }
    fn test_young(&self, hva: Hva) -> bool {
        self.asked.lock().unwrap().push(("test_young", HvaRange::page(hva)));
        self.young.load(Ordering::SeqCst)
    }
}

/// A helper, the op that it sends, and the pages it is about.
type Row = (fn(&Mm, Hva) -> bool, &'static str, u64);
const HELPERS: [Row; 4] = [
    (Mm::ptep_clear_flush_young_notify, "clear_flush_young", 1),
    (Mm::ptep_clear_young_notify, "clear_young", 1),
    (Mm::pmdp_clear_flush_young_notify, "clear_flush_young", PMD_PAGES),
    (Mm::pmdp_clear_young_notify, "clear_young", PMD_PAGES),
];

#[test]
fn i12_both_sides_are_cleared_whatever_the_first_one_says() {
    let machine = Machine::new(64);
    machine.map_at(BASE, 16, RW, MapFlags::PRIVATE);
    let (older, newer) = (Arc::<Marked>::default(), Arc::<Marked>::default());
    let subscriptions = [&older, &newer].map(|one| machine.mm.register(one.clone()).unwrap());
    // An address in the middle of its page, and of its 2 MiB.
    let at = Hva(page(BASE, 9).0 + 0x123);
    for (helper, op, count) in HELPERS {
        for (primary, secondary) in [(false, false), (true, false), (false, true), (true, true)] {
            if primary {
                machine.poke(page(BASE, 9), 1);
            }
            [&older, &newer].iter().for_each(|one| one.young.store(secondary, Ordering::SeqCst));
            assert_eq!(machine.mm.test_young(at), primary || secondary);
            [&older, &newer].iter().for_each(|one| _ = one.asked());
            let before = machine.pte(at);
            assert_eq!(helper(&machine.mm, at), primary || secondary, "{op} of {count} pages");
            let range = HvaRange::pages_from(if count == 1 { page(BASE, 9) } else { BASE }, count);
            assert_eq!([older.asked(), newer.asked()], [[(op, range)], [(op, range)]], "once each");
            assert!(!helper(&machine.mm, at) && !machine.mm.test_young(at));
            let after = machine.pte(at);
            assert_eq!(
                (after.pfn(), after.is_writable(), after.is_dirty()),
                (before.pfn(), before.is_writable(), before.is_dirty())
            );
        }
    }
    subscriptions.iter().for_each(|one| machine.mm.unregister(one).unwrap());
    machine.finish();
}

#[test]
fn i49_two_megabytes_are_cleared_and_nothing_beside_them() {
    let machine = Machine::new(64);
    machine.map_at(page(BASE, PMD_PAGES - 2), PMD_PAGES + 4, RW, MapFlags::PRIVATE | MapFlags::NORESERVE);
    let touched = [PMD_PAGES - 1, PMD_PAGES, PMD_PAGES + 7, 2 * PMD_PAGES - 1, 2 * PMD_PAGES];
    let inside = |n: u64| (PMD_PAGES..2 * PMD_PAGES).contains(&n);
    let mut vcpu = machine.vcpu(0, Off);
    for (helper, ..) in &HELPERS[2..] {
        touched.iter().for_each(|&n| vcpu.write(page(BASE, n), n).unwrap());
        // The whole range, by any address in it.
        assert!(helper(&machine.mm, page(BASE, PMD_PAGES + 300)));
        for n in touched {
            let (pte, spte) = (machine.pte(page(BASE, n)), machine.spte(page(BASE, n)));
            let young = (pte.is_young(), spte.is_accessed(), machine.mm.test_young(page(BASE, n)));
            assert_eq!(young, if inside(n) { (false, false, false) } else { (true, true, true) }, "page {n}");
            assert!(pte.is_dirty() && spte.is_dirty() && pte.is_writable() && spte.is_writable());
        }
        machine.check();
        // What is cached without A would hide the next access.
        machine.tlb.flush_everything();
    }
    machine.finish();
}

/// The vCPU's accesses do not fault, so only its own marks tell of them: the primary alone would call the page idle.
#[test]
fn i48_what_a_guest_does_through_its_spte_is_seen() {
    let machine = Machine::new(64);
    machine.map_at(BASE, 2, RW, MapFlags::PRIVATE);
    let mut vcpu = machine.vcpu(0, Off);
    (0..2).for_each(|n| vcpu.write(page(BASE, n), 1).unwrap());
    let faults = vcpu.faults;
    assert!((0..2).all(|n| machine.mm.ptep_clear_flush_young_notify(page(BASE, n))));
    for _ in 0..3 {
        vcpu.read(BASE).unwrap();
        assert!(!machine.pte(BASE).is_young() && machine.mm.test_young(BASE));
        assert!(!machine.mm.test_young(page(BASE, 1)), "asking changes nothing, nobody was there");
        assert!(machine.mm.ptep_clear_flush_young_notify(BASE));
        assert!(!machine.mm.ptep_clear_flush_young_notify(BASE));
    }
    assert_eq!(vcpu.faults, faults);
    // A secondary that loses its leaf tells the frame.
    vcpu.read(BASE).unwrap();
    machine.mm.mprotect(BASE, pages(1), READ).unwrap();
    assert!(!machine.mm.test_young(BASE));
    assert!(machine.pool.frame(machine.pte(BASE).pfn()).flags().contains(FrameFlags::ACCESSED));
    machine.finish();
}

#[test]
fn where_nothing_is_mapped_nothing_is_young() {
    let machine = Machine::new(64);
    machine.map_at(BASE, 2, RW, MapFlags::PRIVATE);
    for wild in [BASE.0, page(BASE, 2).0, 0, (1 << 47) - 1, 1 << 47, u64::MAX] {
        HELPERS.iter().for_each(|(helper, ..)| assert!(!helper(&machine.mm, Hva(wild)), "{wild:#x}"));
        assert!(!machine.mm.test_young(Hva(wild)), "{wild:#x}");
    }
    machine.finish();
}

/// The listeners answer with the page-table lock held: the page stays what it was asked about until all have answered.
#[test]
fn the_page_stays_between_the_two_halves_of_the_answer() {
    for (helper, ..) in HELPERS {
        let machine = Machine::new(64);
        machine.map_at(BASE, 2, RW, MapFlags::PRIVATE);
        machine.poke(BASE, 1);
        let listener = Arc::<Marked>::default();
        let subscription = machine.mm.register(listener.clone()).unwrap();
        listener.gate.shut();
        std::thread::scope(|scope| {
            let aging = scope.spawn(|| helper(&machine.mm, BASE));
            listener.gate.wait_for_arrival();
            let zap = scope.spawn(|| machine.mm.madvise(BASE, pages(1), Advice::DontNeed).unwrap());
            std::thread::sleep(WATCH);
            assert!(!zap.is_finished(), "the page went while it was asked about");
            listener.gate.open();
            assert!(aging.join().unwrap());
            zap.join().unwrap();
        });
        machine.mm.unregister(&subscription).unwrap();
        machine.finish();
    }
}
