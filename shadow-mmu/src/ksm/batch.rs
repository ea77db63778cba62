// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Merging what a sweep has come to, many pages at a time and in the order of their addresses: neighbours share pairs, hence
//! flushes.
//!
//! The first page of a content becomes a page of KSM, in its place in that order, hence before any page is compared with it. If
//! it turns out that nobody could be merged into it, it is made an ordinary page again at the end of the pass (`break_cow`, without
//! the copy: nobody else has it). Of a page that others have since a fork, a copy becomes the page of KSM.
//!
//! Between look and merge anything may have happened; what is not as it was is left alone, and found again by a later pass.

use super::index::Place;
use super::note::Why;
use super::scanner::Scanner;
use super::{CandidateAccess, Ksm};
use crate::addr::Pfn;
use crate::frame::{Fill, FrameFlags};
use crate::mm::{MergeInto, Mm, Outcome, Target};
use crate::sync::Arc;
use std::collections::HashMap;

/// A page that waits to be merged.
#[derive(Debug, Clone, Copy)]
struct Wanted {
    /// The number of its space.
    space: usize,
    target: Target,
    /// Why it may be that nobody is merged with it.
    why: Why,
}

/// Pages that wait to be merged.
#[derive(Debug, Default)]
pub(super) struct Batch {
    wanted: Vec<Wanted>,
    /// How many pages wait for each page of KSM, or candidate that is to become one.
    waiting: HashMap<Pfn, usize>,
    /// Copies that are pages of KSM, with a reference each.
    copies: Vec<Pfn>,
    /// Pages that have become pages of KSM in this pass, and where they are. Longer than a batch: it has to be seen whether
    /// anybody is merged into them.
    promoted: Vec<(Place, Pfn, Why)>,
}

impl Batch {
    /// Pages that wait.
    pub(super) fn len(&self) -> usize {
        self.wanted.len()
    }

    /// How many wait for `into`; `None` if it is not known that anybody may.
    pub(super) fn waiting(&self, into: Pfn) -> Option<usize> {
        self.waiting.get(&into).copied()
    }

    fn add(&mut self, space: usize, page: u64, pfn: Pfn, into: MergeInto) {
        self.wanted.push(Wanted { space, target: Target::new(page, pfn, into), why: Why::Unique });
    }

    /// A page of zeros.
    pub(super) fn zero(&mut self, space: usize, page: u64, pfn: Pfn) {
        self.add(space, page, pfn, MergeInto::Zero);
    }

    /// A page like a page of KSM, or like one that waits to become one.
    pub(super) fn merge(&mut self, space: usize, page: u64, pfn: Pfn, into: Pfn) {
        *self.waiting.entry(into).or_default() += 1;
        self.add(space, page, pfn, MergeInto::Frame(into));
    }

    /// A candidate that is to become a page of KSM; `why` is the reason if nobody is merged into it.
    pub(super) fn promote(&mut self, space: usize, page: u64, pfn: Pfn, why: Why) {
        self.waiting.insert(pfn, 0);
        self.wanted.push(Wanted { space, target: Target::new(page, pfn, MergeInto::Itself), why });
    }
}

fn space(scanner: &Scanner, at: usize) -> Option<Arc<Mm>> {
    scanner.members.get(at)?.as_ref()?.mm.upgrade()
}

impl Ksm {
    /// Merges what waits. Returns how many pages were merged with something.
    pub(super) fn merge(&self, scanner: &mut Scanner) -> u64 {
        let mut wanted = std::mem::take(&mut scanner.batch.wanted);
        // In order as they come, but for what hints brought.
        wanted.sort_by_key(|one| (one.space, one.target.page));
        let mut targets = Vec::with_capacity(wanted.len());
        for of_space in wanted.chunk_by_mut(|a, b| a.space == b.space) {
            let Some(mm) = space(scanner, of_space[0].space) else { continue };
            targets.clear();
            targets.extend(of_space.iter().map(|one| one.target));
            mm.merge(&mut targets, self.settings.max_page_sharing);
            of_space.iter_mut().zip(&targets).for_each(|(one, &target)| one.target = target);
        }
        let merged = wanted.iter().map(|one| self.after_merge(scanner, one)).sum();
        scanner.batch.waiting.clear();
        let copies = std::mem::take(&mut scanner.batch.copies);
        self.pool.put_all(&copies);
        wanted.clear();
        scanner.batch.wanted = wanted;
        merged
    }

