// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Exceptions: the CPU's vectors, and `int n`, which hosts report in different ways. Natively and on hardware it is a
//! general-protection exception whose error code names the gate; on nested PVM it arrives as an invalid opcode, and by ptrace without
//! the code. The bytes at rip tell.

use shadow_mmu::addr::Gpa;
use shadow_mmu::shadow::Walker;

pub(crate) const DIVIDE_ERROR: u8 = 0;
pub(crate) const DEBUG: u8 = 1;
pub(crate) const BREAKPOINT: u8 = 3;
pub(crate) const INVALID_OPCODE: u8 = 6;
pub(crate) const SEGMENT_NOT_PRESENT: u8 = 11;
pub(crate) const STACK_SEGMENT: u8 = 12;
pub(crate) const GENERAL_PROTECTION: u8 = 13;
pub(crate) const PAGE_FAULT: u8 = 14;
pub(crate) const X87: u8 = 16;
pub(crate) const ALIGNMENT: u8 = 17;
pub(crate) const SIMD: u8 = 19;

/// The opcode of `int n`; n follows.
const INT: u8 = 0xcd;

/// What a general-protection exception's error code says besides a gate's number: it is one of the IDT.
const OF_IDT: u32 = 1 << 1;

/// The error code that `int n` at `rip` has natively; `None`: another instruction is there.
pub(super) fn int_gate(walker: &Walker, rip: u64) -> Option<u32> {
    let mut code = [0; 2];
    let is_int = walker.fetch(Gpa(rip), &mut code) == code.len() && code[0] == INT;
    is_int.then(|| u32::from(code[1]) << 3 | OF_IDT)
}
