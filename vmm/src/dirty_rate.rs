// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How many pages a guest writes, by mapping and second: what a dirty log says when it is read regularly.
//!
//! A page counts once an interval, however often it is written in that. What was written is known by address; which mapping
//! was there is looked up when the log is read, so pages that were unmapped since are a row of their own.
//!
//! A guest that writes everywhere makes the log forget single pages: it reports whole ranges then
//! ([`DirtyPages::whole_runs`]), perhaps of all its addresses. Their pages are told apart, as *unsure*. Nothing here goes
//! through pages one by one: an interval costs time for its runs and for what is mapped.
//!
//! The summary goes by a mapping's first address, which a heap that grows keeps. A guest that makes mappings all day must not
//! make it grow: it follows [`MAX_VMAS`] of them, and adds up the rest. The interval that the guest's end cuts short is no
//! part of means and peaks, unless it is the only one: its rate says little, and a mean with it could be above every peak.

use crate::aging::vma_rights;
use serde::Serialize;
use shadow_mmu::addr::PAGE_SIZE;
use shadow_mmu::mm::Vma;
use shadow_mmu::shadow::DirtyPages;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::ops::Range;
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
    /// Further pages, of which the log knows no more than that it may be them: something near was written.
    pub unsure_pages: u64,
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
    /// Further pages that may have been written.
    pub unsure_pages: u64,
    /// By mapping, ascending; without those of which nothing was written.
    pub vmas: Vec<Written>,
}

fn per_second(pages: u64, seconds: f64) -> f64 {
    if seconds > 0.0 { pages as f64 / seconds } else { 0.0 }
}

/// How many pages of `runs`, ascending, are in each of `vmas`, ascending too; behind those the pages that are in none.
fn count(runs: impl Iterator<Item = Range<u64>>, vmas: &[Vma]) -> Vec<u64> {
    let none = vmas.len();
    let mut counts = vec![0; none + 1];
    let mut at = 0;
    for run in runs {
        let mut page = run.start;
        while page < run.end {
            while vmas.get(at).is_some_and(|vma| vma.range.end.page() <= page) {
                at += 1;
            }
            let (row, end) = match vmas.get(at) {
                Some(vma) if vma.range.start.page() <= page => (at, vma.range.end.page().min(run.end)),
                Some(next) => (none, next.range.start.page().min(run.end)),
                None => (none, run.end),
            };
            counts[row] += end - page;
            page = end;
        }
    }
    counts
}

impl Interval {
    /// `pages`, by page number, were written from `from` to `to` after logging began; `vmas` is what is mapped now, ascending.
    pub fn new(pages: &DirtyPages, vmas: &[Vma], from: Duration, to: Duration) -> Self {
        let seconds = to.saturating_sub(from).as_secs_f64();
        let (all, unsure) = (count(pages.runs(), vmas), count(pages.whole_runs(), vmas));
        let places = vmas.iter().map(Some).chain([None]);
        let of = |((vma, all), unsure_pages): ((Option<&Vma>, u64), u64)| {
            let pages = all - unsure_pages;
            (all > 0).then(|| Written {
                place: vma.map_or_else(|| Place::without_mapping("unmapped since"), Place::of),
                pages,
                pages_per_s: per_second(pages, seconds),
                unsure_pages,
            })
        };
        let vmas: Vec<_> = places.zip(all).zip(unsure).filter_map(of).collect();
        let pages = vmas.iter().map(|row| row.pages).sum();
        Self {
            report: "dirty_rate",
            from_s: from.as_secs_f64(),
            seconds,
            pages,
            pages_per_s: per_second(pages, seconds),
            unsure_pages: vmas.iter().map(|row| row.unsure_pages).sum(),
            vmas,
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
            if written.pages > 0 {
                let _ = writeln!(out, "{:>12.0}  {}", written.pages_per_s, written.place.text());
            }
            if written.unsure_pages > 0 {
                let (place, size) = (written.place.text(), mib(written.unsure_pages));
                let _ = writeln!(out, "{:>12}  {place}: perhaps some of {size}", "?");
            }
        }
        out
    }
}

