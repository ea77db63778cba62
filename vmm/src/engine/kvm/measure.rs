// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where the figures in this engine's comments come from. Not tests of anything; run by hand, on a quiet machine:
//! `cargo test --release -p vmm kvm::measure -- --ignored --nocapture --test-threads=1`.

use super::FlushMethod;
use super::testing::*;
use super::window::Run;
use crate::engine::{Engine, Exit, Vcpu};
use kvm_ioctls::SyncReg;
use shadow_mmu::addr::{Access, PAGE_SIZE, Pfn};
use shadow_mmu::frame::Fill;
use shadow_mmu::shadow::Spte;
use shadow_mmu::sync::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

fn us(time: Duration, count: usize) -> f64 {
    time.as_secs_f64() * 1e6 / count as f64
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort();
    us(times[times.len() / 2], 1)
}

#[test]
#[ignore = "a measurement"]
fn exits() {
    const N: usize = 20_000;
    // again: syscall; jmp again
    let Some(guest) = Guest::new(&[0x0f, 0x05, 0xeb, 0xfc]) else { return };
    let mut vcpu = guest.vcpu();
    let mut timed = |name: &str, expected: Exit| {
        start(&mut vcpu);
        let begin = Instant::now();
        (0..N).for_each(|_| assert_eq!(vcpu.run().unwrap(), expected));
        println!("{name:<40} {:6.2} us", us(begin.elapsed(), N));
    };
    timed("syscall exit and back", Exit::Syscall);
    guest.rewrite(CODE, &[0x0f, 0x0b]);
    timed("#UD exit and back", exception(6, 0));
    // mov [0], al
    guest.rewrite(CODE, &[0x88, 0x04, 0x25, 0, 0, 0, 0]);
    timed("page fault, not resolved, and back", page_fault(0, Access::WRITE));
}

/// KVM_RUN that comes back at once, with different registers in the shared page: what each choice costs.
#[test]
#[ignore = "a measurement"]
fn shared_registers() {
    const N: usize = 20_000;
    let Some(guest) = Guest::new(&SYSCALL) else { return };
    let mut vcpu = guest.vcpu();
    assert_eq!(vcpu.run().unwrap(), Exit::Syscall);
    let raw = vcpu.raw_mut();
    let (regs, sregs, events) = (SyncReg::Register, SyncReg::SystemRegister, SyncReg::VcpuEvents);
    let choices: [(&str, &[SyncReg], &[SyncReg]); 6] = [
        ("nothing", &[], &[]),
        ("out: regs", &[regs], &[]),
        ("out: regs, sregs", &[regs, sregs], &[]),
        ("out: regs, sregs; in: regs", &[regs, sregs], &[regs]),
        ("out: regs, sregs; in: regs, sregs", &[regs, sregs], &[regs, sregs]),
        ("out and in: regs, sregs, events", &[regs, sregs, events], &[regs, sregs, events]),
    ];
    raw.fd.set_kvm_immediate_exit(1);
    for (name, out, into) in choices {
        [regs, sregs, events].into_iter().for_each(|set| raw.fd.clear_sync_valid_reg(set));
        out.iter().for_each(|&set| raw.fd.set_sync_valid_reg(set));
        let start = Instant::now();
        for _ in 0..N {
            into.iter().for_each(|&set| raw.fd.set_sync_dirty_reg(set));
            assert!(raw.fd.run().is_err());
        }
        println!("KVM_RUN, {name:<40} {:6.2} us", us(start.elapsed(), N));
    }
}

#[test]
#[ignore = "a measurement"]
fn kicks() {
    const ROUNDS: u64 = 500;
    let Some(guest) = Guest::new(&FOREVER) else { return };
    let mut vcpu = guest.vcpu();
    let kicker = vcpu.kicker();
    let (entering, returned) = (AtomicU64::new(0), Mutex::new(Instant::now()));
    let times = std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 1..=ROUNDS {
                entering.store(2 * round - 1, Ordering::SeqCst);
                assert_eq!(vcpu.run().unwrap(), Exit::Kicked);
                *returned.lock() = Instant::now();
                entering.store(2 * round, Ordering::SeqCst);
            }
        });
        let wait = |value| {
            while entering.load(Ordering::SeqCst) < value {
                std::thread::yield_now();
            }
        };
        let round = |round| {
            wait(2 * round - 1);
            std::thread::sleep(Duration::from_micros(200));
            let kicked = Instant::now();
            kicker.kick();
            wait(2 * round);
            *returned.lock() - kicked
        };
        (1..=ROUNDS).map(round).collect()
    });
    println!("from kick to run's return {:6.2} us (median)", median(times));
}

