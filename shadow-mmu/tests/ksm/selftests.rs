// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The kernel's selftests of page sharing, by name: `ksm_tests` (-M, -U, -Z; the others measure) and `ksm_functional_tests`.
//!
//! What has no counterpart: `ksm_tests -N` and `-H` (one node, one page size), and the exec half of `test_prctl_fork_exec`
//! (a new program is a new [`Mm`](shadow_mmu::mm::Mm), and who makes it sets what it is to have). `test_prot_none` writes the
//! pages by ptrace, which has no counterpart either: they are written before the rights go.

use super::*;
use crate::common::NONE;
use shadow_mmu::shadow::DirtyMethod::WriteProtect;
use shadow_mmu::shadow::ProtectOn;

/// Pages of 2 MiB, which the functional tests use.
const PAGES: u64 = 512;
/// `max_page_sharing` as it is unless somebody says otherwise.
const LIMIT: u64 = 256;

/// `assert_ksm_pages_count`: what `n` equal pages come to, if `limit` may share one.
fn expected(n: u64, limit: u64) -> (u64, u64) {
    if n % limit < 2 { (n / limit, n / limit * (limit - 1)) } else { (n / limit + 1, n - n / limit - 1) }
}

#[track_caller]
fn assert_ksm_pages_count(ksm: &Ksm, n: u64, limit: u64) {
    let stats = ksm.stats();
    let (frames, sharing) = expected(n, limit);
    assert_eq!((stats.pages_shared, stats.pages_sharing), (frames, sharing), "{n} pages, limit {limit}");
    // The contents of which there are several frames, and those frames: a page that is left over has none of its own (I54).
    let (chains, dups) = if frames > 1 { (1, frames) } else { (0, 0) };
    assert_eq!(
        (stats.stable_node_chains, stats.stable_node_dups),
        (chains, dups),
        "{n} pages, limit {limit}"
    );
    assert_eq!(stats.pages_unshared, n - frames - sharing, "{n} pages, limit {limit}");
}

#[test]
fn i54_ksm_tests_m_merges_every_number_of_pages_under_every_limit() {
    for limit in 2..=8 {
        for n in 1..=40 {
            let machine = filled(AdBits::AfterFlush, n, |_| SAME);
            let max_page_sharing = limit as u32;
            let ksm = sharing(KsmSettings { max_page_sharing, ..settings() }, [&machine]);
            assert_eq!(
                (pass(&ksm), shared(&ksm)),
                (0, (0, 0)),
                "a page is merged when it was quiet for a pass"
            );
            pass(&ksm);
            assert_ksm_pages_count(&ksm, n, limit);
            // It stays so, whatever is tried again for a page that is left over.
            assert_eq!(pass(&ksm), 0);
            assert_ksm_pages_count(&ksm, n, limit);
            check(&ksm, &machine);
            check_counters(&ksm);
            assert_eq!(words(&machine, BASE, n), vec![SAME; n as usize]);
        }
    }
}

/// More of one content than the index takes: all are merged when they were quiet for a pass, as long as the frames that they come to
/// are no more than it takes.
#[test]
fn i54_ksm_tests_m_merges_as_many_pages_as_there_are() {
    for (n, limit) in [(32, 256), (33, 256), (3000, 256), (3000, 10_000), (2500, 100), (600, 20), (62, 2)] {
        let machine = filled(AdBits::AfterFlush, n, |_| SAME);
        let max_page_sharing = limit as u32;
        let ksm = sharing(KsmSettings { max_page_sharing, ..settings() }, [&machine]);
        merge(&ksm);
        assert_ksm_pages_count(&ksm, n, limit);
        check(&ksm, &machine);
        check_counters(&ksm);
        machine.finish();
    }
}

/// The same when the pages come one by one, each in a pass of its own, in three address spaces in turn.
#[test]
fn i54_ksm_tests_m_holds_for_pages_that_come_one_by_one() {
    for limit in 2..=5 {
        let first = Machine::new(1024);
        let machines = [first.beside(AdBits::None), first.beside(AdBits::Unflushed), first];
        let max_page_sharing = limit as u32;
        let ksm = sharing(KsmSettings { max_page_sharing, ..settings() }, &machines);
        for n in 0..30 {
            let machine = &machines[n as usize % 3];
            fill(machine, page(BASE, n), 1, |_| SAME);
            merge(&ksm);
            assert_ksm_pages_count(&ksm, n + 1, limit);
        }
        machines.iter().for_each(|machine| check(&ksm, machine));
        check_counters(&ksm);
    }
}

#[test]
fn ksm_tests_u_takes_a_merge_back_by_a_write() {
    for ad in KINDS {
        let machine = filled(ad, 2, |_| SAME);
        let ksm = sharing(settings(), [&machine]);
        merge(&ksm);
        assert_eq!(shared(&ksm), (1, 1));
        let mut vcpu = machine.vcpu(0, Off);
        vcpu.write(BASE, 1).unwrap();
        vcpu.write(page(BASE, 1), 2).unwrap();
        assert_eq!(shared(&ksm), (0, 0), "at once, and not when somebody scans");
        merge(&ksm);
        assert_eq!((shared(&ksm), words(&machine, BASE, 2)), ((0, 0), vec![1, 2]));
        check(&ksm, &machine);
        machine.finish();
    }
}

