// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Benchmarks that go through phases: each run of a contestant gives several figures, one a phase.
//!
//! As in [`measure`](super::measure) the contestants [take turns](take_turns).

use super::Row;
use super::contestant::{Contestant, take_turns};
use anyhow::Result;
use std::collections::BTreeMap;
use std::time::Duration;

/// One figure of a run.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Phase {
    /// As the kernel's selftest names it.
    pub(super) name: String,
    pub(super) unit: &'static str,
    pub(super) value: f64,
}

impl Phase {
    pub(super) fn new(name: impl Into<String>, unit: &'static str, value: f64) -> Self {
        Self { name: name.into(), unit, value }
    }

    /// In milliseconds, of which the table shows three decimals: some phases take a few microseconds.
    pub(super) fn time(name: impl Into<String>, time: Duration) -> Self {
        Self::new(name, "ms", time.as_secs_f64() * 1e3)
    }
}

/// Rows `CONTESTANT.PHASE` of `runs` runs each, in the order of the first run, and what could not be measured.
///
/// # Errors
/// Those of [`take_turns`].
pub(super) fn measure_phases(
    runs: usize,
    contestants: Vec<Contestant<'_, Vec<Phase>>>,
    progress: &mut dyn FnMut(&str),
) -> Result<(Vec<Row>, Vec<String>)> {
    let (turns, missing) = take_turns(runs, contestants, progress)?;
    let rows = turns.into_iter().flat_map(|(name, turns)| {
        let mut figures = Figures::default();
        turns.into_iter().for_each(|phases| figures.add(phases));
        figures.rows(name)
    });
    Ok((rows.collect(), missing))
}

/// The figures of one contestant, by phase.
#[derive(Debug, Clone, Default)]
struct Figures {
    order: Vec<(String, &'static str)>,
    values: BTreeMap<String, Vec<f64>>,
}

impl Figures {
    fn add(&mut self, phases: Vec<Phase>) {
        for Phase { name, unit, value } in phases {
            if !self.values.contains_key(&name) {
                self.order.push((name.clone(), unit));
            }
            self.values.entry(name).or_default().push(value);
        }
    }

    fn rows(mut self, contestant: &str) -> Vec<Row> {
        let row = |(name, unit): &(String, &'static str)| {
            let values = self.values.remove(name)?;
            Some(Row::of(&format!("{contestant}.{name}"), unit, values))
        };
        self.order.iter().filter_map(row).collect()
    }
}

/// The median of a row, if it was measured.
pub(super) fn median(rows: &[Row], name: &str) -> Option<f64> {
    rows.iter().find(|row| row.name == name).map(|row| row.median)
}

/// Milliseconds as the kernel's selftests print a time: `%ld.%.9lds`.
pub(super) fn selftest_time(milliseconds: f64) -> String {
    format!("{:.9}s", milliseconds / 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::bail;

    #[test]
    fn each_phase_is_a_row() {
        let mut turn = 0.0;
        let good = Contestant::required("good", || {
            turn += 1.0;
            Ok(vec![Phase::new("b", "s", turn), Phase::new("a", "pages", 7.0)])
        });
        let bad = Contestant::optional("bad", || bail!("no root"));
        let (rows, missing) = measure_phases(3, vec![good, bad], &mut |_| {}).unwrap();
        assert_eq!(missing, ["bad: no root"]);
        let names: Vec<_> = rows.iter().map(|row| (row.name.as_str(), row.unit.as_str(), row.runs)).collect();
        assert_eq!(names, [("good.b", "s", 3), ("good.a", "pages", 3)]);
        // The first turn does not count.
        assert_eq!((rows[0].min, median(&rows, "good.b")), (2.0, Some(3.0)));
        assert!(measure_phases(0, Vec::new(), &mut |_| {}).is_err());
    }

    #[test]
    fn times_look_like_the_selftests() {
        assert_eq!(selftest_time(1500.0), "1.500000000s");
    }
}
