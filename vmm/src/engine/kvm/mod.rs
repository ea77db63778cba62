// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The KVM engine: ring 3 in long mode, with the shadow map as the page table that the CPU walks.
//!
//! ```text
//! KvmVm ─┬─ VM fd, one memslot: the frame pool's file through the window      window.rs
//!        ├─ the monitor: stubs, IDT, GDT, a TSS and a stack page a vCPU       monitor.rs
//!        ├─ flush methods, and which of them work here                        flush.rs, probe.rs
//!        ├─ memslots of adopted mappings                                      host_slots.rs
//!        └─ parked vCPUs                                                      raw_vcpu.rs, fpu.rs
//!           as an engine                                                       engine.rs
//! KvmVcpu ─ entry, exit, registers                                            vcpu.rs, exit.rs, interrupt.rs
//!           and what is known of one that is lost                             snapshot.rs
//! ```
//!
//! Locks, all of them leaves: `parked` (free list), the flusher's registry and dummy slot, the list of adopted memslots, the
//! monitor's list of frames. `making` is held while a vCPU is made and covers the leaf locks taken in that.

mod engine;
mod error;
mod exit;
mod flush;
mod fpu;
mod host;
mod host_slots;
mod interrupt;
mod monitor;
mod probe;
mod probe_guest;
mod raw_vcpu;
mod snapshot;
mod vcpu;
mod window;

#[cfg(test)]
mod flush_tests;
#[cfg(test)]
mod hostile;
#[cfg(all(test, feature = "inject"))]
mod lost_tests;
#[cfg(test)]
mod measure;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

pub use error::SetupError;
pub use flush::FlushMethod;

pub use host::{Backend, Capability, HostFacts, host_facts};
pub use probe::{Change, Effort, FlushReport, FlushRow};
pub use vcpu::KvmVcpu;

use crate::engine::fpu::FpuLayout;
use flush::{Flusher, KvmTlb};
use host_slots::{AdoptedSlots, KvmHostSlots};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use monitor::Monitor;
use raw_vcpu::{CpuModel, RawVcpu};
use shadow_mmu::addr::Pfn;
use shadow_mmu::frame::FramePool;
use shadow_mmu::inject::{Faults, Point};
use shadow_mmu::mm::watch::HostSlots;
use shadow_mmu::shadow::Tlb;
use shadow_mmu::sync::{Arc, Mutex};
use std::path::Path;
use std::sync::OnceLock;
use window::Window;

/// What is needed to make one more vCPU.
#[derive(Debug)]
struct Making {
    model: CpuModel,
    /// vCPUs made so far, and the number of the next.
    made: usize,
}

/// One virtual machine.
///
/// Fields are dropped from top to bottom: vCPUs and VM before the memory that they use, the window before the monitor
/// returns its frames to the pool.
#[derive(Debug)]
pub struct KvmVm {
    parked: Mutex<Vec<RawVcpu>>,
    making: Mutex<Making>,
    /// Set by the first vCPU, when KVM has said which components it accepts.
    fpu: OnceLock<FpuLayout>,
    vm: VmFd,
    flusher: Flusher,
    adopted: AdoptedSlots,
    monitor: Monitor,
    facts: HostFacts,
}

