// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What both sides go through, and what each step gives.
//!
//! | step | rows |
//! | --- | --- |
//! | scanning at full pace until everything is saved that can be | `saved_bytes`, `first_pass_wall_s`, `first_pass_cpu_s`, `cpu_us_per_merged_page` |
//! | some passes to settle, then many over memory that nobody changes | `idle_pass_cpu_s`, `metadata_bytes_per_page` |
//! | the program works, with scanning beside it and without; at full pace, then at a pass a second | `guest_slowdown`, `guest_slowdown_paced` |
//! | nobody scans; writes to shared pages and, to compare, to others | `cow_break_us`, `cow_break_p99_us`, `plain_write_us` |
//! | a pass a second, while a hundredth of the pages a second is rewritten | `rewrite_cpu_s` |
//! | the program looks at every byte | |
//!
//! Full pace is without a pause for ksmd, which takes a whole CPU whatever it has to do; umbra's thread makes 20 passes a second
//! at most even so, and takes what these need. So at full pace the side whose pass is shorter makes more of them, up to that,
//! and its program is disturbed more often by each; the paced row has as many on both sides.
//!
//! CPU time is that of the scanner's thread, on both sides. What scanning causes in the program's own threads, faults at pages that
//! were made read-only or clean and copies of shared ones, is in no row of CPU time; it shows in `guest_slowdown` and
//! `cow_break_us`.
//!
//! `metadata_bytes_per_page` is what is kept about pages, divided by what it is kept for: for umbra the frames of its pool, all of
//! them, for ksmd the pages of the program.

use super::compat::NotOk;
use super::mix::Content;
use super::program::{Program, Rewriter, Rewritten};
use crate::bench::phases::Phase;
use anyhow::{Result, bail};
use shadow_mmu::addr::PAGE_SIZE;
use std::time::{Duration, Instant};

/// Passes before those over unchanged memory count. The kernel's smart scan skips a page the more often the longer it was not
/// changed, and longest after nine passes.
const SETTLE_PASSES: u64 = 12;
/// Over so many passes their time is averaged: twice that period.
const IDLE_PASSES: u64 = 18;
/// However slowly somebody scans, some passes take no longer than this.
const PASSES_WITHIN: Duration = Duration::from_secs(300);
/// What of the window each of these takes: averaging passes over unchanged memory, and each turn of the program's work.
const PARTS: u32 = 20;
/// How often it does, with scanning beside it and without.
const WORK_TURNS: u32 = 3;
/// Pages that are written to.
const WRITES: u64 = 1000;
/// Between two looks at counters.
const POLL: Duration = Duration::from_millis(1);
/// Between two lots of pages that are rewritten.
const TICK: Duration = Duration::from_millis(50);

/// What is measured, but for who.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub(super) content: Content,
    /// Pages are rewritten all the time.
    pub(super) background: Option<Rewritten>,
    /// How long rewriting is measured; other things a part of it.
    pub(super) window: Duration,
    /// The saving is given up as incomplete after this.
    pub(super) limit: Duration,
}

/// How fast is scanned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ScanPace {
    /// As fast as the scanner goes: without a pause, but for the one that umbra's makes of itself when a pass was short.
    Full,
    /// One full pass, then nothing for a second.
    PassASecond,
}

/// Counters at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sample {
    /// Pages that need no memory of their own.
    pub(super) saved_pages: u64,
    /// CPU time of scanning so far.
    pub(super) cpu: Duration,
    /// Passes so far.
    pub(super) full_scans: u64,
}

/// A scanner and the program that it works on, which is filled and may be merged.
pub(super) trait Side {
    fn program(&mut self) -> &mut Program;
    /// Scans from now on, until told otherwise.
    fn scan(&mut self, pace: ScanPace) -> Result<()>;
    /// Stops scanning; what is merged stays so.
    fn pause(&mut self) -> Result<()>;
    fn sample(&mut self) -> Result<Sample>;
    /// Bytes of what is kept about a page, by the side's own count of pages.
    fn metadata_bytes_per_page(&mut self) -> Result<f64>;
    /// How many pages may share one.
    fn sharing_limit(&self) -> u64;
}

/// What the steps gave.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Measured {
    pub(super) phases: Vec<Phase>,
    /// What must be said of them.
    pub(super) note: Option<String>,
}

