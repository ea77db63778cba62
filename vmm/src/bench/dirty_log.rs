// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `bench dirty_log`: what logging writes costs, after the kernel's `dirty_log_perf_test`.
//!
//! | phase | what |
//! | --- | --- |
//! | `Populate memory time` | every page written for the first time |
//! | `Enabling dirty logging time` | |
//! | `Iteration N dirty memory time` | a pass over the memory, whose writes are logged |
//! | `Iteration N get dirty log time` | the log is read (and, with `-g`, armed again) |
//! | `Iteration N clear dirty log time` | what was read is cleared, and armed again; not with `-g` |
//! | `Disabling dirty logging time` | |
//! | `Get dirty log`, `Clear dirty log` | the mean of an iteration |
//! | `Dirty pages` | in the last log, of the memory that is touched |
//!
//! With rings (`-M ring`) reading the log is harvesting and resetting every vCPU's ring; there is no clearing. A vCPU whose
//! ring is full waits, so they are also collected in the middle of a pass when one is.
//!
//! | contestant | who logs |
//! | --- | --- |
//! | `umbra` | umbra, over a guest |
//! | `native` | Linux, over the same program as a process: soft-dirty bits of pagemap, cleared by clear_refs, if the kernel has them |
//!
//! Where every page is written (`-w 100`, in order) the log must hold every page, or the benchmark fails.

use super::access_tracking::{TOLD, pages_within};
use super::linux::LinuxPages;
use super::memstress::{Memstress, Work};
use super::phases::{Phase, measure_phases, selftest_time};
use super::{Contestant, Host, Report, ratios};
use crate::vm::{Tracking, WindowFill};
use anyhow::{Context, Result, bail};
use shadow_mmu::addr::{Gfn, Hva, HvaRange, PAGE_SIZE};
use shadow_mmu::shadow::{
    DirtyLogConfig, DirtyMethod, DirtyPages, DirtyRecords, FaultAroundPolicy, Initially, ProtectOn, ShadowMmu,
};
use shadow_mmu::table::LOWER_HALF_PAGES;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::EventFd;

const POPULATE: &str = "Populate memory time";
const ENABLE: &str = "Enabling dirty logging time";
const DISABLE: &str = "Disabling dirty logging time";
const GET: &str = "Get dirty log";
const CLEAR: &str = "Clear dirty log";
const DIRTY_PAGES: &str = "Dirty pages";

/// Entries of a vCPU's ring, as in the kernel's dirty_log_test.
const RING_ENTRIES: u32 = 65536;

/// The only memslot of a machine.
const SLOT: Gfn = Gfn(0);

/// What is measured.
#[derive(Debug, Clone)]
pub struct DirtyLogWork {
    /// vCPUs, their memory, and how they touch it.
    pub work: Work,
    /// Passes that are logged.
    pub iterations: u32,
    /// How writes are seen.
    pub method: DirtyMethod,
    /// Where they are kept.
    pub records: DirtyRecords,
    /// Whether reading the log or clearing it arms pages again.
    pub protect: ProtectOn,
}

impl DirtyLogWork {
    /// Pages that every log must hold; `None` where that depends on random numbers.
    fn written(&self) -> Option<u64> {
        (self.work.write_percent == 100 && !self.work.random).then(|| self.work.total_pages())
    }

    /// As the selftest has it: a log that is cleared by hand begins with all pages.
    fn config(&self) -> DirtyLogConfig {
        let (protect, initially) = match (self.protect, self.records) {
            (ProtectOn::Clear, DirtyRecords::Bitmap) => (ProtectOn::Clear, Initially::AllDirty),
            _ => (ProtectOn::Get, Initially::Clean),
        };
        DirtyLogConfig { method: self.method, records: self.records, protect, initially }
    }
}

/// Runs the benchmark, `runs` times a contestant.
///
/// # Errors
/// What keeps umbra from running a guest at all; a method that the engine does not have; a log that lost a write.
pub fn bench_dirty_log(
    host: &Host,
    options: &DirtyLogWork,
    runs: usize,
    progress: &mut dyn FnMut(&str),
) -> Result<Report> {
    if options.iterations < 2 {
        bail!("a dirty log needs at least two iterations (-i): the first one finds what logging began with");
    }
    if options.records == DirtyRecords::Rings && options.method == DirtyMethod::DirtyBit {
        bail!(
            "rings are filled by the faults of writes: leave -m out, or give -m write-protect with -M ring"
        );
    }
    options.work.expect_room(1)?;
    let contestants = vec![
        Contestant::required("umbra", || guest(options)),
        Contestant::optional("native", || native(options)),
    ];
    let (rows, missing) = measure_phases(runs, contestants, progress)?;
    let of = |contestant: &str, phase: &str| format!("{contestant}.{phase}");
    let pairs: Vec<_> = [GET, CLEAR].iter().map(|phase| (of("native", phase), of("umbra", phase))).collect();
    let pairs: Vec<_> = pairs.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
    let ratios = ratios(&rows, &pairs);
    let lines = rows
        .iter()
        .filter_map(|row| Some((row.name.strip_prefix("umbra.")?, row.median)))
        .filter_map(|(phase, time)| match phase {
            GET | CLEAR => {
                let all = selftest_time(time * f64::from(options.iterations));
                let each = selftest_time(time);
                Some(format!(
                    "{phase} over {} iterations took {all}. (Avg {each}/iteration)",
                    options.iterations
                ))
            }
            DIRTY_PAGES => None,
            _ => Some(format!("{phase}: {}", selftest_time(time))),
        })
        .collect();
    Ok(Report {
        bench: "dirty_log".into(),
        host: host.clone(),
        rows,
        ratios,
        missing,
        notes: Vec::new(),
        lines,
    })
}

