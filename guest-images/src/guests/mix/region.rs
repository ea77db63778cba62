// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The memory that is to be shared, and what is known of it.
//!
//! For each page there are a mark, which says what kind of content it has, and a hash of what was last written to it. Both
//! lie in mappings of their own that are never mergeable, so that a page that was merged wrongly cannot spoil what it is
//! compared with.

use core::slice;

use crate::rt::input::Input;
use crate::rt::random::{Rng, mix2};
use crate::rt::sys::{self, Errno};
use crate::rt::{PAGE, WORDS};
use crate::timing::{Clock, Times, ticks};

/// The mark of a page whose content occurs nowhere else. Smaller marks name a group of equal pages.
const OWN: u32 = u32::MAX;
/// The mark of the group of zero pages.
const ZERO: u32 = u32::MAX - 1;
/// Pages that `work` writes over and over: what a program's busiest data is beside the rest.
const HOT: usize = 256;
/// What a page holds whose every byte is a star.
const STARS: u64 = 0x2a2a_2a2a_2a2a_2a2a;

/// How much of the memory is what.
#[derive(Clone, Copy)]
pub struct Shares {
    /// Percent of the pages.
    pub zero: usize,
    /// Percent of the pages.
    pub dup: usize,
    /// How many pages of a group are equal; the last group may be smaller.
    pub copies: usize,
}

/// What the memory is filled with.
#[derive(Clone, Copy)]
pub enum Filling {
    Mix,
    Same,
    Pairs,
    Zeros,
}

/// Which pages are meant.
#[derive(Clone, Copy)]
pub enum Kind {
    Any,
    /// Not zero, and equal to another when it was filled.
    Shared,
    /// Like no other.
    Own,
}

impl Kind {
    fn has(self, mark: u32) -> bool {
        match self {
            Self::Any => true,
            Self::Shared => mark < ZERO,
            Self::Own => mark == OWN,
        }
    }
}

/// The memory.
pub struct Region {
    address: usize,
    shares: Shares,
    seed: u64,
    rng: Rng,
    /// Contents that were like no other, so far.
    written: u64,
    marks: &'static mut [u32],
    hashes: &'static mut [u64],
    /// Room for a number a page.
    scratch: &'static mut [u64],
}

/// A mapping as a slice.
fn map<T>(count: usize) -> Result<&'static mut [T], Errno> {
    let at = sys::map_anywhere((count * size_of::<T>()).next_multiple_of(PAGE), sys::PROT_RW)?;
    // SAFETY: it is a new mapping, zeroed, that stays for good; the integers it is used for may hold anything.
    Ok(unsafe { slice::from_raw_parts_mut(at as *mut T, count) })
}

impl Region {
    /// Memory of `pages` pages, not touched yet.
    pub fn new(pages: usize, shares: Shares, seed: u64) -> Result<Self, Errno> {
        let address = sys::map_anywhere(pages * PAGE, sys::PROT_RW)?;
        // Page sharing is about small pages, on both sides. A kernel without huge pages refuses, which is as good.
        // SAFETY: this advice changes no content.
        let _ = unsafe { sys::madvise(address, pages * PAGE, sys::MADV_NOHUGEPAGE) };
        let (marks, hashes, scratch) = (map(pages)?, map(pages)?, map(pages)?);
        Ok(Self { address, shares, seed, rng: Rng::new(seed), written: 0, marks, hashes, scratch })
    }

    pub fn address(&self) -> usize {
        self.address
    }

    pub fn pages(&self) -> usize {
        self.marks.len()
    }

    /// The words of a page.
    fn page(&mut self, page: usize) -> &mut [u64] {
        assert!(page < self.pages());
        // SAFETY: the page lies in the mapping, which stays; nobody else in this process knows it, and `self` is borrowed.
        unsafe { slice::from_raw_parts_mut((self.address + page * PAGE) as *mut u64, WORDS) }
    }

    /// Fills a page, and notes that.
    fn set(&mut self, page: usize, mark: u32, mut word: impl FnMut() -> u64) {
        self.page(page).fill_with(&mut word);
        self.marks[page] = mark;
        self.note(page);
    }