/// Goes through all of it with `side`.
///
/// # Errors
/// The side's; counters that stand still; content that changed.
pub(super) fn measure(side: &mut dyn Side, plan: &Plan) -> Result<Measured> {
    let mut phases = Vec::new();
    let mut background = plan.background.map(Rewriter::new);
    let mut note = None;

    let savable = plan.content.savable(side.sharing_limit());
    let (before, began) = (side.sample()?, Instant::now());
    side.scan(ScanPace::Full)?;
    let complete = until(side, &mut background, plan.limit, |sample| sample.saved_pages >= savable)?;
    let (wall, now) = (began.elapsed(), side.sample()?);
    phases.push(Phase::new("saved_bytes", "bytes", (now.saved_pages * PAGE_SIZE) as f64));
    if now.saved_pages > savable && plan.background.is_none() {
        note = Some(format!(
            "saved {} pages where the content lets {savable} be saved: somebody else's are among them",
            now.saved_pages
        ));
    }
    match complete {
        Some(complete) => {
            let cpu = complete.cpu - before.cpu;
            phases.push(Phase::new("first_pass_wall_s", "s", wall.as_secs_f64()));
            phases.push(Phase::new("first_pass_cpu_s", "s", cpu.as_secs_f64()));
            if savable > 0 {
                let each = cpu.as_secs_f64() * 1e6 / savable as f64;
                phases.push(Phase::new("cpu_us_per_merged_page", "us", each));
            }
        }
        None => {
            note = Some(format!(
                "saved {} pages of {savable} within {} s: the saving never became complete",
                now.saved_pages,
                plan.limit.as_secs_f64()
            ));
        }
    }

    phases.push(Phase::new("idle_pass_cpu_s", "s", idle_pass(side, &mut background, plan)?));
    phases.push(Phase::new("metadata_bytes_per_page", "bytes", side.metadata_bytes_per_page()?));

    let work = plan.window / PARTS;
    phases.push(Phase::new("guest_slowdown", "times", slowdown(side, ScanPace::Full, work)?));
    phases.push(Phase::new("guest_slowdown_paced", "times", slowdown(side, ScanPace::PassASecond, work)?));

    let shared = side.program().write(WRITES, "shared")?;
    if shared.pages > 0 {
        phases.push(Phase::new("cow_break_us", "us", shared.median.as_secs_f64() * 1e6));
        phases.push(Phase::new("cow_break_p99_us", "us", shared.p99.as_secs_f64() * 1e6));
    }
    let plain = side.program().write(WRITES, "own")?;
    if plain.pages > 0 {
        phases.push(Phase::new("plain_write_us", "us", plain.median.as_secs_f64() * 1e6));
    }

    let rewriter = Rewriter::new(plan.background.unwrap_or(Rewritten::Any));
    phases.push(Phase::new("rewrite_cpu_s", "s/s", rewriting(side, rewriter, plan.window)?));
    side.pause()?;
    side.program().verify()?;
    Ok(Measured { phases, note })
}

/// How much longer the program's work, of about `time`, takes beside a scanner at that pace; they take turns. Nobody scans in
/// the end.
fn slowdown(side: &mut dyn Side, pace: ScanPace, time: Duration) -> Result<f64> {
    side.pause()?;
    let once = side.program().timed("work 1")?.max(Duration::from_micros(1));
    // At least once, and so often that it takes long enough.
    let work = format!("work {}", (time.as_nanos() / once.as_nanos()).max(1));
    let (mut without, mut beside) = (Duration::ZERO, Duration::ZERO);
    for _ in 0..WORK_TURNS {
        without += side.program().timed(&work)?;
        side.scan(pace)?;
        beside += side.program().timed(&work)?;
        side.pause()?;
    }
    Ok(beside.as_secs_f64() / without.as_secs_f64())
}

/// Waits until so many more passes are over; the first may have begun before.
///
/// # Errors
/// The side's; they take longer than `limit`.
pub(super) fn wait_for_passes(side: &mut dyn Side, passes: u64, limit: Duration) -> Result<()> {
    let first = side.sample()?.full_scans;
    match until(side, &mut None, limit, |sample| sample.full_scans >= first + passes)? {
        Some(_) => Ok(()),
        None => {
            let seconds = limit.as_secs_f64();
            Err(NotOk(format!("Scan time limit exceeded: fewer than {passes} passes within {seconds} s"))
                .into())
        }
    }
}

/// CPU seconds of one further pass.
fn idle_pass(side: &mut dyn Side, background: &mut Option<Rewriter>, plan: &Plan) -> Result<f64> {
    let mut pass_after = |side: &mut dyn Side, passes: u64, least: Duration| -> Result<Sample> {
        let (first, began) = (side.sample()?.full_scans, Instant::now());
        let enough = |sample: &Sample| sample.full_scans >= first + passes && began.elapsed() >= least;
        match until(side, background, PASSES_WITHIN, enough)? {
            Some(sample) => Ok(sample),
            None => bail!("fewer than {passes} passes within {} s", PASSES_WITHIN.as_secs()),
        }
    };
    let settled = pass_after(side, SETTLE_PASSES, Duration::ZERO)?;
    let now = pass_after(side, IDLE_PASSES, plan.window / PARTS)?;
    let passes = now.full_scans - settled.full_scans;
    Ok((now.cpu - settled.cpu).as_secs_f64() / passes as f64)
}

/// CPU seconds a second while pages are rewritten.
fn rewriting(side: &mut dyn Side, rewriter: Rewriter, time: Duration) -> Result<f64> {
    let mut rewriter = Some(rewriter);
    side.scan(ScanPace::PassASecond)?;
    // Passes that see what happened before.
    let first = side.sample()?.full_scans;
    let seen = |sample: &Sample| sample.full_scans >= first + 2;
    if until(side, &mut rewriter, PASSES_WITHIN, seen)?.is_none() {
        bail!("fewer than two passes within {} s, at a pass a second", PASSES_WITHIN.as_secs());
    }
    let (before, began) = (side.sample()?, Instant::now());
    until(side, &mut rewriter, time, |_| false)?;
    let (now, elapsed) = (side.sample()?, began.elapsed());
    Ok((now.cpu - before.cpu).as_secs_f64() / elapsed.as_secs_f64())
}

