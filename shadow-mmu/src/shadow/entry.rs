// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A leaf entry in its table. The CPU that walks the table changes it too: it sets A and D, in a leaf that is present, at any
//! moment and without any lock, until a flush has taken the leaf from it.
//!
//! So none of these reads an entry and then stores to it (R11): each is one atomic operation, or a compare-exchange that is
//! tried again. Which lock the caller holds is at each; the locks order us among ourselves, never us and the CPU.

use super::{AdBits, Spte};
use crate::addr::Access;
use crate::sync::atomic::{AtomicU64, Ordering};

/// To make masks of.
const ALL: Spte = Spte(!0);

/// What became of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Installed {
    /// There was no leaf, now there is.
    New,
    /// The leaf has more rights now.
    Upgraded,
    /// The leaf was good already.
    Already,
    /// The leaf maps another frame, and was left alone.
    Stale,
}

/// Puts the leaf `new` where there is none, or adds its rights to the leaf that is there. The caller holds `mmu_lock` for
/// reading: others may install at the same time, nobody removes.
pub(crate) fn install(entry: &AtomicU64, new: Spte) -> Installed {
    let mut old = Spte(entry.load(Ordering::Acquire));
    loop {
        let (next, installed) = if !old.is_leaf() {
            (new, Installed::New)
        } else if old.pfn() != new.pfn() {
            return Installed::Stale;
        } else if old.rights().contains(new.rights()) {
            return Installed::Already;
        } else {
            // More rights for the same frame, and never less: what the old leaf allows was allowed when it was made, and a
            // right that is taken away takes the leaf with it.
            (new.added_to(old), Installed::Upgraded)
        };
        match entry.compare_exchange(old.0, next.0, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => return installed,
            Err(now) => old = Spte(now),
        }
    }
}

/// What the CPU does at an access that the leaf allows: sets A, and D for a write. Returns the leaf with its marks; `None` where
/// the leaf does not allow the access. No lock, as for the CPU; the caller's next flush is ordered after it.
pub(crate) fn access(entry: &AtomicU64, access: Access) -> Option<Spte> {
    let mut old = Spte(entry.load(Ordering::Acquire));
    loop {
        if !old.is_leaf() || !old.rights().contains(access) {
            return None;
        }
        let new = old.touched(access);
        if new == old {
            return Some(old);
        }
        match entry.compare_exchange(old.0, new.0, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => return Some(new),
            Err(now) => old = Spte(now),
        }
    }
}

/// Removes the leaf and returns it, with the marks that the CPU had set by then; [`Spte::NONE`] where there was none. The
/// caller holds `mmu_lock` for writing, and flushes before it lets go.
pub(crate) fn take(entry: &AtomicU64) -> Spte {
    // Most entries of a range are empty, and a look costs less than an exchange. Nobody installs meanwhile.
    if entry.load(Ordering::Relaxed) == 0 {
        return Spte::NONE;
    }
    Spte(entry.swap(0, Ordering::AcqRel))
}

/// Whether one of these leaves may be young. Most are not, and to look at eight costs little more than to look at one.
#[inline]
pub(crate) fn is_any_young(entries: &[AtomicU64], ad: AdBits) -> bool {
    let all = entries.iter().fold(0, |all, entry| all | entry.load(Ordering::Relaxed));
    Spte(all).is_young(ad)
}

/// Clears what says that the leaf was accessed, and returns the leaf as it was seen if it was young. Nothing else of it can
/// be lost (I48: a lost W or D is never tolerated, a lost A is). The caller holds `mmu_lock` for reading.
#[inline]
pub(crate) fn clear_young(entry: &AtomicU64, ad: AdBits) -> Option<Spte> {
    let mut old = Spte(entry.load(Ordering::Relaxed));
    if !old.is_young(ad) {
        return None;
    }
    if ad != AdBits::None {
        // Without the value before, this is one instruction.
        entry.fetch_and(ALL.old().0, Ordering::AcqRel);
        return Some(old);
    }
    // W goes too; D, which came with it, stays, and says that there was a write (I25).
    loop {
        match entry.compare_exchange(old.0, old.access_tracked().0, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => return Some(old),
            Err(now) => old = Spte(now),
        }
        if !old.is_young(ad) {
            return None;
        }
    }
}

/// What became of an entry that was to get back what tracking had taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Restored {
    /// The leaf allows the access already.
    Already,
    /// It was access-tracked, and is no longer.
    Access,
    /// It has W now, and had not before; whoever logs writes has heard of it (R20).
    Write,
    /// Both.
    AccessAndWrite,
    /// Only the primary can say whether the access is allowed.
    No,
}

/// Gives the leaf what `access` needs, if tracking alone had taken it (`fast_page_fault`). The caller holds `mmu_lock` for
/// reading: what the leaf may have is as true as the leaf. `record` is called before W is given, once at most.
pub(crate) fn restore(entry: &AtomicU64, access: Access, record: impl FnOnce()) -> Restored {
    let mut record = Some(record);
    let mut old = Spte(entry.load(Ordering::Acquire));
    loop {
        if old.rights().contains(access) {
            return Restored::Already;
        }
        let Some(new) = old.restored(access) else { return Restored::No };
        if new.is_writable()
            && let Some(record) = record.take()
        {
            record();
        }
        match entry.compare_exchange(old.0, new.0, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) if !new.is_writable() => return Restored::Access,
            Ok(_) if old.is_present() => return Restored::Write,
            Ok(_) => return Restored::AccessAndWrite,
            Err(now) => old = Spte(now),
        }
    }
}

/// Clears W, and returns the leaf as it was if it had W. The caller holds `mmu_lock` for writing, and flushes before it tells
/// anybody (I32).
pub(crate) fn write_protect(entry: &AtomicU64) -> Option<Spte> {
    if !Spte(entry.load(Ordering::Relaxed)).is_writable() {
        return None;
    }
    Some(Spte(entry.fetch_and(ALL.write_protected().0, Ordering::AcqRel)))
}

/// Whether one of these leaves is dirty. Most are not, and to look at eight costs little more than to look at one.
#[inline]
pub(crate) fn is_any_dirty(entries: &[AtomicU64]) -> bool {
    let all = entries.iter().fold(0, |all, entry| all | entry.load(Ordering::Relaxed));
    Spte(all).is_dirty()
}

/// Clears what says that the leaf was written, and returns the leaf as it was if it was. The caller holds `mmu_lock` for
/// reading, and flushes before it lets go.
pub(crate) fn clear_written(entry: &AtomicU64, ad: AdBits) -> Option<Spte> {
    if !Spte(entry.load(Ordering::Relaxed)).is_dirty() {
        return None;
    }
    let cleared = match ad {
        AdBits::Unflushed | AdBits::AfterFlush => ALL.clean(),
        AdBits::None => ALL.clean().write_protected(),
    };
    Some(Spte(entry.fetch_and(cleared.0, Ordering::AcqRel)))
}

/// Clears D, and returns the leaf as it was if it had D. As [`write_protect`]; and the caller hands D to the frame.
pub(crate) fn clear_dirty(entry: &AtomicU64) -> Option<Spte> {
    if !Spte(entry.load(Ordering::Relaxed)).is_dirty() {
        return None;
    }
    Some(Spte(entry.fetch_and(ALL.clean().0, Ordering::AcqRel)))
}
