// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `crate::sync` for shuttle: its locks and threads, and atomics that offer it a scheduling point.
//!
//! # Atomics
//! shadow-mmu lays tables of atomics over raw frame memory, so an atomic must be no larger than its value. These are
//! `repr(transparent)` around the standard library's, and before each operation they call into shuttle's scheduler. shuttle
//! runs one task at a time, so every operation is sequentially consistent; what weaker orderings allow is loom's business.
//!
//! A `Relaxed` operation offers no scheduling point. In shadow-mmu it is either a counter, or ordered by something that does
//! offer one: a lock, a fence, a stronger operation on the same word. So nothing that a schedule could show is lost, and
//! filling a frame with poison costs one step and not 512.
//!
//! Points are off until [`points`] turns them on for this thread: while a machine is built or checked nobody else runs.

use std::cell::Cell;
use std::time::Duration;

pub use shuttle::sync::{MutexGuard, RwLockReadGuard, RwLockWriteGuard};
pub use shuttle::thread_local;
use std::sync::TryLockError;
pub use std::sync::{Arc, Weak};

std::thread_local! {
    static POINTS: Cell<bool> = const { Cell::new(false) };
}

/// Whether operations on atomics are scheduling points.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Points {
    /// They are.
    On,
    /// They are not: only one task is alive.
    Off,
}

/// From now on, atomics of this OS thread do as told.
pub fn points(points: Points) {
    POINTS.set(points == Points::On);
}

fn point() {
    if POINTS.get() {
        // shuttle's sleep is a switch and nothing else. A yield would not do: PCT takes it for a spin loop and puts the
        // task behind all others.
        shuttle::thread::sleep(Duration::ZERO);
    }
}

/// Atomics and fences.
pub mod atomic {
    use super::point;
    pub use std::sync::atomic::Ordering;

    fn point_unless_relaxed(order: Ordering) {
        if order != Ordering::Relaxed {
            point();
        }
    }

    /// A fence. It does nothing, for every operation is sequentially consistent; others may run here.
    pub fn fence(order: Ordering) {
        point_unless_relaxed(order);
    }

    macro_rules! atomic {
        ($name:ident, $value:ty) => {
            /// The standard library's, with a scheduling point before each operation that is not `Relaxed`.
            #[derive(Debug, Default)]
            #[repr(transparent)]
            pub struct $name(std::sync::atomic::$name);

            impl $name {
                /// Holds `value`.
                pub const fn new(value: $value) -> Self {
                    Self(std::sync::atomic::$name::new(value))
                }
                /// Loads.
                pub fn load(&self, order: Ordering) -> $value {
                    point_unless_relaxed(order);
                    self.0.load(order)
                }
                /// Stores.
                pub fn store(&self, value: $value, order: Ordering) {
                    point_unless_relaxed(order);
                    self.0.store(value, order);
                }
                /// Exchanges.
                pub fn swap(&self, value: $value, order: Ordering) -> $value {
                    point_unless_relaxed(order);
                    self.0.swap(value, order)
                }
                /// Exchanges if it is as expected.
                pub fn compare_exchange(
                    &self,
                    current: $value,
                    new: $value,
                    success: Ordering,
                    failure: Ordering,
                ) -> Result<$value, $value> {
                    point_unless_relaxed(success);
                    self.0.compare_exchange(current, new, success, failure)
                }
                /// Exchanges if it is as expected. Does not fail without reason.
                pub fn compare_exchange_weak(
                    &self,
                    current: $value,
                    new: $value,
                    success: Ordering,
                    failure: Ordering,
                ) -> Result<$value, $value> {
                    self.compare_exchange(current, new, success, failure)
                }
                atomic!(@fetch $name, $value, fetch_and fetch_or fetch_xor);
                /// Changes it until nobody came in between.
                pub fn fetch_update(
                    &self,
                    success: Ordering,
                    failure: Ordering,
                    mut change: impl FnMut($value) -> Option<$value>,
                ) -> Result<$value, $value> {
                    let mut old = self.load(failure);
                    while let Some(new) = change(old) {
                        match self.compare_exchange(old, new, success, failure) {
                            Ok(old) => return Ok(old),
                            Err(now) => old = now,
                        }
                    }
                    Err(old)
                }
                /// The value, to change.
                pub fn get_mut(&mut self) -> &mut $value {
                    self.0.get_mut()
                }
            }
        };
        (@fetch $name:ident, $value:ty, $($operation:ident)*) => {
            $(
                /// As the standard library's.
                pub fn $operation(&self, value: $value, order: Ordering) -> $value {
                    point_unless_relaxed(order);
                    self.0.$operation(value, order)
                }
            )*
        };
        (integer $name:ident, $value:ty) => {
            atomic!($name, $value);
            impl $name {
                atomic!(@fetch $name, $value, fetch_add fetch_sub fetch_max fetch_min);
            }
        };
    }

    atomic!(AtomicBool, bool);
    atomic!(integer AtomicU32, u32);
    atomic!(integer AtomicU64, u64);
    atomic!(integer AtomicUsize, usize);

