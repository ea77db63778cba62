// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The bitmap of a dirty log: one bit a page, in parts of 128 MiB that are there while they have a bit.
//!
//! Bits are set by one atomic operation and taken by one, a word at a time (I34). The lock around the map of parts is for the
//! map: held for reading by who sets or takes bits, for writing by who adds or drops a part. It is a leaf lock.
//!
//! A guest chooses which pages it writes, and must not make umbra's memory grow by it. So there is a limit of parts, and
//! beyond it a part has no bits of its own: all its pages count as written once one is (*whole*). Such parts are kept by
//! runs; where there are too many of those, they become one with all that is between them. A record too many costs its reader
//! time, one too few would cost data (I37).

use super::pages::{PART, WORDS, place};
use super::runs::Runs;
use crate::sync::RwLock;
use crate::sync::atomic::{AtomicU64, Ordering};
use std::collections::BTreeMap;
use std::ops::Range;

type Part = Box<[AtomicU64; WORDS]>;

fn filled(word: impl Fn(usize) -> u64) -> Part {
    Box::new(std::array::from_fn(|at| AtomicU64::new(word(at))))
}

fn is_empty(part: &Part) -> bool {
    part.iter().all(|word| word.load(Ordering::Relaxed) == 0)
}

/// Pages of a memslot, by their offset in it.
#[derive(Debug)]
pub(super) struct Bitmap {
    parts: RwLock<BTreeMap<u64, Part>>,
    /// Pages that count as written as a whole: parts, cut off where the slot ends. Below the lock of `parts`.
    whole: RwLock<Runs>,
    /// Pages of the slot.
    pages: u64,
    /// Parts that have bits of their own at most.
    limit: usize,
}

impl Bitmap {
    /// No page of `pages`.
    pub(super) fn new(pages: u64, limit: usize) -> Self {
        Self { parts: RwLock::default(), whole: RwLock::default(), pages, limit }
    }

    /// Adds `page`.
    pub(super) fn mark(&self, page: u64) {
        let (part, word, bit) = place(page);
        let set = |words: &Part| {
            // Most are set already; then the cache line stays shared. Release: a reader that takes the bit sees what was
            // written.
            if words[word].load(Ordering::Relaxed) & bit == 0 {
                words[word].fetch_or(bit, Ordering::AcqRel);
            }
        };
        if let Some(words) = self.parts.read().get(&part) {
            return set(words);
        }
        if self.whole.read().contains(page) {
            return;
        }
        let mut parts = self.parts.write();
        if parts.len() < self.limit || parts.contains_key(&part) {
            return set(parts.entry(part).or_insert_with(|| filled(|_| 0)));
        }
        self.whole.write().insert_bounded(self.pages_of(part));
    }

    /// Adds every page of `pages`.
    pub(super) fn mark_range(&self, pages: Range<u64>) {
        if pages.end - pages.start < PART {
            return pages.for_each(|page| self.mark(page));
        }
        self.whole.write().insert_bounded(pages);
    }

    /// The pages of a part that the slot has.
    fn pages_of(&self, part: u64) -> Range<u64> {
        let first = part.saturating_mul(PART).min(self.pages);
        first..first.saturating_add(PART).min(self.pages)
    }

    /// The first part at or behind `part` that has bits of its own.
    pub(super) fn next_part(&self, part: u64) -> Option<u64> {
        self.parts.read().range(part..).next().map(|(&part, _)| part)
    }

    /// Pages that count as written as a whole.
    pub(super) fn whole(&self) -> Runs {
        self.whole.read().clone()
    }

    /// Takes those of `pages` that count as written as a whole.
    pub(super) fn take_whole(&self, pages: Range<u64>) -> Runs {
        self.whole.write().take(pages)
    }

    /// The words of one part, added to `into`.
    pub(super) fn copy(&self, part: u64, into: &mut [u64; WORDS]) {
        if let Some(words) = self.parts.read().get(&part) {
            into.iter_mut().zip(words.iter()).for_each(|(into, word)| *into |= word.load(Ordering::Acquire));
        }
    }

