// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The KVM engine: ring 3 in long mode, with the shadow map as the page table that the CPU walks.
//!
//! ```text
//! KvmVm ─┬─ VM fd, one memslot: the frame pool's file through the window      window.rs
//!        ├─ the monitor: stubs, IDT, GDT, a TSS and a stack page a vCPU       monitor.rs
//!        ├─ flush methods, and which of them work here                        flush.rs, probe.rs
//!        ├─ memslots of adopted mappings                                      host_slots.rs
//!        └─ parked vCPUs                                                      raw_vcpu.rs, fpu.rs
//! KvmVcpu ─ entry, exit, registers                                            vcpu.rs, exit.rs, interrupt.rs
//!           and what is known of one that is lost                             snapshot.rs
//! ```
//!
//! Locks, all of them leaves: `parked` (free list), the flusher's registry and dummy slot, the list of adopted memslots, the
//! monitor's list of frames. `making` is held while a vCPU is made and covers the leaf locks taken in that.

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

pub use error::KvmError;
pub use flush::FlushMethod;
pub use host::{Backend, Capability, KvmFacts, facts};
pub use probe::{Change, Effort, FlushReport, FlushRow};
pub use vcpu::KvmVcpu;

use crate::engine::{Engine, EngineKind, HostFacts, Marks, SetupError, Vcpu};
use flush::{Flusher, KvmTlb};
use host_slots::{AdoptedSlots, KvmHostSlots};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use monitor::Monitor;
use raw_vcpu::{CpuModel, RawVcpu};
use shadow_mmu::addr::Pfn;
use shadow_mmu::frame::FramePool;
use shadow_mmu::inject::Faults;
use shadow_mmu::mm::watch::HostSlots;
use shadow_mmu::shadow::{Prefaulted, Tlb};
use shadow_mmu::sync::{Arc, Mutex};
use std::ops::Range;
use std::path::Path;
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
    vm: VmFd,
    flusher: Flusher,
    adopted: AdoptedSlots,
    monitor: Monitor,
    facts: KvmFacts,
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
                result => break result.map_err(KvmError::ioctl("KVM_CREATE_VM"))?,
            }
        };
        let window = Window::new(pool.map_window().map_err(KvmError::from)?);
        let slot = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: window.bytes(),
            userspace_addr: window.address(),
        };
        // SAFETY: the window is a mapping of that size, nobody else's, and is unmapped after the VM is gone.
        unsafe { vm.set_user_memory_region(slot) }.map_err(|error| {
            KvmError::host(
                "KVM_SET_USER_MEMORY_REGION of the frame pool",
                Some(0..window.bytes()),
                error.errno(),
            )
        })?;
        let flusher = Flusher::new(window).map_err(|source| KvmError::Host {
            what: "mapping a page for flushing".to_owned(),
            addresses: None,
            source,
        })?;
        let monitor = Monitor::new(pool)?;
        Ok(Arc::new(Self {
            parked: Mutex::new(Vec::new()),
            making: Mutex::new(Making { model, made: 0 }),
            vm,
            flusher,
            adopted: AdoptedSlots::default(),
            monitor,
            facts,
        }))
    }

    /// One vCPU more: a parked one, if there is one, else a new one of KVM's.
    fn new_vcpu(self: &Arc<Self>, root: Pfn) -> Result<KvmVcpu, SetupError> {
        let parked = self.parked.lock().pop();
        let raw = match parked {
            Some(raw) => raw,
            None => self.make_vcpu()?,
        };
        raw.reset()?;
        Ok(KvmVcpu::new(raw, Arc::clone(self), root))
    }

    fn make_vcpu(&self) -> Result<RawVcpu, SetupError> {
        let mut making = self.making.lock();
        let number = making.made;
        if number >= self.max_vcpus() {
            return Err(SetupError::VcpuLimit { engine: EngineKind::Kvm, limit: self.max_vcpus() });
        }
        // Counted even if it fails below: KVM does not give a number back.
        making.made += 1;
        let pages = self.monitor.add_vcpu(number)?;
        let raw = RawVcpu::new(&self.vm, &mut making.model, number, pages)?;
        self.flusher.register(&raw.state);
        Ok(raw)
    }

    /// Takes a vCPU back whose guest thread is gone.
    fn park(&self, raw: RawVcpu) {
        self.parked.lock().push(raw);
    }
}

impl Engine for KvmVm {
    fn kind(&self) -> EngineKind {
        EngineKind::Kvm
    }

    fn create_vcpu(self: Arc<Self>, root: Pfn) -> Result<Box<dyn Vcpu>, SetupError> {
        Ok(Box::new(self.new_vcpu(root)?))
    }

    fn tlb(self: Arc<Self>) -> Arc<dyn Tlb> {
        Arc::new(KvmTlb { vm: self })
    }

    fn host_slots(self: Arc<Self>) -> Result<Arc<dyn HostSlots>, SetupError> {
        Ok(Arc::new(KvmHostSlots { vm: self }))
    }

    fn max_vcpus(&self) -> usize {
        usize::try_from(self.facts.capability("KVM_CAP_MAX_VCPUS")).unwrap_or(0).max(1)
    }

    fn upper_entry(&self) -> Option<(usize, u64)> {
        Some(self.monitor.entry())
    }

    /// Where KVM shadows the guest's tables it brings in what has the marks eight at a time.
    fn prefaulted(&self) -> Prefaulted {
        match self.facts.backend.is_two_dimensional() {
            true => Prefaulted::Old,
            false => Prefaulted::Young,
        }
    }

    /// What KVM has as its RAM.
    fn window(&self) -> Option<Range<u64>> {
        let window = &self.flusher.window;
        Some(window.address()..window.address() + window.bytes())
    }

    fn arm(&self, faults: Faults) {
        self.flusher.faults.arm(faults);
    }

    fn marks(&self) -> Marks {
        self.facts.backend.marks()
    }

    fn facts(&self) -> HostFacts {
        HostFacts::with(Some(self.facts.clone()))
    }

    fn describe(&self) -> Vec<String> {
        let methods: Vec<_> = self.flusher.methods().iter().map(ToString::to_string).collect();
        vec![format!("flush methods that work: {}", methods.join(", "))]
    }
}
