// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which flush methods this host honours: what is tried, what is concluded, and the report.
//!
//! The trying itself, with a real guest on two vCPUs, is in `probe_guest`. A method is chosen if it was tried and never
//! stale. Methods that were not tried are not used. One of those chosen must be [full](FlushMethod::is_full).

use super::KvmVm;
use super::error::KvmError;
use super::flush::FlushMethod;
use super::host::Backend;
use super::probe_guest::{Pace, Prober, with_guest};
use crate::engine::SetupError;
use serde::Serialize;
use shadow_mmu::sync::Arc;
use std::fmt;

/// How much the probe does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effort {
    /// The methods that fit the backend, a round or so each: for every start. Stale translations show at once where they
    /// show at all (in every round of thousands, on every host measured).
    Quick,
    /// All methods and kinds of change, and the control: for `umbra doctor`. About 0.3 ms a round, 20 rows.
    Thorough {
        /// Rounds for each row.
        rounds: u32,
    },
}

/// What the probe does to the entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// The entry goes; the vCPUs must fault.
    Zap,
    /// Another frame takes its place; the old one must not be written any more.
    ChangeFrame,
    /// W goes; the vCPUs must fault.
    WriteProtect,
    /// D goes; the next write must set it again.
    ClearDirty,
}

impl Change {
    /// Every kind.
    pub const ALL: [Self; 4] = [Self::Zap, Self::ChangeFrame, Self::WriteProtect, Self::ClearDirty];
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Zap => "zap",
            Self::ChangeFrame => "change frame",
            Self::WriteProtect => "write-protect",
            Self::ClearDirty => "clear D",
        })
    }
}

/// What became of one method and one kind of change.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FlushRow {
    /// How it was flushed.
    pub method: FlushMethod,
    /// What was changed before.
    pub change: Change,
    /// How often.
    pub rounds: u32,
    /// In how many rounds a vCPU used the old translation after the flush had returned.
    pub stale: u32,
    /// Median time of the flush, with both vCPUs running; microseconds.
    pub median_us: f64,
    /// Why the host refused the method; it was not tried then.
    pub refused: Option<String>,
}

/// What [`KvmVm::probe_flush`] found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FlushReport {
    /// How KVM runs guests here.
    pub backend: Backend,
    /// A row for every method and kind of change that was tried.
    pub rows: Vec<FlushRow>,
    /// The methods that may be used: tried, and never stale.
    pub chosen: Vec<FlushMethod>,
    /// Whether A, once cleared, stays clear under accesses until the entry is flushed.
    pub a_bit_needs_flush: bool,
}

