// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `mix`: memory for page sharing: so many pages are zero, so many are equal to some others, the rest are like no other.
//!
//! Which page is what follows from the arguments alone, so that the same program as a guest and as a process holds the same
//! bytes, and somebody outside knows how many pages can be saved. What is to be done comes on stdin, one command a line, and
//! each is answered by one line on stdout.
//!
//! | command | what | answer |
//! | --- | --- | --- |
//! | `fill mix` | fills the memory: `--zero` percent of the pages with zeros, `--dup` percent in groups of `--copies` equal ones | `fill: N pages` |
//! | `fill same`, `pairs`, `zeros` | all pages are equal; 2k and 2k+1 are; all are zero | `fill: N pages` |
//! | `load N` | reads N pages from stdin, behind the line; all the memory becomes copies of them, in a circle | `load: N pages` |
//! | `mergeable`, `unmergeable` | madvise(2) of it all | `mergeable: T ns` |
//! | `verify` | looks at every byte: nobody has changed one but this program | `verify: CHECKSUM` |
//! | `rewrite N [own]` | gives random pages (of those like no other) content like no other | `rewrite: N pages` |
//! | `write N shared` or `own` | writes a word to each of N random pages that equal (or do not equal) another, each timed | `write: N pages, median T ns, p99 T ns` |
//! | `poke K` | writes a word to every K-th page, all timed together | `poke: N pages, T ns` |
//! | `work N` | N rounds of reading random pages and writing some that are like no other | `work: T ns, CHECKSUM` |
//! | `where` | | `where: HEX N`: address and pages |
//! | `quit` | ends the program, as the end of stdin does | |
//!
//! What is printed depends on the arguments and commands alone, but for T and `where`. `mix/region.rs` is the memory,
//! `mix/timing.rs` the clock.

#![no_std]
#![no_main]

#[path = "mix/region.rs"]
mod region;
#[allow(dead_code, reason = "the runtime serves all guests, and none uses all of it")]
mod rt;
#[path = "mix/timing.rs"]
mod timing;
#[allow(dead_code, reason = "each guest prints one of the usage lines")]
#[path = "../usage.rs"]
mod usage;

use region::{Filling, Kind, Region, Shares};
use rt::args::{Args, Cli};
use rt::input::Input;
use rt::out::{errln, outln};
use rt::sys;

/// 64 GiB: page numbers fit into 32 bits, with room for other marks.
const MAX_PAGES: u64 = 1 << 24;
/// Of equal pages; a kernel's limit of sites a shared page, as it is by default.
const MAX_COPIES: u64 = 256;
/// How commands are spelled, for the complaint about one that is not.
const COMMANDS: &str = "fill mix|same|pairs|zeros, load N, mergeable, unmergeable, verify, rewrite N [own], \
                        write N shared|own, poke K, work N, where, quit; one a line";

fn run(args: Args) -> i32 {
    let mut cli = Cli::new(args, usage::MIX);
    let (mut pages, mut seed) = (1024, 1);
    let mut shares = Shares { zero: 25, dup: 50, copies: 4 };
    while let Some(word) = cli.word() {
        match word {
            "--pages" => pages = cli.number(word, 1, MAX_PAGES) as usize,
            "--zero" => shares.zero = cli.number(word, 0, 100) as usize,
            "--dup" => shares.dup = cli.number(word, 0, 100) as usize,
            "--copies" => shares.copies = cli.number(word, 2, MAX_COPIES) as usize,
            "--seed" => seed = cli.number(word, 0, u64::MAX),
            _ => cli.unknown(word),
        }
    }
    if shares.zero + shares.dup > 100 {
        cli.refuse(format_args!("--zero and --dup must not add up to more than 100"));
    }
    let mut region = match Region::new(pages, shares, seed) {
        Ok(region) => region,
        Err(error) => {
            errln!("mix: cannot map {pages} pages: {error}");
            return 1;
        }
    };
    let mut input = Input::new();
    loop {
        let length = match input.line() {
            Ok(None) => return 0,
            Ok(Some(length)) => length,
            Err(problem) => {
                errln!("mix: {problem}");
                return 2;
            }
        };
        let command = parse(input.text(length));
        if matches!(command, Err(Misunderstood)) {
            errln!("mix: unknown command {:?}; commands: {COMMANDS}", input.text(length));
            return 2;
        }
        input.drop_line(length);
        match command {
            Ok(Command::Quit) => return 0,
            Ok(command) => {
                if let Err(status) = obey(command, &mut region, &mut input) {
                    return status;
                }
            }
            Err(Misunderstood) => {}
        }
    }
}

