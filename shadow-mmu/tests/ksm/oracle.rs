// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Nobody can tell by the bytes: guests, devices and the host write, unmap, remap, fork and protect the pages of several spaces
//! of one pool, while they are merged at full speed, and each finds what it wrote last (I58).
//!
//! Each space has two threads, which keep to a half of its pages each: the thread knows what every word of its pages is, and
//! looks each time. Contents are few, so that most pages are like some other. Some threads unshare everything, some age.
//! Regularly all stand still, and everything is audited.

use super::*;
use crate::common::{PATIENCE, Vcpu};
use shadow_mmu::iommu;
use shadow_mmu::iommu::GuestView;
use std::sync::{Barrier, RwLock};
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress};

/// Pages of one thread.
const PAGES: u64 = 96;
/// Contents, 0 among them.
const CONTENTS: u64 = 5;
/// Where a thread's pages are: the halves of a space share a table.
fn first(half: u64) -> Hva {
    page(BASE, half * 2 * PAGES)
}

/// One thread of a guest, and what it knows.
struct Guest<'a> {
    machine: &'a Machine,
    vcpu: Vcpu,
    view: GuestView,
    first: Hva,
    /// What each page begins and ends with.
    words: Vec<u64>,
    random: Random,
}

impl<'a> Guest<'a> {
    fn new(machine: &'a Machine, half: u64, seed: u64) -> Self {
        let first = first(half);
        fill(machine, first, PAGES, |_| 0);
        let view = iommu::view(&machine.mm).unwrap();
        let vcpu = machine.vcpu(half as usize, [Off, Fixed(16)][half as usize]);
        Self { machine, vcpu, view, first, words: vec![0; PAGES as usize], random: Random(seed) }
    }

    fn at(&self, n: u64) -> Hva {
        page(self.first, n)
    }

    /// The page's two words are what was written last.
    fn look(&mut self, n: u64) {
        let (at, word) = (self.at(n), self.words[n as usize]);
        let end = Hva(at.0 + PAGE_SIZE - 8);
        let found = match self.random.below(6) {
            0 => (self.machine.peek(at), self.machine.peek(end)),
            1 => {
                let read = |at: Hva| self.view.read_obj(GuestAddress(at.0)).unwrap();
                (read(at), read(end))
            }
            _ => (self.vcpu.read(at).unwrap(), self.vcpu.read(end).unwrap()),
        };
        assert_eq!(found, (word, word), "page {n} of {}", self.first);
    }

    fn write(&mut self, n: u64, word: u64) {
        let at = self.at(n);
        for at in [at, Hva(at.0 + PAGE_SIZE - 8)] {
            match self.random.below(8) {
                0 => self.machine.poke(at, word),
                1 => self.view.write_obj(word, GuestAddress(at.0)).unwrap(),
                _ => self.vcpu.write(at, word).unwrap(),
            }
        }
        self.words[n as usize] = word;
    }

    /// One thing that a program does to some pages; they are as its model says afterwards.
    fn step(&mut self) {
        let (n, count) = (self.random.below(PAGES), 1 + self.random.below(12));
        let some = n..(n + count).min(PAGES);
        let (at, len) = (self.at(n), pages(some.end - some.start));
        let mm = &self.machine.mm;
        match self.random.below(40) {
            0 => {
                mm.madvise(at, len, Advice::DontNeed).unwrap();
                some.for_each(|n| self.words[n as usize] = 0);
            }
            1 => {
                mm.munmap(at, len).unwrap();
                assert!(self.vcpu.read(at).is_err());
                self.machine.map_at(at, some.end - some.start, RW, MapFlags::PRIVATE);
                mm.madvise(at, len, Advice::Mergeable).unwrap();
                some.for_each(|n| self.words[n as usize] = 0);
            }
            2 => {
                // Away and back.
                let flags = RemapFlags::MAYMOVE | RemapFlags::FIXED;
                let away = page(self.first, 4000);
                mm.mremap(at, len, len, flags, away).unwrap();
                assert_eq!(self.vcpu.read(away), Ok(self.words[n as usize]));
                mm.mremap(away, len, len, flags, at).unwrap();
            }
            3 => {
                mm.mprotect(at, len, READ).unwrap();
                assert!(self.vcpu.write(at, 99).is_err());
                self.look(n);
                mm.mprotect(at, len, RW).unwrap();
            }
            4 => {
                mm.madvise(at, len, Advice::Unmergeable).unwrap();
                assert!(!has_merged(self.machine, at, some.end - some.start));
                mm.madvise(at, len, Advice::Mergeable).unwrap();
            }
            5 => self.fork(),
            6 => _ = mm.age(),
            7..15 => {
                let word = self.random.below(CONTENTS);
                some.for_each(|n| self.write(n, word));
            }
            _ => some.for_each(|n| self.look(n)),
        }
    }

