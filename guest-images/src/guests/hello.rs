// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `hello`: greets, and proves that each kind of memory a program starts with works.
//!
//! It is also built as a static-pie, `hello-pie`. The two print the same.

#![no_std]
#![no_main]

#[allow(dead_code, reason = "the runtime serves all guests, and none uses all of it")]
mod rt;
#[allow(dead_code, reason = "each guest prints one of the usage lines")]
#[path = "../usage.rs"]
mod usage;

use core::cell::UnsafeCell;

use rt::PAGE;
use rt::args::{Args, Cli};
use rt::out::{errln, outln};
use rt::random::{Checksum, mix2};
use rt::sys;

/// Bytes of each kind of memory: more than two pages, so that page boundaries are crossed.
const BYTES: usize = 2 * PAGE + 512;
const LEN: usize = BYTES / 8;

/// Words in a static that the one thread of this program may change.
struct Static(UnsafeCell<[u64; LEN]>);
// SAFETY: the program has one thread.
unsafe impl Sync for Static {}

/// Comes from the file: not zero, so that it lands in .data.
static DATA: Static = Static(UnsafeCell::new([0x5eed; LEN]));
/// Comes from nowhere: zero, and not in the file.
static BSS: Static = Static(UnsafeCell::new([0; LEN]));

/// Tries one kind of memory, with content that depends on the argument; returns a checksum, or the problem.
type Part = fn(u64) -> Result<u64, &'static str>;

/// What is tried, by name. A table of pointers, so that a static-pie which was not relocated would fail here.
static PARTS: [(&str, Part); 5] =
    [("stack", stack), ("data", data), ("bss", bss), ("brk", heap), ("mmap", mapping)];

fn run(args: Args) -> i32 {
    let mut cli = Cli::new(args, usage::HELLO);
    if let Some(word) = cli.word() {
        cli.unknown(word);
    }
    let mut checksum = Checksum::new();
    for (number, (name, part)) in (1..).zip(core::hint::black_box(&PARTS)) {
        match part(number) {
            Ok(sum) => checksum.add(sum),
            Err(problem) => {
                errln!("hello: {name}: {problem}");
                return 1;
            }
        }
    }
    outln!("hello from ring 3: stack, data, bss, brk and mmap answer (checksum {:016x})", checksum.value());
    0
}

fn stack(number: u64) -> Result<u64, &'static str> {
    let mut words = [0; LEN];
    exercise(words.as_mut_ptr(), 0, number)
}

fn data(number: u64) -> Result<u64, &'static str> {
    exercise(DATA.0.get().cast(), 0x5eed, number)
}

fn bss(number: u64) -> Result<u64, &'static str> {
    exercise(BSS.0.get().cast(), 0, number)
}

fn heap(number: u64) -> Result<u64, &'static str> {
    // SAFETY: it only asks.
    let old = unsafe { sys::brk(0) };
    // The heap may start anywhere; words must not.
    let start = old.next_multiple_of(8);
    // SAFETY: the heap grows; nothing goes away.
    if unsafe { sys::brk(start + BYTES) } != start + BYTES {
        return Err("the heap does not grow");
    }
    let sum = exercise(start as *mut u64, 0, number)?;
    // SAFETY: nothing but `exercise` used the new part.
    if unsafe { sys::brk(old) } != old {
        return Err("the heap does not shrink");
    }
    Ok(sum)
}

fn mapping(number: u64) -> Result<u64, &'static str> {
    let start = sys::map_anywhere(BYTES, sys::PROT_RW).map_err(|_| "it cannot be mapped")?;
    let sum = exercise(start as *mut u64, 0, number)?;
    // SAFETY: nothing but `exercise` used the mapping.
    unsafe { sys::munmap(start, BYTES) }.map_err(|_| "it cannot be unmapped")?;
    Ok(sum)
}

/// Expects `LEN` words of `initial`, changes each, and returns a sum over what it then reads.
fn exercise(words: *mut u64, initial: u64, number: u64) -> Result<u64, &'static str> {
    for index in 0..LEN {
        let word = words.wrapping_add(index);
        // SAFETY: every caller passes `LEN` aligned words that are its own. Volatile, so that memory is
        // really used.
        if unsafe { word.read_volatile() } != initial {
            return Err("it does not start with what it should hold");
        }
        // SAFETY: as above.
        unsafe { word.write_volatile(mix2(number, index as u64)) };
    }
    let mut sum = Checksum::new();
    for index in 0..LEN {
        // SAFETY: as above.
        sum.add(unsafe { words.wrapping_add(index).read_volatile() });
    }
    Ok(sum.value())
}
