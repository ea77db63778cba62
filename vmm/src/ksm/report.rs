// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What there is to say of page sharing: counters by the kernel's names, and of each guest what [`guest`](super::guest) has.
//!
//! A report is of one moment, `at_s`, so that its numbers fit together: the last one at which most was saved, for at the end of
//! guests that end one after the other there is nothing left to see. Only what is counted up from the start, `pages_scanned`,
//! `pages_skipped`, `full_scans`, `cow_ksm`, `cpu_s` and `reserve_taken`, is of the end.

use super::guest::{Fates, GuestSharing};
use super::mib;
use serde::Serialize;
use shadow_mmu::ksm::KsmStats;
use std::fmt::Write;

/// The counters of `/sys/kernel/mm/ksm` and what umbra has besides; in JSON the object `ksm` of `--stats`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct SharingStats {
    /// When this was so: seconds since umbra started.
    pub at_s: f64,
    /// Frames that are shared.
    pub pages_shared: u64,
    /// Further ptes of them: pages saved.
    pub pages_sharing: u64,
    /// Pages that are like no other.
    pub pages_unshared: u64,
    /// Pages that change too often.
    pub pages_volatile: u64,
    /// Pages that a pass left out because they change too often.
    pub pages_skipped: u64,
    /// Pages that were looked at and had been written.
    pub pages_scanned: u64,
    /// Passes.
    pub full_scans: u64,
    /// Contents with several frames, because of `max-page-sharing`.
    pub stable_node_chains: u64,
    /// Those frames.
    pub stable_node_dups: u64,
    /// Pages of zeros that have the zero frame: pages saved.
    pub ksm_zero_pages: u64,
    /// Bytes saved, less those that sharing needs.
    pub general_profit: i64,
    /// Merged pages that were copied because somebody wrote them.
    pub cow_ksm: u64,
    /// Bytes that sharing needs.
    pub metadata_bytes: u64,
    /// CPU time of the scanning thread.
    pub cpu_s: f64,
    /// Frames that are kept for pages that stop being shared.
    pub reserve_pages: u64,
    /// Frames that were taken from those.
    pub reserve_taken: u64,
}

/// What umbra knows of sharing besides the counters.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Besides {
    /// As [`SharingStats::metadata_bytes`].
    pub metadata_bytes: u64,
    /// As [`SharingStats::cpu_s`].
    pub cpu_s: f64,
    /// As [`SharingStats::reserve_pages`].
    pub reserve_pages: u64,
    /// As [`SharingStats::reserve_taken`].
    pub reserve_taken: u64,
}

impl SharingStats {
    /// What was so at `at_s` is from `then`, what was counted up from `end`.
    pub fn new(at_s: f64, then: &KsmStats, end: &KsmStats, besides: Besides) -> Self {
        Self {
            at_s,
            pages_shared: then.pages_shared,
            pages_sharing: then.pages_sharing,
            pages_unshared: then.pages_unshared,
            pages_volatile: then.pages_volatile,
            pages_skipped: end.pages_skipped,
            pages_scanned: end.pages_scanned,
            full_scans: end.full_scans,
            stable_node_chains: then.stable_node_chains,
            stable_node_dups: then.stable_node_dups,
            ksm_zero_pages: then.ksm_zero_pages,
            general_profit: then.general_profit,
            cow_ksm: end.cow_ksm,
            metadata_bytes: besides.metadata_bytes,
            cpu_s: besides.cpu_s,
            reserve_pages: besides.reserve_pages,
            reserve_taken: besides.reserve_taken,
        }
    }

    /// Pages saved.
    pub fn saved_pages(&self) -> u64 {
        self.pages_sharing + self.ksm_zero_pages
    }

    /// For people, in a line: of `--stats`.
    pub fn text(&self) -> String {
        format!(
            "sharing   {} pages saved at most, {:.1} MiB less {:.1} MiB that it needs, in {} passes; {:.3} s of CPU time",
            self.saved_pages(),
            mib(self.saved_pages()),
            self.metadata_bytes as f64 / f64::from(1 << 20),
            self.full_scans,
            self.cpu_s
        )
    }

    fn rows(&self) -> [(&'static str, String); 16] {
        [
            ("pages_shared", self.pages_shared.to_string()),
            ("pages_sharing", self.pages_sharing.to_string()),
            ("pages_unshared", self.pages_unshared.to_string()),
            ("pages_volatile", self.pages_volatile.to_string()),
            ("pages_skipped", self.pages_skipped.to_string()),
            ("pages_scanned", self.pages_scanned.to_string()),
            ("full_scans", self.full_scans.to_string()),
            ("stable_node_chains", self.stable_node_chains.to_string()),
            ("stable_node_dups", self.stable_node_dups.to_string()),
            ("ksm_zero_pages", self.ksm_zero_pages.to_string()),
            ("general_profit", self.general_profit.to_string()),
            ("cow_ksm", self.cow_ksm.to_string()),
            ("metadata_bytes", self.metadata_bytes.to_string()),
            ("cpu_s", format!("{:.3}", self.cpu_s)),
            ("reserve_pages", self.reserve_pages.to_string()),
            ("reserve_taken", self.reserve_taken.to_string()),
        ]
    }
}

/// All there is to say.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SharingReport {
    /// `ksm`.
    pub report: &'static str,
    /// The counters.
    #[serde(flatten)]
    pub stats: SharingStats,
    /// The guests there were at that moment.
    pub guests: Vec<GuestSharing>,
}

