// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A thread of the guest and the loop that runs it: enter, see why the vCPU stopped, do what is needed, enter again.
//!
//! One host thread drives one [`Thread`] on one vCPU. Everything in here belongs to that thread; what others may touch of
//! it is in the [`group`](super::group) and in its [`Waker`].

use super::errno::Errno;
use super::group::ExitStatus;
use super::process::Process;
use super::restart::Restart;
use super::robust::RobustList;
use super::signal::deliver::{Cause, Flow, Forced, Interrupted};
use super::signal::{AltStack, SigInfo, SigSet, Signal, Trap};
use super::syscall;
use super::waker::{Parked, Waker};
use super::{Fault, FaultHandler, HostFault};
use crate::deterministic::Leaving;
use crate::engine::exception::{
    ALIGNMENT, BREAKPOINT, DEBUG, DIVIDE_ERROR, GENERAL_PROTECTION, INVALID_OPCODE, PAGE_FAULT,
    SEGMENT_NOT_PRESENT, SIMD, STACK_SEGMENT, X87,
};
use crate::engine::{EngineError, Exit, Vcpu};
use crate::inject::points::TIMER;
use shadow_mmu::addr::{Access, Gpa, LINUX_TASK_SIZE, PAGE_SIZE, Pfn};
use shadow_mmu::inject::Effect;
use std::sync::Arc;
use std::time::Instant;

const SEGV_MAPERR: i32 = 1;
const SEGV_ACCERR: i32 = 2;
const BUS_ADRERR: i32 = 2;
const BUS_MCEERR_AR: i32 = 4;

/// A thread of the guest, before and while it runs. Dropping it takes it out of its process.
#[derive(Debug)]
pub struct Thread {
    pub(super) process: Arc<Process>,
    pub(super) tid: i32,
    pub(super) waker: Arc<Waker>,
    /// `comm`: up to 15 bytes and a NUL.
    pub(super) name: [u8; 16],
    /// Where to store 0 and wake a futex when the thread ends (`CLONE_CHILD_CLEARTID`); 0 for nowhere.
    pub(super) clear_child_tid: u64,
    pub(super) robust_list: RobustList,
    pub(super) alt_stack: AltStack,
    /// The last exception, for signal frames.
    pub(super) trap: Trap,
    /// The mask to go back to after a call that changed it for its own duration.
    pub(super) saved_mask: Option<SigSet>,
    /// A system call whose result depends on what signals there are.
    pub(super) interrupted: Option<Interrupted>,
    /// What `restart_syscall` continues.
    pub(super) restart: Restart,
    /// The thread has said `exit`.
    pub(super) exit_code: Option<i32>,
}

impl Thread {
    pub(super) fn new(process: Arc<Process>, tid: i32, waker: Arc<Waker>, name: [u8; 16]) -> Self {
        Self {
            process,
            tid,
            waker,
            name,
            clear_child_tid: 0,
            robust_list: RobustList::default(),
            alt_stack: AltStack::default(),
            trap: Trap::default(),
            saved_mask: None,
            interrupted: None,
            restart: Restart::None,
            exit_code: None,
        }
    }

    /// The thread's id, as the guest sees it. That of the main thread is the process's pid.
    pub fn tid(&self) -> i32 {
        self.tid
    }

    /// What must be dropped when everything else of the thread is gone: its seat in deterministic mode.
    pub fn leaving(&self) -> Option<Leaving> {
        self.waker.seat().map(|seat| Leaving(Arc::clone(seat)))
    }

    /// Runs the thread on `vcpu`, whose registers are set, until the thread or the process ends.
    ///
    /// # Errors
    /// [`EngineError`]: the vCPU is lost. The process has been ended by SIGKILL then.
    pub fn run(mut self, vcpu: &mut dyn Vcpu, faults: &mut dyn FaultHandler) -> Result<(), EngineError> {
        self.waker.attach(vcpu.kicker());
        if let Some(seat) = self.waker.seat() {
            seat.begin();
        }
        let result = self.until_it_ends(vcpu, faults);
        // From here on the thread makes system calls only on its own behalf; nobody needs its vCPU any more.
        self.waker.detach();
        if let Err(error) = &result {
            // First: the process's memory goes with it.
            self.process.host().vcpu_lost(self.tid, error);
            self.process.end(ExitStatus::Signaled(libc::SIGKILL));
        }
        self.release_user_memory();
        result
    }

