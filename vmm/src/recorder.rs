// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A listener that remembers the last notifier events of an address space, for the report on a guest that died.

use crate::trace::{Observe, Op, Pairs, TraceEvent, start_clock};
use shadow_mmu::notifier::Invalidation;
use shadow_mmu::sync::Mutex;
use std::collections::VecDeque;

/// Events remembered.
const LAST: usize = 16;

/// The last events: pairs, changes of ptes, the end. Not those of aging, which would leave no room for the others.
#[derive(Debug)]
pub struct Recorder {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    pairs: Pairs,
    /// In the order in which they ended.
    last: VecDeque<TraceEvent>,
}

/// Adds the newest, and forgets the oldest of too many.
fn record(last: &mut VecDeque<TraceEvent>, event: TraceEvent) {
    if last.len() == LAST {
        last.pop_front();
    }
    last.push_back(event);
}

impl Default for Recorder {
    fn default() -> Self {
        start_clock();
        Self { state: Mutex::new(State { pairs: Pairs::default(), last: VecDeque::with_capacity(LAST) }) }
    }
}

impl Recorder {
    /// The last events and the pairs that are open now, by the time at which they began.
    pub fn events(&self) -> Vec<TraceEvent> {
        let state = self.state.lock();
        let mut events: Vec<_> = state.last.iter().copied().chain(state.pairs.open()).collect();
        events.sort_by_key(|event| event.at);
        events
    }
}

impl Observe for Recorder {
    fn start(&self, invalidation: &Invalidation) {
        let State { pairs, last } = &mut *self.state.lock();
        if let Some(never_ended) = pairs.start(invalidation) {
            record(last, never_ended);
        }
    }

    fn end(&self, invalidation: &Invalidation) {
        let State { pairs, last } = &mut *self.state.lock();
        if let Some(event) = pairs.end(invalidation) {
            record(last, event);
        }
    }

    fn op(&self, op: Op) {
        if matches!(op, Op::ChangePte(..) | Op::InvalidatePage(_) | Op::Release) {
            record(&mut self.state.lock().last, TraceEvent::now(op));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shadow_mmu::addr::{Hva, HvaRange};
    use shadow_mmu::notifier::{Blockable, Event};

    #[test]
    fn only_the_last_events_are_kept_in_order() {
        let recorder = Recorder::default();
        (0..LAST as u64 + 3).for_each(|n| recorder.op(Op::InvalidatePage(Hva(n << 12))));
        let events = recorder.events();
        assert_eq!(events.len(), LAST);
        assert_eq!(events[0].op, Op::InvalidatePage(Hva(3 << 12)));
        assert!(events.windows(2).all(|pair| pair[0].at <= pair[1].at));
    }

    #[test]
    fn a_pair_is_one_event_and_an_open_one_is_told_too() {
        let recorder = Recorder::default();
        let pair = |pages| Invalidation {
            range: HvaRange::pages_from(Hva(0x1000), pages),
            event: Event::Unmap,
            blockable: Blockable::Yes,
        };
        recorder.start(&pair(2));
        recorder.start(&pair(1));
        recorder.op(Op::ClearYoung(pair(1).range));
        recorder.end(&pair(1));
        let events: Vec<_> = recorder.events().iter().map(|event| (event.op, event.took.is_some())).collect();
        assert_eq!(events, [(Op::Invalidate(pair(2)), false), (Op::Invalidate(pair(1)), true)]);
    }
}
