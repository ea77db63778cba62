// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A listener that only listens: it maps nothing, so it has nothing to invalidate, and no page is young because of it.

use super::event::Op;
use shadow_mmu::addr::{Hva, HvaRange};
use shadow_mmu::mm::Pte;
use shadow_mmu::notifier::{Invalidation, MmuNotifier, WouldBlock};
use std::fmt::Debug;

/// Something that is told every event of an address space.
///
/// Called on the thread that changes the address space, under its locks (see
/// [`notifier`](shadow_mmu::notifier)): no I/O, no waiting, no call into the `Mm`.
pub trait Observe: Debug + Send + Sync {
    /// A pair opens. Pairs of one thread nest.
    fn start(&self, invalidation: &Invalidation);
    /// The pair with this `invalidation`, opened last by this thread, closes.
    fn end(&self, invalidation: &Invalidation);
    /// Any other op than a pair.
    fn op(&self, op: Op);
    /// Whether it wants to be told [`Op::InvalidateRange`] too, which comes with the end of every pair.
    fn wants_invalidate_range(&self) -> bool {
        false
    }
}

/// An [`Observe`] as a listener.
#[derive(Debug, Default)]
pub struct Observer<O>(pub O);

impl<O: Observe> MmuNotifier for Observer<O> {
    fn release(&self) {
        self.0.op(Op::Release);
    }
    fn clear_flush_young(&self, range: HvaRange) -> bool {
        self.0.op(Op::ClearFlushYoung(range));
        false
    }
    fn clear_young(&self, range: HvaRange) -> bool {
        self.0.op(Op::ClearYoung(range));
        false
    }
    fn test_young(&self, hva: Hva) -> bool {
        self.0.op(Op::TestYoung(hva));
        false
    }
    fn change_pte(&self, hva: Hva, pte: Pte) {
        self.0.op(Op::ChangePte(hva, pte));
    }
    fn invalidate_page(&self, hva: Hva) {
        self.0.op(Op::InvalidatePage(hva));
    }
    fn invalidate_range_start(&self, invalidation: &Invalidation) -> Result<(), WouldBlock> {
        self.0.start(invalidation);
        Ok(())
    }
    fn invalidate_range_end(&self, invalidation: &Invalidation) {
        self.0.end(invalidation);
    }
    fn walks_primary_tables(&self) -> bool {
        self.0.wants_invalidate_range()
    }
    fn invalidate_range(&self, range: HvaRange) {
        self.0.op(Op::InvalidateRange(range));
    }
}
