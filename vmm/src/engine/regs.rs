// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The registers of a guest thread, and what an engine makes of them before it enters with them: the flags that ring 3 may choose, and
//! the exception that the CPU would raise for addresses that no code can have.

use super::Exit;
use super::exception::GENERAL_PROTECTION;
use shadow_mmu::addr::{Access, Gpa, TASK_SIZE};

/// CF, PF, AF, ZF, SF, TF, DF, OF, RF, AC, ID: the flags that a guest chooses. Not IOPL, NT, VM, VIF, VIP.
const USER_FLAGS: u64 = 0x0025_0dd5;
/// Bit 1, always set, and IF, as every Linux program sees it. No interrupt ever comes.
pub(super) const FIXED_FLAGS: u64 = 0x202;

/// Bits of a linear address with page tables of four levels.
pub(super) const FOUR_LEVELS: u32 = 48;

/// The registers of a guest thread, as ring 3 sees them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[allow(missing_docs, reason = "the names are the registers'")]
pub struct Regs {
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rbp: u64,
    pub rsp: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub rip: u64,
    pub rflags: u64,
    pub fs_base: u64,
    pub gs_base: u64,
}

/// A structure with the registers of another that has them under the same names: the sixteen general ones and rip. What else it has
/// is given as in a structure expression.
macro_rules! with_general_registers {
    ($from:expr, $to:ident { $($others:tt)* }) => {{
        let from = $from;
        $to {
            rax: from.rax,
            rbx: from.rbx,
            rcx: from.rcx,
            rdx: from.rdx,
            rsi: from.rsi,
            rdi: from.rdi,
            rbp: from.rbp,
            rsp: from.rsp,
            r8: from.r8,
            r9: from.r9,
            r10: from.r10,
            r11: from.r11,
            r12: from.r12,
            r13: from.r13,
            r14: from.r14,
            r15: from.r15,
            rip: from.rip,
            $($others)*
        }
    }};
}
pub(super) use with_general_registers;

impl Regs {
    /// The flags to enter with.
    pub(super) fn entry_flags(&self) -> u64 {
        self.rflags & USER_FLAGS | FIXED_FLAGS
    }

    /// The exception that a CPU with linear addresses of `address_bits` bits raises instead of running with these registers.
    pub(super) fn refused(&self, address_bits: u32) -> Option<Exit> {
        let above = u64::BITS - address_bits;
        let is_canonical = |address: u64| ((address << above) as i64 >> above) as u64 == address;
        if ![self.rip, self.fs_base, self.gs_base].into_iter().all(is_canonical) {
            Some(Exit::Exception { vector: GENERAL_PROTECTION, error_code: 0 })
        } else if self.rip >= TASK_SIZE {
            // Where no guest has a page; an engine may have one of its own.
            Some(Exit::PageFault { addr: Gpa(self.rip), access: Access::EXEC })
        } else {
            None
        }
    }
}
