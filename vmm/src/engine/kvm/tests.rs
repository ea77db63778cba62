// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The engine, with real guests of a few instructions: entry, exits, registers, kicks, reuse. Every test builds a VM of
//! its own. What a hostile guest may try is in `hostile`, flushing in `flush_tests`.

use super::testing::*;
use crate::engine::{Exit, Kick, Regs, TimeStamps, Vcpu};
use shadow_mmu::addr::Access;
use shadow_mmu::frame::FreedFrames;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

#[test]
fn a_guest_faults_calls_and_gets_its_results() {
    // mov [rdi], rax; syscall; mov rbx, rax; mov rdx, [rdi]; syscall
    let code = [0x48, 0x89, 0x07, 0x0f, 0x05, 0x48, 0x89, 0xc3, 0x48, 0x8b, 0x17, 0x0f, 0x05];
    let Some(guest) = Guest::new(&code) else { return };
    let mut vcpu = guest.vcpu();
    let regs = vcpu.regs_mut();
    (regs.rax, regs.rdi, regs.r15) = (0x1122_3344_5566_7788, DATA + 8, 15);
    assert_eq!(vcpu.run().unwrap(), page_fault(DATA + 8, Access::WRITE));
    assert_eq!(vcpu.regs().rip, CODE);
    let frame = guest.map_new(DATA, RW);
    assert_eq!(vcpu.run().unwrap(), Exit::Syscall);
    assert_eq!(guest.word(frame, 1), 0x1122_3344_5566_7788);
    let regs = vcpu.regs();
    assert_eq!((regs.rip, regs.rcx, regs.rsp, regs.r15), (CODE + 5, CODE + 5, STACK_TOP - 0x100, 15));
    assert_eq!(regs.rflags & !0xd5, 0x202);
    vcpu.regs_mut().rax = 77;
    assert_eq!(vcpu.run().unwrap(), Exit::Syscall);
    assert_eq!((vcpu.regs().rbx, vcpu.regs().rdx), (77, 0x1122_3344_5566_7788));
}

#[test]
fn every_register_goes_in_and_comes_out() {
    let Some(guest) = Guest::new(&[0xcc]) else { return };
    let mut vcpu = guest.vcpu();
    let regs = Regs {
        rax: 1,
        rbx: 2,
        rcx: 3,
        rdx: 4,
        rsi: 5,
        rdi: 6,
        rbp: 7,
        rsp: STACK_TOP - 8,
        r8: 8,
        r9: 9,
        r10: 10,
        r11: 11,
        r12: 12,
        r13: 13,
        r14: 14,
        r15: u64::MAX,
        rip: CODE,
        rflags: 0xad7,
        fs_base: 0x7fff_1234_5678,
        gs_base: 0xffff_8000_0000_0000,
    };
    *vcpu.regs_mut() = regs;
    assert_eq!(vcpu.run().unwrap(), exception(3, 0));
    // IF is always set; the instruction is one byte long.
    assert_eq!(*vcpu.regs(), Regs { rip: CODE + 1, rflags: 0xad7 | 0x200, ..regs });
}

#[test]
fn accesses_are_told_apart() {
    // mov al, [rdi]; syscall; jmp rsi
    let Some(guest) = Guest::new(&[0x8a, 0x07, 0x0f, 0x05, 0xff, 0xe6]) else { return };
    let mut vcpu = guest.vcpu();
    (vcpu.regs_mut().rdi, vcpu.regs_mut().rsi) = (DATA, DATA + 4);
    assert_eq!(vcpu.run().unwrap(), page_fault(DATA, Access::READ));
    guest.map_new(DATA, RW);
    assert_eq!(vcpu.run().unwrap(), Exit::Syscall);
    // Present, but not executable.
    assert_eq!(vcpu.run().unwrap(), page_fault(DATA + 4, Access::EXEC));
    assert_eq!(vcpu.regs().rip, DATA + 4);
}

#[test]
fn the_cpu_marks_what_it_touches() {
    // mov al, [rdi]; syscall; mov [rdi], al; syscall
    let Some(guest) = Guest::new(&[0x8a, 0x07, 0x0f, 0x05, 0x88, 0x07, 0x0f, 0x05]) else { return };
    let mut vcpu = guest.vcpu();
    vcpu.regs_mut().rdi = DATA;
    guest.map_new(DATA, RW);
    let marks = || guest.spte(DATA).load(Ordering::SeqCst) >> 5 & 3;
    assert_eq!(marks(), 0);
    assert_eq!(vcpu.run().unwrap(), Exit::Syscall);
    assert_eq!(marks(), 1, "A after a read");
    assert_eq!(vcpu.run().unwrap(), Exit::Syscall);
    assert_eq!(marks(), 3, "A and D after a write");
}

