// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Faults one at a time: which frame an access gets, what it may do there, what comes along, and what is left when
//! there is no memory.
// What a test does not expect may end it.
#![cfg(feature = "mmu-notifier")]
#![allow(clippy::unwrap_used)]

mod common;

use common::{ALL_GFNS, Machine, NONE, READ, RW, RX, Random, TestFile, page, pages};
use shadow_mmu::addr::{Access, Gfn, Hva, HvaRange, PAGE_SIZE, Pfn};
use shadow_mmu::frame::{Fill, FrameFlags};
use shadow_mmu::mm::{Advice, Backing, FaultError, FaultRequest, MapFlags, MmError, Object, RemapFlags};
use shadow_mmu::shadow::FaultAroundPolicy::{Adaptive, Fixed, Off};
use shadow_mmu::shadow::{AdBits, FaultCause, Memslot, Prefaulted, SlotAccess, Spte};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Aligned to 4 MiB, so that blocks of up to 1024 pages are whole.
const BASE: Hva = Hva(0x7000_0000);

fn map_file(machine: &Machine, at: Hva, file: &Arc<Object>, count: u64) {
    let backing = Backing::Object { object: Arc::clone(file), offset: 0 };
    machine.mm.mmap(at, pages(count), RW, MapFlags::PRIVATE | MapFlags::FIXED, backing).unwrap();
}

/// I23, where no fault runs: each frame has a reference for each pte, and one more if a page cache has it.
#[track_caller]
fn check_references(machine: &Machine) {
    for vma in machine.mm.vmas() {
        for number in vma.range.page_numbers() {
            let pte = machine.pte(Hva(number * PAGE_SIZE));
            if pte.is_present() && !pte.is_zero() {
                let frame = machine.pool.frame(pte.pfn());
                let held = frame.map_count() + u32::from(pte.is_object());
                assert_eq!(frame.ref_count(), held, "page {number:#x}, {pte:?} (I23)");
            }
        }
    }
}

#[test]
fn untouched_memory_costs_nothing_and_reads_as_the_zero_frame() {
    let machine = Machine::new(64);
    let at = machine.map(8, RW);
    let mut vcpu = machine.vcpu(0, Off);
    assert_eq!(vcpu.read(at), Ok(0));
    let free = machine.pool.free_frames();
    for n in 1..8 {
        assert_eq!(vcpu.read(page(at, n)), Ok(0));
        let spte = machine.spte(page(at, n));
        assert_eq!(spte.pfn(), machine.mm.zero_frame());
        assert!(!spte.is_writable() && !spte.is_host_writable() && spte.is_accessed(), "{spte:?}");
    }
    assert_eq!(machine.pool.free_frames(), free);
    machine.finish();
}

#[test]
fn i15_a_write_to_the_zero_frame_moves_that_page_alone() {
    let machine = Machine::new(64);
    let at = machine.map(4, RW);
    let (mut writer, mut reader) = (machine.vcpu(0, Off), machine.vcpu(1, Off));
    for n in 0..4 {
        assert_eq!((writer.read(page(at, n)), reader.read(page(at, n))), (Ok(0), Ok(0)));
    }
    let others = [0, 2, 3].map(|n| machine.spte(page(at, n)));
    writer.write(page(at, 1), 7).unwrap();
    assert_ne!(machine.spte(page(at, 1)).pfn(), machine.mm.zero_frame());
    assert_eq!([0, 2, 3].map(|n| machine.spte(page(at, n))), others, "other mappings of the zero frame");
    // The reader had the zero frame cached: the copy's pair flushed it (I26).
    assert_eq!(reader.read(page(at, 1)), Ok(7));
    assert_eq!([0, 2, 3].map(|n| reader.read(page(at, n))), [Ok(0); 3]);
    machine.check();
    machine.finish();
}

