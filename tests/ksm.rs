// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `umbra run --ksm`: guests that share pages, what is told of it, and what becomes of them when they stop to share.
//!
//! A guest cannot see that its pages are merged, and umbra tells at the end. So a guest is given some time, and more and more of
//! it until what must come has come; what must never be is checked each time.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use common::{STATIC, assert_same, cc, code, finish, folder, guests, native_images, run, stderr};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(120);
/// As fast as it goes, so that tests need little time.
const FAST: &str = "scan=100000/1ms";

/// A program of one kind of memory. Arguments: `advise`, `prctl` or `none`; how many pages of each kind there are: zeros, equal
/// ones, ones that differ from each other but are the same in each guest; and how long to wait then, ms. At the end it checks
/// every byte. With input it obeys that instead, letter by letter, and answers each: `f`: fill 12 MiB more with equal pages;
/// `w`: make all those pages different; `q`: end.
fn program(test: &str) -> PathBuf {
    let source = r#"
        #define _GNU_SOURCE
        #include <stdio.h>
        #include <stdlib.h>
        #include <string.h>
        #include <sys/mman.h>
        #include <sys/prctl.h>
        #include <time.h>
        #include <unistd.h>
        static char *pages(long n) {
            return mmap(0, n * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        }
        int main(int argc, char **argv) {
            long zero = atol(argv[2]), equal = atol(argv[3]), unique = atol(argv[4]), all = zero + equal + unique;
            if (!strcmp(argv[1], "prctl")) prctl(67, 1, 0, 0, 0);
            char letter, *regions[8];
            int count = 0;
            while (read(0, &letter, 1) == 1) {
                if (letter == 'f') {
                    regions[count] = pages(3072);
                    madvise(regions[count], 3072L << 12, 12);
                    memset(regions[count++], 7, 3072L << 12);
                }
                if (letter == 'w') for (long i = 0; i < 3072L * count; i++)
                    *(long *)(regions[i / 3072] + (i % 3072 << 12)) = i;
                if (letter == 'q') return 0;
                printf("%c\n", letter);
                fflush(stdout);
            }
            char *p = pages(all);
            if (!strcmp(argv[1], "advise") && madvise(p, all << 12, 12)) return 9;
            for (long i = 0; i < all; i++) {
                memset(p + (i << 12), i < zero ? 0 : 0x5a, 4096);
                if (i >= zero + equal) *(long *)(p + (i << 12)) = i;
            }
            struct timespec time = { atol(argv[5]) / 1000, atol(argv[5]) % 1000 * 1000000 };
            nanosleep(&time, 0);
            for (long i = 0; i < all; i++) for (long at = 0; at < 4096; at += 8) {
                long is = *(long *)(p + (i << 12) + at), must = i < zero ? 0 : 0x5a5a5a5a5a5a5a5a;
                if (at == 0 && i >= zero + equal) must = i;
                if (is != must) return 1;
            }
            puts("ok");
            return 0;
        }"#;
    cc(&folder(test), "share", source, STATIC)
}

fn number(value: &Value, key: &str) -> u64 {
    value[key].as_u64().unwrap_or_else(|| panic!("no {key} in {value}"))
}

/// The sum of `key` over what `of` has in each guest of a report.
fn sum(report: &Value, key: &str) -> u64 {
    report["guests"].as_array().unwrap().iter().map(|guest| number(guest, key)).sum()
}

/// Of one guest: what became of its pages for `reason`.
fn fate(guest: &Value, reason: &str) -> u64 {
    guest["vmas"].as_array().unwrap().iter().map(|vma| number(vma, reason)).sum()
}

/// What must be true of every report (I53).
fn assert_adds_up(report: &Value) {
    assert_eq!(
        number(report, "pages_shared") + number(report, "pages_sharing"),
        sum(report, "ksm_merging_pages"),
        "{report}"
    );
    assert_eq!(number(report, "ksm_zero_pages"), sum(report, "ksm_zero_pages"), "{report}");
    let saved = number(report, "pages_sharing") + number(report, "ksm_zero_pages");
    let profit = (saved * 4096) as i64 - number(report, "metadata_bytes") as i64;
    assert_eq!(report["general_profit"], profit, "{report}");
    for guest in report["guests"].as_array().unwrap() {
        for vma in guest["vmas"].as_array().unwrap() {
            let reasons = ["shared", "zero", "volatile", "unique", "pinned", "domain", "limit"];
            let fates: u64 = reasons.iter().map(|reason| number(vma, reason)).sum();
            assert_eq!(fates, number(vma, "pages"), "{vma}");
        }
    }
}

/// How long guests wait for what ksmd does, in milliseconds, if it did not do it in the time before.
const WAITS: [&str; 4] = ["300", "1000", "4000", "16000"];

/// Runs guests with `options` and more and more time until their report is `good`.
fn report_when(test: &str, options: &[&str], args: [&str; 4], good: impl Fn(&Value) -> bool) -> Value {
    let program = program(test);
    let mut last = Value::Null;
    for wait in WAITS {
        let options = [options, &["--ksm-report=json", "--check"]].concat();
        let output = finish(run(&options, &[&program]).args(args).arg(wait), b"", LIMIT);
        let said = stderr(&output);
        assert_eq!(code(output.status), 0, "{said}");
        let lines = String::from_utf8(output.stdout).unwrap();
        assert!(lines.lines().all(|line| line == "ok"), "{lines}");
        let object = said.lines().find(|line| line.starts_with('{')).unwrap();
        last = serde_json::from_str(object).unwrap();
        assert_eq!(last["report"], "ksm");
        assert_adds_up(&last);
        if good(&last) {
            return last;
        }
    }
    panic!("it never came: {last}");
}

#[test]
fn equal_pages_of_all_guests_share_frames_and_the_counters_add_up() {
    if !guests() {
        return;
    }
    let pace = format!("--ksm={FAST}");
    let options = ["--guests", "3", "--memory", "16M", &pace];
    let saved = |report: &Value| number(report, "pages_sharing") + number(report, "ksm_zero_pages");
    // Equal ones have a frame in each 256, the others one for all three guests.
    let report = report_when("ksm-share", &options, ["advise", "50", "150", "100"], |report| {
        saved(report) == 150 + 450 - 2 + 200
    });
    assert_eq!(number(&report, "pages_shared"), 2 + 100, "{report}");
    assert_eq!(number(&report, "stable_node_dups"), 2, "{report}");
    assert_eq!((sum(&report, "ksm_zero_pages"), sum(&report, "ksm_merging_pages")), (150, 750));
    for guest in report["guests"].as_array().unwrap() {
        assert_eq!((&guest["ksm_mergeable"], &guest["ksm_merge_any"]), (&true.into(), &false.into()));
    }
}

#[test]
fn nothing_is_shared_that_nobody_let_be_shared() {
    if !guests() {
        return;
    }
    let pace = format!("--ksm=madvise,{FAST}");
    let report = report_when("ksm-none", &[&pace], ["none", "50", "50", "0"], |_| true);
    assert_eq!((number(&report, "pages_sharing"), number(&report, "ksm_zero_pages")), (0, 0), "{report}");
    assert_eq!(report["guests"][0]["ksm_mergeable"], false);
    // A guest may ask for all of its memory, and so may the operator.
    let all = format!("all,{FAST}");
    for (options, ask) in [([&pace[..]].as_slice(), "prctl"), (&["--ksm", &all], "none")] {
        let report = report_when("ksm-any", options, [ask, "50", "50", "0"], |report| {
            number(report, "pages_sharing") >= 49 && number(report, "ksm_zero_pages") >= 50
        });
        assert_eq!(report["guests"][0]["ksm_merge_any"], true, "{report}");
    }
}

#[test]
fn guests_of_different_domains_do_not_share_and_are_told_so() {
    if !guests() {
        return;
    }
    let pace = format!("--ksm={FAST}");
    let options =
        ["--guests", "4", "--memory", "16M", &pace, "--ksm-domain", "web=0-1", "--ksm-domain", "db=2"];
    let report = report_when("ksm-domains", &options, ["advise", "10", "0", "100"], |report| {
        number(report, "pages_sharing") == 100
            && report["guests"].as_array().unwrap()[2..].iter().all(|guest| fate(guest, "domain") == 100)
    });
    assert_eq!(number(&report, "pages_shared"), 100, "{report}");
    let guests = report["guests"].as_array().unwrap();
    for (guest, name, merged) in
        [(0, Some("web"), 100), (1, Some("web"), 100), (2, Some("db"), 0), (3, None, 0)]
    {
        let row = &guests[guest];
        assert_eq!((row["share_domain"].as_str(), number(row, "ksm_merging_pages")), (name, merged), "{row}");
        // Zeros tell nothing of anybody.
        assert_eq!(number(row, "ksm_zero_pages"), 10, "{row}");
    }
}

#[test]
fn a_limit_keeps_pages_apart_and_zeros_may_be_kept() {
    if !guests() {
        return;
    }
    let pace = format!("--ksm={FAST},max-page-sharing=10,no-zero-pages");
    let report = report_when("ksm-limit", &[&pace], ["advise", "100", "100", "0"], |report| {
        number(report, "pages_sharing") == 180
    });
    assert_eq!((number(&report, "pages_shared"), number(&report, "ksm_zero_pages")), (20, 0), "{report}");
    assert_eq!(
        (number(&report, "stable_node_chains"), number(&report, "stable_node_dups")),
        (2, 20),
        "{report}"
    );
}

/// A guest that obeys letters, and others that idle.
struct Obeying {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Obeying {
    fn start(program: &PathBuf, options: &[&str]) -> Self {
        let mut command = run(&[options, &["--timeout", "100s"]].concat(), &[program]);
        command.args(["none", "0", "0", "1", "90000"]);
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (stdin, stdout) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        Self { child, stdin, stdout }
    }

    /// Whether the guest did that.
    fn obey(&mut self, letter: &str, wait: Duration) -> bool {
        let mut line = String::new();
        self.stdin.write_all(letter.as_bytes()).unwrap();
        let read = BufReader::new(&mut self.stdout).read_line(&mut line);
        std::thread::sleep(wait);
        read.is_ok_and(|read| read > 0) && line.trim() == letter
    }
}

#[test]
fn a_guest_that_stops_to_share_more_than_there_is_is_killed_with_a_warning_and_the_other_lives_on() {
    if !guests() {
        return;
    }
    let program = program("ksm-storm");
    let pace = format!("--ksm={FAST}");
    for wait in [300, 1000, 4000, 12_000] {
        // Twice 12 MiB are there only while they are shared.
        let mut guests = Obeying::start(&program, &["--guests", "2", "--pool", "24M", &pace, "--check"]);
        let wait = Duration::from_millis(wait);
        let mut stderr = BufReader::new(guests.child.stderr.take().unwrap());
        let is_shared = guests.obey("f", wait) && guests.obey("f", wait);
        guests.stdin.write_all(b"w").unwrap();
        let mut said = String::new();
        while !said.contains("guest 0 died of SIGKILL: out of memory") {
            assert!(stderr.read_line(&mut said).unwrap() > 0, "{said}");
        }
        // SAFETY: our child, which was not waited for yet.
        assert_eq!(unsafe { libc::kill(guests.child.id() as i32, libc::SIGTERM) }, 0);
        stderr.read_to_string(&mut said).unwrap();
        assert_eq!(code(guests.child.wait().unwrap()), 128 + libc::SIGKILL, "{said}");
        assert!(said.contains("guest 1 was ended by SIGTERM") && said.contains("audits clean"), "{said}");
        if is_shared {
            assert_eq!(said.matches("from the reserve").count(), 1, "{said}");
            return;
        }
    }
    panic!("nothing was shared in all that time");
}

#[test]
fn guests_that_share_compute_what_they_do_alone() {
    if !guests() {
        return;
    }
    let native = native_images("ksm-torture");
    let expected = finish(Command::new(native.join("torture")).arg("5000..5008"), b"", LIMIT);
    for how in ["all", "all,copy-on-access,no-smart-scan", "all,max-page-sharing=2,no-zero-pages"] {
        let ksm = format!("--ksm={how},{FAST}");
        let got = finish(&mut run(&["--check", &ksm], &["torture", "5000..5008"]), b"", LIMIT);
        assert_same(&expected, &got, &ksm);
        assert!(stderr(&got).contains("audits clean"), "{}", stderr(&got));
    }
}

#[test]
fn a_report_is_a_table_and_a_picture_and_statistics_have_the_counters() {
    if !guests() {
        return;
    }
    let folder = folder("ksm-picture");
    let (program, picture) = (program("ksm-report"), folder.join("saved.svg"));
    let report = format!("--ksm-report={}", picture.display());
    let args = ["advise", "20", "20", "5", "300"];
    let output = finish(run(&["--ksm", &report], &[&program]).args(args), b"", LIMIT);
    let said = stderr(&output);
    assert_eq!(code(output.status), 0, "{said}");
    for word in
        ["cpu_s ", "pages_sharing", "ksm_zero_pages", "general_profit", "volatile", "merge_any", "full_scans"]
    {
        assert!(said.contains(word), "no {word} in: {said}");
    }
    let svg = std::fs::read_to_string(picture).unwrap();
    assert!(svg.contains("MiB saved") && svg.contains("unique: ") && svg.contains("</svg>"), "{svg}");
    for guests in ["1", "2"] {
        let options = ["--guests", guests, "--memory", "16M", "--ksm", "--stats=json"];
        let mut last = Value::Null;
        let has_scanned = WAITS.iter().any(|wait| {
            let mut command = run(&options, &[&program]);
            let output = finish(command.args(&args[..4]).arg(wait), b"", LIMIT);
            last = serde_json::from_str(stderr(&output).trim()).unwrap();
            number(&last["ksm"], "full_scans") > 0 && last["ksm"]["cpu_s"].as_f64() > Some(0.0)
        });
        assert!(has_scanned, "{last}");
    }
    let output = finish(run(&["--stats=json"], &[&program]).args(args), b"", LIMIT);
    let stats: Value = serde_json::from_str(stderr(&output).trim()).unwrap();
    assert!(stats["ksm"].is_null(), "{stats}");
}

#[test]
fn bad_options_are_one_clear_line() {
    for (options, status, words) in [
        (&["--ksm=some"][..], 2, &["`some`", "madvise, all"][..]),
        (&["--ksm=all,scan=0/1s"], 2, &["scan=0/1s"]),
        (&["--ksm", "--ksm-domain", "a b=0"], 2, &["`a b`", "name of a domain"]),
        (&["--ksm", "--ksm-domain", "web=x"], 2, &["web=0-3"]),
        (&["--ksm", "--ksm-domain", "web=1"], 2, &["no guest 1"]),
        (
            &["--ksm", "--guests", "3", "--ksm-domain", "a=0-1", "--ksm-domain", "b=1,2"],
            2,
            &["guest 1", "a and b"],
        ),
        (&["--ksm", "--ksm-domain", "web=0", "--ksm-domain", "rest"], 2, &["rest", "there is none"]),
        (&["--ksm-domain", "web"], 2, &["--ksm"]),
        (&["--ksm", "all,scn=5/1ms"], 2, &["`scn=5/1ms`", "scan=PAGES/INTERVAL"]),
        (&["--ksm", "--ksm-report", "x.svg"], 2, &["--ksm-report=x.svg"]),
        (&["--ksm=reserve=8M", "--memory", "16M"], 2, &["8.0 MiB is half of the 16.0 MiB"]),
        (&["--ksm=reserve=13M", "--guests", "2", "--pool", "24M"], 2, &["13.0 MiB", "24.0 MiB"]),
        (&["--ksm-report"], 2, &["--ksm"]),
        (&["--ksm", "--ksm-report=x.png"], 2, &["`x.png`", ".svg"]),
        (&["--ksm", "--ksm-report=/nonexistent/x.svg"], 125, &["/nonexistent/x.svg"]),
        (&["--ksm", "all", "--adopt-demo"], 2, &["--adopt-demo"]),
    ] {
        let output = finish(&mut run(options, &["hello"]), b"", LIMIT);
        let said = stderr(&output);
        assert_eq!(code(output.status), status, "{options:?}: {said}");
        for word in words {
            assert!(
                said.lines().next().unwrap().contains(word) || said.starts_with("error: the "),
                "no `{word}` in: {said}"
            );
        }
        assert!(said.starts_with("error: ") || said.trim_end().lines().count() == 1, "{said}");
    }
}
