// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory that fails under a program, as a plan says: what the program sees, which is what it would see on Linux, and that nothing
//! else changes. `--check` looks at the shadow map and at every frame all the while.
//!
//! The program is the bundled `victim`, which says of each page what became of it, or busybox where that is there.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use common::{busybox, code, finish, folder, guests, stderr, text, umbra};
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(120);
/// What `victim` ends with if something happened to its pages.
const HARMED: i32 = 3;
/// Where `victim` has its 64 pages: guests have the same addresses in each run. A test says so.
const PAGES: u64 = 0x7fff_fefb_f000;

/// A plan in a file of its own.
fn plan(test: &str, toml: &str) -> PathBuf {
    let path = folder(&format!("memory-faults-{test}")).join("plan.toml");
    std::fs::write(&path, toml).unwrap();
    path
}

fn inject_into(plan: &Path, options: &[&str], program: &[&str], input: &[u8]) -> Output {
    let mut command = umbra();
    command.arg("inject").arg(plan).args(["--report=json", "--", "run"]).args(options).args(program);
    finish(&mut command, input, LIMIT)
}

/// Runs `victim ARGS` under a plan, audited. Standard output in lines, the status, and the account.
fn victim(test: &str, toml: &str, args: &[&str]) -> Option<(Vec<String>, i32, serde_json::Value)> {
    if !guests() {
        return None;
    }
    let program = [&["victim"], args].concat();
    let output = inject_into(&plan(test, toml), &["--check"], &program, b"");
    let said = stderr(&output);
    assert!(said.contains("audits clean, no free frame written"), "{test}: {said}");
    let account = said.lines().find(|line| line.starts_with('{'));
    let account =
        serde_json::from_str(account.unwrap_or_else(|| panic!("{test}: no account in {said}"))).unwrap();
    let lines = String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect();
    Some((lines, code(output.status), account))
}

fn notes(account: &serde_json::Value) -> Vec<String> {
    let notes = account["notes"].as_array().cloned().unwrap_or_default();
    notes.iter().map(|note| note.as_str().unwrap().to_owned()).collect()
}

fn page_at(n: u64) -> String {
    format!("{:#x}-{:#x}", PAGES + n * 4096, PAGES + (n + 1) * 4096)
}

/// A rule of one effect on the page `n` of `victim`.
fn on_page(n: u64, rest: &str) -> String {
    format!("[[fault]]\npoint = 'page'\nat = '{:#x}'\n{rest}", PAGES + n * 4096)
}

#[test]
fn addresses_are_the_same_in_each_run() {
    if !guests() {
        return;
    }
    for _ in 0..2 {
        let output = finish(umbra().args(["run", "victim", "--where"]), b"", LIMIT);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!(code(output.status), 0, "{said}");
        let first = format!("victim: pages from {PAGES:#x} to {:#x}", PAGES + 64 * 4096);
        assert_eq!(said.lines().collect::<Vec<_>>(), [&first, "victim: 64 pages hold what they must"]);
    }
}

#[test]
fn each_kind_of_page_gives_the_signal_that_linux_gives_and_efault() {
    let cases = [
        ("sigbus", "SIGBUS ADRERR, si_addr +0"),
        ("poison", "SIGBUS MCEERR_AR, si_addr +0, si_addr_lsb 12"),
        ("revoke", "SIGSEGV ACCERR, si_addr +0"),
    ];
    for (kind, signal) in cases {
        let toml = on_page(20, &format!("memory = '{kind}'"));
        let Some((lines, status, account)) = victim(kind, &toml, &[]) else { return };
        let expected = [
            &format!("page 20: {signal}"),
            "page 20: write(2) says EFAULT",
            "victim: of 64 pages 1 failed, 0 lost what they held, 0 bits differed",
        ];
        assert_eq!(lines, expected);
        assert_eq!(status, HARMED);
        let name = if kind == "sigbus" { "bus" } else { kind };
        assert_eq!(notes(&account)[0], format!("{name} at {}", page_at(20)));
    }
}

#[test]
fn a_named_region_is_hit_and_no_other() {
    let toml = "[[fault]]\npoint = 'page'\nat = 'heap'\nnth = 5\nmemory = 'poison'";
    let Some((lines, status, account)) = victim("heap", toml, &["--heap"]) else { return };
    assert_eq!(lines[0], "page 4: SIGBUS MCEERR_AR, si_addr +0, si_addr_lsb 12");
    assert_eq!((lines.len(), status), (3, HARMED));
    assert_eq!(account["rules"][0]["fired"], 1);
    // The same rule, where the pages are mapped: there is no heap.
    let (lines, status, account) = victim("no-heap", toml, &[]).unwrap();
    assert_eq!((lines[0].as_str(), status), ("victim: 64 pages hold what they must", 0));
    assert_eq!(account["rules"][0]["eligible"], 0);
}

