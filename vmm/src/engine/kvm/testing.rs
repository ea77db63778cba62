// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the KVM engine's own tests share: the [guest](conformance::guest) with this engine's types.

use super::{KvmVcpu, KvmVm};
use crate::engine::{EngineKind, conformance, testing};
use shadow_mmu::frame::{FramePool, FreedFrames};
use std::path::PathBuf;
use std::sync::Arc;

pub(super) use conformance::guest::{
    CODE, DATA, FOREVER, RW, STACK_TOP, SYSCALL, exception, page_fault, start,
};

/// The device to test with. `None`, and one line: the test has nothing to do.
pub(super) fn test_device() -> Option<PathBuf> {
    Some(testing::config(EngineKind::Kvm)?.kvm_device)
}

pub(super) type Guest = conformance::guest::Guest<KvmVm>;

impl Guest {
    /// A guest with `code` and a stack, or `None` where KVM is not tested.
    pub(super) fn new(code: &[u8]) -> Option<Self> {
        let device = test_device()?;
        let pool = Arc::new(FramePool::new(64 << 20, FreedFrames::Keep).unwrap());
        let vm = KvmVm::new(&device, Arc::clone(&pool)).unwrap();
        Some(Self::over(pool, vm, code))
    }

    /// A vCPU at the start of the code.
    pub(super) fn vcpu(&self) -> KvmVcpu {
        let mut vcpu = self.vm.new_vcpu(self.root).unwrap();
        start(&mut vcpu);
        vcpu
    }
}
