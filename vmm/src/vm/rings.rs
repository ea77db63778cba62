// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The dirty rings of a machine's vCPUs: who waits for whom.
//!
//! ```text
//! vCPU thread: pushes ─► soft-full? ─► writes `full`, polls `room` ───────────────► enters the guest
//! event loop:                          reads `full` ─► harvest ─► reset ─► writes `room`
//! ```
//! A vCPU drains `room` *before* it looks whether its ring is full, and the reset writes `room` *after* it has made room; so
//! either the look finds room, or the poll returns. It polls beside its waker's descriptor, as a guest thread that waits in a
//! system call, so signals and the guest's end reach it.
//!
//! Rings of vCPUs that have ended are emptied by the event loop too, with all others. But nobody waits for it there, and a
//! guest may start and end threads faster than a busy loop comes around. So from [`ENDED_ENTRIES`] on the ending vCPU's
//! thread does it, for the ended ones only: what was in them is kept with what the loop collects (bounded),
//! their pages are reset, and they go.
//!
//! # Locks
//! `state`, above the shadow map's list of rings and its `mmu_lock`. Held while rings are harvested and reset, so that a ring
//! whose vCPU has ended by then is empty afterwards, and goes.

use super::lock;
use anyhow::{Context, Result};
use shadow_mmu::shadow::{DirtyPages, DirtyRing, ShadowMmu, VcpuRing, dirty_parts_limit};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex};
use vmm_sys_util::eventfd::EventFd;

/// Entries of all rings of ended vCPUs that may wait for the next collection: 1.5 MiB.
const ENDED_ENTRIES: u64 = 65536;

/// Whether a ring's vCPU still runs.
#[derive(Debug, PartialEq, Eq)]
enum Owner {
    Running,
    Ended,
}

/// All rings of a machine.
#[derive(Debug)]
pub(super) struct Rings {
    entries: u32,
    full: EventFd,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    members: Vec<(Arc<DirtyRing>, Owner)>,
    /// What was harvested and not asked for yet; bounded by `limit`, for it may be an hour until somebody asks.
    pages: DirtyPages,
    limit: usize,
}

impl State {
    /// Takes everything out of the rings of these, makes room in them, and lets go of those that ended. Pages are reset
    /// before this returns: a write after it is a new entry.
    fn collect(&mut self, shadow: &ShadowMmu, of: impl Fn(&Owner) -> bool) {
        let Self { members, pages, limit } = self;
        for (ring, _) in members.iter().filter(|(_, owner)| of(owner)) {
            // One slot, from guest frame 0: an offset in it is a page number.
            ring.harvest(|dirty| pages.insert_within(dirty.page, *limit));
        }
        // Before the reset, which lets go of rings that only the shadow map still has.
        members.retain(|(_, owner)| *owner == Owner::Running);
        shadow.reset_dirty_rings();
    }
}

/// What a vCPU's thread has of its ring, beside the end that it pushes into.
#[derive(Debug)]
pub(super) struct Member {
    ring: Arc<DirtyRing>,
    room: Arc<EventFd>,
}

fn event() -> Result<EventFd> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).context("cannot make an eventfd")
}

impl Rings {
    /// No ring yet; each will have `entries` entries. The guest has `frames` frames.
    pub(super) fn new(entries: u32, frames: usize) -> Result<Self> {
        let state =
            State { members: Vec::new(), pages: DirtyPages::default(), limit: dirty_parts_limit(frames) };
        Ok(Self { entries, full: event()?, state: Mutex::new(state) })
    }

    /// Readable when a vCPU waits for room.
    pub(super) fn full(&self) -> Result<EventFd> {
        self.full.try_clone().context("cannot duplicate an eventfd")
    }

    /// A ring for a vCPU that is about to run on `shadow`.
    pub(super) fn join(&self, shadow: &ShadowMmu) -> Result<(Member, VcpuRing)> {
        let (ring, end) = DirtyRing::new(self.entries)?;
        let room = Arc::new(event()?);
        let wake = Arc::clone(&room);
        ring.on_reset(move || {
            // Fails only when the counter is full; then it is readable already.
            let _ = wake.write(1);
        });
        shadow.add_dirty_ring(&ring);
        lock(&self.state).members.push((Arc::clone(&ring), Owner::Running));
        Ok((Member { ring, room }, end))
    }

