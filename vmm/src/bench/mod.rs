// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Benchmarks: what umbra costs, beside something else doing the same work in the same run.
//!
//! Every benchmark gives rows of one unit each, with the least, the median and the greatest of several runs, and ratios of
//! medians. The runs of all rows take turns, so that a machine that changes its speed changes it for all of them. The
//! absolute figures are the host's; compare ratios.

mod access_tracking;
mod age;
mod age_overhead;
mod contestant;
mod cpu;
mod demand_paging;
mod dirty_log;
mod fault;
mod ksm;
mod linux;
mod memstress;
mod notifier;
mod phases;
mod runners;
mod start;
mod syscall;
mod told;
mod userfault;

pub use memstress::{Memstress, Pass, Work};
pub use userfault::WindowHandler;

use crate::engine::{Engine, EngineKind, HostFacts};
use anyhow::{Context, Result, bail};
use contestant::{Contestant, take_turns};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;

pub use access_tracking::bench_access_tracking;
pub use age::bench_age;
pub use age_overhead::{AgeOverhead, bench_age_overhead};
pub use cpu::bench_cpu;
pub use demand_paging::{DemandPaging, UffdMode, bench_demand_paging};
pub use dirty_log::{DirtyLogWork, bench_dirty_log};
pub use fault::bench_fault;
pub use ksm::{
    Compat, CompatMode, KsmWork, MergeType, Mix, NotOk, Shares, bench_ksm, bench_ksm_compat, draw_ksm,
};
pub use notifier::bench_notifier;
pub use start::bench_start;
pub use syscall::bench_syscall;

/// What the figures were measured on.
#[derive(Debug, Clone, Serialize)]
pub struct Host {
    /// What ran the guests; `None` where there were none.
    pub engine: Option<EngineKind>,
    /// What KVM runs on; `none` where it did not run them.
    pub kvm_backend: String,
    /// Kernel release.
    pub kernel: String,
    /// CPU model.
    pub cpu: String,
    /// CPUs.
    pub cpus: usize,
}

impl Host {
    /// Where guests run by `engine`.
    pub fn of(engine: &dyn Engine) -> Self {
        Self::new(Some(engine.kind()), engine.facts())
    }

    /// Where none run.
    fn without_guests() -> Self {
        Self::new(None, HostFacts::with(None))
    }

    fn new(engine: Option<EngineKind>, facts: HostFacts) -> Self {
        let kvm_backend = facts.kvm_backend();
        let HostFacts { kernel, cpu, cpus, .. } = facts;
        Self { engine, kvm_backend, kernel, cpu, cpus }
    }
}

/// One thing measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// What.
    pub name: String,
    /// In what.
    pub unit: String,
    /// The least of the runs.
    pub min: f64,
    /// Half of the runs are below.
    pub median: f64,
    /// The greatest.
    pub max: f64,
    /// How many there were.
    pub runs: usize,
}

impl Row {
    /// A row of `values`, which are not empty.
    fn of(name: &str, unit: &str, mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let (runs, last) = (values.len(), values.len() - 1);
        let median = (values[last / 2] + values[runs / 2]) / 2.0;
        Self { name: name.into(), unit: unit.into(), min: values[0], median, max: values[last], runs }
    }
}

/// A benchmark's result; every one has this shape in JSON.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Which benchmark.
    pub bench: String,
    /// Where.
    pub host: Host,
    /// The figures.
    pub rows: Vec<Row>,
    /// Medians, one over another: `a/b`. And what a benchmark gives a name of its own.
    pub ratios: BTreeMap<String, f64>,
    /// What could not be measured, and why.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub missing: Vec<String>,
    /// What must be known of figures that were measured.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// umbra's medians once more, as the kernel's selftest of the same name prints them, or held against what was promised;
    /// empty where there is neither.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub lines: Vec<String>,
}

