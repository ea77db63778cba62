// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `threads`: threads write to a region of memory while the main thread takes it away, again and again.
//!
//! The writers never stop for the main thread. When a page is unmapped, write-protected or moved under them,
//! their stores must fault from that moment on, and a frame that was freed must be out of their reach: the
//! main thread at once maps fresh memory, which gets such frames, and watches whether anybody scribbles on
//! it. So a translation that outlived its page, in a TLB or in a shadow map, shows as a changed word, and the
//! word tells who wrote it.
//!
//! `threads/writer.rs` is the writers, `threads/round.rs` what the main thread does to them.

#![no_std]
#![no_main]

#[path = "threads/round.rs"]
mod round;
#[allow(dead_code, reason = "the runtime serves all guests, and none uses all of it")]
mod rt;
#[allow(dead_code, reason = "each guest prints one of the usage lines")]
#[path = "../usage.rs"]
mod usage;
#[path = "threads/writer.rs"]
mod writer;

use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use rt::PAGE;
use rt::args::{Args, Cli};
use rt::out::{errln, outln};
use rt::random::{Checksum, mix2};
use rt::sys::{self, Errno, PROT_RW};
use rt::thread::Thread;

/// The most writers there can be.
pub const MAX_WRITERS: usize = 64;

/// What all threads know. It is written before the writers start, but for the fields that say otherwise.
pub struct Shared {
    /// The address of the region that is fought over.
    pub victim: AtomicUsize,
    /// Its length in pages.
    pub pages: AtomicUsize,
    /// Decides all content and all choices.
    pub seed: AtomicU64,
    /// What the main thread works on at the moment, so that writers go there: first page << 32 | pages.
    pub focus: AtomicU64,
    /// Set when the writers shall end.
    pub stop: AtomicBool,
    /// One for each writer.
    pub writers: [WriterState; MAX_WRITERS],
}

/// What a writer and the main thread tell each other.
pub struct WriterState {
    /// The writer's own region, set before it starts.
    pub region: AtomicUsize,
    /// Accesses to the victim so far, good or bad: the main thread waits on it to know that the writer is
    /// awake.
    pub attempts: AtomicU64,
    /// How many of them faulted.
    pub faults: AtomicU64,
    /// Checksum of the private region, set at the end.
    pub checksum: AtomicU64,
}

pub static SHARED: Shared = Shared {
    victim: AtomicUsize::new(0),
    pages: AtomicUsize::new(0),
    seed: AtomicU64::new(0),
    focus: AtomicU64::new(0),
    stop: AtomicBool::new(false),
    writers: [const {
        WriterState {
            region: AtomicUsize::new(0),
            attempts: AtomicU64::new(0),
            faults: AtomicU64::new(0),
            checksum: AtomicU64::new(0),
        }
    }; MAX_WRITERS],
};

/// Tags carry this in their upper half, which makes them recognisable wherever they turn up.
const TAG: u64 = 0x7a6;

/// The word that writer `writer` puts at word `index` of victim page `page`; `count` makes stores differ.
pub const fn tag(writer: usize, page: usize, index: usize, count: u64) -> u64 {
    TAG << 52 | (writer as u64) << 44 | (page as u64) << 26 | (index as u64) << 16 | (count & 0xffff)
}

/// Whether `word` may stand at that place of the victim: nothing yet, or a tag for just this place.
pub const fn belongs(word: u64, page: usize, index: usize) -> bool {
    word == 0 || (word & !(0xff << 44) & !0xffff) == tag(0, page, index, 0)
}

/// A word for the report of a violation. A tag names its writer and the place it was meant for.
pub struct Word(pub u64);

impl fmt::Display for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#018x}", self.0)?;
        if self.0 >> 52 == TAG {
            let (writer, page, index) = (self.0 >> 44 & 0xff, self.0 >> 26 & 0x3_ffff, self.0 >> 16 & 0x3ff);
            write!(f, " (a store of writer {writer} to victim page {page} word {index})")?;
        }
        Ok(())
    }
}

/// Ends the program: memory did what it must not do.
pub fn violation(what: fmt::Arguments<'_>) -> ! {
    errln!("threads: {what}");
    sys::exit_group(1)
}

/// A system call that must work did not.
pub struct Failed {
    call: &'static str,
    error: Errno,
}

/// Gives an error the name of the call that it came from.
pub fn failed(call: &'static str) -> impl FnOnce(Errno) -> Failed {
    move |error| Failed { call, error }
}

