// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Aging and the dirty log with real vCPUs: what the CPU's A and D say on this host, and the oracle of the kernel's
//! dirty_log_test. The same with CPUs in software, and the oracle's rules, are in `shadow-mmu/tests`.
//!
//! The guest is a few instructions in an address space of its own, with guest addresses as in there. Its data has a memslot
//! for itself, so that a log is about nothing else.

use super::guest::{CODE, DATA, RW, RX, STACK_TOP, start};
use super::machines;
use crate::engine::{Engine, Exit, Kick, Marks, Vcpu};
use shadow_mmu::addr::{Access, Gfn, Hva, PAGE_SIZE, Pfn};
use shadow_mmu::frame::{FramePool, FreedFrames};
use shadow_mmu::mm::{Backing, FaultRequest, MapFlags, Mm, PageAge};
use shadow_mmu::shadow::FaultAroundPolicy::Fixed;
use shadow_mmu::shadow::{
    DirtyLogConfig, DirtyMethod, DirtyPages, DirtyRecords, DirtyRing, Initially, Memslot, ProtectOn,
    ShadowMmu, SlotAccess, VcpuMmu,
};
use shadow_mmu::table::LOWER_HALF_PAGES;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Data pages.
const PAGES: u64 = 128;
/// A page that the test and the guest speak through: the number of the iteration, the mask of pages, and a counter for each
/// vCPU.
const CONTROL: u64 = DATA + 0x1000_0000;
const SLOT: Gfn = Gfn(DATA / PAGE_SIZE);
/// Ends a wait that would never end.
const PATIENCE: Duration = Duration::from_secs(20);

/// mov rax, [rdi]; syscall; mov [rdi], rax; syscall
const TOUCH: [u8; 10] = [0x48, 0x8b, 0x07, 0x0f, 0x05, 0x48, 0x89, 0x07, 0x0f, 0x05];
/// Where in it the write is.
const TOUCH_WRITE: u64 = CODE + 5;

/// Stores the iteration's number into random pages, forever: rcx = rcx * r8 + r9; rax = (rcx >> 33 & [rsi + 8]) << 12; [rdi +
/// rax] = [rsi]; [r12] += 1.
const STORE: [u8; 40] = [
    0x49, 0x0f, 0xaf, 0xc8, // imul rcx, r8
    0x4c, 0x01, 0xc9, // add rcx, r9
    0x48, 0x89, 0xc8, // mov rax, rcx
    0x48, 0xc1, 0xe8, 0x21, // shr rax, 33
    0x4c, 0x8b, 0x56, 0x08, // mov r10, [rsi + 8]
    0x4c, 0x21, 0xd0, // and rax, r10
    0x48, 0xc1, 0xe0, 0x0c, // shl rax, 12
    0x48, 0x8b, 0x1e, // mov rbx, [rsi]
    0x48, 0x89, 0x1c, 0x07, // mov [rdi + rax], rbx
    0x49, 0xff, 0x04, 0x24, // inc qword ptr [r12]
    0xeb, 0xda, // jmp to the beginning
    0x0f, 0x05, // not reached
];

/// A VM over an address space, as umbra puts it together.
struct Guest {
    pool: Arc<FramePool>,
    engine: Arc<dyn Engine>,
    mm: Arc<Mm>,
    shadow: Arc<ShadowMmu>,
    control: Pfn,
    /// The frames of the data pages, which none of the tests changes.
    data: Vec<Pfn>,
}

