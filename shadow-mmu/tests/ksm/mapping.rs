// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What happens to merged pages when mappings change: bytes stay, counters follow, nobody else notices.

use super::*;
use crate::common::NONE;
use shadow_mmu::addr::Gfn;
use shadow_mmu::mm::{Backing, Object};
use shadow_mmu::shadow::{DirtyMethod, ProtectOn};

/// 16 pages, merged: of zeros and of one other content in turn; two others like them at the end.
fn merged() -> (Machine, Arc<Ksm>) {
    let machine = filled(AdBits::AfterFlush, 16, |n| [0, SAME][n as usize % 2]);
    fill(&machine, page(BASE, 1000), 2, |n| [0, SAME][n as usize % 2]);
    let ksm = sharing(settings(), [&machine]);
    merge(&ksm);
    assert_eq!((shared(&ksm), ksm.stats().ksm_zero_pages), ((1, 8), 9));
    (machine, ksm)
}

/// Counters as the ptes are, and the two apart untouched.
#[track_caller]
fn check_left(machine: &Machine, ksm: &Ksm, sharing: (u64, u64), zero: u64) {
    assert_eq!((shared(ksm), ksm.stats().ksm_zero_pages), (sharing, zero));
    assert_eq!(words(machine, page(BASE, 1000), 2), [0, SAME]);
    check(ksm, machine);
}

#[test]
fn unmapping_half_leaves_half() {
    let (machine, ksm) = merged();
    machine.mm.munmap(BASE, pages(8)).unwrap();
    check_left(&machine, &ksm, (1, 4), 5);
    machine.mm.munmap(page(BASE, 8), pages(8)).unwrap();
    check_left(&machine, &ksm, (1, 0), 1);
    merge(&ksm);
    check_left(&machine, &ksm, (1, 0), 1);
    check_counters(&ksm);
    machine.finish();
}

#[test]
fn what_is_dropped_reads_zeros_and_is_merged_again_when_it_is_written() {
    for advice in [Advice::DontNeed, Advice::Free] {
        let (machine, ksm) = merged();
        let mut vcpu = machine.vcpu(0, Off);
        assert_eq!(vcpu.read(page(BASE, 3)), Ok(SAME));
        machine.mm.madvise(page(BASE, 2), pages(4), advice).unwrap();
        check_left(&machine, &ksm, (1, 6), 7);
        assert_eq!(vcpu.read(page(BASE, 3)), Ok(0));
        vcpu.write(page(BASE, 3), SAME).unwrap();
        // A page of zeros that was never written is no page of its own.
        merge(&ksm);
        check_left(&machine, &ksm, (1, 7), 7);
        machine.finish();
    }
}

/// Rights that come do not let a merged page be written; rights that go and come back let it be copied.
#[test]
fn mprotect_never_makes_a_merged_page_writable() {
    for ad in KINDS {
        let machine = filled(ad, 4, |_| SAME);
        let ksm = sharing(settings(), [&machine]);
        machine.mm.mprotect(BASE, pages(4), READ).unwrap();
        merge(&ksm);
        assert_eq!(shared(&ksm), (1, 3));
        let mut vcpu = machine.vcpu(0, Fixed(4));
        for rights in [RW, NONE, READ, RW] {
            machine.mm.mprotect(BASE, pages(4), rights).unwrap();
            assert_eq!(vcpu.read(BASE).is_ok(), rights != NONE);
            assert!((0..4).all(|n| !machine.pte(page(BASE, n)).is_writable()));
            assert!((0..4).all(|n| !machine.spte(page(BASE, n)).is_writable()));
            check(&ksm, &machine);
        }
        vcpu.write(page(BASE, 2), 5).unwrap();
        assert_eq!((words(&machine, BASE, 4), shared(&ksm)), (vec![SAME, SAME, 5, SAME], (1, 2)));
        check(&ksm, &machine);
        machine.finish();
    }
}

