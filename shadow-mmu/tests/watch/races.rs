// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Who waits for whom: the caller of a change for the watch, the guest in the gap, a fork, and many of each at once.

use super::*;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// The order: while a start has not returned, the call has not either.
#[test]
fn the_caller_waits_until_no_cpu_can_reach_the_page() {
    for (name, call) in [
        ("munmap", (|m: &mut Mapping| m.munmap(0..8)) as fn(&mut Mapping)),
        ("mremap", |m| m.move_away(0..8)),
        ("madvise", |m| m.madvise(0..8, libc::MADV_DONTNEED)),
    ] {
        let Some((machine, watch)) = watched() else { return };
        let mut mapping = Mapping::anonymous(PAGES);
        let at = adopt(&machine, &watch, &mapping, RW);
        let mut cpu = machine.vcpu(0, FaultAroundPolicy::Off);
        cpu.read(at).unwrap();
        machine.before.start.shut();
        let returned = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let caller = scope.spawn(|| {
                call(&mut mapping);
                returned.store(true, Ordering::SeqCst);
            });
            machine.before.start.wait_for_arrival();
            std::thread::sleep(WATCH);
            let early = returned.load(Ordering::SeqCst);
            machine.before.start.open();
            caller.join().unwrap();
            assert!(!early, "{name} returned before the start did");
        });
        finish(machine, watch);
    }
}

/// In the gap between the kernel's change and ours the guest is refused, and its access is right once the watch has settled.
#[test]
fn an_access_in_the_gap_waits_for_the_watch() {
    for (name, call, expected) in [
        ("munmap", (|m: &mut Mapping| m.munmap(0..8)) as fn(&mut Mapping), GONE),
        ("mremap", |m: &mut Mapping| m.move_away(0..8), Ok(Mapping::tag(0))),
    ] {
        // Nobody reads events but who settles: so the gap lasts until the guest gets into it.
        let Some((machine, watch)) = watched_by(Reader::Nobody, Forks::Ignore) else { return };
        let mut mapping = Mapping::anonymous(PAGES);
        let at = adopt(&machine, &watch, &mapping, RW);
        let mut cpu = machine.vcpu(0, FaultAroundPolicy::Off);
        assert_eq!(cpu.read(at), Ok(Mapping::tag(0)), "{name}");
        let old = mapping.range();
        std::thread::scope(|scope| {
            let caller = scope.spawn(|| call(&mut mapping));
            wait_until("the kernel has changed the mapping", || !mapping::is_mapped(&old));
            assert!(machine.spte(at).is_leaf(), "{name}: the leaf is still there: this is the gap");
            assert!(!caller.is_finished(), "{name} returned without its event being read");
            assert_eq!(cpu.read(at), expected, "{name}");
            // mremap has two events.
            wait_until("the call returns", || {
                watch.settle(Duration::from_secs(60)).unwrap();
                caller.is_finished()
            });
        });
        machine.check();
        finish(machine, watch);
    }
}

#[test]
fn who_polls_needs_no_thread() {
    let Some((machine, watch)) = watched_by(Reader::Nobody, Forks::Ignore) else { return };
    let mut mapping = Mapping::anonymous(PAGES);
    let at = adopt(&machine, &watch, &mapping, RW);
    let mut cpu = machine.vcpu(0, FaultAroundPolicy::Off);
    cpu.read(at).unwrap();
    assert_eq!(watch.handle().unwrap(), 0);
    std::thread::scope(|scope| {
        let caller = scope.spawn(|| mapping.munmap(0..8));
        mapping::wait_readable(watch.fd());
        assert!(!caller.is_finished(), "munmap returned before its event was read");
        assert_eq!(watch.handle().unwrap(), 1);
        caller.join().unwrap();
    });
    assert_eq!(cpu.read(at), GONE);
    finish(machine, watch);
}

#[test]
fn a_watch_that_ends_lets_everybody_go() {
    let Some((machine, watch)) = watched_by(Reader::Nobody, Forks::Ignore) else { return };
    let mut mappings: Vec<Mapping> = (0..4).map(|_| Mapping::anonymous(PAGES)).collect();
    let at: Vec<Hva> = mappings.iter().map(|mapping| adopt(&machine, &watch, mapping, RW)).collect();
    let mut cpu = machine.vcpu(0, FaultAroundPolicy::Off);
    assert!(at.iter().all(|&at| cpu.read(at) == Ok(Mapping::tag(0))));
    std::thread::scope(|scope| {
        let callers: Vec<_> =
            mappings.iter_mut().map(|mapping| scope.spawn(|| mapping.munmap(0..4))).collect();
        mapping::wait_readable(watch.fd());
        assert!(callers.iter().any(|caller| !caller.is_finished()));
        drop(watch);
        callers.into_iter().for_each(|caller| caller.join().unwrap());
    });
    assert!(at.iter().all(|&at| !machine.spte(at).is_present() && cpu.read(at) == GONE));
    assert_eq!(machine.tlb.host.slots(), []);
    machine.finish();
}

