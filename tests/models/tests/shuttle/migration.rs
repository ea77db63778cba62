// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Whoever reads a dirty log, as a live migration does: it has a copy of some pages, and after each report copies what was
//! reported.
//!
//! What must hold is what the kernel's `dirty_log_test` checks, for each page:
//! * A write that was over when a report began is in the copy when the reported pages have been copied (I34, I37).
//! * When nobody writes any more, one more report makes the copy equal to the memory (I32: no write that comes after a report
//!   goes unreported).
//!
//! Writes are maxima, so that the memory of a page only ever grows, whoever writes first.

use crate::addr::{Access, Gfn, Hva, PAGE_SIZE};
use crate::cpu::{Vcpu, tagged};
use crate::machine::Machine;
use crate::shadow::{
    DirtyLogConfig, DirtyLogError, DirtyMethod, DirtyPages, DirtyRecords, DirtyRing, Initially, ProtectOn,
};
use crate::sync::Arc;
use crate::sync::atomic::{AtomicU64, Ordering};

/// The slot of a machine.
pub(crate) const SLOT: Gfn = Gfn(0);
/// Pages that a migration can be about.
const MOST: usize = 4;

/// A log in a bitmap whose reports arm, clean at first.
pub(crate) fn bitmap(method: DirtyMethod) -> DirtyLogConfig {
    DirtyLogConfig {
        method,
        records: DirtyRecords::Bitmap,
        protect: ProtectOn::Get,
        initially: Initially::Clean,
    }
}

/// Which writes to some pages are over.
#[derive(Debug, Default)]
pub(crate) struct Writes {
    over: [AtomicU64; MOST],
}

impl Writes {
    /// The `n`-th value of page `which`, at `at`, was written.
    pub(crate) fn over(&self, which: usize, at: Hva, n: u64) {
        self.over[which].fetch_max(tagged(at, n), Ordering::SeqCst);
    }

    /// `vcpu` writes the `n`-th value of page `which`, at `at`, unless a later one is there.
    pub(crate) fn write(&self, vcpu: &mut Vcpu<'_>, which: usize, at: Hva, n: u64) {
        let write = |word: &AtomicU64| word.fetch_max(tagged(at, n), Ordering::SeqCst);
        vcpu.access(at, Access::WRITE, write).unwrap();
        self.over(which, at, n);
    }
}

/// See the top of the file.
#[derive(Debug)]
pub(crate) struct Migration<'a> {
    machine: &'a Machine,
    writes: &'a Writes,
    pages: Vec<Hva>,
    /// What was copied last; 0 where nothing is mapped.
    copies: Vec<u64>,
    rings: Vec<Arc<DirtyRing>>,
    protect: ProtectOn,
}

impl<'a> Migration<'a> {
    /// Copies `pages`, whose log was just switched on.
    pub(crate) fn begin(
        machine: &'a Machine,
        writes: &'a Writes,
        pages: &[Hva],
        config: DirtyLogConfig,
    ) -> Self {
        let (pages, copies) = (pages.to_vec(), vec![0; pages.len()]);
        let mut migration =
            Self { machine, writes, pages, copies, rings: Vec::new(), protect: config.protect };
        if config.initially == Initially::Clean {
            (0..migration.pages.len()).for_each(|which| migration.copy(which));
        }
        migration
    }

    /// With the rings of vCPUs, which it collects from.
    pub(crate) fn with_rings(mut self, rings: &[Arc<DirtyRing>]) -> Self {
        self.rings = rings.to_vec();
        self
    }

    fn copy(&mut self, which: usize) {
        self.copies[which] = self.machine.peek(self.pages[which]).unwrap_or(0);
    }

    fn report(&self) -> Result<DirtyPages, DirtyLogError> {
        let shadow = self.machine.shadow();
        let mut dirty = DirtyPages::default();
        for ring in &self.rings {
            let harvested = ring.harvest(|entry| dirty.insert(entry.page));
            self.machine.must(harvested <= 4, || format!("a ring of 4 had {harvested} entries (I36)"));
        }
        if !self.rings.is_empty() {
            shadow.reset_dirty_rings();
        }
        let bits = shadow.get_dirty_log(SLOT)?;
        if self.protect == ProtectOn::Clear {
            let pages = shadow.slots().find(SLOT).map_or(0, |slot| slot.pages);
            shadow.clear_dirty_log(SLOT, 0..pages, &bits)?;
        }
        bits.iter().for_each(|page| dirty.insert(page));
        Ok(dirty)
    }

    /// Asks for a report and copies what is in it.
    pub(crate) fn round(&mut self) {
        let over: Vec<u64> =
            self.writes.over.iter().take(self.pages.len()).map(|n| n.load(Ordering::SeqCst)).collect();
        let dirty = match self.report() {
            Ok(dirty) => dirty,
            Err(error) => return self.machine.must(false, || format!("no report: {error}")),
        };
        for (which, &over) in over.iter().enumerate() {
            let at = self.pages[which];
            if dirty.contains(at.0 / PAGE_SIZE) {
                self.copy(which);
            }
            let copy = self.copies[which];
            self.machine.must(copy >= over, || {
                format!("{over:#x} was in {at} when a report began, and {copy:#x} is in the copy (I34)")
            });
        }
    }

    /// Nobody writes any more: one more report, and the copy must be equal.
    pub(crate) fn finish(mut self) {
        self.round();
        for (&at, &copy) in self.pages.iter().zip(&self.copies) {
            let memory = self.machine.peek(at).unwrap_or(0);
            self.machine.must(copy == memory, || {
                format!("{memory:#x} is in {at}, {copy:#x} in the copy: a write was not reported (I32)")
            });
        }
    }
}