impl SharingReport {
    /// What became of all pages.
    pub fn fates(&self) -> Fates {
        let vmas = self.guests.iter().flat_map(|guest| &guest.vmas);
        vmas.fold(Fates::default(), |sum, vma| sum.sum(vma.fates))
    }

    /// For people, whole lines.
    pub fn text(&self) -> String {
        let mut out = String::new();
        // Writing to a string cannot fail.
        let _ = self.write(&mut out);
        out
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        let saved = self.stats.saved_pages();
        writeln!(
            out,
            "umbra: page sharing {:.3} s after the start, when most was saved: {:.1} MiB",
            self.stats.at_s,
            mib(saved)
        )?;
        for two in self.stats.rows().chunks(2) {
            let cells: Vec<_> = two.iter().map(|(name, value)| format!("{name:<18} {value:>14}")).collect();
            writeln!(out, "  {}", cells.join("    "))?;
        }
        writeln!(
            out,
            "guests    domain           rmap_items  merging_pages  zero_pages  process_profit  merge_any  mergeable"
        )?;
        let yes = |is_so| if is_so { "yes" } else { "no" };
        for guest in &self.guests {
            writeln!(
                out,
                "  {:<7} {:<16} {:>10}  {:>13}  {:>10}  {:>14}  {:>9}  {:>9}",
                guest.guest,
                guest.share_domain.as_deref().unwrap_or("-"),
                guest.ksm_rmap_items,
                guest.ksm_merging_pages,
                guest.ksm_zero_pages,
                guest.ksm_process_profit,
                yes(guest.ksm_merge_any),
                yes(guest.ksm_mergeable)
            )?;
        }
        let parts = Fates::default().parts().map(|(name, _)| format!(" {name:>8}"));
        writeln!(
            out,
            "pages     mapping                                    {:>8}{}",
            "pages",
            parts.concat()
        )?;
        for guest in &self.guests {
            for vma in guest.vmas.iter().filter(|vma| vma.fates.pages > 0) {
                let at = if vma.end == 0 { String::new() } else { format!("{:x}-{:x} ", vma.start, vma.end) };
                writeln!(
                    out,
                    "  {:<7} {:<42} {}",
                    guest.guest,
                    format!("{at}{} {}", vma.rights, vma.name),
                    vma.fates.row()
                )?;
            }
        }
        writeln!(out, "  {:<7} {:<42} {}", "all", "", self.fates().row())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed test may panic")]
    use super::super::guest::VmaSharing;
    use super::*;

    fn vma(pages: u64, unique: u64) -> VmaSharing {
        let fates = Fates { pages, unique, shared: pages - unique, ..Fates::default() };
        VmaSharing { start: 0x1000, end: 0x9000, rights: "rw-p".into(), name: "[heap]".into(), fates }
    }

    fn report() -> SharingReport {
        let stats = KsmStats { pages_shared: 1, pages_sharing: 7, pages_scanned: 20, ..KsmStats::default() };
        let end = KsmStats { pages_scanned: 30, cow_ksm: 2, ..KsmStats::default() };
        let besides = Besides { metadata_bytes: 160, cpu_s: 0.25, reserve_pages: 3, reserve_taken: 0 };
        let guest = |guest, vmas| GuestSharing {
            guest,
            share_domain: (guest == 0).then(|| "web".to_owned()),
            ksm_rmap_items: 10,
            ksm_zero_pages: 0,
            ksm_merging_pages: 4,
            ksm_process_profit: -5,
            ksm_merge_any: true,
            ksm_mergeable: false,
            vmas,
        };
        SharingReport {
            report: "ksm",
            stats: SharingStats::new(1.5, &stats, &end, besides),
            guests: vec![guest(0, vec![vma(6, 2), vma(1, 1)]), guest(1, vec![vma(9, 0)])],
        }
    }

    #[test]
    fn what_is_of_one_moment_is_of_that_and_what_adds_up_of_the_end() {
        let stats = report().stats;
        assert_eq!((stats.pages_sharing, stats.pages_scanned, stats.cow_ksm), (7, 30, 2));
        assert_eq!(stats.saved_pages(), 7);
    }

    #[test]
    fn json_has_the_kernels_names_and_a_row_a_mapping() {
        let json = serde_json::to_value(report()).unwrap();
        assert_eq!((&json["report"], &json["pages_sharing"]), (&"ksm".into(), &7.into()));
        assert_eq!(json["guests"][0]["share_domain"], "web");
        assert!(json["guests"][1]["share_domain"].is_null());
        assert_eq!(json["guests"][0]["vmas"][0]["unique"], 2);
        assert_eq!(json["guests"][0]["vmas"][0]["rights"], "rw-p");
    }

    #[test]
    fn the_table_has_every_counter_and_the_sum_of_all_mappings() {
        let report = report();
        let fates = report.fates();
        assert_eq!((fates.pages, fates.shared, fates.unique), (16, 13, 3));
        let text = report.text();
        for (name, value) in report.stats.rows() {
            let cell = text.split(name).nth(1).unwrap().split_whitespace().next().unwrap();
            assert_eq!(cell, value, "{name} in {text}");
        }
        let last: Vec<_> = text.lines().last().unwrap().split_whitespace().collect();
        assert_eq!(last, ["all", "16", "13", "0", "0", "3", "0", "0", "0"]);
    }
}
