// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Races about who learns of a write: the scanner takes D, from sptes, frames and ptes, and others want to know of it too: a dirty
//! log, an aging pass, a pair that takes the leaf away.

use crate::addr::HvaRange;
use crate::cpu::tagged;
use crate::explore::explore;
use crate::frame::FrameFlags;
use crate::machine::{Machine, RW, task};
use crate::migration::{Migration, SLOT, Writes, bitmap};
use crate::mutant::M;
use crate::notifier::{Event, WrittenPages};
use crate::shadow::{AdBits, DirtyMethod};
use crate::sharing::{AT, Guests, writes};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::table::index;

/// Asks whether the page at `AT` was written since this was asked last, as a scan does: takes what the primary, the frame, and
/// every secondary have to say.
fn is_written(machine: &Machine) -> bool {
    let mut asked = WrittenPages::new(AT, 1);
    let _map = machine.mm.read_map();
    {
        let (leaf, at) = (machine.mm.lock_leaf(AT).unwrap(), index(AT.page(), 1));
        let pte = leaf.get(at);
        leaf.set(at, pte.clean());
        let frame = machine.pool.frame(pte.pfn());
        let told = !frame.take_flags(FrameFlags::WRITTEN).is_empty();
        let pinned = frame.ref_count() > frame.map_count();
        asked.ask(AT.page());
        if pte.is_dirty() || told || pinned {
            asked.add(AT.page());
        }
    }
    machine.mm.notifiers().test_clear_dirty(&mut asked);
    asked.contains(AT.page())
}

/// V writes, somebody asks again and again, pairs take the leaf away. Who asks copies what was written: a write that was over when
/// he asked is in the copy, unless a pair came between what the frame and what the leaf was asked: then the frame knows. When all is
/// over the copy is the page.
fn asked(ad: AdBits) {
    let machine = Machine::small(ad);
    machine.map_at(AT, 1, RW);
    machine.vcpu(0).write(AT, 1).unwrap();
    let (over, mut copy) = (AtomicU64::new(0), 0);
    let mut round = |machine: &Machine| {
        let before = over.load(Ordering::SeqCst);
        if is_written(machine) {
            copy = machine.peek(AT).unwrap();
        }
        let frame = machine.pool.frame(machine.mm.lookup(AT).unwrap().0.pfn());
        machine.must(copy >= before || frame.flags().contains(FrameFlags::WRITTEN), || {
            format!("{before:#x} was written, and {copy:#x} is known of (I25)")
        });
        copy
    };
    machine.race([
        task(|| {
            let mut vcpu = machine.vcpu(0);
            for n in 2..6 {
                vcpu.write(AT, n).unwrap();
                over.store(tagged(AT, n), Ordering::SeqCst);
            }
        }),
        task(|| {
            (0..3).for_each(|_| {
                round(&machine);
            });
        }),
        task(|| {
            let _mapped = machine.mm.read_map();
            drop(machine.mm.notifiers().invalidate(HvaRange::page(AT), Event::Clear));
        }),
    ]);
    let copy = round(&machine);
    let page = machine.peek(AT).unwrap();
    machine.must(copy == page, || format!("{page:#x} was written, and {copy:#x} is known of (I25)"));
    machine.finish();
}

#[test]
fn i25_a_write_behind_a_question_is_in_the_answer_to_the_next() {
    let mutants = [M::WrittenNotFlushed, M::WrittenNotHandedOver, M::WrittenNotAdded];
    explore("i25_asked", || asked(AdBits::AfterFlush), &mutants);
}

#[test]
fn i25_a_write_is_known_of_where_d_comes_without_a_flush() {
    explore("i25_asked_unflushed", || asked(AdBits::Unflushed), &[M::WrittenNotFlushed]);
}

#[test]
fn i25_a_write_is_known_of_where_cpus_set_no_d() {
    let mutants = [M::WrittenNotFlushed, M::ClearWrittenKeepsWrite];
    explore("i25_asked_no_marks", || asked(AdBits::None), &mutants);
}

