// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `bench access_tracking`: how long touching memory takes before and after it was marked idle, after the kernel's
//! `access_tracking_perf_test`.
//!
//! | phase | what |
//! | --- | --- |
//! | `Populating memory` | every page written for the first time |
//! | `Writing to populated memory`, `Reading from populated memory` | the same again, with nothing to be done for anybody |
//! | `Mark memory idle (…)` | who was accessed is noted and forgotten: by one aging pass (`lru_gen`) or by Linux (`clear_refs`) |
//! | `Writing to idle memory` | the accesses are found by the CPU, or by faults where it sets no A |
//! | `Mark memory idle (…), again` | as above (the selftest prints it by the same name) |
//! | `Reading from idle memory` | |
//! | `Still idle` | the highest share of pages, at both markings, that had been touched just before and were not found accessed |
//!
//! As the selftest, this warns where that share is 10 % or more. Times of accesses are the guest's own, from the first vCPU's
//! start to the last one's end; the others are taken from outside.
//!
//! | contestant | who notes accesses |
//! | --- | --- |
//! | `umbra` | umbra, over a guest |
//! | `native` | Linux, over the same program as a process: `Referenced` of smaps is read, 1 written to clear_refs |

use super::linux::LinuxPages;
use super::memstress::{Memstress, Work};
use super::phases::{Phase, measure_phases, median, selftest_time};
use super::{Contestant, Host, Report, ratios};
use crate::vm::{Accesses, AdBitsUse, Tracking, WindowFill};
use anyhow::{Context, Result};
use shadow_mmu::addr::{HvaRange, PAGE_SIZE};
use shadow_mmu::mm::PageAge;
use shadow_mmu::shadow::FaultAroundPolicy;
use std::time::{Duration, Instant};

const POPULATE: &str = "Populating memory";
const WRITE: &str = "Writing to populated memory";
const READ: &str = "Reading from populated memory";
const MARK: &str = "Mark memory idle";
const WRITE_IDLE: &str = "Writing to idle memory";
const READ_IDLE: &str = "Reading from idle memory";
const STILL_IDLE: &str = "Still idle";

/// Runs the benchmark over `work`, `runs` times a contestant.
///
/// # Errors
/// What keeps umbra from running a guest at all.
pub fn bench_access_tracking(
    host: &Host,
    work: &Work,
    runs: usize,
    progress: &mut dyn FnMut(&str),
) -> Result<Report> {
    work.expect_room(1)?;
    let contestants =
        vec![Contestant::required("umbra", || guest(work)), Contestant::optional("native", || native(work))];
    let (rows, missing) = measure_phases(runs, contestants, progress)?;
    let of = |contestant: &str, phase: &str| format!("{contestant}.{phase}");
    let ratios = ratios(
        &rows,
        &[
            (&of("native", &marked("clear_refs")), &of("umbra", &marked("lru_gen"))),
            (&of("umbra", WRITE_IDLE), &of("umbra", WRITE)),
            (&of("umbra", READ_IDLE), &of("umbra", READ)),
            (&of("native", WRITE_IDLE), &of("native", WRITE)),
            (&of("native", READ_IDLE), &of("native", READ)),
        ],
    );
    let mark = marked("lru_gen");
    let again = format!("{mark}, again");
    let phases = [
        (POPULATE, POPULATE),
        (WRITE, WRITE),
        (READ, READ),
        (&mark, &mark),
        (WRITE_IDLE, WRITE_IDLE),
        (&again, &mark),
    ];
    let mut lines: Vec<String> = phases
        .into_iter()
        .chain([(READ_IDLE, READ_IDLE)])
        .filter_map(|(row, name)| {
            Some(format!("{name}: {}", selftest_time(median(&rows, &of("umbra", row))?)))
        })
        .collect();
    if let Some(share) = median(&rows, &of("umbra", STILL_IDLE)) {
        let verdict =
            if share < 10.0 { "" } else { ": WARNING: too many pages were touched and not found accessed" };
        lines.push(format!("{STILL_IDLE}: {share:.2}%{verdict}"));
    }
    Ok(Report {
        bench: "access_tracking".into(),
        host: host.clone(),
        rows,
        ratios,
        missing,
        notes: Vec::new(),
        lines,
    })
}

fn marked(by: &str) -> String {
    format!("{MARK} ({by})")
}

