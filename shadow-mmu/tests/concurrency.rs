// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Many threads at once, each with a seed: vCPUs that read and write, and an address space that changes under them.
//!
//! Oracles: no vCPU ever reaches a free frame (I21, I22: checked at each access, and by the poison), no page ever shows
//! another page's words (I13), no write is lost to a copy (I24), no mark is lost with a leaf (I25), no write lands after
//! rights were taken (I14), the audit finds nothing while all of it runs, and in the end every frame is back (I23).
//! The interleavings that the contract names are forced one by one in `interleavings.rs`.
// What a test does not expect may end it.
#![cfg(feature = "mmu-notifier")]
#![allow(clippy::unwrap_used)]

mod common;

use common::{Machine, NONE, PATIENCE, READ, RW, Random, StopOnDrop, TestFile, Vcpu, page, pages};
use shadow_mmu::addr::{Access, Gfn, Hva, HvaRange};
use shadow_mmu::frame::FrameFlags;
use shadow_mmu::mm::{Advice, Backing, FaultError, MapFlags, Object, RemapFlags};
use shadow_mmu::shadow::FaultAroundPolicy::{Adaptive, Fixed, Off};
use shadow_mmu::shadow::{Memslot, SlotAccess};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Crosses the end of a leaf table.
const BASE: Hva = Hva(0x7020_0000 - (24 << 12));
/// Pages of each of the two areas that mappings are moved between.
const AREA: u64 = 48;
/// Where the second area lies, in pages from [`BASE`].
const OTHER: u64 = 64;
/// The second slot's first guest frame: the first area once more.
const ALIAS: Gfn = Gfn(0x100);

fn words(at: Hva, n: u64) -> Hva {
    Hva(at.0 + 8 * n)
}

/// What a vCPU may be told while mappings come and go.
fn is_expected(error: FaultError) -> bool {
    matches!(error, FaultError::NoMapping | FaultError::NoAccess)
}

fn slot(gfn: Gfn, pages: u64) -> Memslot {
    Memslot { gfn, pages, hva: BASE, access: SlotAccess::ReadWrite }
}

/// Reads and writes words that say which page of their area they belong to, in both areas and through the alias.
fn guest(machine: &Machine, id: usize, seed: u64, stop: &AtomicBool) -> u64 {
    let mut random = Random(seed);
    let mut vcpu = machine.vcpu(id, [Off, Fixed(8), Adaptive][id % 3]);
    let mut accesses = 0;
    while !stop.load(Ordering::Relaxed) {
        let n = random.below(AREA);
        let base = [BASE, page(BASE, OTHER), ALIAS.gpa().0.into_hva()][random.below(3) as usize];
        let at = words(page(base, n), random.below(512));
        let result = match random.below(3) {
            0 => vcpu.write(at, (n + 1) << 32 | random.below(1 << 32)),
            _ => vcpu.read(at).map(|word| {
                assert!(word == 0 || word >> 32 == n + 1, "page {n} shows {word:#x}: another page's word");
            }),
        };
        match result {
            Ok(()) => accesses += 1,
            Err(error) => assert!(is_expected(error), "{error} at {at}"),
        }
    }
    accesses
}

trait IntoHva {
    fn into_hva(self) -> Hva;
}

impl IntoHva for u64 {
    fn into_hva(self) -> Hva {
        Hva(self)
    }
}

/// One random change of the address space, that keeps each page at its place in its area.
fn change(machine: &Machine, random: &mut Random) {
    let mm = &machine.mm;
    let (n, area) = (random.below(AREA), random.below(2));
    let len = 1 + random.below(AREA - n);
    let (from, to) = (page(BASE, n + area * OTHER), page(BASE, n + (1 - area) * OTHER));
    let prot = [RW, RW, READ, NONE][random.below(4) as usize];
    let private = MapFlags::PRIVATE | MapFlags::FIXED;
    // Whether a call succeeds depends on what is mapped by then.
    match random.below(16) {
        0 => _ = mm.munmap(from, pages(len)),
        1..5 => _ = mm.mmap(from, pages(len), RW, private, Backing::Anonymous),
        5 => _ = mm.mmap(from, pages(len), RW, private | MapFlags::POPULATE, Backing::Anonymous),
        6..8 => _ = mm.mprotect(from, pages(len), prot),
        8 => _ = mm.mprotect(from, pages(len), RW),
        9..11 => {
            let advice = [Advice::DontNeed, Advice::Free, Advice::PopulateRead, Advice::PopulateWrite];
            _ = mm.madvise(from, pages(len), advice[random.below(4) as usize]);
        }
        11..14 => {
            let flags = RemapFlags::MAYMOVE | RemapFlags::FIXED;
            let keep = if random.below(2) == 0 { RemapFlags::DONTUNMAP } else { RemapFlags::empty() };
            _ = mm.mremap(from, pages(len), pages(len), flags | keep, to);
        }
        14 => _ = mm.notifiers().clear_flush_young(HvaRange::pages_from(from, len)),
        _ => {
            if machine.shadow.remove_slot(ALIAS).is_err() {
                // Another thread may be as fast.
                _ = machine.shadow.add_slot(slot(ALIAS, AREA));
            }
        }
    }
}