    /// A child has what its parent had, and what either writes from then on the other does not see.
    fn fork(&mut self) {
        // The other thread of the space goes on: only our half is known.
        let Ok(child) = self.machine.fork() else { return };
        let mut vcpu = child.vcpu(0, Fixed(16));
        let then = self.words.clone();
        for _ in 0..10 {
            let n = self.random.below(PAGES);
            match self.random.below(3) {
                0 => self.write(n, 1),
                1 if then[n as usize] != 77 => assert_eq!(vcpu.read(self.at(n)), Ok(then[n as usize])),
                _ => {
                    vcpu.write(self.at(n), 77).unwrap();
                    assert_eq!(vcpu.read(self.at(n)), Ok(77));
                    // Not known to the model, which is of this moment: as it was.
                    vcpu.write(self.at(n), then[n as usize]).unwrap();
                }
            }
        }
        child.check();
        drop(child.exit());
    }
}

/// Guests on CPUs of every kind, for so long.
fn run(settings: KsmSettings, seed: u64, time: Duration) {
    let last = Machine::with_ad_bits(16384, AdBits::Unflushed);
    let machines = [last.beside(AdBits::AfterFlush), last.beside(AdBits::None), last];
    let ksm = sharing(settings, &machines);
    let (stop, still) = (AtomicBool::new(false), RwLock::new(()));
    let merged = AtomicU64::new(0);
    let began = Instant::now();
    let ready = Barrier::new(machines.len() * 2 + 1);
    std::thread::scope(|scope| {
        let _stop = StopOnDrop(&stop);
        let mut threads = Vec::new();
        for (number, machine) in machines.iter().enumerate() {
            for half in 0..2 {
                let (stop, still, ready) = (&stop, &still, &ready);
                threads.push(scope.spawn(move || {
                    let seed = seed * 100 + number as u64 * 2 + half;
                    let mut guest = Guest::new(machine, half, seed);
                    ready.wait();
                    let mut stopped = false;
                    while !stopped {
                        stopped = stop.load(Ordering::SeqCst);
                        let _going = still.read().unwrap();
                        // Now and then for a while nothing is written.
                        let quiet = guest.random.below(4) == 0;
                        for _ in 0..guest.random.below(40) {
                            match guest.random.below(PAGES) {
                                n if quiet => guest.look(n),
                                _ => guest.step(),
                            }
                        }
                    }
                    (0..PAGES).for_each(|n| guest.look(n));
                }));
            }
        }
        scope.spawn(|| {
            let mut random = Random(seed);
            while !stop.load(Ordering::SeqCst) {
                merged.fetch_add(ksm.scan(1 + random.below(400)).merged, Ordering::SeqCst);
                let machine = &machines[random.below(3) as usize];
                match random.below(200) {
                    0 => ksm.unmerge().unwrap(),
                    1..10 => ksm.hint(&machine.mm, HvaRange::pages_from(page(BASE, random.below(300)), 40)),
                    _ => {}
                }
            }
        });
        ready.wait();
        let is_enough = || began.elapsed() >= time && merged.load(Ordering::SeqCst) > 100;
        while !is_enough() && !threads.iter().any(|thread| thread.is_finished()) {
            assert!(began.elapsed() < time + PATIENCE, "next to nothing is merged");
            std::thread::sleep(Duration::from_millis(50));
            // A thread that failed has said so.
            let Ok(_still) = still.write() else { break };
            machines.iter().for_each(|machine| check(&ksm, machine));
        }
        stop.store(true, Ordering::SeqCst);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    });
    // And in the end, at rest, as much is shared as there can be.
    for _ in 0..20 {
        pass(&ksm);
    }
    machines.iter().for_each(|machine| check(&ksm, machine));
    check_counters(&ksm);
    if settings.max_page_sharing > 256 && settings.zero_pages == ZeroPages::Share {
        assert!(ksm.stats().pages_shared <= CONTENTS, "{:?}", ksm.stats());
        assert_eq!(ksm.stats().pages_volatile, 0);
    }
    let [.., last] = machines.map(|machine| machine.exit());
    drop(ksm);
    assert_eq!(last.stats().free, 16384, "frames leaked");
    assert_eq!(last.check_poison(), 0);
}

/// What the runs differ in.
fn variants() -> [KsmSettings; 4] {
    let all = settings();
    [
        KsmSettings { max_page_sharing: 1000, ..all },
        KsmSettings { max_page_sharing: 3, zero_pages: ZeroPages::Keep, ..all },
        KsmSettings { smart_scan: SmartScan::Off, reserve: 100, ..all },
        KsmSettings { access: CandidateAccess::CopyOnAccess, ..all },
    ]
}

#[test]
fn i58_guests_find_what_they_wrote_whatever_is_merged() {
    for (seed, settings) in (1..).zip(variants()) {
        run(settings, seed, Duration::from_millis(1000));
    }
}

#[test]
#[ignore = "takes a minute and a half"]
fn i58_guests_find_what_they_wrote_for_long() {
    for round in 0..8 {
        for (seed, settings) in (10 * round..).zip(variants()) {
            run(settings, seed, Duration::from_secs(3));
        }
    }
}
