// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Traps: pages that are mapped, and that every access is refused at, until the trap is lifted or the mapping goes.
//!
//! They are what `UFFDIO_POISON` (`PTE_MARKER_POISONED`), memory failure and a right that was revoked look like to a program:
//!
//! | trap | an access gets | a system call that touches it | the content |
//! | --- | --- | --- | --- |
//! | [`Bus`](Trap::Bus) | [`FaultError::BusError`]: SIGBUS, `BUS_ADRERR` | `EFAULT` | stays |
//! | [`Poison`](Trap::Poison) | [`FaultError::Poisoned`]: SIGBUS, `BUS_MCEERR_AR` | `EFAULT` | is lost |
//! | [`Revoke`](Trap::Revoke) | [`FaultError::NoAccess`]: SIGSEGV, `SEGV_ACCERR` | `EFAULT` | stays |
//!
//! # State
//! Traps are kept with the VMAs, under the mmap lock, and only where something is mapped. A trap goes with its mapping (munmap, or
//! another mapping over it), moves with it (mremap), and a child inherits it. `MADV_DONTNEED` and `MADV_FREE` take poison away,
//! as Linux does with its marker: the page is a new one. The other two are no matter of the page's content and stay.
//! Poison takes the page away from this address space; what an object (a file, shared memory) has there, it keeps.
//!
//! # Protocol
//! [`Mm::trap`] takes the mmap lock for writing, so no fault is under way in the primary, and takes pages from secondaries by a
//! pair, so none that was answered before is installed after. From its return on no vCPU reaches the page. Whoever faults asks
//! here after the VMA; pages that a fault brings along are never trapped ones. A trapped page is not merged either. Lifting takes
//! nothing away, so it needs no pair.

use super::{FaultError, Map, Mm};
use crate::addr::{Access, Hva, HvaRange, PAGE_SIZE, TASK_SIZE};
use crate::notifier::Event;
use crate::sync::atomic::Ordering;
use crate::table::index;
use std::collections::BTreeMap;

/// What is wrong with a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Trap {
    /// It cannot be had, as beyond the end of a file.
    Bus,
    /// It has failed, and its content is lost.
    Poison,
    /// It was taken away.
    Revoke,
}

impl From<Trap> for FaultError {
    fn from(trap: Trap) -> Self {
        match trap {
            Trap::Bus => Self::BusError,
            Trap::Poison => Self::Poisoned,
            Trap::Revoke => Self::NoAccess,
        }
    }
}

/// A trap, and by which number who set it finds it again, wherever it has moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Mark {
    trap: Trap,
    setter: u64,
}

/// All traps of an address space: disjoint ranges.
#[derive(Debug, Clone, Default)]
pub(super) struct Traps {
    /// By first address.
    ranges: BTreeMap<u64, (HvaRange, Mark)>,
}

impl Traps {
    pub(super) fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// What is wrong with the page at `hva`.
    pub(crate) fn find(&self, hva: Hva) -> Option<Trap> {
        let (_, (range, mark)) = self.ranges.range(..=hva.0).next_back()?;
        range.contains(hva).then_some(mark.trap)
    }

    /// The parts of traps that lie in `range`, ascending.
    fn within(&self, range: HvaRange) -> Vec<(HvaRange, Mark)> {
        let before = self.ranges.range(..=range.start.0).next_back();
        let first = before.map_or(range.start.0, |(start, _)| *start);
        let parts = self.ranges.range(first..range.end.0.max(first)).map(|(_, (at, trap))| (*at, *trap));
        let parts = parts.filter(|(at, _)| at.end > range.start && at.start < range.end);
        parts.map(|(at, trap)| (at.intersect(range), trap)).collect()
    }

    /// Takes out what lies in `range` and `is_meant`, and returns it.
    pub(super) fn take(&mut self, range: HvaRange, is_meant: impl Fn(Mark) -> bool) -> Vec<(HvaRange, Mark)> {
        if self.is_empty() {
            return Vec::new();
        }
        let taken: Vec<_> = self.within(range).into_iter().filter(|(_, trap)| is_meant(*trap)).collect();
        for (part, trap) in &taken {
            let Some((start, (whole, _))) = self.ranges.range(..=part.start.0).next_back() else { continue };
            let (start, whole) = (*start, *whole);
            self.ranges.remove(&start);
            for rest in [
                HvaRange { start: whole.start, end: part.start },
                HvaRange { start: part.end, end: whole.end },
            ] {
                if !rest.is_empty() {
                    self.ranges.insert(rest.start.0, (rest, *trap));
                }
            }
        }
        taken
    }

