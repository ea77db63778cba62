// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A fault of a guest thread: filled from the shadow map, or the guest's.
//!
//! # Reads and writes
//! The kernel does not tell which a fault was. The instruction at rip does; where it does not, the access is taken for a read, which is
//! safe. If the same fault comes back while the TLB has kept all its entries, it was none: then it is a write.
//!
//! # No memory
//! The host may have none for a mapping, and have some the next moment. The fill is tried again after pauses, about a second in all
//! ([`Shortage`](crate::engine::shortage::Shortage)); who is kicked meanwhile does not sit a pause out.

use super::access;
use super::tlb::ProcessMappings;
use super::vcpu::PtraceVcpu;
use crate::engine::kick::Requests;
use crate::engine::shortage::Next;
use crate::engine::{EngineError, Exit};
use shadow_mmu::addr::{Access, Gpa};
use shadow_mmu::shadow::Filled;

/// The longest instruction.
pub(super) const CODE_BYTES: usize = 15;

/// A fault that was answered as a read for want of knowing better.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TakenForRead {
    rip: u64,
    addr: u64,
    /// [`SoftTlb::drops`](shadow_mmu::shadow::SoftTlb::drops) before it was filled.
    drops: u64,
}

impl PtraceVcpu {
    /// Has the TLB allow `access` at `addr`, if the shadow map does; `None`: the host has no memory for it now, and the vCPU is wanted
    /// for something else.
    pub(super) fn fill(&mut self, addr: Gpa, access: Access) -> Result<Option<Filled>, EngineError> {
        loop {
            let filled =
                self.vm.tlb.fill(&self.walker, addr.gfn(), access, &mut ProcessMappings::of(&self.vm));
            let source = match filled {
                Ok(filled) => return Ok(Some(filled)),
                Err(source) => source,
            };
            let is_short = matches!(source.raw_os_error(), Some(libc::ENOMEM | libc::EAGAIN));
            let is_wanted = || self.state.wants(Requests::all());
            if !is_short || self.shortage.sit_out(is_wanted) == Next::GiveUp {
                let what = format!("mapping guest frame {:#x} in the guest's process", addr.gfn().0);
                return Err(EngineError::lost(what, source));
            }
            if is_wanted() {
                return Ok(None);
            }
        }
    }

    /// The access at `addr` failed in the process: the TLB has it now, or it is a page fault of the guest.
    pub(super) fn fault(&mut self, addr: u64) -> Result<Option<Exit>, EngineError> {
        let (rip, gpa) = (self.regs.rip, Gpa(addr));
        let drops = self.vm.tlb.drops();
        let again = TakenForRead { rip, addr, drops };
        let access = match self.access(addr) {
            Access::READ if self.taken_for_read.take() == Some(again) => Access::READ | Access::WRITE,
            access => access,
        };
        match self.fill(gpa, access)? {
            Some(Filled::NotAllowed) => {
                self.expected = Some((gpa, access));
                let access = if access.contains(Access::WRITE) { Access::WRITE } else { access };
                Ok(Some(Exit::PageFault { addr: gpa, access }))
            }
            Some(Filled::Allowed) => {
                if access == Access::READ {
                    self.taken_for_read = Some(again);
                }
                Ok(None)
            }
            None => Ok(None),
        }
    }

    /// What the instruction at rip wanted of `addr`.
    fn access(&mut self, addr: u64) -> Access {
        let rip = self.regs.rip;
        let mut code = [0; CODE_BYTES];
        let bytes = self.walker.fetch(Gpa(rip), &mut code);
        // Data may begin right behind it.
        let offset = addr.wrapping_sub(rip);
        let in_instruction = offset < CODE_BYTES as u64
            && access::length(&code[..bytes]).is_none_or(|length| offset < length as u64);
        if in_instruction && !self.vm.tlb.rights(Gpa(addr).gfn()).contains(Access::EXEC) {
            return Access::EXEC;
        }
        match self.decoder.access_at(&code[..bytes], &self.regs, addr) {
            // Code that went away between the fault and here.
            Access::EXEC if !in_instruction => Access::READ,
            access => access,
        }
    }
}
