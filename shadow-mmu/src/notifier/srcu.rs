// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Sleepable read-copy-update: readers may sleep, and a writer can wait until every read section that was open when it asked
//! has ended. What `kernel/rcu/srcutree.c` promises, by the means of a userspace RCU with one record a thread and
//! `membarrier(2)` (Desnoyers and others, "User-Level Implementations of Read-Copy Update", 2012).
//!
//! # Protocol
//! Each thread has a record in each domain that it reads in: the *epoch* at which its outermost section began, or 0 outside.
//!
//! ```text
//! reader                                   writer
//! R1  record = epoch      (release)        W1  publish the new
//! R2  light fence                          W2  target = ++epoch
//! R3  load what was published, use it      W3  heavy fence
//! R4  record = 0          (release)        W4  wait until each record is 0 or >= target
//!                                          W5  free the old
//! ```
//! * *A section that the writer does not wait for does not see the old.* The record was 0 at W4: then R1 came after W4 looked,
//!   and by the two fences R3 comes after W1. Or it was >= target: then R1 read the epoch of W2, which is behind W1.
//! * *A section that it does wait for is over before W5*: R4 releases what R3 did, W4 acquires it.
//! * *Nobody starves.* A section that begins after W2 has an epoch that W4 does not wait for. Epochs are 64 bits and do not wrap.
//!   Any number of writers may wait at once; they share nothing but the counter.
//!
//! Sections nest and end in any order: the record also counts those that are open, and only the first and the last of them take
//! part in this.
//!
//! A reader makes a few stores to a cache line that is its own, and no locked instruction: wait-free, and as fast in parallel as
//! alone. The writer pays: a microsecond or so for the fence on every CPU, and the longest section.

use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::thread::ThreadId;
use crate::sync::{Arc, AsymmetricFence, Condvar, Mutex, PerThread, hint, thread};
use std::collections::VecDeque;
use std::fmt;
use std::marker::PhantomData;
use std::time::Duration;

/// Outside of any section.
const IDLE: u64 = 0;

/// A thread's state in a domain, alone on its cache lines (CPUs fetch them in pairs). Written by its thread only.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Record {
    /// The epoch at which the outermost section began, or [`IDLE`].
    since: AtomicU64,
    /// Sections that are open.
    depth: AtomicU64,
}

type Callback = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct Queue {
    callbacks: VecDeque<Callback>,
    /// Who runs callbacks, from the first that it takes to the last that it finds; at most one.
    worker: Option<ThreadId>,
}

impl fmt::Debug for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} callbacks queued, worker {:?}", self.callbacks.len(), self.worker)
    }
}

#[derive(Debug)]
struct Domain {
    records: PerThread<Record>,
    /// Never [`IDLE`].
    epoch: AtomicU64,
    fence: AsymmetricFence,
    queue: Mutex<Queue>,
    drained: Condvar,
}

/// A domain of read sections and of those who wait for them.
#[derive(Debug)]
pub struct Srcu {
    domain: Arc<Domain>,
}

impl Default for Srcu {
    fn default() -> Self {
        Self::new()
    }
}

/// A read section; over when dropped. Sections of one thread may be dropped in any order.
#[derive(Debug)]
#[must_use = "the section is over when this is dropped"]
pub struct Section<'a> {
    record: &'a Record,
    /// Keeps it on the thread whose record it is.
    _thread: PhantomData<*const ()>,
}

impl Drop for Section<'_> {
    #[inline]
    fn drop(&mut self) {
        let depth = self.record.depth.load(Ordering::Relaxed) - 1;
        self.record.depth.store(depth, Ordering::Relaxed);
        if depth == 0 {
            self.record.since.store(IDLE, Ordering::Release);
        }
    }
}

impl Srcu {
    /// A domain nobody reads in.
    pub fn new() -> Self {
        Self {
            domain: Arc::new(Domain {
                records: PerThread::default(),
                epoch: AtomicU64::new(IDLE + 1),
                fence: AsymmetricFence::default(),
                queue: Mutex::default(),
                drained: Condvar::new(),
            }),
        }
    }

