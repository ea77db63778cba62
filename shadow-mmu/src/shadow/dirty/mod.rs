// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The dirty log of a memslot: which of its pages were written since they were last reported. `kvm_get_dirty_log_protect`,
//! `kvm_clear_dirty_log_protect`, `KVM_CAP_DIRTY_LOG_RING`.
//!
//! # How a write is seen ([`DirtyMethod`])
//! * *Write protection.* A leaf has W only while its page is recorded (I33). The fault that gives it W records the page: the
//!   record first, then W, both under one hold of `mmu_lock` for reading (R20); so W is never there without its record, not
//!   even for a report that only copies. Leaves that a fault brings along, and those of reads, get no W.
//! * *The D bit.* Nothing is recorded at faults; whoever asks reads D of every leaf. A leaf that is removed hands D to the log.
//!
//! # How it is reported
//! *Report and arm*: under `mmu_lock` for writing the record is taken and the leaf loses W (or D); the flush follows before
//! the lock is let go, and so before anybody is told (I32, R20b). From then on the next write faults (or sets D) again. In
//! [`ProtectOn::Clear`] a report only copies; what the reader has dealt with it clears, and that arms.
//!
//! Nobody but the vCPUs goes through leaves. What devices and umbra write, and what changes because a mapping was taken away
//! or moved there, is told by [`written`](crate::notifier::MmuNotifier::written), and goes to the bitmap also where vCPUs
//! have rings. A device's write is told right after it is made, so a report may miss it that was made between the two; the
//! next one has it.
//!
//! A mapping that is made brings bytes along that nobody wrote: of a file, or of shared memory that was mapped elsewhere. A
//! reader takes the pages of a new VMA with an object for written.
//!
//! A record may say that a page was written which was not yet, or never, but never the reverse (I37). Pages are guest frames:
//! memory that is mapped at two addresses is reported at the one that was written.
//!
//! # Switching on
//! The log is published with the slots, so a fault that began without it starts over (I35). Then every leaf of the slot is
//! armed, or ([`Initially::AllDirty`]) every page there is counts as written and nothing is armed; pages whose leaves have W
//! at once (I33), the others before switching on returns. A report of a log that another thread ends meanwhile is an error:
//! what it took could be missing in the next log.
//!
//! # Locks
//! The list of rings, under which entries are taken back; then as for every removal. The bitmap's is a leaf lock.

mod bitmap;
mod harvest;
mod pages;
mod ring;
mod runs;

pub use pages::DirtyPages;
pub use ring::{DirtyGfn, DirtyRing, RING_LEAST, RING_MOST, VcpuRing};

use super::{AdBits, Core, Memslot, ShadowMmu, SlotError, Spte};
use crate::addr::{Gfn, HvaRange};
use crate::mm::WriteLogging;
use crate::sync::Arc;
use bitmap::Bitmap;

/// Parts of the bitmap that are always granted: 1 MiB of bits, for 32 GiB of memory.
const PARTS_LEAST: usize = 256;
/// Beyond that, as many as frames of the pool divided by this: 1/64 of the guest's memory.
const FRAMES_A_PART: usize = 64;

/// Parts of 128 MiB that a log of a guest with so many frames has bits of their own for: as [`DirtyPages::insert_within`]
/// takes it.
pub fn dirty_parts_limit(frames: usize) -> usize {
    (frames / FRAMES_A_PART).max(PARTS_LEAST)
}

/// How a log sees that a page is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DirtyMethod {
    /// By D, which the CPU sets.
    DirtyBit,
    /// By the fault of the first write.
    WriteProtect,
}

/// Where a log keeps what vCPUs write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DirtyRecords {
    /// A bit a page, for [`ShadowMmu::get_dirty_log`].
    Bitmap,
    /// The rings of those vCPUs that have one, for their collectors. Needs [`DirtyMethod::WriteProtect`].
    Rings,
}

