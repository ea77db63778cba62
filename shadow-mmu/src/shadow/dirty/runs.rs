// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Runs of numbers: a set that costs what it has of gaps, not of members.

use std::collections::BTreeMap;
use std::ops::Range;

/// Runs that [`insert_bounded`](Runs::insert_bounded) leaves at most.
pub(super) const RUNS_MOST: usize = 1024;

/// A set of numbers, as disjoint runs none of which begins where another ends.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Runs {
    /// The end of each run, by its start.
    ends: BTreeMap<u64, u64>,
}

impl Runs {
    /// The number of runs.
    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    pub(super) fn contains(&self, number: u64) -> bool {
        self.ends.range(..=number).next_back().is_some_and(|(_, &end)| number < end)
    }

    /// The runs, ascending.
    pub(super) fn iter(&self) -> impl Iterator<Item = Range<u64>> {
        self.ends.iter().map(|(&start, &end)| start..end)
    }

    /// Adds a run.
    pub(super) fn insert(&mut self, run: Range<u64>) {
        if run.is_empty() {
            return;
        }
        let (mut start, mut end) = (run.start, run.end);
        // Those that touch it become one with it.
        while let Some((&first, &last)) =
            self.ends.range(..=end).next_back().filter(|(_, last)| **last >= start)
        {
            self.ends.remove(&first);
            (start, end) = (start.min(first), end.max(last));
        }
        self.ends.insert(start, end);
    }

    /// Takes out what there is of `run`.
    pub(super) fn take(&mut self, run: Range<u64>) -> Self {
        let mut taken = Self::default();
        while let Some((&start, &end)) =
            self.ends.range(..run.end).next_back().filter(|(_, end)| **end > run.start)
        {
            self.ends.remove(&start);
            taken.insert(start.max(run.start)..end.min(run.end));
            self.insert(start..run.start.min(end));
            self.insert(run.end.max(start)..end);
            if start <= run.start {
                break;
            }
        }
        taken
    }

    /// Adds a run; where there are too many, all become one with what is between them.
    pub(super) fn insert_bounded(&mut self, run: Range<u64>) {
        self.insert(run);
        if self.len() > RUNS_MOST {
            self.collapse();
        }
    }

    fn collapse(&mut self) {
        if let (Some((&start, _)), Some((_, &end))) =
            (self.ends.first_key_value(), self.ends.last_key_value())
        {
            self.ends = BTreeMap::from([(start, end)]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(of: &[Range<u64>]) -> Runs {
        let mut runs = Runs::default();
        of.iter().for_each(|run| runs.insert(run.clone()));
        runs
    }

    fn list(runs: &Runs) -> Vec<Range<u64>> {
        runs.iter().collect()
    }

    #[test]
    fn runs_that_touch_are_one() {
        assert_eq!(list(&runs(&[5..7, 1..3, 9..9, 3..5, 20..30, 8..40])), [1..7, 8..40]);
        let some = runs(&[5..7, 10..20]);
        assert!([5, 6, 10, 19].iter().all(|&n| some.contains(n)));
        assert!([0, 4, 7, 9, 20].iter().all(|&n| !some.contains(n)));
    }

    #[test]
    fn what_is_taken_is_gone_and_the_rest_stays() {
        let mut some = runs(&[0..10, 20..30, 40..50]);
        assert_eq!(list(&some.take(5..45)), [5..10, 20..30, 40..45]);
        assert_eq!(list(&some), [0..5, 45..50]);
        assert!(some.take(1..2).contains(1));
        assert_eq!(list(&some), [0..1, 2..5, 45..50]);
        assert!(some.take(5..45).is_empty() && some.take(7..7).is_empty());
        some.collapse();
        assert_eq!((some.iter().next(), some.len()), (Some(0..50), 1));
    }
}
