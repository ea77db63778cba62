// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The scan: a cursor over all address spaces, twice in a pass. See the [module](super) for a page's way.
//!
//! First it *looks*: which pages were written, which were not, and what those hold; each look up to [`TABLES`] leaf tables of one
//! VMA at a time, in three steps:
//! 1. Under the page-table lock: which pages are there, and what is known of them. What the primary and the frame have to say
//!    of writes is taken.
//! 2. Every secondary is asked, once for all pages that could have been written through it (`test_clear_dirty`).
//! 3. Without a lock but the mmap lock: pages that were written are forgotten, quiet ones are hashed, looked up, and put into
//!    the index. A page for which there is another is noted, and so is the other.
//!
//! Then, if any were noted, it *sweeps*: all that were are merged, in the order of their addresses, so that neighbours share pairs
//! and flushes. The first of its content becomes a page of KSM, and the others are merged into it.
//!
//! # A pass over what is known
//! Most passes find that nothing was written. When the last one did, and none of what it noted at ptes can be out of date ([`Noted`]), a part
//! is gone through quickly first: ptes alone say which pages are merged or known, and the secondaries that those were not written.
//! Where that is so of all pages of a part, no frame is looked at and nothing is counted; what the last pass counted stays true.
//! Pages that are alone because of the limit wait for the next thorough one, too.
//!
//! A page that is written after step 2 has D again, and the next pass finds it; its hash is wrong until then, and nobody is
//! merged with it, for merging compares.
//!
//! # What a scan costs
//! A page that is hashed, merged, or of which D was cleared, counts as one page of what the caller allows; so does a leaf table,
//! for pages in it that nothing has to be done for.

use super::batch::Batch;
use super::index::{Index, Place, SPACES, Step};
use super::report::{KsmPages, MemberPass, NotShared};
use super::{CandidateAccess, Domain, Ksm, KsmMember, Queue, SmartScan, ZeroPages};
use crate::addr::{Hva, HvaRange, PAGE_SIZE, Pfn, TASK_SIZE};
use crate::frame::{Frame, FrameFlags};
use crate::mm::{Known, LockedLeaf, Mm, Vma};
use crate::notifier::WrittenPages;
use crate::sync::{Arc, Weak};
use crate::table::ENTRIES;
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Leaf tables of one look.
const TABLES: u64 = 16;
/// Pages that are merged in one go, so that neighbours share flushes.
const BATCH: usize = 2048;

/// What one scan came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scanned {
    /// Pages that something was done for.
    pub pages: u64,
    /// Pages that were merged.
    pub merged: u64,
    /// Whether it came to the end of a pass, where it stops.
    pub pass: PassEnd,
}

/// Where a scan stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PassEnd {
    /// Somewhere: the next scan goes on there.
    NotYet,
    /// At the end of a pass: the next scan begins another.
    Reached,
}

/// Why a page that was quiet is not merged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Why {
    /// There is no other like it.
    #[default]
    Unique = 0,
    /// There is one, in another domain.
    Domain = 1,
    /// There are others, and as many share a frame as may.
    Limit = 2,
    /// There is something to merge it with, and it waits for the sweep.
    Wanted = 3,
}

/// What a page is compared by when something like it is looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Finds {
    /// Its hash, which is as good as always enough.
    #[default]
    ByHash,
    /// Its bytes too: it was found to have the hash of other bytes, and would find those each time.
    ByBytes,
}

/// What is remembered of a page that is not merged, in its frame's note.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Note {
    /// Looks in a row that found it written.
    streak: u16,
    /// Passes that are to pass over it.
    skip: u16,
    /// Why it is not merged.
    why: Why,
    /// What its hash finds.
    finds: Finds,
}

impl Note {
    fn of(bits: u16) -> Self {
        let why = match bits & 3 {
            0 => Why::Unique,
            1 => Why::Domain,
            2 => Why::Limit,
            _ => Why::Wanted,
        };
        let finds = if bits & 1 << 10 == 0 { Finds::ByHash } else { Finds::ByBytes };
        Self { streak: bits >> 2 & 0xf, skip: bits >> 6 & 0xf, why, finds }
    }

    fn bits(self) -> u16 {
        self.why as u16 | self.streak << 2 | self.skip << 6 | (self.finds as u16) << 10
    }

