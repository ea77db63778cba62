// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A set of pages of a memslot, by their offset in it: what a dirty log says to its reader, and what the reader says to be cleared. Sparse,
//! for a slot may be as large as the guest's addresses and hold little.

use std::collections::BTreeMap;

/// Words of one part.
pub(super) const WORDS: usize = 512;
/// Pages of one part: 128 MiB, whose bits fill one page of memory.
pub(super) const PART: u64 = WORDS as u64 * 64;

/// Which part `page` is in, and where there.
pub(super) fn place(page: u64) -> (u64, usize, u64) {
    (page / PART, (page % PART / 64) as usize, 1 << (page % 64))
}

/// Pages of a memslot, by offset.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DirtyPages {
    parts: BTreeMap<u64, Box<[u64; WORDS]>>,
}

impl DirtyPages {
    /// Adds a page.
    pub fn insert(&mut self, page: u64) {
        let (part, word, bit) = place(page);
        self.part(part)[word] |= bit;
    }

    /// Whether the page was added.
    pub fn contains(&self, page: u64) -> bool {
        let (part, word, bit) = place(page);
        self.parts.get(&part).is_some_and(|words| words[word] & bit != 0)
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.parts.values().flat_map(|words| words.iter()).map(|word| u64::from(word.count_ones())).sum()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.parts.values().all(|words| words.iter().all(|&word| word == 0))
    }

    /// The pages, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u64> {
        self.parts.iter().flat_map(|(part, words)| {
            words.iter().enumerate().flat_map(move |(at, &word)| {
                let first = part * PART + at as u64 * 64;
                bits(word).map(move |bit| first + bit)
            })
        })
    }

    /// The words of one part, to be added to.
    pub(super) fn part(&mut self, part: u64) -> &mut [u64; WORDS] {
        self.parts.entry(part).or_insert_with(|| Box::new([0; WORDS]))
    }

    /// Every part there is, ascending.
    pub(super) fn parts(&self) -> impl Iterator<Item = (u64, &[u64; WORDS])> {
        self.parts.iter().map(|(&part, words)| (part, &**words))
    }
}

impl FromIterator<u64> for DirtyPages {
    fn from_iter<T: IntoIterator<Item = u64>>(pages: T) -> Self {
        let mut all = Self::default();
        pages.into_iter().for_each(|page| all.insert(page));
        all
    }
}

/// The places of the bits that are set in `word`.
pub(super) fn bits(mut word: u64) -> impl Iterator<Item = u64> {
    std::iter::from_fn(move || {
        let bit = word.trailing_zeros();
        word &= word.wrapping_sub(1);
        (bit < 64).then_some(u64::from(bit))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_come_back_ascending_and_once() {
        let pages = [PART * 3 + 64, 0, 63, PART - 1, PART, 63];
        let set: DirtyPages = pages.into_iter().collect();
        assert_eq!(set.iter().collect::<Vec<_>>(), [0, 63, PART - 1, PART, PART * 3 + 64]);
        assert_eq!(set.count(), 5);
        assert!(set.contains(63) && !set.contains(62) && !set.contains(PART * 9));
        assert!(!set.is_empty() && DirtyPages::default().is_empty());
        assert_eq!(bits(1 << 63 | 1).collect::<Vec<_>>(), [0, 63]);
    }
}
