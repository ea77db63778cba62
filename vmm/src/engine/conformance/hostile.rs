// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a hostile guest may execute. None of it may hang, end the vCPU, or change what the next program sees.

use super::guest::{CODE, DATA, Guest, RW, STACK_TOP, SYSCALL, exception, page_fault, start};
use super::guests;
use crate::engine::{Engine, Exit, Regs, Vcpu};
use shadow_mmu::addr::Access;

/// Where a harmless program waits: a lone `syscall`.
pub(in crate::engine) const HARMLESS: u64 = CODE + 0x1000;

/// Gives a guest the harmless program and a data page.
pub(in crate::engine) fn make_ready<E: Engine + ?Sized>(guest: &Guest<E>) {
    guest.load(HARMLESS, &SYSCALL);
    guest.map_new(DATA, RW);
}

/// Guests that are ready.
pub(super) fn ready() -> impl Iterator<Item = Guest> {
    guests(&[]).inspect(make_ready)
}

/// Runs `code` from the start with rdi at a data page, until it stops for the first time.
pub(in crate::engine) fn run<E: Engine + ?Sized>(guest: &Guest<E>, vcpu: &mut dyn Vcpu, code: &[u8]) -> Exit {
    guest.rewrite(CODE, code);
    start(vcpu);
    vcpu.regs_mut().rdi = DATA;
    vcpu.run().unwrap()
}

/// The vCPU works as if nothing had been.
pub(in crate::engine) fn check_works(vcpu: &mut dyn Vcpu, after: &str) {
    let regs = Regs { rip: HARMLESS, rsp: STACK_TOP, rbx: 6, ..Regs::default() };
    *vcpu.regs_mut() = regs;
    assert_eq!(vcpu.run().unwrap(), Exit::Syscall, "after {after}");
    let expected = Regs { rip: HARMLESS + 2, rcx: HARMLESS + 2, r11: 0x202, rflags: 0x202, ..regs };
    assert_eq!(*vcpu.regs(), expected, "after {after}");
}

/// Runs each program; it must stop with an exception of one of the vectors, at its first byte.
fn all_raise(vectors: &[u8], programs: &[(&str, &[u8])]) {
    for guest in ready() {
        let mut vcpu = guest.vcpu();
        for (name, code) in programs {
            let exit = run(&guest, &mut *vcpu, &[code, &SYSCALL[..]].concat());
            let raised =
                matches!(exit, Exit::Exception { vector, error_code: 0 } if vectors.contains(&vector));
            assert!(raised, "{name}: {exit:?}");
            assert_eq!(vcpu.regs().rip, CODE, "{name}");
            check_works(&mut *vcpu, name);
        }
    }
}

#[test]
fn privileged_instructions_are_exceptions() {
    all_raise(
        &[13],
        &[
            ("hlt", &[0xf4]),
            ("cli", &[0xfa]),
            ("sti", &[0xfb]),
            ("in al, dx", &[0xec]),
            ("out dx, al", &[0xee]),
            ("out 14, al: a port of the monitor", &[0xe6, 14]),
            ("out 32, al: another", &[0xe6, 32]),
            ("rep outsb", &[0xf3, 0x6e]),
            ("rdmsr", &[0x0f, 0x32]),
            ("wrmsr", &[0x0f, 0x30]),
            ("rdpmc", &[0x0f, 0x33]),
            ("mov rax, cr0", &[0x0f, 0x20, 0xc0]),
            ("mov cr3, rax", &[0x0f, 0x22, 0xd8]),
            ("mov rax, cr8", &[0x44, 0x0f, 0x20, 0xc0]),
            ("mov rax, dr0", &[0x0f, 0x21, 0xc0]),
            ("mov dr7, rax", &[0x0f, 0x23, 0xf8]),
            ("clts", &[0x0f, 0x06]),
            ("invd", &[0x0f, 0x08]),
            ("wbinvd", &[0x0f, 0x09]),
            ("invlpg [rdi]", &[0x0f, 0x01, 0x3f]),
            ("lgdt [rdi]", &[0x0f, 0x01, 0x17]),
            ("lidt [rdi]", &[0x0f, 0x01, 0x1f]),
            ("lldt ax", &[0x0f, 0x00, 0xd0]),
            ("ltr ax", &[0x0f, 0x00, 0xd8]),
            ("lmsw ax", &[0x0f, 0x01, 0xf0]),
            ("swapgs", &[0x0f, 0x01, 0xf8]),
            ("sysret", &[0x48, 0x0f, 0x07]),
            ("xsetbv", &[0x0f, 0x01, 0xd1]),
            ("iretq from nothing", &[0x48, 0xcf]),
            ("a prefix too many", &[0x66; 16]),
        ],
    );
}

