// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Access tracking: where the CPU sets no A ([`AdBits::None`]), a leaf that was found young loses present and W, and the next
//! access gives it back what it had, without asking the address space (I50). What the ops of aging promise holds here as
//! elsewhere (I48, I49), and no mark of a write is lost on the way (I25).
// What a test does not expect may end it.
#![cfg(feature = "mmu-notifier")]
#![allow(clippy::unwrap_used)]

mod common;

use common::{Machine, READ, RW, RX, Random, StopOnDrop, page, pages, wait_until};
use shadow_mmu::addr::{Access, Gfn, Hva};
use shadow_mmu::frame::FrameFlags;
use shadow_mmu::mm::{FaultError, MapFlags};
use shadow_mmu::shadow::FaultAroundPolicy::{Fixed, Off};
use shadow_mmu::shadow::{AdBits, FaultCause, FaultOutcome, Memslot, SlotAccess};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Aligned to 2 MiB.
const BASE: Hva = Hva(0x7000_0000);
const RWX: Access = Access::all();

/// `count` pages at [`BASE`] with rights `prot`, written by the primary; none is young.
fn machine(count: u64, prot: Access) -> Machine {
    let machine = Machine::with_ad_bits(2048, AdBits::None);
    machine.map_at(BASE, count, RW, MapFlags::PRIVATE);
    (0..count).for_each(|n| machine.poke(page(BASE, n), n));
    machine.mm.mprotect(BASE, pages(count), prot).unwrap();
    (0..count).for_each(|n| _ = machine.mm.ptep_clear_young_notify(page(BASE, n)));
    machine
}

fn cause(cause: FaultCause) -> Result<FaultOutcome, FaultError> {
    Ok(FaultOutcome { cause, retries: 0 })
}

/// Faults that were answered by the shadow map alone.
fn fast(machine: &Machine) -> u64 {
    machine.shadow.stats().pf_fast.load(Ordering::SeqCst)
}

fn tracked(machine: &Machine, at: Hva) -> bool {
    let spte = machine.spte(at);
    spte.is_leaf() && !spte.is_present()
}

#[test]
fn i50_an_access_brings_its_leaf_back_without_asking_the_primary() {
    let machine = machine(1, RW);
    let mut vcpu = machine.vcpu(0, Off);
    assert_eq!(vcpu.fault(BASE, Access::READ), cause(FaultCause::Mapped));
    assert_eq!(vcpu.read(BASE), Ok(0));
    let before = machine.spte(BASE);
    assert!(machine.mm.ptep_clear_flush_young_notify(BASE));
    for round in 1..4 {
        assert!(tracked(&machine, BASE), "{:?}", machine.spte(BASE));
        assert_eq!(vcpu.fault(BASE, Access::READ), cause(FaultCause::AccessTracked));
        assert_eq!(vcpu.fault(BASE, Access::READ), cause(FaultCause::Spurious));
        assert_eq!((vcpu.read(BASE), machine.spte(BASE)), (Ok(0), before));
        assert_eq!(fast(&machine), round);
        assert!(!machine.pte(BASE).is_young(), "the primary was not asked");
        assert!(machine.mm.ptep_clear_flush_young_notify(BASE));
    }
    assert_eq!(machine.shadow.stats().pages_4k.load(Ordering::SeqCst), 1, "a tracked leaf is a leaf (I43)");
    machine.finish();
}

/// Whatever came first, the leaf allows afterwards what it may, and W only if the access was a write.
#[test]
fn i50_a_leaf_gets_back_exactly_the_rights_it_had() {
    for prot in [READ, RW, RX, RWX] {
        for access in [Access::READ, Access::WRITE, Access::EXEC] {
            let machine = machine(1, prot);
            let mut vcpu = machine.vcpu(0, Off);
            // W or not, it had all that tracking may leave it.
            let first = if prot.contains(Access::WRITE) { Access::WRITE } else { Access::READ };
            vcpu.access(BASE, first, |word| word.load(Ordering::SeqCst)).unwrap();
            assert_eq!(machine.spte(BASE).rights(), prot);
            assert!(machine.mm.ptep_clear_young_notify(BASE));
            assert_eq!(machine.spte(BASE).rights(), Access::empty());
            let answer = vcpu.fault(BASE, access);
            if !prot.contains(access) {
                assert_eq!((answer, fast(&machine)), (Err(FaultError::NoAccess), 0), "{prot} {access}");
                assert!(tracked(&machine, BASE), "refused, and not accessed");
            } else {
                let expected = if access == Access::WRITE { prot } else { prot - Access::WRITE };
                assert_eq!((machine.spte(BASE).rights(), fast(&machine)), (expected, 1), "{prot} {access}");
            }
            if prot.contains(Access::WRITE) {
                vcpu.write(BASE, 5).unwrap();
                assert_eq!((machine.spte(BASE).rights(), vcpu.read(BASE)), (prot, Ok(5)));
            }
            machine.check();
            machine.finish();
        }
    }
}

