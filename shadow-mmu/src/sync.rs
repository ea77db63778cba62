// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The one place that locks, atomics, threads and fences come from, so that a model checker's can take their place: the
//! crate for the models compiles these same sources with another file here.
//!
//! The locks are the standard library's without poisoning: a panic under a lock is a bug of ours that ends the
//! process's tests; it must not turn every later lock into a second panic.

use std::cell::Cell;
pub use std::hint;
use std::ptr;
pub use std::sync::atomic;
pub use std::sync::{Arc, Weak};
use std::sync::{LockResult, OnceLock, PoisonError, TryLockError};
pub use std::sync::{MutexGuard, RwLockReadGuard, RwLockWriteGuard};
pub use std::thread;
use std::time::Duration;

fn unpoisoned<T>(result: LockResult<T>) -> T {
    result.unwrap_or_else(PoisonError::into_inner)
}

/// A mutual-exclusion lock.
#[derive(Debug, Default)]
pub struct Mutex<T: ?Sized>(std::sync::Mutex<T>);

impl<T> Mutex<T> {
    /// A lock around `value`.
    pub const fn new(value: T) -> Self {
        Self(std::sync::Mutex::new(value))
    }
    /// The value, without the lock.
    pub fn into_inner(self) -> T {
        unpoisoned(self.0.into_inner())
    }
}

impl<T: ?Sized> Mutex<T> {
    /// Waits for the lock.
    pub fn lock(&self) -> MutexGuard<'_, T> {
        unpoisoned(self.0.lock())
    }
}

/// A readers-writer lock.
#[derive(Debug, Default)]
pub struct RwLock<T: ?Sized>(std::sync::RwLock<T>);

impl<T> RwLock<T> {
    /// A lock around `value`.
    pub const fn new(value: T) -> Self {
        Self(std::sync::RwLock::new(value))
    }
}

impl<T: ?Sized> RwLock<T> {
    /// Waits for shared access.
    pub fn read(&self) -> RwLockReadGuard<'_, T> {
        unpoisoned(self.0.read())
    }
    /// Shared access if it can be had at once.
    pub fn try_read(&self) -> Option<RwLockReadGuard<'_, T>> {
        match self.0.try_read() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }
    /// Waits for exclusive access.
    pub fn write(&self) -> RwLockWriteGuard<'_, T> {
        unpoisoned(self.0.write())
    }
}

/// A condition variable for [`Mutex`].
#[derive(Debug, Default)]
pub struct Condvar(std::sync::Condvar);

impl Condvar {
    /// A condition nobody waits for yet.
    pub const fn new() -> Self {
        Self(std::sync::Condvar::new())
    }
    /// Lets go of the lock and sleeps until notified.
    pub fn wait<'a, T>(&self, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
        unpoisoned(self.0.wait(guard))
    }
    /// As [`wait`](Self::wait), for at most `timeout`.
    pub fn wait_timeout<'a, T>(&self, guard: MutexGuard<'a, T>, timeout: Duration) -> MutexGuard<'a, T> {
        unpoisoned(self.0.wait_timeout(guard, timeout)).0
    }
    /// Wakes every waiter.
    pub fn notify_all(&self) {
        self.0.notify_all();
    }
    /// Wakes one waiter.
    pub fn notify_one(&self) {
        self.0.notify_one();
    }
}

/// One `T` for each thread that asked for one. A value outlives its thread, and serves a later thread then.
#[derive(Debug)]
pub struct PerThread<T: Send> {
    values: thread_local::ThreadLocal<T>,
    /// Of all that there ever were in this process.
    id: u64,
}

std::thread_local! {
    /// The id of the `PerThread` that this thread asked last, and its value there.
    static LAST: Cell<(u64, *const ())> = const { Cell::new((0, ptr::null())) };
}

impl<T: Send> Default for PerThread<T> {
    fn default() -> Self {
        static NEXT: atomic::AtomicU64 = atomic::AtomicU64::new(1);
        let id = NEXT.fetch_add(1, atomic::Ordering::Relaxed);
        Self { values: thread_local::ThreadLocal::new(), id }
    }
}

impl<T: Default + Send + Sync> PerThread<T> {
    /// This thread's value.
    #[inline]
    pub fn get(&self) -> &T {
        let (id, value) = LAST.get();
        if id != self.id {
            return self.look_up();
        }
        // SAFETY: `look_up` put it there for this very object, whose id no other has, and so for this type; the object keeps
        // its values in place for as long as it lives, and it is borrowed.
        unsafe { &*value.cast() }
    }

    #[cold]
    fn look_up(&self) -> &T {
        let value = self.values.get_or_default();
        LAST.set((self.id, ptr::from_ref(value).cast()));
        value
    }

    /// Calls `visit` with every thread's value. One that a thread asks for meanwhile may be missed.
    pub fn for_each(&self, visit: impl FnMut(&T)) {
        self.values.iter().for_each(visit);
    }
}

/// A pair of fences, of which the *light* one is run often and the *heavy* one seldom. Where one thread runs the light and
/// another the heavy one, it is as if both had run a sequentially consistent fence.
///
/// The light one keeps the compiler from moving accesses; the heavy one makes the kernel run a full fence on every CPU that
/// runs a thread of this process (`membarrier(2)`, private expedited, Linux 4.14). Where the kernel refuses, both are plain
/// fences.
#[derive(Debug, Clone, Copy)]
pub struct AsymmetricFence {
    expedited: bool,
}

impl Default for AsymmetricFence {
    fn default() -> Self {
        static EXPEDITED: OnceLock<bool> = OnceLock::new();
        let register = || membarrier(libc::MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED);
        Self { expedited: *EXPEDITED.get_or_init(register) }
    }
}

impl AsymmetricFence {
    /// The cheap side.
    #[inline]
    pub fn light(self) {
        if self.expedited {
            atomic::compiler_fence(atomic::Ordering::SeqCst);
        } else {
            atomic::fence(atomic::Ordering::SeqCst);
        }
    }

    /// The dear side: 1 to 10 us.
    pub fn heavy(self) {
        atomic::fence(atomic::Ordering::SeqCst);
        // Once registered it cannot be refused; if it were, readers could be missed, and nothing that runs on may rely on them.
        if self.expedited && !membarrier(libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED) {
            log::error!("membarrier(2) is refused after it was granted");
            std::process::abort();
        }
        atomic::fence(atomic::Ordering::SeqCst);
    }
}

/// Whether the kernel did what `command` says.
fn membarrier(command: libc::c_int) -> bool {
    // SAFETY: takes plain numbers and touches no memory.
    unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) == 0 }
}
