// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The primary MMU: a Linux address space in miniature.
//!
//! [`Mm`] holds VMAs and a page table of its own, and is the only place where a page of the guest gets, changes or loses
//! its frame. Every change that takes something away is made inside a pair of the [notifier layer](crate::notifier).
//!
//! | file | what |
//! | --- | --- |
//! | [`vma`] | which addresses are mapped, to what, with which rights |
//! | `map` | mmap, munmap, mprotect, brk |
//! | `remap` | mremap |
//! | `advise` | madvise, mincore, msync |
//! | `fault` | demand faults, the zero page, copy-on-write; pinned pages |
//! | `merge` | pages of the same content get one frame ([`ksm`](crate::ksm)), and get frames of their own again |
//! | `notify` | a pte changes its frame |
//! | [`watch`] | mappings of this very process, and what others do to them |
//! | `zap` | taking ptes out of a range |
//! | `write_logs` | whether somebody logs writes |
//! | `age` | whether a page was accessed |
//! | [`generations`](PageAge) | how long each page has been idle |
//! | [`audit`](MmAudit) | what must be true of ptes, checked |
//! | `fork` | children |
//! | [`trap`](Trap) | pages at which every access is refused: poisoned, revoked |
//! | [`reap`](Reaped) | the memory of a guest that is told to die |
//! | [`object`](Object) | page cache and shared memory |
//!
//! # Locks
//! ```text
//! family (fork, and holes in shared memory)
//!  └─ mmap_lock (read: faults, madvise, aging; write: everything that changes VMAs)
//!      ├─ notifier callbacks
//!      ├─ Object::pages
//!      └─ page-table lock (one of 64, by leaf table)
//!          └─ notifier callbacks that may not sleep: change_pte, young ops
//! ```
//! Only a holder of the family lock has the mmap locks of two spaces at once, and then in any order.
//! Frames are freed after the pair's end, with no page-table lock held. A reader of the mmap lock may add page tables, a
//! writer may also remove them.

mod advise;
mod age;
mod audit;
mod fault;
mod fork;
mod generations;
mod map;
mod merge;
mod notify;
mod object;
mod pte;
mod reap;
mod remap;
mod trap;
pub mod vma;
pub mod watch;
mod write_logs;
mod zap;

pub use advise::Advice;
pub use audit::{MmAudit, MmViolation};
pub use fault::{Ahead, Brought, FaultError, FaultRequest, Pinned, PinnedPage};
pub use generations::{AgingPass, FULL_LOOK, OLDEST, PageAge};
pub use map::MapFlags;
pub use merge::MergeAny;
pub(crate) use merge::{CopyOnAccess, MergeInto, Outcome, Sharer, Target};
pub use object::{FileSource, NoPage, Object};
pub(crate) use pte::Known;
pub use pte::Pte;
pub use reap::Reaped;
pub use remap::RemapFlags;
pub use trap::Trap;
pub use vma::{Backing, Vma, VmaFlags};
#[cfg(feature = "mmu-notifier")]
pub(crate) use write_logs::WriteLogging;

use crate::addr::{Hva, HvaRange, LINUX_TASK_SIZE, PAGE_SIZE, Pfn, TASK_SIZE};
use crate::frame::{Fill, FramePool, OutOfFrames, Purpose};
use crate::inject::Faults;
use crate::notifier::Notifiers;
#[cfg(feature = "mmu-notifier")]
use crate::notifier::interval::{IntervalNotifier, IntervalSubscription};
#[cfg(feature = "mmu-notifier")]
use crate::notifier::{Misuse, MmuNotifier, Subscription};
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::{Arc, Mutex, MutexGuard, RwLock, RwLockWriteGuard, Weak};
use crate::table::{Table, Tables, index};
use vma::VmaSet;
use write_logs::WriteLogs;

/// New mappings are placed below this address, top down; above it is room for the stack.
pub const MMAP_BASE: Hva = Hva(LINUX_TASK_SIZE - (16 << 20));
const PAGE_TABLE_LOCKS: usize = 64;

/// Why an operation on the address space was refused. Each is one errno of Linux's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MmError {
    /// Not enough memory, addresses or mappings, or a hole in the range (`ENOMEM`).
    #[error("out of memory, or part of the range is not mapped")]
    NoMemory,
    /// An argument makes no sense (`EINVAL`).
    #[error("invalid argument")]
    Invalid,
    /// Something is mapped there (`EEXIST`).
    #[error("the range is taken")]
    Exists,
    /// The range is not one mapping (`EFAULT`).
    #[error("bad address")]
    Fault,
    /// A page of it has failed (`EHWPOISON`).
    #[error("memory page has hardware error")]
    Poisoned,
    /// The mapping can never have these rights (`EACCES`).
    #[error("permission denied")]
    Access,
    /// Below the lowest address that may be mapped (`EPERM`).
    #[error("operation not permitted")]
    NotPermitted,
}