#[test]
fn what_some_cpus_know_and_others_do_not_is_an_exception_too() {
    all_raise(
        &[6, 13],
        &[
            ("ud2", &[0x0f, 0x0b]),
            ("into", &[0xce]),
            ("lock nop", &[0xf0, 0x90]),
            ("rsm", &[0x0f, 0xaa]),
            ("sysenter", &[0x0f, 0x34]),
            ("sysexit", &[0x0f, 0x35]),
            ("vmrun", &[0x0f, 0x01, 0xd8]),
            ("vmload", &[0x0f, 0x01, 0xda]),
            ("clgi", &[0x0f, 0x01, 0xdd]),
            ("skinit", &[0x0f, 0x01, 0xde]),
            ("vmlaunch", &[0x0f, 0x01, 0xc2]),
            ("vmxoff", &[0x0f, 0x01, 0xc4]),
            ("encls", &[0x0f, 0x01, 0xcf]),
            ("enclu", &[0x0f, 0x01, 0xd7]),
            ("getsec", &[0x0f, 0x37]),
            ("pconfig", &[0x0f, 0x01, 0xc5]),
            ("monitor", &[0x0f, 0x01, 0xc8]),
            ("mwait", &[0x0f, 0x01, 0xc9]),
            ("clac", &[0x0f, 0x01, 0xca]),
            ("xsaves [rdi]", &[0x0f, 0xc7, 0x2f]),
            ("KVM's prefix for forced emulation", &[0x0f, 0x0b, 0x6b, 0x76, 0x6d, 0x90]),
        ],
    );
}

/// KVM answers hypercalls of ring 3 with an error in rax; on other hosts they are exceptions.
#[test]
fn hypercalls_get_nowhere() {
    for guest in ready() {
        let mut vcpu = guest.vcpu();
        for (name, code) in [("vmcall", [0x0f, 0x01, 0xc1]), ("vmmcall", [0x0f, 0x01, 0xd9])] {
            let exit = run(&guest, &mut *vcpu, &[&code[..], &SYSCALL].concat());
            match exit {
                Exit::Syscall => assert!((vcpu.regs().rax as i64) < 0, "{name}: {:#x}", vcpu.regs().rax),
                Exit::Exception { vector: 6 | 13, .. } => {}
                other => panic!("{name}: {other:?}"),
            }
            check_works(&mut *vcpu, name);
        }
    }
}

#[test]
fn what_ring_3_may_do_works() {
    for guest in ready() {
        let mut vcpu = guest.vcpu();
        let programs: [(&str, &[u8]); 5] = [
            ("cpuid", &[0x0f, 0xa2]),
            ("rdtsc", &[0x0f, 0x31]),
            ("xgetbv", &[0x31, 0xc9, 0x0f, 0x01, 0xd0]),
            ("pushf; popf", &[0x9c, 0x9d]),
            ("lar of a system segment", &[0x0f, 0x02, 0xc0]),
        ];
        for (name, code) in programs {
            assert_eq!(run(&guest, &mut *vcpu, &[code, &SYSCALL[..]].concat()), Exit::Syscall, "{name}");
            check_works(&mut *vcpu, name);
        }
    }
}

