// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What no vCPU writes and is logged all the same: devices, and mappings that go, come and move. And the audit of a log (I33).

use super::*;
use crate::common::ALL_GFNS;
use shadow_mmu::addr::HvaRange;
use shadow_mmu::iommu;
use shadow_mmu::mm::{Advice, RemapFlags};
use vm_memory::{Bytes, GuestAddress};

fn set(pages: impl IntoIterator<Item = u64>) -> Vec<u64> {
    pages.into_iter().collect()
}

#[test]
fn i34_what_devices_write_is_logged_and_what_they_read_is_not() {
    for (method, ad) in WAYS {
        let machine = machine(ad, 80);
        let view = iommu::view(&machine.mm).unwrap();
        let at = |n: u64, offset: u64| GuestAddress(page(BASE, n).0 + offset);
        view.write_obj(1u64, at(1, 0)).unwrap();
        machine.shadow.enable_dirty_log(SLOT, bitmap_log(method, ProtectOn::Get)).unwrap();
        assert_eq!(view.read_obj::<u64>(at(1, 0)).unwrap(), 1);
        assert_eq!(report(&machine), set([]));
        // Through a translation that was there, across a page's end, and of several pages.
        view.write_obj(2u64, at(1, 8)).unwrap();
        view.write_obj(3u64, at(4, PAGE_SIZE - 4)).unwrap();
        view.write_slice(&[7; 3 * PAGE_SIZE as usize], at(20, 100)).unwrap();
        view.read_slice(&mut [0; 64], at(70, 0)).unwrap();
        assert_eq!(report(&machine), [1, 4, 5, 20, 21, 22, 23], "{method:?} {ad:?}");
        assert_eq!(report(&machine), set([]));
        view.write_obj(2u64, at(1, 16)).unwrap();
        assert_eq!(report(&machine), [1]);
        drop(view);
        machine.finish();
    }
}

/// A device does not know of slots: every log that shows the page hears of its write.
#[test]
fn i34_a_device_write_is_in_the_log_of_every_slot_that_shows_it() {
    let machine = machine(AdBits::AfterFlush, 80);
    machine.shadow.remove_slot(SLOT).unwrap();
    for (gfn, first) in [(13, 0), (513, 30), (1000, 60)] {
        let hva = page(BASE, first);
        let slot = Memslot { gfn: Gfn(gfn), pages: 20, hva, access: SlotAccess::ReadWrite };
        machine.shadow.add_slot(slot).unwrap();
    }
    let slot = Memslot { gfn: Gfn(2000), pages: 80, hva: BASE, access: SlotAccess::ReadWrite };
    machine.shadow.add_slot(slot).unwrap();
    for gfn in [13, 513, 2000] {
        machine.shadow.enable_dirty_log(Gfn(gfn), bitmap_log(WriteProtect, ProtectOn::Get)).unwrap();
    }
    let view = iommu::view(&machine.mm).unwrap();
    for n in [5, 33, 65, 75] {
        view.write_obj(1u64, GuestAddress(page(BASE, n).0)).unwrap();
    }
    let get = |gfn| offsets(&machine.shadow.get_dirty_log(Gfn(gfn)).unwrap(), 0);
    assert_eq!([get(13), get(513), get(2000)], [set([5]), set([3]), set([5, 33, 65, 75])]);
    drop(view);
    machine.finish();
}

/// What is read there afterwards are other bytes: of each page that was there. Its neighbours in the range may be reported too.
#[test]
fn i34_pages_that_go_or_move_are_logged() {
    type Change = fn(&Machine);
    let changes: [(Change, &[u64], u64); 4] = [
        (|machine| machine.mm.madvise(page(BASE, 3), pages(4), Advice::DontNeed).unwrap(), &[3, 4, 5, 6], 4),
        (
            |machine| {
                machine.mm.munmap(page(BASE, 10), pages(2)).unwrap();
                machine.map_at(page(BASE, 10), 2, RW, MapFlags::PRIVATE);
            },
            &[10, 11],
            2,
        ),
        (|machine| machine.map_at(page(BASE, 20), 2, RW, MapFlags::PRIVATE), &[20, 21], 2),
        (
            |machine| {
                let flags = RemapFlags::MAYMOVE | RemapFlags::FIXED;
                machine.mm.mremap(page(BASE, 30), pages(2), pages(2), flags, page(BASE, 100)).unwrap();
            },
            &[30, 31, 100, 101],
            4,
        ),
    ];
    for (method, ad) in WAYS {
        for (change, pages, most) in changes {
            let machine = machine(ad, 64);
            let mut vcpu = machine.vcpu(0, Off);
            (0..64).for_each(|n| vcpu.write(page(BASE, n), n).unwrap());
            machine.shadow.enable_dirty_log(SLOT, bitmap_log(method, ProtectOn::Get)).unwrap();
            change(&machine);
            let dirty = report(&machine);
            assert!(pages.iter().all(|page| dirty.contains(page)), "{method:?} {ad:?}: {dirty:?}");
            assert!(dirty.len() as u64 <= most, "{dirty:?}");
            assert_eq!(report(&machine), set([]));
            machine.check();
            machine.finish();
        }
    }
}