#[test]
fn a_private_file_page_is_shared_until_it_is_written() {
    let machine = Machine::new(64);
    let file = Object::file(&machine.pool, TestFile::new(pages(2) + 100));
    let [first, second] = [BASE, page(BASE, 8)];
    [first, second].iter().for_each(|&at| map_file(&machine, at, &file, 4));
    let mut vcpu = machine.vcpu(0, Off);
    for at in [first, second] {
        assert_eq!(vcpu.read(page(at, 1)), Ok(TestFile::tag(1)));
    }
    let cached = machine.spte(page(first, 1));
    assert_eq!(cached.pfn(), machine.spte(page(second, 1)).pfn(), "one frame of the page cache for both");
    assert!(!cached.is_writable(), "{cached:?}");

    vcpu.write(page(first, 1), 9).unwrap();
    assert_eq!((vcpu.read(page(first, 1)), vcpu.read(page(second, 1))), (Ok(9), Ok(TestFile::tag(1))));
    assert_eq!(machine.spte(page(second, 1)).pfn(), cached.pfn());
    let beyond_the_word = Hva(page(first, 1).0 + 8);
    assert_eq!(vcpu.read(beyond_the_word), Ok(0x0101_0101_0101_0101), "the rest came with the copy");
    machine.mm.madvise(first, pages(4), Advice::DontNeed).unwrap();
    assert_eq!(vcpu.read(page(first, 1)), Ok(TestFile::tag(1)), "the copy is gone, the file is not");
    check_references(&machine);
    drop(file);
    machine.finish();
}

#[test]
fn a_file_ends_in_zeros_up_to_the_page_and_in_bus_errors_beyond() {
    let machine = Machine::new(64);
    let file = Object::file(&machine.pool, TestFile::new(pages(2) + 16));
    map_file(&machine, BASE, &file, 5);
    let mut vcpu = machine.vcpu(0, Fixed(8));
    let last = page(BASE, 2);
    assert_eq!(vcpu.read(last), Ok(TestFile::tag(2)));
    assert_eq!(vcpu.read(Hva(last.0 + 8)), Ok(0x0202_0202_0202_0202));
    assert_eq!(vcpu.read(Hva(last.0 + 16)), Ok(0));
    assert_eq!(vcpu.read(Hva(last.0 + 4088)), Ok(0));
    for access in [READ, Access::WRITE] {
        assert_eq!(vcpu.fault(page(BASE, 3), access), Err(FaultError::BusError));
    }
    machine.check();
    drop(file);
    machine.finish();
}

#[test]
fn i19_shared_memory_is_one_through_two_mappings_and_two_slots() {
    let machine = Machine::without_slot(64);
    let mm = &machine.mm;
    let at = mm.mmap(Hva(0), pages(4), RW, MapFlags::SHARED, Backing::Anonymous).unwrap();
    let twin = mm.mremap(at, 0, pages(4), RemapFlags::MAYMOVE, Hva(0)).unwrap();
    // Guest frames 0.. and 0x1000.. show `at`, 0x2000.. shows its twin.
    for (gfn, hva) in [(0, at), (0x1000, at), (0x2000, twin)] {
        let slot = Memslot { gfn: Gfn(gfn), pages: 4, hva, access: SlotAccess::ReadWrite };
        machine.shadow.add_slot(slot).unwrap();
    }
    let guest = |slot: u64, n: u64| Hva(pages(slot * 0x1000 + n));
    let mut vcpu = machine.vcpu(0, Off);
    vcpu.write(guest(0, 2), 5).unwrap();
    assert_eq!((vcpu.read(guest(1, 2)), vcpu.read(guest(2, 2))), (Ok(5), Ok(5)));
    vcpu.write(guest(2, 2), 6).unwrap();
    assert_eq!((vcpu.read(guest(0, 2)), vcpu.read(guest(1, 2))), (Ok(6), Ok(6)));
    machine.check();

    mm.munmap(page(at, 2), pages(1)).unwrap();
    assert_eq!(vcpu.read(guest(0, 2)), Err(FaultError::NoMapping));
    assert_eq!(vcpu.read(guest(1, 2)), Err(FaultError::NoMapping));
    assert_eq!(vcpu.read(guest(2, 2)), Ok(6), "the twin stays");
    machine.check();
    machine.finish();
}

#[test]
fn i14_a_read_only_slot_withholds_writing_from_the_guest_alone() {
    let machine = Machine::without_slot(64);
    let at = machine.map(2, Access::all());
    let slot = Memslot { gfn: Gfn(0), pages: 2, hva: at, access: SlotAccess::ReadOnly };
    machine.shadow.add_slot(slot).unwrap();
    let mut vcpu = machine.vcpu(0, Fixed(2));
    machine.poke(at, 3);
    assert_eq!((vcpu.read(Hva(0)), vcpu.fetch(Hva(0))), (Ok(3), Ok(3)));
    assert_eq!(vcpu.write(Hva(0), 4), Err(FaultError::NoAccess));
    assert!(!machine.spte(Hva(0)).is_host_writable());
    machine.poke(at, 5);
    assert_eq!(vcpu.read(Hva(0)), Ok(5));
    machine.check();
    machine.finish();
}

