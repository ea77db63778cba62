// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One address space beside its model: each step is done to both, and then both are compared.

use super::common::{Machine, READ, RW, TestFile, Vcpu, pages};
use super::listener::Listeners;
use super::model::{Content, Model, Result};
use super::script::{Age, Death, FILE_PAGES, HEAP, Op, What, Where, hva, page_of};
use shadow_mmu::addr::{Access, Hva, HvaRange, PAGE_SIZE};
use shadow_mmu::iommu::{self, GuestView};
use shadow_mmu::mm::{Advice, Backing, FaultError, MapFlags, Mm, MmError, Object, VmaFlags};
use shadow_mmu::shadow::FaultAroundPolicy;
use std::sync::Arc;
use vm_memory::{Bytes, GuestAddress, guest_memory::Error};

/// The machine and its model, in step.
pub(super) struct Space {
    machine: Machine,
    /// What a device sees; its translations stay from step to step.
    view: GuestView,
    file: Arc<Object>,
    vcpu: Vcpu,
    policy: FaultAroundPolicy,
    model: Model,
    listeners: Listeners,
    /// Memory may run out.
    short: bool,
}

impl Space {
    pub(super) fn new(frames: u64, policy: FaultAroundPolicy, short: bool) -> Self {
        let machine = Machine::new(frames);
        let file = Object::file(&machine.pool, TestFile::new(pages(FILE_PAGES) - PAGE_SIZE / 2));
        let start = hva(page_of(HEAP));
        machine.mm.set_brk_start(start);
        let vcpu = machine.vcpu(0, policy);
        let model = Model { brk: start.0, ..Model::default() };
        let view = iommu::view(&machine.mm).unwrap();
        Self { machine, view, file, vcpu, policy, model, listeners: Listeners::default(), short }
    }

    /// The address space.
    pub(super) fn mm(&self) -> &Arc<Mm> {
        &self.machine.mm
    }

    /// A child, if there is memory for one. Nobody listens to it but its own shadow map.
    pub(super) fn fork(&self) -> Option<Self> {
        let Ok(machine) = self.machine.fork() else {
            assert!(self.short, "a fork failed without need");
            return None;
        };
        let vcpu = machine.vcpu(0, self.policy);
        let (file, model, listeners) = (Arc::clone(&self.file), self.model.fork(), Listeners::default());
        let view = iommu::view(&machine.mm).unwrap();
        Some(Self { machine, view, file, vcpu, policy: self.policy, model, listeners, short: self.short })
    }

    /// The end of a space that is not the last.
    pub(super) fn die(self, death: Death) {
        let Self { machine, view, listeners, vcpu, .. } = self;
        drop((vcpu, view));
        if death == Death::ByReaper {
            assert_eq!(machine.mm.reap().map(|reaped| reaped.skipped), Some(0));
            for vma in machine.mm.vmas().iter().filter(|vma| !vma.is_shared()) {
                let left = vma.range.page_numbers().find(|&page| machine.pte(hva(page)).is_present());
                assert_eq!(left, None, "the reaper left a page");
            }
            listeners.check(&machine.mm);
            machine.check();
        }
        machine.exit();
        listeners.check_order();
    }

    /// The end of the last space: every frame must be back.
    pub(super) fn finish(self) {
        let Self { machine, view, file, vcpu, .. } = self;
        drop((vcpu, view, file));
        machine.finish();
    }

    /// A result that must be the model's, unless memory ran out. Whether it did. `late` are errors that are found
    /// only after memory was needed.
    fn agree<T: PartialEq + std::fmt::Debug, E: PartialEq + std::fmt::Debug>(
        &self,
        real: Result<T, E>,
        model: Result<T, E>,
        out_of_memory: E,
        late: &[E],
    ) -> bool {
        let in_time = model.as_ref().err().is_some_and(|error| !late.contains(error));
        let ran_out = self.short && real == Err(out_of_memory) && !in_time;
        assert!(ran_out || real == model, "the call returned {real:?}, the model {model:?}");
        ran_out
    }

