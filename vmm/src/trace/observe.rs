// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A listener that only listens: it maps nothing, so it has nothing to invalidate, and no page is young because of it.
//!
//! It is no device that walks the primary's tables, so `invalidate_range` is not called for it: that op repeats what
//! `change_pte` and the end of each pair say. An address space that is listened to calls nothing that it would not call anyway.

use super::event::Op;
use shadow_mmu::addr::{Hva, HvaRange};
use shadow_mmu::mm::Pte;
use shadow_mmu::notifier::{Invalidation, MmuNotifier, WouldBlock, WrittenPages, YoungPages};
use std::fmt::Debug;

/// Something that is told every event of an address space.
///
/// Called on the thread that changes the address space, under its locks (see
/// [`notifier`](shadow_mmu::notifier)): no I/O, no waiting, no call into the `Mm`.
pub trait Observe: Debug + Send + Sync {
    /// A pair opens. A thread may have several open.
    fn start(&self, invalidation: &Invalidation);
    /// A pair with this `invalidation` that this thread opened closes.
    fn end(&self, invalidation: &Invalidation);
    /// Any other op than a pair.
    fn op(&self, op: Op);
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
    fn test_clear_young(&self, young: &mut YoungPages) {
        self.0.op(Op::TestClearYoung(young.range()));
    }
    fn test_clear_dirty(&self, pages: &mut WrittenPages) {
        self.0.op(Op::TestClearDirty(pages.range()));
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
}
