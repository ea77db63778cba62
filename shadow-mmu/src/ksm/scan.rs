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

use super::Ksm;
use super::look::{Part, Turn};
use super::scanner::{Member, Noted, Pace, Phase, Scanner};
use crate::addr::{Hva, HvaRange, PAGE_SIZE, TASK_SIZE};
use crate::mm::{Mm, Vma};
use crate::sync::Weak;
use crate::table::ENTRIES;

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
}
