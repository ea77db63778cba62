// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The secondary MMU: the shadow map that the guest's CPUs walk.
//!
//! [`ShadowMmu`] translates guest frame numbers through memslots to addresses of an [`Mm`], and those to frames, and keeps
//! the result in four-level tables. It never invents a translation: it asks the `Mm`, under KVM's rule of sequence and
//! retry, and it listens to the `Mm`'s notifier to lose what is no longer true.
//!
//! | file | what | kernel |
//! | --- | --- | --- |
//! | [`spte`](Spte) | the entry, by value | `arch/x86/kvm/mmu/spte.h` |
//! | `entry` | the entry in its table, which the CPU changes too | `tdp_iter.h` |
//! | [`slots`](Memslot) | gfn ↔ hva | `kvm_main.c` |
//! | `invalidate` | sequence, windows, retry; the notifier ops | `kvm_main.c` |
//! | `fault` | the fault path | `mmu.c`, `tdp_mmu.c` |
//! | [`around`](FaultAround) | how much a fault brings along | `mm/filemap.c`, `mm/readahead.c` |
//! | [`vcpu`](VcpuMmu) | what is kept for a vCPU | |
//! | `zap` | removing leaves; table reclaim | `tdp_mmu.c` |
//! | `age` | young | `tdp_mmu.c` |
//! | [`dirty`](ShadowMmu::enable_dirty_log) | which pages were written | `kvm_main.c`, `dirty_ring.c` |
//! | [`gather`](Gather), [`tlb`](Tlb) | from a zap to its flush | `mm/mmu_gather.c` |
//! | [`walker`](Walker), [`soft_tlb`](SoftTlb) | the CPU's walk and its TLB, for engines that do both in software | |
//! | [`audit`](AuditReport) | the invariants, checked | |
//!
//! # Locking
//! `mmu_lock` is a readers-writer lock. Faults hold it for reading: they install by compare-exchange and so may race with each
//! other and with the CPU. Whoever takes leaves away holds it for writing, from before the first leaf is cleared until the
//! flush is done (R12). It guards the [windows](crate::notifier::windows), whose module has the rule of sequence and retry.
//!
//! # A fault, in the order that matters
//! 1. `seq` is read — *before* the slots and before the `Mm` is asked (R2).
//! 2. The slot; then [`Mm::fault`], without any lock of ours.
//! 3. `mmu_lock` for reading: gone? `seq` changed? the page in a window? Then all over again.
//! 4. The leaf is installed, with marks for the access that is about to be repeated. Neighbours follow, each checked against
//!    the windows for itself (R30).

mod age;
mod around;
mod audit;
mod dirty;
mod entry;
mod fault;
mod gather;
mod invalidate;
mod slots;
mod soft_tlb;
mod spte;
mod tlb;
mod vcpu;
mod walker;
mod written;
mod zap;

pub use around::{FaultAround, FaultAroundPolicy};
pub use audit::{AuditReport, Violation};
pub use dirty::{
    DirtyGfn, DirtyLogConfig, DirtyLogError, DirtyMethod, DirtyPages, DirtyRecords, DirtyRing, Initially,
    ProtectOn, RING_LEAST, RING_MOST, VcpuRing, dirty_parts_limit,
};
pub use fault::{FaultCause, FaultOutcome};
pub use gather::Gather;
pub use slots::{Memslot, Memslots, SlotAccess, SlotError};
pub use soft_tlb::{Filled, HostMappings, SoftTlb};
pub use spte::{AdBits, PRESENT, Spte};
pub use tlb::{NoTlb, Tlb, Zapped};
pub use vcpu::VcpuMmu;
pub use walker::{Translation, Walker};

use crate::addr::{Gfn, Pfn};
use crate::frame::{FramePool, OutOfFrames, Purpose};
use crate::mm::Mm;
use crate::notifier::windows::{Sequence, Windows};
use crate::notifier::{Misuse, Subscription};
use crate::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use crate::sync::{Arc, Condvar, Mutex, RwLock};
use crate::table::{Tables, index};

