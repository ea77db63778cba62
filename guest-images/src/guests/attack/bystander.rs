// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What an attack must leave alone: memory with known content, and a thread that does its own work.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

use super::rt::random::mix2;
use super::rt::sys::{self, Errno, PROT_RW};
use super::rt::thread::Thread;
use super::rt::{PAGE, WORDS};
use super::{Verdict, broken};

const PAGES: usize = 64;
/// How often the thread looks, in yields of the one that waits for it, before it is taken for lost.
const PATIENCE: usize = 5_000_000;

/// Rounds of the thread; and what it found wrong.
static ROUNDS: AtomicU64 = AtomicU64::new(0);
static WRONG: AtomicU64 = AtomicU64::new(0);
static STOP: AtomicU32 = AtomicU32::new(0);

/// A mapping that nobody writes, a heap that nobody writes, and the thread that reads both.
pub struct Bystander {
    mapping: usize,
    heap: usize,
    thread: Thread,
    pid: usize,
}

/// Where both are, for the thread.
static PLACES: [AtomicU64; 2] = [AtomicU64::new(0), AtomicU64::new(0)];

fn differing(start: usize) -> usize {
    let words = PAGES * WORDS;
    // SAFETY: the pages are this module's, mapped for good.
    (0..words)
        .filter(|&at| unsafe { ((start + at * 8) as *const u64).read_volatile() } != mix2(7, at as u64))
        .count()
}

fn fill(start: usize) {
    for at in 0..PAGES * WORDS {
        // SAFETY: as in `differing`.
        unsafe { ((start + at * 8) as *mut u64).write_volatile(mix2(7, at as u64)) };
    }
}

extern "C" fn watch(_: usize) {
    while STOP.load(Relaxed) == 0 {
        for place in &PLACES {
            WRONG.fetch_add(differing(place.load(Relaxed) as usize) as u64, Relaxed);
        }
        ROUNDS.fetch_add(1, Relaxed);
        sys::sched_yield();
    }
}

impl Bystander {
    /// # Errors
    /// What mmap or clone answers.
    pub fn start() -> Result<Self, Errno> {
        let mapping = sys::map_anywhere(PAGES * PAGE, PROT_RW)?;
        // SAFETY: it only asks.
        let heap = unsafe { sys::brk(0) }.next_multiple_of(PAGE);
        // SAFETY: the heap grows.
        if unsafe { sys::brk(heap + PAGES * PAGE) } != heap + PAGES * PAGE {
            return Err(sys::ENOMEM);
        }
        for (place, start) in PLACES.iter().zip([mapping, heap]) {
            fill(start);
            place.store(start as u64, Relaxed);
        }
        Ok(Self { mapping, heap, thread: Thread::spawn(watch, 0)?, pid: pid() })
    }

    /// Checks that all is as it was, and ends the thread.
    pub fn check(self) -> Verdict {
        let before = ROUNDS.load(Relaxed);
        let mut waited = 0;
        while ROUNDS.load(Relaxed) < before + 2 {
            sys::sched_yield();
            waited += 1;
            if waited > PATIENCE {
                return broken(format_args!("the other thread does not get on"));
            }
        }
        STOP.store(1, Relaxed);
        if self.thread.join().is_err() {
            return broken(format_args!("the other thread's stack is gone"));
        }
        let wrong = (differing(self.mapping), differing(self.heap), WRONG.load(Relaxed));
        if wrong != (0, 0, 0) {
            return broken(format_args!(
                "words of the mapping, of the heap, seen by the thread: {wrong:?} differ"
            ));
        }
        if pid() != self.pid {
            return broken(format_args!("the process was {} and is {}", self.pid, pid()));
        }
        Ok(())
    }
}

/// getpid's answer.
pub fn pid() -> usize {
    const GETPID: usize = 39;
    // SAFETY: it touches no memory.
    unsafe { sys::syscall(GETPID, [0; 6]) }.unwrap_or(0)
}