#[test]
fn i14_rights_of_the_mapping_are_the_rights_of_the_guest() {
    let machine = Machine::new(64);
    let at = machine.map(6, RW);
    machine.poke(at, 1);
    let rows = [(NONE, NONE), (READ, READ), (RW, RW), (RX, RX), (Access::WRITE, RW), (Access::EXEC, RX)];
    let mut vcpu = machine.vcpu(0, Fixed(4));
    // From each set of rights to each other, so that upgrades and downgrades of a leaf that is there are covered.
    for (before, _) in rows {
        for (prot, allowed) in rows {
            machine.mm.mprotect(at, pages(1), before).unwrap();
            let _ = vcpu.read(at);
            machine.mm.mprotect(at, pages(1), prot).unwrap();
            for access in [Access::READ, Access::WRITE, Access::EXEC] {
                let word = vcpu.access(at, access, |word| word.load(Ordering::SeqCst));
                let expected = if allowed.contains(access) { Ok(1) } else { Err(FaultError::NoAccess) };
                assert_eq!(word, expected, "{access} after {before} became {prot}");
            }
            machine.check();
        }
    }
    machine.finish();
}

#[test]
fn i25_rights_taken_and_given_back_keep_the_frame_and_its_marks() {
    let machine = Machine::new(64);
    let at = machine.map(2, RW);
    let mut vcpu = machine.vcpu(0, Off);
    vcpu.write(at, 8).unwrap();
    assert_eq!(vcpu.read(page(at, 1)), Ok(0));
    let pfn = machine.spte(at).pfn();
    assert_eq!(machine.pool.frame(pfn).flags(), FrameFlags::empty());
    machine.mm.mprotect(at, pages(2), READ).unwrap();
    assert!(!machine.spte(at).is_present(), "rights that go take the leaf with them");
    assert_eq!(
        machine.pool.frame(pfn).flags(),
        FrameFlags::ACCESSED | FrameFlags::DIRTY | FrameFlags::WRITTEN
    );
    assert_eq!((vcpu.write(at, 9), vcpu.read(at)), (Err(FaultError::NoAccess), Ok(8)));
    assert!(!machine.spte(at).is_dirty(), "a read leaves no D");
    machine.mm.mprotect(at, pages(2), RW).unwrap();
    vcpu.write(at, 10).unwrap();
    assert_eq!(machine.spte(at).pfn(), pfn, "nobody shares the frame: no copy");
    machine.finish();
}

#[test]
fn a_leaf_that_is_good_already_is_left_as_it_is() {
    let machine = Machine::new(64);
    let at = machine.map(1, RW);
    let mut vcpu = machine.vcpu(0, Off);
    let mut cause = |access| vcpu.fault(at, access).map(|outcome| outcome.cause);
    assert_eq!(cause(Access::WRITE), Ok(FaultCause::FirstTouch));
    let spte = machine.spte(at);
    assert_eq!(cause(Access::READ), Ok(FaultCause::Spurious));
    assert_eq!((machine.spte(at), cause(Access::WRITE)), (spte, Ok(FaultCause::Spurious)));
    machine.finish();
}

#[test]
fn addresses_without_slot_or_mapping_are_no_mapping() {
    let machine = Machine::without_slot(32);
    let at = machine.map(1, RW);
    let mut vcpu = machine.vcpu(0, Adaptive);
    assert_eq!(vcpu.read(at), Err(FaultError::NoMapping), "no slot");
    let all = Memslot { gfn: Gfn(0), pages: ALL_GFNS, hva: Hva(0), access: SlotAccess::ReadWrite };
    machine.shadow.add_slot(all).unwrap();
    for wild in [0, PAGE_SIZE, page(at, 1).0, (1 << 47) - 8, 1 << 47, u64::MAX - 7] {
        let outcome = vcpu.fault(Hva(wild), READ);
        assert_eq!(outcome, Err(FaultError::NoMapping), "{wild:#x}");
    }
    vcpu.write(at, 1).unwrap();
    machine.mm.release();
    assert_eq!(machine.spte(at), Spte::NONE);
    assert_eq!(vcpu.read(at), Err(FaultError::NoMapping), "the space is gone");
    machine.finish();
}

