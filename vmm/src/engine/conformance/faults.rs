// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Page faults: the first byte that could not be reached, and what was wanted of it.

use super::guest::{CODE, DATA, Guest, RW, RX, STACK_TOP, SYSCALL, page_fault, start};
use super::guests;
use crate::engine::Exit;
use shadow_mmu::addr::{Access, PAGE_SIZE};
use std::sync::atomic::Ordering;

#[test]
fn a_guest_faults_calls_and_gets_its_results() {
    // mov [rdi], rax; syscall; mov rbx, rax; mov rdx, [rdi]; syscall
    let code = [0x48, 0x89, 0x07, 0x0f, 0x05, 0x48, 0x89, 0xc3, 0x48, 0x8b, 0x17, 0x0f, 0x05];
    for guest in guests(&code) {
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
}

#[test]
fn accesses_are_told_apart() {
    // mov al, [rdi]; syscall; jmp rsi
    for guest in guests(&[0x8a, 0x07, 0x0f, 0x05, 0xff, 0xe6]) {
        let mut vcpu = guest.vcpu();
        (vcpu.regs_mut().rdi, vcpu.regs_mut().rsi) = (DATA, DATA + 4);
        assert_eq!(vcpu.run().unwrap(), page_fault(DATA, Access::READ));
        guest.map_new(DATA, RW);
        assert_eq!(vcpu.run().unwrap(), Exit::Syscall);
        // Present, but not executable.
        assert_eq!(vcpu.run().unwrap(), page_fault(DATA + 4, Access::EXEC));
        assert_eq!(vcpu.regs().rip, DATA + 4);
    }
}

#[test]
fn the_cpu_marks_what_it_touches() {
    // mov al, [rdi]; syscall; mov [rdi], al; syscall
    for guest in guests(&[0x8a, 0x07, 0x0f, 0x05, 0x88, 0x07, 0x0f, 0x05]) {
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
}

/// The page behind the code's.
const NEXT: u64 = CODE + PAGE_SIZE;

/// A program of two pages: `code` ends `behind` bytes into the second.
fn across(guest: &Guest, code: &[u8], behind: usize) -> u64 {
    let (first, second) = code.split_at(code.len() - behind);
    let start = PAGE_SIZE as usize - first.len();
    guest.rewrite(CODE, &[&vec![0x90; start], first].concat());
    if behind > 0 {
        guest.load(NEXT, second);
    }
    CODE + start as u64
}

#[test]
fn an_access_across_pages_faults_at_the_first_byte_that_is_missing() {
    // mov rax, [rdi]; syscall; mov [rdi], rax; syscall; add [rdi], rax; syscall
    for guest in
        guests(&[0x48, 0x8b, 0x07, 0x0f, 0x05, 0x48, 0x89, 0x07, 0x0f, 0x05, 0x48, 0x01, 0x07, 0x0f, 0x05])
    {
        let mut vcpu = guest.vcpu();
        for (rip, access) in [(CODE, Access::READ), (CODE + 5, Access::WRITE), (CODE + 10, Access::WRITE)] {
            guest.spte(DATA).store(0, Ordering::SeqCst);
            guest.spte(DATA + PAGE_SIZE).store(0, Ordering::SeqCst);
            guest.tlb().flush_all();
            start(&mut *vcpu);
            (vcpu.regs_mut().rip, vcpu.regs_mut().rdi) = (rip, DATA + PAGE_SIZE - 3);
            // Which of the two missing pages it is, is the CPU's choice.
            let mut faulted = Vec::new();
            for _ in 0..2 {
                let exit = vcpu.run().unwrap();
                let Exit::PageFault { addr, access: wanted } = exit else { panic!("{exit:?}") };
                assert_eq!(wanted, access, "at {rip:#x}");
                assert_eq!(vcpu.regs().rip, rip);
                faulted.push(addr.0);
                guest.map_new(addr.0 & !(PAGE_SIZE - 1), RW);
            }
            faulted.sort_unstable();
            assert_eq!(faulted, [DATA + PAGE_SIZE - 3, DATA + PAGE_SIZE]);
            assert_eq!(vcpu.run().unwrap(), Exit::Syscall);
        }
    }
}

#[test]
fn rights_of_a_page_are_what_the_guest_gets() {
    // mov al, [rdi]; mov [rdi], al; syscall
    for guest in guests(&[0x8a, 0x07, 0x88, 0x07, 0x0f, 0x05]) {
        let frame = guest.map_new(DATA, Access::READ);
        guest.pool.write(frame, 0, &[0xc3]);
        let mut vcpu = guest.vcpu();
        vcpu.regs_mut().rdi = DATA;
        // Read, then not written; not executed either, with the same page in the TLB.
        assert_eq!((vcpu.run().unwrap(), vcpu.regs().rip), (page_fault(DATA, Access::WRITE), CODE + 2));
        vcpu.regs_mut().rip = DATA;
        assert_eq!(vcpu.run().unwrap(), page_fault(DATA, Access::EXEC));
        // A page of code can be read, and is not written.
        start(&mut *vcpu);
        vcpu.regs_mut().rdi = CODE;
        assert_eq!((vcpu.run().unwrap(), vcpu.regs().rip), (page_fault(CODE, Access::WRITE), CODE + 2));
        // One more right is enough, without a flush.
        guest.map(DATA, frame, RW);
        start(&mut *vcpu);
        vcpu.regs_mut().rdi = DATA;
        assert_eq!(vcpu.run().unwrap(), Exit::Syscall);
        assert_eq!(guest.word(frame, 0), 0xc3);
        guest.map(DATA, frame, RX);
        guest.tlb().flush_all();
        vcpu.regs_mut().rip = DATA;
        vcpu.regs_mut().rsp = DATA + 0x100;
        // ret to where the stack's zeros lead.
        assert_eq!(vcpu.run().unwrap(), page_fault(0, Access::EXEC));
    }
}

#[test]
fn an_instruction_across_pages_is_fetched_from_both() {
    for guest in guests(&[]) {
        let mut vcpu = guest.vcpu();
        // mov rax, imm64; syscall: each cut.
        let code = [0x48, 0xb8, 1, 2, 3, 4, 5, 6, 7, 8, 0x0f, 0x05];
        for behind in 3..12 {
            let rip = across(&guest, &code, behind);
            guest.spte(NEXT).store(0, Ordering::SeqCst);
            guest.tlb().flush_all();
            start(&mut *vcpu);
            vcpu.regs_mut().rip = rip;
            assert_eq!(vcpu.run().unwrap(), page_fault(NEXT, Access::EXEC), "{behind} behind");
            assert_eq!(vcpu.regs().rip, rip);
            // There, but not to be executed.
            guest.map_new(NEXT, RW);
            assert_eq!(vcpu.run().unwrap(), page_fault(NEXT, Access::EXEC), "{behind} behind");
            guest.load(NEXT, &code[code.len() - behind..]);
            guest.tlb().flush_all();
            assert_eq!(vcpu.run().unwrap(), Exit::Syscall);
            assert_eq!(vcpu.regs().rax, 0x0807_0605_0403_0201);
        }
    }
}

/// Data that begins right behind the instruction is data.
#[test]
fn data_behind_an_instruction_is_not_taken_for_a_part_of_it() {
    for guest in guests(&[]) {
        let mut vcpu = guest.vcpu();
        // mov al, [rdi]; mov [rdi], al; mov rax, [rip + 0]
        let programs: [(&[u8], Access); 3] = [
            (&[0x8a, 0x07], Access::READ),
            (&[0x88, 0x07], Access::WRITE),
            (&[0x48, 0x8b, 0x05, 0, 0, 0, 0], Access::READ),
        ];
        for (code, access) in programs {
            let rip = across(&guest, code, 0);
            guest.spte(NEXT).store(0, Ordering::SeqCst);
            guest.tlb().flush_all();
            start(&mut *vcpu);
            (vcpu.regs_mut().rip, vcpu.regs_mut().rdi) = (rip, NEXT);
            assert_eq!(vcpu.run().unwrap(), page_fault(NEXT, access));
            // Pages of data are not executable: the access works, what follows is a fetch.
            guest.map_new(NEXT, RW);
            assert_eq!(vcpu.run().unwrap(), page_fault(NEXT, Access::EXEC), "{code:x?}");
            assert_eq!(vcpu.regs().rip, NEXT);
        }
    }
}

/// With the fault's page mapped and unmapped by turns, an instruction that reads and writes comes to its end.
#[test]
fn instructions_that_load_and_store_come_to_their_end() {
    for guest in guests(&[]) {
        let mut vcpu = guest.vcpu();
        let (from, to) = (DATA, DATA + (1 << 30));
        let programs: [(&str, &[u8]); 6] = [
            ("rep movsb", &[0xf3, 0xa4]),
            ("movsq", &[0x48, 0xa5]),
            ("xchg [rdi], rax", &[0x48, 0x87, 0x07]),
            ("lock xadd [rdi], rax", &[0xf0, 0x48, 0x0f, 0xc1, 0x07]),
            ("push [rsi]", &[0xff, 0x36]),
            ("cmpxchg16b [rdi]", &[0x48, 0x0f, 0xc7, 0x0f]),
        ];
        for (name, code) in programs {
            guest.rewrite(CODE, &[code, &SYSCALL[..]].concat());
            for address in [from, to] {
                guest.spte(address).store(0, Ordering::SeqCst);
            }
            guest.tlb().flush_all();
            start(&mut *vcpu);
            (vcpu.regs_mut().rsi, vcpu.regs_mut().rdi, vcpu.regs_mut().rcx) = (from, to, 64);
            let mut faults = Vec::new();
            loop {
                match vcpu.run().unwrap() {
                    Exit::PageFault { addr, access } => {
                        faults.push((addr.0, access));
                        // No more than was asked for.
                        guest.map_new(addr.0, Access::READ | access);
                    }
                    exit => break assert_eq!(exit, Exit::Syscall, "{name}"),
                }
                assert!(faults.len() <= 2, "{name}: {faults:x?}");
            }
            let of = |address| faults.iter().find(|fault| fault.0 == address).map(|fault| fault.1);
            assert!(of(from).is_none_or(|access| access == Access::READ), "{name}: {faults:x?}");
            assert!(of(to).is_none_or(|access| access == Access::WRITE), "{name}: {faults:x?}");
        }
    }
}
