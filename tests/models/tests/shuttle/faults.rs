// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Races of a fault against what takes its page away: R1 to R6, R12, R13, R29, R30.
//!
//! V is the vCPU, H a thread of the host. Wherever a frame is freed H uses it for another page at once: whoever still reaches
//! it through an old translation reads a foreign value, or writes one over the page that has the frame now.

use crate::addr::{Hva, HvaRange, PAGE_SIZE};
use crate::cpu::{Vcpu, tagged};
use crate::explore::explore;
use crate::machine::{Machine, RW, page, task};
use crate::mm::Advice;
use crate::mutant::M;
use crate::notifier::Event;
use crate::shadow::FaultAroundPolicy;
use crate::sync::atomic::{AtomicBool, Ordering};

/// H: `madvise(MADV_DONTNEED)`.
pub(crate) fn drop_pages(machine: &Machine, at: Hva, pages: u64) {
    machine.mm.madvise(at, pages * PAGE_SIZE, Advice::DontNeed).unwrap();
}

/// H: writes to the page at `at`, which takes a frame if there is none; then reads what it wrote.
pub(crate) fn reuse(machine: &Machine, at: Hva) {
    machine.poke(at, tagged(at, 7));
    let seen = machine.peek(at);
    machine.must(seen == Some(tagged(at, 7)), || {
        format!("{at} holds {seen:x?}, and only the host wrote there (I24)")
    });
}

/// V: snapshot, looks its page up. H: start, clears the pte, end, frees the frame, which becomes another page. V: installs.
fn r1() {
    let machine = Machine::new();
    let (a, b) = (machine.map(1, RW), machine.map(1, RW));
    machine.race([
        task(|| {
            let mut vcpu = machine.vcpu(0);
            vcpu.write(a, 1).unwrap();
            vcpu.read(a).unwrap();
        }),
        task(|| {
            drop_pages(&machine, a, 1);
            reuse(&machine, b);
        }),
    ]);
    machine.finish();
}

#[test]
fn r1_no_fault_installs_a_page_that_went_away() {
    explore("r1", r1, &[M::NoRetryCheck, M::NoWindow, M::PairEndsEarly, M::FlushNever, M::FreedBeforeStart]);
}

/// V: looks its page up. H: the whole pair. V: snapshot, if it comes too late; installs.
fn r2() {
    let machine = Machine::new();
    let (a, b) = (machine.map(1, RW), machine.map(1, RW));
    machine.race([
        task(|| {
            let mut vcpu = machine.vcpu(0);
            if vcpu.write(a, 1).is_ok() {
                let _ = vcpu.read(a);
            }
        }),
        task(|| {
            machine.mm.munmap(a, PAGE_SIZE).unwrap();
            reuse(&machine, b);
        }),
    ]);
    machine.finish();
}

#[test]
fn r2_the_snapshot_comes_before_the_lookup() {
    explore("r2", r2, &[M::SnapshotAfterLookup, M::NoRetryCheck]);
}

/// H: start. V: snapshot in the window, looks up the pte that is still there. H: clears it, ends the pair in two steps. V comes
/// between them.
fn r3() {
    let machine = Machine::new();
    let (a, b) = (machine.map(1, RW), machine.map(1, RW));
    machine.poke(a, tagged(a, 1));
    machine.race([
        task(|| {
            machine.vcpu(0).read(a).unwrap();
        }),
        task(|| {
            machine.vcpu(1).write(a, 2).unwrap();
        }),
        task(|| {
            drop_pages(&machine, a, 1);
            reuse(&machine, b);
        }),
    ]);
    machine.finish();
}

#[test]
fn r3_the_end_steps_the_sequence_before_the_window_is_closed() {
    explore("r3", r3, &[M::SequenceAfterWindow]);
}

/// H: start. V: snapshot in the window, looks up the pte that is still there. H: clears it; end. V: installs, if the sequence
/// went on at the start only. The page comes along with the one beside it: for the page that faults itself, the look at the
/// windows before the lookup (R31) happens to stand in.
fn r4() {
    let machine = Machine::new();
    let a = machine.map_at(Hva(0x40_0000), 2, RW);
    let (b, c) = (page(a, 1), machine.map(1, RW));
    machine.poke(a, tagged(a, 1));
    machine.poke(b, tagged(b, 1));
    machine.race([
        task(|| {
            let mut vcpu = Vcpu::new(&machine, 0, FaultAroundPolicy::Fixed(2));
            vcpu.read(b).unwrap();
            vcpu.read(a).unwrap();
        }),
        task(|| {
            drop_pages(&machine, a, 1);
            reuse(&machine, c);
        }),
    ]);
    machine.finish();
}

#[test]
fn r4_a_lookup_inside_the_window_is_not_installed_behind_it() {
    explore("r4", r4, &[M::StepAtStart, M::SequenceAfterWindow]);
}

/// V: snapshot, looks up the zero page. H: writes, so the page gets a frame of its own (copy-on-write). V: installs the zero
/// page, and would read zeros for ever.
fn r5() {
    let machine = Machine::new();
    let a = machine.map(1, RW);
    assert_eq!(machine.peek(a), Some(0));
    let written = AtomicBool::new(false);
    machine.race([
        task(|| {
            let mut vcpu = machine.vcpu(0);
            for _ in 0..3 {
                let written = written.load(Ordering::SeqCst);
                let value = vcpu.read(a).unwrap();
                machine.must(!written || value == tagged(a, 1), || {
                    format!("V reads {value:#x} after H has written {:#x} (I24)", tagged(a, 1))
                });
            }
        }),
        task(|| {
            machine.poke(a, tagged(a, 1));
            written.store(true, Ordering::SeqCst);
        }),
    ]);
    machine.finish();
}

