// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Races of dirty logs: R16, R20, R20b and I25, I32 to I37. What is checked is at the top of [`migration`](crate::migration).

use crate::addr::{Gpa, Hva, HvaRange};
use crate::cpu::{Vcpu, tagged};
use crate::explore::explore;
use crate::faults::drop_pages;
use crate::frame::Fill;
use crate::iommu::{GuestView, view};
use crate::machine::{Machine, READ, RW, page, task};
use crate::migration::{Migration, SLOT, Writes, bitmap};
use crate::mutant::M;
use crate::notifier::Event;
use crate::shadow::DirtyMethod::{DirtyBit, WriteProtect};
use crate::shadow::{
    AdBits, DirtyLogConfig, DirtyLogError, DirtyMethod, DirtyRecords, DirtyRing, FaultAroundPolicy,
    Initially, ProtectOn, VcpuMmu,
};
use crate::sync::atomic::{AtomicU64, Ordering};
use vm_memory::{GuestAddress, GuestMemory, Permissions};

/// `count` pages beside each other, with values.
fn pages(machine: &Machine, count: u64) -> Vec<Hva> {
    let base = machine.map_at(Hva(0x40_0000), count, RW);
    let pages: Vec<Hva> = (0..count).map(|n| page(base, n)).collect();
    pages.iter().for_each(|&at| assert!(machine.poke(at, tagged(at, 0))));
    pages
}

/// Two vCPUs write to two pages, one of them with fault-around. G asks for reports.
fn writers(config: DirtyLogConfig, ad: AdBits) {
    let machine = Machine::small(ad);
    let pages = pages(&machine, 2);
    let (a, b) = (pages[0], pages[1]);
    // A leaf with W, cached by its CPU, which the log takes.
    machine.vcpu(0).write(a, 0).unwrap();
    machine.shadow().enable_dirty_log(SLOT, config).unwrap();
    let writes = Writes::default();
    let mut migration = Migration::begin(&machine, &writes, &pages, config);
    machine.race([
        task(|| {
            let mut vcpu = machine.vcpu(0);
            writes.write(&mut vcpu, 0, a, 1);
            writes.write(&mut vcpu, 0, a, 3);
            writes.write(&mut vcpu, 1, b, 5);
        }),
        task(|| {
            let mut vcpu = Vcpu::new(&machine, 1, FaultAroundPolicy::Fixed(2));
            writes.write(&mut vcpu, 1, b, 2);
            writes.write(&mut vcpu, 0, a, 4);
        }),
        task(|| (0..2).for_each(|_| migration.round())),
    ]);
    migration.finish();
    machine.finish();
}

#[test]
fn r20_every_write_to_a_protected_page_is_reported() {
    let mutants = [
        M::RecordBeforeWrite,
        M::InstallNotRecorded,
        M::RestoreNotRecorded,
        M::NeighbourWritable,
        M::ReportDoesNotFlush,
        M::SwitchedOnUnarmed,
    ];
    explore("r20", || writers(bitmap(WriteProtect), AdBits::AfterFlush), &mutants);
}

#[test]
fn i32_every_write_that_sets_d_is_reported() {
    let mutants = [M::ReportDoesNotFlush, M::SwitchedOnUnflushed];
    explore("i32_dirty_bit", || writers(bitmap(DirtyBit), AdBits::AfterFlush), &mutants);
}

#[test]
fn r20_cpus_that_set_no_marks_are_logged_by_write_protection() {
    let mutants = [M::RestoreNotRecorded, M::ReportDoesNotFlush];
    explore("r20_no_marks", || writers(bitmap(WriteProtect), AdBits::None), &mutants);
}

fn cleared(method: DirtyMethod) {
    let config = DirtyLogConfig { protect: ProtectOn::Clear, ..bitmap(method) };
    writers(config, AdBits::Unflushed);
}

#[test]
fn r20b_pages_are_copied_behind_the_clear_of_their_records() {
    explore("r20b_protect", || cleared(WriteProtect), &[M::ClearDoesNotFlush, M::RecordAfterWrite]);
}

#[test]
fn r20b_pages_are_copied_behind_the_clear_of_their_d() {
    explore("r20b_dirty_bit", || cleared(DirtyBit), &[M::ClearDoesNotFlush]);
}

