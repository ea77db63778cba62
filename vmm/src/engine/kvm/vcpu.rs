// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest thread's vCPU: into ring 3 by writing registers, out of it through the monitor, one KVM_RUN an exit.
//!
//! # Entry
//!
//! All registers travel in the page shared with KVM (KVM_CAP_SYNC_REGS). System registers are written whole on every
//! entry: an exit leaves the vCPU in ring 0, and whatever the guest loaded into its segment registers is gone with that.
//! Of the guest's flags those pass that ring 3 may choose. A rip, or a segment base, that no x86-64 program can have does
//! not reach the CPU: [`run`](Vcpu::run) reports the exception that the CPU would raise.
//!
//! # Exit
//!
//! * KVM_EXIT_IO: the guest arrived at a stub of the monitor; the port tells which. Exceptions have their frame on the
//!   vCPU's stack page. `syscall` comes with the return address in rcx and the flags in r11.
//! * On nested PVM `syscall` makes rip the value of LSTAR but leaves the CPL at 3, so that it arrives as a fault of the
//!   instruction fetch there. A guest that *jumps* to that address arrives in the same way and has made a system call
//!   that returns to what rcx says: it could have had that for less.
//! * EINTR: somebody kicked, or some other signal came. In ring 3 the registers are the guest's. In ring 0 the guest
//!   had arrived at a stub but not executed `out` yet: that is the same exit, told by rip. If the guest is on its way there
//!   (KVM holds an exception that it has not delivered yet; rip is LSTAR's), the vCPU runs on before the kick is
//!   reported: the way leads straight to a stub, while registers changed under a pending exception (a signal frame)
//!   would get it on top. Signals that nobody asked a kick with do not end `run`.
//! * ENOMEM: the host had no page left for KVM's own tables (`mmu_topup_memory_caches`), which may pass. The guest has not moved,
//!   so the same entry is tried again, after pauses that double from 1 ms to 512 ms: about a second in all, then the vCPU is
//!   lost. Whoever kicks, flushes, holds or stops the vCPU meanwhile is served at once ([`Shortage`]).
//! * EFAULT: KVM finds nothing, or not the right to it, behind a frame of an adopted mapping. Registers are those before the
//!   instruction. Behind a frame of the pool there is always something, so there EFAULT is the end of the vCPU.
//!
//! An exit that is none of these loses the vCPU. The error then carries what it was ([`VcpuSnapshot`](crate::engine::VcpuSnapshot)).
//!
//! # Cost
//!
//! Nested PVM, Linux 6.18, by `measure`: a system call or a fault and back 34 to 40 µs, from kick to return 31 µs. KVM_RUN
//! that comes back at once takes 7.5 µs; sharing general and system registers, out and in, adds 0.8 µs to it, the pending
//! events 0.3 µs more (they are fetched by ioctl instead, on kicks only). Any ioctl for registers costs 5 to 6 µs there.

use super::KvmVm;
use super::exit::{Outcome, enter, exception_in_flight, facts, in_ring3, switch_root_and_back};
use super::monitor::{Arrival, SYSCALL_ENTRY};
use super::raw_vcpu::{CR4_TSD, RawVcpu};
use super::snapshot::snapshot;
use crate::engine::exception::{GENERAL_PROTECTION, INVALID_OPCODE, PAGE_FAULT, int_gate};
use crate::engine::kick::{Kicker, Requests};
use crate::engine::regs::{FOUR_LEVELS, with_general_registers};
use crate::engine::shortage::{Next, Shortage};
use crate::engine::{EngineError, Exit, Kick, Regs, TimeStamps, Vcpu};
use kvm_bindings::kvm_regs;
use kvm_ioctls::SyncReg;
use shadow_mmu::addr::{Access, Gpa, PAGE_SIZE, Pfn};
use shadow_mmu::shadow::Walker;
use shadow_mmu::table::LOWER_HALF_PAGES;
use std::io;
use std::sync::Arc;