/// Descriptor tables are the monitor's, or with nested PVM the host's own: the CPU refuses to show them (UMIP), or the
/// guest learns an address that it cannot use.
#[test]
fn descriptor_tables_are_not_shown_or_of_no_use() {
    for guest in ready() {
        let mut vcpu = guest.vcpu();
        let programs: [(&str, &[u8]); 5] = [
            ("sgdt [rdi]", &[0x0f, 0x01, 0x07]),
            ("sidt [rdi]", &[0x0f, 0x01, 0x0f]),
            ("sldt eax", &[0x0f, 0x00, 0xc0]),
            ("str eax", &[0x0f, 0x00, 0xc8]),
            ("smsw eax", &[0x0f, 0x01, 0xe0]),
        ];
        for (name, code) in programs {
            let exit = run(&guest, &mut *vcpu, &[code, &SYSCALL[..]].concat());
            assert!(exit == Exit::Syscall || exit == exception(13, 0), "{name}: {exit:?}");
            check_works(&mut *vcpu, name);
        }
    }
}

#[test]
fn no_way_leads_into_ring_0() {
    for guest in ready() {
        let mut vcpu = guest.vcpu();
        let programs: [(&str, &[u8]); 4] = [
            (
                "push ss, rsp, rflags, cs 0x10, rip; iretq",
                &[0x6a, 0x18, 0x54, 0x9c, 0x6a, 0x10, 0x57, 0x48, 0xcf],
            ),
            ("push cs 0x10, rip; retfq", &[0x6a, 0x10, 0x57, 0x48, 0xcb]),
            // There is no 32-bit code segment, nor a gate in the GDT.
            ("push cs 0x23, rip; retfq", &[0x6a, 0x23, 0x68, 0, 0, 0x20, 0, 0x48, 0xcb]),
            ("push 0x40, rip; jmp far [rsp]", &[0x6a, 0x40, 0x57, 0x48, 0xff, 0x2c, 0x24]),
        ];
        for (name, code) in programs {
            let exit = run(&guest, &mut *vcpu, code);
            assert!(matches!(exit, Exit::Exception { vector: 13, .. }), "{name}: {exit:?}");
        }
        check_works(&mut *vcpu, "far transfers");
    }
}

/// Whatever has its tables in the upper half, the monitor or the host itself.
#[test]
fn nothing_in_the_upper_half_can_be_reached() {
    for guest in ready() {
        let mut vcpu = guest.vcpu();
        let slots = (256..512u64).map(|slot| 0xffff_0000_0000_0000 | slot << 39);
        let corners = slots.flat_map(|first| [first, first + (1 << 38) + 0x1238, first + ((1 << 39) - 8)]);
        for address in corners {
            let load_rax = [&[0x48, 0xb8][..], &address.to_le_bytes()].concat();
            for (last, access) in
                [([0x8a, 0x00], Access::READ), ([0x88, 0x00], Access::WRITE), ([0xff, 0xe0], Access::EXEC)]
            {
                let exit = run(&guest, &mut *vcpu, &[&load_rax, &last[..]].concat());
                assert_eq!(exit, page_fault(address, access));
            }
        }
        check_works(&mut *vcpu, "the upper half");
    }
}

