// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Races of a TLB in software, which fills put translations into, against whoever takes them: R34, R35, I59, I60.
//!
//! V is a vCPU, H a thread of the host, as in [`faults`](crate::faults); V runs in a [`process`](crate::process).

use crate::addr::{Access, Gpa, Hva, PAGE_SIZE};
use crate::cpu::tagged;
use crate::explore::explore;
use crate::faults::{drop_pages, reuse};
use crate::frame::Fill;
use crate::ksm::{Domain, Ksm};
use crate::machine::{Machine, READ, RW, page, task};
use crate::migration::{Migration, SLOT, Writes, bitmap};
use crate::mm::{Advice, FaultRequest};
use crate::mutant::M;
use crate::process::{Guest, Vcpu};
use crate::shadow::{DirtyMethod, FaultAroundPolicy, Spte, VcpuMmu};
use crate::sharing::{ALL, is_merged, settings};
use crate::sync::Arc;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::table::{Link, index};

const BASE: Hva = Hva(0x40_0000);

/// V fills and uses. H takes the page away, and the frame becomes another page.
fn zap() {
    let guest = Guest::new();
    let machine = &guest.machine;
    let (a, b) = (machine.map_at(BASE, 1, RW), machine.map(1, RW));
    machine.race([
        task(|| {
            let mut vcpu = guest.vcpu();
            vcpu.write(a, 1).unwrap();
            vcpu.read(a).unwrap();
        }),
        task(|| {
            drop_pages(machine, a, 1);
            reuse(machine, b);
        }),
    ]);
    guest.finish();
}

#[test]
fn r34_a_fill_races_a_zap() {
    let mutants = [M::FillWalksUnlocked, M::FlushOfNothingUnlocked, M::MapsBehindItsNote, M::FlushNever];
    explore("r34_zap", zap, &mutants);
}

/// Two vCPUs fill the same page and the one beside it at once, and write.
fn two() {
    let guest = Guest::new();
    let machine = &guest.machine;
    let (a, c) = (machine.map_at(BASE, 2, RW), machine.map(1, RW));
    let b = page(a, 1);
    machine.race([
        task(|| {
            let mut vcpu = guest.vcpu();
            vcpu.read(a).unwrap();
            vcpu.write(b, 1).unwrap();
        }),
        task(|| {
            let mut vcpu = guest.vcpu();
            let _ = vcpu.write(a, 2);
            let _ = vcpu.read(b);
        }),
        task(|| {
            drop_pages(machine, a, 1);
            reuse(machine, c);
        }),
    ]);
    guest.finish();
}

#[test]
fn r34_two_fills_race_a_zap() {
    explore("r34_two", two, &[M::FillWalksUnlocked, M::MapsBehindItsNote]);
}

/// mprotect and fork take the right to write. When they have returned no write reaches the page.
fn protect() {
    let guest = Guest::new();
    let machine = &guest.machine;
    let a = machine.map_at(BASE, 1, RW);
    let protected = AtomicBool::new(false);
    machine.race([
        task(|| {
            let mut vcpu = guest.vcpu();
            for n in 1..4 {
                let protected = protected.load(Ordering::SeqCst);
                let wrote = vcpu.write(a, n).is_ok();
                machine.must(!(protected && wrote), || "V wrote to a page that is read-only (I14)".into());
            }
        }),
        task(|| {
            machine.mm.mprotect(a, PAGE_SIZE, READ).unwrap();
            protected.store(true, Ordering::SeqCst);
            let before = machine.peek(a);
            machine.must(before == machine.peek(a), || "a page changes that is read-only (I14)".into());
        }),
    ]);
    guest.finish();
}

#[test]
fn r34_a_fill_races_the_right_to_write() {
    explore("r34_protect", protect, &[M::FillWalksUnlocked, M::ProtectOutsidePair]);
}

/// fork shares the page: what V writes behind it gets a frame of its own, and is not in the child.
fn replaced() {
    let guest = Guest::new();
    let machine = &guest.machine;
    let a = machine.map_at(BASE, 1, RW);
    machine.poke(a, tagged(a, 1));
    machine.race([
        task(|| {
            let mut vcpu = guest.vcpu();
            vcpu.write(a, 2).unwrap();
            vcpu.write(a, 3).unwrap();
            let seen = vcpu.read(a);
            machine.must(seen == Ok(tagged(a, 3)), || format!("V wrote and reads {seen:x?} (I24)"));
        }),
        task(|| {
            let child = machine.mm.fork().unwrap();
            let in_child = || {
                let pinned = child.fault(&FaultRequest::one_page(a, READ)).unwrap();
                machine.pool.words(pinned.required().pfn)[0].load(Ordering::SeqCst)
            };
            let before = in_child();
            machine.must(before == in_child(), || "V writes to a page of the child (I15)".into());
        }),
    ]);
    guest.finish();
}

