// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The working set: how much of each mapping was accessed how many passes ago.
//!
//! Rows are VMAs, as in `/proc/self/maps`; columns are ages in passes. Every page that is present is in exactly one column of
//! one row, so a row's columns add up to what is resident there. VMAs with nothing resident are left out.

use super::humane;
use super::line::HeatLine;
use serde::Serialize;
use shadow_mmu::addr::{HvaRange, PAGE_SIZE};
use shadow_mmu::mm::{Mm, OLDEST, PageAge, Vma};
use std::fmt::Write;
use std::time::Duration;

/// Ages that are told apart: 0 to [`OLDEST`], which stands for itself and all above.
const AGES: usize = OLDEST as usize + 1;
const KIB_A_PAGE: u64 = PAGE_SIZE >> 10;

/// What is resident of something, by the age of its pages. KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Resident {
    /// All of it.
    pub resident_kib: u64,
    /// By passes since the last access: between the last pass and the one before, in the interval before that, …; the last is
    /// "that long ago, or longer".
    pub age_kib: [u64; AGES],
    /// Brought in and not accessed since, as far as was seen.
    pub untouched_kib: u64,
}

impl Resident {
    fn add(&mut self, pages: u64, age: PageAge) {
        let kib = pages * KIB_A_PAGE;
        self.resident_kib += kib;
        match age {
            PageAge::Passes(passes) => self.age_kib[usize::from(passes.min(OLDEST))] += kib,
            PageAge::Untouched => self.untouched_kib += kib,
        }
    }
}

/// A VMA's part of the working set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct VmaAges {
    /// First address.
    pub start: u64,
    /// First address behind it.
    pub end: u64,
    /// As in `/proc/self/maps`: `rw-p`.
    pub rights: String,
    /// As there: a file's path, `[heap]`, `[stack]`, or nothing.
    pub name: String,
    /// What is resident of it.
    #[serde(flatten)]
    pub resident: Resident,
}

/// A working set, at one point in time.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct WorkingSet {
    /// `working_set`: tells this object from others in the same stream.
    pub report: &'static str,
    /// Passes so far.
    pub passes: u64,
    /// Time between passes that was asked for, milliseconds.
    pub interval_ms: f64,
    /// Time since the last pass, or since the start; milliseconds.
    pub since_pass_ms: f64,
    /// By VMA, ascending; without those of which nothing is resident.
    pub vmas: Vec<VmaAges>,
    /// All of them together.
    pub total: Resident,
    /// Where in the address space it is hot.
    #[serde(skip)]
    pub heat: HeatLine,
}

/// Rights and sharing of a VMA as `/proc/self/maps` has them: `rw-p`.
pub fn vma_rights(vma: &Vma) -> String {
    format!("{}{}", vma.prot, if vma.is_shared() { 's' } else { 'p' })
}

impl WorkingSet {
    /// That of `mm` as of its last pass, `since_pass` ago.
    pub fn of(mm: &Mm, every: Duration, since_pass: Duration) -> Self {
        let mut set = Self {
            report: "working_set",
            passes: mm.generation(),
            interval_ms: every.as_secs_f64() * 1e3,
            since_pass_ms: since_pass.as_secs_f64() * 1e3,
            vmas: Vec::new(),
            total: Resident::default(),
            heat: HeatLine::default(),
        };
        mm.for_each_age(|vma, range, age| set.add(vma, range, age));
        set
    }

    /// Runs come ascending.
    fn add(&mut self, vma: &Vma, range: HvaRange, age: PageAge) {
        self.heat.add(range, age);
        self.total.add(range.page_count(), age);
        let (start, end) = (vma.range.start.0, vma.range.end.0);
        if self.vmas.last().is_none_or(|last| last.start != start) {
            let (rights, name) = (vma_rights(vma), vma.name().to_owned());
            self.vmas.push(VmaAges { start, end, rights, name, resident: Resident::default() });
        }
        if let Some(last) = self.vmas.last_mut() {
            last.resident.add(range.page_count(), age);
        }
    }

    /// For people: a table in KiB and a heat line of `columns` columns. Ends with a newline.
    pub fn text(&self, columns: usize) -> String {
        let mut out = String::new();
        // Writing to a string cannot fail.
        let _ = self.write(&mut out, columns);
        out
    }

