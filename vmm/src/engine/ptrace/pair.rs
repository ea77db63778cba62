// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which CPUs a tracer and its tracee run on.
//!
//! Of the two one always waits for the other. On one CPU the switch between them is the scheduler's, a few microseconds; on two,
//! each stop wakes the other CPU up by an interrupt, which on a virtual machine costs tens of microseconds (measured here: 10 against
//! 70 µs for a stop and back). The scheduler prefers the idle CPU. So a pair that stops often is *tied* to one CPU, that of the
//! tracer. But CPUs must not lie idle because of that:
//!
//! * Pairs are tied after a few short runs in a row, not before: a thread that computes goes where the scheduler puts it.
//! * A tied pair is let go every few milliseconds, at a stop, so that the scheduler can put it elsewhere.
//! * A pair that stays as it is, in a run without a stop or outside of any, is let go by the service's thread, which looks every few
//!   milliseconds while there are tied pairs ([`Pairs::look`]).

use super::tracee::Tracee;
use libc::{cpu_set_t, pid_t};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A run that is shorter is a sign of more stops to come.
const SHORT: Duration = Duration::from_micros(200);
/// Short runs in a row after which a pair is tied.
const SHORT_RUNS: u32 = 3;
/// How long a pair is tied at most; how long a run may last while it is.
const TIED: Duration = Duration::from_millis(8);
/// How often who looks for long runs looks.
pub(super) const LOOK: Duration = Duration::from_millis(4);

fn bytes() -> usize {
    size_of::<cpu_set_t>()
}

/// The CPUs that this thread may use; `None` where it is one, or the host does not say.
fn own_cpus() -> Option<cpu_set_t> {
    // SAFETY: a cpu_set_t is a bit map, and zeros are the empty one.
    let mut cpus: cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the size is that of the set.
    let result = unsafe { libc::sched_getaffinity(0, bytes(), &raw mut cpus) };
    // SAFETY: the set was filled in.
    (result == 0 && unsafe { libc::CPU_COUNT(&cpus) } > 1).then_some(cpus)
}

fn is_same(one: &cpu_set_t, other: &cpu_set_t) -> bool {
    // SAFETY: compares two sets.
    unsafe { libc::CPU_EQUAL(one, other) }
}

/// Fails where the thread is gone, or the host forbids it: then it runs where it runs.
fn set_cpus(tid: pid_t, cpus: &cpu_set_t) {
    // SAFETY: the size is that of the set.
    unsafe { libc::sched_setaffinity(tid, bytes(), cpus) };
}

/// The CPU that this thread is on, alone.
fn this_cpu() -> Option<cpu_set_t> {
    // SAFETY: takes nothing.
    let cpu = usize::try_from(unsafe { libc::sched_getcpu() }).ok()?;
    // SAFETY: a cpu_set_t is a bit map, and zeros are the empty one.
    let mut cpus: cpu_set_t = unsafe { std::mem::zeroed() };
    if cpu >= bytes() * 8 {
        return None;
    }
    // SAFETY: within the set.
    unsafe { libc::CPU_SET(cpu, &mut cpus) };
    Some(cpus)
}

/// Does something with `tracee` on the CPU that this thread is on now. For the service's thread, whose tracee never runs else.
pub(super) fn with_tracee<T>(tracee: Tracee, action: impl FnOnce() -> T) -> T {
    let (Some(all), Some(here)) = (own_cpus(), this_cpu()) else { return action() };
    set_cpus(0, &here);
    set_cpus(tracee.tid, &here);
    let result = action();
    set_cpus(0, &all);
    result
}

/// What of a pair others look at.
#[derive(Debug)]
struct Shared {
    tracee: pid_t,
    tracer: pid_t,
    /// Held by who ties and who lets go, so that the two threads' CPUs are those of the last.
    tied: Mutex<bool>,
    /// When its last run began, or ended, in nanoseconds of [`Pairs::began`].
    since: AtomicU64,
}

impl Shared {
    fn let_go(&self, all: &cpu_set_t) {
        let mut tied = self.tied.lock().unwrap_or_else(PoisonError::into_inner);
        if std::mem::replace(&mut *tied, false) {
            set_cpus(self.tracer, all);
            set_cpus(self.tracee, all);
        }
    }
}

/// The pairs of one guest.
#[derive(Debug)]
pub(super) struct Pairs {
    began: Instant,
    /// Where threads may run; `None`: on one CPU anyway, and nothing is done here.
    all: Option<cpu_set_t>,
    pairs: Mutex<Vec<Arc<Shared>>>,
    /// Whether anything may be tied that nobody has let go yet.
    tied: AtomicBool,
}

