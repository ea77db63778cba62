// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The modes of the kernel's ksm_tests (tools/testing/selftests/mm), run against umbra's page sharing: with its options -p, -l,
//! -z, -s and -t, with the lines that it prints, so that results compare by name, and with its exit status, 1 where a check
//! fails ([`NotOk`]).
//!
//! | mode | what |
//! | --- | --- |
//! | `-M` | equal pages are merged, as many as there should be |
//! | `-U` | two merged pages that are written are not merged any more |
//! | `-Z` | pages of zeros are merged with each other, or (`-z 1`) with the zero page |
//! | `-P` | how fast an area of equal pages is merged |
//! | `-D` | how fast madvise takes that back |
//! | `-C` | writing to every other of 4,000 pages, not merged and merged |
//!
//! Not `-N` and the option `-m`, for umbra's guests have one NUMA node, nor `-H`, for they have no huge pages; nor the options `-a`,
//! for the rights of memory make no difference to what is merged, and `-d`, for `umbra run --ksm-report` has the counters.

use super::phases::{ScanPace, Side, wait_for_passes};
use super::umbra::UmbraSide;
use super::{expect_room, mix};
use crate::bench::contestant::Contestant;
use crate::bench::phases::{Phase, measure_phases, median};
use crate::bench::{Host, Report, Row};
use anyhow::{Context, Result};
use shadow_mmu::ksm::{KsmSettings, KsmStats, ZeroPages};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// A check failed, as opposed to what keeps umbra from running it: the selftest's `Not OK`, and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct NotOk(pub(super) String);

/// Pages of `-C`.
const COW_PAGES: u64 = 4000;
const PAGES_PER_MIB: u64 = 256;

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CompatMode {
    /// `-M`
    Merge,
    /// `-U`
    Unmerge,
    /// `-Z`
    ZeroPages,
    /// `-P`
    MergeTime,
    /// `-D`
    UnmergeTime,
    /// `-C`
    CowTime,
}

/// How memory is said to be mergeable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MergeType {
    /// madvise(2)
    Madvise,
    /// prctl(PR_SET_MEMORY_MERGE): all of it.
    Prctl,
}

/// A mode and its options.
#[derive(Debug, Clone)]
pub struct Compat {
    /// What is done.
    pub mode: CompatMode,
    /// `-p`: pages, at least 1.
    pub pages: u64,
    /// `-l`: at most so long until two passes are over.
    pub limit: Duration,
    /// `-z`
    pub zero_pages: ZeroPages,
    /// `-s`: what `-P` and `-D` are about.
    pub mib: Option<u64>,
    /// `-t`
    pub merge_type: MergeType,
}

impl Compat {
    fn area(&self) -> Result<u64> {
        Ok(match self.mode {
            CompatMode::Merge | CompatMode::ZeroPages => self.pages,
            CompatMode::Unmerge => 2,
            CompatMode::CowTime => COW_PAGES,
            CompatMode::MergeTime | CompatMode::UnmergeTime => {
                let mib = self.mib.context("-P and -D need -s, the size of the area in MiB")?;
                mib.saturating_mul(PAGES_PER_MIB)
            }
        })
    }
}

/// Runs a mode, `runs` times after one that does not count; the lines have medians.
///
/// # Errors
/// What keeps umbra from running a guest; [`NotOk`] where a mode that checks finds something wrong, or passes take too long.
pub fn bench_ksm_compat(
    host: &Host,
    options: &Compat,
    runs: usize,
    progress: &mut dyn FnMut(&str),
) -> Result<Report> {
    let area = options.area()?;
    expect_room(area)?;
    let contestants = vec![Contestant::required("umbra", || run(options, area))];
    let (rows, missing) = measure_phases(runs, contestants, progress)?;
    let lines = lines(options.mode, area, &rows);
    let bench = "ksm-kernel-compat".into();
    let (ratios, notes) = (BTreeMap::new(), Vec::new());
    Ok(Report { bench, host: host.clone(), rows, ratios, missing, notes, lines })
}

