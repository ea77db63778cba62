// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The OOM reaper: what it takes, what it leaves, and that a page it took never comes back as another (I10, R23).
// What a test does not expect may end it.
#![cfg(feature = "mmu-notifier")]
#![allow(clippy::unwrap_used)]

mod common;

use common::{Machine, READ, RW, Random, TestFile, page, pages};
use shadow_mmu::addr::{Hva, HvaRange};
use shadow_mmu::mm::{Advice, Backing, FaultError, FaultRequest, MapFlags, MmError, Object, Reaped};
use shadow_mmu::notifier::{Blockable, Event, Invalidation, MmuNotifier, WouldBlock};
use shadow_mmu::shadow::FaultAroundPolicy::{Fixed, Off};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

const BASE: Hva = Hva(0x7000_0000);

/// A listener that would have to sleep for some pages, and so has no end op.
#[derive(Debug)]
struct Sleeper {
    asleep_for: Mutex<HvaRange>,
    heard: Mutex<Vec<(HvaRange, Event)>>,
}

impl Sleeper {
    fn new(asleep_for: HvaRange) -> Arc<Self> {
        Arc::new(Self { asleep_for: Mutex::new(asleep_for), heard: Mutex::default() })
    }
}

impl MmuNotifier for Sleeper {
    fn invalidate_range_start(&self, invalidation: &Invalidation) -> Result<(), WouldBlock> {
        self.heard.lock().unwrap().push((invalidation.range, invalidation.event));
        let asleep = self.asleep_for.lock().unwrap().overlaps(invalidation.range);
        if asleep && invalidation.blockable == Blockable::No { Err(WouldBlock) } else { Ok(()) }
    }
}

fn span(from: u64, to: u64) -> HvaRange {
    HvaRange { start: page(BASE, from), end: page(BASE, to) }
}

/// Pages 0 to 3 are private memory, 8 to 11 shared, 16 to 19 a private file of which 17 was written, 24 to 27 private
/// again. All have been touched.
fn machine() -> Machine {
    let machine = Machine::new(128);
    let file = Object::file(&machine.pool, TestFile::new(pages(4)));
    machine.map_at(BASE, 4, RW, MapFlags::PRIVATE);
    machine.map_at(page(BASE, 8), 4, RW, MapFlags::SHARED);
    let backing = Backing::Object { object: file, offset: 0 };
    machine.mm.mmap(page(BASE, 16), pages(4), RW, MapFlags::PRIVATE | MapFlags::FIXED, backing).unwrap();
    machine.map_at(page(BASE, 24), 4, RW, MapFlags::PRIVATE);
    for n in (0..4).chain(8..12).chain([17]).chain(24..28) {
        machine.poke(page(BASE, n), n + 1);
    }
    [16, 18, 19].iter().for_each(|&n| assert_eq!(machine.peek(page(BASE, n)), TestFile::tag(n - 16)));
    machine
}

#[test]
fn private_pages_go_and_everything_else_stays() {
    let machine = machine();
    let mut vcpu = machine.vcpu(0, Off);
    (0..4).for_each(|n| assert_eq!(vcpu.read(page(BASE, n)), Ok(n + 1)));
    let (free, vmas, tables) =
        (machine.pool.free_frames(), machine.mm.vmas().len(), machine.mm.table_count());
    // Four, the copy of a file page, four. The file's own pages are the file's.
    assert_eq!(machine.mm.reap(), Some(Reaped { freed: 9, skipped: 0 }));
    assert_eq!(machine.pool.free_frames(), free + 9);
    assert_eq!((machine.mm.vmas().len(), machine.mm.table_count()), (vmas, tables));
    machine.check();
    machine.check_tlb(0);
    assert!(
        (8..12).all(|n| machine.pte(page(BASE, n)).is_present()),
        "shared memory is not the guest's alone"
    );
    // A page that was taken must not come back as zeros, for guest or host, nor as what the file has.
    for n in (0..4).chain(16..20) {
        assert_eq!(vcpu.read(page(BASE, n)), Err(FaultError::OutOfMemory), "page {n}");
        assert_eq!(vcpu.write(page(BASE, n), 1), Err(FaultError::OutOfMemory), "page {n}");
    }
    assert!(machine.pool.free_frames() >= free + 9, "who is refused costs nothing");
    assert_eq!(machine.mm.madvise(BASE, pages(1), Advice::PopulateWrite), Err(MmError::NoMemory));
    assert_eq!(machine.mm.fork().err(), Some(MmError::NoMemory));
    (8..12).for_each(|n| assert_eq!(vcpu.read(page(BASE, n)), Ok(n + 1)));
    assert_eq!(machine.mm.reap(), Some(Reaped::default()), "nothing is left to take");
    machine.finish();
}

