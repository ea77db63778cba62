// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Everything at once: small random programs of vCPUs, of threads that change the address space, of aging, of dirty logs and of
//! listeners that come and go. The programs are drawn from shuttle's own generator, so a replay repeats them.

use crate::addr::{Gpa, Hva, HvaRange, PAGE_SIZE};
use crate::cpu::{CPUS, Vcpu, tagged};
use crate::explore::explore;
use crate::listeners::Probe;
use crate::machine::{Machine, READ, RW, page, task};
use crate::migration::{Migration, SLOT, Writes};
use crate::mm::{Advice, Backing, MapFlags, RemapFlags};
use crate::mutant::M;
use crate::shadow::{
    AdBits, DirtyLogConfig, DirtyMethod, DirtyRecords, FaultAroundPolicy, Initially, NoTlb, ProtectOn,
    ShadowMmu, VcpuMmu,
};
use crate::sync::Arc;
use shuttle::rand::{Rng, thread_rng};

/// Pages that the programs are about, at [`BASE`].
const PAGES: u64 = 4;
const BASE: Hva = Hva(0x40_0000);

fn below(bound: u64) -> u64 {
    thread_rng().gen_range(0..bound)
}

fn any_page() -> Hva {
    page(BASE, below(PAGES))
}

/// A run of pages.
fn any_run() -> (Hva, u64) {
    let first = below(PAGES);
    (page(BASE, first), 1 + below(PAGES - first))
}

fn run_vcpu(machine: &Machine, id: usize) {
    let policy = [FaultAroundPolicy::Off, FaultAroundPolicy::Fixed(4), FaultAroundPolicy::Adaptive];
    let mut vcpu = Vcpu::new(machine, id, policy[below(3) as usize]);
    for n in 0..4 {
        // What is not mapped is refused; what is wrong is noted.
        if below(2) == 0 {
            let _ = vcpu.read(any_page());
        } else {
            let _ = vcpu.write(any_page(), n);
        }
    }
}

/// Whether the host's programs fork.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Forks {
    Yes,
    No,
}

fn run_host(machine: &Machine, forks: Forks) {
    let mm = &machine.mm;
    let mut children = Vec::new();
    for _ in 0..3 {
        let (at, pages) = any_run();
        let len = pages * PAGE_SIZE;
        // What an operation refuses, because another was there before, is as good as what it does.
        match below(9) {
            // The child goes at once, or when the program is over.
            8 if forks == Forks::Yes => children.extend(mm.fork().ok().filter(|_| below(2) == 0)),
            // A hole, where the memory is shared.
            7 => drop(mm.madvise(at, len, Advice::Remove)),
            0 => drop(mm.munmap(at, len)),
            1 => drop(machine.map_at(at, pages, if below(2) == 0 { RW } else { READ })),
            2 => drop(mm.madvise(at, len, Advice::DontNeed)),
            3 => drop(mm.mprotect(at, len, if below(2) == 0 { RW } else { READ })),
            4 => {
                machine.poke(at, tagged(at, 7));
                // As by a system call, which tells.
                mm.written(HvaRange::page(at));
            }
            5 => drop(machine.peek(at)),
            // The page keeps its values, which are another page's now; so it is dropped where it lands.
            _ => {
                let to = Hva(0x80_0000);
                let flags = RemapFlags::MAYMOVE | RemapFlags::FIXED;
                if mm.mremap(at, PAGE_SIZE, PAGE_SIZE, flags, to).is_ok() {
                    let _ = mm.munmap(to, PAGE_SIZE);
                }
            }
        }
    }
}

fn run_aging(machine: &Machine) {
    for _ in 0..2 {
        let (at, pages) = any_run();
        let range = HvaRange::pages_from(at, pages);
        match below(6) {
            0 => machine.mm.notifiers().clear_young(range),
            1 => machine.mm.notifiers().clear_flush_young(range),
            2 => machine.mm.ptep_clear_young_notify(at),
            3 => machine.mm.ptep_clear_flush_young_notify(at),
            4 => machine.mm.pmdp_clear_young_notify(at),
            _ => machine.mm.test_young(at),
        };
    }
}

fn run_listener(machine: &Machine) {
    let probe = Probe::new(machine);
    let subscription = machine.mm.register(probe.clone()).unwrap();
    machine.mm.unregister(&subscription).unwrap();
    probe.free();
    // A second shadow map, which no CPU walks, comes and goes too.
    let Ok(shadow) = ShadowMmu::new(Arc::clone(&machine.mm), Arc::new(NoTlb)) else { return };
    shadow.add_slot(Machine::slot()).unwrap();
    let mut vcpu = VcpuMmu::new(FaultAroundPolicy::Fixed(4));
    let _ = shadow.fault(&mut vcpu, Gpa(any_page().0), READ);
}

