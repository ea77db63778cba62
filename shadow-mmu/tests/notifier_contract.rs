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
fn a_released_space_takes_no_listeners_and_calls_release_once_for_those_it_had() {
    let (mm, log) = (space(16), Log::default());
    map(&mm, BASE, 4, RW, MapFlags::PRIVATE, Backing::Anonymous);
    touch(&mm, BASE, RW);
    let subscriptions = three(&mm, &log, false, false);
    mm.release();
    mm.release();
    assert_eq!(take(&log), [3, 2, 1].map(|n| (n, Op::Release)), "and nothing else: no pair reaches them");
    assert!(mm.vmas().is_empty());
    assert_eq!(mm.register(Recorder::new(4, &log)).err(), Some(Misuse::Released));
    assert_eq!(mm.unregister(&subscriptions[0]), Err(Misuse::NotRegistered));
}

/// A listener's op is stopped inside the op; meanwhile another thread unregisters the listener.
#[test]
fn i7_unregister_returns_when_no_op_of_the_listener_runs() {
    let (mm, hook) = (space(16), Arc::<Hook>::default());
    let subscription = mm.register(hook.clone()).unwrap();
    hook.end.shut();
    let caller = {
        let mm = Arc::clone(&mm);
        std::thread::spawn(move || drop(mm.notifiers().invalidate(span(0, 1), Event::Clear)))
    };
    hook.end.wait_for_arrival();
    let unregister = {
        let mm = Arc::clone(&mm);
        std::thread::spawn(move || mm.unregister(&subscription))
    };
    wait_until("release was called", || hook.released.load(Ordering::SeqCst) == 1);
    assert_waits(&unregister, "unregister returned while an op was running");
    hook.end.open();
    assert_eq!(unregister.join().unwrap(), Ok(()));
    caller.join().unwrap();
    // None runs afterwards: the gate would stop it.
    hook.start.shut();
    drop(mm.notifiers().invalidate(span(0, 1), Event::Clear));
}

/// Unregisters itself in whichever op it is told to, in the way that it is told to.
#[derive(Debug, Default)]
struct Suicidal {
    space: OnceLock<(Arc<Mm>, Subscription)>,
    quietly: bool,
    result: Mutex<Vec<Result<(), Misuse>>>,
    callback_ran: Arc<AtomicBool>,
    still_inside: Arc<AtomicBool>,
}

impl Suicidal {
    fn unregister(&self) {
        let (mm, subscription) = self.space.get().unwrap();
        self.still_inside.store(true, Ordering::SeqCst);
        let result = if self.quietly {
            let (ran, inside) = (Arc::clone(&self.callback_ran), Arc::clone(&self.still_inside));
            let result = mm.notifiers().unregister_no_release(subscription);
            mm.notifiers().call_srcu(move || {
                assert!(!inside.load(Ordering::SeqCst), "the callback ran before the op was over (R19)");
                ran.store(true, Ordering::SeqCst);
            });
            std::thread::sleep(WATCH);
            result
        } else {
            mm.unregister(subscription)
        };
        self.result.lock().unwrap().push(result);
        self.still_inside.store(false, Ordering::SeqCst);
    }
    fn register(mm: &Arc<Mm>, quietly: bool) -> (Arc<Self>, Subscription) {
        let listener = Arc::new(Self { quietly, ..Self::default() });
        let subscription = mm.register(listener.clone()).unwrap();
        listener.space.set((Arc::clone(mm), subscription.clone())).unwrap();
        (listener, subscription)
    }
}

impl MmuNotifier for Suicidal {
    fn release(&self) {
        self.unregister();
    }
    fn invalidate_range_end(&self, _: &Invalidation) {
        self.unregister();
    }
}

#[test]
fn unregistering_inside_an_op_is_refused() {
    let mm = space(16);
    let (listener, subscription) = Suicidal::register(&mm, false);
    drop(mm.notifiers().invalidate(span(0, 1), Event::Clear));
    // Also in the release that unregister itself calls.
    assert_eq!(mm.unregister(&subscription), Ok(()));
    assert_eq!(*listener.result.lock().unwrap(), [Err(Misuse::InsideCallback); 2]);
    let (listener, _) = Suicidal::register(&mm, false);
    mm.notifiers().release().unwrap();
    assert_eq!(*listener.result.lock().unwrap(), [Err(Misuse::InsideCallback)]);
}