/// Where the times of `-C` come from.
const NOT_MERGED: &str = "Not merged pages";
const MERGED: &str = "Merged pages";
const TOTAL_TIME: &str = "Total time";

fn lines(mode: CompatMode, area: u64, rows: &[Row]) -> Vec<String> {
    // Whole MiB, as the kernel's has it.
    let size = format!("Total size:    {} MiB", area / PAGES_PER_MIB);
    // Spaces as the kernel has them: -C has one more in front of a time than the others.
    let times = |name: &str, space: &str, mib: u64| -> Vec<String> {
        let seconds = median(rows, &format!("umbra.{name}")).unwrap_or(f64::NAN);
        vec![
            format!("{TOTAL_TIME}:{space}{seconds:.9} s"),
            format!("Average speed:  {:.3} MiB/s", mib as f64 / seconds),
        ]
    };
    let heading = |words: &str| vec![String::new(), format!("{words}:")];
    match mode {
        CompatMode::Merge | CompatMode::Unmerge | CompatMode::ZeroPages => vec!["OK".into()],
        CompatMode::MergeTime | CompatMode::UnmergeTime => {
            [vec![size], times(TOTAL_TIME, "    ", area / PAGES_PER_MIB)].concat()
        }
        CompatMode::CowTime => {
            let written = area / 2 / PAGES_PER_MIB;
            let [not_merged, merged] =
                [NOT_MERGED, MERGED].map(|which| times(&time_of(which), "     ", written));
            [vec![size], heading(NOT_MERGED), not_merged, heading(MERGED), merged].concat()
        }
    }
}

fn time_of(which: &str) -> String {
    format!("{which}: {TOTAL_TIME}")
}

fn run(options: &Compat, area: u64) -> Result<Vec<Phase>> {
    let words = ["--pages".to_owned(), area.to_string()];
    let settings = KsmSettings { zero_pages: options.zero_pages, ..KsmSettings::default() };
    let mut side = UmbraSide::start(&words, area, settings)?;
    let seconds = |name: &str, time: Duration| Phase::new(name, "s", time.as_secs_f64());
    let phases = match options.mode {
        CompatMode::Merge => {
            side.program().command("fill same")?;
            merge(&mut side, options)?;
            expect_counts(&side, area)?
        }
        CompatMode::Unmerge => {
            side.program().command("fill same")?;
            merge(&mut side, options)?;
            expect_counts(&side, 2)?;
            side.program().command("poke 1")?;
            wait_for_passes(&mut side, 1, options.limit)?;
            expect_counts(&side, 0)?
        }
        CompatMode::ZeroPages => {
            side.program().command("fill zeros")?;
            merge(&mut side, options)?;
            match options.zero_pages {
                ZeroPages::Keep => expect_counts(&side, area)?,
                ZeroPages::Share => {
                    let zero = side.stats().ksm_zero_pages;
                    if zero < area {
                        return Err(NotOk(format!("ksm_zero_pages is {zero}, not {area}")).into());
                    }
                    expect_counts(&side, 0)?
                }
            }
        }
        CompatMode::MergeTime => {
            side.program().command("fill same")?;
            vec![seconds(TOTAL_TIME, merge(&mut side, options)?)]
        }
        CompatMode::UnmergeTime => {
            side.program().command("fill same")?;
            merge(&mut side, options)?;
            vec![seconds(TOTAL_TIME, side.program().timed("unmergeable")?)]
        }
        CompatMode::CowTime => {
            side.program().command("fill same")?;
            let not_merged = side.program().timed("poke 2")?;
            side.program().command("fill pairs")?;
            merge(&mut side, options)?;
            let merged = side.program().timed("poke 2")?;
            vec![seconds(&time_of(NOT_MERGED), not_merged), seconds(&time_of(MERGED), merged)]
        }
    };
    side.program().verify()?;
    side.finish()?;
    Ok(phases)
}

