// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Aging passes on the event loop, and what is told of their results: working set, heat line, heat map.
//!
//! ```text
//! timer ──► Ager::pass ──► Mm::age             clears A everywhere, one generation up
//!                 └──────► HeatMap::sample     a column of the heat map
//! SIGUSR1, end ─► Ager::working_set ─► WorkingSet ─► table, heat line, JSON
//! ```
//! An [`Ager`] belongs to one thread, the event loop's. It takes the mmap lock for reading, through [`Mm`]; faults do that
//! too, so vCPUs go on during a pass, and calls that change mappings wait for it.
//!
//! A pass says "accessed since the pass before". What was accessed after the last pass is therefore not told before the next
//! one; every report says how long ago the last was.

mod heat_map;
mod line;
mod svg;
mod working_set;

pub use heat_map::{HeatMap, MAX_COLUMNS, MAX_ROWS};
pub use line::HeatLine;
pub use svg::draw;
pub use working_set::{VmaAges, WorkingSet, vma_rights};

use crate::stalls::{Times, TimesSummary};
use serde::Serialize;
use shadow_mmu::mm::Mm;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Ages an address space, and remembers what the reports need.
#[derive(Debug)]
pub struct Ager {
    mm: Arc<Mm>,
    every: Duration,
    /// How long each pass took.
    took: Times,
    /// When the clock of the heat map began, and when the last pass ended.
    began: Instant,
    last: Instant,
    skipped: u64,
    map: Option<HeatMap>,
}

/// What aging cost.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct AgingCost {
    /// The interval between passes that was asked for, milliseconds.
    pub interval_ms: f64,
    /// Passes left out because the one before was still running.
    pub skipped: u64,
    /// How long the passes took; `None` where there was none.
    #[serde(flatten)]
    pub passes: Option<TimesSummary>,
}

impl Ager {
    /// For passes over `mm`, `every` so often, of a guest that starts now; who calls [`pass`](Self::pass) sees to that.
    /// `map`: what samples go to.
    pub fn new(mm: Arc<Mm>, every: Duration, map: Option<HeatMap>) -> Self {
        let now = Instant::now();
        Self { mm, every, took: Times::default(), began: now, last: now, skipped: 0, map }
    }

    /// One pass.
    pub fn pass(&mut self) {
        let begin = Instant::now();
        self.mm.age();
        let end = Instant::now();
        self.took.record(end - begin);
        if let Some(map) = &mut self.map {
            map.sample(&self.mm, self.last - self.began, end - self.began);
        }
        self.last = end;
    }

    /// Counts ticks on which no pass was made.
    pub fn skip(&mut self, ticks: u64) {
        self.skipped += ticks;
    }

    /// The working set as of the last pass.
    pub fn working_set(&self) -> WorkingSet {
        WorkingSet::of(&self.mm, self.every, self.last.elapsed())
    }

    /// What the passes so far cost.
    pub fn cost(&self) -> AgingCost {
        AgingCost {
            interval_ms: self.every.as_secs_f64() * 1e3,
            skipped: self.skipped,
            passes: self.took.summary(),
        }
    }

    /// The heat map, where one was asked for.
    pub fn map(&self) -> Option<&HeatMap> {
        self.map.as_ref()
    }
}

impl AgingCost {
    /// For people, one line.
    pub fn text(&self) -> String {
        let interval = humane(self.interval_ms / 1e3);
        match self.passes {
            None => format!("aging     no pass, one each {interval} asked for"),
            Some(times) => format!(
                "aging     {} passes, one each {interval} asked for, {} skipped; they took {:.1} us (median), {:.1} us (p99), {:.1} us (max)",
                times.count, self.skipped, times.median_us, times.p99_us, times.max_us
            ),
        }
    }
}

/// A time in the unit that suits it, as options take it: `2 s`, `100 ms`.
pub fn humane(seconds: f64) -> String {
    let (value, unit) = if seconds >= 1.0 { (seconds, "s") } else { (seconds * 1e3, "ms") };
    let text = format!("{value:.3}");
    format!("{} {unit}", text.trim_end_matches('0').trim_end_matches('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_told_in_the_unit_that_suits_them() {
        for (seconds, told) in
            [(1.0, "1 s"), (0.1, "100 ms"), (2.5, "2.5 s"), (0.000_25, "0.25 ms"), (90.0, "90 s")]
        {
            assert_eq!(humane(seconds), told);
        }
    }
}