#[test]
fn ksm_tests_z_has_zero_pages_shared_or_kept() {
    for n in [1, 2, 7, 10] {
        for (zero_pages, merged, zero) in
            [(ZeroPages::Share, (0, 0), n), (ZeroPages::Keep, if n > 1 { (1, n - 1) } else { (0, 0) }, 0)]
        {
            let machine = filled(AdBits::AfterFlush, n, |_| 0);
            let free = machine.pool.free_frames() as u64;
            let ksm = sharing(KsmSettings { zero_pages, ..settings() }, [&machine]);
            merge(&ksm);
            assert_eq!((shared(&ksm), ksm.stats().ksm_zero_pages), (merged, zero), "{n} pages");
            assert_eq!(machine.pool.free_frames() as u64, free + merged.1 + zero);
            assert_eq!(words(&machine, BASE, n), vec![0; n as usize]);
            check(&ksm, &machine);
            check_counters(&ksm);
            machine.finish();
        }
    }
}

/// 2 MiB of equal pages, merged (`mmap_and_merge_range`).
fn merged_range(word: u64) -> (Machine, Arc<Ksm>) {
    let machine = filled(AdBits::AfterFlush, PAGES, |_| word);
    let ksm = sharing(settings(), [&machine]);
    merge(&ksm);
    assert!(has_duplicates(&machine, BASE, PAGES));
    (machine, ksm)
}

#[track_caller]
fn unmerge_all(machine: &Machine, ksm: &Ksm, word: u64) {
    machine.mm.madvise(BASE, pages(PAGES), Advice::Unmergeable).unwrap();
    assert!(!has_duplicates(machine, BASE, PAGES) && !has_merged(machine, BASE, PAGES));
    // And it stays so (I55).
    merge(ksm);
    assert!(!has_duplicates(machine, BASE, PAGES) && !has_merged(machine, BASE, PAGES));
    assert_eq!(words(machine, BASE, PAGES), vec![word; PAGES as usize]);
    check(ksm, machine);
}

#[test]
fn i55_test_unmerge() {
    let (machine, ksm) = merged_range(SAME);
    unmerge_all(&machine, &ksm, SAME);
    assert_eq!(shared(&ksm), (0, 0));
    machine.finish();
}

#[test]
fn i55_test_unmerge_zero_pages() {
    let (machine, ksm) = merged_range(0);
    assert_eq!(ksm.stats().ksm_zero_pages, PAGES);
    machine.mm.madvise(BASE, pages(PAGES / 2), Advice::Unmergeable).unwrap();
    assert_eq!(ksm.stats().ksm_zero_pages, PAGES / 2);
    assert!(!has_duplicates(&machine, BASE, PAGES / 2));
    let mut vcpu = machine.vcpu(0, Fixed(16));
    for n in PAGES / 2..PAGES {
        vcpu.write(page(BASE, n), n).unwrap();
        assert_eq!(ksm.stats().ksm_zero_pages, PAGES - 1 - n, "one by one, whatever a fault brings along");
    }
    assert!(!has_duplicates(&machine, BASE, PAGES));
    check(&ksm, &machine);
    machine.finish();
}

#[test]
fn i55_test_unmerge_discarded() {
    for advice in [Advice::DontNeed, Advice::Free] {
        let (machine, ksm) = merged_range(SAME);
        machine.mm.madvise(BASE, pages(PAGES / 2), advice).unwrap();
        assert_eq!(shared(&ksm), (1, LIMIT - 1));
        machine.mm.madvise(BASE, pages(PAGES), Advice::Unmergeable).unwrap();
        assert!(!has_duplicates(&machine, page(BASE, PAGES / 2), PAGES / 2));
        assert_eq!(words(&machine, BASE, 1), [0]);
        check(&ksm, &machine);
        machine.finish();
    }
}

/// In the place of userfaultfd: pages that a dirty log has write-protected, and whose writes it wants to hear of.
#[test]
fn i55_test_unmerge_uffd_wp() {
    for ad in KINDS {
        let machine = filled(ad, PAGES, |_| SAME);
        let ksm = sharing(settings(), [&machine]);
        machine.shadow.enable_dirty_log(Gfn(0), bitmap_log(WriteProtect, ProtectOn::Get)).unwrap();
        let mut vcpu = machine.vcpu(0, Off);
        (0..PAGES).for_each(|n| vcpu.write(page(BASE, n), SAME).unwrap());
        let dirty = || machine.shadow.get_dirty_log(Gfn(0)).unwrap().count();
        assert_eq!(dirty(), PAGES);
        merge(&ksm);
        assert_ksm_pages_count(&ksm, PAGES, LIMIT);
        unmerge_all(&machine, &ksm, SAME);
        assert_eq!(dirty(), 0, "what is read is what it was");
        vcpu.write(BASE, 1).unwrap();
        assert_eq!(dirty(), 1);
        machine.finish();
    }
}

