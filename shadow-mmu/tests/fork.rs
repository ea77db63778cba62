// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! fork: what the child gets and what it does not, who pays for a write, and what is left when there is no memory
//! (R21, I15, I23, I24). What runs beside a fork is in `fork_races.rs`; random scripts in forked spaces are in
//! `mm_model.rs`.
// What a test does not expect may end it.
#![cfg(feature = "mmu-notifier")]
#![allow(clippy::unwrap_used)]

mod common;

use common::{Machine, NONE, READ, RW, TestFile, page, pages};
use shadow_mmu::addr::{Hva, PAGE_SIZE, Pfn};
use shadow_mmu::frame::Fill;
use shadow_mmu::mm::{Advice, Backing, FaultError, FaultRequest, MapFlags, MmError, Object, RemapFlags};
use shadow_mmu::notifier::Misuse;
use shadow_mmu::shadow::FaultAroundPolicy::{Fixed, Off};
use std::sync::Arc;
use std::sync::atomic::Ordering;

const BASE: Hva = Hva(0x7000_0000);
/// A place that shares no page table with [`BASE`] but the root.
const FAR: Hva = Hva(BASE.0 + (1 << 40));

/// A machine with `count` private pages at [`BASE`], of which the n-th begins with n + 1.
fn machine(frames: u64, count: u64) -> Machine {
    let machine = Machine::new(frames);
    machine.map_at(BASE, count, RW, MapFlags::PRIVATE);
    (0..count).for_each(|n| machine.poke(page(BASE, n), n + 1));
    machine
}

fn words(machine: &Machine, count: u64) -> Vec<u64> {
    (0..count).map(|n| machine.peek(page(BASE, n))).collect()
}

/// Takes all frames but `left`.
fn hoard(machine: &Machine, left: usize) -> Vec<Pfn> {
    let mut frames = Vec::new();
    machine.pool.alloc_up_to(machine.pool.free_frames() - left, Fill::Overwritten, &mut frames);
    frames
}

fn copied(machine: &Machine) -> u64 {
    machine.mm.stats().copied_pages.load(Ordering::SeqCst)
}

#[test]
fn a_child_has_the_mappings_the_break_and_the_frames_of_its_parent() {
    let machine = machine(128, 4);
    machine.map_at(page(BASE, 4), 2, READ, MapFlags::PRIVATE);
    machine.mm.set_brk_start(page(BASE, 64));
    machine.mm.brk(Hva(page(BASE, 66).0 + 5));
    let free = machine.pool.free_frames();
    let child = machine.mm.fork().unwrap();
    let shapes = |mm: &shadow_mmu::mm::Mm| {
        mm.vmas().into_iter().map(|vma| (vma.range, vma.prot, vma.flags)).collect::<Vec<_>>()
    };
    assert_eq!(shapes(&child), shapes(&machine.mm));
    assert_eq!(child.brk(Hva(0)), Hva(page(BASE, 66).0 + 5));
    assert_eq!(free - machine.pool.free_frames(), child.table_count() + 1, "tables and a zero frame");
    for n in 0..4 {
        let (ours, theirs) = (machine.pte(page(BASE, n)), child.lookup(page(BASE, n)).unwrap().0);
        assert_eq!(ours.pfn(), theirs.pfn());
        assert!(!ours.is_writable() && !theirs.is_writable() && ours.is_dirty() && theirs.is_dirty());
        // What the child has not accessed is not young there; what the parent has, stays so here.
        assert!(ours.is_young() && !theirs.is_young());
        let frame = machine.pool.frame(ours.pfn());
        assert_eq!((frame.ref_count(), frame.map_count()), (2, 2));
    }
    drop(child);
    assert_eq!(machine.pool.free_frames(), free);
    machine.finish();
}

