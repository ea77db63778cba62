// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Made-up results for each branch of the judge.

use super::super::case::Settings;
use super::super::program::Program;
use super::super::run::RunReport;
use super::*;
use crate::inject::RuleAccount;

const CLEAN: &str = "umbra: check: 2 audits clean, no free frame written\n";
const UNSEEN: &str = "[[fault]]\npoint='kick'\ndelay='1ms'\n";
const ENOMEM: &str = "[[fault]]\npoint='frame-alloc'\nerror='ENOMEM'\n";
const CALL: &str = "[[fault]]\npoint='syscall'\ncall='mmap'\nerror='ENOMEM'\n";
const EFAULT: &str = "[[fault]]\npoint='vcpu-run'\nerror='EFAULT'\n";
const CORRUPT: &str = "allow-corruption=true\n[[fault]]\npoint='file-read'\ncorrupt=true\n";
const SIGBUS: &str = "[[fault]]\npoint='page'\nmemory='sigbus'\n";

fn native() -> Native {
    Native { first: "one\ntwo: 12 ns, 3 accesses\n".into(), other: "one\n".into() }
}

/// A run under `plan` all of whose rules fired once, which ended well.
fn good(plan: &str) -> (Case, Observed) {
    let plan: crate::inject::Plan = plan.parse().unwrap();
    let account = |rule: &Rule| RuleAccount { rule: rule.headline(), eligible: 1, fired: 1 };
    let report = RunReport { rules: plan.rules.iter().map(account).collect(), ..RunReport::default() };
    let program = Program { image: "hello", args: Vec::new(), input: String::new() };
    let seen = Observed {
        end: End::Exited(0),
        stdout: "one\ntwo: 777 ns, 3 accesses\n".into(),
        stderr: CLEAN.into(),
        report: Some(report),
        left: Vec::new(),
        files: Vec::new(),
    };
    (Case { number: 0, program, settings: Settings::default(), plan }, seen)
}

/// The verdict on a run under `plan` that differs from a good one by `change`.
fn verdict(plan: &str, change: impl FnOnce(&mut Case, &mut Observed)) -> Result<Ending, Kind> {
    let (mut case, mut seen) = good(plan);
    change(&mut case, &mut seen);
    judge(&case, &native(), &seen).map_err(|failure| {
        assert!(!failure.detail.is_empty());
        failure.kind
    })
}

/// The run failed with this status, and umbra says so.
fn failed(seen: &mut Observed, status: i32) {
    seen.end = End::Exited(status);
    seen.stderr = format!("umbra: the guest was ended, and this is the reason\n{CLEAN}");
}

#[test]
fn a_run_like_the_native_one_is_right_whatever_fired() {
    for plan in [UNSEEN, ENOMEM, CALL, EFAULT, CORRUPT, SIGBUS] {
        assert_eq!(verdict(plan, |_, _| ()), Ok(Ending::Equal), "{plan}");
    }
}

#[test]
fn what_must_never_happen_is_a_failure_whatever_fired() {
    type Change = fn(&mut Observed);
    let never: [(Kind, Change); 9] = [
        (Kind::Hang, |seen| seen.end = End::TimedOut),
        (Kind::Killed, |seen| seen.end = End::Signaled(libc::SIGSEGV)),
        (Kind::Panic, |seen| seen.stderr.push_str("thread 'main' (7) panicked at vmm/src/vm.rs:1:1:\n")),
        (Kind::Panic, |seen| seen.stderr.push_str("umbra: this is a bug of umbra's\n")),
        (Kind::Audit, |seen| seen.stderr.push_str("umbra: check: 3 frames are still in use\n")),
        (Kind::NoReport, |seen| seen.report = None),
        (Kind::NoReport, |seen| seen.report = Some(RunReport::default())),
        (Kind::Leak, |seen| {
            seen.report.as_mut().unwrap().leaks.push("descriptor 9 of anon_inode:kvm-vm".into());
        }),
        (Kind::LeftBehind, |seen| seen.left.push("tmp/x".into())),
    ];
    for plan in [UNSEEN, ENOMEM, CALL, EFAULT, CORRUPT, SIGBUS] {
        for (kind, change) in never {
            assert_eq!(verdict(plan, |_, seen| change(seen)), Err(kind), "{plan}");
        }
        let odd = [3, 125 + 1, 128 + libc::SIGTERM];
        for status in odd {
            assert_eq!(verdict(plan, |_, seen| failed(seen, status)), Err(Kind::Status), "{plan}{status}");
        }
    }
}

