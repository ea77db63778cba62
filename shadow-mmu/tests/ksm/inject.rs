// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The points of a merge (`merge-protect`, `merge-compare`, `merge-replace`): a scan that an injector holds there, or makes give up.

use super::*;
use shadow_mmu::inject::{Effect, Faults, Hit, Injector, MERGE_COMPARE, MERGE_PROTECT, MERGE_REPLACE, Point};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// A page, apart from others.
const LATE: Hva = Hva(BASE.0 + 100 * PAGE_SIZE);

/// What happens at the next hit of one point for [`LATE`]: it is told of, waits until it may go on, and comes to the effect.
#[derive(Debug)]
struct Next {
    point: &'static Point,
    effect: Effect,
    arrived: Sender<()>,
    go_on: Receiver<()>,
}

#[derive(Debug, Default)]
struct Once(Mutex<Option<Next>>);

impl Injector for Once {
    fn hit(&self, hit: &Hit) -> Effect {
        let is_it = |next: &mut Next| next.point == hit.point && hit.at == Some(LATE.0);
        // The lock is not held while it waits: others come by.
        let next = self.0.lock().unwrap_or_else(PoisonError::into_inner).take_if(is_it);
        let Some(next) = next else { return Effect::Go };
        next.arrived.send(()).unwrap();
        next.go_on.recv_timeout(Duration::from_secs(60)).unwrap();
        next.effect
    }
}

/// Two merged pages at [`BASE`], one like them at [`LATE`] that is about to be merged, and a pass that does so, with `effect` at
/// `point`; `act` runs while it is held there and may let it go on. Returns how many pages were merged.
fn pass_held_at(
    point: &'static Point,
    effect: Effect,
    act: impl FnOnce(&Machine, &dyn Fn()),
) -> (u64, Machine, Arc<Ksm>) {
    let once = Arc::<Once>::default();
    let machine = Machine::with_faults(4096, Faults::new(Arc::clone(&once) as _));
    fill(&machine, BASE, 2, |_| SAME);
    let ksm = sharing(settings(), [&machine]);
    merge(&ksm);
    fill(&machine, LATE, 1, |_| SAME);
    pass(&ksm);
    let ((arrived, arrival), (open, go_on)) = (channel(), channel());
    *once.0.lock().unwrap() = Some(Next { point, effect, arrived, go_on });
    let merged = std::thread::scope(|scope| {
        let scan = scope.spawn(|| pass(&ksm));
        arrival.recv_timeout(Duration::from_secs(60)).unwrap();
        // Twice is no more than once.
        let open = || _ = open.send(());
        act(&machine, &open);
        open();
        scan.join().unwrap()
    });
    (merged, machine, ksm)
}

#[test]
fn a_write_while_the_scanner_is_held_stays_and_the_page_is_not_merged() {
    for point in [&MERGE_PROTECT, &MERGE_COMPARE] {
        let (merged, machine, ksm) = pass_held_at(point, Effect::Go, |machine, _| {
            machine.vcpu(0, Off).write(LATE, 77).unwrap();
        });
        assert_eq!((merged, machine.peek(LATE)), (0, 77), "{}", point.name);
        assert_eq!(words(&machine, BASE, 2), [SAME, SAME]);
        check(&ksm, &machine);
        machine.finish();
    }
}

#[test]
fn a_write_inside_the_pair_waits_for_its_end_and_gets_a_copy() {
    let (merged, machine, ksm) = pass_held_at(&MERGE_REPLACE, Effect::Go, |machine, open| {
        std::thread::scope(|scope| {
            let mut vcpu = machine.vcpu(0, Off);
            let writer = scope.spawn(move || vcpu.write(LATE, 77).unwrap());
            std::thread::sleep(common::WATCH);
            assert!(!writer.is_finished(), "it wrote inside the pair");
            open();
        });
    });
    assert_eq!((merged, machine.peek(LATE)), (1, 77));
    assert_eq!(words(&machine, BASE, 2), [SAME, SAME]);
    check(&ksm, &machine);
    machine.finish();
}

#[test]
fn a_merge_that_is_given_up_leaves_the_page_as_it_was_and_comes_later() {
    for point in [&MERGE_PROTECT, &MERGE_COMPARE] {
        let (merged, machine, ksm) = pass_held_at(point, Effect::Fail(libc::EAGAIN), |_, _| {});
        assert_eq!((merged, machine.peek(LATE)), (0, SAME), "{}", point.name);
        assert!(!machine.pte(LATE).is_ksm());
        check(&ksm, &machine);
        merge(&ksm);
        assert!(machine.pte(LATE).is_ksm(), "{}: it is never merged", point.name);
        check(&ksm, &machine);
        machine.finish();
    }
}
