// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The shadow page-table entry: an x86-64 entry that the CPU walks, plus software bits of ours.
//!
//! | bit | name | who sets it |
//! | --- | --- | --- |
//! | 0 | present: the entry may be used, and for reads | us |
//! | 1 | W | us |
//! | 2 | user | us, in every entry of the lower half |
//! | 5 | A, accessed | the CPU, and us at a fault that the access is about to repeat |
//! | 6 | D, dirty (leaf only) | the same |
//! | 9 | HOST_WRITABLE: the primary allowed writing when the entry was made | us, constant while present (I16) |
//! | 10 | MMU_WRITABLE: W may be given back without asking the primary | us |
//! | 11 | MMU_PRESENT: a leaf of ours is here, whatever bit 0 says | us |
//! | 12–51 | pfn | us |
//! | 63 | NX | us |
//!
//! Legal (HOST_WRITABLE, MMU_WRITABLE, W): 111 writable, 110 write-protected for tracking, 000 read-only by the primary
//! (`spte.h`; 100, protected because it is a shadowed guest table, cannot occur: guests have no page tables).
//!
//! An *access-tracked* leaf has lost present and W, so that the next access faults: what stands for A where the CPU sets none.
//! KVM keeps the rights to be restored in bits of their own; here nothing needs to be kept (I50): every leaf could be read,
//! NX is where it was, and W comes back by a write fault only, as MMU_WRITABLE allows.

use crate::addr::{Access, PAGE_SHIFT, Pfn};
use crate::table::Link;
use std::fmt;

/// Present, for the CPU.
pub const PRESENT: u64 = 1;
const WRITE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const HOST_WRITABLE: u64 = 1 << 9;
const MMU_WRITABLE: u64 = 1 << 10;
const MMU_PRESENT: u64 = 1 << 11;
const NO_EXEC: u64 = 1 << 63;
const PFN_MASK: u64 = 0x000f_ffff_ffff_f000;

/// What the CPUs of an engine do with A and D. [`Tlb::ad_bits`](super::Tlb::ad_bits) says which it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AdBits {
    /// They set them at the next access, flushed or not. A translation that some CPU has cached may hide an access from A;
    /// aging tolerates that, and does without flushes.
    Unflushed,
    /// They set them only after a flush: a KVM that shadows guest tables has the leaf's rights in a copy of its own and does
    /// not look again. Aging flushes in batches.
    AfterFlush,
    /// They set none. A is told from leaves that are access-tracked, D from leaves that get W by a write fault only: there, W
    /// implies D.
    None,
}

/// One entry of the shadow map, by value. In a table it is an atomic word, because the CPU writes it too.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Spte(pub u64);

impl Spte {
    /// No entry.
    pub const NONE: Self = Self(0);

    /// A leaf for `pfn` with at most `rights`; a leaf can always be read.
    pub fn leaf(pfn: Pfn, rights: Access) -> Self {
        let mut bits = pfn.offset() | PRESENT | USER | MMU_PRESENT;
        if rights.contains(Access::WRITE) {
            bits |= WRITE | HOST_WRITABLE | MMU_WRITABLE;
        }
        if !rights.contains(Access::EXEC) {
            bits |= NO_EXEC;
        }
        Self(bits)
    }

    /// An entry that leads to the table in `pfn`.
    pub fn table(pfn: Pfn) -> Self {
        Self(Link::to(pfn).0)
    }

    /// With A set, and D for an access that writes: what the CPU would do when it repeats the access, for less.
    pub fn touched(self, access: Access) -> Self {
        Self(self.0 | ACCESSED | if access.contains(Access::WRITE) { DIRTY } else { 0 })
    }

