// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `touch`: touches each page of a mapping once a pass, in a chosen order, reading or writing.
//!
//! The first pass is a fault a page, the next ones show what a page costs that is mapped. Which page comes
//! when and whether it is written is computed, never looked up: a table would be memory touched beside the
//! pages that count.

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
use rt::random::{Checksum, mix, mix2};
use rt::sys;

/// 256 GiB, so that the squares of page numbers stay far below 2^64.
const MAX_PAGES: u64 = 1 << 26;

struct Options {
    pages: u64,
    passes: u64,
    /// Writes in a hundred accesses.
    write: u64,
    pattern: u64,
    seed: u64,
    verify: bool,
    time: bool,
    /// Touch one further page before the clock starts, so that what the first fault of a mapping costs once is
    /// not counted with what each page costs.
    prime: bool,
    /// Steps of arithmetic after each access: work that needs no memory.
    spin: u64,
}

/// In which order a pass visits the pages.
#[derive(Clone, Copy)]
enum Order {
    Ascending,
    Descending,
    /// A permutation by a Feistel network over `2 * half` bits, the fewest that hold every page number. What
    /// falls behind the last page goes through again until it falls before ("cycle walking", Black and
    /// Rogaway 2002).
    Random {
        half: u32,
    },
    /// Every `step`-th page, modulo their number; after `cycle` pages that is the first again, and the next
    /// cycle starts one page further.
    Stride {
        step: u64,
        cycle: u64,
    },
}

fn run(args: Args) -> i32 {
    let mut cli = Cli::new(args, usage::TOUCH);
    let mut options = Options {
        pages: 1024,
        passes: 1,
        write: 100,
        pattern: 0xa5a5_5a5a_0f0f_f0f0,
        seed: 1,
        verify: false,
        time: false,
        prime: false,
        spin: 0,
    };
    let mut order = "asc";
    while let Some(word) = cli.word() {
        match word {
            "--pages" => options.pages = cli.number(word, 1, MAX_PAGES),
            "--passes" => options.passes = cli.number(word, 1, 1_000_000),
            "--order" => order = cli.value(word),
            "--write" => options.write = cli.number(word, 0, 100),
            "--pattern" => options.pattern = cli.hex(word),
            "--seed" => options.seed = cli.number(word, 0, u64::MAX),
            "--verify" => options.verify = true,
            "--time" => options.time = true,
            "--prime" => options.prime = true,
            "--spin" => options.spin = cli.number(word, 0, 1_000_000),
            _ => cli.unknown(word),
        }
    }
    // Only now: what an order is depends on the number of pages, which may be given behind it.
    let order = match (order, order.strip_prefix("stride:")) {
        ("asc", _) => Order::Ascending,
        ("desc", _) => Order::Descending,
        ("random", _) => Order::Random { half: (64 - (options.pages - 1).leading_zeros()).div_ceil(2) },
        (_, Some(step)) => {
            let step = cli.parse("stride", step, 1, u64::MAX) % options.pages;
            Order::Stride { step, cycle: options.pages / gcd(options.pages, step) }
        }
        _ => cli.refuse(format_args!("--order must be asc, desc, random or stride:K, not {order:?}")),
    };

    let primer = usize::from(options.prime);
    let base = match sys::map_anywhere((options.pages as usize + primer) * PAGE, sys::PROT_RW) {
        Ok(base) => base,
        Err(error) => {
            errln!("touch: cannot map {} pages: {error}", options.pages);
            return 1;
        }
    };
    if options.prime {
        // SAFETY: the mapping is one page longer than what the passes visit.
        unsafe { ((base + options.pages as usize * PAGE) as *mut u64).write_volatile(options.pattern) };
    }
    let mut checksum = Checksum::new();
    for pass in 0..options.passes {
        let start = sys::now();
        checksum.add(options.pass(base, order, pass));
        if options.time {
            let spent = sys::now() - start;
            let each = spent / options.pages;
            outln!("pass {}: {spent} ns, {}.{:03} us/page", pass + 1, each / 1000, each % 1000);
        }
    }
    if options.verify && !options.verify(base) {
        return 1;
    }
    outln!("touch: {} pages, {} passes, checksum {:016x}", options.pages, options.passes, checksum.value());
    0
}

impl Options {
    /// One pass: touches every page, returns a sum over what was read and written, in the order of access.
    fn pass(&self, base: usize, order: Order, pass: u64) -> u64 {
        let mut sum = 0_u64;
        for step in 0..self.pages {
            let page = self.page(order, step);
            let word = (base + page as usize * PAGE) as *mut u64;
            let value = if self.writes(pass, page) {
                let value = self.pattern ^ page;
                // SAFETY: `page` is below `self.pages`, the length of the mapping, which is this function's
                // alone.
                unsafe { word.write_volatile(value) };
                value
            } else {
                // SAFETY: as above.
                unsafe { word.read_volatile() }
            };
            // Cheaper than `Checksum`, since it is inside what --time measures.
            sum = sum.rotate_left(7).wrapping_mul(5) ^ value;
            for _ in 0..self.spin {
                sum = mix(sum);
            }
        }
        sum
    }

    /// The page to touch as number `step` of a pass.
    fn page(&self, order: Order, step: u64) -> u64 {
        match order {
            Order::Ascending => step,
            Order::Descending => self.pages - 1 - step,
            Order::Stride { step: stride, cycle } => (step / cycle + step % cycle * stride) % self.pages,
            Order::Random { half } => {
                let mask = (1 << half) - 1;
                let mut page = step;
                loop {
                    let (mut left, mut right) = (page >> half, page & mask);
                    for round in 0..3 {
                        (left, right) = (right, left ^ (mix(self.seed ^ round << 56 ^ right) & mask));
                    }
                    page = left << half | right;
                    if page < self.pages {
                        break page;
                    }
                }
            }
        }
    }

    /// Whether `pass` writes to `page`.
    fn writes(&self, pass: u64, page: u64) -> bool {
        match self.write {
            0 => false,
            100 => true,
            percent => mix2(self.seed ^ pass, page) % 100 < percent,
        }
    }

    /// Whether each page holds what the passes, if they wrote it, put there; says so if not.
    fn verify(&self, base: usize) -> bool {
        for page in 0..self.pages {
            let written = (0..self.passes).any(|pass| self.writes(pass, page));
            let expected = if written { self.pattern ^ page } else { 0 };
            // SAFETY: `page` is below the length of the mapping.
            let got = unsafe { ((base + page as usize * PAGE) as *const u64).read_volatile() };
            if got != expected {
                errln!("touch: page {page}: expected {expected:#018x}, got {got:#018x}");
                return false;
            }
        }
        true
    }
}

/// Greatest common divisor; that of a number and zero is the number.
const fn gcd(mut a: u64, mut b: u64) -> u64 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}
