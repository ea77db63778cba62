// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `umbra run --age`, `--wss`, `--heatmap` and the stalls in `--stats`: guests that touch known pages, and what is
//! told of them.
//!
//! Exact numbers of accessed pages are expected where KVM or umbra sees accesses in software. A CPU that walks the tables
//! itself may set A for pages that nobody touched ([`Marks`]).
//!
//! Nothing here depends on how fast a machine is: where a number is exact, no timer takes part in it (the interval is longer
//! than the test, and the pass or reading at the end is the only one); else a test waits until what must come has come.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use common::pages::{NEVER, Running, marks, pages, reports, row};
use common::{code, engine, finish, folder, guests, run, stderr};
use serde_json::Value;
use std::os::unix::process::ExitStatusExt;
use std::time::Duration;
use vmm::engine::{EngineKind, Marks};

const LIMIT: Duration = Duration::from_secs(60);

fn ages(of: &Value) -> Vec<u64> {
    of["age_kib"].as_array().unwrap().iter().map(|kib| kib.as_u64().unwrap()).collect()
}

/// Every resident page is in exactly one column of one row.
fn assert_adds_up(report: &Value) {
    let vmas = report["vmas"].as_array().unwrap();
    for of in vmas.iter().chain([&report["total"]]) {
        let sum = ages(of).iter().sum::<u64>() + of["untouched_kib"].as_u64().unwrap();
        assert_eq!(of["resident_kib"].as_u64().unwrap(), sum, "{of}");
        assert!(sum > 0, "nothing is resident: {of}");
    }
    for key in ["resident_kib", "untouched_kib"] {
        let rows: u64 = vmas.iter().map(|row| row[key].as_u64().unwrap()).sum();
        assert_eq!(report["total"][key].as_u64().unwrap(), rows, "{key}");
    }
}

#[test]
fn what_was_touched_is_young_and_what_was_only_brought_in_is_not() {
    if !guests() {
        return;
    }
    for bits in ["on", "off"] {
        let options = ["--age", NEVER, "--wss=json", "--fault-around", "256K", "--ad-bits", bits];
        let (output, at) = pages("aging-exact", &options, &["touch", "11"]);
        let told = reports(&stderr(&output), "working_set");
        assert_eq!(told.len(), 1, "{}", stderr(&output));
        assert_adds_up(&told[0]);
        assert_eq!(told[0]["passes"], 1);
        let row = row(&told[0], at).unwrap();
        assert_eq!((row["start"].as_u64().unwrap(), row["rights"].as_str().unwrap()), (at, "rw-p"));
        let (young, untouched) = (ages(row)[0], row["untouched_kib"].as_u64().unwrap());
        assert_eq!(young + untouched, 256, "{bits}: {row}");
        match marks(bits) {
            Marks::Exact => assert_eq!(young, 44, "{bits}: {row}"),
            // All that was touched, and not all that was brought in.
            Marks::CpuGuesses => assert!((44..256).contains(&young), "{bits}: {row}"),
        }
    }
}

#[test]
fn on_sigusr1_what_is_idle_is_old_and_what_is_used_is_not() {
    if !guests() {
        return;
    }
    for bits in ["on", "off"] {
        let options = ["--age", "20ms", "--wss=json", "--ad-bits", bits, "--fault-around", "off"];
        let mut guest = Running::start("aging-signal", &options, &["touch", "16", "keep", "4"]);
        let at = guest.at;
        // The first 16 pages are written once, the next 32 are used all the time.
        let told = guest.await_report(
            "working_set",
            |guest| guest.signal(libc::SIGUSR1),
            |report| {
                let Some(row) = row(report, at) else { return false };
                let ages = ages(row);
                let (idle, used) = (ages[7], ages[..3].iter().sum::<u64>());
                let is_told = match marks(bits) {
                    Marks::Exact => (idle, used) == (64, 128),
                    // Some that are used look idle for a while, and some of the others are looked at ahead of need.
                    Marks::CpuGuesses => idle >= 32 && used >= 64,
                };
                report["passes"].as_u64().unwrap() > 8 && is_told
            },
        );
        assert_adds_up(&told);
        let rest = reports(&guest.end(), "working_set");
        assert_adds_up(rest.last().expect("a report at the end"));
    }
}

#[test]
fn the_table_has_its_rows_and_the_heat_line_its_key() {
    if !guests() {
        return;
    }
    let (output, at) = pages("aging-text", &["--age", NEVER, "--wss"], &["touch", "20"]);
    let said = stderr(&output);
    let mut lines = said.lines();
    let head = lines.next().unwrap();
    assert!(head.contains("working set in KiB") && head.contains("1 pass, one each 36000 s"), "{said}");
    let columns: Vec<_> = lines.next().unwrap().split_whitespace().collect();
    assert_eq!(columns, ["range", "resident", "0", "untouched"]);
    let rows: Vec<_> = lines.by_ref().take_while(|line| !line.starts_with("total")).collect();
    assert!(rows.iter().any(|row| row.starts_with(&format!("{at:x}-"))), "{said}");
    assert!(rows.iter().any(|row| row.ends_with("[stack]")), "{said}");
    let key = lines.next().unwrap();
    for word in
        ["heat of ", "KiB of resident memory a column", "9 = all accessed in the last 36000 s", "0 = "]
    {
        assert!(key.contains(word), "no `{word}` in: {key}");
    }
    let heat = lines.next().unwrap();
    assert!(heat.len() > 20 && heat.len() <= 80 && heat.bytes().all(|byte| byte.is_ascii_digit()), "{heat}");
    assert!(heat.contains('9'), "{heat}");
}