    /// Without W, which a write fault gives back without asking the primary.
    pub fn write_protected(self) -> Self {
        Self(self.0 & !WRITE)
    }
    /// Without present, W and A: the next access faults (`mark_spte_for_access_track`).
    pub fn access_tracked(self) -> Self {
        Self(self.0 & !(PRESENT | WRITE | ACCESSED))
    }
    /// Without D.
    pub fn clean(self) -> Self {
        Self(self.0 & !DIRTY)
    }
    /// Without A.
    pub fn old(self) -> Self {
        Self(self.0 & !ACCESSED)
    }
    /// With what `access` needs and the leaf may have without asking the primary, touched by that access; `None` where it may
    /// not, or is no leaf (`restore_acc_track_spte`, and W as MMU_WRITABLE allows).
    pub fn restored(self, access: Access) -> Option<Self> {
        if !self.is_leaf() {
            return None;
        }
        let mut restored = Self(self.0 | PRESENT);
        if access.contains(Access::WRITE) && self.is_mmu_writable() {
            restored.0 |= WRITE;
        }
        restored.rights().contains(access).then(|| restored.touched(access))
    }
    /// Whether it was accessed since that was cleared.
    pub fn is_young(self, ad: AdBits) -> bool {
        match ad {
            AdBits::Unflushed | AdBits::AfterFlush => self.is_accessed(),
            AdBits::None => self.is_leaf() && self.is_present(),
        }
    }
    /// Whether the CPU may use the entry, as a leaf or as a table. False for a leaf that is access-tracked.
    pub fn is_present(self) -> bool {
        self.0 & PRESENT != 0
    }
    /// Whether this is a leaf of the shadow map.
    pub fn is_leaf(self) -> bool {
        self.0 & MMU_PRESENT != 0
    }
    /// The frame: of the page for a leaf, of the next table otherwise.
    pub fn pfn(self) -> Pfn {
        Pfn(((self.0 & PFN_MASK) >> PAGE_SHIFT) as u32)
    }
    /// What the CPU lets a guest do through this leaf.
    pub fn rights(self) -> Access {
        if !self.is_present() {
            return Access::empty();
        }
        let mut rights = Access::READ;
        rights.set(Access::WRITE, self.is_writable());
        rights.set(Access::EXEC, self.0 & NO_EXEC == 0);
        rights
    }
    /// W.
    pub fn is_writable(self) -> bool {
        self.0 & WRITE != 0
    }
    /// HOST_WRITABLE.
    pub fn is_host_writable(self) -> bool {
        self.0 & HOST_WRITABLE != 0
    }
    /// MMU_WRITABLE.
    pub fn is_mmu_writable(self) -> bool {
        self.0 & MMU_WRITABLE != 0
    }
    /// A.
    pub fn is_accessed(self) -> bool {
        self.0 & ACCESSED != 0
    }
    /// D.
    pub fn is_dirty(self) -> bool {
        self.0 & DIRTY != 0
    }
    /// Whether (HOST_WRITABLE, MMU_WRITABLE, W) is one of the legal states, and D is not set without W's leave.
    pub fn is_legal(self) -> bool {
        matches!(
            (self.is_host_writable(), self.is_mmu_writable(), self.is_writable()),
            (true, true, true) | (true, true, false) | (false, false, false)
        ) && (self.is_host_writable() || !self.is_dirty())
    }
    /// Whether it has no bit that no leaf has, and those that each has. Every other bit is reserved, or means something to the CPU
    /// that umbra never asks for.
    pub fn is_well_formed(self) -> bool {
        /// Frames have 32 bits.
        const FRAME: u64 = (u32::MAX as u64) << PAGE_SHIFT;
        const KNOWN: u64 = PRESENT
            | WRITE
            | USER
            | ACCESSED
            | DIRTY
            | HOST_WRITABLE
            | MMU_WRITABLE
            | MMU_PRESENT
            | FRAME
            | NO_EXEC;
        self.0 & !KNOWN == 0 && self.0 & USER != 0
    }
    /// Without A and D, to compare entries for what they translate to and allow.
    pub fn without_marks(self) -> Self {
        Self(self.0 & !(ACCESSED | DIRTY))
    }
    /// What becomes of the leaf `old` of the same frame when it gets the rights of this one. Its marks stay, and W if it had
    /// that: this one may be without because of a log, but a W that CPUs have cached goes by a flush only, and whoever finds
    /// it gone does not flush (R16).
    pub fn added_to(self, old: Self) -> Self {
        let write = if self.is_mmu_writable() { old.0 & WRITE } else { 0 };
        Self(self.0 | old.0 & (ACCESSED | DIRTY) | write)
    }
}

