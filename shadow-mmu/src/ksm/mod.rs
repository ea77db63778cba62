// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Page sharing: pages of equal content get one frame, read-only, until somebody writes. After `mm/ksm.c`, with one thing that
//! the kernel does not have: the CPU's dirty bit, for pages that a guest reaches through a shadow map.
//!
//! A [`Ksm`] belongs to a frame pool, and merges pages of the address spaces that [entered](Ksm::enter). It has no thread:
//! somebody calls [`Ksm::scan`], as often and for as many pages as sharing may cost.
//!
//! | file | what |
//! | --- | --- |
//! | `scan` | the cursor: passes, looks and sweeps, hints |
//! | `look` | one look at some pages, and what follows |
//! | `sweep`, `batch` | merging what looks have found |
//! | `scanner` | what the scanner's lock guards |
//! | `note` | what is remembered of a page |
//! | `index` | which page has which content |
//! | [`advisor`] | how many pages at a time |
//! | `report` | counters, and why pages were not merged |
//! | `audit` | whether what must be true of merged pages is |
//! | `mm/merge.rs` | the protocol by which a page changes its frame |
//!
//! # A page's way
//! ```text
//!             written since the last look                     equal to nothing
//!           ┌──────── volatile ◄───────┐                  ┌────────────────────┐
//!   new ────┘  (D off; skipped for     │ written          ▼                    │
//!     │         some passes, if often) ├───────────── candidate ── in the index┘
//!     │                                │                  │ a twin turns up
//!     └─ quiet for a pass: hashed ─────┘                  ▼
//!                         equal to zeros, to a page of KSM, or to a candidate:   merged
//! ```
//! A page is read when it was not written for one whole pass, once; then not again until it is written. That it was not, D
//! says: of the spte, of the frame (which has D of sptes that are gone), or of the primary's pte. So a pass over memory that
//! nobody writes costs a walk of two page tables. The kernel reads each page in each pass, to compare checksums.
//!
//! What is in the index is a guess: a page may be written at any time. Before a page is merged, it is write-protected inside a
//! pair of the notifier layer, and its bytes are compared (`mm/merge.rs`).
//!
//! # Locks
//! The scanner's, held throughout a scan, above all locks of an address space. Newcomers and hints are put into a queue with
//! a lock of its own, so that neither a fork nor a guest's read waits for a scan.
//!
//! # Who shares with whom
//! Only address spaces of one [`Domain`]. Whoever shares can find out, by how long a write takes, that somebody has a page of the
//! same content. [`CandidateAccess::CopyOnAccess`] makes every page that was quiet for a pass fault alike, shared or not.

pub mod advisor;
mod audit;
mod batch;
mod index;
mod look;
mod note;
mod report;
mod scan;
mod scanner;
mod sweep;

pub use audit::KsmViolation;
pub use report::{KsmMemberReport, KsmMmStats, KsmPages, KsmPlace, KsmReport, KsmStats, KsmVma, NotShared};
pub use scan::{PassEnd, Scanned};

use crate::addr::HvaRange;
use crate::frame::FramePool;
use crate::mm::{CopyOnAccess, Mm, MmError, Sharer};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Arc, Mutex, Weak};
use scanner::Scanner;
use std::collections::VecDeque;
use std::hash::{BuildHasher, Hasher};

/// Hints that wait for a scan, at most; the oldest go.
const HINTS: usize = 1024;

/// Whether pages of zeros are merged with the zero frame (`use_zero_pages`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ZeroPages {
    /// They are. Nothing limits how many.
    #[default]
    Share,
    /// They are pages like others.
    Keep,
}

/// Whether pages that are written all the time are passed over (`smart_scan`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SmartScan {
    /// They are, for up to eight passes.
    #[default]
    On,
    /// Every pass looks at every page.
    Off,
}

/// What an access to a page does that is merged, or may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CandidateAccess {
    /// Reading a merged page is reading; writing it copies. How long a write takes tells whether somebody has the same content.
    #[default]
    Normal,
    /// Every page that was quiet for a pass loses its rights, merged or not, and whoever reads or writes it gets a copy. How long
    /// that takes tells nothing. (VUsion, SOSP 2017.)
    CopyOnAccess,
}

/// How pages are shared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KsmSettings {
    /// Ptes that may share one frame, at least 2; pages of the same content beyond that get a further frame
    /// (`max_page_sharing`).
    pub max_page_sharing: u32,
    /// `use_zero_pages`.
    pub zero_pages: ZeroPages,
    /// `smart_scan`.
    pub smart_scan: SmartScan,
    /// What an access does.
    pub access: CandidateAccess,
    /// Free frames that are kept for pages that stop being shared, at most: no more than there are merged pages.
    pub reserve: usize,
    /// Of the hash; `None` for one that nobody knows, so that nobody can make up pages of one hash.
    pub seed: Option<u64>,
}

