// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `bench cpu`: the same CPU-bound program by each engine, natively, and translated by qemu.
//!
//! The program, `compute`, has work of several kinds, which take about the same time each where the CPU itself runs them. A row
//! `WHO` is the sum of all kinds, `WHO.KIND` is one. A kind's first round, in which its pages come in, is left out by the guest:
//! what is measured is the speed of code that needs nothing from anyone.
//!
//! A translator's slowdown depends on the kind far more than anything else here does. So beside the ratio of sums, in which the
//! worst kind weighs most, there is the geometric mean of the kinds' ratios.

use super::Report;
use super::phases::{Phase, measure_phases};
use super::runners::{Engines, NATIVE, QEMU, Runners, ratios_of, umbra_with};
use crate::engine::EngineConfig;
use anyhow::{Result, ensure};

/// Phases of the guest, as suffixes of rows' names.
const KINDS: [&str; 5] = [".chain", ".sort", ".calls", ".bytes", ".floats"];
/// The phase whose row has the contestant's own name.
const SUM: &str = "sum";

/// Runs the benchmark with `passes` rounds of each kind of work, `runs` times a contestant.
///
/// # Errors
/// What keeps umbra from running a guest at all.
pub fn bench_cpu(
    config: &EngineConfig,
    passes: u64,
    runs: usize,
    progress: &mut dyn FnMut(&str),
) -> Result<Report> {
    let Engines { present, missing, host } = &Engines::of(config)?;
    let runners = Runners::new("compute", present)?;
    let passes = passes.to_string();
    let args = ["--rounds", passes.as_str()];
    let (mut rows, others_missing) = measure_phases(runs, runners.contestants(&args, seconds), progress)?;
    for row in &mut rows {
        if let Some(name) = row.name.strip_suffix(SUM).and_then(|name| name.strip_suffix('.')) {
            row.name = name.to_owned();
        }
    }
    let pairs: Vec<_> = present
        .iter()
        .flat_map(|&engine| [(NATIVE, umbra_with(engine)), (QEMU, umbra_with(engine))])
        .collect();
    let mut ratios = ratios_of(&rows, &[""], &pairs);
    for pair in pairs {
        let kinds = ratios_of(&rows, &KINDS, &[pair]);
        if !kinds.is_empty() {
            let mean = kinds.values().map(|ratio| ratio.ln()).sum::<f64>() / kinds.len() as f64;
            ratios.insert(format!("{}/{} (geometric mean)", pair.0, pair.1), mean.exp());
        }
        ratios.extend(kinds);
    }
    Ok(Report {
        bench: "cpu".into(),
        host: host.clone(),
        rows,
        ratios,
        missing: missing.iter().cloned().chain(others_missing).collect(),
        notes: Vec::new(),
        lines: Vec::new(),
    })
}

/// From the guest's lines `KIND: T ns, checksum …`: their sum, and each.
fn seconds(printed: &str) -> Result<Vec<Phase>> {
    let each = printed.lines().filter_map(|line| {
        let (kind, rest) = line.split_once(": ")?;
        let nanoseconds: f64 = rest.split_once(" ns, checksum ")?.0.parse().ok()?;
        Some(Phase::new(kind, "s", nanoseconds / 1e9))
    });
    let each: Vec<_> = each.collect();
    ensure!(each.len() == KINDS.len(), "the guest printed no times: {printed:?}");
    let sum = each.iter().map(|phase| phase.value).sum();
    Ok(std::iter::once(Phase::new(SUM, "s", sum)).chain(each).collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

    use super::*;

    #[test]
    fn the_sum_is_of_all_kinds() {
        let printed: String =
            KINDS.iter().map(|kind| format!("{}: 500000000 ns, checksum 0\n", &kind[1..])).collect();
        let phases = seconds(&printed).unwrap();
        assert_eq!((phases.len(), phases[0].name.as_str(), phases[0].value), (6, SUM, 2.5));
        assert_eq!((phases[1].name.as_str(), phases[1].value), ("chain", 0.5));
        assert!(seconds("chain: 5 ns, checksum 0\n").is_err());
    }
}
