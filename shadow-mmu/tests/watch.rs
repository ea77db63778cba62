// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Real host mappings with real userfaultfd events, seen by CPUs in software: what the guest can reach, at the very moment
//! when a system call of the host returns, and afterwards. Where the host refuses userfaultfd the tests say so and pass;
//! with UMBRA_REQUIRE_KVM=1, as on machines that are known to have all that umbra needs, that is a failure.

#![cfg(feature = "mmu-notifier")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;
#[cfg(feature = "inject")]
#[path = "watch/late.rs"]
mod late;
#[path = "watch/mapping.rs"]
mod mapping;
#[path = "watch/races.rs"]
mod races;

use common::*;
use mapping::{Mapping, PlainCall};
use shadow_mmu::addr::{Access, Hva, HvaRange, PAGE_SIZE, Pfn};
use shadow_mmu::mm::watch::{AdoptError, Forks, Watch, WatchError};
use shadow_mmu::mm::{Advice, FaultError, MapFlags, MmError, RemapFlags};
use shadow_mmu::notifier::{Event, Invalidation, MmuNotifier, WouldBlock};
use shadow_mmu::shadow::FaultAroundPolicy;
use shadow_mmu::sync::Mutex;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Who reads the events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reader {
    Thread,
    Nobody,
}

/// A machine with a watch, unless the host has no such thing.
fn watched_by(reader: Reader, forks: Forks) -> Option<(Machine, Arc<Watch>)> {
    watch(Machine::new(256), reader, forks)
}