/// First address above the lower half.
const LOWER_HALF_END: u64 = LOWER_HALF_PAGES * PAGE_SIZE;

/// Vectors that say the monitor is broken, or the machine: NMI, double fault, invalid TSS, machine check.
const FATAL_VECTORS: [u8; 4] = [2, 8, 10, 18];

/// Bits of a page fault's error code.
const FAULT_WRITE: u32 = 1 << 1;
const FAULT_USER: u32 = 1 << 2;
const FAULT_RESERVED: u32 = 1 << 3;
const FAULT_FETCH: u32 = 1 << 4;

pub(super) fn from_kvm(regs: &kvm_regs, fs_base: u64, gs_base: u64) -> Regs {
    with_general_registers!(regs, Regs { rflags: regs.rflags, fs_base, gs_base })
}

/// One virtual CPU of a [`KvmVm`], over one root table.
#[derive(Debug)]
pub struct KvmVcpu {
    /// `None` once KVM's state of it cannot be trusted any more.
    raw: Option<RawVcpu>,
    vm: Arc<KvmVm>,
    walker: Walker,
    kicker: Arc<Kicker>,
    regs: Regs,
    /// KVM_RUNs in a row for which the host had no memory.
    shortage: Shortage,
    time_stamps: TimeStamps,
}

impl TimeStamps {
    /// Calls `enter` with the thread's own `rdtsc` as the guest's is to be. `enter` reads no clock: reading one is `rdtsc` too.
    ///
    /// The guest's CR4.TSD asks for the trap. Where the guest runs under the CR4 of who runs KVM (nested PVM, Linux 6.18) that has
    /// no effect, but the thread's own setting has (`prctl(PR_SET_TSC)`); so both are used.
    pub(super) fn around<T>(self, enter: impl FnOnce() -> T) -> T {
        if self == Self::OfTheCpu {
            return enter();
        }
        own_time_stamps(libc::PR_TSC_SIGSEGV);
        let result = enter();
        own_time_stamps(libc::PR_TSC_ENABLE);
        result
    }
}

/// Sets what `rdtsc` does in this thread.
fn own_time_stamps(setting: libc::c_int) {
    // SAFETY: takes a number and changes nothing but this thread's `rdtsc`; where the host has no such setting, nothing.
    unsafe { libc::prctl(libc::PR_SET_TSC, setting) };
}

impl KvmVcpu {
    pub(super) fn new(raw: RawVcpu, vm: Arc<KvmVm>, root: Pfn) -> Self {
        let lease = raw.state.begin_lease();
        let kicker =
            Arc::new(Kicker { state: Arc::clone(&raw.state), lease, faults: vm.flusher.faults.get() });
        let walker = Walker::new(Arc::clone(vm.monitor.pool()), root);
        let (regs, shortage, time_stamps) = Default::default();
        Self { raw: Some(raw), vm, walker, kicker, regs, shortage, time_stamps }
    }

    /// KVM's part, for `what`.
    fn raw(&self, what: &str) -> Result<&RawVcpu, EngineError> {
        let raw = self.raw.as_ref();
        raw.ok_or_else(|| EngineError::lost(what, io::Error::other("the vCPU failed before")))
    }

    #[cfg(test)]
    pub(super) fn raw_mut(&mut self) -> &mut RawVcpu {
        self.raw.as_mut().unwrap()
    }