    fn until_it_ends(
        &mut self,
        vcpu: &mut dyn Vcpu,
        faults: &mut dyn FaultHandler,
    ) -> Result<(), EngineError> {
        loop {
            if let Some(seat) = self.waker.seat() {
                seat.turn();
            }
            let mut flow = self.settle(vcpu)?;
            if flow == Flow::Enter && self.wait_if_held_back(faults) {
                // A signal may have come meanwhile.
                continue;
            }
            if flow == Flow::Enter {
                flow = match self.enter(vcpu)? {
                    Exit::Kicked => Flow::Enter,
                    Exit::Syscall => syscall::handle(self, vcpu)?,
                    Exit::PageFault { addr, access } => self.page_fault(vcpu, faults, addr, access)?,
                    Exit::HostFault { pfn } => self.host_fault(vcpu, faults, pfn)?,
                    Exit::Exception { vector: GENERAL_PROTECTION, error_code: 0 }
                        if self.answer_time_stamp(vcpu) =>
                    {
                        Flow::Enter
                    }
                    Exit::Exception { vector, error_code } => self.exception(vcpu, vector, error_code)?,
                };
            }
            if flow == Flow::Leave {
                return Ok(());
            }
        }
    }

    /// Waits while the vCPU must not run, or until the thread is wanted for something else; whether it did.
    fn wait_if_held_back(&self, faults: &mut dyn FaultHandler) -> bool {
        let Some(fd) = faults.held_back() else { return false };
        let mut ready = [libc::pollfd { fd, events: libc::POLLIN, revents: 0 }];
        if let Err(error) = self.poll(&mut ready, None)
            && error != Errno::EINTR
        {
            log::debug!("waiting to enter the guest failed and is tried again: {error}");
        }
        true
    }

    fn page_fault(
        &mut self,
        vcpu: &mut dyn Vcpu,
        faults: &mut dyn FaultHandler,
        addr: Gpa,
        access: Access,
    ) -> Result<Flow, EngineError> {
        match faults.fault(addr, access) {
            Fault::Resolved => Ok(Flow::Enter),
            Fault::NoMapping => self.refuse(vcpu, addr, access, (Signal::SEGV, SEGV_MAPERR)),
            Fault::NoAccess => self.refuse(vcpu, addr, access, (Signal::SEGV, SEGV_ACCERR)),
            Fault::BusError => self.refuse(vcpu, addr, access, (Signal::BUS, BUS_ADRERR)),
            Fault::Poisoned => self.refuse(vcpu, addr, access, (Signal::BUS, BUS_MCEERR_AR)),
            Fault::OutOfMemory => {
                let cause = Cause { vector: PAGE_FAULT, access: Some((addr, access)) };
                self.out_of_memory(vcpu, Some(cause))
            }
        }
    }

    /// The signal for an access that cannot be made possible.
    fn refuse(
        &mut self,
        vcpu: &mut dyn Vcpu,
        addr: Gpa,
        access: Access,
        (signal, code): (Signal, i32),
    ) -> Result<Flow, EngineError> {
        // The error code as the CPU gives it: present, write, user, instruction fetch. What Linux has at its own addresses it does
        // not tell (`sanitize_error_code`).
        let is_present = signal == Signal::SEGV && code == SEGV_ACCERR || addr.0 >= LINUX_TASK_SIZE;
        let error_code = u64::from(is_present)
            | u64::from(access.contains(Access::WRITE)) << 1
            | 1 << 2
            | u64::from(access.contains(Access::EXEC)) << 4;
        let trap = Trap { vector: PAGE_FAULT.into(), error_code, cr2: addr.0 };
        let mut info = SigInfo::fault(signal, code, addr.0);
        if (signal, code) == (Signal::BUS, BUS_MCEERR_AR) {
            info = info.with_failed_bits(PAGE_SIZE.ilog2());
        }
        let cause = Cause { vector: PAGE_FAULT, access: Some((addr, access)) };
        self.fault(vcpu, Forced { signal, info, trap, cause: Some(cause) })
    }