/// What marks a leaf gets that a fault brought along (`arch_wants_old_prefaulted_pte`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Prefaulted {
    /// None. A and D then say what the guest did, and nothing else.
    #[default]
    Old,
    /// A, and D where it may be written: the guest is expected to get there. A KVM that shadows guest tables brings in such
    /// leaves eight at a time, and without the marks one by one, so this halves the cost of a sequential touch there. For
    /// guests that nobody ages or tracks: until the marks are cleared, they say "touched" of pages that never were.
    Young,
}

/// Counters of a shadow map, under KVM's names where it has one.
#[derive(Debug, Default)]
pub struct ShadowStats {
    /// Faults that asked the primary.
    pub pf_taken: AtomicU64,
    /// Faults that installed or upgraded a leaf.
    pub pf_fixed: AtomicU64,
    /// Faults that gave back what tracking had taken, without asking the primary.
    pub pf_fast: AtomicU64,
    /// Faults that found the leaf good already.
    pub pf_spurious: AtomicU64,
    /// Times a fault began again because of an invalidation.
    pub pf_retried: AtomicU64,
    /// Leaves installed for neighbours.
    pub around_installed: AtomicU64,
    /// Leaves present now.
    pub pages_4k: AtomicU64,
    /// Leaves removed.
    pub zapped: AtomicU64,
    /// Flushes asked of the engine.
    pub flushes: AtomicU64,
    /// Page tables reclaimed.
    pub tables_reclaimed: AtomicU64,
    /// Leaves whose frame was found to differ from the primary's at a fault: a notification was missed (I17). A bug.
    pub stale_leaves: AtomicU64,
}

/// The part of a [`ShadowMmu`] that the notifier calls. It does not know the `Mm`, so it cannot call it.
#[derive(Debug)]
struct Core {
    pool: Arc<FramePool>,
    tables: Tables,
    tlb: Arc<dyn Tlb>,
    /// `mmu_lock`, and the windows in guest frames, which live under it.
    windows: RwLock<Windows>,
    seq: Sequence,
    slots: RwLock<Arc<Memslots>>,
    /// Pairs between their start and their end, of any range (`mn_active_invalidate_count`): the slots may not change
    /// meanwhile, or an end would not find what its start found (I40, R15).
    active: Mutex<usize>,
    idle: Condvar,
    /// Whether leaves that a fault brought along are [`Prefaulted::Young`].
    prefaulted_young: AtomicBool,
    /// An [`AdBits`].
    ad_bits: AtomicU32,
    /// The rings of vCPUs. Above `mmu_lock`.
    rings: Mutex<Vec<Arc<DirtyRing>>>,
    /// Table count at which empty tables are looked for.
    reclaim_at: AtomicUsize,
    stats: ShadowStats,
}

/// A shadow map over one address space, registered with its notifier for as long as it lives.
///
/// # Examples
/// ```
/// use shadow_mmu::addr::{Access, Gfn, Gpa, Hva};
/// use shadow_mmu::frame::{FramePool, FreedFrames};
/// use shadow_mmu::mm::{Backing, MapFlags, Mm};
/// use shadow_mmu::shadow::{FaultAroundPolicy, Memslot, NoTlb, ShadowMmu, SlotAccess, VcpuMmu};
/// use std::sync::Arc;
///
/// let pool = Arc::new(FramePool::new(1 << 20, FreedFrames::Keep)?);
/// let mm = Mm::new(pool)?;
/// let at = mm.mmap(Hva(0), 0x1000, Access::READ | Access::WRITE, MapFlags::PRIVATE, Backing::Anonymous)?;
/// let shadow = ShadowMmu::new(Arc::clone(&mm), Arc::new(NoTlb))?;
/// shadow.add_slot(Memslot { gfn: Gfn(0), pages: 1 << 35, hva: Hva(0), access: SlotAccess::ReadWrite })?;
///
/// let mut vcpu = VcpuMmu::new(FaultAroundPolicy::Off);
/// shadow.fault(&mut vcpu, Gpa(at.0), Access::WRITE)?;
/// assert!(shadow.spte(Gpa(at.0).gfn()).is_writable());
/// mm.munmap(at, 0x1000)?;
/// assert!(!shadow.spte(Gpa(at.0).gfn()).is_present(), "the notifier took it away");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct ShadowMmu {
    core: Arc<Core>,
    mm: Arc<Mm>,
    subscription: Subscription,
}

