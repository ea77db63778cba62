// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The ptrace engine, for hosts without a KVM that can be used: guest threads are threads of a traced process.
//!
//! ```text
//! PtraceVm ─┬─ Service: a thread of umbra, tracer of the process's first thread     service.rs
//!           │    └─ the process: the pool as its one descriptor, the stub           child.rs, boot.rs, stub.rs, filter.rs
//!           ├─ SoftTlb: which host mappings it has of the shadow map                tlb.rs
//!           └─ Pairs: which CPU tracers and tracees run on                          pair.rs
//! PtraceVcpu ─ one thread of the process: entry, exit, registers                    vcpu.rs
//!              its stops as exceptions                                              stop.rs
//!              its faults; reads told from writes                                   faults.rs, access.rs
//!              ptrace(2), calls for the engine, its end                             tracee.rs, calls.rs, gone.rs
//!              its XSAVE area                                                       fpu.rs
//!              the CPU time that it uses, and its process; /proc                    cpu_time.rs, proc.rs
//!              and what is known of one that is lost                                snapshot.rs
//! ```
//!
//! # Isolation
//! The process has no memory but frames of the pool that the shadow map maps, and the stub; no descriptor but the pool; no new
//! privileges; and a filter that refuses each system call that is not the engine's own, should one ever get past the tracers. It
//! dies with the thread that serves it and with each tracer that ends without ending its tracee. What a guest can see of the engine
//! are the stub's pages: the same code in every process, and the last addresses that were mapped.
//!
//! # What differs from KVM
//! * Adopted mappings of umbra's own process cannot be shown: another process has no way to map them.
//! * The guest's CPUID is the host's.
//! * A guest can read the stub's pages. Code there does what it does with the guest's registers, until it makes a call or comes to
//!   an `int3`; that is the page fault that jumping there would have been.
//!
//! # Locks
//! `mmu_lock` of the shadow map, then the TLB's, then the service's queue. All others are leaves.

mod access;
mod boot;
mod calls;
mod child;
mod cpu_time;
mod error;
mod faults;
mod filter;
mod fpu;
mod gone;
mod interrupt;
mod pair;
mod proc;
mod service;
mod snapshot;
mod stop;
mod stub;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod tlb;
mod tracee;
mod vcpu;

pub use error::PtraceError;
pub use vcpu::PtraceVcpu;

use super::fpu::FpuLayout;
use super::{Engine, EngineKind, HostFacts, Marks, SetupError, Vcpu};
use crate::inject::Armed;
use pair::Pairs;
use service::Service;
use shadow_mmu::addr::{PAGE_SIZE, Pfn};
use shadow_mmu::frame::{Fill, FramePool, FreedFrames, OutOfFrames};
use shadow_mmu::inject::Faults;
use shadow_mmu::mm::watch::HostSlots;
use shadow_mmu::shadow::{Prefaulted, SoftTlb, Tlb};
use std::arch::x86_64::__cpuid;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tracee::Tracee;

/// Entries of the TLB: a quarter of what Linux lets a process map by default (vm.max_map_count, 65,530), or of what this host does.
const MOST_ENTRIES: usize = 16_384;
/// The CPUID leaf that tells how wide addresses are.
const ADDRESS_SIZES: u32 = 0x8000_0008;
/// Guest threads at once. Each is a thread of umbra and one of the guest's process.
const MOST_VCPUS: usize = 1_024;

/// One virtual machine: a process for the guest. It ends before the stub's frames go back to the pool.
#[derive(Debug)]
pub struct PtraceVm {
    service: Service,
    stub: StubFrames,
    tlb: SoftTlb,
    pairs: Arc<Pairs>,
    vcpus: AtomicUsize,
    fpu: FpuLayout,
    /// Of a linear address: with five levels `wrfsbase` takes more than with four.
    address_bits: u32,
    faults: Armed,
    pool: Arc<FramePool>,
}

/// The frames of a process's stub.
#[derive(Debug, Clone, Copy)]
struct StubFrames {
    code: Pfn,
    list: Pfn,
}

impl StubFrames {
    fn new(pool: &FramePool) -> Result<Self, OutOfFrames> {
        let code = pool.alloc(Fill::Zeros)?;
        let list = pool.alloc(Fill::Zeros).inspect_err(|_| pool.put(code))?;
        Ok(Self { code, list })
    }

    /// When nobody maps them any more.
    fn put(self, pool: &FramePool) {
        pool.put(self.code);
        pool.put(self.list);
    }
}

