// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a scenario races on: a small pool, an address space, a shadow map over all of it (gpa = hva), and CPUs.
//!
//! [`Machine::race`] runs tasks with scheduling points at every atomic; before and after it only one task is alive and points
//! are off. [`Machine::finish`] checks everything that must hold at the end of any scenario: what CPUs noted, the audit, the
//! poison of free frames, that each cached translation has its leaf (I28), and that no frame is lost. Several machines may
//! have one pool, as guests that share pages have; [`sharing`](crate::sharing) is about those.

use crate::addr::{Access, Gfn, Gpa, Hva, PAGE_SHIFT, PAGE_SIZE};
use crate::cpu::{CPUS, SoftTlb, Vcpu};
use crate::frame::{FramePool, FreedFrames};
use crate::mm::{Backing, FaultRequest, MapFlags, Mm};
use crate::shadow::{AdBits, FaultAroundPolicy, Memslot, ShadowMmu, SlotAccess, Spte, Tlb};
use crate::sync::atomic::Ordering;
use crate::sync::{Arc, Points, points};
use std::sync::OnceLock;

pub(crate) const READ: Access = Access::READ;
pub(crate) const RW: Access = Access::READ.union(Access::WRITE);
/// Guest frames of the slot that covers everything.
const ALL_GFNS: u64 = 1 << 35;
/// Frames of a machine.
const FRAMES: u64 = 40;

/// A task of a race.
pub(crate) type Task<'a> = Box<dyn FnOnce() + Send + 'a>;

/// Makes a task.
pub(crate) fn task<'a>(run: impl FnOnce() + Send + 'a) -> Task<'a> {
    Box::new(run)
}

/// The `n`-th page from `base` on.
pub(crate) fn page(base: Hva, n: u64) -> Hva {
    Hva(base.0 + n * PAGE_SIZE)
}

/// See the top of the file.
#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) pool: Arc<FramePool>,
    pub(crate) mm: Arc<Mm>,
    pub(crate) tlb: Arc<SoftTlb>,
    /// Made by the scenario itself where that is part of the race.
    shadow: OnceLock<ShadowMmu>,
}

impl Machine {
    /// A machine with nothing mapped.
    pub(crate) fn new() -> Self {
        let machine = Self::without_shadow();
        machine.make_shadow();
        machine
    }

    /// The same with CPUs that do with A and D what `ad` says.
    pub(crate) fn with_ad_bits(ad: AdBits) -> Self {
        let machine = Self::unshadowed(ad);
        machine.make_shadow();
        machine
    }

    /// The same with a slot of 16 MiB. What goes through a whole slot is short then, and schedules are about what matters.
    pub(crate) fn small(ad: AdBits) -> Self {
        let machine = Self::unshadowed(ad);
        machine.make_shadow_of(Memslot { pages: 16 << 20 >> PAGE_SHIFT, ..Self::slot() });
        machine
    }

    /// As [`small`](Self::small), with its frames from the pool of this one.
    pub(crate) fn small_beside(&self, ad: AdBits) -> Self {
        let machine = Self::of_pool(Arc::clone(&self.pool), ad);
        machine.make_shadow_of(Memslot { pages: 16 << 20 >> PAGE_SHIFT, ..Self::slot() });
        machine
    }

    /// One whose shadow map is still to be made.
    pub(crate) fn without_shadow() -> Self {
        Self::unshadowed(AdBits::AfterFlush)
    }

    fn unshadowed(ad: AdBits) -> Self {
        Self::of_pool(Arc::new(FramePool::new(FRAMES * PAGE_SIZE, FreedFrames::Poison).unwrap()), ad)
    }

    fn of_pool(pool: Arc<FramePool>, ad: AdBits) -> Self {
        let mm = Mm::new(Arc::clone(&pool)).unwrap();
        let tlb = Arc::new(SoftTlb::new(&pool, ad));
        Self { pool, mm, tlb, shadow: OnceLock::new() }
    }

    /// Makes the shadow map.
    pub(crate) fn make_shadow(&self) {
        self.make_shadow_of(Self::slot());
    }

    fn make_shadow_of(&self, slot: Memslot) {
        self.make_shadow_over(self.tlb.clone(), slot);
    }

    /// Makes the shadow map with this slot, whose translations are cached by `tlb` and by no CPU of [`cpu`](crate::cpu).
    pub(crate) fn make_shadow_over(&self, tlb: Arc<dyn Tlb>, slot: Memslot) {
        let shadow = ShadowMmu::new(Arc::clone(&self.mm), tlb).unwrap();
        shadow.add_slot(slot).unwrap();
        assert!(self.shadow.set(shadow).is_ok(), "a machine has one shadow map");
    }

    /// The slot that a machine begins with.
    pub(crate) fn slot() -> Memslot {
        Memslot { gfn: Gfn(0), pages: ALL_GFNS, hva: Hva(0), access: SlotAccess::ReadWrite }
    }

    pub(crate) fn shadow(&self) -> &ShadowMmu {
        self.shadow.get().expect("the scenario has made its shadow map")
    }