/// The size of so many pages, for people.
fn mib(pages: u64) -> String {
    format!("{:.1} MiB", pages as f64 * PAGE_SIZE as f64 / f64::from(1 << 20))
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
    /// The most pages of one interval that may have been written besides.
    pub unsure_pages: u64,
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
    /// Length of these intervals together.
    pub seconds: f64,
    /// Whole intervals; where there is none, the one that was cut short.
    pub intervals: u64,
    /// Pages, those written in several intervals as often.
    pub pages: u64,
    /// By the second, over all the time.
    pub mean_pages_per_s: f64,
    /// By the second, in the interval in which most were written.
    pub peak_pages_per_s: f64,
    /// The last interval, in which the guest ended, where there are whole ones: it is in no other number here.
    pub cut_short: Option<CutShort>,
    /// By mapping, ascending.
    pub vmas: Vec<Total>,
}

/// An interval in which the guest ended.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct CutShort {
    /// Its length.
    pub seconds: f64,
    /// Pages written in it.
    pub pages: u64,
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
    cut_short: Option<CutShort>,
}

/// Whether an interval was as long as it should be.
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
        if length == Length::CutShort && self.intervals > 0 {
            self.cut_short = Some(CutShort { seconds: interval.seconds, pages: interval.pages });
            return;
        }
        self.intervals += 1;
        self.seconds += interval.seconds;
        self.pages += interval.pages;
        self.peak = self.peak.max(interval.pages_per_s);
        // Those that are not followed are one row: its peak is that of their sum.
        let mut others: Option<Written> = None;
        for written in &interval.vmas {
            let known = self.vmas.len();
            match written.place.start {
                Some(start) if known < MAX_VMAS || self.vmas.contains_key(&start) => {
                    let total = self.vmas.entry(start).or_insert_with(|| Total::none(written.place.clone()));
                    total.place.clone_from(&written.place);
                    total.add(written);
                }
                _ => match &mut others {
                    None => others = Some(written.clone()),
                    Some(others) => {
                        others.pages += written.pages;
                        others.pages_per_s += written.pages_per_s;
                        others.unsure_pages += written.unsure_pages;
                    }
                },
            }
        }
        if let Some(others) = others {
            self.others.get_or_insert_with(|| Total::none(Place::without_mapping("others"))).add(&others);
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
            cut_short: self.cut_short,
            vmas,
        }
    }
}

impl Total {
    fn none(place: Place) -> Self {
        Self { place, pages: 0, mean_pages_per_s: 0.0, peak_pages_per_s: 0.0, unsure_pages: 0 }
    }

