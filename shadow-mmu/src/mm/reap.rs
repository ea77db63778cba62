// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The OOM reaper: the memory of a guest that was told to die, before it has died. After `__oom_reap_task_mm`
//! (`mm/oom_kill.c`).
//!
//! A guest that dies for want of memory frees it when the last of its threads is gone, which may take for ever: a thread
//! may wait for something that itself waits for memory. So its private pages are taken from under it, by somebody who
//! must not wait for anybody: the mmap lock is only tried, and pairs are opened without blocking. A VMA for which a
//! listener would have to sleep is left alone (I10).
//!
//! # What the guest sees
//! Nothing any more. A page that it has lost must not come back as zeros, so from the first VMA on the space is *reaped*
//! (`MMF_UNSTABLE`): every fault at private memory is [`FaultError::OutOfMemory`], for guest and host, for
//! good. The mark is set before the first pte goes, and [`Mm::fault`] looks at it after everything else: a fault that found
//! a pte that the reaper had cleared finds the mark too, by the page-table lock.

use super::{FaultError, Mm, Vma};
use crate::notifier::Event;
use crate::sync::atomic::Ordering;

/// What one go of the reaper came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Reaped {
    /// Frames that are free now. A page that somebody else has too, through a fork or a pin, is not among them.
    pub freed: u64,
    /// VMAs left as they were, because a listener would have had to sleep. Another go may find it awake.
    pub skipped: u64,
}

impl Mm {
    /// Frees every private page that can be freed without waiting, and makes the space useless for its guest.
    ///
    /// Page tables and VMAs stay: those go with the space itself ([`Mm::release`]). `None`: somebody is changing the VMAs;
    /// nothing was done, and another go may do better.
    pub fn reap(&self) -> Option<Reaped> {
        let map = self.map.try_read()?;
        self.reaped.store(true, Ordering::Release);
        let mut reaped = Reaped::default();
        for vma in map.vmas.iter().filter(|vma| !vma.is_shared()) {
            match self.notifiers.invalidate_nonblock(vma.range, Event::Unmap) {
                Ok(pair) => reaped.freed += self.zap_in(vma.range, pair),
                Err(_) => reaped.skipped += 1,
            }
        }
        Some(reaped)
    }

    /// Whether [`reap`](Self::reap) has begun.
    pub(super) fn is_reaped(&self) -> bool {
        self.reaped.load(Ordering::Acquire)
    }

    /// An error if the pages of `vma` may have been reaped (`check_stable_address_space`).
    pub(super) fn refuse_reaped(&self, vma: &Vma) -> Result<(), FaultError> {
        if self.is_reaped() && !vma.is_shared() { Err(FaultError::OutOfMemory) } else { Ok(()) }
    }
}