#[test]
fn r34_a_fill_races_a_page_that_is_shared_and_copied() {
    explore("r34_replaced", replaced, &[M::FillWalksUnlocked, M::ForkOutsidePair]);
}

/// Two pages of V are equal. H merges them while V writes one of them, to be equal again in the end.
fn merged() {
    let guest = Guest::new();
    let machine = &guest.machine;
    let a = machine.map_at(BASE, 2, RW);
    let b = page(a, 1);
    machine.mm.madvise(a, 2 * PAGE_SIZE, Advice::Mergeable).unwrap();
    let writes = |vcpu: &mut Vcpu<'_>, at, n| {
        vcpu.access(at, Access::WRITE, |word| word.swap(n, Ordering::SeqCst)).unwrap();
    };
    let reads = |vcpu: &mut Vcpu<'_>, at, n| {
        let seen = vcpu.access(at, READ, |word| word.load(Ordering::SeqCst)).unwrap();
        machine.must(seen == n, || format!("V reads {seen} at {at}, which holds {n} (I58)"));
    };
    [a, b].into_iter().for_each(|at| writes(&mut guest.vcpu(), at, 1));
    let ksm = Ksm::new(Arc::clone(&machine.pool), settings()).unwrap();
    ksm.enter(&machine.mm, Domain(0)).unwrap();
    ksm.scan(ALL);
    machine.race([
        task(|| {
            let mut vcpu = guest.vcpu();
            for n in [2, 3, 1] {
                writes(&mut vcpu, a, n);
                reads(&mut vcpu, a, n);
            }
        }),
        task(|| {
            let mut vcpu = guest.vcpu();
            (0..3).for_each(|_| reads(&mut vcpu, b, 1));
        }),
        task(|| (0..2).for_each(|_| _ = ksm.scan(ALL))),
    ]);
    (0..4).for_each(|_| _ = ksm.scan(ALL));
    for at in [a, b] {
        machine
            .must(is_merged(&machine.mm, at), || format!("{at} has a twin: a write is not known of (I51)"));
    }
    drop(ksm);
    guest.finish();
}

#[test]
fn r34_a_fill_races_a_merge() {
    explore("r34_merged", merged, &[M::FillWalksUnlocked, M::MergeProtectsOutsidePair]);
}

/// H clears A and flushes. Every read behind that is seen by the next question.
fn aging() {
    let guest = Guest::new();
    let machine = &guest.machine;
    let a = machine.map_at(BASE, 1, RW);
    machine.poke(a, tagged(a, 1));
    machine.race([
        task(|| _ = guest.vcpu().read(a).unwrap()),
        task(|| _ = machine.mm.ptep_clear_flush_young_notify(a)),
    ]);
    machine.mm.ptep_clear_flush_young_notify(a);
    guest.vcpu().read(a).unwrap();
    let young = machine.mm.notifiers().test_young(a);
    machine.must(young, || format!("V has read {a}, but its leaf is {:?} (I48)", machine.spte(a)));
    guest.finish();
}

#[test]
fn i59_a_fill_races_aging() {
    explore("i59_aging", aging, &[M::FillWalksUnlocked, M::FlushOfNothingUnlocked, M::MapsBehindItsNote]);
}

/// Two vCPUs write, G asks for reports by D. See [`migration`](crate::migration).
fn logged() {
    let guest = Guest::new();
    let machine = &guest.machine;
    let base = machine.map_at(BASE, 2, RW);
    let pages = [base, page(base, 1)];
    pages.iter().for_each(|&at| assert!(machine.poke(at, tagged(at, 0))));
    guest.vcpu().write(pages[0], 0).unwrap();
    let config = bitmap(DirtyMethod::DirtyBit);
    machine.shadow().enable_dirty_log(SLOT, config).unwrap();
    let writes = Writes::default();
    let mut migration = Migration::begin(machine, &writes, &pages, config);
    let write = |vcpu: &mut Vcpu<'_>, which: usize, n: u64| {
        let at = pages[which];
        vcpu.access(at, Access::WRITE, |word| word.fetch_max(tagged(at, n), Ordering::SeqCst)).unwrap();
        writes.over(which, at, n);
    };
    machine.race([
        task(|| {
            let mut vcpu = guest.vcpu();
            vcpu.read(pages[1]).unwrap();
            write(&mut vcpu, 0, 1);
            write(&mut vcpu, 1, 4);
        }),
        task(|| {
            let mut vcpu = guest.vcpu();
            write(&mut vcpu, 1, 2);
            write(&mut vcpu, 0, 3);
        }),
        task(|| (0..2).for_each(|_| migration.round())),
    ]);
    migration.finish();
    guest.finish();
}

