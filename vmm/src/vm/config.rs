// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a machine is to be like, and the flush strategy that comes of it.

use crate::deterministic::Deterministic;
use crate::engine::EngineConfig;
use crate::inject::points::FLUSH;
use shadow_mmu::addr::{PAGE_SIZE, Pfn};
use shadow_mmu::frame::{FramePool, FreedFrames};
use shadow_mmu::inject::{Effect, Faults};
use shadow_mmu::notifier::MmuNotifier;
use shadow_mmu::shadow::{AdBits, FaultAroundPolicy, Tlb, Zapped};
use std::sync::Arc;
use std::time::Duration;

/// How the pages of the window, the engine's view of the frames, come to be. An engine without one has nothing to fill: the
/// first two are the same to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WindowFill {
    /// As the engine needs them, and ahead of need for what a fault brought along.
    #[default]
    Ahead,
    /// As the engine needs them.
    OnDemand,
    /// By a thread that serves userfaultfd events, each after this long: what monitors do that back guest memory themselves.
    /// For comparison; an engine without a window refuses.
    Userfaultfd(Duration),
}

/// Whose frames a machine has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Frames {
    /// Its own.
    Own,
    /// Those of a pool that several machines share.
    Shared,
}

/// What a machine is made of.
#[derive(Debug, Clone)]
pub struct VmConfig {
    /// What runs it.
    pub engine: EngineConfig,
    /// Bytes of memory, page tables included. Where the pool is shared it is what the guest adds to it, and how many threads it
    /// may have goes by it; nothing else holds the guest to it.
    pub memory: u64,
    /// The frames, where several machines share them; `None`: a pool of its own, of `memory` bytes.
    pub pool: Option<Arc<FramePool>>,
    /// What a fault brings along.
    pub fault_around: FaultAroundPolicy,
    /// What happens to freed frames of a pool of its own.
    pub freed: FreedFrames,
    /// How the window is filled.
    pub window: WindowFill,
    /// Further listeners, which hear of everything from before the program is loaded.
    pub listeners: Vec<Arc<dyn MmuNotifier>>,
    /// What is to be known of the guest's accesses.
    pub tracking: Tracking,
    /// What may be made to go wrong.
    pub faults: Faults,
    /// What decides everything that a run may differ in from the next, where something does. For one machine.
    pub deterministic: Option<Arc<Deterministic>>,
}

impl VmConfig {
    /// A machine of this engine with `memory` bytes of its own, and nothing special about it.
    pub fn new(engine: EngineConfig, memory: u64) -> Self {
        Self {
            engine,
            memory,
            pool: None,
            fault_around: FaultAroundPolicy::default(),
            freed: FreedFrames::default(),
            window: WindowFill::default(),
            listeners: Vec::new(),
            tracking: Tracking::default(),
            faults: Faults::default(),
            deterministic: None,
        }
    }

    /// The same for the guest with this number.
    #[must_use]
    pub fn numbered(mut self, number: usize) -> Self {
        self.faults = self.faults.of_vm(u32::try_from(number).unwrap_or(u32::MAX));
        self
    }
}

/// Whether A and D bits are to say what the guest did, or only have to be right for the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Accesses {
    /// Nobody asks: pages that a fault brings along may look accessed from the start, where that makes the guest faster.
    #[default]
    Untold,
    /// Somebody will.
    Told,
}

/// Whose A and D bits are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AdBitsUse {
    /// The CPU's, as the engine found it to set them.
    #[default]
    Engine,
    /// None: accesses and writes are seen by taking rights away. For comparison, and to test what CPUs without these bits need.
    Off,
}

impl AdBitsUse {
    /// What that comes to with this engine's TLB.
    pub(super) fn of(self, engine: &dyn Tlb) -> AdBits {
        match self {
            Self::Engine => engine.ad_bits(),
            Self::Off => AdBits::None,
        }
    }
}

/// What is to be known of a guest's accesses. By default nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tracking {
    /// Whether the guest is aged or its writes are logged.
    pub accesses: Accesses,
    /// By whose A and D bits.
    pub ad_bits: AdBitsUse,
    /// Entries of the dirty ring of each vCPU; `None` for no rings.
    pub ring_entries: Option<u32>,
}

/// The engine's, with what the configuration takes away from it.
#[derive(Debug)]
pub(super) struct ConfiguredTlb {
    pub(super) engine: Arc<dyn Tlb>,
    pub(super) window: WindowFill,
    pub(super) ad_bits: AdBits,
    pub(super) faults: Faults,
}

impl Tlb for ConfiguredTlb {
    fn flush(&self, zapped: &[Zapped]) {
        let first = zapped.first().map(|zapped| zapped.gfn.0 * PAGE_SIZE);
        match self.faults.hit_with(&FLUSH, first, None) {
            // One by one is in parts, and in between others may run.
            Effect::Split => zapped.chunks(1).for_each(|one| self.engine.flush(one)),
            _ => self.engine.flush(zapped),
        }
    }
    fn flush_all(&self) {
        self.faults.hit(&FLUSH);
        self.engine.flush_all();
    }
    fn ad_bits(&self) -> AdBits {
        self.ad_bits
    }
    fn prefault(&self, frames: &[Pfn]) {
        match self.window {
            WindowFill::Ahead => self.engine.prefault(frames),
            WindowFill::OnDemand | WindowFill::Userfaultfd(_) => {}
        }
    }
}
