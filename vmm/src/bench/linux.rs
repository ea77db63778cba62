// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What Linux can tell of the pages of another process: what umbra's aging and dirty log are measured beside.
//!
//! | what | how (Documentation/filesystems/proc.rst, Documentation/admin-guide/mm) |
//! | --- | --- |
//! | which pages were accessed | `Referenced` in `/proc/PID/smaps`: a walk that tests the A bit of every pte |
//! | forget it | 1 to `/proc/PID/clear_refs`: a walk that clears it |
//! | which pages were written | bit 55 in `/proc/PID/pagemap`, 8 bytes a page: "soft-dirty" (CONFIG_MEM_SOFT_DIRTY) |
//! | forget it | 4 to `/proc/PID/clear_refs`: a walk that write-protects every pte |
//!
//! Both ways of forgetting are about the whole process. `Referenced` is a sum for a mapping, not a bit for a page; no file
//! tells it by page where the kernel has no idle page tracking.

use anyhow::{Context, Result, bail};
use shadow_mmu::addr::{HvaRange, PAGE_SIZE};
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

/// Of an entry of pagemap: the page was written since the last time that this was forgotten.
const SOFT_DIRTY: u64 = 1 << 55;
/// Entries read in one go, 512 KiB.
const BATCH: u64 = 1 << 16;

/// A range of another process's memory.
#[derive(Debug)]
pub(super) struct LinuxPages {
    folder: PathBuf,
    region: HvaRange,
}

impl LinuxPages {
    /// Of `region` in process `pid`.
    pub(super) fn new(pid: u32, region: HvaRange) -> Self {
        Self { folder: format!("/proc/{pid}").into(), region }
    }

    /// Forgets which pages were accessed.
    ///
    /// # Errors
    /// The process is gone, or the kernel has no such file (CONFIG_PROC_PAGE_MONITOR).
    pub(super) fn clear_referenced(&self) -> Result<()> {
        self.clear_refs("1")
    }

    /// Forgets which were written.
    ///
    /// # Errors
    /// As above.
    pub(super) fn clear_soft_dirty(&self) -> Result<()> {
        self.clear_refs("4")
    }

    fn clear_refs(&self, what: &str) -> Result<()> {
        let path = self.folder.join("clear_refs");
        let mut file =
            File::options().write(true).open(&path).with_context(|| format!("{}", path.display()))?;
        file.write_all(what.as_bytes()).with_context(|| format!("{}", path.display()))
    }

    /// Pages that were accessed, of the mappings that the region lies in.
    ///
    /// # Errors
    /// As above.
    pub(super) fn referenced(&self) -> Result<u64> {
        let path = self.folder.join("smaps");
        let mut text = String::new();
        File::open(&path)
            .and_then(|mut file| file.read_to_string(&mut text))
            .with_context(|| format!("{}", path.display()))?;
        let sum = referenced_kib(&text, self.region);
        Ok(sum.with_context(|| format!("{} says nothing of {:?}", path.display(), self.region))? * 1024
            / PAGE_SIZE)
    }

    /// Pages of the region that were written.
    ///
    /// # Errors
    /// As above.
    pub(super) fn soft_dirty(&self) -> Result<u64> {
        let path = self.folder.join("pagemap");
        let file = File::open(&path).with_context(|| format!("{}", path.display()))?;
        let (first, end) = (self.region.start.0 / PAGE_SIZE, self.region.end.0 / PAGE_SIZE);
        let mut bytes = vec![0; (BATCH.min(end - first) * 8) as usize];
        let mut dirty = 0;
        let mut at = first;
        while at < end {
            let bytes = &mut bytes[..(BATCH.min(end - at) * 8) as usize];
            file.read_exact_at(bytes, at * 8).with_context(|| format!("{}", path.display()))?;
            let (entries, _) = bytes.as_chunks::<8>();
            let is_dirty = |entry: &&[u8; 8]| u64::from_ne_bytes(**entry) & SOFT_DIRTY != 0;
            dirty += entries.iter().filter(is_dirty).count() as u64;
            at += entries.len() as u64;
        }
        Ok(dirty)
    }

