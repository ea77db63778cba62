// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Interval notifiers: a subscription to one range, with collision and retry built in (`mmu_interval_notifier`, since 5.5).
//!
//! A driver that maps a range into a device asks [`read_begin`](IntervalSubscription::read_begin), looks up the pages without
//! its lock, takes its lock, and asks [`read_retry`](IntervalSubscription::read_retry): if that says yes the pages may be gone,
//! and it begins again; if not it maps them, still under its lock. Its callback takes the same lock, calls
//! [`Collision::set_seq`], and unmaps.
//!
//! # Protocol
//! One sequence for the address space, in `State`, is even while no subscribed range is being invalidated and odd while one
//! is; each subscription has the sequence of its last collision. Equal and odd means "colliding now": `read_begin` sleeps until
//! the invalidation is over. A callback sets the subscription's sequence under the driver's lock, so whoever holds that lock
//! and finds the sequence that it began with can map: a later callback will see the mapping.
//!
//! The set of subscriptions changes only while no subscribed range is being invalidated: callbacks run without the lock of
//! `State`, and the end must find what the start found. Changes that come meanwhile wait in `deferred`. A subscription that is
//! made while any pair is open is taken to collide with it (R32).
//!
//! Locks: `State` is a leaf, and never held over a callback. `read_begin` and removal sleep until ends of pairs; they may not be
//! called with a lock that an invalidation needs, nor from a callback.

use super::{Blockable, Event, Invalidation, Misuse, WouldBlock};
use crate::addr::{Hva, HvaRange, TASK_SIZE};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Arc, Condvar, Mutex};
use std::fmt::Debug;

/// What a subscriber is told.
pub trait IntervalNotifier: Debug + Send + Sync {
    /// Part of the interval is about to change. Takes the lock that [`IntervalSubscription::read_retry`] is called under, calls
    /// [`Collision::set_seq`], and drops every translation of the range.
    ///
    /// # Errors
    /// [`WouldBlock`], only where the range is [`Blockable::No`]; then `set_seq` need not have been called.
    fn invalidate(&self, invalidation: &Invalidation, collision: Collision<'_>) -> Result<(), WouldBlock>;
}

/// The collision that a callback has to make known (`mmu_interval_set_seq`).
#[derive(Debug)]
#[must_use = "readers that began before would not learn that their pages are gone"]
pub struct Collision<'a> {
    node: &'a Node,
    seq: u64,
}

impl Collision<'_> {
    /// From here on readers that began before must retry. The caller holds the lock that `read_retry` is called under.
    pub fn set_seq(self) {
        self.node.seq.store(self.seq, Ordering::Release);
    }
}

/// Where a reader began.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IntervalSeq(u64);

#[derive(Debug)]
struct Node {
    range: HvaRange,
    /// The sequence of its last collision.
    seq: AtomicU64,
    notifier: Arc<dyn IntervalNotifier>,
}

impl Node {
    fn overlaps(&self, range: HvaRange) -> bool {
        !self.range.intersect(range).is_empty()
    }
}

#[derive(Debug)]
enum Change {
    Insert(Arc<Node>),
    Remove(Arc<Node>),
}

#[derive(Debug)]
struct State {
    /// Odd while a subscribed range is being invalidated. Starts at 2, so that no reader's first sequence is below 0.
    seq: u64,
    /// Pairs that are open, of any range.
    active: usize,
    /// Few, and walked once a pair: a vector, not a tree.
    nodes: Vec<Arc<Node>>,
    deferred: Vec<Change>,
    /// The address space is gone: nobody will be told anything any more, so nobody may begin to look up.
    released: bool,
}

impl State {
    fn is_invalidating(&self) -> bool {
        self.seq % 2 == 1
    }
}

/// The interval subscriptions of an address space.
#[derive(Debug)]
pub(crate) struct Intervals {
    state: Mutex<State>,
    over: Condvar,
}

impl Default for Intervals {
    fn default() -> Self {
        let state = State { seq: 2, active: 0, nodes: Vec::new(), deferred: Vec::new(), released: false };
        Self { state: Mutex::new(state), over: Condvar::new() }
    }
}

impl Intervals {
    /// `mn_itree_invalidate`: opens a pair and calls everybody whose range it hits.
    pub(super) fn start(&self, invalidation: &Invalidation) -> Result<(), WouldBlock> {
        let (hit, seq) = {
            let mut state = self.state.lock();
            state.active += 1;
            let hit: Vec<_> =
                state.nodes.iter().filter(|node| node.overlaps(invalidation.range)).cloned().collect();
            if !hit.is_empty() {
                state.seq |= 1;
            }
            (hit, state.seq)
        };
        let mut result = Ok(());
        for node in hit {
            let refused = node.notifier.invalidate(invalidation, Collision { node: &node, seq }).is_err();
            match invalidation.blockable {
                Blockable::Yes if refused => log::error!("{node:?} refused a blockable invalidation"),
                Blockable::No if refused => {
                    result = Err(WouldBlock);
                    break;
                }
                _ => {}
            }
        }
        if result.is_err() {
            self.end();
        }
        result
    }