/// A line is no command.
struct Misunderstood;

/// What a line says.
enum Command {
    Fill(Filling),
    Load(usize),
    Advise { verb: &'static str, advice: usize },
    Verify,
    Rewrite(usize, Kind),
    Write(usize, Kind),
    Poke(usize),
    Work(usize),
    Where,
    Quit,
}

fn parse(text: &str) -> Result<Command, Misunderstood> {
    let mut words = text.split_ascii_whitespace();
    let Some(verb) = words.next() else { return Err(Misunderstood) };
    let mut number = |least: usize| match words.next().map(str::parse) {
        Some(Ok(number)) if number >= least => Ok(number),
        _ => Err(Misunderstood),
    };
    let command = match verb {
        "load" => Command::Load(number(1)?),
        "poke" => Command::Poke(number(1)?),
        "work" => Command::Work(number(1)?),
        "rewrite" => {
            let count = number(0)?;
            match words.next() {
                None => Command::Rewrite(count, Kind::Any),
                Some("own") => Command::Rewrite(count, Kind::Own),
                Some(_) => return Err(Misunderstood),
            }
        }
        "write" => {
            let count = number(1)?;
            match words.next() {
                Some("shared") => Command::Write(count, Kind::Shared),
                Some("own") => Command::Write(count, Kind::Own),
                _ => return Err(Misunderstood),
            }
        }
        "fill" => Command::Fill(match words.next() {
            Some("mix") => Filling::Mix,
            Some("same") => Filling::Same,
            Some("pairs") => Filling::Pairs,
            Some("zeros") => Filling::Zeros,
            _ => return Err(Misunderstood),
        }),
        "mergeable" => Command::Advise { verb: "mergeable", advice: sys::MADV_MERGEABLE },
        "unmergeable" => Command::Advise { verb: "unmergeable", advice: sys::MADV_UNMERGEABLE },
        "verify" => Command::Verify,
        "where" => Command::Where,
        "quit" => Command::Quit,
        _ => return Err(Misunderstood),
    };
    if words.next().is_none() { Ok(command) } else { Err(Misunderstood) }
}

/// Does it and answers; the error is the program's exit status.
fn obey(command: Command, region: &mut Region, input: &mut Input) -> Result<(), i32> {
    match command {
        Command::Fill(filling) => {
            region.fill(filling);
            outln!("fill: {} pages", region.pages());
        }
        Command::Load(count) => {
            if count > region.pages() {
                errln!("mix: {count} pages are more than the memory's {}", region.pages());
                return Err(2);
            }
            region.load(count, input).map_err(|problem| {
                errln!("mix: {problem}");
                1
            })?;
            outln!("load: {count} pages");
        }
        Command::Advise { verb, advice } => {
            let began = sys::now();
            region.advise(advice).map_err(|error| {
                errln!("mix: madvise({advice}): {error}");
                1
            })?;
            outln!("{verb}: {} ns", sys::now() - began);
        }
        Command::Verify => match region.verify() {
            Ok(checksum) => outln!("verify: {checksum:016x}"),
            Err(page) => {
                errln!("mix: page {page} does not hold what was written to it");
                return Err(1);
            }
        },
        Command::Rewrite(count, kind) => outln!("rewrite: {} pages", region.rewrite(count, kind)),
        Command::Write(count, kind) => {
            let times = region.write(count, kind);
            outln!("write: {} pages, median {} ns, p99 {} ns", times.count, times.median, times.p99);
        }
        Command::Poke(every) => {
            let (count, time) = region.poke(every);
            outln!("poke: {count} pages, {time} ns");
        }
        Command::Work(rounds) => {
            let (time, checksum) = region.work(rounds);
            outln!("work: {time} ns, {checksum:016x}");
        }
        Command::Where => outln!("where: {:#x} {}", region.address(), region.pages()),
        Command::Quit => {}
    }
    Ok(())
}
