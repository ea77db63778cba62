// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Settings: who shares with whom, what an access tells, what is kept for those that stop sharing; and the limits.

use super::*;
use shadow_mmu::frame::{Fill, FramePool, FreedFrames};
use shadow_mmu::mm::Mm;
use xxhash_rust::xxh3::xxh3_64_with_seed;

#[test]
fn only_spaces_of_one_domain_share() {
    let first = Machine::new(2048);
    let machines = [first.beside(AdBits::AfterFlush), first.beside(AdBits::AfterFlush), first];
    let ksm = Ksm::new(Arc::clone(&machines[0].pool), settings()).unwrap();
    for (machine, domain) in machines.iter().zip([7, 8, 7]) {
        fill(machine, BASE, 4, |n| [SAME, SAME + 1, 0, machine as *const _ as u64][n as usize]);
        ksm.enter(&machine.mm, Domain(domain)).unwrap();
    }
    merge(&ksm);
    // The first and the third have two in common; zeros nobody can tell anything by that is not known.
    assert_eq!((shared(&ksm), ksm.stats().ksm_zero_pages), ((2, 2), 3));
    assert_eq!(frames(&machines[0], BASE, 2), frames(&machines[2], BASE, 2));
    let alone = &ksm.report().members[1].vmas[0].pages.not_shared;
    assert_eq!((alone.domain, alone.unique), (2, 1));
    assert_eq!(ksm.report().members[0].vmas[0].pages.not_shared.domain, 0);
    // One like those of the other domain, in either, one after the other.
    fill(&machines[1], page(BASE, 10), 1, |_| SAME);
    merge(&ksm);
    assert_eq!(shared(&ksm), (3, 3));
    let pfn = |machine: &Machine, n| machine.pte(page(BASE, n)).pfn();
    assert_eq!(pfn(&machines[1], 10), pfn(&machines[1], 0));
    assert_ne!(pfn(&machines[1], 0), pfn(&machines[0], 0));
    // The same content in two domains is no chain.
    assert_eq!(ksm.stats().stable_node_chains, 0);
    machines.iter().for_each(|machine| check(&ksm, machine));
    check_counters(&ksm);
}

/// A space that is gone is no domain: what a child of it has left is found.
#[test]
fn pages_of_a_space_that_is_gone_are_found_by_their_heirs() {
    let parent = filled(AdBits::AfterFlush, 1, |_| SAME);
    let ksm = sharing(settings(), [&parent]);
    merge(&ksm);
    let child = parent.fork().unwrap();
    let other = parent.beside(AdBits::AfterFlush);
    drop(parent.exit());
    merge(&ksm);
    ksm.enter(&other.mm, Domain(0)).unwrap();
    fill(&other, BASE, 1, |_| SAME);
    merge(&ksm);
    merge(&ksm);
    assert_eq!(shared(&ksm), (1, 1));
    check(&ksm, &child);
    check(&ksm, &other);
}

/// Two contents of one hash: pages of either find each other.
#[test]
fn pages_of_different_content_and_one_hash_are_told_apart() {
    let seed = 1;
    let hash = |word: u64| {
        let mut bytes = [0u8; PAGE_SIZE as usize];
        bytes[..8].copy_from_slice(&word.to_le_bytes());
        (xxh3_64_with_seed(&bytes, seed) >> 32) as u32
    };
    let mut hashes: Vec<(u32, u64)> = (1..300_000).map(|word| (hash(word), word)).collect();
    hashes.sort_unstable();
    let [(_, one), (_, other)] = *hashes.windows(2).find(|two| two[0].0 == two[1].0).unwrap() else {
        panic!()
    };
    for (limit, expected) in [(2, 4), (3, 4), (256, 6)] {
        let machine = filled(AdBits::AfterFlush, 8, |n| [one, other, other, one][n as usize % 4]);
        let settings = KsmSettings { max_page_sharing: limit, seed: Some(seed), ..settings() };
        let ksm = sharing(settings, [&machine]);
        // A pass finds out what it cannot be merged with, the next does better.
        (0..4).for_each(|_| _ = merge(&ksm));
        assert_eq!(shared(&ksm), (if limit == 2 { 4 } else { 2 }, expected));
        assert_eq!(words(&machine, BASE, 8), [one, other, other, one, one, other, other, one]);
        assert_eq!(merge(&ksm), 0);
        check(&ksm, &machine);
        machine.finish();
    }
}

