// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What happens to the page faults of a vCPU: the shadow map resolves them, the clock runs meanwhile.
//!
//! A [`VcpuFaults`] belongs to the vCPU's thread. It shares the machine with the others and locks none of it but what the
//! shadow map itself locks; the machine's sum of [`Stalls`] is locked once, when the thread ends.

use super::memory_faults::Flips;
use super::rings::Member;
use super::{Machine, lock};
use crate::guest::{Fault, FaultHandler, HostFault};
use crate::stalls::{StallCause, Stalls};
use anyhow::Result;
use shadow_mmu::addr::{Access, Gpa, Hva, Pfn};
use shadow_mmu::mm::FaultError;
use shadow_mmu::shadow::VcpuMmu;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Resolves the page faults of one vCPU.
#[derive(Debug)]
pub(super) struct VcpuFaults {
    machine: Arc<Machine>,
    /// The guest's thread.
    tid: i32,
    mmu: VcpuMmu,
    /// Where writes are logged in rings.
    ring: Option<Member>,
    stalls: Stalls,
    /// Since when the ring has been full.
    full_since: Option<Instant>,
    /// Host faults since the last fault of another kind.
    host_faults: u32,
}

impl VcpuFaults {
    /// For a vCPU of `machine` that has run nothing so far, and will run thread `tid`.
    ///
    /// # Errors
    /// No descriptor left for its dirty ring.
    pub(super) fn new(machine: &Arc<Machine>, tid: i32) -> Result<Self> {
        let mut mmu = VcpuMmu::new(machine.config.fault_around);
        let mut ring = None;
        if let Some(rings) = &machine.rings {
            let (member, end) = rings.join(&machine.shadow)?;
            mmu = mmu.with_ring(end);
            ring = Some(member);
        }
        let (machine, stalls) = (Arc::clone(machine), Stalls::default());
        Ok(Self { machine, tid, mmu, ring, stalls, full_since: None, host_faults: 0 })
    }
}

impl Drop for VcpuFaults {
    /// The thread ends: what it counted becomes the machine's.
    fn drop(&mut self) {
        // Ended while its ring was full: it waited all the same.
        if let Some(since) = self.full_since.take() {
            self.stalls.record(StallCause::RingFull, since.elapsed());
        }
        lock(&self.machine.stalls).add(self.tid, &self.stalls);
        if let (Some(rings), Some(ring)) = (&self.machine.rings, &self.ring) {
            rings.leave(ring, &self.machine.shadow);
        }
    }
}

impl VcpuFaults {
    /// Most often a change of the mapping is under way, and settling it takes the leaf away: the access faults anew, and finds
    /// the mapping at its new place or gone. What is there but cannot be reached is tried a few times, for the host may
    /// be about to give it back. A guest may live on SIGBUS, so only the first is told.
    fn settle(&mut self, pfn: Option<Pfn>) -> HostFault {
        const TRIES: u32 = 64;
        // Short: what the thread is told meanwhile, to end for example, it hears when this returns.
        const PATIENCE: Duration = Duration::from_millis(20);
        self.host_faults += 1;
        log::debug!("the host has nothing at frame {pfn:x?}, {} in a row", self.host_faults);
        let watch = lock(&self.machine.watch).clone();
        match watch.map(|watch| watch.settle(PATIENCE)) {
            None | Some(Ok(())) => {}
            Some(Err(error)) if error.kind() == std::io::ErrorKind::TimedOut => {
                // Others go on changing what is adopted; this page may be next. Not a try that tells anything.
                self.host_faults -= 1;
                return HostFault::Retry;
            }
            Some(Err(error)) => log::error!("changes of adopted memory cannot be settled: {error}"),
        }
        if self.host_faults <= TRIES {
            return HostFault::Retry;
        }
        self.host_faults = 0;
        let at = pfn.and_then(|pfn| self.machine.mm.adopted_at(pfn));
        self.machine.told_unreachable.call_once(|| {
            let page = match at {
                Some(at) => format!("the page of adopted memory at {at}"),
                None => "a page of adopted memory that the engine does not name".to_owned(),
            };
            log::warn!(
                "the guest gets SIGBUS: the host could not reach {page} in {TRIES} tries, with all changes of adopted \
                 memory settled before each; it was mprotected, or lies beyond the end of its file (told once)"
            );
        });
        HostFault::Unreachable(at.map(|at| Gpa(at.0)))
    }
}

impl FaultHandler for VcpuFaults {
    fn fault(&mut self, addr: Gpa, access: Access) -> Fault {
        self.host_faults = 0;
        let began = Instant::now();
        let hva = Hva(addr.0);
        let mut flips = Flips::default();
        if self.machine.config.faults.are_armed() {
            let alone;
            (alone, flips) = self.machine.memory_faults.page(&self.machine, hva);
            self.mmu.keep_alone(alone);
        }
        let result = self.machine.shadow.fault(&mut self.mmu, addr, access);
        let cause = result.as_ref().map_or(StallCause::Refused, StallCause::of);
        self.stalls.record(cause, began.elapsed());
        match result {
            Ok(_) => {
                flips.finish(&self.machine, hva);
                Fault::Resolved
            }
            Err(FaultError::NoMapping) => Fault::NoMapping,
            Err(FaultError::NoAccess) => Fault::NoAccess,
            Err(FaultError::BusError) => Fault::BusError,
            Err(FaultError::Poisoned) => Fault::Poisoned,
            Err(FaultError::OutOfMemory) => Fault::OutOfMemory,
        }
    }

    fn held_back(&mut self) -> Option<RawFd> {
        let (Some(rings), Some(ring)) = (&self.machine.rings, &self.ring) else { return None };
        let held = ring.held_back(rings);
        match (held, self.full_since) {
            (None, Some(since)) => {
                self.full_since = None;
                self.stalls.record(StallCause::RingFull, since.elapsed());
            }
            (Some(_), None) => self.full_since = Some(Instant::now()),
            _ => {}
        }
        held
    }

    fn host_fault(&mut self, pfn: Option<Pfn>) -> HostFault {
        let began = Instant::now();
        let result = self.settle(pfn);
        self.stalls.record(StallCause::HostFault, began.elapsed());
        result
    }
}
