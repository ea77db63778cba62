// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `int n`, which hosts report in different ways: natively and on hardware it is a general-protection exception whose error code names
//! the gate; on nested PVM it arrives as an invalid opcode, and by ptrace without the code. The bytes at rip tell.

/// The opcode of `int n`; n follows.
pub(super) const INT: u8 = 0xcd;

/// What a general-protection exception's error code says besides a gate's number: it is one of the IDT.
const OF_IDT: u32 = 1 << 1;

/// The error code for gate `n` of the IDT.
pub(super) const fn gate_of_idt(n: u8) -> u32 {
    (n as u32) << 3 | OF_IDT
}
