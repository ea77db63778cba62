// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `rdtsc` and `rdtscp` in deterministic mode, where they arrive as general-protection exceptions: answered from virtual time,
//! as a counter of 1 GHz on CPU 0.

use super::clock::Clock;
use super::thread::Thread;
use crate::engine::{Regs, Vcpu};

const RDTSC: [u8; 2] = [0x0f, 0x31];
const RDTSCP: [u8; 3] = [0x0f, 0x01, 0xf9];

impl Thread {
    /// Answers the instruction that the guest is at, if it is one of these; whether it was.
    pub(super) fn answer_time_stamp(&self, vcpu: &mut dyn Vcpu) -> bool {
        let Clock::Virtual(clock) = self.process.clock() else { return false };
        let mut code = [0; 3];
        let read = self.process.user().read_prefix(vcpu.regs().rip, &mut code);
        let nanos = u64::try_from(clock.elapsed().as_nanos()).unwrap_or(u64::MAX);
        answer(vcpu.regs_mut(), &code[..read], nanos)
    }
}

fn answer(regs: &mut Regs, code: &[u8], counter: u64) -> bool {
    let len = match code {
        code if code.starts_with(&RDTSC) => RDTSC.len(),
        code if code.starts_with(&RDTSCP) => {
            regs.rcx = 0;
            RDTSCP.len()
        }
        _ => return false,
    };
    regs.rax = counter & u64::from(u32::MAX);
    regs.rdx = counter >> 32;
    regs.rip += len as u64;
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_instructions_are_answered_and_nothing_else() {
        let before = Regs { rip: 0x1000, rcx: 9, rax: u64::MAX, ..Regs::default() };
        let mut regs = before;
        assert!(answer(&mut regs, &[0x0f, 0x31, 0x90], 0x1_2345_6789));
        assert_eq!(regs, Regs { rip: 0x1002, rax: 0x2345_6789, rdx: 1, ..before });
        regs = before;
        assert!(answer(&mut regs, &[0x0f, 0x01, 0xf9], 7));
        assert_eq!(regs, Regs { rip: 0x1003, rax: 7, rcx: 0, ..before });
        regs = before;
        for other in [&[0x0f, 0x01, 0xd0][..], &[0x0f], &[], &[0xf4]] {
            assert!(!answer(&mut regs, other, 7));
        }
        assert_eq!(regs, before);
    }
}