#[test]
fn a_range_fails_as_a_whole_at_a_tick_and_the_rest_works() {
    let (from, to) = (PAGES + 60 * 4096, PAGES + 64 * 4096);
    let toml = format!("[[fault]]\npoint = 'tick'\nnth = 30\nat = '{from:#x}-{to:#x}'\nmemory = 'sigbus'");
    let Some((lines, status, account)) = victim("range", &toml, &["--until", "fault", "--pause", "5"]) else {
        return;
    };
    let failed: Vec<_> = lines.iter().filter(|line| line.ends_with("SIGBUS ADRERR, si_addr +0")).collect();
    // It was looking at some of them when that happened, perhaps.
    assert!(
        (1..=4).contains(&failed.len()) && failed.iter().all(|line| line.starts_with("page 6")),
        "{lines:?}"
    );
    assert_eq!(status, HARMED);
    assert_eq!(notes(&account)[0], format!("bus at {from:#x}-{to:#x}"));
}

#[test]
fn a_revoked_page_comes_back_with_what_it_held_and_a_poisoned_one_with_zeros() {
    // Where the host is slow, all of it may fall between two looks. What poison took is seen to be lost even then; a revoke
    // that nobody saw leaves nothing to be seen, and the program would wait for ever: it lasts longer than any host is slow.
    let kinds =
        [("revoke", "10s", "works, and holds what it held"), ("poison", "800ms", "works, and holds zeros")];
    for (kind, hold, back) in kinds {
        let page = PAGES + 7 * 4096;
        let toml = format!(
            "[[fault]]\npoint = 'tick'\nnth = 30\nat = '{page:#x}'\nmemory = '{kind}'\nhold = '{hold}'"
        );
        let args = ["--until", "back", "--pause", "5"];
        let Some((lines, status, account)) = victim(&format!("hold-{kind}"), &toml, &args) else { return };
        let seen = lines.iter().any(|line| line == &format!("page 7: {back}"));
        assert!(seen, "{kind}: {lines:?}");
        assert_eq!(status, HARMED);
        assert_eq!(notes(&account), [format!("{kind} at {}", page_at(7))]);
    }
}

#[test]
fn hold_ends_a_trap_that_an_access_has_set() {
    let toml = on_page(7, "memory = 'revoke'\nnth = 1\nhold = '500ms'");
    let Some((lines, status, _)) = victim("page-hold", &toml, &["--until", "back", "--pause", "5"]) else {
        return;
    };
    assert_eq!(lines[0], "page 7: SIGSEGV ACCERR, si_addr +0");
    // It was never filled: the first store was refused.
    assert_eq!(lines[2], "page 7: works, and holds zeros");
    assert_eq!(status, HARMED);
}

#[test]
fn memory_that_fails_later_is_some_page_that_is_in_memory_and_the_seed_says_which() {
    let run = |test: &str, seed: u64| {
        let toml =
            format!("seed = {seed}\n[[fault]]\npoint = 'tick'\nat = 'mappings'\nnth = 50\nmemory = 'poison'");
        victim(test, &toml, &["--until", "fault", "--pause", "5"])
    };
    let Some((lines, status, account)) = run("later", 1) else { return };
    assert!(lines[0].ends_with("SIGBUS MCEERR_AR, si_addr +0, si_addr_lsb 12"), "{lines:?}");
    assert_eq!(status, HARMED);
    let (_, _, again) = run("later-again", 1).unwrap();
    assert_eq!(notes(&account), notes(&again));
    let others: Vec<_> = (2..6).map(|seed| notes(&run("later-other", seed).unwrap().2)).collect();
    assert!(others.iter().any(|other| *other != notes(&account)), "{others:?}");
}

