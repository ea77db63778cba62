// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a guest instruction wanted of the byte that it could not reach.
//!
//! A tracer learns of a fault as SIGSEGV with an address. The error code that the CPU pushed, which says whether it was
//! a load, a store or a fetch, stays in the host's kernel. So the instruction is decoded.
//!
//! The answer may err on one side only. *Read* is always safe: the engine makes the page readable, the instruction runs
//! again and faults again, on a page that can be read, which then is a store. *Write* for a load is not: the guest
//! would be sent a SIGSEGV for a page that it may read. So it is *Write* only where an operand that is stored covers the
//! byte and no operand that is only loaded does: instructions that do both (`movs`, `push [mem]`, `call [mem]`) load
//! first. An operand that is loaded and stored (`add [mem], reg`) is a store to the CPU too.
//!
//! Nothing is locked and nothing is read but the arguments. Where another thread changes the instruction between the
//! fault and the look at it, the answer is about the new one: at worst the access fails as it would have a moment later.

use crate::engine::Regs;
use iced_x86::{
    CpuidFeature, Decoder, DecoderOptions, Instruction, InstructionInfoFactory, InstructionInfoOptions,
    Mnemonic, OpAccess, OpKind, Register, UsedMemory,
};
use shadow_mmu::addr::Access;
use std::fmt;

/// The direction flag: string instructions go down.
const RFLAGS_DF: u64 = 1 << 10;

/// Tells accesses apart. Holds the buffers of the decoder, so a vCPU keeps one.
pub(super) struct AccessDecoder {
    operands: InstructionInfoFactory,
}

impl fmt::Debug for AccessDecoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AccessDecoder")
    }
}

impl AccessDecoder {
    pub(super) fn new() -> Self {
        Self { operands: InstructionInfoFactory::new() }
    }

    /// What the instruction wanted of the byte at `addr`, which it could not reach.
    ///
    /// `code`: the bytes from `regs.rip` on that can be fetched, up to 15; fewer where the next page cannot be fetched,
    /// none where the instruction's own page cannot.
    pub(super) fn access_at(&mut self, code: &[u8], regs: &Regs, addr: u64) -> Access {
        let mut decoder = Decoder::with_ip(64, code, regs.rip, DecoderOptions::NONE);
        let instruction = decoder.decode();
        if instruction.is_invalid() {
            // Too few bytes, or none: the CPU stopped at the first that is missing.
            let missing = regs.rip.wrapping_add(code.len() as u64);
            return if addr == missing { Access::EXEC } else { Access::READ };
        }
        if instruction.mnemonic() == Mnemonic::Clzero {
            // An operand that the decoder does not list: the cache line that rax is in.
            return if addr & !63 == regs.rax & !63 { Access::WRITE } else { Access::READ };
        }
        let operands = self.operands.info_options(&instruction, InstructionInfoOptions::NO_REGISTER_USAGE);
        let (mut loaded, mut stored) = (false, false);
        for operand in operands.used_memory() {
            if !covers(&instruction, operand, regs, addr) {
                continue;
            }
            match operand.access() {
                OpAccess::Read | OpAccess::CondRead => loaded = true,
                OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite => {
                    stored = true
                }
                OpAccess::None | OpAccess::NoMemAccess => {}
            }
        }
        if stored && !loaded { Access::WRITE } else { Access::READ }
    }
}

/// Bytes of the instruction that `code` begins with; `None` where it is none, or not all of it.
pub(super) fn length(code: &[u8]) -> Option<usize> {
    let instruction = Decoder::new(64, code, DecoderOptions::NONE).decode();
    (!instruction.is_invalid()).then(|| instruction.len())
}

/// Whether the instruction that `code` begins with is one of the x87 unit's, or of MMX, which is in there.
pub(super) fn is_x87(code: &[u8]) -> bool {
    let instruction = Decoder::new(64, code, DecoderOptions::NONE).decode();
    let x87 = [CpuidFeature::FPU, CpuidFeature::FPU287, CpuidFeature::FPU387, CpuidFeature::MMX];
    instruction.cpuid_features().iter().any(|feature| x87.contains(feature))
}

/// Whether the byte at `addr` is part of the operand.
///
/// True also where that cannot be known from `regs`: a scatter takes its addresses from a vector register, the state
/// components decide about the length of `xsave`, and the rows of a tile are anywhere. None of them has another operand
/// in memory, so the access that failed is theirs.
fn covers(instruction: &Instruction, operand: &UsedMemory, regs: &Regs, addr: u64) -> bool {
    let Some(start) = operand.virtual_address(0, |register, _, _| value(register, regs)) else { return true };
    let start = start.wrapping_add(bit_offset(instruction, regs));
    if repeats(instruction) {
        return repeated(instruction, operand, regs, start, addr);
    }
    match operand.memory_size().size() as u64 {
        0 => true,
        size => addr.wrapping_sub(start) < size,
    }
}

fn repeats(instruction: &Instruction) -> bool {
    instruction.is_string_instruction() && (instruction.has_rep_prefix() || instruction.has_repne_prefix())
}

/// Whether the byte is in one of the elements that are left to do, of which the one at `start` is next.
fn repeated(instruction: &Instruction, operand: &UsedMemory, regs: &Regs, start: u64, addr: u64) -> bool {
    let size = instruction.memory_size().size() as u64;
    let count = if operand.base().size() == 4 { regs.rcx & u64::from(u32::MAX) } else { regs.rcx };
    let bytes = count.saturating_mul(size);
    if regs.rflags & RFLAGS_DF == 0 {
        addr.wrapping_sub(start) < bytes
    } else {
        start.wrapping_add(size - 1).wrapping_sub(addr) < bytes
    }
}

/// `bts [mem], reg` changes a bit of a string of bits that `mem` is the middle of: how far away, in bytes, the operand
/// is that has the bit.
fn bit_offset(instruction: &Instruction, regs: &Regs) -> u64 {
    let strings_of_bits = matches!(instruction.mnemonic(), Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc);
    if !strings_of_bits || instruction.op1_kind() != OpKind::Register {
        return 0;
    }
    let register = instruction.op1_register();
    let bits = register.size() as u32 * 8;
    let unused = u64::BITS - bits;
    let bit = ((value(register, regs).unwrap_or(0) << unused) as i64) >> unused;
    (bit.div_euclid(i64::from(bits)) * i64::from(bits / 8)) as u64
}

/// The value of a register, the base of a segment; `None` for a vector.
fn value(register: Register, regs: &Regs) -> Option<u64> {
    let full = match register.full_register() {
        Register::RAX => regs.rax,
        Register::RBX => regs.rbx,
        Register::RCX => regs.rcx,
        Register::RDX => regs.rdx,
        Register::RSI => regs.rsi,
        Register::RDI => regs.rdi,
        Register::RBP => regs.rbp,
        Register::RSP => regs.rsp,
        Register::R8 => regs.r8,
        Register::R9 => regs.r9,
        Register::R10 => regs.r10,
        Register::R11 => regs.r11,
        Register::R12 => regs.r12,
        Register::R13 => regs.r13,
        Register::R14 => regs.r14,
        Register::R15 => regs.r15,
        Register::FS => return Some(regs.fs_base),
        Register::GS => return Some(regs.gs_base),
        Register::CS | Register::DS | Register::ES | Register::SS => return Some(0),
        _ => return None,
    };
    // `xlat` adds al, and the 67 prefix makes addresses of 32 bits.
    Some(match register.size() {
        1 => full & 0xff,
        2 => full & 0xffff,
        4 => full & 0xffff_ffff,
        _ => full,
    })
}

#[cfg(test)]
mod tests;
