// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Page sharing among guests: the thread that scans (`ksmd`), its pace, and what is told of it: [`report`] and
//! [`guest`] in numbers, [`history`] and [`svg`] as a picture.
//!
//! One thread a [`Ksm`], with the niceness that the kernel gives its own. What sharing costs is this thread's CPU time, in which the
//! system calls are that flush what it merges; what it costs the guests besides are the faults at pages that it took from them.

pub mod guest;
pub mod history;
pub mod report;
pub mod svg;

use anyhow::{Context, Result};
use shadow_mmu::addr::PAGE_SIZE;
use shadow_mmu::ksm::advisor::{AdvisorSettings, ScanTimeAdvisor};
use shadow_mmu::ksm::{Ksm, PassEnd};
use std::os::unix::thread::JoinHandleExt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A pass takes at least this long, so that there are 20 a second at most, whatever the pace: a page that was not written for a millisecond is not quiet, and to take D from pages that are
/// written all the time costs the guest a fault each.
const SHORTEST_PASS: Duration = Duration::from_millis(50);
/// As the kernel's ksmd.
const NICENESS: libc::c_int = 5;

/// How fast a [`Ksmd`] scans.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pace {
    /// So many pages, then a pause (`pages_to_scan`, `sleep_millisecs`). Without a pause it takes all of a CPU while a pass lasts;
    /// of passes there are 20 a second at most.
    Fixed {
        /// Pages at a time.
        pages: u64,
        /// The pause.
        interval: Duration,
    },
    /// As many pages as the advisor says, then a pause.
    Advisor {
        /// What it aims at.
        settings: AdvisorSettings,
        /// The pause.
        interval: Duration,
    },
}

impl Default for Pace {
    /// 1,000 pages every 20 ms: ten times the kernel's default, at which few merges are ever seen.
    fn default() -> Self {
        Self::Fixed { pages: 1000, interval: Self::PAUSE }
    }
}

impl Pace {
    /// The pause where nobody says otherwise: the kernel's `sleep_millisecs`.
    pub const PAUSE: Duration = Duration::from_millis(20);

    /// The pause.
    pub fn interval(self) -> Duration {
        match self {
            Self::Fixed { interval, .. } | Self::Advisor { interval, .. } => interval,
        }
    }
}

/// Pages in MiB.
pub(crate) fn mib(pages: u64) -> f64 {
    pages as f64 * PAGE_SIZE as f64 / f64::from(1 << 20)
}

/// CPU time of the calling thread.
fn own_cpu_time() -> Duration {
    cpu_time_of(libc::CLOCK_THREAD_CPUTIME_ID)
}

fn cpu_time_of(clock: libc::clockid_t) -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes one timespec, which is ours.
    let result = unsafe { libc::clock_gettime(clock, &raw mut time) };
    if result == 0 { Duration::new(time.tv_sec as u64, time.tv_nsec as u32) } else { Duration::ZERO }
}

#[derive(Debug, Default)]
struct State {
    stop: bool,
    /// What the thread had used when it ended.
    used: Option<Duration>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    wake: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits, and says whether to go on.
    fn pause(&self, interval: Duration) -> bool {
        let state = self.lock();
        if state.stop || interval.is_zero() {
            return !state.stop;
        }
        let waited = self.wake.wait_timeout_while(state, interval, |state| !state.stop);
        !waited.unwrap_or_else(PoisonError::into_inner).0.stop
    }
}

/// The thread that scans. Dropped, it stops; what is merged stays so.
#[derive(Debug)]
pub struct Ksmd {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Ksmd {
    /// Begins to scan.
    ///
    /// # Errors
    /// The host has no thread left.
    pub fn start(ksm: Arc<Ksm>, pace: Pace) -> Result<Self> {
        let shared = Arc::<Shared>::default();
        let theirs = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("ksmd".into())
            .spawn(move || {
                // SAFETY: changes the niceness of this thread only (0 names it), and touches no memory.
                let _ = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICENESS) };
                scan(&ksm, pace, &theirs);
                theirs.lock().used = Some(own_cpu_time());
            })
            .context("cannot start the thread that shares pages")?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// CPU time that scanning has taken so far, in user and kernel mode.
    pub fn cpu_time(&self) -> Duration {
        // Held, so that the thread cannot end and its clock go in between.
        let state = self.shared.lock();
        match (&state.used, &self.thread) {
            (Some(used), _) => *used,
            (None, Some(thread)) => {
                let mut clock: libc::clockid_t = 0;
                // SAFETY: the thread has not been joined, so its handle is good; the C library writes one clock id.
                let result = unsafe { libc::pthread_getcpuclockid(thread.as_pthread_t(), &raw mut clock) };
                if result == 0 { cpu_time_of(clock) } else { Duration::ZERO }
            }
            (None, None) => Duration::ZERO,
        }
    }

