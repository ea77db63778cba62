// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Page sharing, as the library's caller sees it: what is merged and what is not, that nobody can tell by the bytes, and what a
//! pass over memory costs. `selftests` has the kernel's tests by name; `races` forces interleavings; `dirty` is about what the
//! CPU's D saves; `policy` about settings; `inject` about a scan that is held or gives up; `mapping` about what happens to merged pages; `oracle` runs everything at once.
// What a test does not expect may end it.
#![cfg(feature = "mmu-notifier")]
#![allow(clippy::unwrap_used)]

mod common;
#[path = "ksm/dirty.rs"]
mod dirty;
#[cfg(feature = "inject")]
#[path = "ksm/inject.rs"]
mod inject;
#[path = "ksm/mapping.rs"]
mod mapping;
#[path = "ksm/oracle.rs"]
mod oracle;
#[path = "ksm/policy.rs"]
mod policy;
#[path = "ksm/races.rs"]
mod races;
#[path = "ksm/selftests.rs"]
mod selftests;

use common::{Machine, READ, RW, Random, StopOnDrop, bitmap_log, page, pages};
use shadow_mmu::addr::{Gfn, Hva, HvaRange, PAGE_SIZE, Pfn};
use shadow_mmu::ksm::{
    CandidateAccess, Domain, Ksm, KsmError, KsmSettings, KsmStats, NotShared, PassEnd, SmartScan, ZeroPages,
};
use shadow_mmu::mm::{Advice, FaultRequest, MapFlags, MergeAny, MmError, RemapFlags, VmaFlags};
use shadow_mmu::shadow::AdBits;
use shadow_mmu::shadow::FaultAroundPolicy::{Fixed, Off};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Aligned to 2 MiB.
const BASE: Hva = Hva(0x7000_0000);
/// Every kind of CPU.
const KINDS: [AdBits; 3] = [AdBits::AfterFlush, AdBits::Unflushed, AdBits::None];
/// What pages begin with that are equal.
const SAME: u64 = 0xcf;

/// One content in every run, so that hashes are, too.
fn settings() -> KsmSettings {
    KsmSettings { seed: Some(1), ..KsmSettings::default() }
}

/// Sharing among `machines`, which have one pool.
fn sharing<'a>(settings: KsmSettings, machines: impl IntoIterator<Item = &'a Machine>) -> Arc<Ksm> {
    let mut machines = machines.into_iter().peekable();
    let ksm = Ksm::new(Arc::clone(&machines.peek().unwrap().pool), settings).unwrap();
    machines.for_each(|machine| _ = ksm.enter(&machine.mm, Domain(0)).unwrap());
    ksm
}

/// `count` pages at `at` that may be merged, the n-th beginning with `word(n)`.
fn fill(machine: &Machine, at: Hva, count: u64, word: impl Fn(u64) -> u64) {
    machine.map_at(at, count, RW, MapFlags::PRIVATE);
    machine.mm.madvise(at, pages(count), Advice::Mergeable).unwrap();
    (0..count).for_each(|n| machine.poke(page(at, n), word(n)));
}

/// A machine with pages as of [`fill`] at [`BASE`].
fn filled(ad: AdBits, count: u64, word: impl Fn(u64) -> u64) -> Machine {
    let machine = Machine::with_ad_bits(4096, ad);
    fill(&machine, BASE, count, word);
    machine
}

/// The rest of the pass. Returns how many pages were merged.
fn pass(ksm: &Ksm) -> u64 {
    let mut merged = 0;
    loop {
        let scanned = ksm.scan(1000);
        merged += scanned.merged;
        if scanned.pass == PassEnd::Reached {
            return merged;
        }
    }
}

/// Two passes, after which all is merged that can be.
fn merge(ksm: &Ksm) -> u64 {
    pass(ksm) + pass(ksm)
}

/// `pages_shared` and `pages_sharing`.
fn shared(ksm: &Ksm) -> (u64, u64) {
    let KsmStats { pages_shared, pages_sharing, .. } = ksm.stats();
    (pages_shared, pages_sharing)
}

/// The frame of each of these pages.
fn frames(machine: &Machine, at: Hva, count: u64) -> Vec<Pfn> {
    (0..count).map(|n| machine.pte(page(at, n)).pfn()).collect()
}

/// Whether two of these pages have one frame (`range_maps_duplicates`).
fn has_duplicates(machine: &Machine, at: Hva, count: u64) -> bool {
    BTreeSet::from_iter(frames(machine, at, count)).len() < count as usize
}

/// Whether any of these pages is merged.
fn has_merged(machine: &Machine, at: Hva, count: u64) -> bool {
    (0..count).any(|n| machine.pte(page(at, n)).is_ksm())
}

/// The words that the pages begin with, as a host access finds them.
fn words(machine: &Machine, at: Hva, count: u64) -> Vec<u64> {
    (0..count).map(|n| machine.peek(page(at, n))).collect()
}

/// Everything that can be looked at from outside.
#[track_caller]
fn check(ksm: &Ksm, machine: &Machine) {
    let wrong = ksm.audit();
    assert!(wrong.is_empty(), "{wrong:#?}");
    machine.check();
}

/// What `/sys/kernel/mm/ksm` promises of its counters, where nothing changes (I53).
#[track_caller]
fn check_counters(ksm: &Ksm) {
    let report = ksm.report();
    let (stats, mms) = (report.stats, report.members.iter().map(|member| member.stats));
    assert_eq!(
        mms.clone().map(|mm| mm.ksm_merging_pages).sum::<u64>(),
        stats.pages_shared + stats.pages_sharing
    );
    assert_eq!(mms.clone().map(|mm| mm.ksm_zero_pages).sum::<u64>(), stats.ksm_zero_pages);
    let items = mms.map(|mm| mm.ksm_rmap_items).sum::<u64>();
    assert_eq!(items, stats.pages_shared + stats.pages_sharing + stats.pages_unshared + stats.pages_volatile);
    let saved = ((stats.pages_sharing + stats.ksm_zero_pages) * PAGE_SIZE) as i64;
    assert_eq!(stats.general_profit, saved - ksm.metadata_bytes() as i64);
    for member in &report.members {
        for vma in &member.vmas {
            let NotShared { volatile, unique, pinned, domain, limit } = vma.pages.not_shared;
            let sum = vma.pages.shared + vma.pages.zero + volatile + unique + pinned + domain + limit;
            assert_eq!(vma.pages.all, sum, "every page has one reason: {vma:?}");
        }
    }
}