impl Guest {
    fn over(pool: Arc<FramePool>, engine: Arc<dyn Engine>, code: &[u8]) -> Self {
        let mm = Mm::new(Arc::clone(&pool)).unwrap();
        let shadow = Arc::new(ShadowMmu::new(Arc::clone(&mm), Arc::clone(&engine).tlb()).unwrap());
        if let Some((index, entry)) = engine.upper_entry() {
            shadow.set_upper(index, entry);
        }
        let (data, behind) = (SLOT.0, SLOT.0 + PAGES);
        for (first, end) in [(0, data), (data, behind), (behind, LOWER_HALF_PAGES)] {
            let hva = Hva(first * PAGE_SIZE);
            let slot = Memslot { gfn: Gfn(first), pages: end - first, hva, access: SlotAccess::ReadWrite };
            shadow.add_slot(slot).unwrap();
        }
        let map = |at: u64, pages: u64, prot| {
            let flags = MapFlags::PRIVATE | MapFlags::FIXED;
            mm.mmap(Hva(at), pages * PAGE_SIZE, prot, flags, Backing::Anonymous).unwrap();
        };
        let pfn = |at: u64| mm.fault(&FaultRequest::one_page(Hva(at), Access::WRITE)).unwrap().required().pfn;
        map(CODE, 1, RW);
        pool.write(pfn(CODE), 0, code);
        mm.mprotect(Hva(CODE), PAGE_SIZE, RX).unwrap();
        map(STACK_TOP - PAGE_SIZE, 1, RW);
        map(CONTROL, 1, RW);
        map(DATA, PAGES, RW);
        let control = pfn(CONTROL);
        let data = (0..PAGES).map(|n| pfn(DATA + n * PAGE_SIZE)).collect();
        Self { pool, engine, mm, shadow, control, data }
    }

    fn vcpu(&self) -> Box<dyn Vcpu> {
        let mut vcpu = Arc::clone(&self.engine).create_vcpu(self.shadow.root()).unwrap();
        start(&mut *vcpu);
        vcpu
    }

    /// Runs until something else than a fault that can be resolved.
    fn run(&self, vcpu: &mut dyn Vcpu, mmu: &mut VcpuMmu) -> Exit {
        loop {
            match vcpu.run().unwrap() {
                Exit::PageFault { addr, access } => _ = self.shadow.fault(mmu, addr, access).unwrap(),
                exit => return exit,
            }
            if mmu.is_ring_full() {
                return Exit::Kicked;
            }
        }
    }

    fn control(&self, word: usize) -> &AtomicU64 {
        &self.pool.words(self.control)[word]
    }

    fn values(&self) -> Vec<u64> {
        self.data.iter().map(|&pfn| self.pool.words(pfn)[0].load(Ordering::SeqCst)).collect()
    }

    fn check(&self) {
        let report = self.shadow.audit(&self.mm);
        assert!(report.violations.is_empty(), "{:#?}", report.violations);
    }
}

fn random(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *seed >> 33
}

#[track_caller]
fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < PATIENCE, "waited in vain until {what}");
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// After each pass the young pages are those that the guest accessed since the last one (and where the CPU itself sets A,
/// which it may do ahead of accesses, perhaps more), and D of a page's leaf says whether it wrote. What faults bring along is
/// neither.
#[test]
fn i48_a_pass_finds_exactly_the_pages_that_a_real_cpu_accessed() {
    for (pool, engine) in machines(FreedFrames::Keep) {
        let guest = Guest::over(pool, engine, &TOUCH);
        let (mut vcpu, mut mmu) = (guest.vcpu(), VcpuMmu::new(Fixed(16)));
        guest.mm.age();
        let config = DirtyLogConfig {
            method: DirtyMethod::DirtyBit,
            records: DirtyRecords::Bitmap,
            protect: ProtectOn::Get,
            initially: Initially::Clean,
        };
        guest.shadow.enable_dirty_log(SLOT, config).unwrap();
        let mut seed = 1;
        for round in 0..40 {
            let (mut accessed, mut written) = (BTreeSet::new(), BTreeSet::new());
            for _ in 0..[0, 4, 40][round % 3] {
                let n = random(&mut seed) % PAGES;
                start(&mut *vcpu);
                vcpu.regs_mut().rdi = DATA + n * PAGE_SIZE;
                accessed.insert(n);
                if random(&mut seed).is_multiple_of(2) {
                    vcpu.regs_mut().rip = TOUCH_WRITE;
                    written.insert(n);
                }
                assert_eq!(guest.run(&mut *vcpu, &mut mmu), Exit::Syscall);
            }
            guest.mm.age();
            let mut young = BTreeSet::new();
            guest.mm.for_each_age(|_, range, age| {
                let pages = range.page_numbers().filter(|page| (SLOT.0..SLOT.0 + PAGES).contains(page));
                if age == PageAge::Passes(0) {
                    young.extend(pages.map(|page| page - SLOT.0));
                }
            });
            if guest.engine.marks() == Marks::Exact {
                assert_eq!(young, accessed, "round {round}");
            } else {
                // The CPU may set A ahead of accesses too, for what has a leaf.
                assert!(young.is_superset(&accessed), "round {round}: {accessed:?} in {young:?}");
                // What it has cached would not be seen in the next round.
                Arc::clone(&guest.engine).tlb().flush_all();
            }
            let dirty = BTreeSet::from_iter(guest.shadow.get_dirty_log(SLOT).unwrap().iter());
            assert_eq!(dirty, written, "round {round}");
        }
        guest.check();
    }
}

