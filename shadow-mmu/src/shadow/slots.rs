// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memslots: which guest frames are backed by which host addresses.
//!
//! The set is immutable and replaced whole. A fault works on the set it loaded; replacing it bumps the sequence, so a fault
//! that used the old one retries. It is never replaced while a pair is open (I40): start and end of a pair must find the
//! same slots, or one would count what the other does not (R15).

use super::dirty::{DirtyLog, DirtyLogError};
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

/// A slot, and who logs writes to it.
#[derive(Debug, Clone)]
struct Slot {
    memslot: Memslot,
    log: Option<Arc<DirtyLog>>,
}

/// The slots of a guest, by first guest frame.
#[derive(Debug, Default, Clone)]
pub struct Memslots {
    slots: Vec<Slot>,
}

impl Memslots {
    fn slot_of(&self, gfn: Gfn) -> Option<&Slot> {
        let after = self.slots.partition_point(|slot| slot.memslot.gfn <= gfn);
        self.slots[..after].last().filter(|slot| slot.memslot.gfns().contains(&gfn.0))
    }

    /// The slot that holds `gfn`.
    pub fn find(&self, gfn: Gfn) -> Option<&Memslot> {
        self.slot_of(gfn).map(|slot| &slot.memslot)
    }

    /// The log of the slot that holds `gfn`.
    pub(super) fn log_of(&self, gfn: Gfn) -> Option<&Arc<DirtyLog>> {
        self.slot_of(gfn)?.log.as_ref()
    }

    /// Whether any slot has a log.
    pub(super) fn is_any_logged(&self) -> bool {
        self.slots.iter().any(|slot| slot.log.is_some())
    }

    /// The guest frames that `range` backs: one run for each slot it hits, for two slots may show the same addresses (I19).
    pub fn gfns_of(&self, range: HvaRange) -> impl Iterator<Item = Range<u64>> {
        self.parts_of(range).map(|(_, gfns)| gfns)
    }

    /// The same, with the slots.
    pub(super) fn parts_of(&self, range: HvaRange) -> impl Iterator<Item = (&Memslot, Range<u64>)> {
        let parts = self.slots.iter().map(move |slot| (&slot.memslot, slot.memslot.gfns_of(range)));
        parts.filter(|(_, gfns)| !gfns.is_empty())
    }

    fn with(&self, slot: Memslot) -> Result<Self, SlotError> {
        let fits = slot.pages > 0
            && slot.hva.is_page_aligned()
            && slot.gfn.0.checked_add(slot.pages).is_some_and(|end| end <= LOWER_HALF_PAGES)
            && slot.pages.checked_mul(PAGE_SIZE).and_then(|bytes| slot.hva.checked_add(bytes)).is_some();
        if !fits {
            return Err(SlotError::Range(slot));
        }
        let (new, taken) = (slot.gfns(), |old: &Slot| old.memslot.gfns());
        if self.slots.iter().map(taken).any(|old| old.start < new.end && new.start < old.end) {
            return Err(SlotError::Overlap(slot));
        }
        let mut slots = self.slots.clone();
        let at = slots.partition_point(|other| other.memslot.gfn < slot.gfn);
        slots.insert(at, Slot { memslot: slot, log: None });
        Ok(Self { slots })
    }

    fn position(&self, gfn: Gfn) -> Result<usize, SlotError> {
        self.slots.iter().position(|slot| slot.memslot.gfn == gfn).ok_or(SlotError::Missing(gfn))
    }

    fn without(&self, gfn: Gfn) -> Result<(Self, Memslot), SlotError> {
        let mut slots = self.slots.clone();
        let slot = slots.remove(self.position(gfn)?);
        Ok((Self { slots }, slot.memslot))
    }
}

impl ShadowMmu {
    /// Adds a slot. Waits until no pair is open.
    ///
    /// # Errors
    /// [`SlotError`].
    pub fn add_slot(&self, slot: Memslot) -> Result<(), SlotError> {
        self.replace_slots(|slots| Ok((slots.with(slot)?, Leaves::Stay)))
    }

    /// Removes the slot that starts at `gfn`, with every leaf of it. On return no vCPU reaches its memory (I39).
    ///
    /// # Errors
    /// [`SlotError::Missing`].
    pub fn remove_slot(&self, gfn: Gfn) -> Result<(), SlotError> {
        self.replace_slots(|slots| slots.without(gfn).map(|(slots, slot)| (slots, Leaves::Go(slot.gfns()))))
    }

    /// Publishes a log for the slot that starts at `gfn`, and arms its leaves, or notes them where the log begins with all
    /// written.
    pub(super) fn set_log(
        &self,
        gfn: Gfn,
        log: impl FnOnce(&Memslot) -> DirtyLog,
    ) -> Result<(), DirtyLogError> {
        self.replace_slots(|slots| {
            let mut slots = slots.clone();
            let at = slots.position(gfn)?;
            let slot = &mut slots.slots[at];
            if slot.log.is_some() {
                return Err(DirtyLogError::Logged(gfn));
            }
            let log = Arc::new(log(&slot.memslot));
            slot.log = Some(Arc::clone(&log));
            let leaves = Leaves::Arm(slot.memslot, log);
            Ok((slots, leaves))
        })
    }

    /// Ends the log of the slot that starts at `gfn`.
    pub(super) fn unset_log(&self, gfn: Gfn) -> Result<(), DirtyLogError> {
        self.replace_slots(|slots| {
            let mut slots = slots.clone();
            let at = slots.position(gfn)?;
            slots.slots[at].log.take().ok_or(DirtyLogError::NotLogged(gfn))?;
            Ok((slots, Leaves::Stay))
        })
    }

    /// The slots as they are now.
    pub fn slots(&self) -> Arc<Memslots> {
        Arc::clone(&self.core.slots.read())
    }

    /// Publishes changed slots, and does to leaves what `change` says.
    fn replace_slots<E>(
        &self,
        change: impl FnOnce(&Memslots) -> Result<(Memslots, Leaves), E>,
    ) -> Result<(), E> {
        let core = &*self.core;
        // Held throughout: no pair can open, and two replacements cannot cross.
        let mut active = core.active.lock();
        while *active > 0 {
            active = core.idle.wait(active);
        }
        let (slots, leaves) = change(&core.slots.read())?;
        let slots = Arc::new(slots);
        *core.slots.write() = Arc::clone(&slots);
        let _exclusive = core.windows.write();
        core.seq.removed();
        let mut gather = Gather::new(core.tlb.as_ref());
        match leaves {
            Leaves::Stay => {}
            Leaves::Go(gfns) => core.zap(&slots, gfns, &mut gather),
            Leaves::Arm(memslot, log) => core.arm_slot(&memslot, &log, &mut gather),
        }
        core.finish(gather);
        Ok(())
    }
}

/// What becomes of leaves when the slots change.
enum Leaves {
    Stay,
    /// These are removed.
    Go(Range<u64>),
    /// Those of the slot lose what would hide a write from its log, or are in it from the start.
    Arm(Memslot, Arc<DirtyLog>),
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
