// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Frame numbers beyond the pool's, the engine's memslots behind them, and which host addresses they are.
//!
//! A *slot* is a run of frame numbers with one run of host addresses behind it; the engine makes a memslot of it. A *piece* is
//! what is left of an adopted mapping: a run of host addresses, as its owner knows them, and its frame numbers. For a private
//! mapping a slot points at those very addresses; when they move, the pieces get a slot of their own and new numbers. For
//! a shared one the slot points at an alias that does not move, so the piece alone changes its addresses. A slot may cover
//! more than its pieces: what has no VMA has no pte, hence no spte, and no CPU reaches it.

use crate::addr::{Access, PAGE_SIZE, Pfn};
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::io;
use std::ops::Range;

/// A run of frame numbers beyond the pool's, and the memory of this process that they stand for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostSlot {
    /// First frame number.
    pub first: Pfn,
    /// How many.
    pub pages: u64,
    /// Host address of the first.
    pub host: u64,
    /// What guests may do: with or without [`Access::WRITE`].
    pub access: Access,
}

/// The engine's side: how the CPUs of a guest reach frame numbers beyond the pool's. For KVM each is a memslot.
///
/// Called with the mmap lock held for writing: an implementation must not call into the `Mm`, nor wait for a vCPU thread to do
/// more than leave the guest.
pub trait HostSlots: Debug + Send + Sync {
    /// Lets the guest reach the memory of `slot`, as far as sptes lead there. Slots never overlap, and the frame number
    /// right behind the pool's is never part of one.
    ///
    /// # Errors
    /// The host's; then there is no such slot.
    ///
    /// # Safety
    /// Until [`remove`](Self::remove) the guest may reach whatever is at these addresses of this process, as
    /// [`Mm::adopt`](crate::mm::Mm::adopt) says.
    unsafe fn add(&self, slot: &HostSlot) -> io::Result<()>;

    /// Takes away the slot that begins at `first`. No spte leads there any more, and everything was flushed.
    ///
    /// # Errors
    /// The host's; then the slot is still there.
    fn remove(&self, first: Pfn) -> io::Result<()>;
}

/// A mapping of our own, that goes when it is dropped.
#[derive(Debug)]
pub(super) struct Anonymous(Range<u64>);

impl Anonymous {
    /// One page that nobody can access.
    pub(super) fn page() -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping where the kernel likes; nothing that exists is touched.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), PAGE_SIZE as usize, 0, flags, -1, 0) };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self(at as u64..at as u64 + PAGE_SIZE))
    }

    /// A second mapping of the shared memory at `range`.
    pub(super) fn alias(range: &Range<u64>) -> io::Result<Self> {
        let len = range.end - range.start;
        // SAFETY: an old length of 0 leaves the old mapping alone and makes a new one where the kernel likes.
        let at =
            unsafe { libc::mremap(range.start as *mut libc::c_void, 0, len as usize, libc::MREMAP_MAYMOVE) };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self(at as u64..at as u64 + len))
    }

    pub(super) fn range(&self) -> Range<u64> {
        self.0.clone()
    }
}

impl Drop for Anonymous {
    fn drop(&mut self) {
        // SAFETY: `self` made the mapping, no reference into it exists, and nobody else knows it but the engine, whose slot was
        // removed. It is not registered with a userfaultfd, so this waits for nobody.
        unsafe { libc::munmap(self.0.start as *mut libc::c_void, (self.0.end - self.0.start) as usize) };
    }
}

/// A slot of the engine's.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) pages: u32,
    pub(super) access: Access,
    /// Where a shared mapping's slot points.
    pub(super) alias: Option<Anonymous>,
}

/// A run of host addresses and its frame numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) host: Range<u64>,
    pub(super) first: u32,
}

impl Piece {
    /// Its frame numbers.
    pub(super) fn pfns(&self) -> Range<u32> {
        self.first..self.first + ((self.host.end - self.host.start) / PAGE_SIZE) as u32
    }

