// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which frames are free: two bitmaps and two cursors.
//!
//! A free frame is *clean* (the file has a hole there, it reads as zeros) or *used* (it holds somebody's old bytes and
//! still costs the host a page). Used frames go out first. Frames go out in ascending order, so that a batch is mostly
//! one run: discarding a run costs 0.2 µs a page, discarding its pages one by one costs 2.7 µs each.

use crate::addr::Pfn;
use std::ops::Range;

const WORD: usize = u64::BITS as usize;

/// The free frames of a pool. Not synchronised; the pool keeps it under a mutex.
#[derive(Debug)]
pub(super) struct FreeFrames {
    /// One bit a frame: free.
    free: Vec<u64>,
    /// One bit a frame: free and holding old bytes. Always a subset of `free`.
    used: Vec<u64>,
    free_count: usize,
    used_count: usize,
    /// Words where the next search starts: next fit, so that a search rarely looks at a full word twice.
    cursor: usize,
    used_cursor: usize,
}

/// What the bitmaps hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Recount {
    pub(super) free: usize,
    pub(super) used: usize,
    pub(super) used_not_free: usize,
}

impl FreeFrames {
    /// All of `frames` frames free and clean.
    pub(super) fn new(frames: usize) -> Self {
        let words = frames.div_ceil(WORD);
        let mut free = vec![u64::MAX; words];
        if !frames.is_multiple_of(WORD) {
            free[words - 1] = (1 << (frames % WORD)) - 1;
        }
        Self { free, used: vec![0; words], free_count: frames, used_count: 0, cursor: 0, used_cursor: 0 }
    }

    pub(super) fn free_count(&self) -> usize {
        self.free_count
    }

    pub(super) fn used_count(&self) -> usize {
        self.used_count
    }

    /// Takes up to `want` frames and appends them to `out` with whether each holds old bytes. Returns how many it took.
    pub(super) fn take(&mut self, want: usize, out: &mut Vec<(Pfn, bool)>) -> usize {
        let before = out.len();
        let mut left = want.min(self.free_count);
        let reuse = left.min(self.used_count);
        left -= reuse;
        self.used_cursor = take_bits(&mut self.used, self.used_cursor, reuse, |pfn| out.push((pfn, true)));
        for &(pfn, _) in &out[before..] {
            self.free[pfn.index() / WORD] &= !(1 << (pfn.index() % WORD));
        }
        // Every used frame that was wanted is gone from `free`; what is left to take may still be one that is used,
        // if `want` was more than the clean ones, so look again by bit.
        let used = &mut self.used;
        let mut more_used = 0;
        self.cursor = take_bits(&mut self.free, self.cursor, left, |pfn| {
            let bit = 1 << (pfn.index() % WORD);
            let word = &mut used[pfn.index() / WORD];
            more_used += usize::from(*word & bit != 0);
            out.push((pfn, *word & bit != 0));
            *word &= !bit;
        });
        self.used_count -= reuse + more_used;
        self.free_count -= out.len() - before;
        out.len() - before
    }

    /// Gives back frames that hold old bytes.
    pub(super) fn put_used(&mut self, pfn: Pfn) {
        let (word, bit) = (pfn.index() / WORD, 1 << (pfn.index() % WORD));
        debug_assert_eq!(self.free[word] & bit, 0, "frame {pfn:?} freed twice");
        self.free[word] |= bit;
        self.used[word] |= bit;
        self.free_count += 1;
        self.used_count += 1;
    }

    /// Takes up to `most` used frames, as runs, for the caller to punch out of the file and to hand back through
    /// [`put_clean`](Self::put_clean). Long runs first, for a run is what a punch costs; and from the top: what stays is low and
    /// dense.
    pub(super) fn take_used_runs(&mut self, most: usize) -> Vec<Range<u32>> {
        let mut taken: Vec<Range<u32>> = Vec::new();
        let mut left = most;
        for least in RUN_LENGTHS {
            if left == 0 {
                break;
            }
            for run in self.used_runs(least, left) {
                left -= run.len();
                for frame in run.clone() {
                    let (word, bit) = (frame as usize / WORD, 1 << (frame as usize % WORD));
                    self.used[word] &= !bit;
                    self.free[word] &= !bit;
                }
                taken.push(run);
            }
        }
        self.used_count -= most - left;
        self.free_count -= most - left;
        taken
    }

