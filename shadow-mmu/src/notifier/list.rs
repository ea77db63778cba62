// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The listeners of one address space, and the pair as a guard.
//!
//! # Protocol
//! The listeners are an immutable value behind an atomic pointer, null while there are none. Ops walk the value that they
//! loaded inside a read section of [`srcu`](super::srcu); additions and removals publish a changed copy under `writers`, and
//! leave the old one to a callback behind its readers. So an op with nobody to call is one load, and an op with somebody adds
//! a few stores to memory of its own thread.
//!
//! A pair is one read section from its start to its end, and both walk the same value: who heard the start hears the end, and
//! `unregister` waits for pairs that are open. (In the kernel each op is a section of its own; a listener that leaves in
//! between keeps a count too many, and KVM puts it right by hand.) A pair stays on its thread.
//!
//! Additions happen with the mmap lock held for writing, hence while no pair is open: nobody misses an end that counts, nor
//! hears one whose start came before (I9), and a null seen outside of a section is still null when the caller goes on.

use super::interval::Intervals;
use super::srcu::{Section, Srcu};
use super::{Blockable, Event, Invalidation, Misuse, MmuNotifier, WouldBlock, WrittenPages, YoungPages};
use crate::addr::{Hva, HvaRange};
use crate::mm::Pte;
use crate::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use crate::sync::{Arc, Mutex};
use std::any::{Any, TypeId};
use std::collections::HashMap;
use std::ptr;

/// Everybody who is told.
#[derive(Debug, Clone, Default)]
struct Listeners {
    /// Newest first.
    list: Vec<Arc<dyn MmuNotifier>>,
    /// Whether an interval was ever subscribed to (`has_itree`).
    intervals: bool,
    /// Whether some listener wants `invalidate_range`.
    walkers: bool,
}

/// A listener's place in the list, from registration to unregistration.
#[derive(Debug, Clone)]
pub struct Subscription {
    listener: Arc<dyn MmuNotifier>,
}

/// A listener that is shared by its users, and how many they are ([`get`](super::get)).
#[derive(Debug)]
pub(super) struct SharedListener {
    pub(super) listener: Arc<dyn Any + Send + Sync>,
    pub(super) subscription: Subscription,
    pub(super) users: usize,
}

/// The listeners of one address space (`mmu_notifier_mm`, later `mmu_notifier_subscriptions`).
#[derive(Debug)]
pub struct Notifiers {
    /// Null, or made by `Box::into_raw`.
    listeners: AtomicPtr<Listeners>,
    writers: Mutex<()>,
    released: AtomicBool,
    intervals: Arc<Intervals>,
    pub(super) shared: Mutex<HashMap<TypeId, SharedListener>>,
    srcu: Srcu,
}

impl Default for Notifiers {
    fn default() -> Self {
        Self::new()
    }
}

impl Notifiers {
    /// Nobody listens (`mmu_notifier_mm_init`).
    pub fn new() -> Self {
        Self {
            listeners: AtomicPtr::new(ptr::null_mut()),
            writers: Mutex::new(()),
            released: AtomicBool::new(false),
            intervals: Arc::default(),
            shared: Mutex::default(),
            srcu: Srcu::new(),
        }
    }

    /// Whether this thread is in an op or a pair of this address space: then it must not wait for either to end.
    pub fn inside(&self) -> bool {
        self.srcu.inside_read_section()
    }

    /// Whether anybody may be listening (`mm_has_notifiers`).
    #[inline]
    pub fn has_listeners(&self) -> bool {
        !self.listeners.load(Ordering::Acquire).is_null()
    }

    /// Adds `listener` in front of the others. The caller holds the mmap lock for writing (`__mmu_notifier_register`).
    ///
    /// # Errors
    /// [`Misuse::Released`].
    pub(crate) fn register_locked(&self, listener: Arc<dyn MmuNotifier>) -> Result<Subscription, Misuse> {
        let subscription = Subscription { listener: Arc::clone(&listener) };
        self.add(|listeners| listeners.list.insert(0, listener))?;
        Ok(subscription)
    }

    /// The intervals of this space, if they are told of pairs.
    pub(crate) fn intervals(&self) -> Option<&Arc<Intervals>> {
        self.walk().is_some_and(|walk| walk.listeners.intervals).then_some(&self.intervals)
    }

    /// The intervals of this space, from now on told of every pair. The caller holds the mmap lock for writing.
    ///
    /// # Errors
    /// [`Misuse::Released`].
    pub(crate) fn intervals_locked(&self) -> Result<&Arc<Intervals>, Misuse> {
        self.add(|listeners| listeners.intervals = true)?;
        Ok(&self.intervals)
    }