fn watch(machine: Machine, reader: Reader, forks: Forks) -> Option<(Machine, Arc<Watch>)> {
    let engine = machine.tlb.host.clone();
    let made = match reader {
        Reader::Thread => Watch::with_thread(&machine.mm, engine, forks),
        Reader::Nobody => Watch::new(&machine.mm, engine, forks),
    };
    match made {
        Ok(watch) => {
            let watch = Arc::new(watch);
            machine.tlb.host.set_watch(&watch);
            Some((machine, watch))
        }
        Err(WatchError::Userfaultfd(error)) => {
            assert!(std::env::var_os("UMBRA_REQUIRE_KVM").is_none(), "userfaultfd is required here: {error}");
            println!("skipped: the host refuses userfaultfd: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn watched() -> Option<(Machine, Arc<Watch>)> {
    watched_by(Reader::Thread, Forks::Ignore)
}

/// Shows all of `mapping` to the guest.
fn adopt(machine: &Machine, watch: &Watch, mapping: &Mapping, access: Access) -> Hva {
    // SAFETY: a mapping of the test's own that holds numbers; nothing secret is ever mapped in its place.
    unsafe { machine.mm.adopt(watch, mapping.range(), access, None) }.unwrap()
}

/// Takes everything away and checks that nothing is left.
fn finish(machine: Machine, watch: Arc<Watch>) {
    drop(watch);
    assert_eq!(machine.tlb.host.slots(), [], "slots are left");
    machine.finish();
}

/// What the guest reads in each page.
fn read_all(cpu: &mut Vcpu, at: Hva, count: u64) -> Vec<Result<u64, FaultError>> {
    (0..count).map(|n| cpu.read(page(at, n))).collect()
}

/// Pages that the shadow map has a leaf for.
fn leaves(machine: &Machine, at: Hva, count: u64) -> Vec<u64> {
    (0..count).filter(|&n| machine.spte(page(at, n)).is_leaf()).collect()
}

const PAGES: u64 = 8;
const GONE: Result<u64, FaultError> = Err(FaultError::NoMapping);

#[test]
fn guest_and_host_see_each_others_writes_in_mappings_of_every_kind() {
    for (kind, make) in mapping::KINDS {
        let Some((machine, watch)) = watched() else { return };
        let mapping = make(PAGES);
        let at = adopt(&machine, &watch, &mapping, RW);
        let mut cpu = machine.vcpu(0, FaultAroundPolicy::Adaptive);
        assert_eq!(read_all(&mut cpu, at, PAGES), mapping.tags(), "{kind}");
        cpu.write(page(at, 3), 77).unwrap();
        assert_eq!(mapping.peek(3), 77, "{kind}");
        mapping.poke(4, 88);
        assert_eq!(cpu.read(page(at, 4)), Ok(88), "{kind}");
        machine.check();
        finish(machine, watch);
        assert_eq!(mapping.peek(3), 77, "{kind}: the end of the watch is not the end of the mapping");
    }
}

/// A call of the host: what it is done to, and what the guest reads afterwards.
struct Change {
    name: &'static str,
    call: fn(&mut Mapping),
    /// Pages whose leaves must be gone when the call returns.
    lost: &'static [u64],
    /// What the guest reads then, by the tags before and whether the mapping is a private file's.
    after: fn(&Mapping) -> Vec<Result<u64, FaultError>>,
}

fn tags_without(mapping: &Mapping, gone: std::ops::Range<u64>) -> Vec<Result<u64, FaultError>> {
    let tags = mapping.tags().into_iter().zip(0..);
    tags.map(|(tag, n)| if gone.contains(&n) { GONE } else { tag }).collect()
}

const ALL: &[u64] = &[0, 1, 2, 3, 4, 5, 6, 7];

const CHANGES: [Change; 9] = [
    Change { name: "munmap", call: |m| m.munmap(0..8), lost: ALL, after: |_| vec![GONE; 8] },
    Change {
        name: "munmap of a part",
        call: |m| m.munmap(2..4),
        lost: &[2, 3],
        after: |m| tags_without(m, 2..4),
    },
    Change { name: "mremap", call: |m| m.move_away(0..8), lost: ALL, after: Mapping::tags },
    Change { name: "mremap of a part", call: |m| m.move_away(5..7), lost: &[5, 6], after: Mapping::tags },
    Change { name: "mremap that grows", call: |m| m.grow_away(12), lost: ALL, after: Mapping::tags },
    Change {
        name: "mremap that shrinks",
        call: |m| m.shrink(3),
        lost: &[3, 4, 5, 6, 7],
        after: |m| tags_without(m, 3..8),
    },
    Change { name: "mremap with DONTUNMAP", call: Mapping::move_and_keep, lost: ALL, after: Mapping::tags },
    Change {
        name: "DONTNEED",
        call: |m| m.madvise(1..3, libc::MADV_DONTNEED),
        lost: &[1, 2],
        after: |m| m.discarded(1..3),
    },
    Change {
        name: "MAP_FIXED over it",
        call: |m| m.map_over(4..6),
        lost: &[4, 5],
        after: |m| tags_without(m, 4..6),
    },
];

#[test]
fn a_change_by_the_host_has_reached_the_guest_when_the_call_returns() {
    every_change_has_reached_the_guest_when_the_call_returns(watched);
}

fn every_change_has_reached_the_guest_when_the_call_returns(
    watched: impl Fn() -> Option<(Machine, Arc<Watch>)>,
) {
    for (kind, make) in mapping::KINDS {
        for change in &CHANGES {
            let what = format!("{kind}, {}", change.name);
            let Some((machine, watch)) = watched() else { return };
            let mut mapping = make(PAGES);
            let at = adopt(&machine, &watch, &mapping, RW);
            let mut cpu = machine.vcpu(0, FaultAroundPolicy::Off);
            assert_eq!(read_all(&mut cpu, at, PAGES), mapping.tags(), "{what}");
            assert_eq!(leaves(&machine, at, PAGES), ALL, "{what}");
            (change.call)(&mut mapping);
            // No settle: this is the promise. (Other pages may have lost theirs, too.)
            let left = leaves(&machine, at, PAGES);
            assert!(change.lost.iter().all(|page| !left.contains(page)), "{what}: leaves of {left:?}");
            let cached = machine.tlb.cached(0);
            assert!(cached.is_empty(), "{what}: {cached:x?} cached");
            watch.settle(Duration::from_secs(60)).unwrap();
            assert_eq!(read_all(&mut cpu, at, PAGES), (change.after)(&mapping), "{what}");
            machine.check();
            finish(machine, watch);
        }
    }
}

#[test]
fn a_hole_in_shared_memory_reads_zeros() {
    let Some((machine, watch)) = watched() else { return };
    let mapping = Mapping::shared_memfd(PAGES);
    let at = adopt(&machine, &watch, &mapping, RW);
    let mut cpu = machine.vcpu(0, FaultAroundPolicy::Off);
    assert_eq!(read_all(&mut cpu, at, PAGES), mapping.tags());
    mapping.madvise(2..5, libc::MADV_REMOVE);
    assert_eq!(read_all(&mut cpu, at, PAGES)[2..5], [Ok(0); 3]);
    watch.settle(Duration::from_secs(60)).unwrap();
    assert!(watch.events() > 0);
    finish(machine, watch);
}

#[test]
fn what_the_host_makes_unreachable_without_an_event_is_a_bus_error() {
    let Some((machine, watch)) = watched() else { return };
    let mapping = Mapping::anonymous(PAGES);
    let at = adopt(&machine, &watch, &mapping, RW);
    let mut cpu = machine.vcpu(0, FaultAroundPolicy::Off);
    cpu.read(at).unwrap();
    mapping.mprotect(0..1, libc::PROT_NONE);
    assert_eq!(cpu.read(at), Err(FaultError::BusError));
    assert_eq!(cpu.read(page(at, 1)), Ok(Mapping::tag(1)));
    mapping.mprotect(0..1, libc::PROT_READ);
    assert_eq!(cpu.read(at), Ok(Mapping::tag(0)));
    finish(machine, watch);
}

#[test]
fn slots_come_and_go_with_what_they_are_for() {
    let Some((machine, watch)) = watched() else { return };
    let host = machine.tlb.host.clone();
    let (mut private, mut shared) = (Mapping::anonymous(PAGES), Mapping::shared_memfd(PAGES));
    let at = adopt(&machine, &watch, &private, RW);
    let shared_at = adopt(&machine, &watch, &shared, READ);
    let [SlotCall::Add(first), SlotCall::Add(second)] = host.calls()[..] else {
        panic!("two slots expected")
    };
    assert_eq!((first.host, first.pages, first.access), (private.range().start, PAGES, RW));
    assert!(first.first.index() > machine.pool.frame_count(), "beyond the pool, and not right behind it");
    assert_ne!(second.host, shared.range().start, "a shared mapping is reached through an alias");
    assert_eq!(second.access, READ);
    // Part of a private mapping moves: it gets a slot of its own; the rest keeps the old one.
    private.move_away(2..4);
    watch.settle(Duration::from_secs(60)).unwrap();
    let [SlotCall::Add(moved)] = host.calls()[..] else { panic!("one new slot expected") };
    assert_eq!((moved.host, moved.pages), (private.address(2), 2));
    // A shared one moves behind its alias.
    shared.move_away(0..8);
    watch.settle(Duration::from_secs(60)).unwrap();
    assert_eq!(host.calls(), []);
    // A hole changes nothing; what is left of it does when it goes.
    private.munmap(0..2);
    private.munmap(4..7);
    watch.settle(Duration::from_secs(60)).unwrap();
    assert_eq!(host.calls(), []);
    private.munmap(7..8);
    watch.settle(Duration::from_secs(60)).unwrap();
    assert_eq!(host.calls(), [SlotCall::Remove(first.first)]);
    private.munmap(2..4);
    watch.settle(Duration::from_secs(60)).unwrap();
    assert_eq!(host.calls(), [SlotCall::Remove(moved.first)]);
    shared.munmap(0..8);
    watch.settle(Duration::from_secs(60)).unwrap();
    assert_eq!(host.calls(), [SlotCall::Remove(second.first)]);
    let mut cpu = machine.vcpu(0, FaultAroundPolicy::Off);
    assert_eq!((cpu.read(at), cpu.read(shared_at)), (GONE, GONE));
    assert_eq!(machine.mm.vmas().len(), 0);
    finish(machine, watch);
}

#[test]
fn a_mapping_that_moves_where_no_slot_is_to_be_had_is_lost_to_the_guest_and_no_more() {
    let Some((machine, watch)) = watched() else { return };
    let mut mapping = Mapping::anonymous(PAGES);
    let at = adopt(&machine, &watch, &mapping, RW);
    let mut cpu = machine.vcpu(0, FaultAroundPolicy::Off);
    cpu.read(at).unwrap();
    machine.tlb.host.full.store(true, Ordering::SeqCst);
    mapping.move_away(2..4);
    watch.settle(Duration::from_secs(60)).unwrap();
    assert_eq!(read_all(&mut cpu, at, PAGES), tags_without(&mapping, 2..4));
    assert_eq!(mapping.peek(2), Mapping::tag(2));
    finish(machine, watch);
}

#[test]
fn the_guests_own_calls_change_its_view_and_never_the_mapping() {
    let Some((machine, watch)) = watched() else { return };
    let mut mapping = Mapping::anonymous(PAGES);
    let at = adopt(&machine, &watch, &mapping, RW);
    let mut cpu = machine.vcpu(0, FaultAroundPolicy::Off);
    read_all(&mut cpu, at, PAGES);
    let mm = &machine.mm;
    mm.mprotect(page(at, 1), PAGE_SIZE, READ).unwrap();
    assert_eq!(cpu.write(page(at, 1), 9), Err(FaultError::NoAccess));
    mm.mprotect(page(at, 1), PAGE_SIZE, RW).unwrap();
    cpu.write(page(at, 1), 9).unwrap();
    assert_eq!(mapping.peek(1), 9);
    mm.munmap(page(at, 0), PAGE_SIZE).unwrap();
    assert_eq!(cpu.read(at), GONE);
    assert_eq!(mapping.peek(0), Mapping::tag(0));
    mm.madvise(at, PAGE_SIZE * 2, Advice::DontNeed).unwrap_err();
    mm.madvise(page(at, 1), PAGE_SIZE, Advice::DontNeed).unwrap();
    assert_eq!(cpu.read(page(at, 1)), Ok(9), "the content is the host's");
    assert_eq!(mm.madvise(page(at, 1), PAGE_SIZE, Advice::Free), Err(MmError::Invalid));
    assert_eq!(mm.madvise(page(at, 1), PAGE_SIZE, Advice::Remove), Err(MmError::Invalid));
    let may_move = RemapFlags::MAYMOVE;
    assert_eq!(
        mm.mremap(page(at, 1), PAGE_SIZE * 7, PAGE_SIZE * 9, may_move, Hva(0)),
        Err(MmError::Fault),
        "there is nothing to grow into"
    );
    // A change of the host finds the view wherever the guest has put it, and a second view as well.
    let (new, second) = (Hva(0x7000_0000), Hva(0x7100_0000));
    mm.mremap(page(at, 4), PAGE_SIZE * 4, PAGE_SIZE * 4, may_move | RemapFlags::FIXED, new).unwrap();
    let keep = may_move | RemapFlags::FIXED | RemapFlags::DONTUNMAP;
    mm.mremap(new, PAGE_SIZE * 2, PAGE_SIZE * 2, keep, second).unwrap();
    assert_eq!(cpu.read(page(new, 1)), Ok(Mapping::tag(5)));
    assert_eq!(cpu.read(page(second, 1)), Ok(Mapping::tag(5)));
    mapping.munmap(5..6);
    watch.settle(Duration::from_secs(60)).unwrap();
    assert_eq!((cpu.read(page(new, 1)), cpu.read(page(second, 1))), (GONE, GONE));
    assert_eq!(cpu.read(page(second, 0)), Ok(Mapping::tag(4)));
    machine.check();
    finish(machine, watch);
}

#[test]
fn a_read_only_view_stays_one() {
    let Some((machine, watch)) = watched() else { return };
    let mapping = Mapping::anonymous(PAGES);
    let at = adopt(&machine, &watch, &mapping, READ);
    let mut cpu = machine.vcpu(0, FaultAroundPolicy::Off);
    assert_eq!(cpu.read(at), Ok(Mapping::tag(0)));
    assert_eq!(cpu.write(at, 1), Err(FaultError::NoAccess));
    assert_eq!(machine.mm.mprotect(at, PAGE_SIZE, RW), Err(MmError::Access));
    finish(machine, watch);
}

#[test]
fn devices_are_refused() {
    use vm_memory::{Bytes, GuestAddress};
    let Some((machine, watch)) = watched() else { return };
    let mapping = Mapping::anonymous(PAGES);
    let at = adopt(&machine, &watch, &mapping, RW);
    let view = shadow_mmu::iommu::view(&machine.mm).unwrap();
    let error = format!("{:?}", view.read_obj::<u64>(GuestAddress(at.0)).unwrap_err());
    assert!(error.contains("is an adopted mapping of the host"), "{error}");
    assert!(view.write_obj(1u64, GuestAddress(at.0)).is_err());
    assert_eq!(mapping.peek(0), Mapping::tag(0));
    drop(view);
    finish(machine, watch);
}

#[test]
fn children_do_not_inherit_what_nobody_watches_for_them() {
    let Some((machine, watch)) = watched() else { return };
    let mapping = Mapping::anonymous(PAGES);
    let at = adopt(&machine, &watch, &mapping, RW);
    assert_eq!(machine.vcpu(0, FaultAroundPolicy::Off).read(at), Ok(Mapping::tag(0)));
    let child = machine.mm.fork().unwrap();
    assert!(child.vma(at).is_none());
    assert_eq!(machine.mm.madvise(at, PAGE_SIZE, Advice::DoFork), Err(MmError::Invalid));
    assert!(machine.mm.fork().unwrap().vma(at).is_none());
    drop(child);
    assert_eq!(machine.mm.reap().map(|reaped| reaped.freed), Some(0), "none of it is the guest's own");
    assert_eq!(mapping.peek(0), Mapping::tag(0));
    finish(machine, watch);
}

#[test]
fn what_cannot_be_adopted_is_refused_with_a_reason_and_nothing_changes() {
    let Some((machine, watch)) = watched() else { return };
    let mut mapping = Mapping::anonymous(PAGES);
    let range = mapping.range();
    // SAFETY: as in `adopt`.
    let try_adopt =
        |range: std::ops::Range<u64>, access, at| unsafe { machine.mm.adopt(&watch, range, access, at) };
    let refused = |range: &std::ops::Range<u64>| try_adopt(range.clone(), RW, None).unwrap_err();
    assert!(matches!(refused(&(range.start..range.start)), AdoptError::Range(_)));
    assert!(matches!(refused(&(range.start + 1..range.end)), AdoptError::Range(_)));
    assert!(matches!(refused(&(range.start..range.end - 1)), AdoptError::Range(_)));
    assert!(matches!(refused(&(range.end..range.start)), AdoptError::Range(_)));
    assert!(matches!(refused(&(0..PAGE_SIZE)), AdoptError::NotMapped(_)));
    mapping.mprotect(4..6, libc::PROT_READ);
    assert!(matches!(refused(&range), AdoptError::Several { count: 3, .. }));
    let part = mapping.address(4)..mapping.address(6);
    assert!(matches!(refused(&part), AdoptError::Access { .. }));
    mapping.munmap(6..7);
    assert!(matches!(refused(&range), AdoptError::NotMapped(_)));
    let part = mapping.address(0)..mapping.address(4);
    machine
        .mm
        .mmap(
            Hva(0x6000_0000),
            PAGE_SIZE,
            RW,
            shadow_mmu::mm::MapFlags::PRIVATE | shadow_mmu::mm::MapFlags::FIXED,
            shadow_mmu::mm::Backing::Anonymous,
        )
        .unwrap();
    let taken = try_adopt(part.clone(), RW, Some(Hva(0x6000_0000 - PAGE_SIZE)));
    assert!(matches!(taken, Err(AdoptError::Guest(MmError::Exists))), "{taken:?}");
    machine.tlb.host.full.store(true, Ordering::SeqCst);
    assert!(matches!(refused(&part), AdoptError::Host { .. }));
    machine.tlb.host.full.store(false, Ordering::SeqCst);
    let at = try_adopt(part.clone(), RW, Some(Hva(0x5000_0000))).unwrap();
    assert_eq!(at, Hva(0x5000_0000));
    assert!(matches!(refused(&part), AdoptError::Adopted(_)));
    assert!(matches!(
        Watch::new(&machine.mm, machine.tlb.host.clone(), Forks::Ignore),
        Err(WatchError::Watched)
    ));
    // Only `adopt` makes such VMAs.
    let forged = shadow_mmu::mm::Backing::Adopted { first: machine.tlb.host.slots()[0].first };
    let private = shadow_mmu::mm::MapFlags::PRIVATE;
    assert_eq!(machine.mm.mmap(Hva(0), PAGE_SIZE, RW, private, forged), Err(MmError::Invalid));
    // What the guest has given up may be adopted again.
    machine.mm.munmap(at, PAGE_SIZE * 4).unwrap();
    let again = try_adopt(part, RW, None).unwrap();
    assert_eq!(machine.vcpu(0, FaultAroundPolicy::Off).read(again), Ok(Mapping::tag(0)));
    finish(machine, watch);
}

/// Writes down the starts and ends that it hears of.
#[derive(Debug, Default)]
struct Listener(Mutex<Vec<(bool, HvaRange, Event)>>);

impl MmuNotifier for Listener {
    fn invalidate_range_start(&self, invalidation: &Invalidation) -> Result<(), WouldBlock> {
        self.0.lock().push((true, invalidation.range, invalidation.event));
        Ok(())
    }
    fn invalidate_range_end(&self, invalidation: &Invalidation) {
        self.0.lock().push((false, invalidation.range, invalidation.event));
    }
}

/// Each event is a pair with its range and its reason, inside one over everything adopted.
#[test]
fn every_listener_hears_what_was_done_and_where() {
    type Call = fn(&mut Mapping);
    let calls: [(&str, Call, std::ops::Range<u64>, Event); 6] = [
        ("munmap", |m| m.munmap(2..4), 2..4, Event::Unmap),
        ("shrink", |m| m.shrink(5), 5..8, Event::Unmap),
        ("mremap", |m| m.move_away(1..3), 1..3, Event::Clear),
        ("madvise", |m| m.madvise(4..7, libc::MADV_DONTNEED), 4..7, Event::Clear),
        ("MADV_FREE", |m| m.madvise(0..2, libc::MADV_FREE), 0..2, Event::Clear),
        ("fork", |m| m.fork_and_spoil(PlainCall::Fork), 0..8, Event::ProtectionPage),
    ];
    for (name, call, pages, event) in calls {
        let Some((machine, watch)) = watched_by(Reader::Thread, Forks::Report) else { return };
        if name == "fork" && watch.forks() != Forks::Report {
            println!("skipped: forks are no events for this user");
            return finish(machine, watch);
        }
        let mut mapping = Mapping::anonymous(PAGES);
        let at = adopt(&machine, &watch, &mapping, RW);
        let mut cpu = machine.vcpu(0, FaultAroundPolicy::Off);
        read_all(&mut cpu, at, PAGES);
        let listener = Arc::<Listener>::default();
        let subscription = machine.mm.register(listener.clone()).unwrap();
        call(&mut mapping);
        watch.settle(Duration::from_secs(60)).unwrap();
        let (whole, part) = (
            HvaRange::pages_from(at, PAGES),
            HvaRange { start: page(at, pages.start), end: page(at, pages.end) },
        );
        let expected = [
            (true, whole, Event::Clear),
            (true, part, event),
            (false, part, event),
            (false, whole, Event::Clear),
        ];
        assert_eq!(listener.0.lock()[..4], expected, "{name}");
        machine.mm.unregister(&subscription).unwrap();
        finish(machine, watch);
    }
}

/// One event opens few pairs, however many parts the guest has cut its view into, and they end inside out.
#[test]
fn the_pairs_of_an_event_are_few_and_nest() {
    let Some((machine, watch)) = watched() else { return };
    let first = Mapping::anonymous(PAGES);
    let second = Mapping::anonymous(64);
    adopt(&machine, &watch, &first, RW);
    let many = adopt(&machine, &watch, &second, RW);
    let cuts: [fn(&Machine, Hva); 3] = [
        |_, _| {},
        |machine, at| machine.mm.mprotect(at, PAGE_SIZE, Access::READ).unwrap(),
        // Something of the guest's own.
        |machine, at| machine.map_at(at, 1, RW, MapFlags::PRIVATE | MapFlags::FIXED),
    ];
    for cut in cuts {
        (0..64).step_by(2).for_each(|n| cut(&machine, page(many, n)));
        let listener = Arc::<Listener>::default();
        let subscription = machine.mm.register(listener.clone()).unwrap();
        first.madvise(0..1, libc::MADV_DONTNEED);
        watch.settle(Duration::from_secs(60)).unwrap();
        machine.mm.unregister(&subscription).unwrap();
        let heard = std::mem::take(&mut *listener.0.lock());
        let mut open = Vec::new();
        for &(is_start, range, event) in &heard {
            if is_start {
                open.push((range, event));
            } else {
                assert_eq!(open.pop(), Some((range, event)), "{heard:?}");
            }
        }
        assert!(open.is_empty() && heard.len() <= 2 * 3, "{} ops for one event", heard.len());
    }
    finish(machine, watch);
}

/// Whoever polls for himself must not wait for an event that only he would read.
#[test]
fn adopting_waits_for_nobody_but_the_kernel() {
    for (kind, make) in mapping::KINDS {
        let Some((machine, watch)) = watched_by(Reader::Nobody, Forks::Ignore) else { return };
        let mapping = make(PAGES);
        let at = adopt(&machine, &watch, &mapping, Access::READ);
        // SAFETY: as in `adopt`.
        let again = unsafe { machine.mm.adopt(&watch, mapping.range(), Access::READ, None) };
        assert!(matches!(again, Err(AdoptError::Adopted(_))), "{kind}: {again:?}");
        machine.mm.munmap(at, PAGES * PAGE_SIZE).unwrap();
        let at = adopt(&machine, &watch, &mapping, Access::READ);
        assert_eq!(machine.vcpu(0, FaultAroundPolicy::Off).read(at), Ok(Mapping::tag(0)), "{kind}");
        finish(machine, watch);
    }
}

/// The kernel says only that something is under way, and with enough threads something always is.
#[test]
fn settling_comes_to_an_end_while_others_go_on() {
    let Some((machine, watch)) = watched() else { return };
    let over = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..6 {
            let mapping = Mapping::anonymous(1);
            adopt(&machine, &watch, &mapping, RW);
            let over = &over;
            scope.spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    mapping.madvise(0..1, libc::MADV_DONTNEED);
                }
                mapping
            });
        }
        for _ in 0..5 {
            match watch.settle(Duration::from_millis(20)) {
                Ok(()) => {}
                Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::TimedOut),
            }
        }
        over.store(true, Ordering::Relaxed);
    });
    watch.settle(Duration::from_secs(60)).unwrap();
    finish(machine, watch);
}
