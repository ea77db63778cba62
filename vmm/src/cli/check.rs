// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `umbra run --check` and `--audit`: audits running guests again and again, and each once more at its end.
//!
//! | | `--check` | `--audit EVERY` |
//! | --- | --- | --- |
//! | how often | ten times a second | as it says |
//! | freed frames | filled with a pattern, and watched | left alone |
//! | a violation | is told at the end | ends all guests at once, with a report ([`crash`]) |
//! | at the end | no frame may be in use, and all is told | no frame may be in use |
//!
//! What is looked at is the same: each guest's address space and shadow map ([`Machine::audit_all`]), what they share, and the
//! free list. A guest waits only for the locks that an audit of it holds.
//!
//! A thread looks at all guests that are left, and at what they share; who takes one out of the fleet looks at it once more
//! ([`Checker::last_look`]). When all are gone there must be no frame in use ([`Checker::finish`]).
//!
//! While an address space is torn down its merged pages belong to nobody that could be asked. So guests do not go while somebody
//! looks at what they share: `sharing` is held for both, by whoever may be the last to let go of a guest: the one who took it
//! out of the fleet, or the thread, which was looking at it meanwhile.

use crate::causes::{say, tell};
use crate::crash;
use crate::fleet::{Fleet, Numbered};
use crate::vm::{Machine, Vm};
use anyhow::{Result, bail};
use serde::Serialize;
use shadow_mmu::ksm::Ksm;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Lines of violations that are printed.
const TOLD: usize = 20;
const CHECK_EVERY: Duration = Duration::from_millis(100);

/// What for guests are audited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Vigilance {
    /// To find umbra's bugs.
    Check,
    /// In production, this often.
    Audit(Duration),
}

/// Audits running guests.
#[derive(Debug)]
pub(super) struct Checker<'a> {
    fleet: &'a Fleet,
    /// What they share.
    sharing: Option<Mutex<Arc<Ksm>>>,
    vigilance: Vigilance,
    report_folder: Option<PathBuf>,
    began: Instant,
    over: Mutex<bool>,
    ended: Condvar,
    findings: Mutex<Findings>,
}

#[derive(Debug, Default)]
struct Findings {
    /// Looks at one guest.
    looks: u64,
    /// Where the next look at the free list begins.
    next_frame: usize,
    violations: Vec<String>,
    /// They were told, and the guests ended.
    alarmed: bool,
    cost: Cost,
}

/// Times of the audits of the thread.
#[derive(Debug, Default, Clone, Copy)]
struct Cost {
    audits: u64,
    total: Duration,
    longest: Duration,
    cpu: Duration,
}

/// What auditing cost: `audit` in `--stats=json`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct AuditStats {
    /// Audits of all guests there were.
    audits: u64,
    /// Their sum, milliseconds.
    total_ms: f64,
    /// The longest, milliseconds.
    longest_ms: f64,
    /// CPU time of the thread as a share of the time that the guests ran: 1 is one CPU.
    cpu_share: f64,
}

impl AuditStats {
    /// For people.
    pub(super) fn text(&self) -> String {
        format!(
            "audit     {} audits, {:.3} ms in all, {:.3} ms the longest, {:.3} % of one CPU",
            self.audits,
            self.total_ms,
            self.longest_ms,
            self.cpu_share * 100.0
        )
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// CPU time of this thread.
fn thread_cpu() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes the timespec that it is given; the clock exists on every Linux.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec as u32)
}

impl<'a> Checker<'a> {
    pub(super) fn new(
        fleet: &'a Fleet,
        sharing: Option<Arc<Ksm>>,
        vigilance: Vigilance,
        report_folder: Option<PathBuf>,
    ) -> Self {
        Self {
            fleet,
            sharing: sharing.map(Mutex::new),
            vigilance,
            report_folder,
            began: Instant::now(),
            over: Mutex::new(false),
            ended: Condvar::new(),
            findings: Mutex::default(),
        }
    }

    /// The thread.
    pub(super) fn run(&self) {
        let every = match self.vigilance {
            Vigilance::Check => CHECK_EVERY,
            Vigilance::Audit(every) => every,
        };
        while !*lock(&self.over) {
            let (began, cpu) = (Instant::now(), thread_cpu());
            for (number, vm) in self.fleet.left() {
                self.audit(number, &vm);
                self.let_go(vm);
            }
            self.audit_what_is_shared();
            if self.vigilance == Vigilance::Check {
                self.fleet.pool().check_poison();
            }
            self.count(began.elapsed(), thread_cpu().saturating_sub(cpu));
            self.raise_alarm(None);
            let over = lock(&self.over);
            // Whichever came first, the loop's condition tells.
            drop(self.ended.wait_timeout_while(over, every, |over| !*over));
        }
    }

