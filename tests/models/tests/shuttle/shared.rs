// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Races about pages that are merged: who writes them, forks, unmaps, takes merges back, and what of that is counted: I51, I53,
//! I58, R9. What must hold is at the top of [`sharing`](crate::sharing).

use crate::addr::{Hva, PAGE_SIZE};
use crate::cpu::{Vcpu, tagged};
use crate::explore::explore;
use crate::faults::drop_pages;
use crate::frame::{Fill, FrameFlags};
use crate::intervals::Device;
use crate::ksm::{CandidateAccess, KsmSettings};
use crate::machine::{Machine, READ, page, task};
use crate::mm::{Advice, MergeInto, Mm, Outcome, Target};
use crate::mutant::M;
use crate::shadow::{AdBits, FaultAroundPolicy};
use crate::sharing::{AT, Guests, is_merged, reads, settings, word, writes};
use crate::sync::Arc;

/// Both guests write the page that they share, and the scanner goes on.
fn copied() {
    let guests = Guests::merged(AdBits::AfterFlush);
    let (ours, theirs) = guests.both();
    let rewrite = |guest: &Machine| {
        let mut vcpu = guest.vcpu(0);
        [2, 3, 1].into_iter().for_each(|n| writes(guest, &mut vcpu, AT, n));
    };
    ours.race([task(|| rewrite(ours)), task(|| rewrite(theirs)), task(|| guests.scan())]);
    guests.audit();
    guests.settle(AT);
    guests.finish();
}

#[test]
fn i58_who_shares_a_page_writes_one_of_its_own() {
    let mutants = [M::SharedReused, M::CopyNotCounted];
    explore("i58_copied", copied, &mutants);
}

/// Somebody checks while everything goes on: what he finds wrong is wrong.
fn audited() {
    let guests = Guests::merged(AdBits::AfterFlush);
    let (ours, theirs) = guests.both();
    let mut child = None;
    ours.race([
        task(|| {
            let mut vcpu = ours.vcpu(0);
            reads(ours, &mut vcpu, AT, 1);
            writes(ours, &mut vcpu, AT, 2);
        }),
        task(|| {
            reads(theirs, &mut theirs.vcpu(0), AT, 1);
            drop_pages(theirs, AT, 1);
        }),
        task(|| child = ours.mm.fork().ok()),
        task(|| guests.audit()),
        task(|| {
            guests.scan();
            let stats = guests.ksm.stats();
            let (shared, sharing) = (stats.pages_shared, stats.pages_sharing);
            ours.must(shared <= 2 && sharing <= 2, || format!("{stats:?}: three pages may be merged (I53)"));
        }),
    ]);
    drop(child);
    guests.finish();
}

#[test]
fn i53_an_audit_is_right_while_others_go_on() {
    explore("i53_audited", audited, &[M::ForkedNotCounted]);
}

/// A page of zeros: the zero frame, which has no owner to look for.
fn zeros() {
    let guests = Guests::with(AdBits::AfterFlush, settings(), [0, 0], 1);
    let (ours, theirs) = guests.both();
    let zero = |guest: &Machine| assert!(guest.poke(AT, 0));
    zero(ours);
    zero(theirs);
    guests.scan();
    ours.race([
        task(|| {
            let mut vcpu = ours.vcpu(0);
            writes(ours, &mut vcpu, AT, 2);
            writes(ours, &mut vcpu, AT, 3);
        }),
        task(|| {
            let seen = theirs.vcpu(0).read(AT).unwrap();
            theirs.must(seen == 0, || format!("{seen:#x} is read in a page of zeros (I58)"));
            drop_pages(theirs, AT, 1);
        }),
        task(|| (0..2).for_each(|_| guests.scan())),
    ]);
    guests.finish();
}

#[test]
fn i58_a_page_of_zeros_is_written_while_it_is_merged() {
    let mutants = [M::ZappedNotCounted, M::MergeProtectsOutsidePair];
    explore("i58_zeros", zeros, &mutants);
}

