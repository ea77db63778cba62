// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The batch between a zap and its flush, in the manner of `mmu_gather`.
//!
//! Zapped leaves are collected; one flush covers them all. The batch must be flushed before `mmu_lock` is let go (R12:
//! a second zapper that finds nothing to zap would otherwise return, and free the frame, before the first one flushed)
//! and before any frame it covers is freed (I22). Dropping a batch flushes it, so neither can be forgotten.

use super::spte::Spte;
use super::tlb::{Tlb, Zapped};
use crate::addr::Gfn;

/// Leaves in a batch before it is flushed early; bounds the memory, and is the most ranges that `process_madvise`
/// takes a few times over.
const BATCH: usize = 4096;

/// Zapped leaves that no flush has covered yet.
#[must_use = "a batch that is not flushed leaves stale translations behind"]
#[derive(Debug)]
pub struct Gather<'a> {
    tlb: &'a dyn Tlb,
    zapped: Vec<Zapped>,
    flushed: u64,
}

impl<'a> Gather<'a> {
    /// An empty batch for `tlb`.
    pub fn new(tlb: &'a dyn Tlb) -> Self {
        Self { tlb, zapped: Vec::new(), flushed: 0 }
    }

    /// Adds the leaf that was at `gfn`. Flushes first where the batch is full.
    pub fn add(&mut self, gfn: Gfn, level: u8, old: Spte) {
        if self.zapped.len() == BATCH {
            self.flush();
        }
        self.zapped.push(Zapped { gfn, level, old });
    }

    /// Flushes what has been added since the last flush. Returns the number of leaves flushed by this batch so far.
    pub fn flush(&mut self) -> u64 {
        if !self.zapped.is_empty() {
            self.tlb.flush(&self.zapped);
            self.flushed += self.zapped.len() as u64;
            self.zapped.clear();
        }
        self.flushed
    }
}

impl Drop for Gather<'_> {
    fn drop(&mut self) {
        self.flush();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::{Access, Pfn};
    use crate::sync::Mutex;

    #[derive(Debug, Default)]
    struct Recorder(Mutex<Vec<usize>>);

    impl Tlb for Recorder {
        fn flush(&self, zapped: &[Zapped]) {
            self.0.lock().push(zapped.len());
        }
        fn flush_all(&self) {}
    }

    fn leaf() -> Spte {
        Spte::leaf(Pfn(1), Access::READ)
    }

    #[test]
    fn a_batch_is_flushed_once_and_at_the_latest_when_dropped() {
        let tlb = Recorder::default();
        let mut batch = Gather::new(&tlb);
        (0..3).for_each(|n| batch.add(Gfn(n), 1, leaf()));
        assert!(tlb.0.lock().is_empty());
        drop(batch);
        assert_eq!(*tlb.0.lock(), [3]);
    }

    #[test]
    fn an_empty_batch_costs_no_flush() {
        let tlb = Recorder::default();
        drop(Gather::new(&tlb));
        assert!(tlb.0.lock().is_empty());
    }

    #[test]
    fn a_full_batch_is_flushed_before_it_grows() {
        let tlb = Recorder::default();
        let mut batch = Gather::new(&tlb);
        (0..BATCH as u64 + 1).for_each(|n| batch.add(Gfn(n), 1, leaf()));
        assert_eq!(batch.flush(), BATCH as u64 + 1);
        assert_eq!(*tlb.0.lock(), [BATCH, 1]);
    }
}