    pub(super) fn step(&mut self, op: Op) {
        let mm = Arc::clone(&self.machine.mm);
        let before = self.model.clone();
        let to_page = |at: Hva| at.page();
        match op {
            Op::Map(place, len, prot, what, mut flags) => {
                let (spot, fixed) = match place {
                    Where::Anywhere => (None, MapFlags::empty()),
                    Where::Hint(spot) => (Some(spot), MapFlags::empty()),
                    Where::Fixed(spot) => (Some(spot), MapFlags::FIXED),
                    Where::NoReplace(spot) => (Some(spot), MapFlags::FIXED_NOREPLACE),
                };
                flags |= fixed;
                let backing = match what {
                    What::File { from } => {
                        Backing::Object { object: Arc::clone(&self.file), offset: pages(from) }
                    }
                    What::Private | What::Shared => Backing::Anonymous,
                };
                flags |= if matches!(what, What::Shared) { MapFlags::SHARED } else { MapFlags::PRIVATE };
                let at = spot.map_or(Hva(0), |spot| hva(page_of(spot)));
                let real = mm.mmap(at, pages(len), prot, flags, backing).map(to_page);
                let model = self.model.map(place, len, prot, what);
                assert_eq!(real, model);
                if let Ok(at) = model
                    && flags.contains(MapFlags::POPULATE)
                {
                    self.model.touch(at..at + len);
                }
            }
            Op::Unmap(spot, len) => {
                mm.munmap(hva(page_of(spot)), pages(len)).unwrap();
                self.model.unmap(page_of(spot), len);
            }
            Op::Protect(spot, len, prot) => {
                let at = page_of(spot);
                let model = self.model.each(at..at + len, |page| {
                    page.prot = prot;
                    Ok(())
                });
                assert_eq!(mm.mprotect(hva(at), pages(len), prot), model);
            }
            Op::Remap { old, old_len, new_len, flags, to } => {
                let (old, to) = (page_of(old), page_of(to));
                let real = mm.mremap(hva(old), pages(old_len), pages(new_len), flags, hva(to)).map(to_page);
                let model = self.model.remap(old, old_len, new_len, flags, to);
                if self.agree(real, model, MmError::NoMemory, &[]) {
                    self.model = before;
                    self.model.remap_clear(old, old_len, new_len, flags, to);
                }
            }
            Op::Advise(spot, len, advice) => {
                let at = page_of(spot);
                let model = self.model.advise(at..at + len, advice);
                let real = mm.madvise(hva(at), pages(len), advice);
                let ran_out = self.agree(real, model, MmError::NoMemory, &[MmError::Fault, MmError::Invalid]);
                if ran_out && advice == Advice::Unmergeable {
                    // Failure leaves the flag (I55).
                    self.model = before;
                }
            }
            Op::Brk { bytes } => {
                let to = hva(page_of(HEAP)).0 + bytes;
                assert_eq!(mm.brk(Hva(to)).0, self.model.brk(to));
            }
            Op::Read(spot) | Op::HostRead(spot) => self.read(page_of(spot), matches!(op, Op::HostRead(_))),
            Op::Fetch(spot) => {
                let at = page_of(spot);
                let model = self.model.access(at, Access::EXEC);
                let real = self.guest(at, |vcpu| vcpu.fetch(hva(at)));
                self.agree(real, model, FaultError::OutOfMemory, &[FaultError::BusError]);
            }
            Op::Write(spot, value) => self.write(page_of(spot), value),
            Op::HostWrite(spot, value) => {
                let at = page_of(spot);
                self.model.touch(at..at + 1);
                let model = self.model.access(at, RW).is_ok();
                let real = self.host(|view, address| view.write_obj(value, address), at).is_some();
                assert!(real == model || self.short && model, "a host write: {real}, the model: {model}");
                if real {
                    self.model.write(at, value);
                }
            }
            Op::ReadAll => {
                let mapped: Vec<u64> = self.model.pages.keys().copied().collect();
                mapped.into_iter().for_each(|at| self.read(at, false));
            }
            Op::WriteAll(value) => {
                let mapped: Vec<u64> = self.model.pages.keys().copied().collect();
                mapped.into_iter().for_each(|at| self.write(at, value.wrapping_add(at)));
            }
            Op::WriteSame(value) => {
                let mapped: Vec<u64> = self.model.pages.keys().copied().collect();
                mapped.into_iter().for_each(|at| self.write(at, value));
            }
            Op::Age(spot, age) => self.age(page_of(spot), age),
            Op::Trap(spot, len, trap) => {
                let at = page_of(spot);
                let range = HvaRange::pages_from(hva(at), len);
                assert_eq!(mm.trap(range, trap), self.model.trap(at..at + len, trap));
            }
            Op::Untrap(spot, len, trap) => {
                let at = page_of(spot);
                let range = HvaRange::pages_from(hva(at), len);
                assert_eq!(mm.untrap(range, trap), self.model.untrap(at..at + len, trap));
            }
            Op::Register => self.listeners.register(&mm),
            Op::Unregister(which) => self.listeners.unregister(&mm, which),
            Op::UnregisterNoRelease(which) => self.listeners.unregister_no_release(&mm, which),
            Op::Fork(_) | Op::Switch(_) | Op::Die(_) | Op::Scan(_) | Op::Unmerge => {
                unreachable!("{op:?} is not about one space")
            }
        }
    }

