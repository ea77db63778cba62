// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `bench age`: what it costs to learn which pages were accessed, for each page that is present.
//!
//! | row | what is timed |
//! | --- | --- |
//! | `umbra.all-young` | one aging pass ([`Mm::age`](shadow_mmu::mm::Mm::age)) after the guest has touched every page |
//! | `umbra.1pct-young` | the same after it has touched every hundredth |
//! | `umbra.none-young` | after it has touched none |
//! | `umbra.….flush` | the same with the flush in it that this host needs, so that A is set again; only where it needs one |
//! | `clear_refs+smaps.…` | the same program as a process: `Referenced` of its smaps is read and 1 written to its clear_refs |
//! | `table-read` | reading 8 bytes a page once, table after table in an order that no prefetcher knows: the limit |
//!
//! Rows without `.flush` are the harvest alone. Where A needs a flush to be set again, they flush everything between two
//! runs, with the clock stopped, and so the guest's next accesses are seen.
//!
//! Before every run of every row 256 MiB are walked through, with the clock stopped, so that no table is in a cache. Every
//! run checks that it has found the pages that were touched: all of them and no other where KVM sets A, in software; where
//! the CPU does, nine in ten, for a TLB may hide an access, and some that were not touched, for CPUs set A ahead of accesses
//! too. Linux's files are about the whole process, which has a few dozen pages more; they give a sum for a mapping where
//! umbra notes an age a page.

use super::access_tracking::{TOLD, pages_within};
use super::linux::LinuxPages;
use super::memstress::{Memstress, Work};
use super::{Contestant, Host, Measure, Report, measure, ratios};
use crate::causes::one_line;
use crate::engine::Marks;
use crate::vm::WindowFill;
use anyhow::{Context, Result, bail};
use shadow_mmu::addr::HvaRange;
use shadow_mmu::mm::PageAge;
use shadow_mmu::shadow::{AdBits, FaultAroundPolicy, Tlb};
use std::cell::RefCell;
use std::hint::black_box;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Instant;

/// Suffix of a row, what the guest does before each run, and how many pages that touches: one of so many.
const STATES: [(&str, Option<&str>, u64); 3] =
    [("all-young", Some("read"), 1), ("1pct-young", Some("read every 100"), 100), ("none-young", None, 0)];

/// Words of a table.
const ENTRIES: usize = 512;
/// Pages that may look accessed where none was.
const GUESSES: u64 = 64;
/// More than a cache holds.
const COLD_BYTES: usize = 256 << 20;

/// Runs the benchmark over `pages` pages, `runs` times a row.
///
/// # Errors
/// What keeps umbra from running a guest at all; a pass that does not find what was touched.
pub fn bench_age(host: &Host, pages: u64, runs: usize, progress: &mut dyn FnMut(&str)) -> Result<Report> {
    // A guest and a process, both there all the time.
    Work::new(1, pages).expect_room(2)?;
    progress("bringing the memory in");
    let cold = Cold::new();
    let guest = Guest::new(pages)?;
    let needs_flush = guest.host_bits == AdBits::AfterFlush;
    let native = native(pages);
    let table = TableRead::new(pages);

    let mut names = Vec::new();
    for (state, ..) in STATES {
        names.push(format!("umbra.{state}"));
        names.push(format!("umbra.{state}.flush"));
        names.push(format!("clear_refs+smaps.{state}"));
    }
    let mut rows: Vec<Measure<'_>> = Vec::new();
    for ((_, command, one_of), names) in STATES.into_iter().zip(names.chunks_exact(3)) {
        let expected = if one_of == 0 { 0 } else { pages.div_ceil(one_of) };
        let (guest, cold) = (&guest, &cold);
        let flushes = [(&names[0], Flush::Between), (&names[1], Flush::Within)];
        for (name, flush) in flushes.into_iter().filter(|(_, flush)| *flush == Flush::Between || needs_flush)
        {
            rows.push(Contestant::required(name, move || guest.harvest(command, expected, flush, cold)));
        }
        let native = native.as_ref();
        rows.push(Contestant::optional(&names[2], move || match native {
            Ok((memstress, linux)) => linux_harvest(&mut memstress.borrow_mut(), linux, command, pages, cold),
            Err(error) => bail!("{}", one_line(error)),
        }));
    }
    rows.push(Contestant::required("table-read", || Ok(table.read(&cold))));
    let (rows, missing) = measure("ns/page", runs, rows, progress)?;

    let linux_over_umbra = STATES
        .iter()
        .flat_map(|(state, ..)| {
            let linux = format!("clear_refs+smaps.{state}");
            [(linux.clone(), format!("umbra.{state}")), (linux, format!("umbra.{state}.flush"))]
        })
        .chain([("umbra.none-young".to_owned(), "table-read".to_owned())]);
    let pairs: Vec<_> = linux_over_umbra.collect();
    let pairs: Vec<_> = pairs.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
    let ratios = ratios(&rows, &pairs);
    guest.memstress.into_inner().finish()?;
    if let Ok((memstress, _)) = native {
        memstress.into_inner().finish()?;
    }
    Ok(Report {
        bench: "age".into(),
        host: host.clone(),
        rows,
        ratios,
        missing,
        notes: Vec::new(),
        lines: Vec::new(),
    })
}

