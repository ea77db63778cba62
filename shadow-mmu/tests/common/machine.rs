// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Everything that a test needs to run a guest without a guest.

use super::{ALL_GFNS, Hook, SoftTlb, Vcpu, pages};
use shadow_mmu::addr::{Access, Gfn, Gpa, Hva, PAGE_SIZE};
use shadow_mmu::frame::{FramePool, FreedFrames};
use shadow_mmu::inject::Faults;
use shadow_mmu::mm::{Backing, FaultRequest, MapFlags, Mm, MmError, Pte};
use shadow_mmu::shadow::{AdBits, FaultAroundPolicy, Memslot, ShadowError, ShadowMmu, SlotAccess, Spte, Tlb};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A pool, an address space, a shadow map over all of it (gpa = hva) and listeners to stop it at.
#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) pool: Arc<FramePool>,
    pub(crate) mm: Arc<Mm>,
    pub(crate) tlb: Arc<SoftTlb>,
    pub(crate) shadow: Arc<ShadowMmu>,
    /// Its ops run before the shadow map's.
    pub(crate) before: Arc<Hook>,
    /// Its ops run after the shadow map's.
    pub(crate) after: Arc<Hook>,
}

impl Machine {
    /// A machine with `frames` frames and one slot for everything.
    pub(crate) fn new(frames: u64) -> Self {
        Self::with_ad_bits(frames, AdBits::AfterFlush)
    }

    /// A machine whose CPUs do this with A and D. Their caches are emptied by flushes alone, so that of [`AdBits::Unflushed`]
    /// is as bad as it can be.
    pub(crate) fn with_ad_bits(frames: u64, ad: AdBits) -> Self {
        Self::over(Mm::new(Self::pool(frames)).unwrap(), ad).unwrap().with_slot()
    }

    /// A machine whose pool and space have fault points that `faults` decides over.
    pub(crate) fn with_faults(frames: u64, faults: Faults) -> Self {
        super::limit_run_time();
        let pool = FramePool::with_faults(pages(frames), FreedFrames::Poison, faults.clone()).unwrap();
        let mm = Mm::with_faults(Arc::new(pool), faults).unwrap();
        Self::over(mm, AdBits::AfterFlush).unwrap().with_slot()
    }

    fn pool(frames: u64) -> Arc<FramePool> {
        super::limit_run_time();
        Arc::new(FramePool::new(pages(frames), FreedFrames::Poison).unwrap())
    }

    /// A machine of its own, whose frames are of this one's pool and whose CPUs do this with A and D.
    pub(crate) fn beside(&self, ad: AdBits) -> Self {
        Self::over(Mm::new(Arc::clone(&self.pool)).unwrap(), ad).unwrap().with_slot()
    }

    pub(crate) fn without_slot(frames: u64) -> Self {
        Self::over(Mm::new(Self::pool(frames)).unwrap(), AdBits::AfterFlush).unwrap()
    }

    /// A machine of its own for a fork of this one's space.
    ///
    /// # Errors
    /// Too few frames, for the space or for the shadow map.
    pub(crate) fn fork(&self) -> Result<Self, MmError> {
        Self::over(self.mm.fork()?, self.tlb.ad_bits()).map(Self::with_slot).map_err(|_| MmError::NoMemory)
    }

    fn over(mm: Arc<Mm>, ad: AdBits) -> Result<Self, ShadowError> {
        let pool = Arc::clone(mm.pool());
        let tlb = Arc::new(SoftTlb::new(Arc::clone(&pool), 8, ad));
        let (before, after) = (Arc::<Hook>::default(), Arc::<Hook>::default());
        // Newest first: what is registered before the shadow map is called after it.
        let subscription = mm.register(after.clone()).unwrap();
        let shadow = ShadowMmu::new(Arc::clone(&mm), tlb.clone())
            .inspect_err(|_| mm.unregister(&subscription).unwrap())?;
        mm.register(before.clone()).unwrap();
        Ok(Self { pool, mm, tlb, shadow: Arc::new(shadow), before, after })
    }

    fn with_slot(self) -> Self {
        let all = Memslot { gfn: Gfn(0), pages: ALL_GFNS, hva: Hva(0), access: SlotAccess::ReadWrite };
        self.shadow.add_slot(all).unwrap();
        self
    }