/// When pages are armed again that were reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProtectOn {
    /// With the report.
    Get,
    /// By [`ShadowMmu::clear_dirty_log`] (`KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`).
    Clear,
}

/// What a log begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Initially {
    /// No page is written.
    Clean,
    /// Every page there is counts as written, and switching on arms none (`KVM_DIRTY_LOG_INITIALLY_SET`). Needs
    /// [`ProtectOn::Clear`].
    AllDirty,
}

/// What a log is to be like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirtyLogConfig {
    /// How writes are seen.
    pub method: DirtyMethod,
    /// Where they are kept.
    pub records: DirtyRecords,
    /// When pages are armed again.
    pub protect: ProtectOn,
    /// What is there at first.
    pub initially: Initially,
}

/// Why a dirty log cannot do what it is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DirtyLogError {
    /// No such slot, or it is logged already where it must not be, or not where it must.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// The slot has a log already (`EEXIST`).
    #[error("the memslot at guest frame {:#x} is logged already", .0.0)]
    Logged(Gfn),
    /// The slot has no log (`ENOENT`).
    #[error("the memslot at guest frame {:#x} is not logged", .0.0)]
    NotLogged(Gfn),
    /// The CPU sets no D.
    #[error("this engine's CPUs set no dirty bits: log by write protection")]
    NoDirtyBit,
    /// Rings are filled by faults.
    #[error("a ring is filled by the faults of writes: it needs write protection, not the dirty bit")]
    RingsNeedFaults,
    /// `AllDirty` without `ProtectOn::Clear`.
    #[error("a log that begins with every page written is cleared by its reader: it needs protect on clear")]
    AllDirtyNeedsClear,
    /// Inside a pair or an op of this thread: it would wait for itself.
    #[error(
        "inside a notifier callback or a pair a dirty log can be neither begun nor ended: it would wait for itself"
    )]
    InsideCallback,
    /// A log whose report arms has nothing to clear (`EINVAL`).
    #[error("this log is cleared by its report")]
    ClearedByGet,
    /// Misaligned, or beyond the slot (`EINVAL`).
    #[error("pages {start:#x}..{end:#x} cannot be cleared: not within the slot, or not multiples of 64")]
    Range {
        /// First page.
        start: u64,
        /// Behind the last.
        end: u64,
    },
    /// A ring of a size that there is not.
    #[error("a dirty ring of {0} entries: give a power of two from {RING_LEAST} to {RING_MOST}")]
    RingSize(u32),
}

/// The log of one slot.
#[derive(Debug)]
pub(super) struct DirtyLog {
    slot: Gfn,
    config: DirtyLogConfig,
    bitmap: Bitmap,
    /// While it lives, the address space tells of writes that no vCPU makes.
    _writes: WriteLogging,
}

impl DirtyLog {
    /// Whether a leaf of the slot may have W only while its page is recorded.
    pub(super) fn protects(&self) -> bool {
        self.config.method == DirtyMethod::WriteProtect
    }

    /// Whether no page is written at first.
    pub(super) fn begins_clean(&self) -> bool {
        self.config.initially == Initially::Clean
    }

    /// Records what a leaf that is removed knows.
    pub(super) fn removed(&self, gfn: Gfn, old: Spte) {
        if self.config.method == DirtyMethod::DirtyBit && old.is_dirty() {
            self.mark(gfn);
        }
    }

    /// Records a write that no vCPU made, or one that D told of.
    pub(super) fn mark(&self, gfn: Gfn) {
        self.bitmap.mark(gfn.0 - self.slot.0);
    }

    /// Records that a leaf is about to get W for the vCPU of `ring`. Under the same hold of `mmu_lock` (R20).
    pub(super) fn record(&self, gfn: Gfn, ring: Option<&mut VcpuRing>) {
        let page = gfn.0 - self.slot.0;
        let pushed = match ring {
            Some(ring) if self.config.records == DirtyRecords::Rings => {
                ring.push(DirtyGfn { slot: self.slot, page })
            }
            _ => false,
        };
        if !pushed {
            self.bitmap.mark(page);
        }
    }

