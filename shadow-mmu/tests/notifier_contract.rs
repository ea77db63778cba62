// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The notifier layer keeps the contract of `mmu_notifier.h`: who is called, in which order, for which range and reason,
//! and what waits for what (I7, I9, I10, I12; R17–R19, R23).
//!
//! R8 (the secondary hears of a new pte before it is stored) cannot be seen from outside: a listener that looked at the pte
//! in `change_pte` would wait for the page-table lock that its caller holds. It is tested where it is kept, in `mm/notify.rs`.
// What a test does not expect may end it.
#![cfg(feature = "mmu-notifier")]
#![allow(clippy::unwrap_used)]

mod common;
#[path = "notifier_contract/lifetimes.rs"]
mod lifetimes;

use common::{Gate, Hook, READ, RW, TestFile, WATCH, page, pages, wait_until};
use shadow_mmu::addr::{Access, Hva, HvaRange, PAGE_SIZE};
use shadow_mmu::frame::{FramePool, FreedFrames};
use shadow_mmu::mm::{Advice, Backing, FaultRequest, MapFlags, Mm, Object, Pte, RemapFlags};
use shadow_mmu::notifier::{
    Blockable, Event, Invalidation, Misuse, MmuNotifier, Notifiers, Subscription, WouldBlock,
};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;

const BASE: Hva = Hva(0x7000_0000);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Op {
    Release,
    Start(HvaRange, Event),
    End(HvaRange, Event),
    InvalidateRange(HvaRange),
    ChangePte(Hva),
    ClearFlushYoung(HvaRange),
    ClearYoung(HvaRange),
    TestYoung(Hva),
    InvalidatePage(Hva),
}
use Op::{ChangePte, End, InvalidateRange, Start};

type Log = Arc<Mutex<Vec<(usize, Op)>>>;

/// A listener that writes down what it hears.
#[derive(Debug)]
struct Recorder {
    name: usize,
    log: Log,
    young: bool,
    refuses: bool,
}

impl Recorder {
    fn new(name: usize, log: &Log) -> Arc<Self> {
        Arc::new(Self { name, log: Arc::clone(log), young: false, refuses: false })
    }
    fn note(&self, op: Op) {
        self.log.lock().unwrap().push((self.name, op));
    }
}

impl MmuNotifier for Recorder {
    fn release(&self) {
        self.note(Op::Release);
    }
    fn clear_flush_young(&self, range: HvaRange) -> bool {
        self.note(Op::ClearFlushYoung(range));
        self.young
    }
    fn clear_young(&self, range: HvaRange) -> bool {
        self.note(Op::ClearYoung(range));
        self.young
    }
    fn test_young(&self, hva: Hva) -> bool {
        self.note(Op::TestYoung(hva));
        self.young
    }
    fn change_pte(&self, hva: Hva, _: Pte) {
        self.note(ChangePte(hva));
    }
    fn invalidate_page(&self, hva: Hva) {
        self.note(Op::InvalidatePage(hva));
    }
    fn invalidate_range_start(&self, invalidation: &Invalidation) -> Result<(), WouldBlock> {
        if self.refuses && invalidation.blockable == Blockable::No {
            return Err(WouldBlock);
        }
        self.note(Start(invalidation.range, invalidation.event));
        Ok(())
    }
    fn invalidate_range_end(&self, invalidation: &Invalidation) {
        self.note(End(invalidation.range, invalidation.event));
    }
    fn walks_primary_tables(&self) -> bool {
        true
    }
    fn invalidate_range(&self, range: HvaRange) {
        self.note(InvalidateRange(range));
    }
}

fn space(frames: u64) -> Arc<Mm> {
    Mm::new(Arc::new(FramePool::new(pages(frames), FreedFrames::Poison).unwrap())).unwrap()
}

fn take(log: &Log) -> Vec<(usize, Op)> {
    std::mem::take(&mut log.lock().unwrap())
}

