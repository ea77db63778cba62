// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A set of pages of a memslot, by their offset in it: what a dirty log says to its reader, and what the reader says to be
//! cleared. Sparse, for a slot may be as large as the guest's addresses and hold little.

use super::runs::Runs;
use std::collections::BTreeMap;
use std::ops::Range;

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
    /// Pages that count as written because others near them were; a page may be in `parts` too.
    whole: Runs,
}

impl DirtyPages {
    /// Adds a page.
    pub fn insert(&mut self, page: u64) {
        let (part, word, bit) = place(page);
        self.part(part)[word] |= bit;
    }

    /// Adds a page that a guest chose: beyond `limit` parts of 128 MiB with a bit a page, the part as a whole, and beyond a
    /// thousand runs of those, all that is between them too. So a guest that writes everywhere makes it grow so far and no
    /// further.
    pub fn insert_within(&mut self, page: u64, limit: usize) {
        let (part, ..) = place(page);
        if self.parts.len() < limit || self.parts.contains_key(&part) {
            self.insert(page);
        } else {
            self.whole.insert_bounded(part * PART..(part + 1) * PART);
        }
    }

    /// Adds all of `other`. Costs time for what that takes of memory, not for its pages.
    pub fn merge(&mut self, other: Self) {
        other.whole.iter().for_each(|run| self.whole.insert(run));
        for (part, words) in other.parts {
            self.part(part).iter_mut().zip(words.iter()).for_each(|(into, word)| *into |= word);
        }
    }

    /// Whether the page was added.
    pub fn contains(&self, page: u64) -> bool {
        let (part, word, bit) = place(page);
        self.whole.contains(page) || self.parts.get(&part).is_some_and(|words| words[word] & bit != 0)
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.runs().map(|run| run.end - run.start).sum()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.whole.is_empty() && self.parts.values().all(|words| words.iter().all(|&word| word == 0))
    }

    /// The pages, ascending. There may be as many as the slot has, of a guest that chose to: then [`runs`](Self::runs) are few.
    pub fn iter(&self) -> impl Iterator<Item = u64> {
        self.runs().flatten()
    }

    /// The pages by runs, ascending and disjoint. Runs end where a part of 128 MiB does.
    pub fn runs(&self) -> impl Iterator<Item = Range<u64>> {
        let mut whole = self.whole.iter().peekable();
        let mut rest = self.parts.iter().flat_map(|(&part, words)| part_runs(part, words)).peekable();
        let mut done = 0;
        std::iter::from_fn(move || {
            loop {
                // Of two that begin at the same page, either: what the second has in common with the first is cut off.
                let first = match (whole.peek(), rest.peek()) {
                    (Some(a), Some(b)) if b.start < a.start => rest.next(),
                    (Some(_), _) => whole.next(),
                    (None, _) => rest.next(),
                }?;
                let first = first.start.max(done)..first.end;
                if !first.is_empty() {
                    done = first.end;
                    return Some(first);
                }
            }
        })
    }

    /// Pages that count as written because others near them were: what a log tells of a guest that writes at so many places
    /// that remembering each would cost too much.
    pub fn whole_runs(&self) -> impl Iterator<Item = Range<u64>> {
        self.whole.iter()
    }

    /// Adds pages that count as written as a whole.
    pub fn add_whole(&mut self, run: Range<u64>) {
        self.whole.insert(run);
    }

    /// The words of one part, to be added to.
    pub(super) fn part(&mut self, part: u64) -> &mut [u64; WORDS] {
        self.parts.entry(part).or_insert_with(|| Box::new([0; WORDS]))
    }

    /// Every part with words, ascending.
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

/// The runs of one part.
fn part_runs(part: u64, words: &[u64; WORDS]) -> impl Iterator<Item = Range<u64>> {
    let first = part * PART;
    let mut at = 0;
    std::iter::from_fn(move || {
        let set = |page: u64| words[(page / 64) as usize] >> (page % 64) & 1 != 0;
        // A word at a time over what is clear, and over what is set.
        let skip = |at: u64, full: u64| at.is_multiple_of(64) && words[(at / 64) as usize] == full;
        while at < PART && !set(at) {
            at += if skip(at, 0) { 64 } else { 1 };
        }
        let start = at;
        while at < PART && set(at) {
            at += if skip(at, !0) { 64 } else { 1 };
        }
        (start < at).then_some(first + start..first + at)
    })
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
        assert_eq!(
            set.runs().collect::<Vec<_>>(),
            [0..1, 63..64, PART - 1..PART, PART..PART + 1, PART * 3 + 64..PART * 3 + 65]
        );
    }

    #[test]
    fn i37_what_a_guest_writes_everywhere_does_not_make_it_grow() {
        let mut pages = DirtyPages::default();
        // Every second part, so that no two are one run.
        let written: Vec<u64> = (0..5000).map(|n| 2 * n * PART + 7).collect();
        written.iter().for_each(|&page| pages.insert_within(page, 256));
        written.iter().for_each(|&page| pages.insert_within(page + 1, 256));
        assert!(written.iter().all(|&page| pages.contains(page) && pages.contains(page + 1)), "none is lost");
        assert!(pages.parts.len() == 256 && pages.whole.len() <= super::super::runs::RUNS_MOST);
        // What has bits is known by the page.
        assert!(!pages.contains(written[255] + 2) && pages.contains(written[256] + 2));
    }

    #[test]
    fn a_page_that_is_there_twice_counts_once() {
        let mut set: DirtyPages = [1, 2, 3, 70, PART + 5].into_iter().collect();
        set.add_whole(2..65);
        set.add_whole(PART..3 * PART);
        assert_eq!(set.runs().collect::<Vec<_>>(), [1..4, 4..65, 70..71, PART..3 * PART]);
        assert_eq!(set.count(), 64 + 1 + 2 * PART);
        assert!(set.contains(64) && set.contains(2 * PART) && !set.contains(65));
        let mut other: DirtyPages = [0, 70].into_iter().collect();
        other.merge(set);
        assert_eq!(other.count(), 65 + 1 + 2 * PART);
        assert_eq!(other.whole_runs().collect::<Vec<_>>(), [2..65, PART..3 * PART]);
        let full: DirtyPages = (0..PART).collect();
        assert_eq!(full.runs().collect::<Vec<_>>(), vec![0..PART]);
    }
}