    /// Opens a read section. Sections nest.
    #[inline]
    pub fn enter(&self) -> Section<'_> {
        let record = self.domain.records.get();
        let depth = record.depth.load(Ordering::Relaxed);
        record.depth.store(depth + 1, Ordering::Relaxed);
        if depth == 0 {
            // Release, and acquire of the epoch: whoever sees this epoch sees that our last section is over, and we see
            // what was published before it began.
            record.since.store(self.domain.epoch.load(Ordering::Acquire), Ordering::Release);
            self.domain.fence.light();
        }
        Section { record, _thread: PhantomData }
    }

    /// Whether this thread is in a read section of this domain, so that waiting for one would never end.
    pub fn inside_read_section(&self) -> bool {
        self.domain.records.get().depth.load(Ordering::Relaxed) > 0
    }

    /// Returns when every read section that was open at the call has ended.
    ///
    /// # Panics
    /// In debug builds, if this thread is in a read section: it would wait for itself.
    pub fn synchronize(&self) {
        debug_assert!(!self.inside_read_section(), "synchronize inside a read section waits for itself");
        self.domain.synchronize();
    }

    /// Calls `callback`, on another thread, when every read section that is open now has ended. It must be quick, must not
    /// panic, and must not wait for this domain.
    pub fn call(&self, callback: impl FnOnce() + Send + 'static) {
        let mut queue = self.domain.queue.lock();
        queue.callbacks.push_back(Box::new(callback));
        if queue.worker.is_none() {
            let domain = Arc::clone(&self.domain);
            let worker = thread::Builder::new().name("srcu".into()).spawn(move || domain.run_callbacks());
            match worker {
                Ok(worker) => queue.worker = Some(worker.thread().id()),
                // It is done by the next call that gets one, or by a barrier.
                Err(error) => log::warn!("no thread for callbacks of the notifier layer: {error}"),
            }
        }
    }

    /// Returns when every callback queued before has run (`srcu_barrier`). At once inside a callback, which would wait for
    /// itself.
    pub fn barrier(&self) {
        if self.inside_callback() {
            return;
        }
        loop {
            let mut queue = self.domain.queue.lock();
            while queue.worker.is_some() {
                queue = self.domain.drained.wait(queue);
            }
            if queue.callbacks.is_empty() {
                return;
            }
            // Nobody got to run them.
            queue.worker = Some(thread::current().id());
            drop(queue);
            self.domain.run_callbacks();
        }
    }

    /// Whether this thread runs callbacks of this domain.
    pub fn inside_callback(&self) -> bool {
        self.domain.queue.lock().worker == Some(thread::current().id())
    }
}

/// A worker at work. One that ends by a panic leaves the rest of the callbacks to the next.
struct Worker<'a>(&'a Domain);

impl Drop for Worker<'_> {
    fn drop(&mut self) {
        self.0.queue.lock().worker = None;
        self.0.drained.notify_all();
    }
}

impl Domain {
    fn synchronize(&self) {
        let target = self.epoch.fetch_add(1, Ordering::AcqRel) + 1;
        self.fence.heavy();
        self.records.for_each(|record| {
            for round in 0u32.. {
                let since = record.since.load(Ordering::Acquire);
                if since == IDLE || since >= target {
                    return;
                }
                // Most sections end within a microsecond; those that sleep may take their time.
                match round {
                    0..100 => hint::spin_loop(),
                    100..200 => thread::yield_now(),
                    _ => thread::sleep(Duration::from_micros(50)),
                }
            }
        });
    }