    fn add(&self, change: impl FnOnce(&mut Listeners)) -> Result<(), Misuse> {
        let _writer = self.writers.lock();
        if self.released.load(Ordering::Acquire) {
            return Err(Misuse::Released);
        }
        self.publish(change);
        Ok(())
    }

    /// Calls the listener's `release`, takes it off the list, and returns when none of its ops runs or can run (I7).
    ///
    /// # Errors
    /// [`Misuse`]; the list is as before.
    pub fn unregister(&self, subscription: &Subscription) -> Result<(), Misuse> {
        if self.inside() {
            return Err(Misuse::InsideCallback);
        }
        // As in the kernel, the release at the end of the address space may be calling it too; release allows for that. And
        // inside a read section like every op: the end of the address space must wait for this call before it frees what
        // the call may still use (R18).
        if let Some(walk) = self.walk()
            && walk.listeners.list.iter().any(|one| Arc::ptr_eq(one, &subscription.listener))
        {
            subscription.listener.release();
        }
        let removed = self.remove(subscription);
        // Also when it was already gone: then somebody else's walk may still be in one of its ops.
        self.srcu.synchronize();
        // Old lists hold it too. When they are freed, nothing of the layer refers to it any more.
        self.srcu.barrier();
        removed
    }

    /// Takes the listener off the list and returns at once; its ops may still run. Allowed inside an op. What the listener
    /// needs must live on until [`call_srcu`](Self::call_srcu) says so.
    ///
    /// # Errors
    /// [`Misuse::NotRegistered`].
    pub fn unregister_no_release(&self, subscription: &Subscription) -> Result<(), Misuse> {
        self.remove(subscription)
    }

    /// Calls `callback` when every op that runs now has returned.
    pub fn call_srcu(&self, callback: impl FnOnce() + Send + 'static) {
        self.srcu.call(callback);
    }

    /// Returns when every callback of [`call_srcu`](Self::call_srcu) has run, and nothing else (`mmu_notifier_synchronize`).
    ///
    /// # Errors
    /// [`Misuse::InsideCallback`]: in such a callback, or in an op that the callbacks wait for.
    pub fn synchronize(&self) -> Result<(), Misuse> {
        if self.inside() || self.srcu.inside_callback() {
            return Err(Misuse::InsideCallback);
        }
        self.srcu.barrier();
        Ok(())
    }

    /// The address space goes: every listener's `release`, then the list is empty for good. Returns when no op runs
    /// (`__mmu_notifier_release`).
    ///
    /// # Errors
    /// [`Misuse::InsideCallback`]; nothing is done.
    pub fn release(&self) -> Result<(), Misuse> {
        if self.inside() {
            return Err(Misuse::InsideCallback);
        }
        {
            // Before anybody is called: who registers from now on is refused, and so nobody is left out.
            let _writer = self.writers.lock();
            self.released.store(true, Ordering::Release);
        }
        {
            let _op = self.srcu.enter();
            self.intervals.release();
            let walk = self.walk();
            all(&walk).for_each(|listener| listener.release());
        }
        {
            let _writer = self.writers.lock();
            self.publish(|listeners| *listeners = Listeners::default());
        }
        // Their users hold them; nobody else finds them any more.
        let shared = std::mem::take(&mut *self.shared.lock());
        self.srcu.synchronize();
        drop(shared);
        Ok(())
    }

    /// The end of the layer's own state (`mmu_notifier_mm_destroy`), also done by dropping it.
    ///
    /// # Errors
    /// [`Misuse::StillListening`]: listeners are left, where the kernel stops. They are taken off.
    pub fn destroy(&mut self) -> Result<(), Misuse> {
        let left = self.walk().map_or(0, |walk| walk.listeners.list.len());
        {
            let _writer = self.writers.lock();
            self.publish(|listeners| *listeners = Listeners::default());
        }
        self.srcu.barrier();
        if left == 0 { Ok(()) } else { Err(Misuse::StillListening(left)) }
    }

