// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Races of the device IOTLB (`iommu.rs`), a secondary MMU beside the shadow map: R33, R13, I2.

use crate::addr::{Hva, PAGE_SIZE, Pfn};
use crate::cpu::tagged;
use crate::explore::explore;
use crate::faults::{drop_pages, reclaim_unbracketed, reuse};
use crate::iommu::{GuestView, view};
use crate::machine::{Machine, READ, RW, task};
use crate::mutant::M;
use crate::sync::atomic::{AtomicBool, Ordering};
use vm_memory::{GuestAddress, GuestMemory, Permissions};

/// A device writes the `n`-th value of the page at `at`, and others run while it has the slice. Whether it could.
fn device_writes(machine: &Machine, view: &GuestView, at: Hva, n: u64) -> bool {
    let Ok(mut slices) = view.get_slices(GuestAddress(at.0), 8, Permissions::Write) else { return false };
    let Some(Ok(slice)) = slices.next() else { return false };
    let first = machine.pool.words(Pfn(0)).as_ptr().addr();
    let pfn = Pfn(((slice.ptr_guard().as_ptr().addr() - first) as u64 / PAGE_SIZE) as u32);
    // The word that the slice is about, through an atomic: a point where others run.
    for n in [n, n] {
        let held = machine.pool.frame(pfn).ref_count() > 0;
        machine.must(held, || format!("a device reaches frame {:#x}, which is free (I21)", pfn.0));
        machine.pool.words(pfn)[0].store(tagged(at, n), Ordering::SeqCst);
    }
    true
}

/// C: misses, looks its page up. H: the whole pair, frees the frame. C: keeps the translation.
fn r33_iotlb() {
    let machine = Machine::new();
    let (a, b) = (machine.map(1, RW), machine.map(1, RW));
    let view = view(&machine.mm).unwrap();
    machine.race([
        task(|| {
            device_writes(&machine, &view, a, 1);
            device_writes(&machine, &view, a, 2);
        }),
        task(|| machine.vcpu(0).write(a, 3).unwrap()),
        task(|| {
            drop_pages(&machine, a, 1);
            reuse(&machine, b);
        }),
    ]);
    // Through a stale translation this would not be what the primary has.
    device_writes(&machine, &view, a, 4);
    let seen = machine.peek(a);
    machine.must(seen == Some(tagged(a, 4)), || {
        format!("a device wrote {:#x}, the page holds {seen:x?}", tagged(a, 4))
    });
    drop(view);
    machine.finish();
}

#[test]
fn r33_a_device_keeps_no_translation_of_what_went_away() {
    let mutants = [M::IotlbNoRetryCheck, M::IotlbSnapshotAfterLookup, M::IotlbStartKeeps, M::NoWindow];
    explore("r33_iotlb", r33_iotlb, &mutants);
}

/// The same with a removal outside of any pair.
fn r13_iotlb() {
    let machine = Machine::new();
    let (a, b) = (machine.map(1, RW), machine.map(1, RW));
    machine.poke(a, tagged(a, 1));
    let view = view(&machine.mm).unwrap();
    machine.race([
        task(|| {
            device_writes(&machine, &view, a, 1);
            device_writes(&machine, &view, a, 2);
        }),
        task(|| {
            reclaim_unbracketed(&machine, a);
            reuse(&machine, b);
        }),
    ]);
    device_writes(&machine, &view, a, 4);
    let seen = machine.peek(a);
    machine.must(seen == Some(tagged(a, 4)), || {
        format!("a device wrote {:#x}, the page holds {seen:x?}", tagged(a, 4))
    });
    drop(view);
    machine.finish();
}

#[test]
fn r13_what_a_device_loses_outside_of_pairs_steps_its_sequence() {
    explore("r13_iotlb", r13_iotlb, &[M::IotlbRemovalWithoutStep]);
}

/// mprotect takes the right to write. When it has returned, no device writes.
fn r21_iotlb() {
    let machine = Machine::new();
    let a = machine.map(1, RW);
    let view = view(&machine.mm).unwrap();
    let protected = AtomicBool::new(false);
    machine.race([
        task(|| {
            for n in 1..3 {
                let protected = protected.load(Ordering::SeqCst);
                let wrote = device_writes(&machine, &view, a, n);
                machine.must(!(protected && wrote), || {
                    "a device wrote to a page that is read-only (I14)".into()
                });
            }
        }),
        task(|| {
            machine.mm.mprotect(a, PAGE_SIZE, READ).unwrap();
            protected.store(true, Ordering::SeqCst);
            let before = machine.peek(a);
            let after = machine.peek(a);
            machine.must(before == after, || "a page changes that nobody may write to (I14)".into());
        }),
    ]);
    drop(view);
    machine.finish();
}

#[test]
fn r21_no_device_writes_when_mprotect_has_returned() {
    explore("r21_iotlb", r21_iotlb, &[M::ProtectOutsidePair, M::IotlbStartKeeps]);
}
