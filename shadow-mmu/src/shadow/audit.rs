// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The invariants of the shadow map, checked against the primary, while both are in use.
//!
//! The audit holds the mmap lock for reading, the count of open pairs, and `mmu_lock` for writing, in that order. Then the
//! slots stay as they are, leaves stand still (the CPU still sets A and D), and so does the primary as far as it matters:
//! taking anything away from a pte needs a start first, which waits for `mmu_lock`. Primary ptes are read without their
//! lock, which comes before `mmu_lock`; an aligned word is read whole, and what may change in it under us (a page coming
//! in, a right being added) breaks no invariant.

use super::{ShadowMmu, SlotAccess, Spte};
use crate::addr::{Access, Gfn};
use crate::mm::{Mm, Pte};
use crate::sync::atomic::Ordering;
use crate::table::LOWER_HALF_PAGES;
use std::fmt;

/// One entry that breaks one invariant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// The invariant's number in the contract: 2 for I2.
    pub invariant: u8,
    /// Where.
    pub gfn: Gfn,
    /// The entry.
    pub spte: Spte,
    /// What is wrong with it.
    pub what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "I{} broken at guest frame {:#x} ({:?}): {}",
            self.invariant, self.gfn.0, self.spte, self.what
        )
    }
}

/// What an audit saw.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AuditReport {
    /// Leaves looked at.
    pub leaves: u64,
    /// What was wrong. Empty is good.
    pub violations: Vec<Violation>,
}

impl ShadowMmu {
    /// Checks every leaf against `mm`, the address space that this map shadows: invariants I2, I13–I17, I21, I33 and I43;
    /// and the tables.
    ///
    /// Everything that faults or unmaps waits meanwhile; about 50 ns a leaf.
    pub fn audit(&self, mm: &Mm) -> AuditReport {
        let core = &*self.core;
        let map = mm.read_map();
        // While this is held the slots stay, and no slot is between its removal and the zap of its leaves.
        let _slots_stay = core.active.lock();
        let slots = self.slots();
        let windows = core.windows.write();
        let mut report = AuditReport::default();
        // Faults add tables under `mmu_lock`, so the count is exact.
        let tables = core.tables.recount();
        for what in tables.violations(core.tables.count()) {
            report.violations.push(Violation { invariant: 43, gfn: Gfn(0), spte: Spte::NONE, what });
        }
        if !tables.stray.is_empty() {
            // Not to be walked.
            return report;
        }
        core.tables.for_each_leaf_table(0..LOWER_HALF_PAGES, |base, table, entries| {
            for at in entries {
                let spte = Spte(table[at].load(Ordering::Acquire));
                if spte == Spte::NONE {
                    continue;
                }
                let gfn = Gfn(base + at as u64);
                report.leaves += 1;
                let mut breaks = |invariant, what: String| {
                    report.violations.push(Violation { invariant, gfn, spte, what });
                };
                if !spte.is_leaf() || !spte.is_legal() {
                    breaks(16, "not a legal state of a leaf".into());
                }
                if !spte.is_well_formed() {
                    breaks(16, format!("bits that no leaf has, or none that each has: {:#018x}", spte.0));
                }
                if core.pool.contains(spte.pfn()) && core.pool.frame(spte.pfn()).ref_count() == 0 {
                    breaks(21, "the frame is free".into());
                }
                if windows.contains(&(gfn.0..gfn.0 + 1)) {
                    breaks(2, "a leaf is present in a range between its start and its end".into());
                }
                let Some(slot) = slots.find(gfn) else {
                    breaks(13, "no memslot holds this guest frame".into());
                    continue;
                };
                let hva = slot.hva_of(gfn);
                let Some(vma) = map.vmas.find(hva) else {
                    breaks(13, format!("nothing is mapped at {hva}"));
                    continue;
                };
                if let Some(trap) = map.trap(hva) {
                    breaks(14, format!("present, but every access of {hva} is refused: {trap:?}"));
                }
                let pte = mm.pte_unlocked(hva);
                if !pte.is_present() || pte.pfn() != spte.pfn() {
                    breaks(13, format!("the primary has {pte:?} at {hva}"));
                    continue;
                }
                let rights = spte.rights();
                if spte.is_writable() && slot.access == SlotAccess::ReadOnly {
                    breaks(14, "writable in a read-only memslot".into());
                }
                if !vma.allows(rights) {
                    breaks(14, format!("the mapping allows {} only", vma.prot));
                }
                if rights.contains(Access::WRITE) && !pte.is_writable() {
                    breaks(14, format!("writable, but the primary has {pte:?}"));
                }
                if let Some(log) = slots.log_of(gfn).filter(|log| log.keeps_bits())
                    && spte.is_writable()
                    && !log.is_marked(gfn)
                {
                    breaks(33, "writable, and its log does not say so".into());
                }
                if rights.contains(Access::WRITE) && is_shared_frame(mm, pte) {
                    breaks(15, format!("writable, but the frame is shared: {pte:?}"));
                }
            }
        });
        let counted = core.stats.pages_4k.load(Ordering::Relaxed);
        let mut breaks = |invariant, what| {
            report.violations.push(Violation { invariant, gfn: Gfn(0), spte: Spte::NONE, what });
        };
        if counted != report.leaves {
            breaks(43, format!("{counted} leaves are counted, {} are present", report.leaves));
        }
        let stale = core.stats.stale_leaves.load(Ordering::Relaxed);
        if stale > 0 {
            breaks(17, format!("{stale} leaves were found to map another frame than the primary"));
        }
        report
    }
}

/// Whether writing to the frame of `pte` would be seen by somebody who does not share memory on purpose.
fn is_shared_frame(mm: &Mm, pte: Pte) -> bool {
    pte.is_zero() || !pte.is_object() && !pte.is_adopted() && mm.pool().frame(pte.pfn()).map_count() > 1
}
