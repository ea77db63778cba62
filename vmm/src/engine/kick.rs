// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Making a vCPU leave the guest: one word a vCPU, and the engine's way to interrupt it.
//!
//! # Protocol
//!
//! [`RunState`] holds one atomic word: the *mode*, the pending *requests*, and the *lease* (which use of the vCPU this
//! is; KVM cannot destroy a vCPU, so one serves many guest threads in turn).
//!
//! ```text
//!            enter (no request pending)            request             interrupt sent
//!   OUTSIDE ───────────────────────────► IN_GUEST ─────────► SENDING ────────────────► SENT
//!      ▲                                     │ leave                                     │ leave: takes it back
//!      └─────────────────────────────────────┴───────────────────────────────────────────┘
//! ```
//!
//! * The vCPU's thread *enters* by one compare-exchange that fails while a request is pending. So a request made
//!   before the entry is seen by the entry, and one made after it finds IN_GUEST: there is no gap between the two, and
//!   no fence to forget, because both sides work on the same word.
//! * Whoever turns IN_GUEST into SENDING sends the engine's [`Interrupt`], once. It must end the guest's run also where
//!   the vCPU's thread has entered but has not reached the guest yet.
//! * The thread cannot get out of [`leave`](RunState::leave) while the word says SENDING. So the interrupt goes to a vCPU
//!   whose thread is inside [`run`](crate::engine::Vcpu::run): what that keeps alive, the sender can use.
//! * A request stays in the word until the vCPU's thread takes it. Requests are not counted; one that is pending already
//!   sends no second interrupt.
//! * A [`Kicker`] knows the lease it was made for. Against a word of another lease (the vCPU is parked, or serves
//!   another guest thread by now) it does nothing.
//!
//! # Orderings
//!
//! Requests and entry are read-modify-writes with `SeqCst`: on x86 each is a locked instruction, hence a full barrier.
//! A flusher that changed an spte and then requested FLUSH of a vCPU in OUTSIDE relies on that: an entry that comes
//! later in the word's order also sees the spte. Where the request turns out to be pending already, a fence stands in for
//! the exchange that is saved. `leave` releases, [`RunState::is_out`] acquires: what the guest wrote
//! before it left is visible to who waited for it.

use super::Kick;
use crate::inject::points::KICK;
use shadow_mmu::inject::Faults;
use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::time::Duration;

const MODE: u64 = 0b11;
const OUTSIDE: u64 = 0;
const IN_GUEST: u64 = 1;
const SENDING: u64 = 2;
const SENT: u64 = 3;
const LEASE_SHIFT: u32 = 32;

bitflags::bitflags! {
    /// What other threads want of a vCPU.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub(super) struct Requests: u64 {
        /// Return `Exit::Kicked`.
        const KICK = 1 << 2;
        /// Drop the vCPU's translations before the next entry.
        const FLUSH = 1 << 3;
        /// Stay out of the guest until the holder lets go.
        const HOLD = 1 << 4;
        /// Never enter the guest again.
        const STOP = 1 << 5;
    }
}

/// How an engine reaches a vCPU that runs, to get it out of the guest above all. [`RunState`] does that, and nobody else.
pub(super) trait Interrupt: Debug + Send + Sync {
    /// The calling thread is about to enter the guest, or to find that it must not. What is stored here, with any ordering,
    /// is seen by `send`.
    fn entering(&self);

    /// Makes the guest's run end, or the one that is about to begin. Once at most between an `entering` and the thread's
    /// leave; from any thread. Does not wait. It cannot fail: what the host refuses is for the log.
    fn send(&self);

    /// Undoes what `send` left behind. By the thread that entered, on its way out; only after a `send`,
    /// and then once or more.
    fn take_back(&self);

    /// [`Kick::cpu_time_outside`].
    fn cpu_time_outside(&self) -> Duration {
        Duration::ZERO
    }
}

/// Where a vCPU is and what others want of it.
#[derive(Debug)]
pub(super) struct RunState {
    word: AtomicU64,
    interrupt: Box<dyn Interrupt>,
}

impl RunState {
    /// A vCPU outside the guest, not leased yet.
    pub(super) fn new(interrupt: impl Interrupt + 'static) -> Self {
        Self { word: AtomicU64::new(0), interrupt: Box::new(interrupt) }
    }

