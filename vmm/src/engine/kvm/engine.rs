// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! KVM as one [`Engine`] of several.

use super::{HostFacts, KvmVm};
use crate::engine::{Engine, EngineKind, SetupError, Vcpu};
use shadow_mmu::addr::Pfn;
use shadow_mmu::inject::Faults;
use shadow_mmu::mm::watch::HostSlots;
use shadow_mmu::shadow::{AdBits, Prefaulted, Tlb};
use shadow_mmu::sync::Arc;
use std::ops::Range;

impl Engine for KvmVm {
    fn kind(&self) -> EngineKind {
        EngineKind::Kvm
    }

    fn create_vcpu(self: Arc<Self>, root: Pfn) -> Result<Box<dyn Vcpu>, SetupError> {
        Ok(Box::new(Self::create_vcpu(&self, root)?))
    }

    fn tlb(self: Arc<Self>) -> Arc<dyn Tlb> {
        Self::tlb(&self)
    }

    fn host_slots(self: Arc<Self>) -> Result<Arc<dyn HostSlots>, SetupError> {
        Ok(Self::host_slots(&self))
    }

    fn max_vcpus(&self) -> usize {
        Self::max_vcpus(self)
    }

    fn ad_bits(&self) -> AdBits {
        Self::ad_bits(self)
    }

    fn upper_entry(&self) -> Option<(usize, u64)> {
        Some(self.monitor_entry())
    }

    fn prefaulted(&self) -> Prefaulted {
        // Where KVM shadows the guest's tables it brings in what has the marks eight at a time.
        match self.facts().kvm_backend.is_two_dimensional() {
            true => Prefaulted::Old,
            false => Prefaulted::Young,
        }
    }

    fn window(&self) -> Option<Range<u64>> {
        Some(Self::window(self))
    }

    fn arm(&self, faults: Faults) {
        Self::arm(self, faults);
    }

    fn facts(&self) -> &HostFacts {
        Self::facts(self)
    }

    fn describe(&self) -> Vec<String> {
        let methods: Vec<_> = self.flush_methods().iter().map(ToString::to_string).collect();
        vec![format!("flush methods that work: {}", methods.join(", "))]
    }
}