fn map(mm: &Mm, at: Hva, count: u64, prot: Access, flags: MapFlags, backing: Backing) {
    mm.mmap(at, pages(count), prot, flags | MapFlags::FIXED, backing).unwrap();
}

fn touch(mm: &Mm, at: Hva, access: Access) {
    drop(mm.fault(&FaultRequest::one_page(at, access)).unwrap());
}

fn span(from: u64, to: u64) -> HvaRange {
    HvaRange { start: page(BASE, from), end: page(BASE, to) }
}

/// Three listeners, the newest of which is number 3; the middle one as asked for.
fn three(mm: &Mm, log: &Log, young: bool, refuses: bool) -> Vec<Subscription> {
    let middle = Arc::new(Recorder { name: 2, log: Arc::clone(log), young, refuses });
    let listeners = [Recorder::new(1, log), middle, Recorder::new(3, log)];
    listeners.into_iter().map(|listener| mm.register(listener).unwrap()).collect()
}

#[track_caller]
fn assert_waits<T>(thread: &JoinHandle<T>, what: &str) {
    std::thread::sleep(WATCH);
    assert!(!thread.is_finished(), "{what}");
}

#[test]
fn i12_every_op_reaches_the_newest_listener_first() {
    let (mm, log) = (space(8), Log::default());
    three(&mm, &log, false, false);
    let (range, notifiers) = (span(0, 2), mm.notifiers());
    drop(notifiers.invalidate(range, Event::Clear));
    let start = [3, 2, 1].map(|n| (n, Start(range, Event::Clear)));
    let end = [3, 2, 1].map(|n| [(n, InvalidateRange(range)), (n, End(range, Event::Clear))]);
    assert_eq!(take(&log), [&start[..], end.as_flattened()].concat());
    notifiers.change_pte(BASE, Pte::NONE);
    notifiers.invalidate_page(BASE);
    notifiers.invalidate_range(range);
    let expected = [ChangePte(BASE), Op::InvalidatePage(BASE), InvalidateRange(range)];
    assert_eq!(take(&log), expected.map(|op| [3, 2, 1].map(|n| (n, op))).concat());
    mm.release();
    assert_eq!(take(&log), [3, 2, 1].map(|n| (n, Op::Release)));
}

#[test]
fn i12_clearing_young_asks_everybody_and_testing_stops_at_the_first() {
    for young in [false, true] {
        let (mm, log) = (space(8), Log::default());
        three(&mm, &log, young, false);
        let (range, notifiers) = (span(0, 2), mm.notifiers());
        assert_eq!(notifiers.clear_flush_young(range), young);
        assert_eq!(notifiers.clear_young(range), young);
        let everybody = [Op::ClearFlushYoung(range), Op::ClearYoung(range)];
        assert_eq!(take(&log), everybody.map(|op| [3, 2, 1].map(|n| (n, op))).concat());
        assert_eq!(notifiers.test_young(BASE), young);
        let asked = if young { vec![3, 2] } else { vec![3, 2, 1] };
        assert_eq!(take(&log), asked.iter().map(|&n| (n, Op::TestYoung(BASE))).collect::<Vec<_>>());
    }
}

#[test]
fn i10_r23_a_refused_start_is_ended_for_those_that_had_agreed() {
    let (mm, log) = (space(8), Log::default());
    three(&mm, &log, false, true);
    let range = span(0, 1);
    assert_eq!(mm.notifiers().invalidate_nonblock(range, Event::Unmap).err(), Some(WouldBlock));
    assert_eq!(take(&log), [(3, Start(range, Event::Unmap)), (3, End(range, Event::Unmap))]);
    // It refuses only what must not block.
    drop(mm.notifiers().invalidate(range, Event::Unmap));
    assert_eq!(take(&log).iter().filter(|(_, op)| matches!(op, Start(..))).count(), 3);
}