/// Of a range that goes, what was there; and not where it was zeros.
#[test]
fn i34_what_was_not_there_or_held_zeros_is_not_logged_when_it_goes() {
    let machine = Machine::new(200);
    machine.map_at(BASE, 512, RW, MapFlags::PRIVATE | MapFlags::NORESERVE);
    let mut vcpu = machine.vcpu(0, Off);
    [3, 4, 90].iter().for_each(|&n| vcpu.write(page(BASE, n), n).unwrap());
    [5, 200].iter().for_each(|&n| assert_eq!(vcpu.read(page(BASE, n)), Ok(0)));
    machine.shadow.enable_dirty_log(SLOT, bitmap_log(WriteProtect, ProtectOn::Get)).unwrap();
    machine.mm.madvise(BASE, pages(512), Advice::DontNeed).unwrap();
    assert_eq!(report(&machine), [3, 4, 90]);
    machine.finish();
}

/// Shared memory has its bytes in the object: a hole takes them also where no pte is left that shows them.
#[test]
fn i34_a_hole_in_shared_memory_is_logged_whoever_had_it_mapped() {
    let machine = Machine::new(64);
    machine.map_at(BASE, 4, RW, MapFlags::SHARED);
    let mut vcpu = machine.vcpu(0, Off);
    vcpu.write(page(BASE, 1), 7).unwrap();
    machine.shadow.enable_dirty_log(SLOT, bitmap_log(WriteProtect, ProtectOn::Get)).unwrap();
    machine.mm.madvise(BASE, pages(4), Advice::DontNeed).unwrap();
    report(&machine);
    machine.mm.madvise(page(BASE, 1), pages(1), Advice::Remove).unwrap();
    assert_eq!(report(&machine), [1]);
    assert_eq!(vcpu.read(page(BASE, 1)), Ok(0));
    machine.finish();
}

/// However many places a guest writes at, a report stays small, and what it clears is cleared.
#[test]
fn i37_a_report_of_a_guest_that_writes_everywhere_is_a_few_runs() {
    const APART: u64 = 1 << 16;
    for protect in [ProtectOn::Get, ProtectOn::Clear] {
        let machine = Machine::new(64);
        machine.map_at(BASE, 4, RW, MapFlags::PRIVATE);
        machine.shadow.enable_dirty_log(SLOT, bitmap_log(WriteProtect, protect)).unwrap();
        let at = |n: u64| Hva((n * APART) << 12);
        (0..4000).for_each(|n| machine.mm.notifiers().written(HvaRange::page(at(n))));
        let dirty = machine.shadow.get_dirty_log(SLOT).unwrap();
        assert!((0..4000).all(|n| dirty.contains(at(n).page())));
        assert!(dirty.runs().count() < 1500 && dirty.whole_runs().count() <= 1024);
        if protect == ProtectOn::Clear {
            machine.shadow.clear_dirty_log(SLOT, 0..ALL_GFNS, &dirty).unwrap();
        }
        assert!(machine.shadow.get_dirty_log(SLOT).unwrap().is_empty());
        machine.finish();
    }
}

/// A page that a vCPU wrote and that then got a frame of its own stays reported; and nothing more is.
#[test]
fn i34_copy_on_write_is_logged_as_the_write_that_it_is() {
    for (method, ad) in WAYS {
        let machine = machine(ad, 16);
        let mut vcpu = machine.vcpu(0, Fixed(16));
        machine.shadow.enable_dirty_log(SLOT, bitmap_log(method, ProtectOn::Get)).unwrap();
        vcpu.write(page(BASE, 2), 1).unwrap();
        let child = machine.fork().unwrap();
        assert_eq!(vcpu.read(page(BASE, 3)), Ok(3));
        vcpu.write(page(BASE, 4), 1).unwrap();
        assert_eq!(report(&machine), [2, 4], "{method:?} {ad:?}");
        vcpu.write(page(BASE, 2), 1).unwrap();
        assert_eq!(report(&machine), [2]);
        drop(child.exit());
        machine.finish();
    }
}

/// The audit sees a leaf with W that the log knows nothing of, and that of a log by D it need not know.
#[test]
fn i33_the_audit_finds_w_without_a_record() {
    const W: u64 = 1 << 1;
    for (method, ad) in WAYS {
        let machine = machine(ad, 4);
        let mut vcpu = machine.vcpu(0, Fixed(4));
        machine.shadow.enable_dirty_log(SLOT, bitmap_log(method, ProtectOn::Get)).unwrap();
        vcpu.write(BASE, 1).unwrap();
        vcpu.read(page(BASE, 1)).unwrap();
        machine.check();
        let before = machine.leaf_entry(page(BASE, 1)).fetch_or(W, Ordering::SeqCst);
        let found: Vec<(u8, Gfn)> = (machine.shadow.audit(&machine.mm).violations.iter())
            .map(|violation| (violation.invariant, violation.gfn))
            .collect();
        let expected = [(33, Gfn(BASE.page() + 1))];
        assert_eq!(found, if method == WriteProtect { &expected[..] } else { &[] }, "{method:?} {ad:?}");
        machine.leaf_entry(page(BASE, 1)).store(before, Ordering::SeqCst);
        machine.check();
        machine.finish();
    }
}