#[test]
fn r5_a_page_that_was_replaced_meanwhile_is_not_installed() {
    explore("r5", r5, &[M::SnapshotAfterLookup, M::NoRetryCheck]);
}

/// Two windows of two threads. The end of one must leave the other open.
fn r6() {
    let machine = Machine::new();
    let (a, b, c) = (machine.map(1, RW), machine.map(1, RW), machine.map(1, RW));
    machine.poke(a, tagged(a, 1));
    machine.poke(b, tagged(b, 1));
    machine.race([
        task(|| drop_pages(&machine, a, 1)),
        task(|| {
            drop_pages(&machine, b, 1);
            reuse(&machine, c);
        }),
        task(|| {
            let mut vcpu = machine.vcpu(0);
            vcpu.read(b).unwrap();
            vcpu.write(b, 2).unwrap();
        }),
    ]);
    machine.finish();
}

#[test]
fn r6_the_end_of_one_window_leaves_the_others_open() {
    explore("r6", r6, &[M::EndClosesAll]);
}

/// H1 zaps the leaf and has not flushed. H2 finds nothing to zap, returns, and frees the frame. V writes through its TLB.
fn r12() {
    let machine = Machine::new();
    let (a, b) = (machine.map(1, RW), machine.map(1, RW));
    machine.vcpu(0).write(a, 1).unwrap();
    machine.race([
        task(|| {
            let mut vcpu = machine.vcpu(0);
            vcpu.write(a, 2).unwrap();
            vcpu.write(a, 3).unwrap();
        }),
        task(|| drop_pages(&machine, a, 1)),
        task(|| {
            drop_pages(&machine, a, 1);
            reuse(&machine, b);
        }),
    ]);
    machine.finish();
}

#[test]
fn r12_the_flush_comes_before_the_lock_goes() {
    explore("r12", r12, &[M::FlushAfterUnlock, M::FlushNever]);
}

/// H: takes the page at `at` away without a pair, and tells the listeners behind that, as reclaim did until 4.12.
pub(crate) fn reclaim_unbracketed(machine: &Machine, at: Hva) {
    let mapped = machine.mm.read_map();
    let pte = {
        let leaf = machine.mm.lock_leaf(at).unwrap();
        let index = crate::table::index(at.page(), 1);
        let pte = leaf.get(index);
        leaf.set(index, crate::mm::Pte::NONE);
        pte
    };
    machine.mm.notifiers().invalidate_page(at);
    drop(mapped);
    machine.pool.frame(pte.pfn()).remove_map();
    machine.pool.put(pte.pfn());
}

/// A removal outside of any pair, as `invalidate_page` was until 4.12. V: snapshot, looks its page up. H: takes the pte out,
/// tells the listeners, frees the frame. V: must see that the sequence went on.
fn r13() {
    let machine = Machine::new();
    let (a, b) = (machine.map(1, RW), machine.map(1, RW));
    machine.poke(a, tagged(a, 1));
    machine.race([
        task(|| {
            let mut vcpu = machine.vcpu(0);
            vcpu.read(a).unwrap();
            vcpu.read(a).unwrap();
        }),
        task(|| {
            reclaim_unbracketed(&machine, a);
            reuse(&machine, b);
        }),
    ]);
    machine.finish();
}

#[test]
fn r13_a_removal_outside_of_pairs_steps_the_sequence() {
    explore("r13", r13, &[M::RemovalWithoutStep]);
}

/// One thread's pairs nest: the end of the inner one leaves the outer one open, for the pages that it is about.
fn r29() {
    let machine = Machine::new();
    let a = machine.map(2, RW);
    let b = page(a, 1);
    machine.race([
        task(|| {
            let mapped = machine.mm.read_map();
            let outer = machine.mm.notifiers().invalidate(HvaRange::page(a), Event::Clear);
            drop(machine.mm.notifiers().invalidate(HvaRange::pages_from(a, 2), Event::Clear));
            let spte = machine.spte(a);
            machine.must(!spte.is_present(), || format!("{spte:?} is there, in the outer window (I2)"));
            drop(outer);
            drop(mapped);
        }),
        task(|| {
            machine.vcpu(0).write(a, 1).unwrap();
        }),
        task(|| {
            machine.vcpu(1).write(b, 1).unwrap();
        }),
    ]);
    machine.finish();
}

#[test]
fn r29_the_end_of_an_inner_pair_leaves_the_outer_one_open() {
    explore("r29", r29, &[M::EndClosesAll]);
}

/// H: start for one page. V: faults at the page beside it, and brings along what is mapped around.
fn r30() {
    let machine = Machine::new();
    let a = machine.map_at(Hva(0x40_0000), 2, RW);
    let (b, c) = (page(a, 1), machine.map(1, RW));
    machine.poke(a, tagged(a, 1));
    machine.poke(b, tagged(b, 1));
    machine.race([
        task(|| {
            let mut vcpu = Vcpu::new(&machine, 0, FaultAroundPolicy::Fixed(2));
            vcpu.read(b).unwrap();
            vcpu.read(a).unwrap();
        }),
        task(|| {
            drop_pages(&machine, a, 1);
            reuse(&machine, c);
        }),
    ]);
    machine.finish();
}

#[test]
fn r30_neighbours_are_checked_against_the_windows_too() {
    explore("r30", r30, &[M::NeighbourNotChecked]);
}
