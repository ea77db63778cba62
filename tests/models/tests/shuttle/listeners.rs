// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Listeners that check how they are called.

use crate::addr::{Hva, Pfn};
use crate::cpu::SoftTlb;
use crate::machine::Machine;
use crate::mm::Pte;
use crate::notifier::{Blockable, Invalidation, MmuNotifier, WouldBlock};
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::{Arc, Mutex};

/// A listener that knows whether it may still be called, and counts its open pairs.
#[derive(Debug)]
pub(crate) struct Probe {
    tlb: Arc<SoftTlb>,
    /// Ops that run now.
    inside: AtomicU64,
    /// Starts without their ends.
    open: AtomicU64,
    /// Starts so far.
    starts: AtomicU64,
    /// Set when no op may be called any more.
    gone: AtomicBool,
    /// Whether it refuses ranges that may not block.
    refuses: bool,
}

impl Probe {
    pub(crate) fn new(machine: &Machine) -> Arc<Self> {
        Arc::new(Self::of(machine))
    }

    /// One that refuses ranges that may not block; it has no end op, as such listeners must not.
    pub(crate) fn refusing(machine: &Machine) -> Arc<Self> {
        Arc::new(Self { refuses: true, ..Self::of(machine) })
    }

    /// One that is not shared yet.
    pub(crate) fn of(machine: &Machine) -> Self {
        Self {
            tlb: Arc::clone(&machine.tlb),
            inside: AtomicU64::new(0),
            open: AtomicU64::new(0),
            starts: AtomicU64::new(0),
            gone: AtomicBool::new(false),
            refuses: false,
        }
    }

    /// Starts that it heard of so far.
    pub(crate) fn starts(&self) -> u64 {
        self.starts.load(Ordering::SeqCst)
    }

    /// From now on nobody may call it: what it needs would be freed here.
    pub(crate) fn free(&self) {
        self.gone.store(true, Ordering::SeqCst);
        let inside = self.inside.load(Ordering::SeqCst);
        self.must(inside == 0, "an op runs in a listener that is freed (I7)");
    }

    /// Starts without their ends.
    pub(crate) fn open_pairs(&self) -> u64 {
        self.open.load(Ordering::SeqCst)
    }

    fn must(&self, holds: bool, what: &str) {
        if !holds {
            self.tlb.note(|| what.to_owned());
        }
    }

    fn op<R>(&self, op: impl FnOnce() -> R) -> R {
        self.inside.fetch_add(1, Ordering::SeqCst);
        self.must(!self.gone.load(Ordering::SeqCst), "a listener is called that was freed (I7)");
        let result = op();
        self.must(!self.gone.load(Ordering::SeqCst), "a listener was freed while an op of it ran (I7)");
        self.inside.fetch_sub(1, Ordering::SeqCst);
        result
    }
}

impl MmuNotifier for Probe {
    fn release(&self) {
        self.op(|| ());
    }
    fn invalidate_range_start(&self, invalidation: &Invalidation) -> Result<(), WouldBlock> {
        if self.refuses {
            return if invalidation.blockable == Blockable::No { Err(WouldBlock) } else { Ok(()) };
        }
        self.op(|| {
            self.open.fetch_add(1, Ordering::SeqCst);
            self.starts.fetch_add(1, Ordering::SeqCst);
        });
        Ok(())
    }
    fn invalidate_range_end(&self, _: &Invalidation) {
        if !self.refuses {
            self.op(|| {
                let before = self.open.fetch_sub(1, Ordering::SeqCst);
                self.must(before > 0, "a listener is told of an end whose start it was not told of (I9)");
            });
        }
    }
}

/// A secondary MMU of one page that relies on `change_pte` alone, as replication of read-only pages does.
#[derive(Debug, Default)]
pub(crate) struct Mirror {
    pub(crate) frame: Mutex<Option<Pfn>>,
}

impl MmuNotifier for Mirror {
    fn change_pte(&self, _: Hva, pte: Pte) {
        *self.frame.lock() = Some(pte.pfn());
    }
}
