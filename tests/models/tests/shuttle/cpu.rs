// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! CPUs in software: they walk the sptes word by word, set A and D by compare-exchange, and go on using what they have cached
//! until a flush takes it from them.
//!
//! An access happens with the CPU's lock held, and a flush takes that lock: as when KVM kicks a vCPU, a flush returns when no
//! CPU is in the middle of an access. Every step of a walk and every access is a scheduling point.
//!
//! What they do with A and D is the machine's [`AdBits`]. Those that set the marks set A in the links on their way too,
//! unless they begin at a leaf table that they remember.
//!
//! Each page is written with values that carry its page number ([`tagged`]). A CPU that reads another page's value, or reaches
//! a frame that is free, notes it; the machine's check fails then.

use crate::addr::{Access, Gfn, Gpa, Hva, PAGE_SIZE, Pfn};
use crate::frame::FramePool;
use crate::machine::Machine;
use crate::mm::FaultError;
use crate::shadow::{AdBits, FaultAroundPolicy, FaultOutcome, Spte, Tlb, VcpuMmu, VcpuRing, Zapped};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Mutex, thread};
use crate::table::{Link, index};
use std::collections::BTreeMap;
use std::sync::Arc;

/// CPUs of a machine.
pub(crate) const CPUS: usize = 3;
/// Faults that one access may take. A CPU that needs more is in a livelock.
const MOST_FAULTS: usize = 500;

/// The `n`-th value for the page at `at`.
pub(crate) fn tagged(at: Hva, n: u64) -> u64 {
    at.page() << 16 | n
}

/// A translation as a CPU has cached it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cached {
    pub(crate) pfn: Pfn,
    pub(crate) rights: Access,
    dirty: bool,
}

/// What one CPU has cached: pages, and (by page number without its last nine bits) where leaf tables are.
#[derive(Debug, Default)]
struct Caches {
    pages: BTreeMap<u64, Cached>,
    tables: BTreeMap<u64, CachedTable>,
}

/// Where a leaf table is, as a CPU remembers it.
#[derive(Debug, Clone, Copy)]
struct CachedTable {
    pfn: Pfn,
    /// A flush has come since: the next walk sets A on its way again.
    flushed: bool,
}

/// The TLBs of all CPUs.
#[derive(Debug)]
pub(crate) struct SoftTlb {
    pool: Arc<FramePool>,
    cpus: [Mutex<Caches>; CPUS],
    ad: AdBits,
    /// The first thing that a CPU saw and should not have.
    wrong: std::sync::Mutex<Option<String>>,
}

impl SoftTlb {
    pub(crate) fn new(pool: &Arc<FramePool>, ad: AdBits) -> Self {
        Self { pool: Arc::clone(pool), cpus: Default::default(), ad, wrong: std::sync::Mutex::default() }
    }

    /// Notes that something went wrong.
    pub(crate) fn note(&self, what: impl FnOnce() -> String) {
        self.wrong.lock().unwrap().get_or_insert_with(what);
    }

    /// What was noted first.
    pub(crate) fn wrong(&self) -> Option<String> {
        self.wrong.lock().unwrap().clone()
    }

    /// What CPU `cpu` has cached.
    pub(crate) fn cached(&self, cpu: usize) -> Vec<(Gfn, Cached)> {
        self.cpus[cpu].lock().pages.iter().map(|(&gfn, &cached)| (Gfn(gfn), cached)).collect()
    }

    /// CPU `cpu` forgets its pages, as it may at any time, and remembers where tables are.
    pub(crate) fn forget_pages(&self, cpu: usize) {
        self.cpus[cpu].lock().pages.clear();
    }

    fn check_held(&self, pfn: Pfn, what: &str) {
        if self.pool.frame(pfn).ref_count() == 0 {
            self.note(|| format!("a CPU reached frame {:#x}, {what}, which is free (I21, I22)", pfn.0));
        }
    }
}

impl Tlb for SoftTlb {
    fn flush(&self, zapped: &[Zapped]) {
        for cpu in &self.cpus {
            let mut caches = cpu.lock();
            for one in zapped {
                caches.pages.remove(&one.gfn.0);
                if let Some(table) = caches.tables.get_mut(&(one.gfn.0 >> 9)) {
                    table.flushed = true;
                }
            }
        }
    }
    fn flush_all(&self) {
        self.cpus.iter().for_each(|cpu| *cpu.lock() = Caches::default());
    }
    fn ad_bits(&self) -> AdBits {
        self.ad
    }
}

/// The CPU cannot go on: a page fault.
struct PageFault;

/// A CPU, and the task that runs it.
#[derive(Debug)]
pub(crate) struct Vcpu<'a> {
    id: usize,
    machine: &'a Machine,
    mmu: VcpuMmu,
}

