// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What runs the guest: a vCPU that executes ring-3 code over the shadow map until something needs umbra.
//!
//! An engine is small on purpose. It does not know what a system call means or why a page is missing; it says *that* one
//! was made and *which* access failed, and goes on when told.
//!
//! | module | what |
//! | --- | --- |
//! | [`kvm`] | ring 3 of a virtual machine; the CPU walks the shadow map |
//! | [`ptrace`] | a traced process, whose mappings are filled from the shadow map |
//! | [`choice`] | which of them |
//! | `host` | what a machine has for them |
//! | `regs`, `fpu`, `exception` | what they share of a thread's registers, its FPU state, vectors and `int n` |
//! | `entry`, `kick`, `shortage`, `snapshot` | what they share of a vCPU: injected entries, getting it out, waiting for memory, what is known of a lost one |
//! | `conformance` | what every engine must do, as tests of each |

use kvm::KvmError;
use ptrace::PtraceError;
use serde::Serialize;
use shadow_mmu::addr::{Access, Gpa, Pfn};
use shadow_mmu::frame::OutOfFrames;
use shadow_mmu::inject::Faults;
use shadow_mmu::mm::watch::HostSlots;
use shadow_mmu::shadow::{Prefaulted, Tlb};
use std::fmt::{self, Debug};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

pub mod choice;
#[cfg(test)]
mod conformance;
mod entry;
pub(crate) mod exception;
mod fpu;
mod host;
mod kick;
pub mod kvm;
pub mod ptrace;
mod regs;
mod shortage;
mod snapshot;
#[cfg(test)]
pub(crate) mod testing;

pub use choice::{EngineChoice, EngineConfig};
pub use host::HostFacts;
pub use regs::Regs;
pub use snapshot::{Facts, VcpuSnapshot};

/// Which engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum EngineKind {
    /// [`kvm`].
    Kvm,
    /// [`ptrace`].
    Ptrace,
}

impl EngineKind {
    /// Where a guest ran, for people: `on KVM (pvm)`, `by ptrace`.
    pub fn place(self, kvm_backend: &str) -> String {
        match self {
            Self::Kvm => format!("on KVM ({kvm_backend})"),
            Self::Ptrace => "by ptrace".to_owned(),
        }
    }
}

impl fmt::Display for EngineKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "kvm",
            Self::Ptrace => "ptrace",
        })
    }
}

/// One virtual machine of some engine, over the frame pool that it was made with.
pub trait Engine: Debug + Send + Sync {
    /// Which engine.
    fn kind(&self) -> EngineKind;

    /// A vCPU that runs on the table `root`, which holds the [upper entry](Self::upper_entry) if there is one; with all
    /// registers zero and the FPU of a new process.
    ///
    /// # Errors
    /// [`SetupError`]; [`SetupError::VcpuLimit`] where too many are in use at once.
    fn create_vcpu(self: Arc<Self>, root: Pfn) -> Result<Box<dyn Vcpu>, SetupError>;

    /// The flush strategy, for the shadow map.
    fn tlb(self: Arc<Self>) -> Arc<dyn Tlb>;

    /// What adopted mappings are shown through, for the watch over the address space.
    ///
    /// # Errors
    /// The engine cannot show memory of this process.
    fn host_slots(self: Arc<Self>) -> Result<Arc<dyn HostSlots>, SetupError>;

    /// The most vCPUs that can be in use at once.
    fn max_vcpus(&self) -> usize;

    /// The place and the raw value of the entry that belongs into the upper half of every root table, if there is one. It is
    /// constant, and it is not an entry of the shadow map: leave it alone when that is zapped.
    fn upper_entry(&self) -> Option<(usize, u64)>;

    /// The marks worth giving to what a fault brings along, where nobody asks for A and D.
    fn prefaulted(&self) -> Prefaulted;

    /// The addresses, in this process, of the engine's own mapping of the frame pool, if it has one.
    fn window(&self) -> Option<Range<u64>>;

    /// From now on `faults` decides over the engine's fault points, and over those of vCPUs that are made from now on. Once.
    fn arm(&self, faults: Faults);