/// Who writes first gets a copy, whichever side it is; who is left gets its frame back without one.
#[test]
fn i15_copy_on_write_works_both_ways_and_the_last_owner_copies_nothing() {
    for parent_writes_first in [true, false] {
        let parent = machine(128, 2);
        let mut vcpus = [parent.vcpu(0, Off), parent.vcpu(1, Off)];
        vcpus.iter_mut().for_each(|vcpu| assert_eq!(vcpu.read(BASE), Ok(1)));
        let child = parent.fork().unwrap();
        let mut child_vcpu = child.vcpu(0, Off);
        assert_eq!(child_vcpu.read(BASE), Ok(1));
        let [mut parent_vcpu, mut bystander] = vcpus;
        let (first, second) = if parent_writes_first {
            ((&parent, &mut parent_vcpu), (&child, &mut child_vcpu))
        } else {
            ((&child, &mut child_vcpu), (&parent, &mut parent_vcpu))
        };
        let pfn = first.0.pte(BASE).pfn();
        let copies = [&parent, &child].map(copied);
        first.1.write(BASE, 10).unwrap();
        assert_eq!((second.1.read(BASE), first.1.read(BASE)), (Ok(1), Ok(10)));
        second.1.write(BASE, 20).unwrap();
        assert_eq!((second.1.read(BASE), first.1.read(BASE)), (Ok(20), Ok(10)));
        assert_ne!(first.0.pte(BASE).pfn(), pfn, "a copy");
        assert_eq!(second.0.pte(BASE).pfn(), pfn, "nobody shares it any more");
        assert_eq!((copied(&parent) - copies[0]) + (copied(&child) - copies[1]), 1, "one copy for both");
        assert_eq!(bystander.read(BASE), Ok(if parent_writes_first { 10 } else { 20 }), "I26");
        [&parent, &child].iter().for_each(|machine| machine.check());
        // The neighbour is still one frame for both.
        assert_eq!(parent.pte(page(BASE, 1)).pfn(), child.pte(page(BASE, 1)).pfn());
        child.exit();
        parent.finish();
    }
}

/// G has a writable translation cached. H: forks. G: writes. Without a pair over the parent's ptes it would write into the
/// frame that the child has too.
#[test]
fn r21_i15_what_the_parent_writes_through_an_old_translation_is_not_the_childs() {
    let parent = machine(128, 2);
    let mut vcpu = parent.vcpu(0, Off);
    (0..2).for_each(|n| vcpu.write(page(BASE, n), n + 1).unwrap());
    let child = parent.fork().unwrap();
    parent.check();
    (0..2).for_each(|n| vcpu.write(page(BASE, n), 0xbad).unwrap());
    assert_eq!(words(&child, 2), [1, 2]);
    assert_eq!(words(&parent, 2), [0xbad; 2]);
    parent.check();
    child.exit();
    parent.finish();
}

#[test]
fn listeners_are_not_inherited() {
    let parent = machine(128, 2);
    let mut vcpu = parent.vcpu(0, Off);
    vcpu.write(BASE, 1).unwrap();
    let child = parent.mm.fork().unwrap();
    assert_eq!(vcpu.read(BASE), Ok(1));
    let (starts, spte) = (parent.after.starts.load(Ordering::SeqCst), parent.spte(BASE));
    child.mprotect(BASE, pages(2), READ).unwrap();
    child.munmap(BASE, pages(2)).unwrap();
    assert!(!child.notifiers().test_young(BASE), "the parent's guest has read it, the child's nobody");
    child.release();
    assert_eq!((parent.after.starts.load(Ordering::SeqCst), parent.spte(BASE)), (starts, spte));
    assert_eq!(parent.after.released.load(Ordering::SeqCst), 0);
    assert_eq!(child.fork().unwrap().vmas().len(), 0, "a released space has nothing to inherit");
    drop(child);
    // Nor is one from the child known to the parent.
    let other = machine(128, 1);
    let subscription = other.mm.register(Arc::<common::Hook>::default()).unwrap();
    assert_eq!(parent.mm.unregister(&subscription), Err(Misuse::NotRegistered));
    other.mm.unregister(&subscription).unwrap();
    [parent, other].into_iter().for_each(Machine::finish);
}

