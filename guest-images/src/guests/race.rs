// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `race`: threads that update one counter, some of the time as if they were alone. A planted bug, for a search to find.
//!
//! Most updates are atomic. One in `--every` is a load, a little work, and a store; an update of another thread that comes in
//! between and is of the same kind is lost. `exits`: the work is a system call. `steps`: it is a few instructions, so that
//! only who interrupts between two of them can see it. `spin`: no bug, but a thread that waits for another without ever making
//! a system call.

#![no_std]
#![no_main]

#[allow(dead_code, reason = "the runtime serves all guests, and none uses all of it")]
mod rt;
#[allow(dead_code, reason = "each guest prints one of the usage lines")]
#[path = "../usage.rs"]
mod usage;

use core::hint::{black_box, spin_loop};
use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use rt::args::{Args, Cli};
use rt::out::{errln, outln};
use rt::sys;
use rt::thread::Thread;

/// The most threads there can be.
const MAX_THREADS: usize = 16;

/// What is between a load and its store.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Exits,
    Steps,
    Spin,
}

/// Updated by all threads, now and then by load and store.
static RACED: AtomicU64 = AtomicU64::new(0);
/// Updated by all threads, always atomically.
static SAFE: AtomicU64 = AtomicU64::new(0);
/// Set before the threads start.
static ITERATIONS: AtomicUsize = AtomicUsize::new(0);
static EVERY: AtomicUsize = AtomicUsize::new(0);
/// What `spin` waits for.
static GO: AtomicBool = AtomicBool::new(false);

fn run(args: Args) -> i32 {
    let mut cli = Cli::new(args, usage::RACE);
    let mode = match cli.word() {
        Some("exits") => Mode::Exits,
        Some("steps") => Mode::Steps,
        Some("spin") => Mode::Spin,
        Some(word) => cli.unknown(word),
        None => cli.refuse(format_args!("exits, steps or spin?")),
    };
    let (mut threads, mut iterations, mut every) = (2, 50, if mode == Mode::Steps { 25 } else { 50 });
    while let Some(word) = cli.word() {
        match word {
            "--threads" => threads = cli.number(word, 1, MAX_THREADS as u64) as usize,
            "--iterations" => iterations = cli.number(word, 1, 1 << 30) as usize,
            "--every" => every = cli.number(word, 1, 1 << 30) as usize,
            _ => cli.unknown(word),
        }
    }
    ITERATIONS.store(iterations, Ordering::Relaxed);
    EVERY.store(every, Ordering::Relaxed);
    let function = match mode {
        Mode::Exits => update_around_calls,
        Mode::Steps => update_around_instructions,
        Mode::Spin => spin,
    };
    let mut running = [const { None }; MAX_THREADS];
    for thread in &mut running[..threads] {
        match Thread::spawn(function, 0) {
            Ok(started) => *thread = Some(started),
            Err(error) => {
                errln!("race: a thread cannot be started: {error}");
                return 1;
            }
        }
    }
    if mode == Mode::Spin {
        // Time for those that spin to begin.
        (0..iterations).for_each(|_| sys::getpid());
        GO.store(true, Ordering::Release);
    }
    for thread in running.into_iter().flatten() {
        if let Err(error) = thread.join() {
            errln!("race: munmap of a stack failed, which must work here: {error}");
            return 1;
        }
    }
    if mode == Mode::Spin {
        outln!("race: {threads} threads have spun");
        return 0;
    }
    let wanted = (threads * iterations) as u64;
    let lost = wanted - RACED.load(Ordering::Relaxed) - SAFE.load(Ordering::Relaxed);
    if lost != 0 {
        errln!("race: {lost} of {wanted} updates are lost");
        return 1;
    }
    outln!("race: {wanted} updates, none lost");
    0
}

/// Whether update `number` is one that goes wrong: in the middle of each `--every`.
fn is_raced(number: usize) -> bool {
    let every = EVERY.load(Ordering::Relaxed);
    number % every == every / 2
}

extern "C" fn update_around_calls(_: usize) {
    for number in 0..ITERATIONS.load(Ordering::Relaxed) {
        if is_raced(number) {
            let before = RACED.load(Ordering::Relaxed);
            sys::getpid();
            RACED.store(before + 1, Ordering::Relaxed);
        } else {
            sys::getpid();
            SAFE.fetch_add(1, Ordering::Relaxed);
        }
    }
}

extern "C" fn update_around_instructions(_: usize) {
    for number in 0..ITERATIONS.load(Ordering::Relaxed) {
        if is_raced(number) {
            let before = RACED.load(Ordering::Relaxed);
            let after = black_box(before) + 1;
            RACED.store(black_box(after), Ordering::Relaxed);
        } else {
            SAFE.fetch_add(1, Ordering::Relaxed);
        }
    }
}

extern "C" fn spin(_: usize) {
    while !GO.load(Ordering::Acquire) {
        spin_loop();
    }
}
