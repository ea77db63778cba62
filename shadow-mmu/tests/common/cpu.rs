// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A CPU in software that walks the sptes, and the TLBs that a flush empties.

use super::Gate;
use shadow_mmu::addr::{Access, Gfn, Gpa, Hva, PAGE_SIZE, Pfn};
use shadow_mmu::frame::FramePool;
use shadow_mmu::mm::FaultError;
use shadow_mmu::shadow::{FaultAround, FaultAroundPolicy, FaultOutcome, ShadowMmu, Spte, Tlb, Zapped};
use shadow_mmu::sync::Mutex;
use shadow_mmu::table::index;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

/// A translation as the CPU has cached it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cached {
    pub(crate) pfn: Pfn,
    pub(crate) rights: Access,
    dirty: bool,
}

/// The TLBs of all CPUs of a machine.
#[derive(Debug)]
pub(crate) struct SoftTlb {
    pool: Arc<FramePool>,
    /// Each is held by its CPU throughout an access, so that a flush waits for the access to end.
    cpus: Vec<Mutex<HashMap<u64, Cached>>>,
    /// Passed by each flush, before it begins.
    pub(crate) flush: Gate,
    pub(crate) flushed: AtomicU64,
    /// Accesses that reached a frame which was free (I21, I22).
    pub(crate) freed_accesses: AtomicU64,
}

impl SoftTlb {
    pub(super) fn new(pool: Arc<FramePool>, cpus: usize) -> Self {
        let cpus = (0..cpus).map(|_| Mutex::default()).collect();
        Self {
            pool,
            cpus,
            flush: Gate::default(),
            flushed: AtomicU64::new(0),
            freed_accesses: AtomicU64::new(0),
        }
    }
    /// What CPU `cpu` has cached.
    pub(crate) fn cached(&self, cpu: usize) -> Vec<(Gfn, Cached)> {
        self.cpus[cpu].lock().iter().map(|(&gfn, &cached)| (Gfn(gfn), cached)).collect()
    }
}

impl Tlb for SoftTlb {
    fn flush(&self, zapped: &[Zapped]) {
        self.flush.pass();
        for cpu in &self.cpus {
            let mut cached = cpu.lock();
            zapped.iter().for_each(|one| {
                cached.remove(&one.gfn.0);
            });
        }
        self.flushed.fetch_add(zapped.len() as u64, Ordering::SeqCst);
    }
    fn flush_all(&self) {
        self.cpus.iter().for_each(|cpu| cpu.lock().clear());
    }
}

/// The CPU cannot go on: a page fault.
struct PageFault;

/// A CPU that walks the shadow map.
#[derive(Debug)]
pub(crate) struct Vcpu {
    id: usize,
    tlb: Arc<SoftTlb>,
    root: Pfn,
    /// Weak: a CPU keeps no machine alive.
    shadow: Weak<ShadowMmu>,
    around: FaultAround,
    /// Faults taken so far.
    pub(crate) faults: u64,
}

impl Vcpu {
    pub(super) fn new(
        id: usize,
        tlb: &Arc<SoftTlb>,
        shadow: &Arc<ShadowMmu>,
        policy: FaultAroundPolicy,
    ) -> Self {
        let (tlb, root, shadow) = (Arc::clone(tlb), shadow.root(), Arc::downgrade(shadow));
        Self { id, tlb, root, shadow, around: FaultAround::new(policy), faults: 0 }
    }
    /// Loads a word.
    pub(crate) fn read(&mut self, at: Hva) -> Result<u64, FaultError> {
        self.access(at, Access::READ, |word| word.load(Ordering::SeqCst))
    }
    /// Stores a word.
    pub(crate) fn write(&mut self, at: Hva, value: u64) -> Result<(), FaultError> {
        self.access(at, Access::WRITE, |word| {
            word.store(value, Ordering::SeqCst);
            0
        })
        .map(drop)
    }
    /// Fetches an instruction.
    pub(crate) fn fetch(&mut self, at: Hva) -> Result<u64, FaultError> {
        self.access(at, Access::EXEC, |word| word.load(Ordering::SeqCst))
    }
    /// Does `access` at `at`, with as many faults as it takes.
    pub(crate) fn access(
        &mut self,
        at: Hva,
        access: Access,
        operation: impl Fn(&AtomicU64) -> u64,
    ) -> Result<u64, FaultError> {
        for _ in 0..100_000 {
            if let Ok(value) = self.try_access(at, access, &operation) {
                return Ok(value);
            }
            self.fault(at, access)?;
        }
        panic!("vCPU {} faults at {at} for {access} forever", self.id);
    }
    /// Faults without having accessed anything.
    pub(crate) fn fault(&mut self, at: Hva, access: Access) -> Result<FaultOutcome, FaultError> {
        self.faults += 1;
        self.shadow.upgrade().unwrap().fault(&mut self.around, Gpa(at.0), access)
    }

    fn try_access(
        &self,
        at: Hva,
        access: Access,
        operation: impl Fn(&AtomicU64) -> u64,
    ) -> Result<u64, PageFault> {
        let gfn = at.page();
        // Held to the end: the CPU is in the guest.
        let mut cached = self.tlb.cpus[self.id].lock();
        let good = |one: &Cached| one.rights.contains(access) && (one.dirty || access != Access::WRITE);
        let entry = match cached.get(&gfn) {
            Some(entry) if good(entry) => *entry,
            _ => {
                // A fault drops what is cached for its page, and a first write walks again to set D.
                cached.remove(&gfn);
                let entry = self.walk(gfn, access)?;
                cached.insert(gfn, entry);
                entry
            }
        };
        let word = &self.tlb.pool.words(entry.pfn)[(at.0 % PAGE_SIZE / 8) as usize];
        let mut freed = self.tlb.pool.frame(entry.pfn).ref_count() == 0;
        let value = operation(word);
        freed |= self.tlb.pool.frame(entry.pfn).ref_count() == 0;
        self.tlb.freed_accesses.fetch_add(u64::from(freed), Ordering::SeqCst);
        Ok(value)
    }

    /// The page walk of the Intel manual, volume 3, 4.5, for an access at CPL 3 with CR0.WP and EFER.NXE set.
    fn walk(&self, gfn: u64, access: Access) -> Result<Cached, PageFault> {
        const PRESENT_USER: u64 = 0b101;
        const WRITE: u64 = 1 << 1;
        const ACCESSED: u64 = 1 << 5;
        const DIRTY: u64 = 1 << 6;
        const NO_EXEC: u64 = 1 << 63;
        loop {
            let mut table = self.root;
            let mut rights = Access::all();
            for level in (1..=4).rev() {
                let entry = &self.tlb.pool.words(table)[index(gfn, level)];
                let old = entry.load(Ordering::SeqCst);
                if old & PRESENT_USER != PRESENT_USER {
                    return Err(PageFault);
                }
                rights.set(Access::WRITE, rights.contains(Access::WRITE) && old & WRITE != 0);
                rights.set(Access::EXEC, rights.contains(Access::EXEC) && old & NO_EXEC == 0);
                table = Spte(old).pfn();
                if level > 1 {
                    continue;
                }
                if !rights.contains(access) {
                    return Err(PageFault);
                }
                let new = old | ACCESSED | if access == Access::WRITE { DIRTY } else { 0 };
                if entry.compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
                    return Ok(Cached { pfn: table, rights, dirty: new & DIRTY != 0 });
                }
            }
        }
    }
}
