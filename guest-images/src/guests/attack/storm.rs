// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Many threads at once, and threads that do not want to end.

use core::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use super::attempt::{Catcher, Outcome, Regs, SIGSEGV};
use super::calls::{END, TOP};
use super::rt::PAGE;
use super::rt::out::outln;
use super::rt::random::Rng;
use super::rt::sys::{self, PROT_NONE, PROT_RW};
use super::rt::thread::Thread;
use super::{Verdict, broken, doors, reach, signals, state};

const THREADS: usize = 64;
const ROUNDS: usize = 300;
const SHARED_PAGES: usize = 64;

static SHARED: AtomicUsize = AtomicUsize::new(0);
static LEFT: AtomicUsize = AtomicUsize::new(0);
static WRONG: AtomicUsize = AtomicUsize::new(0);

/// One random attack; whether it was contained.
fn one(catcher: &Catcher, random: &mut Rng) -> bool {
    let shared = SHARED.load(Relaxed) + random.below(SHARED_PAGES * PAGE / 8) * 8;
    let is_harmless = |outcome: Outcome| matches!(outcome, Outcome::Returned(_)) || outcome.is_refused();
    match random.below(8) {
        0 => {
            let wishes = reach::wishes();
            let target = TOP + random.below(END - TOP);
            is_harmless(catcher.run(target, &wishes[random.below(wishes.len())]))
        }
        1 => catcher.store(TOP + random.below(END - TOP - 8), 1).is_signal(SIGSEGV),
        2 => !matches!(
            catcher.run(doors::VSYSCALL + random.below(4) * 0x400, &Regs::default()),
            Outcome::Returned(0)
        ),
        3 => is_harmless(catcher.load(shared)),
        4 => is_harmless(catcher.store(shared, random.word() as usize)),
        5 => state::any_privileged(catcher, random),
        6 => {
            let flags = 0x202 | 1 << random.below(8);
            let outcome = signals::frame_with_flags(catcher, flags);
            is_harmless(outcome) || outcome.is_signal(super::attempt::SIGTRAP)
        }
        // Code in memory that comes and goes is no code.
        _ => catcher.run(shared, &Regs::default()).is_refused(),
    }
}

extern "C" fn attacker(seed: usize) {
    if let Ok(catcher) = Catcher::new() {
        let mut random = Rng::new(seed as u64);
        for _ in 0..ROUNDS {
            if !one(&catcher, &mut random) {
                WRONG.fetch_add(1, Relaxed);
            }
        }
    } else {
        WRONG.fetch_add(1, Relaxed);
    }
    LEFT.fetch_sub(1, Relaxed);
}

/// `storm`: all of it at once, in memory that is unmapped, protected and mapped again meanwhile.
pub fn storm(_: &Catcher) -> Verdict {
    let Ok(shared) = sys::map_anywhere(SHARED_PAGES * PAGE, PROT_RW) else {
        return broken(format_args!("no memory to share"));
    };
    SHARED.store(shared, Relaxed);
    LEFT.store(THREADS, Relaxed);
    let mut threads = [const { None }; THREADS];
    for (seed, thread) in threads.iter_mut().enumerate() {
        let Ok(started) = Thread::spawn(attacker, seed) else {
            return broken(format_args!("thread {seed} does not start"));
        };
        *thread = Some(started);
    }
    let mut random = Rng::new(99);
    let flags = sys::MAP_PRIVATE | sys::MAP_NORESERVE | sys::MAP_FIXED;
    while LEFT.load(Relaxed) > 0 {
        let first = random.below(SHARED_PAGES);
        let (at, len) = (shared + first * PAGE, random.upto(SHARED_PAGES - first) * PAGE);
        // Never a hole: a thread's new mapping could come to lie there, and be replaced.
        let _ = match random.below(3) {
            // SAFETY: nothing of Rust's is there.
            0 => unsafe { sys::mprotect(at, len, PROT_NONE) },
            // SAFETY: as above.
            1 => unsafe { sys::madvise(at, len, sys::MADV_DONTNEED) },
            // SAFETY: as above.
            _ => unsafe { sys::mmap(at, len, PROT_RW, flags) },
        };
        sys::sched_yield();
    }
    for thread in threads.into_iter().flatten() {
        if thread.join().is_err() {
            return broken(format_args!("a thread's stack is gone"));
        }
    }
    let wrong = WRONG.load(Relaxed);
    if wrong > 0 {
        return broken(format_args!("{wrong} attacks of {} got through", THREADS * ROUNDS));
    }
    outln!("storm: {} attacks of {THREADS} threads", THREADS * ROUNDS);
    Ok(())
}

extern "C" fn spin(_: usize) {
    signals::block_all();
    loop {
        core::hint::spin_loop();
    }
}

/// `outlive`: threads that spin with every signal ignored and blocked. Whoever wants them gone must take them.
pub fn outlive(_: &Catcher) -> Verdict {
    for signal in 1..=64 {
        // All but two.
        let _ = signals::dispose(signal, 1);
    }
    for _ in 0..3 {
        if Thread::spawn(spin, 0).map(core::mem::forget).is_err() {
            return broken(format_args!("no thread"));
        }
    }
    outln!("outlive: spinning");
    spin(0);
    Ok(())
}
