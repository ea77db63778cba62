// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `umbra run --dirty-rate`, by every method: guests that write known pages, and what is told of them.
//!
//! Nothing here depends on how fast a machine is: where a number is exact, the log is read once, at the end; else a test
//! waits until what must come has come.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use common::pages::{Running, reports, row};
use common::{STATIC, cc, code, finish, folder, guests, run, stderr};
use serde_json::Value;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(60);

/// What each method must get right.
const METHODS: [&[&str]; 6] = [
    &[],
    &["--dirty-method", "write-protect"],
    &["--dirty-log", "ring"],
    &["--dirty-log", "ring:128"],
    &["--ad-bits", "off"],
    &["--dirty-log", "ring:256", "--dirty-method", "write-protect", "--ad-bits", "off"],
];

#[test]
fn a_dirty_rate_counts_what_is_written_and_not_what_is_read() {
    if !guests() {
        return;
    }
    for method in METHODS {
        let options = [&["--dirty-rate=20ms,json"], method].concat();
        let mut guest = Running::start("dirty-rate", &options, &["keep", "5"]);
        let at = guest.at;
        let written = |report: &Value| row(report, at).map_or(0, |row| row["pages"].as_u64().unwrap());
        let told = guest.await_report("dirty_rate", |_| {}, |report| written(report) == 5);
        let seconds = told["seconds"].as_f64().unwrap();
        let per_second = row(&told, at).unwrap()["pages_per_s"].as_f64().unwrap();
        assert!((per_second * seconds - 5.0).abs() < 1e-6, "{told}");
        let rest = guest.end();
        for report in reports(&rest, "dirty_rate") {
            assert!(written(&report) <= 5, "{method:?}: pages that were only read: {report}");
        }
        let summary = &reports(&rest, "dirty_rate_summary")[0];
        let row = row(summary, at).unwrap();
        assert!(row["pages"].as_u64().unwrap() >= 5 && summary["cut_short"]["pages"].is_u64(), "{summary}");
    }
}

#[test]
fn no_write_is_lost_whatever_the_ring_holds() {
    if !guests() {
        return;
    }
    for method in METHODS {
        let options = [&["--dirty-rate=600m,json", "--stats=json"], method].concat();
        let output = finish(&mut run(&options, &["touch", "--pages", "3000", "--passes", "2"]), b"", LIMIT);
        assert_eq!(code(output.status), 0, "{}", stderr(&output));
        let said = stderr(&output);
        let told = &reports(&said, "dirty_rate")[0];
        let most = told["vmas"].as_array().unwrap().iter().map(|row| row["pages"].as_u64().unwrap()).max();
        assert_eq!(most, Some(3000), "{method:?}: {told}");
        // A small ring was full many times, and its vCPU waited.
        let stats: Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
        let waited = stats["stalls"]["ring_full"]["count"].as_u64().unwrap_or(0);
        match method.iter().find(|word| word.starts_with("ring")) {
            Some(&"ring:128") => assert!(waited >= 3000 / 64 - 1, "{stats}"),
            Some(_) => {}
            None => assert_eq!(waited, 0, "{stats}"),
        }
        let (causes, vcpus) = (stats["stalls"].as_object().unwrap(), &stats["stalled_threads"]);
        let all: u64 = causes.values().filter_map(|times| times["count"].as_u64()).sum();
        assert_eq!(
            (vcpus[0]["count"].as_u64(), vcpus[1].is_null()),
            (Some(all), true),
            "one thread: {stats}"
        );
    }
}

/// That a thread which waits for its ring is reached is a test of `guest::thread`'s; here its last wait must not be lost.
#[test]
fn a_guest_that_fills_its_ring_over_and_over_can_be_ended() {
    if !guests() {
        return;
    }
    let options = ["--dirty-rate=600m", "--dirty-log", "ring:128", "--timeout", "500ms"];
    let guest = ["touch", "--pages", "20000", "--passes", "1000000"];
    let output = finish(&mut run(&options, &guest), b"", LIMIT);
    assert_eq!(code(output.status), 128 + libc::SIGKILL, "{}", stderr(&output));
    assert!(stderr(&output).contains("pages a second written over"), "{}", stderr(&output));
}

