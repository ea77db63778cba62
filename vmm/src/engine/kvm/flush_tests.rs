// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Flushing, with vCPUs that write through entries while these are changed.

use super::probe_guest::{Pace, with_guest};
use super::testing::*;
use super::{Backend, Change, Effort, FlushMethod, KvmVcpu};
use crate::engine::conformance::flush::{COUNT, wait_for_change, zapped};
use crate::engine::{Engine, Exit, Vcpu};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

fn counting(guest: &Guest) -> KvmVcpu {
    let mut vcpu = guest.vcpu();
    vcpu.regs_mut().rdi = DATA;
    vcpu
}

#[test]
fn the_chosen_methods_pass_200_rounds_of_every_change() {
    let Some(guest) = Guest::new(&SYSCALL) else { return };
    let report = guest.vm.probe_flush(Effort::Quick).unwrap();
    assert!(!report.chosen.is_empty());
    // Spinning vCPUs on few CPUs make a round take scheduler ticks.
    for (pace, rounds) in [(Pace::Napping, 200), (Pace::Spinning, 20)] {
        let stale = with_guest(&guest.vm, pace, |prober| {
            let mut stale = Vec::new();
            for &method in &report.chosen {
                for change in Change::ALL {
                    for round in 0..rounds {
                        if prober.round(method, change)?.unwrap().stale {
                            stale.push((method, change, round));
                        }
                    }
                }
            }
            Ok(stale)
        });
        assert_eq!(stale.unwrap(), [], "{pace:?}");
    }
}

/// The probe can tell: where KVM shadows guest tables, flushing nothing leaves every translation stale.
#[test]
fn the_control_is_stale_on_shadowing_hosts() {
    let Some(guest) = Guest::new(&SYSCALL) else { return };
    let backend = guest.vm.facts.backend;
    if !matches!(backend, Backend::Pvm | Backend::Shadow) {
        println!("skipped: {backend:?} shadows no guest tables");
        return;
    }
    for pace in [Pace::Spinning, Pace::Napping] {
        let stale = with_guest(&guest.vm, pace, |prober| {
            let mut stale = 0;
            for change in Change::ALL.into_iter().cycle().take(20) {
                stale += usize::from(prober.round(FlushMethod::Nothing, change)?.unwrap().stale);
            }
            Ok(stale)
        });
        let stale = stale.unwrap();
        // The host may drop a translation by itself now and then.
        assert!(stale >= 16, "{pace:?}: {stale} of 20");
    }
}

#[test]
fn a_thorough_probe_tries_everything_and_chooses_what_passed() {
    let Some(guest) = Guest::new(&SYSCALL) else { return };
    let free = guest.pool.free_frames();
    let report = guest.vm.probe_flush(Effort::Thorough { rounds: 3 }).unwrap();
    for method in FlushMethod::ALL.into_iter().chain([FlushMethod::Nothing]) {
        let rows: Vec<_> = report.rows.iter().filter(|row| row.method == method).collect();
        let refused = rows.iter().any(|row| row.refused.is_some());
        assert!(refused || rows.len() == Change::ALL.len(), "{rows:?}");
        let passed = !refused && rows.iter().all(|row| row.stale == 0);
        assert_eq!(report.chosen.contains(&method), passed && method != FlushMethod::Nothing, "{rows:?}");
    }
    assert!(report.chosen.contains(&FlushMethod::WindowMadvise));
    // The two vCPUs stay, parked, with two pages each and a table for them; nothing else.
    assert!(free - guest.pool.free_frames() <= 5);
    assert_eq!(guest.vm.parked.lock().len(), 2);
}

#[test]
fn vcpus_that_are_held_stay_out_and_come_back() {
    let Some(guest) = Guest::new(&COUNT) else { return };
    let frame = guest.map_new(DATA, RW);
    let mut vcpus = [counting(&guest), counting(&guest)];
    let kickers = vcpus.each_ref().map(Vcpu::kicker);
    std::thread::scope(|scope| {
        for vcpu in &mut vcpus {
            scope.spawn(|| assert_eq!(vcpu.run().unwrap(), Exit::Kicked));
        }
        for _ in 0..50 {
            wait_for_change(&guest, frame);
            guest.vm.flusher.with_all_held(|| {
                let before = guest.word(frame, 0);
                std::thread::sleep(Duration::from_micros(100));
                assert_eq!(guest.word(frame, 0), before);
                // A second holder meanwhile.
                guest.vm.flusher.with_all_held(|| assert_eq!(guest.word(frame, 0), before));
                assert_eq!(guest.word(frame, 0), before);
            });
        }
        wait_for_change(&guest, frame);
        kickers.iter().for_each(|kicker| kicker.kick());
    });
}

#[test]
fn without_a_method_that_works_the_guest_is_stopped_for_good() {
    let Some(guest) = Guest::new(&COUNT) else { return };
    let frame = guest.map_new(DATA, RW);
    let mut vcpu = counting(&guest);
    let mut idle = guest.vcpu();
    drop(guest.vcpu());
    std::thread::scope(|scope| {
        let runner = scope.spawn(|| vcpu.run());
        wait_for_change(&guest, frame);
        guest.vm.flusher.set_working(&[]);
        let old = guest.spte(DATA).swap(0, Ordering::SeqCst);
        Arc::clone(&guest.vm).tlb().flush(&[zapped(DATA, old)]);
        // The promise holds all the same.
        let before = guest.word(frame, 0);
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(guest.word(frame, 0), before);
        assert!(runner.join().unwrap().is_err());
    });
    assert!(idle.run().is_err());
    // A vCPU that was parked, and a new one.
    assert!(guest.vcpu().run().is_err());
    let (mut one, mut two) = (guest.vcpu(), guest.vcpu());
    assert!(one.run().is_err() && two.run().is_err());
}
