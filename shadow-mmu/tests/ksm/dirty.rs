// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the dirty bit promises: memory that nobody writes is not read again, and no write is missed, whoever makes it, and
//! whoever else goes by D.

use super::*;
use shadow_mmu::iommu;
use shadow_mmu::shadow::DirtyMethod::{DirtyBit, WriteProtect};
use shadow_mmu::shadow::{DirtyMethod, ProtectOn};
use vm_memory::{Bytes, GuestAddress};

/// Every way in which a log can see writes.
const WAYS: [(DirtyMethod, AdBits); 5] = [
    (DirtyBit, AdBits::AfterFlush),
    (DirtyBit, AdBits::Unflushed),
    (WriteProtect, AdBits::AfterFlush),
    (WriteProtect, AdBits::Unflushed),
    (WriteProtect, AdBits::None),
];

fn scanned(ksm: &Ksm) -> u64 {
    ksm.stats().pages_scanned
}

fn flushed(machine: &Machine) -> u64 {
    machine.tlb.flushed.load(Ordering::SeqCst)
}

/// What a further pass costs is its tables: nothing is hashed, nothing flushed, and a guest that reads takes no fault.
#[test]
fn a_further_pass_over_what_nobody_writes_reads_nothing() {
    const PAGES: u64 = 900;
    for ad in KINDS {
        // Zeros, equal ones, and different ones.
        let machine = filled(ad, PAGES, |n| [0, SAME, n + 1000][n as usize % 3]);
        let ksm = sharing(settings(), [&machine]);
        let mut vcpu = machine.vcpu(0, Fixed(16));
        for _ in 0..2 {
            assert_eq!(vcpu.read(BASE), Ok(0));
            merge(&ksm);
        }
        (0..PAGES).for_each(|n| _ = vcpu.read(page(BASE, n)).unwrap());
        let (hashed, flushes, faults) = (scanned(&ksm), flushed(&machine), vcpu.faults);
        for _ in 0..10 {
            let scan = ksm.scan(u64::MAX);
            assert_eq!((scan.pass, scan.merged), (PassEnd::Reached, 0));
            assert!(scan.pages <= 2, "{} for two tables", scan.pages);
            (0..PAGES).for_each(|n| _ = vcpu.read(page(BASE, n)).unwrap());
        }
        assert_eq!((scanned(&ksm), flushed(&machine), vcpu.faults), (hashed, flushes, faults), "{ad:?}");
        check(&ksm, &machine);
        check_counters(&ksm);
        machine.finish();
    }
}

/// A pass that is cut into parts goes on where it was, whatever the parts.
#[test]
fn a_pass_in_parts_is_a_pass() {
    for part in [1, 2, 7, 513] {
        let machine = filled(AdBits::AfterFlush, 700, |n| n / 2 + 1);
        fill(&machine, page(BASE, 5000), 20, |n| n / 2 + 1);
        let ksm = sharing(settings(), [&machine]);
        let mut merged = 0;
        for _ in 0..2 {
            loop {
                let scan = ksm.scan(part);
                merged += scan.merged;
                if scan.pass == PassEnd::Reached {
                    break;
                }
                assert!((part..part + 40).contains(&scan.pages), "{} of {part}", scan.pages);
            }
        }
        assert_eq!((merged, ksm.stats().full_scans), (350 + 20, 2));
        check(&ksm, &machine);
        check_counters(&ksm);
        machine.finish();
    }
}

/// One that was written is hashed again when it was quiet for a pass, and then not any more.
#[test]
fn a_written_page_is_hashed_again_after_a_quiet_pass() {
    for ad in KINDS {
        let machine = filled(ad, 300, |n| n + 1);
        let ksm = sharing(settings(), [&machine]);
        let mut vcpu = machine.vcpu(0, Fixed(16));
        merge(&ksm);
        for round in 0..5 {
            let n = 40 * round + 3;
            vcpu.write(page(BASE, n), 200).unwrap();
            vcpu.write(page(BASE, n + 1), 100_000 + n).unwrap();
            let before = scanned(&ksm);
            // Its D is taken.
            assert_eq!((pass(&ksm), scanned(&ksm) - before), (0, 2), "{ad:?} round {round}");
            // It is hashed, and found equal to page 199.
            assert_eq!((pass(&ksm), scanned(&ksm) - before), (1, 4), "{ad:?} round {round}");
            assert_eq!((pass(&ksm), scanned(&ksm) - before), (0, 4), "{ad:?} round {round}");
        }
        assert_eq!(shared(&ksm), (1, 5));
        check(&ksm, &machine);
        check_counters(&ksm);
        machine.finish();
    }
}

