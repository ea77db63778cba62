// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The dirty ring of a vCPU: what it wrote, page by page, in the order in which it got to write (`virt/kvm/dirty_ring.c`).
//!
//! # Protocol
//! An entry goes 00 → 01 dirty → 1X harvested → 00, in order of the index (I36). Three parties, one step each:
//! * The vCPU's thread *pushes* ([`VcpuRing`], which only it has): fills slot and page, then publishes the entry by its flag.
//! * The collector *harvests* ([`DirtyRing::harvest`]): reads entries whose flag says dirty, and marks them harvested.
//! * Somebody *resets* ([`ShadowMmu::reset_dirty_rings`](crate::shadow::ShadowMmu::reset_dirty_rings)): takes back harvested
//!   entries, write-protects their pages again and flushes. From its return on, a further write makes a further entry (I32);
//!   so it comes before whoever collects reads the pages.
//!
//! A vCPU whose ring is *soft-full* must not run: the entries that are left are for faults that are under way. Whoever resets
//! wakes it.

use super::DirtyLogError;
use crate::addr::Gfn;
use crate::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use crate::sync::{Arc, Mutex};
use std::fmt;

/// Entries kept free behind soft-full (`KVM_DIRTY_RING_RSVD_ENTRIES`).
const RESERVED: u32 = 64;
/// The fewest entries of a ring.
pub const RING_LEAST: u32 = 2 * RESERVED;
/// The most (`KVM_DIRTY_RING_MAX_ENTRIES`).
pub const RING_MOST: u32 = 65536;

const FREE: u32 = 0;
const DIRTY: u32 = 1;
const HARVESTED: u32 = 2;

/// A page that a vCPU may have written: its memslot, and its offset there (`struct kvm_dirty_gfn`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DirtyGfn {
    /// First guest frame of the memslot.
    pub slot: Gfn,
    /// Offset in the memslot, in pages.
    pub page: u64,
}

#[derive(Debug, Default)]
struct Entry {
    flags: AtomicU32,
    slot: AtomicU64,
    page: AtomicU64,
}

impl Entry {
    /// What it speaks of. The caller has seen its flag.
    fn gfn(&self) -> DirtyGfn {
        DirtyGfn { slot: Gfn(self.slot.load(Ordering::Relaxed)), page: self.page.load(Ordering::Relaxed) }
    }
}

type Wake = Box<dyn Fn() + Send + Sync>;

/// A ring, as its collector sees it.
pub struct DirtyRing {
    entries: Box<[Entry]>,
    /// Entries pushed so far, modulo 2^32. Only the owner changes it.
    pushed: AtomicU32,
    /// Entries taken back. Only who holds the list of rings changes it.
    reset: AtomicU32,
    /// Entries harvested; the lock is the collector's.
    harvested: Mutex<u32>,
    /// What is called when entries were taken back.
    wake: Mutex<Option<Wake>>,
}

impl fmt::Debug for DirtyRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DirtyRing")
            .field("size", &self.size())
            .field("used", &self.used())
            .finish_non_exhaustive()
    }
}

/// A ring, as the vCPU has it that fills it.
#[derive(Debug)]
pub struct VcpuRing(Arc<DirtyRing>);

impl DirtyRing {
    /// A ring of `entries` entries, and the vCPU's end of it.
    ///
    /// # Errors
    /// [`DirtyLogError::RingSize`]: no power of two from [`RING_LEAST`] to [`RING_MOST`].
    pub fn new(entries: u32) -> Result<(Arc<Self>, VcpuRing), DirtyLogError> {
        if !entries.is_power_of_two() || !(RING_LEAST..=RING_MOST).contains(&entries) {
            return Err(DirtyLogError::RingSize(entries));
        }
        let ring = Arc::new(Self {
            entries: (0..entries).map(|_| Entry::default()).collect(),
            pushed: AtomicU32::new(0),
            reset: AtomicU32::new(0),
            harvested: Mutex::new(0),
            wake: Mutex::new(None),
        });
        Ok((Arc::clone(&ring), VcpuRing(ring)))
    }

    fn size(&self) -> u32 {
        self.entries.len() as u32
    }

    fn entry(&self, index: u32) -> &Entry {
        &self.entries[(index & (self.size() - 1)) as usize]
    }

    /// Entries in use: pushed and not taken back.
    pub fn used(&self) -> u32 {
        // In this order: the other one grows meanwhile at most, and the difference stays one of moments in their order.
        let reset = self.reset.load(Ordering::Acquire);
        self.pushed.load(Ordering::Acquire).wrapping_sub(reset)
    }

    /// Whether the vCPU must not run until entries were taken back.
    pub fn is_soft_full(&self) -> bool {
        self.used() >= self.size() - RESERVED
    }