impl Default for Pairs {
    fn default() -> Self {
        Self { began: Instant::now(), all: own_cpus(), pairs: Mutex::default(), tied: AtomicBool::new(false) }
    }
}

impl Pairs {
    fn now(&self) -> u64 {
        self.began.elapsed().as_nanos() as u64
    }

    fn pairs(&self) -> std::sync::MutexGuard<'_, Vec<Arc<Shared>>> {
        self.pairs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pair of this thread and `tracee`.
    pub(super) fn join(self: &Arc<Self>, tracee: Tracee) -> Pair {
        // SAFETY: takes nothing, cannot fail.
        let tracer = unsafe { libc::gettid() };
        let shared = Arc::new(Shared {
            tracee: tracee.tid,
            tracer,
            tied: Mutex::new(false),
            since: AtomicU64::new(0),
        });
        if let Some(all) = &self.all {
            // Both begin where who made them was tied.
            set_cpus(tracer, all);
            set_cpus(tracee.tid, all);
        }
        self.pairs().push(Arc::clone(&shared));
        Pair { pairs: Arc::clone(self), shared, short_runs: 0, tied_since: None }
    }

    /// Lets those go that have run, or not run, for too long. Whether there may be tied pairs left to look at.
    pub(super) fn look(&self) -> bool {
        let Some(all) = &self.all else { return false };
        if !self.tied.swap(false, Ordering::AcqRel) {
            return false;
        }
        let now = self.now();
        let mut left = false;
        for pair in self.pairs().iter() {
            let since = pair.since.load(Ordering::Acquire);
            if Duration::from_nanos(now.saturating_sub(since)) > TIED {
                pair.let_go(all);
            }
            left |= *pair.tied.lock().unwrap_or_else(PoisonError::into_inner);
        }
        if left {
            self.tied.store(true, Ordering::Release);
        }
        left
    }
}

/// A tracer's and its tracee's place. For the tracer.
#[derive(Debug)]
pub(super) struct Pair {
    pairs: Arc<Pairs>,
    shared: Arc<Shared>,
    short_runs: u32,
    tied_since: Option<u64>,
}

impl Pair {
    /// Around a run of the tracee. `wake` is called when somebody must [`look`](Pairs::look) from now on.
    pub(super) fn around<T>(&mut self, run: impl FnOnce() -> T, wake: impl FnOnce()) -> T {
        let pairs = Arc::clone(&self.pairs);
        let Some(all) = &pairs.all else { return run() };
        let began = pairs.now();
        self.shared.since.store(began, Ordering::Release);
        match self.tied_since {
            None if self.short_runs >= SHORT_RUNS => {
                self.tie();
                self.tied_since = Some(began);
                if !pairs.tied.swap(true, Ordering::AcqRel) {
                    wake();
                }
            }
            Some(since) if Duration::from_nanos(began - since) > TIED => {
                self.shared.let_go(all);
                self.tied_since = None;
                self.short_runs = 0;
            }
            _ => {}
        }
        let result = run();
        let ended = pairs.now();
        self.shared.since.store(ended, Ordering::Release);
        let took = Duration::from_nanos(ended - began);
        self.short_runs = if took < SHORT { self.short_runs.saturating_add(1) } else { 0 };
        result
    }

    /// The tracee is gone, and its number may be another's.
    pub(super) fn forget_tracee(&self) {
        let mut tied = self.shared.tied.lock().unwrap_or_else(PoisonError::into_inner);
        if let (true, Some(all)) = (std::mem::replace(&mut *tied, false), &self.pairs.all) {
            set_cpus(self.shared.tracer, all);
        }
    }

    fn tie(&self) {
        let mut tied = self.shared.tied.lock().unwrap_or_else(PoisonError::into_inner);
        // Where an operator has placed this thread since, it stays.
        let placed = own_cpus().zip(self.pairs.all).is_none_or(|(now, all)| !is_same(&now, &all));
        if let (false, Some(here)) = (placed, this_cpu()) {
            set_cpus(self.shared.tracer, &here);
            set_cpus(self.shared.tracee, &here);
            *tied = true;
        }
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        if let Some(all) = &self.pairs.all {
            self.shared.let_go(all);
        }
        self.pairs.pairs().retain(|pair| !Arc::ptr_eq(pair, &self.shared));
    }
}
