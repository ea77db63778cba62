// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How much was saved, over time, in bounded memory: where there are too many samples every other one goes, and from then on
//! half as many are taken.

use std::time::Duration;

/// Samples that are kept, at most.
const MOST: usize = 2048;

/// What was saved at some moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sample {
    /// Since the start.
    pub at: Duration,
    /// Pages saved.
    pub saved: u64,
}

/// Samples over time.
#[derive(Debug, Clone)]
pub struct History {
    samples: Vec<Sample>,
    /// Only each so-many-th is taken.
    each: u64,
    offered: u64,
}

impl Default for History {
    fn default() -> Self {
        Self { samples: Vec::new(), each: 1, offered: 0 }
    }
}

impl History {
    /// Takes a sample, or leaves it out. Times ascend.
    pub fn add(&mut self, sample: Sample) {
        let is_due = self.offered.is_multiple_of(self.each);
        self.offered += 1;
        if !is_due {
            return;
        }
        if self.samples.len() == MOST {
            let mut keep = false;
            self.samples.retain(|_| {
                keep = !keep;
                keep
            });
            self.each *= 2;
        }
        self.samples.push(sample);
    }

    /// Takes the last one, whatever was left out before it.
    pub fn add_last(&mut self, sample: Sample) {
        self.samples.push(sample);
    }

    /// Those that are kept, by time.
    pub fn samples(&self) -> &[Sample] {
        &self.samples
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_run_is_told_in_few_samples_evenly() {
        let mut history = History::default();
        let sample = |n: u64| Sample { at: Duration::from_millis(n), saved: n };
        (0..100_000).for_each(|n| history.add(sample(n)));
        history.add_last(sample(100_000));
        let samples = history.samples();
        assert!((MOST / 2..=MOST + 1).contains(&samples.len()), "{}", samples.len());
        let (last, even) = samples.split_last().map_or((None, samples), |(last, even)| (Some(last), even));
        assert_eq!(last, Some(&sample(100_000)));
        assert!(even.windows(2).all(|two| two[1].saved - two[0].saved == history.each), "{}", history.each);
    }
}