/// What is tried, in this order: a method and the kinds of change.
type Plan = Vec<(FlushMethod, &'static [Change])>;

/// What a quick probe tries: what the strategy of this backend is made of. process_madvise(2) is the same mechanism as
/// madvise(2), so it is enough to see that the kernel takes the call.
fn quick_plan(backend: Backend) -> Plan {
    use FlushMethod::{AlternateRoot, DummySlot, ProcessMadvise, WindowMadvise};
    let last: (_, &[_]) = if backend.is_two_dimensional() {
        (AlternateRoot, &Change::ALL)
    } else {
        (DummySlot, &[Change::ChangeFrame])
    };
    vec![(WindowMadvise, &Change::ALL), (ProcessMadvise, &[Change::Zap]), last]
}

fn thorough_plan() -> Plan {
    let methods = [FlushMethod::Nothing].into_iter().chain(FlushMethod::ALL);
    methods.map(|method| (method, &Change::ALL[..])).collect()
}

fn row(
    prober: &mut Prober<'_>,
    method: FlushMethod,
    change: Change,
    rounds: u32,
) -> Result<FlushRow, KvmError> {
    let mut row = FlushRow { method, change, rounds, stale: 0, median_us: 0.0, refused: None };
    let mut times = Vec::new();
    for _ in 0..rounds {
        match prober.round(method, change)? {
            Ok(round) => {
                row.stale += u32::from(round.stale);
                times.push(round.took.as_secs_f64() * 1e6);
            }
            Err(error) => {
                row.refused = Some(error.to_string());
                break;
            }
        }
    }
    times.sort_by(f64::total_cmp);
    row.median_us = times.get(times.len() / 2).copied().unwrap_or(0.0);
    Ok(row)
}

/// Tries a plan; a method that the host refuses once is not tried again.
fn try_plan(
    prober: &mut Prober<'_>,
    plan: &Plan,
    rounds: u32,
    rows: &mut Vec<FlushRow>,
) -> Result<(), KvmError> {
    for &(method, changes) in plan {
        for &change in changes {
            let row = row(prober, method, change, rounds)?;
            let refused = row.refused.is_some();
            rows.push(row);
            if refused {
                break;
            }
        }
    }
    Ok(())
}

/// The methods that were tried and passed every time.
fn passed(rows: &[FlushRow]) -> Vec<FlushMethod> {
    let tried = |method| rows.iter().filter(move |row| row.method == method);
    let good = |row: &FlushRow| row.stale == 0 && row.refused.is_none();
    let passed = |&method: &FlushMethod| tried(method).count() > 0 && tried(method).all(good);
    FlushMethod::ALL.into_iter().filter(passed).collect()
}

/// Whether these methods can do all that a flush strategy has to.
fn are_enough(methods: &[FlushMethod]) -> bool {
    methods.iter().any(|method| method.is_full())
}

fn probe(prober: &mut Prober<'_>, backend: Backend, effort: Effort) -> Result<FlushReport, KvmError> {
    let (plan, rounds, a_bit_rounds) = match effort {
        Effort::Quick => (quick_plan(backend), 1, 2),
        Effort::Thorough { rounds } => (thorough_plan(), rounds.max(1), 20),
    };
    let mut rows = Vec::new();
    let mut a_bit_needs_flush = false;
    for _ in 0..a_bit_rounds {
        // A translation may be lost by chance, and A come back with it: once is enough.
        a_bit_needs_flush |= prober.a_stays_clear()?;
    }
    try_plan(prober, &plan, rounds, &mut rows)?;
    if !are_enough(&passed(&rows)) {
        let others =
            FlushMethod::ALL.into_iter().filter(|method| plan.iter().all(|(tried, _)| tried != method));
        try_plan(prober, &others.map(|method| (method, &Change::ALL[..])).collect(), rounds, &mut rows)?;
    }
    let chosen = passed(&rows);
    if !are_enough(&chosen) {
        return Err(KvmError::NoFlush { tried: summary(&rows) });
    }
    Ok(FlushReport { backend, rows, chosen, a_bit_needs_flush })
}

fn summary(rows: &[FlushRow]) -> String {
    let bad = rows.iter().filter(|row| row.stale != 0 || row.refused.is_some());
    let words = bad.map(|row| match &row.refused {
        Some(refused) => format!("{}: {refused}", row.method),
        None => format!("{}: stale after {} {} of {} times", row.method, row.change, row.stale, row.rounds),
    });
    words.collect::<Vec<_>>().join("; ")
}

impl KvmVm {
    /// Finds out which flush methods this host honours and what it does with A, and goes by that from now on. To be called
    /// once, before guests run: the methods flush the whole VM, and the two vCPUs it makes stay parked for the first guest
    /// threads.
    ///
    /// # Errors
    /// [`KvmError::NoFlush`] if none works, [`KvmError::Probe`] if the probe's guest does not run, and what
    /// [`create_vcpu`](crate::engine::Engine::create_vcpu) says.
    pub fn probe_flush(self: &Arc<Self>, effort: Effort) -> Result<FlushReport, SetupError> {
        let backend = self.facts.backend;
        let pace = if effort == Effort::Quick { Pace::Napping } else { Pace::Spinning };
        let report = with_guest(self, pace, |prober| probe(prober, backend, effort))?;
        self.flusher.learn(&report);
        Ok(report)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(method: FlushMethod, stale: u32, refused: Option<&str>) -> FlushRow {
        let refused = refused.map(str::to_owned);
        FlushRow { method, change: Change::Zap, rounds: 3, stale, median_us: 1.0, refused }
    }

    #[test]
    fn only_what_was_tried_and_never_stale_is_chosen() {
        let rows = [
            row(FlushMethod::Nothing, 0, None),
            row(FlushMethod::WindowMadvise, 0, None),
            row(FlushMethod::WindowMadvise, 1, None),
            row(FlushMethod::ProcessMadvise, 0, Some("invalid")),
            row(FlushMethod::DummySlot, 0, None),
        ];
        assert_eq!(passed(&rows), [FlushMethod::DummySlot]);
        assert_eq!(summary(&rows), "madvise: stale after zap 1 of 3 times; process_madvise: invalid");
    }
}
