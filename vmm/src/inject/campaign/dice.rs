// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The generator that cases are drawn from: SplitMix64 (Steele, Lea, Flood 2014), one for each case.

use crate::random::{SplitMix64, mix};

/// The dice of one case.
#[derive(Debug, Clone)]
pub(super) struct Dice(SplitMix64);

impl Dice {
    /// Those of case `number` of a campaign with this seed.
    pub(super) fn new(seed: u64, number: u64) -> Self {
        Self(SplitMix64::new(mix(mix(seed) ^ number)))
    }

    /// A number from `low` to `high`, both of which it may be.
    pub(super) fn from(&mut self, low: u64, high: u64) -> u64 {
        low + self.0.below(high.saturating_sub(low).saturating_add(1))
    }

    /// Whether one of `out_of` equal chances came.
    pub(super) fn one_in(&mut self, out_of: u64) -> bool {
        self.from(1, out_of) == 1
    }

    /// One of these; `None` if there is none.
    pub(super) fn pick<T: Copy>(&mut self, of: &[T]) -> Option<T> {
        let last = of.len().checked_sub(1)?;
        of.get(self.from(0, last as u64) as usize).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_case_has_dice_of_its_own_that_are_always_the_same() {
        let first = |seed, number| {
            let mut dice = Dice::new(seed, number);
            [dice.from(0, u64::MAX), dice.from(0, u64::MAX)]
        };
        assert_eq!(first(1, 2), first(1, 2));
        assert_ne!(first(1, 2), first(1, 3));
        assert_ne!(first(1, 2), first(2, 2));
    }

    #[test]
    fn a_range_is_reached_from_end_to_end_and_never_left() {
        let mut dice = Dice::new(1, 1);
        let mut seen = [0; 3];
        for _ in 0..300 {
            seen[dice.from(5, 7) as usize - 5] += 1;
        }
        assert!(seen.iter().all(|&times| times > 60), "{seen:?}");
        assert_eq!(dice.from(9, 9), 9);
        dice.from(0, u64::MAX);
        assert_eq!(dice.pick::<u8>(&[]), None);
    }
}
