// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Kicks, from before the entry to after the vCPU's end; and many vCPUs at once.

use super::guest::{CODE, DATA, FOREVER, Guest, RW, STACK_TOP, SYSCALL, start};
use super::{guests, machines};
use crate::engine::{Exit, Kick, Regs, TimeStamps};
use shadow_mmu::frame::FreedFrames;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

#[test]
fn an_endless_loop_is_kicked_every_time() {
    for guest in guests(&FOREVER) {
        let mut vcpu = guest.vcpu();
        let kicker = vcpu.kicker();
        let running = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let running = &running;
            let runner = scope.spawn(move || {
                for _ in 0..200 {
                    running.store(true, Ordering::SeqCst);
                    assert_eq!(vcpu.run().unwrap(), Exit::Kicked);
                    assert_eq!(vcpu.regs().rip, CODE);
                }
            });
            let mut delay = 0;
            while !runner.is_finished() {
                if running.swap(false, Ordering::SeqCst) {
                    // From "before the entry" to "long in the guest".
                    delay = (delay + 7) % 200;
                    let start = Instant::now();
                    while start.elapsed() < Duration::from_micros(delay) {
                        std::hint::spin_loop();
                    }
                    kicker.kick();
                } else {
                    std::thread::yield_now();
                }
            }
        });
    }
}

#[test]
fn a_kick_before_run_counts_once_and_a_kick_without_a_run_harms_nobody() {
    for guest in guests(&SYSCALL) {
        let mut vcpu = guest.vcpu();
        let kicker = vcpu.kicker();
        kicker.kick();
        kicker.kick();
        assert_eq!(vcpu.run().unwrap(), Exit::Kicked);
        assert_eq!(*vcpu.regs(), Regs { rip: CODE, rsp: STACK_TOP - 0x100, ..Regs::default() });
        assert_eq!(vcpu.run().unwrap(), Exit::Syscall);
        // Parked, and then somebody else's: the old handle is void.
        drop(vcpu);
        kicker.kick();
        let mut next = guest.vcpu();
        kicker.kick();
        assert_eq!(next.run().unwrap(), Exit::Syscall);
        // Of a vCPU that is gone with its thread.
        let kicker = std::thread::scope(|scope| {
            let mut last = guest.vcpu();
            scope
                .spawn(move || {
                    assert_eq!(last.run().unwrap(), Exit::Syscall);
                    last.kicker()
                })
                .join()
                .unwrap()
        });
        let mut later = guest.vcpu();
        kicker.kick();
        assert_eq!(later.run().unwrap(), Exit::Syscall);
    }
}

/// However the kicks meet the entries and exits: one that was made before a return is served by it or by the next.
#[test]
fn ten_thousand_kicks_race_with_exits_and_none_is_lost() {
    // again: syscall; jmp again
    for guest in guests(&[0x0f, 0x05, 0xeb, 0xfc]) {
        let mut vcpu = guest.vcpu();
        let kicker = vcpu.kicker();
        let (made, served) = (AtomicU64::new(0), AtomicU64::new(0));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for n in 1..=10_000 {
                    kicker.kick();
                    made.store(n, Ordering::SeqCst);
                    // Not counted while it is pending, so the next waits for it.
                    while served.load(Ordering::SeqCst) < n {
                        std::thread::yield_now();
                    }
                }
            });
            let mut kicks = 0;
            while kicks < 10_000 {
                match vcpu.run().unwrap() {
                    Exit::Syscall => {}
                    Exit::Kicked => {
                        kicks += 1;
                        served.store(kicks, Ordering::SeqCst);
                    }
                    other => panic!("{other:?}"),
                }
            }
        });
        assert_eq!(made.load(Ordering::SeqCst), 10_000);
        // One was served for each that was made: none is left.
        assert_eq!(vcpu.run().unwrap(), Exit::Syscall);
    }
}

#[test]
fn kicks_of_many_threads_before_a_run_are_one() {
    for guest in guests(&SYSCALL) {
        let mut vcpu = guest.vcpu();
        let kicker = vcpu.kicker();
        for _ in 0..20 {
            std::thread::scope(|scope| {
                (0..8).for_each(|_| _ = scope.spawn(|| (0..50).for_each(|_| kicker.kick())));
            });
            assert_eq!(vcpu.run().unwrap(), Exit::Kicked);
            start(&mut *vcpu);
            assert_eq!(vcpu.run().unwrap(), Exit::Syscall);
            start(&mut *vcpu);
        }
    }
}

