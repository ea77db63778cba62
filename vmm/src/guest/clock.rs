// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The time that a process lives in: the host's, or a virtual one that goes on as the scheduler of deterministic mode says.
//! Everything in `guest/` that reads a clock asks its process's, so there is one way for both.
//!
//! In virtual time every clock goes at the same pace. CLOCK_REALTIME starts at [`START`], CLOCK_TAI 37 s ahead of it, and the
//! others at 0; the process has used all of that time itself, in user mode.

use super::errno::Errno;
use super::host::{self, ClockQuery};
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

    /// Asks clock `number`, which exists; (seconds, nanoseconds).
    pub(super) fn query(&self, number: i32, query: ClockQuery) -> Result<(i64, i64), Errno> {
        let Self::Virtual(clock) = self else { return host::clock(number, query) };
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

    /// `struct tms` as its 32 bytes, and the ticks that `times` returns.
    pub(super) fn times(&self) -> Result<([u8; 32], u64), Errno> {
        let Self::Virtual(clock) = self else { return host::times() };
        let ticks = ticks(clock.elapsed());
        let mut record = Record::<32>::zeroed();
        record.put_u64(0, ticks);
        Ok((record.0, ticks))
    }

    /// `struct rusage` as its 144 bytes.
    pub(super) fn rusage(&self, who: i32) -> Result<[u8; 144], Errno> {
        let Self::Virtual(clock) = self else { return host::rusage(who) };
        let mut record = Record::<144>::zeroed();
        match who {
            libc::RUSAGE_SELF | libc::RUSAGE_THREAD => {
                let used = clock.elapsed();
                record.put_u64(0, used.as_secs()).put_u64(8, used.subsec_micros().into());
            }
            libc::RUSAGE_CHILDREN => {}
            _ => return Err(Errno::EINVAL),
        }
        Ok(record.0)
    }
}

fn ticks(time: Duration) -> u64 {
    (time.as_nanos() * TICKS_A_SECOND / 1_000_000_000) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::deterministic::PID;
    use crate::guest::testing::Fixture;

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