    /// After one more look that found it written. The steps are the kernel's (`skip_age`).
    fn written(self) -> Self {
        let streak = (self.streak + 1).min(15);
        let skip = match streak {
            0..3 => 0,
            3 => 1,
            4..=5 => 2,
            6..=8 => 4,
            _ => 8,
        };
        Self { streak, skip, ..Self::default() }
    }
}

/// A page that was looked at and is not merged.
#[derive(Debug, Clone, Copy)]
struct Looked {
    page: u64,
    pfn: Pfn,
    /// It is in the index.
    candidate: bool,
    note: Note,
}

/// Why pages are looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    /// It is their turn.
    Cursor,
    /// Somebody said that it is worth while: they are hashed at once.
    Hint,
}

/// What has to be as it was when the last pass began, for the marks that it left in ptes to be true of the frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Noted {
    /// No secondary told a frame of a write.
    writes_lost: u64,
    /// No candidate was forgotten.
    forgotten: u64,
    /// Nobody came to take part, and no hint.
    called: u64,
}

/// How a pass looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pace {
    /// At ptes, where these are settled.
    Quick,
    /// At frames too, and counts.
    Thorough,
}

/// Where a pass is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// It has not begun.
    Begin,
    Look,
    Sweep,
}

/// Some pages of a VMA.
#[derive(Debug)]
struct Part<'a> {
    /// The number of their space.
    at: usize,
    mm: &'a Mm,
    vma: &'a Vma,
    range: HvaRange,
}