#[test]
fn a_nonblocking_pair_that_nobody_refuses_is_a_pair() {
    let (mm, log) = (space(8), Log::default());
    three(&mm, &log, false, false);
    let range = span(0, 1);
    let pair = mm.notifiers().invalidate_nonblock(range, Event::Unmap).unwrap();
    assert_eq!(pair.invalidation(), Invalidation { range, event: Event::Unmap, blockable: Blockable::No });
    assert_eq!(take(&log), [3, 2, 1].map(|n| (n, Start(range, Event::Unmap))));
    drop(pair);
    assert_eq!(take(&log).iter().filter(|(_, op)| matches!(op, End(..))).count(), 3);
}

/// What each operation of the address space announces. Pages 0 to 7 are private, of which 2 and 5 are written; 8 to 11 are
/// shared and 9 is written; page 12 is read only (the zero frame); 16 to 19 map a file, of which 17 was read.
#[test]
fn every_operation_announces_its_range_and_its_reason() {
    use Event::{Clear, ProtectionPage, ProtectionVma, Unmap};
    type Row<'a> = (&'a str, &'a dyn Fn(&Mm), &'a [(HvaRange, Event)]);
    let remap = |mm: &Mm, old: u64, old_len: u64, len: u64, flags, to: u64| {
        mm.mremap(page(BASE, old), pages(old_len), pages(len), flags, page(BASE, to)).unwrap();
    };
    let advise = |mm: &Mm, at: u64, len, advice| mm.madvise(page(BASE, at), pages(len), advice).unwrap();
    let protect = |mm: &Mm, at: u64, len, prot| mm.mprotect(page(BASE, at), pages(len), prot).unwrap();
    let (may_move, fixed) = (RemapFlags::MAYMOVE, RemapFlags::MAYMOVE | RemapFlags::FIXED);
    let keep = fixed | RemapFlags::DONTUNMAP;
    #[rustfmt::skip]
    let rows: &[Row<'_>] = &[
        ("mmap in free space", &|mm| map(mm, page(BASE, 40), 4, RW, MapFlags::PRIVATE, Backing::Anonymous), &[]),
        ("mmap over mappings", &|mm| map(mm, page(BASE, 6), 4, RW, MapFlags::PRIVATE, Backing::Anonymous), &[(span(6, 10), Unmap)]),
        ("munmap", &|mm| mm.munmap(page(BASE, 1), pages(4)).unwrap(), &[(span(1, 5), Unmap)]),
        ("munmap of a hole", &|mm| mm.munmap(page(BASE, 40), pages(4)).unwrap(), &[]),
        ("madvise dontneed", &|mm| advise(mm, 1, 3, Advice::DontNeed), &[(span(1, 4), Clear)]),
        ("madvise dontneed, a pair a mapping", &|mm| advise(mm, 6, 4, Advice::DontNeed), &[(span(6, 8), Clear), (span(8, 10), Clear)]),
        ("madvise free", &|mm| advise(mm, 1, 3, Advice::Free), &[(span(1, 4), Clear)]),
        ("madvise remove", &|mm| advise(mm, 9, 2, Advice::Remove), &[(span(9, 11), Clear)]),
        ("madvise random", &|mm| advise(mm, 1, 3, Advice::Random), &[]),
        ("madvise populate read", &|mm| advise(mm, 0, 8, Advice::PopulateRead), &[]),
        ("mprotect, from the first page there is", &|mm| protect(mm, 0, 8, READ), &[(span(2, 8), ProtectionVma)]),
        ("mprotect of nothing populated", &|mm| protect(mm, 6, 2, READ), &[]),
        ("mprotect that changes nothing", &|mm| protect(mm, 0, 8, RW), &[]),
        ("mprotect upward", &|mm| protect(mm, 2, 1, Access::all()), &[(span(2, 3), ProtectionVma)]),
        ("mremap in place", &|mm| remap(mm, 16, 4, 6, RemapFlags::empty(), 0), &[]),
        ("mremap shrinks", &|mm| remap(mm, 0, 8, 3, RemapFlags::empty(), 0), &[(span(3, 8), Unmap)]),
        ("mremap moves", &|mm| remap(mm, 4, 2, 3, fixed, 40), &[(span(4, 6), Unmap)]),
        ("mremap moves over a mapping", &|mm| remap(mm, 4, 2, 2, fixed, 8), &[(span(8, 10), Unmap), (span(4, 6), Unmap)]),
        ("mremap keeps", &|mm| remap(mm, 4, 2, 2, keep, 40), &[(span(4, 6), Unmap)]),
        ("mremap doubles", &|mm| remap(mm, 8, 0, 4, may_move, 0), &[]),
        ("first touch", &|mm| touch(mm, page(BASE, 0), RW), &[]),
        ("first read", &|mm| touch(mm, page(BASE, 0), READ), &[]),
        ("first write to a file page", &|mm| touch(mm, page(BASE, 18), RW), &[]),
        ("copy of the zero frame", &|mm| touch(mm, page(BASE, 12), RW), &[(span(12, 13), Clear)]),
        ("copy of a file page", &|mm| touch(mm, page(BASE, 17), RW), &[(span(17, 18), Clear)]),
        ("fork, a pair a mapping with private pages", &|mm| drop(mm.fork().unwrap()), &[(span(0, 8), ProtectionPage)]),
        ("reap, a pair a private mapping", &|mm| _ = mm.reap().unwrap(), &[(span(0, 8), Unmap), (span(12, 13), Unmap), (span(16, 20), Unmap)]),
        ("aging", &|mm| _ = mm.pmdp_clear_flush_young_notify(BASE) && mm.ptep_clear_young_notify(BASE), &[]),
        ("brk up", &|mm| assert_eq!(mm.brk(page(BASE, 62)), page(BASE, 62)), &[]),
        ("brk down", &|mm| _ = [62, 61].map(|n| mm.brk(page(BASE, n))), &[(span(61, 62), Unmap)]),
    ];
    for (name, call, expected) in rows {
        let (mm, log) = (space(128), Log::default());
        let file = Object::file(mm.pool(), TestFile::new(pages(8)));
        map(&mm, BASE, 8, RW, MapFlags::PRIVATE, Backing::Anonymous);
        map(&mm, page(BASE, 8), 4, RW, MapFlags::SHARED, Backing::Anonymous);
        map(&mm, page(BASE, 12), 1, RW, MapFlags::PRIVATE, Backing::Anonymous);
        map(&mm, page(BASE, 16), 4, RW, MapFlags::PRIVATE, Backing::Object { object: file, offset: 0 });
        mm.set_brk_start(page(BASE, 60));
        [2, 5, 9].iter().for_each(|&n| touch(&mm, page(BASE, n), RW));
        [12, 17].iter().for_each(|&n| touch(&mm, page(BASE, n), READ));
        mm.register(Recorder::new(1, &log)).unwrap();
        call(&mm);
        let ops: Vec<Op> = take(&log).into_iter().map(|(_, op)| op).collect();
        let pairs = |end: bool| {
            ops.iter().filter_map(move |op| match *op {
                Start(range, event) if !end => Some((range, event)),
                End(range, event) if end => Some((range, event)),
                _ => None,
            })
        };
        assert_eq!(pairs(false).collect::<Vec<_>>(), *expected, "{name}");
        assert_eq!(pairs(true).collect::<Vec<_>>(), *expected, "{name}: ends");
        // One pair at a time: each start is followed by its own end before the next.
        let mut open = 0;
        for op in &ops {
            open += i32::from(matches!(op, Start(..))) - i32::from(matches!(op, End(..)));
            assert!((0..=1).contains(&open), "{name}: {ops:?}");
        }
    }
}