#[test]
fn a_flipped_bit_is_one_bit() {
    let toml = format!("allow-corruption = true\n{}", on_page(3, "memory = 'flip'\nnth = 1"));
    // The fault's own access comes after it, so the flip may be overwritten; a tick's is not.
    let Some((lines, status, account)) = victim("flip-page", &toml, &[]) else { return };
    assert_eq!(notes(&account), [format!("flip at {}", page_at(3))]);
    assert_eq!((lines.len(), status), (1, 0), "the page was filled after it: {lines:?}");
    let toml =
        "allow-corruption = true\n[[fault]]\npoint = 'tick'\nat = 'mappings'\nnth = 50\nmemory = 'flip'";
    let (lines, status, account) = victim("flip-tick", toml, &["--until", "fault", "--pause", "5"]).unwrap();
    let note = notes(&account).remove(0);
    let at = u64::from_str_radix(&note["flip at 0x".len()..][..12], 16).unwrap();
    assert_eq!(lines[0], format!("page {}: 1 bits differ", (at - PAGES) / 4096));
    assert_eq!(status, HARMED);
}

#[test]
fn slow_memory_is_fetched_again_and_again_and_holds_what_it_held() {
    let toml = "[[fault]]\npoint = 'page'\nat = 'mappings'\nmemory = 'slow'\nlatency = '100us'";
    let Some((lines, status, account)) = victim("slow", toml, &["--rounds", "20", "--pause", "20"]) else {
        return;
    };
    assert_eq!((lines.as_slice(), status), (&["victim: 64 pages hold what they must".to_owned()][..], 0));
    // Each page alone, and anew after ticks; in how many of the rounds is a matter of time.
    let fetches = account["rules"][0]["fired"].as_u64().unwrap();
    assert!(fetches >= 3 * 64, "{fetches} fetches");
}

#[test]
fn who_needs_more_than_pressure_leaves_is_killed_and_who_does_not_is_unaffected() {
    let toml = "[[fault]]\npoint = 'tick'\nnth = 1\nmemory = 'pressure'\ntake = '90%'";
    let Some((lines, status, account)) = victim("pressure", toml, &["--rounds", "100", "--pause", "5"])
    else {
        return;
    };
    assert_eq!((lines.as_slice(), status), (&["victim: 64 pages hold what they must".to_owned()][..], 0));
    assert_eq!(notes(&account), ["pressure takes 58982 frames (230 MiB)"]);
    let toml = "[[fault]]\npoint = 'tick'\nevery = 2\nmemory = 'pressure'\ntake = '25%'";
    let grow = ["--until", "fault", "--grow", "16", "--pause", "2"];
    let (lines, status, account) = victim("pressure-all", toml, &grow).unwrap();
    assert_eq!((lines.len(), status), (0, 128 + libc::SIGKILL));
    assert!(notes(&account).len() >= 4, "{account}");
}

#[test]
fn pressure_that_is_over_gives_the_memory_back() {
    // More than is left while it lasts, touched after a long while.
    let toml = "[[fault]]\npoint = 'tick'\nnth = 1\nmemory = 'pressure'\ntake = '99%'\nhold = '30ms'";
    let args = ["--rounds", "4", "--grow", "1000", "--pause", "900"];
    let Some((lines, status, account)) = victim("pressure-over", toml, &args) else { return };
    assert_eq!((lines.as_slice(), status), (&["victim: 64 pages hold what they must".to_owned()][..], 0));
    assert_eq!(notes(&account).len(), 1);
}

#[test]
fn guests_that_share_a_pool_fail_one_by_one() {
    if !guests() {
        return;
    }
    let toml = format!("{}\nvm = 1", on_page(5, "memory = 'poison'"));
    let output = inject_into(&plan("fleet", &toml), &["--check", "--guests", "2"], &["victim"], b"");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(said.matches("hold what they must").count(), 1, "{said}{}", stderr(&output));
    assert_eq!(said.matches("page 5: SIGBUS MCEERR_AR, si_addr +0, si_addr_lsb 12").count(), 1, "{said}");
    assert!(stderr(&output).contains(&format!("machine 1: poison at {}", page_at(5))), "{}", stderr(&output));
}

#[test]
fn a_program_without_a_handler_dies_and_the_report_says_where_and_why() {
    if !guests() {
        return;
    }
    let toml = "[[fault]]\npoint = 'page'\nat = 'mappings'\nnth = 3\nmemory = 'poison'";
    let output = inject_into(&plan("dies", toml), &["--check"], &["touch", "--pages", "64"], b"");
    let said = stderr(&output);
    assert_eq!(code(output.status), 128 + libc::SIGBUS, "{said}");
    for part in [
        "died of SIGBUS: the page has failed, and its content is lost (BUS_MCEERR_AR)",
        "the plan did that: it poisoned the page",
        &format!("of {:#x}", PAGES + 2 * 4096),
    ] {
        assert!(said.contains(part), "no `{part}` in: {said}");
    }
}