/// A slot for both areas, at their own addresses.
fn storm_machine() -> Machine {
    let machine = Machine::without_slot(2048);
    machine.shadow.add_slot(slot(Gfn(BASE.page()), OTHER + AREA)).unwrap();
    machine.map_at(BASE, AREA, RW, MapFlags::PRIVATE);
    machine
}

#[test]
fn i13_i21_i22_guests_run_through_a_storm_of_changes() {
    for seed in 0..3 {
        let machine = storm_machine();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let stopper = StopOnDrop(&stop);
            let guests = [0, 1, 2].map(|id| {
                let (machine, stop) = (&machine, &stop);
                scope.spawn(move || guest(machine, id, seed * 100 + id as u64, stop))
            });
            for id in 0..2 {
                let (machine, stop) = (&machine, &stop);
                scope.spawn(move || {
                    let mut random = Random(seed * 100 + 50 + id);
                    while !stop.load(Ordering::Relaxed) {
                        change(machine, &mut random);
                    }
                });
            }
            let start = Instant::now();
            while start.elapsed() < Duration::from_millis(600) && !guests.iter().any(|one| one.is_finished())
            {
                std::thread::sleep(Duration::from_millis(5));
                machine.check();
            }
            drop(stopper);
            for guest in guests {
                assert!(guest.join().unwrap() > 0, "seed {seed}: a guest got nowhere");
            }
        });
        (0..3).for_each(|cpu| machine.check_tlb(cpu));
        machine.finish();
    }
}

/// vCPUs touch the same fresh pages at the same time. There is memory: nobody may be told that there is none.
#[test]
fn a_fault_that_another_one_overtook_is_not_out_of_memory() {
    const PAGES: u64 = 4096;
    let machine = Machine::new(3 * PAGES);
    for (round, policy) in [Off, Off, Fixed(4), Adaptive].into_iter().enumerate() {
        machine.map_at(BASE, PAGES, RW, MapFlags::PRIVATE);
        // Both walk the same way, each waiting for the other at every page.
        let turns = [AtomicU64::new(0), AtomicU64::new(0)];
        std::thread::scope(|scope| {
            for id in 0..2usize {
                let (machine, turns) = (&machine, &turns);
                scope.spawn(move || {
                    let mut vcpu = machine.vcpu(id, policy);
                    for n in 0..PAGES {
                        turns[id].store(n, Ordering::SeqCst);
                        let start = Instant::now();
                        while turns[1 - id].load(Ordering::SeqCst) < n && start.elapsed().as_micros() < 50 {
                            std::hint::spin_loop();
                        }
                        let at = words(page(BASE, n), id as u64);
                        assert_eq!(vcpu.write(at, n + 1), Ok(()), "round {round}, page {n}");
                    }
                    turns[id].store(u64::MAX, Ordering::SeqCst);
                });
            }
        });
        let mut vcpu = machine.vcpu(2, Off);
        for n in 0..PAGES {
            assert_eq!([0, 1].map(|id| vcpu.read(words(page(BASE, n), id))), [Ok(n + 1); 2], "page {n}");
        }
        machine.check();
    }
    machine.finish();
}