    pub(crate) fn vcpu(&self, id: usize, policy: FaultAroundPolicy) -> Vcpu {
        Vcpu::new(id, &self.tlb, &self.shadow, policy)
    }

    /// Maps `count` pages of private memory anywhere.
    pub(crate) fn map(&self, count: u64, prot: Access) -> Hva {
        self.mm.mmap(Hva(0), pages(count), prot, MapFlags::PRIVATE, Backing::Anonymous).unwrap()
    }

    /// Maps `count` pages of memory at `at`, over what is there.
    pub(crate) fn map_at(&self, at: Hva, count: u64, prot: Access, flags: MapFlags) {
        self.mm.mmap(at, pages(count), prot, flags | MapFlags::FIXED, Backing::Anonymous).unwrap();
    }

    pub(crate) fn spte(&self, at: Hva) -> Spte {
        self.shadow.spte(Gpa(at.0).gfn())
    }

    pub(crate) fn pte(&self, at: Hva) -> Pte {
        self.mm.lookup(at).map_or(Pte::NONE, |(pte, _)| pte)
    }

    /// The word at `at`, through a page that is pinned: as get_user_pages would, also while a pair is open.
    pub(crate) fn peek(&self, at: Hva) -> u64 {
        self.with_word(at, Access::READ, |word| word.load(Ordering::SeqCst))
    }

    /// Writes the word at `at` in the same way.
    pub(crate) fn poke(&self, at: Hva, value: u64) {
        self.with_word(at, Access::READ | Access::WRITE, |word| word.store(value, Ordering::SeqCst));
    }

    fn with_word<R>(&self, at: Hva, access: Access, with: impl FnOnce(&AtomicU64) -> R) -> R {
        let pinned = self.mm.fault(&FaultRequest::one_page(at, access)).unwrap();
        with(&self.pool.words(pinned.required().pfn)[(at.0 % PAGE_SIZE / 8) as usize])
    }

    /// Every invariant that can be looked at from outside, now.
    #[track_caller]
    pub(crate) fn check(&self) {
        let report = self.shadow.audit(&self.mm);
        assert!(report.violations.is_empty(), "{:#?}", report.violations);
        assert_eq!(
            self.tlb.freed_accesses.load(Ordering::SeqCst),
            0,
            "a vCPU reached a free frame (I21, I22)"
        );
        assert_eq!(self.pool.check_poison(), 0, "a frame was written after it was freed (I22)");
        assert_eq!(self.tlb.host.lost_accesses(), 0, "a vCPU reached an adopted frame without a slot");
    }

    /// I28, where nothing runs: each cached translation is backed by a leaf with the same frame and at least its rights.
    #[track_caller]
    pub(crate) fn check_tlb(&self, cpu: usize) {
        for (gfn, cached) in self.tlb.cached(cpu) {
            let spte = self.shadow.spte(gfn);
            assert!(
                spte.is_leaf() && spte.pfn() == cached.pfn && spte.rights().contains(cached.rights),
                "vCPU {cpu} has {cached:x?} cached for guest frame {:#x}, but the leaf is {spte:?} (I28)",
                gfn.0
            );
        }
    }

    /// Unmaps everything and checks that every frame is back but the roots, the zero frame and the shadow's empty tables;
    /// then lets go of all of it and checks those too.
    #[track_caller]
    pub(crate) fn finish(self) {
        let frames = self.pool.stats().frames;
        for vma in self.mm.vmas() {
            self.mm.munmap(vma.range.start, vma.range.len()).unwrap();
        }
        self.check();
        assert_eq!(self.mm.table_count(), 1, "primary page tables are left");
        let held = 1 + 1 + self.shadow.table_count();
        assert_eq!(self.pool.free_frames() + held, frames, "frames leaked");
        let pool = self.exit();
        assert_eq!(pool.check_poison(), 0);
        assert_eq!(pool.free_frames(), frames, "frames leaked with the machine");
    }

    /// Ends the machine with all that is mapped, and gives back its pool.
    pub(crate) fn exit(self) -> Arc<FramePool> {
        [&self.before, &self.after].iter().for_each(|hook| hook.open_all());
        self.mm.release();
        let Self { pool, mm, tlb, shadow, .. } = self;
        drop(shadow);
        mm.notifiers().synchronize().unwrap();
        drop((mm, tlb));
        pool
    }
}
