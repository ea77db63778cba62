// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The threads of `memstress`: they sleep until there is a job, do it, and say that they have.
//!
//! The main thread writes the job, then raises `GENERATION` and wakes; a worker that sees a new generation reads the
//! job, does it, leaves its figures and counts itself in `DONE`. Only when all have done so does the main thread
//! write the next job, so nothing of a job changes while somebody reads it, but for what is there to change:
//! `ITERATION` and `RUNNING`.

use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use super::rt::PAGE;
use super::rt::random::{Rng, mix};
use super::rt::sys::{self, Errno};
use super::rt::thread::Thread;

/// The most threads there can be.
pub const MAX_THREADS: usize = 64;
/// What a pass writes, as the kernel's memstress does.
const VALUE: u64 = 0x0123_4567_89AB_CDEF;

/// How pages are touched; the same for all jobs.
#[derive(Clone, Copy)]
pub struct Touch {
    /// Writes in a hundred accesses of [`Job::Mix`].
    pub percent: u64,
    /// Random pages instead of one after the other.
    pub random: bool,
    /// Thread i draws its numbers from seed + i.
    pub seed: u64,
    /// Steps of arithmetic after each access.
    pub spin: u64,
}

/// What all threads shall do.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Job {
    Read,
    Write,
    Mix,
    /// Write the iteration number to random pages while `RUNNING`.
    Free,
    /// End.
    End,
}

const JOBS: [Job; 5] = [Job::Read, Job::Write, Job::Mix, Job::Free, Job::End];

/// The job, as an index of [`JOBS`].
static JOB: AtomicU32 = AtomicU32::new(0);
static EVERY: AtomicU64 = AtomicU64::new(1);
static TIMES: AtomicU64 = AtomicU64::new(1);
/// Jobs given so far; workers sleep on it.
static GENERATION: AtomicU32 = AtomicU32::new(0);
/// Workers that have done the job; the main thread sleeps on it.
static DONE: AtomicU32 = AtomicU32::new(0);
/// How many have to.
static THREADS: AtomicU32 = AtomicU32::new(0);
static ITERATION: AtomicU64 = AtomicU64::new(0);
static RUNNING: AtomicBool = AtomicBool::new(false);

/// One worker's.
struct State {
    /// Address of its region, set before it starts, as are the next four.
    region: AtomicU64,
    pages: AtomicU64,
    percent: AtomicU64,
    seed: AtomicU64,
    spin: AtomicU64,
    random: AtomicBool,
    /// When it began and ended the last job, and its accesses.
    began: AtomicU64,
    ended: AtomicU64,
    accesses: AtomicU64,
    /// The iteration it writes, if it runs free; it writes no older one any more.
    iteration: AtomicU64,
}

static STATES: [State; MAX_THREADS] = [const {
    State {
        region: AtomicU64::new(0),
        pages: AtomicU64::new(0),
        percent: AtomicU64::new(0),
        seed: AtomicU64::new(0),
        spin: AtomicU64::new(0),
        random: AtomicBool::new(false),
        began: AtomicU64::new(0),
        ended: AtomicU64::new(0),
        accesses: AtomicU64::new(0),
        iteration: AtomicU64::new(u64::MAX),
    }
}; MAX_THREADS];

/// All workers, seen from the main thread.
pub struct Team {
    threads: [Option<Thread>; MAX_THREADS],
    count: usize,
}

impl Team {
    /// Starts `count` threads. Thread i touches `pages` pages from page i * `stride` behind `base`.
    ///
    /// # Errors
    /// What starting a thread answers.
    pub fn start(count: usize, base: usize, pages: u64, stride: u64, touch: Touch) -> Result<Self, Errno> {
        THREADS.store(count as u32, Ordering::Relaxed);
        let mut threads = [const { None }; MAX_THREADS];
        for (number, thread) in threads[..count].iter_mut().enumerate() {
            let state = &STATES[number];
            state.region.store(base as u64 + number as u64 * stride * PAGE as u64, Ordering::Relaxed);
            state.pages.store(pages, Ordering::Relaxed);
            state.percent.store(touch.percent, Ordering::Relaxed);
            state.seed.store(touch.seed.wrapping_add(number as u64), Ordering::Relaxed);
            state.spin.store(touch.spin, Ordering::Relaxed);
            state.random.store(touch.random, Ordering::Relaxed);
            *thread = Some(Thread::spawn(work, number)?);
        }
        Ok(Self { threads, count })
    }

    /// Whether the threads run free.
    pub fn is_running(&self) -> bool {
        RUNNING.load(Ordering::Relaxed)
    }

    /// Gives all threads a job, which they have done only after [`wait`](Self::wait). None may be under way.
    pub fn begin(&self, job: Job, every: u64, times: u64) {
        let index = JOBS.iter().position(|&other| other == job).unwrap_or(0);
        JOB.store(index as u32, Ordering::Relaxed);
        EVERY.store(every, Ordering::Relaxed);
        TIMES.store(times, Ordering::Relaxed);
        DONE.store(0, Ordering::Relaxed);
        RUNNING.store(job == Job::Free, Ordering::Relaxed);
        GENERATION.fetch_add(1, Ordering::Release);
        sys::futex_wake(&GENERATION, MAX_THREADS);
    }

