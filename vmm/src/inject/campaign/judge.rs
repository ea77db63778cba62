// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What may have happened in a run, and what must not.
//!
//! What is allowed follows from the rules that fired, by what their points promise ([`Rule::outcome`]), and from nothing else: a rule
//! that did not fire allows nothing.
//!
//! | worst outcome that fired | status | stdout |
//! | --- | --- | --- |
//! | none, or `Unseen` | 0 | the native one |
//! | `GuestFails` | 0 | the native one |
//! | | the program's own failure, or 128 + a signal that the rule may bring | whole lines of the native one, the last may be cut |
//! | | 125 with a reason, where it was about starting a guest | the same |
//! | `RunFails` | 0, or 125 with a reason | the same |
//!
//! Whatever fired: no hang, no panic, no finding of `--check`, no death of umbra's, nothing leaked, nothing left behind. Where data
//! was corrupted stdout is not looked at. A guest that finds memory of its own changed is right, and umbra wrong, unless a rule that
//! fired changes memory or lets system calls fail. Several guests' lines come in any order.

use super::super::plan::{Memory, Rule, What};
use super::super::points;
use super::case::Case;
use super::native::Native;
use super::run::{End, Observed};
use crate::cli::FAILED;
use crate::report::signal_name;
use serde::Serialize;
use shadow_mmu::inject::{FRAME_ALLOC, Outcome, TABLE_ALLOC};
use std::collections::BTreeMap;

/// How a run ended, where that was right.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ending {
    /// As without umbra.
    Equal,
    /// The program failed, as the plan wanted.
    GuestFailed,
    /// umbra gave the run up, and said why.
    RunFailed,
}

/// In which way a run was wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// It did not end.
    Hang,
    /// umbra panicked.
    Panic,
    /// `--check` found something, or did not take place.
    Audit,
    /// A signal ended umbra itself.
    Killed,
    /// There is no report, or not of this plan.
    NoReport,
    /// The process still had something of the run's.
    Leak,
    /// There were files in its folders, or processes.
    LeftBehind,
    /// The status is not one that the rules that fired allow.
    Status,
    /// What the guest said is wrong.
    Output,
    /// It failed without saying why.
    NoReason,
}

/// A run that was wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Failure {
    /// In which way.
    pub kind: Kind,
    /// What was seen.
    pub detail: String,
}

/// Who says whether a run was right: [`judge`], but for tests.
pub type Judge = fn(&Case, &Native, &Observed) -> Result<Ending, Failure>;

fn fail<T>(kind: Kind, detail: impl Into<String>) -> Result<T, Failure> {
    Err(Failure { kind, detail: detail.into() })
}

/// Statuses of the bundled guests' own: a failure, a wrong command line, a panic, a relocation that cannot be.
const OWN: [i32; 4] = [1, 2, 101, 127];

/// Says how the run of `case` ended.
///
/// # Errors
/// It was wrong.
pub fn judge(case: &Case, native: &Native, seen: &Observed) -> Result<Ending, Failure> {
    umbra_is_well(seen)?;
    let report = match &seen.report {
        Some(report) if report.rules.len() == case.plan.rules.len() => report,
        Some(_) => return fail(Kind::NoReport, "the report has other rules than the plan"),
        None => return fail(Kind::NoReport, "there is no report"),
    };
    let rules = case.plan.rules.iter().zip(&report.rules);
    let fired: Vec<&Rule> = rules.filter(|(_, account)| account.fired > 0).map(|(rule, _)| rule).collect();
    if let Some(leak) = report.leaks.first() {
        return fail(Kind::Leak, format!("{leak} (1 of {})", report.leaks.len()));
    }
    let worst = fired.iter().map(|rule| rule.outcome()).max().unwrap_or(Outcome::Unseen);
    // What is documented to be written where a vCPU is lost.
    let may_stay = |name: &&String| worst == Outcome::RunFails && name.starts_with("cwd/umbra-report-");
    if let Some(left) = seen.left.iter().find(|name| !may_stay(name)) {
        return fail(Kind::LeftBehind, left.clone());
    }
    let ending = ending(case, seen, &fired, worst)?;
    if ending != Ending::RunFailed && !seen.stderr.lines().any(is_clean_check) {
        return fail(Kind::Audit, "`--check` did not say that it found nothing");
    }
    if !fired.iter().any(|rule| may_change_memory(rule))
        && let Some(line) = seen.stderr.lines().find(|line| tells_of_wrong_memory(line))
    {
        return fail(Kind::Output, format!("the guest says: {line}"));
    }
    if !fired.iter().any(|rule| rule.corrupts()) {
        said_right(case, native, seen, ending)?;
    }
    Ok(ending)
}