#[test]
fn the_guest_moves_its_segment_bases() {
    // wrfsbase rax; mov rbx, fs:[0]; rdgsbase rdx; syscall
    let code = [
        0xf3, 0x48, 0x0f, 0xae, 0xd0, 0x64, 0x48, 0x8b, 0x1c, 0x25, 0, 0, 0, 0, 0xf3, 0x48, 0x0f, 0xae, 0xca,
        0x0f, 0x05,
    ];
    let Some(guest) = Guest::new(&code) else { return };
    let mut vcpu = guest.vcpu();
    let frame = guest.map_new(DATA, RW);
    guest.pool.write(frame, 0x40, &99u64.to_le_bytes());
    (vcpu.regs_mut().rax, vcpu.regs_mut().gs_base) = (DATA + 0x40, 0x1234_5000);
    match vcpu.run().unwrap() {
        Exit::Syscall => {}
        // A host CPU without FSGSBASE.
        exit => return assert_eq!(exit, exception(6, 0)),
    }
    let regs = vcpu.regs();
    assert_eq!((regs.rbx, regs.rdx, regs.fs_base, regs.gs_base), (99, 0x1234_5000, DATA + 0x40, 0x1234_5000));
}

#[test]
fn vector_registers_make_the_round_trip() {
    // vmovdqu [rdi], ymm7; vpaddq ymm7, ymm7, ymm7; fld1; syscall
    let code = [
        0xc5, 0xfe, 0x7f, 0x3f, 0xc5, 0xc5, 0xd4, 0xff, 0xd9, 0xe8, 0x0f, 0x05, 0xc5, 0xfe, 0x7f, 0x3f, 0x0f,
        0x05,
    ];
    let Some(guest) = Guest::new(&code) else { return };
    if !std::is_x86_feature_detected!("avx2") {
        return;
    }
    let mut vcpu = guest.vcpu();
    let frame = guest.map_new(DATA, RW);
    vcpu.regs_mut().rdi = DATA;
    let fresh = vcpu.xsave().unwrap();
    assert_eq!(u16::from_le_bytes([fresh[0], fresh[1]]), 0x37f);
    assert_eq!(u32::from_le_bytes([fresh[24], fresh[25], fresh[26], fresh[27]]), 0x1f80);
    let mut state = fresh.clone();
    state[512] = 0b111;
    // Low half of ymm7, then its high half.
    state[160 + 7 * 16..][..16].copy_from_slice(&[1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    state[576 + 7 * 16..][..16].copy_from_slice(&[3, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0]);
    vcpu.set_xsave(&state).unwrap();
    assert_eq!(vcpu.run().unwrap(), Exit::Syscall);
    assert_eq!([0, 1, 2, 3].map(|n| guest.word(frame, n)), [1, 2, 3, 4]);
    let after = vcpu.xsave().unwrap();
    assert_eq!(after[160 + 7 * 16], 2);
    assert_eq!(after[576 + 7 * 16 + 8], 8);
    assert_eq!(after[512] & 0b111, 0b111, "XSTATE_BV names x87, SSE and AVX");
    // What was read can be written, and the guest sees it.
    vcpu.set_xsave(&after).unwrap();
    assert_eq!(vcpu.run().unwrap(), Exit::Syscall);
    assert_eq!([0, 1, 2, 3].map(|n| guest.word(frame, n)), [2, 4, 6, 8]);
}

#[test]
fn no_state_that_a_guest_makes_up_is_refused() {
    let Some(guest) = Guest::new(&SYSCALL) else { return };
    let mut vcpu = guest.vcpu();
    let mut seed = 7u64;
    let lengths = [512, 575, 576, 832, 2000, 4096, 9000];
    for length in lengths.into_iter().cycle().take(100) {
        let noise = (0..length).map(|_| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 56) as u8
        });
        vcpu.set_xsave(&noise.collect::<Vec<_>>()).unwrap();
        start(&mut vcpu);
        assert_eq!(vcpu.run().unwrap(), Exit::Syscall);
    }
    vcpu.set_xsave(&vec![0xff; 4096]).unwrap();
    assert!(vcpu.set_xsave(&[0; 100]).is_err());
    start(&mut vcpu);
    assert_eq!(vcpu.run().unwrap(), Exit::Syscall);
}

/// jmp to itself.
const FOREVER: [u8; 2] = [0xeb, 0xfe];