    /// Sets a trap for `range`, in the place of what is there.
    pub(super) fn set(&mut self, range: HvaRange, trap: Mark) {
        if !range.is_empty() {
            self.take(range, |_| true);
            self.ranges.insert(range.start.0, (range, trap));
        }
    }

    /// The part of `around`, which holds `hva`, that can be reached from there without a trap in between.
    pub(super) fn clear_around(&self, mut around: HvaRange, hva: Hva) -> HvaRange {
        if self.is_empty() {
            return around;
        }
        for (trapped, _) in self.within(around) {
            if trapped.end <= hva {
                around.start = trapped.end;
            } else {
                around.end = around.end.min(trapped.start.max(hva));
            }
        }
        around
    }

    /// Those of `parent` that lie in `range`, for a child.
    pub(super) fn inherit(&mut self, parent: &Self, range: HvaRange) {
        if !parent.is_empty() {
            parent.within(range).into_iter().for_each(|(part, trap)| self.set(part, trap));
        }
    }

    /// What was at `source` is at the same place from `to` on now (mremap).
    pub(super) fn move_to(&mut self, source: HvaRange, to: Hva) {
        for (part, trap) in self.take(source, |_| true) {
            let start = Hva(to.0 + (part.start.0 - source.start.0));
            self.set(HvaRange { start, end: Hva(start.0 + part.len()) }, trap);
        }
    }
}

impl Map {
    /// What is wrong with the page at `hva`, if anything is.
    pub(crate) fn trap(&self, hva: Hva) -> Option<Trap> {
        if self.traps.is_empty() { None } else { self.traps.find(hva.page_floor()) }
    }

    /// Whether some page of `range` is poisoned.
    pub(super) fn is_poisoned(&self, range: HvaRange) -> bool {
        !self.traps.is_empty() && self.traps.within(range).iter().any(|(_, mark)| mark.trap == Trap::Poison)
    }
}

impl Mm {
    /// Sets a trap at every page of `range` that is mapped, in the place of another that is there. Returns how many pages that
    /// are. On return no secondary reaches them.
    pub fn trap(&self, range: HvaRange, trap: Trap) -> u64 {
        self.trap_by(0, range, trap)
    }

    /// The same for [`untrap_by`](Self::untrap_by) to find by `setter`.
    pub fn trap_by(&self, setter: u64, range: HvaRange, trap: Trap) -> u64 {
        let mut map = self.map.write();
        let parts: Vec<_> = map.vmas.overlapping(range).map(|vma| vma.range.intersect(range)).collect();
        let mut pages = 0;
        for part in parts {
            map.traps.set(part, Mark { trap, setter });
            pages += part.page_count();
            // Where no pte is, no secondary has anything.
            let Some(first) = self.first_present(part) else { continue };
            let held = HvaRange { start: first, end: part.end };
            match trap {
                Trap::Poison => self.zap(held, Event::Clear),
                Trap::Bus | Trap::Revoke => drop(self.notifiers.invalidate(held, Event::Clear)),
            }
        }
        pages
    }

    /// Lifts those traps in `range` that are of this kind. Returns from how many pages.
    pub fn untrap(&self, range: HvaRange, trap: Trap) -> u64 {
        let lifted = self.map.write().traps.take(range, |mark| mark.trap == trap);
        lifted.iter().map(|(part, _)| part.page_count()).sum()
    }

    /// Lifts what `setter` has set, wherever it is now; what has taken its place stays. Returns from how many pages.
    pub fn untrap_by(&self, setter: u64) -> u64 {
        let everything = HvaRange { start: Hva(0), end: Hva(TASK_SIZE) };
        let lifted = self.map.write().traps.take(everything, |mark| mark.setter == setter);
        lifted.iter().map(|(part, _)| part.page_count()).sum()
    }

    /// The trap at `hva`, if there is one.
    pub fn trapped(&self, hva: Hva) -> Option<Trap> {
        self.map.read().trap(hva)
    }

