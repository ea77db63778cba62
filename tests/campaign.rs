// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Campaigns, `umbra inject --campaign`: a fixed small one that must be clean, and planted failures that must be found and shrunk.
//! docs/campaigns.md says what one is.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use common::{engine, folder, guests, stderr, umbra};
use shadow_mmu::inject::Outcome;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};
use vmm::engine::{EngineChoice, EngineKind};
use vmm::inject::Plan;
use vmm::inject::campaign::{Campaign, Case, Deck, Ending, Failure, Judge, Kind, Native, Observed, judge};

/// How long a run may take here, where other tests run at the same time.
const LIMIT: Duration = Duration::from_secs(60);

fn campaign<'a>(seed: u64, runs: u64, keep: &Path, judge: Judge, stop: &'a AtomicBool) -> Campaign<'a> {
    Campaign {
        // Runs say which engine they take unless they are told.
        deck: Deck {
            engine: (engine() == EngineKind::Ptrace).then_some(EngineChoice::Ptrace),
            ..Deck::new(seed)
        },
        first: 0,
        runs,
        jobs: 2,
        limit: LIMIT,
        keep: keep.to_owned(),
        umbra: PathBuf::from(env!("CARGO_BIN_EXE_umbra-under-test")),
        judge,
        stop,
    }
}

/// The small campaign of the default test run. A failure of it prints its plan and how to replay it.
#[test]
fn a_small_campaign_is_clean_and_most_points_fire_in_it() {
    if !guests() {
        return;
    }
    let keep = folder("campaign-small").join("kept");
    let stop = AtomicBool::new(false);
    let mut told = 0;
    let summary = campaign(1, 60, &keep, judge, &stop).run(&mut |_| told += 1).unwrap();
    assert!(summary.failures.is_empty(), "{}", summary.text());
    assert_eq!((summary.runs, summary.interrupted), (60, false));
    assert!(summary.covered() >= 12, "{}", summary.text());
    assert!(summary.endings.values().sum::<u64>() == 60 && summary.endings.len() == 3, "{}", summary.text());
    assert!(told > 0);
    assert!(!keep.exists(), "nothing failed, so there is nothing to keep");
    println!("{}", summary.text());
}

/// As if umbra had promised that nobody notices a guest without memory.
fn nobody_runs_out_of_memory(case: &Case, native: &Native, seen: &Observed) -> Result<Ending, Failure> {
    let ending = judge(case, native, seen)?;
    let rules = case.plan.rules.iter().zip(&seen.report.as_ref().unwrap().rules);
    let mut fired = rules.filter(|(_, account)| account.fired > 0).map(|(rule, _)| rule);
    match fired.any(|rule| rule.point.name == "frame-alloc" && rule.outcome() > Outcome::Unseen) {
        true if ending != Ending::Equal => {
            Err(Failure { kind: Kind::Status, detail: "there was no memory".into() })
        }
        _ => Ok(ending),
    }
}

/// What the judge is told to call wrong is found, and comes down to the one rule that does it.
#[test]
fn a_planted_failure_is_found_kept_and_shrunk_to_its_rule() {
    if !guests() {
        return;
    }
    let keep = folder("campaign-planted").join("kept");
    let stop = AtomicBool::new(false);
    let deck = Deck::new(1);
    // A run that is likely to fail, so that others need not be run.
    let is_guilty = |case: &Case| {
        let rules = &case.plan.rules;
        let worst = &rules[0];
        rules.len() >= 3
            && worst.point.name == "frame-alloc"
            && worst.outcome() == Outcome::GuestFails
            && worst.pick == vmm::inject::Pick::All
            && worst.after.is_none()
    };
    let number = (0..100_000).find(|&number| is_guilty(&deck.case(number))).unwrap();
    let mut campaign = campaign(1, 1, &keep, nobody_runs_out_of_memory, &stop);
    campaign.first = number;
    let summary = campaign.run(&mut |_| ()).unwrap();
    let [failed] = &summary.failures[..] else { panic!("{}", summary.text()) };
    assert_eq!((failed.run, failed.failure.kind), (number, Kind::Status));
    let plan: Plan = fs::read_to_string(failed.folder.join("plan.toml")).unwrap().parse().unwrap();
    assert_eq!(plan.to_toml().unwrap(), failed.plan);
    let [rule] = &plan.rules[..] else { panic!("{}", failed.plan) };
    assert_eq!(rule.point.name, "frame-alloc");
    assert!(failed.again.unwrap().failed > 0, "{}", summary.text());
    assert!(failed.command.contains("hello"), "the smallest program fails as well: {}", failed.command);
    let first: Plan = fs::read_to_string(failed.folder.join("first/plan.toml")).unwrap().parse().unwrap();
    assert_eq!(first, deck.case(number).plan);

    // The command that is kept does it again.
    let output =
        Command::new("sh").arg("-c").arg(&failed.command).current_dir(&failed.folder).output().unwrap();
    assert_ne!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(stderr(&output).contains("frame-alloc: ENOMEM) fired"), "{}", stderr(&output));
}