/// Whatever was injected, umbra neither hangs nor panics nor finds itself in disorder.
fn umbra_is_well(seen: &Observed) -> Result<(), Failure> {
    if seen.end == End::TimedOut {
        return fail(Kind::Hang, "it did not end in time, and was killed");
    }
    for line in seen.stderr.lines() {
        // A guest's own panic has no thread in it.
        if line.starts_with("thread '") && line.contains("panicked at") {
            return fail(Kind::Panic, line);
        }
        if line.starts_with("umbra: check: ") && !is_clean_check(line) {
            return fail(Kind::Audit, line);
        }
        if line.starts_with("umbra: ") && line.contains("bug of umbra's") {
            return fail(Kind::Panic, line);
        }
    }
    match seen.end {
        End::Signaled(signal) => fail(Kind::Killed, format!("{} ended umbra itself", signal_name(signal))),
        _ => Ok(()),
    }
}

fn is_clean_check(line: &str) -> bool {
    line.starts_with("umbra: check: ") && line.ends_with(" audits clean, no free frame written")
}

/// Lines of umbra's that say why something failed.
fn has_reason(stderr: &str) -> bool {
    // What is said of every run, or says only that there was a failure.
    let besides = ["check:", "inject:", "deterministic:", "to replay it:", "pages a second written"];
    stderr.lines().filter_map(|line| line.strip_prefix("umbra: ")).any(|said| {
        let says_that = said.starts_with("guest ") && said.contains(" exited with status ");
        let is_besides = says_that
            || said.contains(" pages a second written")
            || besides.iter().any(|besides| said.starts_with(besides));
        !is_besides && said.len() > 13
    })
}

/// Whether a guest may not even start because of it. One that only waits there does start.
fn is_before_the_guest(rule: &Rule) -> bool {
    let is_there = [&FRAME_ALLOC, &TABLE_ALLOC, &points::THREAD_START].contains(&rule.point);
    is_there && matches!(rule.effect, What::Error(_))
}

/// Whether umbra says of a guest that was running that it cannot go on.
fn has_lost_a_guest(stderr: &str) -> bool {
    stderr.lines().any(|line| line.starts_with("umbra: ") && line.contains(" is lost: "))
}

/// Whether a guest may rightly find another content than it wrote. Where system calls fail, it may have been wrong itself. Of what
/// happens to memory only poison takes the content; slow, revoked, failing and scarce memory holds what it held.
fn may_change_memory(rule: &Rule) -> bool {
    let fails_a_call = rule.point == &points::SYSCALL && matches!(rule.effect, What::Error(_));
    rule.corrupts() || fails_a_call || matches!(rule.effect, What::Memory(Memory::Poison, _))
}

/// How the bundled guests say that memory of theirs holds something else than they wrote.
fn tells_of_wrong_memory(line: &str) -> bool {
    (line.contains(": expected 0x") && line.contains(", got 0x"))
        || line.ends_with(" does not hold what was written to it")
}

/// Signals that end a guest because of `rule`.
fn signals(rule: &Rule) -> &'static [i32] {
    use libc::{SIGABRT, SIGBUS, SIGILL, SIGKILL, SIGSEGV};
    if rule.outcome() == Outcome::Unseen {
        return &[];
    }
    match &rule.effect {
        _ if rule.corrupts() => &[SIGABRT, SIGBUS, SIGILL, SIGKILL, SIGSEGV],
        // SIGSEGV, too, where the frame of a signal finds no room.
        What::Memory(Memory::Sigbus | Memory::Poison, _) => &[SIGBUS, SIGSEGV],
        What::Memory(Memory::Revoke, _) => &[SIGSEGV],
        What::Memory(..) => &[SIGKILL, SIGSEGV],
        // Programs that go on without looking.
        What::Error(_) if rule.point == &points::SYSCALL => &[SIGABRT, SIGBUS, SIGILL, SIGSEGV],
        _ if is_before_the_guest(rule) => &[SIGKILL, SIGSEGV],
        _ => &[],
    }
}

