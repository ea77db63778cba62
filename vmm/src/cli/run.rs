// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `umbra run`.

use super::check::{Checker, Vigilance};
use super::deterministic::{self, DeterministicArgs, Stdin};
use super::guests::{Endings, GuestsArgs};
use super::observers::Observers;
use super::replacement::Replacement;
use super::{Format, adopt_demo, age, choose_engine, dirty, engine, ksm, parse, trace};
use crate::causes::{say, tell};
use crate::deterministic::Deterministic;
use crate::engine::EngineChoice;
use crate::fleet::Fleet;
use crate::guest::{Arguments, check_elf};
use crate::inject::Waits;
use crate::reactor::{Event, Reactor, Sources, block_report_signal, block_signals, unblock_signals};
use crate::trace::Tracer;
use crate::vm::{Accesses, Program, Tracking, VmConfig, WindowFill};
use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use shadow_mmu::frame::FreedFrames;
use shadow_mmu::inject::Faults;
use shadow_mmu::notifier::MmuNotifier;
use shadow_mmu::shadow::FaultAroundPolicy;
use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Run a program: a bundled guest by name, or any static x86-64 Linux ELF by path.
///
/// The program's stdin, stdout and stderr are umbra's, and so is its exit status; 128 + N if signal N ended it, 125 if umbra
/// could not run it. A name with a slash in it is a path; any other is a bundled guest, and else a file in this folder.
#[derive(Debug, Args)]
#[command(
    override_usage = "umbra run [OPTIONS] <PROGRAM|IMAGE> [ARGS]...\n       umbra run [OPTIONS] --adopt-demo"
)]
pub(super) struct RunArgs {
    /// Memory for the guest, its page tables included: bytes, or with K, M, G.
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = parse::memory)]
    memory: u64,
    /// What a page fault brings along: `off`, a block of this SIZE, or what the faults so far suggest.
    #[arg(long, value_name = "off|SIZE|adaptive", default_value = "adaptive", value_parser = parse::fault_around)]
    fault_around: FaultAroundPolicy,
    /// What runs the guest. The same program does the same under each.
    ///
    /// `kvm` is a virtual machine whose CPU walks umbra's tables: page faults are cheapest there, and only there can memory of umbra's
    /// own be shown to a guest. It needs /dev/kvm. `ptrace` is a traced process whose mappings follow umbra's tables: it needs no
    /// device and no rights; code runs at full speed, page faults and changes of mappings cost more. `auto` takes KVM where it
    /// works, else ptrace, and says so. `umbra doctor` says what works here. Without this option: UMBRA_ENGINE, or else auto.
    #[arg(long, value_name = "ENGINE")]
    engine: Option<EngineChoice>,
    #[command(flatten)]
    guests: GuestsArgs,
    /// Print what the run cost, to stderr, at the end.
    #[arg(long, value_name = "FORMAT", num_args = 0..=1, require_equals = true, default_missing_value = "text")]
    stats: Option<Format>,
    #[command(flatten)]
    age: age::AgeArgs,
    #[command(flatten)]
    dirty: dirty::DirtyArgs,
    #[command(flatten)]
    ksm: ksm::KsmArgs,
    #[command(flatten)]
    trace: trace::TraceArgs,
    #[command(flatten)]
    deterministic: DeterministicArgs,
    /// Set NAME to VALUE for the guest, or pass on umbra's own NAME. The guest's environment is empty otherwise.
    #[arg(long, value_name = "NAME[=VALUE]", value_parser = parse::environment)]
    env: Vec<String>,
    /// End the guest with SIGKILL after this long: seconds, or with ms, s, m.
    #[arg(long, value_name = "DURATION", value_parser = parse::duration)]
    timeout: Option<Duration>,
    /// Check umbra itself: freed frames are filled with a pattern and watched, and the shadow map is held against the
    /// address space ten times a second and at the end. Exits with 125 if anything is wrong.
    #[arg(long)]
    check: bool,
    /// Audit umbra itself while the guest runs, this often: every pte and every leaf against each other and against their
    /// frames, merged pages, the free list.
    ///
    /// Whatever is found ends every guest with SIGKILL, for a wrong map may reach other memory; umbra says what it was, writes a
    /// report (see --report-dir) and exits with 125. A guest waits for an audit no longer than it takes, and only where it
    /// faults: roughly 1 ms for 64 MiB of memory in use, so 0.1 % of a CPU at 1s. Without a pattern in freed frames, as --check has it.
    #[arg(long, value_name = "EVERY", value_parser = parse::interval, conflicts_with = "check")]
    audit: Option<Duration>,
    /// Where the report goes that umbra writes when it fails itself, because the engine lost a vCPU or an audit found something:
    /// umbra-report-PID.txt, for its owner's eyes only. By default the current folder, or $TMPDIR or /tmp where that cannot be
    /// written.
    #[arg(long, value_name = "DIR")]
    report_dir: Option<PathBuf>,
    /// Instead of a program, show a guest memory of umbra's own, and unmap, move and discard it behind the guest's back;
    /// say at each step what was done and what the guest saw. Exits with 125 if the guest saw anything else than it must. Needs KVM.
    #[arg(long, conflicts_with_all = [
        "program", "guests", "ksm", "stats", "audit", "env", "age", "wss", "heatmap", "dirty_rate", "dirty_log", "dirty_method"
    ])]
    adopt_demo: bool,
    /// How the engine's view of the frames is filled; for benchmarks. `userfaultfd` is for KVM alone.
    #[arg(long, value_name = "HOW", default_value = "ahead", hide = true)]
    window: WindowArg,
    /// The program, or a bundled guest by its name; what follows are its arguments.
    #[arg(
        required_unless_present = "adopt_demo",
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "PROGRAM|IMAGE"
    )]
    program: Vec<OsString>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum WindowArg {
    Ahead,
    OnDemand,
    Userfaultfd,
}

