// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `umbra run --check`: audits running guests, ten times a second and each once more at its end.
//!
//! A thread looks at all guests that are left; who takes one out of the fleet looks at it once more
//! ([`Checker::audit`]). When all are gone there must be no frame in use ([`Checker::finish`]).

use crate::fleet::Fleet;
use crate::vm::Vm;
use anyhow::{Result, bail};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Lines of violations that are printed.
const TOLD: usize = 20;

/// Audits running guests.
#[derive(Debug)]
pub(super) struct Checker<'a> {
    fleet: &'a Fleet,
    over: AtomicBool,
    findings: Mutex<Findings>,
}

#[derive(Debug, Default)]
struct Findings {
    audits: u64,
    violations: Vec<String>,
}

impl<'a> Checker<'a> {
    pub(super) fn new(fleet: &'a Fleet) -> Self {
        Self { fleet, over: AtomicBool::new(false), findings: Mutex::default() }
    }

    /// The thread.
    pub(super) fn run(&self) {
        while !self.over.load(Ordering::Acquire) {
            for (number, vm) in self.fleet.left() {
                self.audit(number, &vm);
            }
            self.fleet.pool().check_poison();
            std::thread::park_timeout(Duration::from_millis(100));
        }
    }

    /// The thread is to end.
    pub(super) fn stop(&self) {
        self.over.store(true, Ordering::Release);
    }

    fn findings(&self) -> MutexGuard<'_, Findings> {
        self.findings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks at one guest now.
    pub(super) fn audit(&self, number: usize, vm: &Vm) {
        let report = vm.machine().audit();
        let who = if self.fleet.count() == 1 { String::new() } else { format!("guest {number}: ") };
        let mut findings = self.findings();
        findings.audits += 1;
        findings.violations.extend(report.violations.iter().map(|violation| format!("{who}{violation}")));
    }

    /// All guests are gone: a last look at the frames, and the verdict.
    pub(super) fn finish(&self) -> Result<()> {
        let pool = self.fleet.pool();
        let broken = pool.check_poison();
        let mut findings = self.findings();
        if broken > 0 {
            findings.violations.push(format!("{broken} free frames were written"));
        }
        let stats = pool.stats();
        let held = stats.frames - stats.free;
        if held > 0 {
            findings.violations.push(format!("{held} frames are still in use although every guest is gone"));
        }
        for line in findings.violations.iter().take(TOLD) {
            eprintln!("umbra: check: {line}");
        }
        if !findings.violations.is_empty() {
            bail!("{} checks failed: this is a bug of umbra's", findings.violations.len());
        }
        eprintln!("umbra: check: {} audits clean, no free frame written", findings.audits);
        Ok(())
    }
}