/// A migration and the scanner want to know of the same writes.
fn logged(method: DirtyMethod, ad: AdBits) {
    let guests = Guests::about_to_merge(ad);
    let (ours, theirs) = guests.both();
    let all = Writes::default();
    let mut migration = None;
    ours.race([
        task(|| {
            let mut vcpu = ours.vcpu(0);
            [2, 3].into_iter().for_each(|n| all.write(&mut vcpu, 0, AT, n));
        }),
        task(|| {
            ours.shadow().enable_dirty_log(SLOT, bitmap(method)).unwrap();
            let mut begun = Migration::begin(ours, &all, &[AT], bitmap(method));
            (0..2).for_each(|_| begun.round());
            migration = Some(begun);
        }),
        task(|| guests.scan()),
        task(|| guests.scan()),
    ]);
    migration.unwrap().finish();
    writes(theirs, &mut theirs.vcpu(0), AT, 3);
    guests.settle(AT);
    guests.finish();
}

#[test]
fn i34_a_log_by_d_hears_of_what_the_scanner_takes() {
    let mutants = [M::WrittenNotLogged, M::WrittenNotFlushed];
    explore("i34_scanned", || logged(DirtyMethod::DirtyBit, AdBits::AfterFlush), &mutants);
}

/// Somebody asks once while a log begins.
fn log_begins() {
    let machine = Machine::small(AdBits::Unflushed);
    machine.map_at(AT, 1, RW);
    machine.vcpu(0).write(AT, 1).unwrap();
    let all = Writes::default();
    let mut migration = None;
    machine.race([
        task(|| all.write(&mut machine.vcpu(0), 0, AT, 2)),
        task(|| {
            let config = bitmap(DirtyMethod::DirtyBit);
            machine.shadow().enable_dirty_log(SLOT, config).unwrap();
            migration = Some(Migration::begin(&machine, &all, &[AT], config));
        }),
        task(|| {
            let mut asked = WrittenPages::new(AT, 1);
            asked.ask(AT.page());
            machine.mm.notifiers().test_clear_dirty(&mut asked);
        }),
    ]);
    migration.unwrap().finish();
    machine.finish();
}

#[test]
fn i34_a_log_that_begins_hears_of_what_the_scanner_takes() {
    explore("i34_begins", log_begins, &[M::WrittenOfOldSlots, M::WrittenNotLogged]);
}

#[test]
fn i33_a_log_by_write_protection_hears_of_writes_to_merged_pages() {
    explore("i33_scanned", || logged(DirtyMethod::WriteProtect, AdBits::None), &[M::InstallNotRecorded]);
}

/// An aging pass, the scanner, and a guest that writes, whose leaf is taken away now and then: no write is forgotten, or the page
/// would never be merged again.
fn aged(ad: AdBits) {
    let guests = Guests::about_to_merge(ad);
    let (ours, theirs) = guests.both();
    ours.race([
        task(|| {
            let mut vcpu = ours.vcpu(0);
            [2, 3].into_iter().for_each(|n| writes(ours, &mut vcpu, AT, n));
        }),
        task(|| {
            ours.mm.age();
            let _mapped = ours.mm.read_map();
            drop(ours.mm.notifiers().invalidate(HvaRange::page(AT), Event::Clear));
        }),
        task(|| (0..2).for_each(|_| guests.scan())),
    ]);
    writes(theirs, &mut theirs.vcpu(0), AT, 3);
    guests.settle(AT);
    guests.finish();
}

#[test]
fn i51_no_write_to_a_page_is_forgotten_whoever_looks_at_its_marks() {
    let mutants = [M::LookIgnoresFrame, M::WrittenNotHandedOver, M::ForgottenStaysCandidate];
    explore("i51_aged", || aged(AdBits::AfterFlush), &mutants);
}

#[test]
fn i51_no_write_is_forgotten_where_cpus_set_no_marks() {
    explore("i51_aged_no_marks", || aged(AdBits::None), &[M::ClearWrittenKeepsWrite]);
}
