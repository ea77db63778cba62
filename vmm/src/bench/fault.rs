// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `bench fault`: one guest touching fresh pages, served in several ways.
//!
//! | row | who brings a page in |
//! | --- | --- |
//! | `umbra` | umbra, with fault-around as it is by default |
//! | `umbra-no-fault-around` | umbra, one page a fault |
//! | `kvm-demand-paging` | KVM: every spte is there before the clock starts, the memory behind them is not |
//! | `userfaultfd-thread` | a thread of umbra's that serves userfaultfd events, sptes as in the row above |
//! | `ptrace.umbra`, `ptrace.umbra-no-fault-around` | umbra as in the first two rows, by the ptrace engine |
//! | `native` | Linux: the same program as a process |
//! | `qemu-x86_64` | Linux: the same, translated by qemu |
//!
//! Rows of umbra without a prefix are of the KVM engine, as are the two behind them. The guest times itself, from before the first
//! page to after the last; one further page is touched before.

use super::runners::{Engines, Runners};
use super::{Contestant, Measure, Report, measure, output, ratios, umbra};
use crate::engine::{EngineConfig, EngineKind};
use anyhow::{Context, Result};

/// Runs the benchmark over `pages` pages, `runs` times each.
///
/// # Errors
/// What keeps umbra from running a guest at all.
pub fn bench_fault(
    config: &EngineConfig,
    pages: u64,
    runs: usize,
    progress: &mut dyn FnMut(&str),
) -> Result<Report> {
    let Engines { present, missing, host } = &Engines::of(config)?;
    let run = |engine: EngineKind, options: &'static [&'static str]| {
        move || {
            // Room for the pages, their tables, and the reserve that pages ahead of need stay clear of.
            let memory = format!("{}K", (pages * 4 * 5 / 4).max(1 << 10) + (16 << 10));
            let mut command = umbra()?;
            command.args(["run", "--engine", &engine.to_string(), "--memory", &memory]).args(options);
            command.args(["touch", "--prime", "--time", "--pages", &pages.to_string()]);
            microseconds_a_page(&output(&mut command)?, pages)
        }
    };
    let runners = Runners::new("touch", present)?;
    let count = pages.to_string();
    let args = ["--prime", "--time", "--pages", count.as_str()];
    let mut rows: Vec<Measure<'_>> = Vec::new();
    if present.contains(&EngineKind::Kvm) {
        let run = |options| run(EngineKind::Kvm, options);
        // A window of 16 GiB is cut to the mapping: the first fault maps all of it.
        rows.extend([
            Contestant::required("umbra", run(&[])),
            Contestant::required("umbra-no-fault-around", run(&["--fault-around", "off"])),
            Contestant::required(
                "kvm-demand-paging",
                run(&["--fault-around", "16G", "--window", "on-demand"]),
            ),
            Contestant::optional(
                "userfaultfd-thread",
                run(&["--fault-around", "16G", "--window", "userfaultfd"]),
            ),
        ]);
    }
    if present.contains(&EngineKind::Ptrace) {
        let run = |options| run(EngineKind::Ptrace, options);
        rows.extend([
            Contestant::required("ptrace.umbra", run(&[])),
            Contestant::required("ptrace.umbra-no-fault-around", run(&["--fault-around", "off"])),
        ]);
    }
    rows.extend(runners.others(&args, |printed| microseconds_a_page(printed, pages)));
    let (rows, others_missing) = measure("us/page", runs, rows, progress)?;
    let ratios = ratios(
        &rows,
        &[
            ("umbra", "kvm-demand-paging"),
            ("userfaultfd-thread", "umbra-no-fault-around"),
            ("userfaultfd-thread", "umbra"),
            ("umbra", "native"),
            ("ptrace.umbra", "native"),
            ("ptrace.umbra", "umbra"),
            ("ptrace.umbra-no-fault-around", "umbra-no-fault-around"),
            ("ptrace.umbra", "qemu-x86_64"),
        ],
    );
    Ok(Report {
        bench: "fault".into(),
        host: host.clone(),
        rows,
        ratios,
        missing: missing.iter().cloned().chain(others_missing).collect(),
        notes: Vec::new(),
        lines: Vec::new(),
    })
}

/// From the guest's line `pass 1: T ns, …`.
fn microseconds_a_page(printed: &str, pages: u64) -> Result<f64> {
    let nanoseconds = printed
        .lines()
        .find_map(|line| line.strip_prefix("pass 1: ")?.split(' ').next()?.parse::<f64>().ok())
        .with_context(|| format!("the guest printed no time: {printed:?}"))?;
    Ok(nanoseconds / 1e3 / pages as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_own_time_is_read() {
        assert_eq!(microseconds_a_page("pass 1: 5000 ns, 0.500 us/page\ntouch: …\n", 10).unwrap(), 0.5);
        assert!(microseconds_a_page("touch: 10 pages\n", 10).is_err());
    }
}