#[test]
fn mremap_takes_merges_along() {
    let (machine, ksm) = merged();
    let (to, before) = (page(BASE, 5000), frames(&machine, BASE, 16));
    let flags = RemapFlags::MAYMOVE | RemapFlags::FIXED;
    machine.mm.mremap(BASE, pages(16), pages(16), flags, to).unwrap();
    assert_eq!(frames(&machine, to, 16), before);
    check_left(&machine, &ksm, (1, 8), 9);
    let mut vcpu = machine.vcpu(0, Fixed(16));
    (0..16).for_each(|n| assert_eq!(vcpu.read(page(to, n)), Ok([0, SAME][n as usize % 2])));
    // Shrunk, and over others.
    machine.mm.mremap(to, pages(16), pages(10), RemapFlags::empty(), Hva(0)).unwrap();
    check_left(&machine, &ksm, (1, 5), 6);
    fill(&machine, BASE, 16, |_| SAME);
    machine.mm.mremap(to, pages(10), pages(10), flags, BASE).unwrap();
    merge(&ksm);
    // The six at the end were not covered.
    check_left(&machine, &ksm, (1, 5 + 6), 6);
    machine.finish();
}

/// A page that waits for one like it is found where it went, a pass later at most.
#[test]
fn a_candidate_that_was_moved_is_found_where_it_is() {
    let machine = filled(AdBits::AfterFlush, 1, |_| SAME);
    let ksm = sharing(settings(), [&machine]);
    merge(&ksm);
    let flags = RemapFlags::MAYMOVE | RemapFlags::FIXED;
    machine.mm.mremap(BASE, pages(1), pages(1), flags, page(BASE, 600)).unwrap();
    fill(&machine, page(BASE, 1200), 1, |_| SAME);
    merge(&ksm);
    pass(&ksm);
    assert_eq!(shared(&ksm), (1, 1));
    check(&ksm, &machine);
    machine.finish();
}

#[test]
fn a_heap_that_shrinks_takes_its_merges_with_it() {
    let machine = Machine::new(256);
    machine.mm.set_brk_start(BASE);
    machine.mm.brk(page(BASE, 8));
    (0..8).for_each(|n| machine.poke(page(BASE, n), SAME));
    machine.mm.madvise(BASE, pages(8), Advice::Mergeable).unwrap();
    let ksm = sharing(settings(), [&machine]);
    merge(&ksm);
    assert_eq!(shared(&ksm), (1, 7));
    machine.mm.brk(page(BASE, 3));
    assert_eq!(shared(&ksm), (1, 2));
    machine.mm.brk(page(BASE, 6));
    assert_eq!(words(&machine, BASE, 6), [SAME, SAME, SAME, 0, 0, 0]);
    check(&ksm, &machine);
    machine.mm.brk(BASE);
    assert_eq!(shared(&ksm), (0, 0));
    check(&ksm, &machine);
    machine.finish();
}

/// Only private pages that are there: not the file's, not shared memory's, not the zero page that nobody has written.
#[test]
fn what_is_not_private_is_not_merged() {
    let machine = Machine::new(512);
    let file = crate::common::TestFile::new(4 * PAGE_SIZE);
    let object = Object::file(&machine.pool, file);
    let places = [
        (BASE, MapFlags::PRIVATE, Some(Arc::clone(&object))),
        (page(BASE, 10), MapFlags::SHARED, Some(object)),
        (page(BASE, 20), MapFlags::SHARED, None),
        (page(BASE, 30), MapFlags::PRIVATE, None),
    ];
    for (at, flags, object) in places {
        let backing = object.map_or(Backing::Anonymous, |object| Backing::Object { object, offset: 0 });
        machine.mm.mmap(at, pages(4), RW, flags | MapFlags::FIXED, backing).unwrap();
        machine.mm.madvise(at, pages(4), Advice::Mergeable).unwrap();
        (0..4).for_each(|n| _ = machine.peek(page(at, n)));
    }
    // Copies of file pages are private.
    machine.poke(page(BASE, 1), 1);
    machine.poke(page(BASE, 1), SAME);
    (20..24).for_each(|n| machine.poke(page(BASE, n), SAME));
    let ksm = sharing(settings(), [&machine]);
    merge(&ksm);
    assert_eq!((shared(&ksm), ksm.stats().ksm_zero_pages, ksm.stats().pages_unshared), ((0, 0), 0, 1));
    // Two pages of one mapping that became equal, byte by byte.
    for n in [1, 2] {
        let pinned = machine.mm.fault(&FaultRequest::one_page(page(BASE, n), RW)).unwrap();
        machine.pool.write(pinned.required().pfn, 0, &[9; PAGE_SIZE as usize]);
    }
    merge(&ksm);
    assert_eq!(shared(&ksm), (1, 1));
    machine.mm.madvise(page(BASE, 1), pages(1), Advice::DontNeed).unwrap();
    assert_eq!(machine.peek(page(BASE, 1)), crate::common::TestFile::tag(1), "the file's again");
    check(&ksm, &machine);
    machine.finish();
}

