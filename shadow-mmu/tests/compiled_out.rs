// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The primary MMU alone, with the notifier layer compiled out.
#![cfg(not(feature = "mmu-notifier"))]
#![allow(clippy::unwrap_used, reason = "what a test does not expect may end it")]

use shadow_mmu::addr::{Access, Hva, HvaRange, PAGE_SIZE};
use shadow_mmu::frame::{FramePool, FreedFrames};
use shadow_mmu::mm::{Advice, Backing, FaultError, FaultRequest, MapFlags, Mm, RemapFlags};
use shadow_mmu::notifier::{Event, InvalidateGuard, Notifiers};
use std::sync::Arc;

const RW: Access = Access::READ.union(Access::WRITE);

#[test]
fn the_calls_are_there_and_cost_nothing() {
    assert_eq!((size_of::<Notifiers>(), size_of::<InvalidateGuard<'_>>()), (0, 0));
    let (notifiers, range) = (Notifiers::new(), HvaRange::page(Hva(PAGE_SIZE)));
    drop(notifiers.invalidate(range, Event::Unmap));
    drop(notifiers.invalidate_nonblock(range, Event::Clear).unwrap());
    let young = [
        notifiers.clear_flush_young(range),
        notifiers.clear_young(range),
        notifiers.test_young(range.start),
        notifiers.has_listeners(),
    ];
    assert_eq!(young, [false; 4]);
}

/// Writes a word to each page, moves, protects, discards and unmaps them, and looks for the words and for leaks.
#[test]
fn the_address_space_works_alone() {
    let pool = Arc::new(FramePool::new(256 * PAGE_SIZE, FreedFrames::Poison).unwrap());
    let whole = pool.free_frames();
    let mm = Mm::new(Arc::clone(&pool)).unwrap();
    let at = mm.mmap(Hva(0), 8 * PAGE_SIZE, RW, MapFlags::PRIVATE, Backing::Anonymous).unwrap();
    let page = |n: u64| Hva(at.0 + n * PAGE_SIZE);
    let word = |hva: Hva, access| {
        mm.fault(&FaultRequest::one_page(hva, access)).map(|pinned| {
            let entry = &pool.words(pinned.required().pfn)[0];
            if access.contains(Access::WRITE) {
                entry.store(hva.0, std::sync::atomic::Ordering::Relaxed);
            }
            entry.load(std::sync::atomic::Ordering::Relaxed)
        })
    };
    for n in 0..8 {
        assert_eq!(word(page(n), RW), Ok(page(n).0));
    }
    let moved = mm.mremap(at, 2 * PAGE_SIZE, 4 * PAGE_SIZE, RemapFlags::MAYMOVE, Hva(0)).unwrap();
    assert_eq!(word(Hva(moved.0 + PAGE_SIZE), Access::READ), Ok(page(1).0));
    assert_eq!(word(at, Access::READ), Err(FaultError::NoMapping));
    mm.mprotect(page(2), PAGE_SIZE, Access::READ).unwrap();
    assert_eq!(word(page(2), RW), Err(FaultError::NoAccess));
    mm.madvise(page(3), PAGE_SIZE, Advice::DontNeed).unwrap();
    assert_eq!(word(page(3), Access::READ), Ok(0));
    mm.munmap(page(0), 8 * PAGE_SIZE).unwrap();
    mm.munmap(moved, 4 * PAGE_SIZE).unwrap();
    drop(mm);
    assert_eq!((pool.free_frames(), pool.check_poison()), (whole, 0));
}
