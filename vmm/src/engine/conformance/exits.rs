// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! System calls and the exceptions that ring 3 can cause, each as its own exit.

use super::guest::{CODE, STACK_TOP, SYSCALL, exception, start};
use super::guests;
use super::hostile::{check_works, ready, run};
use crate::engine::{Exit, Regs};

#[test]
fn software_interrupts_arrive_as_on_linux() {
    for guest in ready() {
        let mut vcpu = guest.vcpu();
        for (code, vector) in [(&[0xcc][..], 3), (&[0xcd, 3], 3)] {
            assert_eq!(run(&guest, &mut *vcpu, code), exception(vector, 0));
            assert_eq!(vcpu.regs().rip, CODE + code.len() as u64);
        }
        // `int 4` is let through by Linux's own gate; to a tracer it is the SIGSEGV of every other.
        let exit = run(&guest, &mut *vcpu, &[0xcd, 4]);
        assert!(exit == exception(4, 0) || exit == exception(13, 0), "{exit:?}");
        for gate in [0, 1, 2, 8, 14, 18, 0x20, 0x80, 0xff] {
            let exit = run(&guest, &mut *vcpu, &[0xcd, gate]);
            let Exit::Exception { vector: 13, error_code } = exit else { panic!("int {gate:#x}: {exit:?}") };
            // The gate's number, of the IDT. QEMU's emulated CPU counts gates of 16 bytes.
            let gate = u32::from(gate);
            let codes = [gate << 3 | 2, gate << 4 | 2];
            assert!(codes.contains(&error_code), "int {gate:#x}: {error_code:#x}");
            assert_eq!(vcpu.regs().rip, CODE);
            check_works(&mut *vcpu, "int");
        }
    }
}

#[test]
fn faults_of_arithmetic_and_alignment_arrive() {
    for guest in ready() {
        let mut vcpu = guest.vcpu();
        // xor ecx, ecx; div ecx
        assert_eq!(run(&guest, &mut *vcpu, &[0x31, 0xc9, 0xf7, 0xf1]), exception(0, 0));
        assert_eq!(vcpu.regs().rip, CODE + 2);
        // push AC; popf; mov eax, [rdi+1]; syscall. QEMU's emulated CPU does not check.
        let exit = run(&guest, &mut *vcpu, &[0x68, 2, 2, 4, 0, 0x9d, 0x8b, 0x47, 1, 0x0f, 0x05]);
        assert!(exit == exception(17, 0) || exit == Exit::Syscall, "{exit:?}");
        // fninit; push 0x37b (divide by zero unmasked); fldcw [rsp]; fldz; fld1; fdiv st, st1; fwait
        let code =
            [0xdb, 0xe3, 0x68, 0x7b, 0x03, 0, 0, 0xd9, 0x2c, 0x24, 0xd9, 0xee, 0xd9, 0xe8, 0xd8, 0xf1, 0x9b];
        assert_eq!(run(&guest, &mut *vcpu, &code), exception(16, 0));
        // ldmxcsr with divide by zero unmasked; divss of 1 by 0; syscall. QEMU's emulated CPU does not raise it.
        let code = [
            0x68, 0x80, 0x1d, 0, 0, 0x0f, 0xae, 0x14, 0x24, 0xb8, 0, 0, 0x80, 0x3f, 0x66, 0x0f, 0x6e, 0xc0,
            0x0f, 0x57, 0xc9, 0xf3, 0x0f, 0x5e, 0xc1, 0x0f, 0x05,
        ];
        let exit = run(&guest, &mut *vcpu, &code);
        assert!(exit == exception(19, 0) || exit == Exit::Syscall, "{exit:?}");
        check_works(&mut *vcpu, "all of these");
    }
}

#[test]
fn single_stepping_stops_after_one_instruction() {
    for guest in ready() {
        let mut vcpu = guest.vcpu();
        // nop; nop; syscall
        guest.rewrite(CODE, &[0x90, 0x90, 0x0f, 0x05]);
        start(&mut *vcpu);
        vcpu.regs_mut().rflags = 0x100;
        for n in 1..=2 {
            assert_eq!(vcpu.run().unwrap(), exception(1, 0));
            assert_eq!((vcpu.regs().rip, vcpu.regs().rflags & 0x100), (CODE + n, 0x100));
        }
        assert_eq!(vcpu.run().unwrap(), Exit::Syscall);
        assert_eq!(vcpu.regs().rflags & 0x100, 0x100);
        check_works(&mut *vcpu, "single steps");
    }
}

#[test]
fn a_system_call_shows_the_caller_and_changes_nothing_else() {
    // again: syscall; jmp again
    for guest in guests(&[0x0f, 0x05, 0xeb, 0xfc]) {
        let mut vcpu = guest.vcpu();
        // Numbers that Linux has, has not, and takes for restarts of its own; flags that a guest can have at a call.
        let numbers =
            [0, 39, 60, 231, 15, 219, 1 << 30, u64::MAX, -512i64 as u64, -516i64 as u64, -38i64 as u64];
        for (rax, flags) in numbers.into_iter().flat_map(|rax| [(rax, 0x202), (rax, 0x602), (rax, 0xad7)]) {
            let regs = Regs {
                rax,
                rbx: 2,
                rdx: u64::MAX,
                rsi: 5,
                rdi: 6,
                rbp: 7,
                rsp: STACK_TOP - 8,
                r8: 1 << 63,
                r10: 10,
                r15: 15,
                rip: CODE,
                rflags: flags,
                fs_base: 0x1000,
                gs_base: 0x2000,
                ..Regs::default()
            };
            *vcpu.regs_mut() = regs;
            assert_eq!(vcpu.run().unwrap(), Exit::Syscall, "call {rax:#x}");
            let rip = CODE + SYSCALL.len() as u64;
            let r11 = flags | 0x200;
            assert_eq!(*vcpu.regs(), Regs { rip, rcx: rip, r11, rflags: r11, ..regs }, "call {rax:#x}");
            // What the result is to be is what comes out, whatever it looks like.
            vcpu.regs_mut().rax = rax;
            assert_eq!(vcpu.run().unwrap(), Exit::Syscall);
            assert_eq!((vcpu.regs().rax, vcpu.regs().rip), (rax, rip));
        }
    }
}

#[test]
fn debug_exceptions_are_told_from_breakpoints() {
    for guest in ready() {
        let mut vcpu = guest.vcpu();
        // icebp
        assert_eq!(run(&guest, &mut *vcpu, &[0xf1, 0x0f, 0x05]), exception(1, 0));
        // Behind it, but for a KVM on nested PVM.
        assert!((CODE..=CODE + 1).contains(&vcpu.regs().rip), "{:#x}", vcpu.regs().rip);
        assert_eq!(run(&guest, &mut *vcpu, &[0x90, 0xcc]), exception(3, 0));
        assert_eq!(vcpu.regs().rip, CODE + 2);
        check_works(&mut *vcpu, "traps");
    }
}
