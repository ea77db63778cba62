// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The options of `umbra run` that age a guest and tell of it, and what they do.

use super::replacement::Replacement;
use super::{Format, parse};
use crate::aging::{Ager, AgingCost, HeatMap, WorkingSet, draw};
use crate::causes::say;
use crate::vm::{AdBitsUse, Machine};
use anyhow::Result;
use clap::{Args, ValueEnum};
use std::io::stderr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Between passes, where reports are wanted and no interval is given.
const INTERVAL: Duration = Duration::from_secs(1);
/// Columns of a heat line where stderr is no terminal.
const COLUMNS: usize = 80;

#[derive(Debug, Args)]
pub(super) struct AgeArgs {
    /// Look this often which pages the guest accessed since the last time: seconds, or with ms, s, m; 1ms at least. What
    /// `--wss` and `--heatmap` count in; 1s where one of them is given without it.
    #[arg(long, value_name = "DURATION", value_parser = parse::interval)]
    age: Option<Duration>,
    /// Print the working set, at the end and whenever umbra gets SIGUSR1, to stderr.
    ///
    /// A row a mapping, in KiB: what is resident; of that, what was last accessed 0, 1, 2 … 7 or more passes of `--age` ago
    /// (0: since the pass before the last); and what was brought in but not seen to be accessed. Then a line of digits, the
    /// heat of the address space. At the end there is one more pass, so 0 is what was accessed since the last regular one.
    /// `json`: one object a report {report: "working_set", passes, interval_ms, since_pass_ms, total, vmas: [{start, end,
    /// rights, name, resident_kib, age_kib: [KiB, …], untouched_kib}]}.
    #[arg(long, value_name = "FORMAT", num_args = 0..=1, require_equals = true, default_missing_value = "text")]
    wss: Option<Format>,
    /// Draw a heat map, address by time, into PATH at the end: an SVG, anew. Its cells say which share of the resident pages
    /// was accessed between two passes of `--age`.
    #[arg(long, value_name = "PATH")]
    heatmap: Option<PathBuf>,
    /// Use the Accessed and Dirty bits that the CPU sets, or see accesses and writes by taking rights away, as for CPUs that
    /// have none: for comparison.
    #[arg(long, value_name = "on|off", default_value = "on", hide_possible_values = true)]
    ad_bits: Switch,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Switch {
    On,
    Off,
}

impl AgeArgs {
    /// How often the guest is to be aged; `None` if not at all.
    pub(super) fn interval(&self) -> Option<Duration> {
        self.age.or_else(|| (self.wss.is_some() || self.heatmap.is_some()).then_some(INTERVAL))
    }

    /// An option that shows a guest, if one is given.
    pub(super) fn given(&self) -> Option<&'static str> {
        let given = [
            (self.age.is_some(), "--age"),
            (self.wss.is_some(), "--wss"),
            (self.heatmap.is_some(), "--heatmap"),
        ];
        given.iter().find(|(is_given, _)| *is_given).map(|(_, option)| *option)
    }

    pub(super) fn ad_bits(&self) -> AdBitsUse {
        match self.ad_bits {
            Switch::On => AdBitsUse::Engine,
            Switch::Off => AdBitsUse::Off,
        }
    }

    /// Whether SIGUSR1 asks for a report.
    pub(super) fn reports_on_signal(&self) -> bool {
        self.wss.is_some()
    }

    /// Makes sure of the file for the heat map, before there is anything to lose.
    pub(super) fn open(&self) -> Result<Option<Replacement>> {
        self.heatmap.as_deref().map(Replacement::prepare).transpose()
    }

    /// What ages `machine`'s guest, if something does.
    pub(super) fn start(&self, machine: &Machine, picture: Option<Replacement>) -> Option<Aging> {
        let every = self.interval()?;
        let map = picture.is_some().then(HeatMap::default);
        let ager = Ager::new(Arc::clone(machine.mm()), every, map);
        Some(Aging { ager, every, wss: self.wss, picture })
    }
}

/// The aging of one guest.
#[derive(Debug)]
pub(super) struct Aging {
    ager: Ager,
    every: Duration,
    wss: Option<Format>,
    picture: Option<Replacement>,
}

impl Aging {
    /// The interval has passed.
    pub(super) fn pass(&mut self) {
        self.ager.pass();
    }

    /// The working set now, as `--wss` wants it told, and how that is.
    pub(super) fn report(&self) -> Option<(Format, String)> {
        self.wss.map(|format| (format, write(&self.ager.working_set(), format)))
    }

    /// The guest has ended: one more pass, so that what was accessed since the last is told.
    pub(super) fn last_pass(&mut self, skipped: u64) {
        self.ager.pass();
        self.ager.skip(skipped);
    }

    /// Draws the heat map, if one is wanted; what the passes cost. A picture that cannot be written is no reason to hide how
    /// the guest ended, so it is only told.
    pub(super) fn finish(&mut self) -> AgingCost {
        if let (Some(picture), Some(map)) = (self.picture.take(), self.ager.map())
            && let Err(error) = draw(map, self.every).and_then(|svg| picture.write(svg.as_bytes()))
        {
            say(format_args!("there is no heat map: {error:#}"));
        }
        self.ager.cost()
    }
}

fn write(set: &WorkingSet, format: Format) -> String {
    match format {
        Format::Text => {
            let terminal = terminal_size::terminal_size_of(stderr());
            set.text(terminal.map_or(COLUMNS, |(width, _)| usize::from(width.0)))
        }
        Format::Json => match serde_json::to_string(set) {
            Ok(json) => json + "\n",
            // Numbers, strings and lists always have a form.
            Err(error) => format!("umbra: the working set cannot be written: {error}\n"),
        },
    }
}
