// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The scan: a cursor over all address spaces, and one look at each page. See the [module](super) for a page's way.
//!
//! A look takes up to [`TABLES`] leaf tables of one VMA at a time, in three steps:
//! 1. Under the page-table lock: which pages are there, and what is known of them. What the primary and the frame have to say
//!    of writes is taken.
//! 2. Every secondary is asked, once for all pages that could have been written through it (`test_clear_dirty`).
//! 3. Without a lock but the mmap lock: pages that were written are forgotten, quiet ones are hashed and looked up.
//!
//! A page that is written after step 2 has D again, and the next pass finds it; its hash is wrong until then, and nobody is
//! merged with it, for merging compares.
//!
//! # What a scan costs
//! A page that is hashed, or of which D was cleared, counts as one page of what the caller allows; so does a leaf table, for pages
//! in it that nothing has to be done for.

use super::batch::Batch;
use super::index::{Index, Place, SPACES, Step};
use super::report::{KsmPages, MemberPass, NotShared};
use super::{CandidateAccess, Domain, Ksm, KsmMember, Queue, SmartScan, ZeroPages};
use crate::addr::{Hva, HvaRange, PAGE_SIZE, Pfn, TASK_SIZE};
use crate::frame::{Frame, FrameFlags};
use crate::mm::{Mm, Vma};
use crate::notifier::WrittenPages;
use crate::sync::{Arc, Weak};
use crate::table::ENTRIES;
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Leaf tables of one look.
const TABLES: u64 = 16;
/// Pages that are merged in one go, so that neighbours share flushes.
const BATCH: usize = 4096;

/// What one scan came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scanned {
    /// Pages that something was done for.
    pub pages: u64,
    /// Pages that were merged.
    pub merged: u64,
    /// Whether it came to the end of all address spaces, where it stops.
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

/// What is remembered of a page that is not merged, in its frame's note.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Note {
    /// Looks in a row that found it written.
    streak: u16,
    /// Passes that are to pass over it.
    skip: u16,
    /// Why it is not merged.
    why: Why,
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
}

impl Note {
    fn of(bits: u16) -> Self {
        let why = match bits & 3 {
            1 => Why::Domain,
            2 => Why::Limit,
            _ => Why::Unique,
        };
        Self { streak: bits >> 2 & 0xf, skip: bits >> 6 & 0xf, why }
    }

    fn bits(self) -> u16 {
        self.why as u16 | self.streak << 2 | self.skip << 6
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
        Self { streak, skip, why: Why::Unique }
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

/// Whether pages are looked at because it is their turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    /// It is.
    Cursor,
    /// Somebody said that it is worth while: they are hashed at once.
    Hint,
}

/// Whether something had to be done for a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Work {
    Done,
    None,
}

/// Whether a page is in the index, and why it is alone.
enum Found {
    /// Merge it into this page of KSM, to which there is a reference.
    Stable(Pfn),
    /// Merge it with this candidate.
    Twin(Pfn),
    /// There is nothing to merge it with.
    Nothing(Why),
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
    /// Where the next look begins.
    member: usize,
    page: u64,
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
            member: 0,
            page: 0,
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

