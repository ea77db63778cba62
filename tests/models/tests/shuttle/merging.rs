// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Races of merging: a page that is written, pinned, freed, or no longer to be merged while the scanner is at it: R10, R10b, R22,
//! R26, R27, R28. What must hold is at the top of [`sharing`](crate::sharing).

use crate::addr::{HvaRange, PAGE_SIZE, Pfn};
use crate::cpu::tagged;
use crate::explore::explore;
use crate::faults::drop_pages;
use crate::frame::FrameFlags;
use crate::intervals::Device;
use crate::machine::{Machine, READ, RW, page, task};
use crate::mm::{Advice, FaultRequest, MergeAny, MergeInto, Mm, Target};
use crate::mutant::M;
use crate::shadow::AdBits;
use crate::sharing::{AT, Guests, is_merged, reads, settings, word, writes};
use crate::sync::Arc;
use crate::sync::atomic::Ordering;

/// V writes while its page is merged with that of the other guest, which reads.
fn r10(ad: AdBits) {
    let guests = Guests::about_to_merge(ad);
    let (ours, theirs) = guests.both();
    ours.race([
        task(|| {
            let mut vcpu = ours.vcpu(0);
            [2, 3, 1].into_iter().for_each(|n| writes(ours, &mut vcpu, AT, n));
        }),
        task(|| {
            let mut vcpu = theirs.vcpu(0);
            (0..3).for_each(|_| reads(theirs, &mut vcpu, AT, 1));
        }),
        task(|| (0..2).for_each(|_| guests.scan())),
    ]);
    guests.settle(AT);
    guests.finish();
}

#[test]
fn r10_no_write_is_lost_to_a_merge() {
    let mutants = [M::MergeProtectsOutsidePair, M::FlushNever];
    explore("r10", || r10(AdBits::AfterFlush), &mutants);
}

#[test]
fn r10_no_write_is_lost_to_a_merge_where_cpus_set_no_marks() {
    let mutants = [M::MergeProtectsOutsidePair, M::ClearWrittenKeepsWrite];
    explore("r10_no_marks", || r10(AdBits::None), &mutants);
}

/// Merges the page of `guest`, as a scan does that has found it equal.
fn merge(guest: &Machine, into: MergeInto) {
    let pfn = guest.mm.lookup(AT).unwrap().0.pfn();
    guest.mm.merge(&mut [Target::new(AT.page(), pfn, into)], 8);
}

/// Makes the page of `guest` one of KSM, and returns its frame, held.
fn promote(guest: &Machine) -> Pfn {
    merge(guest, MergeInto::Itself);
    let pfn = guest.mm.lookup(AT).unwrap().0.pfn();
    assert!(guest.pool.get_ksm(pfn), "a page that is quiet becomes one of KSM");
    pfn
}

/// Lets go of `shared`, of which the index knows nothing, and of the pages; checks.
fn leave(guests: Guests, shared: Pfn) {
    guests.of[0].pool.put(shared);
    guests.of.iter().for_each(|guest| drop_pages(guest, AT, 1));
    guests.finish();
}

/// A device that hears of pairs, and of nothing else, looks the page up while it is merged.
fn replaced() {
    let guests = Guests::about_to_merge(AdBits::AfterFlush);
    let (ours, theirs) = guests.both();
    let shared = promote(theirs);
    let device = Device::new(ours, AT);
    let interval = device.subscribe(ours);
    ours.race([
        task(|| merge(ours, MergeInto::Frame(shared))),
        task(|| (0..2).for_each(|_| device.map_for(ours, &interval, READ))),
    ]);
    device.check(ours);
    drop(interval);
    leave(guests, shared);
}

#[test]
fn i42_a_page_changes_its_frame_inside_a_pair() {
    explore("i42_merge", replaced, &[M::MergeReplacesOutsidePair]);
}

