// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What `memstress` is told on its command line, and the machine that this takes.

use super::super::linux;
use crate::vm::{Tracking, VmConfig, WindowFill};
use anyhow::{Result, bail};
use shadow_mmu::addr::PAGE_SIZE;
use shadow_mmu::shadow::FaultAroundPolicy;
use std::time::Duration;

/// What `memstress` is to touch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Work {
    /// Threads, hence vCPUs, that touch memory. One more waits for commands.
    pub threads: u32,
    /// Pages of each.
    pub pages: u64,
    /// All threads touch the same pages.
    pub overlap: bool,
    /// Writes in a hundred accesses of the command `mix`.
    pub write_percent: u8,
    /// Random pages instead of one after the other.
    pub random: bool,
    /// Of the random numbers.
    pub seed: u64,
    /// Steps of arithmetic after each access.
    pub spin: u64,
}

impl Work {
    /// `threads` threads that touch `pages` pages each in order.
    pub fn new(threads: u32, pages: u64) -> Self {
        Self { threads, pages, overlap: false, write_percent: 100, random: false, seed: 1, spin: 0 }
    }

    /// Pages in all.
    pub fn total_pages(&self) -> u64 {
        if self.overlap { self.pages } else { self.pages.saturating_mul(u64::from(self.threads)) }
    }

    /// Whether the host has the memory for `copies` of it at once, and a quarter more.
    ///
    /// # Errors
    /// It has not: better than the out-of-memory killer.
    pub fn expect_room(&self, copies: u64) -> Result<()> {
        let needed = self.total_pages().saturating_mul(PAGE_SIZE * copies).saturating_mul(5) / 4;
        match linux::available_memory() {
            Some(available) if available < needed => bail!(
                "this takes {} MiB of memory and the host has {} MiB available: give it fewer pages or vCPUs",
                needed >> 20,
                available >> 20
            ),
            _ => Ok(()),
        }
    }

    /// Longer than one pass over all of it takes, whoever serves its faults.
    pub(super) fn pass_at_most(&self) -> Duration {
        let accesses = self.pages.saturating_mul(self.threads.into());
        // No access takes a millisecond: a fault that copies a page and is looked at by a log takes a tenth.
        Duration::from_millis(accesses)
    }

    /// A machine for it: room for the pages, their tables, and the reserve that pages ahead of need stay clear of.
    pub fn config(
        &self,
        fault_around: FaultAroundPolicy,
        window: WindowFill,
        tracking: Tracking,
    ) -> VmConfig {
        let bytes = self.total_pages().saturating_mul(PAGE_SIZE);
        let threads = u64::from(self.threads) << 20;
        let memory = (bytes + bytes / 4 + threads).saturating_add(32 << 20);
        VmConfig { fault_around, window, tracking, ..VmConfig::new(crate::cli::engine(), memory) }
    }

    /// The command line behind the program's name.
    pub(super) fn words(&self) -> Vec<String> {
        let mut words = Vec::new();
        let mut option = |name: &str, value: u64| words.extend([name.to_owned(), value.to_string()]);
        option("--threads", self.threads.into());
        option("--pages", self.pages);
        option("--write-percent", self.write_percent.into());
        option("--seed", self.seed);
        option("--spin", self.spin);
        for (is_set, name) in [(self.overlap, "--overlap"), (self.random, "--random")] {
            words.extend(is_set.then(|| name.to_owned()));
        }
        words
    }
}
