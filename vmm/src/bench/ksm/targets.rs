// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What was promised of umbra's page sharing beside ksmd's, and whether this run kept it.

use super::program::Rewritten;
use crate::bench::Row;
use crate::bench::phases::median;
use std::collections::BTreeMap;

/// A bound that a figure is to keep.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

/// Two rows, of which the first is divided by the second; or one alone.
type Figure = (&'static str, Option<&'static str>);

/// Of memory that nobody changes.
const IDLE_PASS: &str = "CPU of a pass over unchanged memory";

const TARGETS: [(&str, Figure, Bound); 6] = [
    ("saved", ("umbra.saved_bytes", Some("ksmd.saved_bytes")), Bound::AtLeast(1.0)),
    (
        "CPU a merged page, first pass",
        ("ksmd.cpu_us_per_merged_page", Some("umbra.cpu_us_per_merged_page")),
        Bound::AtLeast(4.0),
    ),
    (IDLE_PASS, ("ksmd.idle_pass_cpu_s", Some("umbra.idle_pass_cpu_s")), Bound::AtLeast(50.0)),
    (
        "CPU while 1 % is rewritten a second",
        ("ksmd.rewrite_cpu_s", Some("umbra.rewrite_cpu_s")),
        Bound::AtLeast(10.0),
    ),
    ("metadata, bytes a frame of the pool", ("umbra.metadata_bytes_per_page", None), Bound::AtMost(16.0)),
    ("slowdown while scanning", ("umbra.guest_slowdown", Some("ksmd.guest_slowdown")), Bound::AtMost(1.0)),
];

/// The figures that were promised, by name, and lines that hold them against the promise. What was not measured is left out, and
/// so is what is promised of unchanged memory where there is a `background` that changes it.
pub(super) fn targets(rows: &[Row], background: Option<Rewritten>) -> (BTreeMap<String, f64>, Vec<String>) {
    let (mut ratios, mut lines) = (BTreeMap::new(), Vec::new());
    for (what, (over, under), bound) in TARGETS {
        if what == IDLE_PASS && background.is_some() {
            continue;
        }
        let Some(over_median) = median(rows, over) else { continue };
        let (name, value) = match under {
            None => (over.to_owned(), over_median),
            Some(under) => {
                let Some(under_median) = median(rows, under) else { continue };
                (format!("{over}/{under}"), over_median / under_median)
            }
        };
        // Nothing was saved, or so little spent that the clock does not show it.
        if value.is_nan() {
            lines.push(format!("{what}: {name} cannot be told, both are 0"));
            continue;
        }
        let (words, limit, is_kept) = match bound {
            Bound::AtLeast(limit) => ("at least", limit, value >= limit),
            Bound::AtMost(limit) => ("at most", limit, value <= limit),
        };
        let verdict = if is_kept { "" } else { ": missed" };
        let figure = match value.is_finite() {
            true => format!("{value:.3}"),
            false => format!("without bound, for {} is 0", under.unwrap_or_default()),
        };
        lines.push(format!("{what}: {name} {figure} (target: {words} {limit}{verdict})"));
        // JSON has no such number.
        if under.is_some() && value.is_finite() {
            ratios.insert(name, value);
        }
    }
    (ratios, lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_measured_is_held_against_its_target() {
        let row = |name: &str, value| Row::of(name, "s", vec![value]);
        let rows = [
            row("umbra.saved_bytes", 100.0),
            row("ksmd.saved_bytes", 100.0),
            row("umbra.idle_pass_cpu_s", 0.1),
            row("ksmd.idle_pass_cpu_s", 2.0),
            row("umbra.metadata_bytes_per_page", 17.0),
            row("umbra.guest_slowdown", 0.0),
            row("ksmd.guest_slowdown", 0.0),
            row("umbra.rewrite_cpu_s", 1.0),
        ];
        let (ratios, lines) = targets(&rows, None);
        assert_eq!(ratios.len(), 2);
        assert_eq!(ratios["umbra.saved_bytes/ksmd.saved_bytes"], 1.0);
        assert_eq!(ratios["ksmd.idle_pass_cpu_s/umbra.idle_pass_cpu_s"], 20.0);
        let ends = [
            "(target: at least 1)",
            "(target: at least 50: missed)",
            "(target: at most 16: missed)",
            "umbra.guest_slowdown/ksmd.guest_slowdown cannot be told, both are 0",
        ];
        assert_eq!(lines.len(), ends.len(), "{lines:?}");
        for (line, end) in lines.iter().zip(ends) {
            assert!(line.ends_with(end), "{line}");
        }
        // While pages are rewritten no pass is idle.
        let (ratios, rewritten) = targets(&rows, Some(Rewritten::Own));
        assert_eq!((ratios.len(), rewritten.len()), (1, ends.len() - 1));
        assert!(rewritten.iter().all(|line| !line.contains("idle_pass")), "{rewritten:?}");
    }

    #[test]
    fn a_cost_that_the_clock_does_not_show_keeps_its_target() {
        let row = |name: &str, value| Row::of(name, "s", vec![value]);
        let lines = |name: &str, umbra, ksmd| {
            let rows = [row(&format!("umbra.{name}"), umbra), row(&format!("ksmd.{name}"), ksmd)];
            let (ratios, lines) = targets(&rows, None);
            assert!(ratios.is_empty(), "JSON has no such number: {ratios:?}");
            lines
        };
        assert_eq!(
            lines("idle_pass_cpu_s", 0.0, 2.0),
            [
                "CPU of a pass over unchanged memory: ksmd.idle_pass_cpu_s/umbra.idle_pass_cpu_s without bound, \
              for umbra.idle_pass_cpu_s is 0 (target: at least 50)"
            ]
        );
        let slower = lines("guest_slowdown", 1.0, 0.0);
        assert!(slower[0].ends_with("(target: at most 1: missed)"), "{slower:?}");
    }
}