#[test]
fn a_pinned_page_outlives_its_mapping_and_no_longer() {
    let machine = Machine::new(64);
    let at = machine.map(1, RW);
    machine.poke(at, 0x1234);
    let pinned = machine.mm.fault(&FaultRequest::one_page(at, READ)).unwrap();
    let pfn = pinned.required().pfn;
    machine.mm.munmap(at, pages(1)).unwrap();
    // Whoever maps memory now gets other frames.
    let other = machine.map(40, RW);
    (0..40).for_each(|n| machine.poke(page(other, n), n));
    let frame = machine.pool.frame(pfn);
    assert_eq!((frame.ref_count(), frame.map_count()), (1, 0));
    assert_eq!(machine.pool.words(pfn)[0].load(Ordering::SeqCst), 0x1234);
    let free = machine.pool.free_frames();
    drop(pinned);
    assert_eq!(machine.pool.free_frames(), free + 1);
    machine.finish();
}

/// Takes all frames but `left`.
fn hoard(machine: &Machine, left: usize) -> Vec<Pfn> {
    let mut frames = Vec::new();
    machine.pool.alloc_up_to(machine.pool.free_frames() - left, Fill::Overwritten, &mut frames);
    frames
}

/// An access needs up to three tables on either side and a frame. With each number of frames too few, it fails, ends, and
/// leaves nothing behind that a later one could not use; with enough, it succeeds.
#[test]
fn i23_out_of_memory_is_an_answer_at_every_step_of_a_fault() {
    for access in [Access::READ, Access::WRITE] {
        for left in 0..9 {
            let machine = Machine::new(64);
            let at = machine.map(1, RW);
            let hoard = hoard(&machine, left);
            let mut vcpu = machine.vcpu(0, Adaptive);
            let enough = left >= 6 + usize::from(access == Access::WRITE);
            let answer = vcpu.access(at, access, |_| 1);
            assert_eq!(answer, if enough { Ok(1) } else { Err(FaultError::OutOfMemory) }, "{left} frames");
            machine.check();
            check_references(&machine);
            machine.pool.put_all(&hoard);
            assert_eq!(vcpu.access(at, access, |_| 1), Ok(1), "{left} frames, then more");
            machine.finish();
        }
    }
}

#[test]
fn i23_a_move_without_memory_changes_nothing() {
    for left in 0..4 {
        let machine = Machine::new(64);
        machine.map_at(BASE, 2, RW, MapFlags::PRIVATE);
        let mut vcpu = machine.vcpu(0, Off);
        (0..2).for_each(|n| vcpu.write(page(BASE, n), n + 1).unwrap());
        let (tables, hoard) = (machine.mm.table_count(), hoard(&machine, left));
        // Far enough away to need three tables.
        let far = Hva(BASE.0 + (1 << 40));
        let flags = RemapFlags::MAYMOVE | RemapFlags::FIXED;
        let moved = machine.mm.mremap(BASE, pages(2), pages(2), flags, far);
        let at = if left < 3 { BASE } else { far };
        assert_eq!(moved, if left < 3 { Err(MmError::NoMemory) } else { Ok(far) }, "{left} frames");
        assert_eq!((machine.mm.table_count(), machine.mm.vmas().len()), (tables, 1), "{left} frames");
        machine.pool.put_all(&hoard);
        assert_eq!([0, 1].map(|n| vcpu.read(page(at, n))), [Ok(1), Ok(2)]);
        machine.check();
        machine.finish();
    }
}

