// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The races of the contract, each with its interleaving forced.
//!
//! A fault cannot be stopped between its snapshot and its install by anything in the code under test, but it can from
//! outside: it has to look at the neighbours of its page, and so takes one page-table lock after the other. [`Held`] makes
//! another thread hold the second of them (a copy-on-write there, stopped in `change_pte`), so that the fault waits with its
//! snapshot taken and its page pinned, for as long as a test wants. The copy's own end is held back until the fault is
//! over, so that the only invalidation that the fault can notice is the test's.
//!
//! Not expressible from outside: R3 (the order of the two stores in an end: both happen under `mmu_lock`), R7 and R8 (see
//! `notifier_contract.rs`), R10, R14, R22, R25–R28, R32–R34 (merging, huge pages, MMIO: not built).
//! R18, R19 and R23 are in `notifier_contract.rs`, R11 in `concurrency.rs`, R16 and R20 in `dirty_log.rs`.
// What a test does not expect may end it.
#![cfg(feature = "mmu-notifier")]
#![allow(clippy::unwrap_used)]

mod common;

use common::{Machine, READ, RW, TestFile, Vcpu, WATCH, page, pages, wait_until};
use shadow_mmu::addr::{Access, Gfn, Hva, HvaRange, PAGE_SIZE};
use shadow_mmu::mm::{Advice, Backing, FaultError, MapFlags, Object, Pte, RemapFlags};
use shadow_mmu::notifier::Event;
use shadow_mmu::shadow::FaultAroundPolicy::{Fixed, Off};
use shadow_mmu::shadow::{Memslot, SlotAccess, Spte};
use std::sync::atomic::Ordering;
use std::thread::{Scope, ScopedJoinHandle};

/// Aligned to 4 MiB: a window of 1024 pages from here covers two leaf tables.
const BASE: Hva = Hva(0x7000_0000);
const WINDOW: u64 = 1024;
/// In the second leaf table: where the lock is held that faults in the first one wait for.
const BLOCKER: u64 = 700;

type Answer = Result<u64, FaultError>;

#[track_caller]
fn assert_waits<T>(thread: &ScopedJoinHandle<'_, T>, what: &str) {
    std::thread::sleep(WATCH);
    assert!(!thread.is_finished(), "{what}");
}

/// A machine with [`WINDOW`] pages of private memory at [`BASE`], of which the blocker is ready to be copied.
fn machine() -> Machine {
    let machine = Machine::new(3 * WINDOW);
    machine.map_at(BASE, WINDOW, RW, MapFlags::PRIVATE);
    assert_eq!(machine.peek(page(BASE, BLOCKER)), 0);
    machine
}

/// A fault that waits between its snapshot and its install.
struct Held<'scope, 'm> {
    machine: &'m Machine,
    copier: ScopedJoinHandle<'scope, ()>,
    faulter: ScopedJoinHandle<'scope, (Vcpu, Answer)>,
}

impl<'scope, 'm: 'scope> Held<'scope, 'm> {
    /// Lets a vCPU fault at page `at` until it has pinned what is at page `pinned` (it or a neighbour in the first table).
    fn new<'env>(
        scope: &'scope Scope<'scope, 'env>,
        machine: &'m Machine,
        at: u64,
        access: Access,
        pinned: u64,
    ) -> Self {
        let blocker = page(BASE, BLOCKER);
        // After the shadow map has heard of the copy, and before it hears of its end: no further bump of the sequence.
        machine.after.change_pte.shut_for(HvaRange::page(blocker));
        machine.before.end.shut_for(HvaRange::page(blocker));
        let copier = scope.spawn(move || machine.poke(blocker, 1));
        machine.after.change_pte.wait_for_arrival();
        let frame = machine.pool.frame(machine.pte(page(BASE, pinned)).pfn());
        let references = frame.ref_count();
        let mut vcpu = machine.vcpu(0, Fixed(WINDOW));
        let faulter = scope.spawn(move || {
            let answer = vcpu.access(page(BASE, at), access, |word| word.load(Ordering::SeqCst));
            (vcpu, answer)
        });
        wait_until("the page is pinned", || frame.ref_count() == references + 1);
        assert!(!faulter.is_finished());
        Self { machine, copier, faulter }
    }

    /// Lets the fault go on; what its access came to.
    fn release(self) -> Answer {
        self.machine.after.change_pte.open();
        let (_, answer) = self.faulter.join().unwrap();
        self.machine.before.end.open();
        self.copier.join().unwrap();
        answer
    }
}

