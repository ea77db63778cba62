// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Races of aging on each kind of CPU: those that set A whether flushed or not, those that do after a flush only, and those
//! that never do, where aging takes the leaf's rights and the next fault gives them back: R11, I25, I48, I50. Aging removes
//! no leaf, so R13 is not its business.

use crate::addr::{Hva, HvaRange, PAGE_SIZE};
use crate::cpu::{Vcpu, tagged};
use crate::entries::check_dirty;
use crate::explore::explore;
use crate::faults::{drop_pages, reuse};
use crate::machine::{Machine, READ, RW, page, task};
use crate::mm::PageAge;
use crate::mutant::M;
use crate::notifier::Notifiers;
use crate::shadow::{AdBits, FaultAroundPolicy};
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::thread;

/// CPUs without marks. V0 writes, V1 reads, two threads age, H takes the right to write away: what was written is known to be
/// (I25).
fn tracked() {
    let machine = Machine::with_ad_bits(AdBits::None);
    let a = machine.map(1, RW);
    machine.poke(a, tagged(a, 1));
    machine.vcpu(1).read(a).unwrap();
    let wrote = AtomicBool::new(false);
    let age = || {
        machine.mm.notifiers().clear_young(HvaRange::page(a));
    };
    machine.race([
        task(|| wrote.store(machine.vcpu(0).write(a, 2).is_ok(), Ordering::SeqCst)),
        task(|| {
            machine.vcpu(1).read(a).unwrap();
        }),
        task(age),
        task(age),
        task(|| machine.mm.mprotect(a, PAGE_SIZE, READ).unwrap()),
    ]);
    if wrote.load(Ordering::SeqCst) {
        check_dirty(&machine, a);
    }
    machine.finish();
}

#[test]
fn i25_no_write_is_forgotten_by_access_tracking() {
    let mutants = [M::TrackedForgetsDirty, M::MarksNotHandedOver];
    explore("i25_tracked", tracked, &mutants);
}

/// The same while the leaf stays.
fn tracked_in_place() {
    let machine = Machine::with_ad_bits(AdBits::None);
    let a = machine.map(1, RW);
    machine.poke(a, tagged(a, 1));
    machine.vcpu(1).read(a).unwrap();
    let age = || {
        machine.mm.notifiers().clear_young(HvaRange::page(a));
    };
    machine.race([
        task(|| machine.vcpu(0).write(a, 2).unwrap()),
        task(|| {
            machine.vcpu(1).read(a).unwrap();
        }),
        task(age),
        task(age),
    ]);
    check_dirty(&machine, a);
    machine.finish();
}

#[test]
fn r11_tracking_and_faults_lose_no_dirty_mark() {
    let mutants = [M::AccessTrackByStore, M::RestoreByStore];
    explore("r11_tracked", tracked_in_place, &mutants);
}

/// CPUs without marks. A leaf of the zero page is tracked, and V writes: the primary must be asked. Another leaf goes, and
/// its frame becomes another page's.
fn restored() {
    let machine = Machine::with_ad_bits(AdBits::None);
    let (a, b, c) = (machine.map(1, RW), machine.map(1, RW), machine.map(1, RW));
    assert_eq!(machine.peek(a), Some(0));
    machine.poke(b, tagged(b, 1));
    for at in [a, b] {
        machine.vcpu(0).read(at).unwrap();
    }
    machine.race([
        task(|| {
            let mut vcpu = machine.vcpu(0);
            vcpu.write(a, 2).unwrap();
            vcpu.read(b).unwrap();
            vcpu.read(b).unwrap();
        }),
        task(|| {
            machine.mm.notifiers().clear_young(HvaRange::page(a));
            machine.mm.notifiers().clear_young(HvaRange::page(b));
        }),
        task(|| {
            drop_pages(&machine, b, 1);
            reuse(&machine, c);
        }),
    ]);
    machine.finish();
}

#[test]
fn i50_tracking_gives_back_what_it_took_and_no_more() {
    let mutants = [M::RestoreWithoutLeave, M::RestoreOfNothing, M::FlushNever];
    explore("i50", restored, &mutants);
}