    /// Content like no other.
    fn set_own(&mut self, page: usize) {
        self.written += 1;
        let mut rng = Rng::new(mix2(self.seed ^ 1, self.written));
        self.set(page, OWN, || rng.word());
    }

    /// Notes that a page is to hold what it does.
    fn note(&mut self, page: usize) {
        self.hashes[page] = hash(self.page(page));
    }

    /// Fills all of it.
    pub fn fill(&mut self, filling: Filling) {
        let pages = self.pages();
        match filling {
            Filling::Mix => self.fill_mix(),
            Filling::Zeros => (0..pages).for_each(|page| self.set(page, ZERO, || 0)),
            Filling::Same => (0..pages).for_each(|page| self.set(page, 0, || STARS)),
            Filling::Pairs => (0..pages).for_each(|page| self.set_group(page, page as u32 / 2)),
        }
    }

    fn set_group(&mut self, page: usize, group: u32) {
        let mut rng = Rng::new(mix2(self.seed, group.into()));
        self.set(page, group, || rng.word());
    }

    /// The page of rank r is zero, of a group or like no other, as the shares say; which page has which rank is random.
    fn fill_mix(&mut self) {
        let pages = self.pages();
        let zeros = pages * self.shares.zero / 100;
        let dups = pages * self.shares.dup / 100;
        for rank in 0..pages {
            self.marks[rank] = rank as u32;
        }
        let mut rng = Rng::new(self.seed ^ 2);
        for last in (1..pages).rev() {
            self.marks.swap(last, rng.below(last + 1));
        }
        for page in 0..pages {
            let rank = self.marks[page] as usize;
            let group = rank.wrapping_sub(zeros);
            // A group of one is no group.
            let is_alone = group % self.shares.copies == 0 && group + 1 == dups;
            if rank < zeros {
                // Written all the same: there is a page, as zeroed memory of a program's has.
                self.set(page, ZERO, || 0);
            } else if group < dups && !is_alone {
                self.set_group(page, (group / self.shares.copies) as u32);
            } else {
                self.set_own(page);
            }
        }
    }

