// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What must be true of merged pages, checked: for tests, and for who suspects umbra.
//!
//! | what | invariant |
//! | --- | --- |
//! | a merged page is read-only, its frame is one of KSM and has the bytes that the index knows it by | I51 |
//! | the counters of address spaces are the ptes there are; their sum is `pages_shared + pages_sharing` | I53 |
//! | a frame has no more ptes than `max_page_sharing`, but for those that a fork made | I54 |

use super::Ksm;
use crate::addr::{Hva, HvaRange, PAGE_SIZE, Pfn, TASK_SIZE};
use crate::frame::FrameFlags;
use crate::mm::Pte;
use std::collections::BTreeMap;
use std::fmt;

/// Something that must not be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KsmViolation {
    /// A merged page can be written, or its frame is not one of KSM, or not one that is in use.
    NotAPage {
        /// Where.
        hva: Hva,
        /// Its pte.
        pte: Pte,
    },
    /// The bytes of a frame are not those that it was merged for.
    Changed {
        /// The frame.
        pfn: Pfn,
    },
    /// More ptes share a frame than may.
    Crowded {
        /// The frame.
        pfn: Pfn,
        /// Its ptes.
        ptes: u32,
    },
    /// The counter of an address space is wrong.
    Miscounted {
        /// What it says: shared frames, zero frame.
        counted: (u64, u64),
        /// The ptes there are.
        found: (u64, u64),
    },
    /// Fewer frames are mapped than there are said to be, or more.
    Frames {
        /// What the pool says.
        counted: usize,
        /// Those that are mapped.
        found: usize,
    },
}

impl fmt::Display for KsmViolation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAPage { hva, pte } => write!(f, "the merged page at {hva} is {pte:?}"),
            Self::Changed { pfn } => write!(f, "the shared frame {:#x} has changed", pfn.0),
            Self::Crowded { pfn, ptes } => write!(f, "{ptes} ptes share the frame {:#x}", pfn.0),
            Self::Miscounted { counted, found } => {
                write!(f, "an address space counts {counted:?} merged pages and has {found:?}")
            }
            Self::Frames { counted, found } => {
                write!(f, "{counted} frames are said to be shared, and {found} are")
            }
        }
    }
}

impl Ksm {
    /// Checks every merged page. While it runs nothing is merged, so the number of shared frames can only fall; each address space
    /// is kept as it is while it is looked at.
    pub fn audit(&self) -> Vec<KsmViolation> {
        let mut scanner = self.scanner.lock();
        scanner.admit(&mut self.queue.lock());
        let mut wrong = Vec::new();
        let mut ptes: BTreeMap<Pfn, u32> = BTreeMap::new();
        let frames = self.pool.ksm_frames();
        for mm in scanner.spaces() {
            // No fork, no unmapping, and no write brings in or takes away a page.
            let _held = mm.mmap_write_lock();
            let (mut merging, mut zero) = (0, 0);
            let everything = HvaRange { start: Hva(0), end: Hva(TASK_SIZE) };
            mm.for_each_leaf(everything, |base, leaf, entries| {
                for at in entries {
                    let pte = leaf.get(at);
                    if !pte.is_present() || !pte.is_ksm() {
                        continue;
                    }
                    let is_page = pte.is_zero() || {
                        let frame = self.pool.frame(pte.pfn());
                        // Others come and go: of two counters no more can be asked than that there is one.
                        frame.flags().contains(FrameFlags::KSM) && frame.ref_count() > 0
                    };
                    if pte.is_writable() || !is_page {
                        wrong.push(KsmViolation::NotAPage { hva: Hva(base.0 + at as u64 * PAGE_SIZE), pte });
                    }
                    if pte.is_zero() {
                        zero += 1;
                    } else {
                        merging += 1;
                        *ptes.entry(pte.pfn()).or_default() += 1;
                    }
                }
            });
            let counted = (mm.ksm_merging_pages(), mm.ksm_zero_pages());
            if counted != (merging, zero) {
                wrong.push(KsmViolation::Miscounted { counted, found: (merging, zero) });
            }
        }
        for (&pfn, &ptes) in &ptes {
            if ptes > self.settings.max_page_sharing && self.forks() == 0 {
                wrong.push(KsmViolation::Crowded { pfn, ptes });
            }
            // All who had it may have left since.
            if !self.pool.get_ksm(pfn) {
                continue;
            }
            if !scanner.index.is_entry(pfn) || scanner.index.hash(pfn) != scanner.hash_of(self, pfn) {
                wrong.push(KsmViolation::Changed { pfn });
            }
            self.pool.put(pfn);
        }
        // A fault in flight may hold a frame that no pte has any more. First: whoever is counted here may be gone next.
        let held = (0..self.pool.frame_count() as u32).filter(|&pfn| self.is_only_held(Pfn(pfn))).count();
        let (counted, found) = (self.pool.ksm_frames(), ptes.len());
        // A child that came meanwhile has not been looked at, and may be the only one that maps a frame. One that is being made has
        // its frames of a space that was looked at before: there they were found.
        let all_met = self.queue.lock().newcomers.is_empty();
        if found > frames || counted > found + held && all_met {
            wrong.push(KsmViolation::Frames { counted, found });
        }
        wrong
    }

    /// Whether `pfn` is a page of KSM that no pte maps.
    fn is_only_held(&self, pfn: Pfn) -> bool {
        let frame = self.pool.frame(pfn);
        frame.flags().contains(FrameFlags::KSM) && frame.ref_count() > 0 && frame.map_count() == 0
    }
}
