// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! fork beside guests that go on writing, faults, zaps, moves and aging: a child is a snapshot, and stays one (R21, I15).
// What a test does not expect may end it.
#![cfg(feature = "mmu-notifier")]
#![allow(clippy::unwrap_used)]

mod common;

use common::{Machine, READ, RW, Random, StopOnDrop, WATCH, page, pages};
use shadow_mmu::addr::{Access, Hva, PAGE_SIZE};
use shadow_mmu::mm::{Advice, MapFlags, RemapFlags};
use shadow_mmu::shadow::FaultAroundPolicy::{Adaptive, Fixed, Off};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const BASE: Hva = Hva(0x7000_0000);
/// A place that shares no page table with [`BASE`] but the root.
const FAR: Hva = Hva(BASE.0 + (1 << 40));

/// H: fork has started its pair, and write-protected nothing yet. G: writes. It must wait, and write into a copy. Before the
/// start it writes into what the child will get.
#[test]
fn r21_a_write_waits_while_the_pair_of_a_fork_is_open() {
    let parent = Machine::new(128);
    parent.map_at(BASE, 2, RW, MapFlags::PRIVATE);
    let mut vcpu = parent.vcpu(0, Off);
    vcpu.write(BASE, 1).unwrap();
    std::thread::scope(|scope| {
        // Newest first: `before` hears of the start before the shadow map does, `after` after it.
        parent.before.start.shut();
        parent.after.start.shut();
        let fork = scope.spawn(|| parent.fork().unwrap());
        parent.before.start.wait_for_arrival();
        vcpu.write(BASE, 2).unwrap();
        parent.before.start.open();
        parent.after.start.wait_for_arrival();
        let writer = scope.spawn(move || {
            vcpu.write(BASE, 3).unwrap();
            vcpu.read(BASE)
        });
        // A host that brings in another page is in nobody's window, and must wait all the same: a child with what it writes
        // next and without what it writes now would be no snapshot.
        let host = scope.spawn(|| parent.poke(page(BASE, 1), 4));
        std::thread::sleep(WATCH);
        assert!(!writer.is_finished() && !host.is_finished(), "a write was served inside the pair");
        parent.after.start.open();
        let child = fork.join().unwrap();
        assert_eq!(writer.join().unwrap(), Ok(3));
        host.join().unwrap();
        assert_eq!((parent.peek(BASE), child.peek(BASE)), (3, 2));
        assert_eq!((parent.peek(page(BASE, 1)), child.peek(page(BASE, 1))), (4, 0));
        [&parent, &child].iter().for_each(|machine| machine.check());
        child.exit();
    });
    parent.finish();
}

/// Two counters are written by a guest, always the first before the second, while forks are made: no child may see the second
/// ahead of the first, nor any word change. The two lie in one mapping (tables far apart), or in two.
#[test]
fn r21_a_child_is_a_snapshot_of_a_guest_that_goes_on_writing() {
    for (second, mappings) in [(1200, 1), (2000, 2)] {
        let parent = Machine::new(4096);
        parent.map_at(BASE, 1500, RW, MapFlags::PRIVATE);
        parent.map_at(page(BASE, 1600), 600, RW, MapFlags::PRIVATE);
        let at = [BASE, page(BASE, second)];
        at.iter().for_each(|&at| parent.poke(at, 0));
        let (stop, written) = (AtomicBool::new(false), AtomicU64::new(0));
        std::thread::scope(|scope| {
            let _stop = StopOnDrop(&stop);
            scope.spawn(|| {
                let mut vcpu = parent.vcpu(0, Off);
                for n in 1.. {
                    at.iter().for_each(|&at| vcpu.write(at, n).unwrap());
                    written.store(n, Ordering::SeqCst);
                    if stop.load(Ordering::SeqCst) {
                        break;
                    }
                }
            });
            for round in 0..100 {
                let before = written.load(Ordering::SeqCst);
                let child = parent.fork().unwrap();
                let seen = at.map(|at| child.peek(at));
                assert!(seen[0] >= seen[1] && seen[0] <= seen[1] + 1, "{mappings}: {seen:?}, round {round}");
                assert!(seen[1] >= before, "{seen:?}: the past, in round {round}");
                common::wait_until("the guest has gone on", || written.load(Ordering::SeqCst) > seen[0]);
                assert_eq!(at.map(|at| child.peek(at)), seen, "a later write came through, round {round}");
                parent.check();
                child.check();
                child.exit();
            }
        });
        parent.finish();
    }
}

