// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Mutants of the secondary MMUs: the shadow map and the device IOTLB.

use super::Mutant;

pub(crate) const MUTANTS: &[Mutant] = &[
    Mutant {
        name: "NoRetryCheck",
        breaks: "R1, R5: nobody looks at the sequence or at the windows before a leaf is installed.",
        file: "shadow/fault.rs",
        behind: "",
        original: "windows.must_retry(begun, &core.seq, &(gfn.0..gfn.0 + 1))",
        replacement: "false",
    },
    Mutant {
        name: "SnapshotAfterLookup",
        breaks: "R2: the snapshot is taken when everything has been looked up.",
        file: "shadow/fault.rs",
        behind: "",
        original: "windows.must_retry(begun, &core.seq, &(gfn.0..gfn.0 + 1))",
        replacement: "windows.must_retry(core.seq.snapshot(), &core.seq, &(gfn.0..gfn.0 + 1))",
    },
    Mutant {
        name: "NeighbourNotChecked",
        breaks: "R30: only the page that faulted is checked against the windows, not those that come along.",
        file: "shadow/fault.rs",
        behind: "let gfn = slot.gfn_of(page.hva);",
        original: "windows.contains(&(gfn.0..gfn.0 + 1))",
        replacement: "false",
    },
    Mutant {
        name: "InstallByStore",
        breaks: "R11: a leaf is installed by a plain store.",
        file: "shadow/entry.rs",
        behind: "",
        original: "entry.compare_exchange(old.0, next.0, Ordering::AcqRel, Ordering::Acquire)",
        replacement: "{ entry.store(next.0, Ordering::Release); Ok::<u64, u64>(old.0) }",
    },
    Mutant {
        name: "UpgradeForgetsMarks",
        breaks: "R11: a leaf that gets more rights loses A and D.",
        file: "shadow/entry.rs",
        behind: "",
        original: "(new.added_to(old), Installed::Upgraded)",
        replacement: "(new, Installed::Upgraded)",
    },
    Mutant {
        name: "ZapByStore",
        breaks: "R11: a leaf is read and then cleared by a plain store.",
        file: "shadow/entry.rs",
        behind: "",
        original: "Spte(entry.swap(0, Ordering::AcqRel))",
        replacement: "{ let old = entry.load(Ordering::Acquire); entry.store(0, Ordering::Release); Spte(old) }",
    },
    Mutant {
        name: "AgeByStore",
        breaks: "R11: A is cleared by a load and a plain store.",
        file: "shadow/entry.rs",
        behind: "",
        original: "entry.fetch_and(ALL.old().0, Ordering::AcqRel);",
        replacement: "{ let old = entry.load(Ordering::Acquire); entry.store(old & ALL.old().0, Ordering::Release); }",
    },
    Mutant {
        name: "StepAtStart",
        breaks: "R4: the sequence is stepped at the start, not at the end.",
        file: "shadow/invalidate.rs",
        behind: "",
        original: "windows.open(gfns.clone());",
        replacement: "windows.open(gfns.clone()); self.seq.removed();",
    },
    Mutant {
        name: "SequenceAfterWindow",
        breaks: "R3: the window is closed first, and the sequence stepped later.",
        file: "shadow/invalidate.rs",
        behind: "",
        original: "*active -= 1;",
        replacement: "self.seq.removed(); *active -= 1;",
    },
    Mutant {
        name: "FlushAfterUnlock",
        breaks: "R12: the start flushes when it has let go of mmu_lock.",
        file: "shadow/invalidate.rs",
        behind: "With the lock held: whoever comes next",
        original: "self.finish(gather);",
        replacement: "drop(windows); self.finish(gather);",
    },
    Mutant {
        name: "FlushNever",
        breaks: "I22: the start does not flush.",
        file: "shadow/invalidate.rs",
        behind: "With the lock held: whoever comes next",
        original: "self.finish(gather);",
        replacement: "std::mem::forget(gather);",
    },
    Mutant {
        name: "RemovalWithoutStep",
        breaks: "I5, R13: a removal outside of any pair does not step the sequence.",
        file: "shadow/invalidate.rs",
        behind: "fn drop_page",
        original: "self.seq.removed();",
        replacement: "",
    },
    Mutant {
        name: "ChangePteMapsNewFrame",
        breaks: "R9: change_pte maps the new frame, whatever windows are open.",
        file: "shadow/invalidate.rs",
        behind: "fn change_pte",
        original: "self.drop_page(hva);",
        replacement: "self.drop_page(hva);
        let slots = self.slots.read().clone();
        let _exclusive = self.windows.write();
        for gfns in slots.gfns_of(HvaRange::page(hva)) {
            if let Some(table) = self.tables.leaf_table(gfns.start) {
                let leaf = super::Spte::leaf(pte.pfn(), crate::addr::Access::READ | crate::addr::Access::WRITE);
                table[crate::table::index(gfns.start, 1)].store(leaf.0, crate::sync::atomic::Ordering::Release);
                self.stats.pages_4k.fetch_add(1, crate::sync::atomic::Ordering::Relaxed);
            }
        }",
    },
    Mutant {
        name: "MarksNotHandedOver",
        breaks: "I25: A and D of a leaf that is removed are forgotten.",
        file: "shadow/zap.rs",
        behind: "",
        original: "self.hand_over_marks(old);",
        replacement: "",
    },
    Mutant {
        name: "TablesFreedWithoutFlush",
        breaks: "I31: the frames of page tables are freed while CPUs know where the tables were.",
        file: "shadow/zap.rs",
        behind: "",
        original: "self.tlb.flush_all();",
        replacement: "",
    },
    Mutant {
        name: "SlotsDoNotWait",
        breaks: "R15: the slots are replaced while a pair is open.",
        file: "shadow/slots.rs",
        behind: "",
        original: "*active > 0",
        replacement: "false",
    },
    Mutant {
        name: "SlotsWithoutStep",
        breaks: "R24: a slot is removed without a step of the sequence.",
        file: "shadow/slots.rs",
        behind: "",
        original: "core.seq.removed();",
        replacement: "",
    },
    Mutant {
        name: "IotlbNoRetryCheck",
        breaks: "R33: a device keeps a translation without a look at the sequence or at the windows.",
        file: "iommu.rs",
        behind: "",
        original: "translations.windows.must_retry(begun, &self.cache.seq, &pages)",
        replacement: "false",
    },
    Mutant {
        name: "IotlbSnapshotAfterLookup",
        breaks: "R2, R33: a device takes its snapshot when it has looked everything up.",
        file: "iommu.rs",
        behind: "",
        original: "translations.windows.must_retry(begun, &self.cache.seq, &pages)",
        replacement: "translations.windows.must_retry(self.cache.seq.snapshot(), &self.cache.seq, &pages)",
    },
    Mutant {
        name: "IotlbRemovalWithoutStep",
        breaks: "I5, R13: a device drops a translation outside of any pair and does not step the sequence.",
        file: "iommu.rs",
        behind: "fn remove(",
        original: "self.seq.removed();",
        replacement: "",
    },
    Mutant {
        name: "IotlbStartKeeps",
        breaks: "I2: a start leaves a device its translations.",
        file: "iommu.rs",
        behind: "translations.windows.open(",
        original: "forget(&mut translations.iotlb, invalidation.range);",
        replacement: "",
    },
];
