// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The time that a process lives in: the host's, or a virtual one that goes on as the scheduler of deterministic mode says.
//! Everything in `guest/` that reads a clock asks its process's, so there is one way for both.
//!
//! Used CPU time is that of umbra's process or of the calling thread in it, and what the engine had the guest use outside of that.
//! The latter counts as user mode: the guest's system calls are umbra's work.
//!
//! In virtual time every clock goes at the same pace. CLOCK_REALTIME starts at [`START`], CLOCK_TAI 37 s ahead of it, and the
//! others at 0; the process has used all of that time itself, in user mode.

use super::errno::Errno;
use super::host::{self, ClockQuery};
use super::thread::Thread;
use super::uaccess::Record;
use crate::deterministic::{START, VirtualClock};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Between CLOCK_TAI and CLOCK_REALTIME, seconds, since 2017.
const TAI_OFFSET: i64 = 37;
/// `_SC_CLK_TCK`.
const TICKS_A_SECOND: u128 = 100;

/// Where a process has its time from.
#[derive(Debug, Clone, Default)]
pub enum Clock {
    /// The host's clocks.
    #[default]
    Host,
    /// A clock of the VM's own.
    Virtual(Arc<VirtualClock>),
}

impl Clock {
    /// Now, for deadlines.
    pub fn now(&self) -> Instant {
        match self {
            Self::Host => Instant::now(),
            Self::Virtual(clock) => clock.now(),
        }
    }

    /// Asks clock `number`, which exists, for `t`; (seconds, nanoseconds).
    pub(super) fn query(&self, t: &Thread, number: i32, query: ClockQuery) -> Result<(i64, i64), Errno> {
        let Self::Virtual(clock) = self else {
            let (seconds, nanoseconds) = host::clock(number, query)?;
            let whose = match (number, query) {
                (libc::CLOCK_PROCESS_CPUTIME_ID, ClockQuery::Time) => libc::RUSAGE_SELF,
                (libc::CLOCK_THREAD_CPUTIME_ID, ClockQuery::Time) => libc::RUSAGE_THREAD,
                _ => return Ok((seconds, nanoseconds)),
            };
            let used = Duration::new(seconds as u64, nanoseconds as u32) + cpu_time_outside(t, whose);
            return Ok((used.as_secs() as i64, used.subsec_nanos().into()));
        };
        if query == ClockQuery::Resolution {
            return Ok((0, 1));
        }
        let elapsed = clock.elapsed();
        let epoch = match number {
            libc::CLOCK_REALTIME | libc::CLOCK_REALTIME_COARSE => START,
            libc::CLOCK_TAI => START + TAI_OFFSET,
            _ => 0,
        };
        Ok((epoch + elapsed.as_secs() as i64, elapsed.subsec_nanos().into()))
    }

    /// `struct tms` as its 32 bytes, for `t`, and the ticks that `times` returns.
    pub(super) fn times(&self, t: &Thread) -> Result<([u8; 32], u64), Errno> {
        let Self::Virtual(clock) = self else {
            let (tms, now) = host::times()?;
            let mut record = Record(tms);
            record.put_u64(0, record.u64(0) + ticks(cpu_time_outside(t, libc::RUSAGE_SELF)));
            return Ok((record.0, now));
        };
        let ticks = ticks(clock.elapsed());
        let mut record = Record::<32>::zeroed();
        record.put_u64(0, ticks);
        Ok((record.0, ticks))
    }

    /// `struct rusage` as its 144 bytes, for `t`.
    pub(super) fn rusage(&self, t: &Thread, who: i32) -> Result<[u8; 144], Errno> {
        let Self::Virtual(clock) = self else {
            let mut record = Record(host::rusage(who)?);
            let own = Duration::from_secs(record.u64(0)) + Duration::from_micros(record.u64(8));
            put_timeval(&mut record, own + cpu_time_outside(t, who));
            return Ok(record.0);
        };
        let mut record = Record::<144>::zeroed();
        match who {
            libc::RUSAGE_SELF | libc::RUSAGE_THREAD => put_timeval(&mut record, clock.elapsed()),
            libc::RUSAGE_CHILDREN => {}
            _ => return Err(Errno::EINVAL),
        }
        Ok(record.0)
    }
}

/// What was used outside umbra's process by those whom `who` of getrusage(2) means.
fn cpu_time_outside(t: &Thread, who: i32) -> Duration {
    match who {
        libc::RUSAGE_SELF => t.process.host().cpu_time_outside(),
        libc::RUSAGE_THREAD => t.waker.cpu_time_outside(),
        _ => Duration::ZERO,
    }
}

/// Sets `ru_utime`.
fn put_timeval(rusage: &mut Record<144>, time: Duration) {
    rusage.put_u64(0, time.as_secs()).put_u64(8, time.subsec_micros().into());
}

