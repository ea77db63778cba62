// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A CPU in software that walks the sptes, and the TLBs that a flush empties.

use super::{Gate, SoftHost};
use shadow_mmu::addr::{Access, Gfn, Gpa, Hva, PAGE_SIZE, Pfn};
use shadow_mmu::frame::FramePool;
use shadow_mmu::mm::FaultError;
use shadow_mmu::shadow::{
    AdBits, FaultAroundPolicy, FaultOutcome, ShadowMmu, Spte, Tlb, VcpuMmu, VcpuRing, Zapped,
};
use shadow_mmu::sync::Mutex;
use shadow_mmu::table::{Link, index};
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

/// What one CPU has cached: pages, and (by page number without its last nine bits) where leaf tables are.
#[derive(Debug, Default)]
struct Caches {
    pages: HashMap<u64, Cached>,
    tables: HashMap<u64, CachedTable>,
}

/// Where a leaf table is, as a CPU remembers it.
#[derive(Debug, Clone, Copy)]
struct CachedTable {
    pfn: Pfn,
    /// A flush has come since: the next walk sets A on its way again.
    flushed: bool,
}

/// The TLBs of all CPUs of a machine, with their paging-structure caches.
#[derive(Debug)]
pub(crate) struct SoftTlb {
    pool: Arc<FramePool>,
    /// Each is held by its CPU throughout an access, so that a flush waits for the access to end.
    cpus: Vec<Mutex<Caches>>,
    /// Passed by each flush, before it begins.
    pub(crate) flush: Gate,
    pub(crate) flushed: AtomicU64,
    /// Accesses and walks that reached a frame which was free (I21, I22, I31).
    pub(crate) freed_accesses: AtomicU64,
    /// What is behind frame numbers beyond the pool's.
    pub(crate) host: Arc<SoftHost>,
    /// What the CPUs do with A and D.
    ad: AdBits,
}

impl SoftTlb {
    pub(super) fn new(pool: Arc<FramePool>, cpus: usize, ad: AdBits) -> Self {
        let cpus = (0..cpus).map(|_| Mutex::default()).collect();
        Self {
            pool,
            cpus,
            flush: Gate::default(),
            flushed: AtomicU64::new(0),
            freed_accesses: AtomicU64::new(0),
            host: Arc::default(),
            ad,
        }
    }
    /// Every CPU forgets everything, as a context switch may make it.
    pub(crate) fn flush_everything(&self) {
        self.cpus.iter().for_each(|cpu| *cpu.lock() = Caches::default());
    }
    /// What CPU `cpu` has cached.
    pub(crate) fn cached(&self, cpu: usize) -> Vec<(Gfn, Cached)> {
        self.cpus[cpu].lock().pages.iter().map(|(&gfn, &cached)| (Gfn(gfn), cached)).collect()
    }
}

impl Tlb for SoftTlb {
    fn flush(&self, zapped: &[Zapped]) {
        self.flush.pass();
        for cpu in &self.cpus {
            let mut caches = cpu.lock();
            zapped.iter().for_each(|one| {
                caches.pages.remove(&one.gfn.0);
                if let Some(table) = caches.tables.get_mut(&(one.gfn.0 >> 9)) {
                    table.flushed = true;
                }
            });
        }
        self.flushed.fetch_add(zapped.len() as u64, Ordering::SeqCst);
    }
    fn flush_all(&self) {
        self.flush_everything();
    }
    fn ad_bits(&self) -> AdBits {
        self.ad
    }
}

const NO_EXEC: u64 = 1 << 63;

/// The CPU cannot go on.
enum Stopped {
    PageFault,
    /// The host has nothing at the address that a slot points at: KVM_RUN fails with EFAULT.
    HostFault,
}
use Stopped::PageFault;

