// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Races of memslots that change: R15, R24.

use crate::addr::Gfn;
use crate::cpu::tagged;
use crate::explore::explore;
use crate::faults::drop_pages;
use crate::machine::{Machine, RW, task};
use crate::mutant::M;

/// H: start, finds the slot. M: takes it away, puts it back. H: end, must find what the start found.
fn r15() {
    let machine = Machine::new();
    let a = machine.map(1, RW);
    machine.poke(a, tagged(a, 1));
    machine.race([
        task(|| drop_pages(&machine, a, 1)),
        task(|| {
            machine.shadow().remove_slot(Gfn(0)).unwrap();
        }),
        task(|| {
            let _ = machine.vcpu(0).read(a);
        }),
    ]);
    machine.shadow().add_slot(Machine::slot()).unwrap();
    // A window that nobody closes would keep V out for ever.
    machine.vcpu(0).write(a, 2).unwrap();
    machine.finish();
}

#[test]
fn r15_slots_stay_while_a_pair_is_open() {
    explore("r15", r15, &[M::SlotsDoNotWait]);
}

/// V: finds its slot. M: takes it away. V: must not install behind that.
fn r24() {
    let machine = Machine::new();
    let a = machine.map(1, RW);
    machine.race([
        task(|| {
            let mut vcpu = machine.vcpu(0);
            let _ = vcpu.write(a, 1);
            let _ = vcpu.read(a);
        }),
        task(|| {
            machine.shadow().remove_slot(Gfn(0)).unwrap();
            let spte = machine.spte(a);
            machine.must(!spte.is_present(), || format!("{spte:?} is there, and no slot is (I39)"));
        }),
    ]);
    machine.finish();
}

#[test]
fn r24_a_fault_that_found_a_slot_installs_nothing_when_it_is_gone() {
    explore("r24", r24, &[M::SlotsWithoutStep]);
}
