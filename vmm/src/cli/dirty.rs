// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The options of `umbra run` that log a guest's writes, and what they do: a collector on the event loop.
//!
//! The log is switched on right before the guest starts, so what loading the program wrote is not in it. It is read at each
//! tick and at the end; rings are also emptied whenever a vCPU waits for that or ends, and what they held counts in the
//! interval that is running. The loop is what ends a guest, so no turn of it goes through pages one by one: a guest may make
//! all its addresses count as written.

use super::{Format, parse};
use crate::dirty_rate::{Interval, Length, Rates};
use crate::vm::Machine;
use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use serde::Serialize;
use shadow_mmu::addr::Gfn;
use shadow_mmu::shadow::{AdBits, DirtyLogConfig, DirtyMethod, DirtyRecords, Initially, ProtectOn};
use std::time::{Duration, Instant};

/// Where a guest's memory is: one slot, from guest frame 0.
const SLOT: Gfn = Gfn(0);
/// Entries of a ring where none are named.
pub(super) const RING_ENTRIES: u32 = 4096;

#[derive(Debug, Args)]
pub(super) struct DirtyArgs {
    /// Print, once a second, how many pages the guest wrote, by mapping; and mean and peak at the end. To stderr.
    ///
    /// HOW is a list, with commas, of an interval (`100ms`; 1s if not given, 1ms at least) and `json`: one object a report
    /// {report: "dirty_rate", from_s, seconds, pages, pages_per_s, unsure_pages, vmas: [{start, end, rights, name, pages,
    /// pages_per_s, unsure_pages}]}, the last one {report: "dirty_rate_summary", …}. A page counts once an interval. Pages
    /// that umbra writes for the guest, as `read` does, count too. Of a guest that writes at very many places only ranges are
    /// known: their pages are `unsure`.
    #[arg(
        long,
        value_name = "HOW",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "1s",
        value_parser = parse::dirty_rate
    )]
    dirty_rate: Option<RateArg>,
    /// Where vCPUs note what they write: a bitmap, or a ring for each vCPU, of 128 to 65536 entries, a power of two (4096 if
    /// not given). A vCPU whose ring is full waits until it has been emptied. Each thread's ring takes 24 bytes an entry of
    /// the host's memory, besides `--memory`: 1.5 MiB at 65536.
    #[arg(
        long,
        value_name = "bitmap|ring[:ENTRIES]",
        default_value = "bitmap",
        requires = "dirty_rate",
        value_parser = parse::dirty_log
    )]
    dirty_log: LogArg,
    /// How a write is seen: by the Dirty bit that the CPU sets, or by the fault of the first write to a protected page. The
    /// former if not given; but with a ring, or where the CPU's bits are not used, the latter.
    #[arg(long, value_name = "d-bit|write-protect", requires = "dirty_rate", hide_possible_values = true)]
    dirty_method: Option<MethodArg>,
}

/// `--dirty-rate`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RateArg {
    pub(super) every: Duration,
    pub(super) format: Format,
}

/// `--dirty-log`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LogArg {
    Bitmap,
    Ring(u32),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum MethodArg {
    #[value(name = "d-bit")]
    DirtyBit,
    WriteProtect,
}

impl DirtyArgs {
    /// How often the log is to be read; `None` if there is none.
    pub(super) fn interval(&self) -> Option<Duration> {
        self.dirty_rate.map(|rate| rate.every)
    }

    /// An option that shows a guest, if one is given.
    pub(super) fn given(&self) -> Option<&'static str> {
        self.dirty_rate.map(|_| "--dirty-rate")
    }

    /// Entries of each vCPU's ring, where there are to be rings.
    pub(super) fn ring_entries(&self) -> Option<u32> {
        match (self.dirty_rate, self.dirty_log) {
            (Some(_), LogArg::Ring(entries)) => Some(entries),
            _ => None,
        }
    }

    fn config(&self, machine: &Machine) -> DirtyLogConfig {
        let records = match self.dirty_log {
            LogArg::Bitmap => DirtyRecords::Bitmap,
            LogArg::Ring(_) => DirtyRecords::Rings,
        };
        let method = match self.dirty_method {
            Some(MethodArg::DirtyBit) => DirtyMethod::DirtyBit,
            Some(MethodArg::WriteProtect) => DirtyMethod::WriteProtect,
            // What a ring holds is pushed by faults.
            None if records == DirtyRecords::Rings || machine.ad_bits() == AdBits::None => {
                DirtyMethod::WriteProtect
            }
            None => DirtyMethod::DirtyBit,
        };
        DirtyLogConfig { method, records, protect: ProtectOn::Get, initially: Initially::Clean }
    }

    /// Switches the log on, if there is to be one.
    pub(super) fn start(&self, machine: &Machine) -> Result<Option<Dirty>> {
        let Some(rate) = self.dirty_rate else { return Ok(None) };
        let config = self.config(machine);
        machine.shadow().enable_dirty_log(SLOT, config).context("cannot log writes")?;
        let began = Instant::now();
        let (last, rates) = (Duration::ZERO, Rates::default());
        Ok(Some(Dirty { config, format: rate.format, began, last, rates }))
    }
}

/// The log of one guest's writes, and who reads it.
#[derive(Debug)]
pub(super) struct Dirty {
    config: DirtyLogConfig,
    format: Format,
    began: Instant,
    /// When it was last read, since the beginning.
    last: Duration,
    rates: Rates,
}

impl Dirty {
    /// How reports are written.
    pub(super) fn format(&self) -> Format {
        self.format
    }

    /// The interval has passed: what was written in it.
    pub(super) fn tick(&mut self, machine: &Machine) -> Option<String> {
        let interval = self.read(machine)?;
        self.rates.add(&interval, Length::Whole);
        Some(write(self.format, &interval, Interval::text))
    }

    /// The guest has ended, perhaps in the middle of an interval.
    pub(super) fn finish(mut self, machine: &Machine) -> Vec<String> {
        let mut reports = Vec::new();
        if let Some(interval) = self.read(machine) {
            self.rates.add(&interval, Length::CutShort);
            reports.push(write(self.format, &interval, Interval::text));
        }
        let method = match self.config.method {
            DirtyMethod::DirtyBit => "d-bit",
            DirtyMethod::WriteProtect => "write-protect",
        };
        let log = match self.config.records {
            DirtyRecords::Bitmap => "bitmap",
            DirtyRecords::Rings => "ring",
        };
        let summary = self.rates.summary(method, log);
        reports.push(write(self.format, &summary, |summary| summary.text()));
        reports
    }

    fn read(&mut self, machine: &Machine) -> Option<Interval> {
        machine.collect_dirty_rings();
        let mut pages = machine.take_ring_pages();
        match machine.shadow().get_dirty_log(SLOT) {
            // One slot, from address 0: an offset in it is a page number.
            Ok(logged) => pages.merge(logged),
            Err(error) => {
                log::error!("the dirty log cannot be read: {error}");
                return None;
            }
        }
        let now = self.began.elapsed();
        let interval = Interval::new(&pages, &machine.mm().vmas(), self.last, now);
        self.last = now;
        Some(interval)
    }
}

fn write<T: Serialize>(format: Format, report: &T, text: impl Fn(&T) -> String) -> String {
    match format {
        Format::Text => text(report),
        Format::Json => match serde_json::to_string(report) {
            Ok(json) => json + "\n",
            // Numbers, strings and lists always have a form.
            Err(error) => format!("umbra: a report cannot be written: {error}\n"),
        },
    }
}