    fn add(&mut self, written: &Written) {
        self.pages += written.pages;
        self.peak_pages_per_s = self.peak_pages_per_s.max(written.pages_per_s);
        self.unsure_pages = self.unsure_pages.max(written.unsure_pages);
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
            let mut place = total.place.text();
            if total.unsure_pages > 0 {
                let _ = write!(place, ": and perhaps some of {}", mib(total.unsure_pages));
            }
            row(total.mean_pages_per_s, total.peak_pages_per_s, &place);
        }
        row(self.mean_pages_per_s, self.peak_pages_per_s, "total");
        if let Some(last) = self.cut_short {
            let _ = writeln!(
                out,
                "besides, {} pages in the last {:.3} s, an interval that was cut short",
                last.pages, last.seconds
            );
        }
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
            range: HvaRange::pages_from(Hva(page * PAGE_SIZE), pages),
            prot: Access::READ | Access::WRITE,
            flags: VmaFlags::empty(),
            backing: Backing::Anonymous,
        }
    }

    fn interval(pages: &[u64], vmas: &[Vma], second: u64) -> Interval {
        let at = Duration::from_secs(second);
        let pages = pages.iter().copied().collect();
        Interval::new(&pages, vmas, at, at + Duration::from_secs(2))
    }

    #[test]
    fn every_page_is_somebodys() {
        let vmas = [vma(10, 5), vma(15, 5), vma(100, 1)];
        let told = interval(&[9, 10, 14, 15, 50, 100, 101], &vmas, 0);
        let rows: Vec<_> = told.vmas.iter().map(|row| (row.place.start, row.pages)).collect();
        let start = |page: u64| Some(page * PAGE_SIZE);
        assert_eq!(rows, [(start(10), 2), (start(15), 1), (start(100), 1), (None, 3)]);
        assert_eq!((told.pages, told.pages_per_s, told.unsure_pages), (7, 3.5, 0));
    }

    #[test]
    fn what_the_log_knows_only_as_a_whole_is_cut_to_what_is_mapped_and_told_apart() {
        const PART: u64 = 1 << 15;
        let mut pages: DirtyPages = [10, 11].into_iter().collect();
        // All of a guest's addresses but the first part: as many pages as could not be visited one by one.
        pages.add_whole(PART..1 << 35);
        let vmas = [vma(10, 5), vma(PART - 3, 6), vma(9 * PART, 256)];
        let told = Interval::new(&pages, &vmas, Duration::ZERO, Duration::from_secs(2));
        let rows: Vec<_> =
            told.vmas.iter().map(|row| (row.place.start, row.pages, row.unsure_pages)).collect();
        let start = |page: u64| Some(page * PAGE_SIZE);
        let nowhere = (1 << 35) - PART - 3 - 256;
        assert_eq!(
            rows,
            [(start(10), 2, 0), (start(PART - 3), 0, 3), (start(9 * PART), 0, 256), (None, 0, nowhere)]
        );
        assert_eq!((told.pages, told.pages_per_s), (2, 1.0));
        let text = told.text();
        assert!(text.contains(": perhaps some of 1.0 MiB\n") && text.lines().count() == 5, "{text}");
        let mut rates = Rates::default();
        rates.add(&told, Length::Whole);
        let text = rates.summary("d-bit", "bitmap").text();
        assert!(text.contains(": and perhaps some of 1.0 MiB\n"), "{text}");
    }

    #[test]
    fn a_mapping_that_grows_stays_one_and_an_interval_cut_short_is_told_apart() {
        let mut rates = Rates::default();
        rates.add(&interval(&[10, 11], &[vma(10, 2)], 0), Length::Whole);
        rates.add(&interval(&[10, 11, 12, 13], &[vma(10, 4)], 2), Length::Whole);
        let at = Duration::from_secs(4);
        let pages = (10..14).collect();
        let last = Interval::new(&pages, &[vma(10, 4)], at, at + Duration::from_millis(1));
        rates.add(&last, Length::CutShort);
        let told = rates.summary("d-bit", "bitmap");
        assert_eq!((told.intervals, told.pages, told.seconds), (2, 6, 4.0));
        assert_eq!((told.mean_pages_per_s, told.peak_pages_per_s), (1.5, 2.0));
        assert_eq!(told.cut_short, Some(CutShort { seconds: 0.001, pages: 4 }));
        assert_eq!(told.vmas.len(), 1);
        let row = &told.vmas[0];
        assert_eq!((row.pages, row.mean_pages_per_s, row.peak_pages_per_s), (6, 1.5, 2.0));
        assert_eq!(row.place.end, Some(14 * PAGE_SIZE));
        let text = told.text();
        assert!(text.contains("(bitmap, d-bit)") && text.contains("4 pages in the last 0.001 s"), "{text}");
    }

    #[test]
    fn an_interval_cut_short_is_all_that_is_known_where_it_is_the_only_one() {
        let mut rates = Rates::default();
        rates.add(&interval(&[10, 11], &[vma(10, 2)], 0), Length::CutShort);
        let told = rates.summary("d-bit", "bitmap");
        assert_eq!((told.intervals, told.pages, told.peak_pages_per_s, told.cut_short), (1, 2, 1.0, None));
    }

    #[test]
    fn a_guest_that_maps_all_day_does_not_make_the_summary_grow() {
        let mut rates = Rates::default();
        for page in 0..3 * MAX_VMAS as u64 {
            // The second page is unmapped, so from some time on two rows an interval are others.
            rates.add(&interval(&[page * 2, page * 2 + 1], &[vma(page * 2, 1)], page), Length::Whole);
        }
        let told = rates.summary("d-bit", "bitmap");
        assert_eq!(told.vmas.len(), MAX_VMAS + 1);
        let others = told.vmas.last().unwrap();
        assert_eq!((others.pages, others.peak_pages_per_s), (5 * MAX_VMAS as u64, 1.0));
        assert_eq!(told.vmas.iter().map(|row| row.pages).sum::<u64>(), told.pages);
        let above = told.vmas.iter().find(|row| row.mean_pages_per_s > row.peak_pages_per_s);
        assert_eq!(above, None, "no mean is above its peak");
    }
}