impl MmError {
    /// The errno, positive.
    pub fn errno(self) -> i32 {
        match self {
            Self::NoMemory => libc::ENOMEM,
            Self::Invalid => libc::EINVAL,
            Self::Exists => libc::EEXIST,
            Self::Fault => libc::EFAULT,
            Self::Poisoned => libc::EHWPOISON,
            Self::Access => libc::EACCES,
            Self::NotPermitted => libc::EPERM,
        }
    }
}

impl From<OutOfFrames> for MmError {
    fn from(_: OutOfFrames) -> Self {
        Self::NoMemory
    }
}

/// What happened in an address space so far.
#[derive(Debug, Default)]
pub struct MmStats {
    /// Pages brought in because they were touched.
    pub demand_pages: AtomicU64,
    /// Pages brought in ahead of need.
    pub ahead_pages: AtomicU64,
    /// Ptes pointed at the zero frame.
    pub zero_pages: AtomicU64,
    /// Pages copied because of a write.
    pub copied_pages: AtomicU64,
    /// Ptes taken out.
    pub zapped_pages: AtomicU64,
}

pub(crate) fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

/// VMAs, traps and the break: what the mmap lock guards.
#[derive(Debug, Default)]
pub(crate) struct Map {
    pub(crate) vmas: VmaSet,
    traps: trap::Traps,
    brk_start: Hva,
    brk: Hva,
}

/// An address space.
///
/// # Examples
/// ```
/// use shadow_mmu::addr::{Access, Hva};
/// use shadow_mmu::frame::{FramePool, FreedFrames};
/// use shadow_mmu::mm::{Backing, MapFlags, Mm};
/// use std::sync::Arc;
///
/// let pool = Arc::new(FramePool::new(1 << 20, FreedFrames::Keep)?);
/// let mm = Mm::new(pool)?;
/// let at = mm.mmap(Hva(0), 0x3000, Access::READ | Access::WRITE, MapFlags::PRIVATE, Backing::Anonymous)?;
/// mm.munmap(Hva(at.0 + 0x1000), 0x1000)?;
/// assert_eq!(mm.vmas().len(), 2);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Mm {
    pool: Arc<FramePool>,
    notifiers: Notifiers,
    /// The mmap lock.
    map: RwLock<Map>,
    tables: Tables,
    page_table_locks: Box<[Mutex<()>]>,
    zero_frame: Pfn,
    /// This space and all that it was forked from or that were forked from it: those that may share an [`Object`] by
    /// fork. Locked by whoever adds one and by whoever has to reach all of them.
    family: Arc<Family>,
    /// Its pages were taken away; see [`reap`](Self::reap).
    reaped: AtomicBool,
    stats: MmStats,
    /// Whether a [`watch::Watch`] is over it.
    watched: AtomicBool,
    generations: generations::Generations,
    write_logs: Arc<WriteLogs>,
    sharing: merge::Sharing,
    faults: Faults,
}

type Family = Mutex<Vec<Weak<Mm>>>;

/// A leaf of the page table, locked.
pub(crate) struct LockedLeaf<'a> {
    table: &'a Table,
    _lock: MutexGuard<'a, ()>,
}

impl LockedLeaf<'_> {
    pub(crate) fn get(&self, index: usize) -> Pte {
        Pte(self.table[index].load(Ordering::Relaxed))
    }
    pub(crate) fn set(&self, index: usize, pte: Pte) {
        self.table[index].store(pte.0, Ordering::Relaxed);
    }
    /// All of them, for who goes through the whole table.
    fn entries(&self) -> &[AtomicU64] {
        self.table
    }
}

impl Mm {
    /// An address space with nothing mapped, whose pages and page tables come from `pool`.
    ///
    /// # Errors
    /// [`OutOfFrames`]: two frames are needed.
    pub fn new(pool: Arc<FramePool>) -> Result<Arc<Self>, OutOfFrames> {
        Self::with_faults(pool, Faults::default())
    }

    /// The same, with fault points that `faults` decides over.
    ///
    /// # Errors
    /// As those of [`new`](Self::new).
    pub fn with_faults(pool: Arc<FramePool>, faults: Faults) -> Result<Arc<Self>, OutOfFrames> {
        let family = Arc::<Family>::default();
        let mm = Self::new_in(pool, Arc::clone(&family), faults)?;
        family.lock().push(Arc::downgrade(&mm));
        Ok(mm)
    }

