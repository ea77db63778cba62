// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Clocks and sleeping. The clocks are those of the process ([`Clock`](super::clock::Clock)).
//!
//! A deadline is an [`Instant`], that is CLOCK_MONOTONIC; `None` stands for one that is too far away to be reached. A
//! deadline on CLOCK_REALTIME is translated when the wait begins: setting the clock during the wait does not move it.

use super::errno::{Errno, SysResult};
use super::host::ClockQuery;
use super::restart::Restart;
use super::thread::Thread;
use super::uaccess::{Record, UserMemory};
use super::waker::Parked;
use std::time::{Duration, Instant};

/// `struct timespec`, checked: seconds from 0 on, nanoseconds below a billion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Timespec(pub(super) Duration);

impl Timespec {
    /// Reads the guest's.
    ///
    /// # Errors
    /// `EFAULT`; `EINVAL` for what is no time.
    pub(super) fn read(user: &UserMemory, addr: u64) -> Result<Self, Errno> {
        let record: Record<16> = user.record(addr)?;
        let (seconds, nanoseconds) = (record.i64(0), record.i64(8));
        match (u64::try_from(seconds), u32::try_from(nanoseconds)) {
            (Ok(seconds), Ok(nanoseconds)) if nanoseconds < 1_000_000_000 => {
                Ok(Self(Duration::new(seconds, nanoseconds)))
            }
            _ => Err(Errno::EINVAL),
        }
    }

    pub(super) fn record(self) -> Record<16> {
        record(self.0.as_secs() as i64, i64::from(self.0.subsec_nanos()))
    }
}

fn record(first: i64, second: i64) -> Record<16> {
    let mut record = Record::zeroed();
    record.put_i64(0, first).put_i64(8, second);
    record
}

/// The deadline `time` from now.
pub(super) fn deadline_after(t: &Thread, time: Timespec) -> Option<Instant> {
    t.process.clock().now().checked_add(time.0)
}

/// The deadline at `time` on `clock`.
pub(super) fn deadline_at(t: &Thread, clock: i32, time: Timespec) -> Result<Option<Instant>, Errno> {
    let (seconds, nanoseconds) = t.process.clock().query(t, clock, ClockQuery::Time)?;
    // A clock before its epoch is as good as one at it: every deadline is ahead.
    let now = Duration::new(u64::try_from(seconds).unwrap_or(0), nanoseconds as u32);
    Ok(deadline_after(t, Timespec(time.0.saturating_sub(now))))
}

/// What is left until `deadline`, as the calls report it.
pub(super) fn left(t: &Thread, deadline: Option<Instant>) -> Timespec {
    let now = t.process.clock().now();
    Timespec(deadline.map_or(Duration::MAX, |deadline| deadline.saturating_duration_since(now)))
}

/// The clocks that exist without a device or another process: REALTIME to TAI.
fn check_clock(clock: i32) -> Result<(), Errno> {
    if (0..=libc::CLOCK_TAI).contains(&clock) { Ok(()) } else { Err(Errno::EINVAL) }
}

pub(super) fn clock_query(t: &Thread, clock: i32, into: u64, query: ClockQuery) -> SysResult {
    check_clock(clock)?;
    let (seconds, nanoseconds) = t.process.clock().query(t, clock, query)?;
    if into != 0 || query == ClockQuery::Time {
        t.process.user().write(into, &record(seconds, nanoseconds).0)?;
    }
    Ok(0)
}

pub(super) fn gettimeofday(t: &Thread, time: u64, zone: u64) -> SysResult {
    if time != 0 {
        let (seconds, nanoseconds) = t.process.clock().query(t, libc::CLOCK_REALTIME, ClockQuery::Time)?;
        t.process.user().write(time, &record(seconds, nanoseconds / 1000).0)?;
    }
    if zone != 0 {
        t.process.user().write_u64(zone, 0)?;
    }
    Ok(0)
}

pub(super) fn time(t: &Thread, into: u64) -> SysResult {
    let (seconds, _) = t.process.clock().query(t, libc::CLOCK_REALTIME_COARSE, ClockQuery::Time)?;
    if into != 0 {
        t.process.user().write_u64(into, seconds as u64)?;
    }
    Ok(seconds as u64)
}

pub(super) fn times(t: &Thread, into: u64) -> SysResult {
    let (tms, ticks) = t.process.clock().times(t)?;
    if into != 0 {
        t.process.user().write(into, &tms)?;
    }
    Ok(ticks)
}

/// A sleep: everything that `restart_syscall` needs to go on with it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sleep {
    deadline: Option<Instant>,
    /// Where what is left is to be stored; 0 for nowhere.
    left_to: u64,
    absolute: bool,
}

pub(super) fn nanosleep(t: &mut Thread, time: u64, left_to: u64) -> SysResult {
    let time = Timespec::read(t.process.user(), time)?;
    sleep(t, Sleep { deadline: deadline_after(t, time), left_to, absolute: false })
}

pub(super) fn clock_nanosleep(t: &mut Thread, clock: i32, flags: i32, time: u64, left_to: u64) -> SysResult {
    const CAN_SLEEP: [i32; 4] =
        [libc::CLOCK_REALTIME, libc::CLOCK_MONOTONIC, libc::CLOCK_BOOTTIME, libc::CLOCK_TAI];
    check_clock(clock)?;
    if !CAN_SLEEP.contains(&clock) {
        return Err(Errno::EOPNOTSUPP);
    }
    let time = Timespec::read(t.process.user(), time)?;
    let absolute = flags & libc::TIMER_ABSTIME != 0;
    let deadline = if absolute { deadline_at(t, clock, time)? } else { deadline_after(t, time) };
    sleep(t, Sleep { deadline, left_to, absolute })
}

