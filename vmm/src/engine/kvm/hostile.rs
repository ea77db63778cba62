// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a hostile guest may try against the monitor. What it may try anywhere is in `conformance::hostile`.

use super::testing::*;
use crate::engine::conformance::hostile::{HARMLESS, check_works, make_ready, run};
use crate::engine::{Exit, Regs, Vcpu};
use shadow_mmu::addr::Access;

fn guest() -> Option<Guest> {
    let guest = Guest::new(&[])?;
    make_ready(&guest);
    Some(guest)
}

#[test]
fn the_monitor_can_be_neither_read_nor_entered() {
    let Some(guest) = guest() else { return };
    let mut vcpu = guest.vcpu();
    let monitor = 0xffff_ffff_8000_0000_u64;
    for page in 0..8 {
        let address = monitor + page * 0x1000;
        let load_rax = [&[0x48, 0xb8][..], &address.to_le_bytes()].concat();
        let program = |last: &[u8]| [&load_rax, last].concat();
        assert_eq!(run(&guest, &mut vcpu, &program(&[0x8a, 0x00])), page_fault(address, Access::READ));
        assert_eq!(run(&guest, &mut vcpu, &program(&[0x88, 0x00])), page_fault(address, Access::WRITE));
        assert_eq!(run(&guest, &mut vcpu, &program(&[0xff, 0xe0])), page_fault(address, Access::EXEC));
        assert_eq!(vcpu.regs().rip, address);
        // Again, with the registers as they are.
        assert_eq!(vcpu.run().unwrap(), page_fault(address, Access::EXEC));
    }
    check_works(&mut vcpu, "looking at the monitor");
}

/// On nested PVM this is what `syscall` looks like; on other hosts it is a fault like any other.
#[test]
fn a_jump_to_the_system_call_entry_is_harmless() {
    let Some(guest) = guest() else { return };
    let mut vcpu = guest.vcpu();
    for (rcx, r11) in [(HARMLESS, 0), (1 << 63, u64::MAX), (super::monitor::SYSCALL_ENTRY, 0x0003_7302)] {
        start(&mut vcpu);
        *vcpu.regs_mut() = Regs {
            rip: CODE,
            rax: super::monitor::SYSCALL_ENTRY,
            rcx,
            r11,
            rsp: STACK_TOP - 8,
            ..Regs::default()
        };
        guest.rewrite(CODE, &[0xff, 0xe0]);
        match vcpu.run().unwrap() {
            Exit::Syscall => {
                assert_eq!(vcpu.regs().rip, rcx);
                let next = vcpu.run().unwrap();
                let fine = match rcx {
                    HARMLESS => next == Exit::Syscall,
                    _ => matches!(next, Exit::Exception { vector: 13, .. } | Exit::PageFault { .. }),
                };
                assert!(fine, "rcx {rcx:#x}: {next:?}");
            }
            exit => assert_eq!(exit, page_fault(super::monitor::SYSCALL_ENTRY, Access::EXEC)),
        }
        check_works(&mut vcpu, "the jump");
    }
}