    fn host_fault(
        &mut self,
        vcpu: &mut dyn Vcpu,
        faults: &mut dyn FaultHandler,
        pfn: Option<Pfn>,
    ) -> Result<Flow, EngineError> {
        match faults.host_fault(pfn) {
            HostFault::Retry => Ok(Flow::Enter),
            // Whether it was a load or a store the host does not say.
            HostFault::Unreachable(Some(addr)) => {
                self.refuse(vcpu, addr, Access::READ, (Signal::BUS, BUS_ADRERR))
            }
            HostFault::Unreachable(None) => {
                let trap = Trap { vector: PAGE_FAULT.into(), error_code: 1 << 2, cr2: 0 };
                let info = SigInfo::fault(Signal::BUS, BUS_ADRERR, 0);
                let cause = Some(Cause { vector: PAGE_FAULT, access: None });
                self.fault(vcpu, Forced { signal: Signal::BUS, info, trap, cause })
            }
        }
    }

    /// `arch/x86/kernel/traps.c`, as far as ring 3 can cause it.
    fn exception(&mut self, vcpu: &mut dyn Vcpu, vector: u8, error_code: u32) -> Result<Flow, EngineError> {
        const FPE_INTDIV: i32 = 1;
        const FPE_FLTINV: i32 = 7;
        const ILL_ILLOPN: i32 = 2;
        const TRAP_TRACE: i32 = 2;
        const BUS_ADRALN: i32 = 1;
        let rip = vcpu.regs().rip;
        let (signal, info) = match vector {
            DIVIDE_ERROR => (Signal::FPE, SigInfo::fault(Signal::FPE, FPE_INTDIV, rip)),
            DEBUG => (Signal::TRAP, SigInfo::fault(Signal::TRAP, TRAP_TRACE, rip)),
            BREAKPOINT => (Signal::TRAP, SigInfo::kernel(Signal::TRAP)),
            INVALID_OPCODE => (Signal::ILL, SigInfo::fault(Signal::ILL, ILL_ILLOPN, rip)),
            X87 | SIMD => {
                let code = fpu_error(&vcpu.xsave()?, vector).unwrap_or(FPE_FLTINV);
                (Signal::FPE, SigInfo::fault(Signal::FPE, code, rip))
            }
            ALIGNMENT => (Signal::BUS, SigInfo::fault(Signal::BUS, BUS_ADRALN, 0)),
            SEGMENT_NOT_PRESENT | STACK_SEGMENT => (Signal::BUS, SigInfo::kernel(Signal::BUS)),
            // General protection, #OF, #BR and whatever else: no address that could be told.
            _ => (Signal::SEGV, SigInfo::kernel(Signal::SEGV)),
        };
        let trap = Trap { vector: vector.into(), error_code: error_code.into(), cr2: self.trap.cr2 };
        self.fault(vcpu, Forced { signal, info, trap, cause: Some(Cause { vector, access: None }) })
    }

    /// Waits until `done` (which is announced through [`Waker::notify`]), for a signal that is really to be taken, or
    /// until `deadline`; `None` for ever.
    pub(super) fn sleep(&self, deadline: Option<Instant>, done: impl Fn() -> bool) -> Parked {
        let deadline = self.maybe_late(deadline);
        loop {
            match self.waker.park(deadline, &done) {
                // Perhaps another thread took the signal meanwhile.
                Parked::Interrupted if !self.is_wanted() => {}
                parked => return parked,
            }
        }
    }

    /// The host's `poll`, with the same rules. `deadline`: `None` for ever.
    ///
    /// # Errors
    /// `EINTR`: a signal is to be taken. Otherwise the host's.
    pub(super) fn poll(&self, fds: &mut [libc::pollfd], deadline: Option<Instant>) -> Result<usize, Errno> {
        let deadline = self.maybe_late(deadline);
        loop {
            match self.waker.poll(fds, deadline) {
                Err(Errno::EINTR) if !self.is_wanted() => {}
                result => return result,
            }
        }
    }