/// umbra under a limit that no run can hold, as if it hung: the run is killed, and judged so.
#[test]
fn a_run_that_does_not_end_is_killed_and_is_a_failure() {
    if !guests() {
        return;
    }
    let keep = folder("campaign-hang").join("kept");
    let stop = AtomicBool::new(false);
    let mut campaign = campaign(1, 1, &keep, judge, &stop);
    // Not umbra: it never ends, whatever it is told.
    let endless = folder("campaign-endless").join("endless");
    fs::write(&endless, "#!/bin/sh\nsleep 1000 & wait\n").unwrap();
    fs::set_permissions(&endless, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    (campaign.umbra, campaign.limit) = (endless, Duration::from_millis(20));
    let summary = campaign.run(&mut |_| ()).unwrap();
    let [failed] = &summary.failures[..] else { panic!("{}", summary.text()) };
    assert_eq!(failed.failure.kind, Kind::Hang);
    let again = failed.again.unwrap();
    assert_eq!((again.failed, again.of), (3, 3));
}

#[test]
fn the_command_says_in_json_what_came_of_it() {
    if !guests() {
        return;
    }
    let folder = folder("campaign-json");
    let args =
        ["inject", "--campaign", "4", "--seed", "9", "--images", "hello,touch", "--json", "--timeout", "60s"];
    let output = umbra().args(args).current_dir(&folder).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stdout));
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((json["seed"].as_u64(), json["runs"].as_u64()), (Some(9), Some(4)));
    assert!(
        json["images"].as_object().unwrap().keys().all(|name| ["hello", "touch"].contains(&name.as_str()))
    );
    assert_eq!(json["failures"], serde_json::json!([]));
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 0);
}

#[test]
fn a_signal_ends_a_campaign_with_what_was_judged_so_far() {
    if !guests() {
        return;
    }
    let folder = folder("campaign-signal");
    let mut child = umbra()
        .args(["inject", "--campaign", "1000000", "--json", "--timeout", "60s"])
        .current_dir(&folder)
        .env("TMPDIR", &folder)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // It is at work when a run has its folder.
    let began = Instant::now();
    let is_at_work = || {
        let mut folders = fs::read_dir(&folder).unwrap().flatten();
        folders.any(|entry| entry.path().join("job-0/plan.toml").exists())
    };
    while !is_at_work() {
        assert!(began.elapsed() < LIMIT, "it does not begin");
        std::thread::sleep(Duration::from_millis(5));
    }
    // SAFETY: it takes no memory; the child was not waited for, so the number is its.
    assert_eq!(unsafe { libc::kill(child.id() as libc::pid_t, libc::SIGINT) }, 0);
    let mut text = String::new();
    std::io::Read::read_to_string(&mut child.stdout.take().unwrap(), &mut text).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(json["interrupted"], true);
    assert!(json["runs"].as_u64().unwrap() < 1_000_000);
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 0, "its folder is gone");
}

#[test]
fn what_makes_no_campaign_is_refused() {
    let refused: [&[&str]; 6] = [
        &["--campaign", "3", "--images", "nobody"],
        &["--campaign", "3", "oom-at-5th"],
        &["--campaign", "3", "--list"],
        &["--seed", "3"],
        &["--campaign", "x"],
        &["--json"],
    ];
    for args in refused {
        let output = umbra().arg("inject").args(args).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", stderr(&output));
        assert!(output.stdout.is_empty());
    }
}

/// What umbra says of itself at the end of a run under a plan.
#[test]
fn a_report_goes_to_the_file_that_is_named_and_finds_nothing_left() {
    if !guests() {
        return;
    }
    let folder = folder("campaign-report");
    fs::write(folder.join("plan.toml"), "[[fault]]\npoint = 'vcpu-run'\nnth = 2\nerror = 'EINTR'\n").unwrap();
    let args = ["inject", "plan.toml", "--report=json:report.json", "--", "run", "--guests", "2", "hello"];
    let output = umbra().args(args).current_dir(&folder).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(!stderr(&output).contains("rules"), "{}", stderr(&output));
    let report: serde_json::Value =
        serde_json::from_slice(&fs::read(folder.join("report.json")).unwrap()).unwrap();
    assert_eq!(report["rules"][0]["fired"], 1);
    assert_eq!(report["leaks"], serde_json::json!([]));
}