/// A slot that withholds W withholds it from a tracked leaf too.
#[test]
fn i50_a_read_only_slot_gives_no_w_back() {
    let machine = machine(1, RW);
    machine.shadow.remove_slot(Gfn(0)).unwrap();
    let slot = Memslot { gfn: Gfn(64), pages: 1, hva: BASE, access: SlotAccess::ReadOnly };
    machine.shadow.add_slot(slot).unwrap();
    let mut vcpu = machine.vcpu(0, Off);
    let at = Hva(pages(64));
    vcpu.read(at).unwrap();
    assert!(machine.mm.ptep_clear_young_notify(BASE));
    assert_eq!(vcpu.fault(at, Access::WRITE), Err(FaultError::NoAccess));
    assert_eq!(vcpu.read(at), Ok(0));
    assert_eq!((machine.spte(at).rights(), fast(&machine)), (READ, 1));
    machine.finish();
}

/// There, W implies D; so only a write may bring W, from the first fault on.
#[test]
fn w_comes_by_a_write_fault_only() {
    let machine = machine(1, RW);
    let mut vcpu = machine.vcpu(0, Off);
    vcpu.read(BASE).unwrap();
    let spte = machine.spte(BASE);
    assert!(!spte.is_writable() && spte.is_mmu_writable() && !spte.is_dirty(), "{spte:?}");
    vcpu.write(BASE, 1).unwrap();
    assert!(machine.spte(BASE).is_writable() && machine.spte(BASE).is_dirty());
    assert_eq!(fast(&machine), 1, "the leaf knew that it may");
    machine.finish();
}

/// Neighbours come along as tracked: nobody has accessed them, and who does needs no word with the primary.
#[test]
fn neighbours_are_not_young_and_have_no_w() {
    let machine = machine(16, RW);
    let mut vcpu = machine.vcpu(0, Fixed(16));
    vcpu.write(page(BASE, 4), 44).unwrap();
    for n in 0..16 {
        let (at, spte) = (page(BASE, n), machine.spte(page(BASE, n)));
        assert!(spte.is_leaf() && spte.is_mmu_writable(), "page {n}: {spte:?}");
        let own = n == 4;
        assert_eq!((spte.is_writable(), spte.is_dirty(), machine.mm.test_young(at)), (own, own, own));
    }
    vcpu.read(page(BASE, 5)).unwrap();
    vcpu.write(page(BASE, 6), 66).unwrap();
    assert_eq!(fast(&machine), 2);
    let young: Vec<u64> = (0..16).filter(|&n| machine.mm.test_young(page(BASE, n))).collect();
    assert_eq!(young, [4, 5, 6]);
    assert!(!machine.spte(page(BASE, 5)).is_writable() && machine.spte(page(BASE, 6)).is_writable());
    machine.check();
    machine.finish();
}

/// The mark of a write outlives tracking, and goes to the frame with the leaf.
#[test]
fn i25_a_page_that_was_written_then_tracked_then_lost_is_dirty() {
    let machine = machine(2, RW);
    let mut vcpu = machine.vcpu(0, Off);
    vcpu.write(BASE, 1).unwrap();
    vcpu.read(page(BASE, 1)).unwrap();
    for n in 0..2 {
        assert!(machine.mm.ptep_clear_flush_young_notify(page(BASE, n)));
        // Twice: what is tracked already is left alone.
        assert!(!machine.mm.ptep_clear_flush_young_notify(page(BASE, n)));
    }
    let frames = [0, 1].map(|n| machine.pte(page(BASE, n)).pfn());
    machine.mm.mprotect(BASE, pages(2), READ).unwrap();
    let flags = frames.map(|pfn| machine.pool.frame(pfn).flags());
    assert_eq!(
        flags,
        [FrameFlags::DIRTY | FrameFlags::WRITTEN, FrameFlags::empty()],
        "and neither was accessed since"
    );
    machine.finish();
}