    /// Stops, and returns the CPU time that scanning took.
    pub fn stop(mut self) -> Duration {
        self.join();
        self.cpu_time()
    }

    fn join(&mut self) {
        self.shared.lock().stop = true;
        self.shared.wake.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the thread that shares pages panicked: this is a bug of umbra's");
        }
    }
}

impl Drop for Ksmd {
    fn drop(&mut self) {
        self.join();
    }
}

/// Scanning without a thread of its own: whoever has the time calls it, at the pace's interval, and says what time it is. Only
/// for a fixed pace: the advisor goes by what a pass costs, and looks at as few pages as it may here.
#[derive(Debug)]
pub struct Turns {
    ksm: Arc<Ksm>,
    pages: u64,
    /// Before this there is no new pass.
    rests_until: Option<Instant>,
    began: Option<Instant>,
}

impl Turns {
    /// Nothing scanned yet.
    pub fn new(ksm: Arc<Ksm>, pace: Pace) -> Self {
        let pages = match pace {
            Pace::Fixed { pages, .. } => pages,
            Pace::Advisor { settings, .. } => settings.min_pages_to_scan,
        };
        Self { ksm, pages, rests_until: None, began: None }
    }

    /// It is `now`, and the interval has passed. Not inside a pair or an op.
    pub fn turn(&mut self, now: Instant) {
        if self.rests_until.is_some_and(|until| now < until) {
            return;
        }
        let began = *self.began.get_or_insert(now);
        if self.ksm.scan(self.pages).pass == PassEnd::Reached {
            self.rests_until = Some(began + SHORTEST_PASS);
            self.began = None;
        }
    }
}

fn scan(ksm: &Ksm, pace: Pace, shared: &Shared) {
    let mut advisor = match pace {
        Pace::Fixed { .. } => None,
        Pace::Advisor { settings, .. } => Some(ScanTimeAdvisor::new(settings)),
    };
    let (mut began, mut cpu) = (Instant::now(), own_cpu_time());
    loop {
        let pages = match (&advisor, pace) {
            (Some(advisor), _) => advisor.pages_to_scan(),
            (None, Pace::Fixed { pages, .. }) => pages,
            (None, Pace::Advisor { settings, .. }) => settings.min_pages_to_scan,
        };
        let scanned = ksm.scan(pages);
        if scanned.pass == PassEnd::Reached {
            let (now, used) = (Instant::now(), own_cpu_time());
            if let Some(advisor) = &mut advisor {
                advisor.update(now - began, used.saturating_sub(cpu));
            }
            let rest = SHORTEST_PASS.saturating_sub(now - began);
            if !rest.is_zero() && !shared.pause(rest) {
                return;
            }
            (began, cpu) = (Instant::now(), used);
        }
        if !shared.pause(pace.interval()) {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shadow_mmu::addr::{Access, Hva};
    use shadow_mmu::frame::{FramePool, FreedFrames};
    use shadow_mmu::ksm::{Domain, KsmSettings};
    use shadow_mmu::mm::{Backing, FaultRequest, MapFlags, MergeAny, Mm};

    fn wait_for(done: impl Fn() -> bool) {
        let began = Instant::now();
        while !done() {
            assert!(began.elapsed() < Duration::from_secs(60), "it takes too long");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn it_merges_by_itself_at_any_pace_and_tells_what_that_costs() {
        let advisor = AdvisorSettings { min_pages_to_scan: 3, ..AdvisorSettings::default() };
        let interval = Duration::from_millis(1);
        for pace in [
            Pace::default(),
            Pace::Fixed { pages: 1, interval },
            Pace::Advisor { settings: advisor, interval },
        ] {
            let pool = Arc::new(FramePool::new(256 * PAGE_SIZE, FreedFrames::Poison).unwrap());
            let mm = Mm::new(Arc::clone(&pool)).unwrap();
            let rw = Access::READ | Access::WRITE;
            let at = mm.mmap(Hva(0), 20 * PAGE_SIZE, rw, MapFlags::PRIVATE, Backing::Anonymous).unwrap();
            for page in 0..20 {
                let hva = Hva(at.0 + page * PAGE_SIZE);
                let pinned = mm.fault(&FaultRequest::one_page(hva, rw)).unwrap();
                pool.write(pinned.required().pfn, 0, &[7; 100]);
            }
            mm.set_merge_any(MergeAny::On).unwrap();
            let ksm = Ksm::new(pool, KsmSettings::default()).unwrap();
            ksm.enter(&mm, Domain(0)).unwrap();
            let ksmd = Ksmd::start(Arc::clone(&ksm), pace).unwrap();
            wait_for(|| ksm.stats().pages_sharing == 19);
            assert!(ksmd.cpu_time() > Duration::ZERO);
            let used = ksmd.cpu_time();
            assert!(ksmd.stop() >= used);
            assert_eq!(ksm.audit(), []);
        }
    }
}
