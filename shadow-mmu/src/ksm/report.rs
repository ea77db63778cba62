// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Counters, by the names and meanings of `/sys/kernel/mm/ksm` and `/proc/PID/ksm_stat`; and what the kernel does not tell: why
//! pages were not merged.
//!
//! What is true of merged pages is counted where it becomes true: `pages_shared`, `pages_sharing` and `ksm_zero_pages` are of this
//! moment. What is true of the others is counted by a pass: `pages_unshared`, `pages_volatile`, `ksm_rmap_items` and the rows of
//! VMAs are, for each address space, of the last pass that has left it behind.

use super::{Ksm, KsmMember};
use crate::addr::{Access, HvaRange, PAGE_SIZE};
use crate::frame::FrameFlags;
use crate::mm::{MergeAny, Mm, Vma, VmaFlags};
use crate::sync::atomic::Ordering;
use std::collections::HashMap;

/// VMAs of one address space that have a row of their own; the others share the last.
const ROWS: usize = 1024;

/// The counters of `/sys/kernel/mm/ksm`, and `cow_ksm` of `/proc/vmstat`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct KsmStats {
    /// Pages that were hashed or had D cleared, so far. Pages known not to have been written cost nothing, and do not count.
    pub pages_scanned: u64,
    /// Frames that are shared.
    pub pages_shared: u64,
    /// Further ptes of them: pages saved.
    pub pages_sharing: u64,
    /// Pages in the index that are like no other.
    pub pages_unshared: u64,
    /// Pages that change too often to be in the index.
    pub pages_volatile: u64,
    /// Pages that were passed over because they change too often, so far (`smart_scan`).
    pub pages_skipped: u64,
    /// Passes so far.
    pub full_scans: u64,
    /// Contents of which there are several frames, because of `max_page_sharing`.
    pub stable_node_chains: u64,
    /// Those frames.
    pub stable_node_dups: u64,
    /// Ptes of the zero frame in the place of a page of zeros: pages saved.
    pub ksm_zero_pages: u64,
    /// Bytes saved, less those that sharing itself needs.
    pub general_profit: i64,
    /// Pages of KSM that were copied because somebody wrote them, so far.
    pub cow_ksm: u64,
}

/// What `/proc/PID/ksm_stat` says of an address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct KsmMmStats {
    /// Pages that are merged, or might be.
    pub ksm_rmap_items: u64,
    /// As [`KsmStats::ksm_zero_pages`].
    pub ksm_zero_pages: u64,
    /// Ptes of shared frames.
    pub ksm_merging_pages: u64,
    /// Bytes saved, less 16 for each of its pages.
    pub ksm_process_profit: i64,
    /// Whether all of its private memory may be merged.
    pub ksm_merge_any: bool,
    /// Whether some of it may.
    pub ksm_mergeable: bool,
}

/// How many pages were not merged, by reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct NotShared {
    /// They change too often.
    pub volatile: u64,
    /// There is no other like them.
    pub unique: u64,
    /// Somebody held them just then, who might have written them.
    pub pinned: u64,
    /// There is one like them, in another domain.
    pub domain: u64,
    /// As many share the frame already as may.
    pub limit: u64,
}

/// A VMA in a report. Not the VMA itself: that would keep what it shows alive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KsmPlace {
    /// Where it is.
    pub range: HvaRange,
    /// What an access may do.
    pub prot: Access,
    /// Its [name](Vma::name).
    pub name: String,
}

/// What became of the pages of a VMA.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KsmVma {
    /// Which; `None` for those beyond the first 1,024, together.
    pub place: Option<KsmPlace>,
    /// Its pages.
    pub pages: KsmPages,
}

/// What became of some pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct KsmPages {
    /// Private pages there are.
    pub all: u64,
    /// Those that have a shared frame.
    pub shared: u64,
    /// Those that have the zero frame.
    pub zero: u64,
    /// The others.
    pub not_shared: NotShared,
}

/// What one pass counted of an address space.
#[derive(Debug, Clone, Default)]
pub(super) struct MemberPass {
    vmas: Vec<KsmVma>,
}

impl MemberPass {
    /// Adds what a look at a part of `vma` counted, which comes behind all others of the pass.
    pub(super) fn add(&mut self, vma: &Vma, counts: &KsmPages) {
        let is_last = |row: &KsmVma| match &row.place {
            Some(last) => last.range.end > vma.range.start,
            None => true,
        };
        if !self.vmas.last().is_some_and(is_last) {
            let place = || KsmPlace { range: vma.range, prot: vma.prot, name: vma.name().to_owned() };
            let place = (self.vmas.len() < ROWS).then(place);
            self.vmas.push(KsmVma { place, pages: KsmPages::default() });
        }
        let Some(row) = self.vmas.last_mut() else { return };
        let row = &mut row.pages;
        row.all += counts.all;
        row.shared += counts.shared;
        row.zero += counts.zero;
        let (sum, more) = (&mut row.not_shared, counts.not_shared);
        sum.volatile += more.volatile;
        sum.unique += more.unique;
        sum.pinned += more.pinned;
        sum.domain += more.domain;
        sum.limit += more.limit;
    }

    /// What is counted of the pages of the VMA that has `page`.
    pub(super) fn pages_at(&mut self, page: u64) -> Option<&mut KsmPages> {
        let begins = |row: &KsmVma| row.place.as_ref().is_some_and(|place| place.range.start.page() <= page);
        let row = self.vmas.partition_point(begins).checked_sub(1)?;
        // Beyond the rows that are a VMA's each, the last is everybody's.
        let last = self.vmas.len() - 1;
        let is_in = self.vmas[row].place.as_ref().is_some_and(|place| place.range.end.page() > page);
        let row = if is_in { row } else { last };
        (is_in || self.vmas[row].place.is_none()).then(|| &mut self.vmas[row].pages)
    }

