// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Makes a failing case smaller while it still fails in the same way.
//!
//! Greedy: whatever simpler case fails again is the next to start from. Rules go first, one by one, then settings, then what makes
//! rules special, then the program does less. What depends on the scheduler may not fail each time; so a simpler case is tried up to
//! three times before it is given up, and of the last one it is said how often it failed.

use super::super::plan::{Pick, Rule};
use super::case::{Case, Settings};
use super::judge::{Failure, Kind};
use super::run::Observed;
use anyhow::Result;
use serde::Serialize;

/// How often a case is tried before it counts as right.
const TRIES: u32 = 3;
/// The most runs that one failure is worth.
const MOST: u32 = 150;

/// What came of a run.
#[derive(Debug, Clone, PartialEq)]
pub enum Tried {
    /// It was right.
    Right,
    /// It was wrong.
    Wrong(Box<Failed>),
    /// The campaign was ended meanwhile, so nothing is known of it.
    Stopped,
}

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
    /// How often it failed when it was run again at the end; of fewer runs than three if the campaign was ended.
    pub again: Again,
    /// Runs that it took.
    pub runs: u32,
}

/// Runs a case.
type Try<'a> = &'a mut dyn FnMut(&Case) -> Result<Tried>;

/// Whether a case is worth to be the next to start from.
enum Verdict {
    Fails(Box<Failed>),
    /// As far as is known.
    Right,
    /// No more is to be run.
    Enough,
}

/// Shrinks `case`, which failed as `first` says; as far as that goes in 150 runs, and until the campaign is ended.
///
/// # Errors
/// What `run` returns.
pub fn shrink(case: &Case, first: Failed, run: Try<'_>) -> Result<Shrunk> {
    let mut shrunk = Shrunk { case: case.clone(), last: first, again: Again { failed: 0, of: 0 }, runs: 0 };
    'smaller: loop {
        for candidate in simpler(&shrunk.case) {
            match shrunk.fails(&candidate, run)? {
                Verdict::Fails(failed) => {
                    (shrunk.case, shrunk.last) = (candidate, *failed);
                    continue 'smaller;
                }
                Verdict::Right => {}
                Verdict::Enough => break,
            }
        }
        break;
    }
    let last = shrunk.case.clone();
    for _ in 0..TRIES {
        match shrunk.try_once(&last, run)? {
            Tried::Wrong(failed) => {
                shrunk.last = *failed;
                shrunk.again.failed += 1;
            }
            Tried::Right => {}
            Tried::Stopped => break,
        }
        shrunk.again.of += 1;
    }
    Ok(shrunk)
}

/// Whether both are the same failure, as far as one can tell. What ended a run is a part of it only where that is what is wrong.
fn is_same(one: &Failed, other: &Failed) -> bool {
    let is_about_the_end =
        matches!(one.failure.kind, Kind::Status | Kind::NoReason | Kind::Killed | Kind::Output);
    one.failure.kind == other.failure.kind && (!is_about_the_end || one.seen.end == other.seen.end)
}

impl Shrunk {
    /// What comes of `case` in one run. To be wrong in another way counts as right.
    fn try_once(&mut self, case: &Case, run: Try<'_>) -> Result<Tried> {
        let tried = run(case)?;
        self.runs += u32::from(tried != Tried::Stopped);
        Ok(match tried {
            Tried::Wrong(failed) if !is_same(&failed, &self.last) => Tried::Right,
            tried => tried,
        })
    }

    /// Whether `case` fails in the same way in one run of several.
    fn fails(&mut self, case: &Case, run: Try<'_>) -> Result<Verdict> {
        for _ in 0..TRIES {
            if self.runs >= MOST {
                return Ok(Verdict::Enough);
            }
            match self.try_once(case, run)? {
                Tried::Wrong(failed) => return Ok(Verdict::Fails(failed)),
                Tried::Right => {}
                Tried::Stopped => return Ok(Verdict::Enough),
            }
        }
        Ok(Verdict::Right)
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
    let simplify: [fn(&mut Settings, &Settings); 8] = [
        |settings, plain| settings.deterministic = plain.deterministic,
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
            files: Vec::new(),
        };
        Failed { failure: Failure { kind, detail: String::new() }, seen }
    }