    fn write(&mut self, at: u64, value: u64) {
        let model = self.model.access(at, Access::WRITE).map(drop);
        let real = self.guest(at, |vcpu| vcpu.write(hva(at), value));
        if !self.agree(real, model, FaultError::OutOfMemory, &[FaultError::BusError]) && model.is_ok() {
            self.model.write(at, value);
        }
    }

    /// An access of the guest to page `at`. If it walks, it is seen.
    fn guest<T>(
        &mut self,
        at: u64,
        access: impl FnOnce(&mut Vcpu) -> Result<T, FaultError>,
    ) -> Result<T, FaultError> {
        let cached = |machine: &Machine| machine.tlb.cached(0).iter().any(|(gfn, _)| gfn.0 == at);
        let walks = !cached(&self.machine);
        self.model.touch(at..at + 1);
        let result = access(&mut self.vcpu);
        if walks && result.is_ok() {
            assert!(self.machine.spte(hva(at)).is_accessed(), "a walk of page {at:#x} left no mark");
        }
        result
    }

    /// Aging, against the marks that both sides have, and against what the model knows was never accessed.
    fn age(&mut self, at: u64, age: Age) {
        let machine = &self.machine;
        let pages = match age {
            Age::Test | Age::ClearFlush | Age::Clear => at..at + 1,
            Age::ClearFlushPmd | Age::ClearPmd => at & !511..(at | 511) + 1,
        };
        let marks = || -> Vec<_> {
            let mapped = self.model.pages.range(pages.clone());
            mapped.map(|(&page, _)| (page, machine.pte(hva(page)), machine.spte(hva(page)))).collect()
        };
        let before = marks();
        // The shadow map's mark, or the device's.
        let secondary = |page: u64| machine.mm.notifiers().test_young(hva(page));
        let marked = before
            .iter()
            .map(|&(page, pte, spte)| {
                assert!(secondary(page) || !spte.is_accessed(), "page {page:#x} is young in {spte:?}");
                pte.is_young() || secondary(page)
            })
            .fold(false, std::ops::BitOr::bitor);
        let helper = match age {
            Age::Test => Mm::test_young,
            Age::ClearFlush => Mm::ptep_clear_flush_young_notify,
            Age::Clear => Mm::ptep_clear_young_notify,
            Age::ClearFlushPmd => Mm::pmdp_clear_flush_young_notify,
            Age::ClearPmd => Mm::pmdp_clear_young_notify,
        };
        // Any address of the page will do.
        let young = helper(&machine.mm, Hva(hva(at).0 + at % PAGE_SIZE));
        assert_eq!(young, marked, "{age:?} of page {at:#x}, whose marks are {before:?}");
        let after = marks();
        if age == Age::Test {
            assert_eq!(after, before, "asking changed something (I48)");
            assert!(!young || self.model.pages[&at].touched, "page {at:#x} is young, and nobody was there");
            return;
        }
        for (&(page, pte, spte), &(_, old_pte, old_spte)) in after.iter().zip(&before) {
            assert!(
                !pte.is_young() && !spte.is_accessed() && !secondary(page),
                "page {page:#x} keeps a mark (I49): {pte:?} {spte:?}"
            );
            assert_eq!(
                (pte, spte.without_marks(), spte.is_dirty()),
                (old_pte.old(), old_spte.without_marks(), old_spte.is_dirty()),
                "aging page {page:#x} changed more than its marks (I48)"
            );
            let flushed = matches!(age, Age::ClearFlush | Age::ClearFlushPmd) && old_spte.is_accessed();
            let cached = machine.tlb.cached(0).iter().any(|(gfn, _)| gfn.0 == page);
            assert!(!flushed || !cached, "the next access to page {page:#x} would not be seen");
        }
        let touched = self.model.age(pages);
        assert!(!young || touched, "{before:?} were young, and nobody was there");
    }

