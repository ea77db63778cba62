// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What goes in and comes out: registers, the FPU, time stamps.

use super::guest::{CODE, DATA, RW, STACK_TOP, SYSCALL, exception, start};
use super::guests;
use crate::engine::{Exit, Regs, TimeStamps};
use std::time::Instant;

#[test]
fn every_register_goes_in_and_comes_out() {
    for guest in guests(&[0xcc]) {
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
            gs_base: 0x1234_5678_9abc,
        };
        *vcpu.regs_mut() = regs;
        assert_eq!(vcpu.run().unwrap(), exception(3, 0));
        // IF is always set; the instruction is one byte long.
        assert_eq!(*vcpu.regs(), Regs { rip: CODE + 1, rflags: 0xad7 | 0x200, ..regs });
    }
}

#[test]
fn a_segment_base_in_the_upper_half_goes_in_and_comes_out() {
    for guest in guests(&[0xcc]) {
        let mut vcpu = guest.vcpu();
        vcpu.regs_mut().gs_base = 0xffff_8000_0000_0000;
        assert_eq!(vcpu.run().unwrap(), exception(3, 0));
        assert_eq!(vcpu.regs().gs_base, 0xffff_8000_0000_0000);
    }
}

#[test]
fn the_guest_moves_its_segment_bases() {
    // wrfsbase rax; mov rbx, fs:[0]; rdgsbase rdx; syscall
    let code = [
        0xf3, 0x48, 0x0f, 0xae, 0xd0, 0x64, 0x48, 0x8b, 0x1c, 0x25, 0, 0, 0, 0, 0xf3, 0x48, 0x0f, 0xae, 0xca,
        0x0f, 0x05,
    ];
    for guest in guests(&code) {
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
        assert_eq!(
            (regs.rbx, regs.rdx, regs.fs_base, regs.gs_base),
            (99, 0x1234_5000, DATA + 0x40, 0x1234_5000)
        );
    }
}

#[test]
fn vector_registers_make_the_round_trip() {
    // vmovdqu [rdi], ymm7; vpaddq ymm7, ymm7, ymm7; fld1; syscall
    let code = [
        0xc5, 0xfe, 0x7f, 0x3f, 0xc5, 0xc5, 0xd4, 0xff, 0xd9, 0xe8, 0x0f, 0x05, 0xc5, 0xfe, 0x7f, 0x3f, 0x0f,
        0x05,
    ];
    for guest in guests(&code) {
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
}

#[test]
fn no_state_that_a_guest_makes_up_is_refused() {
    for guest in guests(&SYSCALL) {
        let mut vcpu = guest.vcpu();
        let mut seed = 7u64;
        let lengths = [512, 575, 576, 832, 2000, 4096, 9000];
        for length in lengths.into_iter().cycle().take(100) {
            let noise = (0..length).map(|_| {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (seed >> 56) as u8
            });
            vcpu.set_xsave(&noise.collect::<Vec<_>>()).unwrap();
            start(&mut *vcpu);
            assert_eq!(vcpu.run().unwrap(), Exit::Syscall);
        }
        vcpu.set_xsave(&vec![0xff; 4096]).unwrap();
        assert!(vcpu.set_xsave(&[0; 100]).is_err());
        start(&mut *vcpu);
        assert_eq!(vcpu.run().unwrap(), Exit::Syscall);
    }
}

#[test]
fn rdtsc_is_trapped_where_that_is_asked_for() {
    // rdtsc; rdtscp; syscall
    for guest in guests(&[0x0f, 0x31, 0x0f, 0x01, 0xf9, 0x0f, 0x05]) {
        let mut vcpu = guest.vcpu();
        assert_eq!(vcpu.run().unwrap(), Exit::Syscall, "untrapped by default");
        start(&mut *vcpu);
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
}