/// How a contestant logs: each step is timed by who calls it.
trait Logger {
    fn enable(&mut self) -> Result<()>;
    /// One pass over the memory, by its own clock.
    fn pass(&mut self, command: &str) -> Result<Duration>;
    /// Reads the log.
    fn get(&mut self) -> Result<()>;
    /// Clears what was read; `None` where reading does that.
    fn clear(&mut self) -> Option<Result<()>>;
    /// Pages of the memory in the last log that was read.
    fn dirty_pages(&self) -> Result<u64>;
    fn disable(&mut self) -> Result<()>;
}

fn timed(action: impl FnOnce() -> Result<()>) -> Result<Duration> {
    let began = Instant::now();
    action()?;
    Ok(began.elapsed())
}

fn phases(logger: &mut dyn Logger, options: &DirtyLogWork) -> Result<Vec<Phase>> {
    let mut phases = vec![Phase::time(POPULATE, logger.pass("write")?)];
    phases.push(Phase::time(ENABLE, timed(|| logger.enable())?));
    let (mut get, mut clear, mut cleared) = (Duration::ZERO, Duration::ZERO, 0);
    for iteration in 1..=options.iterations {
        let name = |what: &str| format!("Iteration {iteration} {what} time");
        phases.push(Phase::time(name("dirty memory"), logger.pass("mix")?));
        let time = timed(|| logger.get())?;
        get += time;
        phases.push(Phase::time(name("get dirty log"), time));
        let began = Instant::now();
        if let Some(result) = logger.clear() {
            result?;
            let time = began.elapsed();
            clear += time;
            cleared += 1;
            phases.push(Phase::time(name("clear dirty log"), time));
        }
        let dirty = logger.dirty_pages()?;
        if let Some(written) = options.written().filter(|written| *written != dirty) {
            bail!("iteration {iteration}: {written} pages were written and {dirty} are in the log");
        }
    }
    let dirty = logger.dirty_pages()?;
    phases.push(Phase::time(DISABLE, timed(|| logger.disable())?));
    phases.push(Phase::time(GET, get / options.iterations));
    if cleared > 0 {
        phases.push(Phase::time(CLEAR, clear / cleared));
    }
    phases.push(Phase::new(DIRTY_PAGES, "pages", dirty as f64));
    Ok(phases)
}

/// umbra's log, kept in a bitmap.
struct Bitmap<'a> {
    memstress: Memstress,
    region: HvaRange,
    options: &'a DirtyLogWork,
    last: DirtyPages,
}

impl Bitmap<'_> {
    fn shadow(&self) -> Result<&ShadowMmu> {
        Ok(self.memstress.expect_machine()?.shadow())
    }
}

impl Logger for Bitmap<'_> {
    fn enable(&mut self) -> Result<()> {
        Ok(self.shadow()?.enable_dirty_log(SLOT, self.options.config())?)
    }

    fn pass(&mut self, command: &str) -> Result<Duration> {
        Ok(self.memstress.pass(command)?.time)
    }

    fn get(&mut self) -> Result<()> {
        self.last = self.shadow()?.get_dirty_log(SLOT)?;
        Ok(())
    }

    fn clear(&mut self) -> Option<Result<()>> {
        match self.options.protect {
            ProtectOn::Get => None,
            ProtectOn::Clear => Some(
                self.shadow()
                    .and_then(|shadow| Ok(shadow.clear_dirty_log(SLOT, 0..LOWER_HALF_PAGES, &self.last)?)),
            ),
        }
    }

    fn dirty_pages(&self) -> Result<u64> {
        Ok(within(&self.last, self.region))
    }

    fn disable(&mut self) -> Result<()> {
        Ok(self.shadow()?.disable_dirty_log(SLOT)?)
    }
}