    /// Runs callbacks until there are none. The caller is, or is about to be, noted as the worker.
    fn run_callbacks(&self) {
        let worker = Worker(self);
        loop {
            let ready = {
                let mut queue = self.queue.lock();
                if queue.callbacks.is_empty() {
                    // Under the lock that found none: a call that comes now finds no worker and makes one.
                    queue.worker = None;
                    std::mem::forget(worker);
                    self.drained.notify_all();
                    return;
                }
                queue.callbacks.len()
            };
            self.synchronize();
            for _ in 0..ready {
                // One by one, so that what a panic leaves is still in the queue.
                let callback = self.queue.lock().callbacks.pop_front();
                callback.into_iter().for_each(|callback| callback());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed test may panic")]
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicUsize};
    use std::sync::mpsc;

    /// A section of another thread, open until the sender is dropped; it sets the flag as the last thing inside.
    fn hold(srcu: &Arc<Srcu>) -> (mpsc::Sender<()>, Arc<AtomicBool>) {
        let (release, released) = mpsc::channel::<()>();
        let (opened, open) = mpsc::channel();
        let over = Arc::new(AtomicBool::new(false));
        let (srcu, flag) = (Arc::clone(srcu), Arc::clone(&over));
        std::thread::spawn(move || {
            let _section = srcu.enter();
            opened.send(()).unwrap();
            let _ = released.recv();
            flag.store(true, Ordering::SeqCst);
        });
        open.recv().unwrap();
        (release, over)
    }

    #[test]
    fn synchronize_waits_for_open_sections() {
        let srcu = Arc::new(Srcu::new());
        let (release, over) = hold(&srcu);
        let waiter = {
            let (srcu, over) = (Arc::clone(&srcu), Arc::clone(&over));
            std::thread::spawn(move || {
                srcu.synchronize();
                assert!(over.load(Ordering::SeqCst), "synchronize returned before the section ended");
            })
        };
        std::thread::sleep(Duration::from_millis(20));
        assert!(!waiter.is_finished());
        drop(release);
        waiter.join().unwrap();
    }

    #[test]
    fn a_section_that_began_later_is_not_waited_for() {
        let srcu = Arc::new(Srcu::new());
        let (first, _) = hold(&srcu);
        let (done, finished) = mpsc::channel();
        {
            let srcu = Arc::clone(&srcu);
            std::thread::spawn(move || {
                srcu.synchronize();
                done.send(()).unwrap();
            });
        }
        // Once the epoch moved, the waiter has its target.
        while srcu.domain.epoch.load(Ordering::SeqCst) == 1 {
            std::thread::yield_now();
        }
        let (second, over) = hold(&srcu);
        drop(first);
        finished.recv_timeout(Duration::from_secs(60)).unwrap();
        assert!(!over.load(Ordering::SeqCst), "the second section is still open");
        drop(second);
    }

    #[test]
    fn sections_nest_and_end_in_any_order() {
        let srcu = Srcu::new();
        let (first, second) = (srcu.enter(), srcu.enter());
        drop(first);
        assert!(srcu.inside_read_section(), "the second section is still open");
        let record = srcu.domain.records.get();
        assert_ne!(record.since.load(Ordering::SeqCst), IDLE);
        drop(second);
        assert!(!srcu.inside_read_section());
        assert_eq!(record.since.load(Ordering::SeqCst), IDLE);
        srcu.synchronize();
    }

    #[test]
    fn domains_do_not_wait_for_each_other() {
        let srcu = Arc::new(Srcu::new());
        let (release, over) = hold(&srcu);
        let _section = srcu.enter();
        Srcu::new().synchronize();
        assert!(!over.load(Ordering::SeqCst));
        drop(release);
    }

    #[test]
    fn a_callback_runs_after_the_sections_that_were_open() {
        let srcu = Arc::new(Srcu::new());
        let (release, over) = hold(&srcu);
        let (ran, result) = mpsc::channel();
        srcu.call(move || ran.send(over.load(Ordering::SeqCst)).unwrap());
        assert!(result.try_recv().is_err());
        drop(release);
        srcu.barrier();
        assert_eq!(
            result.try_recv(),
            Ok(true),
            "the barrier waits for the callback, the callback for the section"
        );
    }

    #[test]
    fn a_callback_that_waits_for_callbacks_does_not_wait_for_itself() {
        let srcu = Arc::new(Srcu::new());
        let (ran, result) = mpsc::channel();
        let inner = Arc::clone(&srcu);
        srcu.call(move || {
            inner.barrier();
            ran.send(inner.inside_callback()).unwrap();
        });
        assert_eq!(result.recv_timeout(Duration::from_secs(60)), Ok(true));
        srcu.barrier();
        assert!(!srcu.inside_callback());
    }

    #[test]
    fn a_callback_that_panics_takes_no_other_with_it() {
        let srcu = Srcu::new();
        let (ran, result) = mpsc::channel();
        // The first waits until the others are queued.
        let (go, wait) = mpsc::channel::<()>();
        srcu.call(move || wait.recv().unwrap());
        srcu.call(|| std::panic::resume_unwind(Box::new("on purpose")));
        srcu.call(move || ran.send(()).unwrap());
        go.send(()).unwrap();
        // What the worker left when it died is run by who waits for it.
        srcu.barrier();
        assert_eq!(result.try_recv(), Ok(()));
    }

    #[test]
    fn what_is_retired_behind_synchronize_is_never_seen_by_a_reader() {
        let srcu = Arc::new(Srcu::new());
        let live: Arc<Vec<AtomicU64>> = Arc::new((0..64).map(|_| AtomicU64::new(1)).collect());
        let current = Arc::new(AtomicUsize::new(0));
        let readers: Vec<_> = (0..4)
            .map(|_| {
                let (srcu, live, current) = (Arc::clone(&srcu), Arc::clone(&live), Arc::clone(&current));
                std::thread::spawn(move || {
                    while current.load(Ordering::SeqCst) + 1 < live.len() {
                        let _section = srcu.enter();
                        let at = current.load(Ordering::Relaxed);
                        std::thread::yield_now();
                        let slot = live[at].load(Ordering::SeqCst);
                        assert_eq!(slot, 1, "slot {at} was retired under a reader");
                    }
                })
            })
            .collect();
        for at in 0..live.len() - 1 {
            current.store(at + 1, Ordering::SeqCst);
            srcu.synchronize();
            live[at].store(0, Ordering::SeqCst);
        }
        readers.into_iter().for_each(|reader| reader.join().unwrap());
    }
}