/// Reading and writing, merged or like no other, known to KSM or not: each quiet page takes the same fault and the same copy.
#[test]
fn copy_on_access_treats_every_quiet_page_alike() {
    for ad in KINDS {
        let access = CandidateAccess::CopyOnAccess;
        let machine = filled(ad, 64, |n| if n < 32 { SAME } else { n });
        fill(&machine, page(BASE, 100), 8, |_| 0);
        let ksm = sharing(KsmSettings { access, ..settings() }, [&machine]);
        merge(&ksm);
        check(&ksm, &machine);
        check_counters(&ksm);
        let copied = || machine.mm.stats().copied_pages.load(Ordering::SeqCst);
        // A window as large as they come, and one page alone.
        let mut vcpus = [machine.vcpu(0, Fixed(64)), machine.vcpu(1, Off)];
        let all = (0..64).chain(100..108);
        for n in all.clone() {
            assert!(machine.pte(page(BASE, n)).is_ksm(), "{n}");
            let (vcpu, word) = (
                &mut vcpus[n as usize % 2],
                if n < 32 {
                    SAME
                } else if n < 64 {
                    n
                } else {
                    0
                },
            );
            let (faults, copies) = (vcpu.faults, copied());
            if n % 3 == 0 {
                vcpu.write(page(BASE, n), word).unwrap();
            } else {
                assert_eq!(vcpu.read(page(BASE, n)), Ok(word), "{n}");
            }
            assert_eq!((vcpu.faults - faults, copied() - copies), (1, 1), "{ad:?} page {n}");
            assert!(!machine.pte(page(BASE, n)).is_ksm());
            // It is its own until the next pass.
            assert_eq!((vcpu.read(page(BASE, n)), vcpu.faults - faults), (Ok(word), 1));
            assert!(
                n == 63 || n >= 64 || machine.pte(page(BASE, n + 1)).is_ksm(),
                "no fault brings it along"
            );
        }
        assert_eq!((shared(&ksm), ksm.stats().ksm_zero_pages), ((0, 0), 0));
        check(&ksm, &machine);
        merge(&ksm);
        assert!(all.clone().all(|n| machine.pte(page(BASE, n)).is_ksm()));
        check(&ksm, &machine);
        check_counters(&ksm);
        // The host's reads are accesses too.
        assert_eq!((machine.peek(BASE), machine.pte(BASE).is_ksm()), (SAME, false));
        ksm.unmerge().unwrap();
        assert!(!all.clone().any(|n| machine.pte(page(BASE, n)).is_ksm()));
        check(&ksm, &machine);
        machine.finish();
    }
}

/// A pool of so many frames, of which all but `spare` are taken.
fn short_of_frames(machine: &Machine, spare: usize) -> Vec<Pfn> {
    let mut taken = Vec::new();
    machine.pool.alloc_up_to(machine.pool.free_frames() - spare, Fill::Overwritten, &mut taken);
    assert_eq!(machine.pool.free_frames(), spare);
    taken
}

/// The reserve is as large as what is merged, within the setting; nobody else gets it, and those that stop sharing do.
#[test]
fn the_reserve_is_for_pages_that_stop_being_shared() {
    const MERGED: u64 = 20;
    for (reserve, kept) in [(1000, MERGED), (5, 5), (0, 0)] {
        for word in [SAME, 0] {
            let machine = filled(AdBits::AfterFlush, MERGED, |_| word);
            machine.map_at(page(BASE, 100), 8, RW, MapFlags::PRIVATE);
            machine.poke(page(BASE, 100), 1);
            let ksm = sharing(KsmSettings { reserve, ..settings() }, [&machine]);
            let mut vcpu = machine.vcpu(0, Fixed(16));
            let mut read = || (0..MERGED).for_each(|n| _ = vcpu.read(page(BASE, n)).unwrap());
            read();
            let free = machine.pool.free_frames();
            merge(&ksm);
            // A shadow table without a leaf could be taken by whoever needs a frame.
            read();
            let freed = MERGED as usize - usize::from(word != 0);
            assert_eq!(machine.pool.stats().reserve, kept as usize);
            assert_eq!(machine.pool.free_frames(), free + freed - kept as usize);
            let taken = short_of_frames(&machine, 0);
            // New memory does not get it, nor does a copy for a fork.
            assert!(vcpu.write(page(BASE, 101), 1).is_err());
            assert!(machine.pool.alloc(Fill::Zeros).is_err());
            for n in 0..MERGED {
                let wrote = vcpu.write(page(BASE, n), n + 100);
                assert_eq!(wrote.is_ok(), n < kept, "page {n} of {kept}");
            }
            assert_eq!(machine.pool.stats().reserve_taken, kept);
            for n in 0..MERGED {
                assert_eq!(vcpu.read(page(BASE, n)), Ok(if n < kept { n + 100 } else { word }));
            }
            check(&ksm, &machine);
            machine.pool.put_all(&taken);
            // What is not merged any more needs none.
            (0..MERGED).for_each(|n| vcpu.write(page(BASE, n), n + 100).unwrap());
            pass(&ksm);
            assert_eq!(machine.pool.stats().reserve, 0);
            check(&ksm, &machine);
            machine.finish();
        }
    }
}

