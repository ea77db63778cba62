// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Random guests in a process whose mappings are a TLB over the shadow map, against a model: which pages there are, with which
//! rights, and which word each begins with.
//!
//! The process is a map from pages to frames and rights. Its vCPU does what an engine does: an access that is not mapped is
//! filled, and where the shadow map has nothing either it is a page fault. Now and then a system call fails. After each step the
//! entries of the TLB are what the process has mapped, in maximal runs and no more than allowed (I60); and each mapped page is a
//! leaf of the shadow map, with that frame, and with no right that the leaf or its marks do not cover (I28, I59).
#![cfg(feature = "mmu-notifier")]
// What a test does not expect may end it.
#![allow(clippy::unwrap_used)]

mod common;

use common::{NONE, READ, RW, RX, Random, limit_run_time, page, pages};
use shadow_mmu::addr::{Access, Gfn, Gpa, Hva, HvaRange, PAGE_SIZE, Pfn};
use shadow_mmu::frame::{FramePool, FreedFrames};
use shadow_mmu::ksm::{Domain, Ksm, KsmSettings};
use shadow_mmu::mm::{Advice, Backing, FaultRequest, MapFlags, Mm, RemapFlags};
use shadow_mmu::shadow::FaultAroundPolicy::{Fixed, Off};
use shadow_mmu::shadow::{
    DirtyMethod, FaultAroundPolicy, Filled, HostMappings, Memslot, Prefaulted, ProtectOn, ShadowMmu,
    SlotAccess, SoftTlb, Tlb, Translation, VcpuMmu, Walker, Zapped,
};
use shadow_mmu::sync::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Pages of a guest, half of them on either side of a table's end.
const PAGES: u64 = 96;
const BASE: Hva = Hva(0x4000_0000 - PAGES / 2 * PAGE_SIZE);
const FIRST: u64 = BASE.0 / PAGE_SIZE;
const SLOT: Gfn = Gfn(0);
const STEPS: usize = 3000;

/// The process, and what is known of it.
#[derive(Debug)]
struct Process {
    mapped: Mutex<BTreeMap<u64, (Pfn, Access)>>,
    tlb: SoftTlb,
    calls: AtomicU64,
    /// One of so many calls fails, having done a part of its work.
    fails: u64,
}

#[derive(Debug)]
struct Refused;

struct Calls<'a>(&'a Process);

impl Calls<'_> {
    fn result(&self) -> Result<(), Refused> {
        match self.0.calls.fetch_add(1, Ordering::SeqCst) % self.0.fails {
            0 => Err(Refused),
            _ => Ok(()),
        }
    }
}

impl HostMappings for Calls<'_> {
    type Error = Refused;

    fn map(&mut self, translation: &Translation) -> Result<(), Refused> {
        let result = self.result();
        let done = if result.is_ok() { translation.pages } else { translation.pages / 2 };
        for n in 0..done {
            let frame = (Pfn(translation.pfn.0 + n as u32), translation.rights);
            self.0.mapped.lock().insert(translation.gfn.0 + n, frame);
        }
        result
    }

    fn unmap(&mut self, pages: &[Range<u64>]) -> Result<(), Refused> {
        let result = self.result();
        let done = if result.is_ok() { pages } else { &pages[..pages.len() / 2] };
        self.0.mapped.lock().retain(|page, _| !done.iter().any(|pages| pages.contains(page)));
        result
    }

    fn unmap_all(&mut self) -> Result<(), Refused> {
        self.result().inspect(|()| self.0.mapped.lock().clear())
    }
}

impl Tlb for Process {
    fn flush(&self, zapped: &[Zapped]) {
        self.tlb.flush(zapped, &mut Calls(self)).unwrap();
    }
    fn flush_all(&self) {
        self.tlb.flush_all(&mut Calls(self)).unwrap();
    }
}

/// What a page of the guest is, if it is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Page {
    rights: Access,
    word: u64,
}

struct Guest {
    pool: Arc<FramePool>,
    mm: Arc<Mm>,
    shadow: ShadowMmu,
    process: Arc<Process>,
    walker: Walker,
    mmu: VcpuMmu,
    ksm: Arc<Ksm>,
    model: Vec<Option<Page>>,
    /// A child, with what its parent had.
    child: Option<(Arc<Mm>, Vec<Option<Page>>)>,
    /// Written since the last report.
    written: BTreeSet<u64>,
    random: Random,
    merged: u64,
    most: usize,
}

