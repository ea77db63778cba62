// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What plans may say, and what is said of those that may not.

use super::*;

fn error(text: &str) -> String {
    text.parse::<Plan>().unwrap_err().to_string()
}

#[test]
fn a_plan_says_where_when_and_what() {
    let plan: Plan = "
        seed = 9
        [[fault]]
        point = 'syscall'
        call = 'mmap'
        nth = 5
        error = 'ENOMEM'
        [[fault]]
        point = 'notifier-start'
        event = 'unmap'
        probability = 0.5
        after = '20ms'
        stall = 'page'
        at-most = '30ms'"
        .parse()
        .unwrap();
    assert_eq!(plan.seed, 9);
    assert_eq!(
        plan.rules,
        [
            Rule {
                point: &points::SYSCALL,
                what: Some("mmap".into()),
                vm: None,
                at: None,
                pick: Pick::From(5),
                after: None,
                times: Some(1),
                effect: What::Error(libc::ENOMEM),
            },
            Rule {
                point: &points::NOTIFIER_START,
                what: Some("unmap".into()),
                vm: None,
                at: None,
                pick: Pick::Probability(0.5),
                after: Some(After::Time(Duration::from_millis(20))),
                times: None,
                effect: What::Stall(&points::PAGE, Duration::from_millis(30)),
            },
        ]
    );
}

#[test]
fn system_calls_are_named_or_numbered() {
    for call in ["'munmap'", "11"] {
        let plan: Plan = format!("[[fault]]\npoint='syscall'\ncall={call}\nerror='EINVAL'").parse().unwrap();
        assert_eq!(plan.rules[0].what.as_deref(), Some("munmap"));
    }
}

#[test]
fn what_is_wrong_is_named_with_its_line_and_what_could_stand_there() {
    let fault = |rest: &str| error(&format!("seed = 1\n\n[[fault]]\n{rest}"));
    for (rest, words) in [
        ("point='fram-alloc'\nerror='ENOMEM'", ["line 3", "no point `fram-alloc`", "frame-alloc"]),
        ("point='kick'\nerror='EIO'", ["line 3", "`EIO` is no error that `kick` has", "delay"]),
        ("point='kick'\ncorrupt=true", ["line 3", "`corrupt` cannot be had at `kick`", "stall"]),
        ("point='kick'", ["line 3", "does not say what is to happen", "delay, stall"]),
        ("point='kick'\ndelay='1ms'\nstall='page'", ["line 3", "`delay` and `stall`", "one of them"]),
        ("point='kick'\ndelay='1ms'\nnth=1\nevery=2", ["line 3", "`nth` and `every`", "one of them"]),
        ("point='kick'\ndelay='1ms'\nnth=0", ["line 3", "counted from 1", ""]),
        ("point='kick'\ndelay='11s'", ["line 3", "longer than one hit may wait", "10s"]),
        ("point='kick'\ndelay='1ms'\nat='0x1000'", ["line 3", "no address", "leave `at` out"]),
        ("point='punch'\nvm=1\ndelay='1ms'", ["line 3", "the pool's", "leave `vm` out"]),
        ("point='page'\nmemory='flip'", ["line 3", "corrupts data", "allow-corruption = true"]),
        ("point='page'\nmemory='slow'", ["line 3", "needs a `latency`", ""]),
        ("point='tick'\nmemory='slow'\nlatency='1ms'", ["line 3", "use the point `page`", ""]),
        ("point='page'\nmemory='slow'\nlatency='1ms'\nhold='1s'", ["line 3", "`hold` goes with", ""]),
        ("point='flush'\nat='heap'\ndelay='1ms'", ["line 3", "`at` by name", ""]),
        ("point='page'\nat='attic'\nmemory='revoke'", ["line 3", "`attic` is no address", ""]),
        ("point='tick'\nat='heap'\ndelay='1ms'", ["line 3", "have no address", ""]),
        ("point='page'\nmemory='pressure'\ntake='5%'", ["line 3", "use the point `tick`", ""]),
        ("point='page'\nmemory='sigbus'\ntake='5%'", ["line 3", "`take` goes with", "pressure"]),
        ("point='syscall'\ncall='mmapp'\nerror='EIO'", ["line 3", "no system call", "mmapp"]),
        ("point='page'\ncall='mmap'\nmemory='poison'", ["line 3", "`call` is for the point `syscall`", ""]),
        ("point='notifier-end'\nevent='gone'\ndelay='1ms'", ["line 3", "no event `gone`", "unmap"]),
        ("point='kick'\ndelay='1ms'\nwhen='now'", ["line 6", "unknown field `when`", "nth"]),
    ] {
        let said = fault(rest);
        for word in words {
            assert!(said.contains(word), "{rest}\n{said}\nlacks {word}");
        }
    }
    assert!(error("seed = 1").contains("no [[fault]]"));
    assert!(error("[[fault]\npoint = 1").starts_with("line 1: "));
}

