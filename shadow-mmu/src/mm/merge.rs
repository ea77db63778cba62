// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Merging: the primary's half of [`ksm`](crate::ksm). After `try_to_merge_one_page`, `write_protect_page`, `replace_page` and
//! `break_ksm` (`mm/ksm.c`).
//!
//! # One page
//! ```text
//! 1  pair: start (secondaries lose the page)
//! 2        page-table lock: still that frame? pinned? then leave it. W and D off: orig_pte
//! 3  end
//! 4  compare the bytes with those of the other frame
//! 5  pair: start
//! 6        page-table lock: still orig_pte? Then the pte gets the other frame, read-only
//! 7  end; the old frame goes
//! ```
//! Whoever writes after 2 has to fault first, in [`Mm::fault`], which sets W and D in the pte; then 6 finds another pte than
//! `orig_pte`, and the page stays (I52). So what 4 compares is what is there at 6, though it may run beside a write. To compare
//! first and protect then would lose a write in between (R10b); to protect without the pair would leave a secondary that
//! writes (R10).
//!
//! A page that becomes a page of KSM itself, for others to be merged into, needs 1 to 3 only. Whoever maps such a page says so in
//! his pte.
//!
//! Many pages are done at once: neighbours share pairs, hence flushes. A pair covers gaps of up to [`GAP`] pages, which lose
//! their sptes with the others, and find them again by a fault that changes nothing.
//!
//! # Pins (R22)
//! A pin is taken under the page-table lock. With that held, and W gone, nobody takes one who could write; one that was there
//! before shows as a reference that no pte has. Of a frame that several ptes map, all are read-only since a fork, which copied
//! what was pinned.
//!
//! # Leaving
//! A write to a merged page always copies ([`Mm::fault`]), whoever else has it. [`Mm::unmerge`] copies all at once. Either takes
//! frames that the pool keeps for that ([`Purpose::Unshare`]).

use super::{Map, Mm, MmError, Pte, Vma, VmaFlags};
use crate::addr::{Hva, HvaRange, PAGE_SIZE, Pfn};
use crate::frame::{Fill, FrameFlags, OutOfFrames, Purpose};
use crate::inject::{Effect, MERGE_COMPARE, MERGE_PROTECT, MERGE_REPLACE, Point};
use crate::notifier::Event;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::{Arc, Mutex};
use crate::table::{ENTRIES, index};

/// Pages between two that are merged, that may lose their sptes with them.
const GAP: u64 = 8;
/// Pages of one pair at most: for so long a fault waits.
const RUN: u64 = 512;
/// Pages that get frames of their own inside one pair.
const UNMERGE_BATCH: usize = 64;

/// What a page is merged into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MergeInto {
    /// The zero frame.
    Zero,
    /// This page of KSM, if it still is one when the bytes are compared; who merges is the only one who makes such pages.
    Frame(Pfn),
    /// Nothing: it becomes a page of KSM.
    Itself,
}

/// What became of a page that was to be merged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Not tried.
    Pending,
    /// Write-protected, with this pte.
    Protected(Pte),
    /// Merged.
    Merged,
    /// Another page is there now, or it was written meanwhile.
    Changed,
    /// Somebody holds the frame who might write it.
    Pinned,
    /// It cannot become a page of KSM itself, for others have it since a fork, whose ptes do not say so.
    Forked,
    /// The bytes differ.
    Different,
    /// The other frame has as many ptes as it may.
    Full,
    /// The mapping is not to be merged, or gone.
    NotMergeable,
}

/// A page that is to be merged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Target {
    /// Its number.
    pub(crate) page: u64,
    /// Its frame, as it was seen last.
    pub(crate) pfn: Pfn,
    pub(crate) into: MergeInto,
    pub(crate) outcome: Outcome,
}

impl Target {
    pub(crate) fn new(page: u64, pfn: Pfn, into: MergeInto) -> Self {
        Self { page, pfn, into, outcome: Outcome::Pending }
    }
}

/// Whether all of a space's private memory may be merged (`PR_SET_MEMORY_MERGE`), or only what was advised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MergeAny {
    /// All of it.
    On,
    /// What has [`VmaFlags::MERGEABLE`].
    #[default]
    Off,
}