fn ending(case: &Case, seen: &Observed, fired: &[&Rule], worst: Outcome) -> Result<Ending, Failure> {
    let End::Exited(status) = seen.end else { return fail(Kind::Status, "it has none") };
    if status == 0 {
        return Ok(Ending::Equal);
    }
    let because = if fired.is_empty() {
        "no rule fired".to_owned()
    } else {
        fired.iter().map(|rule| rule.headline()).collect::<Vec<_>>().join("; ")
    };
    let refused = || fail(Kind::Status, format!("status {status}, although {because}"));
    if worst == Outcome::Unseen {
        return refused();
    }
    if status == i32::from(FAILED) {
        let before = || fired.iter().any(|rule| is_before_the_guest(rule)) && !has_lost_a_guest(&seen.stderr);
        if worst != Outcome::RunFails && !before() {
            return refused();
        }
        return match has_reason(&seen.stderr) {
            true => Ok(Ending::RunFailed),
            false => fail(Kind::NoReason, format!("status {status} without a word; {because}")),
        };
    }
    let timed_out = case.plan.rules.iter().any(Rule::corrupts).then_some(libc::SIGKILL);
    let mut allowed = fired.iter().flat_map(|rule| signals(rule)).copied().chain(timed_out);
    // What only umbra may fail by reaches no guest.
    if !fired.iter().any(|rule| rule.outcome() == Outcome::GuestFails) {
        return refused();
    }
    match status - 128 {
        signal if signal > 0 && !allowed.any(|allowed| allowed == signal) => refused(),
        signal if signal > 0 && !has_reason(&seen.stderr) => {
            fail(Kind::NoReason, format!("{} without a word; {because}", signal_name(signal)))
        }
        signal if signal > 0 || OWN.contains(&status) => Ok(Ending::GuestFailed),
        _ => refused(),
    }
}

/// Numbers of nanoseconds are of no interest.
fn timeless(line: &str) -> String {
    let words: Vec<&str> = line.split(' ').collect();
    let is_time = |at: usize| words.get(at + 1).is_some_and(|next| next.trim_end_matches(',') == "ns");
    let kept = words.iter().enumerate().map(|(at, word)| if is_time(at) { "T" } else { *word });
    kept.collect::<Vec<_>>().join(" ")
}

/// Every line that was written is one that the program writes natively; and all of them, where it ended well.
fn said_right(case: &Case, native: &Native, seen: &Observed, ending: Ending) -> Result<(), Failure> {
    let mut left: BTreeMap<String, u64> = BTreeMap::new();
    let others = u64::from(case.settings.guests.saturating_sub(1));
    for (text, times) in [(&native.first, 1), (&native.other, others)] {
        text.lines().for_each(|line| *left.entry(timeless(line)).or_default() += times);
    }
    let mut said = seen.stdout.as_str();
    // Who fails may do so in the middle of a line.
    if let (Some(cut), true) =
        (said.rfind('\n').map_or(Some(0), |end| Some(end + 1)), ending != Ending::Equal)
    {
        let (whole, rest) = said.split_at(cut);
        if rest.is_empty() || left.keys().any(|line| line.starts_with(rest)) {
            said = whole;
        }
    }
    for line in said.lines() {
        match left.get_mut(&timeless(line)) {
            Some(times) if *times > 0 => *times -= 1,
            _ => return fail(Kind::Output, format!("it wrote {line:?}, which it does not write natively")),
        }
    }
    match left.iter().find(|(_, times)| **times > 0) {
        Some((line, times)) if ending == Ending::Equal => {
            fail(Kind::Output, format!("it ended with 0, but {line:?} is missing, {times} times"))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
#[path = "judge_tests.rs"]
mod tests;