#[test]
fn what_dontfork_says_is_not_the_childs_until_dofork() {
    let parent = machine(128, 6);
    let mm = &parent.mm;
    mm.madvise(page(BASE, 1), pages(3), Advice::DontFork).unwrap();
    mm.madvise(page(BASE, 2), pages(1), Advice::DoFork).unwrap();
    assert_eq!(mm.vmas().len(), 5);
    let child = parent.fork().unwrap();
    let mapped: Vec<u64> = (0..6).filter(|&n| child.mm.vma(page(BASE, n)).is_some()).collect();
    assert_eq!(mapped, [0, 2, 4, 5]);
    assert_eq!(child.vcpu(0, Off).read(page(BASE, 1)), Err(FaultError::NoMapping));
    assert!([1, 3].iter().all(|&n| parent.pte(page(BASE, n)).is_writable()), "nothing to share");
    child.exit();
    mm.madvise(BASE, pages(6), Advice::DoFork).unwrap();
    assert_eq!(mm.vmas().len(), 1);
    let child = parent.fork().unwrap();
    assert_eq!(words(&child, 6), [1, 2, 3, 4, 5, 6]);
    child.exit();
    parent.finish();
}

#[test]
fn pages_of_zeros_are_found_again_by_the_child_also_when_the_parent_is_gone() {
    let parent = Machine::new(128);
    parent.map_at(BASE, 4, RW, MapFlags::PRIVATE);
    assert_eq!(words(&parent, 2), [0, 0]);
    parent.poke(page(BASE, 2), 3);
    let child = parent.fork().unwrap();
    assert!(!child.pte(BASE).is_present());
    child.vcpu(0, Fixed(4)).write(page(BASE, 1), 7).unwrap();
    assert_eq!(parent.peek(page(BASE, 1)), 0);
    parent.vcpu(0, Fixed(4)).write(BASE, 8).unwrap();
    assert_eq!(words(&child, 4), [0, 7, 3, 0]);
    assert_eq!(words(&parent, 4), [8, 0, 3, 0]);
    parent.check();
    parent.exit();
    assert_eq!(words(&child, 4), [0, 7, 3, 0]);
    child.finish();
}

#[test]
fn a_file_is_found_again_and_what_was_written_over_it_is_shared() {
    let parent = Machine::new(128);
    let file = Object::file(&parent.pool, TestFile::new(pages(3)));
    let backing = Backing::Object { object: file, offset: 0 };
    parent.mm.mmap(BASE, pages(3), RW, MapFlags::PRIVATE | MapFlags::FIXED, backing).unwrap();
    assert_eq!(parent.peek(page(BASE, 1)), TestFile::tag(1));
    parent.poke(BASE, 5);
    let child = parent.fork().unwrap();
    assert_eq!(child.pte(BASE).pfn(), parent.pte(BASE).pfn());
    assert!(!child.pte(page(BASE, 1)).is_present());
    assert_eq!(words(&child, 3), [5, TestFile::tag(1), TestFile::tag(2)]);
    child.poke(page(BASE, 1), 6);
    assert_eq!(words(&parent, 3), [5, TestFile::tag(1), TestFile::tag(2)]);
    child.exit();
    parent.finish();
}