/// Waits until `is_enough`, rewriting meanwhile; `None` where `limit` came first.
fn until(
    side: &mut dyn Side,
    background: &mut Option<Rewriter>,
    limit: Duration,
    is_enough: impl Fn(&Sample) -> bool,
) -> Result<Option<Sample>> {
    let began = Instant::now();
    let mut ticked = began;
    loop {
        let sample = side.sample()?;
        if is_enough(&sample) {
            return Ok(Some(sample));
        }
        if began.elapsed() >= limit {
            return Ok(None);
        }
        if let Some(rewriter) = background.as_mut().filter(|_| ticked.elapsed() >= TICK) {
            ticked = Instant::now();
            rewriter.tick(side.program())?;
        }
        std::thread::sleep(POLL);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

    use super::super::mix::Mix;
    use super::*;

    /// A scanner that merges `at_once` pages a look, up to `most`, with a pass and a millisecond of CPU time a look while it runs.
    struct Fake {
        program: Program,
        at_once: u64,
        most: u64,
        is_running: bool,
        now: Sample,
    }

    impl Side for Fake {
        fn program(&mut self) -> &mut Program {
            &mut self.program
        }
        fn scan(&mut self, _: ScanPace) -> Result<()> {
            self.is_running = true;
            Ok(())
        }
        fn pause(&mut self) -> Result<()> {
            self.is_running = false;
            Ok(())
        }
        fn sample(&mut self) -> Result<Sample> {
            if self.is_running {
                self.now.saved_pages = (self.now.saved_pages + self.at_once).min(self.most);
                self.now.cpu += Duration::from_millis(1);
                self.now.full_scans += 1;
            }
            Ok(self.now)
        }
        fn metadata_bytes_per_page(&mut self) -> Result<f64> {
            Ok(7.0)
        }
        fn sharing_limit(&self) -> u64 {
            256
        }
    }

    /// 100 pages, of which 25 are zero and 37 can be saved of the 50 that are in groups of 4, the last of 2.
    const SAVABLE: u64 = 25 + 36 + 1;

    fn measured(at_once: u64, most: u64) -> Measured {
        let content = Content::new(&Mix::parse("zero=25,dup=50,unique=25").unwrap(), 100, 1).unwrap();
        let (window, limit) = (Duration::from_millis(20), Duration::from_millis(200));
        let plan = Plan { content, background: None, window, limit };
        let mut program = Program::native(&plan.content.words, 100).unwrap();
        program.fill(&plan.content).unwrap();
        let now = Sample { saved_pages: 0, cpu: Duration::ZERO, full_scans: 0 };
        measure(&mut Fake { program, at_once, most, is_running: false, now }, &plan).unwrap()
    }

    fn value(measured: &Measured, name: &str) -> Option<f64> {
        measured.phases.iter().find(|phase| phase.name == name).map(|phase| phase.value)
    }

    #[test]
    fn figures_are_those_of_the_moment_when_all_is_saved() {
        let measured = measured(SAVABLE / 2, SAVABLE);
        assert_eq!(measured.note, None);
        assert_eq!(value(&measured, "saved_bytes"), Some((SAVABLE * PAGE_SIZE) as f64));
        // Two looks.
        assert_eq!(value(&measured, "first_pass_cpu_s"), Some(0.002));
        assert_eq!(value(&measured, "cpu_us_per_merged_page"), Some(2000.0 / SAVABLE as f64));
        assert_eq!(value(&measured, "idle_pass_cpu_s"), Some(0.001));
        assert_eq!(value(&measured, "metadata_bytes_per_page"), Some(7.0));
        for name in ["guest_slowdown", "guest_slowdown_paced", "cow_break_us", "rewrite_cpu_s"] {
            assert!(value(&measured, name).is_some_and(|value| value > 0.0), "{name}");
        }
    }

    #[test]
    fn a_saving_that_is_not_complete_has_no_time() {
        let measured = measured(SAVABLE, SAVABLE - 1);
        assert!(measured.note.as_ref().is_some_and(|note| note.contains("never became complete")));
        assert_eq!(value(&measured, "saved_bytes"), Some(((SAVABLE - 1) * PAGE_SIZE) as f64));
        assert_eq!(value(&measured, "first_pass_cpu_s"), None);
        assert_eq!(value(&measured, "cpu_us_per_merged_page"), None);
        assert!(value(&measured, "idle_pass_cpu_s").is_some());
    }

    #[test]
    fn more_than_can_be_is_said() {
        let measured = measured(SAVABLE + 5, SAVABLE + 5);
        assert!(measured.note.is_some_and(|note| note.contains("somebody else's")));
    }
}
