// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How many pages a guest writes, by mapping and second: what a dirty log says when it is read regularly.
//!
//! A page counts once an interval, however often it is written in that. What was written is known by address; which mapping was there is
//! looked up when the log is read, so pages that were unmapped since are a row of their own.
//!
//! The summary goes by a mapping's first address, which a heap that grows keeps. A guest that makes mappings all day must not make it grow:
//! it follows [`MAX_VMAS`] of them, and adds up the rest.

use crate::aging::vma_rights;
use serde::Serialize;
use shadow_mmu::addr::PAGE_SHIFT;
use shadow_mmu::mm::Vma;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

/// Mappings that the summary follows.
pub const MAX_VMAS: usize = 1024;

/// A mapping in a report, or what is no mapping's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Place {
    /// First address; with [`end`](Self::end) null for pages of no mapping.
    pub start: Option<u64>,
    /// First address behind it.
    pub end: Option<u64>,
    /// As in `/proc/self/maps`: `rw-p`.
    pub rights: String,
    /// As there; or what the pages are that belong to no mapping.
    pub name: String,
}

impl Place {
    fn of(vma: &Vma) -> Self {
        let range = vma.range;
        Self {
            start: Some(range.start.0),
            end: Some(range.end.0),
            rights: vma_rights(vma),
            name: vma.name().to_owned(),
        }
    }

    fn without_mapping(name: &str) -> Self {
        Self { start: None, end: None, rights: String::new(), name: name.to_owned() }
    }

    fn text(&self) -> String {
        match (self.start, self.end) {
            (Some(start), Some(end)) => {
                let range = format!("{start:x}-{end:x}");
                format!("{range:<29} {:<4}  {}", self.rights, self.name).trim_end().to_owned()
            }
            _ => format!("({})", self.name),
        }
    }
}

/// What was written of one mapping.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Written {
    /// Where.
    #[serde(flatten)]
    pub place: Place,
    /// Pages, each once.
    pub pages: u64,
    /// The same by the second.
    pub pages_per_s: f64,
}

/// One reading of the log.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Interval {
    /// `dirty_rate`: tells this object from others in the same stream.
    pub report: &'static str,
    /// Seconds from the start of logging to the start of the interval.
    pub from_s: f64,
    /// Length of the interval, seconds.
    pub seconds: f64,
    /// Pages written, each once.
    pub pages: u64,
    /// The same by the second.
    pub pages_per_s: f64,
    /// By mapping, ascending; without those of which nothing was written.
    pub vmas: Vec<Written>,
}

fn per_second(pages: u64, seconds: f64) -> f64 {
    if seconds > 0.0 { pages as f64 / seconds } else { 0.0 }
}

impl Interval {
    /// `pages`, by page number and ascending, were written from `from` to `to` after logging began; `vmas` is what is mapped now,
    /// ascending.
    pub fn new(pages: impl Iterator<Item = u64>, vmas: &[Vma], from: Duration, to: Duration) -> Self {
        let seconds = to.saturating_sub(from).as_secs_f64();
        let mut counts = vec![0u64; vmas.len()];
        let (mut all, mut unmapped, mut at) = (0, 0, 0);
        for page in pages {
            all += 1;
            while vmas.get(at).is_some_and(|vma| vma.range.end.page() <= page) {
                at += 1;
            }
            match vmas.get(at) {
                Some(vma) if vma.range.start.0 <= page << PAGE_SHIFT => counts[at] += 1,
                _ => unmapped += 1,
            }
        }
        let of = |place, pages| Written { place, pages, pages_per_s: per_second(pages, seconds) };
        let mut written: Vec<_> = vmas
            .iter()
            .zip(counts)
            .filter(|(_, pages)| *pages > 0)
            .map(|(vma, pages)| of(Place::of(vma), pages))
            .collect();
        if unmapped > 0 {
            written.push(of(Place::without_mapping("unmapped since"), unmapped));
        }
        Self {
            report: "dirty_rate",
            from_s: from.as_secs_f64(),
            seconds,
            pages: all,
            pages_per_s: per_second(all, seconds),
            vmas: written,
        }
    }

