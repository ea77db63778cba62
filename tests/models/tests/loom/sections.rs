// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Sleepable RCU: what a writer takes back behind `synchronize` is not in use, in the strict sense of the memory model: loom's
//! cells fail where an access and the taking back are not ordered.

use crate::exhaust::{Preemptions, exhaust};
use crate::mutant::M;
use crate::notifier::srcu::Srcu;
use crate::sync::Arc;
use crate::sync::atomic::{AtomicUsize, Ordering};
use loom::cell::UnsafeCell;

/// Two values, of which one is published.
struct Shared {
    srcu: Srcu,
    published: AtomicUsize,
    values: [UnsafeCell<u32>; 2],
}

// SAFETY: loom checks each access to the cells; that they are ordered is what the models are about.
unsafe impl Sync for Shared {}

const ALIVE: u32 = 1;
const TAKEN_BACK: u32 = 2;

impl Shared {
    fn new() -> Arc<Self> {
        let values = [UnsafeCell::new(ALIVE), UnsafeCell::new(ALIVE)];
        Arc::new(Self { srcu: Srcu::new(), published: AtomicUsize::new(0), values })
    }

    /// Uses what is published. In a read section.
    fn use_published(&self) {
        self.use_value(self.published.load(Ordering::Acquire));
    }

    fn use_value(&self, at: usize) {
        self.values[at].with(|value| {
            // SAFETY: loom checks that nobody writes meanwhile; the pointer is the cell's own.
            assert_eq!(unsafe { *value }, ALIVE, "a reader uses what was taken back");
        });
    }

    /// Publishes the other value, and takes the first one back.
    fn replace(&self) {
        self.published.store(1, Ordering::Release);
        self.srcu.synchronize();
        self.take_back();
    }

    fn take_back(&self) {
        // SAFETY: loom checks that nobody else uses the value; the pointer is the cell's own.
        self.values[0].with_mut(|value| unsafe { *value = TAKEN_BACK });
    }
}

fn read(shared: &Arc<Shared>, reads: usize) -> loom::thread::JoinHandle<()> {
    let shared = Arc::clone(shared);
    loom::thread::spawn(move || {
        for _ in 0..reads {
            let _section = shared.srcu.enter();
            shared.use_published();
        }
    })
}

/// One reader, one section; one writer.
fn one_reader() {
    let shared = Shared::new();
    let reader = read(&shared, 1);
    shared.replace();
    reader.join().unwrap();
}

#[test]
fn a_writer_waits_for_a_reader() {
    let mutants = [
        M::ReaderWithoutFence,
        M::WriterWithoutFence,
        M::SectionEndsRelaxed,
        M::WaitRelaxed,
        M::SynchronizeDoesNotWait,
    ];
    exhaust("one_reader", Preemptions::Any, one_reader, &mutants);
}

/// One reader with two sections, one after the other: the second may begin while the writer waits for the first.
fn two_sections() {
    let shared = Shared::new();
    let reader = read(&shared, 2);
    shared.replace();
    reader.join().unwrap();
}

#[test]
fn a_writer_waits_for_the_section_that_was_open() {
    exhaust(
        "two_sections",
        Preemptions::Any,
        two_sections,
        &[M::SynchronizeDoesNotWait, M::WriterWithoutFence],
    );
}

/// Two readers, one writer. Three threads: with any number of preemptions it is a million executions, and takes minutes.
fn two_readers() {
    let shared = Shared::new();
    let readers = [read(&shared, 1), read(&shared, 1)];
    shared.replace();
    for reader in readers {
        reader.join().unwrap();
    }
}

#[test]
fn a_writer_waits_for_every_reader() {
    exhaust(
        "two_readers",
        Preemptions::AtMost(3),
        two_readers,
        &[M::SynchronizeDoesNotWait, M::ReaderWithoutFence],
    );
}

/// A section in a section, of which the outer one ends first.
fn outer_first() {
    let shared = Shared::new();
    let reader = {
        let shared = Arc::clone(&shared);
        loom::thread::spawn(move || {
            let outer = shared.srcu.enter();
            let at = shared.published.load(Ordering::Acquire);
            let inner = shared.srcu.enter();
            drop(outer);
            shared.use_value(at);
            drop(inner);
        })
    };
    shared.replace();
    reader.join().unwrap();
}

#[test]
fn an_inner_section_outlives_the_outer_one() {
    exhaust("outer_first", Preemptions::Any, outer_first, &[M::AnySectionEndsAll]);
}

/// The same, and the inner one ends first.
fn inner_first() {
    let shared = Shared::new();
    let reader = {
        let shared = Arc::clone(&shared);
        loom::thread::spawn(move || {
            let outer = shared.srcu.enter();
            let at = shared.published.load(Ordering::Acquire);
            drop(shared.srcu.enter());
            shared.use_value(at);
            drop(outer);
        })
    };
    shared.replace();
    reader.join().unwrap();
}

#[test]
fn an_inner_section_leaves_the_outer_one_open() {
    exhaust("inner_first", Preemptions::Any, inner_first, &[M::AnySectionEndsAll]);
}

/// Two writers wait at the same time. Two threads that spin: loom's schedules are not fair to the third, so without a bound
/// some never end.
fn two_writers() {
    let shared = Shared::new();
    let reader = read(&shared, 1);
    let writer = {
        let shared = Arc::clone(&shared);
        loom::thread::spawn(move || shared.srcu.synchronize())
    };
    shared.replace();
    reader.join().unwrap();
    writer.join().unwrap();
}

#[test]
fn writers_do_not_disturb_each_other() {
    exhaust("two_writers", Preemptions::AtMost(2), two_writers, &[M::SynchronizeDoesNotWait, M::WaitRelaxed]);
}

/// A callback takes the value back; a barrier waits for the callback.
fn callback() {
    let shared = Shared::new();
    let reader = read(&shared, 1);
    shared.published.store(1, Ordering::Release);
    let taker = Arc::clone(&shared);
    shared.srcu.call(move || taker.take_back());
    shared.srcu.barrier();
    shared.values[0].with(|value| {
        // SAFETY: loom checks that nobody writes meanwhile; the pointer is the cell's own.
        assert_eq!(unsafe { *value }, TAKEN_BACK, "the barrier returned before the callback had run");
    });
    reader.join().unwrap();
}

#[test]
fn a_callback_runs_behind_the_readers_and_a_barrier_behind_the_callback() {
    exhaust("callback", Preemptions::Any, callback, &[M::CallDoesNotWait, M::BarrierIgnoresRunning]);
}
