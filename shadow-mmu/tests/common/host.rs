// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! KVM's memslots of adopted memory, in software: frame numbers to host addresses, resolved at each access, and an access
//! where nothing is mapped is an error and no signal, as in KVM's `get_user_pages`.

use shadow_mmu::addr::{Access, PAGE_SIZE, Pfn};
use shadow_mmu::mm::watch::{HostSlot, HostSlots, Watch};
use shadow_mmu::sync::Mutex;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

/// What the watch asked of the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SlotCall {
    Add(HostSlot),
    Remove(Pfn),
}

/// Memslots for a software vCPU.
#[derive(Debug, Default)]
pub(crate) struct SoftHost {
    slots: Mutex<Vec<HostSlot>>,
    calls: Mutex<Vec<SlotCall>>,
    watch: Mutex<Weak<Watch>>,
    /// Adding a slot fails while this is set.
    pub(crate) full: AtomicBool,
    lost: AtomicU64,
}

impl SoftHost {
    /// Whom to ask when an access found nothing.
    pub(crate) fn set_watch(&self, watch: &Arc<Watch>) {
        *self.watch.lock() = Arc::downgrade(watch);
    }
    /// What was asked since the last time.
    pub(crate) fn calls(&self) -> Vec<SlotCall> {
        std::mem::take(&mut *self.calls.lock())
    }
    /// Slots there are.
    pub(crate) fn slots(&self) -> Vec<HostSlot> {
        self.slots.lock().clone()
    }
    pub(crate) fn lost_accesses(&self) -> u64 {
        self.lost.load(Ordering::SeqCst)
    }

    pub(super) fn settle(&self) {
        let watch = self.watch.lock().upgrade();
        if let Some(watch) = watch {
            watch.settle(Duration::from_secs(60)).unwrap();
        }
    }

    /// Does `operation` to the word at `offset` of frame `pfn`; `None` where the host has nothing there.
    pub(super) fn access(
        &self,
        pfn: Pfn,
        offset: u64,
        access: Access,
        operation: impl Fn(&AtomicU64) -> u64,
    ) -> Option<u64> {
        let slots = self.slots.lock().clone();
        let slot =
            slots.iter().find(|slot| (slot.first.0..slot.first.0 + slot.pages as u32).contains(&pfn.0));
        let Some(slot) = slot else {
            self.lost.fetch_add(1, Ordering::SeqCst);
            return None;
        };
        assert!(
            !access.contains(Access::WRITE) || slot.access.contains(Access::WRITE),
            "a write to {slot:?}"
        );
        let address = slot.host + u64::from(pfn.0 - slot.first.0) * PAGE_SIZE + offset;
        let word = AtomicU64::new(0);
        let local = libc::iovec { iov_base: word.as_ptr().cast(), iov_len: 8 };
        let remote = libc::iovec { iov_base: address as *mut libc::c_void, iov_len: 8 };
        let pid = std::process::id() as i32;
        // SAFETY: the kernel writes 8 bytes to `word`; what it reads it checks.
        let read = unsafe { libc::process_vm_readv(pid, &local, 1, &remote, 1, 0) };
        if read != 8 {
            return None;
        }
        let value = operation(&word);
        if access.contains(Access::WRITE) {
            // SAFETY: adopted for writing; the kernel checks the address.
            let written = unsafe { libc::process_vm_writev(pid, &local, 1, &remote, 1, 0) };
            if written != 8 {
                return None;
            }
        }
        Some(value)
    }
}

impl HostSlots for SoftHost {
    unsafe fn add(&self, slot: &HostSlot) -> io::Result<()> {
        if self.full.load(Ordering::SeqCst) {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        let mut slots = self.slots.lock();
        let end = |slot: &HostSlot| u64::from(slot.first.0) + slot.pages;
        let taken = |old: &HostSlot| u64::from(old.first.0) < end(slot) && u64::from(slot.first.0) < end(old);
        assert!(!slots.iter().any(taken), "{slot:x?} overlaps another");
        slots.push(*slot);
        self.calls.lock().push(SlotCall::Add(*slot));
        Ok(())
    }

    fn remove(&self, first: Pfn) -> io::Result<()> {
        let mut slots = self.slots.lock();
        let at = slots.iter().position(|slot| slot.first == first).expect("a slot that was added");
        slots.remove(at);
        self.calls.lock().push(SlotCall::Remove(first));
        Ok(())
    }
}