/// Runs it, and whatever comes of that, finishes the trace. `waits`: those of what is behind `faults`.
pub(super) fn run(args: RunArgs, faults: &Faults, waits: &Waits) -> Result<ExitCode> {
    // Whatever follows the program is the program's; so clap takes an option it does not know for the program.
    if let Some(option) = args.program.first().filter(|word| word.as_bytes().starts_with(b"-")) {
        say(format_args!("unknown option {}; `umbra run --help` lists them", option.display()));
        return Ok(ExitCode::from(2));
    }
    choose_engine(args.engine)?;
    let shows_one = args.age.given().or(args.dirty.given()).or(args.trace.given());
    let refusal = args.guests.refusal(shows_one, args.memory);
    let count = args.guests.count();
    let pool = args.guests.pool().unwrap_or(args.memory.saturating_mul(count as u64));
    let program = args.program.first().map(OsString::as_os_str);
    let besides = deterministic::Besides {
        several: args.guests.given(),
        dirty: args.dirty.given(),
        trace: args.trace.given(),
        advisor: args.ksm.has_advisor(),
    };
    let refusal = refusal.or_else(|| args.ksm.refusal(count, pool, program));
    if let Some(refusal) = refusal.or_else(|| args.deterministic.refusal(&besides)) {
        say(refusal);
        return Ok(ExitCode::from(2));
    }
    let words = args.program.len();
    if args.deterministic.seeds().is_some() && faults.are_armed() {
        say(format_args!("a plan counts the hits of one run: search seeds without it, or give one --seed"));
        return Ok(ExitCode::from(2));
    }
    if let Some(seeds) = args.deterministic.seeds() {
        let run = |deterministic| run_once(&args, Some(deterministic), faults);
        return args.deterministic.search(seeds, words, run).map(ExitCode::from);
    }
    let deterministic = args.deterministic.one()?;
    deterministic.iter().for_each(|it| waits.go_by(it.baton().clock()));
    let result = run_once(&args, deterministic.clone(), faults);
    if let Some(deterministic) =
        deterministic.filter(|it| !matches!(result, Ok(0)) && it.has_begun() && !it.ended_from_outside())
    {
        deterministic::tell_replay(deterministic.seed(), words, Stdin::Own);
    }
    result.map(ExitCode::from)
}

/// Runs the program once; the exit status.
fn run_once(args: &RunArgs, deterministic: Option<Arc<Deterministic>>, faults: &Faults) -> Result<u8> {
    let began = Instant::now();
    // While signals still end umbra, for it may wait.
    let output = args.trace.open()?;
    let pictures = Pictures { heat_map: args.age.open()?, sharing: args.ksm.open()? };
    // Before the first thread, so that all inherit it.
    block_signals()?;
    if args.age.reports_on_signal() {
        block_report_signal()?;
    }
    let tracer = output.map(trace::Output::start).transpose()?;
    // The end of the address space is the trace's last event, so the VM lives in there.
    let result =
        run_traced(args, deterministic, tracer.as_ref().map(Tracer::listener), pictures, faults, began);
    // What is left may wait for a reader; also where no reactor ran.
    unblock_signals()?;
    trace::finish(tracer);
    result
}

/// Files that are drawn into at the end.
#[derive(Debug)]
struct Pictures {
    heat_map: Option<Replacement>,
    sharing: Option<Replacement>,
}

