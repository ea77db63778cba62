// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Addresses and frame numbers, one type for each space, so that one cannot be taken for another.
//!
//! | type | what it counts | space |
//! | --- | --- | --- |
//! | [`Gpa`] | bytes | guest physical; a guest has no paging of its own, so also guest virtual |
//! | [`Gfn`] | pages | guest physical: `Gpa >> 12` |
//! | [`Hva`] | bytes | the host address space that [`Mm`](crate::mm::Mm) manages |
//! | [`Pfn`] | pages | the frame pool: an index into its file; KVM sees it as guest physical `pfn << 12` |

use std::fmt;
use std::ops::Range;

/// log2 of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;
/// Bytes in a page: the unit of mapping everywhere.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;
/// First byte past what a user program may map on x86-64 Linux with four levels.
pub const LINUX_TASK_SIZE: u64 = (1 << 47) - PAGE_SIZE;
/// First byte past what a guest may map: Linux's limit, less 60 KiB that an engine may need for itself in the guest's own
/// address space. The same for every engine, so that guests find the same limits on each.
pub const TASK_SIZE: u64 = (1 << 47) - (64 << 10);

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub u64);

        impl $name {
            /// This address moved up by `bytes`, or `None` where that leaves 64 bits.
            pub fn checked_add(self, bytes: u64) -> Option<Self> {
                self.0.checked_add(bytes).map(Self)
            }
            /// The start of the page this address lies in.
            pub const fn page_floor(self) -> Self {
                Self(self.0 & !(PAGE_SIZE - 1))
            }
            /// Whether this address is the start of a page.
            pub const fn is_page_aligned(self) -> bool {
                self.0 & (PAGE_SIZE - 1) == 0
            }
            /// The number of the page this address lies in.
            pub const fn page(self) -> u64 {
                self.0 >> PAGE_SHIFT
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

address!(
    /// A guest physical address, in bytes. Without guest paging also a guest virtual one.
    Gpa
);
address!(
    /// A host virtual address, in bytes: an address in the space that [`Mm`](crate::mm::Mm) manages.
    Hva
);

impl Gpa {
    /// The guest frame this address lies in.
    pub const fn gfn(self) -> Gfn {
        Gfn(self.0 >> PAGE_SHIFT)
    }
}

/// A guest frame number: a guest physical address in pages.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Gfn(pub u64);

impl Gfn {
    /// The first byte of this guest frame.
    pub const fn gpa(self) -> Gpa {
        Gpa(self.0 << PAGE_SHIFT)
    }
}

/// A frame of the pool, by index.
///
/// 32 bits: 16 TiB of frames, and half the size of an address in every array that holds one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Pfn(pub u32);

impl Pfn {
    /// Byte offset of this frame in the pool's file, which is also its address in the memslot that KVM is given.
    pub const fn offset(self) -> u64 {
        (self.0 as u64) << PAGE_SHIFT
    }
    /// The frame's place in per-frame arrays.
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

/// A half-open range of host virtual addresses, page aligned at both ends.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct HvaRange {
    /// First byte.
    pub start: Hva,
    /// First byte past the end.
    pub end: Hva,
}

impl HvaRange {
    /// `[start, end)`, rounded outward to whole pages (I20: a range may grow by rounding, never shrink).
    ///
    /// `end` below `start` gives an empty range. `end` is capped at the last page boundary of 64 bits.
    pub fn new(start: Hva, end: Hva) -> Self {
        let up = end.0.saturating_add(PAGE_SIZE - 1) & !(PAGE_SIZE - 1);
        let start = start.page_floor();
        Self { start, end: Hva(up.max(start.0)) }
    }
    /// `pages` pages from the page of `start`, cut off where 64 bits end.
    pub fn pages_from(start: Hva, pages: u64) -> Self {
        let start = start.page_floor();
        Self::new(start, Hva(start.0.saturating_add(pages.saturating_mul(PAGE_SIZE))))
    }
    /// The one page `hva` lies in.
    pub fn page(hva: Hva) -> Self {
        Self::pages_from(hva, 1)
    }
    /// Bytes in the range.
    pub const fn len(self) -> u64 {
        self.end.0 - self.start.0
    }
    /// Whether the range holds nothing.
    pub const fn is_empty(self) -> bool {
        self.end.0 == self.start.0
    }
    /// Pages in the range.
    pub const fn page_count(self) -> u64 {
        self.len() >> PAGE_SHIFT
    }
    /// The range in page numbers.
    pub const fn page_numbers(self) -> Range<u64> {
        self.start.page()..self.end.page()
    }
    /// Whether `hva` lies in the range.
    pub fn contains(self, hva: Hva) -> bool {
        self.start <= hva && hva < self.end
    }
    /// What this range and `other` have in common; empty if nothing.
    pub fn intersect(self, other: Self) -> Self {
        let start = self.start.max(other.start);
        Self { start, end: self.end.min(other.end).max(start) }
    }
    /// Whether the ranges share a byte.
    pub fn overlaps(self, other: Self) -> bool {
        !self.intersect(other).is_empty()
    }
}

impl fmt::Debug for HvaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{:#x}, {:#x})", self.start.0, self.end.0)
    }
}

impl fmt::Display for HvaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

bitflags::bitflags! {
    /// Ways to reach memory. As rights: what a mapping allows. As a request: what an access needs.
    #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
    pub struct Access: u8 {
        /// Load.
        const READ = 1;
        /// Store.
        const WRITE = 2;
        /// Instruction fetch.
        const EXEC = 4;
    }
}

impl fmt::Display for Access {
    /// Three columns, as in `/proc/self/maps`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let column = |flag, letter| if self.contains(flag) { letter } else { '-' };
        write!(f, "{}{}{}", column(Self::READ, 'r'), column(Self::WRITE, 'w'), column(Self::EXEC, 'x'))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn i20_ranges_round_outward() {
        let range = HvaRange::new(Hva(0x1fff), Hva(0x3001));
        assert_eq!(range, HvaRange { start: Hva(0x1000), end: Hva(0x4000) });
        assert_eq!(range.page_numbers(), 1..4);
    }

    #[test]
    fn a_range_at_the_end_of_the_space_does_not_wrap() {
        let range = HvaRange::new(Hva(u64::MAX - 1), Hva(u64::MAX));
        assert!(range.start <= range.end);
        assert!(!HvaRange::pages_from(Hva(u64::MAX), u64::MAX).overlaps(HvaRange::page(Hva(0))));
    }

    #[test]
    fn disjoint_ranges_intersect_in_nothing() {
        let (low, high) = (HvaRange::page(Hva(0)), HvaRange::page(Hva(0x5000)));
        assert!(low.intersect(high).is_empty());
        assert!(!low.overlaps(high));
    }
}
