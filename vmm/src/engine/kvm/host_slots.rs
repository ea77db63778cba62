// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! KVM memslots for adopted mappings: memory of this process beside the frame pool's, at the guest physical addresses of
//! frame numbers beyond the pool's.
//!
//! Slot 0 is the pool's and slot 1 the dummy of the flusher, whose page lies right behind the pool; these are numbered from 2.
//!
//! A slot is deleted when no spte leads to it any more and every translation was flushed. So no vCPU is in the middle of
//! anything there, and what KVM does at a deletion (it drops all that it has of the VM) is no more than a flush. Both ways
//! KVM waits for a grace period, which is short when no vCPU runs: they are held meanwhile, as for the dummy slot.
//!
//! What is *at* the addresses is not looked at here. KVM does at each first access, and where it finds nothing KVM_RUN fails
//! with EFAULT: [`Exit::HostFault`](crate::engine::Exit::HostFault). Which address it was about it says since Linux 6.8
//! (KVM_EXIT_MEMORY_FAULT), but not on nested PVM.

use super::KvmVm;
use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use shadow_mmu::addr::{Access, PAGE_SIZE, Pfn};
use shadow_mmu::mm::watch::{HostSlot, HostSlots};
use shadow_mmu::sync::{Arc, Mutex};
use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

/// Number of the first slot.
const FIRST: u32 = 2;

/// The slots there are.
#[derive(Debug, Default)]
pub(super) struct AdoptedSlots {
    /// Number by first frame.
    numbers: Mutex<BTreeMap<Pfn, u32>>,
    /// Whether there ever was one.
    any: AtomicBool,
}

impl KvmVm {
    /// Whether a fault of KVM's at `gpa`, or at an address that KVM does not name, can be about an adopted mapping.
    pub(super) fn may_be_adopted(&self, gpa: Option<u64>) -> bool {
        match gpa {
            Some(gpa) => gpa > self.flusher.window.bytes(),
            // Not whether there is a slot now: it may have been removed since.
            None => self.adopted.any.load(Ordering::Acquire),
        }
    }
}

/// The engine's side of [`Mm::adopt`](shadow_mmu::mm::Mm::adopt).
#[derive(Debug)]
pub(super) struct KvmHostSlots {
    pub(super) vm: Arc<KvmVm>,
}

impl HostSlots for KvmHostSlots {
    unsafe fn add(&self, slot: &HostSlot) -> io::Result<()> {
        let mut numbers = self.vm.adopted.numbers.lock();
        let taken = |number| numbers.values().any(|&other| other == number);
        let number = (FIRST..).find(|&number| !taken(number)).unwrap_or(u32::MAX);
        let region = kvm_userspace_memory_region {
            slot: number,
            flags: if slot.access.contains(Access::WRITE) { 0 } else { KVM_MEM_READONLY },
            guest_phys_addr: slot.first.offset(),
            memory_size: slot.pages * PAGE_SIZE,
            userspace_addr: slot.host,
        };
        // Before a vCPU can get there.
        self.vm.adopted.any.store(true, Ordering::Release);
        self.vm.flusher.with_all_held(|| {
            // SAFETY: that the guest may reach the memory is the caller's promise; the slot overlaps no other.
            unsafe { self.vm.vm.set_user_memory_region(region) }
        })?;
        numbers.insert(slot.first, number);
        Ok(())
    }

    fn remove(&self, first: Pfn) -> io::Result<()> {
        let mut numbers = self.vm.adopted.numbers.lock();
        let Some(&number) = numbers.get(&first) else {
            return Err(io::Error::other(format!("there is no slot at frame {:#x}", first.0)));
        };
        let region = kvm_userspace_memory_region { slot: number, ..Default::default() };
        self.vm.flusher.with_all_held(|| {
            // SAFETY: a slot of size 0 is deleted.
            unsafe { self.vm.vm.set_user_memory_region(region) }
        })?;
        numbers.remove(&first);
        Ok(())
    }
}
