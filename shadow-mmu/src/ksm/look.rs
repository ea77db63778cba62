// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One look at a part, and what is like what.

use super::index::{Place, Step};
use super::note::{Finds, Note, Why};
use super::report::KsmPages;
use super::scanner::{Pace, Scanner};
use super::{CandidateAccess, Domain, Ksm, SmartScan, ZeroPages};
use crate::addr::{HvaRange, Pfn};
use crate::frame::FrameFlags;
use crate::mm::{Known, LockedLeaf, Mm, Vma};
use crate::notifier::WrittenPages;
use crate::table::ENTRIES;

/// A page that was looked at and is not merged.
#[derive(Debug, Clone, Copy)]
pub(super) struct Looked {
    pub(super) page: u64,
    pub(super) pfn: Pfn,
    /// It is in the index.
    pub(super) candidate: bool,
    /// It was written since the last look, as far as is known.
    pub(super) written: bool,
    /// It can be written without a fault in the primary.
    pub(super) writable: bool,
    pub(super) note: Note,
}

/// Why pages are looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    /// It is their turn.
    Cursor,
    /// Somebody said that it is worth while: they are hashed at once.
    Hint,
}

/// Some pages of a VMA.
#[derive(Debug)]
pub(super) struct Part<'a> {
    /// The number of their space.
    pub(super) at: usize,
    pub(super) mm: &'a Mm,
    pub(super) vma: &'a Vma,
    pub(super) range: HvaRange,
}

/// What there is like a page.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Likes {
    /// A page of KSM that has room, or one that waits to become one.
    pub(super) page: Option<Pfn>,
    /// A candidate.
    pub(super) twin: Option<Pfn>,
    /// If there is neither.
    pub(super) why: Why,
}

impl Ksm {
    /// Whether nothing was written of a part all of whose pages are merged or known. What secondaries say of it stays in
    /// `asked`.
    fn is_unchanged(&self, part: &Part<'_>, asked: &mut WrittenPages) -> bool {
        let mut settled = true;
        part.mm.for_each_leaf(part.range, |base, leaf, entries| {
            for first in (0..ENTRIES as usize).step_by(64) {
                let mut bits = 0;
                for at in first.max(entries.start)..(first + 64).min(entries.end) {
                    let pte = leaf.get(at);
                    settled &= pte.is_settled();
                    bits |= u64::from(pte.is_writable() && pte.is_anonymous()) << (at - first);
                }
                if bits != 0 {
                    asked.ask_run(base.page() + first as u64, bits);
                }
            }
        });
        if settled && !asked.is_empty() {
            part.mm.notifiers().test_clear_dirty(asked);
        }
        settled && asked.found_none()
    }

