// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A listener that remembers the last notifier events of an address space, for the report on a guest that died.

use shadow_mmu::addr::Hva;
use shadow_mmu::mm::Pte;
use shadow_mmu::notifier::{Invalidation, MmuNotifier, WouldBlock};
use shadow_mmu::sync::Mutex;
use std::collections::VecDeque;
use std::fmt;
use std::time::{Duration, Instant};

/// Events remembered.
const LAST: usize = 16;

/// What was told to the listeners.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recorded {
    /// A pair was opened.
    Start(Invalidation),
    /// A pair was closed.
    End(Invalidation),
    /// A pte is about to change.
    ChangePte(Hva, Pte),
    /// A page lost its pte.
    InvalidatePage(Hva),
    /// The address space went.
    Release,
}

impl fmt::Display for Recorded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Start(what) => write!(f, "invalidate_range_start {} {:?}", what.range, what.event),
            Self::End(what) => write!(f, "invalidate_range_end   {} {:?}", what.range, what.event),
            Self::ChangePte(hva, pte) => write!(f, "change_pte {hva} to {pte:?}"),
            Self::InvalidatePage(hva) => write!(f, "invalidate_page {hva}"),
            Self::Release => write!(f, "release"),
        }
    }
}

/// The last events, oldest first.
#[derive(Debug)]
pub struct Recorder {
    began: Instant,
    events: Mutex<VecDeque<(Duration, Recorded)>>,
}

impl Default for Recorder {
    fn default() -> Self {
        Self { began: Instant::now(), events: Mutex::new(VecDeque::with_capacity(LAST)) }
    }
}

impl Recorder {
    /// The events and when they were, counted from the recorder's making.
    pub fn events(&self) -> Vec<(Duration, Recorded)> {
        self.events.lock().iter().copied().collect()
    }

    fn record(&self, event: Recorded) {
        let now = self.began.elapsed();
        let mut events = self.events.lock();
        if events.len() == LAST {
            events.pop_front();
        }
        events.push_back((now, event));
    }
}

impl MmuNotifier for Recorder {
    fn release(&self) {
        self.record(Recorded::Release);
    }
    fn change_pte(&self, hva: Hva, pte: Pte) {
        self.record(Recorded::ChangePte(hva, pte));
    }
    fn invalidate_page(&self, hva: Hva) {
        self.record(Recorded::InvalidatePage(hva));
    }
    fn invalidate_range_start(&self, invalidation: &Invalidation) -> Result<(), WouldBlock> {
        self.record(Recorded::Start(*invalidation));
        Ok(())
    }
    fn invalidate_range_end(&self, invalidation: &Invalidation) {
        self.record(Recorded::End(*invalidation));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_events_are_kept_in_order() {
        let recorder = Recorder::default();
        (0..LAST as u64 + 3).for_each(|n| recorder.invalidate_page(Hva(n << 12)));
        let events = recorder.events();
        assert_eq!(events.len(), LAST);
        assert_eq!(events[0].1, Recorded::InvalidatePage(Hva(3 << 12)));
        assert!(events.windows(2).all(|pair| pair[0].0 <= pair[1].0));
    }
}