    /// The part in `host`, which lies within.
    pub(super) fn part(&self, host: Range<u64>) -> Self {
        let first = self.first + ((host.start - self.host.start) / PAGE_SIZE) as u32;
        Self { host, first }
    }
}

/// Everything that is adopted.
#[derive(Debug)]
pub(super) struct State {
    /// Lowest frame number that may be given out.
    lowest: u32,
    /// By first frame number.
    pub(super) slots: BTreeMap<u32, Slot>,
    /// Disjoint by address and by number, in no order.
    pub(super) pieces: Vec<Piece>,
}

impl State {
    /// Nothing adopted beside a pool of `frames` frames.
    pub(super) fn new(frames: usize) -> Self {
        // A whole table's worth away from the pool: what is right behind it belongs to the engine.
        const ALIGN: usize = 512;
        let lowest = u32::try_from((frames / ALIGN + 2) * ALIGN).unwrap_or(u32::MAX);
        Self { lowest, slots: BTreeMap::new(), pieces: Vec::new() }
    }

    /// The lowest run of `pages` free frame numbers.
    pub(super) fn free_pfns(&self, pages: u32) -> Option<u32> {
        let mut first = self.lowest;
        for (&start, slot) in &self.slots {
            if start - first >= pages {
                break;
            }
            first = start + slot.pages;
        }
        first.checked_add(pages).map(|_| first)
    }

    /// The slot that holds frame number `pfn`.
    pub(super) fn slot_of(&self, pfn: u32) -> Option<&Slot> {
        let (&first, slot) = self.slots.range(..=pfn).next_back()?;
        (pfn - first < slot.pages).then_some(slot)
    }

    /// Takes out what is at the addresses `host`, splitting pieces that reach beyond.
    pub(super) fn take(&mut self, host: &Range<u64>) -> Vec<Piece> {
        let mut taken = Vec::new();
        let mut kept = Vec::with_capacity(self.pieces.len() + 1);
        for piece in self.pieces.drain(..) {
            let inside = piece.host.start.max(host.start)..piece.host.end.min(host.end);
            if inside.is_empty() {
                kept.push(piece);
                continue;
            }
            for rest in [piece.host.start..inside.start, inside.end..piece.host.end] {
                if !rest.is_empty() {
                    kept.push(piece.part(rest));
                }
            }
            taken.push(piece.part(inside));
        }
        self.pieces = kept;
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(pages: u32) -> Slot {
        Slot { pages, access: Access::READ, alias: None }
    }

    #[test]
    fn numbers_keep_their_distance_from_the_pool_and_gaps_are_filled_first() {
        let mut state = State::new(1000);
        assert_eq!(state.free_pfns(8), Some(1536));
        state.slots.insert(1536, slot(8));
        state.slots.insert(1560, slot(8));
        assert_eq!(state.free_pfns(16), Some(1544));
        assert_eq!(state.free_pfns(17), Some(1568));
        assert!(state.slot_of(1543).is_some() && state.slot_of(1544).is_none());
        assert_eq!(State::new(usize::MAX / 2).free_pfns(1), None, "a pool that leaves no number");
    }

    #[test]
    fn taking_the_middle_leaves_both_ends_with_their_numbers() {
        let mut state = State::new(0);
        state.pieces.push(Piece { host: 0x10_000..0x18_000, first: 100 });
        let taken = state.take(&(0x12_000..0x14_000));
        assert_eq!(taken, [Piece { host: 0x12_000..0x14_000, first: 102 }]);
        let left =
            [Piece { host: 0x10_000..0x12_000, first: 100 }, Piece { host: 0x14_000..0x18_000, first: 104 }];
        assert_eq!(state.pieces, left);
        assert!(state.take(&(0x12_000..0x14_000)).is_empty());
        assert_eq!(state.take(&(0..u64::MAX)).len(), 2);
    }
}
