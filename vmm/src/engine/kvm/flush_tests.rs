// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Flushing, with vCPUs that write through entries while these are changed.

use super::probe_guest::{Pace, with_guest};
use super::testing::*;
use super::{Backend, Change, Effort, FlushMethod, KvmVcpu};
use crate::engine::{Exit, Vcpu};
use shadow_mmu::addr::{Access, Gfn, PAGE_SIZE, Pfn};
use shadow_mmu::frame::Fill;
use shadow_mmu::shadow::{Spte, Zapped};
use std::sync::atomic::Ordering;
use std::time::Duration;

/// inc qword ptr [rdi]; jmp to it.
const COUNT: [u8; 5] = [0x48, 0xff, 0x07, 0xeb, 0xfb];

fn counting(guest: &Guest) -> KvmVcpu {
    let mut vcpu = guest.vcpu();
    vcpu.regs_mut().rdi = DATA;
    vcpu
}

/// Waits until the word changes.
fn wait_for_change(guest: &Guest, frame: Pfn) {
    let before = guest.word(frame, 0);
    while guest.word(frame, 0) == before {
        std::thread::yield_now();
    }
}

fn zapped(address: u64, old: u64) -> Zapped {
    Zapped { gfn: Gfn(address / PAGE_SIZE), level: 1, old: Spte(old) }
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
    if !matches!(guest.vm.facts().kvm_backend, Backend::Pvm | Backend::Shadow) {
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

/// The promise itself: once `flush` has returned, the frame is ours alone.
#[test]
fn a_flushed_frame_is_not_written_any_more() {
    let Some(guest) = Guest::new(&COUNT) else { return };
    guest.vm.probe_flush(Effort::Quick).unwrap();
    let tlb = guest.vm.tlb();
    let mut vcpu = counting(&guest);
    let kicker = vcpu.kicker();
    std::thread::scope(|scope| {
        let runner = scope.spawn(|| {
            let mut faults = 0;
            loop {
                match vcpu.run().unwrap() {
                    Exit::PageFault { .. } => {
                        faults += 1;
                        guest.map(DATA, guest.pool.alloc(Fill::Zeros).unwrap(), RW);
                    }
                    Exit::Kicked => return faults,
                    other => panic!("{other:?}"),
                }
            }
        });
        for round in 0..300 {
            while guest.spte(DATA).load(Ordering::SeqCst) == 0 {
                std::thread::yield_now();
            }
            let frame = Spte(guest.spte(DATA).load(Ordering::SeqCst)).pfn();
            wait_for_change(&guest, frame);
            let old = guest.spte(DATA).swap(0, Ordering::SeqCst);
            match round % 3 {
                0 => tlb.flush_all(),
                1 => tlb.flush(&[zapped(DATA, old)]),
                // With others in the batch: the same frame, and ones that no guest ever saw.
                _ => tlb.flush(&[0, 4, 8, 12, 16, 20, 24, 28].map(|n| zapped(DATA, old + n * PAGE_SIZE))),
            }
            guest.pool.words(frame)[0].store(0x5555, Ordering::SeqCst);
            std::thread::sleep(Duration::from_micros(50));
            assert_eq!(guest.word(frame, 0), 0x5555, "round {round}");
            guest.pool.put(frame);
        }
        kicker.kick();
        assert!(runner.join().unwrap() >= 300);
    });
}

#[test]
fn odd_batches_are_flushed_like_others() {
    let Some(guest) = Guest::new(&SYSCALL) else { return };
    let tlb = guest.vm.tlb();
    let frame = guest.pool.alloc(Fill::Zeros).unwrap();
    let leaf = Spte::leaf(frame, Access::READ);
    tlb.flush(&[]);
    tlb.flush(&[zapped(DATA, leaf.0); 1000]);
    tlb.flush(&[Zapped { gfn: Gfn(0), level: 3, old: Spte::leaf(Pfn(0), RW) }]);
    tlb.flush(&[zapped(DATA, Spte::leaf(Pfn(u32::MAX), RW).0), zapped(DATA, 0)]);
    tlb.prefault(&[Pfn(u32::MAX), frame, frame]);
    tlb.prefault(&[]);
    // The VM has not been stopped by any of this.
    assert_eq!(guest.vcpu().run().unwrap(), Exit::Syscall);
}

/// A KVM that shadows guest tables goes on using the table that it knows under an entry of an upper level, until
/// everything is dropped.
#[test]
fn a_full_flush_covers_entries_of_upper_levels() {
    // mov rax, [rdi]; syscall
    let Some(guest) = Guest::new(&[0x48, 0x8b, 0x07, 0x0f, 0x05]) else { return };
    guest.vm.probe_flush(Effort::Quick).unwrap();
    let tlb = guest.vm.tlb();
    let (near, far) = (guest.map_new(DATA, RW), guest.map_new(DATA + (1 << 21), RW));
    guest.pool.write(near, 0, &1u64.to_le_bytes());
    guest.pool.write(far, 0, &2u64.to_le_bytes());
    let mut vcpu = guest.vcpu();
    let mut read = || {
        start(&mut vcpu);
        vcpu.regs_mut().rdi = DATA;
        assert_eq!(vcpu.run().unwrap(), Exit::Syscall);
        vcpu.regs().rax
    };
    // The two entries of level 2, one behind the other.
    let entries = guest.entry(DATA, 2);
    let swap = || {
        let table = guest.pool.words(entries.0);
        let first = table[entries.1].swap(table[entries.1 + 1].load(Ordering::SeqCst), Ordering::SeqCst);
        table[entries.1 + 1].store(first, Ordering::SeqCst);
        tlb.flush_all();
    };
    for _ in 0..20 {
        assert_eq!(read(), 1);
        swap();
        assert_eq!(read(), 2);
        swap();
    }
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
        guest.vm.tlb().flush(&[zapped(DATA, old)]);
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
