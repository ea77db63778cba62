// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The samples of a heat map, address × time, in bounded memory.
//!
//! A sample is taken after each aging pass: for every bin of addresses, how many of its pages are resident and how many of
//! those were accessed since the pass before.
//!
//! *Rows* are bins of one size, a power of two of pages, each at a multiple of its size. Only bins in which something was
//! resident at some time are kept, so gaps cost nothing and nobody has to say beforehand where mappings will be. A guest that
//! gets more than [`MAX_ROWS`] of them makes bins twice as large: pairs are merged, those taken so far too.
//!
//! *Columns* are samples. When there are [`MAX_COLUMNS`], pairs are merged, and from then on each column takes twice as many
//! samples as before. Merging adds counts up, so a cell is the share of accessed pages over all of its samples.
//!
//! So the whole takes at most 1,000 × 256 cells of 24 bytes, 6 MiB, however long a guest runs and whatever it maps.

use shadow_mmu::addr::{HvaRange, PAGE_SHIFT};
use shadow_mmu::mm::{Mm, PageAge};
use std::collections::BTreeSet;
use std::time::Duration;

/// Most bins of addresses.
pub const MAX_ROWS: usize = 256;
/// Columns at which pairs are merged.
pub const MAX_COLUMNS: usize = 1000;

/// Counts of pages: summed over the samples of a column.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cell {
    /// First page number of the bin, shifted by the map's bin size.
    pub(super) bin: u64,
    pub(super) young: u64,
    pub(super) present: u64,
}

/// The samples of one span of time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Column {
    pub(super) from: Duration,
    pub(super) to: Duration,
    /// By bin, ascending.
    pub(super) cells: Vec<Cell>,
}

/// Which pages of an address space were accessed when, in blocks of addresses and spans of time.
#[derive(Debug, Clone)]
pub struct HeatMap {
    /// Log2 of the pages in a bin.
    shift: u32,
    rows: BTreeSet<u64>,
    columns: Vec<Column>,
    /// Samples that a column takes, and those that the last one has.
    samples_a_column: u32,
    samples_in_last: u32,
}

impl Default for HeatMap {
    fn default() -> Self {
        Self { shift: 0, rows: BTreeSet::new(), columns: Vec::new(), samples_a_column: 1, samples_in_last: 0 }
    }
}

/// Adds up cells of the same bin that stand side by side.
fn merge_neighbours(cells: &mut Vec<Cell>) {
    cells.dedup_by(|next, kept| {
        let same = next.bin == kept.bin;
        if same {
            kept.young += next.young;
            kept.present += next.present;
        }
        same
    });
}

impl HeatMap {
    /// Takes a sample of `mm`, which has just been aged: what was accessed from `from` to `to`, counted from the start.
    pub fn sample(&mut self, mm: &Mm, from: Duration, to: Duration) {
        self.begin(from, to);
        mm.for_each_age(|_, range, age| self.add(range, age));
        self.end();
    }

    /// A new column at the end, to be merged into the one before by [`end`](Self::end) if that has room.
    fn begin(&mut self, from: Duration, to: Duration) {
        self.columns.push(Column { from, to, cells: Vec::new() });
    }

    /// Adds pages to the new column; ascending.
    fn add(&mut self, range: HvaRange, age: PageAge) {
        let pages = range.page_numbers();
        // No more cells than rows, also while they come.
        while ((pages.end - 1) >> self.shift) - (pages.start >> self.shift) >= MAX_ROWS as u64 {
            self.coarsen();
        }
        let mut at = pages.start;
        while at < pages.end {
            let bin = at >> self.shift;
            let end = ((bin + 1) << self.shift).min(pages.end);
            let (present, young) = (end - at, if age == PageAge::Passes(0) { end - at } else { 0 });
            at = end;
            let Some(column) = self.columns.last_mut() else { return };
            match column.cells.last_mut() {
                Some(cell) if cell.bin == bin => {
                    cell.young += young;
                    cell.present += present;
                }
                _ => column.cells.push(Cell { bin, young, present }),
            }
            self.rows.insert(bin);
        }
        while self.rows.len() > MAX_ROWS {
            self.coarsen();
        }
    }

    fn end(&mut self) {
        if self.samples_in_last > 0 && self.samples_in_last < self.samples_a_column {
            self.merge_last();
            self.samples_in_last += 1;
        } else {
            self.samples_in_last = 1;
        }
        if self.columns.len() >= MAX_COLUMNS && self.samples_in_last == self.samples_a_column {
            let mut pairs = std::mem::take(&mut self.columns).into_iter();
            while let Some(first) = pairs.next() {
                self.columns.push(first);
                if let Some(second) = pairs.next() {
                    self.columns.push(second);
                    self.merge_last();
                }
            }
            self.samples_a_column = self.samples_a_column.saturating_mul(2);
            // An even number of columns was merged, all of them full.
            self.samples_in_last = self.samples_a_column;
        }
    }