#[test]
fn an_endless_loop_is_kicked_every_time() {
    let Some(guest) = Guest::new(&FOREVER) else { return };
    let mut vcpu = guest.vcpu();
    let kicker = vcpu.kicker();
    let running = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let runner = scope.spawn(|| {
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

#[test]
fn a_kick_before_run_counts_once_and_a_kick_without_a_run_harms_nobody() {
    let Some(guest) = Guest::new(&SYSCALL) else { return };
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
    // Of a thread that has ended.
    let kicker = std::thread::scope(|scope| {
        scope
            .spawn(|| {
                start(&mut next);
                assert_eq!(next.run().unwrap(), Exit::Syscall);
                next.kicker()
            })
            .join()
            .unwrap()
    });
    kicker.kick();
    assert_eq!(next.run().unwrap(), Exit::Kicked);
}

#[test]
fn kicks_among_faults_and_calls_lose_nothing() {
    // again: inc rbx; syscall; inc rbp; mov [rdi], rbx; jmp again
    let code = [0x48, 0xff, 0xc3, 0x0f, 0x05, 0x48, 0xff, 0xc5, 0x48, 0x89, 0x1f, 0xeb, 0xf3];
    let Some(guest) = Guest::new(&code) else { return };
    let mut vcpu = guest.vcpu();
    vcpu.regs_mut().rdi = DATA;
    let kicker: Arc<dyn Kick> = vcpu.kicker();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                kicker.kick();
                std::thread::sleep(Duration::from_micros(20));
            }
        });
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

#[test]
fn signals_that_are_no_kicks_do_not_end_run() {
    let Some(guest) = Guest::new(&FOREVER) else { return };
    let mut vcpu = guest.vcpu();
    let kicker = vcpu.kicker();
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let runner = scope.spawn(|| {
            // SAFETY: takes nothing, cannot fail.
            tell.send(unsafe { libc::gettid() }).unwrap();
            vcpu.run().unwrap()
        });
        let (thread, process) = (told.recv().unwrap(), std::process::id());
        std::thread::sleep(Duration::from_millis(5));
        // The same signal from elsewhere, without a request.
        let signal = vmm_sys_util::signal::SIGRTMIN();
        for _ in 0..20 {
            // SAFETY: plain numbers; the thread is running and the signal has a handler.
            let result = unsafe { libc::syscall(libc::SYS_tgkill, process, thread, signal) };
            assert_eq!(result, 0);
            std::thread::sleep(Duration::from_micros(200));
        }
        assert!(!runner.is_finished());
        kicker.kick();
        assert_eq!(runner.join().unwrap(), Exit::Kicked);
    });
}

#[test]
fn a_parked_vcpu_comes_back_as_new() {
    // fld1; syscall
    let Some(guest) = Guest::new(&[0xd9, 0xe8, 0x0f, 0x05]) else { return };
    let mut vcpu = guest.vcpu();
    let fresh = vcpu.xsave().unwrap();
    *vcpu.regs_mut() = Regs { rip: CODE, rax: 5, r9: 9, fs_base: 0x1000, gs_base: 0x2000, ..Regs::default() };
    assert_eq!(vcpu.run().unwrap(), Exit::Syscall);
    assert_ne!(vcpu.xsave().unwrap(), fresh);
    drop(vcpu);
    let made = guest.vm.making.lock().made;
    let vcpu = guest.vm.create_vcpu(guest.root).unwrap();
    assert_eq!(guest.vm.making.lock().made, made, "reused, not made");
    assert_eq!(*vcpu.regs(), Regs::default());
    assert_eq!(vcpu.xsave().unwrap(), fresh);
}

#[test]
fn many_vcpus_run_at_once_and_their_frames_come_back() {
    let Some(guest) = Guest::with_pool(&SYSCALL, FreedFrames::Poison) else { return };
    let mut vcpus: Vec<_> = (0..40).map(|_| guest.vcpu()).collect();
    std::thread::scope(|scope| {
        for vcpu in &mut vcpus {
            scope.spawn(|| {
                for _ in 0..20 {
                    start(vcpu);
                    assert_eq!(vcpu.run().unwrap(), Exit::Syscall);
                }
            });
        }
    });
    drop(vcpus);
    let pool = Arc::clone(&guest.pool);
    let mine = guest.frame_count();
    drop(guest);
    let stats = pool.stats();
    assert_eq!(stats.free + mine, stats.frames, "the engine returned every frame");
}

#[test]
fn rdtsc_is_trapped_where_that_is_asked_for() {
    // rdtsc; rdtscp; syscall
    let Some(guest) = Guest::new(&[0x0f, 0x31, 0x0f, 0x01, 0xf9, 0x0f, 0x05]) else { return };
    let mut vcpu = guest.vcpu();
    assert_eq!(vcpu.run().unwrap(), Exit::Syscall, "untrapped by default");
    start(&mut vcpu);
    vcpu.set_time_stamps(TimeStamps::Trapped);
    assert_eq!((vcpu.run().unwrap(), vcpu.regs().rip), (exception(13, 0), CODE));
    vcpu.regs_mut().rip = CODE + 2;
    assert_eq!((vcpu.run().unwrap(), vcpu.regs().rip), (exception(13, 0), CODE + 2));
    // This thread's own clock is back.
    let _ = Instant::now();
    vcpu.regs_mut().rip = CODE;
    vcpu.set_time_stamps(TimeStamps::OfTheCpu);
    assert_eq!(vcpu.run().unwrap(), Exit::Syscall);
}