    /// Runs of at least `least` used frames, from the top, of `most` frames together at most.
    fn used_runs(&self, least: usize, most: usize) -> Vec<Range<u32>> {
        let (mut runs, mut left) = (Vec::new(), most);
        let mut run = 0..0;
        let mut end_run = |run: &Range<u32>, left: &mut usize| {
            if run.len() >= least {
                let length = run.len().min(*left);
                runs.push(run.end - length as u32..run.end);
                *left -= length;
            }
        };
        for index in (0..self.used.len()).rev() {
            let mut word = self.used[index];
            while word != 0 && left > 0 {
                let bit = WORD - 1 - word.leading_zeros() as usize;
                word &= !(1 << bit);
                let frame = (index * WORD + bit) as u32;
                if run.start == frame + 1 {
                    run.start = frame;
                } else {
                    end_run(&run, &mut left);
                    run = frame..frame + 1;
                }
            }
            if left == 0 {
                return runs;
            }
        }
        end_run(&run, &mut left);
        runs
    }

    /// Gives back frames whose bytes are gone from the file.
    pub(super) fn put_clean(&mut self, frames: Range<u32>) {
        for frame in frames {
            self.free[frame as usize / WORD] |= 1 << (frame as usize % WORD);
            self.free_count += 1;
        }
    }

    /// Gives back a frame that [`take_used_runs`](Self::take_used_runs) took but whose bytes could not be dropped.
    pub(super) fn put_unpunched(&mut self, frames: Range<u32>) {
        frames.for_each(|frame| self.put_used(Pfn(frame)));
    }

    /// The free frames of a range, ascending.
    pub(super) fn free_in(&self, frames: Range<usize>) -> impl Iterator<Item = Pfn> + '_ {
        let words = frames.start / WORD..frames.end.div_ceil(WORD);
        let bits = words.filter(|&word| self.free[word] != 0).flat_map(move |word| {
            (0..WORD).filter(move |bit| self.free[word] >> bit & 1 == 1).map(move |bit| word * WORD + bit)
        });
        bits.filter(move |frame| frames.contains(frame)).map(|frame| Pfn(frame as u32))
    }

    /// The bitmaps, counted anew.
    pub(super) fn recount(&self) -> Recount {
        let ones = |word: u64| word.count_ones() as usize;
        Recount {
            free: self.free.iter().copied().map(ones).sum(),
            used: self.used.iter().copied().map(ones).sum(),
            used_not_free: self.used.iter().zip(&self.free).map(|(used, free)| ones(used & !free)).sum(),
        }
    }

    /// Makes the counter of free frames wrong.
    #[cfg(test)]
    pub(super) fn miscount(&mut self) {
        self.free_count -= 1;
    }

    /// The used frames, ascending.
    pub(super) fn used_frames(&self) -> impl Iterator<Item = Pfn> + '_ {
        self.used.iter().enumerate().flat_map(|(index, &word)| {
            (0..WORD).filter(move |bit| word >> bit & 1 == 1).map(move |bit| Pfn((index * WORD + bit) as u32))
        })
    }
}

/// How long a run must be to be punched, first and last.
const RUN_LENGTHS: [usize; 4] = [64, 16, 4, 1];

/// Clears `want` set bits of `map`, ascending from word `cursor` and once around; returns where to go on next time.
fn take_bits(map: &mut [u64], cursor: usize, want: usize, mut taken: impl FnMut(Pfn)) -> usize {
    let mut left = want;
    let mut at = cursor;
    while left > 0 {
        while map[at] != 0 && left > 0 {
            let bit = map[at].trailing_zeros() as usize;
            map[at] &= map[at] - 1;
            taken(Pfn((at * WORD + bit) as u32));
            left -= 1;
        }
        if left > 0 {
            at = if at + 1 == map.len() { 0 } else { at + 1 };
        }
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn take(free: &mut FreeFrames, want: usize) -> Vec<(Pfn, bool)> {
        let mut out = Vec::new();
        free.take(want, &mut out);
        out
    }

    #[test]
    fn a_pool_that_is_no_multiple_of_a_word_hands_out_each_frame_once() {
        let mut free = FreeFrames::new(130);
        let frames = take(&mut free, 1000);
        assert_eq!(frames.len(), 130);
        assert_eq!(frames.iter().map(|f| f.0).collect::<BTreeSet<_>>().len(), 130);
        assert!(take(&mut free, 1).is_empty());
    }

    #[test]
    fn used_frames_go_out_before_clean_ones() {
        let mut free = FreeFrames::new(64);
        take(&mut free, 10);
        free.put_used(Pfn(3));
        assert_eq!(take(&mut free, 2), [(Pfn(3), true), (Pfn(10), false)]);
    }

    #[test]
    fn punched_runs_come_from_the_top_and_go_back_clean() {
        let mut free = FreeFrames::new(256);
        take(&mut free, 256);
        [1, 2, 3, 200, 201, 90].into_iter().for_each(|f| free.put_used(Pfn(f)));
        assert_eq!(free.take_used_runs(4), [200..202, 90..91, 3..4]);
        free.put_clean(200..202);
        assert_eq!((free.free_count(), free.used_count()), (4, 2));
        assert!(take(&mut free, 4).contains(&(Pfn(200), false)));
    }
}
