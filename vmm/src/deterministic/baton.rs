// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The baton: which thread of a deterministic VM runs, and for how long. The protocol is at the top of
//! [`deterministic`](super).

use super::clock::VirtualClock;
use super::seat::Seat;
use super::trace::DeterministicTrace;
use crate::causes::say;
use crate::engine::Kick;
use crate::random::SplitMix64;
use crate::trace::Observer;
use shadow_mmu::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::AsRawFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::EventFd;

/// How long a thread keeps the baton while others could run: a number from 1 to the given one, drawn anew each time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantum {
    /// Counted in exits.
    Exits(u64),
    /// Counted in instructions: the engine stops after each one while others could run.
    Steps(u64),
}

impl Quantum {
    /// Exits, where the command line does not say how many.
    pub const EXITS: u64 = 16;
    /// Instructions, where the command line does not say how many.
    pub const STEPS: u64 = 256;

    fn most(self) -> u64 {
        match self {
            Self::Exits(most) | Self::Steps(most) => most,
        }
    }
}

/// How long the host is left alone that cannot say which files are ready.
const POLL_AGAIN: Duration = Duration::from_millis(10);

/// Where a seat's thread is.
#[derive(Debug)]
pub(super) enum Place {
    /// In the list of those that may be next.
    Ready,
    /// It has the baton.
    Running,
    /// It waits to be woken, or for its deadline.
    Asleep(Option<Instant>),
    /// It waits for the host's files.
    Polling {
        deadline: Option<Instant>,
        fds: Vec<libc::pollfd>,
        /// It has looked since the last exit, and there was nothing.
        looked: bool,
    },
}

pub(super) struct Member {
    pub(super) tid: i32,
    pub(super) place: Place,
    /// Something happened that it may wait for, while it did not wait.
    pub(super) woken: bool,
    pub(super) turn: Arc<Condvar>,
    pub(super) kick: Option<Arc<dyn Kick>>,
    /// The CPU time of its thread, while that can be in the guest.
    pub(super) cpu: Option<libc::clockid_t>,
}

/// How often a job is done, in virtual time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interval {
    /// From half to one and a half times this, as the seed says. After a jump of time that was longer the job is done once.
    About(Duration),
    /// This, at least 1 ns, counted without the time that the job itself takes. What a jump of time left out is made up for.
    Exactly(Duration),
}

/// Something that is done regularly, in virtual time.
pub(super) struct Job {
    every: Interval,
    due: Instant,
    /// `None` while it runs.
    run: Option<Box<dyn FnMut() + Send>>,
}

pub(super) struct State {
    pub(super) random: SplitMix64,
    pub(super) members: BTreeMap<u32, Member>,
    pub(super) next: u32,
    /// Who may be next, in the order in which the guest made them so.
    pub(super) ready: Vec<u32>,
    pub(super) holder: Option<u32>,
    /// What is left of the holder's quantum.
    pub(super) left: u64,
    /// The watchdog wants the holder to pass the baton on.
    pub(super) forced: bool,
    /// No thread can run, and the host's files are waited for.
    pub(super) idle: bool,
    pub(super) jobs: Vec<Job>,
    /// Nothing but the seed and the input decided what happened so far.
    pub(super) exact: bool,
    pub(super) switches: u64,
    /// All seats were given up.
    pub(super) over: bool,
    /// It was told that every thread waits for ever.
    pub(super) stuck: bool,
}

/// One VM's baton.
pub struct Baton {
    pub(super) quantum: Quantum,
    pub(super) clock: Arc<VirtualClock>,
    pub(super) trace: Arc<Observer<DeterministicTrace>>,
    /// Ends a wait for the host's files.
    pub(super) wake: EventFd,
    /// Odd while the holder is in the guest.
    pub(super) entries: AtomicU64,
    pub(super) steps: AtomicU64,
    pub(super) over: Condvar,
    /// What is done when every thread waits for ever.
    when_stuck: OnceLock<Box<dyn Fn() + Send + Sync>>,
    pub(super) state: Mutex<State>,
}