    /// The vCPU has ended: what is in its ring is its last. By its thread, with no lock held.
    pub(super) fn leave(&self, member: &Member, shadow: &ShadowMmu) {
        let mut state = lock(&self.state);
        for (ring, owner) in &mut state.members {
            if Arc::ptr_eq(ring, &member.ring) {
                *owner = Owner::Ended;
            }
        }
        let ended = state.members.iter().filter(|(_, owner)| *owner == Owner::Ended).count() as u64;
        if ended * u64::from(self.entries) >= ENDED_ENTRIES {
            state.collect(shadow, |owner| *owner == Owner::Ended);
        }
    }

    fn call_collector(&self) {
        // Fails only when the counter is full; then it is readable already.
        let _ = self.full.write(1);
    }

    /// Takes everything out of all rings, and makes room in them. Pages are reset before this returns: a write after it is a
    /// new entry.
    pub(super) fn collect(&self, shadow: &ShadowMmu) {
        lock(&self.state).collect(shadow, |_| true);
    }

    /// What was collected since the last time.
    pub(super) fn take_pages(&self) -> DirtyPages {
        std::mem::take(&mut lock(&self.state).pages)
    }
}

impl Member {
    /// What must become readable before the vCPU may run; `None` if it may now. To be asked anew after that. The
    /// descriptor is the member's.
    pub(super) fn held_back(&self, rings: &Rings) -> Option<RawFd> {
        // First; see above. There may be nothing to read.
        let _ = self.room.read();
        if !self.ring.is_soft_full() {
            return None;
        }
        rings.call_collector();
        Some(self.room.as_raw_fd())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed test may panic")]
    use super::*;
    use shadow_mmu::addr::{Access, Gfn, Gpa, Hva, PAGE_SIZE};
    use shadow_mmu::frame::{FramePool, FreedFrames};
    use shadow_mmu::mm::{Backing, MapFlags, Mm};
    use shadow_mmu::shadow::{
        DirtyLogConfig, DirtyMethod, DirtyRecords, FaultAroundPolicy, Initially, Memslot, NoTlb, ProtectOn,
        SlotAccess, VcpuMmu,
    };
    use shadow_mmu::table::LOWER_HALF_PAGES;

    #[test]
    fn rings_of_threads_that_end_do_not_wait_for_the_collector() {
        let mm = Mm::new(Arc::new(FramePool::new(16 << 20, FreedFrames::Poison).unwrap())).unwrap();
        let shadow = ShadowMmu::new(Arc::clone(&mm), Arc::new(NoTlb)).unwrap();
        let (pages, access) = (LOWER_HALF_PAGES, SlotAccess::ReadWrite);
        shadow.add_slot(Memslot { gfn: Gfn(0), pages, hva: Hva(0), access }).unwrap();
        let flags = MapFlags::PRIVATE | MapFlags::ANONYMOUS;
        let (len, rights) = (1000 * PAGE_SIZE, Access::READ | Access::WRITE);
        let at = mm.mmap(Hva(0), len, rights, flags, Backing::Anonymous).unwrap();
        let (method, records) = (DirtyMethod::WriteProtect, DirtyRecords::Rings);
        let (protect, initially) = (ProtectOn::Get, Initially::Clean);
        shadow.enable_dirty_log(Gfn(0), DirtyLogConfig { method, records, protect, initially }).unwrap();
        let rings = Rings::new(16384, 4096).unwrap();
        let most = (ENDED_ENTRIES / 16384) as usize;
        let mut seen = Vec::new();
        for page in 0..1000 {
            let (member, end) = rings.join(&shadow).unwrap();
            seen.push(Arc::downgrade(&member.ring));
            let mut vcpu = VcpuMmu::new(FaultAroundPolicy::Off).with_ring(end);
            shadow.fault(&mut vcpu, Gpa(at.0 + page * PAGE_SIZE), Access::WRITE).unwrap();
            rings.leave(&member, &shadow);
            assert!(lock(&rings.state).members.len() <= most, "at thread {page}");
            drop((member, vcpu));
            // Besides those that wait, the one that emptied the others and was still there itself.
            assert!(
                seen.iter().filter(|ring| ring.strong_count() > 0).count() <= most + 1,
                "at thread {page}"
            );
        }
        rings.collect(&shadow);
        let written = rings.take_pages();
        assert_eq!(written.count(), 1000, "what they wrote counts");
        assert!((0..1000).all(|page| written.contains(at.page() + page)));
        assert!(rings.take_pages().is_empty());
    }
}