/// The pages of `guests` are equal, and that of the second guest becomes a page of KSM. Merges the first guest's with it while
/// `write` runs, which writes that to 3 in the end. What a scan does before and behind it is left out: less to schedule.
fn into(guests: Guests, write: fn(&Machine)) {
    let (ours, theirs) = guests.both();
    let shared = promote(theirs);
    ours.race([task(|| write(ours)), task(|| merge(ours, MergeInto::Frame(shared)))]);
    reads(ours, &mut ours.vcpu(1), AT, 3);
    reads(theirs, &mut theirs.vcpu(1), AT, 1);
    leave(guests, shared);
}

#[test]
fn r10_what_a_cpu_writes_while_its_page_is_merged_stays() {
    let scenario = || {
        into(Guests::about_to_merge(AdBits::AfterFlush), |guest| {
            let mut vcpu = guest.vcpu(0);
            [2, 3].into_iter().for_each(|n| writes(guest, &mut vcpu, AT, n));
        });
    };
    explore("r10_cpu", scenario, &[M::MergeProtectsOutsidePair]);
}

/// The host writes, by faults of the primary alone: no pair of its own tells the scanner.
#[test]
fn r10b_what_is_written_between_compare_and_replace_stays() {
    let scenario = || {
        into(Guests::about_to_merge(AdBits::Unflushed), |guest| {
            for n in [2, 3] {
                guest.poke(AT, tagged(AT, n));
                let seen = guest.peek(AT);
                guest.must(seen == Some(tagged(AT, n)), || {
                    format!("{n} was written, {seen:x?} is read (I52)")
                });
            }
        });
    };
    explore("r10b", scenario, &[M::MergeReplacesAnyPte]);
}

/// Pages of one hash, and of two contents: that nobody has written a page for long does not make it equal.
fn collided(into: fn(Pfn) -> MergeInto) {
    let guests = Guests::about_to_merge(AdBits::AfterFlush);
    let (ours, theirs) = guests.both();
    writes(ours, &mut ours.vcpu(0), AT, 3);
    guests.scan();
    let shared = promote(theirs);
    ours.race([
        task(|| merge(ours, into(shared))),
        task(|| {
            let mut vcpu = ours.vcpu(0);
            (0..3).for_each(|_| reads(ours, &mut vcpu, AT, 3));
        }),
    ]);
    reads(ours, &mut ours.vcpu(1), AT, 3);
    leave(guests, shared);
}

#[test]
fn i52_pages_are_merged_because_of_their_bytes() {
    explore("i52_frame", || collided(MergeInto::Frame), &[M::MergeWithoutComparison]);
}

#[test]
fn i52_pages_of_zeros_are_merged_because_of_their_bytes() {
    explore("i52_zero", || collided(|_| MergeInto::Zero), &[M::ZeroWithoutComparison]);
}

/// Somebody holds a pin, and writes by it when he likes.
fn pinned(guest: &Machine) {
    let pinned = guest.mm.fault(&FaultRequest::one_page(AT, RW)).unwrap();
    let word = &guest.pool.words(pinned.required().pfn)[0];
    [2, 2, 3].into_iter().for_each(|n| word.store(tagged(AT, n), Ordering::SeqCst));
    drop(pinned);
    let seen = guest.peek(AT);
    guest.must(seen == Some(tagged(AT, 3)), || format!("{seen:x?} is read, 3 was written by a pin (R22)"));
}

/// The mark of the pin's write was taken long ago, and the write comes now.
fn r22() {
    let guests = Guests::about_to_merge(AdBits::AfterFlush);
    let (ours, theirs) = guests.both();
    let shared = promote(theirs);
    let pinned = ours.mm.fault(&FaultRequest::one_page(AT, RW)).unwrap();
    guests.scan();
    ours.race([
        task(|| {
            let word = &ours.pool.words(pinned.required().pfn)[0];
            [1, 1, 3].into_iter().for_each(|n| word.store(tagged(AT, n), Ordering::SeqCst));
        }),
        task(|| merge(ours, MergeInto::Frame(shared))),
    ]);
    drop(pinned);
    reads(ours, &mut ours.vcpu(1), AT, 3);
    reads(theirs, &mut theirs.vcpu(1), AT, 1);
    leave(guests, shared);
}