impl fmt::Debug for Baton {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Baton")
            .field("quantum", &self.quantum)
            .field("clock", &self.clock)
            .finish_non_exhaustive()
    }
}

impl State {
    pub(super) fn make_ready(&mut self, id: u32) {
        if let Some(member) = self.members.get_mut(&id) {
            member.place = Place::Ready;
            self.ready.push(id);
        }
    }

    /// Makes those ready whose time has come, the earliest first.
    pub(super) fn expire(&mut self, now: Instant) {
        let deadlines = self.members.iter().filter_map(|(&id, member)| match member.place {
            Place::Asleep(Some(deadline)) | Place::Polling { deadline: Some(deadline), .. } => {
                (deadline <= now).then_some((deadline, id))
            }
            _ => None,
        });
        let mut expired: Vec<_> = deadlines.collect();
        expired.sort_unstable();
        expired.into_iter().for_each(|(_, id)| self.make_ready(id));
    }

    /// Draws who is next; `None` if nobody is ready.
    pub(super) fn choose(&mut self) -> Option<u32> {
        let pollers = self.members.iter().filter_map(|(&id, member)| {
            matches!(member.place, Place::Polling { looked: false, .. }).then_some(id)
        });
        let candidates: Vec<u32> = self.ready.iter().copied().chain(pollers).collect();
        // Nothing is drawn where there is no choice: how often a lone thread waits for the host must not move what is drawn.
        let chosen = match candidates[..] {
            [] => return None,
            [only] => only,
            _ => candidates[self.random.below(candidates.len() as u64) as usize],
        };
        self.ready.retain(|&id| id != chosen);
        Some(chosen)
    }

    /// When something happens by itself: a deadline, or before it a job. Without a deadline there is nothing to wait for.
    pub(super) fn next_moment(&self) -> Option<Instant> {
        let deadlines = self.members.values().filter_map(|member| match member.place {
            Place::Asleep(deadline) | Place::Polling { deadline, .. } => deadline,
            Place::Ready | Place::Running => None,
        });
        let deadline = deadlines.min()?;
        Some(self.jobs.iter().map(|job| job.due).min().map_or(deadline, |due| due.min(deadline)))
    }

    /// Where nobody can run and there is no deadline: whether nobody waits for the outside either, which was not told yet.
    fn waits_for_ever(&self) -> bool {
        !self.stuck && !self.members.values().any(|member| matches!(member.place, Place::Polling { .. }))
    }

    /// Whether anybody but the holder could run, now or after some time.
    pub(super) fn others_could_run(&self) -> bool {
        self.members.values().any(|member| match member.place {
            Place::Ready | Place::Polling { .. } => true,
            Place::Asleep(deadline) => deadline.is_some(),
            Place::Running => false,
        })
    }
}

impl Baton {
    pub(super) fn new(
        random: SplitMix64,
        quantum: Quantum,
        trace: Arc<Observer<DeterministicTrace>>,
    ) -> std::io::Result<Arc<Self>> {
        let state = State {
            random,
            members: BTreeMap::new(),
            next: 0,
            ready: Vec::new(),
            holder: None,
            left: 0,
            forced: false,
            idle: false,
            jobs: Vec::new(),
            exact: true,
            switches: 0,
            over: false,
            stuck: false,
        };
        Ok(Arc::new(Self {
            quantum,
            clock: Arc::default(),
            trace,
            wake: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            entries: AtomicU64::new(0),
            steps: AtomicU64::new(0),
            over: Condvar::new(),
            when_stuck: OnceLock::new(),
            state: Mutex::new(state),
        }))
    }

    /// The time that the VM lives in.
    pub fn clock(&self) -> &Arc<VirtualClock> {
        &self.clock
    }

    /// Has `job` run so often in virtual time, by whoever has the baton then.
    pub fn every(&self, every: Interval, job: impl FnMut() + Send + 'static) {
        let mut state = self.state.lock();
        let due = self.clock.now() + every.next(&mut state.random);
        state.jobs.push(Job { every, due, run: Some(Box::new(job)) });
    }

