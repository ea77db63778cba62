// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The main thread's side: take a part of the victim away, look whether anybody still reaches it, give it
//! back.

use core::sync::atomic::Ordering::{Acquire, Relaxed};

use crate::rt::random::{Rng, mix2};
use crate::rt::sys::{self, EFAULT, PROT_NONE, PROT_READ, PROT_RW};
use crate::rt::sys::{
    MADV_DONTNEED, MAP_FIXED, MAP_FIXED_NOREPLACE, MAP_PRIVATE, MREMAP_FIXED, MREMAP_MAYMOVE,
};
use crate::rt::{PAGE, WORDS};
use crate::{Failed, SHARED, Word, belongs, failed, reserve, violation};

/// After a change each writer must try this often before the main thread looks at what it did.
const ATTEMPTS: u64 = 8;
/// A writer that does not try for so long is stuck; in nanoseconds.
const PATIENCE: u64 = 60_000_000_000;

/// The main thread.
pub struct Master {
    writers: usize,
    victim: usize,
    pages: usize,
    /// Where fresh memory is mapped, which gets the frames that the victim loses.
    fresh: usize,
    /// Where pages of the victim are moved to.
    away: usize,
    /// A copy of what the victim held, to see whether it changes.
    snapshot: usize,
    rng: Rng,
    round: u64,
}

/// A part of the victim.
#[derive(Clone, Copy)]
struct Part {
    first: usize,
    pages: usize,
}

impl Part {
    const fn bytes(self) -> usize {
        self.pages * PAGE
    }
}

impl Master {
    /// Reserves all address space it will need, so that no round has to ask the kernel for any.
    pub fn new(pages: usize, writers: usize, seed: u64) -> Result<Self, Failed> {
        Ok(Self {
            writers,
            victim: SHARED.victim.load(Relaxed),
            pages,
            fresh: reserve(pages, PROT_NONE)?,
            away: reserve(pages, PROT_NONE)?,
            snapshot: reserve(pages, PROT_RW)?,
            rng: Rng::new(seed),
            round: 0,
        })
    }

    /// One change of the victim, of the kind and place that the random numbers say, and its undoing.
    ///
    /// # Errors
    /// What a system call answers that should not have failed.
    pub fn round(&mut self, round: u64) -> Result<(), Failed> {
        self.round = round;
        let part = if self.rng.percent(33) {
            Part { first: 0, pages: self.pages }
        } else {
            let first = self.rng.below(self.pages);
            Part { first, pages: self.rng.upto(self.pages - first) }
        };
        SHARED.focus.store((part.first as u64) << 32 | part.pages as u64, Relaxed);
        // Let the writers use the part, so that there is something to be stale.
        self.wait();
        match self.rng.below(5) {
            0 => self.unmap(part)?,
            1 => self.protect(part)?,
            2 => self.drop_content(part)?,
            3 => self.move_away(part)?,
            _ => self.replace(part)?,
        }
        self.check_victim(part);
        Ok(())
    }

    fn unmap(&mut self, part: Part) -> Result<(), Failed> {
        // SAFETY: the victim is touched through probes only, by its writers, and by `read`, which runs in
        // this thread.
        unsafe { sys::munmap(self.at(part), part.bytes()) }.map_err(failed("munmap"))?;
        self.watch_fresh(part.pages)?;
        // SAFETY: as above. NOREPLACE, because there must be nothing there.
        unsafe { map(self.at(part), part.pages, MAP_FIXED_NOREPLACE) }
    }

    fn protect(&mut self, part: Part) -> Result<(), Failed> {
        // SAFETY: as in `unmap`.
        unsafe { sys::mprotect(self.at(part), part.bytes(), PROT_READ) }.map_err(failed("mprotect"))?;
        self.take_snapshot(self.at(part), part.pages);
        self.watch_fresh(part.pages)?;
        self.compare_snapshot(self.at(part), part, "was written to while it was read-only");
        // SAFETY: as in `unmap`.
        unsafe { sys::mprotect(self.at(part), part.bytes(), PROT_RW) }.map(drop).map_err(failed("mprotect"))
    }

    fn drop_content(&mut self, part: Part) -> Result<(), Failed> {
        // SAFETY: as in `unmap`.
        unsafe { sys::madvise(self.at(part), part.bytes(), MADV_DONTNEED) }.map_err(failed("madvise"))?;
        self.watch_fresh(part.pages)
    }

    fn replace(&mut self, part: Part) -> Result<(), Failed> {
        // SAFETY: as in `unmap`.
        unsafe { map(self.at(part), part.pages, MAP_FIXED) }?;
        self.watch_fresh(part.pages)
    }

    fn move_away(&mut self, part: Part) -> Result<(), Failed> {
        self.shift(self.at(part), self.away, part.pages)?;
        self.take_snapshot(self.away, part.pages);
        for page in 0..part.pages {
            self.check_page(self.away + page * PAGE, part.first + page);
        }
        self.watch_fresh(part.pages)?;
        self.compare_snapshot(self.away, part, "was written to by its old address after it was moved");
        if self.rng.percent(50) {
            return self.shift(self.away, self.at(part), part.pages);
        }
        // SAFETY: only `read` uses the place, in this thread.
        unsafe { sys::munmap(self.away, part.bytes()) }.map_err(failed("munmap"))?;
        // SAFETY: as in `unmap`.
        unsafe { map(self.at(part), part.pages, MAP_FIXED_NOREPLACE) }
    }