fn retried(machine: &Machine) -> u64 {
    machine.shadow.stats().pf_retried.load(Ordering::SeqCst)
}

/// V: snapshot, frame P pinned. H: start, clears the pte, end, frees P but for V's pin. V: must not install P. Also R2:
/// a snapshot taken where V was held would be the sequence after H's end.
#[test]
fn r1_r2_a_fault_does_not_install_a_page_that_was_zapped_meanwhile() {
    for access in [READ, Access::WRITE] {
        let machine = machine();
        machine.poke(page(BASE, 3), 0x0ff);
        let old = machine.pte(page(BASE, 3)).pfn();
        std::thread::scope(|scope| {
            let held = Held::new(scope, &machine, 3, access, 3);
            machine.mm.madvise(page(BASE, 3), PAGE_SIZE, Advice::DontNeed).unwrap();
            assert_eq!(machine.pool.frame(old).ref_count(), 1, "the pin");
            assert_eq!(held.release(), Ok(0), "the page is new");
        });
        assert!(retried(&machine) > 0);
        machine.check();
        machine.finish();
    }
}

/// H: start over a neighbour N, stopped there. V: snapshot (inside N's window, which V's own page is not in), page and N
/// pinned. H: clears N's pte, end. V: N is in no window any more; only a sequence that moved at the end tells.
#[test]
fn r4_the_sequence_moves_at_the_end_not_at_the_start() {
    let machine = machine();
    let (at, neighbour) = (page(BASE, 3), page(BASE, 5));
    [at, neighbour].iter().for_each(|&at| machine.poke(at, 0x0ff));
    std::thread::scope(|scope| {
        machine.after.start.shut_for(HvaRange::page(neighbour));
        let advise = scope.spawn(|| machine.mm.madvise(neighbour, PAGE_SIZE, Advice::DontNeed));
        machine.after.start.wait_for_arrival();
        let held = Held::new(scope, &machine, 3, READ, 5);
        machine.after.start.open();
        assert_eq!(advise.join().unwrap(), Ok(()));
        assert_eq!(held.release(), Ok(0x0ff));
    });
    assert_eq!(machine.spte(neighbour), Spte::NONE, "its page is gone");
    machine.check();
    machine.finish();
}

/// V: snapshot, page of the page cache pinned. H: a whole pair, in which the page is replaced by a copy, and written. V:
/// must install the copy; the old frame is alive and well, and would be read forever.
#[test]
fn r5_i24_a_fault_does_not_install_a_page_that_was_copied_meanwhile() {
    let machine = Machine::new(3 * WINDOW);
    let file = Object::file(&machine.pool, TestFile::new(pages(WINDOW)));
    let backing = Backing::Object { object: file, offset: 0 };
    machine.mm.mmap(BASE, pages(WINDOW), RW, MapFlags::PRIVATE | MapFlags::FIXED, backing).unwrap();
    [3, BLOCKER].iter().for_each(|&n| assert_eq!(machine.peek(page(BASE, n)), TestFile::tag(n)));
    std::thread::scope(|scope| {
        let held = Held::new(scope, &machine, 3, READ, 3);
        machine.poke(page(BASE, 3), 0x4e3);
        assert_eq!(held.release(), Ok(0x4e3));
    });
    machine.check();
    machine.finish();
}

/// The same for removals that no pair surrounds: each must move the sequence itself, or V would not know.
#[test]
fn i5_removals_outside_pairs_move_the_sequence() {
    let invalidate: fn(&Machine, Hva) = |machine, at| machine.mm.notifiers().invalidate_page(at);
    let change: fn(&Machine, Hva) = |machine, at| machine.mm.notifiers().change_pte(at, Pte::NONE);
    for remove in [invalidate, change] {
        let machine = machine();
        machine.poke(page(BASE, 3), 7);
        std::thread::scope(|scope| {
            let held = Held::new(scope, &machine, 3, READ, 3);
            let before = retried(&machine);
            remove(&machine, page(BASE, 3));
            assert_eq!(held.release(), Ok(7));
            assert!(retried(&machine) > before);
        });
        machine.check();
        machine.finish();
    }
}

