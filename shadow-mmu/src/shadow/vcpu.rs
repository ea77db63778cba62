// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the shadow map keeps for one vCPU. It belongs to the vCPU's thread, so nothing in here is locked.

use super::{FaultAround, FaultAroundPolicy, VcpuRing};

/// A vCPU, as the fault path knows it.
#[derive(Debug)]
pub struct VcpuMmu {
    /// Its faults so far, by which the next ones guess.
    pub(super) around: FaultAround,
    /// Where its writes are logged, if they are logged in rings.
    pub(super) ring: Option<VcpuRing>,
}

impl VcpuMmu {
    /// A vCPU without a ring, whose faults bring along what `policy` says.
    pub fn new(policy: FaultAroundPolicy) -> Self {
        Self { around: FaultAround::new(policy), ring: None }
    }

    /// The same with a ring. Its collector's end must have been [added](super::ShadowMmu::add_dirty_ring).
    #[must_use]
    pub fn with_ring(mut self, ring: VcpuRing) -> Self {
        self.ring = Some(ring);
        self
    }

    /// Whether the vCPU must not enter the guest until its ring was reset (`KVM_EXIT_DIRTY_RING_FULL`).
    pub fn is_ring_full(&self) -> bool {
        self.ring.as_ref().is_some_and(|ring| ring.ring().is_soft_full())
    }

    /// Its ring.
    pub fn ring(&self) -> Option<&VcpuRing> {
        self.ring.as_ref()
    }
}
