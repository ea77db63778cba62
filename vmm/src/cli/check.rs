// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `umbra run --check`: audits running guests, ten times a second and each once more at its end.
//!
//! A thread looks at all guests that are left, and at what they share; who takes one out of the fleet looks at it once more
//! ([`Checker::last_look`]). When all are gone there must be no frame in use ([`Checker::finish`]).
//!
//! While an address space is torn down its merged pages belong to nobody that could be asked. So guests do not go while somebody
//! looks at what they share: `sharing` is held for both, by whoever may be the last to let go of a guest: the one who took it
//! out of the fleet, or the thread, which was looking at it meanwhile.

use crate::fleet::Fleet;
use crate::vm::Vm;
use anyhow::{Result, bail};
use shadow_mmu::ksm::Ksm;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Lines of violations that are printed.
const TOLD: usize = 20;

/// Audits running guests.
#[derive(Debug)]
pub(super) struct Checker<'a> {
    fleet: &'a Fleet,
    /// What they share.
    sharing: Option<Mutex<Arc<Ksm>>>,
    over: AtomicBool,
    findings: Mutex<Findings>,
}

#[derive(Debug, Default)]
struct Findings {
    audits: u64,
    violations: Vec<String>,
}

impl<'a> Checker<'a> {
    pub(super) fn new(fleet: &'a Fleet, sharing: Option<Arc<Ksm>>) -> Self {
        Self {
            fleet,
            sharing: sharing.map(Mutex::new),
            over: AtomicBool::new(false),
            findings: Mutex::default(),
        }
    }

    /// The thread.
    pub(super) fn run(&self) {
        while !self.over.load(Ordering::Acquire) {
            for (number, vm) in self.fleet.left() {
                self.audit(number, &vm);
                self.let_go(vm);
            }
            self.audit_sharing();
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

    fn sharing(&self) -> Option<MutexGuard<'_, Arc<Ksm>>> {
        self.sharing.as_ref().map(|sharing| sharing.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn audit_sharing(&self) {
        if let Some(ksm) = self.sharing() {
            let wrong = ksm.audit();
            self.findings().violations.extend(wrong.iter().map(ToString::to_string));
        }
    }

    /// Looks at guest `number`, which has ended and was taken out of the fleet, a last time, and drops it.
    pub(super) fn last_look(&self, number: usize, vm: Arc<Vm>) {
        self.audit(number, &vm);
        self.audit_sharing();
        self.let_go(vm);
    }

    /// Drops a guest, perhaps as the last who holds it, while nobody looks at what is shared.
    fn let_go(&self, vm: Arc<Vm>) {
        let _held = self.sharing();
        drop(vm);
    }

    /// Looks at one guest now.
    fn audit(&self, number: usize, vm: &Vm) {
        let report = vm.machine().audit();
        let who = if self.fleet.count() == 1 { String::new() } else { format!("guest {number}: ") };
        let mut findings = self.findings();
        findings.audits += 1;
        findings.violations.extend(report.violations.iter().map(|violation| format!("{who}{violation}")));
    }

    /// All guests are gone: a last look at the frames, and the verdict.
    pub(super) fn finish(self) -> Result<()> {
        let Self { fleet, findings, .. } = self;
        let pool = fleet.pool();
        let broken = pool.check_poison();
        let mut findings = findings.into_inner().unwrap_or_else(PoisonError::into_inner);
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