/// H unmaps what is being merged.
fn unmapped() {
    let guests = Guests::about_to_merge(AdBits::AfterFlush);
    let (ours, theirs) = guests.both();
    ours.race([
        task(|| drop_pages(ours, AT, 1)),
        task(|| {
            theirs.mm.munmap(AT, PAGE_SIZE).unwrap();
            theirs.map_at(AT, 1, crate::machine::RW);
            theirs.poke(AT, tagged(AT, 5));
        }),
        task(|| (0..2).for_each(|_| guests.scan())),
    ]);
    guests.audit();
    let seen = (ours.peek(AT), theirs.peek(AT));
    ours.must(seen == (Some(0), Some(tagged(AT, 5))), || format!("{seen:x?} is read of fresh pages (I24)"));
    guests.finish();
}

#[test]
fn r9_a_page_is_unmapped_while_it_is_merged() {
    explore("r9_merge", unmapped, &[M::ZappedNotCounted, M::FreedStillShared]);
}

/// H forks a guest that writes while the scanner runs. What the child sees stays, whoever writes; and it shares on.
fn forked(guests: Guests) {
    let (ours, theirs) = guests.both();
    let mut child: Option<Arc<Mm>> = None;
    ours.race([
        task(|| {
            let mut vcpu = ours.vcpu(0);
            [2, 1].into_iter().for_each(|n| writes(ours, &mut vcpu, AT, n));
        }),
        task(|| {
            let new = ours.mm.fork().unwrap();
            let (before, after) = (word(&new, AT), word(&new, AT));
            ours.must(before == after, || {
                format!("a child's page goes from {before:#x} to {after:#x} (I15)")
            });
            child = Some(new);
        }),
        task(|| (0..2).for_each(|_| guests.scan())),
        task(|| reads(theirs, &mut theirs.vcpu(0), AT, 1)),
    ]);
    guests.audit();
    let child = child.unwrap();
    let before = word(&child, AT);
    guests.settle(AT);
    guests.audit();
    for n in [4, 5] {
        writes(ours, &mut ours.vcpu(0), AT, n);
        writes(theirs, &mut theirs.vcpu(0), AT, n);
        guests.audit();
    }
    let after = word(&child, AT);
    ours.must(before == after, || format!("a child's page goes from {before:#x} to {after:#x} (I58)"));
    // The family can be told to share no longer: then none of it does.
    child.madvise(AT, PAGE_SIZE, Advice::Unmergeable).unwrap();
    let (pte, _) = child.lookup(AT).unwrap();
    let shared = child.pool().frame(pte.pfn()).flags().contains(FrameFlags::KSM);
    ours.must(!shared, || format!("{pte:?} is shared behind unmergeable (R27)"));
    guests.audit();
    drop(child);
    guests.finish();
}

#[test]
fn r28_a_guest_forks_while_its_page_is_merged() {
    let mutants = [M::ForkedNotCounted, M::ForkOutsidePair, M::SharedReused];
    explore("r28_fork", || forked(Guests::about_to_merge(AdBits::AfterFlush)), &mutants);
}

#[test]
fn r28_a_guest_forks_whose_page_is_merged() {
    let mutants = [M::ForkedNotCounted, M::ForkedAsOrdinary];
    explore("r28_fork_merged", || forked(Guests::merged(AdBits::AfterFlush)), &mutants);
}

/// H forks a guest in the middle of the scan that merges its page: the child has the frame by a pte that does not say so. Then all
/// leave whose ptes do.
fn orphaned() {
    let guests = Guests::about_to_merge(AdBits::AfterFlush);
    let (ours, theirs) = guests.both();
    let mut child = None;
    ours.race([task(|| guests.scan()), task(|| child = ours.mm.fork().ok())]);
    let child = child.unwrap();
    let pfn = |mm: &Mm| mm.lookup(AT).unwrap().0.pfn();
    let shared = |pfn| ours.pool.frame(pfn).flags().contains(FrameFlags::KSM);
    let given_back = pfn(&child);
    child.madvise(AT, PAGE_SIZE, Advice::Unmergeable).unwrap();
    let own = !shared(pfn(&child)) && word(&child, AT) == tagged(AT, 1);
    ours.must(own, || format!("{:?} is shared behind unmergeable (R27)", pfn(&child)));
    guests.audit();
    let other = ours.mm.fork().unwrap();
    ours.must(!shared(given_back) || ours.pool.frame(given_back).map_count() > 0, || {
        "a frame is lost".into()
    });
    for guest in [ours, theirs] {
        writes(guest, &mut guest.vcpu(0), AT, 2);
        guests.audit();
    }
    ours.must(word(&other, AT) == tagged(AT, 1), || "a child's page has changed (I15)".into());
    drop((child, other));
    guests.finish();
}