    /// The deadline of a wait that begins now, or a later one where timers are injected into. One that is reached already is no
    /// timer's: whoever asks what is ready does not wait.
    fn maybe_late(&self, deadline: Option<Instant>) -> Option<Instant> {
        let faults = self.process.mm().faults();
        if !faults.are_armed() || deadline.is_none_or(|deadline| deadline <= self.process.clock().now()) {
            return deadline;
        }
        match faults.hit(&TIMER) {
            Effect::Late(delay) => deadline.and_then(|deadline| deadline.checked_add(delay)),
            _ => deadline,
        }
    }

    fn is_wanted(&self) -> bool {
        self.process.group().refresh(self.tid)
    }

    /// What a thread leaves behind in memory for others to find (`mm_release`).
    fn release_user_memory(&mut self) {
        self.release_robust_list();
        let addr = std::mem::take(&mut self.clear_child_tid);
        let others_live = self.process.group().len() > 1;
        if addr != 0 && others_live {
            // As on Linux: an address that is not there is the program's affair.
            let _ = self.process.user().write_u32(addr, 0);
            self.process.futexes().wake_one(addr);
        }
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        self.waker.detach();
        if std::thread::panicking() {
            // A bug of ours took the thread away; without it the others might wait for ever.
            self.process.end(ExitStatus::Signaled(libc::SIGKILL));
        }
        self.process.thread_left(self.tid, self.exit_code.unwrap_or(0));
    }
}

/// `si_code` for a floating-point exception, from the state it left (`fpu__exception_code`).
fn fpu_error(xsave: &[u8], vector: u8) -> Option<i32> {
    let word = |at: usize| Some(u32::from_le_bytes(xsave.get(at..at + 4)?.try_into().ok()?));
    let pending = match vector {
        X87 => {
            let control_and_status = word(0)?;
            (control_and_status >> 16) & !control_and_status
        }
        _ => {
            let mxcsr = word(24)?;
            !(mxcsr >> 7) & mxcsr
        }
    };
    const INVALID: u32 = 1;
    const DENORMAL: u32 = 2;
    const DIVIDE: u32 = 4;
    const OVERFLOW: u32 = 8;
    const UNDERFLOW: u32 = 16;
    const PRECISION: u32 = 32;
    Some(match () {
        () if pending & INVALID != 0 => 7,
        () if pending & DIVIDE != 0 => 3,
        () if pending & OVERFLOW != 0 => 4,
        () if pending & (DENORMAL | UNDERFLOW) != 0 => 5,
        () if pending & PRECISION != 0 => 6,
        () => return None,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed test may panic")]
    use crate::engine::Exit;
    use crate::guest::ExitStatus;
    use crate::guest::testing::Fixture;

    #[test]
    fn a_thread_that_is_held_back_can_be_ended() {
        let fixture = Fixture::new();
        fixture.host.hold.hold(&fixture.main);
        fixture.process.kill(libc::SIGKILL);
        assert!(fixture.main.finish().is_none(), "it entered the guest");
        assert_eq!(fixture.join(), ExitStatus::Signaled(libc::SIGKILL));
    }

    #[test]
    fn a_thread_that_is_held_back_takes_signals() {
        let fixture = Fixture::new();
        fixture.handle(libc::SIGUSR1, 0);
        let stack = fixture.map_pages(8) + 8 * 4096;
        fixture.main.step(move |regs| {
            regs.rsp = stack;
            Exit::Kicked
        });
        let other = fixture.new_thread();
        // So that it is in the guest, and does not ask in the main thread's place.
        other.regs();
        fixture.host.hold.hold(&fixture.main);
        let (pid, tid) = (fixture.process.pid() as u64, fixture.main.tid as u64);
        assert_eq!(other.call(libc::SYS_tgkill, &[pid, tid, libc::SIGUSR1 as u64]), 0);
        // The descriptor is not readable yet; what it enters the guest for is the handler.
        let regs = fixture.main.finish().unwrap();
        assert_eq!((regs.rip, regs.rdi), (0x40_1000, libc::SIGUSR1 as u64));
    }
}