/// Tables without a leaf are given back when there are many, or when a fault needs one and there is no memory. A CPU that
/// remembered where they were must not go there (I31).
#[test]
fn i31_empty_tables_are_reclaimed_and_no_cpu_walks_them_any_more() {
    const FAR: u64 = 512;
    let machine = Machine::new(2048);
    let at = |n: u64| page(BASE, n * FAR);
    let mut vcpu = machine.vcpu(0, Off);
    let touch_and_unmap = |vcpu: &mut common::Vcpu, count: u64| {
        for n in 0..count {
            machine.map_at(at(n), 2, RW, MapFlags::PRIVATE);
            vcpu.write(at(n), n).unwrap();
        }
        (0..count).for_each(|n| machine.mm.munmap(at(n), PAGE_SIZE).unwrap());
    };
    let reclaimed = || machine.shadow.stats().tables_reclaimed.load(Ordering::SeqCst);
    touch_and_unmap(&mut vcpu, 100);
    assert_eq!(reclaimed(), 0, "few tables stay where they are");
    touch_and_unmap(&mut vcpu, 300);
    assert!(reclaimed() > 0);
    // Nobody has these frames now; whoever reads an entry there is found out.
    (0..300).for_each(|n| assert_eq!(vcpu.read(page(at(n), 1)), Ok(0)));
    machine.check();

    // Without the second pages all tables are empty, and are needed: by the primary, or by the shadow map.
    (0..300).for_each(|n| machine.mm.munmap(page(at(n), 1), PAGE_SIZE).unwrap());
    for (round, left) in [(1, 0), (2, 4)] {
        touch_and_unmap(&mut vcpu, 100);
        (0..100).for_each(|n| machine.mm.munmap(page(at(n), 1), PAGE_SIZE).unwrap());
        let (before, hoard) = (reclaimed(), hoard(&machine, left));
        machine.map_at(at(1000 * round), 1, RW, MapFlags::PRIVATE);
        assert_eq!(vcpu.write(at(1000 * round), 7), Ok(()), "{left} frames and many tables");
        assert!(reclaimed() > before);
        machine.pool.put_all(&hoard);
        machine.check();
    }
    machine.finish();
}

#[test]
fn need_goes_before_guesses() {
    for (kind, flags) in [("shared", MapFlags::SHARED), ("private", MapFlags::PRIVATE)] {
        let machine = Machine::new(256);
        machine.map_at(BASE, 64, RW, flags);
        // Tables on both sides are there, and ten frames, fewer than what guesses must leave.
        assert_eq!(machine.vcpu(0, Off).write(BASE, 1), Ok(()));
        let hoard = hoard(&machine, 10);
        let mut vcpu = machine.vcpu(0, Fixed(64));
        for n in (53..63).rev() {
            assert_eq!(
                vcpu.write(page(BASE, n), n),
                Ok(()),
                "{kind}: page {n} of ten that there are frames for"
            );
        }
        assert_eq!(vcpu.write(page(BASE, 52), 1), Err(FaultError::OutOfMemory), "{kind}");
        machine.check();
        machine.pool.put_all(&hoard);
        machine.finish();
    }
}

#[test]
fn fault_around_brings_neighbours_without_marks_and_never_the_neighbours_of_others() {
    let machine = Machine::without_slot(4096);
    // Pages 4 to 11 are one mapping, 12 to 15 another; the slot ends at page 9.
    machine.map_at(page(BASE, 4), 8, RW, MapFlags::PRIVATE);
    machine.map_at(page(BASE, 12), 4, READ, MapFlags::PRIVATE);
    let slot = Memslot { gfn: Gfn(0), pages: 10, hva: BASE, access: SlotAccess::ReadWrite };
    machine.shadow.add_slot(slot).unwrap();
    let mut vcpu = machine.vcpu(0, Fixed(16));
    vcpu.write(Hva(pages(6)), 1).unwrap();
    let installed = |n: u64| machine.spte(Hva(pages(n))).is_present();
    assert_eq!((0..16).filter(|&n| installed(n)).collect::<Vec<_>>(), (4..10).collect::<Vec<_>>());
    for n in 4..10 {
        let spte = machine.spte(Hva(pages(n)));
        assert_eq!((spte.is_accessed(), spte.is_dirty()), (n == 6, n == 6), "page {n}: {spte:?}");
        assert!(spte.is_writable());
    }
    // A read marks what it reads, and nothing as dirty.
    vcpu.read(Hva(pages(7))).unwrap();
    let spte = machine.spte(Hva(pages(7)));
    assert_eq!((spte.is_accessed(), spte.is_dirty()), (true, false));
    assert_eq!(vcpu.faults, 1, "what came along needs no fault");
    machine.check();
    machine.finish();
}

#[test]
fn prefaulted_young_marks_neighbours_by_their_rights() {
    let machine = Machine::new(256);
    machine.map_at(BASE, 16, RW, MapFlags::PRIVATE);
    machine.shadow.set_prefaulted(Prefaulted::Young);
    machine.vcpu(0, Fixed(8)).write(BASE, 1).unwrap();
    machine.vcpu(0, Fixed(8)).read(page(BASE, 8)).unwrap();
    for n in 0..16 {
        let spte = machine.spte(page(BASE, n));
        assert_eq!((spte.is_accessed(), spte.is_dirty()), (true, n < 8), "page {n}: {spte:?}");
        assert!(spte.is_legal());
    }
    machine.check();
    machine.finish();
}