    /// `mn_itree_inv_end`: closes a pair; the last one applies what was deferred and wakes who waits.
    pub(super) fn end(&self) {
        let mut state = self.state.lock();
        state.active -= 1;
        if state.active > 0 || !state.is_invalidating() {
            return;
        }
        state.seq += 1;
        for change in std::mem::take(&mut state.deferred) {
            match change {
                Change::Insert(node) => state.nodes.push(node),
                Change::Remove(node) => state.nodes.retain(|other| !Arc::ptr_eq(other, &node)),
            }
        }
        self.over.notify_all();
    }

    /// `mn_itree_release`: the address space goes.
    pub(super) fn release(&self) {
        self.state.lock().released = true;
        let range = HvaRange { start: Hva(0), end: Hva(TASK_SIZE) };
        let everything = Invalidation { range, event: Event::Release, blockable: Blockable::Yes };
        if self.start(&everything).is_ok() {
            self.end();
        }
    }

    /// `mmu_interval_notifier_insert`.
    pub(crate) fn insert(
        self: &Arc<Self>,
        range: HvaRange,
        notifier: Arc<dyn IntervalNotifier>,
    ) -> Result<IntervalSubscription, Misuse> {
        let mut state = self.state.lock();
        if state.released {
            return Err(Misuse::Released);
        }
        let node = Arc::new(Node { range, seq: AtomicU64::new(0), notifier });
        if state.active == 0 {
            node.seq.store(state.seq - 1, Ordering::Relaxed);
            state.nodes.push(Arc::clone(&node));
        } else {
            // Whether the open pairs hit the range is not known any more: assume it.
            if state.is_invalidating() {
                state.deferred.push(Change::Insert(Arc::clone(&node)));
            } else {
                state.seq |= 1;
                state.nodes.push(Arc::clone(&node));
            }
            node.seq.store(state.seq, Ordering::Relaxed);
        }
        drop(state);
        Ok(IntervalSubscription { intervals: Arc::clone(self), node })
    }

    /// `mmu_interval_notifier_remove`.
    fn remove(&self, node: &Arc<Node>) {
        let mut state = self.state.lock();
        if !state.is_invalidating() {
            state.nodes.retain(|other| !Arc::ptr_eq(other, node));
            return;
        }
        let inserting = |change: &Change| matches!(change, Change::Insert(other) if Arc::ptr_eq(other, node));
        match state.deferred.iter().position(inserting) {
            Some(at) => {
                state.deferred.swap_remove(at);
            }
            None => {
                state.deferred.push(Change::Remove(Arc::clone(node)));
                // A callback of it may be running.
                let seq = state.seq;
                while state.seq == seq {
                    state = self.over.wait(state);
                }
            }
        }
    }
}

/// A subscription to an interval. Dropping it ends it: on return no callback runs or will run. Not to be dropped inside a
/// callback: that would wait for itself.
#[derive(Debug)]
#[must_use = "the subscription ends when this is dropped"]
pub struct IntervalSubscription {
    intervals: Arc<Intervals>,
    node: Arc<Node>,
}

impl IntervalSubscription {
    /// The interval.
    pub fn range(&self) -> HvaRange {
        self.node.range
    }

    /// Begins a look-up (`mmu_interval_read_begin`). Sleeps while the interval is being invalidated.
    ///
    /// # Errors
    /// [`Misuse::Released`]: the address space is gone. (The kernel's caller has to know.)
    pub fn read_begin(&self) -> Result<IntervalSeq, Misuse> {
        let mut state = self.intervals.state.lock();
        let seq = self.node.seq.load(Ordering::Acquire);
        // Colliding with an invalidation that is still on: wait for its end. Later ones are read_retry's business.
        while state.seq == seq {
            state = self.intervals.over.wait(state);
        }
        if state.released { Err(Misuse::Released) } else { Ok(IntervalSeq(seq)) }
    }

    /// Whether what was looked up since `begun` may be gone (`mmu_interval_read_retry`). The caller holds the lock that its
    /// callback takes.
    #[must_use]
    pub fn read_retry(&self, begun: IntervalSeq) -> bool {
        self.node.seq.load(Ordering::Acquire) != begun.0
    }
}

impl Drop for IntervalSubscription {
    fn drop(&mut self) {
        self.intervals.remove(&self.node);
    }
}