#[test]
fn a_guests_own_panic_is_not_umbras() {
    let verdict = verdict(CALL, |_, seen| {
        failed(seen, 101);
        seen.stderr.push_str("panicked at src/guests/touch.rs:1:1:\n");
        seen.stdout.clear();
    });
    assert_eq!(verdict, Ok(Ending::GuestFailed));
}

#[test]
fn what_nobody_must_notice_allows_no_failure() {
    assert_eq!(verdict(EFAULT, |_, seen| failed(seen, 1)), Err(Kind::Status), "a guest sees nothing of it");
    for status in [1, 125, 128 + libc::SIGKILL, 128 + libc::SIGBUS] {
        assert_eq!(verdict(UNSEEN, |_, seen| failed(seen, status)), Err(Kind::Status), "{status}");
    }
}

#[test]
fn a_rule_that_did_not_fire_allows_nothing() {
    for plan in [ENOMEM, CALL, EFAULT, SIGBUS] {
        let unfired = |seen: &mut Observed| seen.report.as_mut().unwrap().rules[0].fired = 0;
        for status in [1, 125, 128 + libc::SIGKILL] {
            let verdict = verdict(plan, |_, seen| {
                failed(seen, status);
                unfired(seen);
            });
            assert_eq!(verdict, Err(Kind::Status), "{plan}{status}");
        }
    }
    let verdict = verdict(CORRUPT, |_, seen| {
        seen.report.as_mut().unwrap().rules[0].fired = 0;
        seen.stdout = "none\n".into();
    });
    assert_eq!(verdict, Err(Kind::Output));
}

#[test]
fn a_guest_fails_as_its_rule_may_make_it() {
    let allowed = [
        (ENOMEM, vec![1, 128 + libc::SIGKILL]),
        (CALL, vec![1, 2, 128 + libc::SIGSEGV]),
        (SIGBUS, vec![1, 128 + libc::SIGBUS]),
    ];
    for (plan, statuses) in allowed {
        for status in statuses {
            let verdict = verdict(plan, |_, seen| failed(seen, status));
            assert_eq!(verdict, Ok(Ending::GuestFailed), "{plan}{status}");
        }
    }
    let other =
        [(SIGBUS, libc::SIGKILL), (CALL, libc::SIGKILL), (ENOMEM, libc::SIGBUS), (EFAULT, libc::SIGSEGV)];
    for (plan, signal) in other {
        assert_eq!(verdict(plan, |_, seen| failed(seen, 128 + signal)), Err(Kind::Status), "{plan}{signal}");
    }
}

#[test]
fn umbra_gives_up_only_where_that_is_promised_and_says_why() {
    assert_eq!(verdict(EFAULT, |_, seen| failed(seen, 125)), Ok(Ending::RunFailed));
    // Before the guest runs there may be no frame for it.
    assert_eq!(verdict(ENOMEM, |_, seen| failed(seen, 125)), Ok(Ending::RunFailed));
    for plan in [CALL, SIGBUS, CORRUPT] {
        assert_eq!(verdict(plan, |_, seen| failed(seen, 125)), Err(Kind::Status), "{plan}");
    }
    // That an allocation waited keeps no guest from starting.
    let late = format!("{CALL}[[fault]]\npoint='frame-alloc'\ndelay='1ms'\n");
    assert_eq!(verdict(&late, |_, seen| failed(seen, 125)), Err(Kind::Status));
    // A guest that was running is none that could not be started.
    let lost = verdict(ENOMEM, |_, seen| {
        failed(seen, 125);
        seen.stderr.push_str("umbra: the guest is lost: the engine (kvm) lost a vCPU: it gave up\n");
    });
    assert_eq!(lost, Err(Kind::Status));
    let silent = |seen: &mut Observed, status| {
        failed(seen, status);
        seen.stderr = format!("umbra: inject: rule 1 fired 1 of 1 times\n{CLEAN}");
    };
    assert_eq!(verdict(EFAULT, |_, seen| silent(seen, 125)), Err(Kind::NoReason));
    assert_eq!(verdict(SIGBUS, |_, seen| silent(seen, 128 + libc::SIGBUS)), Err(Kind::NoReason));
}

