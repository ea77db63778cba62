// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What came of a campaign: for people, and as JSON.

use super::super::points;
use super::case::Case;
use super::judge::{Ending, Failure};
use super::run::RunReport;
use super::shrink::Again;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;
use std::time::Duration;

/// How often a point was drawn, and fired.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct PointCount {
    /// Runs whose plans had a rule of it.
    pub drawn: u64,
    /// Runs in which such a rule fired.
    pub fired: u64,
    /// How often, in all of them.
    pub times: u64,
}

/// A run that was wrong.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FailedRun {
    /// Its number.
    pub run: u64,
    /// In which way, and what was seen of the smallest case.
    #[serde(flatten)]
    pub failure: Failure,
    /// The smallest plan that fails so, as TOML.
    pub plan: String,
    /// The command that replays it, in `folder`.
    pub command: String,
    /// How often that failed when it was run again; `None` if this failure was not shrunk, for there were many before it.
    pub again: Option<Again>,
    /// Runs that shrinking took.
    pub shrink_runs: u32,
    /// Where plan, command and output are.
    pub folder: PathBuf,
}

/// What came of a campaign.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// Of all that was random.
    pub seed: u64,
    /// Runs that were asked for.
    pub asked: u64,
    /// Number of the first.
    pub first: u64,
    /// Runs that were judged.
    pub runs: u64,
    /// Whether somebody ended it before it was done.
    pub interrupted: bool,
    /// How long it took, seconds.
    pub seconds: f64,
    /// How runs ended that were right.
    pub endings: BTreeMap<Ending, u64>,
    /// Runs of each program.
    pub images: BTreeMap<&'static str, u64>,
    /// By name; all that there are.
    pub points: BTreeMap<&'static str, PointCount>,
    /// In the order of their numbers.
    pub failures: Vec<FailedRun>,
}

impl Summary {
    pub(super) fn new(seed: u64, first: u64, asked: u64) -> Self {
        Self {
            seed,
            asked,
            first,
            runs: 0,
            interrupted: false,
            seconds: 0.0,
            endings: BTreeMap::new(),
            images: BTreeMap::new(),
            points: points::all().map(|point| (point.name, PointCount::default())).collect(),
            failures: Vec::new(),
        }
    }

    /// Counts a run that was judged.
    pub(super) fn count(&mut self, case: &Case, report: Option<&RunReport>, ending: Option<Ending>) {
        self.runs += 1;
        *self.images.entry(case.program.image).or_default() += 1;
        if let Some(ending) = ending {
            *self.endings.entry(ending).or_default() += 1;
        }
        let fired = |index: usize| {
            report.and_then(|report| report.rules.get(index)).map_or(0, |account| account.fired)
        };
        // A plan may have a point several times.
        let mut of_points: BTreeMap<&str, u64> = BTreeMap::new();
        for (index, rule) in case.plan.rules.iter().enumerate() {
            *of_points.entry(rule.point.name).or_default() += fired(index);
        }
        for (name, times) in of_points {
            if let Some(count) = self.points.get_mut(name) {
                count.drawn += 1;
                count.fired += u64::from(times > 0);
                count.times += times;
            }
        }
    }

    /// Points that fired in some run.
    pub fn covered(&self) -> usize {
        self.points.values().filter(|count| count.fired > 0).count()
    }

    /// For people; whole lines.
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = self.write(&mut text);
        text
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        let Self { seed, first, asked, runs, seconds, .. } = self;
        let last = first.saturating_add(asked.saturating_sub(1));
        let range = if *first > 0 { format!(", runs {first} to {last}") } else { String::new() };
        writeln!(out, "campaign: seed {seed}{range}: {runs} of {asked} runs in {seconds:.1} s")?;
        if self.interrupted {
            writeln!(out, "  it was ended before it was done")?;
        }
        let ended = |ending| self.endings.get(&ending).copied().unwrap_or(0);
        writeln!(out, "  {:>7} as without umbra", ended(Ending::Equal))?;
        writeln!(out, "  {:>7} the program failed, as the plan wanted", ended(Ending::GuestFailed))?;
        writeln!(out, "  {:>7} umbra gave up and said why, as the plan wanted", ended(Ending::RunFailed))?;
        writeln!(out, "  {:>7} wrong", self.failures.len())?;
        let images: Vec<_> = self.images.iter().map(|(image, runs)| format!("{image} {runs}")).collect();
        writeln!(out, "  programs: {}", images.join(", "))?;
        writeln!(out, "\n  {:<16} {:>8} {:>8} {:>9}", "point", "drawn", "fired", "times")?;
        for (name, PointCount { drawn, fired, times }) in &self.points {
            writeln!(out, "  {name:<16} {drawn:>8} {fired:>8} {times:>9}")?;
        }
        writeln!(out, "  {} of {} points fired", self.covered(), self.points.len())?;
        for failed in &self.failures {
            let FailedRun { run, failure, again, folder, command, plan, shrink_runs } = failed;
            let kind = serde_json::to_string(&failure.kind).unwrap_or_default();
            writeln!(out, "\nrun {run}: {}: {}", kind.trim_matches('"'), failure.detail)?;
            match again {
                Some(Again { failed, of }) => {
                    writeln!(
                        out,
                        "  after {shrink_runs} runs to shrink it, it failed {failed} of {of} times"
                    )?;
                }
                None => writeln!(out, "  not shrunk: there were many before it")?,
            }
            writeln!(out, "  replay: cd {} && {command}", folder.display())?;
            plan.lines().try_for_each(|line| writeln!(out, "    {line}"))?;
        }
        Ok(())
    }
}