#[test]
fn i59_a_write_behind_a_report_is_in_the_next() {
    explore("i59_logged", logged, &[M::FillMapsWithoutD, M::ReportDoesNotFlush, M::FillWalksUnlocked]);
}

/// Three pages are one entry. H takes the one in the middle, then the one behind it.
fn divided() {
    let guest = Guest::new();
    let machine = &guest.machine;
    let (base, c) = (machine.map_at(BASE, 3, RW), machine.map(2, RW));
    // In whichever order the pool gives out frames, one of the two has them ascend.
    (0..3).for_each(|n| _ = machine.poke(page(base, n), tagged(page(base, n), 0)));
    let pfn = |n| machine.mm.lookup(page(base, n)).unwrap().0.pfn().0;
    if pfn(0) > pfn(2) {
        drop_pages(machine, base, 3);
        (0..3).rev().for_each(|n| _ = machine.poke(page(base, n), tagged(page(base, n), 0)));
    }
    (0..3).for_each(|n| guest.vcpu().write(page(base, n), 1).unwrap());
    assert_eq!(guest.process.tlb.len(), 1, "their frames are no neighbours");
    machine.race([
        task(|| {
            let mut vcpu = guest.vcpu();
            for n in [1, 2, 0] {
                vcpu.write(page(base, n), 2).unwrap();
                vcpu.read(page(base, n)).unwrap();
            }
        }),
        task(|| {
            for n in 0..2 {
                drop_pages(machine, page(base, 1 + n), 1);
                reuse(machine, page(c, n));
            }
        }),
    ]);
    guest.finish();
}

#[test]
fn i60_a_flush_takes_its_page_out_of_an_entry() {
    explore("i60_divided", divided, &[M::FlushMissesTheMiddle, M::FlushForgetsTheRest]);
}

/// The TLB is full: fills evict, while H takes pages away.
fn evicting() {
    let guest = Guest::new();
    let machine = &guest.machine;
    let (base, c) = (machine.map_at(BASE, 16, RW), machine.map(2, RW));
    let pages: Vec<Hva> = (0..8).map(|n| page(base, 2 * n)).collect();
    pages.iter().take(6).for_each(|&at| guest.vcpu().write(at, 1).unwrap());
    machine.race([
        task(|| {
            let mut vcpu = guest.vcpu();
            for which in [6, 0, 7] {
                vcpu.write(pages[which], 2).unwrap();
                vcpu.read(pages[which]).unwrap();
            }
        }),
        task(|| {
            for (n, &at) in (0..2).zip(&pages) {
                drop_pages(machine, at, 1);
                reuse(machine, page(c, n));
            }
        }),
        task(|| {
            let mut vcpu = guest.vcpu();
            let _ = vcpu.read(pages[1]);
            let _ = vcpu.write(pages[0], 3);
        }),
    ]);
    assert!(guest.process.tlb.len() <= 8, "{} entries (I60)", guest.process.tlb.len());
    guest.finish();
}

#[test]
fn i60_eviction_races_a_flush() {
    explore("i60_evicting", evicting, &[M::EvictionOnlyForgets, M::FillWalksUnlocked]);
}

/// Memory is short, so a fault takes the frames of tables without a leaf. V walks them, and aging has cleared A of the links.
fn unlinked() {
    let guest = Guest::with_slot(Machine::slot());
    let machine = &guest.machine;
    let (a, far) = (machine.map_at(BASE, 1, RW), machine.map_at(Hva(1 << 40), 1, RW));
    guest.vcpu().write(a, 1).unwrap();
    machine.mm.munmap(a, PAGE_SIZE).unwrap();
    machine.map_at(a, 1, RW);
    machine.poke(far, tagged(far, 1));
    let mut table = machine.shadow().root();
    for level in (2..=4).rev() {
        let link = &machine.pool.words(table)[index(a.page(), level)];
        table = Spte(link.fetch_and(!Link::ACCESSED, Ordering::SeqCst)).pfn();
    }
    // One too few for a path of three tables.
    let mut taken = Vec::new();
    machine.pool.alloc_up_to(machine.pool.free_frames() - 2, Fill::Overwritten, &mut taken);
    machine.race([
        task(|| _ = guest.vcpu().read(a)),
        task(|| {
            let mut mmu = VcpuMmu::new(FaultAroundPolicy::Off);
            let _ = machine.shadow().fault(&mut mmu, Gpa(far.0), READ);
        }),
    ]);
    machine.pool.put_all(&taken);
    reuse(machine, far);
    guest.finish();
}

#[test]
fn r35_a_link_that_went_is_not_marked() {
    explore("r35", unlinked, &[M::LinkMarkedBlindly]);
}
