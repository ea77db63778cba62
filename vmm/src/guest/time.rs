// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Clocks and sleeping. The clocks are the host's.
//!
//! A deadline is an [`Instant`], that is CLOCK_MONOTONIC; `None` stands for one that is too far away to be reached. A
//! deadline on CLOCK_REALTIME is translated when the wait begins: setting the clock during the wait does not move it.

use super::errno::{Errno, SysResult};
use super::host::{self, ClockQuery};
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
pub(super) fn deadline_after(time: Timespec) -> Option<Instant> {
    Instant::now().checked_add(time.0)
}

/// The deadline at `time` on `clock`.
pub(super) fn deadline_at(clock: i32, time: Timespec) -> Result<Option<Instant>, Errno> {
    let (seconds, nanoseconds) = host::clock(clock, ClockQuery::Time)?;
    // A clock before its epoch is as good as one at it: every deadline is ahead.
    let now = Duration::new(u64::try_from(seconds).unwrap_or(0), nanoseconds as u32);
    Ok(deadline_after(Timespec(time.0.saturating_sub(now))))
}

/// What is left until `deadline`, as the calls report it.
pub(super) fn left(deadline: Option<Instant>) -> Timespec {
    Timespec(deadline.map_or(Duration::MAX, |deadline| deadline.saturating_duration_since(Instant::now())))
}

/// The clocks that exist without a device or another process: REALTIME to TAI.
fn check_clock(clock: i32) -> Result<(), Errno> {
    if (0..=libc::CLOCK_TAI).contains(&clock) { Ok(()) } else { Err(Errno::EINVAL) }
}

pub(super) fn clock_query(t: &Thread, clock: i32, into: u64, query: ClockQuery) -> SysResult {
    check_clock(clock)?;
    let (seconds, nanoseconds) = host::clock(clock, query)?;
    if into != 0 || query == ClockQuery::Time {
        t.process.user().write(into, &record(seconds, nanoseconds).0)?;
    }
    Ok(0)
}

pub(super) fn gettimeofday(t: &Thread, time: u64, zone: u64) -> SysResult {
    if time != 0 {
        let (seconds, nanoseconds) = host::clock(libc::CLOCK_REALTIME, ClockQuery::Time)?;
        t.process.user().write(time, &record(seconds, nanoseconds / 1000).0)?;
    }
    if zone != 0 {
        t.process.user().write_u64(zone, 0)?;
    }
    Ok(0)
}

pub(super) fn time(t: &Thread, into: u64) -> SysResult {
    let (seconds, _) = host::clock(libc::CLOCK_REALTIME_COARSE, ClockQuery::Time)?;
    if into != 0 {
        t.process.user().write_u64(into, seconds as u64)?;
    }
    Ok(seconds as u64)
}

pub(super) fn times(t: &Thread, into: u64) -> SysResult {
    let (tms, ticks) = host::times()?;
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
    sleep(t, Sleep { deadline: deadline_after(time), left_to, absolute: false })
}

pub(super) fn clock_nanosleep(t: &mut Thread, clock: i32, flags: i32, time: u64, left_to: u64) -> SysResult {
    const CAN_SLEEP: [i32; 4] =
        [libc::CLOCK_REALTIME, libc::CLOCK_MONOTONIC, libc::CLOCK_BOOTTIME, libc::CLOCK_TAI];
    check_clock(clock)?;
    if clock == libc::CLOCK_THREAD_CPUTIME_ID {
        return Err(Errno::EINVAL);
    }
    if !CAN_SLEEP.contains(&clock) {
        return Err(Errno::EOPNOTSUPP);
    }
    let time = Timespec::read(t.process.user(), time)?;
    let absolute = flags & libc::TIMER_ABSTIME != 0;
    let deadline = if absolute { deadline_at(clock, time)? } else { deadline_after(time) };
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
    let left = left(sleep.deadline);
    if left.0.is_zero() {
        return Ok(0);
    }
    if sleep.left_to != 0 {
        t.process.user().write(sleep.left_to, &left.record().0)?;
    }
    t.restart = Restart::Sleep(sleep);
    Err(Errno::RESTART_BLOCK)
}
