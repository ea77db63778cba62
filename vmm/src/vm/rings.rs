// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The dirty rings of a machine's vCPUs: who waits for whom.
//!
//! ```text
//! vCPU thread: pushes ─► soft-full? ─► writes `full`, polls `room` ───────────────► enters the guest
//! event loop:                          reads `full` ─► harvest ─► reset ─► writes `room`
//! ```
//! A vCPU drains `room` *before* it looks whether its ring is full, and the reset writes `room` *after* it has made room; so either
//! the look finds room, or the poll returns. It polls beside its waker's descriptor, as a guest thread that waits in a system call,
//! so signals and the guest's end reach it.
//!
//! # Locks
//! `members`, above the shadow map's list of rings. Held while rings are harvested and reset, so that a ring whose vCPU has ended by then
//! is empty afterwards, and goes. Rings of ended vCPUs that wait for that are bounded: from [`ENDED_MOST`] on the collector is called.

use super::lock;
use anyhow::{Context, Result};
use shadow_mmu::shadow::{DirtyGfn, DirtyRing, ShadowMmu, VcpuRing};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex};
use vmm_sys_util::eventfd::EventFd;

/// Rings of ended vCPUs that may wait for the next collection.
const ENDED_MOST: usize = 64;

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
    members: Mutex<Vec<(Arc<DirtyRing>, Owner)>>,
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
    /// No ring yet; each will have `entries` entries.
    pub(super) fn new(entries: u32) -> Result<Self> {
        Ok(Self { entries, full: event()?, members: Mutex::default() })
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
        lock(&self.members).push((Arc::clone(&ring), Owner::Running));
        Ok((Member { ring, room }, end))
    }

    /// The vCPU has ended: what is in its ring is its last.
    pub(super) fn leave(&self, member: &Member) {
        let mut members = lock(&self.members);
        for (ring, owner) in members.iter_mut() {
            if Arc::ptr_eq(ring, &member.ring) {
                *owner = Owner::Ended;
            }
        }
        if members.iter().filter(|(_, owner)| *owner == Owner::Ended).count() >= ENDED_MOST {
            self.call_collector();
        }
    }

    fn call_collector(&self) {
        // Fails only when the counter is full; then it is readable already.
        let _ = self.full.write(1);
    }

    /// Takes everything out of all rings, and makes room in them. Pages are reset before this returns: a write after it is a
    /// new entry.
    pub(super) fn collect(&self, shadow: &ShadowMmu, mut visit: impl FnMut(DirtyGfn)) {
        let mut members = lock(&self.members);
        for (ring, _) in members.iter() {
            ring.harvest(&mut visit);
        }
        shadow.reset_dirty_rings();
        members.retain(|(_, owner)| *owner == Owner::Running);
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
