// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The oracle of the kernel's dirty_log_test, with writers that run throughout: vCPUs and a device store the number of the
//! iteration into pages of their choice, while the log is harvested, leaves are aged and taken away, and rights come and go.
//!
//! Harvest k runs in iteration k; behind it, still in iteration k, every page is read. Then it holds for each page (I34):
//! * Not reported: the page is what it was behind harvest k-1, or was written since this harvest, and holds k. In the latter
//!   case harvest k+1 reports it (`track_next`).
//! * Reported: it was written since harvest k-1 and holds k-1 or k. A record may come before its write (I37): each vCPU may be
//!   on its way to one page, which then still is what it was.
//!
//! An iteration begins when no access of the one before is under way. In the end a copy that was kept up to date by reports
//! alone is equal to the memory.

use super::*;
use crate::common::StopOnDrop;
use shadow_mmu::iommu;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::AtomicU64;
use vm_memory::{Bytes, GuestAddress};

/// Across the end of a table, in a slot that begins and ends anywhere.
const PAGES: u64 = 300;
const FIRST: u64 = 300;
const GFN: Gfn = Gfn(1234 + 37);
const VCPUS: usize = 2;
const ITERATIONS: u64 = 25;
/// Accesses of an iteration at least.
const WRITES: u64 = 60;

/// What else goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Churn {
    None,
    /// Aging, forks, rights that go and come back.
    Everything,
}

struct Run {
    machine: Machine,
    config: DirtyLogConfig,
    rings: Vec<Arc<DirtyRing>>,
    iteration: AtomicU64,
    writes: AtomicU64,
    /// Held by the device for each write, and what it hears of it.
    device: Mutex<()>,
    stop: AtomicBool,
}

impl Run {
    fn new(ad: AdBits, config: DirtyLogConfig) -> Self {
        let machine = machine(ad, FIRST + PAGES);
        machine.shadow.remove_slot(SLOT).unwrap();
        let (hva, access) = (page(BASE, FIRST), SlotAccess::ReadWrite);
        machine.shadow.add_slot(Memslot { gfn: GFN, pages: PAGES, hva, access }).unwrap();
        Self {
            machine,
            config,
            rings: Vec::new(),
            iteration: AtomicU64::new(1),
            writes: AtomicU64::new(0),
            device: Mutex::new(()),
            stop: AtomicBool::new(false),
        }
    }

    fn vcpus(&mut self) -> Vec<Vcpu> {
        (0..VCPUS)
            .map(|id| {
                let vcpu = self.machine.vcpu(id, Fixed(8));
                if self.config.records == DirtyRecords::Bitmap {
                    return vcpu;
                }
                let (ring, end) = DirtyRing::new(128).unwrap();
                self.machine.shadow.add_dirty_ring(&ring);
                self.rings.push(ring);
                vcpu.with_ring(end)
            })
            .collect()
    }

    fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    /// A guest: it writes here and there, and everywhere but seldom.
    fn write_by(&self, mut vcpu: Vcpu, seed: u64) {
        let mut random = Random(seed);
        while !self.is_stopped() {
            if vcpu.mmu.is_ring_full() {
                std::thread::yield_now();
                continue;
            }
            let bound = if random.below(8) == 0 {
                PAGES
            } else {
                1 + self.iteration.load(Ordering::SeqCst) * 7 % PAGES
            };
            let at = Hva((GFN.0 + random.below(bound)) * PAGE_SIZE);
            let wrote = vcpu.access(at, Access::WRITE, |word| {
                word.store(self.iteration.load(Ordering::SeqCst), Ordering::SeqCst);
                0
            });
            // Refused while the rights are away.
            self.writes.fetch_add(u64::from(wrote.is_ok()), Ordering::SeqCst);
        }
    }

    fn write_by_device(&self) {
        let view = iommu::view(&self.machine.mm).unwrap();
        let mut random = Random(99);
        while !self.is_stopped() {
            let at = GuestAddress(page(BASE, FIRST + random.below(PAGES)).0);
            {
                let _one = self.device.lock().unwrap();
                let _refused = view.write_obj(self.iteration.load(Ordering::SeqCst), at);
            }
            std::thread::yield_now();
        }
    }

    fn churn(&self) {
        let (mm, mut random) = (&self.machine.mm, Random(5));
        while !self.is_stopped() {
            let first = page(BASE, FIRST + random.below(PAGES - 20));
            match random.below(5) {
                0 => _ = mm.age(),
                1 => _ = mm.pmdp_clear_flush_young_notify(first),
                2 => _ = mm.ptep_clear_young_notify(first),
                3 => drop(mm.fork().unwrap()),
                _ => {
                    mm.mprotect(first, pages(20), READ).unwrap();
                    mm.mprotect(first, pages(20), RW).unwrap();
                }
            }
            std::thread::yield_now();
        }
    }

