// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `umbra inject`: every fault point fires with each of its errors and effects, and holds its promise.
//!
//! `every_fault` makes each of them happen once and holds what comes of it against what the point says ([`Outcome`]); `promises`
//! looks closer where a promise says more; `sweep` fails every allocation of a guest once. All runs are with `--check`: what the
//! audits find, a frame that is left over included, ends umbra with 125 and says so. Points of the library that no guest can reach
//! in every way have further tests in shadow-mmu; docs/fault-injection.md lists all.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;
#[path = "inject/every_fault.rs"]
mod every_fault;
#[path = "inject/guest.rs"]
mod guest;
#[path = "inject/promises.rs"]
mod promises;
#[path = "inject/sweep.rs"]
mod sweep;

use common::{code, engine, finish, folder, guests, kvm, stderr, umbra};
use guest::Guest;
use serde_json::Value;
use shadow_mmu::inject::Outcome;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use vmm::engine::EngineKind;

/// Nothing here takes this long, whatever is injected.
const LIMIT: Duration = Duration::from_secs(60);
const FAILED: i32 = 125;
const KILLED: i32 = 128 + libc::SIGKILL;

/// A guest that ran under a plan.
#[derive(Debug)]
struct Injected {
    output: Output,
    /// What `--report=json` said.
    account: Value,
    /// What umbra and the guest said besides.
    said: String,
    plan: String,
}

impl Injected {
    fn code(&self) -> i32 {
        code(self.output.status)
    }

    /// How often rule `index` fired.
    fn fired(&self, index: usize) -> u64 {
        self.account["rules"][index]["fired"].as_u64().unwrap()
    }

    /// umbra's own lines, without those of the check and the log.
    fn complaints(&self) -> Vec<&str> {
        let lines = self.said.lines();
        lines.filter(|line| line.starts_with("umbra: ") && !line.starts_with("umbra: check: ")).collect()
    }

    /// Nothing is broken: no panic, no violation, no frame left over. True of every run.
    #[track_caller]
    fn assert_sound(&self) {
        let said = &self.said;
        for bad in ["panicked", "a bug of umbra's", "umbra: check: frame", "still in use"] {
            assert!(!said.contains(bad), "{}\n{said}", self.plan);
        }
    }

    /// The guest did what `native` did.
    #[track_caller]
    fn assert_unseen(&self, guest: &Guest, native: &Output) {
        self.assert_sound();
        assert_eq!(self.code(), code(native.status), "{}\n{}", self.plan, self.said);
        assert_eq!(guest.answer(&self.output.stdout), guest.answer(&native.stdout), "{}", self.plan);
        assert!(self.said.contains("audits clean") || guest.is_unchecked(), "{}\n{}", self.plan, self.said);
    }

    /// What an outcome allows, and nothing else.
    #[track_caller]
    fn assert_within(&self, outcome: Outcome, guest: &Guest, native: &Output) {
        self.assert_sound();
        match (self.code(), outcome) {
            (0, _) | (_, Outcome::Unseen) => self.assert_unseen(guest, native),
            // umbra's own failure: one line, and nothing that the guest had computed.
            (FAILED, _) => {
                assert_eq!(self.complaints().len(), 1, "{}\n{}", self.plan, self.said);
                let before_the_guest = self.account["hits"].get("vcpu-run").is_none();
                assert!(outcome == Outcome::RunFails || before_the_guest, "{}\n{}", self.plan, self.said);
            }
            (KILLED, Outcome::GuestFails) => {
                assert!(self.said.contains("died of SIGKILL: out of memory"), "{}\n{}", self.plan, self.said);
            }
            // The guest's own failure, which it tells of.
            (1, Outcome::GuestFails) => {
                assert!(self.said.contains(guest.name()), "{}\n{}", self.plan, self.said);
            }
            (other, _) => panic!("status {other}\n{}\n{}", self.plan, self.said),
        }
    }
}

/// A file with `plan` in it, in the folder of one test.
fn plan_file(folder: &Path, plan: &str) -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let path = folder.join(format!("plan-{}.toml", NEXT.fetch_add(1, Ordering::Relaxed)));
    std::fs::write(&path, plan).unwrap();
    path
}

/// Runs `guest` under `plan`. What umbra leaves in the current folder, as reports, goes to `folder`.
fn inject(folder: &Path, plan: &str, guest: &Guest) -> Injected {
    let mut command = umbra();
    command.current_dir(folder).arg("inject").arg(plan_file(folder, plan)).args(["--report=json", "--"]);
    command.args(guest.run());
    let output = finish(&mut command, guest.input(), LIMIT);
    let (account, said): (Vec<_>, Vec<_>) =
        stderr(&output).lines().map(str::to_owned).partition(|line| line.starts_with("{\"rules\""));
    let said = said.join("\n");
    let account = account.first().unwrap_or_else(|| panic!("no account\n{plan}\n{said}"));
    Injected { account: serde_json::from_str(account).unwrap(), output, said, plan: plan.to_owned() }
}

#[test]
fn every_point_is_listed_with_its_promise_and_what_it_offers() {
    let output = finish(umbra().args(["inject", "--list", "--json"]), b"", LIMIT);
    assert_eq!(code(output.status), 0);
    let list: Value = serde_json::from_slice(&output.stdout).unwrap();
    let text = finish(umbra().args(["inject", "--list"]), b"", LIMIT).stdout;
    let text = String::from_utf8(text).unwrap();
    for (point, shown) in vmm::inject::points::all().zip(list["points"].as_array().unwrap()) {
        assert_eq!(shown["name"], point.name);
        assert_eq!(shown["promise"], point.promise);
        assert!(shown["effects"].as_array().unwrap().len() >= point.errors.len().max(1));
        assert!(text.contains(&format!("\n  {}\n", point.name)) && text.contains(point.promise));
    }
}

#[test]
fn a_plan_that_cannot_be_followed_starts_nothing() {
    let folder = folder("inject-refused");
    let refusals = [
        ("[[fault]]\npoint = 'frame-aloc'\nerror = 'ENOMEM'", "there is no point `frame-aloc`"),
        ("\n\n[[fault]]\npoint = 'kick'\nerror = 'ENOMEM'", "line 3: "),
        ("[[fault]]\npoint = 'file-read'\ncorrupt = true", "allow-corruption"),
        ("", "no [[fault]]"),
    ];
    for (plan, words) in refusals {
        let mut command = umbra();
        command.arg("inject").arg(plan_file(&folder, plan)).args(["--", "run", "hello"]);
        let output = finish(&mut command, b"", LIMIT);
        let said = stderr(&output);
        assert_eq!(code(output.status), 2, "{said}");
        assert!(said.contains(words) && said.trim_end().lines().count() == 1, "{said}");
        assert_eq!(output.stdout, b"");
    }
}

#[test]
fn a_plan_that_never_fired_says_so() {
    if !guests() {
        return;
    }
    let folder = folder("inject-never");
    let plan = "[[fault]]\npoint = 'frame-alloc'\nnth = 100000\nerror = 'ENOMEM'";
    let mut command = umbra();
    command.arg("inject").arg(plan_file(&folder, plan)).args(["--", "run", "hello"]);
    let output = finish(&mut command, b"", LIMIT);
    let said = stderr(&output);
    assert_eq!(code(output.status), 0, "{said}");
    assert!(said.contains("rule 1 (frame-alloc: ENOMEM) never fired: it was asked "), "{said}");
}
