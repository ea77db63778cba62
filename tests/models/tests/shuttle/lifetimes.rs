// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Races about who is called when: registration, the end of a listener, the end of the address space, ops that replace a
//! frame: R8, R9, R17, R18, R19, R23, I7, I9.

use crate::addr::{HvaRange, PAGE_SIZE};
use crate::cpu::tagged;
use crate::explore::explore;
use crate::faults::{drop_pages, reuse};
use crate::intervals::Device;
use crate::listeners::{Mirror, Probe};
use crate::machine::{Machine, READ, RW, page, task};
use crate::mutant::M;
use crate::notifier::{Event, Misuse, get};
use crate::sync::Arc;
use crate::sync::atomic::{AtomicBool, Ordering};

/// H replaces a frame (copy-on-write). Whoever sees the new pte must not see the old frame through a secondary.
fn r8() {
    let machine = Machine::new();
    let a = machine.map(1, RW);
    assert_eq!(machine.peek(a), Some(0));
    let mirror = Arc::<Mirror>::default();
    *mirror.frame.lock() = Some(machine.mm.zero_frame());
    machine.mm.register(mirror.clone()).unwrap();
    machine.race([
        task(|| {
            machine.poke(a, tagged(a, 1));
        }),
        task(|| {
            // The CPU that runs the primary takes no lock to use a pte.
            let pte = machine.mm.pte_unlocked(a);
            if pte.is_writable() {
                let seen = *mirror.frame.lock();
                machine.must(seen == Some(pte.pfn()), || {
                    format!("{pte:?} is in use, and a secondary has {seen:?} (R8)")
                });
            }
        }),
    ]);
    machine.finish();
}

#[test]
fn r8_secondaries_change_before_the_pte_does() {
    explore("r8", r8, &[M::ChangePteAfterSet]);
}

/// H1: start over two pages. H2: replaces the frame of one of them. H1: clears its pte and frees the new frame.
fn r9() {
    let machine = Machine::new();
    let (a, c) = (machine.map(2, RW), machine.map(1, RW));
    assert_eq!(machine.peek(a), Some(0));
    machine.race([
        task(|| {
            drop_pages(&machine, a, 2);
            reuse(&machine, c);
        }),
        task(|| {
            machine.poke(a, tagged(a, 1));
        }),
        task(|| {
            let mut vcpu = machine.vcpu(0);
            vcpu.read(a).unwrap();
            vcpu.read(page(a, 1)).unwrap();
        }),
    ]);
    machine.finish();
}

#[test]
fn r9_change_pte_maps_nothing_inside_a_window() {
    explore("r9", r9, &[M::ChangePteMapsNewFrame]);
}

/// The address space says goodbye to its listeners, and goes on changing. V must not get a page any more.
fn r17() {
    let machine = Machine::new();
    let (a, b) = (machine.map(1, RW), machine.map(1, RW));
    machine.poke(a, tagged(a, 1));
    let released = AtomicBool::new(false);
    machine.race([
        task(|| {
            let mut vcpu = machine.vcpu(0);
            for n in 1..3 {
                let released = released.load(Ordering::SeqCst);
                let wrote = vcpu.write(a, n).is_ok();
                machine.must(!(released && wrote), || "V reaches a page after release (I8)".into());
            }
        }),
        task(|| {
            machine.mm.notifiers().release().unwrap();
            released.store(true, Ordering::SeqCst);
            drop_pages(&machine, a, 1);
            reuse(&machine, b);
        }),
    ]);
    machine.finish();
}

#[test]
fn r17_after_release_nothing_is_mapped_ever_again() {
    explore("r17", r17, &[M::ReleaseForgotten]);
}

/// A: unregister finds the listener, calls its release. B: the address space goes, and calls it too. Each must wait for the
/// other's call before what the listener uses is freed.
fn r18() {
    let machine = Machine::new();
    let probe = Probe::new(&machine);
    let subscription = machine.mm.register(probe.clone()).unwrap();
    machine.race([
        task(|| {
            // It may have been taken off already; the wait is the same.
            let removed = machine.mm.unregister(&subscription);
            machine.must(matches!(removed, Ok(()) | Err(Misuse::NotRegistered)), || format!("{removed:?}"));
        }),
        task(|| {
            machine.mm.notifiers().release().unwrap();
            probe.free();
        }),
    ]);
    machine.finish();
}

#[test]
fn r18_the_end_of_the_space_waits_for_an_unregister() {
    explore("r18", r18, &[M::ReleaseDoesNotWait, M::ReleaseOutsideSection]);
}

/// H: a pair. U: unregisters; when that has returned the listener is freed.
fn i7() {
    let machine = Machine::new();
    let a = machine.map(1, RW);
    machine.poke(a, tagged(a, 1));
    let probe = Probe::new(&machine);
    let subscription = machine.mm.register(probe.clone()).unwrap();
    machine.race([
        task(|| drop_pages(&machine, a, 1)),
        task(|| {
            machine.mm.unregister(&subscription).unwrap();
            probe.free();
        }),
    ]);
    machine.finish();
}

