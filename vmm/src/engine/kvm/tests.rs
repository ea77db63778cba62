// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The engine, with real guests of a few instructions. Every test builds a VM of its own.

use super::testing::*;
use crate::engine::{Exit, Regs, Vcpu};
use shadow_mmu::addr::Access;

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
    assert_eq!(regs.rflags & 0x202, 0x202, "{:#x}", regs.rflags);
    vcpu.regs_mut().rax = 77;
    assert_eq!(vcpu.run().unwrap(), Exit::Syscall);
    assert_eq!((vcpu.regs().rbx, vcpu.regs().rdx), (77, 0x1122_3344_5566_7788));
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
    let _ = Regs::default();
}

#[test]
fn probe_experiment() {
    let Some(guest) = Guest::new(&SYSCALL) else { return };
    let t = std::time::Instant::now();
    let report = guest.vm.probe_flush(super::Effort::Quick).unwrap();
    println!("{:?}", t.elapsed());
    for r in report.rows {
        println!("{r:?}");
    }
    for r in [20, 200] {
        let t = std::time::Instant::now();
        let report = guest.vm.probe_flush(super::Effort::Thorough { rounds: r }).unwrap();
        println!("{:?} a {} chosen {:?}", t.elapsed(), report.a_bit_needs_flush, report.chosen);
        for r in report.rows {
            println!("{r:?}");
        }
    }
}