    /// Whether soft-dirty means anything here: nobody has written since it was cleared, and `written` pages have now.
    ///
    /// # Errors
    /// The kernel was built without it.
    pub(super) fn expect_soft_dirty(&self, written: u64) -> Result<()> {
        let dirty = self.soft_dirty()?;
        if dirty < written {
            bail!(
                "{dirty} pages are soft-dirty after writes to {written}: this kernel has no soft-dirty bits \
                 (CONFIG_MEM_SOFT_DIRTY)"
            );
        }
        Ok(())
    }
}

/// Bytes of memory that can be had without swapping, if the kernel says so.
pub(super) fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// The sum of `Referenced` over mappings in `smaps` that overlap `region`; `None` if there are none.
fn referenced_kib(smaps: &str, region: HvaRange) -> Option<u64> {
    let mut sum = None;
    let mut is_ours = false;
    for line in smaps.lines() {
        let mut words = line.split_ascii_whitespace();
        let Some(first) = words.next() else { continue };
        if let Some((start, end)) = first.split_once('-')
            && let (Ok(start), Ok(end)) = (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16))
        {
            is_ours = start < region.end.0 && region.start.0 < end;
        } else if is_ours && first == "Referenced:" {
            sum = Some(sum.unwrap_or(0) + words.next()?.parse::<u64>().ok()?);
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

    use super::super::memstress::{Memstress, Work};
    use super::*;
    use shadow_mmu::addr::Hva;

    #[test]
    fn only_mappings_of_the_region_count() {
        let smaps = "1000-3000 rw-p 00000000 00:00 0\nSize: 8 kB\nReferenced:            4 kB\nVmFlags: rd\n\
                     3000-5000 rw-p 00000000 00:00 0   [heap]\nReferenced:            8 kB\n\
                     9000-a000 r--p 00000000 00:00 0   /bin/x\nReferenced:            16 kB\n";
        let range = |start, end| HvaRange { start: Hva(start), end: Hva(end) };
        assert_eq!(referenced_kib(smaps, range(0x1000, 0x3000)), Some(4));
        assert_eq!(referenced_kib(smaps, range(0x2000, 0x4000)), Some(12));
        assert_eq!(referenced_kib(smaps, range(0x6000, 0x7000)), None);
    }

    #[test]
    fn memory_that_is_not_there_is_refused() {
        assert!(available_memory().is_some_and(|bytes| bytes > 1 << 20));
        assert!(Work::new(1, 1).expect_room(1).is_ok());
        let error = Work::new(u32::MAX, u64::MAX).expect_room(2).unwrap_err().to_string();
        assert!(error.contains("fewer pages"), "{error}");
    }

    #[test]
    fn a_processs_accesses_are_seen_and_forgotten() {
        // More than a TLB holds: clearing A flushes nothing, so pages that are cached do not become young again.
        let mut memstress = Memstress::native(&Work::new(1, 20_000)).unwrap();
        let pages = LinuxPages::new(memstress.pid().unwrap(), memstress.region().unwrap());
        memstress.pass("write").unwrap();
        assert!(pages.referenced().unwrap() >= 20_000);
        pages.clear_referenced().unwrap();
        assert_eq!(pages.referenced().unwrap(), 0);
        memstress.pass("read every 10").unwrap();
        // 2,000, less what the TLB hides; and the CPU may set A ahead of accesses too, hardly everywhere.
        assert!((1..10_000).contains(&pages.referenced().unwrap()));
        pages.clear_soft_dirty().unwrap();
        assert_eq!(pages.soft_dirty().unwrap(), 0);
        memstress.pass("write every 2").unwrap();
        match pages.expect_soft_dirty(10_000) {
            Ok(()) => assert_eq!(pages.soft_dirty().unwrap(), 10_000),
            Err(error) => println!("skipped: {error:#}"),
        }
        memstress.finish().unwrap();
        assert!(pages.referenced().is_err());
    }
}