    /// The CPU time that all vCPUs so far have used outside umbra's process, where the engine has the guest run in another.
    fn cpu_time_outside(&self) -> Duration {
        Duration::ZERO
    }

    /// What A says of a guest's accesses.
    fn marks(&self) -> Marks;

    /// What the host is, for reports. Read anew each time.
    fn facts(&self) -> HostFacts;

    /// What is in use, for reports: a line each.
    fn describe(&self) -> Vec<String>;
}

/// How exactly A says which pages were accessed. (D is set for writes alone, by every engine.)
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Marks {
    /// These and no others: software sets A, for accesses that it serves.
    Exact,
    /// A CPU that walks the tables sets A. A translation that it has cached may hide an access, and it may set A for what was
    /// never accessed: for prefetches and for speculative accesses (Intel SDM vol. 3, 4.10.2.3).
    CpuGuesses,
}

/// An engine cannot be set up, or cannot give what it is asked for. One line that says what to do.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// KVM.
    #[error("{error}{advice}", error = .0, advice = .0.advice())]
    Kvm(#[from] KvmError),
    /// ptrace.
    #[error("{error}{advice}", error = .0, advice = .0.advice())]
    Ptrace(#[from] PtraceError),
    /// The frame pool has too few frames for what the engine keeps there.
    #[error(transparent)]
    Frames(#[from] OutOfFrames),
    /// All vCPUs that a machine may have are in use.
    #[error("{}", vcpu_limit(*.engine, *.limit))]
    VcpuLimit {
        /// Whose.
        engine: EngineKind,
        /// [`Engine::max_vcpus`].
        limit: usize,
    },
    /// Another engine could do it.
    #[error("the {engine} engine {what}: {instead}")]
    Unsupported {
        /// Which cannot.
        engine: EngineKind,
        /// What it does not do: `has no …`, `cannot …`.
        what: &'static str,
        /// What to do instead.
        instead: &'static str,
    },
}

fn vcpu_limit(engine: EngineKind, limit: usize) -> String {
    match engine {
        EngineKind::Kvm => {
            format!("KVM allows {limit} vCPUs in one VM and all are running: the guest has too many threads")
        }
        EngineKind::Ptrace => {
            format!("the ptrace engine runs {limit} guest threads at most and all are running")
        }
    }
}

impl SetupError {
    /// The end of the line, where that is advice for whoever wants this engine and no other; else empty.
    fn advice(&self) -> &'static str {
        match self {
            Self::Kvm(error) => error.advice(),
            Self::Ptrace(error) => error.advice(),
            Self::Frames(_) | Self::VcpuLimit { .. } | Self::Unsupported { .. } => "",
        }
    }
}

/// What `rdtsc` and `rdtscp` do in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TimeStamps {
    /// They read the CPU's counter.
    #[default]
    OfTheCpu,
    /// They are general-protection exceptions.
    Trapped,
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

impl EngineError {
    /// A vCPU of which nothing else is known yet.
    fn lost(what: impl Into<String>, source: std::io::Error) -> Self {
        Self { what: what.into(), source, snapshot: None }
    }
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

    /// Says what `rdtsc` is to do from the next entry on.
    fn set_time_stamps(&mut self, time_stamps: TimeStamps);

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

    /// The handle by which other threads reach the vCPU.
    fn kicker(&self) -> Arc<dyn Kick>;
}

/// A vCPU as other threads know it: they can make it leave the guest, and see what it uses there.
pub trait Kick: Debug + Send + Sync {
    /// The vCPU's [`run`](Vcpu::run) returns [`Exit::Kicked`] now, or at once when it is next called. Kicks are not
    /// counted: several before the next return are one. Does not wait.
    fn kick(&self);

    /// The CPU time that the vCPU has used so far outside the thread that runs it, where the engine has another run the
    /// guest: to within a tick of the host's timer, and zero once the vCPU is gone. Does not wait.
    fn cpu_time_outside(&self) -> Duration {
        Duration::ZERO
    }
}
