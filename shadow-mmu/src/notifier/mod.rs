// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The notifier layer: the contract of Linux's `mmu_notifier.h`, between one primary MMU and any number of secondary ones.
//!
//! The primary MMU calls; secondary MMUs ([`MmuNotifier`]) listen. Before the primary takes a mapping away or takes rights
//! from it, it opens a *pair*: [`Notifiers::invalidate`] calls every listener's `invalidate_range_start` and returns a
//! guard, whose drop calls `invalidate_range_end`. From the return of the start to the end, no listener has a usable
//! translation of the range, nor makes one.
//!
//! # Who calls what, holding what
//! | op | caller holds | may sleep |
//! | --- | --- | --- |
//! | `release` | nothing, or the mmap lock | yes |
//! | `invalidate_range_start`, `_end` | the mmap lock (read or write) | yes, unless the range is [`Blockable::No`] |
//! | `invalidate_page` | the mmap lock | yes |
//! | `invalidate_range`, `change_pte`, the young ops of 4.x | a page-table lock | no |
//! | `test_clear_young`, `test_clear_dirty` | the mmap lock for reading | yes |
//! | `written` | what the writer holds: the mmap lock, a page-table lock, or the lock of an access by a device | no |
//!
//! Every op and every pair is a read section of sleepable RCU ([`srcu`]). So unregistering, which waits for such sections,
//! cannot be done inside of one; it is refused there ([`Misuse::InsideCallback`]), where the kernel deadlocks. Listeners are
//! called newest first, start and end in the same order. Ops must not call into the `Mm` that calls them.
//!
//! What is *not* notified: filling an empty pte, and giving a mapping more rights. A secondary may lag by allowing less,
//! never by allowing more.
//!
//! # Parts, and the kernels they are of
//! | file | what | kernel |
//! | --- | --- | --- |
//! | this | the ops, reasons, blockable ranges | 2.6.27 to 4.12; reasons 5.0; blockable 4.19 |
//! | `list` | registration, the pair, the calls | 4.9 |
//! | [`srcu`] | read sections that may sleep | 3.7 |
//! | [`interval`] | subscriptions to a range, with retry | 5.5 |
//! | [`get()`] | one listener of a kind, by reference count | 5.4 |
//! | [`windows`] | sequence and windows, for listeners that fault pages in | KVM |
//! | `young`, `written` | the answers of `test_clear_young` and `test_clear_dirty` | |
//! | `off` | all of it compiled out | `CONFIG_MMU_NOTIFIER=n` |
//!
//! `invalidate_page` went in 4.13: it came after the page-table lock was dropped, when the address could hold another page
//! already (R7), and it named one address where a huge page could be meant. `change_pte` went in 6.10: since 3.7 it is called
//! inside a pair, whose start has removed what it would have changed. Both are kept, and called where 4.9 calls them.
//!
//! Three ops are not Linux's. `test_clear_young` has been proposed for it (Yu Zhao, 2023): the answer of `clear_young` for each
//! page, which is what generations are made of. `test_clear_dirty` is the same for writes: with it, [`ksm`](crate::ksm) need not
//! read a page to learn that it has not changed. `written` tells secondaries that log writes of those that no vCPU made; KVM
//! is told by a function call of its own, `mark_page_dirty`.
//!
//! Without the cargo feature `mmu-notifier` the types stay, every call is empty, and only `Mm` is left to use them.

#[cfg(feature = "mmu-notifier")]
mod get;
#[cfg(feature = "mmu-notifier")]
pub mod interval;
#[cfg(feature = "mmu-notifier")]
mod list;
#[cfg(not(feature = "mmu-notifier"))]
mod off;
#[cfg(feature = "mmu-notifier")]
pub mod srcu;
#[cfg(feature = "mmu-notifier")]
pub mod windows;
mod written;
mod young;

#[cfg(feature = "mmu-notifier")]
pub use get::{Shared, get};
#[cfg(feature = "mmu-notifier")]
pub use list::{InvalidateGuard, Notifiers, Subscription};
#[cfg(not(feature = "mmu-notifier"))]
pub use off::{InvalidateGuard, Notifiers};
pub use written::WrittenPages;
pub use young::{Look, YoungPages};

use crate::addr::{Hva, HvaRange, PAGE_SIZE};
use crate::mm::Pte;
use std::fmt::Debug;

/// Why a range is invalidated (`enum mmu_notifier_event`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Event {
    /// The mapping goes: munmap, or its old place in mremap.
    Unmap,
    /// The ptes go, the mapping stays: madvise, copy-on-write, merging, reclaim.
    Clear,
    /// Rights of the whole mapping change: mprotect.
    ProtectionVma,
    /// Rights of pages change: fork, write-back.
    ProtectionPage,
    /// The address space goes.
    Release,
}

