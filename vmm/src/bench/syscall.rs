// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `bench syscall`: what a system call costs by each engine, natively, and translated by qemu.
//!
//! | row | what is called |
//! | --- | --- |
//! | `WHO.getpid` | a call that is answered at once |
//! | `WHO.clock_gettime` | one that writes 16 bytes to the caller's memory |
//! | `WHO.mmap` | a page that is mapped, touched and unmapped: two calls and a fault |
//!
//! The guest, `syscalls`, times many calls in a row with its own clock. With umbra the call is answered by umbra, natively and
//! with qemu by Linux.

use super::Report;
use super::phases::{Phase, measure_phases};
use super::runners::{Engines, NATIVE, QEMU, Runners, ratios_of, umbra_with};
use crate::engine::{EngineConfig, EngineKind};
use anyhow::{Result, ensure};

/// Phases of the guest, as suffixes of rows' names.
const CALLS: [&str; 3] = [".getpid", ".clock_gettime", ".mmap"];

/// Runs the benchmark with `calls` calls of each kind, `runs` times a contestant.
///
/// # Errors
/// What keeps umbra from running a guest at all.
pub fn bench_syscall(
    config: &EngineConfig,
    calls: u64,
    runs: usize,
    progress: &mut dyn FnMut(&str),
) -> Result<Report> {
    let Engines { present, missing, host } = &Engines::of(config)?;
    let runners = Runners::new("syscalls", present)?;
    let calls = calls.to_string();
    let args = ["--calls", calls.as_str()];
    let (rows, others_missing) = measure_phases(runs, runners.contestants(&args, microseconds), progress)?;
    let mut pairs = vec![(umbra_with(EngineKind::Ptrace), umbra_with(EngineKind::Kvm))];
    for &engine in present {
        pairs.extend([(umbra_with(engine), NATIVE), (umbra_with(engine), QEMU)]);
    }
    Ok(Report {
        bench: "syscall".into(),
        host: host.clone(),
        ratios: ratios_of(&rows, &CALLS, &pairs),
        rows,
        missing: missing.iter().cloned().chain(others_missing).collect(),
        notes: Vec::new(),
        lines: Vec::new(),
    })
}

/// From the guest's lines `CALL: T ns, N times`.
fn microseconds(printed: &str) -> Result<Vec<Phase>> {
    let each = printed.lines().filter_map(|line| {
        let (call, rest) = line.split_once(": ")?;
        let (nanoseconds, times) = rest.strip_suffix(" times")?.split_once(" ns, ")?;
        let (nanoseconds, times): (f64, f64) = (nanoseconds.parse().ok()?, times.parse().ok()?);
        Some(Phase::new(call, "us/call", nanoseconds / times / 1e3))
    });
    let each: Vec<_> = each.collect();
    ensure!(each.len() == CALLS.len(), "the guest printed no times: {printed:?}");
    Ok(each)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

    use super::*;

    #[test]
    fn a_call_is_one_of_many() {
        let printed = "getpid: 5000 ns, 10 times\nclock_gettime: 1 ns, 1 times\nmmap: 1 ns, 1 times\n";
        let phases = microseconds(printed).unwrap();
        assert_eq!((phases[0].name.as_str(), phases[0].value), ("getpid", 0.5));
        assert!(microseconds("getpid: 5000 ns, 10 times\n").is_err());
    }
}