    /// Opens a pair over `range` (`mmu_notifier_invalidate_range_start`). The returned guard is its end.
    #[inline]
    pub fn invalidate(&self, range: HvaRange, event: Event) -> InvalidateGuard<'_> {
        let walk = self.walk();
        if let Some(walk) = &walk {
            walk.start(&Invalidation { range, event, blockable: Blockable::Yes });
        }
        InvalidateGuard { range, event, blockable: Blockable::Yes, walk }
    }

    /// As [`invalidate`](Self::invalidate), without sleeping.
    ///
    /// # Errors
    /// [`WouldBlock`]: no pair is open, listeners that had agreed got their end (I10), and nothing of the range may be
    /// changed.
    pub fn invalidate_nonblock(
        &self,
        range: HvaRange,
        event: Event,
    ) -> Result<InvalidateGuard<'_>, WouldBlock> {
        let walk = self.walk();
        if let Some(walk) = &walk {
            walk.try_start(&Invalidation { range, event, blockable: Blockable::No })?;
        }
        Ok(InvalidateGuard { range, event, blockable: Blockable::No, walk })
    }

    /// Every listener's `clear_flush_young`, OR-ed; all are asked (I12).
    pub fn clear_flush_young(&self, range: HvaRange) -> bool {
        let walk = self.walk();
        all(&walk).fold(false, |young, listener| listener.clear_flush_young(range) | young)
    }

    /// Every listener's `clear_young`, OR-ed; all are asked (I12).
    pub fn clear_young(&self, range: HvaRange) -> bool {
        let walk = self.walk();
        all(&walk).fold(false, |young, listener| listener.clear_young(range) | young)
    }

    /// Every listener's `test_clear_young`: `young` is what any of them found.
    pub fn test_clear_young(&self, young: &mut YoungPages) {
        let walk = self.walk();
        all(&walk).for_each(|listener| listener.test_clear_young(young));
    }

    /// Every listener's `test_clear_dirty`: `pages` is what any of them found.
    pub fn test_clear_dirty(&self, pages: &mut WrittenPages) {
        let walk = self.walk();
        all(&walk).for_each(|listener| listener.test_clear_dirty(pages));
    }

    /// Every listener's `written`.
    pub fn written(&self, range: HvaRange) {
        let walk = self.walk();
        all(&walk).for_each(|listener| listener.written(range));
    }

    /// Whether some listener's `test_young` says so; the first that does ends the question.
    pub fn test_young(&self, hva: Hva) -> bool {
        let walk = self.walk();
        all(&walk).any(|listener| listener.test_young(hva))
    }

    /// Every listener's `change_pte`. The caller stores `pte` afterwards, not before (R8).
    pub fn change_pte(&self, hva: Hva, pte: Pte) {
        let walk = self.walk();
        all(&walk).for_each(|listener| listener.change_pte(hva, pte));
    }

    /// Every listener's `invalidate_page`.
    pub fn invalidate_page(&self, hva: Hva) {
        let walk = self.walk();
        all(&walk).for_each(|listener| listener.invalidate_page(hva));
    }

    /// Every listener's `invalidate_range`.
    pub fn invalidate_range(&self, range: HvaRange) {
        let walk = self.walk();
        if walk.as_ref().is_some_and(|walk| walk.listeners.walkers) {
            all(&walk).for_each(|listener| listener.invalidate_range(range));
        }
    }

    /// The listeners, inside a read section; `None` while there are none.
    #[inline]
    fn walk(&self) -> Option<Walk<'_>> {
        if !self.has_listeners() {
            return None;
        }
        let section = self.srcu.enter();
        let listeners = self.listeners.load(Ordering::Acquire);
        // SAFETY: null or from `Box::into_raw`; and a value that was replaced is freed only when every read section that may
        // have loaded it has ended (`publish`). Ours goes together with the reference, which does not leave `Walk`.
        let listeners = unsafe { listeners.as_ref() }?;
        Some(Walk { listeners, intervals: &self.intervals, _section: section })
    }

    fn remove(&self, subscription: &Subscription) -> Result<(), Misuse> {
        let _writer = self.writers.lock();
        let mut found = false;
        self.publish(|listeners| {
            listeners.list.retain(|one| {
                let is_it = Arc::ptr_eq(one, &subscription.listener);
                found |= is_it;
                !is_it
            });
        });
        found.then_some(()).ok_or(Misuse::NotRegistered)
    }

    /// Publishes a changed copy and leaves the old one to a callback behind its readers. The caller holds `writers`.
    fn publish(&self, change: impl FnOnce(&mut Listeners)) {
        let old = self.listeners.load(Ordering::Acquire);
        // SAFETY: null or from `Box::into_raw`; only a holder of `writers` replaces it, and that is the caller.
        let mut new = unsafe { old.as_ref() }.cloned().unwrap_or_default();
        change(&mut new);
        new.walkers = new.list.iter().any(|listener| listener.walks_primary_tables());
        let new = if new.list.is_empty() && !new.intervals {
            ptr::null_mut()
        } else {
            Box::into_raw(Box::new(new))
        };
        self.listeners.store(new, Ordering::Release);
        if !old.is_null() {
            let old = Retired(old);
            self.srcu.call(move || old.free());
        }
    }
}

impl Drop for Notifiers {
    fn drop(&mut self) {
        if let Err(misuse) = self.destroy() {
            log::error!("{misuse}");
        }
    }
}

/// Listeners that were replaced, and that readers may still see. Not a box yet, which would be the only reference to them.
struct Retired(*mut Listeners);

