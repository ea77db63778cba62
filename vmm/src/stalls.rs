// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Stall accounting: the time that vCPUs spend outside the guest because of page faults, by what the fault was about.
//!
//! Each vCPU thread owns its [`Stalls`] and counts into them without a lock: two readings of the clock a fault, tens of
//! nanoseconds beside the tens of microseconds that the exit costs. When the thread ends they are added to the machine's, so
//! a guest that starts threads all day needs memory for those that run, and for the [`MAX_VCPUS`] that waited longest, which
//! are told one by one. What is read from the machine ([`MachineStalls`]) therefore lacks what running threads have not
//! handed in yet; the report at the end lacks nothing.
//!
//! Counted is the time in umbra: from the exit's arrival in the handler until the fault is resolved or refused. What the way
//! out of the guest and back costs comes on top; `umbra bench fault` measures that.
//!
//! Times go into HDR histograms (two significant digits, so a quantile is at most 1 % off), made when the first
//! stall of a cause is counted: a few KiB each. Sums and maxima are exact.

use hdrhistogram::Histogram;
use serde::Serialize;
use shadow_mmu::shadow::{FaultCause, FaultOutcome};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

/// Threads that are told one by one.
pub const MAX_VCPUS: usize = 16;

/// What a vCPU waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum StallCause {
    /// A page that was not there: zeros, fresh memory, a page of a file.
    FirstTouch,
    /// The address space had the page; the shadow map did not.
    Mapped,
    /// A write to a page that had to be copied.
    CopyOnWrite,
    /// A write to a page that was protected to see writes.
    WriteProtect,
    /// An access to a page that was protected to see accesses.
    AccessTracked,
    /// Nothing: the leaf was good by the time the fault was looked at.
    Spurious,
    /// A fault of any of these kinds that an invalidation by somebody else made begin again.
    Retry,
    /// A fault that ended in a signal, because the access is not allowed or no memory is left.
    Refused,
    /// A full dirty ring, until the collector had emptied it.
    RingFull,
    /// The host, to reach a page of adopted memory, or to have changes of it settled.
    HostFault,
}

impl StallCause {
    /// Why a fault with this outcome stalled its vCPU.
    pub fn of(outcome: &FaultOutcome) -> Self {
        // The pair around its own copy makes a copy-on-write begin again once.
        let own = u32::from(outcome.cause == FaultCause::CopyOnWrite);
        if outcome.retries > own {
            return Self::Retry;
        }
        match outcome.cause {
            FaultCause::FirstTouch => Self::FirstTouch,
            FaultCause::Mapped => Self::Mapped,
            FaultCause::CopyOnWrite => Self::CopyOnWrite,
            FaultCause::WriteProtect => Self::WriteProtect,
            FaultCause::AccessTracked => Self::AccessTracked,
            FaultCause::Spurious => Self::Spurious,
        }
    }

    fn label(self) -> &'static str {
        match self {
            Self::FirstTouch => "first touch",
            Self::Mapped => "mapped",
            Self::CopyOnWrite => "copy-on-write",
            Self::WriteProtect => "write-protect",
            Self::AccessTracked => "access-tracked",
            Self::Spurious => "spurious",
            Self::Retry => "retry",
            Self::Refused => "refused",
            Self::RingFull => "ring full",
            Self::HostFault => "host fault",
        }
    }
}

/// Durations, counted so that quantiles can be told.
#[derive(Debug)]
pub struct Times {
    nanos: Histogram<u64>,
    total: Duration,
    max: Duration,
}

/// What is told of [`Times`]. Microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct TimesSummary {
    /// How many there were.
    pub count: u64,
    /// Their sum.
    pub total_us: f64,
    /// Half of them took no longer, within 1 %.
    pub median_us: f64,
    /// 99 in 100 took no longer, within 1 %.
    pub p99_us: f64,
    /// The longest.
    pub max_us: f64,
}

impl Default for Times {
    fn default() -> Self {
        // A digit count that hdrhistogram takes (0 to 5) cannot fail.
        #[allow(clippy::unwrap_used, reason = "the argument is a constant that is allowed")]
        let nanos = Histogram::new(2).unwrap();
        Self { nanos, total: Duration::ZERO, max: Duration::ZERO }
    }
}

