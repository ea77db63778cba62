// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The kernel's side: the program as a process, scanned by ksmd.
//!
//! Who else on this host has mergeable memory is scanned too, and costs CPU time that counts here; so it is said how many pages
//! were shared before. That memory is merged, its pages of zeros with the zero page, and stays so when the settings are back:
//! nothing is lost, but its owner pays for a copy with the next write.

use super::phases::{Sample, ScanPace, Side};
use super::program::Program;
use super::restore::Settings;
use super::sysfs::{FOLDER, KsmFiles, KsmdThread};
use anyhow::{Context, Result, bail};
use std::path::Path;
use std::time::{Duration, Instant};

/// More pages than anybody has: ksmd ends a batch where a pass ends, so with it a batch is a pass.
const ALL_PAGES: &str = "4294967295";
/// Pages of a batch at full pace. Between batches it can be stopped.
const BATCH: &str = "16384";

/// How long ksmd may take to see that a process is gone: a pass or two, at full pace.
const FORGET_WITHIN: Duration = Duration::from_secs(30);

/// ksmd and the right to drive it.
#[derive(Debug)]
pub(super) struct Ksmd {
    settings: Settings,
    thread: KsmdThread,
    saved_before: i64,
    sharing_limit: u32,
}

impl Ksmd {
    /// Stops it and sets it up. Every setting is put back when this is dropped, and however this process ends.
    ///
    /// # Errors
    /// One line: not root, no KSM in this kernel.
    pub(super) fn take() -> Result<Self> {
        let files = KsmFiles::new(Path::new(FOLDER))?;
        let thread = KsmdThread::find()?;
        let settings = Settings::take(files)?;
        for (name, value) in [
            ("run", "0"),
            ("advisor_mode", "none"),
            ("pages_to_scan", BATCH),
            ("sleep_millisecs", "0"),
            ("smart_scan", "1"),
            ("use_zero_pages", "1"),
        ] {
            settings.set(name, value)?;
        }
        forget_the_dead(&settings)?;
        let saved_before = settings.files().saved_pages()?;
        let limit = settings.files().number("max_page_sharing")?;
        let sharing_limit = u32::try_from(limit).context("max_page_sharing")?;
        Ok(Self { settings, thread, saved_before, sharing_limit })
    }

    /// How many pages may share one on this host (`max_page_sharing`).
    pub(super) fn sharing_limit(&self) -> u32 {
        self.sharing_limit
    }

    /// What must be known of this host's memory, if anything.
    pub(super) fn note(&self) -> Option<String> {
        (self.saved_before != 0).then(|| {
            format!(
                "ksmd: {} pages of others on this host were shared before: their CPU time counts here too",
                self.saved_before
            )
        })
    }
}

/// Lets ksmd look once at all that is mergeable. Where it has been stopped, its counters still tell of processes that have ended
/// since.
fn forget_the_dead(settings: &Settings) -> Result<()> {
    let files = settings.files();
    let (first, began) = (files.number("full_scans")?, Instant::now());
    settings.set("run", "1")?;
    // A pass over nothing is not counted, but then nothing is left.
    while files.number("full_scans")? < first + 2 && (files.saved_pages()?, files.metadata_bytes()?) != (0, 0)
    {
        if began.elapsed() > FORGET_WITHIN {
            bail!("ksmd has not come around in {} s", FORGET_WITHIN.as_secs());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    settings.set("run", "0")
}

/// ksmd, which is stopped when this is dropped.
#[derive(Debug)]
struct Running<'a>(&'a Ksmd);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        // Whatever went wrong before was said.
        let _ = self.0.settings.set("run", "0");
    }
}

/// One run: a process, and ksmd.
#[derive(Debug)]
pub(super) struct KsmdSide<'a> {
    ksmd: Running<'a>,
    program: Program,
    saved_before: i64,
    metadata_before: i64,
}

impl<'a> KsmdSide<'a> {
    /// `program` is filled, and has not said what may be merged.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn new(ksmd: &'a Ksmd, mut program: Program) -> Result<Self> {
        let files = ksmd.settings.files();
        ksmd.settings.set("run", "0")?;
        let (saved_before, metadata_before) = (files.saved_pages()?, files.metadata_bytes()?);
        program.command("mergeable").context("the kernel merges no memory of this program's")?;
        Ok(Self { ksmd: Running(ksmd), program, saved_before, metadata_before })
    }

    /// Lets the program end, and ksmd forget it: until its next pass the counters tell of what is gone.
    ///
    /// # Errors
    /// It did not end well.
    pub(super) fn finish(mut self) -> Result<()> {
        self.scan(ScanPace::Full)?;
        self.program.finish()?;
        let (ksmd, began) = (self.ksmd, Instant::now());
        let files = ksmd.0.settings.files();
        while files.saved_pages()? > self.saved_before || files.metadata_bytes()? > self.metadata_before {
            if began.elapsed() > FORGET_WITHIN {
                bail!("ksmd still knows pages of a process that has ended {} s ago", FORGET_WITHIN.as_secs());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

impl Side for KsmdSide<'_> {
    fn program(&mut self) -> &mut Program {
        &mut self.program
    }

    fn scan(&mut self, pace: ScanPace) -> Result<()> {
        let (pages, sleep) = match pace {
            ScanPace::Full => (BATCH, "0"),
            ScanPace::PassASecond => (ALL_PAGES, "1000"),
        };
        self.ksmd.0.settings.set("pages_to_scan", pages)?;
        self.ksmd.0.settings.set("sleep_millisecs", sleep)?;
        self.ksmd.0.settings.set("run", "1")
    }

    fn pause(&mut self) -> Result<()> {
        // It returns when the batch is done.
        self.ksmd.0.settings.set("run", "0")
    }

    fn sample(&mut self) -> Result<Sample> {
        let files = self.ksmd.0.settings.files();
        // The saving first: CPU time that belongs to it is then surely counted.
        let saved = files.saved_pages()? - self.saved_before;
        Ok(Sample {
            saved_pages: u64::try_from(saved).unwrap_or(0),
            cpu: self.ksmd.0.thread.cpu_time()?,
            full_scans: files.number("full_scans")?.unsigned_abs(),
        })
    }

    /// For each page of the program's memory; pages that became the zero page are forgotten.
    fn metadata_bytes_per_page(&mut self) -> Result<f64> {
        let bytes = self.ksmd.0.settings.files().metadata_bytes()? - self.metadata_before;
        Ok(bytes as f64 / self.program.pages() as f64)
    }

    fn sharing_limit(&self) -> u64 {
        self.ksmd.0.sharing_limit.into()
    }
}