    /// Begins a new lease: kickers of earlier ones are void and what they asked for is forgotten.
    pub(super) fn begin_lease(&self) -> u32 {
        let next = |word: u64| {
            let lease = (word >> LEASE_SHIFT).wrapping_add(1) << LEASE_SHIFT;
            lease | word & (MODE | (Requests::all() - Requests::KICK).bits())
        };
        let update = self.word.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |word| Some(next(word)));
        (next(update.unwrap_or_else(|word| word)) >> LEASE_SHIFT) as u32
    }

    /// Goes into the guest, unless there are requests other than `deferred`: then it stays out and returns them.
    pub(super) fn enter(&self, deferred: Requests) -> Result<(), Requests> {
        // Published by the exchange below; a sender has acquired IN_GUEST.
        self.interrupt.entering();
        let mut word = self.word.load(Ordering::Relaxed);
        loop {
            let requests = Requests::from_bits_truncate(word) - deferred;
            if !requests.is_empty() {
                return Err(requests);
            }
            match self.word.compare_exchange_weak(word, word | IN_GUEST, Ordering::SeqCst, Ordering::Relaxed)
            {
                Ok(_) => return Ok(()),
                Err(now) => word = now,
            }
        }
    }

    /// Comes out of the guest. Waits for a sender that is at it: one system call's time.
    pub(super) fn leave(&self) {
        let mut word = self.word.load(Ordering::Acquire);
        loop {
            match word & MODE {
                SENDING => {
                    // The sender may need this core to finish.
                    std::thread::yield_now();
                    word = self.word.load(Ordering::Acquire);
                    continue;
                }
                SENT => self.interrupt.take_back(),
                _ => {}
            }
            match self.word.compare_exchange_weak(word, word & !MODE, Ordering::SeqCst, Ordering::Acquire) {
                Ok(_) => return,
                Err(now) => word = now,
            }
        }
    }

    /// Asks for `request` and makes the vCPU leave the guest if it is there. With a lease: only if that is the current.
    pub(super) fn request(&self, request: Requests, lease: Option<u32>) {
        // What the caller changed before (an spte) must be visible before the request is seen to be pending already.
        fence(Ordering::SeqCst);
        let mut word = self.word.load(Ordering::SeqCst);
        let send = loop {
            if lease.is_some_and(|lease| lease != (word >> LEASE_SHIFT) as u32) {
                return;
            }
            if word & request.bits() != 0 {
                // Asked for already. The vCPU is on its way out, or was and goes in once more before it serves it;
                // another interrupt would only delay that.
                return;
            }
            let send = word & MODE == IN_GUEST;
            let mode = if send { SENDING } else { word & MODE };
            let next = word & !MODE | mode | request.bits();
            match self.word.compare_exchange_weak(word, next, Ordering::SeqCst, Ordering::SeqCst) {
                Ok(_) => break send,
                Err(now) => word = now,
            }
        };
        if send {
            self.interrupt.send();
            self.word.fetch_or(SENT, Ordering::SeqCst);
        }
    }

    /// Whether somebody asked for `request`.
    pub(super) fn wants(&self, request: Requests) -> bool {
        self.word.load(Ordering::SeqCst) & request.bits() != 0
    }

    /// Forgets requests that have been served.
    pub(super) fn take(&self, requests: Requests) {
        self.word.fetch_and(!requests.bits(), Ordering::SeqCst);
    }

    /// Whether the vCPU is outside the guest, or has served `request` and gone in again.
    pub(super) fn is_out(&self, request: Requests) -> bool {
        let word = self.word.load(Ordering::SeqCst);
        word & MODE == OUTSIDE || word & request.bits() == 0
    }
}

/// Kicks one lease of one vCPU.
#[derive(Debug)]
pub(super) struct Kicker {
    pub(super) state: Arc<RunState>,
    pub(super) lease: u32,
    pub(super) faults: Faults,
}

impl Kick for Kicker {
    fn kick(&self) {
        self.faults.hit(&KICK);
        self.state.request(Requests::KICK, Some(self.lease));
    }

    fn cpu_time_outside(&self) -> Duration {
        self.state.interrupt.cpu_time_outside()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    /// Notes what is called.
    #[derive(Debug, Clone, Default)]
    struct Noted(Arc<Mutex<Vec<&'static str>>>);

    impl Interrupt for Noted {
        fn entering(&self) {
            self.0.lock().unwrap().push("entering");
        }

        fn send(&self) {
            self.0.lock().unwrap().push("send");
        }

        fn take_back(&self) {
            self.0.lock().unwrap().push("take back");
        }
    }

    impl Noted {
        fn drain(&self) -> Vec<&'static str> {
            std::mem::take(&mut self.0.lock().unwrap())
        }
    }

    #[test]
    fn only_a_vcpu_in_the_guest_is_interrupted_and_once() {
        let noted = Noted::default();
        let state = RunState::new(noted.clone());
        state.request(Requests::KICK, None);
        assert!(noted.drain().is_empty());
        assert_eq!(state.enter(Requests::empty()), Err(Requests::KICK));
        state.take(Requests::KICK);
        noted.drain();

        state.enter(Requests::empty()).unwrap();
        state.request(Requests::KICK, None);
        state.request(Requests::KICK, None);
        state.request(Requests::FLUSH, None);
        assert!(!state.is_out(Requests::KICK));
        state.leave();
        assert!(state.is_out(Requests::KICK));
        assert_eq!(noted.drain(), ["entering", "send", "take back"]);
        assert_eq!(state.enter(Requests::KICK), Err(Requests::FLUSH));
    }

    #[test]
    fn nothing_is_taken_back_that_was_not_sent() {
        let noted = Noted::default();
        let state = RunState::new(noted.clone());
        state.enter(Requests::empty()).unwrap();
        state.leave();
        assert_eq!(noted.drain(), ["entering"]);
    }

    #[test]
    fn a_kicker_of_an_earlier_lease_does_nothing() {
        let noted = Noted::default();
        let state = Arc::new(RunState::new(noted.clone()));
        let lease = state.begin_lease();
        let kicker = Kicker { state: Arc::clone(&state), lease, faults: Faults::default() };
        state.begin_lease();
        state.enter(Requests::empty()).unwrap();
        kicker.kick();
        assert!(!state.wants(Requests::KICK));
        assert_eq!(noted.drain(), ["entering"]);
    }
}