#[test]
fn kicks_among_faults_and_calls_lose_nothing() {
    // again: inc rbx; syscall; inc rbp; mov [rdi], rbx; jmp again
    let code = [0x48, 0xff, 0xc3, 0x0f, 0x05, 0x48, 0xff, 0xc5, 0x48, 0x89, 0x1f, 0xeb, 0xf3];
    for guest in guests(&code) {
        let mut vcpu = guest.vcpu();
        vcpu.regs_mut().rdi = DATA;
        let kicker: Arc<dyn Kick> = vcpu.kicker();
        let (kicked, done) = (AtomicBool::new(false), AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::SeqCst) {
                    kicker.kick();
                    kicked.store(true, Ordering::SeqCst);
                    std::thread::sleep(Duration::from_micros(20));
                }
            });
            // A busy host may take longer to begin with that thread than all of this takes.
            while !kicked.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
            let (mut calls, mut faults, mut kicks) = (0, 0, 0);
            while calls < 3000 {
                match vcpu.run().unwrap() {
                    Exit::Syscall => calls += 1,
                    // Never mapped: skipped instead.
                    Exit::PageFault { .. } => {
                        faults += 1;
                        vcpu.regs_mut().rip += 3;
                    }
                    Exit::Kicked => kicks += 1,
                    other => panic!("{other:?}"),
                }
                assert_eq!(vcpu.regs().rdi, DATA);
            }
            done.store(true, Ordering::SeqCst);
            assert!(kicks > 0);
            assert_eq!((vcpu.regs().rbx, vcpu.regs().rbp, faults), (calls, calls - 1, calls - 1));
        });
    }
}

#[test]
fn many_vcpus_run_at_once_and_their_frames_come_back() {
    for (pool, engine) in machines(FreedFrames::Poison) {
        let guest = Guest::over(Arc::clone(&pool), engine, &SYSCALL);
        let vcpus: Vec<_> = (0..40).map(|_| guest.vcpu()).collect();
        std::thread::scope(|scope| {
            for mut vcpu in vcpus {
                scope.spawn(move || {
                    for _ in 0..20 {
                        start(&mut *vcpu);
                        assert_eq!(vcpu.run().unwrap(), Exit::Syscall);
                    }
                });
            }
        });
        let mine = guest.frame_count();
        drop(guest);
        let stats = pool.stats();
        assert_eq!(stats.free + mine, stats.frames, "the engine returned every frame");
    }
}

#[test]
fn a_vcpu_may_be_made_in_one_thread_run_in_another_or_never_run_at_all() {
    // mov [rdi], eax; syscall
    for guest in guests(&[0x89, 0x07, 0x0f, 0x05]) {
        guest.map_new(DATA, RW);
        drop(guest.vcpu());
        let mut elsewhere = guest.vcpu();
        std::thread::scope(|scope| {
            let idle = guest.vcpu();
            scope.spawn(move || drop(idle));
            scope.spawn(move || {
                elsewhere.regs_mut().rdi = DATA;
                assert_eq!(elsewhere.run().unwrap(), Exit::Syscall);
            });
        });
        // And two in one, in turn.
        let mut pair = [guest.vcpu(), guest.vcpu()];
        for n in 0..10 {
            let vcpu = &mut pair[n % 2];
            start(&mut **vcpu);
            vcpu.regs_mut().rdi = DATA;
            assert_eq!(vcpu.run().unwrap(), Exit::Syscall);
        }
    }
}

#[test]
fn a_new_vcpu_has_nothing_of_one_that_is_gone() {
    // fld1; syscall
    for guest in guests(&[0xd9, 0xe8, 0x0f, 0x05]) {
        let mut vcpu = guest.vcpu();
        let fresh = vcpu.xsave().unwrap();
        *vcpu.regs_mut() =
            Regs { rip: CODE, rax: 5, r9: 9, fs_base: 0x1000, gs_base: 0x2000, ..Regs::default() };
        vcpu.set_time_stamps(TimeStamps::Trapped);
        assert_eq!(vcpu.run().unwrap(), Exit::Syscall);
        assert_ne!(vcpu.xsave().unwrap(), fresh);
        drop(vcpu);
        // rdtsc; syscall
        guest.rewrite(CODE, &[0x0f, 0x31, 0x0f, 0x05]);
        let mut vcpu = Arc::clone(&guest.vm).create_vcpu(guest.root).unwrap();
        assert_eq!(*vcpu.regs(), Regs::default());
        assert_eq!(vcpu.xsave().unwrap(), fresh);
        start(&mut *vcpu);
        assert_eq!(vcpu.run().unwrap(), Exit::Syscall);
        assert_eq!((vcpu.regs().r9, vcpu.regs().fs_base, vcpu.regs().gs_base), (0, 0, 0));
    }
}
