// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Random scripts of memory calls, guest accesses and host accesses against a model of a few dozen lines.
//!
//! The [`Model`] knows, page by page, what is mapped, with which rights, and which word the page begins with. After every
//! step: calls returned what the model returned, the VMAs are the model's pages in maximal runs, every page that is in
//! memory holds the model's word and every page that is not holds nothing to lose (I24), the audit is clean (I13–I17,
//! I21, I43), nothing is cached that no leaf backs (I28), no freed frame was written (I22). At the end the vCPU reads
//! every page, and every frame comes back (I23). The second property runs out of memory all the time: calls may fail for
//! that, but only then, and nothing else changes.
//!
//! A failure prints the smallest script that fails; it goes into [`scripts_that_failed_once`].
#![cfg(feature = "mmu-notifier")]
// What a test does not expect may end it.
#![allow(clippy::unwrap_used)]

mod common;
#[path = "mm_model/model.rs"]
mod model;
#[path = "mm_model/script.rs"]
mod script;

use common::{Machine, READ, RW, TestFile, Vcpu, pages};
use model::{Content, Model, Result};
use proptest::prelude::*;
use script::{FILE_PAGES, HEAP, Op, What, Where, hva, op, page_of};
use shadow_mmu::addr::{Access, Hva, PAGE_SIZE};
use shadow_mmu::mm::{Advice, Backing, FaultError, MapFlags, MmError, Object, RemapFlags, VmaFlags};
use shadow_mmu::shadow::FaultAroundPolicy;
use std::sync::Arc;
use vm_memory::{Bytes, GuestAddress, guest_memory::Error};

/// The machine and its model, in step.
struct Pair {
    machine: Machine,
    file: Arc<Object>,
    vcpu: Vcpu,
    model: Model,
    /// Memory may run out.
    short: bool,
}

impl Pair {
    fn new(frames: u64, policy: FaultAroundPolicy, short: bool) -> Self {
        let machine = Machine::new(frames);
        let file = Object::file(&machine.pool, TestFile::new(pages(FILE_PAGES) - PAGE_SIZE / 2));
        let start = hva(page_of(HEAP));
        machine.mm.set_brk_start(start);
        let vcpu = machine.vcpu(0, policy);
        Self { machine, file, vcpu, model: Model { brk: start.0, ..Model::default() }, short }
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

    fn step(&mut self, op: Op) {
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
                self.agree(real, model, MmError::NoMemory, &[MmError::Fault, MmError::Invalid]);
            }
            Op::Brk { bytes } => {
                let to = hva(page_of(HEAP)).0 + bytes;
                assert_eq!(mm.brk(Hva(to)).0, self.model.brk(to));
            }
            Op::Read(spot) | Op::HostRead(spot) => self.read(page_of(spot), matches!(op, Op::HostRead(_))),
            Op::Fetch(spot) => {
                let model = self.model.access(page_of(spot), Access::EXEC);
                let real = self.vcpu.fetch(hva(page_of(spot)));
                self.agree(real, model, FaultError::OutOfMemory, &[FaultError::BusError]);
            }
            Op::Write(spot, value) => {
                let at = page_of(spot);
                let model = self.model.access(at, Access::WRITE).map(drop);
                let real = self.vcpu.write(hva(at), value);
                if !self.agree(real, model, FaultError::OutOfMemory, &[FaultError::BusError]) && model.is_ok()
                {
                    self.model.write(at, value);
                }
            }
            Op::HostWrite(spot, value) => {
                let at = page_of(spot);
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
        }
    }

    fn host<T>(
        &self,
        call: impl FnOnce(&shadow_mmu::iommu::GuestView, GuestAddress) -> std::result::Result<T, Error>,
        at: u64,
    ) -> Option<T> {
        call(&shadow_mmu::iommu::view(&self.machine.mm).unwrap(), GuestAddress(hva(at).0)).ok()
    }

    fn read(&mut self, at: u64, by_host: bool) {
        let model = self.model.access(at, READ);
        if by_host {
            let real = self.host(|view, address| view.read_obj::<u64>(address), at);
            assert!(real == model.ok() || self.short && real.is_none(), "a host read: {real:x?}, {model:x?}");
        } else {
            let real = self.vcpu.read(hva(at));
            self.agree(real, model, FaultError::OutOfMemory, &[FaultError::BusError]);
        }
    }

    fn check(&self) {
        self.machine.check();
        self.machine.check_tlb(0);
        let vmas = self.machine.mm.vmas();
        let shapes: Vec<_> = vmas
            .iter()
            .map(|vma| {
                let flags =
                    [VmaFlags::SHARED, VmaFlags::HEAP, VmaFlags::RANDOM].map(|f| vma.flags.contains(f));
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
                (run, page.prot, [page.is_shared(), page.heap, page.random], offset)
            })
            .collect();
        assert_eq!(shapes, expected, "the mappings differ from the model's");
        for (&at, page) in &self.model.pages {
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
            let lost_nothing = page.fresh(0) == *page && !page.is_shared() || self.model.word(page) == 0;
            assert!(
                word.map_or(lost_nothing, |word| word == self.model.word(page)),
                "page {at:#x} ({pte:?}) begins with {word:x?}, the model's with {:#x}",
                self.model.word(page)
            );
        }
    }

    fn run(mut self, script: &[Op]) {
        for &op in script {
            self.step(op);
            self.check();
        }
        self.step(Op::ReadAll);
        self.check();
        let Self { machine, file, vcpu, .. } = self;
        drop((vcpu, file));
        machine.finish();
    }
}

fn policy() -> impl Strategy<Value = FaultAroundPolicy> {
    prop_oneof![
        Just(FaultAroundPolicy::Off),
        Just(FaultAroundPolicy::Fixed(8)),
        Just(FaultAroundPolicy::Fixed(64)),
        Just(FaultAroundPolicy::Adaptive)
    ]
}

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, failure_persistence: None, max_shrink_iters: 4000, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(config(1000))]

    #[test]
    fn i13_i14_i21_i24_i28_scripts_do_what_the_model_does(
        script in prop::collection::vec(op(), 1..80),
        policy in policy(),
    ) {
        Pair::new(512, policy, false).run(&script);
    }

    #[test]
    fn i23_running_out_of_memory_fails_calls_and_changes_nothing_else(
        script in prop::collection::vec(op(), 1..80),
        policy in policy(),
        frames in 41..72u64,
    ) {
        Pair::new(frames, policy, true).run(&script);
    }
}

#[test]
fn scripts_that_failed_once() {
    let map = |at, len, what| Op::Map(Where::Fixed(at), len, RW, what, MapFlags::empty());
    // Advice on no page split a mapping and lost the second half.
    let nothing = [map(0, 6, What::Private), Op::Write(4, 7), Op::Advise(3, 0, Advice::Random), Op::Read(4)];
    // A move that was refused had unmapped its target already.
    let (old_len, new_len, flags) = (0, 4, RemapFlags::MAYMOVE | RemapFlags::FIXED);
    let refused =
        [map(0, 6, What::Private), Op::Write(2, 7), Op::Remap { old: 1, old_len, new_len, flags, to: 0 }];
    for script in [&nothing[..], &refused[..]] {
        Pair::new(512, FaultAroundPolicy::Off, false).run(script);
    }
}