    /// The thread is to end.
    pub(super) fn stop(&self) {
        *lock(&self.over) = true;
        self.ended.notify_all();
    }

    fn count(&self, took: Duration, cpu: Duration) {
        let cost = &mut lock(&self.findings).cost;
        cost.audits += 1;
        cost.total += took;
        cost.longest = cost.longest.max(took);
        cost.cpu += cpu;
    }

    fn sharing(&self) -> Option<MutexGuard<'_, Arc<Ksm>>> {
        self.sharing.as_ref().map(lock)
    }

    /// The merged pages, and the free list.
    fn audit_what_is_shared(&self) {
        if let Some(ksm) = self.sharing() {
            let wrong = ksm.audit();
            lock(&self.findings).violations.extend(wrong.iter().map(ToString::to_string));
        }
        let mut findings = lock(&self.findings);
        let audit = self.fleet.pool().audit(findings.next_frame);
        findings.next_frame = audit.next;
        findings.violations.extend(audit.violations);
    }

    /// Looks at guest `number`, which has ended and was taken out of the fleet, a last time, and drops it.
    pub(super) fn last_look(&self, number: usize, vm: Arc<Vm>) {
        self.audit(number, &vm);
        self.audit_what_is_shared();
        self.raise_alarm(Some(&(number, Arc::clone(&vm))));
        self.let_go(vm);
    }

    /// Drops a guest, perhaps as the last who holds it, while nobody looks at what is shared.
    fn let_go(&self, vm: Arc<Vm>) {
        let _held = self.sharing();
        drop(vm);
    }

    /// Looks at one guest now.
    fn audit(&self, number: usize, vm: &Vm) {
        let audit = vm.machine().audit_all();
        let who = if self.fleet.count() == 1 { String::new() } else { format!("guest {number}: ") };
        let mut findings = lock(&self.findings);
        findings.looks += 1;
        findings.violations.extend(audit.violations.iter().map(|violation| format!("{who}{violation}")));
    }

    /// In production, what was found ends the guests: a map that is wrong may reach other memory. Once. `also`: a guest that is
    /// out of the fleet.
    fn raise_alarm(&self, also: Option<&Numbered>) {
        let violations = {
            let mut findings = lock(&self.findings);
            if self.vigilance == Vigilance::Check || findings.violations.is_empty() || findings.alarmed {
                return;
            }
            findings.alarmed = true;
            findings.violations.clone()
        };
        let guests = self.fleet.left();
        let machines: Vec<(usize, &Machine)> =
            guests.iter().chain(also).map(|(number, vm)| (*number, vm.machine())).collect();
        // Their memory goes with them, so this comes first: it takes no longer than the audit did.
        let report = crash::audit_failed(&violations, &machines);
        self.fleet.kill(libc::SIGKILL);
        tell_lines("audit", &violations);
        let what = format!("an audit found {} violations and ended every guest", violations.len());
        tell(crash::tell(&what, Some(&report), self.report_folder.as_deref()));
        guests.into_iter().for_each(|(_, vm)| self.let_go(vm));
    }

    /// What it cost so far; `None` where nobody wants to know.
    pub(super) fn stats(&self) -> Option<AuditStats> {
        let cost = lock(&self.findings).cost;
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        matches!(self.vigilance, Vigilance::Audit(_)).then(|| AuditStats {
            audits: cost.audits,
            total_ms: ms(cost.total),
            longest_ms: ms(cost.longest),
            cpu_share: cost.cpu.as_secs_f64() / self.began.elapsed().as_secs_f64(),
        })
    }

    /// All guests are gone: a last look at the frames, and the verdict.
    ///
    /// # Errors
    /// Something was found, which has been told.
    pub(super) fn finish(self) -> Result<()> {
        let Self { fleet, findings, vigilance, .. } = self;
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
        let name = match vigilance {
            Vigilance::Check => "check",
            Vigilance::Audit(_) => "audit",
        };
        if !findings.alarmed {
            tell_lines(name, &findings.violations);
        }
        if !findings.violations.is_empty() {
            bail!("{} {name}s failed: this is a bug of umbra's", findings.violations.len());
        }
        if vigilance == Vigilance::Check {
            say(format_args!("check: {} audits clean, no free frame written", findings.looks));
        }
        Ok(())
    }
}