/// Flushing `runs` single frames, every other frame of the pool, that guests have touched; with vCPUs spinning or none.
#[test]
#[ignore = "a measurement"]
fn flushes() {
    const MOST: usize = 4096;
    // rdi: a page; touch rcx pages, then spin: again: mov [rdi], al; add rdi, 4096; dec ecx; jnz again; syscall; jmp self
    let code = [0x88, 0x07, 0x48, 0x81, 0xc7, 0, 0x10, 0, 0, 0xff, 0xc9, 0x75, 0xf3, 0x0f, 0x05, 0xeb, 0xfe];
    let Some(guest) = Guest::new(&code) else { return };
    let mut frames = Vec::new();
    guest.pool.alloc_up_to(2 * MOST, Fill::Zeros, &mut frames);
    let frames: Vec<Pfn> = frames.into_iter().step_by(2).collect();
    for (n, &frame) in frames.iter().enumerate() {
        guest.map(DATA + n as u64 * PAGE_SIZE, frame, RW);
    }
    for spinning in [0, 1, 2] {
        for count in [1, 2, 4, 8, 16, 64, 256, 1024, 4096] {
            print!("{spinning} vCPUs spinning, {count:5} runs:");
            for method in FlushMethod::ALL {
                let times = (0..9).map(|_| {
                    let mut vcpus: Vec<_> = (0..2).map(|_| guest.vcpu()).collect();
                    let kickers: Vec<_> = vcpus.iter().map(Vcpu::kicker).collect();
                    for vcpu in &mut vcpus {
                        (vcpu.regs_mut().rdi, vcpu.regs_mut().rcx) = (DATA, count as u64);
                        assert_eq!(vcpu.run().unwrap(), Exit::Syscall);
                    }
                    let runs: Vec<_> = frames[..count].iter().map(|&frame| Run::new(frame, 1)).collect();
                    std::thread::scope(|scope| {
                        for vcpu in vcpus.iter_mut().take(spinning) {
                            scope.spawn(|| assert_eq!(vcpu.run().unwrap(), Exit::Kicked));
                        }
                        std::thread::sleep(Duration::from_micros(500));
                        let start = Instant::now();
                        guest.vm.flush_by(method, &runs).unwrap();
                        let took = start.elapsed();
                        kickers.iter().take(spinning).for_each(|kicker| kicker.kick());
                        took
                    })
                });
                print!("  {method} {:8.1} us", median(times.collect()));
            }
            println!();
        }
    }
}

/// A guest touches 512 pages that were installed beforehand, with their window pages populated or not.
#[test]
#[ignore = "a measurement"]
fn prefaults() {
    const PAGES: usize = 512;
    // again: mov [rdi], al; add rdi, 4096; dec ecx; jnz again; syscall
    let code = [0x88, 0x07, 0x48, 0x81, 0xc7, 0, 0x10, 0, 0, 0xff, 0xc9, 0x75, 0xf3, 0x0f, 0x05];
    for (name, step, used) in [
        ("one run, new frames", 1, false),
        ("one run, frames with content", 1, true),
        ("every other frame, new", 2, false),
        ("every other frame, with content", 2, true),
    ] {
        for ahead in [false, true] {
            let Some(guest) = Guest::new(&code) else { return };
            let mut vcpu = guest.vcpu();
            let tlb = Arc::clone(&guest.vm).tlb();
            let (mut populate, mut touch) = (Duration::ZERO, Duration::ZERO);
            for round in 0..8 {
                let at = DATA + round * 512 * PAGE_SIZE;
                let mut frames = Vec::new();
                guest.pool.alloc_up_to(PAGES * step, Fill::Zeros, &mut frames);
                let frames: Vec<Pfn> = frames.into_iter().step_by(step).collect();
                for (n, &frame) in frames.iter().enumerate() {
                    if used {
                        guest.pool.write(frame, 0, &[1]);
                    }
                    let leaf = Spte::leaf(frame, RW).touched(RW);
                    guest.spte(at + n as u64 * PAGE_SIZE).store(leaf.0, Ordering::SeqCst);
                }
                let begin = Instant::now();
                if ahead {
                    tlb.prefault(&frames);
                }
                populate += begin.elapsed();
                start_at(&mut vcpu, at, PAGES);
                let begin = Instant::now();
                assert_eq!(vcpu.run().unwrap(), Exit::Syscall);
                touch += begin.elapsed();
            }
            println!(
                "{name:<34} prefault {ahead:5}: {:5.2} us a page ({:5.2} populate, {:5.2} touch)",
                us(populate + touch, 8 * PAGES),
                us(populate, 8 * PAGES),
                us(touch, 8 * PAGES)
            );
        }
    }
}

fn start_at(vcpu: &mut super::KvmVcpu, address: u64, pages: usize) {
    start(vcpu);
    (vcpu.regs_mut().rdi, vcpu.regs_mut().rcx) = (address, pages as u64);
}

#[test]
#[ignore = "a measurement"]
fn setup() {
    let Some(device) = test_device() else { return };
    for megabytes in [64u64, 1024, 4096] {
        let pool =
            shadow_mmu::frame::FramePool::new(megabytes << 20, shadow_mmu::frame::FreedFrames::Keep).unwrap();
        let pool = std::sync::Arc::new(pool);
        let times = |name: &str, times: Vec<Duration>| {
            println!("{megabytes} MiB: {name:<24} {:8.1} us", median(times))
        };
        let (mut new, mut probe, mut gone) = (Vec::new(), Vec::new(), Vec::new());
        while new.len() < 15 {
            let start = Instant::now();
            let vm = super::KvmVm::new(&device, Arc::clone(&pool)).unwrap();
            new.push(start.elapsed());
            let start = Instant::now();
            vm.probe_flush(super::Effort::Quick).unwrap();
            probe.push(start.elapsed());
            let start = Instant::now();
            drop(vm);
            gone.push(start.elapsed());
        }
        times("KvmVm::new", new);
        times("probe_flush(Quick)", probe);
        times("drop", gone);
    }
}