/// Each vCPU writes its own words of the same pages, while those are copied (from the zero frame, from a file), lose the
/// right to be written and get it back, and grow old. Every word must be there in the end (I24, I26).
#[test]
fn i24_no_write_is_lost_to_a_copy() {
    const PAGES: u64 = 64;
    let machine = Machine::new(1024);
    let file = Object::file(&machine.pool, TestFile::new(pages(PAGES)));
    for round in 0..40u64 {
        let (flags, object) = (MapFlags::PRIVATE | MapFlags::FIXED, file.clone());
        let backing = match round % 2 {
            0 => Backing::Anonymous,
            _ => Backing::Object { object, offset: 0 },
        };
        machine.mm.mmap(BASE, pages(PAGES), RW, flags, backing).unwrap();
        std::thread::scope(|scope| {
            let guests = [0u64, 1].map(|id| {
                let machine = &machine;
                scope.spawn(move || {
                    let mut random = Random(round * 2 + id);
                    let mut vcpu = machine.vcpu(id as usize, [Off, Fixed(16)][(round / 2 % 2) as usize]);
                    for step in 1..2000 {
                        let n = random.below(PAGES);
                        if random.below(2) == 0 {
                            assert!(vcpu.read(page(BASE, n)).is_ok());
                        }
                        let at = words(page(BASE, n), 8 + id);
                        write_when_allowed(&mut vcpu, at, step);
                        assert_eq!(vcpu.read(at), Ok(step), "round {round}: a write was lost at once");
                    }
                })
            });
            let mut random = Random(round + 1000);
            while !guests.iter().all(|guest| guest.is_finished()) {
                let n = random.below(PAGES);
                let range = HvaRange::pages_from(page(BASE, n), 1 + random.below(PAGES - n));
                machine.mm.mprotect(range.start, range.len(), READ).unwrap();
                machine.mm.mprotect(range.start, range.len(), RW).unwrap();
                machine.mm.notifiers().clear_flush_young(range);
                if round % 8 == 0 {
                    machine.check();
                }
            }
        });
        machine.check();
    }
    drop(file);
    machine.finish();
}

fn write_when_allowed(vcpu: &mut Vcpu, at: Hva, value: u64) {
    loop {
        match vcpu.write(at, value) {
            Ok(()) => return,
            Err(error) => assert_eq!(error, FaultError::NoAccess),
        }
    }
}

/// vCPUs count in pages that lose the right to be written again and again. Once mprotect has returned, no count moves.
#[test]
fn i14_r21_no_write_lands_after_rights_are_taken() {
    const PAGES: u64 = 4;
    let machine = Machine::new(256);
    machine.map_at(BASE, PAGES, RW, MapFlags::PRIVATE);
    (0..PAGES).for_each(|n| machine.poke(page(BASE, n), 1));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _stopper = StopOnDrop(&stop);
        for id in 0..2 {
            let (machine, stop) = (&machine, &stop);
            scope.spawn(move || {
                let mut vcpu = machine.vcpu(id, Off);
                while !stop.load(Ordering::Relaxed) {
                    for n in 0..PAGES {
                        let add = |word: &AtomicU64| word.fetch_add(1, Ordering::SeqCst);
                        let counted = vcpu.access(page(BASE, n), Access::WRITE, add);
                        assert!(matches!(counted, Ok(_) | Err(FaultError::NoAccess)), "{counted:?}");
                    }
                }
            });
        }
        for round in 0..1500 {
            let counts = || {
                [0, 1, 2, 3].map(|n| {
                    let frame = machine.pte(page(BASE, n)).pfn();
                    machine.pool.words(frame)[0].load(Ordering::SeqCst)
                })
            };
            machine.mm.mprotect(BASE, pages(PAGES), READ).unwrap();
            let before = counts();
            (0..50).for_each(|_| std::hint::spin_loop());
            assert_eq!(counts(), before, "round {round}: a write landed in read-only memory");
            machine.mm.mprotect(BASE, pages(PAGES), RW).unwrap();
        }
    });
    machine.check();
    machine.finish();
}