/// Faults, copies, zaps, moves and aging in other threads, while spaces are forked, forked again and dropped. Each page
/// holds its own number and a version; no child may see another page's, nor see a page change.
#[test]
fn forks_race_with_everything_else_that_faults_and_zaps() {
    const PAGES: u64 = 64;
    const ROUNDS: u64 = 150;
    let parent = Machine::new(8192);
    parent.map_at(BASE, PAGES, RW, MapFlags::PRIVATE);
    let stop = AtomicBool::new(false);
    let word = |n: u64, version: u64| (n << 32) | version;
    let words = |machine: &Machine| (0..PAGES).map(|n| machine.peek(page(BASE, n))).collect::<Vec<_>>();
    let belongs = |n: u64, word: u64| word == 0 || word >> 32 == n;
    std::thread::scope(|scope| {
        let _stop = StopOnDrop(&stop);
        for id in 0..2 {
            let (parent, stop) = (&parent, &stop);
            scope.spawn(move || {
                let mut vcpu = parent.vcpu(id, [Adaptive, Fixed(16)][id]);
                let mut random = Random(id as u64);
                for version in 1.. {
                    let n = random.below(PAGES);
                    vcpu.write(page(BASE, n), word(n, version)).unwrap();
                    let n = random.below(PAGES);
                    assert!(belongs(n, vcpu.read(page(BASE, n)).unwrap()));
                    if stop.load(Ordering::SeqCst) {
                        break;
                    }
                }
            });
        }
        scope.spawn(|| {
            let mut random = Random(7);
            while !stop.load(Ordering::SeqCst) {
                let (n, len) = (random.below(PAGES - 4), 1 + random.below(4));
                let at = page(BASE, n);
                match random.below(5) {
                    0 => parent.mm.madvise(at, pages(len), Advice::DontNeed).unwrap(),
                    1 => _ = parent.mm.pmdp_clear_flush_young_notify(at),
                    2 => _ = parent.mm.ptep_clear_young_notify(at),
                    3 => parent.poke(at, word(n, 1)),
                    _ => {
                        for prot in [READ | Access::EXEC, RW] {
                            let flags = RemapFlags::MAYMOVE | RemapFlags::FIXED;
                            let scratch = page(FAR, 0);
                            parent.map_at(scratch, 1, RW, MapFlags::PRIVATE);
                            parent.poke(scratch, 1);
                            parent.mm.mprotect(scratch, PAGE_SIZE, prot).unwrap();
                            parent.mm.mremap(scratch, PAGE_SIZE, PAGE_SIZE, flags, page(FAR, 9)).unwrap();
                        }
                    }
                }
            }
        });
        for round in 0..ROUNDS {
            let child = parent.fork().unwrap();
            let seen = words(&child);
            let grandchild = child.fork().unwrap();
            let mut vcpu = child.vcpu(0, Fixed(16));
            (0..PAGES).step_by(3).for_each(|n| vcpu.write(page(BASE, n), word(n, round)).unwrap());
            assert!((0..PAGES).all(|n| belongs(n, seen[n as usize])), "{seen:x?}");
            assert_eq!(words(&grandchild), seen, "round {round}");
            [&parent, &child, &grandchild].iter().for_each(|machine| machine.check());
            if round % 2 == 0 {
                child.exit();
                assert_eq!(words(&grandchild), seen, "round {round}");
                grandchild.exit();
            } else {
                grandchild.exit();
                child.exit();
            }
        }
    });
    parent.finish();
}
