// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The bitmap of a dirty log: one bit a page, in parts of 128 MiB that are there while they have a bit.
//!
//! Bits are set by one atomic operation and taken by one, a word at a time (I34). The lock around the map of parts is for the map: held for
//! reading by who sets or takes bits, for writing by who adds or drops a part. It is a leaf lock.
//!
//! A guest chooses which pages it writes, and must not make umbra's memory grow by it. So there is a limit of parts, and beyond it a part has
//! no bits of its own: all its pages count as written once one is. A record too many costs its reader time, one too few would
//! cost data (I37).

use super::pages::{PART, WORDS, place};
use crate::sync::RwLock;
use crate::sync::atomic::{AtomicU64, Ordering};
use std::collections::BTreeMap;

/// Pages of a part, each written or not.
#[derive(Debug)]
enum Part {
    Bits(Box<[AtomicU64; WORDS]>),
    /// All of them are.
    All,
}

impl Part {
    fn filled(word: u64) -> Self {
        Self::Bits(Box::new(std::array::from_fn(|_| AtomicU64::new(word))))
    }

    fn is_empty(&self) -> bool {
        match self {
            Self::Bits(words) => words.iter().all(|word| word.load(Ordering::Relaxed) == 0),
            Self::All => false,
        }
    }
}

/// Pages of a memslot, by their offset in it.
#[derive(Debug)]
pub(super) struct Bitmap {
    parts: RwLock<BTreeMap<u64, Part>>,
    /// Pages of the slot.
    pages: u64,
    /// Parts that have bits of their own at most.
    limit: usize,
}

impl Bitmap {
    /// No page of `pages`.
    pub(super) fn new(pages: u64, limit: usize) -> Self {
        Self { parts: RwLock::default(), pages, limit }
    }

    /// Adds `page`.
    pub(super) fn mark(&self, page: u64) {
        let (part, word, bit) = place(page);
        let set = |part: &Part| {
            if let Part::Bits(words) = part {
                // Most are set already; then the cache line stays shared. Release: a reader that takes the bit sees what was written.
                if words[word].load(Ordering::Relaxed) & bit == 0 {
                    words[word].fetch_or(bit, Ordering::AcqRel);
                }
            }
        };
        if let Some(part) = self.parts.read().get(&part) {
            return set(part);
        }
        let mut parts = self.parts.write();
        let with_bits = parts.len() < self.limit;
        set(parts.entry(part).or_insert_with(|| if with_bits { Part::filled(0) } else { Part::All }));
    }

    /// The first part at or behind `part` that has a page.
    pub(super) fn next_part(&self, part: u64) -> Option<u64> {
        self.parts.read().range(part..).next().map(|(&part, _)| part)
    }

    /// The bits of those pages of part `part` that the slot has.
    fn mask(&self, part: u64, word: usize) -> u64 {
        let first = part * PART + word as u64 * 64;
        match self.pages.saturating_sub(first) {
            0 => 0,
            left @ 1..64 => (1 << left) - 1,
            _ => !0,
        }
    }

    /// The words of one part, added to `into`.
    pub(super) fn copy(&self, part: u64, into: &mut [u64; WORDS]) {
        match self.parts.read().get(&part) {
            None => {}
            Some(Part::Bits(words)) => {
                into.iter_mut()
                    .zip(words.iter())
                    .for_each(|(into, word)| *into |= word.load(Ordering::Acquire));
            }
            Some(Part::All) => {
                into.iter_mut().enumerate().for_each(|(at, into)| *into |= self.mask(part, at));
            }
        }
    }

    /// Takes those bits of one part that `wanted` has, and returns which were set.
    pub(super) fn take(&self, part: u64, wanted: &[u64; WORDS]) -> Box<[u64; WORDS]> {
        let mut taken = Box::new([0; WORDS]);
        self.give_bits_of_its_own(part);
        if let Some(Part::Bits(words)) = self.parts.read().get(&part) {
            for ((taken, word), &wanted) in taken.iter_mut().zip(words.iter()).zip(wanted) {
                if wanted != 0 && word.load(Ordering::Relaxed) & wanted != 0 {
                    *taken = word.fetch_and(!wanted, Ordering::AcqRel) & wanted;
                }
            }
        }
        // Under the write lock nobody sets a bit, so what is empty stays so until it is dropped.
        let mut parts = self.parts.write();
        if parts.get(&part).is_some_and(Part::is_empty) {
            parts.remove(&part);
        }
        taken
    }

    /// A part of which all pages count as written gets bits, all set: some are about to be taken.
    fn give_bits_of_its_own(&self, part: u64) {
        let all = |parts: &BTreeMap<u64, Part>| matches!(parts.get(&part), Some(Part::All));
        if !all(&self.parts.read()) {
            return;
        }
        let mut parts = self.parts.write();
        if all(&parts) {
            let words = std::array::from_fn(|at| AtomicU64::new(self.mask(part, at)));
            parts.insert(part, Part::Bits(Box::new(words)));
        }
    }

    /// Whether `page` is there.
    pub(super) fn contains(&self, page: u64) -> bool {
        let (part, word, bit) = place(page);
        match self.parts.read().get(&part) {
            None => false,
            Some(Part::Bits(words)) => words[word].load(Ordering::Acquire) & bit != 0,
            Some(Part::All) => true,
        }
    }
}

#[cfg(test)]
mod tests {
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
        let mut words = [0; WORDS];
        bitmap.copy(1, &mut words);
        assert_eq!(words[..3], [!0, (1 << 36) - 1, 0]);
        let mut only = [0; WORDS];
        only[0] = 1;
        assert_eq!(bitmap.take(1, &only)[0], 1);
        assert!(!bitmap.contains(PART) && bitmap.contains(PART + 1), "the others are still to be told");
        assert_eq!(bitmap.take(1, &EVERY)[..2], [!1, (1 << 36) - 1]);
        assert_eq!(bitmap.next_part(1), None);
    }
}
