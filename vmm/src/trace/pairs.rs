// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which end belongs to which start.
//!
//! An end belongs to the newest start of its thread that says the same. The order in which a thread ends its pairs is its own
//! affair: a pair that was opened later and is still open says nothing else, and stays open. A start may never get its end, where
//! the listener is taken off the list meanwhile and put back: it stays among the open pairs, and is handed out without a
//! duration when its thread has more than [`DEEPEST`], so that what is kept has a bound. The pairs of all threads lie in one
//! vector: few are open at a time, and a listener that is always there must not allocate for each.

use super::event::{Op, TraceEvent, guest_thread, now};
use shadow_mmu::notifier::Invalidation;
use std::thread::ThreadId;
use std::time::Duration;

/// Pairs of one thread that are remembered as open. No rule of the notifier layer says how many there may be; this is far more
/// than the primary MMU opens at a time.
pub const DEEPEST: usize = 256;

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
    /// This thread opens a pair. Returns its oldest one if they are too many: that will hardly end.
    pub fn start(&mut self, invalidation: &Invalidation) -> Option<TraceEvent> {
        let thread = std::thread::current().id();
        let mut own = (0..self.open.len()).filter(|&at| self.open[at].thread == thread);
        let oldest = own.next().filter(|_| own.count() + 1 >= DEEPEST);
        let never_ended = oldest.map(|oldest| self.open.remove(oldest).event(None));
        self.open.push(Open { thread, at: now(), tid: guest_thread(), invalidation: *invalidation });
        never_ended
    }

    /// This thread closes a pair, which is returned. `None` without a start, which a listener that is told everything does not
    /// see: there is nothing to say.
    pub fn end(&mut self, invalidation: &Invalidation) -> Option<TraceEvent> {
        let now = now();
        let thread = std::thread::current().id();
        let is_it = |open: &Open| open.thread == thread && open.invalidation == *invalidation;
        let open = self.open.remove(self.open.iter().rposition(is_it)?);
        Some(open.event(Some(now.saturating_sub(open.at))))
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

    /// The pages of the pair that ended.
    fn ended(pairs: &mut Pairs, invalidation: &Invalidation) -> Option<u64> {
        let event = pairs.end(invalidation)?;
        assert!(event.took.is_some(), "{event}");
        Some(event.op.range().unwrap().page_count())
    }

    fn open(pairs: &Pairs) -> Vec<u64> {
        pairs.open().iter().map(|event| event.op.range().unwrap().page_count()).collect()
    }

    #[test]
    fn nested_pairs_end_inside_out_also_with_equal_ranges() {
        let mut pairs = Pairs::default();
        for pages in [2, 1, 1] {
            assert_eq!(pairs.start(&pair(pages)), None);
        }
        assert_eq!(ended(&mut pairs, &pair(1)), Some(1));
        assert_eq!(open(&pairs), [2, 1]);
        assert_eq!(ended(&mut pairs, &pair(1)), Some(1));
        assert_eq!(ended(&mut pairs, &pair(2)), Some(2));
        assert!(pairs.open.is_empty(), "what ended leaves nothing behind");
    }

    #[test]
    fn the_outer_pair_takes_longer_than_the_inner() {
        let mut pairs = Pairs::default();
        pairs.start(&pair(2));
        pairs.start(&pair(1));
        let [inner, outer] = [1, 2].map(|pages| pairs.end(&pair(pages)).unwrap());
        assert!(outer.at <= inner.at && outer.took.unwrap() >= inner.took.unwrap(), "{outer:?} {inner:?}");
    }

    #[test]
    fn each_thread_has_its_own_stack() {
        let mut pairs = Pairs::default();
        pairs.start(&pair(1));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                assert_eq!(ended(&mut pairs, &pair(1)), None, "another thread's pair");
                pairs.start(&pair(2));
            });
        });
        assert_eq!(ended(&mut pairs, &pair(1)), Some(1), "not what the other thread opened since");
        assert_eq!(open(&pairs), [2]);
    }

    #[test]
    fn pairs_that_end_in_the_order_of_their_starts_end_all_the_same() {
        let mut pairs = Pairs::default();
        for pages in [3, 2, 1] {
            assert_eq!(pairs.start(&pair(pages)), None);
        }
        assert_eq!(ended(&mut pairs, &pair(3)), Some(3));
        assert_eq!(open(&pairs), [2, 1], "they go on");
        assert_eq!(ended(&mut pairs, &pair(2)), Some(2));
        assert_eq!(ended(&mut pairs, &pair(1)), Some(1));
        assert!(pairs.open.is_empty(), "what ended leaves nothing behind");
    }

    #[test]
    fn a_hundred_pairs_of_one_thread_are_not_too_many() {
        let mut pairs = Pairs::default();
        assert_eq!((1..=100).find_map(|pages| pairs.start(&pair(pages))), None);
        assert!((1..=100).rev().all(|pages| ended(&mut pairs, &pair(pages)) == Some(pages)));
    }

    #[test]
    fn pairs_that_never_end_do_not_pile_up() {
        let mut pairs = Pairs::default();
        let told: Vec<_> = (1..=1000).filter_map(|pages| pairs.start(&pair(pages))).collect();
        assert_eq!((told.len(), pairs.open().len()), (1000 - DEEPEST, DEEPEST));
        assert!(told.iter().all(|event| event.took.is_none()), "{told:?}");
        assert_eq!(ended(&mut pairs, &pair(1)), None, "it was given up");
        assert_eq!(ended(&mut pairs, &pair(1000)), Some(1000));
    }
}