/// G switches a log on, copies, asks. V's faults are in flight: at `a`, whose leaf an earlier log has protected, and at `b`,
/// whose leaf has W.
fn switched_on(config: DirtyLogConfig) {
    let machine = Machine::small(AdBits::AfterFlush);
    let pages = pages(&machine, 2);
    let (a, b) = (pages[0], pages[1]);
    machine.vcpu(0).write(a, 0).unwrap();
    machine.shadow().enable_dirty_log(SLOT, bitmap(WriteProtect)).unwrap();
    machine.shadow().disable_dirty_log(SLOT).unwrap();
    machine.vcpu(1).write(b, 0).unwrap();
    let writes = Writes::default();
    let mut migration = None;
    machine.race([
        task(|| (1..4).for_each(|n| writes.write(&mut machine.vcpu(0), 0, a, n))),
        task(|| (1..4).for_each(|n| writes.write(&mut machine.vcpu(1), 1, b, n))),
        task(|| {
            machine.shadow().enable_dirty_log(SLOT, config).unwrap();
            let mut begun = Migration::begin(&machine, &writes, &pages, config);
            begun.round();
            migration = Some(begun);
        }),
        task(|| {
            let report = machine.shadow().audit(&machine.mm);
            let first = report.violations.first();
            machine.must(first.is_none(), || format!("{first:?}"));
        }),
    ]);
    migration.unwrap().finish();
    machine.finish();
}

#[test]
fn i35_no_write_is_missed_by_a_log_that_is_switched_on_meanwhile() {
    let mutants = [M::FastPathWithoutStep, M::SlotsWithoutStep, M::SwitchedOnUnarmed, M::SwitchedOnUnflushed];
    explore("i35", || switched_on(bitmap(WriteProtect)), &mutants);
}

#[test]
fn i35_no_d_is_missed_by_a_log_that_is_switched_on_meanwhile() {
    explore("i35_dirty_bit", || switched_on(bitmap(DirtyBit)), &[M::SwitchedOnUnflushed]);
}

/// Where every page counts as written nothing is armed, so leaves with W must be in the log when it can be seen.
fn all_written() {
    let (protect, initially) = (ProtectOn::Clear, Initially::AllDirty);
    switched_on(DirtyLogConfig { protect, initially, ..bitmap(WriteProtect) });
}

#[test]
fn i33_a_log_that_begins_with_every_page_written_says_so_at_once() {
    explore("i33_all_written", all_written, &[M::AllWrittenUnmarked, M::ClearDoesNotFlush]);
}

/// One thread asks for a report; another ends the log and begins a new one. What the first takes is not missing in the
/// second. That is cleared by its reader, so a report that comes late takes nothing from it.
fn replaced(method: DirtyMethod) {
    let second = DirtyLogConfig { protect: ProtectOn::Clear, ..bitmap(method) };
    let machine = Machine::small(AdBits::AfterFlush);
    let pages = pages(&machine, 1);
    let a = pages[0];
    machine.shadow().enable_dirty_log(SLOT, bitmap(method)).unwrap();
    machine.vcpu(0).write(a, 0).unwrap();
    let writes = Writes::default();
    let mut migration = None;
    machine.race([
        task(|| (1..4).for_each(|n| writes.write(&mut machine.vcpu(0), 0, a, n))),
        task(|| match machine.shadow().get_dirty_log(SLOT) {
            Ok(_) | Err(DirtyLogError::NotLogged(_)) => {}
            Err(error) => machine.must(false, || error.to_string()),
        }),
        task(|| {
            machine.shadow().disable_dirty_log(SLOT).unwrap();
            machine.shadow().enable_dirty_log(SLOT, second).unwrap();
            migration = Some(Migration::begin(&machine, &writes, &pages, second));
        }),
    ]);
    migration.unwrap().finish();
    machine.finish();
}

#[test]
fn r16_a_log_is_switched_on_while_a_report_is_to_flush() {
    explore("r16_report", || replaced(WriteProtect), &[M::ReportFlushesAfterUnlock]);
}

#[test]
fn i34_a_report_of_a_log_that_ended_takes_nothing_from_the_next() {
    explore("i34_replaced", || replaced(DirtyBit), &[M::ReportOfEndedLog]);
}