    /// Waits until all have done it: nanoseconds from the first one's start to the last one's end, and accesses of
    /// all.
    pub fn wait(&self) -> (u64, u64) {
        loop {
            let done = DONE.load(Ordering::Acquire);
            if done as usize == self.count {
                break;
            }
            sys::futex_wait(&DONE, done);
        }
        let states = &STATES[..self.count];
        let began = states.iter().map(|state| state.began.load(Ordering::Relaxed)).min().unwrap_or(0);
        let ended = states.iter().map(|state| state.ended.load(Ordering::Relaxed)).max().unwrap_or(0);
        let accesses = states.iter().map(|state| state.accesses.load(Ordering::Relaxed)).sum();
        (ended - began, accesses)
    }

    /// Sets what threads that run free shall write.
    pub fn set_iteration(&self, iteration: u64) {
        ITERATION.store(iteration, Ordering::Release);
    }

    /// Waits until none of them writes another.
    pub fn wait_for_iteration(&self, iteration: u64) {
        for state in &STATES[..self.count] {
            while state.iteration.load(Ordering::Acquire) != iteration {
                sys::nanosleep(50_000);
            }
        }
    }

    /// Ends the free run. Returns as [`wait`](Self::wait).
    pub fn stop(&self) -> (u64, u64) {
        RUNNING.store(false, Ordering::Relaxed);
        self.wait()
    }

    /// Ends the threads.
    ///
    /// # Errors
    /// What taking their stacks away answers.
    pub fn end(self) -> Result<(), Errno> {
        if self.is_running() {
            self.stop();
        }
        self.begin(Job::End, 1, 1);
        self.threads.into_iter().flatten().try_for_each(Thread::join)
    }
}

/// The thread.
extern "C" fn work(number: usize) {
    let state = &STATES[number];
    let mut rng = Rng::new(state.seed.load(Ordering::Relaxed));
    let mut seen = 0;
    loop {
        while GENERATION.load(Ordering::Acquire) == seen {
            sys::futex_wait(&GENERATION, seen);
        }
        seen = seen.wrapping_add(1);
        let job = JOBS[JOB.load(Ordering::Relaxed) as usize];
        state.began.store(sys::now(), Ordering::Relaxed);
        let accesses = match job {
            Job::End => return,
            Job::Free => state.run_free(&mut rng),
            Job::Read | Job::Write | Job::Mix => state.pass(job, &mut rng),
        };
        state.accesses.store(accesses, Ordering::Relaxed);
        state.ended.store(sys::now(), Ordering::Relaxed);
        if DONE.fetch_add(1, Ordering::AcqRel) + 1 == THREADS.load(Ordering::Relaxed) {
            sys::futex_wake(&DONE, 1);
        }
    }
}

impl State {
    /// The first word of a page of the region.
    fn word(&self, page: u64) -> *mut u64 {
        (self.region.load(Ordering::Relaxed) + page * PAGE as u64) as *mut u64
    }

    /// Touches the pages that the job names; returns the number of accesses.
    fn pass(&self, job: Job, rng: &mut Rng) -> u64 {
        let (pages, percent) = (self.pages.load(Ordering::Relaxed), self.percent.load(Ordering::Relaxed));
        let (random, spin) = (self.random.load(Ordering::Relaxed), self.spin.load(Ordering::Relaxed));
        let (every, times) = (EVERY.load(Ordering::Relaxed), TIMES.load(Ordering::Relaxed));
        let mut accesses = 0;
        let mut sum = 0;
        for _ in 0..times {
            let mut step = 0;
            while step < pages {
                let word = self.word(if random { rng.below(pages as usize) as u64 } else { step });
                let write = match job {
                    Job::Write => true,
                    Job::Mix => (rng.below(100) as u64) < percent,
                    _ => false,
                };
                if write {
                    // SAFETY: `word` is in the mapping, which stays; other threads' accesses to it, if they
                    // overlap, are volatile accesses of a whole aligned word too.
                    unsafe { word.write_volatile(VALUE) };
                } else {
                    // SAFETY: as above.
                    sum ^= unsafe { word.read_volatile() };
                }
                for _ in 0..spin {
                    sum = mix(sum);
                }
                accesses += 1;
                step = step.saturating_add(every);
            }
        }
        core::hint::black_box(sum);
        accesses
    }

    /// Writes the iteration number to random pages until `RUNNING` is over; returns the number of accesses.
    fn run_free(&self, rng: &mut Rng) -> u64 {
        let pages = self.pages.load(Ordering::Relaxed) as usize;
        let mut accesses = 0;
        while RUNNING.load(Ordering::Relaxed) {
            let iteration = ITERATION.load(Ordering::Acquire);
            // Before the store that uses it, and after every store of an older one.
            self.iteration.store(iteration, Ordering::Release);
            // SAFETY: as in `pass`.
            unsafe { self.word(rng.below(pages) as u64).write_volatile(iteration) };
            accesses += 1;
        }
        accesses
    }
}
