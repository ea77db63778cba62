// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memslots: which guest frames are backed by which host addresses.
//!
//! The set is immutable and replaced whole. A fault works on the set it loaded; replacing it bumps the sequence, so a fault
//! that used the old one retries. It is never replaced while a pair is open (I40): start and end of a pair must find the
//! same slots, or one would count what the other does not (R15).

use super::{ShadowMmu, gather::Gather};
use crate::addr::{Gfn, Hva, HvaRange, PAGE_SIZE};
use crate::sync::Arc;
use crate::table::LOWER_HALF_PAGES;
use std::ops::Range;

/// What a slot allows beyond what its mapping allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlotAccess {
    /// Everything.
    ReadWrite,
    /// No writes, whatever the mapping says (`KVM_MEM_READONLY`).
    ReadOnly,
}

/// A run of guest frames and the addresses that back it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memslot {
    /// First guest frame.
    pub gfn: Gfn,
    /// Number of frames.
    pub pages: u64,
    /// Address of the first.
    pub hva: Hva,
    /// What the slot allows.
    pub access: SlotAccess,
}

impl Memslot {
    /// The guest frames.
    pub fn gfns(&self) -> Range<u64> {
        self.gfn.0..self.gfn.0 + self.pages
    }
    /// The addresses.
    pub fn hvas(&self) -> HvaRange {
        HvaRange::pages_from(self.hva, self.pages)
    }
    /// The address of `gfn`, which must be in the slot.
    pub fn hva_of(&self, gfn: Gfn) -> Hva {
        Hva(self.hva.0 + (gfn.0 - self.gfn.0) * PAGE_SIZE)
    }
    /// The guest frame of `hva`, which must be in the slot.
    pub fn gfn_of(&self, hva: Hva) -> Gfn {
        Gfn(self.gfn.0 + (hva.0 - self.hva.0) / PAGE_SIZE)
    }
    /// The guest frames that `range` backs in this slot; rounding is outward already in [`HvaRange`] (I20).
    pub fn gfns_of(&self, range: HvaRange) -> Range<u64> {
        let hit = range.intersect(self.hvas());
        if hit.is_empty() {
            return 0..0;
        }
        self.gfn_of(hit.start).0..self.gfn_of(hit.end).0
    }
}

/// Why a slot cannot be set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SlotError {
    /// Another slot has some of these guest frames (`EEXIST`, I19).
    #[error("guest frames {:#x}+{:#x} overlap another memslot", .0.gfn.0, .0.pages)]
    Overlap(Memslot),
    /// Empty, misaligned, or reaching out of the guest's or the host's addresses.
    #[error("memslot {:#x}+{:#x} at {} is empty, misaligned or out of range", .0.gfn.0, .0.pages, .0.hva)]
    Range(Memslot),
    /// There is no slot that starts there.
    #[error("no memslot starts at guest frame {:#x}", .0.0)]
    Missing(Gfn),
}

/// The slots of a guest, by first guest frame.
#[derive(Debug, Default, Clone)]
pub struct Memslots {
    slots: Vec<Memslot>,
}

impl Memslots {
    /// The slot that holds `gfn`.
    pub fn find(&self, gfn: Gfn) -> Option<&Memslot> {
        let after = self.slots.partition_point(|slot| slot.gfn <= gfn);
        self.slots[..after].last().filter(|slot| slot.gfns().contains(&gfn.0))
    }

    /// The guest frames that `range` backs: one run for each slot it hits, for two slots may show the same addresses (I19).
    pub fn gfns_of(&self, range: HvaRange) -> impl Iterator<Item = Range<u64>> {
        self.slots.iter().map(move |slot| slot.gfns_of(range)).filter(|gfns| !gfns.is_empty())
    }

