// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An entry to the guest in deterministic mode: what comes back is counted and traced, and where the quantum is counted in
//! instructions the CPU's trap flag brings the guest out after each one.
//!
//! The trap flag is umbra's and the guest must not see it. It is set for the entry and cleared in every state that is kept:
//! flags, and r11 behind `syscall`. An instruction that shows or changes flags is looked at before: what `pushf` has put on the stack
//! is corrected, and behind `popf` and `iret` the flag is what the guest made it. The debug exception of `icebp` is
//! the guest's. A guest that sets the flag itself leaves after each instruction anyway, so umbra does not set it.

use super::thread::Thread;
use crate::engine::exception::DEBUG;
use crate::engine::{EngineError, Exit, Vcpu};

const TRAP_FLAG: u64 = 1 << 8;

/// Instructions that have to do with the trap flag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Instruction {
    Pushf,
    /// `popf`, `iret`.
    LoadsFlags,
    Icebp,
    Other,
}

impl Instruction {
    /// What `code`, up to 15 bytes, begins with.
    fn decode(code: &[u8]) -> Self {
        let is_prefix = |byte: &&u8| matches!(byte, 0x26 | 0x2e | 0x36 | 0x3e | 0x40..=0x4f | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3);
        match code.iter().find(|byte| !is_prefix(byte)) {
            Some(0x9c) => Self::Pushf,
            Some(0x9d | 0xcf) => Self::LoadsFlags,
            Some(0xf1) => Self::Icebp,
            _ => Self::Other,
        }
    }
}

impl Thread {
    /// Runs the guest until something needs umbra. [`Exit::Kicked`] is nothing to be done anything about: also where one
    /// instruction was executed.
    ///
    /// # Errors
    /// [`EngineError`]: the vCPU is lost.
    pub(super) fn enter(&self, vcpu: &mut dyn Vcpu) -> Result<Exit, EngineError> {
        let (Some(deterministic), Some(seat)) = (self.process.deterministic(), self.waker.seat()) else {
            return vcpu.run();
        };
        let steps = vcpu.regs().rflags & TRAP_FLAG == 0 && seat.single_steps();
        let instruction = if steps { self.instruction(vcpu.regs().rip) } else { Instruction::Other };
        if steps {
            vcpu.regs_mut().rflags |= TRAP_FLAG;
        }
        seat.cross_into_guest_or_back();
        let exit = vcpu.run();
        seat.cross_into_guest_or_back();
        let exit = exit?;
        if steps && self.hide_trap_flag(vcpu, exit, instruction) {
            seat.stepped();
            return Ok(Exit::Kicked);
        }
        if exit != Exit::Kicked {
            deterministic.exit(seat, &exit, vcpu.regs());
        }
        Ok(exit)
    }

    fn instruction(&self, rip: u64) -> Instruction {
        let mut code = [0; 15];
        let read = self.process.user().read_prefix(rip, &mut code);
        Instruction::decode(&code[..read])
    }

    /// Takes umbra's trap flag out of what the guest is left with; whether the exit was for the step alone.
    fn hide_trap_flag(&self, vcpu: &mut dyn Vcpu, exit: Exit, instruction: Instruction) -> bool {
        let is_debug = matches!(exit, Exit::Exception { vector: DEBUG, .. });
        let regs = vcpu.regs_mut();
        if exit == Exit::Syscall {
            regs.r11 &= !TRAP_FLAG;
        }
        match instruction {
            Instruction::LoadsFlags if is_debug => {}
            _ => regs.rflags &= !TRAP_FLAG,
        }
        let rsp = regs.rsp;
        if instruction == Instruction::Pushf && is_debug {
            let user = self.process.user();
            let mut byte = [0];
            // The guest has just written it.
            if user.read(rsp + 1, &mut byte).is_ok() {
                let _ = user.write(rsp + 1, &[byte[0] & !(TRAP_FLAG >> 8) as u8]);
            }
        }
        is_debug && instruction != Instruction::Icebp
    }

    /// Lets another thread run.
    pub(super) fn sched_yield(&self) {
        match self.waker.seat() {
            Some(seat) => seat.give_up_quantum(),
            None => super::host::sched_yield(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_are_told_behind_their_prefixes() {
        for (code, is) in [
            (&[0x9c][..], Instruction::Pushf),
            (&[0x66, 0x9c], Instruction::Pushf),
            (&[0x9d], Instruction::LoadsFlags),
            (&[0x48, 0xcf], Instruction::LoadsFlags),
            (&[0xf1], Instruction::Icebp),
            (&[0x0f, 0x9c], Instruction::Other),
            (&[0x90, 0x9c], Instruction::Other),
            (&[0x66], Instruction::Other),
            (&[], Instruction::Other),
        ] {
            assert_eq!(Instruction::decode(code), is, "{code:x?}");
        }
    }
}
