// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `umbra bench`.

use super::bench_ksm::{self, KsmArgs};
use super::{choose_engine, parse};
use crate::bench::{
    AgeOverhead, DemandPaging, DirtyLogWork, Host, NotOk, Report, UffdMode, Work, bench_access_tracking,
    bench_age, bench_age_overhead, bench_cpu, bench_demand_paging, bench_dirty_log, bench_fault,
    bench_notifier, bench_start, bench_syscall,
};
use crate::causes::{answer, one_line, say, tell};
use crate::engine::{EngineChoice, EngineConfig, choice};
use anyhow::{Result, bail};
use clap::{Args, Subcommand, ValueEnum};
use shadow_mmu::addr::PAGE_SIZE;
use shadow_mmu::shadow::{DirtyMethod, DirtyRecords, ProtectOn};
use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

/// Measure umbra beside something else doing the same work in the same run.
///
/// Absolute figures are this host's. Compare ratios, and look at the distance between min and max before you believe one.
/// Those with names of the kernel's KVM selftests go through the same phases, take their options, and print their metrics.
#[derive(Debug, Args)]
pub(super) struct BenchArgs {
    #[command(subcommand)]
    bench: Bench,
    /// Runs of each row that count; one more goes before them.
    #[arg(long, global = true, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    runs: u16,
    /// What runs the guests: auto, kvm or ptrace, as `umbra run --help` has it. Without this option: UMBRA_ENGINE, or else auto.
    #[arg(long, global = true, value_name = "ENGINE", hide_possible_values = true)]
    engine: Option<EngineChoice>,
    /// Print as JSON: {bench, host, rows: [{name, unit, min, median, max, runs}], ratios, and if there are any: missing, notes,
    /// lines}.
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// What a first touch of a page costs: umbra by each engine, KVM's demand paging, a userfaultfd thread, Linux itself, qemu.
    Fault {
        /// Pages to touch.
        #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(1..=1 << 22))]
        pages: u64,
    },
    /// A CPU-bound program as a guest of each engine, natively, and translated by qemu-x86_64-static.
    Cpu {
        /// Rounds of each kind of work.
        #[arg(long, value_name = "N", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
        passes: u64,
    },
    /// What a system call costs: by each engine, natively, and translated by qemu-x86_64-static.
    Syscall {
        /// Calls of each kind; of pages that are mapped and unmapped, a tenth of that.
        #[arg(long, value_name = "N", default_value_t = 20_000, value_parser = clap::value_parser!(u64).range(10..=100_000_000))]
        calls: u64,
    },
    /// From the command to its end, for the smallest guest.
    Start,
    /// What telling 0, 1 and 4 listeners of an invalidation costs: umbra's list, one behind a RwLock, one in an ArcSwap. Needs
    /// no engine.
    Notifier {
        /// How long each row is measured in each run.
        #[arg(long, value_name = "DURATION", default_value = "50ms", value_parser = parse::duration)]
        window: Duration,
    },
    /// How fast vCPUs bring in fresh memory: umbra, KVM's demand paging, a userfaultfd thread, Linux itself.
    #[command(name = "demand_paging")]
    DemandPaging {
        #[command(flatten)]
        memory: MemoryArgs,
        /// Also measure a thread that serves page faults by userfaultfd. MISSING: it fills the pages of KVM's view of the
        /// frames, the window, with zeros. MINOR is refused: fresh frames are in no page cache, so none can be only mapped.
        #[arg(short = 'u', value_name = "MODE", ignore_case = true)]
        uffd: Option<Uffd>,
        /// Microseconds which that thread waits before it serves a page.
        #[arg(short = 'd', value_name = "MICROSECONDS", default_value_t = 0, value_parser = clap::value_parser!(u64).range(..=1_000_000))]
        delay_us: u64,
    },
    /// How long touching memory takes before and after it was marked idle by an aging pass; beside Linux's clear_refs.
    #[command(name = "access_tracking")]
    AccessTracking {
        #[command(flatten)]
        memory: MemoryArgs,
    },
    /// What logging writes costs: enabling, dirtying, reading, clearing, disabling; beside Linux's soft-dirty bits.
    #[command(name = "dirty_log")]
    DirtyLog(DirtyLogArgs),
    /// What it costs to learn which pages were accessed, a page: beside clear_refs and smaps, and the limit that memory sets.
    Age(AgeArgs),
    /// Page sharing: umbra's beside the kernel's ksmd, on the same bytes. The kernel's takes root; its settings are put back.
    Ksm(KsmArgs),
}