fn run_traced(
    args: &RunArgs,
    deterministic: Option<Arc<Deterministic>>,
    listener: Option<Arc<dyn MmuNotifier>>,
    pictures: Pictures,
    faults: &Faults,
    began: Instant,
) -> Result<u8> {
    let config = VmConfig {
        engine: engine(),
        memory: args.memory,
        pool: None,
        fault_around: args.fault_around,
        freed: if args.check { FreedFrames::Poison } else { FreedFrames::Keep },
        window: match args.window {
            WindowArg::Ahead => WindowFill::Ahead,
            WindowArg::OnDemand => WindowFill::OnDemand,
            WindowArg::Userfaultfd => WindowFill::Userfaultfd(Duration::ZERO),
        },
        listeners: listener.into_iter().collect(),
        tracking: Tracking {
            accesses: match (args.age.interval(), args.dirty.interval()) {
                (None, None) => Accesses::Untold,
                _ => Accesses::Told,
            },
            ad_bits: args.age.ad_bits(),
            ring_entries: args.dirty.ring_entries(),
        },
        faults: faults.clone(),
        deterministic: deterministic.clone(),
    };
    let deterministic = deterministic.as_deref();
    if args.adopt_demo {
        return adopt_demo::run(config, args.timeout);
    }
    let program = program(&args.program, &args.env)?;
    let fleet = Fleet::new(args.guests.count(), args.guests.pool(), config, &program)?;
    let mut endings = Endings::new(fleet.count(), began, args.report_dir.clone());
    let sources = Sources::new(fleet.exited()?)?.with_limit(args.timeout)?;
    let sources = Observers::listen(sources, &fleet, deterministic, &args.age, &args.dirty, &args.ksm)?;
    let mut reactor = Reactor::new(sources)?;
    let sharing = args.ksm.start(&fleet, deterministic, began, pictures.sharing)?;
    let vigilance = args.audit.map(Vigilance::Audit).or(args.check.then_some(Vigilance::Check));
    let checker = vigilance.map(|vigilance| {
        let shared = sharing.as_ref().map(ksm::Sharing::ksm);
        Checker::new(&fleet, shared, vigilance, args.report_dir.clone())
    });
    let mut observers =
        Observers::start(&fleet, deterministic, &args.age, pictures.heat_map, &args.dirty, sharing)?;
    std::thread::scope(|scope| -> Result<()> {
        if let Some(checker) = &checker {
            scope.spawn(|| checker.run());
        }
        let ended = fleet.start().and_then(|()| {
            reactor.run(|event| match event {
                Event::Signal(signal) if signal != libc::SIGUSR1 => {
                    deterministic.iter().for_each(|it| it.note_end_from_outside());
                    fleet.kill(signal);
                }
                Event::TimeLimit => {
                    deterministic.iter().for_each(|it| it.note_time_limit());
                    fleet.kill(libc::SIGKILL);
                }
                // The last one is told of below, when umbra may wait for who reads it.
                Event::Exited(number) => {
                    observers.guest_ends(&fleet);
                    if let Some(vm) = fleet.take_unless_last(number) {
                        let text = endings.note(number, &vm, None);
                        // Who reads of its end finds its memory given back.
                        match &checker {
                            Some(checker) => checker.last_look(number, vm),
                            None => drop(vm),
                        }
                        observers.tell(text);
                    }
                }
                _ => observers.handle(&fleet, event),
            })
        });
        if let Some(checker) = &checker {
            checker.stop();
        }
        // From here on umbra may wait for who reads what it says, and a signal is to end that.
        unblock_signals()?;
        ended
    })?;
    let observed = observers.finish(&fleet, &reactor)?;
    for (number, vm) in fleet.left() {
        tell(endings.note(number, &vm, observed.aging));
        drop(fleet.take(number));
        match &checker {
            Some(checker) => checker.last_look(number, vm),
            None => drop(vm),
        }
    }
    if let Some(report) = observed.shared.as_ref().and_then(|shared| shared.report.as_ref()) {
        tell(report);
    }
    if let Some(format) = args.stats {
        let audit = checker.as_ref().and_then(Checker::stats);
        let shared = observed.shared.map(|shared| shared.stats);
        let told = deterministic.map(Deterministic::summary);
        tell(format_args!("{}\n", endings.stats(format, shared, audit, told)?));
    }
    if let Some(checker) = checker {
        checker.finish()?;
    }
    Ok(endings.exit_status())
}

/// The program that the command line names, with its arguments.
fn program(words: &[OsString], env: &[String]) -> Result<Program> {
    let name = words.first().cloned().context("no program is named")?;
    let path = Path::new(&name);
    let image = name.to_str().filter(|name| !name.contains('/')).and_then(guest_images::find);
    let elf: Arc<[u8]> = match image {
        Some(image) => image.elf.into(),
        None => match std::fs::read(path) {
            Ok(bytes) => bytes.into(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                bail!("{}: no such file, and no bundled guest (`umbra images` lists them)", path.display())
            }
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        },
    };
    // Before there is an engine: of that there may be a line, too, which is not the reason.
    check_elf(&elf).with_context(|| path.display().to_string())?;
    let exe = if image.is_some() {
        format!("/{}", path.display()).into_bytes()
    } else {
        let full = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        full.into_os_string().into_vec()
    };
    let arguments = Arguments {
        exe,
        args: words.iter().map(|word| word.as_bytes().to_vec()).collect(),
        env: env.iter().map(|variable| variable.as_bytes().to_vec()).collect(),
        random: None,
    };
    Ok(Program { elf, arguments })
}