/// umbra's log, kept in rings. Reading it takes entries back, so there is no step of clearing.
struct Rings<'a> {
    memstress: Memstress,
    region: HvaRange,
    options: &'a DirtyLogWork,
    /// Readable when a vCPU waits for room.
    full: EventFd,
    last: DirtyPages,
}

impl Rings<'_> {
    fn collect(&mut self) -> Result<()> {
        self.memstress.expect_machine()?.collect_dirty_rings();
        Ok(())
    }
}

impl Logger for Rings<'_> {
    fn enable(&mut self) -> Result<()> {
        Ok(self.memstress.expect_machine()?.shadow().enable_dirty_log(SLOT, self.options.config())?)
    }

    fn pass(&mut self, command: &str) -> Result<Duration> {
        self.memstress.send(command)?;
        // SAFETY: the descriptor is `full`'s, which lives longer than this borrow of it.
        let full = unsafe { BorrowedFd::borrow_raw(self.full.as_raw_fd()) };
        while self.memstress.wait_beside(full)? {
            // The event first: who finds its ring full behind the collection calls again.
            let _ = self.full.read();
            self.collect()?;
        }
        Ok(self.memstress.pass_answer(command)?.time)
    }

    fn get(&mut self) -> Result<()> {
        self.collect()?;
        let machine = self.memstress.expect_machine()?;
        self.last = machine.take_ring_pages();
        // What was written without a vCPU: by system calls.
        self.last.merge(machine.shadow().get_dirty_log(SLOT)?);
        Ok(())
    }

    fn clear(&mut self) -> Option<Result<()>> {
        None
    }

    fn dirty_pages(&self) -> Result<u64> {
        Ok(within(&self.last, self.region))
    }

    fn disable(&mut self) -> Result<()> {
        Ok(self.memstress.expect_machine()?.shadow().disable_dirty_log(SLOT)?)
    }
}

/// Those of `pages` that are in `region`: guest frames are numbers of pages there.
fn within(pages: &DirtyPages, region: HvaRange) -> u64 {
    pages.iter().map(|page| pages_within(HvaRange::page(Hva(page * PAGE_SIZE)), region)).sum()
}

fn guest(options: &DirtyLogWork) -> Result<Vec<Phase>> {
    let ring_entries = (options.records == DirtyRecords::Rings).then_some(RING_ENTRIES);
    let tracking = Tracking { ring_entries, ..TOLD };
    let config = options.work.config(FaultAroundPolicy::Adaptive, WindowFill::Ahead, tracking);
    let mut memstress = Memstress::guest(config, &options.work)?;
    let region = memstress.region()?;
    let full = memstress.expect_machine()?.dirty_ring_full()?;
    let last = DirtyPages::default();
    match full {
        None => run(Bitmap { memstress, region, options, last }, options, |log| log.memstress),
        Some(full) => run(Rings { memstress, region, options, full, last }, options, |log| log.memstress),
    }
}

/// All phases with `log`, and the end of the program that it is about.
fn run<L: Logger>(
    mut log: L,
    options: &DirtyLogWork,
    memstress: impl FnOnce(L) -> Memstress,
) -> Result<Vec<Phase>> {
    let phases = phases(&mut log, options)?;
    memstress(log).finish()?;
    Ok(phases)
}

/// Linux's soft-dirty bits.
struct SoftDirty {
    memstress: Memstress,
    linux: LinuxPages,
    /// In the last log; `None` before the first.
    last: Option<u64>,
}

impl Logger for SoftDirty {
    fn enable(&mut self) -> Result<()> {
        self.linux.clear_soft_dirty()
    }

    fn pass(&mut self, command: &str) -> Result<Duration> {
        Ok(self.memstress.pass(command)?.time)
    }

    fn get(&mut self) -> Result<()> {
        self.last = Some(self.linux.soft_dirty()?);
        Ok(())
    }

    fn clear(&mut self) -> Option<Result<()>> {
        Some(self.linux.clear_soft_dirty())
    }

    fn dirty_pages(&self) -> Result<u64> {
        self.last.context("no log was read yet")
    }

    /// It cannot be switched off: what is write-protected stays so until it is written.
    fn disable(&mut self) -> Result<()> {
        Ok(())
    }
}

fn native(options: &DirtyLogWork) -> Result<Vec<Phase>> {
    let mut memstress = Memstress::native(&options.work)?;
    let pid = memstress.pid().context("memstress is no process")?;
    let linux = LinuxPages::new(pid, memstress.region()?);
    linux.clear_soft_dirty()?;
    memstress.pass("write")?;
    linux.expect_soft_dirty(options.work.total_pages())?;
    memstress.finish()?;

    // Once more, with nothing touched before.
    let mut memstress = Memstress::native(&options.work)?;
    let pid = memstress.pid().context("memstress is no process")?;
    let linux = LinuxPages::new(pid, memstress.region()?);
    run(SoftDirty { memstress, linux, last: None }, options, |log| log.memstress)
}
