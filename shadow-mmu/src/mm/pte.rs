// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The primary page-table entry. No CPU walks it; it says which frame a page of the address space *is*.
//!
//! | bit | name |
//! | --- | --- |
//! | 0 | present |
//! | 1 | writable: a write needs no fault in the primary |
//! | 5 | young: accessed, as far as the primary knows (secondaries know more) |
//! | 6 | dirty |
//! | 7 | the page was merged: its frame is one of [`ksm`](crate::ksm), or the zero frame; never writable |
//! | 9 | the shared zero frame; no reference is held for it |
//! | 10 | the frame belongs to an [`Object`](super::Object) (page cache or shared memory) |
//! | 11 | a page of an [adopted mapping](super::watch) of the host: no frame of the pool |
//! | 12–51 | pfn |
//! | 52–56 | when it was last found young, see [`generations`](super::PageAge) |
//! | 57 | the page is known to [`ksm`](crate::ksm), which need not look at its frame |
//!
//! The pfn of an adopted page lies beyond the pool's frames: there is no reference to hold, no map count, nothing to copy or
//! to pin, as for the ptes of Linux's `VM_PFNMAP` mappings.
//!
//! Execute is a right of the VMA, not of the pte. A page of a VMA without any right keeps its pte; the VMA refuses.

use crate::addr::{Access, PAGE_SHIFT, Pfn};
use std::fmt;

/// Whether a page's content is known to who shares pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Known {
    Yes,
    No,
}

/// One entry of the primary page table, by value.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Pte(pub(crate) u64);

impl Pte {
    const PRESENT: u64 = 1;
    const WRITE: u64 = 1 << 1;
    const YOUNG: u64 = 1 << 5;
    const DIRTY: u64 = 1 << 6;
    const KSM: u64 = 1 << 7;
    const ZERO: u64 = 1 << 9;
    const OBJECT: u64 = 1 << 10;
    const ADOPTED: u64 = 1 << 11;
    const PFN_MASK: u64 = 0x000f_ffff_ffff_f000;
    const KNOWN: u64 = 1 << 57;
    const TAG_SHIFT: u32 = 52;
    /// Values of the tag.
    pub(super) const TAGS: u8 = 32;

    /// No page.
    pub const NONE: Self = Self(0);

    /// A private page, read-only. Only address spaces that were forked from each other have one together.
    pub fn anonymous(pfn: Pfn) -> Self {
        Self(pfn.offset() | Self::PRESENT)
    }
    /// A page of an object, read-only.
    pub fn object(pfn: Pfn) -> Self {
        Self(pfn.offset() | Self::PRESENT | Self::OBJECT)
    }
    /// The shared zero frame. Never writable.
    pub fn zero(pfn: Pfn) -> Self {
        Self(pfn.offset() | Self::PRESENT | Self::ZERO)
    }
    /// A private page whose frame is shared with others of the same content, read-only.
    pub fn ksm(pfn: Pfn) -> Self {
        Self(pfn.offset() | Self::PRESENT | Self::KSM)
    }
    /// A private page of zeros that was merged with the zero frame.
    pub fn ksm_zero(pfn: Pfn) -> Self {
        Self(Self::zero(pfn).0 | Self::KSM)
    }
    /// The same, as a page of [`ksm`](crate::ksm).
    pub(super) fn merged(self) -> Self {
        Self(self.0 | Self::KSM)
    }
    /// The same, as a page of its own.
    pub(super) fn unmerged(self) -> Self {
        Self(self.0 & !Self::KSM)
    }
    /// The same without the mark of a write.
    pub(crate) fn clean(self) -> Self {
        Self(self.0 & !Self::DIRTY)
    }
    /// The same, with or without the note that who shares pages knows what the page holds.
    pub(crate) fn with_known(self, known: Known) -> Self {
        match known {
            Known::Yes => Self(self.0 | Self::KNOWN),
            Known::No => Self(self.0 & !Self::KNOWN),
        }
    }
    /// Whether nothing is to be found out about the page by who shares pages: it is merged or not his; or it is known to him, and
    /// nobody has written it through the primary since.
    pub(crate) fn is_settled(self) -> bool {
        self.is_ksm() || !self.is_anonymous() || self.0 & (Self::KNOWN | Self::DIRTY) == Self::KNOWN
    }
    /// Whether the two differ in no more than in what says when the page was accessed, and what is known of it (`pte_same`).
    pub(super) fn is_same_page(self, other: Self) -> bool {
        let plain = |pte: Self| pte.old().with_tag(0).with_known(Known::No);
        plain(self) == plain(other)
    }
    /// A page of an adopted mapping, read-only. See [`watch`](super::watch).
    pub fn adopted(pfn: Pfn) -> Self {
        Self(pfn.offset() | Self::PRESENT | Self::ADOPTED)
    }
    /// The same with the marks of an access that is about to happen: young, and dirty if it writes.
    pub fn touched(self, access: Access) -> Self {
        Self(self.0 | Self::YOUNG | if access.contains(Access::WRITE) { Self::DIRTY } else { 0 })
    }
    /// The same without the mark of an access.
    pub fn old(self) -> Self {
        Self(self.0 & !Self::YOUNG)
    }
    /// The same with another tag, below [`TAGS`](Self::TAGS).
    pub(super) fn with_tag(self, tag: u8) -> Self {
        let mask = u64::from(Self::TAGS - 1) << Self::TAG_SHIFT;
        Self(self.0 & !mask | u64::from(tag) << Self::TAG_SHIFT)
    }
    /// The same with what `other` says about when the page was accessed.
    pub(super) fn with_age_of(self, other: Self) -> Self {
        Self(self.0 | other.0 & Self::YOUNG).with_tag(other.tag())
    }
    /// What says when it was last found young; 0 for never.
    pub(super) fn tag(self) -> u8 {
        (self.0 >> Self::TAG_SHIFT) as u8 & (Self::TAGS - 1)
    }
    /// The same, writable.
    pub fn writable(self) -> Self {
        Self(self.0 | Self::WRITE)
    }
    /// The same, not writable.
    pub fn write_protected(self) -> Self {
        Self(self.0 & !Self::WRITE)
    }

