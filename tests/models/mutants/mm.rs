// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Mutants of the primary MMU, in what it tells the notifier layer and when.

use super::Mutant;

pub(crate) const MUTANTS: &[Mutant] = &[
    Mutant {
        name: "RegisterWithoutMmapLock",
        breaks: "I9: a listener is added while a pair may be open.",
        file: "mm/mod.rs",
        behind: "",
        original: "self.mmap_write_lock().register(listener)",
        replacement: "self.notifiers.register_locked(listener)",
    },
    Mutant {
        name: "ChangePteAfterSet",
        breaks: "R8: change_pte is called when the new pte can be used already.",
        file: "mm/notify.rs",
        behind: "",
        original: "self.notifiers.change_pte(hva, pte);
        leaf.set(index(hva.page(), 1), pte);",
        replacement: "leaf.set(index(hva.page(), 1), pte); self.notifiers.change_pte(hva, pte);",
    },
    Mutant {
        name: "PairEndsEarly",
        breaks: "R1: the pair is over before the first pte is cleared.",
        file: "mm/zap.rs",
        behind: "",
        original: "self.notifiers.invalidate(range, event)",
        replacement: "{ drop(self.notifiers.invalidate(range, event)); self.notifiers.invalidate(HvaRange::page(crate::addr::Hva(0)), event) }",
    },
    Mutant {
        name: "FreedBeforeStart",
        breaks: "I22: ptes are cleared and their frames freed before anybody is told.",
        file: "mm/zap.rs",
        behind: "",
        original: "self.notifiers.invalidate(range, event)",
        replacement: "
            let mut early = Vec::new();
            self.for_each_leaf(range, |_, leaf, entries| {
                for at in entries {
                    let pte = leaf.get(at);
                    leaf.set(at, Pte::NONE);
                    early.extend(pte.counted_frame());
                }
            });
            early.iter().for_each(|&pfn| self.pool.frame(pfn).remove_map());
            self.pool.put_all(&early);
            self.notifiers.invalidate(range, event)
        ",
    },
    Mutant {
        name: "ProtectOutsidePair",
        breaks: "R21: mprotect takes rights away without a pair.",
        file: "mm/map.rs",
        behind: "",
        original: "self.notifiers.invalidate(HvaRange { start: first, end: part.end }, Event::ProtectionVma)",
        replacement: "self.notifiers.invalidate(HvaRange::page(Hva(0)), Event::ProtectionVma)",
    },
    Mutant {
        name: "MoveOutsidePair",
        breaks: "I2: mremap moves ptes without a pair.",
        file: "mm/remap.rs",
        behind: "",
        original: "self.notifiers.invalidate(source, Event::Unmap)",
        replacement: "self.notifiers.invalidate(HvaRange::page(Hva(0)), Event::Unmap)",
    },
    Mutant {
        name: "ForkOutsidePair",
        breaks: "R21: fork takes the right to write from the parent's ptes without a pair.",
        file: "mm/fork.rs",
        behind: "",
        original: "self.notifiers.invalidate(range, Event::ProtectionPage)",
        replacement: "self.notifiers.invalidate(HvaRange::page(crate::addr::Hva(0)), Event::ProtectionPage)",
    },
    Mutant {
        name: "ReapUnmarked",
        breaks: "a page that the reaper took comes back as zeros.",
        file: "mm/reap.rs",
        behind: "",
        original: "self.reaped.store(true, Ordering::Release);",
        replacement: "",
    },
    Mutant {
        name: "ForkSharesPinned",
        breaks: "R22, R21: fork shares a frame that somebody has pinned, and may write to.",
        file: "mm/fork.rs",
        behind: "",
        original: "references > frame.map_count()",
        replacement: "false",
    },
];