impl Guest {
    fn new(seed: u64, most: usize, policy: FaultAroundPolicy, marks: Prefaulted) -> Self {
        limit_run_time();
        let pool = Arc::new(FramePool::new(pages(2048), FreedFrames::Poison).unwrap());
        let mm = Mm::new(Arc::clone(&pool)).unwrap();
        let (mapped, calls) = (Mutex::default(), AtomicU64::new(1));
        let process = Arc::new(Process { mapped, tlb: SoftTlb::new(most), calls, fails: 17 });
        let shadow = ShadowMmu::new(Arc::clone(&mm), process.clone()).unwrap();
        let all = Memslot { gfn: SLOT, pages: FIRST + PAGES, hva: Hva(0), access: SlotAccess::ReadWrite };
        shadow.add_slot(all).unwrap();
        shadow.set_prefaulted(marks);
        let method = [DirtyMethod::DirtyBit, DirtyMethod::WriteProtect][seed as usize % 2];
        shadow.enable_dirty_log(SLOT, common::bitmap_log(method, ProtectOn::Get)).unwrap();
        let ksm =
            Ksm::new(Arc::clone(&pool), KsmSettings { seed: Some(1), ..KsmSettings::default() }).unwrap();
        ksm.enter(&mm, Domain(0)).unwrap();
        let walker = Walker::new(Arc::clone(&pool), shadow.root());
        Self {
            pool,
            mm,
            shadow,
            process,
            walker,
            mmu: VcpuMmu::new(policy),
            ksm,
            model: vec![None; PAGES as usize],
            child: None,
            written: BTreeSet::new(),
            random: Random(seed),
            merged: 0,
            most,
        }
    }

    /// Does `access` to page `n`, as the guest; a write stores `word`. What it read, unless the guest may not.
    fn access(&mut self, n: u64, access: Access, word: u64) -> Option<u64> {
        let at = page(BASE, n);
        for _ in 0..100 {
            {
                let mapped = self.process.mapped.lock();
                if let Some(&(pfn, _)) = mapped.get(&at.page()).filter(|(_, rights)| rights.contains(access))
                {
                    assert!(self.pool.frame(pfn).ref_count() > 0, "a free frame is mapped (I22)");
                    let first = &self.pool.words(pfn)[0];
                    if access == Access::WRITE {
                        first.store(word, Ordering::SeqCst);
                    }
                    return Some(first.load(Ordering::SeqCst));
                }
            }
            let filled =
                self.process.tlb.fill(&self.walker, Gpa(at.0).gfn(), access, &mut Calls(&self.process));
            if filled.unwrap() == Filled::NotAllowed
                && self.shadow.fault(&mut self.mmu, Gpa(at.0), access).is_err()
            {
                return None;
            }
        }
        panic!("the guest faults at {at} for {access} for ever");
    }

    /// The same, held against the model.
    fn touch(&mut self, n: u64) {
        let access = [READ, READ, Access::WRITE, Access::EXEC][self.random.below(4) as usize];
        let word = self.random.below(4);
        let got = self.access(n, access, word);
        let known = &mut self.model[n as usize];
        match known.as_mut().filter(|known| known.rights.contains(access)) {
            None => assert_eq!(got, None, "page {n} is {known:?}, and {access} was possible"),
            Some(known) => {
                if access == Access::WRITE {
                    known.word = word;
                    self.written.insert(FIRST + n);
                }
                assert_eq!(got, Some(known.word), "page {n}, for {access} (I24)");
            }
        }
    }

    fn some(&mut self) -> Range<u64> {
        let first = self.random.below(PAGES);
        first..(first + 1 + self.random.below(20)).min(PAGES)
    }

    fn step(&mut self) {
        let some = self.some();
        let (at, len) = (page(BASE, some.start), pages(some.end - some.start));
        let range = some.start as usize..some.end as usize;
        let whole = self.model[range.clone()].iter().all(Option::is_some);
        let rights = [RW, RW, RW, READ, RX, Access::all(), NONE][self.random.below(7) as usize];
        match self.random.below(60) {
            0 | 1 => {
                let flags = MapFlags::PRIVATE | MapFlags::FIXED;
                self.mm.mmap(at, len, rights, flags, Backing::Anonymous).unwrap();
                self.mm.madvise(at, len, Advice::Mergeable).unwrap();
                self.model[range].fill(Some(Page { rights, word: 0 }));
            }
            2 => {
                self.mm.munmap(at, len).unwrap();
                self.model[range].fill(None);
            }
            3..6 if whole => {
                self.mm.mprotect(at, len, rights).unwrap();
                self.model[range].iter_mut().flatten().for_each(|page| page.rights = rights);
            }
            6 | 7 if whole => {
                self.mm.madvise(at, len, Advice::DontNeed).unwrap();
                self.model[range].iter_mut().flatten().for_each(|page| page.word = 0);
            }
            8 if whole => {
                let to = self.random.below(PAGES);
                if to != some.start {
                    let flags = RemapFlags::MAYMOVE | RemapFlags::FIXED;
                    self.mm.mremap(at, PAGE_SIZE, PAGE_SIZE, flags, page(BASE, to)).unwrap();
                    self.model[to as usize] = self.model[range.start].take();
                }
            }
            9 => self.fork(),
            10 => self.young(some),
            11..14 => self.report(),
            14..17 => self.merged += self.ksm.scan(200).merged,
            17 => _ = self.mm.age(),
            _ => some.for_each(|n| self.touch(n)),
        }
    }