fn storm(forks: Forks) {
    let machine = Machine::new();
    let shared = [MapFlags::PRIVATE, MapFlags::SHARED][below(2) as usize];
    machine.mm.mmap(BASE, PAGES * PAGE_SIZE, RW, shared | MapFlags::FIXED, Backing::Anonymous).unwrap();
    for _ in 0..2 {
        let at = any_page();
        machine.poke(at, tagged(at, 7));
    }
    const { assert!(CPUS >= 2) };
    machine.race([
        task(|| run_vcpu(&machine, 0)),
        task(|| run_vcpu(&machine, 1)),
        task(|| run_host(&machine, forks)),
        task(|| run_host(&machine, forks)),
        task(|| run_aging(&machine)),
        task(|| run_listener(&machine)),
    ]);
    machine.finish();
}

/// Some log of writes that `ad` allows. One that begins with every page that is there would not have what only an object has.
fn any_log(ad: AdBits, shared: MapFlags) -> DirtyLogConfig {
    let methods = [DirtyMethod::WriteProtect, DirtyMethod::DirtyBit];
    let method = methods[below(if ad == AdBits::None { 1 } else { 2 }) as usize];
    // No vCPU has a ring, so all is in the bitmap.
    let rings = method == DirtyMethod::WriteProtect && below(2) == 0;
    let records = if rings { DirtyRecords::Rings } else { DirtyRecords::Bitmap };
    let protect = [ProtectOn::Get, ProtectOn::Clear][below(2) as usize];
    let all = protect == ProtectOn::Clear && shared == MapFlags::PRIVATE && below(2) == 0;
    let initially = if all { Initially::AllDirty } else { Initially::Clean };
    DirtyLogConfig { method, records, protect, initially }
}

/// The same programs, aged by passes, on CPUs of any kind, with a log that begins somewhere in the middle, and audits.
fn storm_logged() {
    let ad = [AdBits::Unflushed, AdBits::AfterFlush, AdBits::None][below(3) as usize];
    let machine = Machine::small(ad);
    let shared = [MapFlags::PRIVATE, MapFlags::SHARED][below(2) as usize];
    machine.mm.mmap(BASE, PAGES * PAGE_SIZE, RW, shared | MapFlags::FIXED, Backing::Anonymous).unwrap();
    let pages: Vec<Hva> = (0..PAGES).map(|n| page(BASE, n)).collect();
    let config = any_log(ad, shared);
    let (writes, mut migration) = (Writes::default(), None);
    machine.race([
        task(|| run_vcpu(&machine, 0)),
        task(|| run_vcpu(&machine, 1)),
        task(|| run_host(&machine, Forks::No)),
        task(|| {
            run_aging(&machine);
            machine.mm.age();
        }),
        task(|| {
            machine.shadow().enable_dirty_log(SLOT, config).unwrap();
            let begun = migration.insert(Migration::begin(&machine, &writes, &pages, config));
            (0..2).for_each(|_| begun.round());
        }),
        task(|| {
            for _ in 0..2 {
                let report = machine.shadow().audit(&machine.mm);
                let first = report.violations.first();
                machine.must(first.is_none(), || format!("{config:?}: {first:?}"));
                let primary = machine.mm.audit();
                let first = primary.violations.first();
                machine.must(first.is_none(), || format!("{config:?}: {first:?}"));
                let free = machine.mm.pool().audit(0).violations;
                machine.must(free.is_empty(), || format!("{config:?}: {free:?}"));
            }
        }),
    ]);
    migration.unwrap().finish();
    machine.finish();
}

#[test]
fn nothing_goes_wrong_in_a_storm_that_is_logged() {
    let mutants = [M::ReportDoesNotFlush, M::SwitchedOnUnarmed, M::RemovedNotLogged, M::ZapNotTold];
    explore("storm_logged", storm_logged, &mutants);
}

#[test]
fn nothing_goes_wrong_in_a_storm() {
    let mutants = [
        M::NoRetryCheck,
        M::SnapshotAfterLookup,
        M::NeighbourNotChecked,
        M::ProtectOutsidePair,
        M::UnregisterDoesNotWait,
    ];
    explore("storm", || storm(Forks::No), &mutants);
}

/// No mutants here: a task that fails while it has a child would drop that too, in a space that is broken.
#[test]
fn nothing_goes_wrong_in_a_storm_with_forks() {
    explore("storm_forks", || storm(Forks::Yes), &[]);
}
