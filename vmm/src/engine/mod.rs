// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What runs the guest: a vCPU that executes ring-3 code over the shadow map until something needs umbra.
//!
//! An engine is small on purpose. It does not know what a system call means or why a page is missing; it says *that* one
//! was made and *which* access failed, and goes on when told.

use shadow_mmu::addr::{Access, Gpa, Pfn};
use std::fmt::Debug;
use std::sync::Arc;

pub mod kvm;
mod snapshot;

pub use snapshot::{Facts, VcpuSnapshot};

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

/// Why a vCPU stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// `syscall`. The number is in rax, arguments in rdi, rsi, rdx, r10, r8, r9; rip is behind the instruction already
    /// and rflags are the caller's.
    Syscall,
    /// An access that the shadow map did not allow. rip is at the instruction, which runs again on the next entry.
    PageFault {
        /// The first byte that could not be reached.
        addr: Gpa,
        /// What the instruction wanted of it.
        access: Access,
    },
    /// The host has nothing to show for a frame of an adopted mapping, at least not now
    /// (see [`watch`](shadow_mmu::mm::watch)). rip is at the instruction, which runs again on the next entry.
    HostFault {
        /// The frame, where the host says which.
        pfn: Option<Pfn>,
    },
    /// Any other exception. rip is where the CPU says it is for that vector.
    Exception {
        /// The CPU's vector number: 0 divide error, 3 breakpoint, 6 invalid opcode, 13 general protection, …
        vector: u8,
        /// The error code; 0 for vectors without one.
        error_code: u32,
    },
    /// Somebody called [`Kick::kick`].
    Kicked,
}

/// The engine lost the vCPU: nothing of the guest's doing, or nothing that a guest should be able to do.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}")]
pub struct EngineError {
    /// The step that failed, with its facts.
    pub what: String,
    /// The host's word.
    #[source]
    pub source: std::io::Error,
    /// What the vCPU was then, for a report; `None` where it was lost before.
    pub snapshot: Option<Box<VcpuSnapshot>>,
}

/// One virtual CPU, driven by the one thread that owns it.
pub trait Vcpu: Debug + Send {
    /// Runs ring-3 code with [`regs`](Self::regs) until something needs umbra.
    ///
    /// # Errors
    /// [`EngineError`]: the vCPU cannot go on.
    fn run(&mut self) -> Result<Exit, EngineError>;

    /// The registers after the last exit.
    fn regs(&self) -> &Regs;

    /// The registers for the next entry. Whatever is written here is safe to enter with: the engine forces what ring 3
    /// may not choose (system flags, segments) and reports an address that no code can have as a general-protection
    /// exception.
    fn regs_mut(&mut self) -> &mut Regs;

    /// The FPU, SSE and AVX state in the CPU's XSAVE format (standard form, with the header at byte 512).
    ///
    /// # Errors
    /// [`EngineError`].
    fn xsave(&self) -> Result<Vec<u8>, EngineError>;

    /// Loads what [`xsave`](Self::xsave) gave, possibly changed by the guest meanwhile.
    ///
    /// # Errors
    /// [`EngineError`], also for a state that the CPU refuses.
    fn set_xsave(&mut self, state: &[u8]) -> Result<(), EngineError>;

    /// The handle through which other threads make [`run`](Self::run) return.
    fn kicker(&self) -> Arc<dyn Kick>;
}

/// Makes a vCPU leave the guest.
pub trait Kick: Debug + Send + Sync {
    /// The vCPU's [`run`](Vcpu::run) returns [`Exit::Kicked`] now, or at once when it is next called. Kicks are not
    /// counted: several before the next return are one. Does not wait.
    fn kick(&self);
}
