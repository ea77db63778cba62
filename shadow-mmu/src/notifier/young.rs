// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which pages of a range were found young: the answer of [`test_clear_young`](super::MmuNotifier::test_clear_young), a bit a
//! page. One is made for a pass over an address space and used again for each of its parts, so a pass allocates once.

use crate::addr::HvaRange;
use crate::table::ENTRIES;

/// How close a secondary looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Look {
    /// A table through which no CPU went since the last look is passed over, as its link says. What is missed by that (a CPU
    /// that was on its way through the link while the link's mark was cleared) is found by the next
    /// [`Everything`](Self::Everything).
    #[default]
    Marked,
    /// At every entry.
    Everything,
}

/// A set of pages of one range.
#[derive(Debug, Clone)]
pub struct YoungPages {
    range: HvaRange,
    look: Look,
    /// A bit a page, from the first page of the leaf table that the range begins in.
    words: Vec<u64>,
}

impl YoungPages {
    /// No page of `range`.
    pub fn new(range: HvaRange, look: Look) -> Self {
        let mut pages = Self { range, look, words: Vec::new() };
        pages.reset(range, look);
        pages
    }

    /// No page of another range.
    pub fn reset(&mut self, range: HvaRange, look: Look) {
        (self.range, self.look) = (range, look);
        let pages = range.end.page() - self.base();
        self.words.clear();
        self.words.resize((pages.div_ceil(ENTRIES) * ENTRIES / 64) as usize, 0);
    }

    /// What is asked about.
    pub fn range(&self) -> HvaRange {
        self.range
    }

    /// How close to look.
    pub fn look(&self) -> Look {
        self.look
    }

    fn base(&self) -> u64 {
        self.range.start.page() & !(ENTRIES - 1)
    }

    /// Adds `page`, by number.
    ///
    /// # Panics
    /// If it is not in the range.
    pub fn add(&mut self, page: u64) {
        assert!(self.range.page_numbers().contains(&page), "page {page:#x} is not in {}", self.range);
        let at = page - self.base();
        self.words[(at / 64) as usize] |= 1 << (at % 64);
    }

    /// Adds those of the 64 pages from `first` on that `bits` has.
    ///
    /// # Panics
    /// If one of them lies far outside the range.
    pub fn add_run(&mut self, first: u64, bits: u64) {
        let at = first - self.base();
        let (word, shift) = ((at / 64) as usize, at % 64);
        self.words[word] |= bits << shift;
        let rest = bits.checked_shr(64 - shift as u32).unwrap_or(0);
        if rest != 0 {
            self.words[word + 1] |= rest;
        }
    }

    /// Whether `page` was added.
    pub fn contains(&self, page: u64) -> bool {
        let at = page.wrapping_sub(self.base());
        self.words.get((at / 64) as usize).is_some_and(|word| word >> (at % 64) & 1 != 0)
    }

    /// Whether none was.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&word| word == 0)
    }

    /// The 512 bits of the leaf table that starts at `page`, which has a part in the range.
    pub(crate) fn of_table(&self, page: u64) -> &[u64] {
        let first = ((page - self.base()) / 64) as usize;
        &self.words[first..first + ENTRIES as usize / 64]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Hva;

    #[test]
    fn pages_are_found_by_number_and_by_table() {
        let mut young = YoungPages::new(HvaRange::pages_from(Hva(510 << 12), 600), Look::Marked);
        assert!(young.is_empty());
        for page in [510, 512, 1109] {
            young.add(page);
        }
        assert!([510, 512, 1109].iter().all(|&page| young.contains(page)));
        assert!([0, 511, 513, 1110, 5000, u64::MAX].iter().all(|&page| !young.contains(page)));
        assert_eq!(young.of_table(0)[7], 1 << 62);
        assert_eq!(young.of_table(512)[0], 1);
        assert_eq!(young.of_table(1024)[1], 1 << 21);
        young.add_run(1000, 1 << 63 | 1);
        assert!(young.contains(1000) && young.contains(1063) && !young.contains(1001));
        young.add_run(576, !0);
        assert!((576..640).all(|page| young.contains(page)) && !young.contains(575) && !young.contains(640));
        young.reset(HvaRange::pages_from(Hva(0), 1), Look::Everything);
        assert!(young.is_empty());
    }

    #[test]
    #[should_panic(expected = "is not in")]
    fn a_page_outside_is_a_mistake() {
        YoungPages::new(HvaRange::pages_from(Hva(0), 1), Look::Marked).add(1);
    }
}
