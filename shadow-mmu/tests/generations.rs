// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Generations are exact: after a pass the pages of age 0 are those that were accessed since the pass before, no more and no
//! less, wherever aging flushes or tracks accesses ([`AdBits::AfterFlush`], [`AdBits::None`]); and each age is the number of
//! passes since. Held here by random scripts against a model; single promises, and the tolerance of [`AdBits::Unflushed`],
//! are in `cases`.
//!
//! The script stays away from the two cases in which an access may go unnoticed, which `cases` shows: a leaf that is lost
//! before the pass, of the zero frame or of a frame that several map.
// What a test does not expect may end it.
#![cfg(feature = "mmu-notifier")]
#![allow(clippy::unwrap_used)]

#[path = "generations/cases.rs"]
mod cases;
mod common;

use common::{Machine, READ, RW, RX, Random, StopOnDrop, Vcpu, page, pages};
use shadow_mmu::addr::{Access, Hva, HvaRange};
use shadow_mmu::iommu::{self, GuestView};
use shadow_mmu::mm::{Advice, FULL_LOOK, MapFlags, OLDEST, PageAge, RemapFlags};
use shadow_mmu::shadow::AdBits;
use shadow_mmu::shadow::FaultAroundPolicy::{Adaptive, Fixed, Off};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use vm_memory::{Bytes, GuestAddress};

/// Aligned to 2 MiB.
const BASE: Hva = Hva(0x7000_0000);
/// Around the five bits and on, with full looks in between.
const PASSES: u64 = 3 * FULL_LOOK;

/// Private memory in two tables, written before the script begins.
const PRIVATE: u64 = 0;
const PRIVATE_PAGES: u64 = 700;
/// Read and executed only: every page is the zero frame.
const ZERO: u64 = 2048;
/// Shared memory, at neither end of a table.
const SHARED: u64 = 3172;
/// Private memory that comes and goes, and is only written.
const FRESH: u64 = 4096;
const SOME_PAGES: u64 = 300;
/// Private memory that moves between two places.
const HOMES: [u64; 2] = [5120, 6181];
const MOVED_PAGES: u64 = 64;
/// A page of its own, far from the others.
const HOT: Hva = Hva(0x7000_0000 + (1 << 30));

/// What the pages should be like.
#[derive(Debug, Default)]
struct Model {
    /// The pass that found the page young last.
    last: BTreeMap<u64, u64>,
    /// Accessed since the last pass.
    touched: BTreeSet<u64>,
}

impl Model {
    fn age(&self, page: u64, generation: u64) -> PageAge {
        match self.last.get(&page) {
            Some(last) => PageAge::Passes(u8::try_from(generation - last).unwrap().min(OLDEST)),
            None => PageAge::Untouched,
        }
    }

    fn forget(&mut self, range: HvaRange) {
        self.last.retain(|page, _| !range.page_numbers().contains(page));
        self.touched.retain(|page| !range.page_numbers().contains(page));
    }

    fn move_pages(&mut self, from: HvaRange, to: Hva) {
        let moved = |page: u64| match from.page_numbers().contains(&page) {
            true => page - from.start.page() + to.page(),
            false => page,
        };
        self.last = self.last.iter().map(|(&page, &pass)| (moved(page), pass)).collect();
        self.touched = self.touched.iter().map(|&page| moved(page)).collect();
    }
}

/// A guest whose accesses are known.
struct Script<'m> {
    machine: &'m Machine,
    vcpus: [Vcpu; 3],
    view: GuestView,
    model: Model,
    random: Random,
    /// Where the memory that moves is now.
    home: usize,
    /// What the private memory allows now.
    private: Access,
}

impl<'m> Script<'m> {
    fn new(machine: &'m Machine, seed: u64) -> Self {
        let at = |first| page(BASE, first);
        machine.map_at(at(PRIVATE), PRIVATE_PAGES, RW, MapFlags::PRIVATE);
        machine.map_at(at(ZERO), SOME_PAGES, RX, MapFlags::PRIVATE);
        machine.map_at(at(SHARED), SOME_PAGES, RW, MapFlags::SHARED);
        machine.map_at(at(FRESH), SOME_PAGES, RW, MapFlags::PRIVATE);
        machine.map_at(at(HOMES[0]), MOVED_PAGES, RW, MapFlags::PRIVATE);
        let mut script = Self {
            machine,
            vcpus: [machine.vcpu(0, Fixed(16)), machine.vcpu(1, Adaptive), machine.vcpu(2, Off)],
            view: iommu::view(&machine.mm).unwrap(),
            model: Model::default(),
            random: Random(seed),
            home: 0,
            private: RW,
        };
        for (first, count) in [(PRIVATE, PRIVATE_PAGES), (HOMES[0], MOVED_PAGES)] {
            (0..count).for_each(|n| script.touch(at(first + n), Access::WRITE));
        }
        script
    }