/// Whether listeners may sleep in `invalidate_range_start`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Blockable {
    /// They may.
    Yes,
    /// They must not; one that would have to returns [`WouldBlock`].
    No,
}

/// A listener cannot do without sleeping what it was asked to do without sleeping (`-EAGAIN`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a listener would have to sleep")]
pub struct WouldBlock;

/// A use of the layer that can never work, reported where the kernel would hang or crash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Misuse {
    /// It waits for running ops and open pairs, so it cannot be done inside of one.
    #[error("inside a notifier callback or a pair it would wait for itself; use unregister_no_release there")]
    InsideCallback,
    /// The subscription is not, or no longer, in the list.
    #[error("this subscription is not registered here")]
    NotRegistered,
    /// The address space is gone: it takes no more listeners.
    #[error("the address space was released: it takes no more listeners")]
    Released,
    /// The layer was destroyed while this many still listened.
    #[error("an address space was destroyed with {0} listeners that had not unregistered")]
    StillListening(usize),
}

/// What a pair is about (`struct mmu_notifier_range`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Invalidation {
    /// The addresses.
    pub range: HvaRange,
    /// The reason.
    pub event: Event,
    /// Whether listeners may sleep.
    pub blockable: Blockable,
}

/// A secondary MMU: whatever caches translations of the address space it is registered with.
///
/// Every op has an empty default, as a missing op is skipped. See the table at the top of this module for the locks held
/// around each, and the kernel's `include/linux/mmu_notifier.h` (4.x) for the originals.
pub trait MmuNotifier: Debug + Send + Sync {
    /// The address space is going. On return the listener has no translation and can never make one again. May be called
    /// twice, also at the same time, and beside other ops.
    fn release(&self) {}

    /// Tests and clears "accessed" over `range`, and flushes so that the next access sets it again. Returns whether any
    /// page was young.
    fn clear_flush_young(&self, range: HvaRange) -> bool {
        let _ = range;
        false
    }

    /// As [`clear_flush_young`](Self::clear_flush_young), but the flush may be left out.
    fn clear_young(&self, range: HvaRange) -> bool {
        let _ = range;
        false
    }

    /// Adds each page of `young.range()` that was accessed since that was cleared, and clears it. A flush may be left out
    /// where the CPU sets the mark again without. A page that another thread takes away meanwhile may be in the answer or
    /// not.
    fn test_clear_young(&self, young: &mut YoungPages) {
        for page in young.range().page_numbers() {
            if self.clear_young(HvaRange::page(Hva(page * PAGE_SIZE))) {
                young.add(page);
            }
        }
    }

    /// Adds each page that `pages` asks about and that was written since that was cleared, and clears it, and flushes: from the
    /// return on, each further write is found by the next call, or has gone to the frame
    /// ([`FrameFlags::WRITTEN`](crate::frame::FrameFlags::WRITTEN)) or to the primary's pte. A listener through which nothing is
    /// written has nothing to add.
    fn test_clear_dirty(&self, pages: &mut WrittenPages) {
        let _ = pages;
    }

    /// Whether the page at `hva` was accessed. Changes nothing.
    fn test_young(&self, hva: Hva) -> bool {
        let _ = hva;
        false
    }

    /// The pte at `hva` is about to become `pte`; the old one is cleared and flushed already. On return the old frame is
    /// out of reach; the new one may be mapped with at most the rights of `pte`.
    fn change_pte(&self, hva: Hva, pte: Pte) {
        let _ = (hva, pte);
    }

    /// The page at `hva` has lost its pte (before 4.13).
    fn invalidate_page(&self, hva: Hva) {
        let _ = hva;
    }

    /// The range is about to change. On return no translation of it is usable, and none appears before the matching end.
    ///
    /// # Errors
    /// [`WouldBlock`], only for a range that is [`Blockable::No`] and only from a listener without an end op.
    fn invalidate_range_start(&self, invalidation: &Invalidation) -> Result<(), WouldBlock> {
        let _ = invalidation;
        Ok(())
    }

    /// The range has changed.
    fn invalidate_range_end(&self, invalidation: &Invalidation) {
        let _ = invalidation;
    }

    /// The pages of the range have other bytes than before, and no secondary was asked to write them: a device wrote, a
    /// mapping was taken away or moved there. Called after the bytes have changed or inside the pair that changes them, and
    /// only while somebody [logs](crate::shadow::ShadowMmu::enable_dirty_log).
    fn written(&self, range: HvaRange) {
        let _ = range;
    }

    /// Whether this is a device that walks the primary's own tables, and so wants [`invalidate_range`](Self::invalidate_range).
    /// Asked when the list changes; always the same answer.
    fn walks_primary_tables(&self) -> bool {
        false
    }

    /// Ptes of the range were cleared and their frames are not freed yet; for devices that walk the primary's own tables
    /// (3.19 to 6.5).
    fn invalidate_range(&self, range: HvaRange) {
        let _ = range;
    }
}