/// What a collector has: rings, and how it harvests.
struct Collector<'g> {
    guest: &'g Guest,
    config: DirtyLogConfig,
    rings: Vec<Arc<DirtyRing>>,
}

impl Collector<'_> {
    fn harvest(&self) -> DirtyPages {
        let shadow = &self.guest.shadow;
        let mut dirty = shadow.get_dirty_log(SLOT).unwrap();
        self.rings.iter().for_each(|ring| _ = ring.harvest(|entry| dirty.insert(entry.page)));
        shadow.reset_dirty_rings();
        if self.config.protect == ProtectOn::Clear {
            shadow.clear_dirty_log(SLOT, 0..PAGES, &dirty).unwrap();
        }
        dirty
    }

    /// The guest has stored `count` times more by each vCPU, or stands still for a full ring.
    fn wait_for_stores(&self, count: u64) {
        let stores = |cpu| self.guest.control(8 + cpu).load(Ordering::SeqCst);
        for cpu in 0..2 {
            let enough = stores(cpu) + count;
            let full = || self.rings.get(cpu).is_some_and(|ring| ring.is_soft_full());
            wait_until("the guest stores", || stores(cpu) >= enough || full());
        }
    }

    /// The rules are those of `shadow-mmu/tests/dirty_log/oracle.rs`.
    fn collect(&self) {
        let guest = self.guest;
        let mut seed = 3;
        guest.shadow.enable_dirty_log(SLOT, self.config).unwrap();
        let mut copy = guest.values();
        let (mut clear, mut set) = (0, 0);
        // Seen to be written and not reported yet.
        let mut next = BTreeSet::new();
        for k in 2..40 {
            // Every other page, or every fourth, … : a part of the pages stays clear.
            let mask = random(&mut seed) & random(&mut seed) & (PAGES - 1);
            guest.control(1).store(mask, Ordering::SeqCst);
            guest.control(0).store(k, Ordering::SeqCst);
            // Two stores later each vCPU has loaded the new number.
            self.wait_for_stores(2);
            self.wait_for_stores(50);
            let dirty = self.harvest();
            let values = guest.values();
            let mut early = 0;
            for (n, (&value, copy)) in values.iter().zip(&mut copy).enumerate() {
                if dirty.contains(n as u64) {
                    set += 1;
                    if value != k && value != k - 1 {
                        assert_eq!(value, *copy, "page {n} in iteration {k}: it was {copy}");
                        early += 1;
                    }
                } else {
                    clear += 1;
                    assert!(
                        value == *copy || value == k,
                        "page {n}: {value} in iteration {k}, it was {copy}"
                    );
                    assert!(
                        !next.contains(&n),
                        "page {n} was written behind harvest {}, and is not reported",
                        k - 1
                    );
                }
                next.remove(&n);
                if value != *copy && !dirty.contains(n as u64) {
                    next.insert(n);
                }
                *copy = value;
            }
            assert!(early <= 2, "iteration {k}: {early} pages were reported and not written");
            guest.check();
        }
        assert!(clear > 100 && set > 100, "{clear} clear, {set} set");
    }

    /// From now on reports alone keep a copy up to date; with the guest stopped it is the memory.
    fn copy(&self, stop: impl FnOnce()) {
        let guest = self.guest;
        let word = |n: u64| guest.pool.words(guest.data[n as usize])[0].load(Ordering::SeqCst);
        self.harvest();
        let mut copy = guest.values();
        for _ in 0..10 {
            self.wait_for_stores(20);
            self.harvest().iter().for_each(|n| copy[n as usize] = word(n));
            guest.mm.age();
        }
        stop();
        self.harvest().iter().for_each(|n| copy[n as usize] = word(n));
        assert_eq!(copy, guest.values());
        assert!(self.harvest().is_empty());
    }
}