/// A listener that would have to sleep for one page saves the whole mapping, not a page more; awake, it saves nothing.
#[test]
fn i10_r23_where_a_listener_would_sleep_nothing_is_touched() {
    for older in [true, false] {
        let machine = if older { Machine::new(128) } else { machine() };
        let sleeper = Sleeper::new(HvaRange::page(page(BASE, 2)));
        let subscription = machine.mm.register(sleeper.clone()).unwrap();
        if older {
            machine.map_at(BASE, 4, RW, MapFlags::PRIVATE);
            machine.map_at(page(BASE, 24), 4, RW, MapFlags::PRIVATE);
            (0..4).chain(24..28).for_each(|n| machine.poke(page(BASE, n), n + 1));
        }
        let mut vcpu = machine.vcpu(0, Off);
        (0..4).for_each(|n| vcpu.write(page(BASE, n), n + 2).unwrap());
        let before = [0, 1, 2, 3].map(|n| machine.pte(page(BASE, n)));
        sleeper.heard.lock().unwrap().clear();
        let others = if older { 4 } else { 5 };
        assert_eq!(machine.mm.reap(), Some(Reaped { freed: others, skipped: 1 }));
        let heard: Vec<_> = sleeper.heard.lock().unwrap().drain(..).collect();
        assert!(heard.contains(&(span(0, 4), Event::Unmap)) && heard.contains(&(span(24, 28), Event::Unmap)));
        assert_eq!([0, 1, 2, 3].map(|n| machine.pte(page(BASE, n))), before, "the mapping was touched");
        for (n, pte) in (0..4).zip(before) {
            assert_eq!(machine.pool.words(pte.pfn())[0].load(Ordering::SeqCst), n + 2);
            assert_eq!(machine.pool.frame(pte.pfn()).map_count(), 1);
        }
        machine.check();
        *sleeper.asleep_for.lock().unwrap() = span(100, 101);
        assert_eq!(machine.mm.reap(), Some(Reaped { freed: 4, skipped: 0 }));
        machine.check();
        machine.mm.unregister(&subscription).unwrap();
        machine.finish();
    }
}

/// The reaper waits for nobody: neither for who changes mappings, nor (as it only reads them) does it mind a fault.
#[test]
fn a_lock_that_is_taken_is_not_waited_for() {
    let machine = machine();
    std::thread::scope(|scope| {
        machine.after.start.shut();
        let unmap = scope.spawn(|| machine.mm.munmap(BASE, pages(4)).unwrap());
        machine.after.start.wait_for_arrival();
        assert_eq!(machine.mm.reap(), None);
        machine.after.start.open();
        unmap.join().unwrap();
    });
    assert_eq!(machine.vcpu(0, Off).read(page(BASE, 24)), Ok(25), "a go that did nothing has done no harm");
    machine.finish();

    let owned = Machine::new(128);
    let machine = &owned;
    let source = TestFile::new(pages(4));
    let backing = Backing::Object { object: Object::file(&machine.pool, source.clone()), offset: 0 };
    machine.mm.mmap(BASE, pages(4), RW, MapFlags::PRIVATE | MapFlags::FIXED, backing).unwrap();
    machine.map_at(page(BASE, 8), 4, RW, MapFlags::PRIVATE);
    machine.poke(page(BASE, 8), 1);
    source.read.shut();
    std::thread::scope(|scope| {
        // Not a guest's: a shadow map would notice the reaper's pair, and ask again.
        let request = FaultRequest::one_page(BASE, READ);
        let fault = scope.spawn(move || machine.mm.fault(&request).map(drop));
        source.read.wait_for_arrival();
        assert_eq!(machine.mm.reap(), Some(Reaped { freed: 1, skipped: 0 }));
        source.read.open();
        assert_eq!(fault.join().unwrap(), Err(FaultError::OutOfMemory), "it began before, and ended after");
    });
    machine.check();
    owned.finish();
}

#[test]
fn a_page_that_a_fork_shares_is_freed_by_its_last_owner() {
    let parent = machine();
    let child = parent.fork().unwrap();
    assert_eq!(parent.mm.reap(), Some(Reaped::default()), "nothing is the parent's alone");
    let mut vcpu = child.vcpu(0, Off);
    (0..4).for_each(|n| assert_eq!(vcpu.read(page(BASE, n)), Ok(n + 1)));
    vcpu.write(BASE, 9).unwrap();
    assert_eq!(child.mm.stats().copied_pages.load(Ordering::SeqCst), 0, "nobody shares it any more");
    assert_eq!(child.mm.reap(), Some(Reaped { freed: 9, skipped: 0 }));
    child.exit();
    parent.finish();
}

/// Guests that touch pages while these are reaped: each sees what it wrote, until it sees nothing any more.
#[test]
fn nobody_ever_reads_zeros_where_it_wrote() {
    const PAGES: u64 = 64;
    for round in 0..60 {
        let machine = Machine::new(512);
        machine.map_at(BASE, 2 * PAGES, RW, MapFlags::PRIVATE);
        (0..PAGES).for_each(|n| machine.poke(page(BASE, n), n + 1));
        let ready = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for id in 0..2 {
                let (machine, ready) = (&machine, &ready);
                scope.spawn(move || {
                    // Windows that reach over pages which others have reaped.
                    let mut vcpu = machine.vcpu(id, Fixed(32));
                    let mut random = Random(round * 2 + id as u64);
                    loop {
                        let n = random.below(PAGES);
                        match vcpu.read(page(BASE, n)) {
                            Ok(word) => assert_eq!(word, n + 1),
                            Err(error) => break assert_eq!(error, FaultError::OutOfMemory),
                        }
                        ready.store(true, Ordering::SeqCst);
                        // Fresh pages, which are zeros by right.
                        if vcpu.write(page(BASE, PAGES + random.below(PAGES)), 1).is_err() {
                            break;
                        }
                    }
                });
            }
            common::wait_until("somebody reads", || ready.load(Ordering::SeqCst));
            while machine.mm.reap().is_none() {}
        });
        machine.check();
        machine.finish();
    }
}