impl<'a> Vcpu<'a> {
    pub(crate) fn new(machine: &'a Machine, id: usize, policy: FaultAroundPolicy) -> Self {
        Self { id, machine, mmu: VcpuMmu::new(policy) }
    }

    /// The same, logging its writes in `ring`.
    pub(crate) fn with_ring(mut self, ring: VcpuRing) -> Self {
        self.mmu = self.mmu.with_ring(ring);
        self
    }

    /// Loads the first word of the page at `at`. It must be zero or one of the page's values.
    pub(crate) fn read(&mut self, at: Hva) -> Result<u64, FaultError> {
        let value = self.access(at, Access::READ, |word| word.load(Ordering::SeqCst))?;
        if value != 0 && value >> 16 != at.page() {
            self.machine
                .tlb
                .note(|| format!("a CPU read {value:#x} at {at}, which is no value of that page (I24)"));
        }
        Ok(value)
    }

    /// Stores the `n`-th value of the page at `at` to its first word.
    pub(crate) fn write(&mut self, at: Hva, n: u64) -> Result<(), FaultError> {
        self.access(at, Access::WRITE, |word| {
            word.store(tagged(at, n), Ordering::SeqCst);
            0
        })
        .map(drop)
    }

    /// Does `access` at `at`, with as many faults as it takes.
    pub(crate) fn access(
        &mut self,
        at: Hva,
        access: Access,
        operation: impl Fn(&AtomicU64) -> u64,
    ) -> Result<u64, FaultError> {
        for _ in 0..MOST_FAULTS {
            // With a ring that is as good as full it does not enter the guest; who collects makes room.
            while self.mmu.is_ring_full() {
                thread::yield_now();
            }
            if let Ok(value) = self.try_access(at, access, &operation) {
                return Ok(value);
            }
            self.fault(at, access)?;
        }
        panic!("CPU {} faults at {at} for {access} forever", self.id);
    }

    /// Faults without having accessed anything.
    pub(crate) fn fault(&mut self, at: Hva, access: Access) -> Result<FaultOutcome, FaultError> {
        self.machine.shadow().fault(&mut self.mmu, Gpa(at.0), access)
    }

    fn try_access(
        &self,
        at: Hva,
        access: Access,
        operation: impl Fn(&AtomicU64) -> u64,
    ) -> Result<u64, PageFault> {
        let tlb = &self.machine.tlb;
        let gfn = at.page();
        // Held to the end: the CPU is in the guest.
        let mut caches = tlb.cpus[self.id].lock();
        let sets_dirty = tlb.ad != AdBits::None;
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
        tlb.check_held(entry.pfn, "a page");
        let value = operation(&tlb.pool.words(entry.pfn)[(at.0 % PAGE_SIZE / 8) as usize]);
        tlb.check_held(entry.pfn, "a page");
        Ok(value)
    }

    /// The page walk of the Intel manual, volume 3, 4.5, at CPL 3. It begins at the leaf table if the CPU remembers where that
    /// is (4.10.3); a fault makes it forget (4.10.4.1).
    fn walk(
        &self,
        tables: &mut BTreeMap<u64, CachedTable>,
        gfn: u64,
        access: Access,
    ) -> Result<Cached, PageFault> {
        if let Some(table) = tables.get_mut(&(gfn >> 9)) {
            if table.flushed {
                // The CPU would forget the table. Here it goes on using it, for scenarios of tables that are freed.
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
    fn descend(&self, gfn: u64) -> Result<Pfn, PageFault> {
        let tlb = &self.machine.tlb;
        let mut table = self.machine.shadow().root();
        for level in (2..=4).rev() {
            // Present, writable, user: rights are the leaf's business.
            const ALL: u64 = 0b111;
            let link = &tlb.pool.words(table)[index(gfn, level)];
            let entry = link.load(Ordering::SeqCst);
            if entry & ALL != ALL {
                return Err(PageFault);
            }
            if tlb.ad != AdBits::None && entry & Link::ACCESSED == 0 {
                link.fetch_or(Link::ACCESSED, Ordering::SeqCst);
            }
            table = Spte(entry).pfn();
        }
        Ok(table)
    }

    fn leaf(&self, table: Pfn, gfn: u64, access: Access) -> Result<Cached, PageFault> {
        let tlb = &self.machine.tlb;
        tlb.check_held(table, "a page table");
        let entry = &tlb.pool.words(table)[index(gfn, 1)];
        loop {
            let old = Spte(entry.load(Ordering::SeqCst));
            if !old.rights().contains(access) {
                return Err(PageFault);
            }
            let new = if tlb.ad == AdBits::None { old } else { old.touched(access) };
            if entry.compare_exchange(old.0, new.0, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
                return Ok(Cached { pfn: old.pfn(), rights: old.rights(), dirty: new.is_dirty() });
            }
        }
    }
}