/// Who merges pages of an address space, as the space knows it: children are told of to the same.
pub(crate) trait Sharer: std::fmt::Debug + Send + Sync {
    /// A child of a space that this one scans.
    fn forked(&self, child: &Arc<Mm>);
}

/// What there is to know of merged pages, at their address space.
#[derive(Debug, Default)]
pub(super) struct Sharing {
    merging: AtomicU64,
    zero: AtomicU64,
    merge_any: AtomicBool,
    copy_on_access: AtomicBool,
    sharer: Mutex<Option<Arc<dyn Sharer>>>,
}

/// Merged ptes that are taken out.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Merged {
    merging: u64,
    zero: u64,
}

impl Merged {
    pub(super) fn add(&mut self, pte: Pte) {
        self.merging += u64::from(pte.is_ksm() && !pte.is_zero());
        self.zero += u64::from(pte.is_ksm() && pte.is_zero());
    }
}

impl Sharing {
    /// A pte is merged now.
    pub(super) fn gained(&self, pte: Pte) {
        let counter = if pte.is_zero() { &self.zero } else { &self.merging };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// Ptes are merged no longer.
    pub(super) fn lost(&self, merged: Merged) {
        if merged.merging > 0 {
            self.merging.fetch_sub(merged.merging, Ordering::Relaxed);
        }
        if merged.zero > 0 {
            self.zero.fetch_sub(merged.zero, Ordering::Relaxed);
        }
    }

    /// What a child has of its parent.
    pub(super) fn inherit(&self, parent: &Self) {
        self.merge_any.store(parent.merge_any.load(Ordering::Relaxed), Ordering::Relaxed);
        self.copy_on_access.store(parent.copy_on_access.load(Ordering::Relaxed), Ordering::Relaxed);
    }
}

impl Mm {
    /// Ptes that map a frame shared by content (`ksm_merging_pages`).
    pub fn ksm_merging_pages(&self) -> u64 {
        self.sharing.merging.load(Ordering::Relaxed)
    }

    /// Ptes of pages of zeros that were merged with the zero frame (`ksm_zero_pages`).
    pub fn ksm_zero_pages(&self) -> u64 {
        self.sharing.zero.load(Ordering::Relaxed)
    }

    /// Whether all private memory may be merged.
    pub fn merge_any(&self) -> MergeAny {
        if self.sharing.merge_any.load(Ordering::Relaxed) { MergeAny::On } else { MergeAny::Off }
    }

    /// Lets all private memory be merged, also what is mapped from now on, until it is advised to be
    /// [`Unmergeable`](super::Advice::Unmergeable); or none any more (`prctl(PR_SET_MEMORY_MERGE)`): then also what was advised
    /// with [`Mergeable`](super::Advice::Mergeable) is not merged any longer.
    ///
    /// # Errors
    /// [`MmError::NoMemory`]: there are too few frames to take merges back, and nothing changes but that some are.
    pub fn set_merge_any(&self, any: MergeAny) -> Result<(), MmError> {
        let mut map = self.map.write();
        let vmas: Vec<HvaRange> = map.vmas.iter().map(|vma| vma.range).collect();
        match any {
            MergeAny::Off if self.merge_any() == MergeAny::On => {
                self.unmerge_locked(&map, everything())?;
                for range in vmas {
                    self.change_flags_locked(&mut map, range, |vma| Ok(vma.flags - VmaFlags::MERGEABLE))?;
                }
            }
            MergeAny::Off => {}
            MergeAny::On => {
                for range in vmas {
                    self.change_flags_locked(&mut map, range, |vma| Ok(vma.flags | vma.mergeable()))?;
                }
            }
        }
        // Under the lock, as the flag of a VMA.
        self.sharing.merge_any.store(any == MergeAny::On, Ordering::Relaxed);
        Ok(())
    }

    /// Whether pages of `vma` may be merged now. The caller holds the mmap lock.
    pub(crate) fn may_merge(&self, vma: &Vma) -> bool {
        vma.is_ksm_compatible() && vma.flags.contains(VmaFlags::MERGEABLE)
    }

    /// What a new mapping has, where all private memory may be merged (`ksm_vma_flags`). The caller holds the mmap lock for
    /// writing.
    pub(super) fn flag_if_any_merges(&self, vma: &mut Vma) {
        if self.merge_any() == MergeAny::On {
            vma.flags |= vma.mergeable();
        }
    }

