// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `crate::sync` for loom: its locks, threads and atomics, as they are, behind our interface.
//!
//! `Arc` is the standard library's: loom's cannot hold a trait object. So what loom does not see is when the last reference
//! goes; what is freed or taken back is modelled by loom's own cells instead (see the models).
//!
//! loom takes sequentially consistent *operations* for acquire and release ones; its fences are exact. The code under test uses
//! no such operation, only fences ([`AsymmetricFence`], here a full fence on both sides).

use std::time::Duration;

pub use loom::sync::{MutexGuard, RwLockReadGuard, RwLockWriteGuard};
pub use std::sync::{Arc, Weak};

/// Atomics and fences.
pub mod atomic {
    pub use loom::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};
}

/// Spinning.
pub mod hint {
    pub use loom::hint::spin_loop;
}

/// Threads. None has a time: a sleep is a yield.
pub mod thread {
    pub use loom::thread::{Builder, JoinHandle, ThreadId, current, spawn, yield_now};

    /// Lets the others run.
    pub fn sleep(_: std::time::Duration) {
        yield_now();
    }
}

/// A pair of fences that are full on both sides.
#[derive(Debug, Clone, Copy, Default)]
pub struct AsymmetricFence;

impl AsymmetricFence {
    /// The cheap side.
    pub fn light(self) {
        atomic::fence(atomic::Ordering::SeqCst);
    }
    /// The dear side.
    pub fn heavy(self) {
        atomic::fence(atomic::Ordering::SeqCst);
    }
}

/// Threads that a model may have, its main thread included.
pub const THREADS: usize = 4;

/// A value per thread and object. As in the `thread_local` crate, a value is published by a store that releases, and who
/// visits them acquires: one that is made meanwhile may be missed.
#[derive(Debug)]
pub struct PerThread<T> {
    /// Who has which slot.
    owners: std::sync::Mutex<Vec<loom::thread::ThreadId>>,
    slots: [Slot<T>; THREADS],
}

#[derive(Debug, Default)]
struct Slot<T> {
    present: atomic::AtomicBool,
    value: T,
}

impl<T: Default> Default for PerThread<T> {
    fn default() -> Self {
        let slots = std::array::from_fn(|_| Slot::default());
        Self { owners: std::sync::Mutex::default(), slots }
    }
}

impl<T: Default + Send + Sync> PerThread<T> {
    /// This thread's value.
    pub fn get(&self) -> &T {
        let id = loom::thread::current().id();
        let (slot, new) = {
            let mut owners = self.owners.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            match owners.iter().position(|&owner| owner == id) {
                Some(slot) => (slot, false),
                None => {
                    owners.push(id);
                    (owners.len() - 1, true)
                }
            }
        };
        let slot = &self.slots[slot];
        if new {
            slot.present.store(true, atomic::Ordering::Release);
        }
        &slot.value
    }

    /// Calls `visit` with the value of each thread that has one by now.
    pub fn for_each(&self, mut visit: impl FnMut(&T)) {
        for slot in &self.slots {
            if slot.present.load(atomic::Ordering::Acquire) {
                visit(&slot.value);
            }
        }
    }
}

fn unpoisoned<T>(result: std::sync::LockResult<T>) -> T {
    result.unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// A mutual-exclusion lock.
#[derive(Debug, Default)]
pub struct Mutex<T>(loom::sync::Mutex<T>);

impl<T> Mutex<T> {
    /// A lock around `value`.
    pub fn new(value: T) -> Self {
        Self(loom::sync::Mutex::new(value))
    }
    /// Waits for the lock.
    pub fn lock(&self) -> MutexGuard<'_, T> {
        unpoisoned(self.0.lock())
    }
}

/// A readers-writer lock.
#[derive(Debug, Default)]
pub struct RwLock<T>(loom::sync::RwLock<T>);

impl<T> RwLock<T> {
    /// A lock around `value`.
    pub fn new(value: T) -> Self {
        Self(loom::sync::RwLock::new(value))
    }
    /// Waits for shared access.
    pub fn read(&self) -> RwLockReadGuard<'_, T> {
        unpoisoned(self.0.read())
    }
    /// Waits for exclusive access.
    pub fn write(&self) -> RwLockWriteGuard<'_, T> {
        unpoisoned(self.0.write())
    }
}

/// A condition variable for [`Mutex`].
#[derive(Debug, Default)]
pub struct Condvar(loom::sync::Condvar);

impl Condvar {
    /// A condition nobody waits for yet.
    pub fn new() -> Self {
        Self(loom::sync::Condvar::new())
    }
    /// Lets go of the lock and sleeps until notified.
    pub fn wait<'a, T>(&self, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
        unpoisoned(self.0.wait(guard))
    }
    /// As [`wait`](Self::wait): no time passes here, so the timeout never comes.
    pub fn wait_timeout<'a, T>(&self, guard: MutexGuard<'a, T>, _: Duration) -> MutexGuard<'a, T> {
        self.wait(guard)
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