    /// Takes those bits of one part that `wanted` has, and returns which were set. What counts as written as a whole has no
    /// bits.
    pub(super) fn take(&self, part: u64, wanted: &[u64; WORDS]) -> Box<[u64; WORDS]> {
        let mut taken = Box::new([0; WORDS]);
        if let Some(words) = self.parts.read().get(&part) {
            for ((taken, word), &wanted) in taken.iter_mut().zip(words.iter()).zip(wanted) {
                if wanted != 0 && word.load(Ordering::Relaxed) & wanted != 0 {
                    *taken = word.fetch_and(!wanted, Ordering::AcqRel) & wanted;
                }
            }
        }
        // Under the write lock nobody sets a bit, so what is empty stays so until it is dropped.
        let mut parts = self.parts.write();
        if parts.get(&part).is_some_and(is_empty) {
            parts.remove(&part);
        }
        taken
    }

    /// What counts as written as a whole in a part gets bits, all set: some are about to be taken. The reader's doing, not
    /// the guest's, so it has no limit.
    pub(super) fn give_bits_of_its_own(&self, part: u64) {
        let pages = self.pages_of(part);
        if self.whole.read().iter().all(|run| run.end <= pages.start || pages.end <= run.start) {
            return;
        }
        let mut parts = self.parts.write();
        let words = parts.entry(part).or_insert_with(|| filled(|_| 0));
        for page in self.whole.write().take(pages).iter().flatten() {
            let (_, at, bit) = place(page);
            words[at].fetch_or(bit, Ordering::AcqRel);
        }
    }

    /// Whether `page` is there.
    pub(super) fn contains(&self, page: u64) -> bool {
        let (part, word, bit) = place(page);
        let has = |words: &Part| words[word].load(Ordering::Acquire) & bit != 0;
        self.parts.read().get(&part).is_some_and(has) || self.whole.read().contains(page)
    }
}

#[cfg(test)]
mod tests {
    use super::super::runs::RUNS_MOST;
    use super::*;

    const EVERY: [u64; WORDS] = [!0; WORDS];

    #[test]
    fn bits_are_taken_once_and_an_empty_part_goes() {
        let bitmap = Bitmap::new(4 * PART, 8);
        for page in [0, 65, PART + 1] {
            bitmap.mark(page);
        }
        assert_eq!((bitmap.next_part(0), bitmap.next_part(1), bitmap.next_part(2)), (Some(0), Some(1), None));
        let mut only = [0; WORDS];
        only[1] = 2;
        assert_eq!(bitmap.take(0, &only)[..2], [0, 2]);
        assert!(bitmap.contains(0) && !bitmap.contains(65));
        assert_eq!(bitmap.take(0, &EVERY)[0], 1);
        assert_eq!(bitmap.take(0, &EVERY)[0], 0);
        assert_eq!(bitmap.next_part(0), Some(1));
    }

    #[test]
    fn i37_beyond_the_limit_a_part_is_written_as_a_whole_and_as_far_as_the_slot_goes() {
        let bitmap = Bitmap::new(PART + 100, 1);
        bitmap.mark(5);
        bitmap.mark(PART + 5);
        assert!(!bitmap.contains(6) && bitmap.contains(PART + 6));
        assert_eq!(bitmap.whole().iter().collect::<Vec<_>>(), vec![PART..PART + 100]);
        let mut only = [0; WORDS];
        only[0] = 1;
        bitmap.give_bits_of_its_own(1);
        assert_eq!(bitmap.take(1, &only)[0], 1);
        assert!(!bitmap.contains(PART) && bitmap.contains(PART + 1), "the others are still to be told");
        assert_eq!(bitmap.take(1, &EVERY)[..2], [!1, (1 << 36) - 1]);
        assert_eq!((bitmap.next_part(1), bitmap.whole().len()), (None, 0));
    }

    #[test]
    fn i37_however_far_apart_a_guest_writes_the_bitmap_stays_small() {
        let bitmap = Bitmap::new(1 << 35, 4);
        for part in 0..20_000 {
            bitmap.mark(2 * part * PART + 7);
        }
        assert!((0..20_000).all(|part| bitmap.contains(2 * part * PART + 7)));
        assert!(bitmap.parts.read().len() == 4 && bitmap.whole().len() <= RUNS_MOST);
        bitmap.mark_range(0..1 << 35);
        assert!(bitmap.contains((1 << 35) - 1) && bitmap.whole().len() == 1);
    }
}