/// A vCPU writes to page after page, whose leaves are there without D, while another thread takes the same leaves away, or
/// their A. What was written is marked in the leaf that is there or, by way of the leaf that is gone, in the frame (R11).
#[test]
fn i25_r11_no_mark_is_lost_with_a_leaf() {
    const PAGES: u64 = 512;
    let machine = Machine::new(4 * PAGES);
    let mut met = 0;
    for round in 0..200u64 {
        machine.map_at(BASE, PAGES, RW, MapFlags::SHARED);
        let range = HvaRange::pages_from(BASE, PAGES);
        let mut vcpu = machine.vcpu(1, Off);
        machine.vcpu(0, Fixed(1024)).read(BASE).unwrap();
        let ages = round % 2 == 0;
        if ages {
            (0..PAGES).for_each(|n| assert_eq!(vcpu.read(page(BASE, n)), Ok(0)));
        }
        let go = AtomicU64::new(0);
        std::thread::scope(|scope| {
            let meet = |go: &AtomicU64| {
                go.fetch_add(1, Ordering::SeqCst);
                while go.load(Ordering::SeqCst) < 2 {
                    std::hint::spin_loop();
                }
            };
            let (machine, go) = (&machine, &go);
            scope.spawn(move || {
                meet(go);
                // A little ahead or behind, so that the two meet somewhere.
                (0..round * 20).for_each(|_| std::hint::spin_loop());
                if ages {
                    assert!(machine.mm.notifiers().clear_young(range));
                } else {
                    machine.mm.madvise(range.start, range.len(), Advice::DontNeed).unwrap();
                }
            });
            meet(go);
            (0..PAGES).for_each(|n| vcpu.write(page(BASE, n), n + 1).unwrap());
        });
        let mut gone = 0;
        let (object, _) =
            machine.mm.vma(BASE).unwrap().object_page(BASE).map(|(o, at)| (o.clone(), at)).unwrap();
        for n in 0..PAGES {
            let pfn = object.cached_page(n).unwrap();
            machine.pool.put(pfn);
            assert_eq!(machine.pool.words(pfn)[0].load(Ordering::SeqCst), n + 1, "round {round}, page {n}");
            let spte = machine.spte(page(BASE, n));
            let in_frame = machine.pool.frame(pfn).flags().contains(FrameFlags::DIRTY);
            assert!(spte.is_dirty() || in_frame, "round {round}: D of page {n} is lost, leaf {spte:?}");
            gone += u64::from(!spte.is_present());
        }
        met += u64::from(gone > 0 && gone < PAGES);
    }
    println!("the two met in {met} of 100 rounds");
    machine.check();
    machine.finish();
}

/// A slot comes and goes under vCPUs that use it, and under audits. Once its removal has returned nobody reaches its memory, and nothing of it
/// is cached; its other half, in a slot that stays, is never in the way.
#[test]
fn i39_slots_come_and_go_under_running_guests() {
    let machine = storm_machine();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _stopper = StopOnDrop(&stop);
        for id in 0..2usize {
            let (machine, stop) = (&machine, &stop);
            scope.spawn(move || {
                let mut random = Random(id as u64);
                let mut vcpu = machine.vcpu(id, Fixed(8));
                while !stop.load(Ordering::Relaxed) {
                    let n = random.below(AREA);
                    let alias = vcpu.write(page(Hva(ALIAS.gpa().0), n), n);
                    assert!(matches!(alias, Ok(()) | Err(FaultError::NoMapping)), "{alias:?}");
                    assert!(vcpu.read(page(BASE, n)).is_ok());
                }
            });
        }
        // An audit sees the slots before a change or after it, with their leaves.
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                machine.check();
            }
        });
        for _ in 0..250 {
            machine.shadow.add_slot(slot(ALIAS, AREA)).unwrap();
            std::thread::sleep(Duration::from_micros(200));
            machine.shadow.remove_slot(ALIAS).unwrap();
            let alias = ALIAS.0..ALIAS.0 + AREA;
            for cpu in 0..2 {
                assert!(machine.tlb.cached(cpu).iter().all(|(gfn, _)| !alias.contains(&gfn.0)));
            }
            assert!(alias.clone().all(|gfn| !machine.shadow.spte(Gfn(gfn)).is_present()));
        }
    });
    machine.check();
    machine.finish();
}

/// The address space ends under running vCPUs (I8): every one is told, none reaches a frame that is gone.
#[test]
fn i8_the_space_ends_under_running_guests() {
    for seed in 0..20 {
        let machine = storm_machine();
        let late = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let guests = [0, 1].map(|id| {
                let (machine, late) = (&machine, &late);
                scope.spawn(move || {
                    let mut random = Random(seed * 2 + id as u64);
                    let mut vcpu = machine.vcpu(id, Fixed(4));
                    while !late.load(Ordering::Relaxed) {
                        if let Err(error) = vcpu.write(page(BASE, random.below(AREA)), 1) {
                            return Some(error);
                        }
                    }
                    None
                })
            });
            std::thread::sleep(Duration::from_millis(2));
            machine.mm.release();
            let stopper = StopOnDrop(&late);
            let start = Instant::now();
            while start.elapsed() < PATIENCE && !guests.iter().all(|guest| guest.is_finished()) {
                std::thread::yield_now();
            }
            drop(stopper);
            for guest in guests {
                assert_eq!(guest.join().unwrap(), Some(FaultError::NoMapping), "seed {seed}");
            }
        });
        assert!((0..2).all(|cpu| machine.tlb.cached(cpu).is_empty()));
        machine.check();
        machine.finish();
    }
}
