// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the KVM engine's own tests share: the [guest](conformance::guest) with this engine's types.

use super::{KvmVcpu, KvmVm};
use crate::engine::conformance;
use shadow_mmu::frame::{FramePool, FreedFrames};
use std::path::PathBuf;
use std::sync::Arc;

pub(super) use conformance::guest::{
    CODE, DATA, FOREVER, LOAD, RW, STACK_TOP, SYSCALL, exception, page_fault, start,
};

/// The device to test with. `None`: there is none, and the test has nothing to do. One that exists but cannot be used
/// makes the test fail where it uses it.
pub(super) fn test_device() -> Option<PathBuf> {
    let path = std::env::var_os("UMBRA_KVM_DEVICE").map_or_else(|| PathBuf::from("/dev/kvm"), PathBuf::from);
    if path.exists() {
        return Some(path);
    }
    // Where KVM is known to be, a missing device must not pass as "skipped".
    let required = std::env::var_os("UMBRA_REQUIRE_KVM").is_some();
    assert!(!required, "{} is required here and missing", path.display());
    println!("skipped: no {}", path.display());
    None
}

pub(super) type Guest = conformance::guest::Guest<KvmVm>;

impl Guest {
    /// A guest with `code` and a stack, or `None` without a device.
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