    /// From now on `wake` is called whenever entries were taken back, of any ring. It must not call this function.
    pub fn on_reset(&self, wake: impl Fn() + Send + Sync + 'static) {
        *self.wake.lock() = Some(Box::new(wake));
    }

    /// Calls `visit` with every entry that the vCPU has pushed and nobody has harvested, in order, and marks them harvested.
    /// Returns how many there were. `visit` must not harvest the same ring.
    pub fn harvest(&self, mut visit: impl FnMut(DirtyGfn)) -> u32 {
        let mut next = self.harvested.lock();
        let mut count = 0;
        // At most once around: the entry behind the newest is free, or one that this call has marked.
        while count < self.size() {
            let entry = self.entry(*next);
            // Acquire: behind the flag is what it speaks of (I36).
            if entry.flags.load(Ordering::Acquire) != DIRTY {
                break;
            }
            visit(entry.gfn());
            entry.flags.store(HARVESTED, Ordering::Release);
            *next = next.wrapping_add(1);
            count += 1;
        }
        count
    }

    /// Takes back every harvested entry, in order, and calls `visit` with it. The caller holds the list of rings: nobody else
    /// takes entries back.
    pub(super) fn take_back(&self, mut visit: impl FnMut(DirtyGfn)) -> u32 {
        let begun = self.reset.load(Ordering::Relaxed);
        let mut next = begun;
        loop {
            let entry = self.entry(next);
            if entry.flags.load(Ordering::Acquire) != HARVESTED {
                break;
            }
            visit(entry.gfn());
            entry.flags.store(FREE, Ordering::Release);
            next = next.wrapping_add(1);
        }
        // Release: the owner finds the entries free.
        self.reset.store(next, Ordering::Release);
        next.wrapping_sub(begun)
    }

    /// Lets the vCPU know that entries were taken back.
    pub(super) fn wake(&self) {
        if let Some(wake) = &*self.wake.lock() {
            wake();
        }
    }
}

impl VcpuRing {
    /// The collector's view of it.
    pub fn ring(&self) -> &Arc<DirtyRing> {
        &self.0
    }

    /// Adds a page; false if there is no entry left, which a vCPU that stops when soft-full never sees.
    #[must_use]
    pub(super) fn push(&mut self, gfn: DirtyGfn) -> bool {
        let ring = &*self.0;
        if ring.used() >= ring.size() {
            return false;
        }
        let pushed = ring.pushed.load(Ordering::Relaxed);
        let entry = ring.entry(pushed);
        entry.slot.store(gfn.slot.0, Ordering::Relaxed);
        entry.page.store(gfn.page, Ordering::Relaxed);
        // Release: last, so that a collector that sees it sees the rest (I36).
        entry.flags.store(DIRTY, Ordering::Release);
        ring.pushed.store(pushed.wrapping_add(1), Ordering::Release);
        true
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed test may panic")]
    use super::*;

    fn gfn(page: u64) -> DirtyGfn {
        DirtyGfn { slot: Gfn(0), page }
    }

    #[test]
    fn i36_entries_come_back_in_order_and_only_when_harvested() {
        let (ring, mut vcpu) = DirtyRing::new(128).unwrap();
        let mut seen = Vec::new();
        for round in 0..5 {
            let pages: Vec<u64> = (0..100).map(|n| round * 1000 + n).collect();
            assert!(pages.iter().all(|&page| vcpu.push(gfn(page))));
            assert!(ring.is_soft_full());
            assert_eq!(ring.take_back(|_| panic!("nobody has harvested")), 0);
            seen.clear();
            assert_eq!(ring.harvest(|dirty| seen.push(dirty.page)), 100);
            assert_eq!((&seen, ring.harvest(|_| panic!("twice"))), (&pages, 0));
            assert!(ring.is_soft_full(), "harvested is not reset");
            seen.clear();
            assert_eq!(ring.take_back(|dirty| seen.push(dirty.page)), 100);
            assert_eq!((&seen, ring.used()), (&pages, 0));
        }
    }

    #[test]
    fn a_full_ring_takes_no_more() {
        let (ring, mut vcpu) = DirtyRing::new(128).unwrap();
        assert_eq!((0..200).filter(|&page| vcpu.push(gfn(page))).count(), 128);
        assert_eq!(ring.harvest(|_| {}), 128);
        assert_eq!(ring.take_back(|_| {}), 128);
        assert!(vcpu.push(gfn(1)));
    }

    #[test]
    fn sizes_out_of_range_are_refused() {
        for bad in [0, 1, 64, 100, 1 << 17] {
            assert_eq!(DirtyRing::new(bad).err(), Some(DirtyLogError::RingSize(bad)));
        }
    }
}