/// A page that is written in each pass is never merged, and is passed over ever more often; its D stays then, and it is not
/// flushed. Then it comes to rest, and is merged.
#[test]
fn pages_that_are_written_all_the_time_are_skipped() {
    /// Passes that look at a page that they always find written, of so many.
    fn looks(passes: u64) -> u64 {
        let (mut looks, mut next): (u64, u64) = (0, 0);
        while next < passes {
            looks += 1;
            next += 1 + [0, 0, 0, 1, 2, 2, 4, 4, 4].get(looks as usize).copied().unwrap_or(8);
        }
        looks
    }
    const PASSES: u64 = 60;
    const WRITTEN: u64 = 10;
    for ad in KINDS {
        for (smart_scan, expected) in [(SmartScan::On, looks(PASSES)), (SmartScan::Off, PASSES)] {
            let machine = filled(ad, 64, |n| n + 1);
            let ksm = sharing(KsmSettings { smart_scan, ..settings() }, [&machine]);
            let mut vcpu = machine.vcpu(0, Off);
            for round in 0..PASSES {
                (0..WRITTEN).for_each(|n| vcpu.write(page(BASE, n), round + 1).unwrap());
                assert_eq!(pass(&ksm), 0, "{ad:?} {smart_scan:?} {round}");
            }
            let stats = ksm.stats();
            assert_eq!(stats.pages_skipped, (PASSES - expected) * WRITTEN, "{ad:?} {smart_scan:?}");
            // The others were looked at twice.
            assert_eq!(stats.pages_scanned, expected * WRITTEN + 2 * (64 - WRITTEN), "{ad:?} {smart_scan:?}");
            // Each look that finds a write flushes; but the first, where the host had written.
            assert!(flushed(&machine) <= expected * WRITTEN, "{ad:?} {smart_scan:?}");
            assert_eq!((stats.pages_volatile, stats.pages_unshared), (WRITTEN, 64 - WRITTEN));
            check_counters(&ksm);
            // Skipped, found written, skipped again, found quiet.
            for _ in 0..8 + 1 + 8 + 1 {
                pass(&ksm);
            }
            assert_eq!(shared(&ksm), (1, WRITTEN), "page 59 is like them");
            check(&ksm, &machine);
            machine.finish();
        }
    }
}

/// Pages that somebody points out come first, and need not have been quiet.
#[test]
fn hints_are_looked_at_first() {
    for ad in KINDS {
        let machine = filled(ad, 600, |n| n + 1);
        let hinted = page(BASE, 2000);
        fill(&machine, hinted, 40, |n| [300, 0, 7777, 7777][n as usize % 4]);
        let ksm = sharing(settings(), [&machine]);
        ksm.hint(&machine.mm, HvaRange::pages_from(hinted, 40));
        // In a scan of no more than that: the zeros and the equal ones. One that was there is not known yet.
        let scan = ksm.scan(100);
        assert_eq!((scan.merged, scan.pass), (10 + 9 + 19, PassEnd::NotYet), "{ad:?}");
        assert_eq!((shared(&ksm), ksm.stats().ksm_zero_pages), ((2, 9 + 19), 10));
        check(&ksm, &machine);
        // One that is written after it was hashed is found by the next pass, as any other.
        let mut vcpu = machine.vcpu(0, Off);
        vcpu.write(hinted, 8888).unwrap();
        vcpu.write(page(BASE, 5), 8888).unwrap();
        // The rest of this pass, and two.
        pass(&ksm);
        merge(&ksm);
        assert_eq!(machine.pte(hinted).pfn(), machine.pte(page(BASE, 5)).pfn());
        // 300 is there too, and the eleventh.
        assert!(machine.pte(page(BASE, 299)).is_ksm());
        check(&ksm, &machine);
        check_counters(&ksm);
        machine.finish();
    }
}