    /// CPU `id`, whose faults bring nothing along.
    pub(crate) fn vcpu(&self, id: usize) -> Vcpu<'_> {
        Vcpu::new(self, id, FaultAroundPolicy::Off)
    }

    /// Maps `count` pages of private memory.
    pub(crate) fn map(&self, count: u64, prot: Access) -> Hva {
        self.mm.mmap(Hva(0), count * PAGE_SIZE, prot, MapFlags::PRIVATE, Backing::Anonymous).unwrap()
    }

    /// Maps `count` pages of private memory at `at`.
    pub(crate) fn map_at(&self, at: Hva, count: u64, prot: Access) -> Hva {
        let flags = MapFlags::PRIVATE | MapFlags::FIXED;
        self.mm.mmap(at, count * PAGE_SIZE, prot, flags, Backing::Anonymous).unwrap()
    }

    /// Maps `count` pages of shared memory.
    pub(crate) fn map_shared(&self, count: u64, prot: Access) -> Hva {
        self.mm.mmap(Hva(0), count * PAGE_SIZE, prot, MapFlags::SHARED, Backing::Anonymous).unwrap()
    }

    /// The leaf of the page at `at`.
    pub(crate) fn spte(&self, at: Hva) -> Spte {
        self.shadow().spte(Gpa(at.0).gfn())
    }

    /// The first word of the page at `at`, as the host reads it. `None` where the primary refuses.
    pub(crate) fn peek(&self, at: Hva) -> Option<u64> {
        let pinned = self.mm.fault(&FaultRequest::one_page(at, READ)).ok()?;
        Some(self.pool.words(pinned.required().pfn)[0].load(Ordering::SeqCst))
    }

    /// Writes the first word of the page at `at`, as the host does. Whether the primary allowed it.
    pub(crate) fn poke(&self, at: Hva, value: u64) -> bool {
        let Ok(pinned) = self.mm.fault(&FaultRequest::one_page(at, RW)) else { return false };
        self.pool.words(pinned.required().pfn)[0].store(value, Ordering::SeqCst);
        true
    }

    /// Notes a broken promise.
    pub(crate) fn must(&self, holds: bool, what: impl FnOnce() -> String) {
        if !holds {
            self.tlb.note(what);
        }
    }

    /// Runs the tasks at the same time, and returns when all are done.
    pub(crate) fn race<const N: usize>(&self, tasks: [Task<'_>; N]) {
        points(Points::On);
        shuttle::thread::scope(|scope| {
            for task in tasks {
                scope.spawn(task);
            }
        });
        points(Points::Off);
    }

    /// What must hold whenever no task runs.
    fn check(&self) -> Result<(), String> {
        if let Some(wrong) = self.tlb.wrong() {
            return Err(wrong);
        }
        let report = self.shadow().audit(&self.mm);
        if let Some(violation) = report.violations.first() {
            return Err(violation.to_string());
        }
        if let Some(violation) = self.mm.audit().violations.first() {
            return Err(violation.to_string());
        }
        for (cpu, (gfn, cached)) in
            (0..CPUS).flat_map(|cpu| self.tlb.cached(cpu).into_iter().map(move |it| (cpu, it)))
        {
            let spte = self.shadow().spte(gfn);
            if !spte.is_leaf() || spte.pfn() != cached.pfn || !spte.rights().contains(cached.rights) {
                return Err(format!(
                    "CPU {cpu} has {cached:x?} cached for {gfn:x?}, but the leaf is {spte:?} (I28)"
                ));
            }
        }
        match self.pool.check_poison() {
            0 => Ok(()),
            frames => Err(format!("{frames} frames were written after they were freed (I22)")),
        }
    }

    /// Checks the machine, takes it apart, and checks that nothing is left.
    pub(crate) fn finish(self) {
        Self::finish_all(vec![self]);
    }

    /// The same with machines that have one pool, and no other.
    pub(crate) fn finish_all(machines: Vec<Self>) {
        let checked = machines.iter().try_for_each(Self::check);
        if let Err(wrong) = checked.and_then(|()| Self::unmap_all(&machines)) {
            // Taking a broken machine apart could fail in ways that say less.
            std::mem::forget(machines);
            panic!("{wrong}");
        }
        let pool = Arc::clone(&machines[0].pool);
        for Self { mm, tlb, shadow, .. } in machines {
            drop(shadow);
            mm.notifiers().synchronize().unwrap();
            drop((mm, tlb));
        }
        assert_eq!(pool.free_frames(), pool.frame_count(), "frames are lost");
    }

    fn unmap_all(machines: &[Self]) -> Result<(), String> {
        let mut held = 0;
        for machine in machines {
            for vma in machine.mm.vmas() {
                machine.mm.munmap(vma.range.start, vma.range.len()).map_err(|error| error.to_string())?;
            }
            machine.check()?;
            // A shadow map that went keeps its frames until no list of listeners holds it.
            machine.mm.notifiers().synchronize().map_err(|error| error.to_string())?;
            // The zero frame, the primary's root, and the shadow map's tables, which stay.
            held += 2 + machine.shadow().table_count();
        }
        let pool = &machines[0].pool;
        match pool.frame_count() - pool.free_frames() {
            used if used == held => Ok(()),
            used => Err(format!("{used} frames are in use with nothing mapped, not {held}")),
        }
    }
}