/// Where a host needs a flush, when it is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flush {
    /// After the pass, of everything, not timed.
    Between,
    /// In the pass, as `umbra run --age` does it.
    Within,
}

/// How many pages may be found young where so many were accessed. A prefetcher runs ahead of an access, one page beyond it at
/// most; and a CPU that guesses what comes next may guess a few pages anywhere.
fn may_find(marks: Marks, accessed: u64) -> RangeInclusive<u64> {
    match marks {
        Marks::Exact => accessed..=accessed,
        Marks::CpuGuesses => accessed * 9 / 10..=accessed * 2 + GUESSES,
    }
}

/// A guest whose memory is all there.
struct Guest {
    memstress: RefCell<Memstress>,
    region: HvaRange,
    pages: u64,
    tlb: Arc<dyn Tlb>,
    host_bits: AdBits,
    marks: Marks,
}

impl Guest {
    fn new(pages: u64) -> Result<Self> {
        let work = Work::new(1, pages);
        let config = work.config(FaultAroundPolicy::Adaptive, WindowFill::Ahead, TOLD);
        let mut memstress = Memstress::guest(config, &work)?;
        memstress.pass("write")?;
        let region = memstress.region()?;
        let engine = memstress.expect_machine()?.engine();
        let (tlb, marks) = (Arc::clone(engine).tlb(), engine.marks());
        let host_bits = tlb.ad_bits();
        Ok(Self { memstress: RefCell::new(memstress), region, pages, tlb, host_bits, marks })
    }

    /// Nanoseconds a page of one pass after `command`, which touches `expected` pages.
    fn harvest(&self, command: Option<&str>, expected: u64, flush: Flush, cold: &Cold) -> Result<f64> {
        let mut memstress = self.memstress.borrow_mut();
        // What is young from before does not count.
        memstress.expect_machine()?.mm().age();
        self.tlb.flush_all();
        if let Some(command) = command {
            memstress.pass(command)?;
        }
        let machine = memstress.expect_machine()?;
        let (shadow, mm) = (machine.shadow(), machine.mm());
        let bits = match (flush, self.host_bits) {
            (Flush::Between, AdBits::AfterFlush) => AdBits::Unflushed,
            (_, bits) => bits,
        };
        cold.walk();
        // Between passes, and what was not flushed here is flushed before the guest runs again.
        shadow.set_ad_bits(bits);
        let began = Instant::now();
        mm.age();
        let time = began.elapsed();
        shadow.set_ad_bits(self.host_bits);
        self.tlb.flush_all();

        let mut young = 0;
        mm.for_each_age(|_, range, age| {
            if age == PageAge::Passes(0) {
                young += pages_within(range, self.region);
            }
        });
        let found = may_find(self.marks, expected);
        if !found.contains(&young) {
            bail!(
                "the pass found {young} pages young where {expected} had been touched; here it may find {} to {}",
                found.start(),
                found.end()
            );
        }
        Ok(time.as_nanos() as f64 / self.pages as f64)
    }
}

