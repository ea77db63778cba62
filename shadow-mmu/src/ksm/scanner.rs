// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the scanner's lock guards: the cursor, the address spaces, the index, and which pages are candidates.

use super::batch::Batch;
use super::index::{Index, Place, SPACES};
use super::look::{Looked, Part};
use super::note::{Note, Why};
use super::report::{KsmPages, MemberPass};
use super::{Domain, Ksm, KsmMember, Queue};
use crate::addr::{PAGE_SIZE, Pfn};
use crate::frame::{Frame, FrameFlags};
use crate::mm::Mm;
use crate::notifier::WrittenPages;
use crate::sync::{Arc, Weak};
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// What has to be as it was when the last pass began, for the marks that it left in ptes to be true of the frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Noted {
    /// No secondary told a frame of a write.
    pub(super) writes_lost: u64,
    /// No candidate was forgotten.
    pub(super) forgotten: u64,
    /// Nobody came to take part, and no hint.
    pub(super) called: u64,
}

/// How a pass looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pace {
    /// At ptes, where these are settled.
    Quick,
    /// At frames too, and counts.
    Thorough,
}

/// Where a pass is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// It has not begun.
    Begin,
    Look,
    Sweep,
}

/// An address space in the scan.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) id: KsmMember,
    pub(super) mm: Weak<Mm>,
    pub(super) domain: Domain,
    /// The pass that is under way.
    pub(super) now: MemberPass,
    /// The last one that came to an end.
    pub(super) last: MemberPass,
}

/// What the scanner's lock guards.
#[derive(Debug)]
pub(super) struct Scanner {
    pub(super) index: Index,
    /// By the number in a [`Place`].
    pub(super) members: Vec<Option<Member>>,
    pub(super) phase: Phase,
    /// Where the next look begins.
    pub(super) member: usize,
    pub(super) page: u64,
    /// Pages that wait for the sweep of this pass.
    pub(super) wanted: u64,
    pub(super) pace: Pace,
    /// When this pass began, and the one before it.
    pub(super) noted: Option<Noted>,
    pub(super) forgotten: u64,
    pub(super) called: u64,
    /// What pages were found to be like, while a hint is followed.
    pub(super) twins: Option<Vec<Place>>,
    pub(super) seed: u64,
    pub(super) zero_hash: u32,
    pub(super) asked: WrittenPages,
    pub(super) looked: Vec<Looked>,
    pub(super) batch: Batch,
}

fn content_hash(bytes: &[u8], seed: u64) -> u32 {
    (xxh3_64_with_seed(bytes, seed) >> 32) as u32
}

impl Scanner {
    pub(super) fn new(frames: usize, seed: u64) -> Option<Self> {
        Some(Self {
            index: Index::new(frames)?,
            members: Vec::new(),
            phase: Phase::Begin,
            member: 0,
            page: 0,
            wanted: 0,
            pace: Pace::Thorough,
            noted: None,
            forgotten: 0,
            called: 0,
            twins: None,
            seed,
            zero_hash: content_hash(&[0; PAGE_SIZE as usize], seed),
            asked: WrittenPages::default(),
            looked: Vec::new(),
            batch: Batch::default(),
        })
    }

    pub(super) fn metadata_bytes(&self) -> u64 {
        self.index.bytes()
    }

    /// Takes up those who entered.
    pub(super) fn admit(&mut self, queue: &mut Queue) {
        self.called += (queue.newcomers.len() + queue.hints.len()) as u64;
        for member in &mut self.members {
            if member.as_ref().is_some_and(|member| member.mm.strong_count() == 0) {
                *member = None;
            }
        }
        for newcomer in queue.newcomers.drain(..) {
            let member = Member {
                id: newcomer.id,
                mm: newcomer.mm,
                domain: newcomer.domain,
                now: MemberPass::default(),
                last: MemberPass::default(),
            };
            match self.members.iter().position(Option::is_none) {
                Some(free) => self.members[free] = Some(member),
                None => self.members.push(Some(member)),
            }
        }
        debug_assert!(self.members.len() <= SPACES);
        queue.scanned = self.members.iter().flatten().count();
    }

    /// The address spaces that take part.
    pub(super) fn spaces(&self) -> Vec<Arc<Mm>> {
        self.members.iter().flatten().filter_map(|member| member.mm.upgrade()).collect()
    }