    /// The standard library's, with a scheduling point before each operation that is not `Relaxed`.
    #[derive(Debug)]
    #[repr(transparent)]
    pub struct AtomicPtr<T>(std::sync::atomic::AtomicPtr<T>);

    impl<T> AtomicPtr<T> {
        /// Holds `value`.
        pub const fn new(value: *mut T) -> Self {
            Self(std::sync::atomic::AtomicPtr::new(value))
        }
        /// Loads.
        pub fn load(&self, order: Ordering) -> *mut T {
            point_unless_relaxed(order);
            self.0.load(order)
        }
        /// Stores.
        pub fn store(&self, value: *mut T, order: Ordering) {
            point_unless_relaxed(order);
            self.0.store(value, order);
        }
        /// Exchanges.
        pub fn swap(&self, value: *mut T, order: Ordering) -> *mut T {
            point_unless_relaxed(order);
            self.0.swap(value, order)
        }
        /// The value, to change.
        pub fn get_mut(&mut self) -> &mut *mut T {
            self.0.get_mut()
        }
    }
}

/// The two fences, of which neither has anything to order here; others may run at both.
#[derive(Debug, Clone, Copy, Default)]
pub struct AsymmetricFence;

impl AsymmetricFence {
    /// The cheap side.
    pub fn light(self) {
        point();
    }
    /// The dear side.
    pub fn heavy(self) {
        point();
    }
}

/// Spinning.
pub mod hint {
    /// Lets the others run: who spins waits for one of them.
    pub fn spin_loop() {
        shuttle::thread::yield_now();
    }
}

/// Threads. None has a time: a sleep is a yield.
pub mod thread {
    use std::time::Duration;

    pub use shuttle::thread::{Builder, JoinHandle, Thread, ThreadId, current, park, spawn, yield_now};

    /// Lets the others run.
    pub fn sleep(_: Duration) {
        yield_now();
    }
}

/// A value per thread and object.
#[derive(Debug)]
pub struct PerThread<T> {
    /// By number of the task. Boxed, and none is removed before all are: so references to them may be given out.
    #[allow(clippy::vec_box, reason = "the values must stay where they are when the list grows")]
    values: std::sync::Mutex<Vec<(usize, Box<T>)>>,
}

impl<T> Default for PerThread<T> {
    fn default() -> Self {
        Self { values: std::sync::Mutex::default() }
    }
}

impl<T: Default + Send + Sync> PerThread<T> {
    /// This thread's value, made if there is none.
    pub fn get(&self) -> &T {
        let task = usize::from(shuttle::thread::current().id());
        let mut values = unpoisoned(self.values.lock());
        let known = values.iter().find(|(owner, _)| *owner == task).map(|(_, value)| &raw const **value);
        let value = known.unwrap_or_else(|| {
            let value = Box::<T>::default();
            let at = &raw const *value;
            values.push((task, value));
            at
        });
        // SAFETY: the value is in a box that is dropped with `self`, and `self` is borrowed for as long as the reference
        // lives. Only shared references to it are given out.
        unsafe { &*value }
    }

    /// Calls `visit` with the value of each thread that has one by now.
    pub fn for_each(&self, mut visit: impl FnMut(&T)) {
        let values: Vec<*const T> =
            unpoisoned(self.values.lock()).iter().map(|(_, value)| &raw const **value).collect();
        for value in values {
            // SAFETY: as in `get`. The lock is not held: `visit` may wait for other tasks, which may need it.
            visit(unsafe { &*value });
        }
    }
}

fn unpoisoned<T>(result: std::sync::LockResult<T>) -> T {
    result.unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// A mutual-exclusion lock.
#[derive(Debug, Default)]
pub struct Mutex<T: ?Sized>(shuttle::sync::Mutex<T>);

impl<T> Mutex<T> {
    /// A lock around `value`.
    pub const fn new(value: T) -> Self {
        Self(shuttle::sync::Mutex::new(value))
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
pub struct RwLock<T: ?Sized>(shuttle::sync::RwLock<T>);

impl<T> RwLock<T> {
    /// A lock around `value`.
    pub const fn new(value: T) -> Self {
        Self(shuttle::sync::RwLock::new(value))
    }
}

impl<T: ?Sized> RwLock<T> {
    /// Waits for shared access.
    pub fn read(&self) -> RwLockReadGuard<'_, T> {
        unpoisoned(self.0.read())
    }
    /// Waits for exclusive access.
    pub fn write(&self) -> RwLockWriteGuard<'_, T> {
        unpoisoned(self.0.write())
    }
    /// Shared access, if nobody has to be waited for.
    pub fn try_read(&self) -> Option<RwLockReadGuard<'_, T>> {
        match self.0.try_read() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(error)) => Some(error.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }
    /// Exclusive access, if nobody has to be waited for.
    pub fn try_write(&self) -> Option<RwLockWriteGuard<'_, T>> {
        match self.0.try_write() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(error)) => Some(error.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }
}

/// A condition variable for [`Mutex`].
#[derive(Debug, Default)]
pub struct Condvar(shuttle::sync::Condvar);

impl Condvar {
    /// A condition nobody waits for yet.
    pub const fn new() -> Self {
        Self(shuttle::sync::Condvar::new())
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
