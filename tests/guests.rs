// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The bundled guests: as guests and natively, with the same answers.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use common::{assert_same, code, finish, guests, native_images, run, stderr, umbra};
use std::process::Command;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(120);

fn compare(test: &str, cases: &[&[&str]], options: &[&str]) {
    if !guests() {
        return;
    }
    let native = native_images(test);
    for case in cases {
        let expected = finish(Command::new(native.join(case[0])).args(&case[1..]), b"", LIMIT);
        let got = finish(&mut run(options, case), b"", LIMIT);
        assert_same(&expected, &got, &format!("{options:?} {case:?}"));
    }
}

#[test]
fn both_kinds_of_elf_say_hello() {
    compare("hello", &[&["hello"], &["hello-pie"]], &["--check"]);
}

#[test]
fn touching_in_every_order_reads_back_what_was_written() {
    let cases: &[&[&str]] = &[
        &["touch", "--pages", "3000", "--verify"],
        &["touch", "--pages", "3000", "--verify", "--order", "desc", "--passes", "2"],
        &["touch", "--pages", "3000", "--verify", "--order", "random", "--write", "50", "--passes", "3"],
        &["touch", "--pages", "3000", "--verify", "--order", "stride:7", "--write", "0"],
    ];
    compare("touch-adaptive", cases, &["--check"]);
    compare("touch-off", &cases[..2], &["--check", "--fault-around", "off"]);
    compare("touch-fixed", cases, &["--check", "--fault-around", "64K"]);
    compare("touch-on-demand", &cases[..2], &["--check", "--window", "on-demand"]);
}

#[test]
fn usage_errors_of_a_guest_are_passed_through() {
    compare("usage", &[&["touch", "--pages", "none"], &["torture"]], &[]);
}

#[test]
fn a_sequential_touch_costs_a_handful_of_exits() {
    if !guests() {
        return;
    }
    let output = finish(&mut run(&["--stats=json"], &["touch", "--pages", "10000"]), b"", LIMIT);
    assert_eq!(code(output.status), 0);
    let stats: serde_json::Value = serde_json::from_slice(&output.stderr).unwrap();
    let faults = stats["pf_taken"].as_u64().unwrap();
    assert!(faults < 100, "{faults} faults for 10,000 pages: {stats}");
}

#[test]
fn a_random_touch_wastes_next_to_no_memory() {
    if !guests() {
        return;
    }
    let touch = ["touch", "--pages", "20000", "--order", "stride:7919"];
    let peak = |around: &str| {
        let output = finish(&mut run(&["--stats=json", "--fault-around", around], &touch), b"", LIMIT);
        let stats: serde_json::Value = serde_json::from_slice(&output.stderr).unwrap();
        stats["frames_peak"].as_f64().unwrap()
    };
    let (off, adaptive) = (peak("off"), peak("adaptive"));
    assert!(adaptive <= off * 1.02, "{adaptive} frames instead of {off}");
}

#[test]
fn images_are_listed_and_extracted() {
    let list = umbra().args(["images", "--json"]).output().unwrap();
    let list: serde_json::Value = serde_json::from_slice(&list.stdout).unwrap();
    assert!(list.as_array().unwrap().iter().any(|image| image["name"] == "torture"));
    let folder = native_images("extract");
    let output = Command::new(folder.join("hello")).output().unwrap();
    assert!(output.status.success() && !output.stdout.is_empty());
}

#[test]
fn the_time_limit_ends_a_guest() {
    if !guests() {
        return;
    }
    let output = finish(&mut run(&["--timeout", "300ms"], &["threads", "--seconds", "60"]), b"", LIMIT);
    assert_eq!(code(output.status), 128 + libc::SIGKILL, "{}", stderr(&output));
}