    /// One look at a part. Returns the page to go on at, and what it cost: about `most` at most. The caller holds the mmap
    /// lock for reading.
    pub(super) fn look_at(
        &self,
        scanner: &mut Scanner,
        part: &Part<'_>,
        most: u64,
        turn: Turn,
    ) -> (u64, u64) {
        let mut asked = std::mem::take(&mut scanner.asked);
        let mut looked = std::mem::take(&mut scanner.looked);
        let range = part.range;
        let tables = range.end.page().div_ceil(ENTRIES) - range.start.page() / ENTRIES;
        asked.reset(range.start, tables as usize);
        looked.clear();
        let mut most = most;
        if turn == Turn::Cursor && scanner.pace == Pace::Quick {
            if tables <= most && self.is_unchanged(part, &mut asked) {
                (scanner.asked, scanner.looked) = (asked, looked);
                return (range.end.page(), tables);
            }
            // What this pass counts is not all there is; so the next one counts again.
            scanner.noted = None;
            if !asked.found_none() {
                // The answer is of the whole part, and is not given twice.
                most = u64::MAX;
            } else {
                asked.reset(range.start, tables as usize);
            }
        }
        let mut counts = KsmPages::default();
        let (mut end, mut cost, mut skipped) = (range.end.page(), 0, 0);
        part.mm.for_each_leaf(range, |base, leaf, entries| {
            cost += 1;
            for entry in entries {
                let page = base.page() + entry as u64;
                if cost > most {
                    end = end.min(page);
                    return;
                }
                let seen = self.look_at_pte(leaf, entry, turn, &mut counts, &mut skipped);
                let Some(seen) = seen else { continue };
                if seen.writable {
                    asked.ask(page);
                }
                cost += u64::from(!seen.candidate);
                looked.push(Looked { page, ..seen });
            }
        });
        if !asked.is_empty() {
            part.mm.notifiers().test_clear_dirty(&mut asked);
        }
        for page in &mut looked {
            page.written |= asked.contains(page.page);
        }
        let reads = |page: &&Looked| !page.candidate && !page.written;
        self.pool.populate(looked.iter().filter(reads).map(|page| page.pfn));
        let mut scanned = 0;
        for page in &looked {
            if page.candidate && !page.written && matches!(page.note.why, Why::Unique | Why::Domain) {
                counts.not_shared.count(page.note.why);
                continue;
            }
            cost += u64::from(page.candidate);
            let why = self.after_look(scanner, part, *page, turn, &mut counts);
            // Whether there is room by now is a look at the index, and no news if there is none.
            let is_news = page.written || !page.candidate || why != page.note.why;
            scanned += u64::from(is_news);
        }
        if scanned + skipped > 0 {
            // The next pass counts everything again.
            scanner.noted = None;
        }
        self.count(|counters| &counters.pages_scanned, scanned);
        self.count(|counters| &counters.pages_skipped, skipped);
        if turn == Turn::Cursor
            && let Some(pass) = scanner.pass_of(part.at)
        {
            pass.add(part.vma, &counts);
        }
        (scanner.asked, scanner.looked) = (asked, looked);
        (end, cost)
    }

    /// Step 1 of a look, at one pte: the page, but for its number, which the caller knows. `None` for what is no page of its own, is merged, or is passed over.
    fn look_at_pte(
        &self,
        leaf: &LockedLeaf<'_>,
        entry: usize,
        turn: Turn,
        counts: &mut KsmPages,
        skipped: &mut u64,
    ) -> Option<Looked> {
        let pte = leaf.get(entry);
        if pte.is_ksm() {
            counts.all += 1;
            if pte.is_zero() {
                counts.zero += 1;
            } else if self.settings.access == CandidateAccess::CopyOnAccess
                && self.pool.frame(pte.pfn()).map_count() == 1
            {
                counts.not_shared.unique += 1;
            } else {
                counts.shared += 1;
            }
            return None;
        }
        if !pte.is_anonymous() {
            return None;
        }
        counts.all += 1;
        let frame = self.pool.frame(pte.pfn());
        let (flags, note) = frame.flags_and_note();
        debug_assert!(!flags.contains(FrameFlags::KSM), "{pte:?} does not say that it is merged");
        let mut note = Note::of(note);
        if note.skip > 0 && turn == Turn::Cursor && self.settings.smart_scan == SmartScan::On {
            note.skip -= 1;
            frame.set_note(note.bits());
            leaf.set(entry, pte.with_known(Known::No));
            counts.not_shared.volatile += 1;
            *skipped += 1;
            return None;
        }
        let pinned = frame.ref_count() > frame.map_count();
        let candidate = flags.contains(FrameFlags::CANDIDATE);
        let known = if candidate { Known::Yes } else { Known::No };
        let marked = match pinned {
            // The mark is of a write that may still come, and leave none of its own.
            true => pte.with_known(Known::No),
            false => pte.clean().with_known(known),
        };
        if marked != pte {
            leaf.set(entry, marked);
        }
        let told = flags.contains(FrameFlags::WRITTEN) && !frame.take_flags(FrameFlags::WRITTEN).is_empty();
        let written = pte.is_dirty() || told || pinned;
        Some(Looked { page: 0, pfn: pte.pfn(), candidate, written, writable: pte.is_writable(), note })
    }

