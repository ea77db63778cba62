// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `bench demand_paging`: how fast vCPUs bring in memory that nobody has touched, after the kernel's `demand_paging_test`.
//!
//! Every vCPU writes the first 8 bytes of each page of its own region, once, in order. The machine is made anew for each run.
//!
//! | contestant | who brings a page in |
//! | --- | --- |
//! | `umbra` | umbra, with fault-around as it is by default |
//! | `kvm-demand-paging` | KVM: every spte is there before the clock starts, the memory behind them is not (with that engine alone) |
//! | `userfaultfd-thread` | a thread that serves userfaultfd events, sptes as in the row above (with `-u MISSING`) |
//! | `native` | Linux: the same program as a process |
//!
//! The clock is the guest's own; one page more is touched before it starts. What the selftest gives to `-u MINOR`, pages that
//! are in the page cache and not mapped yet, umbra does not have: see [`UffdMode::Minor`].

use super::memstress::{Memstress, Work};
use super::phases::{Phase, measure_phases, median, selftest_time};
use super::{Contestant, Host, Report, ratios};
use crate::engine::{EngineKind, choice};
use crate::vm::{Tracking, WindowFill};
use anyhow::{Result, bail};
use shadow_mmu::shadow::FaultAroundPolicy;
use std::time::Duration;

const TIME: &str = "Total guest execution time";
const PER_VCPU: &str = "Per-vcpu demand paging rate";
const OVERALL: &str = "Overall demand paging rate";

/// Sptes of a whole mapping at the first fault: a window of this many pages, 16 GiB, is cut to the mapping.
const ALL_AT_ONCE: FaultAroundPolicy = FaultAroundPolicy::Fixed(4 << 20);

/// How userfaultfd is to serve memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UffdMode {
    /// Pages that are not there are filled with zeros.
    Missing,
    /// Pages that are there are only mapped. Refused: a fresh page of umbra's pool is in no page cache, for the pool is a
    /// sparse file, so there is nothing that could be mapped without being filled first.
    Minor,
}

/// What is measured.
#[derive(Debug, Clone)]
pub struct DemandPaging {
    /// vCPUs, and pages of each.
    pub work: Work,
    /// Also measure a thread that serves userfaultfd events.
    pub uffd: Option<UffdMode>,
    /// How long that thread waits before it serves a page.
    pub delay: Duration,
}

impl DemandPaging {
    /// What the delays of all pages add up to: one thread serves them all.
    fn delays(&self) -> Duration {
        let nanoseconds = self.delay.as_nanos().saturating_mul(self.work.total_pages().into());
        Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX))
    }
}

/// Runs the benchmark, `runs` times a contestant.
///
/// # Errors
/// What keeps umbra from running a guest at all; [`UffdMode::Minor`]; a delay without a thread that could wait.
pub fn bench_demand_paging(
    host: &Host,
    options: &DemandPaging,
    runs: usize,
    progress: &mut dyn FnMut(&str),
) -> Result<Report> {
    let DemandPaging { work, uffd, delay } = options;
    match uffd {
        Some(UffdMode::Minor) => bail!(
            "-u MINOR cannot be measured: minor faults are for memory that is in the page cache and not mapped, and a \
             fresh page of umbra's pool is in none; use -u MISSING"
        ),
        None if !delay.is_zero() => bail!("-d delays the userfaultfd thread: give -u MISSING with it"),
        _ => {}
    }
    work.expect_room(1)?;
    let guest = |policy, window| {
        move || {
            let config = work.config(policy, window, Tracking::default());
            populate(Memstress::guest(config, work)?, work, options.delays())
        }
    };
    let mut contestants =
        vec![Contestant::required("umbra", guest(FaultAroundPolicy::Adaptive, WindowFill::Ahead))];
    let mut missing = Vec::new();
    match choice::kind(&crate::cli::engine())? {
        EngineKind::Kvm => contestants
            .push(Contestant::required("kvm-demand-paging", guest(ALL_AT_ONCE, WindowFill::OnDemand))),
        engine => missing.push(format!("kvm-demand-paging: guests run by {engine}, and it is KVM's")),
    }
    if uffd.is_some() {
        let window = WindowFill::Userfaultfd(*delay);
        contestants.push(Contestant::optional("userfaultfd-thread", guest(ALL_AT_ONCE, window)));
    }
    contestants
        .push(Contestant::optional("native", || populate(Memstress::native(work)?, work, Duration::ZERO)));
    let (rows, others_missing) = measure_phases(runs, contestants, progress)?;
    missing.extend(others_missing);

    let overall = |name: &str| format!("{name}.{OVERALL}");
    let (umbra, kvm, thread, native) =
        (overall("umbra"), overall("kvm-demand-paging"), overall("userfaultfd-thread"), overall("native"));
    let ratios = ratios(&rows, &[(&umbra, &kvm), (&umbra, &thread), (&umbra, &native)]);
    let mut lines = Vec::new();
    if let Some(time) = median(&rows, &format!("umbra.{TIME}")) {
        lines.push(format!("{TIME}: {}", selftest_time(time)));
    }
    for (name, unit) in [(PER_VCPU, "pgs/sec/vcpu"), (OVERALL, "pgs/sec")] {
        lines
            .extend(median(&rows, &format!("umbra.{name}")).map(|rate| format!("{name}:\t{rate:.6} {unit}")));
    }
    Ok(Report {
        bench: "demand_paging".into(),
        host: host.clone(),
        rows,
        ratios,
        missing,
        notes: Vec::new(),
        lines,
    })
}

/// Touches everything for the first time, which may take `expected`; rates as the selftest computes them.
fn populate(mut memstress: Memstress, work: &Work, expected: Duration) -> Result<Vec<Phase>> {
    memstress.expect(expected);
    let time = memstress.pass("write")?.time;
    memstress.finish()?;
    let rate = work.pages as f64 / time.as_secs_f64();
    Ok(vec![
        Phase::time(TIME, time),
        Phase::new(PER_VCPU, "pgs/sec/vcpu", rate),
        Phase::new(OVERALL, "pgs/sec", rate * f64::from(work.threads)),
    ])
}
