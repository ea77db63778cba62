// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Four-level radix tables in frames of the pool: the shape that an x86-64 CPU walks.
//!
//! Both MMUs use them. The shadow map must, because the CPU walks it; the primary does, because then its tables are
//! accounted to the guest that caused them and a guest cannot grow umbra's heap by touching one page every 2 MiB.
//! The meaning of a *leaf* entry belongs to the user of the table (`Spte`, [`Pte`](crate::mm::Pte)); an entry of an upper level
//! is a [`Link`] for both, in bits that the CPU walks.
//!
//! # Who may do what
//! * Any number of threads may look up and add tables at once: a table is linked by compare-exchange, so of two that are
//!   made for one place one is used and the other goes straight back.
//! * [`unlink_empty`](Tables::unlink_empty) needs the caller to exclude everyone else, walkers included; a CPU that
//!   walks the table must be flushed before the frames that come back are freed.
//! * Leaf entries are atomics; which lock orders stores to them is the user's business.

use crate::addr::{PAGE_SHIFT, Pfn};
use crate::frame::{Fill, FramePool, OutOfFrames, Purpose};
use crate::inject::TABLE_ALLOC;
use crate::sync::Arc;
use crate::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::ops::Range;

/// Entries in a table.
pub const ENTRIES: u64 = 512;
/// The level of the root. Leaf tables are level 1.
pub const TOP: u8 = 4;
/// Pages that the lower half covers; the upper half of a root belongs to the engine.
pub const LOWER_HALF_PAGES: u64 = 1 << 35;

/// One table, as its entries.
pub type Table = [AtomicU64; ENTRIES as usize];

/// An entry of an upper level, by value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link(pub u64);

impl Link {
    const PRESENT: u64 = 1;
    /// A: set from the start, so that a CPU need not; one that goes through a link whose A was cleared sets it again.
    pub const ACCESSED: u64 = 1 << 5;
    /// For who clears A: a look at the table with A clear has found nothing. The CPU ignores it.
    pub const IDLE: u64 = 1 << 9;
    /// Writable, user, accessed: the leaf decides.
    const OPEN: u64 = 1 << 1 | 1 << 2 | Self::ACCESSED;
    const PFN_MASK: u64 = 0x000f_ffff_ffff_f000;

    /// The entry that leads to the table in `pfn`.
    pub fn to(pfn: Pfn) -> Self {
        Self(pfn.offset() | Self::PRESENT | Self::OPEN)
    }
    /// Whether it leads anywhere.
    pub fn is_present(self) -> bool {
        self.0 & Self::PRESENT != 0
    }
    /// Whether it has the bits that each link has, and none that no link has.
    pub fn is_well_formed(self) -> bool {
        const FRAME: u64 = (u32::MAX as u64) << PAGE_SHIFT;
        let always = Self::PRESENT | Self::OPEN & !Self::ACCESSED;
        self.0 & always == always && self.0 & !(always | Self::ACCESSED | Self::IDLE | FRAME) == 0
    }
    /// A.
    pub fn is_accessed(self) -> bool {
        self.0 & Self::ACCESSED != 0
    }
    /// Whether nobody can have accessed what the table maps: it was noted as idle, and no CPU went through the link since.
    pub fn is_idle(self) -> bool {
        self.0 & (Self::ACCESSED | Self::IDLE) == Self::IDLE
    }
    /// The frame of the table.
    pub fn pfn(self) -> Pfn {
        Pfn(((self.0 & Self::PFN_MASK) >> PAGE_SHIFT) as u32)
    }
}

/// Which entry of a table at `level` leads to `page`.
pub const fn index(page: u64, level: u8) -> usize {
    ((page >> (9 * (level - 1) as u32)) & (ENTRIES - 1)) as usize
}

/// Pages that one entry of a table at `level` covers.
pub(crate) const fn span(level: u8) -> u64 {
    1 << (9 * (level - 1) as u32)
}

/// A tree of tables over the lower half, with its root.
#[derive(Debug)]
pub struct Tables {
    pool: Arc<FramePool>,
    root: Pfn,
    count: AtomicUsize,
    /// What for tables are.
    purpose: Purpose,
}