#[test]
fn r22_a_page_is_not_merged_while_somebody_may_write_it() {
    explore("r22", r22, &[]);
}

/// Both guests write the same new value, each at its own time: a page that is merged has the content that it is known by.
fn promoted() {
    let guests = Guests::about_to_merge(AdBits::AfterFlush);
    let (ours, theirs) = guests.both();
    let write = |guest: &Machine| writes(guest, &mut guest.vcpu(0), AT, 2);
    ours.race([task(|| write(ours)), task(|| write(theirs)), task(|| guests.scan())]);
    guests.audit();
    guests.settle(AT);
    guests.finish();
}

#[test]
fn i51_a_page_is_known_by_the_content_that_it_has() {
    explore("i51_promoted", promoted, &[M::MergeWritten]);
}

/// The same while the scanner looks: it takes the mark of the write when the pin is taken, and the write may come later.
fn r22_scanned() {
    let guests = Guests::about_to_merge(AdBits::AfterFlush);
    let (ours, theirs) = guests.both();
    ours.race([task(|| pinned(ours)), task(|| (0..2).for_each(|_| guests.scan()))]);
    writes(theirs, &mut theirs.vcpu(0), AT, 3);
    guests.settle(AT);
    guests.finish();
}

#[test]
fn r22_a_page_is_not_taken_for_quiet_while_somebody_may_write_it() {
    explore("r22_scanned", r22_scanned, &[M::LookIgnoresPins]);
}

/// The same of a page that the scanner is told to look at first, and hashes at once.
fn hinted() {
    let guests = Guests::about_to_merge(AdBits::AfterFlush);
    let (ours, theirs) = guests.both();
    writes(theirs, &mut theirs.vcpu(0), AT, 3);
    ours.race([
        task(|| {
            let pinned = ours.mm.fault(&FaultRequest::one_page(AT, RW)).unwrap();
            guests.ksm.hint(&ours.mm, HvaRange::page(AT));
            ours.pool.words(pinned.required().pfn)[0].store(tagged(AT, 3), Ordering::SeqCst);
        }),
        task(|| (0..2).for_each(|_| guests.scan())),
    ]);
    guests.settle(AT);
    guests.finish();
}

#[test]
fn r22_a_page_that_somebody_may_write_is_not_hashed_for_a_hint() {
    explore("r22_hinted", hinted, &[]);
}

/// A frame that the index knows goes, and is the same guest's again, for the same address and content, but its own. A page that
/// is found equal to what it was must not get it.
fn r26() {
    let guests = Guests::merged(AdBits::AfterFlush);
    let (ours, theirs) = guests.both();
    // A frame of its own again, of the same content: quiet for a pass.
    writes(theirs, &mut theirs.vcpu(0), AT, 2);
    writes(theirs, &mut theirs.vcpu(0), AT, 1);
    guests.scan();
    ours.race([
        task(|| {
            // No CPU of it takes part: less to schedule.
            drop_pages(ours, AT, 1);
            ours.poke(AT, tagged(AT, 1));
            ours.poke(AT, tagged(AT, 3));
        }),
        task(|| {
            guests.scan();
            let seen = word(&theirs.mm, AT);
            theirs.must(seen == tagged(AT, 1), || {
                format!("{seen:#x} is read, which another guest wrote (R26)")
            });
        }),
    ]);
    writes(theirs, &mut theirs.vcpu(0), AT, 3);
    guests.settle(AT);
    guests.finish();
}

#[test]
fn r26_a_frame_that_was_freed_is_not_merged_into() {
    explore("r26", r26, &[M::MergedNotHeld]);
}