    /// The next address space, if there is one.
    pub(super) fn space(&mut self) -> Option<Arc<Mm>> {
        while let Some(member) = self.members.get_mut(self.member) {
            match member.as_ref().and_then(|member| member.mm.upgrade()) {
                Some(mm) => return Some(mm),
                // Whoever is dropped is left out.
                None => *member = None,
            }
            self.next_space();
        }
        None
    }

    pub(super) fn next_space(&mut self) {
        self.member += 1;
        self.page = 0;
    }

    /// The hash of what the frame holds now.
    pub(super) fn hash_of(&self, ksm: &Ksm, pfn: Pfn) -> u32 {
        let mut bytes = [0; PAGE_SIZE as usize];
        ksm.pool.read(pfn, &mut bytes);
        content_hash(&bytes, self.seed)
    }

    pub(super) fn pass_of(&mut self, space: usize) -> Option<&mut MemberPass> {
        self.members.get_mut(space)?.as_mut().map(|member| &mut member.now)
    }

    /// The same, where pages are counted: not while a hint is followed, for its pages are counted when it is their turn.
    pub(super) fn counted_pass_of(&mut self, space: usize) -> Option<&mut MemberPass> {
        if self.twins.is_some() { None } else { self.pass_of(space) }
    }

    pub(super) fn domain(&self, space: usize) -> Domain {
        let member = self.members.get(space).and_then(Option::as_ref);
        member.map_or_else(Domain::default, |member| member.domain)
    }

    /// Takes a candidate out of the index. Not if its frame has gone meanwhile, and has become a page of KSM.
    pub(super) fn forget(&mut self, frame: &Frame, pfn: Pfn) {
        if !frame.flags().contains(FrameFlags::KSM) {
            self.forgotten += 1;
            frame.take_flags(FrameFlags::CANDIDATE);
            self.index.remove(pfn);
        }
    }

    /// Makes a page a candidate, and returns why it is not merged. It is put into the index if it is like no other there; what
    /// is wanted is found by the other that it is like, and an index with a thousand entries of one content would be a list.
    pub(super) fn remember(&mut self, frame: &Frame, pfn: Pfn, hash: u32, place: Place, note: Note) -> Why {
        // The frame may have been another page's, whose entry nobody has come upon since.
        self.index.remove(pfn);
        if note.why == Why::Wanted {
            self.index.set_hash(pfn, hash);
            self.wanted += 1;
        } else if !self.index.insert(pfn, hash, place) {
            self.forgotten += 1;
            frame.take_flags(FrameFlags::CANDIDATE);
            frame.set_note(Note::default().bits());
            return Why::Limit;
        }
        frame.set_note(note.bits());
        frame.set_flags(FrameFlags::CANDIDATE);
        note.why
    }

    /// A candidate that was alone is not any longer. Returns where it is, and why it was alone.
    pub(super) fn want(&mut self, frame: &Frame, twin: Pfn) -> Option<(Place, Why)> {
        let note = Note::of(frame.flags_and_note().1);
        if note.why == Why::Wanted {
            return None;
        }
        frame.set_note(Note { why: Why::Wanted, ..note }.bits());
        self.wanted += 1;
        let place = self.index.place(twin);
        if let Some(twins) = &mut self.twins {
            twins.push(place);
        }
        Some((place, note.why))
    }

    /// What [`want`](Self::want) returned is counted no more as what it was, if it was counted in this pass and will be once
    /// more: in `counts`, if that is of the part in hand up to `here`.
    pub(super) fn uncount(
        &mut self,
        wanted: (Place, Why),
        counts: &mut KsmPages,
        part: &Part<'_>,
        here: u64,
    ) {
        let (place, why) = wanted;
        let (at, page) = (place.space(), place.page());
        let in_part = at == part.at && part.range.page_numbers().contains(&page);
        let counted = match self.phase {
            Phase::Begin => false,
            Phase::Look if in_part => page < here,
            Phase::Look => (at, page) < (self.member, self.page),
            // All were; but only those that the sweep has still to come to are counted again.
            Phase::Sweep => (at, page) > (part.at, here),
        };
        if !counted {
            return;
        }
        let in_hand = self.phase == Phase::Look && in_part;
        match self.counted_pass_of(at) {
            None => {}
            Some(_) if in_hand => counts.not_shared.uncount(why),
            Some(pass) => pass.pages_at(page).into_iter().for_each(|pages| pages.not_shared.uncount(why)),
        }
    }
}
