// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `syscalls`: makes one system call many times, and tells how long that took.
//!
//! `getpid` does nothing but go there and back. `clock_gettime` also has 16 bytes written to the caller's memory.
//! `mmap` is a page that is mapped, touched and unmapped: two calls and a fault, a tenth as often as the others.
//! One of each goes before those that are timed.

#![no_std]
#![no_main]

#[allow(dead_code, reason = "the runtime serves all guests, and none uses all of it")]
mod rt;
#[allow(dead_code, reason = "each guest prints one of the usage lines")]
#[path = "../usage.rs"]
mod usage;

use rt::PAGE;
use rt::args::{Args, Cli};
use rt::out::{errln, outln};
use rt::sys;

fn run(args: Args) -> i32 {
    let mut cli = Cli::new(args, usage::SYSCALLS);
    let mut calls = 1000;
    while let Some(word) = cli.word() {
        match word {
            "--calls" => calls = cli.number(word, 10, 100_000_000),
            _ => cli.unknown(word),
        }
    }
    let done = time("getpid", calls, || {
        sys::getpid();
        Ok(0)
    })
    .and_then(|()| {
        time("clock_gettime", calls, || {
            sys::now();
            Ok(0)
        })
    })
    .and_then(|()| time("mmap", calls / 10, map_and_unmap));
    if let Err(error) = done {
        errln!("syscalls: a page cannot be mapped and unmapped: {error}");
        return 1;
    }
    0
}

fn time(name: &str, times: u64, mut call: impl FnMut() -> sys::Return) -> Result<(), sys::Errno> {
    call()?;
    let start = sys::now();
    for _ in 0..times {
        call()?;
    }
    let spent = sys::now() - start;
    outln!("{name}: {spent} ns, {times} times");
    Ok(())
}

fn map_and_unmap() -> sys::Return {
    let page = sys::map_anywhere(PAGE, sys::PROT_RW)?;
    // SAFETY: the page was just mapped, and is nobody else's.
    unsafe { (page as *mut u64).write_volatile(1) };
    // SAFETY: nothing that Rust knows is in it.
    unsafe { sys::munmap(page, PAGE) }
}