/// How long to go on.
enum Until {
    Rounds(u64),
    Time(u64),
}

fn run(args: Args) -> i32 {
    let mut cli = Cli::new(args, usage::THREADS);
    let (mut writers, mut pages, mut seed) = (2, 64, 1);
    let (mut rounds, mut seconds, mut stats) = (None, None, false);
    while let Some(word) = cli.word() {
        match word {
            "--writers" => writers = cli.number(word, 1, MAX_WRITERS as u64) as usize,
            "--rounds" => rounds = Some(cli.number(word, 1, u64::MAX)),
            "--seconds" => seconds = Some(cli.number(word, 1, 1_000_000)),
            "--pages" => pages = cli.number(word, 1, 1 << 16) as usize,
            "--seed" => seed = cli.number(word, 0, u64::MAX),
            "--stats" => stats = true,
            _ => cli.unknown(word),
        }
    }
    let until = match (rounds, seconds) {
        (Some(_), Some(_)) => cli.refuse(format_args!("--rounds and --seconds exclude each other")),
        (None, Some(seconds)) => Until::Time(sys::now() + seconds * 1_000_000_000),
        (rounds, None) => Until::Rounds(rounds.unwrap_or(200)),
    };
    match race(writers, pages, seed, &until) {
        Ok((checksum, rounds)) => {
            if stats {
                let sum = |count: fn(&WriterState) -> &AtomicU64| {
                    SHARED.writers.iter().map(|writer| count(writer).load(Ordering::Relaxed)).sum::<u64>()
                };
                let (accesses, faults) = (sum(|writer| &writer.attempts), sum(|writer| &writer.faults));
                errln!("threads: {rounds} rounds, {accesses} accesses of the victim, {faults} faults");
            }
            outln!("threads: ok, checksum {checksum:016x}");
            0
        }
        Err(Failed { call, error }) => {
            errln!("threads: {call} failed, which must work here: {error}");
            1
        }
    }
}

/// Runs it all; returns the checksum, which depends on `writers` and `seed` only, and the number of rounds.
fn race(writers: usize, pages: usize, seed: u64, until: &Until) -> Result<(u64, u64), Failed> {
    rt::fault::install().map_err(failed("rt_sigaction"))?;
    SHARED.pages.store(pages, Ordering::Relaxed);
    SHARED.seed.store(seed, Ordering::Relaxed);
    SHARED.focus.store(pages as u64, Ordering::Relaxed);
    SHARED.victim.store(reserve(pages, PROT_RW)?, Ordering::Relaxed);
    let mut master = round::Master::new(pages, writers, seed)?;

    let mut threads = [const { None }; MAX_WRITERS];
    for state in &SHARED.writers[..writers] {
        state.region.store(reserve(writer::PRIVATE, PROT_RW)?, Ordering::Relaxed);
    }
    for (number, thread) in threads[..writers].iter_mut().enumerate() {
        *thread = Some(Thread::spawn(writer::main, number).map_err(failed("starting a thread"))?);
    }
    // From here to the joins nobody maps memory at an address of the kernel's choice: it might be a hole in
    // the victim, and then the writers would be right to write there.
    let mut rounds = 0;
    while match until {
        Until::Rounds(limit) => rounds < *limit,
        Until::Time(end) => sys::now() < *end,
    } {
        master.round(rounds)?;
        rounds += 1;
    }
    SHARED.stop.store(true, Ordering::Release);
    let mut checksum = Checksum::new();
    for (thread, state) in threads.into_iter().flatten().zip(&SHARED.writers) {
        thread.join().map_err(failed("munmap of a stack"))?;
        checksum.add(state.checksum.load(Ordering::Acquire));
    }
    Ok((checksum.value(), rounds))
}

/// The word at a place of writer `writer`'s private region, after it has been filled for the `generation`th
/// time.
pub fn private_word(writer: usize, generation: u64, page: usize, index: usize) -> u64 {
    let place = (writer as u64) << 32 | (page as u64) << 16 | index as u64;
    mix2(SHARED.seed.load(Ordering::Relaxed) ^ generation << 48, place)
}

/// Maps pages at an address of the kernel's choice: memory, or with PROT_NONE room for later calls with
/// MAP_FIXED.
pub fn reserve(pages: usize, prot: usize) -> Result<usize, Failed> {
    sys::map_anywhere(pages * PAGE, prot).map_err(failed("mmap"))
}