impl KvmVm {
    /// A VM whose memory is `pool`, without vCPUs. `device` is the path of `/dev/kvm`.
    ///
    /// # Errors
    /// [`SetupError`].
    pub fn new(device: &Path, pool: Arc<FramePool>) -> Result<Arc<Self>, SetupError> {
        let (kvm, facts) = host::open(device)?;
        interrupt::install_handler()?;
        let model = CpuModel::of_host(&kvm, facts.capability("KVM_CAP_XSAVE2"))?;
        let vm = loop {
            match kvm.create_vm() {
                // A signal while KVM allocates: again, says its documentation.
                Err(error) if error.errno() == libc::EINTR => {}
                result => break result.map_err(SetupError::ioctl("KVM_CREATE_VM"))?,
            }
        };
        let window = Window::new(pool.map_window()?);
        let slot = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: window.bytes(),
            userspace_addr: window.address(),
        };
        // SAFETY: the window is a mapping of that size, nobody else's, and is unmapped after the VM is gone.
        unsafe { vm.set_user_memory_region(slot) }.map_err(|error| {
            SetupError::host(
                "KVM_SET_USER_MEMORY_REGION of the frame pool",
                Some(0..window.bytes()),
                error.errno(),
            )
        })?;
        let flusher = Flusher::new(window).map_err(|source| SetupError::Host {
            what: "mapping a page for flushing".to_owned(),
            addresses: None,
            source,
        })?;
        let monitor = Monitor::new(pool)?;
        Ok(Arc::new(Self {
            parked: Mutex::new(Vec::new()),
            making: Mutex::new(Making { model, made: 0 }),
            fpu: OnceLock::new(),
            vm,
            flusher,
            adopted: AdoptedSlots::default(),
            monitor,
            facts,
        }))
    }

    /// From now on `faults` decides over the VM's fault points, and over those of vCPUs that are leased from now on. Once.
    pub fn arm(&self, faults: Faults) {
        let _ = self.flusher.faults.set(faults);
    }

    fn fail(&self, point: &'static Point) -> Option<i32> {
        self.flusher.faults.get()?.fail(point)
    }

    fn faults(&self) -> Faults {
        self.flusher.faults.get().cloned().unwrap_or_default()
    }

    /// The place and the raw value of the entry that belongs into the upper half of every root table that a vCPU of this
    /// VM walks. It is constant, and it is not an entry of the shadow map: leave it alone when that is zapped.
    pub fn monitor_entry(&self) -> (usize, u64) {
        self.monitor.entry()
    }

    /// A vCPU that walks the table `root`, which holds the [monitor's entry](Self::monitor_entry), with all registers
    /// zero and the FPU of a new process.
    ///
    /// # Errors
    /// [`SetupError`]; [`SetupError::VcpuLimit`] where too many are in use at once.
    pub fn create_vcpu(self: &Arc<Self>, root: Pfn) -> Result<KvmVcpu, SetupError> {
        let parked = self.parked.lock().pop();
        let raw = match parked {
            Some(raw) => raw,
            None => self.make_vcpu()?,
        };
        raw.reset(self.fpu())?;
        Ok(KvmVcpu::new(raw, Arc::clone(self), root))
    }

    fn make_vcpu(&self) -> Result<RawVcpu, SetupError> {
        let mut making = self.making.lock();
        let number = making.made;
        if number >= self.max_vcpus() {
            return Err(SetupError::VcpuLimit { limit: self.max_vcpus() });
        }
        // Counted even if it fails below: KVM does not give a number back.
        making.made += 1;
        let pages = self.monitor.add_vcpu(number)?;
        let raw = RawVcpu::new(&self.vm, &mut making.model, number, pages)?;
        let _ = self.fpu.set(making.model.fpu.clone());
        self.flusher.register(&raw.state);
        Ok(raw)
    }

    /// Takes a vCPU back whose guest thread is gone.
    fn park(&self, raw: RawVcpu) {
        self.parked.lock().push(raw);
    }

    fn fpu(&self) -> &FpuLayout {
        self.fpu.get_or_init(|| self.making.lock().model.fpu.clone())
    }

    /// The VM's flush strategy, for its shadow map.
    pub fn tlb(self: &Arc<Self>) -> Arc<dyn Tlb> {
        Arc::new(KvmTlb { vm: Arc::clone(self) })
    }

    /// The VM's memslots for adopted mappings, for the watch over its address space.
    pub fn host_slots(self: &Arc<Self>) -> Arc<dyn HostSlots> {
        Arc::new(KvmHostSlots { vm: Arc::clone(self) })
    }

    /// The most vCPUs that can be in use at once.
    pub fn max_vcpus(&self) -> usize {
        usize::try_from(self.facts.capability("KVM_CAP_MAX_VCPUS")).unwrap_or(0).max(1)
    }

    /// The addresses, in this process, of the mapping of the frame pool that KVM has as its RAM.
    pub fn window(&self) -> std::ops::Range<u64> {
        let window = &self.flusher.window;
        window.address()..window.address() + window.bytes()
    }

    /// The ways to flush translations that are in use: those that work here.
    pub fn flush_methods(&self) -> Vec<FlushMethod> {
        self.flusher.methods()
    }

    /// What this host is.
    pub fn facts(&self) -> &HostFacts {
        &self.facts
    }
}