    /// Runs until there is something to report. Every error is the end of this vCPU.
    fn drive(&mut self) -> Result<Exit, EngineError> {
        let raw = self
            .raw
            .as_mut()
            .ok_or_else(|| EngineError::lost("KVM_RUN", io::Error::other("the vCPU failed before")))?;
        let mut sregs = raw.ring3(self.walker.root().offset(), self.regs.fs_base, self.regs.gs_base);
        if self.time_stamps == TimeStamps::Trapped {
            sregs.cr4 |= CR4_TSD;
        }
        let sync = raw.fd.sync_regs_mut();
        sync.regs = with_general_registers!(self.regs, kvm_regs { rflags: self.regs.entry_flags() });
        sync.sregs = sregs;
        raw.fd.set_sync_dirty_reg(SyncReg::Register);
        raw.fd.set_sync_dirty_reg(SyncReg::SystemRegister);
        let mut deferred = Requests::empty();
        loop {
            if let Err(requests) = raw.state.enter(deferred) {
                if requests.contains(Requests::STOP) {
                    return Err(EngineError::lost(
                        "the VM was stopped",
                        io::Error::other("flushing translations failed"),
                    ));
                }
                if requests.contains(Requests::FLUSH) {
                    // Taken before it is served: one that comes meanwhile is served again.
                    raw.state.take(Requests::FLUSH);
                    switch_root_and_back(raw, self.vm.monitor.bare_root())?;
                    continue;
                }
                if requests.contains(Requests::HOLD) {
                    raw.state.take(Requests::HOLD);
                    self.vm.flusher.wait_until_released();
                    continue;
                }
                raw.state.take(Requests::KICK);
                return Ok(Exit::Kicked);
            }
            let outcome = enter(raw, &self.kicker.faults, self.time_stamps);
            raw.state.leave();
            let outcome = match outcome {
                Outcome::NoMemory(error) => {
                    match self.shortage.sit_out(|| raw.state.wants(Requests::all() - deferred)) {
                        // Like an interrupted one, it has left the registers as they were.
                        Next::Again => Outcome::Interrupted,
                        Next::GiveUp => return Err(error),
                    }
                }
                came_back => {
                    self.shortage = Shortage::default();
                    came_back
                }
            };
            let arrival = match outcome {
                Outcome::Port(port) => Arrival::by_port(port),
                Outcome::Interrupted if !in_ring3(raw) => Arrival::by_rip(raw.fd.sync_regs_mut().regs.rip),
                Outcome::Interrupted => {
                    store(&mut self.regs, raw);
                    let on_the_way = self.regs.rip == SYSCALL_ENTRY
                        || raw.state.wants(Requests::KICK) && exception_in_flight(raw)?;
                    deferred = if on_the_way { Requests::KICK } else { Requests::empty() };
                    continue;
                }
                Outcome::NotEmulated => {
                    store(&mut self.regs, raw);
                    return Ok(Exit::Exception { vector: INVALID_OPCODE, error_code: 0 });
                }
                Outcome::Unreachable(gpa, error) => {
                    // Of the pool's memory all is always there; an adopted mapping is the host's to take away.
                    let adopted = self.vm.may_be_adopted(gpa);
                    if !adopted || !in_ring3(raw) {
                        return Err(error);
                    }
                    store(&mut self.regs, raw);
                    return Ok(Exit::HostFault { pfn: gpa.map(|gpa| Pfn((gpa / PAGE_SIZE) as u32)) });
                }
                Outcome::NoMemory(error) | Outcome::Failed(error) => return Err(error),
            };
            store(&mut self.regs, raw);
            return match arrival {
                Some(Arrival::Syscall) => Ok(self.syscall()),
                Some(Arrival::Exception(vector)) => self.exception(vector),
                None => {
                    let facts = facts(raw);
                    Err(EngineError::lost(
                        format!("an exit from nowhere {facts}"),
                        io::Error::other("not a stub of the monitor"),
                    ))
                }
            };
        }
    }

    /// Makes the registers those behind a `syscall` instruction.
    fn syscall(&mut self) -> Exit {
        self.regs.rip = self.regs.rcx;
        self.regs.rflags = self.regs.r11;
        Exit::Syscall
    }