#[test]
fn r8_i26_copy_on_write_tells_of_the_new_pte_inside_its_pair() {
    let (mm, log) = (space(16), Log::default());
    map(&mm, BASE, 1, RW, MapFlags::PRIVATE, Backing::Anonymous);
    touch(&mm, BASE, READ);
    mm.register(Recorder::new(1, &log)).unwrap();
    touch(&mm, BASE, RW);
    let (range, event) = (span(0, 1), Event::Clear);
    let expected = [
        Start(range, event),
        InvalidateRange(range),
        ChangePte(BASE),
        InvalidateRange(range),
        End(range, event),
    ];
    assert_eq!(take(&log), expected.map(|op| (1, op)));
}

#[test]
fn an_address_space_without_listeners_works_and_so_does_one_that_lost_them() {
    let (mm, log) = (space(16), Log::default());
    let all_the_same = |mm: &Mm| {
        map(mm, BASE, 4, RW, MapFlags::PRIVATE, Backing::Anonymous);
        touch(mm, BASE, READ);
        touch(mm, BASE, RW);
        mm.mprotect(BASE, pages(2), READ).unwrap();
        assert!(!mm.notifiers().clear_flush_young(span(0, 4)) && !mm.notifiers().test_young(BASE));
        mm.munmap(BASE, pages(4)).unwrap();
    };
    all_the_same(&mm);
    for subscription in three(&mm, &log, false, false) {
        mm.unregister(&subscription).unwrap();
        assert_eq!(mm.unregister(&subscription), Err(Misuse::NotRegistered));
    }
    take(&log);
    all_the_same(&mm);
    assert_eq!(take(&log), []);
}