    /// Whether the record of a page that has W can be found in the bitmap (I33), rather than in some ring.
    pub(super) fn keeps_bits(&self) -> bool {
        self.protects() && self.config.records == DirtyRecords::Bitmap
    }

    /// Whether the page is in the bitmap.
    pub(super) fn is_marked(&self, gfn: Gfn) -> bool {
        self.bitmap.contains(gfn.0 - self.slot.0)
    }
}

impl Core {
    /// `written`, for the logs of all slots that show the range.
    pub(super) fn log_writes(&self, range: HvaRange) {
        let slots = self.slots.read().clone();
        for (slot, gfns) in slots.parts_of(range) {
            if let Some(log) = slots.log_of(slot.gfn) {
                log.bitmap.mark_range(gfns.start - slot.gfn.0..gfns.end - slot.gfn.0);
            }
        }
    }
}

impl ShadowMmu {
    /// Begins to log writes to the slot that starts at `slot`. Waits until no pair is open, as every change of slots; a guest
    /// that changes its mappings without pause makes it wait for as long as it does.
    ///
    /// # Errors
    /// [`DirtyLogError`].
    pub fn enable_dirty_log(&self, slot: Gfn, config: DirtyLogConfig) -> Result<(), DirtyLogError> {
        self.refuse_inside()?;
        if config.records == DirtyRecords::Rings && config.method == DirtyMethod::DirtyBit {
            return Err(DirtyLogError::RingsNeedFaults);
        }
        if config.method == DirtyMethod::DirtyBit && self.core.ad_bits() == AdBits::None {
            return Err(DirtyLogError::NoDirtyBit);
        }
        if config.initially == Initially::AllDirty && config.protect == ProtectOn::Get {
            return Err(DirtyLogError::AllDirtyNeedsClear);
        }
        let limit = dirty_parts_limit(self.core.pool.frame_count());
        let log = |memslot: &Memslot| DirtyLog {
            slot,
            config,
            bitmap: Bitmap::new(memslot.pages, limit),
            // Before the log is published: what it does not hear of, is in what it begins with.
            _writes: self.mm.log_writes(),
        };
        self.set_log(slot, log)?;
        match config.initially {
            Initially::Clean => {}
            Initially::AllDirty => self.mark_all_present(slot),
        }
        Ok(())
    }

    /// Every page that the address space has, written or not.
    fn mark_all_present(&self, slot: Gfn) {
        let slots = self.slots();
        let (Some(memslot), Some(log)) = (slots.find(slot), slots.log_of(slot)) else { return };
        self.mm.for_each_age(|_, range, _| {
            let gfns = memslot.gfns_of(range);
            log.bitmap.mark_range(gfns.start.saturating_sub(slot.0)..gfns.end.saturating_sub(slot.0));
        });
    }

    /// Ends the log of the slot that starts at `slot`. Waits until no pair is open. W comes back page by page, without asking
    /// the primary. Rings keep what they have: a vCPU that waits for room goes on waiting until its ring was harvested and
    /// reset.
    ///
    /// # Errors
    /// [`DirtyLogError::NotLogged`], [`DirtyLogError::Slot`].
    pub fn disable_dirty_log(&self, slot: Gfn) -> Result<(), DirtyLogError> {
        self.refuse_inside()?;
        self.unset_log(slot)
    }

    fn refuse_inside(&self) -> Result<(), DirtyLogError> {
        if self.mm.notifiers().inside() { Err(DirtyLogError::InsideCallback) } else { Ok(()) }
    }

    /// From now on [`reset_dirty_rings`](Self::reset_dirty_rings) takes back entries of this ring too, until nobody else has
    /// it.
    pub fn add_dirty_ring(&self, ring: &Arc<DirtyRing>) {
        self.core.rings.lock().push(Arc::clone(ring));
    }
}