/// Shared memory is one for the whole family, and so is a hole in it: a pte that the puncher cannot see must not keep the
/// page.
#[test]
fn i24_shared_memory_and_the_holes_in_it_are_one_for_the_family() {
    let parent = Machine::new(256);
    parent.map_at(BASE, 4, RW, MapFlags::SHARED);
    (0..4).for_each(|n| parent.poke(page(BASE, n), n + 1));
    let child = parent.fork().unwrap();
    assert!(parent.pte(BASE).is_writable(), "shared memory is not write-protected");
    let grandchild = child.fork().unwrap();
    let spaces = [&parent, &child, &grandchild];
    // Somewhere else in one of them, so that addresses tell nothing.
    let flags = RemapFlags::MAYMOVE | RemapFlags::FIXED;
    child.mm.mremap(BASE, pages(4), pages(4), flags, FAR).unwrap();
    let at = |n: usize| if n == 1 { FAR } else { BASE };
    for (puncher, machine) in spaces.iter().enumerate() {
        let value = 10 + puncher as u64;
        machine.vcpu(0, Off).write(at(puncher), value).unwrap();
        let mut vcpus = spaces.map(|machine| machine.vcpu(1, Off));
        (0..3).for_each(|n| assert_eq!(vcpus[n].read(at(n)), Ok(value)));
        machine.mm.madvise(at(puncher), PAGE_SIZE, Advice::Remove).unwrap();
        (0..3).for_each(|n| assert_eq!(vcpus[n].read(at(n)), Ok(0), "{puncher} punched, {n} reads"));
        (0..3).for_each(|n| assert_eq!(vcpus[n].read(page(at(n), 3)), Ok(4), "no hole there"));
    }
    spaces.iter().for_each(|machine| machine.check());
    parent.exit();
    grandchild.exit();
    child.finish();
}

#[test]
fn frames_come_back_in_whatever_order_a_family_dies() {
    for order in [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2], [2, 0, 3, 1]] {
        let first = machine(512, 8);
        let pool = Arc::clone(&first.pool);
        let mut family = vec![Some(first)];
        for generation in 1..4 {
            let parent = family[generation - 1].as_ref().unwrap();
            let child = parent.fork().unwrap();
            // Each leaves its mark on two pages, before and after it has a child of its own.
            child.poke(page(BASE, generation as u64), 100 * generation as u64);
            family.push(Some(child));
            family[generation - 1].as_ref().unwrap().poke(page(BASE, 7), 1000 + generation as u64 - 1);
        }
        let expected = |generation: u64| {
            let mut words: Vec<u64> = (1..9).collect();
            (1..=generation).for_each(|older| words[older as usize] = 100 * older);
            words[7] = if generation < 3 { 1000 + generation } else { 8 };
            words
        };
        for gone in order {
            for (generation, machine) in family.iter().enumerate() {
                if let Some(machine) = machine {
                    assert_eq!(words(machine, 8), expected(generation as u64), "before {gone} of {order:?}");
                    machine.check();
                }
            }
            family[gone].take().unwrap().exit();
        }
        assert_eq!(pool.check_poison(), 0);
        assert_eq!(pool.free_frames(), pool.frame_count(), "{order:?}");
    }
}

/// A fork needs a root, a zero frame and page tables, some of them late. With each number of frames too few, it fails, and
/// the parent has lost nothing: not a frame, not a word, not even its right to write without a frame to spare.
#[test]
fn i23_a_fork_without_memory_changes_nothing() {
    // Root and zero frame, then a path of three tables for each place.
    const NEEDED: usize = 2 + 3 + 3;
    for left in 0..NEEDED + 1 {
        let parent = machine(128, 2);
        parent.map_at(FAR, 1, RW, MapFlags::PRIVATE);
        parent.poke(FAR, 7);
        let mut vcpu = parent.vcpu(0, Off);
        (0..2).for_each(|n| vcpu.write(page(BASE, n), n + 1).unwrap());
        let hoard = hoard(&parent, left);
        let refused = parent.mm.fork().map(drop).err();
        assert_eq!(refused, (left < NEEDED).then_some(MmError::NoMemory), "{left} frames");
        if refused.is_some() {
            assert_eq!(parent.pool.free_frames(), left, "{left} frames");
            for at in [BASE, page(BASE, 1), FAR] {
                let frame = parent.pool.frame(parent.pte(at).pfn());
                assert_eq!((frame.ref_count(), frame.map_count()), (1, 1));
            }
            let copies = copied(&parent);
            assert_eq!((vcpu.write(BASE, 10), vcpu.read(page(BASE, 1))), (Ok(()), Ok(2)));
            assert_eq!((copied(&parent), parent.pool.free_frames()), (copies, left));
        }
        parent.check();
        parent.pool.put_all(&hoard);
        let child = parent.fork().unwrap();
        assert_eq!((child.peek(FAR), child.peek(page(BASE, 1))), (7, 2));
        child.exit();
        parent.finish();
    }
}

