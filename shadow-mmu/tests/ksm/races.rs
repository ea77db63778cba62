// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Races of a merge, each with its interleaving forced: the scan is held at one of four moments of one page's merge, and
//! somebody does something meanwhile. (What happens within a step, under one lock, is in the models.)

use super::*;
use crate::common::{Gate, Vcpu, WATCH};
use shadow_mmu::ksm::KsmPages;
use shadow_mmu::mm::{Backing, Mm};
use shadow_mmu::notifier::{MmuNotifier, WrittenPages};
use std::thread::ScopedJoinHandle;

/// Where the merge of a page is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Moment {
    /// It was looked at and is to be merged; its pair is about to be opened.
    Found,
    /// It is write-protected, and the first pair has ended.
    Protected,
    /// It was compared; the second pair is about to be opened.
    Compared,
    /// It is merged.
    Merged,
}
use Moment::{Compared, Found, Merged, Protected};

const MOMENTS: [Moment; 4] = [Found, Protected, Compared, Merged];

/// A pass that is held at `moment` of the merge of the page at `at`, while `act` runs. Returns how many pages were merged, and
/// what `act` did.
fn pass_with<R>(machine: &Machine, ksm: &Ksm, at: Hva, moment: Moment, act: impl FnOnce() -> R) -> (u64, R) {
    let range = HvaRange::page(at);
    let (start, end) = (&machine.before.start, &machine.after.end);
    let gates = &[start, end, start, end][..=moment as usize];
    gates[0].shut_for_one(range);
    std::thread::scope(|scope| {
        let scan = scope.spawn(|| pass(ksm));
        for two in gates.windows(2) {
            two[0].wait_for_arrival();
            two[1].shut_for_one(range);
            two[0].open();
        }
        let last = gates[gates.len() - 1];
        last.wait_for_arrival();
        let result = act();
        last.open();
        (scan.join().unwrap(), result)
    })
}

#[track_caller]
fn assert_waits<T>(thread: &ScopedJoinHandle<'_, T>, what: &str) {
    std::thread::sleep(WATCH);
    assert!(!thread.is_finished(), "{what}");
}

/// A page, apart from others.
const LATE: Hva = Hva(BASE.0 + 100 * PAGE_SIZE);

/// Two merged pages at [`BASE`], and one like them at [`LATE`] that was quiet for a pass, which a vCPU can write without a
/// fault.
fn late(ad: AdBits, word: u64) -> (Machine, Arc<Ksm>, Vcpu) {
    let machine = filled(ad, 2, |_| word);
    let ksm = sharing(settings(), [&machine]);
    merge(&ksm);
    fill(&machine, LATE, 1, |_| word);
    let mut vcpu = machine.vcpu(0, Off);
    vcpu.write(LATE, word).unwrap();
    pass(&ksm);
    if ad == AdBits::None {
        // Whoever looks whether it was written takes W: so it is not writable any more, but for the primary.
        assert!(!machine.spte(LATE).is_writable());
    } else {
        assert!(machine.spte(LATE).is_writable());
    }
    (machine, ksm, vcpu)
}

fn row(ksm: &Ksm, at: Hva) -> KsmPages {
    let rows = ksm.report().members.into_iter().flat_map(|member| member.vmas);
    rows.into_iter().find(|row| row.place.as_ref().unwrap().range.contains(at)).unwrap().pages
}

/// What the vCPU writes is its page's, at whichever moment, and nobody else's; a page that was written is not merged.
#[test]
fn r10_r10b_i52_a_write_beside_a_merge_is_not_lost_and_not_shared() {
    for ad in KINDS {
        for word in [SAME, 0] {
            for moment in MOMENTS {
                let (machine, ksm, mut vcpu) = late(ad, word);
                let faults = vcpu.faults;
                let (merged, ()) = pass_with(&machine, &ksm, LATE, moment, || vcpu.write(LATE, 77).unwrap());
                let what = format!("{ad:?} {moment:?}");
                assert_eq!(merged, u64::from(moment == Merged), "{what}");
                assert_eq!(vcpu.faults > faults, moment != Found || ad == AdBits::None, "{what}");
                assert!(!machine.pte(LATE).is_ksm(), "{what}");
                assert_eq!((machine.peek(LATE), words(&machine, BASE, 2)), (77, vec![word; 2]), "{what}");
                assert_eq!(vcpu.read(LATE), Ok(77), "{what}");
                if moment != Merged {
                    assert_eq!(row(&ksm, LATE).not_shared.volatile, 1, "{what}");
                }
                check(&ksm, &machine);
                // And it is found again when it is like another.
                vcpu.write(LATE, word).unwrap();
                merge(&ksm);
                assert!(machine.pte(LATE).is_ksm(), "{what}");
                check(&ksm, &machine);
                machine.finish();
            }
        }
    }
}