#[test]
fn i55_test_prot_none() {
    let machine = filled(AdBits::AfterFlush, PAGES, |_| SAME);
    machine.mm.mprotect(BASE, pages(PAGES), NONE).unwrap();
    let ksm = sharing(settings(), [&machine]);
    merge(&ksm);
    assert_ksm_pages_count(&ksm, PAGES, LIMIT);
    machine.mm.madvise(BASE, pages(PAGES), Advice::Unmergeable).unwrap();
    assert!(!has_duplicates(&machine, BASE, PAGES));
    assert!(machine.vcpu(0, Off).read(BASE).is_err());
    machine.mm.mprotect(BASE, pages(PAGES), RW).unwrap();
    assert_eq!(words(&machine, BASE, PAGES), vec![SAME; PAGES as usize]);
    check(&ksm, &machine);
    machine.finish();
}

/// As [`filled`], without the advice.
fn unadvised(count: u64) -> Machine {
    let machine = Machine::new(4096);
    machine.map_at(BASE, count, RW, MapFlags::PRIVATE);
    (0..count).for_each(|n| machine.poke(page(BASE, n), SAME));
    machine
}

#[test]
fn test_prctl() {
    let machine = unadvised(4);
    let ksm = sharing(settings(), [&machine]);
    let mm = &machine.mm;
    assert_eq!(mm.merge_any(), MergeAny::Off);
    assert_eq!(merge(&ksm), 0);
    mm.set_merge_any(MergeAny::On).unwrap();
    assert_eq!((mm.merge_any(), ksm.report().members[0].stats.ksm_merge_any), (MergeAny::On, true));
    mm.set_merge_any(MergeAny::Off).unwrap();
    assert_eq!((mm.merge_any(), ksm.report().members[0].stats.ksm_mergeable), (MergeAny::Off, false));
    assert_eq!(merge(&ksm), 0);
    machine.finish();
}

#[test]
fn test_prctl_fork() {
    let machine = unadvised(4);
    let ksm = sharing(settings(), [&machine]);
    machine.mm.set_merge_any(MergeAny::On).unwrap();
    let child = machine.fork().unwrap();
    assert_eq!(child.mm.merge_any(), MergeAny::On);
    // The child's own new memory is merged too, and with its parent's.
    child.map_at(page(BASE, 100), 2, RW, MapFlags::PRIVATE);
    (100..102).for_each(|n| child.poke(page(BASE, n), SAME));
    merge(&ksm);
    assert_eq!(shared(&ksm), (1, 4 + 4 + 2 - 1));
    // Each may leave for itself.
    child.mm.set_merge_any(MergeAny::Off).unwrap();
    assert!(!has_merged(&child, BASE, 4) && has_merged(&machine, BASE, 4));
    assert_eq!((machine.mm.merge_any(), shared(&ksm)), (MergeAny::On, (1, 3)));
    check(&ksm, &child);
    drop(child.exit());
    check(&ksm, &machine);
    machine.finish();
}

#[test]
fn i55_test_prctl_unmerge() {
    let machine = unadvised(PAGES);
    let ksm = sharing(settings(), [&machine]);
    machine.mm.set_merge_any(MergeAny::On).unwrap();
    merge(&ksm);
    assert_ksm_pages_count(&ksm, PAGES, LIMIT);
    machine.mm.set_merge_any(MergeAny::Off).unwrap();
    assert!(!has_duplicates(&machine, BASE, PAGES));
    merge(&ksm);
    assert!(!has_duplicates(&machine, BASE, PAGES));
    check(&ksm, &machine);
    machine.finish();
}

/// As in the kernel, where the flag of every mapping is set: what is advised against is not merged, also while everything may
/// be.
#[test]
fn i55_unmergeable_holds_where_everything_is_merged() {
    let machine = unadvised(8);
    let ksm = sharing(settings(), [&machine]);
    machine.mm.set_merge_any(MergeAny::On).unwrap();
    merge(&ksm);
    machine.mm.madvise(BASE, pages(4), Advice::Unmergeable).unwrap();
    merge(&ksm);
    assert!(!has_merged(&machine, BASE, 4) && has_merged(&machine, page(BASE, 4), 4));
    // New mappings may be merged, and so may a heap.
    fn new(machine: &Machine) {
        machine.map_at(page(BASE, 50), 1, RW, MapFlags::PRIVATE);
        machine.poke(page(BASE, 50), SAME);
    }
    new(&machine);
    machine.mm.set_brk_start(page(BASE, 100));
    machine.mm.brk(page(BASE, 101));
    machine.poke(page(BASE, 100), SAME);
    merge(&ksm);
    assert!(has_merged(&machine, page(BASE, 50), 1) && has_merged(&machine, page(BASE, 100), 1));
    check(&ksm, &machine);
    machine.finish();
}