/// Why a shadow map could not be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ShadowError {
    /// No frame for the root table.
    #[error(transparent)]
    OutOfFrames(#[from] OutOfFrames),
    /// The address space takes no listeners.
    #[error(transparent)]
    Notifier(#[from] Misuse),
}

impl ShadowMmu {
    /// An empty map of `mm` without slots, whose cached translations `tlb` flushes.
    ///
    /// # Errors
    /// [`ShadowError`].
    pub fn new(mm: Arc<Mm>, tlb: Arc<dyn Tlb>) -> Result<Self, ShadowError> {
        let core = Arc::new(Core {
            pool: Arc::clone(mm.pool()),
            tables: Tables::new(Arc::clone(mm.pool()), Purpose::Table)?,
            ad_bits: AtomicU32::new(tlb.ad_bits() as u32),
            rings: Mutex::default(),
            tlb,
            windows: RwLock::default(),
            seq: Sequence::default(),
            slots: RwLock::default(),
            active: Mutex::new(0),
            idle: Condvar::new(),
            prefaulted_young: AtomicBool::new(false),
            reclaim_at: AtomicUsize::new(zap::RECLAIM_LEAST),
            stats: ShadowStats::default(),
        });
        let subscription = mm.register(Arc::clone(&core) as Arc<dyn crate::notifier::MmuNotifier>)?;
        Ok(Self { core, mm, subscription })
    }

    /// The address space behind the map.
    pub fn mm(&self) -> &Arc<Mm> {
        &self.mm
    }

    /// The frame of the root table: what CR3 holds.
    pub fn root(&self) -> Pfn {
        self.core.tables.root()
    }

    /// From now on, leaves that a fault brings along get these marks. [`Prefaulted::Old`] at first.
    pub fn set_prefaulted(&self, marks: Prefaulted) {
        self.core.prefaulted_young.store(marks == Prefaulted::Young, Ordering::Relaxed);
    }

    /// Puts an engine's entry into the upper half of the root.
    ///
    /// # Panics
    /// If `index` is not in 256..512.
    pub fn set_upper(&self, index: usize, entry: u64) {
        self.core.tables.set_upper(index, entry);
    }

    /// Counters.
    pub fn stats(&self) -> &ShadowStats {
        &self.core.stats
    }

    /// Page tables in use, root included.
    pub fn table_count(&self) -> usize {
        self.core.tables.count()
    }

    /// The leaf for `gfn` as it is now; [`Spte::NONE`] where there is none.
    pub fn spte(&self, gfn: Gfn) -> Spte {
        let _stable = self.core.windows.read();
        self.core.spte(gfn)
    }

    /// The raw entries on the way to `gfn`, from the root down: (level, entry), up to the first that is not present.
    pub fn walk(&self, gfn: Gfn) -> Vec<(u8, u64)> {
        let _stable = self.core.windows.read();
        self.core.tables.walk(gfn.0)
    }
}

impl Drop for ShadowMmu {
    /// Unregisters. The caller has stopped every vCPU that walked the map.
    fn drop(&mut self) {
        match self.mm.unregister(&self.subscription) {
            // Not registered: the address space was released, and the map with it.
            Ok(()) | Err(Misuse::NotRegistered) => {}
            Err(error) => {
                log::error!(
                    "a shadow map goes inside a pair or a callback, and cannot wait for its end: {error}"
                );
                crate::notifier::MmuNotifier::release(&*self.core);
                let _ = self.mm.notifiers().unregister_no_release(&self.subscription);
            }
        }
    }
}

impl Core {
    /// The leaf for `gfn`. The caller holds `mmu_lock`, so that the tables stay.
    fn spte(&self, gfn: Gfn) -> Spte {
        match self.tables.leaf_table(gfn.0) {
            Some(table) => Spte(table[index(gfn.0, 1)].load(Ordering::Acquire)),
            None => Spte::NONE,
        }
    }
}
