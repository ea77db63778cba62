// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The list of listeners of one address space, and the pair as a guard.
//!
//! # Protocol
//! The list is an immutable vector behind an atomic pointer. Ops walk the vector that they loaded inside a read section;
//! additions and removals publish a new vector under `writers`, then wait for (or leave to a callback) the readers of the
//! old one. Additions happen with the mmap lock held for writing, hence while no pair is open: a listener never sees an
//! end whose start came before it (I9). Removal may fall into a pair: its end simply no longer reaches that listener.

use super::srcu::Srcu;
use super::{Blockable, Event, Invalidation, MmuNotifier, WouldBlock};
use crate::addr::{Hva, HvaRange};
use crate::mm::Pte;
use crate::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use crate::sync::{Arc, Mutex};

type List = Vec<Arc<dyn MmuNotifier>>;

/// A use of the layer that can never work, reported where the kernel would hang or crash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Misuse {
    /// Unregistering waits for running ops, so it cannot be done from inside one.
    #[error(
        "unregister called inside a notifier callback: it would wait for itself; use unregister_no_release"
    )]
    InsideCallback,
    /// The subscription is not, or no longer, in the list.
    #[error("this subscription is not registered here")]
    NotRegistered,
    /// The address space is gone: it takes no more listeners.
    #[error("the address space was released: it takes no more listeners")]
    Released,
}

/// A listener's place in a list, from registration to unregistration.
#[derive(Debug, Clone)]
pub struct Subscription {
    listener: Arc<dyn MmuNotifier>,
}

/// The listeners of one address space (`mmu_notifier_mm`).
#[derive(Debug)]
pub struct Notifiers {
    /// Never null; made by `Box::into_raw`. Newest listener first.
    list: AtomicPtr<List>,
    writers: Mutex<()>,
    released: AtomicBool,
    srcu: Srcu,
}

impl Default for Notifiers {
    fn default() -> Self {
        Self::new()
    }
}

impl Notifiers {
    /// An empty list (`mmu_notifier_mm_init`).
    pub fn new() -> Self {
        Self {
            list: AtomicPtr::new(Box::into_raw(Box::default())),
            writers: Mutex::new(()),
            released: AtomicBool::new(false),
            srcu: Srcu::new(),
        }
    }

    /// Adds `listener` in front of the others. The caller holds the mmap lock for writing (`__mmu_notifier_register`);
    /// everyone else goes through [`Mm::register`](crate::mm::Mm::register).
    ///
    /// # Errors
    /// [`Misuse::Released`].
    pub(crate) fn register_locked(&self, listener: Arc<dyn MmuNotifier>) -> Result<Subscription, Misuse> {
        let _writer = self.writers.lock();
        if self.released.load(Ordering::Acquire) {
            return Err(Misuse::Released);
        }
        let subscription = Subscription { listener: Arc::clone(&listener) };
        let old = self.publish(|list| list.insert(0, listener));
        self.retire(old);
        Ok(subscription)
    }

    /// Calls the listener's `release`, takes it off the list, and returns when none of its ops runs or can run (I7).
    ///
    /// # Errors
    /// [`Misuse`]; the list is as before.
    pub fn unregister(&self, subscription: &Subscription) -> Result<(), Misuse> {
        if Srcu::inside_read_section() {
            return Err(Misuse::InsideCallback);
        }
        // As in the kernel, the release at the end of the address space may be calling it too; release allows for that. And
        // inside a read section like every op: the end of the address space must wait for this call before it frees what
        // the call may still use (R18).
        self.with_listeners(|list| {
            if list.iter().any(|one| Arc::ptr_eq(one, &subscription.listener)) {
                subscription.listener.release();
            }
        });
        let removed = self.remove(subscription);
        // Also when it was already gone: then somebody else's walk may still be in one of its ops.
        self.srcu.synchronize();
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

    /// Returns when every callback of [`call_srcu`](Self::call_srcu) has run (`mmu_notifier_synchronize`).
    pub fn synchronize(&self) {
        self.srcu.barrier();
    }

    /// The address space goes: every listener's `release`, then the list is empty for good. Returns when no op runs.
    pub fn release(&self) {
        self.with_listeners(|list| list.iter().for_each(|listener| listener.release()));
        {
            let _writer = self.writers.lock();
            self.released.store(true, Ordering::Release);
            let old = self.publish(List::clear);
            self.retire(old);
        }
        self.srcu.synchronize();
    }

    /// Opens a pair over `range` (`mmu_notifier_invalidate_range_start`). The returned guard is its end.
    pub fn invalidate(&self, range: HvaRange, event: Event) -> InvalidateGuard<'_> {
        let invalidation = Invalidation { range, event, blockable: Blockable::Yes };
        self.with_listeners(|list| {
            for listener in list {
                // A range that may block cannot fail; a listener that says so breaks its contract, and has done its
                // zap or not: either way the pair goes on, as in the kernel (WARN).
                if listener.invalidate_range_start(&invalidation).is_err() {
                    log::error!("{listener:?} refused a blockable invalidation of {range}");
                }
            }
        });
        InvalidateGuard { notifiers: self, invalidation }
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
        let invalidation = Invalidation { range, event, blockable: Blockable::No };
        let refused = self.with_listeners(|list| {
            let agreed =
                list.iter().take_while(|one| one.invalidate_range_start(&invalidation).is_ok()).count();
            if agreed == list.len() {
                return false;
            }
            list[..agreed].iter().for_each(|listener| listener.invalidate_range_end(&invalidation));
            true
        });
        if refused { Err(WouldBlock) } else { Ok(InvalidateGuard { notifiers: self, invalidation }) }
    }

