// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Deterministic mode: `umbra run --deterministic --seed S`. Same seed, same program, same input: the same run.
//!
//! # The protocol
//! A VM has one **baton** ([`Baton`]). A host thread that runs a guest thread executes guest code, or umbra's code on its
//! behalf, only while it holds the baton. So at any time one thread of the VM does anything at all, and what it does next
//! depends on what was done before and on the seed.
//!
//! *Who may ask for it.* Each guest thread has a [`Seat`]. It is made by the thread that clones, before the new thread's host
//! thread is started, so seats are numbered in the order in which the guest made its threads, never in the order in which host
//! threads happen to arrive. A seat is given up as the very last thing that the host thread does, when the vCPU is back in the
//! VM's list: what the next holder finds does not depend on how fast the last one cleans up.
//!
//! *When it passes.*
//! * Before an entry to the guest, when the holder's **quantum** is used up. It is counted in exits, or in instructions
//!   ([`Quantum`]); how long the next one is, is drawn when the baton is handed over.
//! * Whenever the thread would wait: a futex, a sleep, a poll. It says until when, and what it polls.
//! * When the thread ends.
//!
//! *Who gets it.* One of the seats that are ready, drawn by the seed's generator from the list of them. A seat enters the list
//! when the holder wakes it, when virtual time reaches its deadline (in the order of deadlines, then of seats), when its
//! quantum is over, or when it is made: all of that is done by the holder. Nothing else may touch the list but an order from
//! outside to end (below). Seats that poll files of the host's are asked too, once after each exit of somebody else's.
//!
//! *Time* is virtual ([`VirtualClock`]): it starts at a fixed point, goes on by a seeded amount with each exit and a fixed one
//! with each single step, and stands still otherwise. Where no seat is ready it jumps to the earliest deadline. Where there is
//! none, but threads poll files of the host's, umbra really waits for those, and time stands still. Where none polls either,
//! nothing can wake a thread any more, and the guest is ended ([`Baton::when_stuck`]).
//!
//! *What umbra does regularly* (aging, page sharing) is a job of the baton's ([`Baton::every`]): the holder runs it, between two
//! exits or while time jumps, when virtual time says so, with an interval that the seed jitters. So are the
//! ticks of a plan, with an exact one. What a plan has a thread wait for is virtual time too ([`VirtualClock::pass`]).
//!
//! # What is not on the baton
//! The event loop (`--timeout`, signals to umbra, reports), the checker of `--check`, the writer of `--trace`, and the
//! `watchdog`. They may look, under the locks that they always take; none of them waits for the baton while it holds a lock, so the
//! holder never waits for long. They may not make anything ready, but for one thing: an order to end the guest. What comes
//! after that is not repeated by a replay, and nothing before it is touched.
//!
//! A kick by the holder reaches a vCPU that is not in the guest, and makes its next entry come back at once: that is no exit.
//! Neither is one that the host's signals cause. So neither is counted or traced.
//!
//! # Locks
//! The baton's lock is a leaf but for the trace's: it is taken under those of `guest/`, and nothing is called under it but
//! condition variables. Jobs run, and descriptors are polled, with no lock held.

mod baton;
mod clock;
mod seat;
mod trace;
mod watchdog;

pub use baton::{Baton, Interval, Quantum};
pub use clock::{START, VirtualClock};
pub use seat::{Leaving, Seat};
pub use trace::{DeterministicTrace, Summary};

use crate::engine::{Exit, Regs};
use crate::random::SplitMix64;
use crate::trace::Observer;
use shadow_mmu::sync::Mutex;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The guest's process id in this mode; further threads count up from it. Its parent is 1.
pub const PID: i32 = 1000;

/// What the seed decides, each by a generator of its own: what one draws does not move the others.
#[derive(Debug, Clone, Copy)]
enum Stream {
    Schedule = 1,
    Getrandom,
    Start,
    Sharing,
}

fn stream(seed: u64, of: Stream) -> SplitMix64 {
    let mut whole = SplitMix64::new(seed);
    let mut from = 0;
    for _ in 0..of as u32 {
        from = whole.word();
    }
    SplitMix64::new(from)
}

/// The deterministic mode of one VM.
#[derive(Debug)]
pub struct Deterministic {
    seed: u64,
    baton: Arc<Baton>,
    random: Mutex<SplitMix64>,
    trace: Arc<Observer<DeterministicTrace>>,
    /// The operator ended the guest.
    ended_from_outside: AtomicBool,
    /// The limit of the run's time ended it.
    out_of_time: AtomicBool,
}

impl Deterministic {
    /// For one run. The trace goes into `file` too, if there is one.
    ///
    /// # Errors
    /// No descriptor left.
    pub fn new(seed: u64, quantum: Quantum, file: Option<File>) -> std::io::Result<Arc<Self>> {
        let trace = Arc::new(Observer(DeterministicTrace::new(file)));
        let baton = Baton::new(stream(seed, Stream::Schedule), quantum, Arc::clone(&trace))?;
        Ok(Arc::new(Self {
            seed,
            baton,
            random: Mutex::new(stream(seed, Stream::Getrandom)),
            trace,
            ended_from_outside: AtomicBool::new(false),
            out_of_time: AtomicBool::new(false),
        }))
    }

    /// The seed of everything.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// The VM's baton.
    pub fn baton(&self) -> &Arc<Baton> {
        &self.baton
    }

    /// What traces exits, and listens to the address space.
    pub fn trace(&self) -> &Arc<Observer<DeterministicTrace>> {
        &self.trace
    }

    /// The 16 bytes that AT_RANDOM points to.
    pub fn at_random(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        stream(self.seed, Stream::Start).fill(&mut bytes);
        bytes
    }

    /// The secret seed of page sharing's hash.
    pub fn sharing_seed(&self) -> u64 {
        stream(self.seed, Stream::Sharing).word()
    }

    /// Random bytes for the guest.
    pub fn fill_random(&self, bytes: &mut [u8]) {
        self.random.lock().fill(bytes);
    }

    /// Notes an exit that the guest caused, before anything is done about it.
    pub fn exit(&self, seat: &Seat, exit: &Exit, regs: &Regs) {
        self.trace.0.exit(seat.tid(), exit, regs, self.baton.steps());
        seat.left_the_guest();
    }

    /// The operator ends the guest: how it ends says nothing about the seed.
    pub fn note_end_from_outside(&self) {
        self.ended_from_outside.store(true, Ordering::Relaxed);
    }

    /// Whether the operator ended the guest.
    pub fn ended_from_outside(&self) -> bool {
        self.ended_from_outside.load(Ordering::Relaxed)
    }

    /// Whether the guest came to run.
    pub fn has_begun(&self) -> bool {
        self.baton.switches().0 > 0
    }

    /// The limit of the run's time has come.
    pub fn note_time_limit(&self) {
        self.out_of_time.store(true, Ordering::Relaxed);
    }

    /// Whether the limit of the run's time ended the guest: at a moment of the host's.
    pub fn is_out_of_time(&self) -> bool {
        self.out_of_time.load(Ordering::Relaxed)
    }

    /// What is told of the run, after its end.
    pub fn summary(&self) -> Summary {
        self.trace.0.summary(self.seed, &self.baton)
    }
}

#[cfg(test)]
mod tests;
