// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `memstress`: threads that touch memory when they are told to, and wait in between.
//!
//! After the guest of the kernel's selftests (`lib/memstress.c`): thread i touches the first 8 bytes of each page of
//! its own region, all at once. What is to be touched comes on stdin, one command a line, and each command is
//! answered by one line on stdout when all threads have done it. In between all of them sleep. So somebody
//! outside can clear A and D bits between two passes and knows exactly what was touched since.
//!
//! | command | what | answer |
//! | --- | --- | --- |
//! | `write [every K] [times N]` | each thread writes its pages 0, K, 2K…, N times over | `write: T ns, A accesses` |
//! | `read …` | reads them | `read: T ns, A accesses` |
//! | `mix …` | writes each with the probability of --write-percent, reads it otherwise | `mix: T ns, A accesses` |
//! | `run I` | all threads write I to random pages of theirs until told otherwise | `run: I` |
//! | `stop` | ends that | `stop: T ns, A accesses` |
//! | `where` | | `where: HEX N`: address and pages of all the memory |
//! | `quit` | ends the program, as the end of stdin does | |
//!
//! From the answer to `run I` on, no thread writes an older number; `run` with another one changes what running threads
//! write. From the answer to `stop` on, nothing is written.
//!
//! T is the guest's own time from the first thread's start to the last one's end. With --random, a pass makes as
//! many accesses as in order, but to random pages, as the kernel's does: some pages twice, some not at all.
//!
//! What is printed depends on the arguments and commands alone, but for T, for A of `stop`, and for `where`.
//! `memstress/worker.rs` is the threads.

#![no_std]
#![no_main]

#[allow(dead_code, reason = "the runtime serves all guests, and none uses all of it")]
mod rt;
#[allow(dead_code, reason = "each guest prints one of the usage lines")]
#[path = "../usage.rs"]
mod usage;
#[path = "memstress/worker.rs"]
mod worker;

use rt::PAGE;
use rt::args::{Args, Cli};
use rt::input::Input;
use rt::out::{errln, outln};
use rt::sys;
use worker::{Job, MAX_THREADS, Team, Touch};

/// 256 GiB a thread.
const MAX_PAGES: u64 = 1 << 26;
/// How commands are spelled, for the complaint about one that is not.
const COMMANDS: &str = "read, write or mix with [every K] [times N], run I, stop, where, quit; one a line";

fn run(args: Args) -> i32 {
    let mut cli = Cli::new(args, usage::MEMSTRESS);
    let (mut threads, mut pages, mut overlap) = (1, 1024, false);
    let mut touch = Touch { percent: 100, random: false, seed: 1, spin: 0 };
    while let Some(word) = cli.word() {
        match word {
            "--threads" => threads = cli.number(word, 1, MAX_THREADS as u64) as usize,
            "--pages" => pages = cli.number(word, 1, MAX_PAGES),
            "--overlap" => overlap = true,
            "--write-percent" => touch.percent = cli.number(word, 0, 100),
            "--random" => touch.random = true,
            "--seed" => touch.seed = cli.number(word, 0, u64::MAX),
            "--spin" => touch.spin = cli.number(word, 0, 1_000_000),
            _ => cli.unknown(word),
        }
    }
    let total = if overlap { pages } else { pages * threads as u64 };
    // One page more, which is touched now: what the first fault of a mapping costs once is then not counted
    // with what each page costs.
    let base = match sys::map_anywhere((total as usize + 1) * PAGE, sys::PROT_RW) {
        Ok(base) => base,
        Err(error) => {
            errln!("memstress: cannot map {total} pages: {error}");
            return 1;
        }
    };
    // The pages of the kernel's selftests are small ones too. A kernel without huge pages refuses, which is as
    // good.
    // SAFETY: this advice changes no content.
    let _ = unsafe { sys::madvise(base, (total as usize + 1) * PAGE, sys::MADV_NOHUGEPAGE) };
    // SAFETY: the mapping is one page longer than what the threads touch.
    unsafe { ((base + total as usize * PAGE) as *mut u64).write_volatile(1) };
    let stride = if overlap { 0 } else { pages };
    let team = match Team::start(threads, base, pages, stride, touch) {
        Ok(team) => team,
        Err(error) => {
            errln!("memstress: cannot start {threads} threads: {error}");
            return 1;
        }
    };

    let mut input = Input::new();
    let status = loop {
        match input.line() {
            Ok(None) => break 0,
            Ok(Some(length)) => {
                let text = input.text(length);
                match obey(text, &team, base, total) {
                    Ok(true) => {}
                    Ok(false) => break 0,
                    Err(Misunderstood) => {
                        errln!("memstress: unknown command {text:?}; commands: {COMMANDS}");
                        break 2;
                    }
                }
                input.drop_line(length);
            }
            Err(problem) => {
                errln!("memstress: {problem}");
                break 2;
            }
        }
    };
    match team.end() {
        Ok(()) => status,
        Err(error) => {
            errln!("memstress: cannot end the threads: {error}");
            1
        }
    }
}

/// A line is no command.
struct Misunderstood;

/// Does what `text` says and answers; whether to go on.
fn obey(text: &str, team: &Team, base: usize, total: u64) -> Result<bool, Misunderstood> {
    let mut words = text.split_ascii_whitespace();
    let Some(verb) = words.next() else { return Err(Misunderstood) };
    let number = |word: Option<&str>, low: u64| match word.map(str::parse) {
        Some(Ok(number)) if number >= low => Ok(number),
        _ => Err(Misunderstood),
    };
    // Threads that run free obey only what is about that.
    match (verb, team.is_running()) {
        ("read" | "write" | "mix", false) => {
            let (mut every, mut times) = (1, 1);
            while let Some(word) = words.next() {
                match word {
                    "every" => every = number(words.next(), 1)?,
                    "times" => times = number(words.next(), 1)?,
                    _ => return Err(Misunderstood),
                }
            }
            let job = match verb {
                "read" => Job::Read,
                "write" => Job::Write,
                _ => Job::Mix,
            };
            team.begin(job, every, times);
            let (time, accesses) = team.wait();
            outln!("{verb}: {time} ns, {accesses} accesses");
        }
        ("run", running) => {
            let iteration = number(words.next(), 0)?;
            end_of(words)?;
            team.set_iteration(iteration);
            if !running {
                team.begin(Job::Free, 1, 1);
            }
            team.wait_for_iteration(iteration);
            outln!("run: {iteration}");
        }
        ("stop", true) => {
            end_of(words)?;
            let (time, accesses) = team.stop();
            outln!("stop: {time} ns, {accesses} accesses");
        }
        ("where", _) => {
            end_of(words)?;
            outln!("where: {base:#x} {total}");
        }
        ("quit", _) => return end_of(words).map(|()| false),
        _ => return Err(Misunderstood),
    }
    Ok(true)
}

fn end_of<'a>(mut words: impl Iterator<Item = &'a str>) -> Result<(), Misunderstood> {
    if words.next().is_none() { Ok(()) } else { Err(Misunderstood) }
}