    fn with(&self, slot: Memslot) -> Result<Self, SlotError> {
        let fits = slot.pages > 0
            && slot.hva.is_page_aligned()
            && slot.gfn.0.checked_add(slot.pages).is_some_and(|end| end <= LOWER_HALF_PAGES)
            && slot.pages.checked_mul(PAGE_SIZE).and_then(|bytes| slot.hva.checked_add(bytes)).is_some();
        if !fits {
            return Err(SlotError::Range(slot));
        }
        let (new, taken) = (slot.gfns(), |old: &Memslot| old.gfns());
        if self.slots.iter().map(taken).any(|old| old.start < new.end && new.start < old.end) {
            return Err(SlotError::Overlap(slot));
        }
        let mut slots = self.slots.clone();
        slots.insert(slots.partition_point(|other| other.gfn < slot.gfn), slot);
        Ok(Self { slots })
    }

    fn without(&self, gfn: Gfn) -> Result<(Self, Memslot), SlotError> {
        let at = self.slots.iter().position(|slot| slot.gfn == gfn).ok_or(SlotError::Missing(gfn))?;
        let mut slots = self.slots.clone();
        let slot = slots.remove(at);
        Ok((Self { slots }, slot))
    }
}

impl ShadowMmu {
    /// Adds a slot. Waits until no pair is open.
    ///
    /// # Errors
    /// [`SlotError`].
    pub fn add_slot(&self, slot: Memslot) -> Result<(), SlotError> {
        self.replace_slots(|slots| Ok((slots.with(slot)?, 0..0)))
    }

    /// Removes the slot that starts at `gfn`, with every leaf of it. On return no vCPU reaches its memory (I39).
    ///
    /// # Errors
    /// [`SlotError::Missing`].
    pub fn remove_slot(&self, gfn: Gfn) -> Result<(), SlotError> {
        self.replace_slots(|slots| slots.without(gfn).map(|(slots, slot)| (slots, slot.gfns())))
    }

    /// The slots as they are now.
    pub fn slots(&self) -> Arc<Memslots> {
        Arc::clone(&self.core.slots.read())
    }

    /// Publishes changed slots, and zaps the guest frames that `change` names.
    fn replace_slots(
        &self,
        change: impl FnOnce(&Memslots) -> Result<(Memslots, Range<u64>), SlotError>,
    ) -> Result<(), SlotError> {
        let core = &*self.core;
        // Held throughout: no pair can open, and two replacements cannot cross.
        let mut active = core.active.lock();
        while *active > 0 {
            active = core.idle.wait(active);
        }
        let (slots, gone) = change(&core.slots.read())?;
        *core.slots.write() = Arc::new(slots);
        let _exclusive = core.windows.write();
        core.seq.removed();
        let mut gather = Gather::new(core.tlb.as_ref());
        core.zap(gone, &mut gather);
        core.finish(gather);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(gfn: u64, pages: u64, hva: u64) -> Memslot {
        Memslot { gfn: Gfn(gfn), pages, hva: Hva(hva), access: SlotAccess::ReadWrite }
    }

    #[test]
    fn i19_slots_may_share_addresses_but_not_guest_frames() {
        let slots =
            Memslots::default().with(slot(0, 16, 0x10000)).unwrap().with(slot(32, 16, 0x10000)).unwrap();
        assert!(matches!(slots.with(slot(47, 2, 0x90000)), Err(SlotError::Overlap(_))));
        let runs: Vec<_> = slots.gfns_of(HvaRange::page(Hva(0x11000))).collect();
        assert_eq!(runs, [1..2, 33..34]);
    }

    #[test]
    fn a_gfn_is_found_in_its_slot_and_in_no_gap() {
        let slots = Memslots::default().with(slot(4, 4, 0x10000)).unwrap().with(slot(16, 1, 0)).unwrap();
        assert_eq!(slots.find(Gfn(7)).unwrap().hva_of(Gfn(7)), Hva(0x13000));
        assert!([3, 8, 15, 17].iter().all(|&gfn| slots.find(Gfn(gfn)).is_none()));
    }

    #[test]
    fn slots_out_of_range_are_refused() {
        let none = Memslots::default();
        for bad in
            [slot(0, 0, 0), slot(0, 1, 1), slot(u64::MAX, 2, 0), slot(0, u64::MAX, 0), slot(0, 1, !0xfff)]
        {
            assert!(matches!(none.with(bad), Err(SlotError::Range(_))), "{bad:?}");
        }
    }
}