    /// For people. Ends with a newline.
    pub fn text(&self) -> String {
        let mut out = format!(
            "umbra: {:.0} pages a second written, {:.3} s to {:.3} s\n",
            self.pages_per_s,
            self.from_s,
            self.from_s + self.seconds
        );
        for written in &self.vmas {
            // Writing to a string cannot fail.
            let _ = writeln!(out, "{:>12.0}  {}", written.pages_per_s, written.place.text());
        }
        out
    }
}

/// What is known of a mapping over all intervals.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Total {
    /// Where; the end as it was last.
    #[serde(flatten)]
    pub place: Place,
    /// Pages, those written in several intervals as often.
    pub pages: u64,
    /// By the second, over all the time.
    pub mean_pages_per_s: f64,
    /// By the second, in the interval in which most were written.
    pub peak_pages_per_s: f64,
}

/// What a run wrote.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// `dirty_rate_summary`.
    pub report: &'static str,
    /// How writes were seen: `d-bit` or `write-protect`.
    pub method: &'static str,
    /// Where they were kept: `bitmap` or `ring`.
    pub log: &'static str,
    /// Length of the run.
    pub seconds: f64,
    /// How often the log was read.
    pub intervals: u64,
    /// Pages, those written in several intervals as often.
    pub pages: u64,
    /// By the second, over all the time.
    pub mean_pages_per_s: f64,
    /// By the second, in the interval in which most were written.
    pub peak_pages_per_s: f64,
    /// By mapping, ascending.
    pub vmas: Vec<Total>,
}

/// Adds intervals up.
#[derive(Debug, Default)]
pub struct Rates {
    vmas: BTreeMap<u64, Total>,
    /// Pages of mappings beyond the limit, and of none.
    others: Option<Total>,
    intervals: u64,
    seconds: f64,
    pages: u64,
    peak: f64,
}

/// Whether an interval was as long as it should be. One that the guest's end cut short says nothing of peaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Length {
    /// It was.
    Whole,
    /// The guest ended in it.
    CutShort,
}

impl Rates {
    /// Adds the next interval.
    pub fn add(&mut self, interval: &Interval, length: Length) {
        // Where it is the only one, it is all that is known.
        let counts = length == Length::Whole || self.intervals == 0;
        let peak = |pages_per_s: f64| if counts { pages_per_s } else { 0.0 };
        self.intervals += 1;
        self.seconds += interval.seconds;
        self.pages += interval.pages;
        self.peak = self.peak.max(peak(interval.pages_per_s));
        for written in &interval.vmas {
            let known = self.vmas.len();
            let total = match written.place.start {
                Some(start) if known < MAX_VMAS || self.vmas.contains_key(&start) => {
                    let total = self.vmas.entry(start).or_insert_with(|| Total::none(written.place.clone()));
                    total.place.clone_from(&written.place);
                    total
                }
                _ => self.others.get_or_insert_with(|| Total::none(Place::without_mapping("others"))),
            };
            total.pages += written.pages;
            total.peak_pages_per_s = total.peak_pages_per_s.max(peak(written.pages_per_s));
        }
    }

    /// What there is to say at the end.
    pub fn summary(self, method: &'static str, log: &'static str) -> Summary {
        let mut vmas: Vec<_> = self.vmas.into_values().chain(self.others).collect();
        vmas.iter_mut().for_each(|total| total.mean_pages_per_s = per_second(total.pages, self.seconds));
        Summary {
            report: "dirty_rate_summary",
            method,
            log,
            seconds: self.seconds,
            intervals: self.intervals,
            pages: self.pages,
            mean_pages_per_s: per_second(self.pages, self.seconds),
            peak_pages_per_s: self.peak,
            vmas,
        }
    }
}

impl Total {
    fn none(place: Place) -> Self {
        Self { place, pages: 0, mean_pages_per_s: 0.0, peak_pages_per_s: 0.0 }
    }
}