/// Out of memory on the way out: what could be taken back is, the rest stays merged, and may be still (I55).
#[test]
fn i55_unmerging_without_frames_leaves_everything_as_it_can_be() {
    const MERGED: u64 = 200;
    type Unmerge = fn(&Machine, &Ksm) -> Result<(), MmError>;
    let ways: [(&str, Unmerge); 3] = [
        ("madvise", |machine, _| machine.mm.madvise(BASE, pages(MERGED), Advice::Unmergeable)),
        ("prctl", |machine, _| machine.mm.set_merge_any(MergeAny::Off)),
        ("run = 2", |_, ksm| ksm.unmerge()),
    ];
    for (what, unmerge) in ways {
        for spare in [0, 1, 63, 64, 130] {
            let machine = filled(AdBits::AfterFlush, MERGED, |n| if n % 2 == 0 { 0 } else { SAME });
            let ksm = sharing(settings(), [&machine]);
            machine.mm.set_merge_any(MergeAny::On).unwrap();
            merge(&ksm);
            let taken = short_of_frames(&machine, spare);
            assert_eq!(unmerge(&machine, &ksm), Err(MmError::NoMemory), "{what} {spare}");
            let merged = (0..MERGED).filter(|&n| machine.pte(page(BASE, n)).is_ksm()).count() as u64;
            assert!(merged > 0 && merged >= MERGED - spare as u64, "{what} {spare}: {merged}");
            assert_eq!(machine.mm.ksm_merging_pages() + machine.mm.ksm_zero_pages(), merged);
            assert!(machine.pool.free_frames() < 64, "frames that a try got are used, or given back");
            assert!(machine.mm.vma(BASE).unwrap().flags.contains(VmaFlags::MERGEABLE));
            assert_eq!(machine.mm.merge_any(), MergeAny::On);
            check(&ksm, &machine);
            machine.pool.put_all(&taken);
            assert_eq!(unmerge(&machine, &ksm), Ok(()));
            assert!(!has_merged(&machine, BASE, MERGED));
            for n in 0..MERGED {
                assert_eq!(machine.peek(page(BASE, n)), if n % 2 == 0 { 0 } else { SAME });
            }
            assert_eq!((shared(&ksm), ksm.stats().ksm_zero_pages, machine.pool.ksm_frames()), ((0, 0), 0, 0));
            check(&ksm, &machine);
            machine.finish();
        }
    }
}

#[test]
fn i56_a_copy_is_private_equal_and_counted() {
    let machine = filled(AdBits::AfterFlush, 5, |_| SAME);
    let at = Hva(BASE.0 + 8);
    let ksm = sharing(settings(), [&machine]);
    merge(&ksm);
    let frame = machine.pte(BASE).pfn();
    let mut vcpu = machine.vcpu(0, Fixed(8));
    for (n, left) in (0..5).zip([(1, 3), (1, 2), (1, 1), (1, 0), (0, 0)]) {
        vcpu.write(Hva(page(at, n).0), n).unwrap();
        let pte = machine.pte(page(BASE, n));
        assert!(pte.pfn() != frame && !pte.is_ksm() && pte.is_writable());
        assert_eq!((machine.peek(page(BASE, n)), machine.peek(page(at, n))), (SAME, n));
        assert_eq!((ksm.stats().cow_ksm, shared(&ksm)), (n + 1, left), "the last is copied too");
        check(&ksm, &machine);
    }
    machine.finish();
}