#[test]
fn a_sequential_touch_costs_a_handful_of_faults_and_a_random_one_brings_nothing_unasked() {
    const TOUCHED: u64 = 10_000;
    let machine = Machine::new(12_000);
    let at = machine.map(TOUCHED, RW);
    let mut vcpu = machine.vcpu(0, Adaptive);
    for n in 0..TOUCHED {
        vcpu.write(page(at, n), n).unwrap();
    }
    assert!(vcpu.faults <= 30, "{} faults for {TOUCHED} pages", vcpu.faults);
    assert!((0..TOUCHED).all(|n| machine.peek(page(at, n)) == n));
    machine.mm.munmap(at, pages(TOUCHED)).unwrap();

    machine.map_at(BASE, 1 << 20, RW, MapFlags::PRIVATE | MapFlags::NORESERVE);
    let (at, mut vcpu) = (BASE, machine.vcpu(0, Adaptive));
    let mut random = Random(1);
    let mut touched = std::collections::BTreeSet::new();
    let before = machine.pool.free_frames() + machine.mm.table_count() + machine.shadow.table_count();
    for _ in 0..2000 {
        let n = random.below(1 << 20);
        vcpu.write(page(at, n), n).unwrap();
        touched.insert(n);
    }
    let after = machine.pool.free_frames() + machine.mm.table_count() + machine.shadow.table_count();
    let (used, distinct) = (before - after, touched.len());
    assert!(used <= distinct + distinct / 100, "{used} frames for {distinct} pages");
    machine.check();
    machine.finish();
}

#[test]
fn policies_decide_what_comes_along() {
    for (policy, faults) in [(Off, 64), (Fixed(1), 64), (Fixed(4), 16), (Fixed(64), 1)] {
        let machine = Machine::new(256);
        machine.map_at(BASE, 64, RW, MapFlags::PRIVATE);
        let mut vcpu = machine.vcpu(0, policy);
        (0..64).for_each(|n| vcpu.write(page(BASE, n), n).unwrap());
        assert_eq!(vcpu.faults, faults, "{policy:?}");
        machine.finish();
    }
    // Where random access was announced, nothing comes whatever the policy.
    let machine = Machine::new(256);
    machine.map_at(BASE, 64, RW, MapFlags::PRIVATE);
    machine.mm.madvise(BASE, pages(64), Advice::Random).unwrap();
    let mut vcpu = machine.vcpu(0, Fixed(64));
    (0..64).for_each(|n| vcpu.write(page(BASE, n), n).unwrap());
    assert_eq!(vcpu.faults, 64);
    machine.finish();
}

#[test]
fn i48_i49_aging_clears_a_of_the_whole_range_and_nothing_else() {
    for ad in [AdBits::Unflushed, AdBits::AfterFlush] {
        let machine = Machine::with_ad_bits(64, ad);
        let at = machine.map(4, RW);
        let (mut vcpu, notifiers) = (machine.vcpu(0, Off), machine.mm.notifiers());
        let range = HvaRange::pages_from(at, 4);
        vcpu.write(at, 1).unwrap();
        vcpu.read(page(at, 2)).unwrap();
        for _ in 0..2 {
            let young = [0, 1, 2, 3].map(|n| notifiers.test_young(page(at, n)));
            assert_eq!(young, [true, false, true, false], "asking changes nothing");
        }
        let before = machine.spte(at);
        assert!(notifiers.clear_flush_young(range));
        assert!(!notifiers.clear_flush_young(range) && !notifiers.test_young(at));
        let after = machine.spte(at);
        assert!(after.is_dirty() && after.without_marks() == before.without_marks(), "{before:?}, {after:?}");
        // Flushed: the next access walks, and is seen.
        vcpu.read(at).unwrap();
        assert!(notifiers.test_young(at) && !notifiers.test_young(page(at, 2)));
        // Flushed only where the CPU needs it: elsewhere what is cached may be used unseen.
        assert!(notifiers.clear_young(range));
        vcpu.read(at).unwrap();
        assert_eq!(notifiers.test_young(at), ad == AdBits::AfterFlush);
        machine.check();
        machine.finish();
    }
}
