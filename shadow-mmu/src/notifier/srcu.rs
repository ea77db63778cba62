// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Sleepable read-copy-update, after `kernel/rcu/srcutree.c`: readers may sleep, and a writer can wait until every read
//! section that was open when it asked has ended.
//!
//! # Protocol
//! Two banks of counters, of which one is current. A reader counts itself in on the current bank and out on the same one.
//! [`Srcu::synchronize`] waits until the other bank is even (readers that took the bank number just before an earlier
//! flip), makes it the current one, and waits until the bank that was current is even. Sums are compared as
//! "all outs, then, behind a full fence, all ins": a reader seen out was seen in, so equality means that the bank was
//! empty at some moment after the wait began.
//!
//! A reader's count-in is sequentially consistent, so either `synchronize` sees it, or the reader sees everything that
//! was published before `synchronize` was called. Counters are spread over cache lines by thread, to be cheap in parallel.

use crate::sync::atomic::{AtomicU64, AtomicUsize, Ordering, fence};
use crate::sync::{Arc, Condvar, Mutex};
use std::cell::Cell;
use std::fmt;
use std::time::Duration;

const SHARDS: usize = 16;

#[derive(Debug, Default)]
#[repr(align(128))]
struct Shard {
    ins: [AtomicU64; 2],
    outs: [AtomicU64; 2],
}

type Callback = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct Queue {
    callbacks: Vec<Callback>,
    /// Callbacks taken from the queue that have not run to their end.
    running: usize,
    worker: bool,
}

impl fmt::Debug for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} callbacks queued, {} running", self.callbacks.len(), self.running)
    }
}

#[derive(Debug, Default)]
struct Domain {
    shards: [Shard; SHARDS],
    current: AtomicUsize,
    /// One grace period at a time.
    grace: Mutex<()>,
    queue: Mutex<Queue>,
    drained: Condvar,
}

/// A domain of read sections and of those who wait for them.
#[derive(Debug, Default)]
pub struct Srcu {
    domain: Arc<Domain>,
}

thread_local! {
    static SHARD: usize = {
        static NEXT: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
        NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed) % SHARDS
    };
    /// Read sections of any domain that this thread is in.
    static NESTED: Cell<usize> = const { Cell::new(0) };
}

/// A read section; it ends when this is dropped, on the thread that opened it.
#[derive(Debug)]
#[must_use = "the read section ends when this is dropped"]
pub struct ReadSection<'a> {
    shard: &'a Shard,
    bank: usize,
    /// Keeps it on its thread.
    _thread: std::marker::PhantomData<*const ()>,
}

impl Srcu {
    /// A domain nobody reads in.
    pub fn new() -> Self {
        Self::default()
    }

    /// Opens a read section. Sections nest.
    pub fn read(&self) -> ReadSection<'_> {
        let shard = &self.domain.shards[SHARD.with(|shard| *shard)];
        let bank = self.domain.current.load(Ordering::Relaxed) & 1;
        shard.ins[bank].fetch_add(1, Ordering::SeqCst);
        NESTED.with(|nested| nested.set(nested.get() + 1));
        ReadSection { shard, bank, _thread: std::marker::PhantomData }
    }

    /// Whether this thread is in a read section of any domain, so that waiting for one may never end.
    pub fn inside_read_section() -> bool {
        NESTED.with(|nested| nested.get() > 0)
    }

    /// Returns when every read section that was open at the call has ended.
    ///
    /// # Panics
    /// In debug builds, if this thread is in a read section: it would wait for itself.
    pub fn synchronize(&self) {
        debug_assert!(!Self::inside_read_section(), "synchronize inside a read section waits for itself");
        self.domain.synchronize();
    }

    /// Calls `callback`, on another thread, when every read section that is open now has ended. It must be quick and must
    /// not wait for this domain.
    pub fn call(&self, callback: impl FnOnce() + Send + 'static) {
        let mut queue = self.domain.queue.lock();
        queue.callbacks.push(Box::new(callback));
        if !queue.worker {
            queue.worker = true;
            let domain = Arc::clone(&self.domain);
            std::thread::spawn(move || domain.run_callbacks());
        }
    }

    /// Returns when every callback queued before has run (`srcu_barrier`).
    pub fn barrier(&self) {
        let mut queue = self.domain.queue.lock();
        while !queue.callbacks.is_empty() || queue.running > 0 {
            queue = self.domain.drained.wait(queue);
        }
    }
}

