// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A writer: stores into the victim and looks at it, and keeps a private region that nobody else may change.

use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use crate::rt::fault::{self, Fault, SEGV_ACCERR, SEGV_MAPERR, SIGSEGV};
use crate::rt::random::{Checksum, Rng};
use crate::rt::sys;
use crate::rt::{PAGE, WORDS};
use crate::{SHARED, Word, belongs, private_word, tag, violation};

/// Pages of a private region.
pub const PRIVATE: usize = 16;

/// The generation of a page that has just been dropped and reads zero.
const DROPPED: u64 = 0;
/// The generation that every page is filled with in the end.
const LAST: u64 = 0xffff;

/// The thread's function; `number` is its place in `SHARED.writers`.
pub extern "C" fn main(number: usize) {
    let mut writer = Writer {
        number,
        region: SHARED.writers[number].region.load(Relaxed),
        generations: [DROPPED; PRIVATE],
        rng: Rng::new(SHARED.seed.load(Relaxed) ^ (number as u64) << 32),
    };
    let mut count = 0;
    while !SHARED.stop.load(Acquire) {
        writer.touch_victim(count);
        if count.is_multiple_of(16) {
            writer.touch_private();
        }
        count += 1;
    }
    // What is left does not depend on how far the race went.
    let mut checksum = Checksum::new();
    for page in 0..PRIVATE {
        writer.check(page);
        writer.fill(page, LAST);
    }
    for page in 0..PRIVATE {
        writer.check(page);
        for index in 0..WORDS {
            checksum.add(writer.read(page, index));
        }
    }
    SHARED.writers[number].checksum.store(checksum.value(), Release);
}

struct Writer {
    number: usize,
    region: usize,
    /// What each page of the region was last filled with.
    generations: [u64; PRIVATE],
    rng: Rng,
}

impl Writer {
    /// One load or store in the victim, every other one in the part that the main thread works on.
    fn touch_victim(&mut self, count: u64) {
        let state = &SHARED.writers[self.number];
        let focus = SHARED.focus.load(Relaxed);
        let (first, pages) = if count.is_multiple_of(2) {
            (focus >> 32, focus as u32)
        } else {
            (0, SHARED.pages.load(Relaxed) as u32)
        };
        let page = first as usize + self.rng.below(pages as usize);
        let index = self.rng.below(WORDS);
        let address = SHARED.victim.load(Relaxed) + page * PAGE + index * 8;
        let result = if self.rng.percent(75) {
            // SAFETY: the main thread installed the handler; the victim is nothing that Rust knows.
            unsafe { fault::store(address, tag(self.number, page, index, count)) }
        } else {
            // SAFETY: as above.
            unsafe { fault::load(address) }.map(|word| {
                // Fresh memory's pattern, or another page's tag: the load went to a frame that is not here
                // any more.
                if !belongs(word, page, index) {
                    violation(format_args!(
                        "writer {}: victim page {page} word {index}: expected zero or a tag for this place, got {}",
                        self.number,
                        Word(word)
                    ));
                }
            })
        };
        state.attempts.fetch_add(1, Release);
        if let Err(fault) = result {
            state.faults.fetch_add(1, Relaxed);
            self.check_fault(fault, address, page, index);
        }
    }

    fn check_fault(&self, fault: Fault, address: usize, page: usize, index: usize) {
        let plausible = fault.signal == SIGSEGV && matches!(fault.code, SEGV_MAPERR | SEGV_ACCERR);
        if !plausible || fault.address != address {
            violation(format_args!(
                "writer {}: victim page {page} word {index}: expected SIGSEGV at {address:#x}, got {fault}",
                self.number
            ));
        }
    }

    /// Checks a page of the private region and gives it new content, or none.
    fn touch_private(&mut self) {
        let page = self.rng.below(PRIVATE);
        self.check(page);
        if self.rng.percent(20) {
            // SAFETY: the page is this writer's, and read and written only through `read` and `fill`.
            if let Err(error) = unsafe { sys::madvise(self.address(page, 0), PAGE, sys::MADV_DONTNEED) } {
                violation(format_args!("writer {}: madvise of its own page failed: {error}", self.number));
            }
            self.generations[page] = DROPPED;
        } else {
            let generation = 1 + self.rng.below(LAST as usize - 1) as u64;
            self.fill(page, generation);
        }
    }

    fn address(&self, page: usize, index: usize) -> usize {
        self.region + page * PAGE + index * 8
    }

    fn expected(&self, page: usize, index: usize) -> u64 {
        match self.generations[page] {
            DROPPED => 0,
            generation => private_word(self.number, generation, page, index),
        }
    }

    fn read(&self, page: usize, index: usize) -> u64 {
        // SAFETY: the region is mapped for reading and writing as long as the program runs, and is this
        // writer's alone.
        unsafe { (self.address(page, index) as *const u64).read_volatile() }
    }

    fn fill(&mut self, page: usize, generation: u64) {
        self.generations[page] = generation;
        for index in 0..WORDS {
            let word = self.expected(page, index);
            // SAFETY: as in `read`.
            unsafe { (self.address(page, index) as *mut u64).write_volatile(word) };
        }
    }

    fn check(&self, page: usize) {
        for index in 0..WORDS {
            let (expected, got) = (self.expected(page, index), self.read(page, index));
            if got != expected {
                violation(format_args!(
                    "writer {}: private page {page} word {index}: expected {expected:#018x}, got {}",
                    self.number,
                    Word(got)
                ));
            }
        }
    }
}