#[test]
fn i48_asking_changes_nothing_and_what_was_cleared_stays_old() {
    let machine = machine(2, RW);
    let mut vcpu = machine.vcpu(0, Off);
    vcpu.write(BASE, 1).unwrap();
    _ = machine.mm.ptep_clear_young_notify(BASE);
    vcpu.read(page(BASE, 1)).unwrap();
    let sptes = || [0, 1].map(|n| machine.spte(page(BASE, n)));
    // The faults left the primary's own marks; the second page's leaf is young by itself.
    assert!(machine.mm.notifiers().test_young(page(BASE, 1)));
    let before = sptes();
    assert!(!machine.mm.notifiers().test_young(BASE));
    assert_eq!(sptes(), before);
    for clear in
        [shadow_mmu::mm::Mm::ptep_clear_flush_young_notify, shadow_mmu::mm::Mm::ptep_clear_young_notify]
    {
        assert_eq!(vcpu.read(BASE), Ok(1));
        assert!(machine.mm.test_young(BASE) && clear(&machine.mm, BASE));
        assert!(!machine.mm.test_young(BASE) && !clear(&machine.mm, BASE));
        assert_eq!(
            machine.tlb.cached(0).iter().filter(|(gfn, _)| gfn.0 == BASE.page()).count(),
            0,
            "flushed"
        );
    }
    machine.finish();
}

#[test]
fn i49_two_megabytes_are_tracked_and_nothing_beside_them() {
    let machine = machine(513, RW);
    let mut vcpu = machine.vcpu(0, Off);
    let touched = [0, 7, 511, 512];
    touched.iter().for_each(|&n| vcpu.write(page(BASE, n), n).unwrap());
    assert!(machine.mm.pmdp_clear_flush_young_notify(page(BASE, 300)));
    assert_eq!(touched.map(|n| tracked(&machine, page(BASE, n))), [true, true, true, false]);
    assert!(!machine.mm.pmdp_clear_flush_young_notify(page(BASE, 300)));
    touched.iter().for_each(|&n| assert_eq!(vcpu.read(page(BASE, n)), Ok(n)));
    machine.check();
    machine.finish();
}

/// Leaves are tracked while vCPUs write through them: every write lands, and every page that was written is dirty in the end.
#[test]
fn r11_r16_no_write_is_lost_to_tracking() {
    const PAGES: u64 = 8;
    let machine = machine(PAGES, RW);
    let stop = AtomicBool::new(false);
    let written: Vec<AtomicU64> = (0..PAGES).map(|_| AtomicU64::new(0)).collect();
    std::thread::scope(|scope| {
        let _stop = StopOnDrop(&stop);
        for id in 0..2 {
            let (mut vcpu, mut random) = (machine.vcpu(id, Fixed(4)), Random(id as u64));
            let (stop, written) = (&stop, &written);
            scope.spawn(move || {
                while !stop.load(Ordering::SeqCst) {
                    let n = random.below(PAGES);
                    let at = Hva(page(BASE, n).0 + 8);
                    vcpu.access(at, Access::WRITE, |word| word.fetch_add(1, Ordering::SeqCst)).unwrap();
                    written[n as usize].fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        let mut random = Random(5);
        wait_until("every page was written and tracked many times", || {
            let at = page(BASE, random.below(PAGES));
            match random.below(3) {
                0 => _ = machine.mm.ptep_clear_young_notify(at),
                1 => _ = machine.mm.pmdp_clear_flush_young_notify(at),
                _ => _ = machine.mm.age(),
            }
            fast(&machine) > 300 && written.iter().all(|count| count.load(Ordering::SeqCst) > 20)
        });
    });
    (0..2).for_each(|cpu| machine.check_tlb(cpu));
    let frames: Vec<_> = (0..PAGES).map(|n| machine.pte(page(BASE, n)).pfn()).collect();
    machine.mm.mprotect(BASE, pages(PAGES), READ).unwrap();
    for (n, &pfn) in frames.iter().enumerate() {
        let count = machine.peek(Hva(page(BASE, n as u64).0 + 8));
        assert_eq!(count, written[n].load(Ordering::SeqCst), "page {n}");
        assert!(machine.pool.frame(pfn).flags().contains(FrameFlags::DIRTY), "page {n}");
    }
    machine.finish();
}