    /// An empty address space that `family` does not know of yet.
    fn new_in(pool: Arc<FramePool>, family: Arc<Family>, faults: Faults) -> Result<Arc<Self>, OutOfFrames> {
        let tables = Tables::new(Arc::clone(&pool), Purpose::New)?;
        let zero_frame = pool.alloc(Fill::Zeros)?;
        Ok(Arc::new(Self {
            notifiers: Notifiers::new(),
            map: RwLock::default(),
            tables,
            page_table_locks: (0..PAGE_TABLE_LOCKS).map(|_| Mutex::new(())).collect(),
            zero_frame,
            family,
            reaped: AtomicBool::new(false),
            stats: MmStats::default(),
            watched: AtomicBool::new(false),
            generations: generations::Generations::default(),
            write_logs: Arc::default(),
            sharing: merge::Sharing::default(),
            faults,
            pool,
        }))
    }

    /// The pool that pages come from.
    pub fn pool(&self) -> &Arc<FramePool> {
        &self.pool
    }

    /// The frame that every page reads as until it is written.
    pub fn zero_frame(&self) -> Pfn {
        self.zero_frame
    }

    /// What may be made to go wrong with it.
    pub fn faults(&self) -> &Faults {
        &self.faults
    }

    /// The listeners of this address space.
    pub fn notifiers(&self) -> &Notifiers {
        &self.notifiers
    }

    /// What happened so far.
    pub fn stats(&self) -> &MmStats {
        &self.stats
    }

    /// Tables of the primary page table, in frames.
    pub fn table_count(&self) -> usize {
        self.tables.count()
    }

    /// Every VMA, ascending.
    pub fn vmas(&self) -> Vec<Vma> {
        self.map.read().vmas.iter().cloned().collect()
    }

    /// The VMA that holds `hva`.
    pub fn vma(&self, hva: Hva) -> Option<Vma> {
        self.map.read().vmas.find(hva).cloned()
    }

    /// The pte of the page at `hva`, and the VMA's rights: what a checker compares with. `None` where nothing is mapped.
    pub fn lookup(&self, hva: Hva) -> Option<(Pte, Vma)> {
        let map = self.map.read();
        let vma = map.vmas.find(hva)?.clone();
        Some((self.pte(hva), vma))
    }

    fn pte(&self, hva: Hva) -> Pte {
        match self.lock_leaf(hva) {
            Some(leaf) => leaf.get(index(hva.page(), 1)),
            None => Pte::NONE,
        }
    }

    /// The pte of the page at `hva`, read without the page-table lock: for a checker that holds a lock below it.
    #[cfg(feature = "mmu-notifier")]
    pub(crate) fn pte_unlocked(&self, hva: Hva) -> Pte {
        match self.tables.leaf_table(hva.page()) {
            Some(table) => Pte(table[index(hva.page(), 1)].load(Ordering::Acquire)),
            None => Pte::NONE,
        }
    }

