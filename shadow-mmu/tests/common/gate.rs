// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Things that block on demand: a gate, a listener with gates, a file whose reads pass one.

use super::PATIENCE;
use shadow_mmu::addr::{Hva, HvaRange, PAGE_SIZE};
use shadow_mmu::mm::{FileSource, Pte};
use shadow_mmu::notifier::{Invalidation, MmuNotifier, WouldBlock};
use shadow_mmu::sync::{Condvar, Mutex};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// A place where threads can be made to wait: all of them, or those whose business touches a range.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct GateState {
    shut_for: Option<HvaRange>,
    others: Others,
    waiting: usize,
}

/// Who comes to a gate at which somebody waits.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Others {
    #[default]
    Wait,
    Pass,
}

const EVERYTHING: HvaRange = HvaRange { start: Hva(0), end: Hva(u64::MAX) };

impl Gate {
    pub(crate) fn shut(&self) {
        self.shut_for(EVERYTHING);
    }
    pub(crate) fn shut_for(&self, range: HvaRange) {
        let mut state = self.state.lock();
        (state.shut_for, state.others) = (Some(range), Others::Wait);
    }
    /// The same for the first that comes; those after it pass.
    pub(crate) fn shut_for_one(&self, range: HvaRange) {
        let mut state = self.state.lock();
        (state.shut_for, state.others) = (Some(range), Others::Pass);
    }
    pub(crate) fn open(&self) {
        self.state.lock().shut_for = None;
        self.changed.notify_all();
    }
    /// Goes through, or waits until the gate is opened.
    pub(crate) fn pass(&self) {
        self.pass_with(EVERYTHING);
    }
    /// The same for a business with `range`.
    pub(crate) fn pass_with(&self, range: HvaRange) {
        let start = Instant::now();
        let mut state = self.state.lock();
        if state.others == Others::Pass && state.waiting > 0 {
            return;
        }
        if !state.shut_for.is_some_and(|shut| shut.overlaps(range)) {
            return;
        }
        state.waiting += 1;
        while state.shut_for.is_some_and(|shut| shut.overlaps(range)) && start.elapsed() < PATIENCE {
            state = self.changed.wait_timeout(state, PATIENCE);
        }
        state.waiting -= 1;
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

/// A listener that does nothing but let its gates be passed, by ops that touch the range that a gate is shut for.
#[derive(Debug, Default)]
pub(crate) struct Hook {
    pub(crate) start: Gate,
    pub(crate) end: Gate,
    pub(crate) change_pte: Gate,
    pub(crate) release: Gate,
    pub(crate) released: AtomicU64,
    /// Starts heard of, of any range.
    pub(crate) starts: AtomicU64,
}

impl Hook {
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
        self.change_pte.pass_with(HvaRange::page(hva));
    }
    fn invalidate_range_start(&self, invalidation: &Invalidation) -> Result<(), WouldBlock> {
        self.starts.fetch_add(1, Ordering::SeqCst);
        self.start.pass_with(invalidation.range);
        Ok(())
    }
    fn invalidate_range_end(&self, invalidation: &Invalidation) {
        self.end.pass_with(invalidation.range);
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
