// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The options of `umbra run` that make several guests of one program, and how their ends are told.
//!
//! A guest's end is told when it comes, and its memory goes back to the pool then; only the last one's waits for the reports
//! on guests that run. So a single guest, which is the last, ends as if there were no others to think of.

use super::check::AuditStats;
use super::{Format, parse};
use crate::aging::AgingCost;
use crate::causes::one_line;
use crate::crash;
use crate::deterministic::Summary;
use crate::guest::ExitStatus;
use crate::ksm::report::SharingStats;
use crate::report::{Stats, death_report, exit_code, signal_name};
use crate::vm::Vm;
use anyhow::Result;
use clap::Args;
use serde::Serialize;
use std::fmt::Write;
use std::path::PathBuf;
use std::time::Instant;

#[derive(Debug, Args)]
pub(super) struct GuestsArgs {
    /// Run this many copies of the program, 1 to 64, each in a VM of its own; they share one pool of frames.
    ///
    /// Guests are numbered from 0. umbra's stdin is that of guest 0; the others find theirs empty. stdout and stderr are all
    /// guests'. A signal to umbra and `--timeout` end all of them. A guest that does not end with 0 is told of on stderr, and
    /// umbra's exit status is that of the first by number, or 0. `--stats=json` is then one object {guests: [{guest,
    /// exit_status, …}]}; its `frames`, `frames_peak` and `frames_punched` are the pool's. Reports on a running guest (`--age`,
    /// `--wss`, `--heatmap`, `--dirty-rate`, `--trace`) are for one guest only.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=64))]
    guests: Option<u8>,
    /// Memory that the guests share: N times `--memory` if not given. Less is promising more than there is: a guest that needs
    /// a frame when all are in use gets SIGKILL, as on Linux.
    #[arg(long, value_name = "SIZE", requires = "guests", value_parser = parse::memory)]
    pool: Option<u64>,
}

impl GuestsArgs {
    /// How many guests there are to be.
    pub(super) fn count(&self) -> usize {
        self.guests.map_or(1, usize::from)
    }

    /// Why these options make no sense together, if they do not. `shows_one`: one of those that show a guest, if one is given;
    /// `memory`: what each guest adds to the pool.
    pub(super) fn refusal(&self, shows_one: Option<&str>, memory: u64) -> Option<String> {
        let count = self.count();
        if let Some(option) = shows_one.filter(|_| count > 1) {
            return Some(format!(
                "{option} shows one guest and --guests {count} runs several: leave out either"
            ));
        }
        let share = memory.saturating_mul(count as u64);
        (self.pool.is_none() && share > parse::MOST_MEMORY).then(|| {
            let mib = memory >> 20;
            format!("{count} guests of {mib}M are more than the 16T that umbra can address: give less with --memory, or a --pool")
        })
    }

    /// An option for several guests, if one is given.
    pub(super) fn given(&self) -> Option<&'static str> {
        self.guests.map(|_| "--guests")
    }

    /// Bytes that the guests share, where the command line says so.
    pub(super) fn pool(&self) -> Option<u64> {
        self.pool
    }
}

/// What there is to say of a guest that ended, apart from what it cost.
#[derive(Debug)]
struct Ended {
    exit_status: u8,
    stats: Stats,
}

/// One guest of several, as `--stats` has it.
#[derive(Debug, Serialize)]
struct GuestStats<'a> {
    /// Its number.
    guest: usize,
    /// What a shell would say: its own, or 128 + signal; 125 if umbra lost it.
    exit_status: u8,
    #[serde(flatten)]
    stats: &'a Stats,
}

#[derive(Debug, Serialize)]
struct AllStats<'a> {
    guests: Vec<GuestStats<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ksm: Option<SharingStats>,
    #[serde(skip_serializing_if = "Option::is_none")]
    audit: Option<AuditStats>,
}

#[derive(Debug, Serialize)]
struct OneStats<'a> {
    #[serde(flatten)]
    stats: &'a Stats,
    #[serde(skip_serializing_if = "Option::is_none")]
    ksm: Option<SharingStats>,
    #[serde(skip_serializing_if = "Option::is_none")]
    audit: Option<AuditStats>,
    #[serde(skip_serializing_if = "Option::is_none")]
    deterministic: Option<Summary>,
}