// SAFETY: what it points at is `Send`, and whoever has this is the only one to free it.
unsafe impl Send for Retired {}

impl Retired {
    /// Frees them. The readers that may have seen them have ended.
    fn free(self) {
        // SAFETY: `publish` took it, which came from `Box::into_raw`, out of the only place that held it.
        drop(unsafe { Box::from_raw(self.0) });
    }
}

/// The listeners as one op sees them, from here until it is dropped.
#[derive(Debug)]
struct Walk<'a> {
    listeners: &'a Listeners,
    intervals: &'a Intervals,
    /// What keeps `listeners` alive.
    _section: Section<'a>,
}

/// Newest first.
#[inline]
fn all<'a>(walk: &'a Option<Walk<'_>>) -> impl Iterator<Item = &'a Arc<dyn MmuNotifier>> {
    walk.iter().flat_map(|walk| &walk.listeners.list)
}

/// A range that may block cannot fail. A listener that says so breaks its contract, and has done its zap or not: either way
/// the pair goes on, as in the kernel (WARN).
#[cold]
fn refused(who: &dyn std::fmt::Debug, invalidation: &Invalidation) {
    log::error!("{who:?} refused a blockable invalidation of {}", invalidation.range);
}

impl Walk<'_> {
    #[inline]
    fn start(&self, invalidation: &Invalidation) {
        if self.listeners.intervals && self.intervals.start(invalidation).is_err() {
            refused(self.intervals, invalidation);
        }
        for listener in &self.listeners.list {
            if listener.invalidate_range_start(invalidation).is_err() {
                refused(listener, invalidation);
            }
        }
    }

    fn try_start(&self, invalidation: &Invalidation) -> Result<(), WouldBlock> {
        // Intervals first: where one of them refuses, the list is not even begun.
        if self.listeners.intervals {
            self.intervals.start(invalidation)?;
        }
        let list = &self.listeners.list;
        let agreed = list.iter().take_while(|one| one.invalidate_range_start(invalidation).is_ok()).count();
        if agreed == list.len() {
            return Ok(());
        }
        if self.listeners.intervals {
            self.intervals.end();
        }
        list[..agreed].iter().for_each(|listener| listener.invalidate_range_end(invalidation));
        Err(WouldBlock)
    }

    #[inline]
    fn end(&self, invalidation: &Invalidation) {
        if self.listeners.intervals {
            self.intervals.end();
        }
        for listener in &self.listeners.list {
            // 4.x: every end also tells devices that walk the primary's tables, before the end op.
            if self.listeners.walkers {
                listener.invalidate_range(invalidation.range);
            }
            listener.invalidate_range_end(invalidation);
        }
    }
}

/// An open pair. Dropping it is the end (`mmu_notifier_invalidate_range_end`).
#[derive(Debug)]
#[must_use = "the pair ends when this is dropped: bind it to a name and drop it after the change"]
pub struct InvalidateGuard<'a> {
    range: HvaRange,
    event: Event,
    blockable: Blockable,
    walk: Option<Walk<'a>>,
}

impl InvalidateGuard<'_> {
    /// What the pair is about.
    #[inline]
    pub fn invalidation(&self) -> Invalidation {
        Invalidation { range: self.range, event: self.event, blockable: self.blockable }
    }
}

impl Drop for InvalidateGuard<'_> {
    #[inline]
    fn drop(&mut self) {
        if let Some(walk) = &self.walk {
            walk.end(&self.invalidation());
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed test may panic")]
    use super::*;

    #[derive(Debug)]
    struct Quiet;
    impl MmuNotifier for Quiet {}

    #[test]
    fn destroying_the_layer_under_listeners_is_reported_and_not_waited_for() {
        let mut notifiers = Notifiers::new();
        assert_eq!(notifiers.destroy(), Ok(()));
        let subscription = notifiers.register_locked(Arc::new(Quiet)).unwrap();
        notifiers.register_locked(Arc::new(Quiet)).unwrap();
        assert_eq!(notifiers.destroy(), Err(Misuse::StillListening(2)));
        assert_eq!(notifiers.unregister(&subscription), Err(Misuse::NotRegistered));
        assert_eq!(notifiers.destroy(), Ok(()));
    }

    #[test]
    fn waiting_inside_a_pair_is_refused() {
        let notifiers = Notifiers::new();
        let subscription = notifiers.register_locked(Arc::new(Quiet)).unwrap();
        let pair = notifiers.invalidate(HvaRange::page(Hva(0)), Event::Clear);
        assert_eq!(notifiers.unregister(&subscription), Err(Misuse::InsideCallback));
        assert_eq!(notifiers.synchronize(), Err(Misuse::InsideCallback));
        drop(pair);
        assert_eq!(notifiers.unregister(&subscription), Ok(()));
    }
}