#[test]
fn a_guest_that_writes_everywhere_is_told_of_in_few_words() {
    if !guests() {
        return;
    }
    // A page in each of 5,120 parts of 128 MiB, every second one: 20 times as many as have a bit a page. All but one are
    // unmapped at once.
    let source = r#"
        #define _GNU_SOURCE
        #include <stdio.h>
        #include <sys/mman.h>
        int main() {
            volatile char *kept = 0;
            for (unsigned long n = 0; n < 5120; n++) {
                void *at = (void *)((1UL << 32) + n * (256UL << 20));
                volatile char *p = mmap(at, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
                if (p == MAP_FAILED) return 1;
                *p = 1;
                if (n == 5000) kept = p; else munmap((void *)p, 4096);
            }
            printf("%lu\n", (unsigned long)kept);
        }"#;
    let program = cc(&folder("dirty-everywhere"), "everywhere", source, STATIC);
    for method in METHODS {
        let options = [&["--memory", "32M", "--dirty-rate=600m,json"], method].concat();
        let output = finish(&mut run(&options, &[&program]), b"", LIMIT);
        assert_eq!(code(output.status), 0, "{}", stderr(&output));
        let at: u64 = String::from_utf8_lossy(&output.stdout).trim().parse().unwrap();
        let told = &reports(&stderr(&output), "dirty_rate")[0];
        let kept = row(told, at).unwrap();
        let (known, unsure) = (kept["pages"].as_u64().unwrap(), kept["unsure_pages"].as_u64().unwrap());
        assert_eq!(known + unsure, 1, "{method:?}: the page is told of, and no page beside it: {kept}");
        let pages = told["pages"].as_u64().unwrap();
        assert!((256..8192).contains(&pages), "{method:?}: not more than the guest has frames: {told}");
        assert!(told["unsure_pages"].as_u64().unwrap() >= 1 << 15, "{method:?}: {told}");
        assert!(told["vmas"].as_array().unwrap().len() < 20, "{method:?}: {told}");
    }
}

#[test]
fn threads_come_and_go_while_their_rings_are_emptied() {
    if !guests() {
        return;
    }
    let source = r#"
        #include <pthread.h>
        #include <stdio.h>
        #include <sys/mman.h>
        static char *p;
        static void *work(void *n) { for (long i = 0; i < 4; i++) p[((long)n * 4 + i) * 4096] = 1; return 0; }
        int main() {
            // Between pages without rights, so that it stays a mapping of its own.
            p = mmap(0, 4002 * 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            p += 4096;
            mprotect(p, 4000 * 4096, PROT_READ | PROT_WRITE);
            for (long n = 0; n < 1000; n += 4) {
                pthread_t t[4];
                for (int i = 0; i < 4; i++) pthread_create(&t[i], 0, work, (void *)(n + i));
                for (int i = 0; i < 4; i++) pthread_join(t[i], 0);
            }
            printf("%lu\n", (unsigned long)p);
        }"#;
    let program = cc(&folder("dirty-threads"), "threads", source, STATIC);
    let options = ["--dirty-rate=600m,json", "--dirty-log", "ring:128", "--fault-around", "off"];
    let output = finish(&mut run(&options, &[program]), b"", LIMIT);
    assert_eq!(code(output.status), 0, "{}", stderr(&output));
    let at: u64 = String::from_utf8_lossy(&output.stdout).trim().parse().unwrap();
    let told = &reports(&stderr(&output), "dirty_rate")[0];
    // What a thread left in its ring counts, though it has ended.
    assert_eq!(row(told, at).unwrap()["pages"], 4000, "{told}");
}

#[test]
fn bad_options_are_explained() {
    for (options, words) in [
        (&["--dirty-rate=often"][..], &["`often`", "100ms"][..]),
        (&["--dirty-rate", "--dirty-log", "ring:100"], &["power of two", "128", "65536"]),
        (&["--dirty-rate", "--dirty-log", "list"], &["`list`", "ring:ENTRIES"]),
        (&["--dirty-log", "ring"], &["--dirty-rate"]),
        (&["--dirty-method", "d-bit"], &["--dirty-rate"]),
        (&["--dirty-rate=0.1ms"], &["1ms"]),
        (&["--age", "0.000000001"], &["1ms"]),
    ] {
        let output = finish(&mut run(options, &["hello"]), b"", LIMIT);
        assert_eq!(code(output.status), 2, "{options:?}: {}", stderr(&output));
        for word in words {
            assert!(stderr(&output).contains(word), "no `{word}` in: {}", stderr(&output));
        }
    }
}

#[test]
fn the_demo_logs_no_writes() {
    for option in [["--dirty-log", "ring:128"], ["--dirty-method", "d-bit"]] {
        let output = finish(&mut run(&[&["--adopt-demo"], &option[..]].concat(), &[""; 0]), b"", LIMIT);
        assert_eq!(code(output.status), 2, "{option:?}: {}", stderr(&output));
        assert!(stderr(&output).contains("--adopt-demo"), "{}", stderr(&output));
    }
}

#[test]
fn a_method_that_cannot_be_is_refused_before_the_guest_runs() {
    if !guests() {
        return;
    }
    for how in [["--dirty-log", "ring"], ["--ad-bits", "off"]] {
        let options = [&["--dirty-rate", "--dirty-method", "d-bit"][..], &how].concat();
        let output = finish(&mut run(&options, &["hello"]), b"", LIMIT);
        let said = stderr(&output);
        assert_eq!((code(output.status), output.stdout.len()), (125, 0), "{said}");
        assert!(said.starts_with("umbra: cannot log writes: ") && said.lines().count() == 1, "{said}");
        assert!(said.contains("write protection"), "{said}");
    }
}