#[test]
fn r27_who_was_forked_in_the_middle_of_a_merge_shares_no_longer_when_he_says_so() {
    explore("r27_forked", orphaned, &[M::PromoteForked]);
}

/// The same, and nobody says so: the last who has a page of KSM is one whose pte does not say that it is.
fn left_alone() {
    let guests = Guests::about_to_merge(AdBits::AfterFlush);
    let (ours, theirs) = guests.both();
    let mut child = None;
    ours.race([task(|| guests.scan()), task(|| child = ours.mm.fork().ok())]);
    for guest in [ours, theirs] {
        writes(guest, &mut guest.vcpu(0), AT, 2);
        guests.audit();
    }
    let child = child.unwrap();
    ours.must(word(&child, AT) == tagged(AT, 1), || "a child's page has changed (I15)".into());
    guests.settle(AT);
    drop(child);
    guests.finish();
}

#[test]
fn i53_frames_are_counted_that_only_a_forked_child_has() {
    explore("i53_forked", left_alone, &[M::ForkedNotCounted]);
}

/// A page that became one of KSM for a twin that changed its mind is its owner's again, unless it was forked meanwhile.
fn demoted() {
    let guests = Guests::about_to_merge(AdBits::AfterFlush);
    let (ours, _) = guests.both();
    let mut child = None;
    ours.race([
        task(|| {
            let (pte, _) = ours.mm.lookup(AT).unwrap();
            let mut targets = [Target::new(AT.page(), pte.pfn(), MergeInto::Itself)];
            ours.mm.merge(&mut targets, 8);
            if targets[0].outcome == Outcome::Merged {
                ours.mm.demote(AT.page(), pte.pfn());
            }
        }),
        task(|| child = ours.mm.fork().ok()),
        task(|| writes(ours, &mut ours.vcpu(0), AT, 2)),
    ]);
    let child = child.unwrap();
    for mm in [&child, &ours.mm] {
        let (pte, _) = mm.lookup(AT).unwrap();
        let shared = ours.pool.frame(pte.pfn()).flags().contains(FrameFlags::KSM);
        ours.must(shared || !pte.is_ksm(), || format!("{pte:?}, and its frame is none of KSM (I51)"));
    }
    let before = word(&child, AT);
    writes(ours, &mut ours.vcpu(0), AT, 3);
    let after = word(&child, AT);
    ours.must(before == after, || format!("a child's page goes from {before:#x} to {after:#x} (I15)"));
    drop(child);
    drop_pages(ours, AT, 1);
    guests.finish();
}

#[test]
fn i51_a_page_that_others_have_does_not_become_ordinary_again() {
    explore("i51_demoted", demoted, &[M::DemoteShared, M::DemoteNotCounted]);
}

/// Merges are taken back while both guests use the page.
fn unmerged() {
    let guests = Guests::merged(AdBits::AfterFlush);
    let (ours, theirs) = guests.both();
    // It hears of pairs, and of nothing else.
    let device = Device::new(theirs, AT);
    let interval = device.subscribe(theirs);
    device.map_for(theirs, &interval, READ);
    ours.race([
        task(|| guests.ksm.unmerge().unwrap()),
        task(|| {
            let mut vcpu = theirs.vcpu(0);
            (0..4).for_each(|_| reads(theirs, &mut vcpu, AT, 1));
        }),
        task(|| {
            reads(ours, &mut ours.vcpu(1), AT, 1);
            writes(ours, &mut ours.vcpu(1), AT, 2);
        }),
    ]);
    for guest in [ours, theirs] {
        guest.must(!is_merged(&guest.mm, AT), || "a page is merged behind unmerge".into());
    }
    reads(theirs, &mut theirs.vcpu(1), AT, 1);
    device.check(theirs);
    drop(interval);
    guests.finish();
}

#[test]
fn i58_what_a_guest_reads_does_not_change_when_merges_are_taken_back() {
    let mutants = [M::UnmergeOutsidePair, M::UnmergeWithoutCopy, M::UnmergedNotCounted];
    explore("i58_unmerged", unmerged, &mutants);
}

