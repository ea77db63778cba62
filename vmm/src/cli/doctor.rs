// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `umbra doctor`.

use super::{ENGINE, engine_of_environment, kvm_device};
use crate::causes::{answer, one_line};
use crate::engine::kvm::{self, Effort, FlushReport, KvmVm};
use crate::engine::{EngineChoice, EngineKind, HostFacts, ptrace};
use crate::report::write_host;
use anyhow::{Context, Result};
use clap::Args;
use serde::Serialize;
use shadow_mmu::frame::{FramePool, FreedFrames};
use shadow_mmu::mm::watch::{Watchable, watchable};
use std::fmt::Write as _;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

/// Say what this host offers: which engines can run guests, and what to do about the other; of KVM also what it runs on, its
/// capabilities, and which ways to flush translations work.
///
/// Nothing is looked up that can be tried. Of KVM the flush methods: two vCPUs write through an entry while it is changed. Of ptrace
/// a process for a guest: it is started, emptied and traced. Exit status 0 if guests can be run by the engine that UMBRA_ENGINE
/// asks for, or else by whatever engine; 1 if not; 125 if that could not be said.
#[derive(Debug, Args)]
pub(super) struct DoctorArgs {
    /// Times each flush method is tried with each kind of change.
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    rounds: u32,
    /// Print as JSON.
    #[arg(long)]
    json: bool,
}

/// Memory of the guest that the probe runs.
const PROBE_MEMORY: u64 = 4 << 20;

/// Whether an engine can run guests here.
#[derive(Debug, Serialize)]
struct Usable {
    usable: bool,
    /// Why not, in one line that says what to do.
    obstacle: Option<String>,
}

impl From<Option<String>> for Usable {
    fn from(obstacle: Option<String>) -> Self {
        Self { usable: obstacle.is_none(), obstacle }
    }
}

/// What this host is, as far as it can be learned without running a guest.
#[derive(Debug, Serialize)]
struct Host {
    #[serde(flatten)]
    facts: HostFacts,
    /// Why KVM's device cannot be used, in one line.
    obstacle: Option<String>,
}

impl Host {
    fn new(device: &Path) -> Self {
        match kvm::facts(device) {
            Ok(kvm) => Self { facts: HostFacts::with(Some(kvm)), obstacle: None },
            Err(error) => Self { facts: HostFacts::with(None), obstacle: Some(error.to_string()) },
        }
    }
}

#[derive(Debug, Serialize)]
struct Report {
    /// What runs guests where no `--engine` says which.
    engine: Option<EngineKind>,
    kvm: Usable,
    ptrace: Usable,
    /// KVM's.
    device: String,
    host: Host,
    flush: Option<FlushReport>,
    /// Which mappings of umbra's own process could be shown to a guest: by KVM, with userfaultfd.
    adoptable: Option<&'static str>,
    /// What keeps guests from running, or would make them slow, and what to do about it.
    advice: Vec<String>,
    ready: bool,
}

