// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Things that block on demand: a gate, a listener with gates, a file whose reads pass one.

use super::PATIENCE;
use shadow_mmu::addr::{Hva, HvaRange, PAGE_SIZE};
use shadow_mmu::mm::{FileSource, Pte};
use shadow_mmu::notifier::{Invalidation, MmuNotifier, WouldBlock};
use shadow_mmu::sync::{Condvar, Mutex};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A place where threads can be made to wait.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct GateState {
    shut: bool,
    waiting: usize,
}

impl Gate {
    pub(crate) fn shut(&self) {
        self.state.lock().shut = true;
    }
    pub(crate) fn open(&self) {
        self.state.lock().shut = false;
        self.changed.notify_all();
    }
    /// Goes through, or waits until the gate is opened.
    pub(crate) fn pass(&self) {
        self.wait(PATIENCE);
    }
    /// As [`pass`](Self::pass), for at most `patience`. Whether the gate was opened.
    pub(super) fn wait(&self, patience: Duration) -> bool {
        let start = Instant::now();
        let mut state = self.state.lock();
        if !state.shut {
            return true;
        }
        state.waiting += 1;
        while state.shut && start.elapsed() < patience {
            state = self.changed.wait_timeout(state, patience);
        }
        state.waiting -= 1;
        !state.shut
    }
    /// Whether somebody waits at the gate.
    pub(crate) fn is_occupied(&self) -> bool {
        self.state.lock().waiting > 0
    }
    /// Waits until somebody waits at the gate.
    #[track_caller]
    pub(crate) fn wait_for_arrival(&self) {
        super::wait_until("somebody arrives at the gate", || self.is_occupied());
    }
}

/// A listener that does nothing but let its gates be passed, by ops that touch the watched range.
#[derive(Debug, Default)]
pub(crate) struct Hook {
    pub(crate) start: Gate,
    pub(crate) end: Gate,
    pub(crate) change_pte: Gate,
    pub(crate) release: Gate,
    pub(crate) released: AtomicU64,
    /// Starts heard of, of any range.
    pub(crate) starts: AtomicU64,
    watched: Mutex<Option<HvaRange>>,
}

impl Hook {
    /// From now on the gates are for ops that touch `range` only.
    pub(crate) fn watch(&self, range: HvaRange) {
        *self.watched.lock() = Some(range);
    }
    fn concerns(&self, range: HvaRange) -> bool {
        self.watched.lock().is_none_or(|watched| watched.overlaps(range))
    }
    pub(super) fn open_all(&self) {
        [&self.start, &self.end, &self.change_pte, &self.release].iter().for_each(|gate| gate.open());
    }
}

impl MmuNotifier for Hook {
    fn release(&self) {
        self.released.fetch_add(1, Ordering::SeqCst);
        self.release.pass();
    }
    fn change_pte(&self, hva: Hva, _: Pte) {
        if self.concerns(HvaRange::page(hva)) {
            self.change_pte.pass();
        }
    }
    fn invalidate_range_start(&self, invalidation: &Invalidation) -> Result<(), WouldBlock> {
        self.starts.fetch_add(1, Ordering::SeqCst);
        if self.concerns(invalidation.range) {
            self.start.pass();
        }
        Ok(())
    }
    fn invalidate_range_end(&self, invalidation: &Invalidation) {
        if self.concerns(invalidation.range) {
            self.end.pass();
        }
    }
}

/// A file in memory. The first word of each page is [`TestFile::tag`], the rest is the page's number in every byte.
#[derive(Debug)]
pub(crate) struct TestFile {
    len: u64,
    /// Passed by each read.
    pub(crate) read: Gate,
}

impl TestFile {
    pub(crate) fn new(len: u64) -> Arc<Self> {
        Arc::new(Self { len, read: Gate::default() })
    }
    pub(crate) fn tag(page: u64) -> u64 {
        0xf11e_0000_0000 + page
    }
}

impl FileSource for TestFile {
    fn len(&self) -> u64 {
        self.len
    }
    fn read_at(&self, offset: u64, into: &mut [u8]) -> std::io::Result<usize> {
        self.read.pass();
        let count = self.len.saturating_sub(offset).min(into.len() as u64);
        for (at, byte) in (offset..offset + count).zip(into.iter_mut()) {
            let (page, within) = (at / PAGE_SIZE, (at % PAGE_SIZE) as usize);
            *byte = *Self::tag(page).to_le_bytes().get(within).unwrap_or(&(page as u8));
        }
        Ok(count as usize)
    }
    fn name(&self) -> &str {
        "/test/file"
    }
}
