// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Mutants of the CPU's walk and its TLB in software.

use super::Mutant;

pub(crate) const MUTANTS: &[Mutant] = &[
    Mutant {
        name: "FillWalksUnlocked",
        breaks: "R34: a fill walks before it takes the lock that flushes take.",
        file: "shadow/soft_tlb.rs",
        behind: "return Ok(Filled::Allowed);",
        original: "walker.access(gfn, access)",
        replacement: "early.flatten()",
    },
    Mutant {
        name: "FlushOfNothingUnlocked",
        breaks: "R34: a flush of a TLB that looks empty does not wait for a fill that is under way.",
        file: "shadow/soft_tlb.rs",
        behind: "",
        original: "pages.sort_unstable_by_key(|pages| pages.start);",
        replacement: "if !self.noted.load(crate::sync::atomic::Ordering::Acquire) { return Ok(()); }",
    },
    Mutant {
        name: "MapsBehindItsNote",
        breaks: "R34: a fill notes the entry, lets go of the lock, and only then has it mapped.",
        file: "shadow/soft_tlb.rs",
        behind: "",
        original: "host.map(&translation).is_err()",
        replacement: "{ state.note(&translation); drop(state); let failed = host.map(&translation).is_err(); state = self.state.lock(); failed }",
    },
    Mutant {
        name: "FillMapsWithoutD",
        breaks: "I59: a translation allows writes before D is set.",
        file: "shadow/walker.rs",
        behind: "",
        original: "spte.is_writable() && spte.is_dirty()",
        replacement: "spte.is_writable()",
    },
    Mutant {
        name: "FlushMissesTheMiddle",
        breaks: "I60: a flush does not see an entry that begins before its page.",
        file: "shadow/soft_tlb.rs",
        behind: "",
        original: "self.find(pages.start).map_or(pages.start, |(start, _)| start)",
        replacement: "pages.start",
    },
    Mutant {
        name: "FlushForgetsTheRest",
        breaks: "I60: what a flush leaves of an entry behind its page is mapped, and forgotten.",
        file: "shadow/soft_tlb.rs",
        behind: "",
        original: "self.entries.insert(pages.end, Entry { pages: end - pages.end, pfn, ..entry });",
        replacement: "let _ = pfn;",
    },
    Mutant {
        name: "EvictionOnlyForgets",
        breaks: "I60: what is evicted stays mapped.",
        file: "shadow/soft_tlb.rs",
        behind: "",
        original: "self.drop_pages(std::iter::once(from..next.unwrap_or(EVERYTHING.end)), host)",
        replacement: "{ self.forget(from..next.unwrap_or(EVERYTHING.end)); Ok(()) }",
    },
    Mutant {
        name: "LinkMarkedBlindly",
        breaks: "R35: A of a link is set whether or not the link is still there.",
        file: "shadow/walker.rs",
        behind: "",
        original: "entry.compare_exchange(link.0, marked, Ordering::AcqRel, Ordering::Acquire)",
        replacement: "{ entry.fetch_or(Link::ACCESSED, Ordering::AcqRel); Ok::<u64, u64>(link.0) }",
    },
];
