// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Events that come late, in parts, or in another order, because an injector wants that (`uffd-event`).
//!
//! What was read is applied under one hold of the mmap lock, with pairs open over everything adopted: the guest cannot see in which
//! order. Listeners can, by the inner pairs. The kernel makes each caller wait until its event was read, so events of one thread
//! that depend on each other come one after the other, and may be read together. Events about different addresses can be those of
//! different threads, which nobody orders: those change places, no others. And a change of many pages can be several
//! events (munmap over two VMAs sends two), so that of one may become several.

use super::uffd::UffdEvent;
use crate::addr::PAGE_SIZE;
use crate::inject::{Effect, Faults, UFFD_EVENT};
use std::ops::Range;

/// Into how many parts an event is cut at most: each costs a pair and a flush.
const PARTS: u64 = 16;

/// The same changes, as late and in such an order as `faults` wants.
pub(super) fn disturbed(faults: &Faults, events: Vec<UffdEvent>) -> Vec<UffdEvent> {
    if !faults.are_armed() {
        return events;
    }
    let split: Vec<bool> = events.iter().map(|_| faults.hit(&UFFD_EVENT) == Effect::Split).collect();
    let mut ordered: Vec<UffdEvent> = Vec::with_capacity(events.len());
    // From the last on, so that those behind an event have their places already.
    for (event, split) in events.into_iter().zip(split).rev() {
        if split {
            let passed = ordered.iter().take_while(|later| !depend(&event, later)).count();
            ordered.splice(passed..passed, parts(event));
        } else {
            ordered.insert(0, event);
        }
    }
    ordered
}

/// The addresses that an event is about; `None` for all.
fn addresses(event: &UffdEvent) -> Option<[Range<u64>; 2]> {
    match event {
        UffdEvent::Unmap(range) | UffdEvent::Remove(range) => Some([range.clone(), 0..0]),
        UffdEvent::Remap { from, to, len } => Some([*from..from + len, *to..to + len]),
        UffdEvent::Fork(_) | UffdEvent::PageFault(_) => None,
    }
}

fn depend(one: &UffdEvent, other: &UffdEvent) -> bool {
    let (Some(one), Some(other)) = (addresses(one), addresses(other)) else { return true };
    one.iter().any(|a| other.iter().any(|b| a.start < b.end && b.start < a.end))
}

/// The event as several, the highest addresses first.
fn parts(event: UffdEvent) -> Vec<UffdEvent> {
    let (range, part): (_, fn(_) -> _) = match event {
        UffdEvent::Unmap(range) => (range, UffdEvent::Unmap),
        UffdEvent::Remove(range) => (range, UffdEvent::Remove),
        // Parts of a move would each need a slot of their own.
        whole => return vec![whole],
    };
    let len = ((range.end - range.start) / PAGE_SIZE).div_ceil(PARTS).max(1) * PAGE_SIZE;
    let starts = (0..PARTS).map(|n| range.start + n * len).take_while(|start| *start < range.end);
    let mut parts: Vec<_> = starts.map(|start| part(start..range.end.min(start + len))).collect();
    parts.reverse();
    parts
}

#[cfg(all(test, feature = "inject"))]
mod tests {
    use super::*;
    use crate::inject::{Hit, Injector};
    use crate::sync::Arc;

    #[derive(Debug)]
    struct Splits;

    impl Injector for Splits {
        fn hit(&self, _: &Hit) -> Effect {
            Effect::Split
        }
    }

    fn order(events: Vec<UffdEvent>) -> Vec<String> {
        let said = disturbed(&Faults::new(Arc::new(Splits)), events);
        said.iter().map(|event| format!("{event:x?}")).collect()
    }

    #[test]
    fn events_about_different_addresses_change_places_and_no_others() {
        let moved = UffdEvent::Remap { from: 0x1000, to: 0x9000, len: 0x1000 };
        let said = order(vec![moved, UffdEvent::Unmap(0x1000..0x2000), UffdEvent::Remove(0x5000..0x6000)]);
        // The move stays before the unmapping of its old place; both let the third one pass.
        let expected =
            ["Remove(5000..6000)", "Remap { from: 1000, to: 9000, len: 1000 }", "Unmap(1000..2000)"];
        assert_eq!(said, expected);
        let onto = UffdEvent::Remap { from: 0x5000, to: 0x1000, len: 0x1000 };
        let said = order(vec![UffdEvent::Unmap(0x1000..0x2000), onto, UffdEvent::Unmap(0x5000..0x6000)]);
        assert_eq!(
            said,
            ["Unmap(1000..2000)", "Remap { from: 5000, to: 1000, len: 1000 }", "Unmap(5000..6000)"]
        );
    }

    #[test]
    fn the_parts_of_an_event_are_all_of_it() {
        for pages in [1u64, 2, 15, 16, 17, 1000] {
            let all = 0x1000..(pages + 1) * PAGE_SIZE;
            let mut end = all.end;
            let parts = parts(UffdEvent::Unmap(all));
            assert!(
                parts.len() as u64 <= PARTS && (pages == 1 || parts.len() > 1),
                "{pages}: {}",
                parts.len()
            );
            for part in parts {
                let UffdEvent::Unmap(range) = part else { panic!("{part:?}") };
                assert!(range.end == end && range.start.is_multiple_of(PAGE_SIZE) && !range.is_empty());
                end = range.start;
            }
            assert_eq!(end, 0x1000);
        }
    }
}