/// CPUs that set no A: aging takes W too. G's report finds no W to take, and must not be over before the leaf is flushed.
fn r16() {
    let machine = Machine::small(AdBits::None);
    let pages = pages(&machine, 1);
    let a = pages[0];
    machine.shadow().enable_dirty_log(SLOT, bitmap(WriteProtect)).unwrap();
    let writes = Writes::default();
    let mut migration = Migration::begin(&machine, &writes, &pages, bitmap(WriteProtect));
    writes.write(&mut machine.vcpu(0), 0, a, 1);
    machine.race([
        task(|| (2..4).for_each(|n| writes.write(&mut machine.vcpu(0), 0, a, n))),
        task(|| {
            machine.mm.notifiers().clear_young(HvaRange::page(a));
        }),
        task(|| migration.round()),
    ]);
    migration.finish();
    machine.finish();
}

#[test]
fn r16_aging_has_flushed_when_a_report_finds_nothing_to_protect() {
    explore("r16", r16, &[M::AgingFlushesAfterUnlock, M::AgingDoesNotFlush]);
}

/// V writes, H takes the leaf away and leaves the page as it is, somebody ages. D is reported.
fn i25() {
    let machine = Machine::small(AdBits::AfterFlush);
    let pages = pages(&machine, 1);
    let a = pages[0];
    machine.vcpu(0).read(a).unwrap();
    machine.shadow().enable_dirty_log(SLOT, bitmap(DirtyBit)).unwrap();
    let writes = Writes::default();
    let mut migration = Migration::begin(&machine, &writes, &pages, bitmap(DirtyBit));
    machine.race([
        task(|| (1..3).for_each(|n| writes.write(&mut machine.vcpu(0), 0, a, n))),
        task(|| {
            let _mapped = machine.mm.read_map();
            drop(machine.mm.notifiers().invalidate(HvaRange::page(a), Event::Clear));
        }),
        task(|| {
            machine.mm.ptep_clear_young_notify(a);
        }),
        task(|| migration.round()),
    ]);
    migration.finish();
    machine.finish();
}

#[test]
fn i25_d_of_a_leaf_that_is_removed_or_aged_is_reported() {
    explore("i25", i25, &[M::RemovedNotLogged, M::AgeByStore, M::ZapByStore]);
}

/// D moves from the leaf to the bitmap, and the table that the leaf was in is freed, while a report looks for parts.
fn i34_tables() {
    let machine = Machine::new();
    let (a, far) = (machine.map_at(Hva(0x40_0000), 1, RW), machine.map_at(Hva(1 << 40), 1, RW));
    machine.poke(a, tagged(a, 0));
    machine.poke(far, tagged(far, 0));
    machine.shadow().enable_dirty_log(SLOT, bitmap(DirtyBit)).unwrap();
    let writes = Writes::default();
    let mut migration = Migration::begin(&machine, &writes, &[a], bitmap(DirtyBit));
    writes.write(&mut machine.vcpu(0), 0, a, 1);
    // Few enough that `far` gets a path of three tables only where another was.
    let mut taken = Vec::new();
    machine.pool.alloc_up_to(machine.pool.free_frames() - 2, Fill::Overwritten, &mut taken);
    machine.race([
        task(|| {
            let mapped = machine.mm.read_map();
            drop(machine.mm.notifiers().invalidate(HvaRange::page(a), Event::Clear));
            drop(mapped);
            let _ = machine.shadow().fault(&mut VcpuMmu::new(FaultAroundPolicy::Off), Gpa(far.0), READ);
        }),
        task(|| migration.round()),
    ]);
    machine.pool.put_all(&taken);
    migration.finish();
    machine.finish();
}

#[test]
fn i34_a_report_finds_d_while_it_moves_to_the_bitmap() {
    explore("i34_tables", i34_tables, &[M::PartFoundInBitmapFirst, M::RemovedNotLogged]);
}

/// A device writes the `n`-th value of page `which`, at `at`, and then tells of it, as vm-memory does. Others run in between.
fn device_writes(machine: &Machine, view: &GuestView, writes: &Writes, which: usize, at: Hva, n: u64) {
    let mut slices = view.get_slices(GuestAddress(at.0), 8, Permissions::Write).unwrap();
    let slice = slices.next().unwrap().unwrap();
    let pfn = machine.mm.lookup(at).unwrap().0.pfn();
    machine.pool.words(pfn)[0].fetch_max(tagged(at, n), Ordering::SeqCst);
    vm_memory::bitmap::Bitmap::mark_dirty(slice.bitmap(), 0, 8);
    drop(slices);
    writes.over(which, at, n);
}