/// Until two passes are over, since a page is merged in its second. How long that took, with all that belongs to it.
fn merge(side: &mut UmbraSide, options: &Compat) -> Result<Duration> {
    let began = Instant::now();
    match options.merge_type {
        MergeType::Madvise => side.program().command("mergeable")?,
        MergeType::Prctl => side.merge_any()?,
    }
    side.scan(ScanPace::Full)?;
    wait_for_passes(side, 2, options.limit)?;
    Ok(began.elapsed())
}

/// The counters are those of `equal` equal pages, and nothing else is shared.
fn expect_counts(side: &UmbraSide, equal: u64) -> Result<Vec<Phase>> {
    check_counts(&side.stats(), equal, side.sharing_limit())?;
    Ok(Vec::new())
}

fn check_counts(stats: &KsmStats, equal: u64, limit: u64) -> Result<(), NotOk> {
    let (shared, sharing) = (mix::shared(equal, limit), mix::sharing(equal, limit));
    if (stats.pages_shared, stats.pages_sharing) == (shared, sharing) {
        return Ok(());
    }
    Err(NotOk(format!(
        "pages_shared is {} and pages_sharing {}; {equal} equal pages make {shared} and {sharing}",
        stats.pages_shared, stats.pages_sharing
    )))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

    use super::*;

    #[test]
    fn lines_are_those_of_the_selftest() {
        let row = |name: &str, value| Row::of(&format!("umbra.{name}"), "s", vec![value]);
        assert_eq!(lines(CompatMode::Merge, 10, &[]), ["OK"]);
        assert_eq!(
            lines(CompatMode::MergeTime, 100 * 256, &[row("Total time", 0.5)]),
            ["Total size:    100 MiB", "Total time:    0.500000000 s", "Average speed:  200.000 MiB/s"]
        );
        let rows = [row("Not merged pages: Total time", 0.5), row("Merged pages: Total time", 2.0)];
        assert_eq!(
            lines(CompatMode::CowTime, COW_PAGES, &rows),
            [
                "Total size:    15 MiB",
                "",
                "Not merged pages:",
                "Total time:     0.500000000 s",
                "Average speed:  14.000 MiB/s",
                "",
                "Merged pages:",
                "Total time:     2.000000000 s",
                "Average speed:  3.500 MiB/s",
            ]
        );
    }

    #[test]
    fn counters_that_are_not_as_they_should_be_are_not_ok() {
        let stats = KsmStats { pages_shared: 2, pages_sharing: 298, ..KsmStats::default() };
        assert_eq!(check_counts(&stats, 300, 256), Ok(()));
        for wrong in [
            KsmStats { pages_shared: 3, ..stats },
            KsmStats { pages_sharing: 297, ..stats },
            KsmStats { pages_sharing: 299, ..stats },
        ] {
            let why = check_counts(&wrong, 300, 256).unwrap_err();
            assert!(why.to_string().contains("300 equal pages make 2 and 298"), "{why}");
            // And is known as such by whoever prints it.
            let umbra = Contestant::required("umbra", || Err(why.clone().into()));
            assert!(measure_phases(1, vec![umbra], &mut |_| {}).unwrap_err().is::<NotOk>());
        }
    }

    #[test]
    fn an_area_needs_a_size() {
        let compat = Compat {
            mode: CompatMode::MergeTime,
            pages: 10,
            limit: Duration::from_secs(1),
            zero_pages: ZeroPages::Keep,
            mib: None,
            merge_type: MergeType::Madvise,
        };
        assert!(compat.area().unwrap_err().to_string().contains("-s"));
        assert_eq!(Compat { mib: Some(3), ..compat.clone() }.area().unwrap(), 768);
        assert_eq!(Compat { mode: CompatMode::Merge, ..compat }.area().unwrap(), 10);
    }
}
