// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The benchmarks that go through phases, with very little memory: the shape of what they print and the names in it. Never a
//! time: how fast anything is, a test cannot tell.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use common::{code, engine, finish, guests, has, offered, stderr, umbra};
use serde_json::Value;
use std::collections::BTreeMap;
use std::os::unix::process::CommandExt;
use std::process::{Command, Output};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use vmm::engine::EngineKind;

const LIMIT: Duration = Duration::from_secs(120);
const FAILED: i32 = 125;

fn bench(words: &str) -> Output {
    finish(umbra().arg("bench").args(words.split_whitespace()), b"", LIMIT)
}

/// The report of two runs, as JSON.
#[track_caller]
fn report(words: &str) -> Value {
    let output = bench(&format!("{words} --runs 2 --json"));
    assert_eq!(code(output.status), 0, "{words}: {}", stderr(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    for row in report["rows"].as_array().unwrap() {
        assert_eq!(row["runs"], 2, "{row}");
        let figure = |name: &str| row[name].as_f64().unwrap();
        assert!(0.0 <= figure("min") && figure("min") <= figure("median"), "{row}");
        assert!(figure("median") <= figure("max"), "{row}");
    }
    for ratio in report["ratios"].as_object().unwrap().values() {
        assert!(ratio.as_f64().unwrap().is_finite(), "{report}");
    }
    report
}

/// Names of the rows, with their units.
fn rows(report: &Value) -> BTreeMap<String, String> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let rows = report["rows"].as_array().unwrap();
    rows.iter().map(|row| (text(&row["name"]), text(&row["unit"]))).collect()
}

fn median(report: &Value, name: &str) -> f64 {
    let rows = report["rows"].as_array().unwrap();
    rows.iter().find(|row| row["name"] == name).unwrap_or_else(|| panic!("no row {name}"))["median"]
        .as_f64()
        .unwrap()
}

/// Lines of the text that the selftest of the same name prints too.
#[track_caller]
fn prints(words: &str, starts: &[&str]) {
    let output = bench(&format!("{words} --runs 1"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(code(output.status), 0, "{}", stderr(&output));
    for start in starts {
        assert!(text.lines().any(|line| line.starts_with(start)), "no line `{start}` in:\n{text}");
    }
}

#[track_caller]
fn refused(words: &str, status: i32, says: &str) {
    let output = bench(words);
    assert_eq!(code(output.status), status, "{words}: {}", stderr(&output));
    assert!(stderr(&output).contains(says), "{words}: {}", stderr(&output));
    assert!(output.stdout.is_empty(), "{words}");
}

#[test]
fn demand_paging_has_the_metrics_of_the_selftest_for_each_contestant() {
    if !guests() {
        return;
    }
    let report = report("demand_paging -v 2 -b 256K -u MISSING -d 1");
    assert_eq!(report["bench"], "demand_paging");
    let rows = rows(&report);
    for contestant in ["umbra", "kvm-demand-paging", "userfaultfd-thread", "native"] {
        let is_missing = report["missing"]
            .as_array()
            .is_some_and(|missing| missing.iter().any(|why| why.as_str().unwrap().starts_with(contestant)));
        // Who may not use userfaultfd is told so, and whose engine has no window.
        if matches!(contestant, "userfaultfd-thread" | "kvm-demand-paging") && is_missing {
            continue;
        }
        for (metric, unit) in [
            ("Total guest execution time", "ms"),
            ("Per-vcpu demand paging rate", "pgs/sec/vcpu"),
            ("Overall demand paging rate", "pgs/sec"),
        ] {
            assert_eq!(rows[&format!("{contestant}.{metric}")], unit, "{report}");
        }
        let each = median(&report, &format!("{contestant}.Per-vcpu demand paging rate"));
        let all = median(&report, &format!("{contestant}.Overall demand paging rate"));
        assert!((all / each - 2.0).abs() < 1e-6, "{report}");
    }
    if engine() == EngineKind::Kvm {
        let ratio = "umbra.Overall demand paging rate/kvm-demand-paging.Overall demand paging rate";
        assert!(report["ratios"].get(ratio).is_some());
    }
    prints(
        "demand_paging -b 64K -o -v 2",
        &["Total guest execution time: ", "Per-vcpu demand paging rate:\t", "Overall demand paging rate:\t"],
    );
}

#[test]
fn what_cannot_be_measured_is_refused() {
    if !guests() {
        return;
    }
    refused("demand_paging -u MINOR", FAILED, "MISSING");
    refused("demand_paging -b 64K -d 5", FAILED, "-u MISSING");
    refused("dirty_log -b 64K -M ring -m d-bit", FAILED, "-m write-protect");
    refused("dirty_log -b 64K -M ring -g", FAILED, "leave it out");
    for (words, says) in [
        ("demand_paging -b 5000", "whole number of pages"),
        ("demand_paging -b 1T", "256G"),
        ("demand_paging -v 0", "0"),
        ("demand_paging -u both", "MISSING"),
        ("dirty_log -i 1", "2"),
        ("dirty_log -m guess", "d-bit"),
        ("dirty_log -w 101", "101"),
        ("age --pages 0", "0"),
        ("age --overhead --pages 5", "--overhead"),
        ("age --overhead --interval 0.000000001", "at least 1ms"),
    ] {
        refused(words, 2, says);
    }
}

/// With nine open files umbra starts and no guest does: the first one takes them to 14 (ptrace) or 17 (KVM).
#[test]
fn a_benchmark_without_umbra_has_failed_and_says_once_why() {
    if !guests() {
        return;
    }
    for words in [
        "access_tracking -b 64K",
        "demand_paging -b 64K",
        "dirty_log -b 64K",
        "age --pages 16",
        "age --overhead --bytes 64K",
        "fault --pages 16",
    ] {
        let mut command = Command::new("sh");
        command.args(["-c", "ulimit -n 9; exec \"$0\" bench --runs 1 \"$@\""]).arg(umbra().get_program());
        let umbra = umbra();
        command.envs(umbra.get_envs().filter_map(|(name, value)| Some((name, value?))));
        command.args(words.split_whitespace()).env_remove("RUST_LOG");
        // What the tests' caller leaves open to them counts too.
        let close_at_exec = || {
            // SAFETY: a plain system call, as is allowed between fork and exec.
            match unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) } {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        };
        // SAFETY: `close_at_exec` does nothing but that call.
        unsafe { command.pre_exec(close_at_exec) };
        let output = finish(&mut command, b"", LIMIT);
        let said = stderr(&output);
        assert_eq!((code(output.status), output.stdout.len()), (FAILED, 0), "{words}: {said}");
        assert_eq!(said.matches("os error 24").count(), 1, "{words}: {said}");
    }
}

const ACCESSES: [&str; 5] = [
    "Populating memory",
    "Writing to populated memory",
    "Reading from populated memory",
    "Writing to idle memory",
    "Reading from idle memory",
];

#[test]
fn access_tracking_goes_through_the_phases_of_the_selftest() {
    if !guests() {
        return;
    }
    let report = report("access_tracking -v 2 -b 2M");
    let rows = rows(&report);
    for (contestant, by) in [("umbra", "lru_gen"), ("native", "clear_refs")] {
        let marks = ["", ", again"].map(|again| format!("Mark memory idle ({by}){again}"));
        for phase in ACCESSES.into_iter().chain(marks.iter().map(String::as_str)) {
            assert_eq!(rows[&format!("{contestant}.{phase}")], "ms", "{report}");
        }
        assert_eq!(rows[&format!("{contestant}.Still idle")], "%");
    }
    // Every page was touched before each marking, and aging flushes where it must: none is missed but those that a TLB hides.
    assert!(median(&report, "umbra.Still idle") < 10.0, "{report}");
    let starts: Vec<String> = ACCESSES.iter().map(|name| format!("{name}: ")).collect();
    let mut starts: Vec<&str> = starts.iter().map(String::as_str).collect();
    starts.extend(["Mark memory idle (lru_gen): ", "Still idle: "]);
    prints("access_tracking -b 256K -o -v 2", &starts);
}

#[test]
fn dirty_log_logs_every_write_whatever_the_method() {
    if !guests() {
        return;
    }
    for options in ["", "-g", "-m write-protect", "-m write-protect -g", "-M ring"] {
        let report = report(&format!("dirty_log -v 2 -b 2M -i 3 {options}"));
        let rows = rows(&report);
        let is_cleared = !options.contains("-g") && !options.contains("ring");
        for phase in [
            "Populate memory time",
            "Enabling dirty logging time",
            "Disabling dirty logging time",
            "Get dirty log",
        ] {
            assert_eq!(rows[&format!("umbra.{phase}")], "ms", "{report}");
        }
        for iteration in 1..=3 {
            for what in ["dirty memory", "get dirty log"] {
                assert!(rows.contains_key(&format!("umbra.Iteration {iteration} {what} time")), "{report}");
            }
            let clear = format!("umbra.Iteration {iteration} clear dirty log time");
            assert_eq!(rows.contains_key(&clear), is_cleared, "{options}: {report}");
        }
        assert_eq!(rows.contains_key("umbra.Clear dirty log"), is_cleared, "{report}");
        // 2 vCPUs × 2 MiB, all written.
        assert_eq!(median(&report, "umbra.Dirty pages"), 1024.0, "{options}: {report}");
    }
}

#[test]
fn dirty_log_with_random_writes_finds_some_pages() {
    if !guests() {
        return;
    }
    let report = report("dirty_log -b 2M -i 2 -a -r 7 -w 30");
    let dirty = median(&report, "umbra.Dirty pages");
    assert!(0.0 < dirty && dirty < 512.0, "{report}");
    prints(
        "dirty_log -b 256K",
        &[
            "Populate memory time: ",
            "Enabling dirty logging time: ",
            "Iteration 1 dirty memory time: ",
            "Iteration 2 get dirty log time: ",
            "Iteration 2 clear dirty log time: ",
            "Disabling dirty logging time: ",
            "Get dirty log over 2 iterations took ",
            "Clear dirty log over 2 iterations took ",
        ],
    );
}

#[test]
fn age_measures_each_state_beside_linux_and_the_limit() {
    if !guests() {
        return;
    }
    let report = report("age --pages 3000");
    let rows = rows(&report);
    for state in ["all-young", "1pct-young", "none-young"] {
        for contestant in ["umbra", "clear_refs+smaps"] {
            assert_eq!(rows[&format!("{contestant}.{state}")], "ns/page", "{report}");
        }
        let ratio = format!("clear_refs+smaps.{state}/umbra.{state}");
        assert!(report["ratios"].get(&ratio).is_some(), "{report}");
    }
    assert_eq!(rows["table-read"], "ns/page");
    assert!(report["ratios"].get("umbra.none-young/table-read").is_some(), "{report}");
}

#[test]
fn age_overhead_runs_the_same_work_with_and_without() {
    if !guests() {
        return;
    }
    let report = report("age --overhead --bytes 2M --interval 10ms --window 50ms");
    assert_eq!(report["bench"], "age-overhead");
    let rows = rows(&report);
    for row in ["umbra.plain", "umbra.aged", "umbra.aged.aging pass"] {
        assert_eq!(rows[row], "ms");
        assert!(median(&report, row) > 0.0, "{report}");
    }
    assert!(!rows.contains_key("umbra.plain.aging pass"), "{report}");
    assert!(report["ratios"].get("slowdown").is_some(), "{report}");
}

const KSM_FIGURES: [(&str, &str); 11] = [
    ("saved_bytes", "bytes"),
    ("first_pass_wall_s", "s"),
    ("first_pass_cpu_s", "s"),
    ("cpu_us_per_merged_page", "us"),
    ("idle_pass_cpu_s", "s"),
    ("metadata_bytes_per_page", "bytes"),
    ("guest_slowdown", "times"),
    ("guest_slowdown_paced", "times"),
    ("cow_break_us", "us"),
    ("cow_break_p99_us", "us"),
    ("rewrite_cpu_s", "s/s"),
];

/// There is one ksmd, so tests that drive it take turns.
static KSMD: Mutex<()> = Mutex::new(());

fn ksmd_turn() -> MutexGuard<'static, ()> {
    KSMD.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether the kernel's side could be measured; a user who may not is told why.
fn has_ksmd(report: &Value) -> bool {
    if rows(report).keys().any(|name| name.starts_with("ksmd.")) {
        return true;
    }
    let why = report["missing"].as_array().and_then(|missing| missing.first()).expect("no word why");
    assert!(why.as_str().unwrap().starts_with("ksmd: "), "{why}");
    println!("without ksmd: {why}");
    false
}

#[test]
fn ksm_saves_what_the_mix_gives_and_has_the_same_rows_for_both_sides() {
    if !guests() {
        return;
    }
    let _turn = ksmd_turn();
    let plot = common::folder("bench-ksm").join("bars.svg");
    // 8 MiB: 2,048 pages. 512 are zero; 1,024 are in 256 groups of four.
    let saved = (512 + 256 * 3) * 4096;
    for mix in ["zero=25,dup=50,unique=25", "rewrite"] {
        let words = format!("ksm --mib 8 --window 100ms --mix {mix} --plot {}", plot.display());
        let report = report(&words);
        let rows = rows(&report);
        assert_eq!(report["bench"], "ksm");
        let sides: &[&str] = if has_ksmd(&report) { &["umbra", "ksmd"] } else { &["umbra"] };
        for side in sides {
            for (figure, unit) in KSM_FIGURES {
                assert_eq!(rows.get(&format!("{side}.{figure}")).map(String::as_str), Some(unit), "{report}");
            }
        }
        assert_eq!(median(&report, "umbra.saved_bytes"), f64::from(saved), "{report}");
        assert!(median(&report, "umbra.metadata_bytes_per_page") <= 16.0, "{report}");
        // While pages are rewritten no pass is over unchanged memory.
        let idle = "ksmd.idle_pass_cpu_s/umbra.idle_pass_cpu_s";
        assert!(mix != "rewrite" || report["ratios"][idle].is_null(), "{report}");
        let svg = std::fs::read_to_string(&plot).unwrap();
        assert!(svg.starts_with("<svg") && svg.contains("idle_pass_cpu_s"), "{svg}");
        std::fs::remove_file(&plot).unwrap();
    }
}

#[test]
fn ksm_counts_what_an_image_lets_be_saved() {
    if !guests() {
        return;
    }
    let _turn = ksmd_turn();
    let report = report("ksm --mib 8 --window 100ms --mix image --copies 2");
    // Every page of it is there twice.
    assert!(median(&report, "umbra.saved_bytes") >= f64::from(4 << 20), "{report}");
    assert!(rows(&report).contains_key("umbra.first_pass_cpu_s"), "the saving was complete: {report}");
}

#[test]
fn ksm_goes_through_the_modes_of_the_selftest() {
    if !guests() {
        return;
    }
    for checked in ["-M", "-M -p 600", "-U", "-Z -p 5", "-Z -z 1", "-M -t 1"] {
        prints(&format!("ksm --kernel-compat {checked}"), &["OK"]);
    }
    let times = ["Total size:    4 MiB", "Total time:    ", "Average speed:  "];
    prints("ksm --kernel-compat -P -s 4", &times);
    prints("ksm --kernel-compat -D -s 4", &times);
    let times = ["Total size:    15 MiB", "Not merged pages:", "Total time:     ", "Merged pages:"];
    prints("ksm --kernel-compat -C", &times);
}

#[test]
fn ksm_refuses_what_makes_no_sense() {
    if !guests() {
        return;
    }
    for (words, says) in [
        ("ksm --mix zero=25,dup=50", "adds up to 75"),
        ("ksm --mix nonsense", "`rewrite`"),
        ("ksm --mix zero=1,ones=99", "ones=99"),
        ("ksm --copies 1", "1"),
        ("ksm --mib 0", "0"),
        ("ksm --kernel-compat", "-M"),
        ("ksm --kernel-compat -M -U", "-U"),
        ("ksm -M", "--kernel-compat"),
        ("ksm -p 5", "--kernel-compat"),
        ("ksm --kernel-compat -M --mib 5", "--mib"),
        ("ksm --kernel-compat -N", "-N"),
    ] {
        refused(words, 2, says);
    }
    refused("ksm --kernel-compat -P", FAILED, "-s");
    refused("ksm --mib 8 --plot /nonexistent/bars.svg", FAILED, "/nonexistent/bars.svg");
}

/// Engines that this host has, by the names of umbra's rows; the report names the others.
fn engines(report: &Value) -> Vec<&'static str> {
    let said = report["missing"].as_array().map_or(&[][..], Vec::as_slice);
    let is_missing = |engine: &str| {
        let start = format!("engine {engine}: ");
        said.iter().any(|why| why.as_str().unwrap().starts_with(&start))
    };
    [("kvm", "umbra"), ("ptrace", "ptrace.umbra")]
        .into_iter()
        .filter_map(|(engine, row)| (!is_missing(engine)).then_some(row))
        .collect()
}

/// All who must have rows: engines, Linux, and qemu where it is installed; the report says so where it is not.
fn runners(report: &Value) -> Vec<&'static str> {
    let mut runners = engines(report);
    assert!(!runners.is_empty(), "{report}");
    runners.push("native");
    let has_qemu = report["missing"].as_array().is_none_or(|missing| {
        !missing
            .iter()
            .any(|why| why.as_str().unwrap().starts_with("qemu-x86_64: qemu-x86_64-static is not in PATH"))
    });
    runners.extend(has_qemu.then_some("qemu-x86_64"));
    runners
}