#[test]
fn addresses_that_cannot_be_are_exceptions() {
    for guest in ready() {
        let mut vcpu = guest.vcpu();
        let load_rax = [0x48, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0x80];
        let program = |last: &[u8]| [&load_rax, last].concat();
        // jmp rax; mov al, [rax]
        assert_eq!(run(&guest, &mut *vcpu, &program(&[0xff, 0xe0])), exception(13, 0));
        assert_eq!(run(&guest, &mut *vcpu, &program(&[0x8a, 0x00])), exception(13, 0));
        // mov rsp, rax; push rax: a stack fault, but for QEMU's emulated CPU
        let exit = run(&guest, &mut *vcpu, &program(&[0x48, 0x89, 0xc4, 0x50]));
        assert!(matches!(exit, Exit::Exception { vector: 12 | 13, error_code: 0 }), "{exit:?}");
        // mov rsp, rax; int3: the frame goes to the monitor's stack
        assert_eq!(run(&guest, &mut *vcpu, &program(&[0x48, 0x89, 0xc4, 0xcc])), exception(3, 0));
        assert_eq!(vcpu.regs().rsp, 1 << 63);
        check_works(&mut *vcpu, "them");
        // And from the other side: registers that umbra was made to load.
        for address in [1 << 63, 1 << 47, 0xffff_7fff_ffff_ffff] {
            for regs in [
                Regs { rip: address, ..Regs::default() },
                Regs { rip: CODE, fs_base: address, ..Regs::default() },
                Regs { rip: CODE, gs_base: address, ..Regs::default() },
            ] {
                *vcpu.regs_mut() = regs;
                assert_eq!(vcpu.run().unwrap(), exception(13, 0));
                assert_eq!(*vcpu.regs(), regs);
            }
        }
        *vcpu.regs_mut() = Regs { rip: u64::MAX, ..Regs::default() };
        assert_eq!(vcpu.run().unwrap(), page_fault(u64::MAX, Access::EXEC));
        check_works(&mut *vcpu, "those as well");
    }
}

#[test]
fn whatever_is_in_the_segment_registers_the_next_entry_works() {
    for guest in ready() {
        let mut vcpu = guest.vcpu();
        // mov ax to es, ss, ds, fs, gs
        for modrm in [0xc0, 0xd0, 0xd8, 0xe0, 0xe8] {
            for selector in [0u16, 3, 0x10, 0x18, 0x23, 0x2b, 0x33, 0x40, 0x53, 0x7fff, 0xffff] {
                let [low, high] = selector.to_le_bytes();
                let exit = run(&guest, &mut *vcpu, &[0xb8, low, high, 0, 0, 0x8e, modrm, 0x0f, 0x05]);
                let fine = matches!(exit, Exit::Syscall | Exit::Exception { vector: 11..=13, .. });
                assert!(fine, "selector {selector:#x}: {exit:?}");
                check_works(&mut *vcpu, "segment loads");
            }
        }
        // mov ss, ax: the interrupt shadow, with an exception, a system call, a single step behind it.
        let shadowed = |last: &[u8]| [&[0xb8, 0x2b, 0, 0, 0, 0x8e, 0xd0], last].concat();
        assert_eq!(run(&guest, &mut *vcpu, &shadowed(&[0xcc])), exception(3, 0));
        assert_eq!(run(&guest, &mut *vcpu, &shadowed(&[0x0f, 0x0b])), exception(6, 0));
        assert_eq!(run(&guest, &mut *vcpu, &shadowed(&[0x0f, 0x05])), Exit::Syscall);
        let stepped = [0xb8, 0x2b, 0, 0, 0, 0x68, 2, 3, 0, 0, 0x9d, 0x8e, 0xd0, 0x0f, 0x05];
        let exit = run(&guest, &mut *vcpu, &stepped);
        assert!(exit == Exit::Syscall || exit == exception(1, 0), "{exit:?}");
        check_works(&mut *vcpu, "shadows");
    }
}

#[test]
fn flags_that_ring_3_may_not_choose_do_not_reach_the_cpu() {
    for guest in ready() {
        let mut vcpu = guest.vcpu();
        // push IOPL 3 and NT; popf; pushf; pop rax; syscall
        let code = [0x68, 2, 0x72, 0, 0, 0x9d, 0x9c, 0x58, 0x0f, 0x05];
        assert_eq!(run(&guest, &mut *vcpu, &code), Exit::Syscall);
        assert_eq!(vcpu.regs().rax & 0x3000, 0, "IOPL");
        // pushf; pop rax; syscall
        guest.rewrite(CODE, &[0x9c, 0x58, 0x0f, 0x05]);
        start(&mut *vcpu);
        vcpu.regs_mut().rflags = !0x100;
        assert_eq!(vcpu.run().unwrap(), Exit::Syscall);
        assert_eq!(vcpu.regs().rax & !0x24_0cd5, 0x202, "{:#x}", vcpu.regs().rax);
        check_works(&mut *vcpu, "flags");
    }
}