    /// Every listener's `clear_flush_young`, OR-ed; all are asked (I12).
    pub fn clear_flush_young(&self, range: HvaRange) -> bool {
        self.with_listeners(|list| list.iter().fold(false, |young, one| one.clear_flush_young(range) | young))
    }

    /// Every listener's `clear_young`, OR-ed; all are asked (I12).
    pub fn clear_young(&self, range: HvaRange) -> bool {
        self.with_listeners(|list| list.iter().fold(false, |young, one| one.clear_young(range) | young))
    }

    /// Whether some listener's `test_young` says so; the first that does ends the question.
    pub fn test_young(&self, hva: Hva) -> bool {
        self.with_listeners(|list| list.iter().any(|listener| listener.test_young(hva)))
    }

    /// Every listener's `change_pte`. The caller stores `pte` afterwards, not before (R8).
    pub fn change_pte(&self, hva: Hva, pte: Pte) {
        self.with_listeners(|list| list.iter().for_each(|listener| listener.change_pte(hva, pte)));
    }

    /// Every listener's `invalidate_page`.
    pub fn invalidate_page(&self, hva: Hva) {
        self.with_listeners(|list| list.iter().for_each(|listener| listener.invalidate_page(hva)));
    }

    /// Every listener's `invalidate_range`.
    pub fn invalidate_range(&self, range: HvaRange) {
        self.with_listeners(|list| list.iter().for_each(|listener| listener.invalidate_range(range)));
    }

    fn with_listeners<R>(&self, walk: impl FnOnce(&List) -> R) -> R {
        let _section = self.srcu.read();
        // SAFETY: the pointer came from `Box::into_raw`, and a list that was replaced is freed only when every read
        // section that may have loaded it has ended (`retire`); ours is open until `walk` has returned.
        walk(unsafe { &*self.list.load(Ordering::SeqCst) })
    }

    fn remove(&self, subscription: &Subscription) -> Result<(), Misuse> {
        let _writer = self.writers.lock();
        let mut found = false;
        let old = self.publish(|list| {
            list.retain(|one| {
                let is_it = Arc::ptr_eq(one, &subscription.listener);
                found |= is_it;
                !is_it
            })
        });
        self.retire(old);
        found.then_some(()).ok_or(Misuse::NotRegistered)
    }

    /// Publishes a changed copy of the list and returns the old one. The caller holds `writers`.
    fn publish(&self, change: impl FnOnce(&mut List)) -> *mut List {
        // SAFETY: only a holder of `writers` retires lists, and that is the caller: the current one is alive.
        let mut list = unsafe { &*self.list.load(Ordering::SeqCst) }.clone();
        change(&mut list);
        self.list.swap(Box::into_raw(Box::new(list)), Ordering::SeqCst)
    }

    /// Frees a list that [`publish`](Self::publish) replaced, when its readers are gone.
    fn retire(&self, old: *mut List) {
        // SAFETY: `publish` took it out of the only place that held it, so nobody else will ever free it.
        let old = unsafe { Box::from_raw(old) };
        self.srcu.call(move || drop(old));
    }
}

impl Drop for Notifiers {
    /// `mmu_notifier_mm_destroy`; a list that is not empty is a bug of the owner, which the kernel stops at and we report.
    fn drop(&mut self) {
        // SAFETY: `&mut self`: no walk runs, so nobody reads the list, and nobody will replace it.
        let list = unsafe { Box::from_raw(*self.list.get_mut()) };
        if !list.is_empty() {
            log::error!("an address space was destroyed with {} listeners: {list:?}", list.len());
        }
        self.srcu.barrier();
    }
}

/// An open pair. Dropping it is the end (`mmu_notifier_invalidate_range_end`).
#[derive(Debug)]
#[must_use = "the pair ends when this is dropped: bind it to a name and drop it after the change"]
pub struct InvalidateGuard<'a> {
    notifiers: &'a Notifiers,
    invalidation: Invalidation,
}

impl InvalidateGuard<'_> {
    /// What the pair is about.
    pub fn invalidation(&self) -> &Invalidation {
        &self.invalidation
    }
}

impl Drop for InvalidateGuard<'_> {
    fn drop(&mut self) {
        self.notifiers.with_listeners(|list| {
            for listener in list {
                // 4.x: every end also tells devices that walk the primary's tables, before the end op.
                listener.invalidate_range(self.invalidation.range);
                listener.invalidate_range_end(&self.invalidation);
            }
        });
    }
}