    /// Reads `count` pages from stdin; the whole memory becomes copies of them.
    pub fn load(&mut self, count: usize, input: &mut Input) -> Result<(), &'static str> {
        for page in 0..count {
            let words = self.page(page);
            // SAFETY: the same bytes, of which any value may be written.
            let bytes = unsafe { slice::from_raw_parts_mut(words.as_mut_ptr().cast::<u8>(), PAGE) };
            input.exact(bytes)?;
        }
        let pages = self.pages();
        for page in count..pages {
            let from = (self.address + page % count * PAGE) as *const u64;
            // SAFETY: both pages lie in the mapping and are different ones, for page % count < count <= page.
            unsafe { core::ptr::copy_nonoverlapping(from, self.page(page).as_mut_ptr(), WORDS) };
        }
        for page in 0..pages {
            let original = page % count;
            let has_copy = original + count < pages;
            self.marks[page] = match self.page(page).iter().all(|&word| word == 0) {
                true => ZERO,
                false if has_copy => original as u32,
                false => OWN,
            };
            self.note(page);
        }
        Ok(())
    }

    /// madvise(2) of all of it.
    pub fn advise(&mut self, advice: usize) -> Result<(), Errno> {
        // SAFETY: whether equal pages are shared changes no content.
        unsafe { sys::madvise(self.address, self.pages() * PAGE, advice) }.map(|_| ())
    }

    /// A checksum of everything; the error is the number of a page that holds something else than was written to it.
    pub fn verify(&mut self) -> Result<u64, usize> {
        let mut sum = 0;
        for page in 0..self.pages() {
            let hash = hash(self.page(page));
            if hash != self.hashes[page] {
                return Err(page);
            }
            sum = mix2(sum, hash);
        }
        Ok(sum)
    }

    /// A random page of that kind: the next from a random one on; `None` if there is none.
    fn pick(&mut self, kind: Kind) -> Option<usize> {
        let pages = self.pages();
        let start = self.rng.below(pages);
        (0..pages).map(|step| (start + step) % pages).find(|&page| kind.has(self.marks[page]))
    }

    /// Gives `count` pages new content like no other; how many it found.
    pub fn rewrite(&mut self, count: usize, kind: Kind) -> usize {
        for done in 0..count {
            let Some(page) = self.pick(kind) else { return done };
            self.set_own(page);
        }
        count
    }

    /// Writes a word to each of `count` pages, or of all that there are.
    pub fn write(&mut self, count: usize, kind: Kind) -> Times {
        let mut found = 0;
        while found < count.min(self.pages()) {
            // A page that is taken is not taken again: it is none of these any more.
            let Some(page) = self.pick(kind) else { break };
            self.marks[page] = ZERO;
            self.scratch[found] = page as u64;
            found += 1;
        }
        let clock = Clock::start();
        for at in 0..found {
            let page = self.scratch[at] as usize;
            let (word, to) = (self.rng.word(), (self.address + page * PAGE) as *mut u64);
            let began = ticks();
            // SAFETY: the page lies in the mapping, and nothing borrows it.
            unsafe { to.write_volatile(word) };
            self.scratch[at] = ticks() - began;
            self.hashes[page] = 0;
            self.marks[page] = OWN;
        }
        // Not while it is timed: it would bring in what the next page's time is about.
        for page in 0..self.pages() {
            if self.hashes[page] == 0 {
                self.note(page);
            }
        }
        clock.times(&mut self.scratch[..found])
    }

    /// Writes a word to every `every`-th page: how many, and nanoseconds for all of them.
    pub fn poke(&mut self, every: usize) -> (usize, u64) {
        let began = sys::now();
        for page in (0..self.pages()).step_by(every) {
            let (word, to) = (self.rng.word(), (self.address + page * PAGE) as *mut u64);
            // SAFETY: the page lies in the mapping, and nothing borrows it.
            unsafe { to.write_volatile(word) };
        }
        let time = sys::now() - began;
        for page in (0..self.pages()).step_by(every) {
            self.marks[page] = OWN;
            self.note(page);
        }
        (self.pages().div_ceil(every), time)
    }

    /// Rounds of as many reads of random pages as there are pages; after every eighth, a write to one of a few pages like no
    /// other. Nanoseconds, and what was computed.
    pub fn work(&mut self, rounds: usize) -> (u64, u64) {
        let (mut hot, mut found) = ([0; HOT], 0);
        // Far apart, and the same ones each time as long as they are not rewritten.
        for at in 0..HOT {
            let start = at * self.pages() / HOT;
            let next = (at + 1) * self.pages() / HOT;
            if let Some(page) = (start..next).find(|&page| self.marks[page] == OWN) {
                hot[found] = page;
                found += 1;
            }
        }
        let mut rng = Rng::new(self.seed ^ 3);
        let (pages, address) = (self.pages(), self.address);
        let mut sum = 0_u64;
        let began = sys::now();
        for access in 0..rounds * pages {
            let random = rng.word() as usize;
            let from = (address + (random >> 20) % pages * PAGE + random % WORDS * 8) as *const u64;
            // SAFETY: the word lies in the mapping, and nothing borrows it.
            sum = mix2(sum, unsafe { from.read_volatile() });
            if access % 8 == 0 && found > 0 {
                let to = (address + hot[access / 8 % found] * PAGE + random % WORDS * 8) as *mut u64;
                // SAFETY: as above.
                unsafe { to.write_volatile(sum) };
            }
        }
        let time = sys::now() - began;
        for &page in &hot[..found] {
            self.note(page);
        }
        (time, sum)
    }
}

/// Of a page. Each word is multiplied in, so a page with the same hash is not met by chance.
fn hash(words: &[u64]) -> u64 {
    let fold = |hash: u64, &word: &u64| (hash.rotate_left(5) ^ word).wrapping_mul(0x517c_c1b7_2722_0a95);
    // Zero says "not known": see `write`.
    words.iter().fold(0x9e37_79b9_7f4a_7c15, fold).max(1)
}