    fn host<T>(
        &self,
        call: impl FnOnce(&GuestView, GuestAddress) -> std::result::Result<T, Error>,
        at: u64,
    ) -> Option<T> {
        call(&self.view, GuestAddress(hva(at).0)).ok()
    }

    fn read(&mut self, at: u64, by_host: bool) {
        let model = self.model.access(at, READ);
        if by_host {
            self.model.touch(at..at + 1);
            let real = self.host(|view, address| view.read_obj::<u64>(address), at);
            assert!(real == model.ok() || self.short && real.is_none(), "a host read: {real:x?}, {model:x?}");
        } else {
            let real = self.guest(at, |vcpu| vcpu.read(hva(at)));
            self.agree(real, model, FaultError::OutOfMemory, &[FaultError::BusError]);
        }
    }

    pub(super) fn check(&self) {
        self.machine.check();
        self.listeners.check(&self.machine.mm);
        self.machine.check_tlb(0);
        let vmas = self.machine.mm.vmas();
        let shapes: Vec<_> = vmas
            .iter()
            .map(|vma| {
                let flags = [
                    VmaFlags::SHARED,
                    VmaFlags::HEAP,
                    VmaFlags::RANDOM,
                    VmaFlags::DONT_FORK,
                    VmaFlags::MERGEABLE,
                ];
                let flags = flags.map(|flag| vma.flags.contains(flag));
                let offset = vma.object_page(vma.range.start).map(|(_, page)| page);
                (vma.range.page_numbers(), vma.prot, flags, offset)
            })
            .collect();
        let expected: Vec<_> = self
            .model
            .runs()
            .into_iter()
            .map(|(run, page)| {
                let offset = match page.content {
                    Content::Anonymous(_) => None,
                    Content::File(index, _) | Content::Shared(_, index) => Some(index),
                };
                let flags = [page.is_shared(), page.heap, page.random, page.dont_fork, page.mergeable];
                (run, page.prot, flags, offset)
            })
            .collect();
        assert_eq!(shapes, expected, "the mappings differ from the model's");
        for (&at, page) in &self.model.pages {
            assert_eq!(self.machine.mm.trapped(hva(at)), page.trap, "page {at:#x}");
            let (pte, vma) = self.machine.mm.lookup(hva(at)).unwrap();
            let mut frame = pte.is_present().then(|| pte.pfn());
            if frame.is_none()
                && page.is_shared()
                && let Some((object, index)) = vma.object_page(hva(at))
            {
                // No pte, but perhaps a page that other ptes have.
                frame = object.cached_page(index).inspect(|&pfn| self.machine.pool.put(pfn));
            }
            let word =
                frame.map(|pfn| self.machine.pool.words(pfn)[0].load(std::sync::atomic::Ordering::SeqCst));
            let fresh = page.fresh(0).content == page.content && !page.is_shared();
            let lost_nothing = fresh || self.model.word(page) == 0;
            assert!(
                word.map_or(lost_nothing, |word| word == self.model.word(page)),
                "page {at:#x} ({pte:?}) begins with {word:x?}, the model's with {:#x}",
                self.model.word(page)
            );
        }
    }
}
