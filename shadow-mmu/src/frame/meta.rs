// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Metadata of a frame: `struct page` in miniature.

use crate::sync::atomic::{AtomicU32, Ordering};

bitflags::bitflags! {
    /// Per-frame flags.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct FrameFlags: u32 {
        /// Some secondary MMU saw the frame accessed and lost the spte that said so (`PG_referenced`).
        const ACCESSED = 1;
        /// The same for written (`PG_dirty`): the frame differs from what backs it.
        const DIRTY = 2;
        /// As [`DIRTY`](Self::DIRTY), for [`ksm`](crate::ksm), which takes it.
        const WRITTEN = 4;
        /// A page of [`ksm`](crate::ksm) (`PageKsm`): mapped read-only wherever it is mapped, and never reused in place.
        const KSM = 8;
        /// In the index of [`ksm`](crate::ksm) as a page that others may be merged with; not written since.
        const CANDIDATE = 16;
    }
}

/// Bits above the flags, for [`ksm`](crate::ksm) to keep what it knows of a page that is not merged. Like the flags they are gone
/// when the frame is freed.
const NOTE_SHIFT: u32 = 16;

/// Metadata of one frame: `struct page` in miniature.
#[derive(Debug, Default)]
pub struct Frame {
    refs: AtomicU32,
    maps: AtomicU32,
    flags: AtomicU32,
}

impl Frame {
    /// The frame goes out: one reference, no flags.
    pub(super) fn handed_out(&self) {
        self.flags.store(0, Ordering::Relaxed);
        self.refs.store(1, Ordering::Release);
    }
    /// One more reference.
    pub(super) fn add_ref(&self) {
        let before = self.refs.fetch_add(1, Ordering::AcqRel);
        debug_assert!(before > 0, "reference taken to a free frame");
    }
    /// One more reference, if there is one (`folio_try_get`).
    pub(super) fn try_add_ref(&self) -> bool {
        let add = |refs: u32| (refs > 0).then(|| refs + 1);
        self.refs.fetch_update(Ordering::AcqRel, Ordering::Acquire, add).is_ok()
    }
    /// One reference less; whether it was the last.
    pub(super) fn remove_ref(&self) -> bool {
        let before = self.refs.fetch_sub(1, Ordering::AcqRel);
        debug_assert!(before > 0, "reference dropped of a free frame");
        before == 1
    }
    /// Everything that keeps the frame from being freed: ptes, page caches, pins, faults in flight.
    pub fn ref_count(&self) -> u32 {
        self.refs.load(Ordering::Acquire)
    }
    /// Primary ptes that map the frame. Each also holds a reference.
    pub fn map_count(&self) -> u32 {
        self.maps.load(Ordering::Acquire)
    }
    /// One more primary pte maps the frame.
    pub fn add_map(&self) {
        self.maps.fetch_add(1, Ordering::AcqRel);
    }
    /// One primary pte less.
    pub fn remove_map(&self) {
        let before = self.maps.fetch_sub(1, Ordering::AcqRel);
        debug_assert!(before > 0, "map count below zero");
    }
    /// The frame's flags.
    pub fn flags(&self) -> FrameFlags {
        FrameFlags::from_bits_truncate(self.flags.load(Ordering::Acquire))
    }
    /// Flags and note of one moment.
    pub(crate) fn flags_and_note(&self) -> (FrameFlags, u16) {
        let word = self.flags.load(Ordering::Acquire);
        (FrameFlags::from_bits_truncate(word), (word >> NOTE_SHIFT) as u16)
    }
    /// Replaces the note. One thread does.
    pub(crate) fn set_note(&self, note: u16) {
        let replace = |word: u32| Some(word & ((1 << NOTE_SHIFT) - 1) | u32::from(note) << NOTE_SHIFT);
        // It never refuses.
        let _ = self.flags.fetch_update(Ordering::AcqRel, Ordering::Relaxed, replace);
    }
    /// Sets flags. Atomic: secondary MMUs call it under their own locks.
    pub fn set_flags(&self, flags: FrameFlags) {
        // Most frames have the bits already; then the cache line stays shared.
        if !self.flags().contains(flags) {
            self.flags.fetch_or(flags.bits(), Ordering::AcqRel);
        }
    }
    /// Clears flags; those of them that were set.
    pub fn take_flags(&self, flags: FrameFlags) -> FrameFlags {
        // As above: most have none of them.
        if !self.flags().intersects(flags) {
            return FrameFlags::empty();
        }
        FrameFlags::from_bits_truncate(self.flags.fetch_and(!flags.bits(), Ordering::AcqRel)) & flags
    }
}
