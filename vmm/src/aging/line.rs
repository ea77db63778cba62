// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A heat map of the address space in one line, as `damo report heats` prints it for DAMON.
//!
//! The line shows resident pages only, in the order of their addresses, each column as many as the next: gaps are cut out. A
//! column's digit is the mean heat of its pages. The heat of a page falls evenly with its age, from 9 for one that was
//! accessed in the last interval to 0 for one that was not accessed for [`OLDEST`] intervals or ever.

use super::humane;
use shadow_mmu::addr::{HvaRange, PAGE_SIZE};
use shadow_mmu::mm::{OLDEST, PageAge};

/// Digits go from 0 to this.
const HOTTEST: u64 = 9;

/// Heats, collected from runs of pages.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HeatLine {
    /// Runs of pages of one age, ascending; neighbours of one age are one.
    runs: Vec<(u64, u64)>,
    pages: u64,
    /// First address, and first behind the last.
    range: Option<(u64, u64)>,
}

/// In sevenths of the greatest heat.
fn heat(age: PageAge) -> u64 {
    match age {
        PageAge::Passes(passes) => u64::from(OLDEST - passes.min(OLDEST)),
        PageAge::Untouched => 0,
    }
}

impl HeatLine {
    /// Adds a run; they come ascending.
    pub fn add(&mut self, range: HvaRange, age: PageAge) {
        let (pages, heat) = (range.page_count(), heat(age));
        match self.runs.last_mut() {
            Some((count, same)) if *same == heat => *count += pages,
            _ => self.runs.push((pages, heat)),
        }
        self.pages += pages;
        let start = self.range.map_or(range.start.0, |(start, _)| start);
        self.range = Some((start, range.end.0));
    }

    /// The digits, at most `columns`: fewer where fewer pages are resident.
    pub fn digits(&self, columns: usize) -> String {
        let columns = (columns as u64).clamp(1, self.pages.max(1));
        let mut runs = self.runs.iter().copied();
        let (mut left, mut heat) = runs.next().unwrap_or_default();
        let mut digits = String::new();
        let mut first = 0;
        for column in 1..=columns {
            if self.pages == 0 {
                break;
            }
            // Columns differ by at most one page.
            let end = (u128::from(self.pages) * u128::from(column) / u128::from(columns)) as u64;
            let (mut wanted, mut sum) = (end - first, 0u64);
            while wanted > 0 {
                let part = left.min(wanted);
                sum += part * heat;
                wanted -= part;
                left -= part;
                if left == 0 {
                    match runs.next() {
                        Some(next) => (left, heat) = next,
                        None => break,
                    }
                }
            }
            let most = (end - first) * u64::from(OLDEST);
            // Rounded to the nearest, but what is not quite cold is not 0, nor what is not quite hot 9.
            let digit = match (sum * HOTTEST * 2 + most) / (most * 2) {
                0 if sum > 0 => 1,
                HOTTEST if sum < most => HOTTEST - 1,
                digit => digit,
            };
            digits.push(char::from(b'0' + digit as u8));
            first = end;
        }
        digits
    }

    /// The line and its key, for passes each `interval` seconds. Ends with a newline.
    pub fn text(&self, columns: usize, interval: f64) -> String {
        let Some((start, end)) = self.range else { return "heat: nothing is resident\n".to_owned() };
        let digits = self.digits(columns);
        let kib = self.pages as f64 * (PAGE_SIZE >> 10) as f64 / digits.len() as f64;
        format!(
            "heat of {start:x}-{end:x}, gaps cut out, {kib:.0} KiB of resident memory a column; 9 = all accessed in the last {}, \
             0 = nothing in the last {}\n{digits}\n",
            humane(interval),
            humane(interval * f64::from(OLDEST)),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shadow_mmu::addr::Hva;

    fn line(runs: &[(u64, u64, PageAge)]) -> HeatLine {
        let mut line = HeatLine::default();
        for &(page, pages, age) in runs {
            line.add(HvaRange::pages_from(Hva(page * PAGE_SIZE), pages), age);
        }
        line
    }

    #[test]
    fn a_column_is_a_page_where_there_are_few_and_gaps_are_cut_out() {
        let ages = (0..=OLDEST).map(PageAge::Passes).chain([PageAge::Untouched]);
        let runs: Vec<_> = ages.enumerate().map(|(n, age)| (n as u64 * 1000, 1, age)).collect();
        assert_eq!(line(&runs).digits(80), "986543100");
    }

    #[test]
    fn every_page_is_in_one_column() {
        let line = line(&[(0, 500, PageAge::Passes(0)), (1 << 30, 500, PageAge::Untouched)]);
        assert_eq!(line.digits(10), "9999900000");
        // The middle column is half of each.
        assert_eq!(line.digits(3), "950");
        assert_eq!(line.digits(1), "5");
    }

    #[test]
    fn only_what_is_all_hot_is_9_and_only_what_is_all_cold_is_0() {
        let nearly = line(&[(0, 999, PageAge::Passes(0)), (999, 1, PageAge::Untouched)]);
        assert_eq!(nearly.digits(1), "8");
        let hardly = line(&[(0, 1, PageAge::Passes(6)), (1, 999, PageAge::Untouched)]);
        assert_eq!(hardly.digits(1), "1");
    }

    #[test]
    fn an_empty_space_is_told_in_words() {
        assert_eq!(HeatLine::default().digits(80), "");
        assert!(HeatLine::default().text(80, 1.0).contains("nothing"));
    }

    #[test]
    fn the_key_says_scale_interval_and_range() {
        let text = line(&[(1, 20, PageAge::Passes(0))]).text(10, 0.1);
        for word in ["1000-15000", "8 KiB", "100 ms", "700 ms", "\n9999999999\n"] {
            assert!(text.contains(word), "no `{word}` in {text}");
        }
    }
}