    /// Whether there is a page.
    pub fn is_present(self) -> bool {
        self.0 & Self::PRESENT != 0
    }
    /// Whether a write needs no fault.
    pub fn is_writable(self) -> bool {
        self.0 & Self::WRITE != 0
    }
    /// Whether the primary saw an access.
    pub fn is_young(self) -> bool {
        self.0 & Self::YOUNG != 0
    }
    /// Whether the primary saw a write.
    pub fn is_dirty(self) -> bool {
        self.0 & Self::DIRTY != 0
    }
    /// Whether this maps the shared zero frame.
    pub fn is_zero(self) -> bool {
        self.0 & Self::ZERO != 0
    }
    /// Whether the page was merged.
    pub fn is_ksm(self) -> bool {
        self.0 & Self::KSM != 0
    }
    /// Whether this maps a private page: a frame of the pool that is neither an object's nor the zero frame.
    pub fn is_anonymous(self) -> bool {
        self.is_present() && !self.is_zero() && !self.is_object() && !self.is_adopted()
    }
    /// Whether the frame belongs to an object.
    pub fn is_object(self) -> bool {
        self.0 & Self::OBJECT != 0
    }
    /// Whether this maps a page of an adopted mapping.
    pub fn is_adopted(self) -> bool {
        self.0 & Self::ADOPTED != 0
    }
    /// The frame.
    pub fn pfn(self) -> Pfn {
        Pfn(((self.0 & Self::PFN_MASK) >> PAGE_SHIFT) as u32)
    }
    /// The frame of the pool, if this pte holds a reference to it.
    pub fn counted_frame(self) -> Option<Pfn> {
        (self.is_present() && !self.is_zero() && !self.is_adopted()).then(|| self.pfn())
    }
}

impl fmt::Debug for Pte {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.is_present() {
            return write!(f, "none");
        }
        let kind = match () {
            () if self.is_zero() && self.is_ksm() => "ksm zero",
            () if self.is_ksm() => "ksm",
            () if self.is_zero() => "zero",
            () if self.is_object() => "object",
            () if self.is_adopted() => "adopted",
            () => "anonymous",
        };
        let flag = |set, letter| if set { letter } else { '-' };
        write!(
            f,
            "{kind} {:#x} r{}{}{}",
            self.pfn().0,
            flag(self.is_writable(), 'w'),
            flag(self.is_young(), 'A'),
            flag(self.is_dirty(), 'D')
        )
    }
}
