// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `umbra bench`.

use super::{kvm_device, parse};
use crate::bench::{bench_cpu, bench_fault, bench_notifier, bench_start};
use crate::engine::kvm::host_facts;
use anyhow::Result;
use clap::{Args, Subcommand};
use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

/// Measure umbra beside something else doing the same work in the same run.
///
/// Absolute figures are this host's. Compare ratios, and look at the distance between min and max before you believe one.
#[derive(Debug, Args)]
pub(super) struct BenchArgs {
    #[command(subcommand)]
    bench: Bench,
    /// Runs of each row that count; one more goes before them.
    #[arg(long, global = true, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    runs: u16,
    /// Print as JSON: {bench, host, rows: [{name, unit, min, median, max, runs}], ratios}.
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// What a first touch of a page costs: umbra, KVM's demand paging, a userfaultfd thread.
    Fault {
        /// Pages to touch.
        #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(1..=1 << 22))]
        pages: u64,
    },
    /// A CPU-bound program as a guest and natively.
    Cpu {
        /// Passes over its memory.
        #[arg(long, value_name = "N", default_value_t = 40, value_parser = clap::value_parser!(u64).range(2..=1_000_000))]
        passes: u64,
    },
    /// From the command to its end, for the smallest guest.
    Start,
    /// What telling 0, 1 and 4 listeners of an invalidation costs: umbra's list, one behind a RwLock, one in an ArcSwap. Needs
    /// no KVM.
    Notifier {
        /// How long each row is measured in each run.
        #[arg(long, value_name = "DURATION", default_value = "50ms", value_parser = parse::duration)]
        window: Duration,
    },
}

pub(super) fn run(args: BenchArgs) -> Result<ExitCode> {
    let facts = host_facts(&kvm_device());
    let needs_kvm = !matches!(args.bench, Bench::Notifier { .. });
    if let Some(obstacle) = facts.obstacle.as_ref().filter(|_| needs_kvm) {
        anyhow::bail!("cannot use KVM: {obstacle}");
    }
    let runs = usize::from(args.runs);
    let live = std::io::stderr().is_terminal();
    let mut progress = |line: &str| {
        if live {
            eprint!("\r\x1b[K{line}");
            let _ = std::io::stderr().flush();
        }
    };
    let report = match args.bench {
        Bench::Fault { pages } => bench_fault(&facts, pages, runs, &mut progress),
        Bench::Cpu { passes } => bench_cpu(&facts, passes, runs, &mut progress),
        Bench::Start => bench_start(&facts, runs, &mut progress),
        Bench::Notifier { window } => bench_notifier(&facts, window, runs, &mut progress),
    };
    progress("");
    let report = report?;
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&report)?)?;
    } else {
        write!(out, "{}", report.text())?;
    }
    Ok(ExitCode::SUCCESS)
}
