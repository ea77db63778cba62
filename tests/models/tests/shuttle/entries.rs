// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Races of the CPU, which sets A and D in a leaf, against whoever changes the leaf: R11, with aging and with upgrades; and
//! the tables that leaves are in (I31).

use crate::addr::{Gpa, Hva, HvaRange, PAGE_SIZE};
use crate::cpu::{Vcpu, tagged};
use crate::explore::explore;
use crate::faults::reuse;
use crate::frame::{Fill, FrameFlags};
use crate::machine::{Machine, READ, RW, page, task};
use crate::mutant::M;
use crate::shadow::FaultAroundPolicy;
use crate::sync::atomic::{AtomicBool, Ordering};

/// What was written through the leaf of `at` is known to be: D is in the leaf, or with the frame (I25).
pub(crate) fn check_dirty(machine: &Machine, at: Hva) {
    let pte = machine.mm.lookup(at).unwrap().0;
    let (spte, flags) = (machine.spte(at), machine.pool.frame(pte.pfn()).flags());
    machine.must(spte.is_dirty() || flags.contains(FrameFlags::DIRTY), || {
        format!("V wrote to {at}, but neither {spte:?} nor {flags:?} says so (I25)")
    });
}

/// H reads the leaf, D is not set. V writes: the CPU sets D. H clears the leaf.
fn r11() {
    let machine = Machine::new();
    let a = machine.map(1, RW);
    machine.poke(a, tagged(a, 1));
    // Writable, and not dirty.
    machine.vcpu(0).read(a).unwrap();
    let wrote = AtomicBool::new(false);
    machine.race([
        task(|| wrote.store(machine.vcpu(0).write(a, 2).is_ok(), Ordering::SeqCst)),
        task(|| machine.mm.mprotect(a, PAGE_SIZE, READ).unwrap()),
    ]);
    if wrote.load(Ordering::SeqCst) {
        check_dirty(&machine, a);
    }
    machine.finish();
}

#[test]
fn r11_no_dirty_mark_is_lost_when_a_leaf_is_removed() {
    explore("r11", r11, &[M::ZapByStore, M::MarksNotHandedOver]);
}

/// The same for aging, which clears A and must leave D as it is.
fn r11_aging() {
    let machine = Machine::new();
    let a = machine.map(1, RW);
    machine.poke(a, tagged(a, 1));
    machine.vcpu(0).read(a).unwrap();
    machine.race([
        task(|| machine.vcpu(0).write(a, 2).unwrap()),
        task(|| {
            machine.mm.ptep_clear_young_notify(a);
            machine.mm.ptep_clear_flush_young_notify(a);
        }),
        task(|| {
            machine.mm.notifiers().clear_young(HvaRange::page(a));
        }),
    ]);
    check_dirty(&machine, a);
    machine.finish();
}

#[test]
fn r11_aging_loses_no_dirty_mark() {
    explore("r11_aging", r11_aging, &[M::AgeByStore]);
}

/// Two CPUs fault at one page. The one that reads found it read-only; the one that writes was given the right to, which is no
/// invalidation. Whoever comes second must add to the leaf that is there.
fn r11_install() {
    let machine = Machine::new();
    let a = machine.map_shared(1, RW);
    machine.poke(a, tagged(a, 1));
    // Now the pte is read-only, and a write needs no copy.
    machine.mm.mprotect(a, PAGE_SIZE, READ).unwrap();
    machine.mm.mprotect(a, PAGE_SIZE, RW).unwrap();
    machine.race([
        task(|| machine.vcpu(0).write(a, 2).unwrap()),
        task(|| {
            machine.vcpu(1).read(a).unwrap();
        }),
    ]);
    check_dirty(&machine, a);
    machine.finish();
}

#[test]
fn r11_of_two_installs_none_takes_from_the_other() {
    explore("r11_install", r11_install, &[M::InstallByStore]);
}

/// A leaf that the CPU has marked accessed gets more rights, because the page beside it faults.
fn r11_upgrade() {
    let machine = Machine::new();
    let a = {
        let flags = crate::mm::MapFlags::SHARED | crate::mm::MapFlags::FIXED;
        machine.mm.mmap(Hva(0x40_0000), 2 * PAGE_SIZE, RW, flags, crate::mm::Backing::Anonymous).unwrap()
    };
    let b = page(a, 1);
    machine.poke(a, tagged(a, 1));
    machine.poke(b, tagged(b, 1));
    machine.mm.mprotect(a, 2 * PAGE_SIZE, READ).unwrap();
    machine.mm.mprotect(a, 2 * PAGE_SIZE, RW).unwrap();
    machine.race([
        task(|| {
            machine.vcpu(0).read(a).unwrap();
        }),
        task(|| {
            machine.poke(a, tagged(a, 2));
            Vcpu::new(&machine, 1, FaultAroundPolicy::Fixed(2)).write(b, 2).unwrap();
        }),
    ]);
    let young = machine.mm.notifiers().test_young(a);
    machine.must(young, || format!("V has read {a}, but its leaf is {:?} (I48)", machine.spte(a)));
    machine.finish();
}

#[test]
fn r11_more_rights_keep_the_marks() {
    explore("r11_upgrade", r11_upgrade, &[M::UpgradeForgetsMarks]);
}

/// Memory is short, so the next fault takes the frames of page tables without a leaf. V0 remembers where such a table was.
fn i31() {
    let machine = Machine::new();
    let (a, far) = (machine.map_at(Hva(0x40_0000), 1, RW), machine.map_at(Hva(1 << 40), 1, RW));
    machine.vcpu(0).write(a, 1).unwrap();
    machine.mm.munmap(a, PAGE_SIZE).unwrap();
    machine.map_at(a, 1, RW);
    machine.poke(far, tagged(far, 1));
    // Few enough that a path of three tables is there for one of the two only.
    let mut taken = Vec::new();
    machine.pool.alloc_up_to(machine.pool.free_frames() - 4, Fill::Overwritten, &mut taken);
    machine.race([
        task(|| {
            let mut vcpu = machine.vcpu(0);
            let _ = vcpu.read(a);
            let _ = vcpu.write(a, 2);
        }),
        task(|| {
            let _ = machine.shadow().fault(
                &mut crate::shadow::VcpuMmu::new(FaultAroundPolicy::Off),
                Gpa(far.0),
                READ,
            );
        }),
        task(|| {
            let _ = machine.mm.munmap(a, PAGE_SIZE);
        }),
    ]);
    machine.pool.put_all(&taken);
    reuse(&machine, far);
    machine.finish();
}

#[test]
fn i31_tables_are_freed_behind_a_full_flush() {
    explore("i31", i31, &[M::TablesFreedWithoutFlush]);
}
