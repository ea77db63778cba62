// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `compute`: work of several kinds that needs a CPU and hardly any memory, each timed by itself.
//!
//! The kinds differ in what they ask of whoever runs them: a translator of instructions does well at a chain of
//! multiplications and badly at calls, vectors and floating point. Each takes about as long as the others where the
//! CPU itself runs the code. The first round, in which pages come in, is not timed.

#![no_std]
#![no_main]

#[allow(dead_code, reason = "the runtime serves all guests, and none uses all of it")]
mod rt;
#[allow(dead_code, reason = "each guest prints one of the usage lines")]
#[path = "../usage.rs"]
mod usage;

use core::hint::black_box;

use rt::args::{Args, Cli};
use rt::out::{errln, outln};
use rt::random::{Checksum, mix};
use rt::sys;

/// Words of the memory that all kinds share, 512 KiB.
const WORDS: usize = 1 << 16;
/// Rows and columns of a matrix. Three of them are in the memory.
const SIDE: usize = 128;

/// One round over the memory; what it returns depends on all that was computed.
type Work = fn(&mut [u64], u64) -> u64;

const KINDS: [(&str, Work); 5] =
    [("chain", chain), ("sort", sort), ("calls", calls), ("bytes", bytes), ("floats", floats)];

fn run(args: Args) -> i32 {
    let mut cli = Cli::new(args, usage::COMPUTE);
    let mut rounds = 1;
    while let Some(word) = cli.word() {
        match word {
            "--rounds" => rounds = cli.number(word, 1, 1_000_000),
            _ => cli.unknown(word),
        }
    }
    let base = match sys::map_anywhere(WORDS * size_of::<u64>(), sys::PROT_RW) {
        Ok(base) => base,
        Err(error) => {
            errln!("compute: cannot map memory: {error}");
            return 1;
        }
    };
    // SAFETY: the mapping is that long, zeroed, and nobody else's.
    let memory = unsafe { core::slice::from_raw_parts_mut(base as *mut u64, WORDS) };
    for (name, work) in KINDS {
        let mut checksum = Checksum::new();
        checksum.add(work(memory, 0));
        let start = sys::now();
        for round in 1..=rounds {
            checksum.add(work(memory, round));
        }
        let spent = sys::now() - start;
        outln!("{name}: {spent} ns, checksum {:016x}", checksum.value());
    }
    0
}

/// Each step waits for the one before.
fn chain(_: &mut [u64], round: u64) -> u64 {
    (0..500_000).fold(round, |value, step| mix(value ^ step))
}

/// Compares and swaps that nobody can predict: a heap sort.
fn sort(memory: &mut [u64], round: u64) -> u64 {
    let words = &mut memory[..32 << 10];
    for (at, word) in (0..).zip(words.iter_mut()) {
        *word = mix(round << 32 | at);
    }
    for root in (0..words.len() / 2).rev() {
        sift(words, root);
    }
    for end in (1..words.len()).rev() {
        words.swap(0, end);
        sift(&mut words[..end], 0);
    }
    words.iter().step_by(1 << 10).fold(0, |sum, word| mix(sum ^ word))
}

fn sift(heap: &mut [u64], mut root: usize) {
    loop {
        let mut child = 2 * root + 1;
        if child >= heap.len() {
            return;
        }
        if child + 1 < heap.len() && heap[child] < heap[child + 1] {
            child += 1;
        }
        if heap[child] <= heap[root] {
            return;
        }
        heap.swap(root, child);
        root = child;
    }
}

/// Calls, returns, and calls of what only a table knows.
fn calls(_: &mut [u64], round: u64) -> u64 {
    let table: [fn(u64, u64) -> u64; 4] = black_box([
        |a, b| a.wrapping_add(b),
        |a, b| a ^ b.rotate_left(7),
        |a, b| a.wrapping_sub(b >> 3),
        |a, b| a.wrapping_mul(b | 1),
    ]);
    #[inline(never)]
    fn descend(table: &[fn(u64, u64) -> u64; 4], depth: u64, value: u64) -> u64 {
        if depth == 0 {
            return value;
        }
        let (left, right) = (descend(table, depth - 1, value ^ depth), descend(table, depth - 1, !value));
        table[((left >> 5) & 3) as usize](left, right)
    }
    descend(&table, 18, round)
}

/// Loops over bytes, which the compiler turns into vector instructions.
fn bytes(memory: &mut [u64], round: u64) -> u64 {
    let words = &mut memory[..8 << 10];
    for (at, word) in (0..).zip(words.iter_mut()) {
        *word = round.wrapping_mul(at);
    }
    // SAFETY: eight bytes a word, and any byte is a byte.
    let bytes =
        unsafe { core::slice::from_raw_parts_mut(words.as_mut_ptr().cast::<u8>(), size_of_val(words)) };
    let mut sum = 0;
    for pass in 0..50_u8 {
        bytes.iter_mut().for_each(|byte| *byte = (*byte ^ pass).wrapping_add(*byte >> 1).max(3));
        sum += black_box(&*bytes).iter().map(|byte| u64::from(*byte)).sum::<u64>();
    }
    sum
}

/// Four times the product of two matrices of numbers with double precision.
fn floats(memory: &mut [u64], round: u64) -> u64 {
    // SAFETY: a double takes as many bytes as a word and has its alignment, and any bits are one.
    let doubles = unsafe { core::slice::from_raw_parts_mut(memory.as_mut_ptr().cast::<f64>(), memory.len()) };
    let (a, rest) = doubles.split_at_mut(SIDE * SIDE);
    let (b, rest) = rest.split_at_mut(SIDE * SIDE);
    let product = &mut rest[..SIDE * SIDE];
    for (at, (a, b)) in (0..).zip(a.iter_mut().zip(b.iter_mut())) {
        *a = (mix(round << 32 | at) >> 40) as f64;
        *b = 1.0 / (1.0 + *a);
    }
    product.fill(0.0);
    for _ in 0..4 {
        for row in 0..SIDE {
            for middle in 0..SIDE {
                let factor = a[row * SIDE + middle];
                let from = &b[middle * SIDE..][..SIDE];
                let to = &mut product[row * SIDE..][..SIDE];
                to.iter_mut().zip(from).for_each(|(to, from)| *to += factor * from);
            }
        }
    }
    product.iter().fold(0, |sum, value| mix(sum ^ value.to_bits()))
}