/// A hint may be about anything.
#[test]
fn hints_may_be_wrong() {
    let machine = filled(AdBits::AfterFlush, 600, |_| SAME);
    machine.map_at(page(BASE, 600), 10, RW, MapFlags::PRIVATE);
    machine.map_at(page(BASE, 700), 10, RW, MapFlags::SHARED);
    [605, 705].iter().for_each(|&n| machine.poke(page(BASE, n), SAME));
    let (stranger, dropped) = (machine.beside(AdBits::AfterFlush), machine.beside(AdBits::AfterFlush));
    fill(&stranger, BASE, 2, |_| SAME);
    let ksm = sharing(settings(), [&machine, &dropped]);
    ksm.hint(&stranger.mm, HvaRange::pages_from(BASE, 2));
    ksm.hint(&dropped.mm, HvaRange::pages_from(BASE, 2));
    drop(dropped.exit());
    let whole = |start, end| HvaRange { start: Hva(start), end: Hva(end) };
    for range in [
        whole(0, 0),
        whole(u64::MAX - 5, u64::MAX),
        whole(BASE.0 + 5 * PAGE_SIZE, BASE.0),
        HvaRange::pages_from(page(BASE, 600), 200),
    ] {
        ksm.hint(&machine.mm, range);
    }
    assert_eq!(ksm.scan(4).merged, 0);
    // The bytes of a read, not of pages; across the end of a table.
    ksm.hint(&machine.mm, whole(BASE.0 + 510 * PAGE_SIZE + 100, BASE.0 + 512 * PAGE_SIZE + 100));
    assert_eq!((ksm.scan(20).merged, shared(&ksm)), (2, (1, 2)));
    ksm.hint(&machine.mm, whole(0, u64::MAX));
    assert_eq!((ksm.scan(2000).merged, shared(&ksm)), (595, (3, 597)));
    // The oldest of too many are forgotten.
    fill(&machine, page(BASE, 1000), 2, |n| n + 5);
    fill(&machine, page(BASE, 1002), 2, |n| n + 5);
    ksm.hint(&machine.mm, HvaRange::pages_from(page(BASE, 1000), 4));
    (0..1024).for_each(|_| ksm.hint(&machine.mm, whole(0, 0)));
    assert_eq!(ksm.scan(0).merged, 0);
    assert!(!has_merged(&stranger, BASE, 2));
    check(&ksm, &machine);
    drop(stranger.exit());
    machine.finish();
}