    /// Reports and arms; what was reported, by offset.
    fn harvest(&self) -> DirtyPages {
        let shadow = &self.machine.shadow;
        let mut dirty = DirtyPages::default();
        for ring in &self.rings {
            ring.harvest(|entry| {
                assert_eq!(entry.slot, GFN);
                dirty.insert(entry.page);
            });
        }
        // Where there are rings: what the device wrote.
        shadow.get_dirty_log(GFN).unwrap().iter().for_each(|page| dirty.insert(page));
        shadow.reset_dirty_rings();
        if self.config.protect == ProtectOn::Clear {
            shadow.clear_dirty_log(GFN, 0..192, &dirty).unwrap();
            shadow.clear_dirty_log(GFN, 192..PAGES, &dirty).unwrap();
        }
        dirty
    }

    fn values(&self) -> Vec<u64> {
        (0..PAGES).map(|n| self.machine.peek(page(BASE, FIRST + n))).collect()
    }

    /// The next iteration begins, and no access of the last one is under way.
    fn advance(&self) {
        self.iteration.fetch_add(1, Ordering::SeqCst);
        // A CPU holds its cache throughout an access.
        (0..VCPUS).for_each(|cpu| _ = self.machine.tlb.cached(cpu));
        drop(self.device.lock().unwrap());
    }

    fn wait_for_writes(&self) {
        let enough = self.writes.load(Ordering::SeqCst) + WRITES;
        let full = || self.rings.iter().any(|ring| ring.is_soft_full());
        wait_until("the guest writes", || self.writes.load(Ordering::SeqCst) >= enough || full());
    }

    /// The iterations. The log is switched on while the guest writes (I35).
    fn collect(&self) {
        let shadow = &self.machine.shadow;
        self.wait_for_writes();
        shadow.enable_dirty_log(GFN, self.config).unwrap();
        let mut copy = self.values();
        let mut next = BTreeMap::new();
        self.advance();
        for k in self.iteration.load(Ordering::SeqCst).. {
            if k > ITERATIONS {
                break;
            }
            self.wait_for_writes();
            let dirty = self.harvest();
            let values = self.values();
            let mut early = 0;
            for (n, (&value, copy)) in values.iter().zip(&mut copy).enumerate() {
                let what = format!("iteration {k}, page {n}: {value}, it was {copy}");
                if dirty.contains(n as u64) {
                    if value != k && value != k - 1 {
                        assert_eq!(value, *copy, "{what}");
                        early += 1;
                    }
                } else {
                    assert!(value == *copy || value == k, "not reported: {what}");
                    assert!(!next.contains_key(&n), "not reported, and written before: {what}");
                }
                next.remove(&n);
                if value == k && value != *copy && !dirty.contains(n as u64) {
                    next.insert(n, value);
                }
                *copy = value;
            }
            assert!(early <= VCPUS, "iteration {k}: {early} pages were reported and not written");
            if k.is_multiple_of(5) {
                let report = self.machine.shadow.audit(&self.machine.mm);
                assert!(report.violations.is_empty(), "{:#?}", report.violations);
            }
            self.advance();
        }
    }

    /// All of it, and then the copy that a collector of reports has is the memory.
    fn run(mut self, churn: Churn) {
        let vcpus = self.vcpus();
        let mut copy = Vec::new();
        std::thread::scope(|scope| {
            let this = &self;
            let _stop = StopOnDrop(&this.stop);
            for (id, vcpu) in vcpus.into_iter().enumerate() {
                scope.spawn(move || this.write_by(vcpu, id as u64));
            }
            scope.spawn(|| this.write_by_device());
            if churn == Churn::Everything {
                scope.spawn(|| this.churn());
            }
            this.collect();
            // From here on the copy is brought up to date by reports alone.
            let _armed = this.harvest();
            copy = this.values();
            for _ in 0..10 {
                this.wait_for_writes();
                for n in this.harvest().iter() {
                    copy[n as usize] = this.machine.peek(page(BASE, FIRST + n));
                }
            }
        });
        let last = self.harvest();
        last.iter().for_each(|n| copy[n as usize] = self.machine.peek(page(BASE, FIRST + n)));
        assert_eq!(copy, self.values());
        assert!(self.harvest().is_empty());
        self.machine.shadow.disable_dirty_log(GFN).unwrap();
        self.machine.finish();
    }
}

#[test]
fn i34_the_oracle_of_dirty_log_test() {
    for (method, ad) in WAYS {
        Run::new(ad, bitmap_log(method, ProtectOn::Get)).run(Churn::None);
    }
}

#[test]
fn i34_the_oracle_with_reports_and_clears_apart() {
    for (method, ad) in WAYS {
        Run::new(ad, bitmap_log(method, ProtectOn::Clear)).run(Churn::None);
    }
}

#[test]
fn i34_i36_the_oracle_with_rings() {
    for ad in [AdBits::AfterFlush, AdBits::Unflushed, AdBits::None] {
        Run::new(ad, ring_log()).run(Churn::None);
    }
}

#[test]
fn r11_r16_the_oracle_while_leaves_are_aged_and_lost() {
    for (method, ad) in WAYS {
        for protect in [ProtectOn::Get, ProtectOn::Clear] {
            Run::new(ad, bitmap_log(method, protect)).run(Churn::Everything);
        }
    }
    for ad in [AdBits::AfterFlush, AdBits::None] {
        Run::new(ad, ring_log()).run(Churn::Everything);
    }
}
