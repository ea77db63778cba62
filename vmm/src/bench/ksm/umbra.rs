// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! umbra's side: the program as a guest, scanned by umbra's own thread.
//!
//! Its CPU time is that thread's: it does all that sharing takes, the flushes included, which are system calls of its own. What
//! the guest pays for it, faults and flushed translations, shows in `guest_slowdown` and `cow_break_us`.

use super::mix::Content;
use super::phases::{Sample, ScanPace, Side};
use super::program::Program;
use crate::bench::access_tracking::TOLD;
use crate::ksm::{Ksmd, Pace};
use crate::vm::VmConfig;
use anyhow::{Context, Result};
use shadow_mmu::addr::PAGE_SIZE;
use shadow_mmu::ksm::{Domain, Ksm, KsmSettings, KsmStats};
use shadow_mmu::mm::{MergeAny, Mm};
use std::sync::Arc;
use std::time::Duration;

/// Pages of a batch at full pace: as many as ksmd is given.
const BATCH: u64 = 16_384;

/// One run: a guest, and the thread that scans it.
#[derive(Debug)]
pub(super) struct UmbraSide {
    /// Above the guest, so that nobody scans what goes.
    scanning: Option<Ksmd>,
    ksm: Arc<Ksm>,
    mm: Arc<Mm>,
    program: Program,
    /// CPU time of threads that have stopped.
    used: Duration,
}

impl UmbraSide {
    /// Starts the guest with the command line `words`, which make it use `pages` pages, and are shared as `settings` say. It has
    /// filled nothing yet, and nobody scans.
    ///
    /// # Errors
    /// What keeps umbra from running a guest.
    pub(super) fn start(words: &[String], pages: u64, settings: KsmSettings) -> Result<Self> {
        let bytes = pages.saturating_mul(PAGE_SIZE);
        // Room for what the program notes of its pages, tables, and the reserve that pages ahead of need stay clear of.
        let memory = (bytes + bytes / 4).saturating_add(32 << 20);
        let config = VmConfig { tracking: TOLD, ..VmConfig::new(crate::cli::engine(), memory) };
        let program = Program::guest(config, words, pages)?;
        let machine = program.told().expect_machine()?;
        let mm = Arc::clone(machine.mm());
        let ksm = Ksm::new(Arc::clone(machine.pool()), settings).context("page sharing")?;
        ksm.enter(&mm, Domain::default()).context("page sharing")?;
        Ok(Self { scanning: None, ksm, mm, program, used: Duration::ZERO })
    }

    /// Fills the memory, and says that it may be merged.
    ///
    /// # Errors
    /// The program ended.
    pub(super) fn fill(&mut self, content: &Content) -> Result<()> {
        self.program.fill(content)?;
        self.program.command("mergeable")
    }

    /// All private memory of the guest may be merged (PR_SET_MEMORY_MERGE).
    ///
    /// # Errors
    /// [`Mm::set_merge_any`]'s.
    pub(super) fn merge_any(&self) -> Result<()> {
        Ok(self.mm.set_merge_any(MergeAny::On)?)
    }

    /// All counters. It waits for the scan that is under way.
    pub(super) fn stats(&self) -> KsmStats {
        self.ksm.stats()
    }

    /// Lets the program end.
    ///
    /// # Errors
    /// It did not end well.
    pub(super) fn finish(mut self) -> Result<()> {
        self.pause()?;
        self.program.finish()
    }
}

impl Side for UmbraSide {
    fn program(&mut self) -> &mut Program {
        &mut self.program
    }

    fn scan(&mut self, pace: ScanPace) -> Result<()> {
        self.pause()?;
        let pace = match pace {
            ScanPace::Full => Pace::Fixed { pages: BATCH, interval: Duration::ZERO },
            // A batch ends where a pass does.
            ScanPace::PassASecond => Pace::Fixed { pages: u64::MAX, interval: Duration::from_secs(1) },
        };
        self.scanning = Some(Ksmd::start(Arc::clone(&self.ksm), pace)?);
        Ok(())
    }

    fn pause(&mut self) -> Result<()> {
        self.used += self.scanning.take().map_or(Duration::ZERO, Ksmd::stop);
        Ok(())
    }

    /// What needs no lock of the scanner's, so that looking does not slow it down.
    fn sample(&mut self) -> Result<Sample> {
        let shared = self.mm.pool().ksm_frames() as u64;
        let sharing = self.mm.ksm_merging_pages().saturating_sub(shared);
        let running = self.scanning.as_ref().map_or(Duration::ZERO, Ksmd::cpu_time);
        Ok(Sample {
            saved_pages: sharing + self.mm.ksm_zero_pages(),
            cpu: self.used + running,
            full_scans: self.ksm.full_scans(),
        })
    }

    /// For each frame of the pool, whatever it is used for.
    fn metadata_bytes_per_page(&mut self) -> Result<f64> {
        Ok(self.ksm.metadata_bytes() as f64 / self.mm.pool().frame_count() as f64)
    }

    fn sharing_limit(&self) -> u64 {
        self.ksm.settings().max_page_sharing.into()
    }
}
