// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What `umbra run` does beside a running guest to tell of it: aging, the dirty log, and their reports. One value, so that
//! the command itself reads as start, wait, end.
//!
//! Everything in here is on the event loop's thread; only the writing of reports is not ([`Reports`]).

use super::age::{AgeArgs, Aging};
use super::dirty::{Dirty, DirtyArgs};
use super::replacement::Replacement;
use super::reports::Reports;
use crate::aging::AgingCost;
use crate::reactor::{Event, Reactor, Sources};
use crate::vm::Machine;
use anyhow::Result;

/// What tells of a guest.
#[derive(Debug)]
pub(super) struct Observers {
    aging: Option<Aging>,
    dirty: Option<Dirty>,
    /// Where something is to be told.
    reports: Option<Reports>,
}

/// What there is to say at the end.
#[derive(Debug)]
pub(super) struct Observed {
    /// What aging cost, if there was any.
    pub(super) aging: Option<AgingCost>,
}

impl Observers {
    /// Adds what the observers listen to.
    pub(super) fn listen(
        sources: Sources,
        machine: &Machine,
        age: &AgeArgs,
        dirty: &DirtyArgs,
    ) -> Result<Sources> {
        let sources = sources
            .with_ticks(Event::Age, age.interval())?
            .with_ticks(Event::CollectDirty, dirty.interval())?
            .with_ring_full(machine.dirty_ring_full()?);
        if age.reports_on_signal() { sources.with_report_signal() } else { Ok(sources) }
    }

    /// For the guest of `machine`, which is about to start.
    pub(super) fn start(
        machine: &Machine,
        age: &AgeArgs,
        picture: Option<Replacement>,
        dirty: &DirtyArgs,
    ) -> Result<Self> {
        let tells = age.reports_on_signal() || dirty.interval().is_some();
        let reports = tells.then(Reports::to_stderr).transpose()?;
        Ok(Self { aging: age.start(machine, picture), dirty: dirty.start(machine)?, reports })
    }

    /// Does what `event` asks for.
    pub(super) fn handle(&mut self, machine: &Machine, event: Event) {
        let report = match event {
            Event::Age => {
                self.aging.iter_mut().for_each(Aging::pass);
                None
            }
            Event::RingFull => {
                machine.collect_dirty_rings();
                None
            }
            Event::CollectDirty => {
                self.dirty.as_mut().and_then(|dirty| Some((dirty.format(), dirty.tick(machine)?)))
            }
            Event::Signal(libc::SIGUSR1) => self.aging.as_ref().and_then(Aging::report),
            Event::Signal(_) | Event::TimeLimit | Event::Exited => None,
        };
        if let (Some((format, report)), Some(reports)) = (report, &mut self.reports) {
            reports.send(format, report);
        }
    }

    /// The guest has ended, its memory is still there. Writes what is left to tell, and waits for who reads it.
    pub(super) fn finish(self, machine: &Machine, reactor: &Reactor) -> Observed {
        let Self { mut aging, dirty, reports } = self;
        if let Some(aging) = &mut aging {
            aging.last_pass(reactor.skipped(Event::Age));
        }
        let mut last = dirty.map_or_else(Vec::new, |dirty| dirty.finish(machine));
        last.extend(aging.as_ref().and_then(Aging::report).map(|(_, report)| report));
        if let Some(reports) = reports {
            reports.finish(last);
        }
        Observed { aging: aging.map(Aging::finish) }
    }
}
