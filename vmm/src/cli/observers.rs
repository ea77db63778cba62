// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What `umbra run` does beside running guests to tell of them: aging, the dirty log, and their reports. One value, so that
//! the command itself reads as start, wait, end.
//!
//! Aging and the dirty log are of one guest, and of a fleet with more the command line has not asked for them: what is
//! observed is guest 0. Of several guests it is told how each of them ended.
//!
//! Everything in here is on the event loop's thread; only the writing of reports is not ([`Reports`]), and in deterministic mode
//! aging, which is a job of the baton's.

use super::Format;
use super::age::{AgeArgs, Aging};
use super::dirty::{Dirty, DirtyArgs};
use super::ksm::{KsmArgs, Shared, Sharing};
use super::replacement::Replacement;
use super::reports::Reports;
use crate::aging::AgingCost;
use crate::deterministic::{Deterministic, Interval};
use crate::fleet::Fleet;
use crate::reactor::{Event, Reactor, Sources};
use crate::vm::Vm;
use anyhow::{Context, Result};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What tells of guests.
#[derive(Debug)]
pub(super) struct Observers {
    /// The guest that is observed, if one is.
    observed: Option<Arc<Vm>>,
    /// Locked for a pass or a report.
    aging: Option<Arc<Mutex<Aging>>>,
    dirty: Option<Dirty>,
    sharing: Option<Sharing>,
    /// Where something is to be told.
    reports: Option<Reports>,
}

/// What there is to say at the end.
#[derive(Debug)]
pub(super) struct Observed {
    /// What aging cost, if there was any.
    pub(super) aging: Option<AgingCost>,
    /// What sharing came to, if there was any.
    pub(super) shared: Option<Shared>,
}

impl Observers {
    /// Adds what the observers listen to.
    pub(super) fn listen(
        sources: Sources,
        fleet: &Fleet,
        deterministic: Option<&Deterministic>,
        age: &AgeArgs,
        dirty: &DirtyArgs,
        ksm: &KsmArgs,
    ) -> Result<Sources> {
        let sources = sources
            .with_ticks(Event::Age, age.interval().filter(|_| deterministic.is_none()))?
            .with_ticks(Event::CollectDirty, dirty.interval())?
            .with_ticks(Event::LookAtSharing, ksm.interval())?
            .with_ring_full(first(fleet)?.machine().dirty_ring_full()?);
        if age.reports_on_signal() { sources.with_report_signal() } else { Ok(sources) }
    }

    /// For the guests of `fleet`, which are about to start.
    pub(super) fn start(
        fleet: &Fleet,
        deterministic: Option<&Deterministic>,
        age: &AgeArgs,
        picture: Option<Replacement>,
        dirty: &DirtyArgs,
        sharing: Option<Sharing>,
    ) -> Result<Self> {
        let tells =
            age.reports_on_signal() || dirty.interval().is_some() || sharing.is_some() || fleet.count() > 1;
        let reports = tells.then(Reports::to_stderr).transpose()?;
        let vm = first(fleet)?;
        let (aging, dirty) = (age.start(vm.machine(), picture), dirty.start(vm.machine())?);
        let aging = aging.map(|aging| Arc::new(Mutex::new(aging)));
        if let (Some(deterministic), Some(aging), Some(every)) = (deterministic, &aging, age.interval()) {
            let aging = Arc::clone(aging);
            deterministic.baton().every(Interval::About(every), move || lock(&aging).pass());
        }
        let observed = (aging.is_some() || dirty.is_some()).then_some(vm);
        Ok(Self { observed, aging, dirty, sharing, reports })
    }

    /// Tells `text`, whole lines, while guests run.
    pub(super) fn tell(&mut self, text: String) {
        if let Some(reports) = self.reports.as_mut().filter(|_| !text.is_empty()) {
            reports.send(Format::Text, text);
        }
    }

    /// Does what `event` asks for.
    pub(super) fn handle(&mut self, fleet: &Fleet, event: Event) {
        if event == Event::LookAtSharing {
            let text = self.sharing.as_mut().and_then(|sharing| sharing.tick(fleet));
            return self.tell(text.unwrap_or_default());
        }
        let Some(vm) = &self.observed else { return };
        let machine = vm.machine();
        let report = match event {
            Event::Age => {
                self.aging.iter().for_each(|aging| lock(aging).pass());
                None
            }
            Event::RingFull => {
                machine.collect_dirty_rings();
                None
            }
            Event::CollectDirty => {
                self.dirty.as_mut().and_then(|dirty| Some((dirty.format(), dirty.tick(machine)?)))
            }
            Event::Signal(libc::SIGUSR1) => self.aging.as_ref().and_then(|aging| lock(aging).report()),
            Event::Signal(_) | Event::TimeLimit | Event::Exited(_) | Event::LookAtSharing => None,
        };
        if let (Some((format, report)), Some(reports)) = (report, &mut self.reports) {
            reports.send(format, report);
        }
    }

    /// A guest has ended, its memory is still there.
    pub(super) fn guest_ends(&mut self, fleet: &Fleet) {
        let text = self.sharing.as_mut().and_then(|sharing| sharing.guest_ends(fleet));
        self.tell(text.unwrap_or_default());
    }

    /// The last guest has ended, its memory is still there. Writes what is left to tell, and waits for who reads it.
    ///
    /// # Errors
    /// What sharing came to cannot be told.
    pub(super) fn finish(self, fleet: &Fleet, reactor: &Reactor) -> Result<Observed> {
        let Self { observed, aging, dirty, sharing, reports } = self;
        if let Some(aging) = &aging {
            lock(aging).last_pass(reactor.skipped(Event::Age));
        }
        let dirty = dirty.zip(observed);
        let mut last = dirty.map_or_else(Vec::new, |(dirty, vm)| dirty.finish(vm.machine()));
        last.extend(aging.as_ref().and_then(|aging| lock(aging).report()).map(|(_, report)| report));
        if let Some(reports) = reports {
            reports.finish(last);
        }
        let shared = sharing.map(|sharing| sharing.finish(fleet)).transpose()?;
        Ok(Observed { aging: aging.map(|aging| lock(&aging).finish()), shared })
    }
}

fn lock(aging: &Mutex<Aging>) -> MutexGuard<'_, Aging> {
    aging.lock().unwrap_or_else(PoisonError::into_inner)
}

fn first(fleet: &Fleet) -> Result<Arc<Vm>> {
    fleet.guest(0).context("there is no guest")
}
