// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the shadow map asks of whoever runs the guest: drop cached translations.

use super::spte::{AdBits, Spte};
use crate::addr::{Gfn, Pfn};
use crate::table::span;
use std::fmt::Debug;
use std::ops::Range;

/// A leaf that was removed from the shadow map or lost rights, as it was before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Zapped {
    /// Where it mapped.
    pub gfn: Gfn,
    /// 1 for a page, 2 for 2 MiB, 3 for 1 GiB, as the CPU counts levels.
    pub level: u8,
    /// The entry that was there, with the A and D that the CPU had set by then.
    pub old: Spte,
}

impl Zapped {
    /// The pages that it mapped.
    pub fn pages(&self) -> Range<u64> {
        self.gfn.0..self.gfn.0 + span(self.level)
    }
}

/// The cached translations of a guest: the CPUs' TLBs and whatever the hypervisor below keeps of our entries.
///
/// Called with `mmu_lock` held: for writing by who removes leaves, for reading by who ages them, so that two calls may run at
/// once. An implementation must not call into `Mm` or `ShadowMmu`, and must not wait for a vCPU thread to do more than leave
/// the guest.
pub trait Tlb: Debug + Send + Sync {
    /// Returns when no vCPU can reach memory through any of `zapped`, nor ever will without a fresh walk. Entries of the
    /// shadow map have been changed before the call. That walk sets A in entries of upper levels again, too.
    ///
    /// There is no error: an engine that cannot flush stops its vCPUs for good, which also keeps the promise.
    fn flush(&self, zapped: &[Zapped]);

    /// The same for every translation there is, and for the entries of upper levels.
    fn flush_all(&self);

    /// What the CPUs do with A and D. Asked once, when the shadow map is made.
    fn ad_bits(&self) -> AdBits {
        AdBits::AfterFlush
    }

    /// A hint: sptes for these frames, in this order, were just installed ahead of need. What the host does per frame at
    /// first use can be done for all of them at once.
    fn prefault(&self, frames: &[Pfn]) {
        let _ = frames;
    }
}

/// For a shadow map that no CPU walks: nothing is cached, so nothing is flushed.
#[derive(Debug, Default, Clone, Copy)]
pub struct NoTlb;

impl Tlb for NoTlb {
    fn flush(&self, _: &[Zapped]) {}
    fn flush_all(&self) {}
    fn ad_bits(&self) -> AdBits {
        AdBits::Unflushed
    }
}
