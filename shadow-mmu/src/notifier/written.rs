// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which of the pages that are asked about were written: question and answer of
//! [`test_clear_dirty`](super::MmuNotifier::test_clear_dirty), a bit a page each.
//!
//! Pages are asked about one by one, for clearing the mark of a write costs a flush, and a page that is written all the time
//! is better left alone.

use crate::addr::{Hva, HvaRange, PAGE_SIZE};
use crate::table::ENTRIES;

/// Words of one leaf table.
pub(crate) const WORDS: usize = ENTRIES as usize / 64;

/// Pages of some leaf tables: those that are asked about, and those of them that were written.
#[derive(Debug, Clone, Default)]
pub struct WrittenPages {
    /// Number of the first page, a multiple of 512.
    base: u64,
    asked: Vec<u64>,
    found: Vec<u64>,
}

impl WrittenPages {
    /// No page of the `tables` leaf tables from that of `hva` on.
    pub fn new(hva: Hva, tables: usize) -> Self {
        let mut pages = Self::default();
        pages.reset(hva, tables);
        pages
    }

    /// No page of other tables.
    pub fn reset(&mut self, hva: Hva, tables: usize) {
        self.base = hva.page() & !(ENTRIES - 1);
        for words in [&mut self.asked, &mut self.found] {
            words.clear();
            words.resize(tables * WORDS, 0);
        }
    }

    /// The leaf tables that hold all these pages.
    pub fn range(&self) -> HvaRange {
        HvaRange::pages_from(Hva(self.base * PAGE_SIZE), self.asked.len() as u64 * 64)
    }

    /// Which word and which bit is that of `page`.
    fn place(&self, page: u64) -> (usize, u64) {
        let at = page.wrapping_sub(self.base);
        ((at / 64) as usize, 1 << (at % 64))
    }

    /// Asks about `page`, by number.
    ///
    /// # Panics
    /// If it is not in the range.
    pub fn ask(&mut self, page: u64) {
        let (word, bit) = self.place(page);
        self.asked[word] |= bit;
    }

    /// Whether `page` is asked about.
    pub fn is_asked(&self, page: u64) -> bool {
        let (word, bit) = self.place(page);
        self.asked.get(word).is_some_and(|word| word & bit != 0)
    }

    /// `page` was written.
    ///
    /// # Panics
    /// If it is not in the range.
    pub fn add(&mut self, page: u64) {
        let (word, bit) = self.place(page);
        self.found[word] |= bit;
    }

    /// Whether `page` was written.
    pub fn contains(&self, page: u64) -> bool {
        let (word, bit) = self.place(page);
        self.found.get(word).is_some_and(|word| word & bit != 0)
    }

    /// Which of the pages from `first` on are asked about, a bit each, as far as the word of the question goes.
    #[cfg(feature = "mmu-notifier")]
    pub(crate) fn asked_from(&self, first: u64) -> u64 {
        let (word, _) = self.place(first);
        self.asked.get(word).map_or(0, |word| word >> (first.wrapping_sub(self.base) % 64))
    }

    /// Adds those of the 64 pages from `first` on, a multiple of 64, that `bits` has to the question.
    ///
    /// # Panics
    /// If they are not in the range.
    pub(crate) fn ask_run(&mut self, first: u64, bits: u64) {
        let (word, _) = self.place(first);
        self.asked[word] |= bits;
    }

    /// Whether none was written.
    pub(crate) fn found_none(&self) -> bool {
        self.found.iter().all(|&word| word == 0)
    }

    /// Whether none is asked about.
    pub fn is_empty(&self) -> bool {
        self.asked.iter().all(|&word| word == 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_asked_about_and_found_by_number() {
        let mut pages = WrittenPages::new(Hva(600 << 12), 2);
        assert_eq!(pages.range(), HvaRange::pages_from(Hva(512 << 12), 1024));
        assert!(pages.is_empty());
        for page in [512, 700, 1535] {
            pages.ask(page);
        }
        pages.add(700);
        assert!(pages.is_asked(512) && pages.is_asked(1535) && !pages.is_asked(513) && !pages.is_asked(0));
        assert!(pages.contains(700) && !pages.contains(512) && !pages.contains(u64::MAX));
        #[cfg(feature = "mmu-notifier")]
        {
            assert_eq!([pages.asked_from(576), pages.asked_from(9999), pages.asked_from(0)], [0; 3]);
            assert_eq!([pages.asked_from(512), pages.asked_from(690)], [1, 1 << 10]);
        }
        pages.reset(Hva(0), 1);
        assert!(pages.is_empty() && !pages.contains(700));
    }

    #[test]
    #[should_panic(expected = "index out of bounds")]
    fn a_page_outside_is_a_mistake() {
        WrittenPages::new(Hva(0), 1).ask(512);
    }
}
