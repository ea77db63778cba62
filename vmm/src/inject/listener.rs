// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The points that are notifier callbacks: a listener that maps nothing, and is as slow and as unwilling as the plan says.
//!
//! It is registered like any other secondary MMU, so what it does to the others is what any of them could do.

use super::points::{NOTIFIER_END, NOTIFIER_START};
use shadow_mmu::inject::{Effect, Faults, Point};
use shadow_mmu::notifier::{Blockable, Event, Invalidation, MmuNotifier, WouldBlock};

/// The events that plans name, as `umbra run --trace` does.
const EVENTS: [(Event, &str); 5] = [
    (Event::Unmap, "unmap"),
    (Event::Clear, "clear"),
    (Event::ProtectionVma, "protection-vma"),
    (Event::ProtectionPage, "protection-page"),
    (Event::Release, "release"),
];

#[cfg(feature = "inject")]
pub(super) fn event_names() -> impl Iterator<Item = &'static str> {
    EVENTS.iter().map(|(_, name)| *name)
}

/// The listener of one machine.
#[derive(Debug)]
pub struct NotifierFaults(Faults);

impl NotifierFaults {
    /// One that `faults` decides over.
    pub fn new(faults: Faults) -> Self {
        Self(faults)
    }

    fn hit(&self, point: &'static Point, invalidation: &Invalidation) -> Effect {
        let name = EVENTS.iter().find(|(event, _)| *event == invalidation.event).map(|(_, name)| *name);
        self.0.hit_with(point, Some(invalidation.range.start.0), name)
    }
}

impl MmuNotifier for NotifierFaults {
    fn invalidate_range_start(&self, invalidation: &Invalidation) -> Result<(), WouldBlock> {
        match (self.hit(&NOTIFIER_START, invalidation), invalidation.blockable) {
            (Effect::Fail(_), Blockable::No) => Err(WouldBlock),
            _ => Ok(()),
        }
    }

    fn invalidate_range_end(&self, invalidation: &Invalidation) {
        self.hit(&NOTIFIER_END, invalidation);
    }
}

#[cfg(all(test, feature = "inject"))]
mod tests {
    use super::super::Registry;
    use super::*;
    use shadow_mmu::addr::{Access, Hva};
    use shadow_mmu::frame::{FramePool, FreedFrames};
    use shadow_mmu::mm::{Backing, FaultRequest, MapFlags, Mm, Reaped};
    use std::sync::Arc;

    #[test]
    fn only_a_change_that_must_not_wait_is_refused() {
        let plan = "[[fault]]\npoint='notifier-start'\nerror='EAGAIN'".parse().unwrap();
        let registry = Registry::new(&plan);
        let faults = Faults::new(Arc::clone(&registry) as _);
        let mm = Mm::new(Arc::new(FramePool::new(1 << 20, FreedFrames::Keep).unwrap())).unwrap();
        mm.register(Arc::new(NotifierFaults::new(faults))).unwrap();
        let rights = Access::READ | Access::WRITE;
        let at = mm.mmap(Hva(0), 0x2000, rights, MapFlags::PRIVATE, Backing::Anonymous).unwrap();
        // munmap may wait, so it is done.
        mm.munmap(at, 0x1000).unwrap();
        assert_eq!(mm.vmas().len(), 1);
        let range = shadow_mmu::addr::HvaRange::page(Hva(at.0 + 0x1000));
        assert!(mm.notifiers().invalidate_nonblock(range, Event::Clear).is_err());
        assert_eq!(registry.account().hits["notifier-start"], 2);
        assert_eq!(registry.account().hits["notifier-end"], 1);
    }

    #[test]
    fn a_reaper_that_is_refused_leaves_the_page_and_gets_it_at_its_next_go() {
        let plan = "[[fault]]\npoint='notifier-start'\nevent='unmap'\nnth=1\nerror='EAGAIN'".parse().unwrap();
        let registry = Registry::new(&plan);
        let pool = Arc::new(FramePool::new(1 << 20, FreedFrames::Keep).unwrap());
        let mm = Mm::new(Arc::clone(&pool)).unwrap();
        mm.register(Arc::new(NotifierFaults::new(Faults::new(Arc::clone(&registry) as _)))).unwrap();
        let rights = Access::READ | Access::WRITE;
        let at = mm.mmap(Hva(0), 0x1000, rights, MapFlags::PRIVATE, Backing::Anonymous).unwrap();
        mm.fault(&FaultRequest::one_page(at, rights)).unwrap();
        let free = pool.free_frames();
        assert_eq!(mm.reap(), Some(Reaped { freed: 0, skipped: 1 }));
        assert_eq!(pool.free_frames(), free);
        assert_eq!(mm.reap(), Some(Reaped { freed: 1, skipped: 0 }));
        assert_eq!(registry.account().rules[0].fired, 1);
    }
}