/// Somebody takes every frame there is. Pages that were merged are written nevertheless: frames are kept for them.
fn reserved() {
    let settings = KsmSettings { reserve: 8, ..settings() };
    let guests = Guests::with(AdBits::AfterFlush, settings, [0, 0], 1);
    (0..2).for_each(|_| guests.scan());
    let (ours, theirs) = guests.both();
    assert_eq!(ours.pool.stats().reserve, 2, "one frame for each page that is merged");
    let mut taken = Vec::new();
    let write = |guest: &Machine| {
        let wrote = guest.vcpu(0).write(AT, 2);
        guest.must(wrote.is_ok(), || format!("{wrote:?}: the reserve was for this page"));
    };
    ours.race([
        task(|| {
            for _ in 0..3 {
                ours.pool.alloc_up_to(64, Fill::Overwritten, &mut taken);
            }
        }),
        task(|| write(ours)),
        task(|| write(theirs)),
    ]);
    // It was never less than what was asked for, so never more was taken than that.
    let stats = ours.pool.stats();
    ours.must(stats.reserve_taken <= 2, || format!("{stats:?}: two pages were unshared"));
    ours.pool.put_all(&taken);
    guests.finish();
}

#[test]
fn who_writes_a_merged_page_gets_the_frame_that_was_kept_for_it() {
    explore("reserved", reserved, &[M::UnsharedAsNew, M::ReserveForAll]);
}

/// Every access to a page that may be merged copies it: none is in the shadow map, not even as a neighbour.
fn guarded() {
    let settings = KsmSettings { access: CandidateAccess::CopyOnAccess, ..settings() };
    let guests = Guests::with(AdBits::AfterFlush, settings, [0, 0], 2);
    guests.scan();
    let (ours, theirs) = guests.both();
    let b = page(AT, 1);
    ours.race([
        task(|| {
            let mut vcpu = Vcpu::new(ours, 0, FaultAroundPolicy::Fixed(2));
            (0..3).for_each(|_| reads(ours, &mut vcpu, AT, 1));
        }),
        task(|| {
            reads(theirs, &mut theirs.vcpu(0), b, 1);
            writes(theirs, &mut theirs.vcpu(0), b, 2);
        }),
        task(|| guests.scan()),
    ]);
    for guest in [ours, theirs] {
        for at in [AT, b] {
            let spte = guest.spte(at);
            guest.must(!is_merged(&guest.mm, at) || !spte.is_leaf(), || {
                format!("{spte:?}: a page that is guarded can be read without a fault")
            });
        }
    }
    guests.finish();
}

#[test]
fn every_access_to_a_guarded_page_copies_it() {
    explore("guarded", guarded, &[M::GuardedNotCopied, M::GuardedNeighbour]);
}

/// Two guests of two domains have the same content, and a page each that they write.
fn domains(limit: u32) {
    let settings = KsmSettings { max_page_sharing: limit, ..settings() };
    let guests = Guests::with(AdBits::AfterFlush, settings, [1, 2], 3);
    let (ours, theirs) = guests.both();
    // Two of a content in the first guest: a page of KSM. The third page is a candidate in both.
    let (b, c) = (page(AT, 1), page(AT, 2));
    let same = |guest: &Machine, at: Hva| assert!(guest.poke(at, tagged(b, 1)));
    same(ours, AT);
    guests.scan();
    ours.race([
        task(|| (0..2).for_each(|_| guests.scan())),
        task(|| {
            let mut vcpu = theirs.vcpu(0);
            writes(theirs, &mut vcpu, AT, 2);
            writes(theirs, &mut vcpu, AT, 1);
        }),
    ]);
    (0..3).for_each(|_| guests.scan());
    let frames = |guest: &Machine| [AT, b, c].map(|at| guest.mm.lookup(at).unwrap().0.pfn());
    let (one, other) = (frames(ours), frames(theirs));
    ours.must(one[0] == one[1], || format!("{one:?} have one content, and are of one domain (I51)"));
    ours.must(!other.iter().any(|pfn| one.contains(pfn)), || format!("{one:?}, {other:?}: of two domains"));
    guests.finish();
}

#[test]
fn pages_of_two_domains_are_not_merged() {
    explore("domains", || domains(8), &[M::DomainIgnored]);
}