    /// Moves pages. mremap before Linux 6.17 moves only what is one mapping, and whether the kernel has
    /// merged the pieces that earlier rounds left is its own affair; page by page always works.
    fn shift(&self, from: usize, to: usize, pages: usize) -> Result<(), Failed> {
        let flags = MREMAP_MAYMOVE | MREMAP_FIXED;
        // SAFETY: both are ranges of the victim or of `away`; see `unmap`.
        match unsafe { sys::mremap(from, pages * PAGE, pages * PAGE, flags, to) } {
            Err(EFAULT) => {}
            result => return result.map(drop).map_err(failed("mremap")),
        }
        for offset in (0..pages).map(|page| page * PAGE) {
            // SAFETY: as above.
            unsafe { sys::mremap(from + offset, PAGE, PAGE, flags, to + offset) }
                .map_err(failed("mremap"))?;
        }
        Ok(())
    }

    /// Maps fresh memory, which gets frames that were just freed if any were, and sees that it is zero and
    /// that nobody else writes to it; all the while the writers hammer on what they have lost.
    fn watch_fresh(&mut self, pages: usize) -> Result<(), Failed> {
        // SAFETY: `fresh` is address space reserved for this function.
        unsafe { map(self.fresh, pages, MAP_FIXED) }?;
        for index in 0..pages * WORDS {
            self.expect_fresh(index, 0, "is not zero at first");
            let word = self.pattern(index);
            // SAFETY: the range has just been mapped, and is this function's alone.
            unsafe { ((self.fresh + index * 8) as *mut u64).write_volatile(word) };
        }
        self.wait();
        for index in 0..pages * WORDS {
            self.expect_fresh(index, self.pattern(index), "was changed by somebody else");
        }
        // SAFETY: as above.
        unsafe { sys::munmap(self.fresh, pages * PAGE) }.map(drop).map_err(failed("munmap"))
    }

    fn pattern(&self, index: usize) -> u64 {
        mix2(self.round, index as u64)
    }

    fn expect_fresh(&self, index: usize, expected: u64, what: &str) {
        let got = self.read(self.fresh + index * 8);
        if got != expected {
            let (page, index) = (index / WORDS, index % WORDS);
            violation(format_args!(
                "round {}: fresh page {page} word {index} {what}: expected {expected:#018x}, got {}",
                self.round,
                Word(got)
            ));
        }
    }

    fn take_snapshot(&self, from: usize, pages: usize) {
        for offset in (0..pages * PAGE).step_by(8) {
            let word = self.read(from + offset);
            // SAFETY: the snapshot is as long as the victim, and used in this thread only.
            unsafe { ((self.snapshot + offset) as *mut u64).write_volatile(word) };
        }
    }

    fn compare_snapshot(&self, with: usize, part: Part, what: &str) {
        for index in 0..part.pages * WORDS {
            let (expected, got) = (self.read(self.snapshot + index * 8), self.read(with + index * 8));
            if got != expected {
                let (page, index) = (part.first + index / WORDS, index % WORDS);
                violation(format_args!(
                    "round {}: victim page {page} word {index} {what}: expected {}, got {}",
                    self.round,
                    Word(expected),
                    Word(got)
                ));
            }
        }
    }

    /// Checks that a part of the victim holds what belongs there; it may change at any time.
    fn check_victim(&self, part: Part) {
        for page in part.first..part.first + part.pages {
            self.check_page(self.victim + page * PAGE, page);
        }
    }

    fn check_page(&self, address: usize, page: usize) {
        for index in 0..WORDS {
            let got = self.read(address + index * 8);
            if !belongs(got, page, index) {
                violation(format_args!(
                    "round {}: victim page {page} word {index}: expected zero or a tag for this place, got {}",
                    self.round,
                    Word(got)
                ));
            }
        }
    }

    /// Waits until each writer has used the victim a few times more.
    fn wait(&mut self) {
        // Sometimes the main thread is off its CPU meanwhile, sometimes it only lets others go first.
        if self.rng.percent(25) {
            sys::nanosleep(50_000);
        }
        let start = sys::now();
        for (number, writer) in SHARED.writers[..self.writers].iter().enumerate() {
            let goal = writer.attempts.load(Acquire) + ATTEMPTS;
            while writer.attempts.load(Acquire) < goal {
                sys::sched_yield();
                if sys::now() - start > PATIENCE {
                    violation(format_args!(
                        "round {}: expected writer {number} to go on, got no access from it for {} s",
                        self.round,
                        PATIENCE / 1_000_000_000
                    ));
                }
            }
        }
    }

    fn at(&self, part: Part) -> usize {
        self.victim + part.first * PAGE
    }

    /// Reads a word of memory that is mapped.
    fn read(&self, address: usize) -> u64 {
        // SAFETY: the callers pass addresses in ranges that this thread has mapped readable and has not yet
        // unmapped. Writers may store there at the same moment; a volatile aligned word is read whole, before
        // or after.
        unsafe { (address as *const u64).read_volatile() }
    }
}

/// Maps fresh private memory at just that address; `flags` say whether it may replace what is there.
///
/// # Safety
/// Nothing that Rust knows may lie in the range.
unsafe fn map(address: usize, pages: usize, flags: usize) -> Result<(), Failed> {
    // SAFETY: the caller's promise.
    let got =
        unsafe { sys::mmap(address, pages * PAGE, PROT_RW, flags | MAP_PRIVATE) }.map_err(failed("mmap"))?;
    if got != address {
        violation(format_args!("mmap: expected address {address:#x}, got {got:#x}"));
    }
    Ok(())
}
