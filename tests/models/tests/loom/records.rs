// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What dirty logs keep: the words of the bitmap (I34), rings (I36), and whether there is a log at all (I37). Parts of two
//! words and rings of two entries, see `build.rs`.

use crate::addr::Gfn;
use crate::exhaust::{Preemptions, exhaust, refute};
use crate::mm::write_logs::WriteLogs;
use crate::mutant::M;
use crate::shadow::dirty::bitmap::Bitmap;
use crate::shadow::dirty::pages::{PART, WORDS};
use crate::shadow::dirty::ring::{DirtyGfn, DirtyRing, RING_LEAST, VcpuRing};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Arc, Mutex};
use loom::thread;

const EVERY: [u64; WORDS] = [!0; WORDS];

/// Two pages of one word are marked while a report takes what is there.
fn mark_and_take() {
    let bitmap = Arc::new(Bitmap::new(PART, 2));
    bitmap.mark(0);
    let marker = thread::spawn({
        let bitmap = Arc::clone(&bitmap);
        move || bitmap.mark(1)
    });
    let other = thread::spawn({
        let bitmap = Arc::clone(&bitmap);
        move || bitmap.mark(2)
    });
    let first = bitmap.take(0, &EVERY)[0];
    marker.join().unwrap();
    other.join().unwrap();
    let second = bitmap.take(0, &EVERY)[0];
    assert_eq!(
        (first | second, first & second),
        (0b111, 0),
        "each page is reported once: {first:b}, {second:b}"
    );
}

#[test]
fn i34_each_bit_is_taken_once_and_none_is_lost() {
    let mutants = [M::MarkByStore, M::TakeByStore, M::PartDroppedWithBits];
    exhaust("mark_and_take", Preemptions::AtMost(3), mark_and_take, &mutants);
}

/// A device writes to a page that is marked already, and marks it, while a report takes the mark and reads the page. Either
/// the reader sees the write, or the next report has the page.
fn write_and_take() {
    let (bitmap, page) = (Arc::new(Bitmap::new(PART, 2)), Arc::new(AtomicU64::new(0)));
    bitmap.mark(0);
    let device = thread::spawn({
        let (bitmap, page) = (Arc::clone(&bitmap), Arc::clone(&page));
        move || {
            page.store(1, Ordering::Relaxed);
            bitmap.mark(0);
        }
    });
    let taken = bitmap.take(0, &EVERY)[0];
    let seen = page.load(Ordering::Relaxed);
    device.join().unwrap();
    assert_eq!(taken, 1);
    assert!(
        seen == 1 || bitmap.contains(0),
        "a write that its reader has not seen is in no later report (I34)"
    );
}

#[test]
fn i34_a_mark_that_was_there_already_does_not_hide_a_write() {
    exhaust("write_and_take", Preemptions::Any, write_and_take, &[M::TakeDoesNotWait]);
}

/// Beyond the limit of parts all pages of a part count as written. A report gives the part bits; what is marked meanwhile
/// stays.
fn whole_part() {
    let bitmap = Arc::new(Bitmap::new(PART, 0));
    bitmap.mark(5);
    let marker = thread::spawn({
        let bitmap = Arc::clone(&bitmap);
        move || bitmap.mark(1)
    });
    let mut only = [0; WORDS];
    only[0] = 0b11;
    bitmap.give_bits_of_its_own(0);
    let first = bitmap.take(0, &only)[0];
    marker.join().unwrap();
    let second = bitmap.take(0, &EVERY);
    assert_eq!(first, 0b11, "all pages count as written");
    assert!(
        second[0] | 0b10 == !0b01 && second[1] == !0,
        "the others are still to be told: {second:x?} (I37)"
    );
}

#[test]
fn i37_a_part_that_is_written_as_a_whole_is_told_as_a_whole() {
    exhaust("whole_part", Preemptions::Any, whole_part, &[M::PartDroppedWithBits]);
}

fn gfn(page: u64) -> DirtyGfn {
    DirtyGfn { slot: Gfn(page + 1), page }
}

fn push(vcpu: &mut VcpuRing, page: u64) -> bool {
    vcpu.push(gfn(page))
}

