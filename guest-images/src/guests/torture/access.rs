// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Loads and stores: each either does what the model says or faults as the model says, at that address and no
//! other.

use core::fmt;

use crate::content::{Content, generated};
use crate::rt::fault::{self, Fault};
use crate::rt::{PAGE, WORDS};
use crate::run::{Place, Range, Run};

/// What an access does: a word (for a store, of no meaning), or a fault.
type Outcome = Result<u64, Fault>;

impl Run<'_> {
    /// One random access.
    pub fn access(&mut self) {
        let page = self.rng.below(self.places.pages);
        match self.rng.below(20) {
            0..8 => self.load_somewhere(page),
            8..13 => self.store_somewhere(page),
            13..16 => self.fill(page),
            16..18 => {
                self.describe(format_args!("check of all of page {page}"));
                self.check(page);
            }
            _ if page + 1 < self.places.pages => self.straddle(page),
            _ => self.load_somewhere(page),
        }
    }

    fn load_somewhere(&mut self, page: usize) {
        let index = self.index(page);
        self.describe(format_args!("load of page {page} word {index}"));
        self.load(page, index);
    }

    fn store_somewhere(&mut self, page: usize) {
        let wish = self.rng.below(WORDS);
        let value = self.rng.word();
        let address = self.address(page);
        let (index, expected) = match self.model.content(page, true) {
            Ok(content) => {
                let index = content.place(wish);
                content.store(index, value);
                (index, Ok(value))
            }
            Err(cause) => (wish, Err(fault_at(cause, address + wish * 8))),
        };
        self.describe(format_args!("store of {value:#x} to page {page} word {index}"));
        self.store(address + index * 8, value, expected);
    }

    /// Writes a whole page.
    fn fill(&mut self, page: usize) {
        // Odd, since zero means no content.
        let fill = self.rng.word() | 1;
        self.describe(format_args!("fill of page {page} with generator {fill:#x}"));
        let address = self.address(page);
        match self.model.content(page, true) {
            Ok(content) => {
                *content = Content::filled(fill);
                for index in 0..WORDS {
                    let value = generated(fill, index);
                    self.store(address + index * 8, value, Ok(value));
                }
            }
            Err(cause) => self.store(address, fill, Err(fault_at(cause, address))),
        }
    }

    /// An access to 8 bytes of which 4 lie in `page` and 4 in the next.
    fn straddle(&mut self, page: usize) {
        let write = self.rng.percent(50);
        let address = self.address(page + 1) - 4;
        let low = self.model.content(page, write).map(|content| *content);
        let high = self.model.content(page + 1, write).map(|content| *content);
        let expected = match (low, high) {
            (Ok(low), Ok(high)) => Ok(low.word(WORDS - 1) >> 32 | high.word(0) << 32),
            // The processor reports the first byte that it could not reach.
            (Err(cause), Ok(_)) => Err(fault_at(cause, address)),
            (Ok(_), Err(cause)) => Err(fault_at(cause, address + 4)),
            // Which half it looks at first is its own affair.
            (Err(_), Err(_)) => return self.load_somewhere(page),
        };
        match expected {
            // One that faults must leave nothing at all, on either page.
            Err(_) if write => {
                self.describe(format_args!("store across the end of page {page}"));
                self.store(address, u64::MAX, expected);
                self.check(page);
                self.check(page + 1);
            }
            // A store that works would leave words that the model has no room for. What may be written may be
            // read.
            _ => {
                self.describe(format_args!("load across the end of page {page}"));
                self.expect_load(address, expected);
            }
        }
    }

    /// A place in a page: half of the time the one word that differs from the rest, if there is one.
    fn index(&mut self, page: usize) -> usize {
        let any = self.rng.below(WORDS);
        match self.model.content(page, false) {
            Ok(content) if any.is_multiple_of(2) => content.place(any),
            _ => any,
        }
    }

    /// Loads a word of the arena and compares.
    fn load(&mut self, page: usize, index: usize) {
        self.load_through(page, index, self.address(page));
    }

    /// Loads a word of what the model has at `page`, but which now lies at `address`.
    pub fn load_through(&mut self, page: usize, index: usize, address: usize) {
        let place = address + index * 8;
        let expected = match self.model.content(page, false) {
            Ok(content) => Ok(content.word(index)),
            Err(cause) => Err(fault_at(cause, place)),
        };
        self.expect_load(place, expected);
    }

    /// Compares a whole page with the model. If it cannot be read, one word is enough to see that.
    fn check(&mut self, page: usize) {
        let words = if self.model.content(page, false).is_ok() { WORDS } else { 1 };
        for index in 0..words {
            self.load(page, index);
        }
    }

    /// Sometimes looks at each page of a range right after a change of it. Not always: a page that is looked
    /// at is a page that has been faulted in, and the next operation shall also meet those that have not.
    pub fn glance(&mut self, range: Range) {
        if self.rng.percent(25) {
            for page in range.first..range.first + range.count {
                let index = self.index(page);
                self.load(page, index);
            }
        }
    }

    /// Compares everything with the model: what can be read, that the rest cannot, and that what can only be
    /// read cannot be written.
    pub fn sweep(&mut self) {
        self.describe(format_args!("check of everything"));
        for page in 0..self.places.pages {
            self.check(page);
            let readable = self.model.content(page, false).is_ok();
            if let Err(cause) = self.model.content(page, true).map(drop)
                && readable
            {
                let address = self.address(page);
                self.store(address, 1, Err(fault_at(cause, address)));
            }
        }
        self.check_heap();
    }

    /// Loads 8 bytes at any place, compares, and takes what it saw into the checksum.
    pub fn expect_load(&mut self, address: usize, expected: Outcome) {
        // SAFETY: `torture` installed the handler, and the program keeps nothing of its own where this reads.
        let got = unsafe { fault::load(address) };
        self.expect_access(address, got, expected);
    }

    /// Stores 8 bytes at any place that belongs to arena or heap, and compares how that went.
    pub fn store(&mut self, address: usize, value: u64, expected: Outcome) {
        // SAFETY: as in `expect_load`: arena and heap hold nothing but what probes put there.
        let got = unsafe { fault::store(address, value) }.map(|()| value);
        self.expect_access(address, got, expected);
    }

    fn expect_access(&mut self, address: usize, got: Outcome, expected: Outcome) {
        if got != expected {
            self.fail(address, self.shown(expected), self.shown(got));
        }
        self.sum.add(match got {
            Ok(value) => value,
            Err(fault) => u64::from(fault.signal << 8 | fault.code),
        });
    }

    fn shown(&self, outcome: Outcome) -> Shown {
        match outcome {
            Ok(value) => Shown::Value(value),
            Err(fault) => Shown::Fault(fault.name(), self.place(fault.address)),
        }
    }
}

/// An outcome without absolute addresses.
enum Shown {
    Value(u64),
    Fault(&'static str, Place),
}

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Value(value) => write!(f, "{value:#018x}"),
            Self::Fault(name, place) => write!(f, "{name} at {place}"),
        }
    }
}

/// The fault that an access to `address` earns for `cause`, a signal and its code.
pub const fn fault_at(cause: (u32, u32), address: usize) -> Fault {
    Fault { signal: cause.0, code: cause.1, address, lsb: 0 }
}

/// The page that holds an address, as a number from `start`.
pub const fn page_of(address: usize, start: usize) -> usize {
    (address - start) / PAGE
}