    /// Has `end` called, once and without a lock, when every thread waits and nothing inside can wake one: it is to end the guest.
    /// Without it such a guest waits for an order from outside. The first that is given counts.
    pub fn when_stuck(&self, end: impl Fn() + Send + Sync + 'static) {
        let _ = self.when_stuck.set(Box::new(end));
    }

    /// A seat for the guest's thread `tid`, which is ready. By the thread that makes it.
    pub fn seat(self: &Arc<Self>, tid: i32) -> Seat {
        let mut state = self.state.lock();
        let id = state.next;
        state.next += 1;
        let turn = Arc::new(Condvar::new());
        let member = Member { tid, place: Place::Ready, woken: false, turn, kick: None, cpu: None };
        state.members.insert(id, member);
        state.ready.push(id);
        Seat::new(Arc::clone(self), id, tid)
    }

    /// Single steps so far.
    pub fn steps(&self) -> u64 {
        self.steps.load(Ordering::Relaxed)
    }

    /// How often another thread got the baton; and whether nothing but the seed and the input decided about that.
    pub fn switches(&self) -> (u64, bool) {
        let state = self.state.lock();
        (state.switches, state.exact)
    }

    /// Hands the baton to the next. The caller's own seat is where it belongs by now. Returns with the caller not holding the
    /// baton, unless it is its own successor.
    pub(super) fn pass<'a>(&'a self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        loop {
            state.expire(self.clock.now());
            if let Some(next) = state.choose() {
                self.grant(&mut state, next);
                return state;
            }
            if state.members.is_empty() {
                state.holder = None;
                return state;
            }
            match state.next_moment() {
                Some(moment) => {
                    self.clock.advance_to(moment);
                    state = self.run_jobs(state);
                }
                None => match self.when_stuck.get().filter(|_| state.waits_for_ever()) {
                    Some(end) => {
                        state.stuck = true;
                        drop(state);
                        say(format_args!(
                            "deterministic: every thread waits, and nothing can wake one: the guest is ended as by SIGKILL"
                        ));
                        end();
                        state = self.state.lock();
                    }
                    None => state = self.wait_for_the_host(state),
                },
            }
        }
    }

    pub(super) fn grant(&self, state: &mut State, next: u32) {
        let before = state.holder.replace(next);
        if before != Some(next) || state.left == 0 {
            state.left = 1 + state.random.below(self.quantum.most());
        }
        state.forced = false;
        let Some(member) = state.members.get_mut(&next) else { return };
        member.place = Place::Running;
        member.turn.notify_all();
        if before != Some(next) {
            self.trace.0.switch(member.tid, self.steps());
            state.switches += 1;
        }
    }

    /// Runs the jobs that are due, without the lock.
    pub(super) fn run_jobs<'a>(&'a self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        for index in 0..state.jobs.len() {
            // Only an exact one can be due again.
            while state.jobs[index].due <= self.clock.now() {
                let Some(mut run) = state.jobs[index].run.take() else { break };
                let began = self.clock.now();
                drop(state);
                run();
                state = self.state.lock();
                let now = self.clock.now();
                let State { jobs, random, .. } = &mut *state;
                let job = &mut jobs[index];
                job.due = match job.every {
                    Interval::About(_) => now,
                    // A plan may have it wait itself.
                    Interval::Exactly(_) => job.due + now.saturating_duration_since(began),
                } + job.every.next(random);
                job.run = Some(run);
            }
        }
        state
    }

    /// Nobody can run, and time would not change that: waits until a file that somebody polls is ready, or an order from
    /// outside comes.
    fn wait_for_the_host<'a>(&'a self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        let mut fds = vec![libc::pollfd { fd: self.wake.as_raw_fd(), events: libc::POLLIN, revents: 0 }];
        let mut owners = Vec::new();
        // The host takes no more than there may be descriptors, and many threads may poll the same: each is asked about once.
        let mut places = BTreeMap::new();
        for (&id, member) in &state.members {
            let Place::Polling { fds: wanted, .. } = &member.place else { continue };
            for &pollfd in wanted.iter().filter(|wanted| wanted.fd >= 0) {
                let place = *places.entry(pollfd.fd).or_insert_with(|| {
                    fds.push(libc::pollfd { events: 0, revents: 0, ..pollfd });
                    fds.len() - 1
                });
                fds[place].events |= pollfd.events;
                owners.push((place, id, pollfd.events | libc::POLLERR | libc::POLLHUP | libc::POLLNVAL));
            }
        }
        state.idle = true;
        drop(state);
        // SAFETY: `fds` is a live array of that length.
        let ready = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, -1) };
        if ready < 0 && std::io::Error::last_os_error().kind() != std::io::ErrorKind::Interrupted {
            // The host cannot say now, for want of memory or of descriptors allowed: asked again, but not all the time.
            std::thread::sleep(POLL_AGAIN);
        }
        let mut state = self.state.lock();
        state.idle = false;
        // There may be nothing to read.
        let _ = self.wake.read();
        if ready > 0 {
            for (place, id, wanted) in owners {
                let polls = |id| {
                    matches!(state.members.get(&id).map(|member| &member.place), Some(Place::Polling { .. }))
                };
                if fds[place].revents & wanted != 0 && polls(id) {
                    state.make_ready(id);
                }
            }
        }
        state
    }

    /// Waits for the baton.
    pub(super) fn wait_for_turn<'a>(&'a self, mut state: MutexGuard<'a, State>, id: u32) {
        while let Some(member) = state.members.get(&id) {
            if matches!(member.place, Place::Running) {
                break;
            }
            let turn = Arc::clone(&member.turn);
            state = turn.wait(state);
        }
    }

    /// For the watchdog: changes with every entry to the guest and every exit.
    pub(super) fn entries(&self) -> u64 {
        self.entries.load(Ordering::Acquire)
    }

    /// For the watchdog: the CPU time that the holder's thread has used in its life, wherever the engine has it run; `None` if it
    /// cannot be in the guest.
    pub(super) fn cpu_time_of_holder(&self) -> Option<Duration> {
        // Held, so that the thread cannot end and its clock go in between.
        let state = self.state.lock();
        let holder = state.members.get(&state.holder?)?;
        let clock = holder.cpu?;
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the kernel writes one timespec.
        let result = unsafe { libc::clock_gettime(clock, &raw mut time) };
        let outside = holder.kick.as_ref().map_or(Duration::ZERO, |kick| kick.cpu_time_outside());
        (result == 0).then(|| Duration::new(time.tv_sec as u64, time.tv_nsec as u32) + outside)
    }

    /// For the watchdog: whether the holder was in the guest by this count.
    pub(super) fn is_in_guest(entries: u64) -> bool {
        entries & 1 == 1
    }

    /// For the watchdog: waits that long; whether there is still something to watch.
    pub(super) fn pause(&self, time: Duration) -> bool {
        let state = self.state.lock();
        if state.over {
            return false;
        }
        !self.over.wait_timeout(state, time).over
    }

    /// For the watchdog: takes the baton from its holder, if others could run; its tid.
    pub(super) fn force(&self) -> Option<i32> {
        let (tid, kick) = {
            let mut state = self.state.lock();
            if !state.others_could_run() {
                return None;
            }
            let holder = state.holder?;
            state.forced = true;
            state.exact = false;
            let member = state.members.get(&holder)?;
            (member.tid, member.kick.clone()?)
        };
        kick.kick();
        Some(tid)
    }
}

impl Interval {
    /// The time to the next.
    fn next(self, random: &mut SplitMix64) -> Duration {
        match self {
            Self::About(every) => jittered(every, random),
            Self::Exactly(every) => every.max(Duration::from_nanos(1)),
        }
    }
}

fn jittered(every: Duration, random: &mut SplitMix64) -> Duration {
    let nanos = u64::try_from(every.as_nanos()).unwrap_or(u64::MAX).max(1);
    Duration::from_nanos((nanos / 2).saturating_add(random.below(nanos)).max(1))
}
