// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A frame between those who let it go, hand it out again, and look it up without holding it: the keyhole of page sharing (R26),
//! with what the memory model allows. And its flags, which secondaries set while the scanner keeps a note beside them.

use crate::exhaust::{Preemptions, exhaust, refute};
use crate::frame::meta::{Frame, FrameFlags};
use crate::mutant::M;
use crate::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use crate::sync::{Arc, Mutex};

/// What the frame holds: a page of KSM, or somebody else's.
const SHARED: u32 = 1;
const OTHER: u32 = 2;

/// The pool, of one frame.
#[derive(Debug)]
struct Pool {
    frame: Frame,
    /// Whether it is on the free list.
    free: Mutex<bool>,
    content: AtomicU32,
    /// How often it was freed.
    freed: AtomicU32,
}

impl Pool {
    /// One with a page of KSM, that one pte maps.
    fn new() -> Arc<Self> {
        let frame = Frame::default();
        frame.handed_out();
        frame.set_flags(FrameFlags::KSM);
        let (content, freed) = (AtomicU32::new(SHARED), AtomicU32::new(0));
        Arc::new(Self { frame, free: Mutex::new(false), content, freed })
    }

    /// As `FramePool::put`.
    fn put(&self) {
        if self.frame.remove_ref() {
            self.freed.fetch_add(1, Ordering::Relaxed);
            *self.free.lock() = true;
        }
    }

    /// As `FramePool::alloc`; then the new owner writes.
    fn alloc(&self) -> bool {
        if !std::mem::take(&mut *self.free.lock()) {
            return false;
        }
        self.frame.handed_out();
        self.content.store(OTHER, Ordering::Relaxed);
        true
    }

    /// As `FramePool::get_ksm`.
    fn get_ksm(&self, second_look: bool) -> bool {
        let is_ksm = || self.frame.flags().contains(FrameFlags::KSM);
        if !is_ksm() || !self.frame.try_add_ref() {
            return false;
        }
        if !second_look || is_ksm() {
            return true;
        }
        self.put();
        false
    }
}

/// One lets the page go, one wants a frame, one looks the page up.
fn keyhole(second_look: bool) {
    let pool = Pool::new();
    let owner = {
        let pool = Arc::clone(&pool);
        loom::thread::spawn(move || {
            pool.put();
            pool.alloc()
        })
    };
    let held = pool.get_ksm(second_look);
    if held {
        let content = pool.content.load(Ordering::Relaxed);
        assert_eq!(content, SHARED, "a reference is to somebody else's page (R26)");
    }
    let handed_out = owner.join().unwrap();
    let content = pool.content.load(Ordering::Relaxed);
    assert!(!held || !handed_out && content == SHARED, "a frame went while it was held (R26)");
    if held {
        pool.put();
    }
    let owned = u32::from(handed_out);
    assert_eq!(pool.frame.ref_count(), owned, "a reference is lost");
    assert_eq!(pool.freed.load(Ordering::Relaxed), 1, "the page of KSM went once");
}

#[test]
fn r26_a_reference_is_to_the_page_that_was_looked_up() {
    let mutants = [M::KeyholeTakesFree, M::HandedOutFlagsLast, M::HandedOutRelaxed];
    exhaust("keyhole", Preemptions::Any, || keyhole(true), &mutants);
    refute("keyhole with one look", Preemptions::Any, || keyhole(false));
}

/// A secondary tells of a write while the scanner takes what it was told before, and replaces the note.
fn flags() {
    let frame = Arc::new(Frame::default());
    frame.handed_out();
    let wrote = Arc::new(AtomicBool::new(false));
    let secondary = {
        let (frame, wrote) = (Arc::clone(&frame), Arc::clone(&wrote));
        loom::thread::spawn(move || {
            wrote.store(true, Ordering::Relaxed);
            frame.set_flags(FrameFlags::WRITTEN | FrameFlags::DIRTY);
        })
    };
    let told = !frame.take_flags(FrameFlags::WRITTEN).is_empty();
    if told {
        assert!(wrote.load(Ordering::Relaxed), "who is told of a write sees what was written before");
    }
    frame.set_note(5);
    secondary.join().unwrap();
    let (left, note) = frame.flags_and_note();
    assert!(told != left.contains(FrameFlags::WRITTEN), "a write is told of once: {told}, {left:?} (I25)");
    assert!(left.contains(FrameFlags::DIRTY) && note == 5, "{left:?}, note {note}");
}

#[test]
fn i25_the_scanner_loses_nothing_that_a_frame_is_told() {
    exhaust("frame_flags", Preemptions::Any, flags, &[M::NoteByStore]);
}