/// A write of what is there already is a write: the page stays.
#[test]
fn i52_a_page_that_was_written_back_is_not_replaced() {
    let (machine, ksm, mut vcpu) = late(AdBits::AfterFlush, SAME);
    let (merged, ()) = pass_with(&machine, &ksm, LATE, Compared, || {
        vcpu.write(LATE, 1).unwrap();
        vcpu.write(LATE, SAME).unwrap();
    });
    assert_eq!((merged, machine.pte(LATE).is_writable()), (0, true));
    check(&ksm, &machine);
    machine.finish();
}

#[test]
fn i58_reads_find_the_same_at_every_moment() {
    for ad in KINDS {
        for word in [SAME, 0] {
            for moment in MOMENTS {
                let (machine, ksm, mut vcpu) = late(ad, word);
                let (merged, read) = pass_with(&machine, &ksm, LATE, moment, || vcpu.read(LATE).unwrap());
                assert_eq!((merged, read), (1, word), "{ad:?} {moment:?}");
                assert!(machine.pte(LATE).is_ksm() && !machine.spte(LATE).is_writable());
                assert_eq!(vcpu.read(LATE), Ok(word));
                check(&ksm, &machine);
                machine.finish();
            }
        }
    }
}

/// Whoever has pinned the page for writing writes it without asking anybody, when he likes.
#[test]
fn r22_i27_a_pinned_page_is_not_merged() {
    for word in [SAME, 0] {
        // Taken before the page is looked at, or just before it is write-protected.
        for moment in [None, Some(Found)] {
            let (machine, ksm, _) = late(AdBits::AfterFlush, word);
            let pin = || machine.mm.fault(&FaultRequest::one_page(LATE, RW)).unwrap();
            let (merged, pinned) = match moment {
                None => {
                    let pinned = pin();
                    (merge(&ksm), pinned)
                }
                Some(moment) => pass_with(&machine, &ksm, LATE, moment, pin),
            };
            assert_eq!((merged, machine.pte(LATE).is_ksm()), (0, false));
            let not_shared = row(&ksm, LATE).not_shared;
            let reason = if moment.is_some() { not_shared.pinned } else { not_shared.volatile };
            assert_eq!(reason, 1, "{not_shared:?}");
            assert!(machine.pte(LATE).is_writable(), "it has back what it had");
            machine.pool.words(pinned.required().pfn)[0].store(77, Ordering::SeqCst);
            assert_eq!((machine.peek(LATE), words(&machine, BASE, 2)), (77, vec![word; 2]));
            drop(pinned);
            check(&ksm, &machine);
            machine.finish();
        }
    }
}

/// A pin that is taken when W is gone finds that it needs it, and the merge finds that.
#[test]
fn r22_a_pin_behind_the_protection_keeps_the_page_from_being_replaced() {
    for moment in [Protected, Compared] {
        let (machine, ksm, _) = late(AdBits::AfterFlush, SAME);
        let pin = || machine.mm.fault(&FaultRequest::one_page(LATE, RW)).unwrap();
        let (merged, pinned) = pass_with(&machine, &ksm, LATE, moment, pin);
        machine.pool.words(pinned.required().pfn)[0].store(77, Ordering::SeqCst);
        assert_eq!((merged, machine.peek(LATE), words(&machine, BASE, 2)), (0, 77, vec![SAME; 2]));
        drop(pinned);
        check(&ksm, &machine);
        machine.finish();
    }
}

/// The candidate that a page is like is held to the same: pinned, it does not become a page of KSM.
#[test]
fn r22_a_pinned_candidate_is_not_promoted() {
    let machine = filled(AdBits::AfterFlush, 1, |_| SAME);
    let ksm = sharing(settings(), [&machine]);
    merge(&ksm);
    fill(&machine, LATE, 1, |_| SAME);
    pass(&ksm);
    let pin = || machine.mm.fault(&FaultRequest::one_page(BASE, RW)).unwrap();
    let (merged, pinned) = pass_with(&machine, &ksm, BASE, Found, pin);
    machine.pool.words(pinned.required().pfn)[0].store(77, Ordering::SeqCst);
    assert_eq!((merged, words(&machine, BASE, 1), words(&machine, LATE, 1)), (0, vec![77], vec![SAME]));
    assert!(!has_merged(&machine, BASE, 1) && !has_merged(&machine, LATE, 1));
    drop(pinned);
    check(&ksm, &machine);
    machine.finish();
}