/// How far a campaign is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Progress {
    /// Runs that were judged.
    pub runs: u64,
    /// Of so many.
    pub asked: u64,
    /// Runs that were wrong, those included that are being shrunk.
    pub failures: u64,
    /// Points that fired in some run.
    pub covered: usize,
    /// Since it began.
    pub took: Duration,
}

impl Progress {
    /// In one line, without its end.
    pub fn line(&self) -> String {
        let Self { runs, asked, failures, covered, took } = self;
        let points = points::all().count();
        let left = match *runs {
            0 => String::new(),
            done => {
                let each = took.as_secs_f64() / done as f64;
                format!(", {:.0} s left", each * asked.saturating_sub(done) as f64)
            }
        };
        format!(
            "campaign: {runs} of {asked} runs, {failures} wrong, {covered} of {points} points fired{left}"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::super::draw::Deck;
    use super::super::judge::Kind;
    use super::*;
    use crate::inject::RuleAccount;

    fn report(case: &Case, fired: u64) -> RunReport {
        let account =
            |rule: &crate::inject::Rule| RuleAccount { rule: rule.headline(), eligible: fired, fired };
        RunReport { rules: case.plan.rules.iter().map(account).collect(), ..RunReport::default() }
    }

    #[test]
    fn a_run_counts_once_for_each_point_of_its_plan() {
        let mut summary = Summary::new(1, 0, 3);
        let mut case = Deck::new(1).case(0);
        let rule = case.plan.rules[0].clone();
        case.plan.rules = vec![rule.clone(), rule.clone()];
        summary.count(&case, Some(&report(&case, 2)), Some(Ending::Equal));
        summary.count(&case, Some(&report(&case, 0)), Some(Ending::Equal));
        summary.count(&case, None, None);
        assert_eq!(summary.points[rule.point.name], PointCount { drawn: 3, fired: 1, times: 4 });
        assert_eq!((summary.runs, summary.covered(), summary.endings[&Ending::Equal]), (3, 1, 2));
    }

    #[test]
    fn a_failure_is_told_with_its_plan_and_how_to_replay_it() {
        let mut summary = Summary::new(5, 10, 3);
        summary.failures.push(FailedRun {
            run: 12,
            failure: Failure { kind: Kind::LeftBehind, detail: "tmp/x".into() },
            plan: "[[fault]]\npoint = 'kick'\n".into(),
            command: "umbra inject plan.toml".into(),
            again: Some(Again { failed: 2, of: 3 }),
            shrink_runs: 9,
            folder: "kept/run-12".into(),
        });
        let text = summary.text();
        for part in [
            "seed 5, runs 10 to 12",
            "run 12: left-behind: tmp/x",
            "failed 2 of 3",
            "cd kept/run-12 && umbra inject plan.toml",
            "    point = 'kick'",
        ] {
            assert!(text.contains(part), "no {part} in {text}");
        }
        let json = serde_json::to_value(&summary).unwrap();
        assert_eq!(json["failures"][0]["kind"], "left-behind");
        assert_eq!(json["failures"][0]["again"]["failed"], 2);
        assert!(json["points"]["frame-alloc"]["drawn"].is_u64());
    }

    #[test]
    fn the_last_number_that_there_can_be_is_told() {
        let text = Summary::new(5, u64::MAX - 1, 3).text();
        assert!(text.contains(&format!("runs {} to {}", u64::MAX - 1, u64::MAX)), "{text}");
    }

    #[test]
    fn progress_says_how_long_it_may_take() {
        let progress =
            Progress { runs: 10, asked: 30, failures: 1, covered: 4, took: Duration::from_secs(20) };
        let line = progress.line();
        assert!(line.contains("10 of 30 runs, 1 wrong, 4 of ") && line.ends_with("40 s left"), "{line}");
    }
}