#[test]
fn settings_that_make_no_sense_are_refused() {
    let machine = Machine::new(64);
    for max_page_sharing in [0, 1] {
        let refused = Ksm::new(Arc::clone(&machine.pool), KsmSettings { max_page_sharing, ..settings() });
        assert_eq!(refused.err(), Some(KsmError::MaxPageSharing(max_page_sharing)));
    }
    let other = Machine::new(64);
    let ksm = sharing(settings(), [&machine]);
    assert_eq!(ksm.enter(&other.mm, Domain(0)), Err(KsmError::OtherPool));
    assert_eq!(ksm.metadata_bytes(), 16 * 64);
    assert_eq!(ksm.settings(), settings());
    other.finish();
    machine.finish();
}

/// As many spaces as the index can name, and one more when one has gone.
#[test]
fn eight_thousand_spaces_share_and_no_more() {
    const SPACES: usize = 8192;
    let frames = 4 * SPACES as u64;
    let pool = Arc::new(FramePool::new(frames * PAGE_SIZE, FreedFrames::Keep).unwrap());
    let ksm = Ksm::new(Arc::clone(&pool), settings()).unwrap();
    let new = || Mm::new(Arc::clone(&pool)).unwrap();
    let mut spaces: Vec<_> = (0..SPACES).map(|_| new()).collect();
    for (n, mm) in spaces.iter().enumerate() {
        assert_eq!(ksm.enter(mm, Domain(0)).unwrap().0, n as u64);
        if n % 1000 == 0 {
            ksm.scan(1);
        }
    }
    let last = new();
    assert_eq!(ksm.enter(&last, Domain(0)), Err(KsmError::TooManySpaces));
    pass(&ksm);
    assert_eq!(ksm.enter(&last, Domain(0)), Err(KsmError::TooManySpaces));
    // The slot of one that is gone is taken by the next, and what is merged there is its.
    spaces.remove(4000);
    pass(&ksm);
    ksm.scan(1);
    ksm.enter(&last, Domain(0)).unwrap();
    for mm in [&last, &spaces[8000]] {
        let at = mm.mmap(
            BASE,
            pages(1),
            RW,
            MapFlags::PRIVATE | MapFlags::FIXED,
            shadow_mmu::mm::Backing::Anonymous,
        );
        let pinned = mm.fault(&FaultRequest::one_page(at.unwrap(), RW)).unwrap();
        pool.write(pinned.required().pfn, 0, b"same");
        mm.madvise(BASE, pages(1), Advice::Mergeable).unwrap();
    }
    merge(&ksm);
    assert_eq!(shared(&ksm), (1, 1));
    assert_eq!(ksm.audit(), []);
    assert_eq!(ksm.report().members.len(), SPACES);
}

/// A candidate is of the domain of who has it, whoever had it before, and whose number is whose by now.
#[test]
fn who_inherits_a_candidate_does_not_share_with_who_inherits_the_number() {
    let first = Machine::new(2048);
    let parent = first.beside(AdBits::AfterFlush);
    let ksm = Ksm::new(Arc::clone(&first.pool), settings()).unwrap();
    fill(&parent, BASE, 1, |_| SAME);
    ksm.enter(&parent.mm, Domain(1)).unwrap();
    merge(&ksm);
    let child = parent.fork().unwrap();
    pass(&ksm);
    drop(parent.exit());
    // Gets the parent's number, in another domain.
    let stranger = first.beside(AdBits::AfterFlush);
    ksm.enter(&stranger.mm, Domain(2)).unwrap();
    fill(&first, BASE, 1, |_| SAME);
    ksm.enter(&first.mm, Domain(2)).unwrap();
    (0..3).for_each(|_| _ = merge(&ksm));
    assert_ne!(child.pte(BASE).pfn(), first.pte(BASE).pfn(), "they are of two domains");
    // Nor is it lost to its own.
    let sibling = first.beside(AdBits::AfterFlush);
    fill(&sibling, BASE, 1, |_| SAME);
    ksm.enter(&sibling.mm, Domain(1)).unwrap();
    (0..3).for_each(|_| _ = merge(&ksm));
    assert_eq!(child.pte(BASE).pfn(), sibling.pte(BASE).pfn());
    check(&ksm, &first);
}