    /// What came of a run that is wrong, if it is.
    fn tried(is_wrong: bool, kind: Kind) -> Result<Tried> {
        Ok(if is_wrong { Tried::Wrong(Box::new(failed(kind))) } else { Tried::Right })
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
            let mut run = |case: &Case| tried(case.plan.rules.iter().any(is_guilty), Kind::Hang);
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
            tried(needed, Kind::Audit)
        };
        let shrunk = shrink(&first, failed(Kind::Audit), &mut run).unwrap();
        assert_eq!((shrunk.case.settings.guests, shrunk.case.settings.ksm), (3, Some("all")));
        assert_eq!(shrunk.case.plan.rules.len(), 2);
        assert_eq!(shrunk.case.settings.age, None);
    }

    #[test]
    fn another_way_to_fail_is_another_failure() {
        let mut run = |_: &Case| tried(true, Kind::Output);
        let shrunk = shrink(&case(2), failed(Kind::Hang), &mut run).unwrap();
        assert_eq!(shrunk.case, case(2));
        assert_eq!(shrunk.again, Again { failed: 0, of: 3 });
        assert_eq!(shrunk.last.failure.kind, Kind::Hang);
    }

    /// So is another status, where the status is what is wrong.
    #[test]
    fn another_status_is_another_failure_and_a_hang_is_a_hang() {
        let ended = |kind, status| {
            let mut failed = failed(kind);
            failed.seen.end = End::Exited(status);
            failed
        };
        assert!(is_same(&ended(Kind::Status, 1), &ended(Kind::Status, 1)));
        assert!(!is_same(&ended(Kind::Status, 1), &ended(Kind::Status, 125)));
        assert!(is_same(&ended(Kind::Audit, 0), &ended(Kind::Audit, 125)));
        let mut run = |_: &Case| Ok(Tried::Wrong(Box::new(ended(Kind::Status, 125))));
        let shrunk = shrink(&case(2), ended(Kind::Status, 1), &mut run).unwrap();
        assert_eq!(shrunk.case, case(2));
    }

    #[test]
    fn no_more_is_run_than_a_failure_is_worth() {
        // Each simpler case is right, but for one near the end, again and again.
        let mut runs = 0;
        let mut run = |_: &Case| {
            runs += 1;
            tried(runs % 29 == 0, Kind::Hang)
        };
        let shrunk = shrink(&case(1), failed(Kind::Hang), &mut run).unwrap();
        assert_eq!((shrunk.runs, runs), (MOST + TRIES, MOST + TRIES));
    }

    #[test]
    fn a_campaign_that_is_ended_tells_what_was_found_so_far() {
        let mut runs = 0;
        let mut run = |case: &Case| {
            runs += 1;
            if runs > 7 {
                Ok(Tried::Stopped)
            } else {
                tried(case.plan.rules.iter().any(is_guilty), Kind::Hang)
            }
        };
        let shrunk = shrink(&case(4), failed(Kind::Hang), &mut run).unwrap();
        assert!(shrunk.case.plan.rules.len() < 5 && shrunk.case.plan.rules.iter().any(is_guilty));
        assert_eq!((shrunk.runs, shrunk.again), (7, Again { failed: 0, of: 0 }));
        assert_eq!(runs, 9, "two more were begun, and stopped");
    }

    /// One run in three fails: the tries see that, and it is told.
    #[test]
    fn a_failure_that_comes_and_goes_is_shrunk_and_told_of_as_such() {
        let mut runs = 0;
        let mut run = |case: &Case| {
            runs += 1;
            tried(runs % 3 == 0 && case.plan.rules.iter().any(is_guilty), Kind::Hang)
        };
        let shrunk = shrink(&case(3), failed(Kind::Hang), &mut run).unwrap();
        assert_eq!(shrunk.case.plan.rules.len(), 1);
        assert_eq!(shrunk.again, Again { failed: 1, of: 3 });
    }
}
