// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What tests of aging and of dirty logs ask a machine.

use super::{Machine, SoftTlb, Vcpu};
use shadow_mmu::addr::{Gpa, Hva};
use shadow_mmu::mm::PageAge;
use shadow_mmu::shadow::{
    DirtyLogConfig, DirtyMethod, DirtyRecords, FaultAroundPolicy, Initially, ProtectOn, ShadowMmu, Spte, Tlb,
};
use shadow_mmu::table::index;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

impl Machine {
    /// The age of every present page, by page number.
    pub(crate) fn ages(&self) -> BTreeMap<u64, PageAge> {
        let mut ages = BTreeMap::new();
        self.mm.for_each_age(|_, range, age| {
            for page in range.page_numbers() {
                assert_eq!(ages.insert(page, age), None, "page {page:#x} was visited twice");
            }
        });
        ages
    }

    /// The age of the page at `at`, if it is present.
    pub(crate) fn age_of(&self, at: Hva) -> Option<PageAge> {
        self.ages().get(&at.page()).copied()
    }

    /// The entry for `at` at `level`; its table must be there.
    fn entry_at(&self, at: Hva, level: u8) -> &AtomicU64 {
        let gfn = Gpa(at.0).gfn();
        let path = self.shadow.walk(gfn);
        let (above, entry) = path[usize::from(3 - level)];
        assert_eq!(above, level + 1);
        &self.pool.words(Spte(entry).pfn())[index(gfn.0, level)]
    }

    /// The leaf entry for `at`.
    pub(crate) fn leaf_entry(&self, at: Hva) -> &AtomicU64 {
        self.entry_at(at, 1)
    }

    /// The entry that leads to the leaf table of `at`.
    pub(crate) fn link_entry(&self, at: Hva) -> &AtomicU64 {
        self.entry_at(at, 2)
    }

    /// A second shadow map of the same address space, with CPUs of its own and no slot.
    pub(crate) fn second_shadow(&self) -> (Arc<ShadowMmu>, Arc<SoftTlb>) {
        let tlb = Arc::new(SoftTlb::new(Arc::clone(&self.pool), 2, self.tlb.ad_bits()));
        let shadow = ShadowMmu::new(Arc::clone(&self.mm), tlb.clone()).unwrap();
        (Arc::new(shadow), tlb)
    }
}

/// A CPU of a second shadow map.
pub(crate) fn vcpu_of(shadow: &Arc<ShadowMmu>, tlb: &Arc<SoftTlb>, policy: FaultAroundPolicy) -> Vcpu {
    Vcpu::new(0, tlb, shadow, policy)
}

/// A log into the bitmap that begins with no page.
pub(crate) fn bitmap_log(method: DirtyMethod, protect: ProtectOn) -> DirtyLogConfig {
    DirtyLogConfig { method, records: DirtyRecords::Bitmap, protect, initially: Initially::Clean }
}

/// A log into rings.
pub(crate) fn ring_log() -> DirtyLogConfig {
    DirtyLogConfig { records: DirtyRecords::Rings, ..bitmap_log(DirtyMethod::WriteProtect, ProtectOn::Get) }
}
