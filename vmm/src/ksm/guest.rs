// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a report has of one guest: what `/proc/PID/ksm_stat` says, and by mapping what became of the pages, merged or why not.

use serde::Serialize;
use shadow_mmu::ksm::{KsmMemberReport, KsmPages, KsmVma};

/// What became of the pages of one mapping, or of several.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Fates {
    /// Private pages there are.
    pub pages: u64,
    /// They have a shared frame.
    pub shared: u64,
    /// They have the zero frame.
    pub zero: u64,
    /// They change too often.
    pub volatile: u64,
    /// There is no other like them.
    pub unique: u64,
    /// Somebody held them just then.
    pub pinned: u64,
    /// There is one like them, in another domain.
    pub domain: u64,
    /// As many share the frame already as may.
    pub limit: u64,
}

impl Fates {
    fn of(pages: &KsmPages) -> Self {
        let why = pages.not_shared;
        Self {
            pages: pages.all,
            shared: pages.shared,
            zero: pages.zero,
            volatile: why.volatile,
            unique: why.unique,
            pinned: why.pinned,
            domain: why.domain,
            limit: why.limit,
        }
    }

    pub(super) fn sum(self, other: Self) -> Self {
        Self {
            pages: self.pages + other.pages,
            shared: self.shared + other.shared,
            zero: self.zero + other.zero,
            volatile: self.volatile + other.volatile,
            unique: self.unique + other.unique,
            pinned: self.pinned + other.pinned,
            domain: self.domain + other.domain,
            limit: self.limit + other.limit,
        }
    }

    /// By name: merged ones first, then the reasons.
    pub fn parts(&self) -> [(&'static str, u64); 7] {
        [
            ("shared", self.shared),
            ("zero", self.zero),
            ("volatile", self.volatile),
            ("unique", self.unique),
            ("pinned", self.pinned),
            ("domain", self.domain),
            ("limit", self.limit),
        ]
    }

    pub(super) fn row(&self) -> String {
        let parts = self.parts().map(|(_, pages)| format!(" {pages:>8}"));
        format!("{:>8}{}", self.pages, parts.concat())
    }
}

/// A mapping.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct VmaSharing {
    /// Its first address; 0 for mappings that have no row of their own, together.
    pub start: u64,
    /// The address behind it; 0 for those.
    pub end: u64,
    /// As `/proc/PID/maps` has them.
    pub rights: String,
    /// What it is.
    pub name: String,
    /// What became of its pages.
    #[serde(flatten)]
    pub fates: Fates,
}

/// A guest.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct GuestSharing {
    /// Its number.
    pub guest: usize,
    /// Its domain, where that has a name.
    pub share_domain: Option<String>,
    /// Pages that are merged, or might be.
    pub ksm_rmap_items: u64,
    /// Pages of zeros that have the zero frame.
    pub ksm_zero_pages: u64,
    /// Its pages that have a shared frame.
    pub ksm_merging_pages: u64,
    /// Bytes saved, less what its pages cost.
    pub ksm_process_profit: i64,
    /// Whether all of its memory may be merged.
    pub ksm_merge_any: bool,
    /// Whether some of it may.
    pub ksm_mergeable: bool,
    /// Its mappings that may be merged.
    pub vmas: Vec<VmaSharing>,
}

impl GuestSharing {
    /// What `report` says of a guest.
    pub fn new(guest: usize, domain: Option<&str>, report: &KsmMemberReport) -> Self {
        let vma = |row: &KsmVma| {
            let (start, end, rights, name) = match &row.place {
                // What is shared is private: others' writes are not to be seen in it.
                Some(place) => {
                    (place.range.start.0, place.range.end.0, format!("{}p", place.prot), place.name.clone())
                }
                None => (0, 0, "----".to_owned(), "all further mappings".to_owned()),
            };
            VmaSharing { start, end, rights, name, fates: Fates::of(&row.pages) }
        };
        let stats = report.stats;
        Self {
            guest,
            share_domain: domain.map(str::to_owned),
            ksm_rmap_items: stats.ksm_rmap_items,
            ksm_zero_pages: stats.ksm_zero_pages,
            ksm_merging_pages: stats.ksm_merging_pages,
            ksm_process_profit: stats.ksm_process_profit,
            ksm_merge_any: stats.ksm_merge_any,
            ksm_mergeable: stats.ksm_mergeable,
            vmas: report.vmas.iter().map(vma).collect(),
        }
    }
}