    /// From now on `sharer` is told of children; with `copy_on_access`, reading a merged page copies it as writing does. False,
    /// and nothing is done, if there is one already.
    #[must_use]
    pub(crate) fn set_sharer(&self, sharer: Arc<dyn Sharer>, copy_on_access: CopyOnAccess) -> bool {
        let mut now = self.sharing.sharer.lock();
        if now.is_some() {
            return false;
        }
        self.sharing.copy_on_access.store(copy_on_access == CopyOnAccess::Yes, Ordering::Relaxed);
        *now = Some(sharer);
        true
    }

    /// Has the sharer of `parent`, if there is one, take this child of its.
    pub(super) fn enter_as(self: &Arc<Self>, parent: &Sharing) {
        let sharer = parent.sharer.lock().clone();
        if let Some(sharer) = sharer {
            sharer.forked(self);
        }
    }

    /// Whether every access to the page of `pte` copies it.
    pub(super) fn copies_on_access(&self, pte: Pte) -> bool {
        pte.is_ksm() && self.sharing.copy_on_access.load(Ordering::Relaxed)
    }

    /// Notes that a page was given a frame of its own in the place of that of `old`, if that was a merged one.
    pub(super) fn copied_merged(&self, old: Pte) {
        if old.is_ksm() {
            let mut merged = Merged::default();
            merged.add(old);
            self.sharing.lost(merged);
            if !old.is_zero() {
                self.pool.count_ksm_copy();
            }
        }
    }
}

/// Whether reading a merged page copies it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CopyOnAccess {
    Yes,
    No,
}

fn everything() -> HvaRange {
    HvaRange { start: Hva(0), end: Hva(crate::addr::TASK_SIZE) }
}

/// The addresses from the first of `targets` to the last.
fn hull(targets: &[Target]) -> HvaRange {
    match (targets.first(), targets.last()) {
        (Some(first), Some(last)) => {
            HvaRange::pages_from(Hva(first.page * PAGE_SIZE), last.page - first.page + 1)
        }
        _ => HvaRange::pages_from(Hva(0), 0),
    }
}

/// How many of `targets`, ascending, one pair takes.
fn run_length(targets: &[Target]) -> usize {
    let Some(first) = targets.first() else { return 0 };
    let neighbours = targets
        .windows(2)
        .take_while(|two| two[1].page - two[0].page <= GAP + 1 && two[1].page - first.page < RUN);
    neighbours.count() + 1
}

impl Mm {
    /// Merges `targets`, ascending by page, and notes at each what became of it. `limit` is how many ptes a page of KSM may
    /// have. May wait for the mmap lock and for flushes; not to be called inside a pair of this space.
    pub(crate) fn merge(&self, mut targets: &mut [Target], limit: u32) {
        while !targets.is_empty() {
            let (run, rest) = targets.split_at_mut(run_length(targets));
            self.merge_run(run, limit);
            targets = rest;
        }
    }

    fn merge_run(&self, run: &mut [Target], limit: u32) {
        let map = self.map.read();
        for target in &mut *run {
            let vma = map.vmas.find(Hva(target.page * PAGE_SIZE));
            let trapped = map.trap(Hva(target.page * PAGE_SIZE)).is_some();
            if trapped || self.is_reaped() || !vma.is_some_and(|vma| self.may_merge(vma)) {
                target.outcome = Outcome::NotMergeable;
            }
        }
        {
            let _pair = self.notifiers.invalidate(hull(run), Event::ProtectionPage);
            self.for_each_target(run, |leaf, at, target| {
                if target.outcome == Outcome::Pending {
                    target.outcome = self.write_protect_page(leaf, at, target);
                }
            });
        }
        self.reach(&MERGE_PROTECT, run);
        // Until the end, so that what was compared is what is mapped (R26).
        let mut held = Vec::with_capacity(run.len());
        for target in &mut *run {
            let Outcome::Protected(_) = target.outcome else { continue };
            let same = match target.into {
                MergeInto::Zero => self.pool.is_zero(target.pfn),
                MergeInto::Frame(frame) if !self.pool.get_ksm(frame) => {
                    target.outcome = Outcome::Changed;
                    continue;
                }
                MergeInto::Frame(frame) => {
                    held.push(frame);
                    self.pool.is_same(target.pfn, frame)
                }
                MergeInto::Itself => true,
            };
            if !same {
                target.outcome = Outcome::Different;
            }
        }
        self.reach(&MERGE_COMPARE, run);
        if !run.iter().any(|target| matches!(target.outcome, Outcome::Protected(_))) {
            self.pool.put_all(&held);
            return;
        }
        let mut left = Vec::with_capacity(run.len());
        {
            let _pair = self.notifiers.invalidate(hull(run), Event::Clear);
            self.for_each_target(run, |leaf, at, target| {
                if let Outcome::Protected(orig) = target.outcome {
                    target.outcome = self.replace_page(leaf, at, target, orig, limit);
                    if target.outcome == Outcome::Merged {
                        left.push(target.pfn);
                    }
                }
            });
            self.reach(&MERGE_REPLACE, run);
        }
        // After the end, as every frame that goes.
        left.iter().for_each(|&pfn| self.pool.frame(pfn).remove_map());
        left.append(&mut held);
        self.pool.put_all(&left);
    }

