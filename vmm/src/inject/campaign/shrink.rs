// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Makes a failing case smaller while it still fails in the same way.
//!
//! Greedy: whatever simpler case fails again is the next to start from. Rules go first, one by one, then settings, then what makes
//! rules special, then the program does less. What depends on the scheduler may not fail each time; so a simpler case is tried up to
//! three times before it is given up, and of the last one it is said how often it failed.

use super::super::plan::{Pick, Rule};
use super::case::{Case, Settings};
use super::judge::Failure;
use super::run::Observed;
use anyhow::Result;
use serde::Serialize;

/// How often a case is tried before it counts as right.
const TRIES: u32 = 3;
/// The most runs that one failure is worth.
const MOST: u32 = 150;

/// A run that failed.
#[derive(Debug, Clone, PartialEq)]
pub struct Failed {
    /// In which way.
    pub failure: Failure,
    /// What was seen of it.
    pub seen: Observed,
}

/// How often a case failed again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Again {
    /// Runs that failed in the same way.
    pub failed: u32,
    /// Of so many.
    pub of: u32,
}

/// The smallest case that was found.
#[derive(Debug, Clone, PartialEq)]
pub struct Shrunk {
    /// The case.
    pub case: Case,
    /// The last failure of it that was seen.
    pub last: Failed,
    /// How often it failed when it was run again at the end.
    pub again: Again,
    /// Runs that it took.
    pub runs: u32,
}

/// Runs a case: how it failed, or `None` if it was right.
type Try<'a> = &'a mut dyn FnMut(&Case) -> Result<Option<Failed>>;

/// Shrinks `case`, which failed as `first` says.
///
/// # Errors
/// What `run` returns.
pub fn shrink(case: &Case, first: Failed, run: Try<'_>) -> Result<Shrunk> {
    let mut shrunk =
        Shrunk { case: case.clone(), last: first, again: Again { failed: 0, of: TRIES }, runs: 0 };
    'smaller: while shrunk.runs < MOST {
        for candidate in simpler(&shrunk.case) {
            if let Some(failed) = shrunk.fails(&candidate, run)? {
                (shrunk.case, shrunk.last) = (candidate, failed);
                continue 'smaller;
            }
        }
        break;
    }
    let last = shrunk.case.clone();
    for _ in 0..TRIES {
        if let Some(failed) = shrunk.try_once(&last, run)? {
            shrunk.last = failed;
            shrunk.again.failed += 1;
        }
    }
    Ok(shrunk)
}

impl Shrunk {
    /// Whether `case` fails in the same way, in one run.
    fn try_once(&mut self, case: &Case, run: Try<'_>) -> Result<Option<Failed>> {
        self.runs += 1;
        Ok(run(case)?.filter(|failed| failed.failure.kind == self.last.failure.kind))
    }

    /// The same, in one run of several.
    fn fails(&mut self, case: &Case, run: Try<'_>) -> Result<Option<Failed>> {
        for _ in 0..TRIES {
            if let Some(failed) = self.try_once(case, run)? {
                return Ok(Some(failed));
            }
        }
        Ok(None)
    }
}

/// Cases that are simpler in one thing.
fn simpler(case: &Case) -> Vec<Case> {
    let mut all = Vec::new();
    let rules = &case.plan.rules;
    if rules.len() > 1 {
        for without in 0..rules.len() {
            let mut smaller = case.clone();
            smaller.plan.rules.remove(without);
            all.push(smaller);
        }
    }
    let plain = Settings::default();
    let simplify: [fn(&mut Settings, &Settings); 7] = [
        |settings, plain| (settings.guests, settings.pool) = (plain.guests, plain.pool),
        |settings, plain| settings.ksm = plain.ksm,
        |settings, plain| settings.age = plain.age,
        |settings, plain| settings.dirty = plain.dirty,
        |settings, plain| settings.ad_bits = plain.ad_bits,
        |settings, plain| settings.fault_around = plain.fault_around,
        |settings, plain| settings.memory = plain.memory,
    ];
    for simplify in simplify {
        let mut smaller = case.clone();
        simplify(&mut smaller.settings, &plain);
        if smaller.settings.guests == 1 {
            smaller.plan.rules.iter_mut().for_each(|rule| rule.vm = None);
        }
        all.push(smaller);
    }
    for index in 0..rules.len() {
        let simplify: [fn(&mut Rule); 4] = [
            |rule| rule.after = None,
            |rule| rule.vm = None,
            |rule| rule.times = Some(1),
            |rule| {
                if matches!(rule.pick, Pick::Probability(_) | Pick::Every(_)) {
                    (rule.pick, rule.times) = (Pick::From(1), Some(1));
                }
            },
        ];
        for simplify in simplify {
            let mut smaller = case.clone();
            if let Some(rule) = smaller.plan.rules.get_mut(index) {
                simplify(rule);
            }
            all.push(smaller);
        }
    }
    all.extend(case.program.smaller().into_iter().map(|program| Case { program, ..case.clone() }));
    all.retain(|smaller| smaller != case);
    all
}