/// What [`Tables::recount`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Recount {
    /// Tables that are linked.
    pub(crate) tables: usize,
    /// What links lead to that can be no table.
    pub(crate) stray: Vec<Pfn>,
    /// Links with bits that none has, or without those that each has.
    pub(crate) odd: Vec<Link>,
}

impl Recount {
    /// What is wrong with them, if `counted` tables are said to be there.
    pub(crate) fn violations(&self, counted: usize) -> Vec<String> {
        let mut wrong: Vec<_> = self
            .stray
            .iter()
            .map(|pfn| format!("a link leads to the frame {:#x}, which is free or not of the pool", pfn.0))
            .collect();
        wrong.extend(self.odd.iter().map(|link| format!("a link is {:#018x}, which none may be", link.0)));
        if self.tables != counted {
            wrong.push(format!("{counted} tables are counted, {} are linked", self.tables));
        }
        wrong
    }
}

impl Tables {
    /// An empty tree: one root. `purpose` is what its tables are for.
    ///
    /// # Errors
    /// [`OutOfFrames`].
    pub fn new(pool: Arc<FramePool>, purpose: Purpose) -> Result<Self, OutOfFrames> {
        let root = pool.alloc(Fill::Zeros)?;
        Ok(Self { pool, root, count: AtomicUsize::new(1), purpose })
    }

    /// The frame of the root: what CR3 holds.
    pub fn root(&self) -> Pfn {
        self.root
    }

    /// Tables in the tree, root included.
    pub fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// The pool that the tables live in.
    pub fn pool(&self) -> &Arc<FramePool> {
        &self.pool
    }

    /// Puts `entry` in the upper half of the root, at `index` of 256..512.
    ///
    /// # Panics
    /// If `index` is not in the upper half.
    pub fn set_upper(&self, index: usize, entry: u64) {
        assert!((256..512).contains(&index), "root entry {index} is not in the upper half");
        self.pool.words(self.root)[index].store(entry, Ordering::Release);
    }

    fn next(&self, table: Pfn, page: u64, level: u8) -> Option<Pfn> {
        let entry = Link(self.pool.words(table)[index(page, level)].load(Ordering::Acquire));
        entry.is_present().then(|| entry.pfn())
    }

    /// The leaf table that covers `page`, if there is one.
    pub fn leaf_table(&self, page: u64) -> Option<&Table> {
        if page >= LOWER_HALF_PAGES {
            return None;
        }
        let leaf = (2..=TOP).rev().try_fold(self.root, |table, level| self.next(table, page, level))?;
        Some(self.pool.words(leaf))
    }

    /// The leaf table that covers `page`, made if there is none.
    ///
    /// # Errors
    /// [`OutOfFrames`]; tables made on the way stay linked, empty.
    ///
    /// # Panics
    /// If `page` is not in the lower half.
    pub fn leaf_table_or_new(&self, page: u64) -> Result<&Table, OutOfFrames> {
        assert!(page < LOWER_HALF_PAGES, "page {page:#x} is not in the lower half");
        let mut table = self.root;
        for level in (2..=TOP).rev() {
            table = match self.next(table, page, level) {
                Some(next) => next,
                None => self.link_new(table, index(page, level))?,
            };
        }
        Ok(self.pool.words(table))
    }

    fn link_new(&self, parent: Pfn, index: usize) -> Result<Pfn, OutOfFrames> {
        if self.pool.faults().fail(&TABLE_ALLOC).is_some() {
            return Err(OutOfFrames);
        }
        let new = self.pool.alloc_for(self.purpose, Fill::Zeros)?;
        // Release: whoever sees the link sees the zeros behind it.
        match self.pool.words(parent)[index].compare_exchange(
            0,
            Link::to(new).0,
            Ordering::AcqRel,
            Ordering::Acquire,
        ) {
            Ok(_) => {
                self.count.fetch_add(1, Ordering::Relaxed);
                Ok(new)
            }
            Err(theirs) => {
                self.pool.put(new);
                Ok(Link(theirs).pfn())
            }
        }
    }

