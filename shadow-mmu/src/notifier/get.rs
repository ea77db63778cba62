// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One listener of a kind for each address space, shared by its users (`mmu_notifier_get` and `_put`, since 5.4).
//!
//! A driver with many contexts on one address space needs one listener there. The first user makes it, the last one takes it
//! off; it is freed when no op of it runs any more. Its `release` is called only if the address space goes before its users.
//!
//! Locks: the table of shared listeners comes below the mmap lock. Putting takes no other lock, so it may be done in a
//! callback, `release` included.

use super::list::SharedListener;
use super::{Misuse, MmuNotifier};
use crate::mm::Mm;
use crate::sync::{Arc, Weak};
use std::any::{Any, TypeId};
use std::ops::Deref;

/// A use of the shared listener. Dropping it is the put.
#[derive(Debug)]
pub struct Shared<T: MmuNotifier + Any> {
    listener: Arc<T>,
    /// Weak: a subscription pins what describes the address space (`mm_count`), not the space (`mm_users`).
    mm: Weak<Mm>,
}

impl<T: MmuNotifier + Any> Deref for Shared<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.listener
    }
}

/// The listener of type `T` of `mm`, made by `alloc` and registered if there is none (`mmu_notifier_get`). `alloc` runs with the
/// mmap lock held for writing and must not call `mm`.
///
/// # Errors
/// [`Misuse::Released`].
pub fn get<T: MmuNotifier + Any>(mm: &Arc<Mm>, alloc: impl FnOnce() -> T) -> Result<Shared<T>, Misuse> {
    let shared = &mm.notifiers().shared;
    let used = |entry: &mut SharedListener| {
        let listener = Arc::clone(&entry.listener).downcast::<T>().ok()?;
        entry.users += 1;
        Some(Shared { listener, mm: Arc::downgrade(mm) })
    };
    if let Some(found) = shared.lock().get_mut(&TypeId::of::<T>()).and_then(used) {
        return Ok(found);
    }
    let map = mm.mmap_write_lock();
    let mut table = shared.lock();
    if let Some(found) = table.get_mut(&TypeId::of::<T>()).and_then(used) {
        return Ok(found);
    }
    let listener = Arc::new(alloc());
    let subscription = map.register(Arc::clone(&listener) as _)?;
    table.insert(
        TypeId::of::<T>(),
        SharedListener { listener: Arc::clone(&listener) as _, subscription, users: 1 },
    );
    Ok(Shared { listener, mm: Arc::downgrade(mm) })
}

impl<T: MmuNotifier + Any> Drop for Shared<T> {
    fn drop(&mut self) {
        // Without an address space there is no list to take it off.
        let Some(mm) = self.mm.upgrade() else { return };
        let notifiers = mm.notifiers();
        let last = {
            let mut table = notifiers.shared.lock();
            match table.get_mut(&TypeId::of::<T>()) {
                Some(entry) if entry.users > 1 => {
                    entry.users -= 1;
                    None
                }
                Some(_) => table.remove(&TypeId::of::<T>()),
                None => None,
            }
        };
        if let Some(last) = last {
            // Not registered: then the address space was released meanwhile, which is as good.
            let _ = notifiers.unregister_no_release(&last.subscription);
            let listener = Arc::clone(&self.listener);
            notifiers.call_srcu(move || drop((listener, last)));
        }
    }
}
