// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The heap: brk, and accesses to what it gives.

use crate::access::fault_at;
use crate::content::Content;
use crate::rt::fault::{SEGV_MAPERR, SIGSEGV};
use crate::rt::sys;
use crate::rt::{PAGE, WORDS};
use crate::run::Run;

/// The most pages that the heap has.
const PAGES: usize = 32;

/// The model of the heap.
pub struct Heap {
    /// Its length in bytes. The page in which it ends is there as a whole.
    length: usize,
    contents: [Content; PAGES],
}

impl Heap {
    /// The longest heap in bytes.
    pub const LIMIT: usize = PAGES * PAGE;

    /// The model of a heap without a page.
    pub const fn new() -> Self {
        Self { length: 0, contents: [Content::ZERO; PAGES] }
    }

    fn pages(&self) -> usize {
        self.length.div_ceil(PAGE)
    }
}

impl Run<'_> {
    /// One random operation on the heap.
    pub fn heap_step(&mut self) {
        match self.rng.below(10) {
            0..4 => {
                let length = self.rng.below(Heap::LIMIT + 1);
                self.set_break(length);
            }
            4 => {
                // Below the heap the answer is where it ends now, and nothing changes.
                self.describe(format_args!("brk below the heap"));
                self.brk(PAGE, self.places.heap + self.heap.length);
            }
            5..8 => self.store_to_heap(),
            _ => {
                self.describe(format_args!("check of the heap"));
                self.check_heap();
            }
        }
    }

    /// Takes away what an earlier seed left.
    pub fn empty_heap(&mut self) {
        self.set_break(0);
    }

    fn set_break(&mut self, length: usize) {
        self.describe(format_args!("brk to {length:#x} bytes"));
        let end = self.places.heap + length;
        self.brk(end, end);
        let before = self.heap.pages();
        self.heap.length = length;
        // New pages are zero. The last old page stays as it is, behind the old end too.
        for page in before..self.heap.pages() {
            self.heap.contents[page] = Content::ZERO;
        }
    }

    fn brk(&mut self, end: usize, expected: usize) {
        // SAFETY: the heap holds nothing but what probes put there.
        let got = unsafe { sys::brk(end) };
        if got != expected {
            self.fail(end, self.place(expected), self.place(got));
        }
        self.sum.add((got - self.places.heap) as u64);
    }

    fn store_to_heap(&mut self) {
        let page = self.rng.below(PAGES);
        let (wish, value) = (self.rng.below(WORDS), self.rng.word());
        let start = self.places.heap + page * PAGE;
        self.describe(format_args!("store to heap page {page}"));
        if page < self.heap.pages() {
            let index = self.heap.contents[page].place(wish);
            self.heap.contents[page].store(index, value);
            self.store(start + index * 8, value, Ok(value));
        } else {
            let address = start + wish * 8;
            self.store(address, value, Err(fault_at((SIGSEGV, SEGV_MAPERR), address)));
        }
    }

    /// Compares the heap, and the page behind it, with the model.
    pub fn check_heap(&mut self) {
        for page in 0..self.heap.pages() {
            let content = self.heap.contents[page];
            let any = self.rng.below(WORDS);
            for index in [0, any, content.place(any), WORDS - 1] {
                let address = self.places.heap + page * PAGE + index * 8;
                self.expect_load(address, Ok(content.word(index)));
            }
        }
        let behind = self.places.heap + self.heap.pages() * PAGE;
        self.expect_load(behind, Err(fault_at((SIGSEGV, SEGV_MAPERR), behind)));
    }
}
