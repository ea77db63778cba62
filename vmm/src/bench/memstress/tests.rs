// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The driver against the program, in both places where it runs.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use super::super::told::GRACE;
use super::*;
use crate::vm::{Tracking, WindowFill};
use shadow_mmu::addr::PAGE_SIZE;
use shadow_mmu::shadow::FaultAroundPolicy;

/// A small machine, if there can be one here.
fn guest(work: &Work) -> Option<Memstress> {
    let config = work.config(FaultAroundPolicy::Adaptive, WindowFill::Ahead, Tracking::default());
    crate::engine::testing::guests()?;
    Some(Memstress::guest(config, work).unwrap())
}

fn both(work: &Work) -> Vec<Memstress> {
    guest(work).into_iter().chain([Memstress::native(work).unwrap()]).collect()
}

#[test]
fn passes_are_answered_in_both_places() {
    let work = Work { overlap: true, write_percent: 30, ..Work::new(2, 100) };
    for mut memstress in both(&work) {
        let region = memstress.region().unwrap();
        assert_eq!(region.end.0 - region.start.0, 100 * PAGE_SIZE);
        assert_eq!(memstress.pass("write").unwrap().accesses, 200);
        assert_eq!(memstress.pass("mix every 10 times 2").unwrap().accesses, 40);
        assert_eq!(memstress.command("run 3").unwrap(), "3");
        assert!(memstress.pass("stop").unwrap().accesses > 0);
        memstress.finish().unwrap();
    }
}

#[test]
fn its_end_is_an_error_that_does_not_wait() {
    for mut memstress in both(&Work::new(1, 4)) {
        assert!(memstress.command("nonsense").is_err());
        assert!(memstress.finish().unwrap_err().to_string().contains("memstress"));
    }
    for mut memstress in both(&Work::new(1, 4)) {
        memstress.0.stdin = None;
        assert!(memstress.command("read").is_err());
    }
}

#[test]
fn one_that_runs_is_ended_by_the_drop() {
    for mut memstress in both(&Work::new(2, 4)) {
        memstress.command("run 1").unwrap();
        let pid = memstress.pid();
        drop(memstress);
        assert!(pid.is_none_or(|pid| !std::path::Path::new(&format!("/proc/{pid}")).exists()));
    }
}

#[test]
fn the_limit_is_beyond_what_was_asked_for() {
    let work = Work::new(2, 1000);
    for mut memstress in both(&work) {
        assert!(memstress.0.limit >= GRACE + work.pass_at_most());
        // 1,000 pages, a second each; and a window that no clock can count: a wait without end, and no panic.
        memstress.expect(Duration::from_secs(1000));
        assert!(memstress.0.limit >= GRACE + Duration::from_secs(1000) && memstress.0.deadline().is_some());
        memstress.expect(Duration::MAX);
        assert_eq!(memstress.0.deadline(), None);
        assert_eq!(memstress.pass("read").unwrap().accesses, 2000);
        memstress.finish().unwrap();
    }
}

#[test]
fn a_limit_ends_a_wait() {
    let mut memstress = Memstress::native(&Work::new(1, 4)).unwrap();
    memstress.0.limit = Duration::from_millis(1);
    // Nobody has asked for anything.
    let error = memstress.answer("read").unwrap_err();
    assert!(format!("{error:#}").contains("said nothing"), "{error:#}");
}

#[test]
fn an_answer_is_a_time_and_a_number() {
    let pass = Pass { time: Duration::from_nanos(12), accesses: 3 };
    assert_eq!(parse_pass("12 ns, 3 accesses"), Some(pass));
    for bad in ["", "12 ns", "12 ns, 3", "x ns, 3 accesses", "1 ns, -3 accesses"] {
        assert_eq!(parse_pass(bad), None, "{bad}");
    }
}