/// Sleeps, or goes on with a sleep.
pub(super) fn sleep(t: &mut Thread, sleep: Sleep) -> SysResult {
    if t.sleep(sleep.deadline, || false) == Parked::TimedOut {
        return Ok(0);
    }
    if sleep.absolute {
        return Err(Errno::RESTART_NO_HANDLER);
    }
    let left = left(t, sleep.deadline);
    if left.0.is_zero() {
        return Ok(0);
    }
    if sleep.left_to != 0 {
        t.process.user().write(sleep.left_to, &left.record().0)?;
    }
    t.restart = Restart::Sleep(sleep);
    Err(Errno::RESTART_BLOCK)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::host;
    use crate::guest::testing::Fixture;

    fn errno(errno: Errno) -> i64 {
        -i64::from(errno.0)
    }
    fn put(fixture: &Fixture, seconds: i64, nanoseconds: i64) -> u64 {
        let at = fixture.map_pages(1);
        fixture.user().write(at, &record(seconds, nanoseconds).0).unwrap();
        at
    }

    #[test]
    fn sleeps_last_as_long_as_they_say() {
        let fixture = Fixture::new();
        let start = Instant::now();
        assert_eq!(fixture.main.call(libc::SYS_nanosleep, &[put(&fixture, 0, 30_000_000), 0]), 0);
        assert!(start.elapsed() >= Duration::from_millis(30));
        let past = put(&fixture, 1, 0);
        let absolute = libc::TIMER_ABSTIME as u64;
        assert_eq!(fixture.main.call(libc::SYS_clock_nanosleep, &[0, absolute, past, 0]), 0);
        assert!(start.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn what_is_no_time_and_no_clock_is_refused() {
        let fixture = Fixture::new();
        for (seconds, nanoseconds) in [(-1, 0), (0, -1), (0, 1_000_000_000), (i64::MIN, i64::MAX)] {
            let at = put(&fixture, seconds, nanoseconds);
            assert_eq!(fixture.main.call(libc::SYS_nanosleep, &[at, 0]), errno(Errno::EINVAL));
        }
        let at = put(&fixture, 0, 0);
        assert_eq!(fixture.main.call(libc::SYS_clock_nanosleep, &[3, 0, at, 0]), errno(Errno::EOPNOTSUPP));
        for clock in [-1, 12, i32::MIN] {
            let call = fixture.main.call(libc::SYS_clock_nanosleep, &[clock as u64, 0, at, 0]);
            assert_eq!(call, errno(Errno::EINVAL), "{clock}");
        }
        assert_eq!(fixture.main.call(libc::SYS_clock_gettime, &[12, at]), errno(Errno::EINVAL));
        assert_eq!(fixture.main.call(libc::SYS_clock_gettime, &[0, 0]), errno(Errno::EFAULT));
        assert_eq!(fixture.main.call(libc::SYS_clock_getres, &[0, 0]), 0);
    }

    #[test]
    fn a_sleep_for_ever_is_interrupted_and_tells_what_is_left() {
        let fixture = Fixture::new();
        fixture.handle(libc::SIGUSR1, libc::SA_RESTART);
        let stack = fixture.map_pages(4);
        let time = put(&fixture, i64::MAX, 0);
        let hour = put(&fixture, 3600, 0);
        for (time, at_least) in [(time, u64::MAX / 2 - 10), (hour, 3500)] {
            let left = fixture.map_pages(1);
            let mask = fixture.map_pages(1);
            fixture.main.begin(move |regs| {
                regs.rsp = stack + 4 * 4096;
                regs.rax = libc::SYS_nanosleep as u64;
                [regs.rdi, regs.rsi] = [time, left];
                crate::engine::Exit::Syscall
            });
            std::thread::sleep(Duration::from_millis(10));
            let info = crate::guest::signal::SigInfo::kernel(crate::guest::signal::Signal::new(10).unwrap());
            let signal = crate::guest::signal::Signal::new(libc::SIGUSR1).unwrap();
            fixture.process.group().send(None, signal, info).unwrap();
            let handler = fixture.main.finish().unwrap();
            assert_eq!(handler.rip, 0x40_1000);
            let saved_rax = handler.rdx + 40 + 8 * libc::REG_RAX as u64;
            assert_eq!(fixture.user().read_u64(saved_rax), Ok(Errno::EINTR.as_rax()), "SA_RESTART or not");
            assert!(fixture.user().read_u64(left).unwrap() >= at_least);
            fixture.main.call(libc::SYS_rt_sigprocmask, &[libc::SIG_SETMASK as u64, mask, 0, 8]);
        }
    }

    #[test]
    fn clocks_are_the_hosts() {
        let fixture = Fixture::new();
        let at = fixture.map_pages(1);
        let (before, _) = host::clock(libc::CLOCK_REALTIME, ClockQuery::Time).unwrap();
        for call in [
            fixture.main.call(libc::SYS_clock_gettime, &[0, at]),
            fixture.main.call(libc::SYS_gettimeofday, &[at, 0]),
        ] {
            assert_eq!(call, 0);
            assert!((before..before + 100).contains(&(fixture.user().read_u64(at).unwrap() as i64)));
        }
        // `time` is the coarse clock, which lags by up to a tick.
        assert!(fixture.main.call(libc::SYS_time, &[0]) >= before - 1);
        assert!(fixture.main.call(libc::SYS_times, &[at]) > 0);
    }
}