impl Times {
    /// Counts one.
    pub fn record(&mut self, took: Duration) {
        // An hour is the longest that is told apart: the histogram's memory is bounded.
        const LONGEST_NS: u64 = 3_600_000_000_000;
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX).min(LONGEST_NS);
        // Resizes itself, so it takes every value.
        let recorded = self.nanos.record(nanos);
        debug_assert!(recorded.is_ok(), "{recorded:?}");
        self.total += took;
        self.max = self.max.max(took);
    }

    /// Adds those of `other`.
    pub fn add(&mut self, other: &Self) {
        let added = self.nanos.add(&other.nanos);
        debug_assert!(added.is_ok(), "{added:?}");
        self.total += other.total;
        self.max = self.max.max(other.max);
    }

    /// How many were counted.
    pub fn count(&self) -> u64 {
        self.nanos.len()
    }

    /// What there is to tell; `None` where nothing was counted.
    pub fn summary(&self) -> Option<TimesSummary> {
        let us = |duration: Duration| duration.as_nanos() as f64 / 1e3;
        // A quantile is told as the upper end of its bucket, which may lie above the longest.
        let quantile = |q| us(Duration::from_nanos(self.nanos.value_at_quantile(q)).min(self.max));
        (self.count() > 0).then(|| TimesSummary {
            count: self.count(),
            total_us: us(self.total),
            median_us: quantile(0.5),
            p99_us: quantile(0.99),
            max_us: us(self.max),
        })
    }
}

/// Stalls by cause.
#[derive(Debug, Default)]
pub struct Stalls {
    by_cause: BTreeMap<StallCause, Times>,
}

impl Stalls {
    /// Counts one.
    pub fn record(&mut self, cause: StallCause, took: Duration) {
        self.by_cause.entry(cause).or_default().record(took);
    }

    /// Adds those of `other`.
    pub fn add(&mut self, other: &Self) {
        for (&cause, times) in &other.by_cause {
            self.by_cause.entry(cause).or_default().add(times);
        }
    }

    /// How many there were, and their sum.
    fn sum(&self) -> (u64, Duration) {
        let times = self.by_cause.values();
        times.fold((0, Duration::ZERO), |(count, total), times| (count + times.count(), total + times.total))
    }
}

/// Stalls of all threads that have ended.
#[derive(Debug, Default)]
pub struct MachineStalls {
    all: Stalls,
    /// The longest sums first; at most [`MAX_VCPUS`].
    longest: Vec<VcpuStalls>,
}

impl MachineStalls {
    /// Adds those of guest thread `tid`, which has ended.
    pub fn add(&mut self, tid: i32, own: &Stalls) {
        self.all.add(own);
        let (count, total) = own.sum();
        if count == 0 {
            return;
        }
        let total_us = total.as_nanos() as f64 / 1e3;
        let behind = self.longest.partition_point(|vcpu| vcpu.total_us >= total_us);
        self.longest.insert(behind, VcpuStalls { tid, count, total_us });
        self.longest.truncate(MAX_VCPUS);
    }

    /// What there is to tell of each cause that occurred, and of threads.
    pub fn summary(&self) -> StallSummary {
        let of = |(&cause, times): (&StallCause, &Times)| Some((cause, times.summary()?));
        let by_cause = self.all.by_cause.iter().filter_map(of).collect();
        StallSummary { by_cause, vcpus: self.longest.clone() }
    }
}

/// What one thread waited for in all.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct VcpuStalls {
    /// The guest's number of it. One that was used again is told twice.
    pub tid: i32,
    /// How often it stalled.
    pub count: u64,
    /// The sum, microseconds.
    pub total_us: f64,
}

/// What is told of [`MachineStalls`]: in JSON `stalls`, an object by cause, and `stalled_threads`; a table in text.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct StallSummary {
    /// Of all threads.
    #[serde(rename = "stalls")]
    pub by_cause: BTreeMap<StallCause, TimesSummary>,
    /// Those that waited longest, the longest first; at most [`MAX_VCPUS`].
    #[serde(rename = "stalled_threads")]
    pub vcpus: Vec<VcpuStalls>,
}