/// Two windows are open. The first ends; a fault in the second must still wait.
#[test]
fn r6_i6_an_end_leaves_other_windows_open() {
    let machine = machine();
    let notifiers = machine.mm.notifiers();
    for first_begun_ends_first in [true, false] {
        let one = notifiers.invalidate(HvaRange::pages_from(BASE, 2), Event::Clear);
        let two = notifiers.invalidate(HvaRange::pages_from(page(BASE, 8), 2), Event::Clear);
        let (first, last, at) = if first_begun_ends_first { (one, two, 8) } else { (two, one, 0) };
        std::thread::scope(|scope| {
            drop(first);
            let mut vcpu = machine.vcpu(1, Off);
            let fault = scope.spawn(move || vcpu.read(page(BASE, at)));
            wait_until("the fault found the window", || retried(&machine) > 0);
            assert_waits(&fault, "a fault was served inside a window");
            assert_eq!(machine.spte(page(BASE, at)), Spte::NONE);
            // Elsewhere nothing is in the way.
            assert_eq!(machine.vcpu(2, Off).read(page(BASE, 4)), Ok(0));
            drop(last);
            assert_eq!(fault.join().unwrap(), Ok(0));
        });
        machine.check();
    }
    machine.finish();
}

/// A change_pte inside somebody else's window: what it announces may be gone by that window's end.
#[test]
fn r9_change_pte_maps_nothing_inside_a_window() {
    let machine = machine();
    machine.poke(page(BASE, 3), 5);
    machine.vcpu(0, Off).read(page(BASE, 3)).unwrap();
    let pair = machine.mm.notifiers().invalidate(HvaRange::pages_from(BASE, 8), Event::Clear);
    let new = machine.pte(page(BASE, 3));
    machine.mm.notifiers().change_pte(page(BASE, 3), new);
    assert_eq!(machine.spte(page(BASE, 3)), Spte::NONE);
    machine.check();
    drop(pair);
    machine.finish();
}

/// H1: start zaps the leaf of P; its flush is stopped. H2: a start for P, with nothing left to zap: it must not return, for
/// its caller would free P while a vCPU still has it cached.
#[test]
fn r12_i22_nobody_overtakes_a_flush() {
    let machine = machine();
    let at = page(BASE, 3);
    let mut vcpu = machine.vcpu(0, Off);
    vcpu.write(at, 5).unwrap();
    let pfn = machine.spte(at).pfn();
    let advise = || machine.mm.madvise(at, PAGE_SIZE, Advice::DontNeed);
    std::thread::scope(|scope| {
        machine.tlb.flush.shut();
        let first = scope.spawn(advise);
        machine.tlb.flush.wait_for_arrival();
        let starts = machine.after.starts.load(Ordering::SeqCst);
        let second = scope.spawn(advise);
        assert_waits(&second, "a second zap overtook the flush of the first");
        assert_eq!(machine.after.starts.load(Ordering::SeqCst), starts, "a start returned before the flush");
        // What the guest has cached is still its page.
        assert!(machine.pool.frame(pfn).ref_count() > 0);
        assert_eq!(vcpu.write(at, 6), Ok(()));
        machine.tlb.flush.open();
        assert_eq!((first.join().unwrap(), second.join().unwrap()), (Ok(()), Ok(())));
    });
    assert_eq!(vcpu.read(at), Ok(0));
    machine.check();
    machine.finish();
}

/// A pair is open over a slot's addresses; somebody removes the slot, or adds one. The end must find what its start found.
#[test]
fn r15_i1_i40_slots_do_not_change_inside_a_pair() {
    let machine = Machine::without_slot(64);
    let at = machine.map(4, RW);
    let slot = |gfn: u64| Memslot { gfn: Gfn(gfn), pages: 4, hva: at, access: SlotAccess::ReadWrite };
    machine.shadow.add_slot(slot(0)).unwrap();
    let mut vcpu = machine.vcpu(0, Off);
    vcpu.write(Hva(0), 5).unwrap();
    let remove: &(dyn Fn() + Sync) = &|| machine.shadow.remove_slot(Gfn(0)).unwrap();
    let add: &(dyn Fn() + Sync) = &|| machine.shadow.add_slot(slot(64)).unwrap();
    for change in [add, remove] {
        std::thread::scope(|scope| {
            let pair = machine.mm.notifiers().invalidate(HvaRange::pages_from(at, 4), Event::Clear);
            let change = scope.spawn(change);
            assert_waits(&change, "the slots changed inside a pair");
            drop(pair);
            change.join().unwrap();
        });
    }
    // No window is left over, of the old slot or of the new one.
    assert_eq!((vcpu.read(Hva(0)), vcpu.read(Hva(pages(64)))), (Err(FaultError::NoMapping), Ok(5)));
    machine.shadow.add_slot(slot(0)).unwrap();
    assert_eq!(vcpu.read(Hva(0)), Ok(5));
    machine.check();
    machine.finish();
}

