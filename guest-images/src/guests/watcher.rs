// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `watcher`: reads memory that changes behind its back, over and over, and says on request what it sees.
//!
//! With `--board` somebody else owns the memory and changes it: umbra, which adopted a mapping of its own and one page
//! more, the *board*, on which the two talk (`umbra run --adopt-demo`). Words of the board:
//!
//! | word | who writes | what |
//! | --- | --- | --- |
//! | 0 | umbra | number of the request; 0 at first |
//! | 1 | watcher | number of the request that was answered last |
//! | 2 | umbra | address of the first page to watch; 0 ends the program |
//! | 3 | watcher | words read while nothing was asked |
//! | 4 | watcher | of those, words that the mapping never held |
//! | 5 | watcher | bit n: page n answered with SIGSEGV, `SEGV_MAPERR` |
//! | 8 + n | watcher | what is read in page n |
//!
//! Without it the program does the same to memory of its own, by the same system calls, and looks after each.

#![no_std]
#![no_main]

#[allow(dead_code, reason = "the runtime serves all guests, and none uses all of it")]
mod rt;
#[allow(dead_code, reason = "each guest prints one of the usage lines")]
#[path = "../usage.rs"]
mod usage;

use core::fmt;
use core::sync::atomic::{AtomicU64, Ordering};

use rt::PAGE;
use rt::args::{Args, Cli};
use rt::fault;
use rt::out::{errln, outln};
use rt::sys::{self, Errno};

/// Pages that are watched.
const PAGES: usize = 8;
/// What page n holds at first, less n.
const TAG: u64 = 0xada0;
/// What is written into one of them later, and into which.
const NEWS: u64 = 0x2e35;
const NEWS_AT: u64 = 3;

/// What is read in each page.
type Sight = [Result<u64, fault::Fault>; PAGES];

struct Shown<'a>(&'a Sight);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, page) in self.0.iter().enumerate() {
            if number > 0 {
                f.write_str(" ")?;
            }
            match page {
                Ok(value) => write!(f, "{value:x}")?,
                Err(fault) if is_gone(fault) => f.write_str("gone")?,
                Err(fault) => f.write_str(fault.name())?,
            }
        }
        Ok(())
    }
}

/// Whether nothing is mapped there.
fn is_gone(fault: &fault::Fault) -> bool {
    (fault.signal, fault.code) == (fault::SIGSEGV, fault::SEGV_MAPERR)
}

/// Reads the first word of each page, at the addresses that `place` gives.
fn look(place: impl Fn(usize) -> usize) -> Sight {
    // SAFETY: the handler is installed, and nothing of Rust's lies in the pages.
    core::array::from_fn(|page| unsafe { fault::load(place(page)) })
}

fn run(args: Args) -> i32 {
    let mut cli = Cli::new(args, usage::WATCHER);
    let mut board = 0;
    while let Some(word) = cli.word() {
        match word {
            "--board" => board = cli.hex(word) as usize,
            _ => cli.unknown(word),
        }
    }
    if let Err(error) = fault::install() {
        errln!("watcher: cannot handle signals: {error}");
        return 1;
    }
    if board != 0 {
        return watch(board);
    }
    match change() {
        Ok(()) => 0,
        Err(error) => {
            errln!("watcher: a system call failed: {error}");
            1
        }
    }
}

/// Word `index` of the board.
fn word(board: usize, index: usize) -> &'static AtomicU64 {
    // SAFETY: who started us put the board there, a page that stays, for both to access as atomic words.
    unsafe { &*((board + 8 * index) as *const AtomicU64) }
}

/// Reads on and on, and answers requests.
fn watch(board: usize) -> i32 {
    let mut base = 0;
    let (mut words, mut wrong) = (0, 0);
    for answered in 0.. {
        while word(board, 0).load(Ordering::Acquire) == answered {
            if base == 0 {
                sys::sched_yield();
                continue;
            }
            // Faults are as good as values: it is being changed right now.
            let sight = look(|page| base + page * PAGE);
            for (number, value) in (0..).zip(sight).filter_map(|(number, page)| Some((number, page.ok()?))) {
                words += 1;
                let ever = value == 0 || value == TAG + number || value == NEWS && number == NEWS_AT;
                wrong += u64::from(!ever);
            }
        }
        word(board, 3).store(words, Ordering::Relaxed);
        word(board, 4).store(wrong, Ordering::Relaxed);
        base = word(board, 2).load(Ordering::Relaxed) as usize;
        if base == 0 {
            return 0;
        }
        let sight = look(|page| base + page * PAGE);
        let mut gone = 0;
        for (number, page) in sight.iter().enumerate() {
            match page {
                Ok(value) => word(board, 8 + number).store(*value, Ordering::Relaxed),
                Err(fault) if is_gone(fault) => gone |= 1 << number,
                // No value that is ever promised.
                Err(_) => word(board, 8 + number).store(u64::MAX, Ordering::Relaxed),
            }
        }
        word(board, 5).store(gone, Ordering::Relaxed);
        outln!("guest  sees {}", Shown(&sight));
        word(board, 1).store(answered + 1, Ordering::Release);
    }
    0
}

/// Does to memory of its own what `umbra run --adopt-demo` does to its.
fn change() -> Result<(), Errno> {
    let room = sys::map_anywhere(4 * PAGES * PAGE, sys::PROT_NONE)?;
    let at = |start: usize, page: usize| room + (start + page) * PAGE;
    let flags = sys::MAP_PRIVATE | sys::MAP_FIXED;
    // SAFETY: over a part of the room, where nothing lies.
    unsafe { sys::mmap(room, PAGES * PAGE, sys::PROT_RW, flags) }?;
    let put = |page: usize, value| {
        // SAFETY: the handler is installed, and nothing of Rust's lies in the pages.
        let _ = unsafe { fault::store(at(0, page), value) };
    };
    (0..PAGES).for_each(|page| put(page, TAG + page as u64));
    outln!("at first: {}", Shown(&look(|page| at(0, page))));
    put(NEWS_AT as usize, NEWS);
    outln!("page 3 written: {}", Shown(&look(|page| at(0, page))));
    // SAFETY: nothing of Rust's lies in the pages.
    unsafe { sys::madvise(at(0, 1), 2 * PAGE, sys::MADV_DONTNEED) }?;
    outln!("pages 1 and 2 discarded: {}", Shown(&look(|page| at(0, page))));
    let fixed = sys::MREMAP_MAYMOVE | sys::MREMAP_FIXED;
    // SAFETY: from pages of ours to a free part of the room.
    unsafe { sys::mremap(at(0, 0), PAGES * PAGE, PAGES * PAGE, fixed, at(PAGES, 0)) }?;
    outln!("all moved: {}", Shown(&look(|page| at(PAGES, page))));
    // SAFETY: nothing of Rust's lies in the pages.
    unsafe { sys::munmap(at(PAGES, 4), 2 * PAGE) }?;
    outln!("pages 4 and 5 unmapped: {}", Shown(&look(|page| at(PAGES, page))));
    // SAFETY: as above.
    unsafe { sys::mremap(at(PAGES, 6), 2 * PAGE, 2 * PAGE, fixed, at(2 * PAGES, 0)) }?;
    let place = |page| if page < 6 { at(PAGES, page) } else { at(2 * PAGES, page - 6) };
    outln!("pages 6 and 7 moved: {}", Shown(&look(place)));
    // SAFETY: as above.
    unsafe { sys::munmap(room, 4 * PAGES * PAGE) }?;
    outln!("all unmapped: {}", Shown(&look(place)));
    Ok(())
}