/// The keyhole alone: somebody looks a page of KSM up, all who have it leave, and one of them gets the frame for another page.
fn keyhole() {
    let guests = Guests::merged(AdBits::AfterFlush);
    let (ours, theirs) = guests.both();
    let pfn = ours.mm.lookup(AT).unwrap().0.pfn();
    drop_pages(theirs, AT, 1);
    ours.race([
        task(|| {
            if ours.pool.get_ksm(pfn) {
                let (flags, seen) =
                    (ours.pool.frame(pfn).flags(), ours.pool.words(pfn)[0].load(Ordering::SeqCst));
                ours.must(flags.contains(FrameFlags::KSM) && seen == tagged(AT, 1), || {
                    format!("{flags:?}, {seen:#x}: a reference to somebody else's page (R26)")
                });
                ours.pool.put(pfn);
            }
        }),
        task(|| {
            drop_pages(ours, AT, 1);
            ours.poke(AT, tagged(AT, 3));
        }),
    ]);
    guests.finish();
}

#[test]
fn r26_a_page_is_looked_up_that_goes_meanwhile() {
    explore("r26_keyhole", keyhole, &[M::KeyholeLooksOnce, M::KeyholeTakesFree]);
}

/// Pages are not to be merged any longer: when that is said they have frames of their own, and keep them.
fn r27(say_no: fn(&Machine)) {
    let guests = Guests::about_to_merge(AdBits::AfterFlush);
    let (ours, theirs) = guests.both();
    ours.race([
        task(|| {
            say_no(ours);
            for _ in 0..2 {
                let merged = is_merged(&ours.mm, AT);
                ours.must(!merged, || "a page is merged that is not to be (R27)".into());
                ours.mm.notifiers().test_young(AT);
            }
        }),
        task(|| {
            let mut vcpu = theirs.vcpu(0);
            (0..2).for_each(|_| reads(theirs, &mut vcpu, AT, 1));
        }),
        task(|| (0..2).for_each(|_| guests.scan())),
    ]);
    ours.must(!is_merged(&ours.mm, AT), || "a page is merged that is not to be (R27)".into());
    reads(ours, &mut ours.vcpu(0), AT, 1);
    guests.finish();
}

#[test]
fn r27_nothing_is_merged_behind_unmergeable() {
    let scenario = || r27(|guest| guest.mm.madvise(AT, PAGE_SIZE, Advice::Unmergeable).unwrap());
    let mutants = [M::MergeableNotCheckedAgain, M::UnmergeableUnlocked];
    explore("r27", scenario, &mutants);
}

#[test]
fn r27_nothing_is_merged_behind_the_end_of_merge_any() {
    let scenario = || {
        r27(|guest| {
            guest.mm.set_merge_any(MergeAny::On).unwrap();
            guest.mm.set_merge_any(MergeAny::Off).unwrap();
        });
    };
    explore("r27_merge_any", scenario, &[M::MergeableNotCheckedAgain]);
}

/// An address space goes while its pages wait to be merged.
fn r28(go: fn(Arc<Mm>)) {
    let guests = Guests::with(AdBits::AfterFlush, settings(), [0, 0], 2);
    let (ours, theirs) = guests.both();
    let child = theirs.mm.fork().unwrap();
    // A frame of its own, of the same content as the other guest's.
    for at in [AT, page(AT, 1)] {
        let pinned = child.fault(&FaultRequest::one_page(at, RW)).unwrap();
        child.pool().words(pinned.required().pfn)[0].store(tagged(at, 1), Ordering::SeqCst);
    }
    guests.scan();
    ours.race([
        task(move || go(child)),
        task(|| guests.scan()),
        task(|| {
            writes(ours, &mut ours.vcpu(0), AT, 2);
            writes(ours, &mut ours.vcpu(0), AT, 1);
        }),
    ]);
    guests.settle(AT);
    guests.finish();
}

#[test]
fn r28_an_address_space_is_dropped_in_the_middle_of_a_scan() {
    explore("r28", || r28(drop), &[]);
}

#[test]
fn r28_an_address_space_is_released_in_the_middle_of_a_scan() {
    explore("r28_release", || r28(|child| child.release()), &[]);
}
