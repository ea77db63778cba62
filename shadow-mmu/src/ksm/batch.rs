// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Merging what a scan has found, many pages at a time: neighbours share pairs, hence flushes.
//!
//! A page that was found equal to a candidate needs that one to become a page of KSM first (`try_to_merge_two_pages`). So the
//! candidates that are wanted come first, all of them, each in the place where it is; then the pages that are merged into
//! something. A candidate to which nobody could be merged in the end becomes an ordinary page again (`break_cow`, without
//! the copy: nobody else has it). A candidate that others have since a fork stays theirs, and a copy of it becomes the page of KSM.
//!
//! Between look and merge anything may have happened; what is not as it was is left alone, and found again by a later pass.

use super::index::{Index, Place};
use super::scan::Scanner;
use super::{CandidateAccess, Domain, Ksm};
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
    /// The row of its VMA.
    row: usize,
    target: Target,
}

/// Pages that wait to be merged.
#[derive(Debug, Default)]
pub(super) struct Batch {
    /// Candidates that are to become pages of KSM.
    promoted: Vec<Wanted>,
    merged: Vec<Wanted>,
    /// How many pages wait for each page of KSM, or candidate that is to become one.
    waiting: HashMap<Pfn, usize>,
    /// Pages of KSM to which a reference is held.
    held: Vec<Pfn>,
}

impl Batch {
    /// Pages that wait.
    pub(super) fn len(&self) -> usize {
        self.promoted.len() + self.merged.len()
    }

    /// How many wait for `into`.
    pub(super) fn waiting(&self, into: Pfn) -> usize {
        self.waiting.get(&into).copied().unwrap_or(0)
    }

    /// A page of zeros.
    pub(super) fn zero(&mut self, space: usize, row: usize, page: u64, pfn: Pfn) {
        self.merged.push(Wanted { space, row, target: Target::new(page, pfn, MergeInto::Zero) });
    }

    /// A page like a page of KSM, to which the caller gives the reference that it has.
    pub(super) fn merge(&mut self, space: usize, row: usize, page: u64, pfn: Pfn, into: Pfn) {
        self.held.push(into);
        self.merge_with(space, row, page, pfn, into);
    }

    /// A page like a candidate that was promoted.
    pub(super) fn merge_with(&mut self, space: usize, row: usize, page: u64, pfn: Pfn, into: Pfn) {
        *self.waiting.entry(into).or_default() += 1;
        self.merged.push(Wanted { space, row, target: Target::new(page, pfn, MergeInto::Frame(into)) });
    }

    /// A candidate is to become a page of KSM.
    pub(super) fn promote(&mut self, candidate: Pfn, index: &Index) {
        if self.waiting.contains_key(&candidate) {
            return;
        }
        self.waiting.insert(candidate, 0);
        let place = index.place(candidate);
        let target = Target::new(place.page(), candidate, MergeInto::Itself);
        self.promoted.push(Wanted { space: place.space(), row: usize::MAX, target });
    }
}

/// Has each address space merge its part of `wanted`.
fn merge_all(scanner: &Scanner, wanted: &mut [Wanted], limit: u32) {
    wanted.sort_unstable_by_key(|one| (one.space, one.target.page));
    let mut targets = Vec::new();
    for of_space in wanted.chunk_by_mut(|a, b| a.space == b.space) {
        let Some(mm) = space(scanner, of_space[0].space) else { continue };
        targets.clear();
        targets.extend(of_space.iter().map(|one| one.target));
        mm.merge(&mut targets, limit);
        of_space.iter_mut().zip(&targets).for_each(|(one, &target)| one.target = target);
    }
}

fn space(scanner: &Scanner, at: usize) -> Option<Arc<Mm>> {
    scanner.members.get(at)?.as_ref()?.mm.upgrade()
}

