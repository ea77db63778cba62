// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The one place that locks, atomics, threads and fences come from, so that a model checker's can take their place: the
//! crate for the models compiles these same sources with another file here.
//!
//! The locks are the standard library's without poisoning: a panic under a lock is a bug of ours that ends the
//! process's tests; it must not turn every later lock into a second panic.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
pub use std::hint;
use std::ptr;
pub use std::sync::atomic;
pub use std::sync::{Arc, Weak};
use std::sync::{LockResult, OnceLock, PoisonError, TryLockError};
pub use std::sync::{MutexGuard, RwLockReadGuard, RwLockWriteGuard};
pub use std::thread;
pub use std::thread_local;
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

/// One `T` for each thread that asked for one, and for no two threads at once. When a thread has ended, its value serves a
/// later one.
#[derive(Debug)]
pub struct PerThread<T> {
    /// Every value that there ever was. One that nobody else refers to is free to be taken by a new thread.
    values: Mutex<Vec<Arc<T>>>,
    /// Of all that there ever were in this process.
    id: u64,
}

/// This thread's values, by the id of the object; they keep others from taking them while the thread lives.
#[derive(Default)]
struct Mine(HashMap<u64, Arc<dyn Any>>);

impl Drop for Mine {
    fn drop(&mut self) {
        // What is let go here may be somebody else's at once.
        LAST.set(NOTHING);
    }
}

const NOTHING: (u64, *const ()) = (0, ptr::null());

std::thread_local! {
    static MINE: RefCell<Mine> = RefCell::default();
    /// The id of the `PerThread` that this thread asked last, and its value there.
    static LAST: Cell<(u64, *const ())> = const { Cell::new(NOTHING) };
}

impl<T> Default for PerThread<T> {
    fn default() -> Self {
        static NEXT: atomic::AtomicU64 = atomic::AtomicU64::new(1);
        Self { values: Mutex::default(), id: NEXT.fetch_add(1, atomic::Ordering::Relaxed) }
    }
}

impl<T: Default + Send + Sync + 'static> PerThread<T> {
    /// This thread's value.
    #[inline]
    pub fn get(&self) -> &T {
        let (id, value) = LAST.get();
        let value = if id == self.id { value.cast() } else { self.look_up() };
        // SAFETY: from `look_up`, called for this very object, whose id no other has, and so for this type. The object is
        // borrowed, and keeps its values for as long as it lives.
        unsafe { &*value }
    }

    #[cold]
    fn look_up(&self) -> *const T {
        let found = MINE.try_with(|mine| {
            let mine = &mut mine.borrow_mut().0;
            let value = mine.entry(self.id).or_insert_with(|| self.take() as Arc<dyn Any>);
            let value = ptr::from_ref::<dyn Any>(&**value).cast::<T>();
            // Objects that are gone have left their values to us.
            mine.retain(|_, value| Arc::strong_count(value) > 1);
            value
        });
        let value = found.unwrap_or_else(|_| {
            // The thread is ending and has let go of its values already: one that nobody will ever take again.
            let value = Arc::<T>::default();
            self.values.lock().extend([Arc::clone(&value), Arc::clone(&value)]);
            Arc::as_ptr(&value)
        });
        LAST.set((self.id, value.cast()));
        value
    }

    /// A value that no thread has.
    fn take(&self) -> Arc<T> {
        let mut values = self.values.lock();
        // Counted under the lock that clones are made under: 1 means that nobody has it, nor will but through us.
        let free = values.iter().find(|value| Arc::strong_count(value) == 1).cloned();
        // The thread that had it let go with a release.
        atomic::fence(atomic::Ordering::Acquire);
        free.unwrap_or_else(|| {
            let value = Arc::<T>::default();
            values.push(Arc::clone(&value));
            value
        })
    }

    /// Calls `visit` with every thread's value. One that a thread asks for meanwhile may be missed.
    pub fn for_each(&self, mut visit: impl FnMut(&T)) {
        // Without the lock: a visit may take long, and new threads must not wait for it.
        let values = self.values.lock().clone();
        values.iter().for_each(|value| visit(value));
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
    /// Asks the kernel for the heavy fence, once for the process; the first fence that is made does so too. In a process that
    /// has one thread that costs nothing, later some milliseconds: so a program does it first of all.
    pub fn prepare() {
        Self::default();
    }

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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed test may panic")]
    use super::*;
    use std::sync::mpsc;

    fn address<T>(value: &T) -> usize {
        ptr::from_ref(value) as usize
    }

    #[test]
    fn a_thread_has_one_value_an_object_and_shares_it_with_nobody() {
        let (one, other) = (PerThread::<u64>::default(), PerThread::<u64>::default());
        assert_eq!(address(one.get()), address(one.get()));
        assert_ne!(address(one.get()), address(other.get()));
        let together = std::sync::Barrier::new(2);
        thread::scope(|scope| {
            let theirs = scope.spawn(|| address(one.get())).join().unwrap();
            assert_ne!(address(one.get()), theirs);
            // That thread has ended: a new one may have its value, and only one.
            let (sender, both) = mpsc::channel();
            for sender in [sender.clone(), sender] {
                let (one, together) = (&one, &together);
                scope.spawn(move || {
                    sender.send(address(one.get())).unwrap();
                    together.wait();
                });
            }
            let both: Vec<_> = both.iter().collect();
            assert!(both[0] != both[1] && !both.contains(&address(one.get())));
        });
        let mut values = 0;
        one.for_each(|_| values += 1);
        assert_eq!(values, 3, "of four threads, three at most lived at once");
    }

    /// A destructor of a thread-local value that runs after ours.
    #[test]
    fn a_thread_that_is_ending_shares_its_value_with_nobody() {
        struct Late(Arc<PerThread<u64>>, mpsc::Sender<usize>, mpsc::Receiver<()>);
        impl Drop for Late {
            fn drop(&mut self) {
                self.1.send(address(self.0.get())).unwrap();
                self.2.recv().unwrap();
                self.1.send(address(self.0.get())).unwrap();
            }
        }
        std::thread_local! {
            static LATE: RefCell<Option<Late>> = const { RefCell::new(None) };
        }
        let object = Arc::<PerThread<u64>>::default();
        let ((sender, seen), (go, wait)) = (mpsc::channel(), mpsc::channel());
        let ending = {
            let object = Arc::clone(&object);
            thread::spawn(move || {
                LATE.set(Some(Late(Arc::clone(&object), sender, wait)));
                object.get();
            })
        };
        let theirs = seen.recv().unwrap();
        let fresh = {
            let object = Arc::clone(&object);
            thread::spawn(move || (address(object.get()), go.send(()).unwrap()))
        };
        let (fresh, ()) = fresh.join().unwrap();
        assert_eq!(seen.recv().unwrap(), theirs);
        assert_ne!(fresh, theirs, "two threads that live have one value");
        ending.join().unwrap();
    }
}