    /// The child of the last time has what its parent had then; a new one takes its place.
    fn fork(&mut self) {
        if let Some((child, model)) = self.child.take() {
            for (n, known) in (0..).zip(&model) {
                if let Some(known) = known.filter(|known| known.rights.contains(READ)) {
                    let pinned = child.fault(&FaultRequest::one_page(page(BASE, n), READ)).unwrap();
                    let word = self.pool.words(pinned.required().pfn)[0].load(Ordering::SeqCst);
                    assert_eq!(word, known.word, "page {n} of the child (I15)");
                }
            }
        } else {
            self.child = Some((self.mm.fork().unwrap(), self.model.clone()));
        }
    }

    /// Every access behind the clearing of A is seen.
    fn young(&mut self, some: Range<u64>) {
        self.mm.notifiers().clear_flush_young(HvaRange::pages_from(BASE, PAGES));
        self.check();
        assert!(self.process.mapped.lock().is_empty(), "what is mapped was accessed, and is not known to be");
        for n in some {
            if self.access(n, READ, 0).is_some() {
                assert!(self.mm.notifiers().test_young(page(BASE, n)), "page {n} was read (I48)");
            }
        }
    }

    /// Every write since the last report is in this one.
    fn report(&mut self) {
        let report = self.shadow.get_dirty_log(SLOT).unwrap();
        let missing: Vec<_> = self.written.iter().filter(|&&gfn| !report.contains(gfn)).collect();
        assert!(missing.is_empty(), "{missing:x?} were written (I34)");
        self.written.clear();
    }

    #[track_caller]
    fn check(&self) {
        let mapped = self.process.mapped.lock();
        for (&gfn, &(pfn, rights)) in mapped.iter() {
            let spte = self.shadow.spte(Gfn(gfn));
            assert!(
                spte.is_leaf() && spte.pfn() == pfn && spte.rights().contains(rights),
                "page {gfn:#x} is mapped to {pfn:?} {rights}, and the leaf is {spte:?} (I28)"
            );
            let unseen = !spte.is_accessed() || rights.contains(Access::WRITE) && !spte.is_dirty();
            assert!(!unseen, "page {gfn:#x} can be accessed by {rights} unseen: {spte:?} (I59)");
        }
        let outside = mapped.keys().any(|gfn| !(FIRST..FIRST + PAGES).contains(gfn));
        assert!(!outside, "{mapped:x?} (I60)");
        for gfn in FIRST..FIRST + PAGES {
            let known = self.process.tlb.rights(Gfn(gfn));
            assert_eq!(known, mapped.get(&gfn).map_or(NONE, |it| it.1), "page {gfn:#x} (I60)");
        }
        let continues = |gfn: u64, pfn: Pfn, rights: Access| {
            gfn.checked_sub(1)
                .and_then(|before| mapped.get(&before))
                .is_some_and(|&(before, same)| u64::from(before.0) + 1 == u64::from(pfn.0) && same == rights)
        };
        let runs = mapped.iter().filter(|&(&gfn, &(pfn, rights))| !continues(gfn, pfn, rights)).count();
        assert_eq!(self.process.tlb.len(), runs, "mappings of the host (I60)");
        assert!(runs <= self.most.max(8), "{runs} entries (I60)");
        assert_eq!(self.pool.check_poison(), 0, "a frame was written after it was freed (I22)");
    }

    fn audit(&self) {
        let report = self.shadow.audit(&self.mm);
        assert!(report.violations.is_empty(), "{:#?}", report.violations);
    }
}

fn run(seed: u64, most: usize, policy: FaultAroundPolicy, marks: Prefaulted) {
    let mut guest = Guest::new(seed, most, policy, marks);
    for step in 0..STEPS {
        guest.step();
        guest.check();
        if step % 50 == 0 {
            guest.audit();
        }
    }
    (0..PAGES).for_each(|n| guest.touch(n));
    guest.report();
    guest.audit();
    assert!(guest.process.tlb.drops() > 100);
    assert!(guest.merged > 10, "{} pages were merged", guest.merged);
}

#[test]
fn i59_i60_a_random_guest_with_a_tlb_of_eight_entries() {
    (0..4).for_each(|seed| run(seed, 8, Off, Prefaulted::Old));
    (4..8).for_each(|seed| run(seed, 8, Fixed(16), Prefaulted::Young));
}

#[test]
fn i59_i60_a_random_guest_with_a_large_tlb() {
    (0..4).for_each(|seed| run(seed, 4096, Off, Prefaulted::Old));
    (4..8).for_each(|seed| run(seed, 4096, Fixed(16), Prefaulted::Young));
}
