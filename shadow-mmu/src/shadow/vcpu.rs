// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the shadow map keeps for one vCPU. It belongs to the vCPU's thread, so nothing in here is locked.

use super::{FaultAround, FaultAroundPolicy, VcpuRing};
use crate::addr::{Access, Hva, HvaRange, PAGE_SIZE};
use crate::mm::FaultRequest;

/// A vCPU, as the fault path knows it.
#[derive(Debug)]
pub struct VcpuMmu {
    /// Its faults so far, by which the next ones guess.
    pub(super) around: FaultAround,
    /// Where its writes are logged, if they are logged in rings.
    pub(super) ring: Option<VcpuRing>,
    /// Addresses at which each page comes by a fault of its own.
    alone: Vec<HvaRange>,
}

impl VcpuMmu {
    /// A vCPU without a ring, whose faults bring along what `policy` says.
    pub fn new(policy: FaultAroundPolicy) -> Self {
        Self { around: FaultAround::new(policy), ring: None, alone: Vec::new() }
    }

    /// The same with a ring. Its collector's end must have been [added](super::ShadowMmu::add_dirty_ring).
    #[must_use]
    pub fn with_ring(mut self, ring: VcpuRing) -> Self {
        self.ring = Some(ring);
        self
    }

    /// From now on every page in `ranges`, addresses of the address space, is brought in by a fault of its own, and brings no other:
    /// so each first access to one of them is a fault. In the place of ranges that were said before.
    pub fn keep_alone(&mut self, ranges: Vec<HvaRange>) {
        let whole_pages = |range: HvaRange| HvaRange {
            start: range.start.page_floor(),
            end: Hva(range.end.0.next_multiple_of(PAGE_SIZE)),
        };
        self.alone = ranges.into_iter().map(whole_pages).collect();
    }

    /// What to ask the primary for, for a fault at `hva`.
    pub(super) fn request(&mut self, hva: Hva, access: Access) -> FaultRequest {
        let mut request = self.around.request(hva, access);
        let around = &mut request.around;
        for alone in &self.alone {
            if alone.contains(hva) {
                *around = HvaRange::page(hva.page_floor());
            } else if alone.end <= hva {
                around.start = around.start.max(alone.end);
            } else {
                around.end = around.end.min(alone.start);
            }
        }
        request
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
