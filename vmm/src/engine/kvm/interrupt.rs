// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Interrupting KVM_RUN: `immediate_exit`, and a signal to the vCPU's thread.
//!
//! * `immediate_exit` covers a thread that has entered but not yet reached the check in KVM_RUN; the signal covers one that
//!   is past it. A signal that arrives after KVM_RUN came back for another reason interrupts nothing.
//! * A sender is at it while the vCPU's thread is inside [`run`](crate::engine::Vcpu::run) (see [`kick`](crate::engine::kick)).
//!   So the signal never goes to a thread that ended, nor to a recycled thread id; and the sender's pointer to
//!   `immediate_exit` is good, because the vCPU cannot be dropped under it.

use super::error::KvmError;
use crate::engine::kick::Interrupt;
use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicU8, Ordering};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler, unblock_signal};

/// The signal that interrupts KVM_RUN: the first real-time signal that libc leaves to programs.
fn kick_signal() -> c_int {
    SIGRTMIN()
}

/// Nothing to do: that the signal was delivered is what ends KVM_RUN.
extern "C" fn on_kick(_: c_int, _: *mut libc::siginfo_t, _: *mut c_void) {}

/// Installs the handler of the kick signal, once a process.
pub(super) fn install_handler() -> Result<(), KvmError> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    INSTALLED
        .get_or_init(|| register_signal_handler(kick_signal(), on_kick).map_err(|error| error.errno()))
        .map_err(|errno| KvmError::host("installing the kick signal's handler", None, errno))
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

/// How a vCPU of KVM is interrupted.
#[derive(Debug)]
pub(super) struct KvmInterrupt {
    /// The thread inside `run`; meaningful from [`entering`](Interrupt::entering) until it has left.
    tid: AtomicI32,
    /// `kvm_run.immediate_exit`, through a mapping of its own; outlives that.
    immediate_exit: AtomicPtr<u8>,
}

impl KvmInterrupt {
    /// For the vCPU with this `immediate_exit`.
    ///
    /// # Safety
    /// `immediate_exit` must be valid for atomic access whenever a thread is between the `enter` and the `leave` of the
    /// [`RunState`](crate::engine::kick::RunState) that this is for.
    pub(super) unsafe fn new(immediate_exit: *mut u8) -> Self {
        Self { tid: AtomicI32::new(0), immediate_exit: AtomicPtr::new(immediate_exit) }
    }

    fn set_immediate_exit(&self, value: u8) {
        let at = self.immediate_exit.load(Ordering::Relaxed);
        // SAFETY: called with the mode SENDING or SENT only, where the pointer is valid (contract of `new`).
        let byte = unsafe { AtomicU8::from_ptr(at) };
        byte.store(value, Ordering::SeqCst);
    }
}

impl Interrupt for KvmInterrupt {
    fn entering(&self) {
        self.tid.store(kickable_thread(), Ordering::Relaxed);
    }

    fn send(&self) {
        self.set_immediate_exit(1);
        let (process, signal) = (std::process::id(), kick_signal());
        let tid = self.tid.load(Ordering::Relaxed);
        // SAFETY: takes plain numbers. The thread is alive: it waits for SENT before it leaves `run`.
        let result = unsafe { libc::syscall(libc::SYS_tgkill, process, tid, signal) };
        if result != 0 {
            // The queue of real-time signals may be full (RLIMIT_SIGPENDING); one that is queued does the job.
            log::warn!("cannot signal thread {tid}: {}", std::io::Error::last_os_error());
        }
    }

    fn take_back(&self) {
        self.set_immediate_exit(0);
    }
}