/// A device and a vCPU write to one page, and the device to the one beside it.
fn device(method: DirtyMethod) {
    let machine = Machine::small(AdBits::AfterFlush);
    let pages = pages(&machine, 2);
    let (a, b) = (pages[0], pages[1]);
    machine.shadow().enable_dirty_log(SLOT, bitmap(method)).unwrap();
    let writes = Writes::default();
    let mut migration = Migration::begin(&machine, &writes, &pages, bitmap(method));
    let view = view(&machine.mm).unwrap();
    machine.race([
        task(|| {
            device_writes(&machine, &view, &writes, 0, a, 2);
            device_writes(&machine, &view, &writes, 1, b, 2);
        }),
        task(|| writes.write(&mut machine.vcpu(0), 0, a, 3)),
        task(|| (0..2).for_each(|_| migration.round())),
    ]);
    drop(view);
    migration.finish();
    machine.finish();
}

#[test]
fn i34_what_a_device_writes_is_reported() {
    explore("i34_device", || device(WriteProtect), &[M::WritesNotLogged, M::TakeByStore]);
}

#[test]
fn i34_what_a_device_writes_is_reported_beside_d() {
    explore("i34_device_dirty_bit", || device(DirtyBit), &[M::WritesNotLogged]);
}

/// H drops a page, which reads as zeros from then on, and V writes another.
fn dropped() {
    let machine = Machine::small(AdBits::AfterFlush);
    let pages = pages(&machine, 2);
    let (a, b) = (pages[0], pages[1]);
    machine.poke(a, tagged(a, 1));
    machine.shadow().enable_dirty_log(SLOT, bitmap(WriteProtect)).unwrap();
    let writes = Writes::default();
    let mut migration = Migration::begin(&machine, &writes, &pages, bitmap(WriteProtect));
    machine.race([
        task(|| drop_pages(&machine, a, 1)),
        task(|| (1..3).for_each(|n| writes.write(&mut machine.vcpu(0), 1, b, n))),
        task(|| (0..2).for_each(|_| migration.round())),
    ]);
    migration.finish();
    machine.finish();
}

#[test]
fn i34_what_is_there_where_a_page_was_is_reported() {
    explore("i34_dropped", dropped, &[M::ZapNotTold, M::WritesNotLogged]);
}

/// Two vCPUs with rings of four entries; who collects does so until both are done. Somebody else resets too.
fn rings() {
    let machine = Machine::small(AdBits::AfterFlush);
    let pages = pages(&machine, 3);
    let config = DirtyLogConfig { records: DirtyRecords::Rings, ..bitmap(WriteProtect) };
    let (mut rings, mut owners) = (Vec::new(), Vec::new());
    for _ in 0..2 {
        let (ring, owner) = DirtyRing::new(4).unwrap();
        machine.shadow().add_dirty_ring(&ring);
        rings.push(ring);
        owners.push(owner);
    }
    machine.shadow().enable_dirty_log(SLOT, config).unwrap();
    let (writes, running) = (Writes::default(), AtomicU64::new(2));
    let mut migration = Migration::begin(&machine, &writes, &pages, config).with_rings(&rings);
    let run = |id: usize, owner, first: u64| {
        let mut vcpu = machine.vcpu(id).with_ring(owner);
        for n in 1..4 {
            let which = ((first + n) % 3) as usize;
            writes.write(&mut vcpu, which, pages[which], 2 * n + first);
        }
        running.fetch_sub(1, Ordering::SeqCst);
    };
    let (one, two) = (owners.pop(), owners.pop());
    machine.race([
        task(|| run(0, one.unwrap(), 0)),
        task(|| run(1, two.unwrap(), 1)),
        task(|| {
            while running.load(Ordering::SeqCst) > 0 {
                migration.round();
                crate::sync::thread::yield_now();
            }
        }),
        task(|| {
            machine.shadow().reset_dirty_rings();
        }),
    ]);
    for ring in &rings {
        let used = ring.used();
        machine.must(used <= 4, || format!("{used} entries of 4 are in use (I36)"));
    }
    migration.finish();
    drop(rings);
    machine.finish();
}

#[test]
fn i36_every_write_makes_an_entry_of_its_ring() {
    let mutants = [
        M::ResetDoesNotFlush,
        M::ResetDoesNotArm,
        M::RecordBeforeWrite,
        M::RestoreNotRecorded,
        M::ResetTakesUnharvested,
        M::RecordAfterWrite,
    ];
    explore("i36_rings", rings, &mutants);
}
