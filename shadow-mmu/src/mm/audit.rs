// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What must be true of the primary's ptes, checked while guests run.
//!
//! | what | why it matters |
//! | --- | --- |
//! | a pte lies in a VMA | a page that nobody can unmap is never freed |
//! | the frame of a pte is in use, and counts its ptes | a frame that is free goes to somebody else |
//! | a private page that was neither forked nor merged is mapped once, and its ptes hold references | the same |
//! | the zero page is the zero frame; zero and merged pages are not writable | others read them |
//! | an adopted page is beyond the pool, every other one in it | umbra has no frame for it |
//! | the counter of tables is the tables there are | they are the guest's memory |
//!
//! The mmap lock is held for writing, so no pte comes, goes or changes its frame. The count of ptes of a frame that several
//! spaces have is theirs together, so of such frames only the least can be asked.

use super::{Mm, Pte};
use crate::addr::{Hva, HvaRange, PAGE_SIZE, Pfn, TASK_SIZE};
use crate::sync::atomic::Ordering;
use std::fmt;

/// Something that must not be in an address space.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MmViolation {
    /// Where, and what is there; `None` for what is wrong with the tables as a whole.
    pub at: Option<(Hva, Pte)>,
    /// What is wrong.
    pub what: String,
}

impl fmt::Display for MmViolation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.at {
            Some((hva, pte)) => write!(f, "the primary's pte at {hva} ({pte:?}): {}", self.what),
            None => write!(f, "the primary's tables: {}", self.what),
        }
    }
}

/// What an audit of an address space saw.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MmAudit {
    /// Ptes looked at.
    pub ptes: u64,
    /// What was wrong. Empty is good.
    pub violations: Vec<MmViolation>,
}

/// Frames that were seen, one bit each. Sparse: the host gives it pages as bits are set.
struct Seen(Vec<u64>);

impl Seen {
    /// Notes `pfn`; whether it was noted before.
    fn insert(&mut self, pfn: Pfn) -> bool {
        let (word, bit) = (&mut self.0[pfn.index() / 64], 1 << (pfn.index() % 64));
        let before = *word & bit != 0;
        *word |= bit;
        before
    }
}

impl Mm {
    /// Checks every pte, and the tables. Whoever faults or changes a mapping waits meanwhile; about 20 ns a page.
    pub fn audit(&self) -> MmAudit {
        // Held, so that there is no fork: the map counts would be the child's too.
        let family = self.family.lock();
        let forked = family.len() > 1;
        let map = self.map.write();
        let mut audit = MmAudit::default();
        let tables = self.tables.recount();
        let wrong = tables.violations(self.tables.count());
        audit.violations.extend(wrong.into_iter().map(|what| MmViolation { at: None, what }));
        if !tables.stray.is_empty() {
            // Not to be walked.
            return audit;
        }
        let mut seen = Seen(vec![0; self.pool.frame_count().div_ceil(64)]);
        let everything = HvaRange { start: Hva(0), end: Hva(TASK_SIZE) };
        let mut vma: Option<HvaRange> = None;
        self.for_each_leaf(everything, |base, leaf, entries| {
            for at in entries {
                let pte = Pte(leaf.entries()[at].load(Ordering::Relaxed));
                if !pte.is_present() {
                    continue;
                }
                audit.ptes += 1;
                let hva = Hva(base.0 + at as u64 * PAGE_SIZE);
                if !vma.is_some_and(|range| range.contains(hva)) {
                    vma = map.vmas.find(hva).map(|vma| vma.range);
                }
                let mut wrong = |what: String| {
                    audit.violations.push(MmViolation { at: Some((hva, pte)), what });
                };
                if vma.is_none() {
                    wrong("nothing is mapped there".into());
                }
                if let Some(what) = self.frame_fault(pte, forked, &mut seen) {
                    wrong(what);
                }
            }
        });
        audit
    }

    /// What is wrong with the frame of a present pte.
    fn frame_fault(&self, pte: Pte, forked: bool, seen: &mut Seen) -> Option<String> {
        let pfn = pte.pfn();
        if pte.is_adopted() == self.pool.contains(pfn) {
            return Some("an adopted page is beyond the pool, every other one in it".into());
        }
        if pte.is_adopted() {
            return None;
        }
        if pte.is_zero() && pfn != self.zero_frame {
            return Some(format!("the zero frame is {:#x}", self.zero_frame.0));
        }
        if pte.is_writable() && (pte.is_zero() || pte.is_ksm()) {
            return Some("others have the frame, and it is writable".into());
        }
        let frame = self.pool.frame(pfn);
        let (refs, maps) = (frame.ref_count(), frame.map_count());
        if refs == 0 {
            return Some("the frame is free".into());
        }
        if pte.is_zero() {
            return None;
        }
        if maps == 0 {
            return Some("the frame says that no pte maps it".into());
        }
        if pte.is_anonymous() && !pte.is_ksm() && !forked {
            // Nobody else has it, so both counts stand still but for pins, which add references.
            if seen.insert(pfn) && maps < 2 {
                return Some("another pte maps the frame too, and it counts one".into());
            }
            if refs < maps {
                return Some(format!("the frame has {maps} ptes and {refs} references"));
            }
        }
        None
    }
}