#[test]
fn a_storm_of_ten_thousand_events_is_taken() {
    let Some((machine, watch)) = watched() else { return };
    let mapping = Mapping::anonymous(PAGES);
    let at = adopt(&machine, &watch, &mapping, RW);
    let mut cpu = machine.vcpu(0, FaultAroundPolicy::Off);
    for n in 0..10_000 {
        if n % 100 == 0 {
            mapping.poke(n % PAGES, n);
            assert_eq!(cpu.read(page(at, n % PAGES)), Ok(n));
        }
        mapping.madvise(n % PAGES..n % PAGES + 1, libc::MADV_DONTNEED);
        if n % 100 == 0 {
            assert_eq!(cpu.read(page(at, n % PAGES)), Ok(0), "the {n}th");
        }
    }
    // The last call has returned, but perhaps what was read last is still being applied.
    watch.settle(Duration::from_secs(60)).unwrap();
    assert_eq!(watch.events(), 10_000);
    machine.check();
    finish(machine, watch);
}

/// Threads that unmap, move and discard mappings of their own, while CPUs read them all.
#[test]
fn many_threads_change_many_mappings_under_running_cpus() {
    const WORKERS: u64 = 4;
    const ROUNDS: u64 = 60;
    let Some((machine, watch)) = watched() else { return };
    // Where each worker's mapping is in the guest now; 0 for nowhere.
    let places: Vec<AtomicU64> = (0..WORKERS).map(|_| AtomicU64::new(0)).collect();
    let over = AtomicBool::new(false);
    let reads = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let stop = StopOnDrop(&over);
        for id in 0..2 {
            let (machine, places, over, reads) = (&machine, &places, &over, &reads);
            scope.spawn(move || {
                let mut cpu = machine.vcpu(id, FaultAroundPolicy::Adaptive);
                let mut random = Random(id as u64);
                while !over.load(Ordering::SeqCst) {
                    let at = places[random.below(WORKERS) as usize].load(Ordering::SeqCst);
                    let n = random.below(PAGES);
                    if at == 0 {
                        continue;
                    }
                    match cpu.read(page(Hva(at), n)) {
                        Ok(value) => {
                            assert!(value == 0 || value == Mapping::tag(n), "{value:#x} in page {n}");
                            reads.fetch_add(1, Ordering::SeqCst);
                        }
                        Err(FaultError::NoMapping) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
            });
        }
        let workers: Vec<_> = (0..WORKERS)
            .map(|id| {
                let (machine, watch, place) = (&machine, &watch, &places[id as usize]);
                scope.spawn(move || {
                    let mut random = Random(100 + id);
                    for round in 0..ROUNDS {
                        let make = mapping::KINDS[(round % mapping::KINDS.len() as u64) as usize].1;
                        let mut mapping = make(PAGES);
                        // Each worker at a place of its own: what one reads is never another's.
                        let own = Some(Hva((1 + id) << 30));
                        // SAFETY: as in `adopt`.
                        let at = unsafe { machine.mm.adopt(watch, mapping.range(), READ, own) }.unwrap();
                        place.store(at.0, Ordering::SeqCst);
                        for _ in 0..4 {
                            let from = random.below(PAGES);
                            match random.below(3) {
                                0 => mapping.move_away(from..from + 1),
                                1 => mapping.madvise(from..from + 1, libc::MADV_DONTNEED),
                                _ => mapping.move_away(0..from + 1),
                            }
                        }
                        mapping.munmap_all();
                        // When it has returned, no leaf leads there any more, and none will.
                        assert!(leaves(machine, at, PAGES).is_empty(), "worker {id}, round {round}");
                        place.store(0, Ordering::SeqCst);
                        watch.settle(Duration::from_secs(60)).unwrap();
                    }
                })
            })
            .collect();
        workers.into_iter().for_each(|worker| worker.join().unwrap());
        drop(stop);
    });
    assert!(reads.load(Ordering::SeqCst) > 0, "the CPUs read nothing");
    machine.check();
    finish(machine, watch);
}