/// A candidate that was written since it was hashed, and has become a page of KSM by then, is not one by its old content; nor
/// does it keep pages of the old content from each other.
#[test]
fn i51_a_candidate_that_was_written_does_not_become_a_page_by_what_it_was() {
    for access in [CandidateAccess::Normal, CandidateAccess::CopyOnAccess] {
        let machine = filled(AdBits::AfterFlush, 1, |_| SAME);
        // In this mode a candidate is guarded at once, unless somebody has it pinned: then it is one unguarded.
        let ksm = sharing(KsmSettings { access, ..settings() }, [&machine]);
        pass(&ksm);
        let mut vcpu = machine.vcpu(0, Off);
        let other = 1234;
        fill(&machine, LATE, 3, |n| [SAME, SAME, other][n as usize]);
        match access {
            CandidateAccess::Normal => {
                pass(&ksm);
                pass_with(&machine, &ksm, BASE, Found, || vcpu.write(BASE, other).unwrap());
            }
            CandidateAccess::CopyOnAccess => {
                pass_with(&machine, &ksm, BASE, Found, || vcpu.write(BASE, other).unwrap());
            }
        }
        check(&ksm, &machine);
        merge(&ksm);
        merge(&ksm);
        assert_eq!(shared(&ksm), (2, 2), "{access:?}");
        let [one, like, unlike, last] =
            [BASE, page(LATE, 2), LATE, page(LATE, 1)].map(|at| machine.pte(at).pfn());
        assert!(one == like && unlike == last && one != unlike);
        check(&ksm, &machine);
        machine.finish();
    }
}

/// A candidate that one like it has found comes under the cursor before they are merged, and was written: it leaves the index,
/// and must not be a page of KSM that is in none, nor one that waits in it.
#[test]
fn i51_a_candidate_that_is_wanted_and_was_written_is_found_again() {
    for access in [CandidateAccess::Normal, CandidateAccess::CopyOnAccess] {
        let machine = filled(AdBits::AfterFlush, 200, |n| n + 1000);
        let ksm = sharing(KsmSettings { access, ..settings() }, [&machine]);
        merge(&ksm);
        let mut vcpu = machine.vcpu(0, Off);
        vcpu.write(page(BASE, 5), 1100).unwrap();
        pass(&ksm);
        // The same as before, so that the other finds it equal.
        vcpu.write(page(BASE, 100), 1100).unwrap();
        pass(&ksm);
        check(&ksm, &machine);
        merge(&ksm);
        merge(&ksm);
        assert_eq!(machine.pte(page(BASE, 5)).pfn(), machine.pte(page(BASE, 100)).pfn(), "{access:?}");
        check(&ksm, &machine);
        machine.finish();
    }
}

/// Stops whoever asks for writes.
#[derive(Debug, Default)]
struct Asked(Gate);

impl MmuNotifier for Asked {
    fn test_clear_dirty(&self, _: &mut WrittenPages) {
        self.0.pass();
    }
}

/// A space that goes while it is looked at, when some of its pages are to be merged.
#[test]
fn r28_a_space_that_is_dropped_between_two_looks_is_left_out() {
    let machine = filled(AdBits::AfterFlush, 2, |_| SAME);
    let mm = Mm::new(Arc::clone(&machine.pool)).unwrap();
    for (at, word) in [(BASE, 0), (page(BASE, 1), SAME), (page(BASE, 600), SAME)] {
        mm.mmap(at, PAGE_SIZE, RW, MapFlags::PRIVATE | MapFlags::FIXED, Backing::Anonymous).unwrap();
        let pinned = mm.fault(&FaultRequest::one_page(at, RW)).unwrap();
        machine.pool.words(pinned.required().pfn)[0].store(word, Ordering::SeqCst);
    }
    mm.set_merge_any(MergeAny::On).unwrap();
    let asked = Arc::<Asked>::default();
    mm.register(asked.clone()).unwrap();
    let ksm = sharing(settings(), [&machine]);
    ksm.enter(&mm, Domain(0)).unwrap();
    pass(&ksm);
    asked.0.shut();
    std::thread::scope(|scope| {
        let scan = scope.spawn(|| pass(&ksm));
        asked.0.wait_for_arrival();
        drop(mm);
        asked.0.open();
        // Of the other space only.
        assert_eq!(scan.join().unwrap(), 1);
    });
    assert_eq!((shared(&ksm), ksm.report().members.len()), ((1, 1), 1));
    check(&ksm, &machine);
    machine.finish();
}

