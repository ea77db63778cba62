// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `torture`: random memory system calls, every result and every word read compared with a model of Linux's
//! rules.
//!
//! A seed decides everything. All happens in an arena of address space and in the heap, where the program
//! does nothing else, so the model knows of each page what is there, what may be done to it and what it
//! holds.
//!
//! `model.rs` is that knowledge, `content.rs` what a page holds. `maps.rs`, `moves.rs`, `heap.rs` and
//! `errors.rs` make the system calls, `access.rs` the loads and stores. `run.rs` holds one seed's state and
//! reports differences.

#![no_std]
#![no_main]

#[path = "torture/access.rs"]
mod access;
#[path = "torture/content.rs"]
mod content;
#[path = "torture/errors.rs"]
mod errors;
#[path = "torture/heap.rs"]
mod heap;
#[path = "torture/maps.rs"]
mod maps;
#[path = "torture/model.rs"]
mod model;
#[path = "torture/moves.rs"]
mod moves;
#[allow(dead_code, reason = "the runtime serves all guests, and none uses all of it")]
mod rt;
#[path = "torture/run.rs"]
mod run;
#[allow(dead_code, reason = "each guest prints one of the usage lines")]
#[path = "../usage.rs"]
mod usage;

use rt::args::{Args, Cli};
use rt::out::{errln, outln};
use rt::sys::Errno;

use model::Model;
use run::{Places, Run};

fn run(args: Args) -> i32 {
    let mut cli = Cli::new(args, usage::TORTURE);
    let (mut seeds, mut ops, mut pages, mut trace) = (None, 1000, 256, false);
    while let Some(word) = cli.word() {
        match word {
            "--ops" => ops = cli.number(word, 0, u64::MAX),
            "--pages" => pages = cli.number(word, model::MIN_PAGES as u64, model::MAX_PAGES as u64) as usize,
            "--trace" => trace = true,
            _ if word.starts_with('-') || seeds.is_some() => cli.unknown(word),
            _ => {
                let (first, last) = word.split_once("..").unwrap_or((word, word));
                let first = cli.parse("SEED", first, 0, u64::MAX);
                seeds = Some((first, cli.parse("LAST", last, first, u64::MAX)));
            }
        }
    }
    let Some((first, last)) = seeds else {
        cli.refuse(format_args!("a SEED is missing, or two as in 1..200"));
    };
    match torture(first, last, ops, pages, trace) {
        Ok(()) => 0,
        Err(error) => {
            errln!("torture: the arena cannot be set up: {error}");
            1
        }
    }
}

/// Runs the seeds from `first` to `last`, both included. A difference ends the program from within.
fn torture(first: u64, last: u64, ops: u64, pages: usize, trace: bool) -> Result<(), Errno> {
    rt::fault::install()?;
    let places = Places::reserve(pages)?;
    let mut model = Model::new(pages)?;
    for seed in first..=last {
        let mut run = Run::new(seed, &places, &mut model, trace)?;
        for op in 1..=ops {
            run.step(op);
        }
        let checksum = run.finish();
        outln!("torture seed {seed}: {ops} ops, checksum {checksum:016x}");
    }
    Ok(())
}