#[test]
fn sharing_goes_on_beside_traps_and_flips() {
    if !guests() {
        return;
    }
    let toml = "seed = 3\nallow-corruption = true\n
        [[fault]]\npoint = 'tick'\nat = 'mappings'\nevery = 2\nmemory = 'flip'\n
        [[fault]]\npoint = 'tick'\nat = 'mappings'\nevery = 3\nmemory = 'revoke'\nhold = '20ms'";
    let options = ["--check", "--ksm"];
    let program = ["victim", "--rounds", "60", "--pause", "5"];
    let output = inject_into(&plan("ksm", toml), &options, &program, b"");
    let said = stderr(&output);
    assert_eq!(code(output.status), HARMED, "{said}");
    assert!(said.contains("audits clean, no free frame written"), "{said}");
}

#[test]
fn a_real_program_dies_of_its_poisoned_heap_and_computes_the_same_on_slow_memory() {
    if !guests() {
        return;
    }
    let Some(busybox) = busybox() else { return };
    let input = text(200_000);
    let sorted = finish(std::process::Command::new(busybox).args(["sort"]), &input, LIMIT);
    let program = [busybox.to_str().unwrap(), "sort"];
    let slow = "[[fault]]\npoint = 'page'\nat = 'heap'\nmemory = 'slow'\nlatency = '20us'";
    let output = inject_into(&plan("busybox-slow", slow), &["--check"], &program, &input);
    assert_eq!(code(output.status), 0, "{}", stderr(&output));
    assert!(output.stdout == sorted.stdout, "slow memory changed the result");
    let poison = "[[fault]]\npoint = 'page'\nat = 'heap'\nnth = 30\nmemory = 'poison'";
    let output = inject_into(&plan("busybox-poison", poison), &["--check"], &program, &input);
    assert_eq!(code(output.status), 128 + libc::SIGBUS, "{}", stderr(&output));
}

/// A program that comes to where the ready plan `name` has its faults, with its input.
fn reaching(name: &str) -> (&'static str, String) {
    let many_reads = || format!("fill mix\n{}quit\n", "verify\n".repeat(2500));
    match name {
        "busy-host" => ("threads --rounds 20", String::new()),
        "failing-read" | "interrupted-calls" => ("mix --pages 16", many_reads()),
        "slow-disk" => ("mix --pages 16", "fill mix\nverify\nquit\n".into()),
        "oom-at-5th" | "oom-random" => ("torture 1 --ops 200 --pages 128", String::new()),
        "poisoned-later" => ("victim --until fault --pause 5", String::new()),
        "thread-limit" => ("threads --writers 4 --rounds 2 --pages 4", String::new()),
        _ => ("victim --rounds 60 --pause 5", String::new()),
    }
}

#[test]
fn every_ready_plan_does_something_and_umbra_stays_in_order() {
    if !guests() {
        return;
    }
    let list = umbra().args(["inject", "--list", "--json"]).output().unwrap();
    let list: serde_json::Value = serde_json::from_slice(&list.stdout).unwrap();
    let names: Vec<_> =
        list["plans"].as_array().unwrap().iter().map(|plan| plan["name"].as_str().unwrap()).collect();
    assert!(names.len() >= 14, "{names:?}");
    for name in names {
        let (program, input) = reaching(name);
        let words: Vec<&str> = program.split(' ').collect();
        let output = inject_into(Path::new(name), &["--check"], &words, input.as_bytes());
        let (said, status) = (stderr(&output), code(output.status));
        assert!(said.contains("audits clean, no free frame written"), "{name}: {said}");
        // Its own answers, or a signal's where the page that was hit is one that it cannot do without.
        let expected = [0, 1, 2, HARMED, 101, 128 + libc::SIGBUS, 128 + libc::SIGSEGV];
        assert!(expected.contains(&status), "{name}: {status}, {said}");
        let account = said.lines().find(|line| line.starts_with('{')).unwrap();
        let account: serde_json::Value = serde_json::from_str(account).unwrap();
        let fired = account["rules"].as_array().unwrap().iter().map(|rule| rule["fired"].as_u64().unwrap());
        assert!(fired.sum::<u64>() > 0, "{name} did nothing to `{program}`: {said}");
    }
}