/// Frames of KSM that are freed, and handed out again: for other content, for the same, for tables.
#[test]
fn r26_i57_a_frame_that_was_one_of_ksm_is_not_found_as_one() {
    let machine = Machine::new(80);
    fill(&machine, BASE, 2, |_| SAME);
    let ksm = sharing(settings(), [&machine]);
    merge(&ksm);
    let was = machine.pte(BASE).pfn();
    // Free, and named by the index: nobody is merged into it.
    fill(&machine, LATE, 1, |_| SAME);
    machine.mm.munmap(BASE, pages(2)).unwrap();
    assert_eq!(machine.pool.frame(was).ref_count(), 0);
    merge(&ksm);
    assert_eq!((shared(&ksm), has_merged(&machine, LATE, 1)), ((0, 0), false));
    check(&ksm, &machine);

    for (round, word) in [5, SAME].into_iter().enumerate() {
        // A page of KSM anew, which goes while the index knows it.
        fill(&machine, BASE, 2, |_| SAME + 1);
        merge(&ksm);
        let was = machine.pte(BASE).pfn();
        machine.mm.madvise(BASE, pages(2), Advice::DontNeed).unwrap();
        // Handed out again, with all that there is but a few.
        let (at, count) = (page(BASE, 300), machine.pool.free_frames() as u64 - 4);
        fill(&machine, at, count, |_| word);
        assert!(frames(&machine, at, count).contains(&was));
        let mut vcpu = machine.vcpu(0, Off);
        // Those that are like what it was are not merged with it, also not while it is new.
        fill(&machine, page(BASE, 200), 2, |_| SAME + 1);
        machine.mm.madvise(at, pages(count), Advice::Unmergeable).unwrap();
        merge(&ksm);
        assert!((0..2).all(|n| machine.pte(page(BASE, 200 + n)).pfn() != was));
        (0..count).for_each(|n| vcpu.write(page(at, n), 6).unwrap());
        assert_eq!(words(&machine, at, count), vec![6; count as usize], "round {round}");
        assert_eq!(words(&machine, page(BASE, 200), 2), [SAME + 1; 2]);
        check(&ksm, &machine);
        machine.mm.munmap(at, pages(count)).unwrap();
        machine.mm.munmap(page(BASE, 200), pages(2)).unwrap();
    }
    machine.finish();
}

/// Everything that changes mappings waits for the merge of a page of theirs, and then takes it back.
#[test]
fn r27_unmerging_waits_for_a_merge_and_takes_it_back() {
    for moment in MOMENTS {
        let (machine, ksm, _) = late(AdBits::AfterFlush, SAME);
        std::thread::scope(|scope| {
            let ((), unmerge) = {
                let (_, unmerge) = pass_with(&machine, &ksm, LATE, moment, || {
                    let unmerge = scope.spawn(|| machine.mm.madvise(LATE, pages(1), Advice::Unmergeable));
                    assert_waits(&unmerge, "the page is being merged");
                    unmerge
                });
                ((), unmerge)
            };
            unmerge.join().unwrap().unwrap();
        });
        assert!(!machine.pte(LATE).is_ksm());
        merge(&ksm);
        assert_eq!((has_merged(&machine, LATE, 1), shared(&ksm)), (false, (1, 1)), "{moment:?}");
        check(&ksm, &machine);
        machine.finish();
    }
}

/// Two spaces; a page of the second is found like one of the first, and while that is made a page of KSM, something happens to
/// the second, or to the whole of it.
#[test]
fn r27_r28_what_is_no_longer_as_it_was_found_is_left_alone() {
    type Change = fn(&Machine);
    let changes: [(&str, Change, Option<u64>); 9] = [
        ("unmergeable", |m| m.mm.madvise(LATE, pages(1), Advice::Unmergeable).unwrap(), Some(SAME)),
        (
            "prctl",
            |m| {
                m.mm.set_merge_any(MergeAny::On).unwrap();
                m.mm.set_merge_any(MergeAny::Off).unwrap()
            },
            Some(SAME),
        ),
        ("munmap", |m| m.mm.munmap(LATE, pages(1)).unwrap(), None),
        ("dontneed", |m| m.mm.madvise(LATE, pages(1), Advice::DontNeed).unwrap(), Some(0)),
        ("mmap", |m| m.map_at(LATE, 1, RW, MapFlags::SHARED), Some(0)),
        (
            "mremap",
            |m| {
                let flags = RemapFlags::MAYMOVE | RemapFlags::FIXED;
                m.mm.mremap(LATE, pages(1), pages(1), flags, page(LATE, 600)).unwrap();
            },
            None,
        ),
        ("reap", |m| _ = m.mm.reap().unwrap(), None),
        ("release", |m| m.mm.release(), None),
        ("fork", |m| drop(m.mm.fork().unwrap()), Some(SAME)),
    ];
    for (what, change, word) in changes {
        let first = filled(AdBits::AfterFlush, 1, |_| SAME);
        let second = first.beside(AdBits::AfterFlush);
        let ksm = sharing(settings(), [&first, &second]);
        merge(&ksm);
        fill(&second, LATE, 1, |_| SAME);
        pass(&ksm);
        let (merged, ()) = pass_with(&first, &ksm, BASE, Found, || change(&second));
        assert_eq!(merged, u64::from(what == "fork"), "{what}");
        if what == "fork" {
            // What both have is one page, and can be merged.
            assert_eq!(shared(&ksm), (1, 1));
        } else {
            assert_eq!(shared(&ksm), (0, 0), "{what}");
        }
        check(&ksm, &first);
        check(&ksm, &second);
        if let Some(word) = word {
            assert_eq!(second.peek(LATE), word, "{what}");
        }
        assert_eq!(first.peek(BASE), SAME);
        drop(second.exit());
        merge(&ksm);
        check(&ksm, &first);
        first.finish();
    }
}