impl Domain {
    fn synchronize(&self) {
        let _one_at_a_time = self.grace.lock();
        // Pairs with the readers' count-in: what was stored before this call is seen by every reader we do not wait for.
        fence(Ordering::SeqCst);
        let old = self.current.load(Ordering::Relaxed) & 1;
        self.wait_until_even(old ^ 1);
        self.current.store(old ^ 1, Ordering::SeqCst);
        self.wait_until_even(old);
        fence(Ordering::SeqCst);
    }

    fn wait_until_even(&self, bank: usize) {
        let sum = |counters: fn(&Shard) -> &[AtomicU64; 2]| {
            self.shards
                .iter()
                .fold(0u64, |sum, shard| sum.wrapping_add(counters(shard)[bank].load(Ordering::SeqCst)))
        };
        for round in 0u32.. {
            let outs = sum(|shard| &shard.outs);
            fence(Ordering::SeqCst);
            if outs == sum(|shard| &shard.ins) {
                return;
            }
            // Most sections end within a microsecond; those that sleep may take their time.
            match round {
                0..100 => std::hint::spin_loop(),
                100..200 => std::thread::yield_now(),
                _ => std::thread::sleep(Duration::from_micros(50)),
            }
        }
    }

    fn run_callbacks(&self) {
        loop {
            let callbacks = {
                let mut queue = self.queue.lock();
                queue.running = 0;
                if queue.callbacks.is_empty() {
                    queue.worker = false;
                    self.drained.notify_all();
                    return;
                }
                queue.running = queue.callbacks.len();
                std::mem::take(&mut queue.callbacks)
            };
            self.synchronize();
            callbacks.into_iter().for_each(|callback| callback());
        }
    }
}

impl Drop for ReadSection<'_> {
    fn drop(&mut self) {
        NESTED.with(|nested| nested.set(nested.get() - 1));
        self.shard.outs[self.bank].fetch_add(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;
    use std::sync::mpsc;

    #[test]
    fn synchronize_waits_for_an_open_section_and_for_no_later_one() {
        let srcu = Arc::new(Srcu::new());
        let ended = Arc::new(AtomicBool::new(false));
        let (opened, is_open) = mpsc::channel();
        let reader = {
            let (srcu, ended) = (Arc::clone(&srcu), Arc::clone(&ended));
            std::thread::spawn(move || {
                let section = srcu.read();
                opened.send(()).unwrap();
                std::thread::sleep(Duration::from_millis(20));
                ended.store(true, Ordering::SeqCst);
                drop(section);
            })
        };
        is_open.recv().unwrap();
        srcu.synchronize();
        assert!(ended.load(Ordering::SeqCst));
        reader.join().unwrap();
        srcu.synchronize();
    }

    #[test]
    fn a_callback_runs_after_the_sections_that_were_open() {
        let srcu = Srcu::new();
        let ended = Arc::new(AtomicBool::new(false));
        let section = srcu.read();
        let seen = Arc::clone(&ended);
        srcu.call(move || assert!(seen.load(Ordering::SeqCst)));
        ended.store(true, Ordering::SeqCst);
        drop(section);
        srcu.barrier();
        assert!(srcu.domain.queue.lock().callbacks.is_empty());
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
                        let _section = srcu.read();
                        let at = current.load(Ordering::SeqCst);
                        std::thread::yield_now();
                        assert_eq!(
                            live[at].load(Ordering::SeqCst),
                            1,
                            "slot {at} was retired under a reader"
                        );
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