fn tell_lines(name: &str, lines: &[String]) {
    for line in lines.iter().take(TOLD) {
        say(format_args!("{name}: {line}"));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed test may panic")]
    use super::*;
    use crate::guest::{Arguments, ExitStatus};
    use crate::vm::{Program, VmConfig};
    use shadow_mmu::addr::{Access, Gfn, Pfn};

    use shadow_mmu::shadow::Spte;
    use shadow_mmu::table::index;
    use std::fs;
    use std::sync::atomic::Ordering;

    /// A guest that runs until it is ended, if guests can be run here.
    fn endless() -> Option<Fleet> {
        let config = VmConfig::new(crate::engine::testing::guests()?, 64 << 20);
        let words = ["threads", "--seconds", "3600"];
        let arguments = Arguments {
            exe: b"/threads".to_vec(),
            args: words.map(|word| word.as_bytes().to_vec()).into(),
            env: Vec::new(),
            random: None,
        };
        let elf = guest_images::find(words[0]).unwrap().elf.into();
        Some(Fleet::new(1, None, config, &Program { elf, arguments }).unwrap())
    }

    /// A leaf of the running guest's program, which it cannot write, by the entry in its table. (Its stack may be there before.)
    fn some_leaf(machine: &Machine) -> (Gfn, Pfn, usize) {
        loop {
            for vma in machine.mm().vmas().into_iter().filter(|vma| !vma.prot.contains(Access::WRITE)) {
                for gfn in vma.range.page_numbers() {
                    let walk = machine.shadow().walk(Gfn(gfn));
                    if let [.., (2, table), (1, leaf)] = walk[..]
                        && Spte(leaf).is_leaf()
                    {
                        return (Gfn(gfn), Spte(table).pfn(), index(gfn, 1));
                    }
                }
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn an_audit_that_finds_a_wrong_leaf_ends_the_guest_and_leaves_a_report() {
        let Some(fleet) = endless() else { return };
        let folder = std::env::temp_dir().join(format!("umbra-audit-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let every = Vigilance::Audit(Duration::from_millis(5));
        let checker = Checker::new(&fleet, None, every, Some(folder.clone()));
        fleet.start().unwrap();
        let vm = fleet.guest(0).unwrap();
        let (_, table, at) = some_leaf(vm.machine());
        std::thread::scope(|scope| {
            scope.spawn(|| checker.run());
            while checker.stats().unwrap().audits < 3 {
                std::thread::sleep(Duration::from_millis(1));
            }
            assert!(lock(&checker.findings).violations.is_empty(), "sound until now");
            // The program's code; a bit that no CPU looks at: writable by the primary, which it cannot be.
            vm.machine().pool().words(table)[at].fetch_or(1 << 9, Ordering::SeqCst);
            assert_eq!(vm.wait().unwrap(), ExitStatus::Signaled(libc::SIGKILL));
            checker.stop();
        });
        let stats = checker.stats().unwrap();
        assert!(
            stats.audits >= 4 && stats.longest_ms <= stats.total_ms && stats.cpu_share > 0.0,
            "{stats:?}"
        );
        let files: Vec<_> = fs::read_dir(&folder).unwrap().map(|file| file.unwrap().path()).collect();
        let report = fs::read_to_string(&files[0]).unwrap();
        assert_eq!(files.len(), 1, "{files:?}");
        assert!(report.starts_with("umbra report: audit\n"), "{report}");
        assert!(report.contains("  I16 broken at guest frame"), "{report}");
        for part in ["engine    ", "host      Linux", "last notifier events", "mappings: ", "(vcpu "] {
            assert!(report.contains(part), "no `{part}` in: {report}");
        }
        drop((vm, fleet.take(0)));
        let verdict = checker.finish().unwrap_err().to_string();
        assert!(verdict.contains("audits failed"), "{verdict}");
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn a_checker_that_is_stopped_does_not_sit_out_its_interval() {
        let Some(fleet) = endless() else { return };
        let checker = Checker::new(&fleet, None, Vigilance::Audit(Duration::from_secs(1 << 20)), None);
        std::thread::scope(|scope| {
            scope.spawn(|| checker.run());
            while checker.stats().unwrap().audits < 1 {
                std::thread::sleep(Duration::from_millis(1));
            }
            checker.stop();
        });
        fleet.take(0);
        checker.finish().unwrap();
    }
}