/// A pin lets its holder write without asking the pte: such a page is copied at once, and stays the parent's.
#[test]
fn a_pinned_page_stays_the_parents_and_the_child_gets_a_copy() {
    for left in 0..2 {
        let parent = machine(128, 2);
        let pinned = parent.mm.fault(&FaultRequest::one_page(BASE, RW)).unwrap();
        let pfn = pinned.required().pfn;
        // A root, a zero frame and three tables, and then the copy.
        let hoard = hoard(&parent, 5 + left);
        let child = parent.mm.fork();
        parent.pool.put_all(&hoard);
        let Ok(child) = child else {
            assert_eq!(left, 0);
            drop(pinned);
            parent.finish();
            continue;
        };
        assert_eq!(left, 1);
        assert_eq!(parent.pte(BASE).pfn(), pfn);
        assert!(parent.pte(BASE).is_writable() && !parent.pte(page(BASE, 1)).is_writable());
        parent.pool.words(pfn)[0].store(0xd1, Ordering::SeqCst);
        let pte = child.lookup(BASE).unwrap().0;
        assert_eq!(parent.pool.words(pte.pfn())[0].load(Ordering::SeqCst), 1);
        // Nobody shares the copy, so a write takes it as it is.
        drop(child.fault(&FaultRequest::one_page(BASE, RW)).unwrap());
        assert_eq!(child.lookup(BASE).unwrap().0.pfn(), pte.pfn());
        drop(pinned);
        assert_eq!(parent.peek(BASE), 0xd1);
        drop(child);
        parent.check();
        parent.finish();
    }
}

#[test]
fn a_fork_costs_tables_for_what_is_there_not_for_what_is_mapped() {
    const TERABYTE: u64 = 1 << 28;
    let parent = Machine::new(256);
    parent.map_at(BASE, TERABYTE, RW, MapFlags::PRIVATE | MapFlags::NORESERVE);
    for n in 0..8 {
        parent.poke(page(BASE, n * (TERABYTE / 8)), n);
        // Tables with nothing to inherit.
        assert_eq!(parent.peek(page(BASE, n * (TERABYTE / 8) + 5000)), 0);
    }
    let child = parent.mm.fork().unwrap();
    assert_eq!(child.table_count(), parent.mm.table_count() - 8);
    drop(child);
    parent.finish();
}

/// Rights are the mapping's in the child as in the parent; a page without any right is inherited all the same.
#[test]
fn i14_rights_are_inherited_with_the_pages() {
    let parent = machine(128, 3);
    parent.mm.mprotect(BASE, pages(1), READ).unwrap();
    parent.mm.mprotect(page(BASE, 1), pages(1), NONE).unwrap();
    let child = parent.fork().unwrap();
    let mut vcpu = child.vcpu(0, Off);
    assert_eq!((vcpu.read(BASE), vcpu.write(BASE, 9)), (Ok(1), Err(FaultError::NoAccess)));
    assert_eq!(vcpu.read(page(BASE, 1)), Err(FaultError::NoAccess));
    child.mm.mprotect(BASE, pages(2), RW).unwrap();
    assert_eq!((vcpu.write(BASE, 9), vcpu.read(page(BASE, 1))), (Ok(()), Ok(2)));
    assert_eq!((parent.peek(BASE), parent.vcpu(0, Off).read(BASE)), (1, Ok(1)));
    child.check();
    child.exit();
    parent.finish();
}