impl Default for KsmSettings {
    /// Those of the kernel, with zero pages; no reserve.
    fn default() -> Self {
        Self {
            max_page_sharing: 256,
            zero_pages: ZeroPages::default(),
            smart_scan: SmartScan::default(),
            access: CandidateAccess::default(),
            reserve: 0,
            seed: None,
        }
    }
}

/// Those that share pages with each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Domain(pub u32);

/// An address space that takes part, by number: in the order of [`Ksm::enter`], from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KsmMember(pub u64);

/// Why sharing is not to be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KsmError {
    /// Two ptes are the least that can share.
    #[error("max_page_sharing is {0}, and must be at least 2")]
    MaxPageSharing(u32),
    /// More frames than the index can name.
    #[error("a pool of {0} frames is too large to be shared from")]
    PoolTooLarge(usize),
    /// More address spaces than the index can name.
    #[error("{} address spaces share pages already, and more cannot", index::SPACES)]
    TooManySpaces,
    /// It takes part already.
    #[error("the address space takes part already")]
    Entered,
    /// The address space has its pages from elsewhere.
    #[error("the address space has its pages from another pool")]
    OtherPool,
}

/// Counters that are looked at while a scan runs.
#[derive(Debug, Default)]
struct Counters {
    pages_scanned: AtomicU64,
    pages_skipped: AtomicU64,
    full_scans: AtomicU64,
    /// Children that came to take part.
    forks: AtomicU64,
}

/// An address space that is to be scanned.
#[derive(Debug)]
struct Newcomer {
    id: KsmMember,
    mm: Weak<Mm>,
    domain: Domain,
}

/// What others want of the scanner.
#[derive(Debug, Default)]
struct Queue {
    newcomers: Vec<Newcomer>,
    hints: VecDeque<(Weak<Mm>, HvaRange)>,
    /// Address spaces that the scanner has.
    scanned: usize,
    entered: u64,
}

/// Merges pages of one pool.
///
/// # Examples
/// ```
/// use shadow_mmu::addr::{Access, Hva, PAGE_SIZE};
/// use shadow_mmu::frame::{FramePool, FreedFrames};
/// use shadow_mmu::ksm::{Domain, Ksm, KsmSettings};
/// use shadow_mmu::mm::{Advice, Backing, FaultRequest, MapFlags, Mm};
/// use std::sync::Arc;
///
/// let pool = Arc::new(FramePool::new(1 << 20, FreedFrames::Keep)?);
/// let mm = Mm::new(Arc::clone(&pool))?;
/// let rw = Access::READ | Access::WRITE;
/// let at = mm.mmap(Hva(0), 8 * PAGE_SIZE, rw, MapFlags::PRIVATE, Backing::Anonymous)?;
/// for page in 0..8 {
///     let pinned = mm.fault(&FaultRequest::one_page(Hva(at.0 + page * PAGE_SIZE), rw))?;
///     pool.write(pinned.required().pfn, 0, b"the same");
/// }
/// mm.madvise(at, 8 * PAGE_SIZE, Advice::Mergeable)?;
///
/// let ksm = Ksm::new(pool, KsmSettings::default())?;
/// ksm.enter(&mm, Domain(0))?;
/// for _ in 0..2 {
///     ksm.scan(1000);
/// }
/// let stats = ksm.stats();
/// assert_eq!((stats.pages_shared, stats.pages_sharing, stats.full_scans), (1, 7, 2));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Ksm {
    pool: Arc<FramePool>,
    settings: KsmSettings,
    me: Weak<Self>,
    scanner: Mutex<Scanner>,
    queue: Mutex<Queue>,
    counters: Counters,
    metadata: u64,
}

/// Has children take part, as their parent does.
#[derive(Debug)]
struct Entered {
    ksm: Weak<Ksm>,
    domain: Domain,
}

impl Sharer for Entered {
    fn forked(&self, child: &Arc<Mm>) {
        let Some(ksm) = self.ksm.upgrade() else { return };
        ksm.count(|counters| &counters.forks, 1);
        if let Err(error) = ksm.enter(child, self.domain) {
            log::warn!("a child takes no part in page sharing: {error}");
        }
    }
}

impl Drop for Ksm {
    fn drop(&mut self) {
        // Nobody keeps it up to date any more.
        self.pool.set_reserve(0);
    }
}