#[derive(Debug, Args)]
struct DirtyLogArgs {
    #[command(flatten)]
    memory: MemoryArgs,
    /// Passes over the memory that are logged.
    #[arg(short = 'i', long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(2..=10_000))]
    iterations: u32,
    /// Writes in a hundred accesses; the others read.
    #[arg(short = 'w', long, value_name = "PERCENT", default_value_t = 100, value_parser = clap::value_parser!(u8).range(..=100))]
    write_percent: u8,
    /// Touch random pages, some twice and some not at all.
    #[arg(short = 'a', long)]
    random_access: bool,
    /// Seed of the random numbers.
    #[arg(short = 'r', long, value_name = "SEED", default_value_t = 1)]
    random_seed: u64,
    /// Let reading the log arm pages again, instead of clearing it (no KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2). Not for rings,
    /// which are never cleared.
    #[arg(short = 'g', long)]
    no_manual_protect: bool,
    /// Where the log is kept: in one bitmap, or in a ring for each vCPU, which only faults can fill.
    #[arg(short = 'M', long, value_name = "WHERE", default_value = "bitmap")]
    mode: Records,
    /// How writes are seen: by the D bit that the CPU sets, or by the fault of the first write. By default d-bit for the bitmap
    /// and write-protect for rings.
    #[arg(short = 'm', long, value_name = "HOW")]
    method: Option<Method>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Records {
    Bitmap,
    Ring,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Method {
    DBit,
    WriteProtect,
}

#[derive(Debug, Args)]
struct AgeArgs {
    /// Pages that are present. With --overhead the memory is given by --bytes.
    #[arg(long, value_name = "N", default_value_t = 1 << 20, conflicts_with = "overhead", value_parser = clap::value_parser!(u64).range(1..=1 << 26))]
    pages: u64,
    /// Measure instead what aging costs a CPU-bound guest that is aged.
    #[arg(long)]
    overhead: bool,
    /// Memory of that guest: bytes, or with K, M, G.
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = pages, requires = "overhead")]
    bytes: Pages,
    /// From one pass to the next, at least 1ms.
    #[arg(long, value_name = "DURATION", default_value = "100ms", value_parser = parse::interval, requires = "overhead")]
    interval: Duration,
    /// About how long each run of that guest takes.
    #[arg(long, value_name = "DURATION", default_value = "2s", value_parser = parse::interval, requires = "overhead")]
    window: Duration,
}

/// What the guest touches: options of the kernel's memstress.
#[derive(Debug, Clone, Args)]
struct MemoryArgs {
    /// vCPUs that touch memory.
    #[arg(short = 'v', long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    vcpus: u32,
    /// Memory of each: bytes, or with K, M, G.
    #[arg(short = 'b', long, value_name = "SIZE", default_value = "1G", value_parser = pages)]
    bytes: Pages,
    /// All vCPUs touch the same memory.
    #[arg(short = 'o', long)]
    overlap: bool,
}

impl MemoryArgs {
    fn work(&self) -> Work {
        Work { overlap: self.overlap, ..Work::new(self.vcpus, self.bytes.0) }
    }
}

/// Memory as a number of pages.
#[derive(Debug, Clone, Copy)]
struct Pages(u64);

