// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The sweep: every page of a part that waits to be merged is given to the [batch](super::batch).

use super::index::Place;
use super::look::{Looked, Part};
use super::note::{Finds, Note, Why};
use super::report::KsmPages;
use super::scanner::Scanner;
use super::{Ksm, ZeroPages};
use crate::addr::Pfn;
use crate::frame::FrameFlags;

impl Ksm {
    /// Has each page of a part that waits for it be merged. As [`look_at`](Self::look_at).
    pub(super) fn sweep(&self, scanner: &mut Scanner, part: &Part<'_>, most: u64) -> (u64, u64) {
        let mut looked = std::mem::take(&mut scanner.looked);
        looked.clear();
        let (mut end, mut cost) = (part.range.end.page(), 0);
        part.mm.for_each_leaf(part.range, |base, leaf, entries| {
            cost += 1;
            for entry in entries {
                let page = base.page() + entry as u64;
                let pte = leaf.get(entry);
                if pte.is_ksm() || !pte.is_anonymous() {
                    continue;
                }
                let (flags, note) = self.pool.frame(pte.pfn()).flags_and_note();
                let note = Note::of(note);
                if !flags.contains(FrameFlags::CANDIDATE) || note.why != Why::Wanted {
                    continue;
                }
                if cost > most {
                    end = end.min(page);
                    return;
                }
                cost += 1;
                let (written, writable) = (false, pte.is_writable());
                looked.push(Looked { page, pfn: pte.pfn(), candidate: true, written, writable, note });
            }
        });
        for page in &looked {
            self.sweep_page(scanner, part, page);
        }
        scanner.looked = looked;
        (end, cost)
    }

    fn sweep_page(&self, scanner: &mut Scanner, part: &Part<'_>, looked: &Looked) {
        let Looked { page, pfn, note, .. } = *looked;
        let frame = self.pool.frame(pfn);
        if frame.flags().contains(FrameFlags::KSM) {
            // It has gone, and its frame is the copy of one before it.
            return;
        }
        let (hash, domain) = (scanner.index.hash(pfn), scanner.domain(part.at));
        if hash == scanner.zero_hash && self.settings.zero_pages == ZeroPages::Share {
            scanner.batch.zero(part.at, page, pfn);
            return;
        }
        let place = Place::of_page(part.at, page);
        let likes = self.look_up(scanner, hash, domain, pfn, note.finds);
        // It came after this one, when what this one was like had gone.
        let twin = likes.twin.and_then(|twin| scanner.want(self.pool.frame(twin), twin));
        if let Some(wanted) = twin {
            scanner.uncount(wanted, &mut KsmPages::default(), part, page);
        }
        if let Some(into) = likes.page {
            scanner.batch.merge(part.at, page, pfn, into);
        } else if frame.map_count() > 1 {
            self.promote_copy(scanner, part.at, page, pfn, likes.why);
        } else if scanner.index.is_entry(pfn) || scanner.index.insert(pfn, hash, place) {
            // Its entry may be of a space that it was forked from, and whose number is another's by now.
            scanner.index.set_place(pfn, place);
            // Also where nothing like it is to be found: that is in no index, or has gone, which the end of the pass will show.
            scanner.batch.promote(part.at, page, pfn, likes.why);
        } else {
            scanner.forget(frame, pfn);
        }
    }

    /// A page is alone again that had been promoted.
    pub(super) fn is_alone(&self, pfn: Pfn, why: Why) {
        let frame = self.pool.frame(pfn);
        let note = Note::of(frame.flags_and_note().1);
        frame.set_note(Note { why, ..note }.bits());
        frame.set_flags(FrameFlags::CANDIDATE);
    }

    /// A page has the hash of what it was to be merged with, and other bytes.
    pub(super) fn is_different(&self, pfn: Pfn) {
        self.pool.frame(pfn).set_note(Note { finds: Finds::ByBytes, ..Note::default() }.bits());
    }
}