impl Summary {
    /// For people. Ends with a newline.
    pub fn text(&self) -> String {
        let mut out = format!(
            "umbra: pages a second written over {:.3} s, in {} intervals ({}, {})\n{:>12} {:>12}\n",
            self.seconds, self.intervals, self.log, self.method, "mean", "peak"
        );
        let mut row = |mean: f64, peak: f64, what: &str| {
            // Writing to a string cannot fail.
            let _ = writeln!(out, "{mean:>12.0} {peak:>12.0}  {what}");
        };
        for total in &self.vmas {
            row(total.mean_pages_per_s, total.peak_pages_per_s, &total.place.text());
        }
        row(self.mean_pages_per_s, self.peak_pages_per_s, "total");
        out
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed test may panic")]
    use super::*;
    use shadow_mmu::addr::{Access, Hva, HvaRange};
    use shadow_mmu::mm::{Backing, VmaFlags};

    fn vma(page: u64, pages: u64) -> Vma {
        Vma {
            range: HvaRange::pages_from(Hva(page << PAGE_SHIFT), pages),
            prot: Access::READ | Access::WRITE,
            flags: VmaFlags::empty(),
            backing: Backing::Anonymous,
        }
    }

    fn interval(pages: &[u64], vmas: &[Vma], second: u64) -> Interval {
        let at = Duration::from_secs(second);
        Interval::new(pages.iter().copied(), vmas, at, at + Duration::from_secs(2))
    }

    #[test]
    fn every_page_is_somebodys() {
        let vmas = [vma(10, 5), vma(15, 5), vma(100, 1)];
        let told = interval(&[9, 10, 14, 15, 50, 100, 101], &vmas, 0);
        let rows: Vec<_> = told.vmas.iter().map(|row| (row.place.start, row.pages)).collect();
        let start = |page: u64| Some(page << PAGE_SHIFT);
        assert_eq!(rows, [(start(10), 2), (start(15), 1), (start(100), 1), (None, 3)]);
        assert_eq!((told.pages, told.pages_per_s), (7, 3.5));
        assert_eq!(told.vmas.iter().map(|row| row.pages).sum::<u64>(), told.pages);
    }

    #[test]
    fn a_mapping_that_grows_stays_one_and_an_interval_cut_short_makes_no_peak() {
        let mut rates = Rates::default();
        rates.add(&interval(&[10, 11], &[vma(10, 2)], 0), Length::Whole);
        rates.add(&interval(&[10, 11, 12, 13], &[vma(10, 4)], 2), Length::Whole);
        let mut last = interval(&[10], &[vma(10, 4)], 4);
        (last.seconds, last.pages_per_s, last.vmas[0].pages_per_s) = (0.001, 1000.0, 1000.0);
        rates.add(&last, Length::CutShort);
        let told = rates.summary("d-bit", "bitmap");
        assert_eq!((told.intervals, told.pages, told.peak_pages_per_s), (3, 7, 2.0));
        assert_eq!(told.vmas.len(), 1);
        assert_eq!((told.vmas[0].pages, told.vmas[0].peak_pages_per_s), (7, 2.0));
        assert_eq!(told.vmas[0].place.end, Some(14 << PAGE_SHIFT));
        assert!(told.text().contains("(bitmap, d-bit)"), "{}", told.text());
    }

    #[test]
    fn a_guest_that_maps_all_day_does_not_make_the_summary_grow() {
        let mut rates = Rates::default();
        for page in 0..3 * MAX_VMAS as u64 {
            rates.add(&interval(&[page * 2], &[vma(page * 2, 1)], page), Length::Whole);
        }
        let told = rates.summary("d-bit", "bitmap");
        assert_eq!(told.vmas.len(), MAX_VMAS + 1);
        assert_eq!(told.vmas.last().unwrap().pages, 2 * MAX_VMAS as u64);
        assert_eq!(told.vmas.iter().map(|row| row.pages).sum::<u64>(), told.pages);
    }
}