#[test]
fn pairs_nest_and_overlap() {
    let (mm, log) = (space(16), Log::default());
    mm.register(Recorder::new(1, &log)).unwrap();
    let outer = mm.notifiers().invalidate(span(0, 4), Event::Unmap);
    let inner = mm.notifiers().invalidate(span(2, 6), Event::Clear);
    drop(outer);
    drop(inner);
    let starts_and_ends: Vec<Op> =
        take(&log).into_iter().map(|(_, op)| op).filter(|op| !matches!(op, InvalidateRange(_))).collect();
    let (outer, inner) = ((span(0, 4), Event::Unmap), (span(2, 6), Event::Clear));
    assert_eq!(
        starts_and_ends,
        [Start(outer.0, outer.1), Start(inner.0, inner.1), End(outer.0, outer.1), End(inner.0, inner.1)]
    );
}

/// Looks at the primary when a pair ends.
#[derive(Debug, Default)]
struct EndWatcher {
    mm: OnceLock<Arc<Mm>>,
    seen: Mutex<Vec<Pte>>,
}

impl MmuNotifier for EndWatcher {
    fn invalidate_range_end(&self, invalidation: &Invalidation) {
        // Allowed in a test only: the caller holds the mmap lock for reading, and nobody waits to write.
        let pte = self.mm.get().and_then(|mm| mm.lookup(invalidation.range.start));
        self.seen.lock().unwrap().extend(pte.map(|(pte, _)| pte));
    }
}

#[test]
fn when_a_pair_ends_the_ptes_have_changed_already() {
    // Otherwise a fault between the end and the change would install what is about to go, and nothing would take it away.
    let pool = Arc::new(FramePool::new(64 * PAGE_SIZE, FreedFrames::Poison).unwrap());
    let mm = Mm::new(pool).unwrap();
    let at = mm.mmap(Hva(0), PAGE_SIZE, RW, MapFlags::PRIVATE, Backing::Anonymous).unwrap();
    let watcher = Arc::new(EndWatcher::default());
    let subscription = mm.register(Arc::clone(&watcher) as _).unwrap();
    watcher.mm.set(Arc::clone(&mm)).unwrap();
    drop(mm.fault(&FaultRequest::one_page(at, Access::READ)).unwrap());
    drop(mm.fault(&FaultRequest::one_page(at, Access::WRITE)).unwrap());
    mm.madvise(at, PAGE_SIZE, Advice::DontNeed).unwrap();
    mm.unregister(&subscription).unwrap();
    let seen = std::mem::take(&mut *watcher.seen.lock().unwrap());
    assert_eq!(seen.len(), 2, "copy-on-write, then madvise: {seen:?}");
    assert!(seen[0].is_writable() && !seen[0].is_zero(), "{seen:?}");
    assert!(!seen[1].is_present(), "{seen:?}");
}