impl Report {
    /// For people.
    pub fn text(&self) -> String {
        let Host { engine, kvm_backend, kernel, cpu, cpus } = &self.host;
        let place = engine.map_or_else(String::new, |engine| format!(" {}", engine.place(kvm_backend)));
        let mut out = format!("{}{place}, Linux {kernel}, {cpu}, {cpus} CPUs\n", self.bench);
        for line in &self.lines {
            out += &format!("{line}\n");
        }
        let width = self.rows.iter().map(|row| row.name.len()).max().unwrap_or(0).max(4);
        if !self.rows.is_empty() {
            let heads = ["min", "median", "max"].map(|head| format!("{head:>10}")).join(" ");
            out += &format!("{:<width$} {heads} {:>5}  unit\n", "row", "runs");
        }
        for Row { name, unit, min, median, max, runs } in &self.rows {
            // Millions of something need no fractions, and no wider columns; small parts of something need more.
            let digits = match *max {
                large if large >= 1e5 => 0,
                small if small > 0.0 && small < 0.1 => 6,
                _ => 3,
            };
            out += &format!(
                "{name:<width$} {min:>10.digits$} {median:>10.digits$} {max:>10.digits$} {runs:>5}  {unit}\n"
            );
        }
        for (name, ratio) in &self.ratios {
            out += &format!("{name}: {ratio:.3}\n");
        }
        for line in &self.missing {
            out += &format!("not measured: {line}\n");
        }
        for line in &self.notes {
            out += &format!("note: {line}\n");
        }
        out
    }
}

/// One row to be measured: a run gives one figure.
type Measure<'a> = Contestant<'a, f64>;

/// Measures `rows` in turn, `runs` times each after one turn that does not count, and names those that could not be measured.
///
/// # Errors
/// Those of [`take_turns`].
fn measure(
    unit: &str,
    runs: usize,
    rows: Vec<Measure<'_>>,
    progress: &mut dyn FnMut(&str),
) -> Result<(Vec<Row>, Vec<String>)> {
    let (turns, missing) = take_turns(runs, rows, progress)?;
    Ok((turns.into_iter().map(|(name, values)| Row::of(name, unit, values)).collect(), missing))
}

/// Medians of `rows`, one over another, for the pairs of names of which both were measured.
fn ratios(rows: &[Row], pairs: &[(&str, &str)]) -> BTreeMap<String, f64> {
    let median = |name: &str| rows.iter().find(|row| row.name == name).map(|row| row.median);
    pairs
        .iter()
        .filter_map(|(a, b)| Some((format!("{a}/{b}"), median(a)? / median(b)?)))
        .filter(|(_, ratio)| ratio.is_finite())
        .collect()
}

/// This very program's file.
fn executable() -> Result<PathBuf> {
    std::env::current_exe().context("cannot find umbra's own executable")
}

/// This very program, to run guests as a user would; by the engine that is measured.
fn umbra() -> Result<Command> {
    let mut command = Command::new(executable()?);
    command.env(crate::cli::ENGINE, crate::cli::engine().choice.to_string());
    Ok(command)
}

/// Runs a command to its end and returns what it printed.
fn output(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?} failed ({}): {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A bundled guest as an executable file, for native runs; it is gone when this is dropped.
#[derive(Debug)]
struct NativeImage(std::fs::File);

impl NativeImage {
    fn new(name: &str) -> Result<Self> {
        use std::io::Write;
        use std::os::fd::FromRawFd;
        let image = guest_images::find(name).with_context(|| format!("no bundled guest {name}"))?;
        // SAFETY: the name is a C string; the call touches no memory of ours.
        let fd = unsafe { libc::memfd_create(c"umbra-native".as_ptr(), 0) };
        if fd < 0 {
            return Err(std::io::Error::last_os_error()).context("memfd_create");
        }
        // SAFETY: the kernel just made it for us and nobody else knows it.
        let mut file = unsafe { std::fs::File::from_raw_fd(fd) };
        file.write_all(image.elf).context("cannot write a memfd")?;
        Ok(Self(file))
    }

    fn command(&self) -> Command {
        Command::new(self.path())
    }

    /// As a program that this one starts sees it too.
    fn path(&self) -> String {
        use std::os::fd::AsRawFd;
        format!("/proc/self/fd/{}", self.0.as_raw_fd())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_has_the_middle_of_its_values() {
        let row = Row::of("x", "s", vec![3.0, 1.0, 2.0]);
        assert_eq!((row.min, row.median, row.max, row.runs), (1.0, 2.0, 3.0, 3));
        assert_eq!(Row::of("x", "s", vec![4.0, 1.0]).median, 2.5);
    }

    #[test]
    fn a_row_that_cannot_be_measured_is_named_and_the_rest_is_measured() {
        let rows: Vec<Measure<'_>> =
            vec![Contestant::required("good", || Ok(2.0)), Contestant::optional("bad", || bail!("no root"))];
        let (rows, missing) = measure("s", 3, rows, &mut |_| {}).unwrap();
        assert_eq!(rows.len(), 1);
        assert_eq!(missing, ["bad: no root"]);
        assert!(ratios(&rows, &[("good", "bad")]).is_empty());
        assert_eq!(ratios(&rows, &[("good", "good")])["good/good"], 1.0);
    }
}