    /// The end of a pass: pages that were there when it looked and were gone, or written, when it came to merge them have changed;
    /// and so has what was counted twice for that.
    pub(super) fn account(&mut self) {
        for row in &mut self.vmas {
            let KsmPages { all, shared, zero, not_shared } = &mut row.pages;
            let others = not_shared.unique + not_shared.pinned + not_shared.domain + not_shared.limit;
            not_shared.volatile = all.saturating_sub(*shared + *zero + others);
        }
    }

    /// Pages that are merged, or might be; those of zeros have no item (`ksm_rmap_items`).
    fn items(&self) -> u64 {
        self.vmas.iter().map(|row| row.pages.all.saturating_sub(row.pages.zero)).sum()
    }

    fn changing(&self) -> u64 {
        let changing = |of: &NotShared| of.volatile + of.pinned;
        self.vmas.iter().map(|row| changing(&row.pages.not_shared)).sum()
    }

    fn alone(&self) -> u64 {
        let alone = |of: &NotShared| of.unique + of.domain + of.limit;
        self.vmas.iter().map(|row| alone(&row.pages.not_shared)).sum()
    }
}

/// What sharing came to, of one address space.
#[derive(Debug, Clone)]
pub struct KsmMemberReport {
    /// Which.
    pub member: KsmMember,
    /// Its counters.
    pub stats: KsmMmStats,
    /// Its VMAs that may be merged, ascending, as the last pass found them.
    pub vmas: Vec<KsmVma>,
}

/// What sharing came to.
#[derive(Debug, Clone)]
pub struct KsmReport {
    /// The counters.
    pub stats: KsmStats,
    /// The address spaces there are.
    pub members: Vec<KsmMemberReport>,
}

fn profit(saved_pages: u64, metadata: u64) -> i64 {
    (saved_pages * PAGE_SIZE) as i64 - metadata as i64
}

fn stats_of(mm: &Mm, items: u64) -> KsmMmStats {
    let (merging, zero) = (mm.ksm_merging_pages(), mm.ksm_zero_pages());
    KsmMmStats {
        ksm_rmap_items: items,
        ksm_zero_pages: zero,
        ksm_merging_pages: merging,
        ksm_process_profit: profit(merging + zero, 16 * items),
        ksm_merge_any: mm.merge_any() == MergeAny::On,
        ksm_mergeable: mm.merge_any() == MergeAny::On
            || mm.read_map().vmas.iter().any(|vma| vma.flags.contains(VmaFlags::MERGEABLE)),
    }
}

impl Ksm {
    /// Passes so far. Waits for nobody, so it may be asked often, and while a scan is under way.
    pub fn full_scans(&self) -> u64 {
        self.counters.full_scans.load(Ordering::Relaxed)
    }

    /// The counters, now. Waits for a scan that is under way.
    pub fn stats(&self) -> KsmStats {
        self.report().stats
    }

    /// Counters and reasons, now. Waits for a scan that is under way.
    pub fn report(&self) -> KsmReport {
        let mut scanner = self.scanner.lock();
        scanner.admit(&mut self.queue.lock());
        let (mut merging, mut zero, mut items, mut unshared) = (0, 0, 0, 0);
        let mut members = Vec::new();
        for member in scanner.members.iter().flatten() {
            let Some(mm) = member.mm.upgrade() else { continue };
            let stats = stats_of(&mm, member.last.items());
            merging += stats.ksm_merging_pages;
            zero += stats.ksm_zero_pages;
            items += stats.ksm_rmap_items;
            // Those that others were merged with since they were counted are shared, and so are those that are guarded.
            let last = &member.last;
            let shared = stats.ksm_merging_pages + last.changing();
            unshared += last.alone().min(stats.ksm_rmap_items.saturating_sub(shared));
            members.push(KsmMemberReport { member: member.id, stats, vmas: member.last.vmas.clone() });
        }
        // Frames first counted, ptes later: while others unmap, a frame may seem to have one pte too few.
        let shared = (self.pool.ksm_frames() as u64).min(merging);
        let (chains, dups) = self.chains(&scanner);
        let counters = &self.counters;
        let stats = KsmStats {
            pages_scanned: counters.pages_scanned.load(Ordering::Relaxed),
            pages_shared: shared,
            pages_sharing: merging - shared,
            pages_unshared: unshared,
            pages_volatile: items.saturating_sub(merging + unshared),
            pages_skipped: counters.pages_skipped.load(Ordering::Relaxed),
            full_scans: self.full_scans(),
            stable_node_chains: chains,
            stable_node_dups: dups,
            ksm_zero_pages: zero,
            general_profit: profit(merging - shared + zero, self.metadata),
            cow_ksm: self.pool.ksm_copies(),
        };
        KsmReport { stats, members }
    }

    /// Contents with several frames, and those frames.
    fn chains(&self, scanner: &super::scanner::Scanner) -> (u64, u64) {
        let mut frames: HashMap<(u32, u32), u64> = HashMap::new();
        if self.pool.ksm_frames() == 0 {
            return (0, 0);
        }
        for pfn in (0..self.pool.frame_count() as u32).map(crate::addr::Pfn) {
            let frame = self.pool.frame(pfn);
            let is_shared = frame.flags().contains(FrameFlags::KSM) && frame.ref_count() > 0;
            if is_shared && scanner.index.is_entry(pfn) {
                let content = (scanner.index.hash(pfn), scanner.index.place(pfn).domain());
                *frames.entry(content).or_default() += 1;
            }
        }
        let several = frames.values().filter(|&&frames| frames > 1);
        (several.clone().count() as u64, several.sum())
    }
}
