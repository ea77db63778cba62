// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! mmap, munmap, mprotect and madvise.

use crate::access::page_of;
use crate::model::{Backing, MAX_RANGE, Model};
use crate::rt::PAGE;
use crate::rt::sys::{self, EEXIST, ENOMEM, MADV_DONTNEED, PROT_RW};
use crate::rt::sys::{MAP_FIXED, MAP_FIXED_NOREPLACE, MAP_NORESERVE, MAP_POPULATE, MAP_PRIVATE, MAP_SHARED};
use crate::run::{Range, Run};

impl Run<'_> {
    /// mmap with MAP_FIXED: over whatever is there.
    pub fn map_fixed(&mut self) {
        let range = self.any_range();
        let (prot, kind, shared) = self.mapping();
        let bytes = self.bytes(range.count);
        let address = self.address(range.first);
        self.describe(format_args!("mmap fixed {range} {} flags {kind:#x}", Model::rights(prot)));
        // SAFETY: the range lies in the arena, where the program keeps nothing.
        let got = unsafe { sys::mmap(address, bytes, prot, MAP_FIXED | kind) };
        self.expect(range.first, got, Ok(address));
        self.model.map(range.first, range.count, prot, shared);
        self.glance(range);
    }

    /// mmap with a hint, which is taken if all of the range is free, or without one.
    pub fn map_hint(&mut self) {
        let range = self.any_range();
        let (prot, kind, shared) = self.mapping();
        let bytes = self.bytes(range.count);
        let address = self.address(range.first);
        if self.rng.percent(80) && self.model.is_free(range.first, range.count) {
            // A hint need not be aligned: it is rounded down.
            let hint = address + self.rng.below(PAGE);
            self.describe(format_args!("mmap hint {range} {} flags {kind:#x}", Model::rights(prot)));
            // SAFETY: without MAP_FIXED nothing is replaced.
            let got = unsafe { sys::mmap(hint, bytes, prot, kind) };
            self.expect(range.first, got, Ok(address));
            self.model.map(range.first, range.count, prot, shared);
            self.glance(range);
        } else {
            let hint = if self.rng.percent(50) { address } else { 0 };
            self.map_anywhere(hint, range.count, kind);
        }
    }

    /// mmap whose place the kernel chooses, perhaps a hole of the arena. Since another kernel chooses another
    /// place, the mapping is looked at and goes away again.
    fn map_anywhere(&mut self, hint: usize, count: usize, kind: usize) {
        if hint != 0 && self.model.is_free(page_of(hint, self.places.arena), count) {
            // The kernel would have to take the hint; that is the other case.
            return;
        }
        self.describe(format_args!("mmap anywhere of {count} pages flags {kind:#x}"));
        // SAFETY: without MAP_FIXED nothing is replaced.
        let address = match unsafe { sys::mmap(hint, count * PAGE, PROT_RW, kind) } {
            Ok(address) => address,
            Err(error) => self.fail(self.places.arena, "an address", error),
        };
        self.expect_unused(address, count);
        for page in 0..count {
            let place = address + page * PAGE + self.rng.below(PAGE / 8) * 8;
            self.expect_load(place, Ok(0));
            let value = self.rng.word();
            self.store(place, value, Ok(value));
            self.expect_load(place, Ok(value));
        }
        // SAFETY: it is the new mapping, which nothing else uses.
        let got = unsafe { sys::munmap(address, count * PAGE) };
        self.expect(0, got, Ok(0));
    }

    /// Checks that a place the kernel has chosen was in no use.
    pub fn expect_unused(&self, address: usize, count: usize) {
        let arena = self.places.arena;
        for place in (address..address + count * PAGE).step_by(PAGE) {
            let used = match place.wrapping_sub(arena) / PAGE {
                page if page < self.places.pages => !matches!(self.model.pages[page].backing, Backing::Free),
                _ => place.wrapping_sub(self.places.scratch) < MAX_RANGE * PAGE,
            };
            if used || !place.is_multiple_of(PAGE) {
                self.fail(place, "an address where nothing is mapped", "this one");
            }
        }
    }

    /// mmap with MAP_FIXED_NOREPLACE: only if all of the range is free.
    pub fn map_noreplace(&mut self) {
        let range = self.any_range();
        let (prot, kind, shared) = self.mapping();
        let address = self.address(range.first);
        let free = self.model.is_free(range.first, range.count);
        self.describe(format_args!("mmap fixed, no replace {range} {} flags {kind:#x}", Model::rights(prot)));
        // SAFETY: nothing is replaced.
        let got = unsafe { sys::mmap(address, range.count * PAGE, prot, MAP_FIXED_NOREPLACE | kind) };
        self.expect(range.first, got, if free { Ok(address) } else { Err(EEXIST) });
        if free {
            self.model.map(range.first, range.count, prot, shared);
        }
        self.glance(range);
    }

    /// munmap of a mapping's head, tail, middle or all, or of any range, holes included.
    pub fn unmap(&mut self) {
        let range = self.some_range(60);
        let bytes = self.bytes(range.count);
        self.describe(format_args!("munmap {range}"));
        // SAFETY: the range lies in the arena, where the program keeps nothing.
        let got = unsafe { sys::munmap(self.address(range.first), bytes) };
        self.expect(range.first, got, Ok(0));
        self.model.unmap(range.first, range.count);
        self.glance(range);
    }

    /// mprotect. At a hole it stops with ENOMEM, and what it has done so far stays.
    pub fn protect(&mut self) {
        let range = self.some_range(70);
        let prot = self.prot();
        let bytes = self.bytes(range.count);
        self.describe(format_args!("mprotect {range} {}", Model::rights(prot)));
        // SAFETY: the range lies in the arena, where the program keeps nothing.
        let got = unsafe { sys::mprotect(self.address(range.first), bytes, prot) };
        let whole = self.model.protect(range.first, range.count, prot);
        self.expect(range.first, got, if whole { Ok(0) } else { Err(ENOMEM) });
        self.glance(range);
    }

    /// madvise(MADV_DONTNEED). It goes on behind a hole, and returns ENOMEM in the end.
    pub fn drop_content(&mut self) {
        let range = self.some_range(70);
        let bytes = self.bytes(range.count);
        self.describe(format_args!("madvise dontneed {range}"));
        // SAFETY: the range lies in the arena, where the program keeps nothing.
        let got = unsafe { sys::madvise(self.address(range.first), bytes, MADV_DONTNEED) };
        let whole = self.model.drop_content(range.first, range.count);
        self.expect(range.first, got, if whole { Ok(0) } else { Err(ENOMEM) });
        self.glance(range);
    }

    /// A part of a mapping in `percent` of the cases, else any range.
    fn some_range(&mut self, percent: usize) -> Range {
        if self.rng.percent(percent)
            && let Some(range) = self.mapped_range()
        {
            return range;
        }
        self.any_range()
    }

    /// Protection, flags and whether they say shared, for a new mapping. Two of the flags only say how the
    /// kernel shall go about it, and change nothing that can be seen.
    fn mapping(&mut self) -> (usize, usize, bool) {
        let prot = self.prot();
        let shared = self.rng.percent(35);
        let extra = self.rng.pick(&[0, 0, 0, MAP_NORESERVE, MAP_POPULATE]);
        (prot, extra | if shared { MAP_SHARED } else { MAP_PRIVATE }, shared)
    }
}
