// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Who is measured, whether the benchmark means anything without it, and the turns that contestants take.
//!
//! One turn goes before those that count. An [optional](Contestant::optional) contestant may fail, for want of a privilege or of a
//! kernel's option, or later: it is left out, with what it gave before, and named with its reason, for the minutes that the
//! others took are not to be lost. A [required](Contestant::required) one may not: a benchmark of umbra in which umbra does not
//! run has no result, and must not look as if it had one.

use crate::causes::one_line;
use anyhow::{Result, bail};
use std::fmt;

/// What it means that a contestant cannot be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Presence {
    /// The benchmark has failed.
    Required,
    /// A row less.
    Optional,
}

/// Who is measured, and how to make one run, which gives a `T`.
pub(super) struct Contestant<'a, T> {
    pub(super) name: &'a str,
    presence: Presence,
    run: Box<dyn FnMut() -> Result<T> + 'a>,
}

impl<T> fmt::Debug for Contestant<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {}", self.presence, self.name)
    }
}

impl<'a, T> Contestant<'a, T> {
    /// One that can be measured wherever umbra runs, umbra itself first of all.
    pub(super) fn required(name: &'a str, run: impl FnMut() -> Result<T> + 'a) -> Self {
        Self { name, presence: Presence::Required, run: Box::new(run) }
    }

    /// One that needs what a host may lack.
    pub(super) fn optional(name: &'a str, run: impl FnMut() -> Result<T> + 'a) -> Self {
        Self { name, presence: Presence::Optional, run: Box::new(run) }
    }

    /// One run; `None` where an optional one failed, which is `missing` then.
    fn measure(&mut self, missing: &mut Vec<String>) -> Result<Option<T>> {
        match ((self.run)(), self.presence) {
            (Ok(given), _) => Ok(Some(given)),
            (Err(error), Presence::Optional) => {
                missing.push(format!("{}: {}", self.name, one_line(&error)));
                Ok(None)
            }
            (Err(error), Presence::Required) => {
                Err(error.context(format!("{} cannot be measured", self.name)))
            }
        }
    }
}

/// What the turns of one contestant gave.
pub(super) type Turns<'a, T> = (&'a str, Vec<T>);

/// Lets `contestants` take turns, `runs` of them after one that does not count. What each gave in its turns, in their order,
/// and who could not be measured and why.
///
/// # Errors
/// A required contestant fails; `runs` is zero.
pub(super) fn take_turns<'a, T>(
    runs: usize,
    mut contestants: Vec<Contestant<'a, T>>,
    progress: &mut dyn FnMut(&str),
) -> Result<(Vec<Turns<'a, T>>, Vec<String>)> {
    if runs == 0 {
        bail!("a benchmark needs at least one run");
    }
    let mut missing = Vec::new();
    let mut present = Vec::new();
    for mut contestant in contestants.drain(..) {
        progress(&format!("{}: warming up", contestant.name));
        if contestant.measure(&mut missing)?.is_some() {
            present.push((contestant, Vec::with_capacity(runs)));
        }
    }
    for turn in 1..=runs {
        let mut left = Vec::with_capacity(present.len());
        for (mut contestant, mut turns) in present {
            progress(&format!("{}: run {turn} of {runs}", contestant.name));
            if let Some(given) = contestant.measure(&mut missing)? {
                turns.push(given);
                left.push((contestant, turns));
            }
        }
        present = left;
    }
    progress("");
    Ok((present.into_iter().map(|(contestant, turns)| (contestant.name, turns)).collect(), missing))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

    use super::*;

    #[test]
    fn the_first_turn_does_not_count_and_all_take_turns() {
        let order = std::cell::RefCell::new(Vec::new());
        let run = |name| {
            let order = &order;
            move || {
                order.borrow_mut().push(name);
                Ok(order.borrow().len())
            }
        };
        let contestants = vec![Contestant::required("a", run("a")), Contestant::optional("b", run("b"))];
        let (turns, missing) = take_turns(2, contestants, &mut |_| {}).unwrap();
        assert_eq!(turns, [("a", vec![3, 5]), ("b", vec![4, 6])]);
        assert!(missing.is_empty());
        assert_eq!(*order.borrow(), ["a", "b", "a", "b", "a", "b"]);
        assert!(take_turns::<()>(0, Vec::new(), &mut |_| {}).is_err());
    }

    #[test]
    fn who_is_optional_may_be_left_out_and_who_is_required_may_not() {
        let good = || Contestant::required("good", || Ok(1));
        let bad = || -> Result<i32> { bail!("no root") };
        let contestants = vec![Contestant::optional("bad", bad), good()];
        let (turns, missing) = take_turns(1, contestants, &mut |_| {}).unwrap();
        assert_eq!((turns, missing), (vec![("good", vec![1])], vec!["bad: no root".to_owned()]));
        let contestants = vec![good(), Contestant::required("bad", bad)];
        let error = take_turns(1, contestants, &mut |_| {}).unwrap_err();
        assert_eq!(one_line(&error), "bad cannot be measured: no root");
    }

    #[test]
    fn who_fails_later_costs_the_others_nothing_unless_it_is_required() {
        let tires = || {
            let mut left = 3;
            move || {
                left -= 1;
                if left > 0 { Ok(left) } else { bail!("tired") }
            }
        };
        let contestants = vec![Contestant::optional("it", tires()), Contestant::required("good", || Ok(7))];
        let (turns, missing) = take_turns(4, contestants, &mut |_| {}).unwrap();
        assert_eq!((turns, missing), (vec![("good", vec![7; 4])], vec!["it: tired".to_owned()]));
        let error = take_turns(5, vec![Contestant::required("it", tires())], &mut |_| {}).unwrap_err();
        assert_eq!(one_line(&error), "it cannot be measured: tired");
    }
}