#[test]
fn a_plan_that_is_written_is_the_plan_that_is_read() {
    let text = "
        seed = 3
        allow-corruption = true
        [[fault]]
        point = 'page'
        at = '0x1000-0x3000'
        every = 3
        times = 4
        memory = 'slow'
        latency = '150us'
        [[fault]]
        point = 'tick'
        at = 'heap'
        memory = 'revoke'
        hold = '2s'
        [[fault]]
        point = 'tick'
        at = '0x1000-0x3000'
        memory = 'sigbus'
        [[fault]]
        point = 'file-read'
        vm = 0
        corrupt = true
        probability = 0.125
        [[fault]]
        point = 'vcpu-run'
        after = 'kick'
        exit = 'shutdown'
        [[fault]]
        point = 'tick'
        after = '1s'
        memory = 'pressure'
        take = '12.5%'
        [[fault]]
        point = 'flush'
        split = true
        [[fault]]
        point = 'syscall'
        call = 'brk'
        nth = 2
        times = 3
        error = 'ENOMEM'
        [[fault]]
        point = 'notifier-end'
        event = 'protection-vma'
        stall = 'page'";
    let plan: Plan = text.parse().unwrap();
    assert_eq!(plan.to_toml().unwrap().parse::<Plan>().unwrap(), plan);
}

#[test]
fn what_a_rule_may_come_to_is_its_errors() {
    let outcome = |rest: &str| {
        let plan: Plan = format!("allow-corruption=true\n[[fault]]\n{rest}").parse().unwrap();
        (plan.rules[0].outcome(), plan.rules[0].corrupts())
    };
    assert_eq!(outcome("point='vcpu-run'\nerror='EINTR'"), (Outcome::Unseen, false));
    assert_eq!(outcome("point='vcpu-run'\nerror='EFAULT'"), (Outcome::RunFails, false));
    assert_eq!(outcome("point='vcpu-run'\ndelay='1ms'"), (Outcome::Unseen, false));
    assert_eq!(outcome("point='vcpu-run'\nexit='hlt'"), (Outcome::RunFails, false));
    assert_eq!(outcome("point='frame-alloc'\nerror='ENOMEM'"), (Outcome::GuestFails, false));
    assert_eq!(outcome("point='file-read'\ncorrupt=true"), (Outcome::GuestFails, true));
    assert_eq!(outcome("point='page'\nmemory='slow'\nlatency='1ms'"), (Outcome::Unseen, false));
}

#[test]
fn every_point_has_a_promise_and_a_name_of_its_own() {
    let mut names: Vec<_> = points::all().map(|point| point.name).collect();
    let count = names.len();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), count);
    for point in points::all() {
        assert!(
            !point.promise.is_empty() && !point.models.is_empty() && !point.place.is_empty(),
            "{}",
            point.name
        );
    }
}