#[test]
fn what_is_said_of_every_run_is_no_reason() {
    for line in [
        "guest 1 exited with status 1",
        "12345 pages a second written, 0.005 s to 0.010 s",
        "pages a second written over 0.100 s, in 20 intervals (bitmap, write-protect)",
        "to replay it: umbra run --deterministic --seed 17 hello",
        "deterministic: seed 17, 5 exits, 0 steps, 2 switches, 9 notifier events",
    ] {
        let said = verdict(EFAULT, |_, seen| {
            failed(seen, 125);
            seen.stderr = format!("umbra: {line}\n{CLEAN}");
        });
        assert_eq!(said, Err(Kind::NoReason), "{line}");
    }
}

#[test]
fn the_report_of_a_lost_vcpu_may_stay_and_only_there() {
    let report = |seen: &mut Observed| seen.left.push("cwd/umbra-report-123.txt".into());
    assert_eq!(verdict(EFAULT, |_, seen| report(seen)), Ok(Ending::Equal));
    assert_eq!(verdict(ENOMEM, |_, seen| report(seen)), Err(Kind::LeftBehind));
    let in_tmp = verdict(EFAULT, |_, seen| seen.left.push("tmp/umbra-report-1".into()));
    assert_eq!(in_tmp, Err(Kind::LeftBehind));
}

#[test]
fn a_check_that_did_not_take_place_is_a_failure() {
    assert_eq!(verdict(UNSEEN, |_, seen| seen.stderr.clear()), Err(Kind::Audit));
    // Nobody checks what was never started.
    let lost = verdict(EFAULT, |_, seen| {
        failed(seen, 125);
        seen.stderr = "umbra: cannot map the pool: not enough memory\n".into();
    });
    assert_eq!(lost, Ok(Ending::RunFailed));
}

#[test]
fn what_a_guest_says_is_right_however_it_ends() {
    for said in ["", "one\n", "two: 1 ns, 3 accesses\none\none\n", "one\none\ntwo: 1 ns, 3 accesses\n"] {
        assert_eq!(verdict(ENOMEM, |_, seen| seen.stdout = said.into()), Err(Kind::Output), "{said:?}");
    }
    let when_failed = |said: &str| {
        verdict(ENOMEM, |_, seen| {
            failed(seen, 1);
            seen.stdout = said.into();
        })
    };
    for said in ["", "one\n", "one\ntwo: 5 ns, 3 acc", "two: 5 ns, 3 accesses\n"] {
        assert_eq!(when_failed(said).is_ok(), !said.ends_with("acc"), "{said:?}");
    }
    assert_eq!(when_failed("one\non"), Ok(Ending::GuestFailed));
    for said in ["three\n", "one\none\n", "one\nthr", "two: 5 ns, 4 accesses\n"] {
        assert_eq!(when_failed(said), Err(Kind::Output), "{said:?}");
    }
    assert_eq!(verdict(CORRUPT, |_, seen| seen.stdout = "anything\n".into()), Ok(Ending::Equal));
}

#[test]
fn several_guests_say_it_several_times_in_any_order() {
    let of_three = |said: &str| {
        verdict(UNSEEN, |case, seen| {
            case.settings.guests = 3;
            seen.stdout = said.into();
        })
    };
    assert_eq!(of_three("one\none\ntwo: 4 ns, 3 accesses\none\n"), Ok(Ending::Equal));
    assert_eq!(of_three("one\none\ntwo: 4 ns, 3 accesses\n"), Err(Kind::Output));
    assert_eq!(of_three("one\none\none\none\ntwo: 4 ns, 3 accesses\n"), Err(Kind::Output));
}

#[test]
fn a_guest_that_finds_its_memory_changed_is_right() {
    for line in [
        "threads: writer 1: private page 5 word 0: expected 0x0000000000000000, got 0xdeadf4a3e0ff1ce5\n",
        "mix: page 7 does not hold what was written to it\n",
    ] {
        let wrong = |plan: &str| {
            verdict(plan, |_, seen| {
                failed(seen, 1);
                seen.stderr.push_str(line);
            })
        };
        let memory = |kind| format!("[[fault]]\npoint='page'\nmemory='{kind}'\n");
        for plan in [ENOMEM, SIGBUS, &memory("revoke")] {
            assert_eq!(wrong(plan), Err(Kind::Output), "{plan}");
        }
        assert_eq!(wrong(&memory("poison")), Ok(Ending::GuestFailed));
        assert_eq!(wrong(CALL), Ok(Ending::GuestFailed));
        assert_eq!(wrong(CORRUPT), Ok(Ending::GuestFailed));
    }
}
