// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `bench cpu`: the same CPU-bound program natively and as a guest.
//!
//! The program walks 1 MiB of its memory over and over and computes with what it reads. Its first pass, in which the pages
//! come in, is left out: what is measured is the speed of code that needs nothing from anyone. A pass is long, some 20 ms,
//! because the guest looks at the clock around each, and without a vDSO that is a system call.

use super::{Contestant, Host, Measure, NativeImage, Report, measure, output, ratios, umbra};
use crate::engine::kvm::HostFacts;
use anyhow::{Context, Result};

const PAGES: &str = "256";

/// Runs the benchmark with `passes` passes, `runs` times each.
///
/// # Errors
/// What keeps umbra from running a guest at all.
pub fn bench_cpu(
    facts: &HostFacts,
    passes: u64,
    runs: usize,
    progress: &mut dyn FnMut(&str),
) -> Result<Report> {
    let native = NativeImage::new("touch")?;
    let passes = passes.max(2).to_string();
    let work = ["--time", "--pages", PAGES, "--passes", passes.as_str(), "--spin", "20000"];
    let rows: Vec<Measure<'_>> = vec![
        Contestant::required("umbra", || seconds(&output(umbra()?.args(["run", "touch"]).args(work))?)),
        Contestant::optional("native", || seconds(&output(native.command().args(work))?)),
    ];
    let (rows, missing) = measure("s", runs, rows, progress)?;
    let ratios = ratios(&rows, &[("native", "umbra")]);
    Ok(Report {
        bench: "cpu".into(),
        host: Host::from(facts),
        rows,
        ratios,
        missing,
        notes: Vec::new(),
        lines: Vec::new(),
    })
}

/// The sum of the guest's own times but the first.
fn seconds(printed: &str) -> Result<f64> {
    let times: Vec<f64> = printed
        .lines()
        .filter_map(|line| line.strip_prefix("pass ")?.split(' ').nth(1)?.parse().ok())
        .collect();
    times.get(1..).filter(|rest| !rest.is_empty()).context("the guest printed no times")?;
    Ok(times[1..].iter().sum::<f64>() / 1e9)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_pass_does_not_count() {
        let printed = "pass 1: 9000000000 ns, x\npass 2: 500000000 ns, x\npass 3: 500000000 ns, x\ntouch\n";
        assert_eq!(seconds(printed).unwrap(), 1.0);
        assert!(seconds("pass 1: 5 ns, x\n").is_err());
    }
}