/// V: snapshot, page pinned. H: release zaps everything. V: must find that the space is gone, and install nothing.
#[test]
fn r17_i8_a_fault_installs_nothing_after_release() {
    let machine = machine();
    machine.poke(page(BASE, 3), 5);
    std::thread::scope(|scope| {
        let held = Held::new(scope, &machine, 3, READ, 3);
        // Not through the space, whose lock the fault holds; its listeners alone are told.
        let release = scope.spawn(|| machine.mm.notifiers().release().unwrap());
        wait_until("the shadow map was released", || machine.after.released.load(Ordering::SeqCst) == 1);
        assert_eq!(held.release(), Err(FaultError::NoMapping));
        release.join().unwrap();
    });
    assert_eq!(machine.spte(page(BASE, 3)), Spte::NONE);
    machine.check();
    machine.finish();
}

/// V: finds its slot, then waits for the file inside its fault. M: removes the slot; or replaces it by one for other
/// addresses. V: must not install what the old slot led to.
#[test]
fn r24_i39_a_fault_does_not_install_through_a_slot_that_went() {
    for replace in [false, true] {
        let machine = Machine::without_slot(64);
        let source = TestFile::new(pages(4));
        let file = Object::file(&machine.pool, source.clone());
        let backing = Backing::Object { object: file, offset: 0 };
        machine.mm.mmap(BASE, pages(4), RW, MapFlags::PRIVATE | MapFlags::FIXED, backing).unwrap();
        let other = machine.map(4, RW);
        machine.poke(other, 0x07e4);
        let slot = |hva| Memslot { gfn: Gfn(16), pages: 4, hva, access: SlotAccess::ReadWrite };
        machine.shadow.add_slot(slot(BASE)).unwrap();
        let at = Hva(pages(16));
        source.read.shut();
        std::thread::scope(|scope| {
            let mut vcpu = machine.vcpu(0, Off);
            let fault = scope.spawn(move || vcpu.read(at));
            source.read.wait_for_arrival();
            machine.shadow.remove_slot(Gfn(16)).unwrap();
            if replace {
                machine.shadow.add_slot(slot(other)).unwrap();
            }
            source.read.open();
            let expected = if replace { Ok(0x07e4) } else { Err(FaultError::NoMapping) };
            assert_eq!(fault.join().unwrap(), expected);
        });
        machine.check();
        machine.finish();
    }
}

/// mprotect to read-only returns: from then on no write lands, also not through what CPUs have cached.
#[test]
fn r21_i14_no_write_lands_after_rights_are_taken() {
    let machine = machine();
    let mut vcpus = [machine.vcpu(0, Off), machine.vcpu(1, Fixed(16))];
    vcpus.iter_mut().for_each(|vcpu| vcpu.write(BASE, 5).unwrap());
    machine.mm.mprotect(BASE, pages(4), READ).unwrap();
    for vcpu in &mut vcpus {
        assert_eq!((vcpu.write(BASE, 6), vcpu.read(BASE)), (Err(FaultError::NoAccess), Ok(5)));
    }
    machine.check();
    machine.finish();
}

