// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! mremap: shrink, grow in place, grow wherever there is room, move to a given place.

use crate::access::fault_at;
use crate::model::{Border, MAX_GROWTH, MAX_RANGE};
use crate::rt::fault::{SEGV_MAPERR, SIGSEGV};
use crate::rt::sys::{self, EFAULT, EINVAL, ENOMEM, PROT_NONE, Return};
use crate::rt::sys::{MAP_FIXED, MAP_NORESERVE, MAP_PRIVATE, MREMAP_FIXED, MREMAP_MAYMOVE};
use crate::rt::{PAGE, WORDS};
use crate::run::{Range, Run};

impl Run<'_> {
    /// mremap to fewer pages, or as many: takes the tail away. It is the one mremap that may cross mappings.
    pub fn shrink(&mut self) {
        let range = if self.rng.percent(30) { Some(self.any_range()) } else { self.mapped_range() };
        let Some(range) = range.filter(|range| self.model.is_mapped(range.first, range.count)) else {
            return;
        };
        let count = self.rng.upto(range.count);
        let flags = self.rng.pick(&[0, MREMAP_MAYMOVE]);
        self.describe(format_args!("mremap {range} to {count} pages"));
        let got = self.mremap(range, count, flags, 0);
        self.expect(range.first, got, Ok(self.address(range.first)));
        self.model.unmap(range.first + count, range.count - count);
        self.glance(range);
    }

    /// mremap to more pages: in place if there is room behind, else only with MREMAP_MAYMOVE.
    pub fn grow(&mut self) {
        let Some(mut range) = self.mapped_range() else {
            return;
        };
        if self.rng.percent(20) {
            // Beyond the mapping, where a border is likely.
            let most = MAX_RANGE.min(self.places.pages - range.first);
            range.count = self.rng.upto(most);
        }
        let borders = || (range.first..range.first + range.count - 1).map(|page| self.model.border(page));
        let crosses = borders().any(|border| border == Border::Different);
        if !crosses {
            // Where it is unknown whether the kernel has merged two mappings, stay in front of that place.
            range.count =
                borders().position(|border| border != Border::Same).map_or(range.count, |place| place + 1);
        }
        let count = range.count + self.rng.upto(MAX_GROWTH);
        let flags = self.rng.pick(&[0, MREMAP_MAYMOVE]);
        let end = range.first + range.count;
        let room = range.first + count <= self.places.pages && self.model.is_free(end, count - range.count);
        self.describe(format_args!("mremap {range} to {count} pages flags {flags}"));
        let got = self.mremap(range, count, flags, 0);
        match got {
            _ if crosses => self.expect(range.first, got, Err(EFAULT)),
            _ if room => {
                self.expect(range.first, got, Ok(self.address(range.first)));
                self.model.grow(range.first, range.count, count);
                self.glance(Range { count, ..range });
            }
            Ok(address) if flags == MREMAP_MAYMOVE => self.settle(range, count, address),
            _ if flags == MREMAP_MAYMOVE => self.expect(range.first, got, Ok(self.places.scratch)),
            _ => self.expect(range.first, got, Err(ENOMEM)),
        }
    }

    /// After the kernel has moved `range` to a place of its choice: looks at it there, and brings it to a
    /// place of ours, since another kernel would have chosen another. The way there is over `scratch`, as the
    /// kernel's choice may overlap ours.
    fn settle(&mut self, range: Range, count: usize, address: usize) {
        self.expect_unused(address, count);
        let target = self.rng.below(self.places.pages - count + 1);
        self.model.relocate(range.first, range.count, target, count);
        for page in 0..count {
            let index = self.rng.below(WORDS);
            self.load_through(target + page, index, address + page * PAGE);
        }
        self.carry(address, self.places.scratch, count);
        self.expect_load(address, Err(fault_at((SIGSEGV, SEGV_MAPERR), address)));
        self.carry(self.places.scratch, self.address(target), count);
        let flags = MAP_FIXED | MAP_PRIVATE | MAP_NORESERVE;
        // SAFETY: nothing is at `scratch` any more, and nobody but this function uses it.
        let got = unsafe { sys::mmap(self.places.scratch, count * PAGE, PROT_NONE, flags) };
        if got != Ok(self.places.scratch) {
            self.fail(self.places.scratch, "to reserve the scratch pages again", "another answer");
        }
        self.glance(Range { first: target, count });
        self.glance(range);
    }

    fn carry(&mut self, from: usize, to: usize, count: usize) {
        let flags = MREMAP_MAYMOVE | MREMAP_FIXED;
        // SAFETY: both ranges belong to `settle`: they are a mapping that came out of the arena, and scratch
        // or arena.
        let got = unsafe { sys::mremap(from, count * PAGE, count * PAGE, flags, to) };
        if got != Ok(to) {
            self.fail(to, "the mapping to be moved here", "another answer");
        }
    }

    /// mremap with MREMAP_FIXED: over whatever is at the new place, growing or shrinking on the way.
    pub fn relocate(&mut self) {
        let Some(range) = self.mapped_range() else {
            return;
        };
        let count = match self.rng.below(4) {
            0 => self.rng.upto(range.count),
            1 => range.count + self.rng.upto(MAX_GROWTH),
            _ => range.count,
        };
        let target = self.rng.below(self.places.pages - count + 1);
        let overlaps = target < range.first + range.count && range.first < target + count;
        self.describe(format_args!("mremap {range} to pages {target}+{count}"));
        let got = self.mremap(range, count, MREMAP_MAYMOVE | MREMAP_FIXED, self.address(target));
        if overlaps {
            self.expect(range.first, got, Err(EINVAL));
        } else {
            self.expect(range.first, got, Ok(self.address(target)));
            self.model.relocate(range.first, range.count, target, count);
            self.glance(Range { first: target, count });
        }
        self.glance(range);
    }

    fn mremap(&mut self, range: Range, count: usize, flags: usize, to: usize) -> Return {
        let (old, new) = (self.bytes(range.count), self.bytes(count));
        // SAFETY: the old range lies in the arena, and the new one too if it is given; the program keeps
        // nothing there.
        unsafe { sys::mremap(self.address(range.first), old, new, flags, to) }
    }
}
