// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest thread's place in the order of a deterministic VM: what its host thread calls to run, to wait, and to end.

use super::baton::{Baton, Place, Quantum, State};
use super::watchdog;
use crate::engine::Kick;
use shadow_mmu::sync::{Arc, MutexGuard};
use std::sync::atomic::Ordering;
use std::time::Instant;

/// Virtual time that an exit takes, nanoseconds: 10 to 90 µs, about what one costs.
const EXIT_NANOS: std::ops::Range<u64> = 10_000..90_000;
/// Virtual time that a single step takes, nanoseconds.
const STEP_NANOS: u64 = 10;

/// One thread's place in the order. All but [`wake`](Self::wake) is for the thread itself.
#[derive(Debug)]
pub struct Seat {
    baton: Arc<Baton>,
    id: u32,
    tid: i32,
}

impl Seat {
    pub(super) fn new(baton: Arc<Baton>, id: u32, tid: i32) -> Self {
        Self { baton, id, tid }
    }

    /// The guest's name for the thread.
    pub fn tid(&self) -> i32 {
        self.tid
    }

    /// The VM's time.
    pub fn now(&self) -> Instant {
        self.baton.clock.now()
    }

    /// From here on `kick` gets the calling thread out of the guest; `None`: it is not there. By the seat's thread.
    pub fn attach(&self, kick: Option<Arc<dyn Kick>>) {
        let cpu = kick.as_ref().and_then(|_| own_cpu_clock());
        if let Some(member) = self.baton.state.lock().members.get_mut(&self.id) {
            member.kick = kick;
            member.cpu = cpu;
        }
    }

    /// Waits for the first turn. The first seat of all finds the baton unclaimed.
    pub fn begin(&self) {
        let mut state = self.baton.state.lock();
        if state.holder.is_none() {
            if let Err(error) = watchdog::start(&self.baton) {
                log::warn!("a guest that spins will hang, there is no watchdog: {error}");
            }
            state = self.baton.pass(state);
        }
        self.baton.wait_for_turn(state, self.id);
    }

    /// Before an entry to the guest: does what is due, and passes the baton on if the quantum is used up.
    pub fn turn(&self) {
        let mut state = self.baton.state.lock();
        state = self.baton.run_jobs(state);
        state.expire(self.baton.clock.now());
        if state.forced {
            self.let_others_run(state);
        } else if state.left == 0 {
            state.make_ready(self.id);
            state = self.baton.pass(state);
            self.baton.wait_for_turn(state, self.id);
        }
    }

