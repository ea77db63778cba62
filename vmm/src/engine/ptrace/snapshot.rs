// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What is known of a vCPU that is lost: the registers of its thread, as the kernel has them.

use super::stop;
use super::tracee::Tracee;
use crate::engine::{Facts, Regs, VcpuSnapshot};

/// For the tracer. Of a thread that is gone nothing is left but `guest`, its registers as they were last.
pub(super) fn snapshot(tracee: Tracee, guest: Regs) -> VcpuSnapshot {
    let mut facts = vec![Facts::new("thread", vec![("pid", tracee.pid as u64), ("tid", tracee.tid as u64)])];
    let mut unread = Vec::new();
    let mut cpu = Regs::default();
    match tracee.registers() {
        Ok(registers) => {
            cpu = stop::from_user(&registers);
            facts.push(Facts::new(
                "segments",
                vec![
                    ("cs", registers.cs),
                    ("ss", registers.ss),
                    ("ds", registers.ds),
                    ("es", registers.es),
                    ("fs", registers.fs),
                    ("gs", registers.gs),
                    ("orig_rax", registers.orig_rax),
                ],
            ));
        }
        Err(error) => unread.push(format!("registers: {error}")),
    }
    let mut cr2 = 0;
    match tracee.signal_info() {
        Ok(info) => {
            // SAFETY: faults have an address there, and all others something else of the same size.
            cr2 = unsafe { info.si_addr() }.addr() as u64;
            let values =
                vec![("signal", info.si_signo as u64), ("code", info.si_code as u64), ("address", cr2)];
            facts.push(Facts::new("last signal", values));
        }
        Err(error) => unread.push(format!("signal: {error}")),
    }
    VcpuSnapshot { guest, cpu, cr2, facts, unread }
}
