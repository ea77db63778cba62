// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Long runs with umbra watching itself (`--check`): the answers are the native ones, every audit is clean, and no frame is
//! written after it was freed.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use common::{assert_same, finish, kvm, native_images, run, stderr};
use std::process::Command;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(900);

#[test]
fn a_thousand_tortures() {
    if !kvm() {
        return;
    }
    let native = native_images("torture");
    let expected = finish(Command::new(native.join("torture")).arg("1..1000"), b"", LIMIT);
    let got = finish(&mut run(&["--check"], &["torture", "1..1000"]), b"", LIMIT);
    assert_same(&expected, &got, "torture 1..1000");
    assert_eq!(got.stdout.iter().filter(|&&byte| byte == b'\n').count(), 1000);
    assert!(stderr(&got).contains("audits clean"), "{}", stderr(&got));
}

#[test]
fn a_torture_in_scarce_memory_and_without_fault_around() {
    if !kvm() {
        return;
    }
    let native = native_images("torture-scarce");
    let expected = finish(Command::new(native.join("torture")).arg("2000..2020"), b"", LIMIT);
    for options in [["--fault-around", "off", "--memory", "24M"], ["--fault-around", "2M", "--memory", "64M"]]
    {
        let got =
            finish(run(&["--check"], &[""; 0]).args(options).args(["torture", "2000..2020"]), b"", LIMIT);
        assert_same(&expected, &got, &format!("{options:?}"));
    }
}

#[test]
fn threads_race_with_unmap_for_a_minute() {
    if !kvm() {
        return;
    }
    let native = native_images("threads");
    // The checksum depends on the seed, not on how long it ran.
    let expected = finish(Command::new(native.join("threads")).args(["--rounds", "50"]), b"", LIMIT);
    let got = finish(&mut run(&["--check"], &["threads", "--seconds", "60"]), b"", LIMIT);
    assert_same(&expected, &got, "threads");
    assert!(stderr(&got).contains("audits clean"), "{}", stderr(&got));
}