/// The same when the whole space is dropped; of it, or of the one that the candidate is in.
#[test]
fn r28_a_space_that_is_dropped_beside_a_merge_is_left_out() {
    let first = filled(AdBits::AfterFlush, 1, |_| SAME);
    let second = first.beside(AdBits::AfterFlush);
    let ksm = sharing(settings(), [&first, &second]);
    merge(&ksm);
    fill(&second, LATE, 1, |_| SAME);
    pass(&ksm);
    let (merged, pool) = pass_with(&first, &ksm, BASE, Found, || second.exit());
    assert_eq!((merged, shared(&ksm)), (0, (0, 0)));
    assert_eq!(ksm.report().members.len(), 1);
    drop(pool);
    check(&ksm, &first);

    // The candidate's: its frame is free, and in the index.
    let second = first.beside(AdBits::AfterFlush);
    ksm.enter(&second.mm, Domain(0)).unwrap();
    fill(&second, LATE, 1, |_| SAME);
    pass(&ksm);
    let second = std::sync::Mutex::new(Some(second));
    drop(first.exit());
    let second = second.into_inner().unwrap().unwrap();
    merge(&ksm);
    assert_eq!((second.peek(LATE), shared(&ksm), ksm.report().members.len()), (SAME, (0, 0), 1));
    check(&ksm, &second);
    second.finish();
}

/// A fork beside a merge waits for it; the child has what was merged, or what was not, and either is counted.
#[test]
fn r28_a_fork_waits_for_a_merge() {
    for moment in MOMENTS {
        let (machine, ksm, mut vcpu) = late(AdBits::AfterFlush, SAME);
        let child = std::thread::scope(|scope| {
            let (_, fork) = pass_with(&machine, &ksm, LATE, moment, || {
                let fork = scope.spawn(|| machine.fork().unwrap());
                assert_waits(&fork, "a page is being merged");
                fork
            });
            fork.join().unwrap()
        });
        check(&ksm, &machine);
        check(&ksm, &child);
        assert_eq!(child.mm.ksm_merging_pages(), machine.mm.ksm_merging_pages());
        vcpu.write(LATE, 9).unwrap();
        assert_eq!((child.peek(LATE), machine.peek(LATE)), (SAME, 9));
        merge(&ksm);
        check(&ksm, &child);
        drop(child.exit());
        check(&ksm, &machine);
        machine.finish();
    }
}

/// Two who have one merged page write it at once: each gets a copy, and the others keep the page (I56).
#[test]
fn i56_two_that_leave_a_page_at_once_leave_it_to_the_third() {
    let machine = filled(AdBits::AfterFlush, 3, |_| SAME);
    let ksm = sharing(settings(), [&machine]);
    merge(&ksm);
    let copies = ksm.stats().cow_ksm;
    let (mut one, mut other) = (machine.vcpu(0, Off), machine.vcpu(1, Off));
    machine.after.end.shut_for_one(HvaRange::page(BASE));
    std::thread::scope(|scope| {
        scope.spawn(|| one.write(BASE, 1).unwrap());
        machine.after.end.wait_for_arrival();
        other.write(page(BASE, 1), 2).unwrap();
        machine.after.end.open();
    });
    assert_eq!(words(&machine, BASE, 3), [1, 2, SAME]);
    assert_eq!((ksm.stats().cow_ksm - copies, shared(&ksm)), (2, (1, 0)));
    assert!(machine.pte(page(BASE, 2)).is_ksm());
    check(&ksm, &machine);
    machine.finish();
}
