// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Events that come late, in parts and in another order (`uffd-event`): the promise is the same.

use super::*;
use shadow_mmu::inject::{Effect, Faults, Hit, Injector, UFFD_EVENT};
use std::sync::atomic::AtomicU64;

/// Does something at each hit of `uffd-event`, and counts them.
#[derive(Debug)]
struct AtEvents {
    effect: Effect,
    delay: Duration,
    hits: Arc<AtomicU64>,
}

impl Injector for AtEvents {
    fn hit(&self, hit: &Hit) -> Effect {
        if hit.point != &UFFD_EVENT {
            return Effect::Go;
        }
        self.hits.fetch_add(1, Ordering::SeqCst);
        std::thread::sleep(self.delay);
        self.effect
    }
}

fn disturbed(effect: Effect, delay: Duration) -> (Faults, Arc<AtomicU64>) {
    let hits = Arc::<AtomicU64>::default();
    (Faults::new(Arc::new(AtEvents { effect, delay, hits: Arc::clone(&hits) })), hits)
}

fn late() -> [(Effect, Duration); 2] {
    [(Effect::Go, Duration::from_millis(2)), (Effect::Split, Duration::ZERO)]
}

#[test]
fn late_and_split_events_have_reached_the_guest_when_the_call_returns() {
    for (effect, delay) in late() {
        let (faults, hits) = disturbed(effect, delay);
        every_change_has_reached_the_guest_when_the_call_returns(|| {
            watch(Machine::with_faults(256, faults.clone()), Reader::Thread, Forks::Ignore)
        });
        assert!(hits.load(Ordering::SeqCst) > 50 || watched().is_none());
    }
}

/// Four threads change four mappings at once, so that the watch reads events of several together.
#[test]
fn events_of_several_threads_may_come_in_any_order() {
    for (effect, delay) in late() {
        let (faults, hits) = disturbed(effect, delay);
        let machine = Machine::with_faults(256, faults);
        let Some((machine, watch)) = watch(machine, Reader::Thread, Forks::Ignore) else { return };
        let makers = [Mapping::anonymous, Mapping::shared_memfd, Mapping::anonymous, Mapping::shared_memfd];
        let mut mappings: Vec<Mapping> = makers.iter().map(|make| make(PAGES)).collect();
        let views: Vec<Hva> = mappings.iter().map(|mapping| adopt(&machine, &watch, mapping, RW)).collect();
        let mut cpu = machine.vcpu(0, FaultAroundPolicy::Off);
        for view in &views {
            read_all(&mut cpu, *view, PAGES);
        }
        std::thread::scope(|scope| {
            for mapping in &mut mappings {
                scope.spawn(|| {
                    mapping.move_away(4..8);
                    mapping.munmap(0..2);
                    mapping.move_away(4..8);
                    mapping.madvise(2..3, libc::MADV_DONTNEED);
                    mapping.munmap(5..6);
                });
            }
        });
        watch.settle(Duration::from_secs(60)).unwrap();
        for (mapping, view) in mappings.iter().zip(views) {
            let mut expected = tags_without(mapping, 5..6);
            expected[..2].fill(GONE);
            expected[2] = mapping.discarded(2..3)[2];
            assert_eq!(read_all(&mut cpu, view, PAGES), expected);
        }
        machine.check();
        assert!(hits.load(Ordering::SeqCst) >= 4 * 6);
        finish(machine, watch);
    }
}