/// The vCPU pushes three entries into a ring of two, the collector harvests twice, somebody resets twice.
fn three_parties() {
    let (ring, mut vcpu) = DirtyRing::new(RING_LEAST).unwrap();
    let owner = thread::spawn(move || {
        let pushed: Vec<u64> = (1..4).filter(|&page| push(&mut vcpu, page)).collect();
        (pushed, vcpu)
    });
    let resetter = thread::spawn({
        let ring = Arc::clone(&ring);
        move || {
            let mut back = Vec::new();
            ring.take_back(|entry| back.push(entry));
            back
        }
    });
    let mut harvested = Vec::new();
    ring.harvest(|entry| harvested.push(entry));
    let (pushed, vcpu) = owner.join().unwrap();
    let mut back = resetter.join().unwrap();
    ring.harvest(|entry| harvested.push(entry));
    ring.take_back(|entry| back.push(entry));
    let expected: Vec<DirtyGfn> = pushed.iter().copied().map(gfn).collect();
    assert_eq!(harvested, expected, "what was pushed is harvested, once and in order (I36)");
    assert_eq!(back, expected, "what was harvested is taken back, once and in order (I36)");
    assert_eq!(vcpu.ring().used(), 0);
}

#[test]
fn i36_entries_are_pushed_harvested_and_taken_back_in_order() {
    let mutants =
        [M::RingFlagFirst, M::RingFlagRelaxed, M::HarvestRelaxed, M::RingNeverFull, M::ResetTakesUnharvested];
    exhaust("three_parties", Preemptions::AtMost(2), three_parties, &mutants);
}

/// A ring that is full and harvested: the vCPU goes on as soon as it is told of an entry that was taken back.
fn around() {
    let (ring, mut vcpu) = DirtyRing::new(RING_LEAST).unwrap();
    assert!(push(&mut vcpu, 1) && push(&mut vcpu, 2));
    assert!(ring.is_soft_full());
    assert_eq!(ring.harvest(|_| {}), 2);
    let owner = thread::spawn(move || push(&mut vcpu, 3));
    let mut back = Vec::new();
    ring.take_back(|entry| back.push(entry.page));
    let pushed = owner.join().unwrap();
    let mut harvested = Vec::new();
    ring.harvest(|entry| harvested.push(entry));
    assert_eq!(back, [1, 2]);
    assert_eq!(harvested, if pushed { vec![gfn(3)] } else { vec![] }, "an entry is lost (I36)");
    assert_eq!(ring.is_soft_full(), pushed);
}

#[test]
fn i36_the_owner_finds_free_what_it_is_told_is_free() {
    exhaust("around", Preemptions::Any, around, &[M::ResetBeforeFree]);
}

/// Two threads reset one ring, of which entry 1 is harvested. Whether they have the list of rings meanwhile is asked of the
/// caller.
fn two_resets(listed: bool) {
    let (ring, mut vcpu) = DirtyRing::new(RING_LEAST).unwrap();
    assert!(push(&mut vcpu, 1));
    assert_eq!(ring.harvest(|_| {}), 1);
    let list = Arc::new(Mutex::new(()));
    let reset = |ring: &Arc<DirtyRing>| {
        let (ring, list) = (Arc::clone(ring), Arc::clone(&list));
        move || {
            let _list = listed.then(|| list.lock());
            ring.take_back(|_| {})
        }
    };
    let other = thread::spawn(reset(&ring));
    let here = reset(&ring)();
    assert_eq!(here + other.join().unwrap(), 1, "one entry was taken back twice (I36)");
    assert_eq!(ring.used(), 0);
}

#[test]
fn i36_entries_are_taken_back_by_one_thread_at_a_time() {
    exhaust("resets", Preemptions::Any, || two_resets(true), &[]);
    refute("resets without the list of rings", Preemptions::Any, || two_resets(false));
}

/// A device writes while a log begins, whose reader copies the page first of all. The write is told, or in the copy.
fn begin() {
    let (logs, page) = (Arc::new(WriteLogs::default()), Arc::new(AtomicU64::new(0)));
    let device = thread::spawn({
        let (logs, page) = (Arc::clone(&logs), Arc::clone(&page));
        move || {
            page.store(1, Ordering::Relaxed);
            logs.is_open()
        }
    });
    let _log = WriteLogs::begin(&logs);
    let copied = page.load(Ordering::Relaxed);
    let told = device.join().unwrap();
    assert!(told || copied == 1, "a write is neither told nor in what the log begins with (I37)");
}

#[test]
fn i37_a_write_is_told_or_in_what_the_log_begins_with() {
    let mutants = [M::LogBegunWithoutFence, M::WriteToldWithoutFence];
    exhaust("begin", Preemptions::Any, begin, &mutants);
}