#[test]
fn i7_no_op_runs_when_unregister_has_returned() {
    explore("i7", i7, &[M::UnregisterDoesNotWait]);
}

/// H: a pair. U: takes the listener off without waiting, and frees it in a callback.
fn r19() {
    let machine = Machine::new();
    let a = machine.map(1, RW);
    machine.poke(a, tagged(a, 1));
    let probe = Probe::new(&machine);
    let subscription = machine.mm.register(probe.clone()).unwrap();
    machine.race([
        task(|| drop_pages(&machine, a, 1)),
        task(|| {
            machine.mm.notifiers().unregister_no_release(&subscription).unwrap();
            let probe = Arc::clone(&probe);
            machine.mm.notifiers().call_srcu(move || probe.free());
            machine.mm.notifiers().synchronize().unwrap();
        }),
    ]);
    machine.finish();
}

#[test]
fn r19_a_callback_runs_behind_every_op_that_ran() {
    explore("r19", r19, &[M::CallDoesNotWait, M::ListFreedAtOnce]);
}

/// H: start, clears the pte, end, frees the frame. R: makes a shadow map, which registers, and a CPU on it: were that to fall
/// into the pair, the map would not know of the window.
fn i9() {
    let machine = Machine::without_shadow();
    let (a, b) = (machine.map(1, RW), machine.map(1, RW));
    machine.poke(a, tagged(a, 1));
    machine.race([
        task(|| {
            drop_pages(&machine, a, 1);
            reuse(&machine, b);
        }),
        task(|| {
            machine.make_shadow();
            let mut vcpu = machine.vcpu(0);
            vcpu.read(a).unwrap();
            vcpu.read(a).unwrap();
        }),
    ]);
    machine.finish();
}

/// A listener that comes and goes hears of as many ends as of starts (I1).
fn i1() {
    let machine = Machine::new();
    let a = machine.map(1, RW);
    let probe = Probe::new(&machine);
    machine.poke(a, tagged(a, 1));
    machine.race([
        task(|| drop_pages(&machine, a, 1)),
        task(|| machine.mm.mprotect(a, PAGE_SIZE, READ).unwrap()),
        task(|| {
            let subscription = machine.mm.register(probe.clone()).unwrap();
            machine.mm.unregister(&subscription).unwrap();
            let open = probe.open_pairs();
            machine.must(open == 0, || format!("{open} starts without their ends (I1)"));
        }),
    ]);
    machine.finish();
}

#[test]
fn i1_who_hears_a_start_hears_its_end() {
    explore("i1", i1, &[M::UnregisterDoesNotWait]);
}

#[test]
fn i9_registration_falls_into_no_pair() {
    explore("i9", i9, &[M::RegisterWithoutMmapLock]);
}

/// A start that may not block is refused by one listener: those that had agreed get their end, and V goes on.
fn r23() {
    let machine = Machine::new();
    let a = machine.map(1, RW);
    let device = Device::new(&machine, a);
    let interval = device.subscribe(&machine);
    // Newest first: the intervals and the probe agree before the one that refuses is asked.
    let refusing = Probe::refusing(&machine);
    let probe = Probe::new(&machine);
    machine.mm.register(refusing).unwrap();
    machine.mm.register(probe.clone()).unwrap();
    machine.race([
        task(|| {
            let mapped = machine.mm.read_map();
            let refused =
                machine.mm.notifiers().invalidate_nonblock(HvaRange::page(a), Event::Unmap).is_err();
            machine.must(refused, || "one listener refused, and the pair is open (I10)".into());
            drop(mapped);
        }),
        task(|| {
            machine.vcpu(0).write(a, 1).unwrap();
            device.map(&machine, &interval);
        }),
    ]);
    machine.must(probe.open_pairs() == 0, || "a listener that agreed got no end (I10)".into());
    // Waits for ever if the interval got none.
    device.map(&machine, &interval);
    device.check(&machine);
    drop(interval);
    machine.finish();
}

#[test]
fn r23_a_start_that_failed_is_ended_where_it_was_agreed_to() {
    explore("r23", r23, &[M::NonblockWithoutEnds, M::NonblockIntervalsWithoutEnd]);
}

/// Two users of one shared listener. Each hears of every pair while it has it.
fn shared() {
    let machine = Machine::new();
    let a = machine.map(1, RW);
    machine.race([
        task(|| drop(get(&machine.mm, || Probe::of(&machine)).unwrap())),
        task(|| {
            let user = get(&machine.mm, || Probe::of(&machine)).unwrap();
            machine.poke(a, tagged(a, 1));
            let before = user.starts();
            drop_pages(&machine, a, 1);
            machine.must(user.starts() > before, || {
                "a shared listener missed a pair, and it has a user (I9)".into()
            });
        }),
        task(|| drop_pages(&machine, a, 1)),
    ]);
    machine.finish();
}

#[test]
fn i9_a_shared_listener_hears_of_every_pair_while_it_has_users() {
    explore("shared", shared, &[M::GetDoesNotCount]);
}
