// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Times of single accesses: by the CPU's time-stamp counter, since a guest's system call costs more than what is timed.
//!
//! What a tick is, is found beside the clock of the system, over a time that is long against a system call. The counter is
//! taken to run evenly and to be the same on all CPUs, as it has been on x86-64 machines for long ("constant_tsc").

use core::arch::asm;

use crate::rt::sys;

/// Shorter than this, and the two system calls would be too much of it.
const LEAST: u64 = 20_000_000;

/// The counter, after everything before it and before everything behind it.
#[inline(always)]
pub fn ticks() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: the fences and the counter touch no memory; that the block is not `nomem` keeps accesses on their side of it.
    unsafe {
        asm!("mfence", "lfence", "rdtsc", "lfence", out("eax") low, out("edx") high,
             options(nostack, preserves_flags));
    }
    u64::from(high) << 32 | u64::from(low)
}

/// A clock that learns what a tick is while something is timed.
pub struct Clock {
    ticks: u64,
    nanoseconds: u64,
}

/// Times of `count` accesses, in nanoseconds.
pub struct Times {
    pub count: usize,
    pub median: u64,
    pub p99: u64,
}

impl Clock {
    /// From now on.
    pub fn start() -> Self {
        Self { ticks: ticks(), nanoseconds: sys::now() }
    }

    /// What the middle and the hundredth-longest of `samples`, in ticks, are. They are sorted.
    pub fn times(self, samples: &mut [u64]) -> Times {
        let elapsed = loop {
            let elapsed = sys::now() - self.nanoseconds;
            if elapsed >= LEAST {
                break elapsed;
            }
        };
        let counted = (ticks() - self.ticks).max(1);
        samples.sort_unstable();
        let of = |share: usize| match samples.len() {
            0 => 0,
            count => {
                let ticks = samples[(count * share / 100).min(count - 1)];
                (u128::from(ticks) * u128::from(elapsed) / u128::from(counted)) as u64
            }
        };
        Times { count: samples.len(), median: of(50), p99: of(99) }
    }
}