    /// Takes up those who entered. Behind the cursor: what is new is likely to change yet.
    pub(super) fn admit(&mut self, queue: &mut Queue) {
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

    /// Goes to the next address space.
    fn next_member(&mut self) {
        if let Some(Some(member)) = self.members.get_mut(self.member) {
            member.last = std::mem::take(&mut member.now);
        }
        self.member += 1;
        self.page = 0;
    }

    /// The hash of what the frame holds now.
    pub(super) fn hash_of(&self, ksm: &Ksm, pfn: Pfn) -> u32 {
        let mut bytes = [0; PAGE_SIZE as usize];
        ksm.pool.read(pfn, &mut bytes);
        content_hash(&bytes, self.seed)
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
        let hints = {
            let mut queue = self.queue.lock();
            scanner.admit(&mut queue);
            std::mem::take(&mut queue.hints)
        };
        let mut scanned = Scanned { pages: 0, merged: 0, pass: PassEnd::NotYet };
        for (mm, range) in hints {
            scanned.pages += self.look_at_hint(&mut scanner, &mm, range);
        }
        while scanned.pages < pages {
            let Some(member) = scanner.members.get(scanner.member) else {
                scanner.member = 0;
                self.count(|counters| &counters.full_scans, 1);
                scanned.pass = PassEnd::Reached;
                break;
            };
            let Some(mm) = member.as_ref().and_then(|member| member.mm.upgrade()) else {
                // Whoever is dropped is left out.
                let at = scanner.member;
                scanner.members[at] = None;
                scanner.next_member();
                continue;
            };
            let map = mm.read_map();
            let rest = HvaRange { start: Hva(scanner.page * PAGE_SIZE), end: Hva(TASK_SIZE) };
            match next_part(&mm, map.vmas.overlapping(rest), scanner.page) {
                Some((vma, part)) => {
                    let (at, most) = (scanner.member, pages - scanned.pages);
                    let (end, cost) = self.look_at(&mut scanner, at, &mm, &vma, part, most, Turn::Cursor);
                    drop(map);
                    scanned.pages += cost;
                    scanner.page = end;
                    if scanner.batch.len() >= BATCH {
                        scanned.merged += self.merge(&mut scanner);
                    }
                }
                None => {
                    drop(map);
                    // While the pass over this space, and its VMAs, can be told what came of it.
                    scanned.merged += self.merge(&mut scanner);
                    scanner.next_member();
                }
            }
        }
        scanned.merged += self.merge(&mut scanner);
        self.keep_reserve(&scanner);
        scanned
    }

    /// Looks at what somebody said to be worth while. Returns what it cost.
    fn look_at_hint(&self, scanner: &mut Scanner, mm: &Weak<Mm>, range: HvaRange) -> u64 {
        let is_it = |member: &Option<Member>| member.as_ref().is_some_and(|member| member.mm.ptr_eq(mm));
        let (Some(at), Some(mm)) = (scanner.members.iter().position(is_it), mm.upgrade()) else { return 0 };
        let mut cost = 0;
        let mut page = range.start.page();
        loop {
            let map = mm.read_map();
            let Some((vma, part)) = next_part(&mm, map.vmas.overlapping(range), page) else { break };
            let part = part.intersect(range);
            if part.is_empty() {
                break;
            }
            // What is counted is of the pass, and this is none.
            let pass = std::mem::take(&mut scanner.now(at).vmas);
            let items = scanner.now(at).items;
            let (end, of_part) = self.look_at(scanner, at, &mm, &vma, part, u64::MAX, Turn::Hint);
            drop(map);
            self.merge(scanner);
            scanner.now(at).vmas = pass;
            scanner.now(at).items = items;
            cost += of_part;
            page = end;
        }
        cost
    }

    /// One look at `part` of `vma`, of the space with the number `at`. Returns the page to go on at, and what it cost: about
    /// `most` at most. The caller holds the mmap lock for reading.
    #[expect(clippy::too_many_arguments, reason = "one call, of what the cursor says")]
    fn look_at(
        &self,
        scanner: &mut Scanner,
        at: usize,
        mm: &Mm,
        vma: &Vma,
        part: HvaRange,
        most: u64,
        turn: Turn,
    ) -> (u64, u64) {
        let row = scanner.now(at).row(vma);
        let mut asked = std::mem::take(&mut scanner.asked);
        let mut looked = std::mem::take(&mut scanner.looked);
        let tables = (part.end.page().div_ceil(ENTRIES) - part.start.page() / ENTRIES) as usize;
        asked.reset(part.start, tables);
        looked.clear();
        let mut counts = KsmPages::default();
        let (mut end, mut cost, mut skipped) = (part.end.page(), 0, 0);
        mm.for_each_leaf(part, |base, leaf, entries| {
            cost += 1;
            for entry in entries {
                let page = base.page() + entry as u64;
                if cost > most && turn == Turn::Cursor {
                    end = end.min(page);
                    return;
                }
                let pte = leaf.get(entry);
                if pte.is_ksm() && pte.is_present() {
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
                    continue;
                }
                if !pte.is_anonymous() {
                    continue;
                }
                counts.all += 1;
                let frame = self.pool.frame(pte.pfn());
                let (flags, note) = frame.flags_and_note();
                debug_assert!(!flags.contains(FrameFlags::KSM), "{pte:?} does not say that it is merged");
                let mut note = Note::of(note);
                if note.skip > 0 && turn == Turn::Cursor && self.settings.smart_scan == SmartScan::On {
                    note.skip -= 1;
                    frame.set_note(note.bits());
                    counts.not_shared.volatile += 1;
                    skipped += 1;
                    continue;
                }
                let candidate = flags.contains(FrameFlags::CANDIDATE);
                if pte.is_dirty() {
                    leaf.set(entry, pte.clean());
                }
                let told =
                    flags.contains(FrameFlags::WRITTEN) && !frame.take_flags(FrameFlags::WRITTEN).is_empty();
                // Whoever has it pinned may write it at any time.
                let pinned = frame.ref_count() > frame.map_count();
                if pte.is_writable() {
                    asked.ask(page);
                }
                if pte.is_dirty() || told || pinned {
                    asked.add(page);
                }
                cost += u64::from(!candidate);
                looked.push(Looked { page, pfn: pte.pfn(), candidate, note });
            }
        });
        if !asked.is_empty() {
            mm.notifiers().test_clear_dirty(&mut asked);
        }
        for page in &looked {
            let worked =
                self.after_look(scanner, at, row, *page, asked.contains(page.page), turn, &mut counts);
            cost += u64::from(worked == Work::Done && page.candidate);
        }
        let scanned = looked.iter().filter(|page| !page.candidate).count() as u64;
        self.count(|counters| &counters.pages_scanned, scanned);
        self.count(|counters| &counters.pages_skipped, skipped);
        scanner.now(at).add(row, &counts);
        (scanner.asked, scanner.looked) = (asked, looked);
        (end, cost)
    }

    /// What follows from a look at one page, which was `written` or was not.
    #[expect(clippy::too_many_arguments, reason = "the second half of look_at")]
    fn after_look(
        &self,
        scanner: &mut Scanner,
        at: usize,
        row: usize,
        looked: Looked,
        written: bool,
        turn: Turn,
        counts: &mut KsmPages,
    ) -> Work {
        let Looked { page, pfn, candidate, note } = looked;
        let frame = self.pool.frame(pfn);
        if written {
            if candidate {
                scanner.forget(frame, pfn);
            }
            if turn == Turn::Cursor {
                frame.set_note(note.written().bits());
                counts.not_shared.volatile += 1;
                return Work::Done;
            }
        }
        let hash = match (candidate && !written, note.why) {
            (true, Why::Unique | Why::Domain) => {
                counts.not_shared.count(note.why);
                return Work::None;
            }
            // Perhaps there is room now.
            (true, Why::Limit) => {
                let hash = scanner.index.hash(pfn);
                scanner.forget(frame, pfn);
                hash
            }
            (false, _) => scanner.hash_of(self, pfn),
        };
        if hash == scanner.zero_hash && self.settings.zero_pages == ZeroPages::Share {
            scanner.batch.zero(at, row, page, pfn);
            return Work::Done;
        }
        let domain = scanner.domain(at);
        let why = match self.look_up(scanner, hash, domain) {
            Found::Stable(into) => {
                scanner.batch.merge(at, row, page, pfn, into);
                return Work::Done;
            }
            Found::Twin(twin) => {
                scanner.batch.promote(twin, &scanner.index);
                scanner.batch.merge_with(at, row, page, pfn, twin);
                return Work::Done;
            }
            Found::Nothing(why) => why,
        };
        // Its frame may have been another page's, whose entry nobody has come upon since.
        scanner.index.remove(pfn);
        let note = Note { why, ..Note::default() };
        frame.set_note(note.bits());
        if scanner.index.insert(pfn, hash, Place::of_page(at, page)) {
            frame.set_flags(FrameFlags::CANDIDATE);
            if self.settings.access == CandidateAccess::CopyOnAccess {
                scanner.batch.promote(pfn, &scanner.index);
            }
            counts.not_shared.count(why);
        } else {
            counts.not_shared.count(Why::Limit);
        }
        Work::Done
    }

    /// What a page of this hash can be merged with.
    fn look_up(&self, scanner: &mut Scanner, hash: u32, domain: Domain) -> Found {
        let Scanner { index, members, batch, .. } = scanner;
        let mut why = Why::Unique;
        let mut stable = None;
        let limit = self.settings.max_page_sharing;
        let twin = index.find(hash, |index, entry| {
            let frame = self.pool.frame(entry);
            let flags = frame.flags();
            let place = index.place(entry);
            let waiting = batch.waiting(entry);
            if flags.contains(FrameFlags::KSM) {
                if place.domain() != domain.0 {
                    why = Why::Domain;
                    return Step::Next;
                }
                if frame.map_count() as usize + waiting >= limit as usize {
                    why = Why::Limit;
                    return Step::Next;
                }
                if !self.pool.get_ksm(entry) {
                    return Step::Remove;
                }
                stable = Some(entry);
                return Step::Stop;
            }
            if !flags.contains(FrameFlags::CANDIDATE) || frame.ref_count() == 0 {
                return Step::Remove;
            }
            let Some(owner) = members.get(place.space()).and_then(Option::as_ref) else {
                return Step::Remove;
            };
            if owner.domain != domain {
                why = Why::Domain;
                return Step::Next;
            }
            if 1 + waiting >= limit as usize {
                why = Why::Limit;
                return Step::Next;
            }
            Step::Stop
        });
        match (stable, twin) {
            (Some(stable), _) => Found::Stable(stable),
            (None, Some(twin)) => Found::Twin(twin),
            (None, None) => Found::Nothing(why),
        }
    }
}

impl Scanner {
    pub(super) fn now(&mut self, at: usize) -> &mut MemberPass {
        // Looked at because it is there; a slot is emptied only in between.
        &mut self.members[at].as_mut().unwrap_or_else(|| unreachable!("space {at} is looked at")).now
    }

    pub(super) fn domain(&self, at: usize) -> Domain {
        self.members[at].as_ref().map_or_else(Domain::default, |member| member.domain)
    }

    /// Takes a candidate out of the index.
    pub(super) fn forget(&mut self, frame: &Frame, pfn: Pfn) {
        frame.take_flags(FrameFlags::CANDIDATE);
        self.index.remove(pfn);
    }
}

impl NotShared {
    pub(super) fn count(&mut self, why: Why) {
        match why {
            Why::Unique => self.unique += 1,
            Why::Domain => self.domain += 1,
            Why::Limit => self.limit += 1,
        }
    }
}