    /// An access by a vCPU, or by a device.
    fn touch(&mut self, at: Hva, access: Access) {
        match self.random.below(8) {
            0 if access == Access::READ => {
                self.view.read_obj::<u64>(GuestAddress(at.0)).unwrap();
            }
            0 if access == Access::WRITE => self.view.write_obj(7u64, GuestAddress(at.0)).unwrap(),
            _ => {
                let vcpu = &mut self.vcpus[self.random.below(3) as usize];
                vcpu.access(at, access, |word| word.load(Ordering::SeqCst)).unwrap();
            }
        }
        self.model.touched.insert(at.page());
    }

    fn touch_somewhere(&mut self) {
        let either = [Access::READ, Access::WRITE][self.random.below(2) as usize];
        let (first, count, access) = match self.random.below(5) {
            0 if self.private == READ => (PRIVATE, PRIVATE_PAGES, Access::READ),
            0 => (PRIVATE, PRIVATE_PAGES, either),
            1 => (ZERO, SOME_PAGES, [Access::READ, Access::EXEC][self.random.below(2) as usize]),
            2 => (SHARED, SOME_PAGES, either),
            3 => (FRESH, SOME_PAGES, Access::WRITE),
            _ => (HOMES[self.home], MOVED_PAGES, either),
        };
        let at = page(BASE, first + self.random.below(count));
        self.touch(at, access);
    }

    /// The address space changes under the pages.
    fn change(&mut self) {
        let mm = &self.machine.mm;
        let first = self.random.below(SOME_PAGES - 40);
        let fresh = HvaRange::pages_from(page(BASE, FRESH + first), 1 + self.random.below(40));
        match self.random.below(4) {
            0 => {
                self.private = if self.private == RW { READ } else { RW };
                mm.mprotect(page(BASE, PRIVATE), pages(PRIVATE_PAGES), self.private).unwrap();
            }
            1 => {
                mm.munmap(fresh.start, fresh.len()).unwrap();
                self.machine.map_at(fresh.start, fresh.page_count(), RW, MapFlags::PRIVATE);
                self.model.forget(fresh);
            }
            2 => {
                mm.madvise(fresh.start, fresh.len(), Advice::DontNeed).unwrap();
                self.model.forget(fresh);
            }
            _ => {
                let from = HvaRange::pages_from(page(BASE, HOMES[self.home]), MOVED_PAGES);
                self.home = 1 - self.home;
                let to = page(BASE, HOMES[self.home]);
                let flags = RemapFlags::MAYMOVE | RemapFlags::FIXED;
                mm.mremap(from.start, from.len(), from.len(), flags, to).unwrap();
                self.model.move_pages(from, to);
            }
        }
    }

    /// Accesses and changes in random order, then a pass, and a look at every page.
    fn round(&mut self) {
        let touches = [0, 3, 40, 400][self.random.below(4) as usize];
        for _ in 0..touches {
            self.touch_somewhere();
            if self.random.below(20) == 0 {
                self.change();
            }
        }
        let pass = self.machine.mm.age();
        assert_eq!(pass.generation, self.machine.mm.generation());
        for page in std::mem::take(&mut self.model.touched) {
            self.model.last.insert(page, pass.generation);
        }
        let ages = self.machine.ages();
        for (&page, &age) in &ages {
            assert_eq!(age, self.model.age(page, pass.generation), "page {page:#x} after {pass:?}");
        }
        assert!(self.model.last.keys().all(|page| ages.contains_key(page)));
        let young = ages.values().filter(|&&age| age == PageAge::Passes(0)).count();
        assert_eq!((pass.present, pass.young), (ages.len() as u64, young as u64), "{pass:?}");
        self.machine.check();
    }
}