#[test]
fn r19_unregister_no_release_works_inside_release_and_its_callback_waits() {
    let mm = space(16);
    let (listener, _) = Suicidal::register(&mm, true);
    mm.release();
    mm.notifiers().synchronize().unwrap();
    assert_eq!(*listener.result.lock().unwrap(), [Ok(())]);
    assert!(listener.callback_ran.load(Ordering::SeqCst));
}

/// As drivers do it: the first call of release does the work, a second one finds nothing to do.
#[derive(Debug, Default)]
struct OnceReleased {
    begun: AtomicBool,
    work: Gate,
    done: AtomicBool,
}

impl MmuNotifier for OnceReleased {
    fn release(&self) {
        if !self.begun.swap(true, Ordering::SeqCst) {
            self.work.pass();
            self.done.store(true, Ordering::SeqCst);
        }
    }
}

/// One of the end of the space and of unregister is stopped inside release, in its work; the other comes second. It must
/// not return before the work is done: it goes on to free what the work still uses.
#[test]
fn r18_the_end_of_the_space_and_unregister_wait_for_each_other() {
    let release: fn(&Notifiers, &Subscription) = |notifiers, _| notifiers.release().unwrap();
    let unregister: fn(&Notifiers, &Subscription) =
        |notifiers, subscription| _ = notifiers.unregister(subscription);
    for (what, first, second) in [("unregister", release, unregister), ("release", unregister, release)] {
        let (mm, listener) = (space(16), Arc::<OnceReleased>::default());
        let subscription = mm.register(listener.clone()).unwrap();
        listener.work.shut();
        let [first, second] = [first, second].map(|call| {
            let (mm, subscription) = (Arc::clone(&mm), subscription.clone());
            let (listener, listener_work) = (Arc::clone(&listener), &listener.work);
            let thread = std::thread::spawn(move || {
                call(mm.notifiers(), &subscription);
                listener.done.load(Ordering::SeqCst)
            });
            wait_until("it got there", || listener_work.is_occupied() || thread.is_finished());
            thread
        });
        assert_waits(&second, what);
        listener.work.open();
        assert_eq!(
            [first, second].map(|thread| thread.join().unwrap()),
            [true, true],
            "{what} came back early"
        );
    }
}

/// A pair of madvise is stopped inside, before its end; a listener registers meanwhile.
#[test]
fn i9_a_listener_that_registers_during_a_pair_hears_of_no_end_alone() {
    let (mm, hook, log) = (space(16), Arc::<Hook>::default(), Log::default());
    map(&mm, BASE, 1, RW, MapFlags::PRIVATE, Backing::Anonymous);
    touch(&mm, BASE, RW);
    mm.register(hook.clone()).unwrap();
    hook.start.shut();
    let advise = {
        let mm = Arc::clone(&mm);
        std::thread::spawn(move || mm.madvise(BASE, PAGE_SIZE, Advice::DontNeed))
    };
    hook.start.wait_for_arrival();
    let register = {
        let (mm, log) = (Arc::clone(&mm), Arc::clone(&log));
        std::thread::spawn(move || mm.register(Recorder::new(1, &log)).map(drop))
    };
    assert_waits(&register, "registered while a pair was open");
    hook.start.open();
    assert_eq!(advise.join().unwrap(), Ok(()));
    assert_eq!(register.join().unwrap(), Ok(()));
    assert_eq!(take(&log), [], "the end of a pair that began before");
    mm.madvise(BASE, PAGE_SIZE, Advice::DontNeed).unwrap();
    assert_eq!(take(&log).len(), 3, "start, invalidate_range, end of one that began after");
}