#[track_caller]
fn has_positive_rows(report: &Value, names: &[String], unit: &str) {
    let rows = rows(report);
    for name in names {
        assert_eq!(rows.get(name).map(String::as_str), Some(unit), "{name}: {report}");
        assert!(median(report, name) > 0.0, "{name}: {report}");
    }
}

#[test]
fn syscall_has_each_call_by_each_engine_and_beside_it() {
    if offered().is_empty() {
        return;
    }
    let report = report("syscall --calls 20 --engine auto");
    assert_eq!(report["bench"], "syscall");
    let runners = runners(&report);
    for call in ["getpid", "clock_gettime", "mmap"] {
        let names: Vec<_> = runners.iter().map(|who| format!("{who}.{call}")).collect();
        has_positive_rows(&report, &names, "us/call");
        for engine in engines(&report) {
            let ratio = format!("{engine}.{call}/native.{call}");
            assert!(report["ratios"].get(&ratio).is_some(), "no {ratio}: {report}");
        }
    }
    assert_eq!(rows(&report).len(), runners.len() * 3, "{report}");
}

#[test]
fn cpu_has_the_sum_and_each_kind_by_each_engine_and_beside_it() {
    if offered().is_empty() {
        return;
    }
    let report = report("cpu --passes 1 --engine auto");
    for who in runners(&report) {
        let kinds = ["chain", "sort", "calls", "bytes", "floats"].map(|kind| format!("{who}.{kind}"));
        has_positive_rows(&report, &kinds, "s");
        has_positive_rows(&report, &[who.to_owned()], "s");
        let least: f64 = kinds.iter().map(|kind| median(&report, kind)).fold(0.0, f64::max);
        assert!(median(&report, who) >= least, "{report}");
    }
    for engine in engines(&report) {
        for ratio in [format!("native/{engine}"), format!("native/{engine} (geometric mean)")] {
            assert!(report["ratios"].get(&ratio).is_some(), "no {ratio}: {report}");
        }
    }
}