    /// Reads the frame of an exception and makes the registers those of the guest.
    fn exception(&mut self, vector: u8) -> Result<Exit, EngineError> {
        let Some(raw) = self.raw.as_mut() else {
            return Err(EngineError::lost("reading a frame", io::Error::other("no vCPU")));
        };
        let frame = self.vm.monitor.exception_frame(raw.pages, vector);
        let cr2 = raw.fd.sync_regs_mut().sregs.cr2;
        let error_code = frame.error_code;
        // A reserved bit below is umbra's own broken entry. Above, where nested PVM has tables of its own, it is what a
        // guest sees of those.
        let reserved = vector == PAGE_FAULT && error_code & FAULT_RESERVED != 0 && cr2 < LOWER_HALF_END;
        if frame.cs & 3 != 3 || reserved || FATAL_VECTORS.contains(&vector) {
            let facts = facts(raw);
            let what = format!("vector {vector}, error code {error_code:#x}, frame {frame:x?}, cr2 {cr2:#x}");
            return Err(EngineError::lost(
                format!("an exception that no guest can cause {facts}"),
                io::Error::other(what),
            ));
        }
        self.regs.rip = frame.rip;
        self.regs.rsp = frame.rsp;
        self.regs.rflags = frame.rflags;
        if vector == INVALID_OPCODE
            && let Some(error_code) = int_gate(&self.walker, frame.rip)
        {
            // Natively a program that does it gets SIGSEGV, not SIGILL.
            return Ok(Exit::Exception { vector: GENERAL_PROTECTION, error_code });
        }
        if vector != PAGE_FAULT {
            return Ok(Exit::Exception { vector, error_code });
        }
        if frame.rip == SYSCALL_ENTRY && cr2 == SYSCALL_ENTRY {
            return Ok(self.syscall());
        }
        if error_code & FAULT_USER == 0 {
            // An access that ring 3 does not make itself. The tables it could be about are all mapped, so it is one that
            // SMAP refuses (some emulated CPUs make the stack accesses of iretq and far returns this way); mapping more
            // would not help it.
            return Ok(Exit::Exception { vector: GENERAL_PROTECTION, error_code: 0 });
        }
        let access = match error_code {
            code if code & FAULT_FETCH != 0 => Access::EXEC,
            code if code & FAULT_WRITE != 0 => Access::WRITE,
            _ => Access::READ,
        };
        Ok(Exit::PageFault { addr: Gpa(cr2), access })
    }
}

/// Takes over the registers that KVM wrote to the shared page.
fn store(regs: &mut Regs, raw: &mut RawVcpu) {
    let sync = raw.fd.sync_regs_mut();
    *regs = from_kvm(&sync.regs, sync.sregs.fs.base, sync.sregs.gs.base);
}

impl Vcpu for KvmVcpu {
    fn run(&mut self) -> Result<Exit, EngineError> {
        // Of a vCPU that is lost the registers are what is left of them.
        if self.raw.is_some()
            && let Some(exit) = self.regs.refused(FOUR_LEVELS)
        {
            return Ok(exit);
        }
        self.drive().map_err(|error| {
            // Whatever is to be known of it is read now: nobody asks it again.
            let snapshot =
                self.raw.take().map(|mut raw| Box::new(snapshot(&mut raw, &self.vm.monitor, self.regs)));
            EngineError { snapshot, ..error }
        })
    }

    fn regs(&self) -> &Regs {
        &self.regs
    }

    fn regs_mut(&mut self) -> &mut Regs {
        &mut self.regs
    }

    fn set_time_stamps(&mut self, time_stamps: TimeStamps) {
        self.time_stamps = time_stamps;
    }

    fn xsave(&self) -> Result<Vec<u8>, EngineError> {
        let raw = self.raw("KVM_GET_XSAVE")?;
        raw.fpu.get(&raw.fd).map_err(|source| EngineError::lost("KVM_GET_XSAVE", source))
    }

    fn set_xsave(&mut self, state: &[u8]) -> Result<(), EngineError> {
        let raw = self.raw("KVM_SET_XSAVE")?;
        raw.fpu.set(&raw.fd, state).map_err(|source| EngineError::lost("KVM_SET_XSAVE", source))
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        Arc::<Kicker>::clone(&self.kicker)
    }
}

impl Drop for KvmVcpu {
    fn drop(&mut self) {
        if let Some(raw) = self.raw.take() {
            self.vm.park(raw);
        }
    }
}