fn ticks(time: Duration) -> u64 {
    (time.as_nanos() * TICKS_A_SECOND / 1_000_000_000) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::deterministic::PID;
    use crate::guest::testing::{Fixture, USED_OUTSIDE_BY_PROCESS, USED_OUTSIDE_BY_THREAD};

    /// What a program can read of time, chance and itself.
    fn readings(seed: u64) -> Vec<Vec<u8>> {
        let fixture = Fixture::deterministic(seed);
        let at = fixture.map_pages(1);
        let hour = fixture.map_pages(1);
        fixture.user().write_u64(hour, 3600).unwrap();
        let mut readings = Vec::new();
        let mut call = |number: i64, args: &[u64]| {
            fixture.user().write(at, &[0; 200]).unwrap();
            let result = fixture.main.call(number, args);
            let mut bytes = result.to_le_bytes().to_vec();
            bytes.resize(208, 0);
            fixture.user().read(at, &mut bytes[8..]).unwrap();
            readings.push(bytes);
        };
        for clock in 0..=11 {
            call(libc::SYS_clock_gettime, &[clock, at]);
            call(libc::SYS_clock_getres, &[clock, at]);
        }
        call(libc::SYS_nanosleep, &[hour, 0]);
        for (number, args) in [
            (libc::SYS_gettimeofday, &[at, 0][..]),
            (libc::SYS_time, &[0]),
            (libc::SYS_times, &[at]),
            (libc::SYS_getrusage, &[0, at]),
            (libc::SYS_getrusage, &[u64::MAX, at]),
            (libc::SYS_sysinfo, &[at]),
            (libc::SYS_getrandom, &[at, 100, 0]),
            (libc::SYS_getcpu, &[at, at + 4]),
            (libc::SYS_sched_getaffinity, &[0, 8, at]),
            (libc::SYS_getpid, &[]),
            (libc::SYS_getppid, &[]),
            (libc::SYS_getpgrp, &[]),
            (libc::SYS_getsid, &[0]),
            (libc::SYS_gettid, &[]),
        ] {
            call(number, args);
        }
        readings
    }

    #[test]
    fn what_a_program_reads_follows_from_the_seed() {
        let began = Instant::now();
        let first = readings(1);
        assert_eq!(first, readings(1));
        assert_ne!(first, readings(2));
        assert!(began.elapsed() < Duration::from_secs(1000), "an hour of virtual time is none of the host's");
        let number = |index: usize| i64::from_le_bytes(first[index][8..16].try_into().unwrap());
        assert!((START..START + 10).contains(&number(0)), "CLOCK_REALTIME starts at a fixed time");
        assert_eq!(number(2), 0, "CLOCK_MONOTONIC starts at 0");
        assert!((START + 3600..START + 3610).contains(&number(25)), "the sleep took an hour");
        let pid = i64::from_le_bytes(first[34][..8].try_into().unwrap());
        assert_eq!(pid, i64::from(PID));
    }

    #[test]
    fn what_the_engine_used_outside_counts() {
        let fixture = Fixture::new();
        let at = fixture.map_pages(1);
        let read = |number: i64, args: &[u64]| {
            assert!(fixture.main.call(number, args) >= 0);
            fixture.user().read_u64(at).unwrap()
        };
        let (process, thread) = (USED_OUTSIDE_BY_PROCESS.as_secs(), USED_OUTSIDE_BY_THREAD.as_secs());
        let clock = |number: i32| read(libc::SYS_clock_gettime, &[number as u64, at]);
        let rusage = |who: i32| read(libc::SYS_getrusage, &[who as u64, at]);
        let about = |used: u64| used..used + 1000;
        assert!(about(process).contains(&clock(libc::CLOCK_PROCESS_CPUTIME_ID)));
        assert!(about(thread).contains(&clock(libc::CLOCK_THREAD_CPUTIME_ID)));
        assert!(about(process).contains(&rusage(libc::RUSAGE_SELF)));
        assert!(about(thread).contains(&rusage(libc::RUSAGE_THREAD)));
        assert!(about(0).contains(&rusage(libc::RUSAGE_CHILDREN)));
        assert!(about(process).contains(&(read(libc::SYS_times, &[at]) / TICKS_A_SECOND as u64)));
        let resolution = read(libc::SYS_clock_getres, &[libc::CLOCK_PROCESS_CPUTIME_ID as u64, at]);
        assert_eq!(resolution, 0, "it is the host's");
    }

    #[test]
    fn poll_and_futex_time_out_in_virtual_time() {
        let fixture = Fixture::deterministic(3);
        let page = fixture.map_pages(1);
        fixture.user().write_u64(page + 8, 7200).unwrap();
        let day: u64 = 24 * 3600 * 1000;
        let before = fixture.process.clock().now();
        let stdin = 1 << 32;
        fixture.user().write_u64(page + 64, stdin).unwrap();
        assert_eq!(fixture.main.call(libc::SYS_poll, &[page + 64, 1, day]), 0);
        assert_eq!(fixture.main.call(libc::SYS_poll, &[0, 0, day]), 0);
        let timed_out = -i64::from(Errno::ETIMEDOUT.0);
        assert_eq!(fixture.main.call(libc::SYS_futex, &[page, 0, 0, page + 8]), timed_out);
        let passed = fixture.process.clock().now() - before;
        assert!((50 * 3600..50 * 3600 + 1).contains(&passed.as_secs()), "{passed:?}");
    }
}