impl fmt::Debug for Spte {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.is_present() && !self.is_leaf() {
            return write!(f, "none");
        }
        let flag = |set, letter| if set { letter } else { '-' };
        write!(
            f,
            "{} {:#x} {}{}{}{}{}",
            if self.is_leaf() { "leaf" } else { "table" },
            self.pfn().0,
            self.rights(),
            flag(self.is_accessed(), 'A'),
            flag(self.is_dirty(), 'D'),
            flag(self.is_host_writable(), 'H'),
            flag(self.is_mmu_writable(), 'M'),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_leaf_gives_back_what_it_was_made_of() {
        for pfn in [0, 1, u32::MAX] {
            for bits in 0..8 {
                let rights = Access::from_bits_truncate(bits) | Access::READ;
                let spte = Spte::leaf(Pfn(pfn), rights);
                assert_eq!((spte.pfn(), spte.rights()), (Pfn(pfn), rights));
                assert!(spte.is_leaf() && spte.is_legal(), "{spte:?}");
                assert!(!spte.is_accessed() && !spte.is_dirty());
            }
        }
    }

    #[test]
    fn i16_only_three_states_of_writability_are_legal() {
        let states = [0, WRITE, MMU_WRITABLE, MMU_WRITABLE | WRITE].map(|low| [low, low | HOST_WRITABLE]);
        let legal = states.iter().flatten().filter(|&&bits| Spte(PRESENT | MMU_PRESENT | bits).is_legal());
        assert_eq!(legal.count(), 3);
    }

    #[test]
    fn r16_an_upgrade_takes_nothing_away() {
        let old = Spte::leaf(Pfn(7), Access::READ | Access::WRITE).touched(Access::WRITE);
        let logged = Spte::leaf(Pfn(7), Access::all()).write_protected();
        assert_eq!(logged.added_to(old), Spte::leaf(Pfn(7), Access::all()).touched(Access::WRITE));
        assert!(!logged.added_to(old.write_protected()).is_writable());
        assert!(!Spte::leaf(Pfn(7), Access::READ).added_to(old).is_writable(), "the primary says no");
    }

    #[test]
    fn a_touch_sets_d_only_for_a_write() {
        let spte = Spte::leaf(Pfn(7), Access::READ | Access::WRITE);
        assert!(!spte.touched(Access::READ).is_dirty() && spte.touched(Access::READ).is_accessed());
        assert!(spte.touched(Access::WRITE).is_dirty());
    }

    #[test]
    fn i50_what_access_tracking_took_comes_back_and_no_more() {
        for bits in 0..8 {
            let rights = Access::from_bits_truncate(bits) | Access::READ;
            let leaf = Spte::leaf(Pfn(9), rights);
            let tracked = leaf.access_tracked();
            assert!(tracked.is_leaf() && tracked.is_legal() && tracked.rights().is_empty(), "{tracked:?}");
            assert!(!tracked.is_young(AdBits::None) && leaf.is_young(AdBits::None));
            let without_w = rights - Access::WRITE;
            for access in [Access::READ, Access::EXEC, Access::READ | Access::WRITE] {
                let restored = tracked.restored(access);
                assert_eq!(restored.is_some(), rights.contains(access), "{leaf:?} for {access}");
                if let Some(restored) = restored {
                    assert_eq!(
                        restored.rights(),
                        without_w | access & Access::WRITE,
                        "{leaf:?} for {access}"
                    );
                    assert_eq!(restored.is_dirty(), access.contains(Access::WRITE));
                    assert!(restored.is_legal() && restored.pfn() == leaf.pfn());
                }
            }
        }
        assert_eq!(Spte::NONE.restored(Access::READ), None);
        assert_eq!(Spte::table(Pfn(3)).restored(Access::READ), None);
    }

    #[test]
    fn i16_a_leaf_with_a_reserved_bit_or_without_the_user_bit_is_not_well_formed() {
        let leaf = Spte::leaf(Pfn(u32::MAX), Access::all()).touched(Access::WRITE);
        assert!(leaf.is_well_formed() && leaf.access_tracked().is_well_formed());
        assert!((44..63).chain([3, 4, 7, 8]).all(|bit| !Spte(leaf.0 | 1 << bit).is_well_formed()));
        assert!(!Spte(leaf.0 & !USER).is_well_formed());
    }

    #[test]
    fn a_table_is_no_leaf() {
        assert!(!Spte::table(Pfn(3)).is_leaf() && Spte::table(Pfn(3)).is_present());
    }
}