    /// Calls `visit(first page of the table, entries, entries within the range)` for each leaf table that has a part in
    /// `pages`, ascending. Absent subtrees cost one look each.
    pub fn for_each_leaf_table<'a>(
        &'a self,
        pages: Range<u64>,
        mut visit: impl FnMut(u64, &'a Table, Range<usize>),
    ) {
        self.for_each_leaf_link(pages, |base, _, table, entries| visit(base, table, entries));
    }

    /// As [`for_each_leaf_table`](Self::for_each_leaf_table), with the entry that leads to the table: its A says whether a CPU
    /// went through it, for those who clear it ([`Link::ACCESSED`]).
    pub fn for_each_leaf_link<'a>(
        &'a self,
        pages: Range<u64>,
        mut visit: impl FnMut(u64, &'a AtomicU64, &'a Table, Range<usize>),
    ) {
        let pages = pages.start..pages.end.min(LOWER_HALF_PAGES);
        if !pages.is_empty() {
            self.visit_below(self.root, TOP, 0, &pages, &mut visit);
        }
    }

    /// The first page of the first leaf table that reaches to `page` or beyond it; `None` where there is none. Absent subtrees
    /// cost one look each.
    pub fn next_leaf_table(&self, page: u64) -> Option<u64> {
        self.next_below(self.root, TOP, 0, page)
    }

    fn next_below(&self, table: Pfn, level: u8, base: u64, page: u64) -> Option<u64> {
        entries_in(&(page..LOWER_HALF_PAGES), base, level).find_map(|at| {
            let entry = Link(self.pool.words(table)[at].load(Ordering::Acquire));
            let start = base + at as u64 * span(level);
            if !entry.is_present() {
                None
            } else if level == 2 {
                Some(start)
            } else {
                self.next_below(entry.pfn(), level - 1, start, page)
            }
        })
    }

    fn visit_below<'a>(
        &'a self,
        table: Pfn,
        level: u8,
        base: u64,
        pages: &Range<u64>,
        visit: &mut impl FnMut(u64, &'a AtomicU64, &'a Table, Range<usize>),
    ) {
        let entries = entries_in(pages, base, level);
        let links = self.pool.words(table);
        for at in entries.clone() {
            let link = &links[at];
            let entry = Link(link.load(Ordering::Acquire));
            if !entry.is_present() {
                continue;
            }
            let start = base + at as u64 * span(level);
            if level == 2 {
                // The next table comes while this one is visited: the CPU's own prefetching ends with the page.
                let next = links[..entries.end].get(at + 1).map(|next| Link(next.load(Ordering::Relaxed)));
                if let Some(next) = next.filter(|next| next.is_present()) {
                    prefetch(self.pool.words(next.pfn()));
                }
                visit(start, link, self.pool.words(entry.pfn()), entries_in(pages, start, 1));
            } else {
                self.visit_below(entry.pfn(), level - 1, start, pages, visit);
            }
        }
    }

    /// The raw entries on the way to `page`, from the root down; shorter where an entry is absent.
    pub fn walk(&self, page: u64) -> Vec<(u8, u64)> {
        let mut path = Vec::new();
        let mut table = self.root;
        for level in (1..=TOP).rev() {
            let entry = self.pool.words(table)[index(page, level)].load(Ordering::Acquire);
            path.push((level, entry));
            if !Link(entry).is_present() {
                break;
            }
            table = Link(entry).pfn();
        }
        path
    }

    /// Takes every table without an entry that covers a part of `pages` out of the tree and returns their frames, which
    /// the caller frees with [`free_unlinked`](Self::free_unlinked), after whatever flush its CPUs need.
    #[must_use = "unlinked tables are leaked unless they are freed"]
    pub fn unlink_empty(&self, pages: Range<u64>) -> Vec<Pfn> {
        let mut unlinked = Vec::new();
        let pages = pages.start..pages.end.min(LOWER_HALF_PAGES);
        if !pages.is_empty() {
            self.unlink_below(self.root, TOP, 0, &pages, &mut unlinked);
        }
        unlinked
    }

    /// Returns whether `table` is empty afterwards. Only a CPU may walk the tree meanwhile, and that is flushed before the
    /// tables are freed; so no order is needed.
    fn unlink_below(&self, table: Pfn, level: u8, base: u64, pages: &Range<u64>, out: &mut Vec<Pfn>) -> bool {
        let words = self.pool.words(table);
        if level > 1 {
            for at in entries_in(pages, base, level) {
                let entry = Link(words[at].load(Ordering::Relaxed));
                if entry.is_present()
                    && self.unlink_below(entry.pfn(), level - 1, base + at as u64 * span(level), pages, out)
                {
                    words[at].store(0, Ordering::Relaxed);
                    out.push(entry.pfn());
                }
            }
        }
        words.iter().all(|word| word.load(Ordering::Relaxed) == 0)
    }

    /// Frees tables that [`unlink_empty`](Self::unlink_empty) took out.
    pub fn free_unlinked(&self, tables: &[Pfn]) {
        self.count.fetch_sub(tables.len(), Ordering::Relaxed);
        self.pool.put_all(tables);
    }

    /// Counts the tables anew, root included; and the links that lead to a free frame, or out of the pool, which are not
    /// followed. Exact while nobody adds or takes away tables.
    pub(crate) fn recount(&self) -> Recount {
        let mut found = Recount { tables: 0, stray: Vec::new(), odd: Vec::new() };
        self.recount_below(self.root, TOP, &mut found);
        found
    }

    fn recount_below(&self, table: Pfn, level: u8, found: &mut Recount) {
        if !self.pool.contains(table) || self.pool.frame(table).ref_count() == 0 {
            found.stray.push(table);
            return;
        }
        found.tables += 1;
        if level > 1 {
            // Of the root only the lower half is ours.
            let entries = if level == TOP { ENTRIES / 2 } else { ENTRIES } as usize;
            for word in &self.pool.words(table)[..entries] {
                let entry = Link(word.load(Ordering::Acquire));
                if entry.0 != 0 && !entry.is_well_formed() {
                    found.odd.push(entry);
                }
                if entry.is_present() {
                    self.recount_below(entry.pfn(), level - 1, found);
                }
            }
        }
    }

    fn collect_tables(&self, table: Pfn, level: u8, out: &mut Vec<Pfn>) {
        if level > 1 {
            // Of the root only the lower half is ours.
            let entries = if level == TOP { ENTRIES / 2 } else { ENTRIES } as usize;
            for word in &self.pool.words(table)[..entries] {
                let entry = Link(word.load(Ordering::Relaxed));
                if entry.is_present() {
                    self.collect_tables(entry.pfn(), level - 1, out);
                }
            }
        }
        out.push(table);
    }
}

