// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a page holds, in 24 bytes instead of 4096.

use crate::rt::random::mix2;

/// The content of a page: all zero, or words that a generator makes, but for one word that a store has
/// changed.
#[derive(Clone, Copy)]
pub struct Content {
    /// The generator's seed; zero stands for a page of zeros.
    fill: u64,
    /// The place and value of the word that differs.
    patch: Option<(u16, u64)>,
}

impl Content {
    /// A page that has not been written to.
    pub const ZERO: Self = Self { fill: 0, patch: None };

    /// A page that has been filled with `generated(fill, ..)`; `fill` is not zero.
    pub const fn filled(fill: u64) -> Self {
        Self { fill, patch: None }
    }

    /// Word `index`.
    pub fn word(&self, index: usize) -> u64 {
        match self.patch {
            Some((place, value)) if usize::from(place) == index => value,
            _ if self.fill == 0 => 0,
            _ => generated(self.fill, index),
        }
    }

    /// Where a single word can be stored: there is room for one such place, so once it is taken it stays,
    /// until the page is filled or dropped. Before that it is `wish`.
    pub fn place(&self, wish: usize) -> usize {
        self.patch.map_or(wish, |(place, _)| usize::from(place))
    }

    /// Notes that `value` has been stored at word `index`, which must be what `place` says.
    pub fn store(&mut self, index: usize, value: u64) {
        self.patch = Some((index as u16, value));
    }
}

/// Word `index` of a page filled with generator `fill`.
pub const fn generated(fill: u64, index: usize) -> u64 {
    mix2(fill, index as u64)
}