/// How many entries the TLB may have on this host.
fn most_entries() -> usize {
    let limit = std::fs::read_to_string("/proc/sys/vm/max_map_count").ok();
    let limit = limit.and_then(|text| text.trim().parse::<usize>().ok());
    limit.map_or(MOST_ENTRIES, |limit| MOST_ENTRIES.min(limit / 4))
}

impl PtraceVm {
    /// A VM whose memory is `pool`, without vCPUs.
    ///
    /// # Errors
    /// [`SetupError`].
    pub fn new(pool: Arc<FramePool>) -> Result<Arc<Self>, SetupError> {
        Self::with_entries(pool, most_entries())
    }

    /// The same with a TLB of at most `most` entries.
    fn with_entries(pool: Arc<FramePool>, most: usize) -> Result<Arc<Self>, SetupError> {
        let fpu = FpuLayout::of_this_cpu().ok_or(PtraceError::NoXsave)?;
        let stub = StubFrames::new(&pool)?;
        let pairs = Arc::<Pairs>::default();
        let service = Service::start(&pool, stub, Arc::clone(&pairs)).inspect_err(|_| stub.put(&pool))?;
        Ok(Arc::new(Self {
            service,
            stub,
            tlb: SoftTlb::new(most),
            pairs,
            vcpus: AtomicUsize::new(0),
            fpu,
            address_bits: __cpuid(ADDRESS_SIZES).eax >> 8 & 0xff,
            faults: Armed::default(),
            pool,
        }))
    }

    fn vcpu_gone(&self) {
        self.vcpus.fetch_sub(1, Ordering::Relaxed);
    }

    /// One more thread of the process.
    fn new_vcpu(self: &Arc<Self>, root: Pfn) -> Result<PtraceVcpu, SetupError> {
        if self.vcpus.fetch_add(1, Ordering::Relaxed) >= MOST_VCPUS {
            self.vcpu_gone();
            return Err(SetupError::VcpuLimit { engine: EngineKind::Ptrace, limit: MOST_VCPUS });
        }
        match self.service.ask(Tracee::new_thread) {
            Ok(tracee) => Ok(PtraceVcpu::new(Arc::clone(self), tracee, root)),
            Err(error) => {
                self.vcpu_gone();
                Err(PtraceError::Thread { source: error }.into())
            }
        }
    }
}

impl Drop for PtraceVm {
    fn drop(&mut self) {
        self.service.end();
        self.stub.put(&self.pool);
    }
}

impl Engine for PtraceVm {
    fn kind(&self) -> EngineKind {
        EngineKind::Ptrace
    }

    fn create_vcpu(self: Arc<Self>, root: Pfn) -> Result<Box<dyn Vcpu>, SetupError> {
        Ok(Box::new(self.new_vcpu(root)?))
    }

    fn tlb(self: Arc<Self>) -> Arc<dyn Tlb> {
        Arc::new(tlb::PtraceTlb { vm: self })
    }

    fn host_slots(self: Arc<Self>) -> Result<Arc<dyn HostSlots>, SetupError> {
        Err(SetupError::Unsupported {
            engine: EngineKind::Ptrace,
            what: "cannot show a guest memory of umbra's own process",
            instead: "use --engine kvm",
        })
    }

    fn max_vcpus(&self) -> usize {
        MOST_VCPUS
    }

    fn upper_entry(&self) -> Option<(usize, u64)> {
        None
    }

    /// What is not marked is not mapped, and costs a stop of its own.
    fn prefaulted(&self) -> Prefaulted {
        Prefaulted::Young
    }

    fn window(&self) -> Option<Range<u64>> {
        None
    }

    fn arm(&self, faults: Faults) {
        self.faults.arm(faults);
    }

    fn cpu_time_outside(&self) -> Duration {
        cpu_time::of_process(self.service.worker.pid)
    }

    /// A fill sets them, for the access that it serves.
    fn marks(&self) -> Marks {
        Marks::Exact
    }

    fn facts(&self) -> HostFacts {
        HostFacts::with(None)
    }

    fn describe(&self) -> Vec<String> {
        vec![format!(
            "the guest's process is {}, with {} mappings of {} at most",
            self.service.worker.pid,
            self.tlb.len(),
            self.tlb.most()
        )]
    }
}

/// Whether guests can be run by this engine here: starts a process and one thread in it.
///
/// # Errors
/// [`SetupError`]: why not.
pub fn probe() -> Result<(), SetupError> {
    let no_pool = |error| PtraceError::child("making a frame pool")(io::Error::other(format!("{error}")));
    let pool = FramePool::new(16 * PAGE_SIZE, FreedFrames::Keep).map_err(no_pool)?;
    let vm = PtraceVm::new(Arc::new(pool))?;
    vm.new_vcpu(Pfn(0)).map(drop)
}