    /// The watchdog wants another to run than this one, which may only spin until one did: if need be, whoever sleeps.
    fn let_others_run<'a>(&'a self, mut state: MutexGuard<'a, State>) {
        let baton = &self.baton;
        let next = state.choose().or_else(|| {
            let moment = state.next_moment()?;
            baton.clock.advance_to(moment);
            state.expire(baton.clock.now());
            state.choose()
        });
        state.forced = false;
        if let Some(next) = next {
            state.make_ready(self.id);
            baton.grant(&mut state, next);
            baton.wait_for_turn(state, self.id);
        }
    }

    /// Whether the guest is to be left after one instruction.
    pub fn single_steps(&self) -> bool {
        matches!(self.baton.quantum, Quantum::Steps(_)) && self.baton.state.lock().others_could_run()
    }

    /// The thread enters the guest, or has come back. Around each entry.
    pub fn cross_into_guest_or_back(&self) {
        self.baton.entries.fetch_add(1, Ordering::AcqRel);
    }

    /// An exit that the guest caused: time goes on, and one is used of the quantum.
    pub(super) fn left_the_guest(&self) {
        let mut state = self.baton.state.lock();
        let nanos = EXIT_NANOS.start + state.random.below(EXIT_NANOS.end - EXIT_NANOS.start);
        self.baton.clock.advance(nanos);
        state.left = state.left.saturating_sub(1);
        for member in state.members.values_mut() {
            if let Place::Polling { looked, .. } = &mut member.place {
                *looked = false;
            }
        }
    }

    /// One instruction was executed.
    pub fn stepped(&self) {
        self.baton.steps.fetch_add(1, Ordering::Relaxed);
        self.baton.clock.advance(STEP_NANOS);
        let mut state = self.baton.state.lock();
        state.left = state.left.saturating_sub(1);
    }

    /// The guest asked to let others run: the quantum is used up.
    pub fn give_up_quantum(&self) {
        self.baton.state.lock().left = 0;
    }

    /// Before the thread looks at what it may wait for: what wakes it from here on ends its next wait.
    pub fn prepare_to_wait(&self) {
        if let Some(member) = self.baton.state.lock().members.get_mut(&self.id) {
            member.woken = false;
        }
    }

    /// Waits to be woken, or until `deadline`; returns when it is this thread's turn again. May return for no reason.
    pub fn sleep(&self, deadline: Option<Instant>) {
        self.wait(Place::Asleep(deadline));
    }

    /// Waits until one of `fds` may be ready, to be woken, or until `deadline`. May return for no reason. The descriptors
    /// stay open meanwhile.
    pub fn poll(&self, fds: &[libc::pollfd], deadline: Option<Instant>) {
        if fds.is_empty() {
            return self.sleep(deadline);
        }
        self.wait(Place::Polling { deadline, fds: fds.to_vec(), looked: true });
    }

    fn wait(&self, place: Place) {
        let mut state = self.baton.state.lock();
        let Some(member) = state.members.get_mut(&self.id) else { return };
        if std::mem::take(&mut member.woken) {
            return;
        }
        member.place = place;
        state = self.baton.pass(state);
        self.baton.wait_for_turn(state, self.id);
    }

    /// Something has happened that the thread may wait for. By the holder of the baton, or with an order to end.
    pub fn wake(&self) {
        let mut state = self.baton.state.lock();
        let idle = state.idle;
        let Some(member) = state.members.get_mut(&self.id) else { return };
        match member.place {
            Place::Ready => {}
            Place::Running => member.woken = true,
            Place::Asleep(_) | Place::Polling { .. } => {
                state.make_ready(self.id);
                if idle {
                    // Fails only when the counter is full; then it is readable already.
                    let _ = self.baton.wake.write(1);
                }
            }
        }
    }

    /// Gives the seat up; whoever has the baton passes it on. May be done twice.
    fn leave(&self) {
        let mut state = self.baton.state.lock();
        if state.members.remove(&self.id).is_none() {
            return;
        }
        let id = self.id;
        state.ready.retain(|&ready| ready != id);
        if state.holder == Some(id) {
            state = self.baton.pass(state);
        }
        if state.members.is_empty() {
            state.over = true;
            self.baton.over.notify_all();
            // What they hold may be of the VM, and goes without the lock.
            let jobs = std::mem::take(&mut state.jobs);
            drop(state);
            drop(jobs);
        }
    }
}

/// The clock of the calling thread's CPU time, for others to read.
fn own_cpu_clock() -> Option<libc::clockid_t> {
    let mut clock = 0;
    // SAFETY: takes nothing and cannot fail.
    let own = unsafe { libc::pthread_self() };
    // SAFETY: the calling thread's own handle is good; the C library writes one clock id.
    let result = unsafe { libc::pthread_getcpuclockid(own, &raw mut clock) };
    (result == 0).then_some(clock)
}

impl Drop for Seat {
    /// One whose thread never came to be.
    fn drop(&mut self) {
        self.leave();
    }
}

/// Gives a seat up when it is dropped: the last thing that a thread does, or that is done with one that never ran.
#[derive(Debug)]
pub struct Leaving(pub Arc<Seat>);

impl Drop for Leaving {
    fn drop(&mut self) {
        self.0.leave();
    }
}