impl StallSummary {
    /// For people: a line a cause and a thread, each with a newline before it; nothing where nothing stalled.
    pub fn text(&self) -> String {
        let mut out = String::new();
        if self.by_cause.is_empty() {
            return out;
        }
        // Writing to a string cannot fail.
        let _ =
            write!(out, "\nstalls    cause              count    total ms  median us     p99 us     max us");
        for (cause, times) in &self.by_cause {
            let _ = write!(
                out,
                "\n          {:<14} {:>9} {:>11.3} {:>10.1} {:>10.1} {:>10.1}",
                cause.label(),
                times.count,
                times.total_us / 1e3,
                times.median_us,
                times.p99_us,
                times.max_us
            );
        }
        for vcpu in &self.vcpus {
            let thread = format!("thread {}", vcpu.tid);
            let _ = write!(out, "\n          {thread:<14} {:>9} {:>11.3}", vcpu.count, vcpu.total_us / 1e3);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed test may panic")]
    use super::*;

    const US: Duration = Duration::from_micros(1);

    #[test]
    fn quantiles_are_within_one_percent_and_sums_exact() {
        let mut times = Times::default();
        (1..=1000).for_each(|n| times.record(US * n));
        let told = times.summary().unwrap();
        assert_eq!((told.count, told.total_us, told.max_us), (1000, 500_500.0, 1000.0));
        assert!((495.0..=505.0).contains(&told.median_us), "{told:?}");
        assert!((980.0..=1000.0).contains(&told.p99_us), "{told:?}");
    }

    #[test]
    fn what_threads_hand_in_adds_up() {
        let mut machine = MachineStalls::default();
        for thread in 1..=3 {
            let mut own = Stalls::default();
            own.record(StallCause::FirstTouch, US * thread);
            own.record(StallCause::Refused, US * 10 * thread);
            machine.add(thread as i32, &own);
        }
        let StallSummary { by_cause: told, vcpus } = machine.summary();
        assert_eq!(told.keys().copied().collect::<Vec<_>>(), [StallCause::FirstTouch, StallCause::Refused]);
        let first = told[&StallCause::FirstTouch];
        assert_eq!((first.count, first.total_us, first.max_us), (3, 6.0, 3.0));
        assert_eq!(told[&StallCause::Refused].max_us, 30.0);
        let rows: Vec<_> = vcpus.iter().map(|vcpu| (vcpu.tid, vcpu.count, vcpu.total_us)).collect();
        assert_eq!(rows, [(3, 2, 33.0), (2, 2, 22.0), (1, 2, 11.0)]);
    }

    #[test]
    fn a_guest_that_starts_threads_all_day_keeps_the_longest() {
        let mut machine = MachineStalls::default();
        for tid in 0..1000 {
            let mut own = Stalls::default();
            // Neither ascending nor descending.
            own.record(StallCause::Mapped, US * (tid * 7 % 1000));
            machine.add(tid as i32, &own);
        }
        machine.add(1000, &Stalls::default());
        let told = machine.summary();
        let sums: Vec<_> = told.vcpus.iter().map(|vcpu| vcpu.total_us).collect();
        assert_eq!(sums, (0..MAX_VCPUS).map(|n| 999.0 - n as f64).collect::<Vec<_>>());
        assert_eq!(told.by_cause[&StallCause::Mapped].count, 1000);
        assert!(told.text().lines().count() == 2 + 1 + MAX_VCPUS, "{}", told.text());
    }

    #[test]
    fn a_fault_that_others_made_begin_again_is_a_retry_whatever_it_was_about() {
        let of = |cause, retries| StallCause::of(&FaultOutcome { cause, retries });
        assert_eq!(of(FaultCause::FirstTouch, 0), StallCause::FirstTouch);
        assert_eq!(of(FaultCause::FirstTouch, 1), StallCause::Retry);
        assert_eq!(of(FaultCause::CopyOnWrite, 1), StallCause::CopyOnWrite, "its own pair");
        assert_eq!(of(FaultCause::CopyOnWrite, 2), StallCause::Retry);
    }

    #[test]
    fn the_longest_stall_that_can_be_is_counted() {
        let mut times = Times::default();
        times.record(Duration::MAX / 2);
        times.record(Duration::ZERO);
        assert_eq!(times.count(), 2);
    }

    #[test]
    fn json_has_an_object_a_cause() {
        let (mut stalls, mut own) = (MachineStalls::default(), Stalls::default());
        own.record(StallCause::CopyOnWrite, US);
        stalls.add(7, &own);
        let json = serde_json::to_value(stalls.summary()).unwrap();
        assert_eq!(json["stalls"]["copy_on_write"]["count"], 1);
        assert_eq!(json["stalls"]["copy_on_write"]["max_us"], 1.0);
        assert!(json["stalls"]["first_touch"].is_null());
        assert_eq!(json["stalled_threads"], serde_json::json!([{"tid": 7, "count": 1, "total_us": 1.0}]));
    }
}
