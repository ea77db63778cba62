// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One KVM_RUN: what it came back with, and what is asked of the vCPU around it.
//!
//! Exits that a guest's instruction can cause become something that `vcpu` reports to the guest's owner. Everything else
//! (a shutdown, a failed entry, MMIO, an error that KVM blames on itself) is the end of the vCPU, with all that is known.

use super::raw_vcpu::RawVcpu;
use crate::engine::entry::{Injected, NO_REASON, injected};
use crate::engine::{EngineError, TimeStamps};
use kvm_bindings::{KVM_INTERNAL_ERROR_EMULATION, KVM_VCPUEVENT_VALID_SHADOW, kvm_sregs};
use kvm_ioctls::{SyncReg, VcpuExit};
use shadow_mmu::addr::Pfn;
use shadow_mmu::inject::Faults;
use std::io;

/// What KVM_RUN came back with.
pub(super) enum Outcome {
    /// A stub's `out`.
    Port(u16),
    /// EINTR or EAGAIN.
    Interrupted,
    /// ENOMEM: the host had no memory for what KVM needs to map one more page.
    NoMemory(EngineError),
    /// The instruction at rip is one that KVM has to emulate and cannot.
    NotEmulated,
    /// KVM could not reach the memory behind this guest physical address (where it says which), or not for this access.
    Unreachable(Option<u64>, EngineError),
    /// Anything else.
    Failed(EngineError),
}

/// Whether ring 3 was running, by what KVM last wrote to the shared page.
pub(super) fn in_ring3(raw: &mut RawVcpu) -> bool {
    raw.fd.sync_regs_mut().sregs.cs.dpl == 3
}

/// Where the vCPU stands, for an error.
pub(super) fn facts(raw: &mut RawVcpu) -> String {
    let reason = raw.fd.get_kvm_run().exit_reason;
    let sync = raw.fd.sync_regs_mut();
    format!(
        "(KVM exit reason {reason}, rip {:#x}, cs {:#x}, rsp {:#x}, rflags {:#x}, cr2 {:#x}, cr3 {:#x})",
        sync.regs.rip,
        sync.sregs.cs.selector,
        sync.regs.rsp,
        sync.regs.rflags,
        sync.sregs.cr2,
        sync.sregs.cr3
    )
}

/// KVM_RUN, once.
pub(super) fn enter(raw: &mut RawVcpu, faults: &Faults, time_stamps: TimeStamps) -> Outcome {
    let came_back = match injected(faults) {
        Some(Injected::Errno(errno)) => Err(kvm_ioctls::Error::new(errno)),
        Some(Injected::Exit(source)) => {
            // Not written to the shared page: a report has KVM's own last exit from there.
            let facts = facts(raw);
            return Outcome::Failed(EngineError::lost(format!("{NO_REASON} {facts}"), source));
        }
        None => time_stamps.around(|| raw.fd.run()),
    };
    let what = match came_back {
        Ok(VcpuExit::IoOut(port, _)) => return Outcome::Port(port),
        Ok(VcpuExit::Intr) => return Outcome::Interrupted,
        Ok(VcpuExit::InternalError) => return internal_error(raw),
        Ok(VcpuExit::MemoryFault { gpa, .. }) => return unreachable(raw, Some(gpa)),
        Ok(exit) => format!("{exit:?}"),
        Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => return Outcome::Interrupted,
        Err(error) if error.errno() == libc::EFAULT => return unreachable(raw, None),
        Err(error) if error.errno() == libc::ENOMEM => {
            let facts = facts(raw);
            return Outcome::NoMemory(EngineError::lost(format!("KVM_RUN {facts}"), error.into()));
        }
        Err(error) => {
            let facts = facts(raw);
            return Outcome::Failed(EngineError::lost(format!("KVM_RUN {facts}"), error.into()));
        }
    };
    let facts = facts(raw);
    Outcome::Failed(EngineError::lost(format!("{NO_REASON} {facts}"), io::Error::other(what)))
}

fn unreachable(raw: &mut RawVcpu, gpa: Option<u64>) -> Outcome {
    let facts = facts(raw);
    let source = io::Error::from_raw_os_error(libc::EFAULT);
    Outcome::Unreachable(
        gpa,
        EngineError::lost(format!("KVM_RUN at guest physical address {gpa:x?} {facts}"), source),
    )
}

fn internal_error(raw: &mut RawVcpu) -> Outcome {
    let run = raw.fd.get_kvm_run();
    // SAFETY: the page is ours, and the fields of the union are plain integers, whatever is in them.
    let internal = unsafe { run.__bindgen_anon_1.internal };
    if internal.suberror == KVM_INTERNAL_ERROR_EMULATION && in_ring3(raw) {
        return Outcome::NotEmulated;
    }
    let data = internal.data.get(..internal.ndata as usize).unwrap_or(&internal.data);
    let what = format!("internal error, suberror {}, data {data:x?}", internal.suberror);
    let facts = facts(raw);
    Outcome::Failed(EngineError::lost(format!("KVM gave the vCPU up {facts}"), io::Error::other(what)))
}

/// Makes KVM drop what the vCPU has cached of its root table: loads another table now, and the old one again with the
/// registers of the next entry. On two-dimensional paging only.
pub(super) fn switch_root_and_back(raw: &mut RawVcpu, other: Pfn) -> Result<(), EngineError> {
    let sregs = kvm_sregs { cr3: other.offset(), ..raw.fd.sync_regs_mut().sregs };
    raw.fd
        .set_sregs(&sregs)
        .map_err(|error| EngineError::lost("KVM_SET_SREGS with the other root table", error.into()))?;
    raw.fd.set_sync_dirty_reg(SyncReg::SystemRegister);
    Ok(())
}

/// Whether KVM holds an exception that the guest has not seen yet. Also ends an interrupt shadow (`mov ss`): it belongs to
/// an instruction that may not be the next one any more.
pub(super) fn exception_in_flight(raw: &RawVcpu) -> Result<bool, EngineError> {
    let ioctl = |what: &'static str| move |error: kvm_ioctls::Error| EngineError::lost(what, error.into());
    let mut events = raw.fd.get_vcpu_events().map_err(ioctl("KVM_GET_VCPU_EVENTS"))?;
    let in_flight = events.exception.pending != 0 || events.exception.injected != 0;
    if !in_flight && events.interrupt.shadow != 0 {
        events.interrupt.shadow = 0;
        events.flags = KVM_VCPUEVENT_VALID_SHADOW;
        raw.fd.set_vcpu_events(&events).map_err(ioctl("KVM_SET_VCPU_EVENTS"))?;
    }
    Ok(in_flight)
}