impl Drop for Tables {
    /// Frees the tables. What leaf entries refer to is the user's and must have been dropped before, as must every CPU
    /// that walked the tree.
    fn drop(&mut self) {
        let mut tables = Vec::new();
        self.collect_tables(self.root, TOP, &mut tables);
        self.pool.put_all(&tables);
    }
}

/// Has the CPU fetch `table` without waiting for it.
fn prefetch(table: &Table) {
    #[cfg(target_arch = "x86_64")]
    for line in table.chunks(8) {
        // SAFETY: a hint, which reads nothing and faults never; and the address is good.
        unsafe {
            std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(line.as_ptr().cast())
        };
    }
}

/// Entries of the table at `level` that starts at page `base` which have a part in `pages`.
fn entries_in(pages: &Range<u64>, base: u64, level: u8) -> Range<usize> {
    let end = base + span(level) * ENTRIES;
    let first = pages.start.clamp(base, end) - base;
    let last = pages.end.clamp(base, end) - base;
    (first / span(level)) as usize..last.div_ceil(span(level)) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::PAGE_SIZE;
    use crate::frame::FreedFrames;

    fn tables(frames: u64) -> Tables {
        let pool = FramePool::new(frames * PAGE_SIZE, FreedFrames::Poison).unwrap();
        Tables::new(Arc::new(pool), Purpose::New).unwrap()
    }

    const FAR: u64 = LOWER_HALF_PAGES - 1;

    #[test]
    fn a_lookup_makes_no_table_and_an_insert_makes_three() {
        let tables = tables(16);
        assert!(tables.leaf_table(5).is_none());
        tables.leaf_table_or_new(5).unwrap();
        assert_eq!(tables.count(), 4);
        assert!(tables.leaf_table(511).is_some() && tables.leaf_table(512).is_none());
    }

    #[test]
    fn visiting_skips_what_is_absent_and_clips_the_range() {
        let tables = tables(32);
        for page in [0, 700, FAR] {
            tables.leaf_table_or_new(page).unwrap();
        }
        let mut seen = Vec::new();
        tables.for_each_leaf_table(3..u64::MAX, |base, _, entries| seen.push((base, entries)));
        assert_eq!(seen, [(0, 3..512), (512, 0..512), (FAR & !511, 0..512)]);
        seen.clear();
        tables.for_each_leaf_table(510..513, |base, _, entries| seen.push((base, entries)));
        assert_eq!(seen, [(0, 510..512), (512, 0..1)]);
    }

    #[test]
    fn the_next_leaf_table_is_found_over_any_gap() {
        let tables = tables(32);
        assert_eq!(tables.next_leaf_table(0), None);
        for page in [700, FAR] {
            tables.leaf_table_or_new(page).unwrap();
        }
        let next = |page| tables.next_leaf_table(page);
        assert_eq!([0, 512, 1023].map(next), [Some(512); 3], "the table that the page lies in counts");
        assert_eq!([1024, FAR].map(next), [Some(FAR & !511); 2]);
        assert_eq!([LOWER_HALF_PAGES, u64::MAX].map(next), [None; 2]);
    }

    #[test]
    fn only_empty_tables_are_unlinked_and_all_frames_come_back() {
        let tables = tables(32);
        tables.leaf_table_or_new(0).unwrap()[7].store(1, Ordering::Relaxed);
        tables.leaf_table_or_new(600).unwrap();
        tables.leaf_table_or_new(FAR).unwrap();
        let unlinked = tables.unlink_empty(0..u64::MAX);
        assert_eq!(unlinked.len(), 1 + 3, "the leaf of 600, and the whole path to the far page");
        tables.free_unlinked(&unlinked);
        assert!(tables.leaf_table(0).is_some() && tables.leaf_table(600).is_none());
        let pool = Arc::clone(tables.pool());
        drop(tables);
        assert_eq!(pool.free_frames(), 32);
    }

    #[test]
    fn running_out_on_the_way_down_leaves_a_usable_tree() {
        let tables = tables(3);
        assert!(tables.leaf_table_or_new(0).is_err());
        assert!(tables.leaf_table(0).is_none());
        assert_eq!(tables.walk(0).len(), 3);
    }

    #[test]
    fn a_link_that_was_changed_behind_the_tree_is_found() {
        let tables = tables(16);
        tables.leaf_table_or_new(5).unwrap();
        assert!(tables.recount().violations(4).is_empty());
        assert_eq!(tables.recount().violations(5), ["5 tables are counted, 4 are linked"]);
        let link = &tables.pool.words(tables.root())[0];
        let sound = link.load(Ordering::Relaxed);
        // A frame that is free, one that is not of the pool, a large page, and one that ring 3 may not walk.
        for (wrong, lines) in
            [(Link::to(Pfn(9)).0, 2), (Link::to(Pfn(99)).0, 2), (sound | 1 << 7, 1), (sound & !4, 1)]
        {
            link.store(wrong, Ordering::Relaxed);
            assert_eq!(tables.recount().violations(4).len(), lines, "{wrong:#x}");
        }
        link.store(sound & !Link::ACCESSED | Link::IDLE, Ordering::Relaxed);
        assert!(tables.recount().violations(4).is_empty(), "aging may do that");
        link.store(sound, Ordering::Relaxed);
    }

    #[test]
    fn the_upper_half_is_left_alone() {
        let tables = tables(8);
        tables.set_upper(511, 0xffff);
        let unlinked = tables.unlink_empty(0..LOWER_HALF_PAGES);
        assert!(unlinked.is_empty());
        assert_eq!(tables.pool.words(tables.root())[511].load(Ordering::Relaxed), 0xffff);
    }
}