/// What there is like a page.
#[derive(Debug, Clone, Copy, Default)]
struct Likes {
    /// A page of KSM that has room, or one that waits to become one.
    page: Option<Pfn>,
    /// A candidate.
    twin: Option<Pfn>,
    /// If there is neither.
    why: Why,
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
    phase: Phase,
    /// Where the next look begins.
    member: usize,
    page: u64,
    /// Pages that wait for the sweep of this pass.
    wanted: u64,
    pace: Pace,
    /// When this pass began, and the one before it.
    noted: Option<Noted>,
    forgotten: u64,
    called: u64,
    /// What pages were found to be like, while a hint is followed.
    twins: Option<Vec<Place>>,
    seed: u64,
    zero_hash: u32,
    asked: WrittenPages,
    looked: Vec<Looked>,
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
    fn space(&mut self) -> Option<Arc<Mm>> {
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

    fn next_space(&mut self) {
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
    fn remember(&mut self, frame: &Frame, pfn: Pfn, hash: u32, place: Place, note: Note) -> Why {
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
    fn want(&mut self, frame: &Frame, twin: Pfn) -> Option<(Place, Why)> {
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
    fn uncount(&mut self, wanted: (Place, Why), counts: &mut KsmPages, part: &Part<'_>, here: u64) {
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

/// The first VMA from `page` on whose pages may be merged, and which of its pages to look at; those have a leaf table.
fn next_part<'a>(mm: &Mm, mut vmas: impl Iterator<Item = &'a Vma>, page: u64) -> Option<(Vma, HvaRange)> {
    let mut page = mm.next_table(page)?.max(page);
    loop {
        let vma = vmas.find(|vma| vma.range.end.page() > page && mm.may_merge(vma))?;
        page = page.max(vma.range.start.page());
        page = mm.next_table(page)?.max(page);
        let end = ((page & !(ENTRIES - 1)) + TABLES * ENTRIES).min(vma.range.end.page());
        if page < end {
            return Some((vma.clone(), HvaRange { start: Hva(page * PAGE_SIZE), end: Hva(end * PAGE_SIZE) }));
        }
    }
}

impl Ksm {
    /// Looks at pages until something was done for `pages` of them, or the pass is over (`ksm_do_scan`). One caller at a
    /// time; others wait. Not to be called inside a pair or an op.
    pub fn scan(&self, pages: u64) -> Scanned {
        let mut scanner = self.scanner.lock();
        scanner.admit(&mut self.queue.lock());
        let mut scanned = Scanned { pages: 0, merged: 0, pass: PassEnd::NotYet };
        // Half of it at most: who hints all the time must not keep the others waiting.
        while scanned.pages < pages / 2
            && let Some((mm, range)) = self.next_hint()
        {
            self.follow_hint(&mut scanner, &mm, range, pages / 2, &mut scanned);
        }
        while scanned.pages < pages {
            if scanner.phase == Phase::Begin {
                self.begin_pass(&mut scanner);
            }
            let Some(mm) = scanner.space() else {
                scanned.merged += self.merge(&mut scanner);
                if self.end_of_phase(&mut scanner) == PassEnd::Reached {
                    scanned.pass = PassEnd::Reached;
                    break;
                }
                continue;
            };
            let map = mm.read_map();
            let rest = HvaRange { start: Hva(scanner.page * PAGE_SIZE), end: Hva(TASK_SIZE) };
            let Some((vma, range)) = next_part(&mm, map.vmas.overlapping(rest), scanner.page) else {
                scanner.next_space();
                continue;
            };
            let part = Part { at: scanner.member, mm: &mm, vma: &vma, range };
            let most = pages - scanned.pages;
            let (end, cost) = match scanner.phase {
                Phase::Begin | Phase::Look => self.look_at(&mut scanner, &part, most, Turn::Cursor),
                Phase::Sweep => self.sweep(&mut scanner, &part, most),
            };
            drop(map);
            scanned.pages += cost;
            scanner.page = end;
            if scanner.batch.len() >= BATCH {
                scanned.merged += self.merge(&mut scanner);
            }
        }
        scanned.merged += self.merge(&mut scanner);
        self.keep_reserve(&scanner);
        scanned
    }

    /// A pass begins: it is quick if what the last one noted is still true.
    fn begin_pass(&self, scanner: &mut Scanner) {
        let (forgotten, called) = (scanner.forgotten, scanner.called);
        let now = Noted { writes_lost: self.pool.writes_lost(), forgotten, called };
        let is_true = scanner.noted.replace(now) == Some(now);
        scanner.pace = if is_true { Pace::Quick } else { Pace::Thorough };
        scanner.phase = Phase::Look;
    }

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

    /// All spaces have been gone through. Whether that is the end of the pass.
    fn end_of_phase(&self, scanner: &mut Scanner) -> PassEnd {
        (scanner.member, scanner.page) = (0, 0);
        if scanner.phase == Phase::Look && scanner.wanted > 0 {
            scanner.phase = Phase::Sweep;
            return PassEnd::NotYet;
        }
        (scanner.phase, scanner.wanted) = (Phase::Begin, 0);
        self.demote_lonely(scanner);
        for member in scanner.members.iter_mut().flatten() {
            let mut now = std::mem::take(&mut member.now);
            if scanner.pace == Pace::Thorough {
                now.account();
                member.last = now;
            }
        }
        self.count(|counters| &counters.full_scans, 1);
        PassEnd::Reached
    }

    /// Looks at what somebody said to be worth while, and merges what is like it, without waiting for the pass.
    /// Ends when `most` is spent: what is left has its turn.
    fn follow_hint(
        &self,
        scanner: &mut Scanner,
        mm: &Weak<Mm>,
        range: HvaRange,
        most: u64,
        scanned: &mut Scanned,
    ) {
        let is_it = |member: &Option<Member>| member.as_ref().is_some_and(|member| member.mm.ptr_eq(mm));
        let Some(at) = scanner.members.iter().position(is_it) else { return };
        scanner.twins = Some(Vec::new());
        scanned.pages += self
            .go_through(scanner, at, range, |scanner, part| self.look_at(scanner, part, most, Turn::Hint));
        scanned.pages +=
            self.go_through(scanner, at, range, |scanner, part| self.sweep(scanner, part, u64::MAX));
        // Those of the range first: what they are like is merged into them.
        scanned.merged += self.merge(scanner);
        for place in scanner.twins.replace(Vec::new()).unwrap_or_default() {
            let page = HvaRange::page(Hva(place.page() * PAGE_SIZE));
            if place.space() == at && range.contains(page.start) {
                // The sweep was there.
                continue;
            }
            scanned.pages += self.go_through(scanner, place.space(), page, |scanner, part| {
                self.sweep(scanner, part, u64::MAX)
            });
        }
        scanned.merged += self.merge(scanner);
        scanner.twins = None;
    }

    /// Calls `visit` for each part of `range` of one space. Returns what that cost.
    fn go_through(
        &self,
        scanner: &mut Scanner,
        at: usize,
        range: HvaRange,
        visit: impl Fn(&mut Scanner, &Part<'_>) -> (u64, u64),
    ) -> u64 {
        let member = scanner.members.get(at).and_then(Option::as_ref);
        let Some(mm) = member.and_then(|member| member.mm.upgrade()) else { return 0 };
        let (mut page, mut cost) = (range.start.page(), 0);
        loop {
            let map = mm.read_map();
            let Some((vma, part)) = next_part(&mm, map.vmas.overlapping(range), page) else { break };
            let part = Part { at, mm: &mm, vma: &vma, range: part.intersect(range) };
            if part.range.is_empty() {
                break;
            }
            let (end, of_part) = visit(scanner, &part);
            (page, cost) = (end, cost + of_part);
            if page < part.range.end.page() {
                break;
            }
        }
        cost
    }

    /// One look at a part. Returns the page to go on at, and what it cost: about `most` at most. The caller holds the mmap
    /// lock for reading.
    fn look_at(&self, scanner: &mut Scanner, part: &Part<'_>, most: u64, turn: Turn) -> (u64, u64) {
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
                let Some((looks, written, writable)) = seen else { continue };
                if writable {
                    asked.ask(page);
                }
                if written {
                    asked.add(page);
                }
                cost += u64::from(!looks.candidate);
                looked.push(Looked { page, ..looks });
            }
        });
        if !asked.is_empty() {
            part.mm.notifiers().test_clear_dirty(&mut asked);
        }
        let reads = |page: &&Looked| !page.candidate && !asked.contains(page.page);
        self.pool.populate(looked.iter().filter(reads).map(|page| page.pfn));
        let mut scanned = 0;
        for page in &looked {
            let written = asked.contains(page.page);
            if page.candidate && !written && matches!(page.note.why, Why::Unique | Why::Domain) {
                counts.not_shared.count(page.note.why);
                continue;
            }
            cost += u64::from(page.candidate);
            let why = self.after_look(scanner, part, *page, written, turn, &mut counts);
            // Whether there is room by now is a look at the index, and no news if there is none.
            let is_news = written || !page.candidate || why != page.note.why;
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

    /// Step 1 of a look, at one pte: the page, whether something says already that it was written, and whether it can be
    /// written. `None` for what is no page of its own, is merged, or is passed over.
    fn look_at_pte(
        &self,
        leaf: &LockedLeaf<'_>,
        entry: usize,
        turn: Turn,
        counts: &mut KsmPages,
        skipped: &mut u64,
    ) -> Option<(Looked, bool, bool)> {
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
        let looked = Looked { page: 0, pfn: pte.pfn(), candidate, note };
        Some((looked, pte.is_dirty() || told || pinned, pte.is_writable()))
    }

    /// What follows from a look at one page, which was `written` or was not. Returns why it is not merged.
    fn after_look(
        &self,
        scanner: &mut Scanner,
        part: &Part<'_>,
        looked: Looked,
        written: bool,
        turn: Turn,
        counts: &mut KsmPages,
    ) -> Why {
        let Looked { page, pfn, candidate, note } = looked;
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
    fn look_up(&self, scanner: &mut Scanner, hash: u32, domain: Domain, but: Pfn, finds: Finds) -> Likes {
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

    /// Has each page of a part that waits for it be merged. As [`look_at`](Self::look_at).
    fn sweep(&self, scanner: &mut Scanner, part: &Part<'_>, most: u64) -> (u64, u64) {
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
                looked.push(Looked { page, pfn: pte.pfn(), candidate: true, note });
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

impl NotShared {
    pub(super) fn count(&mut self, why: Why) {
        match why {
            Why::Unique => self.unique += 1,
            Why::Domain => self.domain += 1,
            Why::Limit => self.limit += 1,
            // The sweep says what became of it.
            Why::Wanted => {}
        }
    }

    fn uncount(&mut self, why: Why) {
        let counter = match why {
            Why::Unique => &mut self.unique,
            Why::Domain => &mut self.domain,
            Why::Limit => &mut self.limit,
            Why::Wanted => return,
        };
        *counter = counter.saturating_sub(1);
    }
}