    /// Merges the last column into the one before.
    fn merge_last(&mut self) {
        let Some(last) = self.columns.pop() else { return };
        let Some(before) = self.columns.last_mut() else { return };
        before.to = last.to;
        before.cells.extend(last.cells);
        before.cells.sort_by_key(|cell| cell.bin);
        merge_neighbours(&mut before.cells);
    }

    /// Makes bins twice as large.
    fn coarsen(&mut self) {
        self.shift += 1;
        self.rows = self.rows.iter().map(|bin| bin >> 1).collect();
        for column in &mut self.columns {
            column.cells.iter_mut().for_each(|cell| cell.bin >>= 1);
            merge_neighbours(&mut column.cells);
        }
    }

    /// The bins, ascending.
    pub(super) fn rows(&self) -> impl Iterator<Item = u64> {
        self.rows.iter().copied()
    }
    pub(super) fn columns(&self) -> &[Column] {
        &self.columns
    }
    /// Bytes in a bin.
    pub fn bin_bytes(&self) -> u64 {
        1 << (PAGE_SHIFT + self.shift)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shadow_mmu::addr::{Hva, PAGE_SIZE};

    fn sample(map: &mut HeatMap, second: u64, runs: &[(u64, u64, PageAge)]) {
        map.begin(Duration::from_secs(second), Duration::from_secs(second + 1));
        for &(page, pages, age) in runs {
            map.add(HvaRange::pages_from(Hva(page * PAGE_SIZE), pages), age);
        }
        map.end();
    }

    fn totals(map: &HeatMap) -> (u64, u64) {
        let cells = map.columns().iter().flat_map(|column| &column.cells);
        cells.fold((0, 0), |(young, present), cell| (young + cell.young, present + cell.present))
    }

    const HOT: PageAge = PageAge::Passes(0);

    #[test]
    fn pages_of_far_apart_regions_are_rows_of_their_own() {
        let mut map = HeatMap::default();
        sample(&mut map, 0, &[(1, 2, HOT), (1 << 34, 1, PageAge::Untouched)]);
        assert_eq!(map.rows().collect::<Vec<_>>(), [1, 2, 1 << 34]);
        assert_eq!(map.bin_bytes(), PAGE_SIZE);
        assert_eq!(totals(&map), (2, 3));
    }

    #[test]
    fn too_many_rows_make_bins_larger_and_lose_no_page() {
        let mut map = HeatMap::default();
        sample(&mut map, 0, &[(0, 100, HOT), (1 << 20, 100, PageAge::Passes(1))]);
        sample(&mut map, 1, &[(0, 100, HOT), (1 << 10, 100_000, HOT), (1 << 20, 100, PageAge::Passes(2))]);
        assert!(map.rows().count() <= MAX_ROWS, "{}", map.rows().count());
        assert!(map.bin_bytes() > PAGE_SIZE);
        assert_eq!(totals(&map), (100_200, 100_400));
        for column in map.columns() {
            let bins: Vec<_> = column.cells.iter().map(|cell| cell.bin).collect();
            assert!(bins.is_sorted_by(|a, b| a < b), "{bins:?}");
            assert!(bins.iter().all(|bin| map.rows.contains(bin)));
        }
    }

    #[test]
    fn a_huge_run_is_never_taken_page_by_page() {
        let mut map = HeatMap::default();
        sample(&mut map, 0, &[(0, 1 << 34, HOT)]);
        assert!(map.rows().count() <= MAX_ROWS);
        assert_eq!(totals(&map), (1 << 34, 1 << 34));
    }

    #[test]
    fn columns_stay_bounded_cover_all_time_and_lose_no_sample() {
        let mut map = HeatMap::default();
        for second in 0..5 * MAX_COLUMNS as u64 + 7 {
            sample(&mut map, second, &[(second % 3, 1, HOT)]);
            assert!(map.columns().len() <= MAX_COLUMNS);
        }
        assert!(map.columns().len() >= MAX_COLUMNS / 2);
        let columns = map.columns();
        assert_eq!(columns[0].from, Duration::ZERO);
        assert_eq!(columns[columns.len() - 1].to, Duration::from_secs(5 * MAX_COLUMNS as u64 + 7));
        assert!(columns.windows(2).all(|pair| pair[0].to == pair[1].from));
        assert_eq!(totals(&map), (5 * MAX_COLUMNS as u64 + 7, 5 * MAX_COLUMNS as u64 + 7));
        // All but the last are of one length.
        let lengths: BTreeSet<_> =
            columns[..columns.len() - 1].iter().map(|column| column.to - column.from).collect();
        assert_eq!(lengths.len(), 1, "{lengths:?}");
    }
}