/// A child has a copy of private memory; what it does to it is not seen by the guest of its parent.
#[test]
fn a_fork_is_no_event_unless_asked_for_and_the_guest_stays_with_the_parent() {
    for (forks, call, expected) in
        [(Forks::Ignore, PlainCall::GlibcFork, 0), (Forks::Report, PlainCall::Fork, 1)]
    {
        let Some((machine, watch)) = watched_by(Reader::Thread, forks) else { return };
        if watch.forks() != forks {
            println!("skipped: forks are no events for this user");
            return finish(machine, watch);
        }
        let mapping = Mapping::anonymous(PAGES);
        let at = adopt(&machine, &watch, &mapping, RW);
        let mut cpu = machine.vcpu(0, FaultAroundPolicy::Off);
        read_all(&mut cpu, at, PAGES);
        let starts = machine.after.starts.load(Ordering::SeqCst);
        mapping.fork_and_spoil(call);
        assert_eq!(read_all(&mut cpu, at, PAGES), mapping.tags());
        cpu.write(at, 5).unwrap();
        assert_eq!(mapping.peek(0), 5);
        watch.settle(Duration::from_secs(60)).unwrap();
        assert_eq!(watch.events(), expected, "{forks:?}");
        // The outer pair and the one for the fork itself.
        assert_eq!(machine.after.starts.load(Ordering::SeqCst) - starts, 2 * expected, "{forks:?}");
        // The parent's mapping is watched as before.
        mapping.madvise(0..1, libc::MADV_DONTNEED);
        assert_eq!(cpu.read(at), Ok(0), "{forks:?}");
        watch.settle(Duration::from_secs(60)).unwrap();
        assert_eq!(watch.events(), expected + 1, "{forks:?}");
        finish(machine, watch);
    }
}

#[test]
fn settling_sees_a_change_whose_event_nobody_has_read() {
    let Some((machine, watch)) = watched_by(Reader::Nobody, Forks::Ignore) else { return };
    let mut mapping = Mapping::anonymous(PAGES);
    let at = adopt(&machine, &watch, &mapping, RW);
    let old = mapping.range();
    std::thread::scope(|scope| {
        scope.spawn(|| mapping.move_away(0..8));
        wait_until("the kernel has moved the mapping", || !mapping::is_mapped(&old));
        watch.settle(Duration::from_secs(60)).unwrap();
    });
    assert_eq!(watch.events(), 2, "REMAP, and UNMAP of the old place");
    let slots = machine.tlb.host.slots();
    assert_eq!(slots.len(), 1);
    assert_eq!(slots[0].host, mapping.range().start);
    assert_eq!(machine.mm.adopted_at(slots[0].first), Some(at));
    assert_eq!(machine.mm.adopted_at(Pfn(slots[0].first.0 + 3)), Some(page(at, 3)));
    assert_eq!(machine.mm.adopted_at(Pfn(slots[0].first.0 + 8)), None);
    finish(machine, watch);
}

/// The events about what was there before must not be taken for events about what is there now.
#[test]
fn addresses_of_a_mapping_that_moved_away_can_be_adopted_again_at_once() {
    let Some((machine, watch)) = watched_by(Reader::Nobody, Forks::Ignore) else { return };
    let mut mapping = Mapping::anonymous(PAGES);
    let at = adopt(&machine, &watch, &mapping, RW);
    let old = mapping.range();
    let (new, new_at) = std::thread::scope(|scope| {
        scope.spawn(|| mapping.move_away(0..PAGES));
        wait_until("the kernel has moved the mapping", || !mapping::is_mapped(&old));
        // REMAP, and UNMAP of this very range, are yet to be read.
        let new = Mapping::anonymous_at(&old);
        // SAFETY: as in `adopt`; what is in the place of the old mapping holds the test's own numbers, too.
        let new_at = unsafe { machine.mm.adopt(&watch, old.clone(), RW, None) };
        // Before anything can fail: the caller waits for somebody to read.
        watch.settle(Duration::from_secs(60)).unwrap();
        (new, new_at)
    });
    let new_at = new_at.unwrap();
    let mut cpu = machine.vcpu(0, FaultAroundPolicy::Off);
    assert_eq!(read_all(&mut cpu, at, PAGES), mapping.tags());
    assert_eq!(cpu.read(page(new_at, 2)), Ok(Mapping::tag(PAGES + 2)));
    assert_eq!(new.peek(2), Mapping::tag(PAGES + 2));
    machine.check();
    finish(machine, watch);
}