    /// Keeps VMAs and, but for faults, ptes as they are while the value lives.
    pub(crate) fn read_map(&self) -> crate::sync::RwLockReadGuard<'_, Map> {
        self.map.read()
    }

    /// From now on and until the value is dropped, secondaries are told of writes that no vCPU makes.
    #[cfg(feature = "mmu-notifier")]
    pub(crate) fn log_writes(&self) -> WriteLogging {
        WriteLogs::begin(&self.write_logs)
    }

    /// Tells secondaries of a write that no vCPU made, if somebody logs writes: after it, or inside the pair that it is made
    /// in.
    pub(crate) fn written(&self, range: HvaRange) {
        if self.write_logs.is_open() {
            self.notifiers.written(range);
        }
    }

    fn lock_table<'a>(&'a self, page: u64, table: &'a Table) -> LockedLeaf<'a> {
        let lock = &self.page_table_locks[(page / crate::table::ENTRIES) as usize % PAGE_TABLE_LOCKS];
        LockedLeaf { table, _lock: lock.lock() }
    }

    pub(crate) fn lock_leaf(&self, hva: Hva) -> Option<LockedLeaf<'_>> {
        let table = self.tables.leaf_table(hva.page())?;
        Some(self.lock_table(hva.page(), table))
    }

    fn lock_leaf_or_new(&self, hva: Hva) -> Result<LockedLeaf<'_>, OutOfFrames> {
        let table = self.tables.leaf_table_or_new(hva.page())?;
        Ok(self.lock_table(hva.page(), table))
    }

    /// The first page of the first leaf table that reaches to `page` or beyond it.
    pub(crate) fn next_table(&self, page: u64) -> Option<u64> {
        self.tables.next_leaf_table(page)
    }

    /// Calls `visit(address of the table's first page, leaf, entries)` for each leaf table with a part in `range`.
    pub(crate) fn for_each_leaf(
        &self,
        range: HvaRange,
        mut visit: impl FnMut(Hva, &LockedLeaf<'_>, std::ops::Range<usize>),
    ) {
        self.tables.for_each_leaf_table(range.page_numbers(), |page, table, entries| {
            visit(Hva(page * PAGE_SIZE), &self.lock_table(page, table), entries);
        });
    }

    /// The end of the address space (`exit_mmap`): every listener lets go first, then every page is freed. The space
    /// stays usable, empty and without listeners.
    ///
    /// # Panics
    /// Inside an op or a pair of this space: it would wait for itself.
    pub fn release(&self) {
        // Before the lock, which such a caller may hold.
        assert!(!self.notifiers.inside(), "an address space was released inside one of its pairs");
        let mut map = self.map.write();
        let released = self.notifiers.release();
        debug_assert!(released.is_ok(), "{released:?}");
        let everything = HvaRange { start: Hva(0), end: Hva(TASK_SIZE) };
        self.zap(everything, crate::notifier::Event::Release);
        map.vmas.remove(everything);
        map.traps = trap::Traps::default();
        self.free_empty_tables(everything);
    }
}

/// The mmap lock, held for writing: no pair is open, and nothing of the address space changes.
#[derive(Debug)]
pub struct MmapWriteGuard<'a> {
    mm: &'a Mm,
    map: RwLockWriteGuard<'a, Map>,
}

impl Mm {
    /// Takes the mmap lock for writing. Until it is dropped, every other call that needs the lock waits, also one by this
    /// thread.
    pub fn mmap_write_lock(&self) -> MmapWriteGuard<'_> {
        MmapWriteGuard { mm: self, map: self.map.write() }
    }
}

impl MmapWriteGuard<'_> {
    /// Every VMA, ascending.
    pub fn vmas(&self) -> impl Iterator<Item = &Vma> {
        self.map.vmas.iter()
    }

    /// The pte of the page at `hva`. With [`register`](Self::register) under the same lock, a listener can begin with a copy of
    /// what is there and miss no change of it.
    pub fn pte(&self, hva: Hva) -> Pte {
        self.mm.pte(hva)
    }
}

#[cfg(feature = "mmu-notifier")]
impl MmapWriteGuard<'_> {
    /// [`Mm::register`] for a caller that holds the lock already (`__mmu_notifier_register`).
    ///
    /// # Errors
    /// [`Misuse`].
    pub fn register(&self, listener: Arc<dyn MmuNotifier>) -> Result<Subscription, Misuse> {
        self.mm.notifiers.register_locked(listener)
    }
}

#[cfg(feature = "mmu-notifier")]
impl Mm {
    /// Adds a listener (`mmu_notifier_register`): from the return on it hears of every change, and of no end whose start
    /// it did not hear.
    ///
    /// # Errors
    /// [`Misuse`].
    pub fn register(&self, listener: Arc<dyn MmuNotifier>) -> Result<Subscription, Misuse> {
        // Exclusive: no pair is open while the list grows (I9).
        self.mmap_write_lock().register(listener)
    }

    /// Takes a listener off (`mmu_notifier_unregister`). On return none of its ops runs or can run.
    ///
    /// # Errors
    /// [`Misuse`].
    pub fn unregister(&self, subscription: &Subscription) -> Result<(), Misuse> {
        self.notifiers.unregister(subscription)
    }

    /// Subscribes `notifier` to changes of `range` (`mmu_interval_notifier_insert`).
    ///
    /// # Errors
    /// [`Misuse::Released`].
    pub fn insert_interval(
        &self,
        range: HvaRange,
        notifier: Arc<dyn IntervalNotifier>,
    ) -> Result<IntervalSubscription, Misuse> {
        let intervals = match self.notifiers.intervals() {
            Some(intervals) => intervals,
            None => {
                // The first one changes the list; like every other addition, while no pair is open.
                let _no_pair = self.map.write();
                self.notifiers.intervals_locked()?
            }
        };
        intervals.insert(range, notifier)
    }
}

impl Drop for Mm {
    fn drop(&mut self) {
        self.release();
        self.pool.put(self.zero_frame);
    }
}