    fn write(&self, out: &mut String, columns: usize) -> std::fmt::Result {
        writeln!(
            out,
            "umbra: working set in KiB by passes since the last access; {} {}, one each {}, the last {} ago",
            self.passes,
            if self.passes == 1 { "pass" } else { "passes" },
            humane(self.interval_ms / 1e3),
            humane(self.since_pass_ms / 1e3)
        )?;
        // A column in which nothing is would only be in the way.
        let oldest = self.total.age_kib.iter().rposition(|&kib| kib > 0).unwrap_or(0);
        write!(out, "{:<29} {:<4} {:>9}", "range", "", "resident")?;
        for age in 0..=oldest {
            let head = if age == usize::from(OLDEST) { format!("{age}+") } else { age.to_string() };
            write!(out, " {head:>8}")?;
        }
        writeln!(out, " {:>9}", "untouched")?;
        let row = |out: &mut String, what: &str, rights: &str, resident: &Resident, name: &str| {
            write!(out, "{what:<29} {rights:<4} {:>9}", resident.resident_kib)?;
            for kib in &resident.age_kib[..=oldest] {
                write!(out, " {kib:>8}")?;
            }
            let line = format!(" {:>9}  {name}", resident.untouched_kib);
            writeln!(out, "{}", line.trim_end())
        };
        for vma in &self.vmas {
            let range = format!("{:x}-{:x}", vma.start, vma.end);
            row(out, &range, &vma.rights, &vma.resident, &vma.name)?;
        }
        row(out, "total", "", &self.total, "")?;
        out.push_str(&self.heat.text(columns, self.interval_ms / 1e3));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed test may panic")]
    use super::*;
    use shadow_mmu::addr::{Access, Hva};
    use shadow_mmu::frame::{FramePool, FreedFrames};
    use shadow_mmu::mm::{Ahead, Backing, FaultRequest, MapFlags};
    use std::sync::Arc;

    const EVERY: Duration = Duration::from_millis(100);

    /// An address space with a mapping of `pages` pages, and where it begins.
    fn space(pages: u64) -> (Arc<Mm>, Hva) {
        let mm = Mm::new(Arc::new(FramePool::new(4 << 20, FreedFrames::Keep).unwrap())).unwrap();
        let rights = Access::READ | Access::WRITE;
        let at = mm.mmap(Hva(0), pages * PAGE_SIZE, rights, MapFlags::PRIVATE, Backing::Anonymous).unwrap();
        (mm, at)
    }

    fn touch(mm: &Mm, hva: Hva) {
        let around = HvaRange::page(hva);
        mm.fault(&FaultRequest { hva, access: Access::WRITE, around, ahead: Ahead::MappedOnly }).unwrap();
    }

    #[test]
    fn every_resident_page_is_in_one_column() {
        let (mm, at) = space(10);
        // Page n is touched before pass n.
        for page in 0..4 {
            touch(&mm, Hva(at.0 + page * PAGE_SIZE));
            mm.age();
        }
        let set = WorkingSet::of(&mm, EVERY, Duration::ZERO);
        assert_eq!(set.vmas.len(), 1);
        let vma = &set.vmas[0];
        assert_eq!((vma.start, vma.end, vma.rights.as_str()), (at.0, at.0 + 10 * PAGE_SIZE, "rw-p"));
        assert_eq!(set.total, vma.resident);
        assert_eq!(set.total.resident_kib, 16);
        assert_eq!(set.total.age_kib, [4, 4, 4, 4, 0, 0, 0, 0]);
        assert_eq!(set.total.untouched_kib, 0);
        let text = set.text(40);
        let line = text.lines().find(|line| line.starts_with("total")).unwrap();
        assert_eq!(line.split_whitespace().collect::<Vec<_>>(), ["total", "16", "4", "4", "4", "4", "0"]);
    }

    #[test]
    fn what_is_mapped_but_not_there_has_no_row() {
        let (mm, _) = space(10);
        let set = WorkingSet::of(&mm, EVERY, Duration::ZERO);
        assert!(set.vmas.is_empty());
        assert_eq!(set.total, Resident::default());
        assert!(set.text(40).contains("nothing is resident"), "{}", set.text(40));
    }

    #[test]
    fn ages_beyond_the_oldest_are_counted_there() {
        let (mm, at) = space(1);
        touch(&mm, at);
        for _ in 0..30 {
            mm.age();
        }
        let set = WorkingSet::of(&mm, EVERY, Duration::ZERO);
        assert_eq!(set.total.age_kib, [0, 0, 0, 0, 0, 0, 0, 4]);
        assert!(set.text(40).contains(" 7+ "), "{}", set.text(40));
    }
}