/// How the guests ended.
#[derive(Debug)]
pub(super) struct Endings {
    began: Instant,
    /// Where reports on umbra's own failures go, if the command line says so.
    report_folder: Option<PathBuf>,
    /// By number; `None` while it runs.
    ended: Vec<Option<Ended>>,
}

impl Endings {
    /// Of `count` guests, which began at this time.
    pub(super) fn new(count: usize, began: Instant, report_folder: Option<PathBuf>) -> Self {
        Self { began, report_folder, ended: (0..count).map(|_| None).collect() }
    }

    /// Guest `number`, which is `vm`, has ended: notes how. Returns what the operator is to be told, whole lines.
    pub(super) fn note(&mut self, number: usize, vm: &Vm, aging: Option<AgingCost>) -> String {
        let who = if self.ended.len() == 1 { "the guest".to_owned() } else { format!("guest {number}") };
        let status = vm.wait();
        // Of several guests that are all sent a signal nobody wants to see the registers.
        let death = vm.machine().death().filter(|death| self.ended.len() == 1 || death.vector.is_some());
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = match (&status, death) {
            (Ok(ExitStatus::Signaled(_)), Some(death)) => {
                text.write_str(&death_report(&death, &who, vm.machine()))
            }
            (Ok(ExitStatus::Signaled(signal)), None) => {
                writeln!(text, "umbra: {who} was ended by {}", signal_name(*signal))
            }
            // A single guest's status is umbra's.
            (Ok(ExitStatus::Exited(code)), _) if *code != 0 && self.ended.len() > 1 => {
                writeln!(text, "umbra: {who} exited with status {code}")
            }
            (Ok(ExitStatus::Exited(_)), _) => Ok(()),
            (Err(error), _) => {
                let what = format!("{who} is lost: {}", one_line(error));
                text.write_str(&crash::tell(&what, vm.machine().crash(), self.report_folder.as_deref()))
            }
        };
        let exit_status = status.map_or(super::FAILED, exit_code);
        let stats = Stats::of(vm.machine(), self.began.elapsed(), aging);
        if let Some(ended) = self.ended.get_mut(number) {
            *ended = Some(Ended { exit_status, stats });
        }
        text
    }

    /// What the guests cost, what they saved by sharing pages, what auditing them cost, and what is told of deterministic mode; one
    /// line in JSON.
    pub(super) fn stats(
        &self,
        format: Format,
        ksm: Option<SharingStats>,
        audit: Option<AuditStats>,
        deterministic: Option<Summary>,
    ) -> Result<String> {
        let ended = || self.ended.iter().enumerate().filter_map(|(n, ended)| Some((n, ended.as_ref()?)));
        let audited = audit.map_or_else(String::new, |audit| format!("\n{}", audit.text()));
        let mut shared = ksm.map_or_else(String::new, |ksm| format!("\n{}", ksm.text())) + &audited;
        if let Some(summary) = &deterministic {
            shared = format!("{shared}\n{}", summary.text());
        }
        match (&self.ended[..], format) {
            ([Some(only)], Format::Text) => Ok(only.stats.text() + &shared),
            ([Some(only)], Format::Json) => {
                Ok(serde_json::to_string(&OneStats { stats: &only.stats, ksm, audit, deterministic })?)
            }
            (_, Format::Text) => {
                let text = |(guest, Ended { exit_status, stats }): (usize, &Ended)| {
                    format!("guest {guest}, exit status {exit_status}\n{}", stats.text())
                };
                Ok(ended().map(text).collect::<Vec<_>>().join("\n") + &shared)
            }
            (_, Format::Json) => {
                let guests = ended().map(|(guest, Ended { exit_status, stats })| GuestStats {
                    guest,
                    exit_status: *exit_status,
                    stats,
                });
                Ok(serde_json::to_string(&AllStats { guests: guests.collect(), ksm, audit })?)
            }
        }
    }

    /// 0 if every guest ended with it; else that of the first by number that did not.
    pub(super) fn exit_status(&self) -> u8 {
        self.ended.iter().flatten().map(|ended| ended.exit_status).find(|&status| status != 0).unwrap_or(0)
    }
}