#[test]
fn fault_has_both_engines_and_linux_beside_them() {
    if offered().is_empty() {
        return;
    }
    let report = report("fault --pages 16 --engine auto");
    let mut names: Vec<String> = runners(&report).into_iter().map(str::to_owned).collect();
    names.extend(engines(&report).into_iter().map(|engine| format!("{engine}-no-fault-around")));
    has_positive_rows(&report, &names, "us/page");
}

#[test]
fn an_engine_that_was_asked_for_is_measured_alone() {
    for (engine, own, other) in [("kvm", "umbra", "ptrace.umbra"), ("ptrace", "ptrace.umbra", "umbra")] {
        if !offered().contains(&engine) {
            continue;
        }
        for bench in ["syscall --calls 10", "cpu --passes 1", "fault --pages 8"] {
            let report = report(&format!("{bench} --engine {engine}"));
            let is_of = |name: &str, row: &str| {
                name.strip_prefix(row).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '-']))
            };
            let names = rows(&report);
            assert!(names.keys().any(|name| is_of(name, own)), "{bench}: {report}");
            assert!(!names.keys().any(|name| is_of(name, other)), "{bench}: {report}");
        }
    }
}

#[test]
fn without_kvm_the_other_engine_is_measured_and_the_report_says_why() {
    if !has(EngineKind::Ptrace) {
        return;
    }
    for (bench, row) in [("syscall --calls 10", "ptrace.umbra.getpid"), ("fault --pages 8", "ptrace.umbra")] {
        let mut command = umbra();
        command.arg("bench").args(bench.split_whitespace()).args(["--runs", "1", "--json"]);
        command.env("UMBRA_KVM_DEVICE", "/nonexistent/kvm").env_remove("UMBRA_ENGINE");
        let output = finish(&mut command, b"", LIMIT);
        assert_eq!(code(output.status), 0, "{bench}: {}", stderr(&output));
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(engines(&report), ["ptrace.umbra"], "{report}");
        assert_eq!(report["host"]["kvm_backend"], "none", "{report}");
        assert!(median(&report, row) > 0.0, "{report}");

        let output = finish(command.args(["--engine", "kvm"]), b"", LIMIT);
        assert_eq!(code(output.status), FAILED, "{bench}");
        assert!(stderr(&output).contains("/nonexistent/kvm does not exist"), "{}", stderr(&output));
    }
}

#[test]
fn without_qemu_the_report_says_what_to_install() {
    if !guests() {
        return;
    }
    let mut command = umbra();
    command.args(["bench", "syscall", "--calls", "10", "--runs", "1"]).env("PATH", "/nonexistent");
    let output = finish(&mut command, b"", LIMIT);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(code(output.status), 0, "{}", stderr(&output));
    let says =
        text.lines().filter(|line| line.starts_with("not measured: qemu-x86_64: ")).collect::<Vec<_>>();
    assert!(says.len() == 1 && says[0].contains("qemu-user-static"), "{text}");
    assert!(text.contains("native.getpid") && !text.contains("qemu-x86_64.getpid"), "{text}");
}
