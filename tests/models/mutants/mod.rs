// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The mutants: changes that break one rule of the protocol each. A checker that does not find every one of them proves
//! nothing about the code without them.
//!
//! | file | what is broken |
//! | --- | --- |
//! | `shadow` | the shadow map and the device IOTLB |
//! | `notifier` | the notifier layer |
//! | `mm` | the primary, in what it tells the layer |
//! | `tracking` | aging, access tracking, dirty logs |
//! | `ksm` | page sharing |
//! | `soft_tlb` | the CPU's walk and its TLB in software |

mod ksm;
mod mm;
mod notifier;
mod shadow;
mod soft_tlb;
mod tracking;

/// One change to one file of shadow-mmu.
pub(crate) struct Mutant {
    /// Its name: a variant of `crate::mutant::M`.
    pub(crate) name: &'static str,
    /// The rule that it breaks, with its number in the contract.
    pub(crate) breaks: &'static str,
    /// Path below `shadow-mmu/src`.
    pub(crate) file: &'static str,
    /// A text that occurs once in the file; the original is the first behind it. Empty where the original occurs once.
    pub(crate) behind: &'static str,
    /// The text that is replaced: whole statements, or one expression.
    pub(crate) original: &'static str,
    /// What stands in its place when the mutant is chosen; of the same type, if it is an expression.
    pub(crate) replacement: &'static str,
}

/// Changes that every copy has, so that a mutant can be written: file, text, what takes its place.
pub(crate) const PREPARATIONS: &[(&str, &str, &str)] = &[
    (
        "shadow/invalidate.rs",
        "fn change_pte(&self, hva: Hva, _: Pte)",
        "fn change_pte(&self, hva: Hva, pte: Pte)",
    ),
    // Two locks that a mutant lets go of too early.
    (
        "shadow/age.rs",
        "let _stable = self.windows.read();\n        let mut gather",
        "let mut stable = Some(self.windows.read());\n        let mut gather",
    ),
    (
        "shadow/dirty/harvest.rs",
        "let _exclusive = core.windows.write();\n                    core.still_logs",
        "let mut exclusive = Some(core.windows.write());\n                    core.still_logs",
    ),
    // What a mutant does later.
    (
        "shadow/entry.rs",
        "let mut record = Some(record);",
        "let (mut record, mut late) = (Some(record), None);",
    ),
    (
        "shadow/entry.rs",
        "Ok(_) if !new.is_writable() => return Restored::Access,",
        "Ok(_) if !new.is_writable() => return Restored::Access,\n            Ok(_) if let Some(record) = late.take() => {\n                record();\n                return Restored::Write;\n            }",
    ),
    // What a mutant takes for what comes later.
    (
        "shadow/dirty/harvest.rs",
        "// The tables first:",
        "let in_bitmap_before = if crate::mutant::is(crate::mutant::M::PartFoundInBitmapFirst) { log.bitmap.next_part(part) } else { None };\n        // The tables first:",
    ),
    // What a mutant does too early.
    (
        "shadow/soft_tlb.rs",
        "let mut state = self.state.lock();\n        if state.find",
        "let early = crate::mutant::is(crate::mutant::M::FillWalksUnlocked).then(|| walker.access(gfn, access));\n        let mut state = self.state.lock();\n        if state.find",
    ),
    // What a mutant looks at without the lock.
    (
        "shadow/soft_tlb.rs",
        "    most: usize,\n}",
        "    most: usize,\n    noted: crate::sync::atomic::AtomicBool,\n}",
    ),
    (
        "shadow/soft_tlb.rs",
        "most: most.max(8) }",
        "most: most.max(8), noted: crate::sync::atomic::AtomicBool::new(false) }",
    ),
    (
        "shadow/soft_tlb.rs",
        "        state.note(&translation);\n",
        "        state.note(&translation);\n        self.noted.store(true, crate::sync::atomic::Ordering::Relaxed);\n",
    ),
    (
        "shadow/written.rs",
        "let _stable = self.windows.read();",
        "let slots_before = crate::mutant::is(crate::mutant::M::WrittenOfOldSlots).then(|| crate::sync::Arc::clone(&self.slots.read()));\n        let _stable = self.windows.read();",
    ),
];

/// All of them. One that changes several places has an entry for each.
pub(crate) fn all() -> impl Iterator<Item = &'static Mutant> {
    [shadow::MUTANTS, notifier::MUTANTS, mm::MUTANTS, tracking::MUTANTS, ksm::MUTANTS, soft_tlb::MUTANTS]
        .into_iter()
        .flatten()
}