/// Removal, unlike registration, may fall into a pair. Unregistering waits for its end, which the listener hears; without
/// release it does not wait, and the end reaches the listener all the same: who heard the start hears the end (I1).
#[test]
fn i1_a_listener_that_leaves_during_a_pair_hears_its_end() {
    let (mm, log) = (space(16), Log::default());
    let subscriptions = three(&mm, &log, false, false);
    let pair = mm.notifiers().invalidate(span(0, 1), Event::Unmap);
    take(&log);
    assert_eq!(
        mm.unregister(&subscriptions[1]),
        Err(Misuse::InsideCallback),
        "by the thread whose pair it is"
    );
    let leave = {
        let (mm, subscription) = (Arc::clone(&mm), subscriptions[1].clone());
        std::thread::spawn(move || mm.unregister(&subscription))
    };
    assert_waits(&leave, "unregistered while a pair was open");
    assert_eq!(take(&log), [(2, Op::Release)]);
    mm.notifiers().unregister_no_release(&subscriptions[0]).unwrap();
    drop(pair);
    assert_eq!(leave.join().unwrap(), Ok(()));
    let ended: Vec<_> =
        take(&log).into_iter().filter(|(_, op)| matches!(op, Op::End(..))).map(|(n, _)| n).collect();
    assert_eq!(ended, [3, 2, 1]);
    drop(mm.notifiers().invalidate(span(0, 1), Event::Unmap));
    assert!(take(&log).iter().all(|(name, _)| *name == 3), "and nothing after that");
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

/// What `__mmu_notifier_register` is for: a listener that copies what is there and registers under one hold of the mmap lock
/// misses no change, though another thread changes all the time.
#[test]
fn i9_a_listener_under_the_lock_begins_with_what_is_there() {
    /// A copy of one pte, which a start takes away.
    #[derive(Debug, Default)]
    struct Copy(Mutex<Option<shadow_mmu::mm::Pte>>);
    impl MmuNotifier for Copy {
        fn invalidate_range_start(&self, _: &Invalidation) -> Result<(), WouldBlock> {
            *self.0.lock().unwrap() = None;
            Ok(())
        }
    }

    let mm = space(64);
    map(&mm, BASE, 1, RW, MapFlags::PRIVATE, Backing::Anonymous);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                touch(&mm, BASE, RW);
                mm.madvise(BASE, PAGE_SIZE, Advice::DontNeed).unwrap();
            }
        });
        let mut copied = 0;
        while copied < 200 {
            let listener = Arc::<Copy>::default();
            let lock = mm.mmap_write_lock();
            assert_eq!(lock.vmas().count(), 1);
            let pte = lock.pte(BASE);
            *listener.0.lock().unwrap() = Some(pte).filter(|pte| pte.is_present());
            copied += u32::from(pte.is_present());
            let subscription = lock.register(Arc::clone(&listener) as _).unwrap();
            drop(lock);
            std::thread::yield_now();
            let lock = mm.mmap_write_lock();
            if let Some(copy) = *listener.0.lock().unwrap() {
                assert_eq!(lock.pte(BASE).pfn(), copy.pfn(), "a change was missed");
            }
            drop(lock);
            mm.unregister(&subscription).unwrap();
        }
        over.store(true, Ordering::Relaxed);
    });
}

/// As a driver that lets go of the address space where it frees itself (`mmdrop` in the kernel).
#[test]
fn the_last_owner_of_a_space_may_be_a_callback() {
    let mm = space(16);
    let pool = Arc::clone(mm.pool());
    let whole = pool.frame_count();
    mm.register(Recorder::new(1, &Log::default())).unwrap();
    let ((go, wait), (sender, done)) = (std::sync::mpsc::channel(), std::sync::mpsc::channel());
    let last = Arc::clone(&mm);
    mm.notifiers().call_srcu(move || {
        wait.recv().unwrap();
        assert_eq!(last.notifiers().synchronize(), Err(Misuse::InsideCallback));
        drop(last);
        sender.send(()).unwrap();
    });
    drop(mm);
    go.send(()).unwrap();
    done.recv_timeout(std::time::Duration::from_secs(60)).unwrap();
    assert_eq!(pool.free_frames(), whole);
}