/// One marking: how long it took, and pages that it found accessed.
struct Marking {
    time: Duration,
    young: u64,
}

fn guest(work: &Work) -> Result<Vec<Phase>> {
    let config = work.config(FaultAroundPolicy::Adaptive, WindowFill::Ahead, TOLD);
    let memstress = Memstress::guest(config, work)?;
    phases(memstress, work, "lru_gen", mark_by_aging)
}

fn mark_by_aging(memstress: &Memstress, region: HvaRange) -> Result<Marking> {
    let mm = memstress.expect_machine()?.mm();
    let began = Instant::now();
    mm.age();
    let time = began.elapsed();
    let mut young = 0;
    mm.for_each_age(|_, range, age| {
        if age == PageAge::Passes(0) {
            young += pages_within(range, region);
        }
    });
    Ok(Marking { time, young })
}

fn native(work: &Work) -> Result<Vec<Phase>> {
    phases(Memstress::native(work)?, work, "clear_refs", |memstress, region| {
        let pid = memstress.pid().context("memstress is no process")?;
        let pages = LinuxPages::new(pid, region);
        let began = Instant::now();
        let young = pages.referenced()?;
        pages.clear_referenced()?;
        Ok(Marking { time: began.elapsed(), young })
    })
}

/// Of a guest that is aged or whose writes are logged: pages that come ahead of need are old until they are touched.
pub(super) const TOLD: Tracking =
    Tracking { accesses: Accesses::Told, ad_bits: AdBitsUse::Engine, ring_entries: None };

/// Pages of `range` that are in `region`.
pub(super) fn pages_within(range: HvaRange, region: HvaRange) -> u64 {
    let (start, end) = (range.start.0.max(region.start.0), range.end.0.min(region.end.0));
    end.saturating_sub(start) / PAGE_SIZE
}

fn phases(
    mut memstress: Memstress,
    work: &Work,
    by: &str,
    mark: impl Fn(&Memstress, HvaRange) -> Result<Marking>,
) -> Result<Vec<Phase>> {
    let region = memstress.region()?;
    let mut phases = Vec::new();
    let mut most_idle: f64 = 0.0;
    let touch = |memstress: &mut Memstress, command| memstress.pass(command).map(|pass| pass.time);
    for (name, command) in [(POPULATE, "write"), (WRITE, "write"), (READ, "read")] {
        phases.push(Phase::time(name, touch(&mut memstress, command)?));
    }
    for (suffix, name, command) in [("", WRITE_IDLE, "write"), (", again", READ_IDLE, "read")] {
        let Marking { time, young } = mark(&memstress, region)?;
        phases.push(Phase::time(format!("{}{suffix}", marked(by)), time));
        let total = work.total_pages();
        most_idle = most_idle.max(total.saturating_sub(young) as f64 * 100.0 / total as f64);
        phases.push(Phase::time(name, touch(&mut memstress, command)?));
    }
    phases.push(Phase::new(STILL_IDLE, "%", most_idle));
    memstress.finish()?;
    Ok(phases)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

    use super::*;
    use shadow_mmu::addr::Hva;

    #[test]
    fn what_was_brought_in_ahead_of_need_is_idle() {
        let work = Work::new(1, 640);
        let config = work.config(FaultAroundPolicy::Fixed(16), WindowFill::Ahead, TOLD);
        if crate::engine::testing::guests().is_none() {
            return;
        }
        let mut memstress = Memstress::guest(config, &work).unwrap();
        let region = memstress.region().unwrap();
        memstress.pass("write every 16").unwrap();
        let young = mark_by_aging(&memstress, region).unwrap().young;
        // 40, and perhaps some that the CPU looked at ahead of an access; not the fifteen that came with each.
        assert!((40..320).contains(&young), "{young}");
        memstress.finish().unwrap();
    }

    #[test]
    fn only_pages_of_the_region_count() {
        let range = |start, end| HvaRange { start: Hva(start), end: Hva(end) };
        let region = range(0x2000, 0x6000);
        assert_eq!(pages_within(range(0, 0x9000), region), 4);
        assert_eq!(pages_within(range(0x3000, 0x9000), region), 3);
        assert_eq!(pages_within(range(0x6000, 0x9000), region), 0);
        assert_eq!(pages_within(range(0, 0x1000), region), 0);
    }
}