    /// What follows from a look at one page. Returns why it is not merged.
    fn after_look(
        &self,
        scanner: &mut Scanner,
        part: &Part<'_>,
        looked: Looked,
        turn: Turn,
        counts: &mut KsmPages,
    ) -> Why {
        let Looked { page, pfn, candidate, written, note, .. } = looked;
        let frame = self.pool.frame(pfn);
        if written && turn == Turn::Cursor {
            if candidate {
                scanner.forget(frame, pfn);
            }
            frame.set_note(note.written().bits());
            counts.not_shared.volatile += 1;
            return note.why;
        }
        let finds = if written { Finds::ByHash } else { note.finds };
        let known = candidate && !written;
        if known && note.why == Why::Wanted {
            // Of a sweep that has not come here yet, or in vain.
            scanner.wanted += 1;
            return Why::Wanted;
        }
        let hash = if known { scanner.index.hash(pfn) } else { scanner.hash_of(self, pfn) };
        let place = Place::of_page(part.at, page);
        let is_zero = hash == scanner.zero_hash && self.settings.zero_pages == ZeroPages::Share;
        let why = if is_zero {
            scanner.remember(frame, pfn, hash, place, Note { why: Why::Wanted, ..Note::default() })
        } else {
            let likes = self.look_up(scanner, hash, scanner.domain(part.at), pfn, finds);
            let twin = likes.twin.and_then(|twin| scanner.want(self.pool.frame(twin), twin));
            if let Some(wanted) = twin {
                scanner.uncount(wanted, counts, part, page);
            }
            let is_wanted = likes.page.is_some()
                || likes.twin.is_some()
                || self.settings.access == CandidateAccess::CopyOnAccess;
            let why = if is_wanted { Why::Wanted } else { likes.why };
            scanner.remember(frame, pfn, hash, place, Note { why, finds, ..Note::default() })
        };
        counts.not_shared.count(why);
        why
    }

    /// What there is like `but`, a page of this hash.
    pub(super) fn look_up(
        &self,
        scanner: &mut Scanner,
        hash: u32,
        domain: Domain,
        but: Pfn,
        finds: Finds,
    ) -> Likes {
        let Scanner { index, members, batch, .. } = scanner;
        let mut likes = Likes::default();
        let limit = self.settings.max_page_sharing as usize;
        let mut orphans = 0;
        index.find(hash, |index, entry| {
            if entry == but {
                return Step::Next;
            }
            let frame = self.pool.frame(entry);
            let flags = frame.flags();
            let place = index.place(entry);
            let waiting = batch.waiting(entry);
            let (its, sharers) = if flags.contains(FrameFlags::KSM) {
                (Domain(place.domain()), frame.map_count() as usize + waiting.unwrap_or(0))
            } else {
                let owner = members.get(place.space()).and_then(Option::as_ref);
                match owner {
                    Some(owner) if flags.contains(FrameFlags::CANDIDATE) => {
                        (owner.domain, 1 + waiting.unwrap_or(0))
                    }
                    _ => {
                        // Of a space that has gone; who has it by a fork is to be looked at anew.
                        orphans += u64::from(!frame.take_flags(FrameFlags::CANDIDATE).is_empty());
                        return Step::Remove;
                    }
                }
            };
            if frame.ref_count() == 0 {
                return Step::Remove;
            }
            if finds == Finds::ByBytes && !self.pool.is_same(but, entry) {
                return Step::Next;
            }
            if its != domain {
                likes.why = Why::Domain;
            } else if !flags.contains(FrameFlags::KSM) && waiting.is_none() {
                likes.twin = Some(entry);
            } else if sharers >= limit {
                likes.why = Why::Limit;
            } else {
                likes.page = Some(entry);
                return Step::Stop;
            }
            Step::Next
        });
        scanner.forgotten += orphans;
        likes
    }
}