#[test]
fn a_space_that_is_reaped_has_nothing_merged() {
    let first = filled(AdBits::AfterFlush, 4, |_| SAME);
    let second = first.beside(AdBits::AfterFlush);
    fill(&second, BASE, 6, |n| [SAME, 0][n as usize % 2]);
    let ksm = sharing(settings(), [&first, &second]);
    merge(&ksm);
    assert_eq!((shared(&ksm), ksm.stats().ksm_zero_pages), ((1, 6), 3));
    second.mm.reap().unwrap();
    assert_eq!((shared(&ksm), ksm.stats().ksm_zero_pages), ((1, 3), 0));
    merge(&ksm);
    check(&ksm, &second);
    check(&ksm, &first);
    assert_eq!(words(&first, BASE, 4), [SAME; 4]);
    drop(second.exit());
    first.finish();
}

/// A child has its parent's merges, is scanned for itself, and takes them with it; either side's writes are its own.
#[test]
fn a_child_has_its_share() {
    for ad in KINDS {
        let machine = filled(ad, 8, |n| [0, SAME, SAME, n][n as usize % 4]);
        let ksm = sharing(KsmSettings { max_page_sharing: 4, ..settings() }, [&machine]);
        merge(&ksm);
        assert_eq!((shared(&ksm), ksm.stats().ksm_zero_pages), ((1, 3), 2));
        let child = machine.fork().unwrap();
        // More than may be merged, for nobody was.
        assert_eq!(shared(&ksm), (1, 7));
        check(&ksm, &child);
        check(&ksm, &machine);
        let (mut ours, mut theirs) = (machine.vcpu(0, Off), child.vcpu(0, Fixed(8)));
        ours.write(page(BASE, 1), 70).unwrap();
        theirs.write(page(BASE, 2), 71).unwrap();
        assert_eq!((ours.read(page(BASE, 2)), theirs.read(page(BASE, 1))), (Ok(SAME), Ok(SAME)));
        assert_eq!(shared(&ksm), (1, 5));
        merge(&ksm);
        check(&ksm, &child);
        check(&ksm, &machine);
        check_counters(&ksm);
        drop(child.exit());
        merge(&ksm);
        assert_eq!(shared(&ksm), (1, 2));
        check(&ksm, &machine);
        machine.finish();
    }
}

/// A page that two have by a fork is one page: what one side's merge makes of it, the other's look finds.
#[test]
fn pages_that_a_fork_shares_are_merged_as_one() {
    let machine = filled(AdBits::AfterFlush, 2, |_| SAME);
    let ksm = sharing(settings(), [&machine]);
    let child = machine.fork().unwrap();
    merge(&ksm);
    assert_eq!(shared(&ksm), (1, 3));
    check(&ksm, &child);
    check(&ksm, &machine);
    check_counters(&ksm);
    drop(child.exit());
    machine.finish();
}