pub(super) fn run(args: &DoctorArgs) -> Result<ExitCode> {
    let device = kvm_device();
    let host = Host::new(&device);
    let (flush, no_kvm) = match &host.obstacle {
        Some(obstacle) => (None, Some(obstacle.clone())),
        None => match probe(args.rounds) {
            Ok(flush) => (Some(flush), None),
            Err(error) => (None, Some(one_line(&error))),
        },
    };
    let no_ptrace = ptrace::probe().err().map(|error| error.to_string());
    let mut advice = Vec::new();
    let adoptable = match no_kvm.is_none().then(watchable) {
        None => None,
        Some(Ok(Watchable::EveryKind)) => Some("every kind"),
        Some(Ok(Watchable::NoFiles)) => Some("anonymous and shared memory, no files"),
        Some(Err(error)) => {
            advice.push(format!("mappings of the host cannot be adopted: {error}"));
            None
        }
    };
    let engine = in_use(no_kvm.is_none(), no_ptrace.is_none(), &mut advice);
    advice.extend(no_kvm.clone());
    advice.extend(no_ptrace.as_ref().map(|obstacle| format!("ptrace: {obstacle}")));
    if engine == Some(EngineKind::Ptrace) {
        advice.push("guests run by ptrace: page faults and changes of mappings cost more than under KVM, and nothing can be adopted".into());
    }
    let mut report = Report {
        engine,
        kvm: no_kvm.into(),
        ptrace: no_ptrace.into(),
        device: device.display().to_string(),
        host,
        flush,
        adoptable,
        advice,
        ready: engine.is_some(),
    };
    if report.host.facts.cpus < 2 {
        report.advice.push("one CPU: guests with several threads take turns".into());
    }
    answer(if args.json { serde_json::to_string_pretty(&report)? + "\n" } else { text(&report) })?;
    Ok(if report.ready { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The engine that the environment asks for, if it can be had; of `Auto`, the first that can.
fn in_use(kvm: bool, ptrace: bool, advice: &mut Vec<String>) -> Option<EngineKind> {
    let choice = match engine_of_environment() {
        Ok(choice) => choice,
        Err(refusal) => {
            advice.push(refusal.to_string());
            return None;
        }
    };
    let usable = [(EngineKind::Kvm, kvm), (EngineKind::Ptrace, ptrace)].map(|(kind, is)| is.then_some(kind));
    let mut usable = usable.into_iter().flatten();
    let first = usable.clone().next();
    if choice == EngineChoice::Auto {
        return first;
    }
    let asked = usable.find(|&kind| choice == kind.into());
    if let (None, Some(other)) = (asked, first) {
        advice
            .push(format!("{ENGINE} is {choice}, which cannot be used: unset it, and guests run by {other}"));
    }
    asked
}

fn probe(rounds: u32) -> Result<FlushReport> {
    let pool = Arc::new(FramePool::new(PROBE_MEMORY, FreedFrames::Keep)?);
    let vm = KvmVm::new(&kvm_device(), pool)?;
    vm.probe_flush(Effort::Thorough { rounds }).context("the flush methods could not be tried")
}

fn text(report: &Report) -> String {
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = write_text(&mut out, report);
    out
}

fn write_text(out: &mut String, report: &Report) -> std::fmt::Result {
    let word = |engine: &Usable| if engine.usable { "usable" } else { "not usable" };
    writeln!(out, "kvm       {}", word(&report.kvm))?;
    writeln!(out, "ptrace    {}", word(&report.ptrace))?;
    writeln!(out, "device    {}", report.device)?;
    write_host(out, &report.host.facts)?;
    if let Some(flush) = &report.flush {
        writeln!(out, "flush methods, each with two vCPUs writing through the entry")?;
        writeln!(
            out,
            "  {:<18} {:<14} {:>7} {:>6} {:>10}",
            "method", "change", "rounds", "stale", "median us"
        )?;
        for row in &flush.rows {
            let (method, change) = (row.method.to_string(), row.change.to_string());
            match &row.refused {
                Some(why) => writeln!(out, "  {method:<18} {change:<14} refused: {why}")?,
                None => writeln!(
                    out,
                    "  {method:<18} {change:<14} {:>7} {:>6} {:>10.1}",
                    row.rounds, row.stale, row.median_us
                )?,
            }
        }
        let chosen: Vec<_> = flush.chosen.iter().map(ToString::to_string).collect();
        writeln!(out, "  in use: {}", chosen.join(", "))?;
        writeln!(
            out,
            "accessed bit: the CPU sets it again {}",
            if flush.a_bit_needs_flush { "only after a flush" } else { "without a flush" }
        )?;
    }
    match report.adoptable {
        Some(kinds) => writeln!(out, "adoption  mappings of {kinds} can be watched (userfaultfd)")?,
        None if !report.kvm.usable => writeln!(out, "adoption  needs KVM")?,
        None => {}
    }
    for line in &report.advice {
        writeln!(out, "advice    {line}")?;
    }
    match report.engine {
        Some(engine) => {
            writeln!(out, "ready: guests can be run, by {engine} where nothing else is asked for")
        }
        None => writeln!(out, "not ready: guests cannot be run"),
    }
}