/// A CPU that walks the shadow map.
#[derive(Debug)]
pub(crate) struct Vcpu {
    id: usize,
    tlb: Arc<SoftTlb>,
    root: Pfn,
    /// Weak: a CPU keeps no machine alive.
    shadow: Weak<ShadowMmu>,
    pub(crate) mmu: VcpuMmu,
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
        Self { id, tlb, root, shadow, mmu: VcpuMmu::new(policy), faults: 0 }
    }
    /// The same, logging its writes in `ring`.
    pub(crate) fn with_ring(mut self, ring: VcpuRing) -> Self {
        self.mmu = self.mmu.with_ring(ring);
        self
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
        let mut host_faults = 0;
        for _ in 0..100_000 {
            match self.try_access(at, access, &operation) {
                Ok(value) => return Ok(value),
                Err(PageFault) => {
                    host_faults = 0;
                    self.fault(at, access)?;
                }
                Err(Stopped::HostFault) if host_faults < 8 => {
                    host_faults += 1;
                    self.tlb.host.settle();
                }
                Err(Stopped::HostFault) => return Err(FaultError::BusError),
            }
        }
        panic!("vCPU {} faults at {at} for {access} forever", self.id);
    }
    /// Faults without having accessed anything.
    pub(crate) fn fault(&mut self, at: Hva, access: Access) -> Result<FaultOutcome, FaultError> {
        self.faults += 1;
        self.shadow.upgrade().unwrap().fault(&mut self.mmu, Gpa(at.0), access)
    }

    fn try_access(
        &self,
        at: Hva,
        access: Access,
        operation: impl Fn(&AtomicU64) -> u64,
    ) -> Result<u64, Stopped> {
        let gfn = at.page();
        // Held to the end: the CPU is in the guest.
        let mut caches = self.tlb.cpus[self.id].lock();
        let sets_dirty = self.tlb.ad != AdBits::None;
        let good = |one: &Cached| {
            one.rights.contains(access) && (one.dirty || access != Access::WRITE || !sets_dirty)
        };
        let entry = match caches.pages.get(&gfn) {
            Some(entry) if good(entry) => *entry,
            _ => {
                // A fault drops what is cached for its page, and a first write walks again to set D.
                caches.pages.remove(&gfn);
                let entry = self.walk(&mut caches.tables, gfn, access)?;
                caches.pages.insert(gfn, entry);
                entry
            }
        };
        if !self.tlb.pool.contains(entry.pfn) {
            let value = self.tlb.host.access(entry.pfn, at.0 % PAGE_SIZE, access, operation);
            return value.ok_or(Stopped::HostFault);
        }
        let word = &self.tlb.pool.words(entry.pfn)[(at.0 % PAGE_SIZE / 8) as usize];
        self.check_held(entry.pfn);
        let value = operation(word);
        self.check_held(entry.pfn);
        Ok(value)
    }

    fn check_held(&self, pfn: Pfn) {
        let freed = self.tlb.pool.frame(pfn).ref_count() == 0;
        self.tlb.freed_accesses.fetch_add(u64::from(freed), Ordering::SeqCst);
    }

    /// The page walk of the Intel manual, volume 3, 4.5, for an access at CPL 3 with CR0.WP and EFER.NXE set. It begins at
    /// the leaf table if the CPU remembers where that is (4.10.3); a fault makes it forget (4.10.4.1).
    fn walk(
        &self,
        tables: &mut HashMap<u64, CachedTable>,
        gfn: u64,
        access: Access,
    ) -> Result<Cached, Stopped> {
        if let Some(table) = tables.get_mut(&(gfn >> 9)) {
            if table.flushed {
                // The CPU would forget the table. Here it goes on using it, for tests of tables that are freed.
                let _ = self.descend(gfn);
                table.flushed = false;
            }
            if let Ok(cached) = self.leaf(table.pfn, gfn, access) {
                return Ok(cached);
            }
            tables.remove(&(gfn >> 9));
        }
        let pfn = self.descend(gfn)?;
        let cached = self.leaf(pfn, gfn, access)?;
        tables.insert(gfn >> 9, CachedTable { pfn, flushed: false });
        Ok(cached)
    }

    /// The leaf table for `gfn`, with A set on the way.
    fn descend(&self, gfn: u64) -> Result<Pfn, Stopped> {
        // Every right: for a table the shadow map leaves it to the leaf, and so rights are not cached with it.
        const ALL: u64 = 0b111;
        let mut table = self.root;
        for level in (2..=4).rev() {
            let word = &self.tlb.pool.words(table)[index(gfn, level)];
            let entry = word.load(Ordering::SeqCst);
            if entry & (ALL | NO_EXEC) != ALL {
                return Err(PageFault);
            }
            if self.tlb.ad != AdBits::None && entry & Link::ACCESSED == 0 {
                word.fetch_or(Link::ACCESSED, Ordering::SeqCst);
            }
            table = Spte(entry).pfn();
        }
        Ok(table)
    }

    fn leaf(&self, table: Pfn, gfn: u64, access: Access) -> Result<Cached, Stopped> {
        const PRESENT_USER: u64 = 0b101;
        const WRITE: u64 = 1 << 1;
        const ACCESSED: u64 = 1 << 5;
        const DIRTY: u64 = 1 << 6;
        self.check_held(table);
        let entry = &self.tlb.pool.words(table)[index(gfn, 1)];
        loop {
            let old = entry.load(Ordering::SeqCst);
            let mut rights = Access::READ;
            rights.set(Access::WRITE, old & WRITE != 0);
            rights.set(Access::EXEC, old & NO_EXEC == 0);
            if old & PRESENT_USER != PRESENT_USER || !rights.contains(access) {
                return Err(PageFault);
            }
            let marks = ACCESSED | if access == Access::WRITE { DIRTY } else { 0 };
            let new = if self.tlb.ad == AdBits::None { old } else { old | marks };
            if entry.compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
                return Ok(Cached { pfn: Spte(old).pfn(), rights, dirty: new & DIRTY != 0 });
            }
        }
    }
}