/// A relative that takes no part has the frame too: it keeps it, and nothing else follows.
#[test]
fn a_relative_that_takes_no_part_keeps_what_it_has() {
    let machine = filled(AdBits::AfterFlush, 2, |_| SAME);
    let stranger = machine.fork().unwrap();
    let ksm = sharing(settings(), [&machine]);
    merge(&ksm);
    assert_eq!(shared(&ksm), (1, 1));
    let mut vcpu = machine.vcpu(0, Off);
    (0..2).for_each(|n| vcpu.write(page(BASE, n), n).unwrap());
    check(&ksm, &machine);
    assert_eq!((words(&stranger, BASE, 2), shared(&ksm)), (vec![SAME; 2], (0, 0)));
    // Its write copies: others might look for the page by its content.
    stranger.vcpu(0, Off).write(BASE, 5).unwrap();
    assert_eq!(words(&stranger, BASE, 2), [5, SAME]);
    merge(&ksm);
    check(&ksm, &machine);
    drop(stranger.exit());
    check(&ksm, &machine);
    machine.finish();
}

/// A child that nobody has looked at yet may be the only one that has the page.
#[test]
fn a_child_is_known_before_it_is_looked_at() {
    let machine = filled(AdBits::AfterFlush, 2, |_| SAME);
    let ksm = sharing(settings(), [&machine]);
    merge(&ksm);
    let child = machine.fork().unwrap();
    let mut vcpu = machine.vcpu(0, Off);
    (0..2).for_each(|n| vcpu.write(page(BASE, n), n).unwrap());
    assert_eq!(ksm.audit(), []);
    assert_eq!(shared(&ksm), (1, 1));
    drop(child.exit());
    assert_eq!((shared(&ksm), ksm.audit()), ((0, 0), vec![]));
    machine.finish();
}

/// Aging goes on beside sharing: a merged page is as old as it was.
#[test]
fn a_merged_page_is_as_old_as_it_was() {
    for ad in KINDS {
        let machine = filled(ad, 8, |_| SAME);
        let ksm = sharing(settings(), [&machine]);
        let mut vcpu = machine.vcpu(0, Off);
        machine.mm.age();
        for round in 0..4 {
            vcpu.read(page(BASE, round)).unwrap();
            machine.mm.age();
            let before = machine.ages();
            if round == 2 {
                merge(&ksm);
                assert_eq!(shared(&ksm), (1, 7));
            }
            assert_eq!(machine.ages(), before, "{ad:?} {round}");
        }
        machine.finish();
    }
}

/// Zeros that were written over a file's bytes are not what a fault would find.
#[test]
fn i58_zeros_over_a_file_stay_zeros_for_a_child_and_are_logged_when_they_go() {
    let machine = Machine::new(512);
    let object = Object::file(&machine.pool, crate::common::TestFile::new(4 * PAGE_SIZE));
    let backing = Backing::Object { object, offset: 0 };
    machine.mm.mmap(BASE, pages(4), RW, MapFlags::PRIVATE | MapFlags::FIXED, backing).unwrap();
    machine.mm.madvise(BASE, pages(4), Advice::Mergeable).unwrap();
    let pinned = machine.mm.fault(&FaultRequest::one_page(page(BASE, 1), RW)).unwrap();
    machine.pool.write(pinned.required().pfn, 0, &[0; PAGE_SIZE as usize]);
    drop(pinned);
    let ksm = sharing(settings(), [&machine]);
    merge(&ksm);
    assert_eq!(ksm.stats().ksm_zero_pages, 1);
    let child = machine.fork().unwrap();
    assert_eq!(words(&child, page(BASE, 1), 1), [0]);
    assert_eq!(ksm.stats().ksm_zero_pages, 2);
    child.poke(page(BASE, 1), 5);
    assert_eq!((words(&child, page(BASE, 1), 1), words(&machine, page(BASE, 1), 1)), (vec![5], vec![0]));
    machine.shadow.enable_dirty_log(Gfn(0), bitmap_log(DirtyMethod::DirtyBit, ProtectOn::Get)).unwrap();
    machine.mm.madvise(page(BASE, 1), pages(1), Advice::DontNeed).unwrap();
    let dirty = machine.shadow.get_dirty_log(Gfn(0)).unwrap();
    assert_eq!(Vec::from_iter(dirty.iter()), [page(BASE, 1).page()], "the file's bytes are there again");
    check(&ksm, &machine);
    drop(child.exit());
    machine.finish();
}