impl Ksm {
    /// Merges what waits. Returns how many pages were merged with something.
    pub(super) fn merge(&self, scanner: &mut Scanner) -> u64 {
        let Batch { mut promoted, mut merged, waiting: _, mut held } = std::mem::take(&mut scanner.batch);
        let limit = self.settings.max_page_sharing;
        merge_all(scanner, &mut promoted, limit);
        // Copies, by what they are copies of.
        let mut copies = HashMap::new();
        promoted.retain_mut(|one| {
            let pfn = one.target.pfn;
            let domain = scanner.domain(one.space);
            if one.target.outcome == Outcome::Forked
                && let Some(copy) = self.copy_of(scanner, pfn, domain)
            {
                copies.insert(pfn, copy);
                held.push(copy);
                let target = Target::new(one.target.page, pfn, MergeInto::Frame(copy));
                merged.push(Wanted { target, ..*one });
                one.target.pfn = copy;
                return true;
            }
            // It may have been written, and its frame gone, since.
            let is_held = one.target.outcome == Outcome::Merged && self.pool.get_ksm(pfn);
            if is_held {
                held.push(pfn);
                self.pool.frame(pfn).take_flags(FrameFlags::CANDIDATE);
                scanner.index.set_place(pfn, Place::of_domain(domain.0));
            } else {
                scanner.forget(self.pool.frame(pfn), pfn);
            }
            is_held
        });
        for one in &mut merged {
            if let MergeInto::Frame(into) = &mut one.target.into {
                *into = copies.get(into).copied().unwrap_or(*into);
            }
        }
        held.sort_unstable();
        // Those whose other half could not be promoted wait for another pass.
        merged.retain(|one| match one.target.into {
            MergeInto::Frame(into) => held.binary_search(&into).is_ok(),
            MergeInto::Zero | MergeInto::Itself => true,
        });
        merge_all(scanner, &mut merged, limit);
        let mut count = 0;
        for one in &merged {
            if one.target.outcome == Outcome::Merged {
                count += 1;
            }
            // A candidate of another space has no row in the pass of this one.
            let Some(row) = scanner.now(one.space).pages_of(one.row) else { continue };
            match one.target.outcome {
                Outcome::Merged => {
                    if one.target.into == MergeInto::Zero {
                        row.zero += 1;
                    } else {
                        row.shared += 1;
                    }
                }
                Outcome::Pinned => row.not_shared.pinned += 1,
                Outcome::Full => row.not_shared.limit += 1,
                Outcome::Changed | Outcome::Different => row.not_shared.volatile += 1,
                Outcome::NotMergeable | Outcome::Forked | Outcome::Pending | Outcome::Protected(_) => {}
            }
        }
        self.pool.put_all(&held);
        if self.settings.access == CandidateAccess::Normal {
            promoted.iter().for_each(|one| self.demote(scanner, one));
        }
        count
    }

    /// A page of KSM with the content of a candidate, which is forgotten; with one reference, which is the caller's.
    fn copy_of(&self, scanner: &mut Scanner, candidate: Pfn, domain: Domain) -> Option<Pfn> {
        let copy = self.pool.alloc(Fill::Overwritten).ok()?;
        self.pool.copy(candidate, copy);
        // It may have been written meanwhile; the copy is what counts.
        let hash = scanner.hash_of(self, copy);
        scanner.forget(self.pool.frame(candidate), candidate);
        scanner.index.remove(copy);
        if !scanner.index.insert(copy, hash, Place::of_domain(domain.0)) {
            self.pool.put(copy);
            return None;
        }
        self.pool.make_ksm(copy);
        Some(copy)
    }

    /// Makes a page of KSM that has remained alone a candidate again.
    fn demote(&self, scanner: &mut Scanner, one: &Wanted) {
        let Target { page, pfn, .. } = one.target;
        if space(scanner, one.space).is_some_and(|mm| mm.demote(page, pfn)) {
            scanner.index.set_place(pfn, Place::of_page(one.space, page));
            self.pool.frame(pfn).set_flags(FrameFlags::CANDIDATE);
        }
    }
}