#[cfg(test)]
mod tests {
    use super::super::draw::Deck;
    use super::super::judge::Kind;
    use super::super::run::End;
    use super::*;
    use crate::inject::What;

    fn failed(kind: Kind) -> Failed {
        let seen = Observed {
            end: End::TimedOut,
            stdout: String::new(),
            stderr: String::new(),
            report: None,
            left: Vec::new(),
        };
        Failed { failure: Failure { kind, detail: String::new() }, seen }
    }

    /// A case with several rules, of which the one at `guilty` is told by its delay.
    fn case(guilty: usize) -> Case {
        let deck = Deck::new(1);
        let mut case = (0..).map(|number| deck.case(number)).find(|case| case.plan.rules.len() == 5).unwrap();
        case.plan.rules[guilty].effect = What::Delay(std::time::Duration::from_micros(1234));
        case
    }

    fn is_guilty(rule: &Rule) -> bool {
        rule.effect == What::Delay(std::time::Duration::from_micros(1234))
    }

    #[test]
    fn the_one_guilty_rule_is_found_and_all_else_is_simple() {
        for guilty in 0..5 {
            let mut run = |case: &Case| Ok(case.plan.rules.iter().any(is_guilty).then(|| failed(Kind::Hang)));
            let shrunk = shrink(&case(guilty), failed(Kind::Hang), &mut run).unwrap();
            assert_eq!(shrunk.case.plan.rules.len(), 1);
            assert!(is_guilty(&shrunk.case.plan.rules[0]));
            assert_eq!(shrunk.case.settings, Settings::default());
            assert_eq!(shrunk.case.program.image, "hello");
            assert_eq!(shrunk.case.plan.rules[0].times, Some(1));
            assert_eq!(shrunk.again, Again { failed: 3, of: 3 });
            assert!(shrunk.runs <= MOST + TRIES);
            assert_eq!(shrunk.case.number, case(guilty).number);
        }
    }

    #[test]
    fn what_is_needed_stays() {
        let mut first = case(0);
        (first.settings.guests, first.settings.ksm) = (3, Some("all"));
        let mut run = |case: &Case| {
            let needed =
                case.settings.guests == 3 && case.settings.ksm.is_some() && case.plan.rules.len() >= 2;
            Ok(needed.then(|| failed(Kind::Audit)))
        };
        let shrunk = shrink(&first, failed(Kind::Audit), &mut run).unwrap();
        assert_eq!((shrunk.case.settings.guests, shrunk.case.settings.ksm), (3, Some("all")));
        assert_eq!(shrunk.case.plan.rules.len(), 2);
        assert_eq!(shrunk.case.settings.age, None);
    }

    #[test]
    fn another_way_to_fail_is_another_failure() {
        let mut run = |_: &Case| Ok(Some(failed(Kind::Output)));
        let shrunk = shrink(&case(2), failed(Kind::Hang), &mut run).unwrap();
        assert_eq!(shrunk.case, case(2));
        assert_eq!(shrunk.again, Again { failed: 0, of: 3 });
        assert_eq!(shrunk.last.failure.kind, Kind::Hang);
    }

    /// One run in three fails: the tries see that, and it is told.
    #[test]
    fn a_failure_that_comes_and_goes_is_shrunk_and_told_of_as_such() {
        let mut runs = 0;
        let mut run = |case: &Case| {
            runs += 1;
            Ok((runs % 3 == 0 && case.plan.rules.iter().any(is_guilty)).then(|| failed(Kind::Hang)))
        };
        let shrunk = shrink(&case(3), failed(Kind::Hang), &mut run).unwrap();
        assert_eq!(shrunk.case.plan.rules.len(), 1);
        assert_eq!(shrunk.again, Again { failed: 1, of: 3 });
    }
}
