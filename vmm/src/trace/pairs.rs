// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which end belongs to which start.
//!
//! A thread ends its pairs in the opposite order of their starts, so an end belongs to the newest start of its thread that says
//! the same: the open pairs of one thread are a stack. A start above that one never got its end: the listener was taken off the
//! list meanwhile, and put back. It is handed out without a duration, as is the oldest of more than [`DEEPEST`] of a thread, so
//! that what is kept has a bound. The stacks of all threads lie in one vector: few pairs are open at a time, and a listener that
//! is always there must not allocate for each.

use super::event::{Op, TraceEvent, guest_thread, now};
use shadow_mmu::notifier::Invalidation;
use std::thread::ThreadId;
use std::time::Duration;

/// Pairs that one thread may have open. The primary MMU nests two.
pub const DEEPEST: usize = 16;

#[derive(Debug)]
struct Open {
    thread: ThreadId,
    at: Duration,
    tid: Option<i32>,
    invalidation: Invalidation,
}

impl Open {
    fn event(&self, took: Option<Duration>) -> TraceEvent {
        TraceEvent { at: self.at, tid: self.tid, op: Op::Invalidate(self.invalidation), took }
    }
}

/// The pairs that are open now.
#[derive(Debug, Default)]
pub struct Pairs {
    /// Of each thread in the order of their starts, the newest last.
    open: Vec<Open>,
}

impl Pairs {
    /// This thread opens a pair. Returns one that will never end, if there is.
    pub fn start(&mut self, invalidation: &Invalidation) -> Option<TraceEvent> {
        let thread = std::thread::current().id();
        let mut own = (0..self.open.len()).filter(|&at| self.open[at].thread == thread);
        let oldest = own.next().filter(|_| own.count() + 1 >= DEEPEST);
        let never_ended = oldest.map(|oldest| self.open.remove(oldest).event(None));
        self.open.push(Open { thread, at: now(), tid: guest_thread(), invalidation: *invalidation });
        never_ended
    }

    /// This thread closes a pair. Calls `emit` with those that will never end, newest first, then with this one. Without a
    /// start, which a listener that is told everything does not see, there is nothing to say.
    pub fn end(&mut self, invalidation: &Invalidation, emit: &mut impl FnMut(TraceEvent)) {
        let now = now();
        let thread = std::thread::current().id();
        let is_it = |open: &Open| open.thread == thread && open.invalidation == *invalidation;
        let Some(start) = self.open.iter().rposition(is_it) else { return };
        for above in (start + 1..self.open.len()).rev() {
            if self.open[above].thread == thread {
                emit(self.open.remove(above).event(None));
            }
        }
        let open = self.open.remove(start);
        emit(open.event(Some(now.saturating_sub(open.at))));
    }

    /// Those that are open now, by the time of their start.
    pub fn open(&self) -> Vec<TraceEvent> {
        let mut open: Vec<_> = self.open.iter().map(|open| open.event(None)).collect();
        open.sort_by_key(|event| event.at);
        open
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shadow_mmu::addr::{Hva, HvaRange};
    use shadow_mmu::notifier::{Blockable, Event};

    fn pair(pages: u64) -> Invalidation {
        let range = HvaRange::pages_from(Hva(0x10_0000), pages);
        Invalidation { range, event: Event::Clear, blockable: Blockable::Yes }
    }

    fn ended(pairs: &mut Pairs, invalidation: &Invalidation) -> Vec<(u64, bool)> {
        let mut events = Vec::new();
        pairs.end(invalidation, &mut |event| {
            events.push((event.op.range().unwrap().page_count(), event.took.is_some()));
        });
        events
    }

    #[test]
    fn nested_pairs_end_inside_out_also_with_equal_ranges() {
        let mut pairs = Pairs::default();
        for pages in [2, 1, 1] {
            assert_eq!(pairs.start(&pair(pages)), None);
        }
        assert_eq!(ended(&mut pairs, &pair(1)), [(1, true)]);
        assert_eq!(pairs.open().len(), 2);
        assert_eq!(ended(&mut pairs, &pair(1)), [(1, true)]);
        assert_eq!(ended(&mut pairs, &pair(2)), [(2, true)]);
        assert!(pairs.open.is_empty(), "what ended leaves nothing behind");
    }

    #[test]
    fn the_outer_pair_takes_longer_than_the_inner() {
        let mut pairs = Pairs::default();
        let mut took = Vec::new();
        pairs.start(&pair(2));
        pairs.start(&pair(1));
        pairs.end(&pair(1), &mut |event| took.push(event));
        pairs.end(&pair(2), &mut |event| took.push(event));
        assert!(took[1].at <= took[0].at && took[1].took.unwrap() >= took[0].took.unwrap(), "{took:?}");
    }

    #[test]
    fn each_thread_has_its_own_stack() {
        let mut pairs = Pairs::default();
        pairs.start(&pair(1));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                assert!(ended(&mut pairs, &pair(1)).is_empty(), "another thread's pair");
                pairs.start(&pair(2));
            });
        });
        assert_eq!(ended(&mut pairs, &pair(1)), [(1, true)], "not what the other thread opened since");
        assert_eq!(pairs.open().len(), 1);
    }

    #[test]
    fn a_pair_that_never_ended_is_told_when_the_one_around_it_ends() {
        let mut pairs = Pairs::default();
        pairs.start(&pair(3));
        pairs.start(&pair(2));
        pairs.start(&pair(1));
        assert_eq!(ended(&mut pairs, &pair(3)), [(1, false), (2, false), (3, true)]);
    }

    #[test]
    fn pairs_that_never_end_do_not_pile_up() {
        let mut pairs = Pairs::default();
        let told = (1..=100).filter_map(|pages| pairs.start(&pair(pages))).count();
        assert_eq!((told, pairs.open().len()), (100 - DEEPEST, DEEPEST));
        assert!(ended(&mut pairs, &pair(1)).is_empty(), "it was given up");
        assert_eq!(ended(&mut pairs, &pair(100)), [(100, true)]);
    }
}