    /// One page of those in `ranges` that are in memory and not trapped: the one that `number` comes to, counted round. `None` if
    /// there is none. Takes time for the pages that are there.
    pub fn pick_resident(&self, ranges: &[HvaRange], number: u64) -> Option<Hva> {
        let map = self.map.read();
        let visit = |each: &mut dyn FnMut(Hva)| {
            for range in ranges {
                self.for_each_leaf(*range, |base, leaf, entries| {
                    for at in entries.filter(|&at| leaf.get(at).is_present()) {
                        let hva = Hva(base.0 + at as u64 * PAGE_SIZE);
                        if map.trap(hva).is_none() {
                            each(hva);
                        }
                    }
                });
            }
        };
        let mut there = 0;
        visit(&mut |_| there += 1);
        let (wanted, mut seen, mut picked) = (number.checked_rem(there)?, 0, None);
        // Another may have come meanwhile, and none has gone but by MADV_DONTNEED: then it is the last one.
        visit(&mut |hva| {
            if seen <= wanted {
                picked = Some(hva);
            }
            seen += 1;
        });
        picked
    }

    /// Flips one bit of the page at `hva`, chosen by `number`, as failing memory does: nobody is told, no D is set. Whether it was
    /// done.
    ///
    /// What the page shares with others that are not this guest's own to change, the zero page, a page of KSM, of a file or of a
    /// fork, gets a frame of its own first, as a write would do; where the mapping forbids writes, and at pages that are not in
    /// memory, trapped or adopted, nothing is done. Pages that may be merged ([`ksm`](crate::ksm)) are marked as written all the
    /// same, and whoever logs writes hears of those: what is said of a page's content there must be true.
    pub fn flip_bit(&self, hva: Hva, number: u64) -> bool {
        let hva = hva.page_floor();
        for _ in 0..2 {
            {
                let map = self.map.read();
                let Some(vma) = map.vmas.find(hva).filter(|_| map.trap(hva).is_none()) else { return false };
                let Some(leaf) = self.lock_leaf(hva) else { return false };
                let at = index(hva.page(), 1);
                let pte = leaf.get(at);
                if !pte.is_present() || pte.is_adopted() {
                    return false;
                }
                let own =
                    vma.allows(Access::WRITE) && (pte.is_object() && vma.is_shared() || pte.is_writable());
                if own {
                    let (word, bit) = (number >> 6, number % 64);
                    let words = self.pool.words(pte.pfn());
                    words[word as usize % words.len()].fetch_xor(1 << bit, Ordering::Relaxed);
                    if self.may_merge(vma) {
                        leaf.set(at, pte.touched(Access::WRITE));
                    }
                    return true;
                }
            }
            let request = super::FaultRequest::one_page(hva, Access::READ | Access::WRITE);
            if self.fault(&request).is_err() {
                return false;
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark(trap: Trap) -> Mark {
        Mark { trap, setter: 0 }
    }

    fn range(start: u64, end: u64) -> HvaRange {
        HvaRange { start: Hva(start << 12), end: Hva(end << 12) }
    }

    fn all(traps: &Traps) -> Vec<(u64, u64, Trap)> {
        traps.ranges.values().map(|(range, trap)| (range.start.page(), range.end.page(), trap.trap)).collect()
    }

    #[test]
    fn a_trap_replaces_what_it_covers_and_leaves_the_rest() {
        let mut traps = Traps::default();
        traps.set(range(10, 20), mark(Trap::Bus));
        traps.set(range(14, 16), mark(Trap::Poison));
        assert_eq!(all(&traps), [(10, 14, Trap::Bus), (14, 16, Trap::Poison), (16, 20, Trap::Bus)]);
        assert_eq!(traps.take(range(12, 17), |mark| mark.trap == Trap::Bus).len(), 2);
        assert_eq!(all(&traps), [(10, 12, Trap::Bus), (14, 16, Trap::Poison), (17, 20, Trap::Bus)]);
        for (page, trap) in
            [(9, None), (10, Some(Trap::Bus)), (12, None), (15, Some(Trap::Poison)), (20, None)]
        {
            assert_eq!(traps.find(Hva(page << 12)), trap, "{page}");
        }
    }

    #[test]
    fn what_comes_along_ends_at_the_next_trap_on_either_side() {
        let mut traps = Traps::default();
        traps.set(range(10, 12), mark(Trap::Bus));
        traps.set(range(20, 21), mark(Trap::Revoke));
        let around = |page: u64| traps.clear_around(range(0, 32), Hva(page << 12));
        assert_eq!((around(5), around(15), around(30)), (range(0, 10), range(12, 20), range(21, 32)));
    }

    #[test]
    fn traps_move_with_their_mapping() {
        let mut traps = Traps::default();
        traps.set(range(0, 100), mark(Trap::Revoke));
        traps.move_to(range(10, 20), Hva(200 << 12));
        assert_eq!(all(&traps), [(0, 10, Trap::Revoke), (20, 100, Trap::Revoke), (200, 210, Trap::Revoke)]);
    }
}