/// V reads again and again, somebody ages: what was read since the last clearing is young, by whatever `clear` and the CPUs
/// are.
fn seen(ad: AdBits, clear: fn(&Notifiers, HvaRange) -> bool) {
    let machine = Machine::with_ad_bits(ad);
    let a = machine.map(1, RW);
    machine.poke(a, tagged(a, 1));
    // Clearings that are over, and how many were when the last read began that is over.
    let (cleared, read) = (AtomicU64::new(0), AtomicU64::new(0));
    machine.race([
        task(|| {
            let mut vcpu = machine.vcpu(0);
            for _ in 0..5 {
                let before = cleared.load(Ordering::SeqCst);
                vcpu.read(a).unwrap();
                read.store(before, Ordering::SeqCst);
            }
        }),
        task(|| {
            machine.vcpu(1).write(a, 2).unwrap();
        }),
        task(|| {
            for n in 0..4 {
                let is_read = n > 0 && read.load(Ordering::SeqCst) == n;
                let tested = machine.mm.notifiers().test_young(a);
                let young = clear(machine.mm.notifiers(), HvaRange::page(a));
                machine.must(!is_read || (tested && young), || {
                    format!("{a} was read since clearing {n}, and looks idle (I48)")
                });
                cleared.store(n + 1, Ordering::SeqCst);
                // Time for a whole read.
                (0..8).for_each(|_| thread::yield_now());
            }
        }),
    ]);
    machine.finish();
}

#[test]
fn i48_a_read_is_seen_by_clear_young_on_every_cpu_that_needs_a_flush() {
    let after_flush = || seen(AdBits::AfterFlush, Notifiers::clear_young);
    explore("i48_after_flush", after_flush, &[M::AgingDoesNotFlush]);
    let no_marks = || seen(AdBits::None, Notifiers::clear_young);
    explore("i48_no_marks", no_marks, &[M::AgingDoesNotFlush]);
}

#[test]
fn i48_a_read_is_seen_by_clear_flush_young_on_every_cpu() {
    let unflushed = || seen(AdBits::Unflushed, Notifiers::clear_flush_young);
    explore("i48_unflushed", unflushed, &[M::AgingDoesNotFlush]);
}

/// The age of the page at `at`.
fn age_of(machine: &Machine, at: Hva) -> Option<PageAge> {
    let mut found = None;
    machine.mm.for_each_age(|_, range, age| {
        if range.contains(at) {
            found = Some(age);
        }
    });
    found
}

/// Passes, while V reads and H moves ptes about: what was read since the last pass has age 0.
fn passes() {
    let machine = Machine::with_ad_bits(AdBits::None);
    let (a, b) = (machine.map(1, RW), machine.map(1, RW));
    for at in [a, b] {
        machine.poke(at, tagged(at, 1));
    }
    let (done, read) = (AtomicU64::new(0), AtomicU64::new(0));
    machine.race([
        task(|| {
            let mut vcpu = machine.vcpu(0);
            for _ in 0..5 {
                let before = done.load(Ordering::SeqCst);
                vcpu.read(a).unwrap();
                read.store(before, Ordering::SeqCst);
            }
        }),
        task(|| {
            machine.vcpu(1).write(b, 2).unwrap();
            drop_pages(&machine, b, 1);
        }),
        task(|| {
            for n in 0..3 {
                let is_read = n > 0 && read.load(Ordering::SeqCst) == n;
                let pass = machine.mm.age();
                let age = age_of(&machine, a);
                machine.must(!is_read || age == Some(PageAge::Passes(0)), || {
                    format!("{a} was read since pass {n}, and has age {age:?} after {pass:?} (I48)")
                });
                done.store(n + 1, Ordering::SeqCst);
                (0..8).for_each(|_| thread::yield_now());
            }
        }),
    ]);
    machine.finish();
}

#[test]
fn i48_what_was_read_since_the_last_pass_has_age_0() {
    explore("i48_passes", passes, &[M::PassIgnoresSecondaries, M::AgingDoesNotFlush]);
}

/// Two pages of one table. V has read both, and remembers where the table is: so it does not go through the link again. A
/// pass that found them young must not make the next one pass over the table.
fn links() {
    let machine = Machine::with_ad_bits(AdBits::Unflushed);
    let a = machine.map_at(Hva(0x40_0000), 2, RW);
    let b = page(a, 1);
    for at in [a, b] {
        machine.poke(at, tagged(at, 1));
    }
    machine.race([
        task(|| {
            let mut vcpu = machine.vcpu(0);
            vcpu.read(a).unwrap();
            vcpu.read(b).unwrap();
            machine.mm.age();
            // Two looks that find nothing make a table one that is passed over.
            for _ in 0..2 {
                // So that it walks to the leaf again, from the table that it remembers.
                machine.tlb.forget_pages(0);
                vcpu.read(b).unwrap();
                machine.mm.age();
                let age = age_of(&machine, b);
                machine.must(age == Some(PageAge::Passes(0)), || {
                    format!("{b} was read since the last pass, and has age {age:?} (I48)")
                });
            }
        }),
        task(|| {
            let _ = Vcpu::new(&machine, 1, FaultAroundPolicy::Fixed(2)).write(a, 2);
        }),
    ]);
    machine.finish();
}

#[test]
fn i48_a_table_that_is_in_use_is_looked_at_again() {
    explore("i48_links", links, &[M::LinkClearedThoughYoung]);
}
