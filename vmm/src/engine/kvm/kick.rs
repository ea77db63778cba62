// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Making a vCPU leave the guest: one word a vCPU, a signal, and `immediate_exit`.
//!
//! # Protocol
//!
//! [`RunState`] holds one atomic word: the *mode*, the pending *requests*, and the *lease* (which use of the vCPU this
//! is; KVM cannot destroy a vCPU, so one serves many guest threads in turn).
//!
//! ```text
//!            enter (no request pending)            request             signal sent
//!   OUTSIDE ───────────────────────────► IN_GUEST ─────────► SENDING ─────────────► SENT
//!      ▲                                     │ leave                                  │ leave: clears immediate_exit
//!      └─────────────────────────────────────┴────────────────────────────────────────┘
//! ```
//!
//! * The vCPU's thread *enters* by one compare-exchange that fails while a request is pending. So a request made
//!   before the entry is seen by the entry, and one made after it finds IN_GUEST: there is no gap between the two, and
//!   no fence to forget, because both sides work on the same word.
//! * Whoever turns IN_GUEST into SENDING sets `immediate_exit` and sends the signal. `immediate_exit` covers a thread
//!   that has entered but not yet reached the check in KVM_RUN; the signal covers one that is past it. A signal that
//!   arrives after KVM_RUN came back for another reason interrupts nothing.
//! * The thread cannot get out of [`leave`](RunState::leave) while the word says SENDING. So the signal goes to a thread
//!   that is inside [`run`](crate::engine::Vcpu::run): never to one that ended, never to a recycled thread id; and the
//!   sender's pointer to `immediate_exit` is good, because the vCPU cannot be dropped under it.
//! * A request stays in the word until the vCPU's thread takes it. Requests are not counted; one that is pending already
//!   sends no second signal.
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

use super::error::SetupError;
use crate::engine::Kick;
use crate::inject::points::KICK;
use shadow_mmu::inject::Faults;
use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicU8, AtomicU64, Ordering, fence};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler, unblock_signal};

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

/// The signal that interrupts KVM_RUN: the first real-time signal that libc leaves to programs.
fn kick_signal() -> c_int {
    SIGRTMIN()
}

/// Nothing to do: that the signal was delivered is what ends KVM_RUN.
extern "C" fn on_kick(_: c_int, _: *mut libc::siginfo_t, _: *mut c_void) {}

/// Installs the handler of the kick signal, once a process.
pub(super) fn install_handler() -> Result<(), SetupError> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    INSTALLED
        .get_or_init(|| register_signal_handler(kick_signal(), on_kick).map_err(|error| error.errno()))
        .map_err(|errno| SetupError::host("installing the kick signal's handler", None, errno))
}

/// This thread's id, with the kick signal unblocked. One system call pair a thread, not one a run.
fn kickable_thread() -> i32 {
    thread_local!(static TID: Cell<i32> = const { Cell::new(0) });
    TID.with(|tid| {
        if tid.get() == 0 {
            if let Err(error) = unblock_signal(kick_signal()) {
                log::warn!("cannot unblock the kick signal, kicks may be late: {error:?}");
            }
            // SAFETY: takes nothing, cannot fail.
            tid.set(unsafe { libc::gettid() });
        }
        tid.get()
    })
}

/// Where a vCPU is and what others want of it.
#[derive(Debug)]
pub(super) struct RunState {
    word: AtomicU64,
    /// The thread inside `run`; meaningful in every mode but OUTSIDE.
    tid: AtomicI32,
    /// `kvm_run.immediate_exit`, through a mapping of its own; outlives every mode but OUTSIDE.
    immediate_exit: AtomicPtr<u8>,
}

impl RunState {
    /// A vCPU outside the guest, not leased yet.
    ///
    /// # Safety
    /// `immediate_exit` must be valid for atomic access whenever a thread is between [`enter`](Self::enter) and
    /// [`leave`](Self::leave).
    pub(super) unsafe fn new(immediate_exit: *mut u8) -> Self {
        Self {
            word: AtomicU64::new(0),
            tid: AtomicI32::new(0),
            immediate_exit: AtomicPtr::new(immediate_exit),
        }
    }

    fn set_immediate_exit(&self, value: u8) {
        let at = self.immediate_exit.load(Ordering::Relaxed);
        // SAFETY: called with the mode SENDING or SENT only, where the pointer is valid (contract of `new`).
        let byte = unsafe { AtomicU8::from_ptr(at) };
        byte.store(value, Ordering::SeqCst);
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
        // Published by the exchange below; read by a sender after it acquired IN_GUEST.
        self.tid.store(kickable_thread(), Ordering::Relaxed);
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
                SENT => self.set_immediate_exit(0),
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
                // another signal would only delay that.
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
            self.set_immediate_exit(1);
            let (process, signal) = (std::process::id(), kick_signal());
            let tid = self.tid.load(Ordering::Relaxed);
            // SAFETY: takes plain numbers. The thread is alive: it waits for SENT before it leaves `run`.
            let result = unsafe { libc::syscall(libc::SYS_tgkill, process, tid, signal) };
            if result != 0 {
                // The queue of real-time signals may be full (RLIMIT_SIGPENDING); one that is queued does the job.
                log::warn!("cannot signal thread {tid}: {}", std::io::Error::last_os_error());
            }
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
}