#[test]
fn sigusr1_means_what_it_always_does_where_nobody_asks_for_reports() {
    if !guests() {
        return;
    }
    let mut guest = Running::start("aging-usr1", &["--age", "20ms"], &["keep", "4"]);
    guest.signal(libc::SIGUSR1);
    assert_eq!(guest.child.wait().unwrap().signal(), Some(libc::SIGUSR1));
}

/// Whether every element that is opened is closed, in order.
fn assert_well_formed(svg: &str) {
    let mut open = Vec::new();
    for tag in svg.split('<').skip(1).map(|rest| rest.split_once('>').expect("a tag ends").0) {
        match tag.strip_prefix('/') {
            Some(name) => assert_eq!(open.pop(), Some(name)),
            None if tag.ends_with('/') || tag.starts_with('?') => {}
            None => open.push(tag.split_whitespace().next().unwrap()),
        }
    }
    assert!(open.is_empty(), "{open:?}");
}

#[test]
fn a_heat_map_is_a_picture_with_title_axes_and_legend() {
    if !guests() {
        return;
    }
    let folder = folder("aging-heatmap");
    let path = folder.join("map.svg");
    std::fs::write(&path, "an older picture").unwrap();
    let options = ["--age", "5ms", "--heatmap", path.to_str().unwrap()];
    // By ptrace each page that is aged costs a stop, and every page is aged every 5 ms.
    let passes = if engine() == EngineKind::Kvm { "3000" } else { "200" };
    let output = finish(&mut run(&options, &["touch", "--pages", "300", "--passes", passes]), b"", LIMIT);
    assert_eq!((code(output.status), stderr(&output)), (0, String::new()));
    let svg = std::fs::read_to_string(&path).unwrap();
    assert!(svg.starts_with("<svg "), "{svg}");
    assert_well_formed(&svg);
    for words in [
        "umbra heat map: 200000-",
        "sampled each 5 ms",
        "seconds since the guest started",
        "nothing resident",
        "a row: ",
    ] {
        assert!(svg.contains(words), "no `{words}` in {svg}");
    }
    // Some cell is of the hottest colour, beside the legend's.
    assert!(svg.matches("#FCFFA4").count() > 1, "nothing is hot in {svg}");
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1, "nothing is left beside it");
}

#[test]
fn aging_and_stalls_are_in_the_statistics() {
    if !guests() {
        return;
    }
    let options = ["--age", NEVER, "--stats=json", "--fault-around", "off"];
    let (output, _) = pages("aging-stats", &options, &["cow", "40"]);
    let stats: Value = serde_json::from_str(stderr(&output).lines().last().unwrap()).unwrap();
    let stalls = stats["stalls"].as_object().unwrap();
    let count = |cause: &str| stalls.get(cause).map_or(0, |it| it["count"].as_u64().unwrap());
    assert_eq!(stalls.values().map(|it| it["count"].as_u64().unwrap()).sum::<u64>(), stats["pf_taken"]);
    assert!(count("copy_on_write") >= 40 && count("first_touch") >= 40, "{stats}");
    for (cause, times) in stalls {
        let of = |key: &str| times[key].as_f64().unwrap();
        assert!(of("median_us") <= of("p99_us") && of("p99_us") <= of("max_us"), "{cause}: {times}");
        assert!(of("max_us") <= of("total_us") && of("median_us") > 0.0, "{cause}: {times}");
    }
    assert_eq!(stats["aging"]["count"], 1, "{stats}");
    let plain = finish(&mut run(&["--stats"], &["hello"]), b"", LIMIT);
    assert!(
        stderr(&plain).contains("stalls    cause") && !stderr(&plain).contains("aging"),
        "{}",
        stderr(&plain)
    );
}

#[test]
fn bad_options_are_one_clear_line() {
    for (options, words) in [
        (&["--age", "0"][..], &["no time at all"][..]),
        (&["--wss=xml"], &["xml", "text, json"]),
        (&["--ad-bits", "perhaps"], &["perhaps", "on, off"]),
    ] {
        let output = finish(&mut run(options, &["hello"]), b"", LIMIT);
        assert_eq!(code(output.status), 2, "{options:?}: {}", stderr(&output));
        for word in words {
            assert!(stderr(&output).contains(word), "no `{word}` in: {}", stderr(&output));
        }
    }
}

#[test]
fn what_cannot_be_done_is_told_before_the_guest_runs() {
    let folder = folder("aging-refused");
    let refused = |options: &[&str], words: &[&str]| {
        let output = finish(&mut run(options, &["hello"]), b"", LIMIT);
        let said = stderr(&output);
        assert_eq!((code(output.status), output.stdout.len()), (125, 0), "{said}");
        assert!(said.starts_with("umbra: ") && said.trim_end().lines().count() == 1, "{said}");
        for word in words {
            assert!(said.contains(word), "no `{word}` in: {said}");
        }
    };
    refused(&["--heatmap", "/nonexistent/map.svg"], &["/nonexistent/map.svg"]);
    refused(&["--heatmap", folder.to_str().unwrap()], &["no regular file"]);
    assert!(folder.read_dir().unwrap().next().is_none(), "nothing is left behind");
}