#[test]
fn i48_ages_are_exact_over_many_passes_of_a_random_guest() {
    for ad in [AdBits::AfterFlush, AdBits::None] {
        for seed in 0..3 {
            let machine = Machine::with_ad_bits(4096, ad);
            let mut script = Script::new(&machine, seed);
            (0..PASSES).for_each(|_| script.round());
            assert_eq!(machine.mm.generation(), PASSES);
            let ages: BTreeSet<PageAge> = machine.ages().into_values().collect();
            assert!(ages.contains(&PageAge::Untouched), "the script brings in neighbours: {ages:?}");
            drop(script);
            machine.finish();
        }
    }
}

/// Whoever faults, unmaps, protects, moves and forks does so while passes run: nothing hangs, and no leaf is wrong.
#[test]
fn passes_run_beside_everything_that_changes_the_space() {
    for ad in [AdBits::AfterFlush, AdBits::Unflushed, AdBits::None] {
        let machine = Machine::with_ad_bits(8192, ad);
        let script = Script::new(&machine, 9);
        drop(script);
        // Shared, so that no fork makes its frame one of several ptes.
        machine.map_at(HOT, 1, RW, MapFlags::SHARED);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let stop_all = StopOnDrop(&stop);
            for id in 0..2 {
                let mut vcpu = machine.vcpu(id, [Fixed(16), Adaptive][id]);
                let mut random = Random(id as u64);
                let stop = &stop;
                scope.spawn(move || {
                    while !stop.load(Ordering::SeqCst) {
                        let at = page(BASE, random.below(HOMES[1] + MOVED_PAGES));
                        // Most of it is not mapped, and what is may go.
                        let access = [Access::READ, Access::WRITE][random.below(2) as usize];
                        let _ = vcpu.access(at, access, |word| word.load(Ordering::SeqCst));
                    }
                });
            }
            let aging = scope.spawn(|| {
                while !stop.load(Ordering::SeqCst) {
                    let pass = machine.mm.age();
                    assert!(pass.young <= pass.present);
                    machine.mm.for_each_age(|vma, range, _| assert!(vma.range.contains(range.start)));
                }
            });
            // Beside the passes; a page that is always in use is never told as old.
            scope.spawn(|| {
                let mut vcpu = machine.vcpu(2, Off);
                while !stop.load(Ordering::SeqCst) {
                    let generation = machine.mm.generation();
                    vcpu.write(HOT, 1).unwrap();
                    machine.mm.age();
                    let age = machine.age_of(HOT);
                    let passed = machine.mm.generation() - generation;
                    // One more: the write may have been found by a pass that was under way. Where nothing is flushed, it may
                    // have gone unseen.
                    let most = if ad == AdBits::Unflushed { OLDEST } else { 1 + passed.min(6) as u8 };
                    assert!(age <= Some(PageAge::Passes(most)), "{age:?} after {passed} passes, {ad:?}");
                }
            });
            let mut random = Random(77);
            let mut home = 0;
            // Each thread gets its share, however few CPUs there are.
            for change in 0.. {
                if change >= 150 && machine.mm.generation() >= 40 {
                    break;
                }
                let fresh = page(BASE, FRESH + random.below(SOME_PAGES - 20));
                match random.below(5) {
                    0 => drop(machine.mm.fork().unwrap()),
                    1 => {
                        let prot = [READ, RW][random.below(2) as usize];
                        machine.mm.mprotect(page(BASE, PRIVATE), pages(PRIVATE_PAGES), prot).unwrap();
                    }
                    2 => machine.mm.madvise(fresh, pages(20), Advice::DontNeed).unwrap(),
                    3 => {
                        machine.mm.munmap(fresh, pages(20)).unwrap();
                        machine.map_at(fresh, 20, RW, MapFlags::PRIVATE);
                    }
                    _ => {
                        let (from, to) = (page(BASE, HOMES[home]), page(BASE, HOMES[1 - home]));
                        let flags = RemapFlags::MAYMOVE | RemapFlags::FIXED;
                        machine.mm.mremap(from, pages(MOVED_PAGES), pages(MOVED_PAGES), flags, to).unwrap();
                        home = 1 - home;
                    }
                }
                let report = machine.shadow.audit(&machine.mm);
                assert!(report.violations.is_empty(), "{:#?}", report.violations);
            }
            drop(stop_all);
            aging.join().unwrap();
        });
        (0..2).for_each(|cpu| machine.check_tlb(cpu));
        machine.finish();
    }
}