/// Devices write through translations that they keep; the host by pins; neither sets D in an spte.
#[test]
fn writes_of_devices_and_of_the_host_are_seen() {
    for ad in KINDS {
        let machine = filled(ad, 64, |n| n + 1);
        let ksm = sharing(settings(), [&machine]);
        let view = iommu::view(&machine.mm).unwrap();
        let mut vcpu = machine.vcpu(0, Off);
        (0..64).for_each(|n| assert_eq!(vcpu.read(page(BASE, n)), Ok(n + 1)));
        merge(&ksm);
        type Write<'a> = (&'a str, &'a dyn Fn(u64));
        let by_device = |n| view.write_obj(50u64, GuestAddress(page(BASE, n).0)).unwrap();
        let by_host = |n| machine.poke(page(BASE, n), 50);
        let by_pin = |n| {
            let pinned = machine.mm.fault(&FaultRequest::one_page(page(BASE, n), RW)).unwrap();
            // It is looked at while it is held, and written then.
            pass(&ksm);
            machine.pool.words(pinned.required().pfn)[0].store(50, Ordering::SeqCst);
        };
        let writes: [Write<'_>; 3] = [("device", &by_device), ("host", &by_host), ("pin", &by_pin)];
        let mut sharing = 0;
        for (who, write) in writes {
            for n in [3, 9] {
                let n = n + 10 * sharing;
                // There is a translation, for writing, by the time that the page is in the index.
                view.write_obj(n + 200, GuestAddress(page(BASE, n).0)).unwrap();
                merge(&ksm);
                assert!(!machine.pte(page(BASE, n)).is_ksm());
                write(n);
                merge(&ksm);
                sharing += 1;
                assert_eq!(shared(&ksm), (1, sharing), "{who} {ad:?}");
                assert_eq!(vcpu.read(page(BASE, n)), Ok(50), "{who} {ad:?}");
            }
        }
        // Into a merged page: not into the others.
        by_device(49);
        view.write_obj(51u64, GuestAddress(page(BASE, 49).0)).unwrap();
        assert_eq!((vcpu.read(page(BASE, 49)), vcpu.read(page(BASE, 3))), (Ok(51), Ok(50)));
        check(&ksm, &machine);
        drop(view);
        machine.finish();
    }
}

/// What a device only reads need not be looked at again for long: its translation is gone, and is made anew without a word.
#[test]
fn a_device_that_writes_between_two_looks_at_once_is_seen() {
    let machine = filled(AdBits::AfterFlush, 2, |n| n + 1);
    let ksm = sharing(settings(), [&machine]);
    let view = iommu::view(&machine.mm).unwrap();
    for round in 0..8u64 {
        view.write_obj(round % 2 + 1, GuestAddress(BASE.0)).unwrap();
        assert_eq!(pass(&ksm), 0, "round {round}");
    }
    assert_eq!(machine.peek(BASE), 2);
    drop(view);
    machine.finish();
}

/// D that sharing takes is told to the log that goes by D; W that it takes to nobody, for the log that goes by W has heard
/// already. Pages that are merged, and come back, are not written thereby.
#[test]
fn i34_a_log_is_exact_while_sharing_takes_d() {
    const PAGES: u64 = 500;
    for (method, ad) in WAYS {
        for protect in [ProtectOn::Get, ProtectOn::Clear] {
            let machine = filled(ad, PAGES, |n| n % 7);
            let ksm = sharing(settings(), [&machine]);
            let mut vcpus = [machine.vcpu(0, Fixed(16)), machine.vcpu(1, Off)];
            let mut random = Random(3);
            machine.shadow.enable_dirty_log(Gfn(0), bitmap_log(method, protect)).unwrap();
            for round in 0..40 {
                let mut written = BTreeSet::new();
                for some in 0..3 {
                    for _ in 0..[0, 5, 60][round % 3] {
                        let (n, vcpu) = (random.below(PAGES), &mut vcpus[random.below(2) as usize]);
                        if random.below(3) > 0 {
                            vcpu.write(page(BASE, n), random.below(7)).unwrap();
                            written.insert(BASE.page() + n);
                        } else {
                            vcpu.read(page(BASE, n)).unwrap();
                        }
                    }
                    match random.below(4) {
                        0 if some == 1 => ksm.unmerge().unwrap(),
                        1 => _ = machine.mm.age(),
                        _ => {}
                    }
                    pass(&ksm);
                }
                let dirty = machine.shadow.get_dirty_log(Gfn(0)).unwrap();
                if protect == ProtectOn::Clear {
                    machine.shadow.clear_dirty_log(Gfn(0), 0..1 << 35, &dirty).unwrap();
                }
                assert_eq!(
                    Vec::from_iter(dirty.iter()),
                    Vec::from_iter(written),
                    "{method:?} {ad:?} {protect:?} round {round}"
                );
                check(&ksm, &machine);
            }
            assert!(shared(&ksm).1 > 0);
            machine.finish();
        }
    }
}

/// And what the log takes, sharing hears of by the frame.
#[test]
fn a_write_that_a_log_has_taken_is_seen() {
    for (method, ad) in WAYS {
        let machine = filled(ad, 64, |n| n + 1);
        let ksm = sharing(settings(), [&machine]);
        let mut vcpu = machine.vcpu(0, Off);
        (0..64).for_each(|n| vcpu.write(page(BASE, n), n + 1).unwrap());
        merge(&ksm);
        machine.shadow.enable_dirty_log(Gfn(0), bitmap_log(method, ProtectOn::Get)).unwrap();
        for n in 0..5 {
            vcpu.write(page(BASE, n), 60).unwrap();
            assert_eq!(machine.shadow.get_dirty_log(Gfn(0)).unwrap().count(), 1);
            assert_eq!((pass(&ksm), pass(&ksm)), (0, 1), "{method:?} {ad:?}");
        }
        assert_eq!(shared(&ksm), (1, 5), "{method:?} {ad:?}");
        check(&ksm, &machine);
        machine.finish();
    }
}

/// A scan that may do little takes D of no page that it does not come to.
#[test]
fn a_scan_that_stops_early_has_asked_about_no_more_than_it_looked_at() {
    for ad in KINDS {
        let machine = Machine::with_ad_bits(9000, ad);
        machine.map_at(BASE, 16 * 512, RW, MapFlags::PRIVATE);
        machine.mm.madvise(BASE, pages(16 * 512), Advice::Mergeable).unwrap();
        // By the vCPU, so that later writes leave D in its leaves and nothing else.
        let mut vcpu = machine.vcpu(0, Off);
        (0..16).for_each(|n| vcpu.write(page(BASE, n * 512), n + 1).unwrap());
        let ksm = sharing(settings(), [&machine]);
        // Until nothing is new, and once more.
        (0..4).for_each(|_| _ = pass(&ksm));
        [1, 12].into_iter().for_each(|n| vcpu.write(page(BASE, n * 512), 4).unwrap());
        assert_eq!(ksm.scan(9).pass, PassEnd::NotYet);
        pass(&ksm);
        merge(&ksm);
        assert_eq!(shared(&ksm), (1, 2), "{ad:?}: tables 1, 3 and 12");
        check(&ksm, &machine);
        machine.finish();
    }
}