    /// What follows from what became of one page. Returns 1 if it was merged with another, else 0.
    fn after_merge(&self, scanner: &mut Scanner, one: &Wanted) -> u64 {
        let Target { page, pfn, into, outcome } = one.target;
        let (place, frame) = (Place::of_page(one.space, page), self.pool.frame(pfn));
        let mut merged = 0;
        let mut counted = None;
        if let Some(pass) = scanner.counted_pass_of(one.space) {
            counted = pass.pages_at(page);
        }
        match (outcome, into) {
            (Outcome::Merged, MergeInto::Itself) => {
                if let Some(pages) = counted {
                    pages.shared += 1;
                }
                // If it was written since, its frame has gone, and the entry is found to be out of date.
                let domain = scanner.domain(one.space);
                scanner.index.set_place(pfn, Place::of_domain(domain.0));
                if self.settings.access == CandidateAccess::Normal {
                    scanner.batch.promoted.push((place, pfn, one.why));
                }
                frame.take_flags(FrameFlags::CANDIDATE);
                return 0;
            }
            (Outcome::Merged, _) => {
                merged = 1;
                if let Some(pages) = counted {
                    let counter = if into == MergeInto::Zero { &mut pages.zero } else { &mut pages.shared };
                    *counter += 1;
                }
            }
            (Outcome::Pinned, _) => counted.into_iter().for_each(|pages| pages.not_shared.pinned += 1),
            (Outcome::Different, _) => {
                counted.into_iter().for_each(|pages| pages.not_shared.volatile += 1);
                scanner.forget(frame, pfn);
                self.is_different(pfn);
                return 0;
            }
            (Outcome::Full, _) => counted.into_iter().for_each(|pages| pages.not_shared.limit += 1),
            _ => counted.into_iter().for_each(|pages| pages.not_shared.volatile += 1),
        }
        scanner.forget(frame, pfn);
        merged
    }

    /// Has a copy of a candidate become a page of KSM, and the candidate be merged into it.
    pub(super) fn promote_copy(&self, scanner: &mut Scanner, at: usize, page: u64, candidate: Pfn, why: Why) {
        // Without memory it stays as it is, and so do those that are like it.
        let Ok(copy) = self.pool.alloc(Fill::Overwritten) else { return };
        if scanner.batch.waiting(copy).is_some() {
            // The frame was a page of KSM that others wait for, and has gone: they would take this one for it.
            self.pool.put(copy);
            return;
        }
        self.pool.copy(candidate, copy);
        // It may have been written meanwhile; the copy is what counts.
        let hash = scanner.hash_of(self, copy);
        scanner.index.remove(copy);
        let domain = scanner.domain(at);
        if !scanner.index.insert(copy, hash, Place::of_domain(domain.0)) {
            self.pool.put(copy);
            scanner.forget(self.pool.frame(candidate), candidate);
            return;
        }
        self.pool.make_ksm(copy);
        scanner.batch.copies.push(copy);
        if self.settings.access == CandidateAccess::Normal {
            scanner.batch.promoted.push((Place::of_page(at, page), copy, why));
        }
        scanner.batch.merge(at, page, candidate, copy);
    }

    /// Makes pages of KSM that have remained alone candidates again.
    pub(super) fn demote_lonely(&self, scanner: &mut Scanner) {
        // None are noted where all candidates are to be alike.
        let promoted = std::mem::take(&mut scanner.batch.promoted);
        for (place, pfn, why) in promoted {
            // Most are not alone; a look costs less than the locks.
            let is_alone = self.pool.frame(pfn).map_count() == 1;
            if is_alone && space(scanner, place.space()).is_some_and(|mm| mm.demote(place.page(), pfn)) {
                scanner.index.set_place(pfn, place);
                self.is_alone(pfn, why);
                if let Some(pages) =
                    scanner.pass_of(place.space()).and_then(|pass| pass.pages_at(place.page()))
                {
                    pages.shared = pages.shared.saturating_sub(1);
                    pages.not_shared.count(why);
                }
            }
        }
    }
}
