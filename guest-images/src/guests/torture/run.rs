// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One seed: its random numbers, the places it works on, and what to do when reality and model differ.

use core::fmt;

use crate::heap::Heap;
use crate::model::{Backing, MAX_GROWTH, MAX_RANGE, Model};
use crate::rt::PAGE;
use crate::rt::out::{Text, errln, outln};
use crate::rt::random::{Checksum, Rng};
use crate::rt::sys::{self, Errno, PROT_NONE, PROT_READ, PROT_RW, PROT_WRITE, Return};
use crate::rt::sys::{MAP_FIXED, MAP_NORESERVE, MAP_PRIVATE};

/// Address space that the program has to itself.
pub struct Places {
    /// The arena. A page before it and one behind stay reserved, so that nothing of it merges with or grows
    /// over memory that the model does not know.
    pub arena: usize,
    pub pages: usize,
    /// Room for one range, outside the arena.
    pub scratch: usize,
    /// Where the heap begins.
    pub heap: usize,
}

impl Places {
    /// Reserves what an arena of so many pages needs.
    pub fn reserve(pages: usize) -> Result<Self, Errno> {
        let start = sys::map_anywhere((pages + 2) * PAGE, PROT_NONE)?;
        let scratch = sys::map_anywhere((MAX_RANGE + MAX_GROWTH + 2) * PAGE, PROT_NONE)?;
        // SAFETY: it only asks.
        let heap = unsafe { sys::brk(0) }.next_multiple_of(PAGE);
        Ok(Self { arena: start + PAGE, pages, scratch: scratch + PAGE, heap })
    }
}

/// The state of one seed.
pub struct Run<'a> {
    pub rng: Rng,
    pub model: &'a mut Model,
    pub places: &'a Places,
    pub heap: Heap,
    pub sum: Checksum,
    seed: u64,
    /// Number of the operation, from 1, and what it is.
    op: u64,
    what: Text<160>,
    trace: bool,
}

/// A range of pages of the arena.
#[derive(Clone, Copy)]
pub struct Range {
    pub first: usize,
    pub count: usize,
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pages {}+{}", self.first, self.count)
    }
}

impl<'a> Run<'a> {
    /// Puts arena and heap into their first state: all reserved, with no access, and empty.
    pub fn new(seed: u64, places: &'a Places, model: &'a mut Model, trace: bool) -> Result<Self, Errno> {
        let flags = MAP_FIXED | MAP_PRIVATE | MAP_NORESERVE;
        // SAFETY: the arena is touched through probes only.
        unsafe { sys::mmap(places.arena, places.pages * PAGE, PROT_NONE, flags) }?;
        model.map(0, places.pages, PROT_NONE, false);
        let mut run = Self {
            rng: Rng::new(seed),
            model,
            places,
            heap: Heap::new(),
            sum: Checksum::new(),
            seed,
            op: 0,
            what: Text::new(),
            trace,
        };
        run.empty_heap();
        Ok(run)
    }

    /// One random operation.
    pub fn step(&mut self, op: u64) {
        self.op = op;
        match self.rng.below(100) {
            0..40 => self.access(),
            40..52 => self.map_fixed(),
            52..56 => self.map_hint(),
            56..59 => self.map_noreplace(),
            59..66 => self.unmap(),
            66..75 => self.protect(),
            75..80 => self.drop_content(),
            80..83 => self.shrink(),
            83..89 => self.grow(),
            89..93 => self.relocate(),
            93..97 => self.heap_step(),
            _ => self.error(),
        }
        // Now and then the whole state, so that a difference is found near its cause.
        if op.is_multiple_of(400) {
            self.sweep();
        }
    }

    /// Looks at everything once more and returns the checksum of the seed.
    pub fn finish(mut self) -> u64 {
        self.op += 1;
        self.sweep();
        self.sum.value()
    }

    /// The address of a page of the arena.
    pub fn address(&self, page: usize) -> usize {
        self.places.arena + page * PAGE
    }

    /// The length of so many pages in bytes, which the kernel rounds up: sometimes it is not a multiple of a
    /// page.
    pub fn bytes(&mut self, count: usize) -> usize {
        let missing = if self.rng.percent(25) { self.rng.below(PAGE) } else { 0 };
        count * PAGE - missing
    }

    /// Any range of the arena.
    pub fn any_range(&mut self) -> Range {
        let first = self.rng.below(self.places.pages);
        let count = self.rng.upto(MAX_RANGE.min(self.places.pages - first));
        Range { first, count }
    }

    /// A range inside one mapping, often ending or beginning with it; `None` if nothing is mapped.
    pub fn mapped_range(&mut self) -> Option<Range> {
        let start = self.rng.below(self.places.pages);
        let mapped = |page: &usize| !matches!(self.model.pages[*page].backing, Backing::Free);
        let page = (start..self.places.pages).chain(0..start).find(mapped)?;
        let (mut first, mut count) = self.model.mapping(page);
        // The reservation at the beginning is as long as the arena.
        if count > MAX_RANGE {
            first = page.min(first + count - MAX_RANGE);
            count = MAX_RANGE;
        }
        let part = self.rng.upto(count);
        let skip = match self.rng.below(4) {
            0 => return Some(Range { first, count }),
            1 => 0,
            2 => count - part,
            _ => self.rng.below(count - part + 1),
        };
        Some(Range { first: first + skip, count: part })
    }

    /// A protection, most often one that allows everything.
    pub fn prot(&mut self) -> usize {
        self.rng.pick(&[PROT_RW, PROT_RW, PROT_RW, PROT_READ, PROT_WRITE, PROT_NONE])
    }

    /// Says what the operation is, before it happens.
    pub fn describe(&mut self, what: fmt::Arguments<'_>) {
        self.what.set(what);
        if self.trace {
            outln!("op {}: {}", self.op, self.what);
        }
    }

    /// Compares what a system call returned with what it should return.
    pub fn expect(&mut self, page: usize, got: Return, expected: Return) {
        if got != expected {
            let arena = self.places.arena;
            self.fail(self.address(page), Shown(expected, arena), Shown(got, arena));
        }
        self.sum.add(match got {
            Ok(0) => 0,
            Ok(address) => address.wrapping_sub(self.places.arena) as u64,
            Err(Errno(number)) => number as u64,
        });
    }

    /// Reports a difference and ends the program.
    pub fn fail(&self, address: usize, expected: impl fmt::Display, got: impl fmt::Display) -> ! {
        let (seed, op) = (self.seed, self.op);
        errln!(
            "torture seed {seed}: op {op} ({}) at {}: expected {expected}, got {got}",
            self.what,
            self.place(address)
        );
        sys::exit_group(1)
    }

    /// An address as an offset that is the same in every run.
    pub fn place(&self, address: usize) -> Place {
        if address.wrapping_sub(self.places.heap) <= Heap::LIMIT {
            Place("heap", address - self.places.heap)
        } else {
            Place("arena", address.wrapping_sub(self.places.arena))
        }
    }
}

/// A place by the region it is in, and the distance from its start.
#[derive(PartialEq, Eq)]
pub struct Place(&'static str, usize);

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(region, offset) = *self;
        if offset <= isize::MAX as usize {
            write!(f, "{region}+{offset:#x}")
        } else {
            write!(f, "{region}-{:#x}", offset.wrapping_neg())
        }
    }
}

/// What a system call returned; an address is shown relative to the arena.
struct Shown(Return, usize);

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Ok(0) => f.write_str("success"),
            Ok(address) => Place("arena", address.wrapping_sub(self.1)).fmt(f),
            Err(error) => error.fmt(f),
        }
    }
}