fn native(pages: u64) -> Result<(RefCell<Memstress>, LinuxPages)> {
    let mut memstress = Memstress::native(&Work::new(1, pages))?;
    memstress.pass("write")?;
    let pid = memstress.pid().context("memstress is no process")?;
    let linux = LinuxPages::new(pid, memstress.region()?);
    Ok((RefCell::new(memstress), linux))
}

/// The same by Linux, which does not flush either when it clears A.
fn linux_harvest(
    memstress: &mut Memstress,
    linux: &LinuxPages,
    command: Option<&str>,
    pages: u64,
    cold: &Cold,
) -> Result<f64> {
    linux.clear_referenced()?;
    if let Some(command) = command {
        memstress.pass(command)?;
    }
    cold.walk();
    let began = Instant::now();
    black_box(linux.referenced()?);
    linux.clear_referenced()?;
    Ok(began.elapsed().as_nanos() as f64 / pages as f64)
}

/// Memory to walk through, so that nothing else is left in the caches.
struct Cold(Vec<u64>);

impl Cold {
    fn new() -> Self {
        // Written, so that there is memory behind it, and not one zero page.
        Self((0..(COLD_BYTES / 8) as u64).collect())
    }

    fn walk(&self) {
        // A word a cache line.
        black_box(self.0.iter().step_by(8).fold(0, |sum: u64, word| sum.wrapping_add(*word)));
    }
}

/// As much table memory as the leaf tables of so many pages.
struct TableRead {
    tables: Vec<u64>,
    /// In which they are read.
    order: Vec<usize>,
    pages: u64,
}

impl TableRead {
    fn new(pages: u64) -> Self {
        let count = (pages as usize).div_ceil(ENTRIES);
        let mut order: Vec<usize> = (0..count).collect();
        let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
        for at in (1..count).rev() {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            order.swap(at, (seed >> 33) as usize % (at + 1));
        }
        Self { tables: (0..pages).collect(), order, pages }
    }

    /// Nanoseconds a page.
    fn read(&self, cold: &Cold) -> f64 {
        cold.walk();
        let began = Instant::now();
        let mut sum = 0_u64;
        for &table in &self.order {
            let first = table * ENTRIES;
            let entries = &self.tables[first..(first + ENTRIES).min(self.tables.len())];
            sum = entries.iter().fold(sum, |sum, entry| sum.wrapping_add(*entry));
        }
        black_box(sum);
        began.elapsed().as_nanos() as f64 / self.pages as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cpu_may_miss_some_and_guess_some_and_software_may_not() {
        for accessed in [0, 7, 1000] {
            assert_eq!(may_find(Marks::Exact, accessed), accessed..=accessed);
            assert!(may_find(Marks::CpuGuesses, accessed).contains(&(accessed + 1)));
            // Below ten pages too.
            assert_eq!(may_find(Marks::CpuGuesses, accessed).contains(&(accessed / 2)), accessed == 0);
        }
        assert_eq!(may_find(Marks::CpuGuesses, 7).start(), &6);
        assert!(!may_find(Marks::CpuGuesses, 1000).contains(&10_000));
    }

    #[test]
    fn every_table_is_read_once() {
        for pages in [1, 511, 512, 513, 5000] {
            let table = TableRead::new(pages);
            let mut order = table.order.clone();
            order.sort_unstable();
            assert_eq!(order, (0..(pages as usize).div_ceil(ENTRIES)).collect::<Vec<_>>());
            assert_eq!(table.tables.len() as u64, pages);
        }
    }
}