fn pages(text: &str) -> Result<Pages, String> {
    match parse::size(text)? {
        bytes if bytes > 1 << 38 => Err(format!("{text} is more than the 256G that the guest can touch")),
        bytes if bytes < PAGE_SIZE || bytes % PAGE_SIZE != 0 => {
            Err(format!("{text} is no whole number of pages of 4K"))
        }
        bytes => Ok(Pages(bytes / PAGE_SIZE)),
    }
}

impl DirtyLogArgs {
    fn options(&self) -> Result<DirtyLogWork> {
        if self.no_manual_protect && self.mode == Records::Ring {
            bail!(
                "-g is about the bitmap: a ring is armed again when it is harvested, with or without it; leave it out"
            );
        }
        Ok(DirtyLogWork {
            work: Work {
                write_percent: self.write_percent,
                random: self.random_access,
                seed: self.random_seed,
                ..self.memory.work()
            },
            iterations: self.iterations,
            method: match (self.method, self.mode) {
                (Some(Method::DBit), _) | (None, Records::Bitmap) => DirtyMethod::DirtyBit,
                (Some(Method::WriteProtect), _) | (None, Records::Ring) => DirtyMethod::WriteProtect,
            },
            records: match self.mode {
                Records::Bitmap => DirtyRecords::Bitmap,
                Records::Ring => DirtyRecords::Rings,
            },
            protect: if self.no_manual_protect { ProtectOn::Get } else { ProtectOn::Clear },
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "UPPER")]
enum Uffd {
    Missing,
    Minor,
}

pub(super) fn run(args: BenchArgs) -> Result<ExitCode> {
    let config = choose_engine(args.engine)?;
    let live = std::io::stderr().is_terminal();
    let mut progress = |line: &str| {
        if live {
            tell(format_args!("\r\x1b[K{line}"));
            let _ = std::io::stderr().flush();
        }
    };
    let report = measure(&config, args.bench, usize::from(args.runs), &mut progress);
    progress("");
    let report = match report {
        // As the kernel's selftest has it: the word on stdout, the status 1. Why is for people.
        Err(error) if error.is::<NotOk>() => {
            answer("Not OK\n")?;
            say(one_line(&error));
            return Ok(ExitCode::FAILURE);
        }
        report => report?,
    };
    answer(if args.json { serde_json::to_string_pretty(&report)? + "\n" } else { report.text() })?;
    Ok(ExitCode::SUCCESS)
}

fn measure(
    config: &EngineConfig,
    bench: Bench,
    runs: usize,
    progress: &mut dyn FnMut(&str),
) -> Result<Report> {
    let host = || choice::trial(config).map(|engine| Host::of(&*engine));
    match bench {
        // They look for all engines themselves.
        Bench::Fault { pages } => bench_fault(config, pages, runs, progress),
        Bench::Cpu { passes } => bench_cpu(config, passes, runs, progress),
        Bench::Syscall { calls } => bench_syscall(config, calls, runs, progress),
        // It runs no guest.
        Bench::Notifier { window } => bench_notifier(window, runs, progress),
        Bench::Start => bench_start(&host()?, runs, progress),
        Bench::DemandPaging { memory, uffd, delay_us } => {
            let uffd = uffd.map(|mode| match mode {
                Uffd::Missing => UffdMode::Missing,
                Uffd::Minor => UffdMode::Minor,
            });
            let options = DemandPaging { work: memory.work(), uffd, delay: Duration::from_micros(delay_us) };
            bench_demand_paging(&host()?, &options, runs, progress)
        }
        Bench::AccessTracking { memory } => bench_access_tracking(&host()?, &memory.work(), runs, progress),
        Bench::DirtyLog(args) => bench_dirty_log(&host()?, &args.options()?, runs, progress),
        Bench::Ksm(args) => bench_ksm::measure(&host()?, args, runs, progress),
        Bench::Age(AgeArgs { pages, overhead: false, .. }) => bench_age(&host()?, pages, runs, progress),
        Bench::Age(AgeArgs { bytes, interval, window, .. }) => {
            let options = AgeOverhead { pages: bytes.0, interval, window };
            bench_age_overhead(&host()?, &options, runs, progress)
        }
    }
}
