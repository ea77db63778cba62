// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `bench age --overhead`: what aging costs the guest that is aged.
//!
//! One vCPU goes over its memory again and again, with arithmetic after each access, and times itself. Runs without aging and
//! runs with a pass every so often take turns, in one and the same guest.
//!
//! | row | what |
//! | --- | --- |
//! | `umbra.plain` | one round over the memory while nobody looks |
//! | `umbra.aged` | the same with a pass of aging every interval, as `umbra run --age` makes it |
//! | `umbra.aged-unflushed` | the same with passes that do not flush; only where this host needs a flush for A to be set again |
//! | `….aging pass` | one pass of aging; its time is not the guest's where there are more CPUs than one |
//!
//! `slowdown` is the time of `umbra.aged` over that of `umbra.plain`, less one; `slowdown-unflushed` that of the other. On
//! hosts that need the flush the latter is a lower bound: there no access after the first pass sets A.

use super::access_tracking::TOLD;
use super::memstress::{Memstress, Work};
use super::phases::{Phase, measure_phases, median};
use super::{Contestant, Host, Report};
use crate::vm::WindowFill;
use anyhow::Result;
use shadow_mmu::mm::Mm;
use shadow_mmu::shadow::{AdBits, FaultAroundPolicy};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AgeOverhead {
    /// Pages of the guest.
    pub pages: u64,
    /// From one pass to the next; passes that would begin while one is running are left out.
    pub interval: Duration,
    /// About how long one run takes.
    pub window: Duration,
}

/// Steps of arithmetic after each access: some 0.2 µs.
const SPIN: u64 = 100;

/// Runs the benchmark, `runs` times a row.
///
/// # Errors
/// What keeps umbra from running a guest at all.
pub fn bench_age_overhead(
    host: &Host,
    options: &AgeOverhead,
    runs: usize,
    progress: &mut dyn FnMut(&str),
) -> Result<Report> {
    let work = Work { spin: SPIN, ..Work::new(1, options.pages) };
    work.expect_room(1)?;
    let config = work.config(FaultAroundPolicy::Adaptive, WindowFill::Ahead, TOLD);
    let mut memstress = Memstress::guest(config, &work)?;
    // Rounds are fitted to the window by one of them, and a machine may slow down.
    memstress.expect(options.window.saturating_mul(2));
    memstress.pass("write")?;
    let host_bits = Arc::clone(memstress.expect_machine()?.engine()).tlb().ad_bits();
    let memstress = RefCell::new(memstress);
    let run = |aging: Option<AdBits>| {
        let memstress = &memstress;
        let mut times = 1;
        move || {
            let (phases, fitting) = rounds(&mut memstress.borrow_mut(), times, aging, options)?;
            // What the first run, which does not count, has shown.
            times = fitting;
            Ok(phases)
        }
    };
    let mut contestants = vec![
        Contestant::required("umbra.plain", run(None)),
        Contestant::required("umbra.aged", run(Some(host_bits))),
    ];
    if host_bits == AdBits::AfterFlush {
        contestants.push(Contestant::required("umbra.aged-unflushed", run(Some(AdBits::Unflushed))));
    }
    let (mut rows, missing) = measure_phases(runs, contestants, progress)?;
    for row in &mut rows {
        row.name = row.name.trim_end_matches('.').to_owned();
    }
    let mut ratios = BTreeMap::new();
    for (name, row) in [("slowdown", "umbra.aged"), ("slowdown-unflushed", "umbra.aged-unflushed")] {
        if let (Some(aged), Some(plain)) = (median(&rows, row), median(&rows, "umbra.plain")) {
            ratios.insert(name.into(), aged / plain - 1.0);
        }
    }
    memstress.into_inner().finish()?;
    Ok(Report {
        bench: "age-overhead".into(),
        host: host.clone(),
        rows,
        ratios,
        missing,
        notes: Vec::new(),
        lines: Vec::new(),
    })
}

/// Goes over the memory `times` times, with a thread that ages if there is `aging`. Milliseconds a round, those of a pass,
/// and how many rounds would have filled the window.
fn rounds(
    memstress: &mut Memstress,
    times: u64,
    aging: Option<AdBits>,
    options: &AgeOverhead,
) -> Result<(Vec<Phase>, u64)> {
    let command = format!("mix times {times}");
    let machine = memstress.expect_machine()?;
    // As after a start: what the last run left without A, and unflushed, would never be young again.
    machine.shadow().set_ad_bits(aging.unwrap_or(AdBits::AfterFlush));
    Arc::clone(machine.engine()).tlb().flush_all();
    memstress.pass("read")?;
    let machine = memstress.expect_machine()?;
    let mm = Arc::clone(machine.mm());
    let (done, ended) = channel();
    let (round, pass) = std::thread::scope(|scope| {
        let ager = aging.map(|_| scope.spawn(move || age_until(&mm, options.interval, &ended)));
        let answer = memstress.pass(&command);
        drop(done);
        (answer, ager.and_then(|ager| ager.join().ok()))
    });
    let time = round?.time;
    let milliseconds = |time: Duration| time.as_secs_f64() * 1e3;
    let each = milliseconds(time) / times as f64;
    let mut phases = vec![Phase::new("", "ms", each)];
    phases.extend(pass.map(|pass| Phase::time("aging pass", pass)));
    Ok((phases, (milliseconds(options.window) / each).ceil().clamp(1.0, 1e9) as u64))
}

/// A pass every `interval`, the first at once, until `ended` is hung up; the mean time of a pass. One that takes longer than
/// the interval is followed by the next at the next multiple of it.
fn age_until(mm: &Mm, interval: Duration, ended: &Receiver<()>) -> Duration {
    let (mut spent, mut passes) = (Duration::ZERO, 0_u32);
    let start = Instant::now();
    loop {
        let began = Instant::now();
        mm.age();
        spent += began.elapsed();
        passes += 1;
        match ended.recv_timeout(until_next(start.elapsed(), interval)) {
            Err(RecvTimeoutError::Timeout) => {}
            Ok(()) | Err(RecvTimeoutError::Disconnected) => return spent / passes,
        }
    }
}

/// How long after `elapsed` the next multiple of `interval` comes, counted from the same time: never at once, so a tick that
/// has passed is left out. By division: a pass may take as long as millions of intervals.
fn until_next(elapsed: Duration, interval: Duration) -> Duration {
    let into = elapsed.as_nanos() % interval.as_nanos().max(1);
    // Less than `elapsed`, whose nanoseconds fit for centuries.
    interval.saturating_sub(Duration::from_nanos(into as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missed_ticks_are_left_out_however_many_there_are() {
        let ms = Duration::from_millis;
        assert_eq!(until_next(ms(0), ms(100)), ms(100));
        assert_eq!(until_next(ms(99), ms(100)), ms(1));
        assert_eq!(until_next(ms(100), ms(100)), ms(100));
        assert_eq!(until_next(ms(350), ms(100)), ms(50));
        // A year of them, a nanosecond each.
        assert_eq!(until_next(ms(31_557_600_000), Duration::from_nanos(1)), Duration::from_nanos(1));
        assert_eq!(until_next(ms(5), Duration::ZERO), Duration::ZERO);
    }
}