fn oracle(config: DirtyLogConfig) {
    machines(FreedFrames::Keep)
        .for_each(|(pool, engine)| oracle_of(&Guest::over(pool, engine, &STORE), config));
}

fn oracle_of(guest: &Guest, config: DirtyLogConfig) {
    guest.control(0).store(1, Ordering::SeqCst);
    guest.control(1).store(PAGES - 1, Ordering::SeqCst);
    let mut collector = Collector { guest, config, rings: Vec::new() };
    let mut vcpus = Vec::new();
    for id in 0..2 {
        let mut vcpu = guest.vcpu();
        let regs = vcpu.regs_mut();
        (regs.rcx, regs.r8, regs.r9) = (id, 6_364_136_223_846_793_005, 1_442_695_040_888_963_407);
        (regs.rdi, regs.rsi, regs.r12) = (DATA, CONTROL, CONTROL + 64 + 8 * id);
        let mut mmu = VcpuMmu::new(Fixed(8));
        if config.records == DirtyRecords::Rings {
            let (ring, end) = DirtyRing::new(128).unwrap();
            guest.shadow.add_dirty_ring(&ring);
            collector.rings.push(ring);
            mmu = mmu.with_ring(end);
        }
        vcpus.push((vcpu, mmu));
    }
    let kickers: Vec<Arc<dyn Kick>> = vcpus.iter().map(|(vcpu, _)| vcpu.kicker()).collect();
    let stop = AtomicBool::new(false);
    /// Also where the test fails.
    struct Stop<'a>(&'a AtomicBool, Vec<Arc<dyn Kick>>);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::SeqCst);
            self.1.iter().for_each(|kicker| kicker.kick());
        }
    }
    std::thread::scope(|scope| {
        let stopper = Stop(&stop, kickers);
        let stop = &stop;
        let threads: Vec<_> = vcpus
            .into_iter()
            .map(|(mut vcpu, mut mmu)| {
                scope.spawn(move || {
                    while !stop.load(Ordering::SeqCst) {
                        if mmu.is_ring_full() {
                            std::thread::yield_now();
                            continue;
                        }
                        assert_eq!(guest.run(&mut *vcpu, &mut mmu), Exit::Kicked);
                    }
                })
            })
            .collect();
        collector.wait_for_stores(100);
        collector.collect();
        collector.copy(|| {
            drop(stopper);
            threads.into_iter().for_each(|thread| thread.join().unwrap());
        });
    });
    guest.check();
}

fn bitmap(method: DirtyMethod, protect: ProtectOn) -> DirtyLogConfig {
    DirtyLogConfig { method, records: DirtyRecords::Bitmap, protect, initially: Initially::Clean }
}

#[test]
fn i34_the_oracle_by_the_dirty_bit() {
    [ProtectOn::Get, ProtectOn::Clear].iter().for_each(|&on| oracle(bitmap(DirtyMethod::DirtyBit, on)));
}

#[test]
fn i34_the_oracle_by_write_protection() {
    [ProtectOn::Get, ProtectOn::Clear].iter().for_each(|&on| oracle(bitmap(DirtyMethod::WriteProtect, on)));
}

#[test]
fn i34_i36_the_oracle_with_rings() {
    let records = DirtyRecords::Rings;
    oracle(DirtyLogConfig { records, ..bitmap(DirtyMethod::WriteProtect, ProtectOn::Get) });
}