impl Ksm {
    /// Sharing among address spaces that have their pages from `pool`. Nothing is merged until [`scan`](Self::scan) is called.
    ///
    /// # Errors
    /// [`KsmError`]: the settings make no sense, or the pool is too large.
    pub fn new(pool: Arc<FramePool>, settings: KsmSettings) -> Result<Arc<Self>, KsmError> {
        if settings.max_page_sharing < 2 {
            return Err(KsmError::MaxPageSharing(settings.max_page_sharing));
        }
        let seed = settings.seed.unwrap_or_else(|| {
            // The standard library's own, which it has from the host.
            std::collections::hash_map::RandomState::new().build_hasher().finish()
        });
        let frames = pool.frame_count();
        let scanner = Scanner::new(frames, seed).ok_or(KsmError::PoolTooLarge(frames))?;
        Ok(Arc::new_cyclic(|me| Self {
            settings,
            me: Weak::clone(me),
            metadata: scanner.metadata_bytes(),
            scanner: Mutex::new(scanner),
            queue: Mutex::default(),
            counters: Counters::default(),
            pool,
        }))
    }

    /// Lets `mm` take part, and the children that it has from now on (`__ksm_enter`). It is left out again when it is dropped.
    ///
    /// # Errors
    /// [`KsmError`].
    pub fn enter(&self, mm: &Arc<Mm>, domain: Domain) -> Result<KsmMember, KsmError> {
        if !Arc::ptr_eq(mm.pool(), &self.pool) {
            return Err(KsmError::OtherPool);
        }
        let copy = match self.settings.access {
            CandidateAccess::Normal => CopyOnAccess::No,
            CandidateAccess::CopyOnAccess => CopyOnAccess::Yes,
        };
        let mut queue = self.queue.lock();
        queue.newcomers.retain(|newcomer| newcomer.mm.strong_count() > 0);
        if queue.scanned + queue.newcomers.len() >= index::SPACES {
            return Err(KsmError::TooManySpaces);
        }
        if !mm.set_sharer(Arc::new(Entered { ksm: Weak::clone(&self.me), domain }), copy) {
            return Err(KsmError::Entered);
        }
        let id = KsmMember(queue.entered);
        queue.entered += 1;
        queue.newcomers.push(Newcomer { id, mm: Arc::downgrade(mm), domain });
        Ok(id)
    }

    /// The next scan looks at these pages first, and does not wait to see whether they change: they were just filled, from a
    /// file perhaps, and are likely to be somebody else's too. (As KSM++ does with what the host reads; USENIX ATC 2013.)
    pub fn hint(&self, mm: &Arc<Mm>, range: HvaRange) {
        let range = HvaRange::new(range.start, range.end);
        let mut queue = self.queue.lock();
        let mm = Arc::downgrade(mm);
        if queue.hints.len() >= HINTS {
            // One of his own, if there is one: who reads most must not push out the others'.
            let oldest = queue.hints.iter().position(|(other, _)| other.ptr_eq(&mm)).unwrap_or(0);
            queue.hints.remove(oldest);
        }
        queue.hints.push_back((mm, range));
    }

    fn next_hint(&self) -> Option<(Weak<Mm>, HvaRange)> {
        self.queue.lock().hints.pop_front()
    }

    /// How pages are shared.
    pub fn settings(&self) -> KsmSettings {
        self.settings
    }

    /// Takes every merge back (`run` = 2): each page gets a frame of its own again, out of the reserve too.
    ///
    /// # Errors
    /// [`MmError::NoMemory`]: there are not frames enough. What was merged still is, as far as it was not reached.
    pub fn unmerge(&self) -> Result<(), MmError> {
        let mut scanner = self.scanner.lock();
        scanner.admit(&mut self.queue.lock());
        let result = scanner.spaces().into_iter().try_for_each(|mm| mm.unmerge());
        self.keep_reserve(&scanner);
        result
    }

    /// Bytes that sharing keeps besides the pages: 16 for each frame of the pool.
    pub fn metadata_bytes(&self) -> u64 {
        self.metadata
    }

    /// Keeps as many frames free as pages may ask for that stop being shared, within the setting.
    fn keep_reserve(&self, scanner: &Scanner) {
        if self.settings.reserve > 0 {
            let merged: u64 =
                scanner.spaces().iter().map(|mm| mm.ksm_merging_pages() + mm.ksm_zero_pages()).sum();
            let frames = usize::try_from(merged).unwrap_or(usize::MAX);
            self.pool.set_reserve(frames.min(self.settings.reserve));
        }
    }

    fn forks(&self) -> u64 {
        self.counters.forks.load(Ordering::Relaxed)
    }

    fn count(&self, counter: fn(&Counters) -> &AtomicU64, by: u64) {
        counter(&self.counters).fetch_add(by, Ordering::Relaxed);
    }
}