    /// Between two steps of a merge; an injected failure gives up what is not merged yet.
    fn reach(&self, point: &'static Point, run: &mut [Target]) {
        if let (true, Some(first)) = (self.faults.are_armed(), run.first())
            && let Effect::Fail(_) = self.faults.hit_at(point, first.page * PAGE_SIZE)
        {
            for target in run.iter_mut().filter(|target| matches!(target.outcome, Outcome::Protected(_))) {
                target.outcome = Outcome::Changed;
            }
        }
    }

    /// Calls `visit` for each of `targets`, ascending, with the lock of its table.
    fn for_each_target(
        &self,
        targets: &mut [Target],
        mut visit: impl FnMut(&super::LockedLeaf<'_>, usize, &mut Target),
    ) {
        for of_table in targets.chunk_by_mut(|a, b| a.page / ENTRIES == b.page / ENTRIES) {
            let leaf = self.lock_leaf(Hva(of_table[0].page * PAGE_SIZE));
            for target in of_table {
                match &leaf {
                    Some(leaf) => visit(leaf, index(target.page, 1), target),
                    None => target.outcome = Outcome::Changed,
                }
            }
        }
    }

    /// Step 2. Inside the pair.
    fn write_protect_page(&self, leaf: &super::LockedLeaf<'_>, at: usize, target: &Target) -> Outcome {
        let pte = leaf.get(at);
        if !pte.is_anonymous() || pte.is_ksm() || pte.pfn() != target.pfn {
            return Outcome::Changed;
        }
        let frame = self.pool.frame(pte.pfn());
        let orig = pte.write_protected().clean();
        leaf.set(at, orig);
        if frame.map_count() == 1 && frame.ref_count() > 1 {
            // What it had comes back: nobody has looked at it meanwhile.
            leaf.set(at, pte);
            return Outcome::Pinned;
        }
        // Written since it was hashed? Secondaries have told by now. Then it is not what it is wanted for, and a page of KSM must
        // be what the index says (I51); whoever looks at it next is to find the marks.
        if pte.is_dirty() || frame.flags().contains(FrameFlags::WRITTEN) {
            leaf.set(at, pte);
            return Outcome::Changed;
        }
        if target.into != MergeInto::Itself {
            return Outcome::Protected(orig);
        }
        if frame.map_count() > 1 {
            return Outcome::Forked;
        }
        self.pool.make_ksm(pte.pfn());
        leaf.set(at, orig.merged());
        self.sharing.gained(orig);
        Outcome::Merged
    }

    /// Step 6. Inside the pair.
    fn replace_page(
        &self,
        leaf: &super::LockedLeaf<'_>,
        at: usize,
        target: &Target,
        orig: Pte,
        limit: u32,
    ) -> Outcome {
        let now = leaf.get(at);
        if !now.is_same_page(orig) {
            return Outcome::Changed;
        }
        let new = match target.into {
            MergeInto::Zero => Pte::ksm_zero(self.zero_frame),
            MergeInto::Frame(frame) if self.pool.frame(frame).map_count() >= limit => return Outcome::Full,
            MergeInto::Frame(frame) => {
                self.pool.get(frame);
                self.pool.frame(frame).add_map();
                Pte::ksm(frame)
            }
            MergeInto::Itself => return Outcome::Changed,
        };
        let hva = Hva(target.page * PAGE_SIZE);
        self.ptep_clear_flush_notify(leaf, hva);
        self.set_pte_at_notify(leaf, hva, new.with_age_of(now));
        self.sharing.gained(new);
        Outcome::Merged
    }

    /// Makes the page an ordinary one again that became a page of KSM, if nobody was merged into it. Whether it did.
    pub(crate) fn demote(&self, page: u64, pfn: Pfn) -> bool {
        let _map = self.map.read();
        let Some(leaf) = self.lock_leaf(Hva(page * PAGE_SIZE)) else { return false };
        let (at, frame) = (index(page, 1), self.pool.frame(pfn));
        let pte = leaf.get(at);
        // Who merges is the caller, and a fork needs the mmap lock: nobody adds a pte.
        if !pte.is_anonymous() || !pte.is_ksm() || pte.pfn() != pfn || frame.map_count() != 1 {
            return false;
        }
        self.pool.unmake_ksm(pfn);
        leaf.set(at, pte.unmerged());
        let mut merged = Merged::default();
        merged.add(pte);
        self.sharing.lost(merged);
        true
    }

    /// Gives every merged page a frame of its own (`run` = 2, `unmerge_ksm_pages`).
    ///
    /// # Errors
    /// [`MmError::NoMemory`]: some pages are still merged.
    pub fn unmerge(&self) -> Result<(), MmError> {
        let map = self.map.write();
        self.unmerge_locked(&map, everything())
    }

    /// The same of `range`. The caller holds the mmap lock for writing: no page is faulted in, forked or merged meanwhile.
    pub(super) fn unmerge_locked(&self, map: &Map, range: HvaRange) -> Result<(), MmError> {
        let mut merged = Vec::new();
        for vma in map.vmas.overlapping(range) {
            self.for_each_leaf(vma.range.intersect(range), |base, leaf, entries| {
                for at in entries {
                    let pte = leaf.get(at);
                    if pte.is_present() && pte.is_ksm() {
                        merged.push((base.page() + at as u64, pte));
                    }
                }
            });
        }
        // Pairs over neighbours: what lies between two far ones is left alone.
        let runs = merged.chunk_by(|a, b| b.0 - a.0 <= GAP + 1).flat_map(|run| run.chunks(UNMERGE_BATCH));
        runs.into_iter().try_for_each(|run| self.unmerge_pages(run)).map_err(MmError::from)
    }

    /// Gives these pages, which are merged, ascending, frames of their own, read-only (`FAULT_FLAG_UNSHARE`).
    fn unmerge_pages(&self, pages: &[(u64, Pte)]) -> Result<(), OutOfFrames> {
        let mut frames = Vec::with_capacity(pages.len());
        for (_, pte) in pages {
            match self
                .pool
                .alloc_for(Purpose::Unshare, if pte.is_zero() { Fill::Zeros } else { Fill::Overwritten })
            {
                Ok(pfn) => frames.push(pfn),
                Err(error) => {
                    self.pool.put_all(&frames);
                    return Err(error);
                }
            }
        }
        for (&(_, pte), &new) in pages.iter().zip(&frames) {
            if !pte.is_zero() {
                self.pool.copy(pte.pfn(), new);
            }
        }
        let hull = match (pages.first(), pages.last()) {
            (Some(first), Some(last)) => HvaRange::pages_from(Hva(first.0 * PAGE_SIZE), last.0 - first.0 + 1),
            _ => return Ok(()),
        };
        {
            let _pair = self.notifiers.invalidate(hull, Event::Clear);
            for (&(page, _), &new) in pages.iter().zip(&frames) {
                let hva = Hva(page * PAGE_SIZE);
                // The tables stay, and so do ptes of private memory, but for the reaper's.
                let Some(leaf) = self.lock_leaf(hva) else { continue };
                let now = leaf.get(index(page, 1));
                self.ptep_clear_flush_notify(&leaf, hva);
                let mut merged = Merged::default();
                merged.add(now);
                self.sharing.lost(merged);
                self.pool.frame(new).add_map();
                self.set_pte_at_notify(&leaf, hva, Pte::anonymous(new).with_age_of(now));
            }
        }
        let left: Vec<Pfn> = pages.iter().filter_map(|(_, pte)| pte.counted_frame()).collect();
        left.iter().for_each(|&pfn| self.pool.frame(pfn).remove_map());
        self.pool.put_all(&left);
        Ok(())
    }
}
