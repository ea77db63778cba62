// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `victim`: holds pages whose content it knows, looks at them again and again, and says what became of each.
//!
//! It is what is run to see memory fail (`umbra inject`). On healthy memory it has nothing to say but that. Pages are told by
//! number, so what it prints does not depend on where they are; `--where` prints that too.

#![no_std]
#![no_main]

#[allow(dead_code, reason = "the runtime serves all guests, and none uses all of it")]
mod rt;
#[allow(dead_code, reason = "each guest prints one of the usage lines")]
#[path = "../usage.rs"]
mod usage;

use rt::args::{Args, Cli};
use rt::fault::{self, Fault};
use rt::out::{STDOUT, outln};
use rt::random::mix2;
use rt::{PAGE, WORDS, sys};

/// Pages at most: their states lie on the stack.
const MOST: usize = 4096;
const MILLISECOND: u64 = 1_000_000;
/// What a healthy page may be sent to stdout as, by the kernel.
const WORD: &[u8] = b".";

/// When it has looked often enough.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Until {
    /// After so many rounds.
    Rounds(u64),
    /// When something is wrong with a page.
    Fault,
    /// When something was, and nothing is any more.
    Back,
}

/// What is known of a page.
#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Good,
    Failed,
}

struct Victim {
    start: usize,
    pages: usize,
    states: [State; MOST],
    faults: u64,
    bits: u64,
    lost: u64,
}

fn content(page: usize, word: usize) -> u64 {
    mix2(page as u64 + 1, word as u64)
}

impl Victim {
    fn address(&self, page: usize, word: usize) -> usize {
        self.start + page * PAGE + word * 8
    }

    /// Writes what belongs there.
    fn fill(&mut self, page: usize) {
        for word in 0..WORDS {
            // SAFETY: the handler is installed, and the page is the victim's own, unknown to Rust.
            if let Err(fault) = unsafe { fault::store(self.address(page, word), content(page, word)) } {
                return self.failed(page, word, &fault);
            }
        }
    }

    fn failed(&mut self, page: usize, word: usize, fault: &Fault) {
        if self.states[page] == State::Failed {
            return;
        }
        self.states[page] = State::Failed;
        self.faults += 1;
        let name = fault.name();
        // As far from the access as the kernel says: nothing, or the failed page's beginning.
        let off = fault.address.wrapping_sub(self.address(page, word)) as isize;
        match fault.lsb {
            0 => outln!("page {page}: {name}, si_addr {off:+}"),
            lsb => outln!("page {page}: {name}, si_addr {off:+}, si_addr_lsb {lsb}"),
        }
        let at = self.address(page, 0);
        // SAFETY: the kernel reads it, or refuses to; Rust does not look at it.
        let bytes = unsafe { core::slice::from_raw_parts(at as *const u8, WORD.len()) };
        match sys::write(STDOUT, bytes) {
            Ok(_) => outln!(" page {page}: write(2) reads it"),
            Err(error) => outln!("page {page}: write(2) says {error}"),
        }
    }

    /// Looks at every word of a page.
    fn look(&mut self, page: usize) {
        let (mut zeros, mut bits) = (0, 0);
        for word in 0..WORDS {
            // SAFETY: as in `fill`.
            match unsafe { fault::load(self.address(page, word)) } {
                Ok(value) => {
                    zeros += usize::from(value == 0);
                    bits += u64::from((value ^ content(page, word)).count_ones());
                }
                Err(fault) => return self.failed(page, word, &fault),
            }
        }
        let was = core::mem::replace(&mut self.states[page], State::Good);
        if zeros == WORDS {
            self.lost += 1;
            outln!("page {page}: works, and holds zeros");
            self.fill(page);
        } else if bits > 0 {
            self.bits += bits;
            outln!("page {page}: {bits} bits differ");
            self.fill(page);
        } else if was == State::Failed {
            outln!("page {page}: works, and holds what it held");
        }
    }

    fn is_over(&self, until: Until, round: u64) -> bool {
        let healthy = self.states[..self.pages].iter().all(|state| *state == State::Good);
        let changed = self.faults + self.bits + self.lost > 0;
        match until {
            Until::Rounds(rounds) => round == rounds,
            Until::Fault => changed,
            Until::Back => changed && healthy,
        }
    }
}

fn run(args: Args) -> i32 {
    let mut cli = Cli::new(args, usage::VICTIM);
    let (mut pages, mut until, mut pause, mut grow) = (64, Until::Rounds(2), 0, 0);
    let (mut heap, mut told) = (false, false);
    while let Some(word) = cli.word() {
        match word {
            "--pages" => pages = cli.number(word, 1, MOST as u64) as usize,
            "--rounds" => until = Until::Rounds(cli.number(word, 1, u64::MAX)),
            "--until" => {
                until = match cli.value(word) {
                    "fault" => Until::Fault,
                    "back" => Until::Back,
                    other => cli.refuse(format_args!("--until is fault or back, not {other:?}")),
                }
            }
            "--pause" => pause = cli.number(word, 0, 999),
            "--grow" => grow = cli.number(word, 0, MOST as u64) as usize,
            "--heap" => heap = true,
            "--where" => told = true,
            _ => cli.unknown(word),
        }
    }
    if fault::install().is_err() {
        outln!("victim: signals cannot be caught");
        return 1;
    }
    let Some(start) =
        (if heap { on_heap(pages) } else { sys::map_anywhere(pages * PAGE, sys::PROT_RW).ok() })
    else {
        outln!("victim: no memory for {pages} pages");
        return 1;
    };
    let mut victim = Victim { start, pages, states: [State::Good; MOST], faults: 0, bits: 0, lost: 0 };
    if told {
        outln!("victim: pages from {start:#x} to {:#x}", start + pages * PAGE);
    }
    (0..pages).for_each(|page| victim.fill(page));
    let mut round = 0;
    while !victim.is_over(until, round) {
        if pause > 0 {
            sys::nanosleep(pause * MILLISECOND);
        }
        if grow > 0 && !more(grow) {
            outln!("victim: mmap refuses to give it more");
            return 1;
        }
        (0..pages).for_each(|page| victim.look(page));
        round = round.saturating_add(1);
    }
    let Victim { faults, bits, lost, .. } = victim;
    if faults + bits + lost == 0 {
        outln!("victim: {pages} pages hold what they must");
        return 0;
    }
    outln!("victim: of {pages} pages {faults} failed, {lost} lost what they held, {bits} bits differed");
    3
}

/// The first of `pages` pages of the heap.
fn on_heap(pages: usize) -> Option<usize> {
    // SAFETY: it only asks.
    let start = unsafe { sys::brk(0) }.next_multiple_of(PAGE);
    // SAFETY: the heap grows; nothing goes away.
    (unsafe { sys::brk(start + pages * PAGE) } == start + pages * PAGE).then_some(start)
}

/// Maps and touches so many more pages, for good. False if there is no room.
fn more(pages: usize) -> bool {
    let Ok(start) = sys::map_anywhere(pages * PAGE, sys::PROT_RW) else { return false };
    for page in 0..pages {
        // SAFETY: the page is new, and nobody else's. A fault of it is said by the page that faults later.
        let _ = unsafe { fault::store(start + page * PAGE, 1) };
    }
    true
}