/// An inner pair ends inside an outer one: what only the inner one covered may be mapped again, the rest may not.
#[test]
fn r29_nested_pairs_end_from_the_inside() {
    let machine = machine();
    let notifiers = machine.mm.notifiers();
    let outer = notifiers.invalidate(HvaRange::pages_from(page(BASE, 3), 1), Event::Unmap);
    let inner = notifiers.invalidate(HvaRange::pages_from(BASE, 16), Event::Clear);
    drop(inner);
    let mut vcpu = machine.vcpu(1, Fixed(16));
    assert_eq!(vcpu.read(page(BASE, 4)), Ok(0), "the inner pair's alone");
    std::thread::scope(|scope| {
        let mut vcpu = machine.vcpu(2, Fixed(16));
        let fault = scope.spawn(move || vcpu.read(page(BASE, 3)));
        assert_waits(&fault, "a fault was served inside the outer pair");
        machine.check();
        drop(outer);
        assert_eq!(fault.join().unwrap(), Ok(0));
    });
    machine.check();
    machine.finish();
}

/// A window covers some neighbours of a page and not the page: the fault is served, those neighbours are not (I2).
#[test]
fn r30_i2_a_fault_brings_no_neighbour_that_is_in_a_window() {
    let machine = machine();
    (0..16).for_each(|n| machine.poke(page(BASE, n), n));
    let pair = machine.mm.notifiers().invalidate(HvaRange::pages_from(page(BASE, 5), 3), Event::Clear);
    let mut vcpu = machine.vcpu(1, Fixed(16));
    assert_eq!(vcpu.read(page(BASE, 3)), Ok(3));
    let installed: Vec<u64> = (0..16).filter(|&n| machine.spte(page(BASE, n)).is_present()).collect();
    assert_eq!(installed, (0..16).filter(|n| !(5..8).contains(n)).collect::<Vec<_>>());
    machine.check();
    drop(pair);
    assert_eq!(vcpu.read(page(BASE, 5)), Ok(5));
    machine.check();
    machine.finish();
}

/// A fault inside a window waits, and leaves the primary alone meanwhile: one that fetched the page again and again would hold
/// the locks that the window's owner needs to get on (R31). Fetching pins the page.
#[test]
fn r31_a_fault_that_must_wait_does_not_fetch_the_page() {
    let machine = machine();
    machine.poke(BASE, 7);
    let frame = machine.pool.frame(machine.pte(BASE).pfn());
    let pair = machine.mm.notifiers().invalidate(HvaRange::page(BASE), Event::Clear);
    std::thread::scope(|scope| {
        let mut vcpu = machine.vcpu(1, Fixed(1));
        let fault = scope.spawn(move || vcpu.read(BASE));
        let before = retried(&machine);
        wait_until("the fault has begun again many times", || {
            assert_eq!(frame.ref_count(), 1, "pinned inside a window");
            retried(&machine) > before + 10_000
        });
        drop(pair);
        assert_eq!(fault.join().unwrap(), Ok(7));
    });
    machine.finish();
}

/// H: MADV_REMOVE has taken the page out of both mappings and not yet out of the object; it is stopped there. V: faults. If
/// it got the old page, one mapping would show memory that no other does, for good.
#[test]
fn i24_a_hole_in_shared_memory_is_one_for_every_mapping_of_it() {
    for stopped_at in [0, 1] {
        let machine = Machine::new(64);
        machine.map_at(BASE, 4, RW, MapFlags::SHARED);
        let twin = page(BASE, 16);
        let flags = RemapFlags::MAYMOVE | RemapFlags::FIXED;
        machine.mm.mremap(BASE, 0, pages(4), flags, twin).unwrap();
        let mappings = [BASE, twin];
        mappings.iter().for_each(|&at| machine.poke(at, 5));
        std::thread::scope(|scope| {
            machine.after.end.shut_for(HvaRange::page(mappings[stopped_at]));
            let remove = scope.spawn(|| machine.mm.madvise(BASE, PAGE_SIZE, Advice::Remove));
            machine.after.end.wait_for_arrival();
            let faults = [BASE, twin].map(|at| {
                let mut vcpu = machine.vcpu(usize::from(at == twin), Off);
                scope.spawn(move || vcpu.read(at))
            });
            std::thread::sleep(WATCH);
            machine.after.end.open();
            assert_eq!(remove.join().unwrap(), Ok(()));
            faults.into_iter().for_each(|fault| _ = fault.join().unwrap().unwrap());
        });
        assert_eq!(mappings.map(|at| machine.vcpu(2, Off).read(at)), [Ok(0), Ok(0)]);
        machine.vcpu(2, Off).write(BASE, 6).unwrap();
        assert_eq!(machine.vcpu(3, Off).read(twin), Ok(6));
        machine.check();
        machine.finish();
    }
}
