// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The CPU time that the guest's process and its threads use: what the clocks of umbra's own threads do not show.
//!
//! That of the process has a clock (clock_getcpuclockid(3)), which is exact and keeps what threads used that have ended. Those of
//! threads can be read through a clock only within their process; from outside there is /proc, which is exact while the thread is
//! stopped and up to a tick behind while it runs. So the threads' never come to more than the process's that is read after them.
//!
//! A process or a thread that is gone has used nothing. For a moment its number may be another's: the guest has ended by then, and
//! nobody of it reads a clock any more.

use super::proc;
use super::tracee::Tracee;
use libc::{clockid_t, pid_t};
use std::time::Duration;

/// Of a whole process.
pub(super) fn of_process(pid: pid_t) -> Duration {
    /// CPUCLOCK_SCHED: user and kernel mode, by the scheduler's count.
    const SCHED: clockid_t = 2;
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes one timespec.
    let result = unsafe { libc::clock_gettime(!pid << 3 | SCHED, &raw mut time) };
    if result == 0 { Duration::new(time.tv_sec as u64, time.tv_nsec as u32) } else { Duration::ZERO }
}

/// Of one thread.
pub(super) fn of_thread(tracee: Tracee) -> Duration {
    let exact = || from_schedstat(&proc::of_thread(tracee, "schedstat")?);
    let in_ticks = || from_stat(&proc::of_thread(tracee, "stat")?);
    exact().or_else(in_ticks).unwrap_or_default()
}

/// From `schedstat`: the first number is nanoseconds. A kernel that does not count has no such file, or zeros in it.
fn from_schedstat(text: &str) -> Option<Duration> {
    let nanos = text.split_whitespace().next()?.parse().ok()?;
    (nanos != 0).then(|| Duration::from_nanos(nanos))
}

/// From `stat`: utime and stime, in ticks. They are fields 14 and 15.
fn from_stat(text: &str) -> Option<Duration> {
    /// `_SC_CLK_TCK`, on every Linux on x86.
    const TICK: Duration = Duration::from_millis(10);
    let mut fields = proc::behind_the_name(text).skip(14 - 3);
    let mut ticks = || fields.next()?.parse::<u32>().ok();
    Some(TICK * ticks()?.checked_add(ticks()?)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::ptrace::testing::Spinning;
    use crate::engine::ptrace::tracee::{Resume, Stop};
    use std::time::Instant;

    /// Long enough for anything that is going to happen.
    const PATIENCE: Duration = Duration::from_secs(20);

    #[test]
    fn what_a_process_and_its_thread_use_is_seen_from_outside() {
        let Some(child) = Spinning::new() else { return };
        let thread = *child;
        let began = (of_process(thread.pid), of_thread(thread));
        let until = Instant::now() + PATIENCE;
        child.resume(Resume::Engine).unwrap();
        let mut now = began;
        while Instant::now() < until && (now.0 == began.0 || now.1 == began.1) {
            let before = now;
            now.1 = of_thread(thread);
            now.0 = of_process(thread.pid);
            assert!(now.0 >= before.0 && now.1 >= before.1, "{now:?} after {before:?}");
            assert!(now.0 >= now.1, "{now:?}: of a process, and of its one thread");
        }
        assert!(now.0 > began.0 && now.1 > began.1, "{now:?} after {began:?}");
        child.kill();
        assert!(matches!(child.wait().unwrap(), Stop::Gone(_)));
        assert_eq!((of_process(thread.pid), of_thread(thread)), (Duration::ZERO, Duration::ZERO));
    }

    #[test]
    fn what_proc_says() {
        assert_eq!(from_schedstat("1500000000 7 3\n"), Some(Duration::from_millis(1500)));
        assert_eq!(from_schedstat("0 0 0\n"), None);
        let stat = "7 (a) b (c) R 1 2 3 4 5 6 7 8 9 10 150 25 0 0 20 0 1\n";
        assert_eq!(from_stat(stat), Some(Duration::from_millis(1750)));
        assert_eq!(from_stat("7 (a) R 1"), None);
    }
}
