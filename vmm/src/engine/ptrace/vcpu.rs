// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest thread's vCPU: a thread of the guest's process, traced by the thread that runs this.
//!
//! # Entry and exit
//! All registers are written before each entry: while the thread was outside it may have made calls for the engine. System calls are
//! stops and are not carried out (PTRACE_SYSEMU). Faults are stops before SIGSEGV: the TLB is filled from the shadow map where that
//! allows the access, and the thread goes on; else it is a page fault of the guest, after which the entry is filled ahead, for the
//! access is about to be repeated.
//!
//! # Attaching
//! A tracee belongs to the *thread* that traces it, and a vCPU is made by another than runs it. So the thread of the process waits in
//! the stub, traced by nobody, until the vCPU is first run or dropped. The filter holds it meanwhile, and it executes nothing but the
//! stub.
//!
//! # Cost
//! By `umbra bench syscall` and `umbra bench fault`. A stop and back is four system calls and two switches between threads: set
//! registers, resume, wait, get registers; a fault has one more for what the signal says, and for the fill four more, two switches and
//! one call in the process.

use super::PtraceVm;
use super::access::AccessDecoder;
use super::faults::{CODE_BYTES, TakenForRead};
use super::gone::gone;
use super::interrupt::TraceeInterrupt;
use super::pair::Pair;
use super::snapshot::snapshot;
use super::stop::{self, Meaning};
use super::tlb::{forget_own, set_own};
use super::tracee::{Resume, Stop, Tracee, USER_CS, plain_registers};
use crate::engine::entry::{Injected, NO_REASON, injected};
use crate::engine::exception::{GENERAL_PROTECTION, int_gate};
use crate::engine::kick::{Kicker, Requests, RunState};
use crate::engine::regs::with_general_registers;
use crate::engine::shortage::{Next, Shortage};
use crate::engine::{EngineError, Exit, Kick, Regs, TimeStamps, Vcpu};
use libc::user_regs_struct;
use shadow_mmu::addr::{Access, Gpa, Pfn};
use shadow_mmu::shadow::Walker;
use std::io;
use std::sync::Arc;

/// How far the vCPU is with its thread.
#[derive(Debug)]
enum Hold {
    /// It waits in the stub, traced by nobody.
    Waiting,
    /// This thread traces it.
    Traced(Pair),
    /// It is gone, or nothing is known of it any more.
    Lost,
}

/// What an entry came to.
enum Outcome {
    /// The thread ran, to this stop.
    Stopped(Stop),
    /// EINTR or EAGAIN: it did not run.
    Interrupted,
    /// ENOMEM: the same.
    NoMemory(EngineError),
}

/// One virtual CPU of a [`PtraceVm`], over one root table.
#[derive(Debug)]
pub struct PtraceVcpu {
    pub(super) vm: Arc<PtraceVm>,
    pub(super) tracee: Tracee,
    hold: Hold,
    pub(super) walker: Walker,
    pub(super) state: Arc<RunState>,
    kicker: Arc<Kicker>,
    pub(super) regs: Regs,
    /// To be loaded with the next entry.
    xsave: Option<Vec<u8>>,
    time_stamps: TimeStamps,
    /// What the process's thread has been told of that.
    time_stamps_set: TimeStamps,
    /// The access that the next entry repeats.
    pub(super) expected: Option<(Gpa, Access)>,
    pub(super) taken_for_read: Option<TakenForRead>,
    pub(super) decoder: AccessDecoder,
    pub(super) shortage: Shortage,
}

impl PtraceVcpu {
    /// For `tracee`, which waits in the stub.
    pub(super) fn new(vm: Arc<PtraceVm>, tracee: Tracee, root: Pfn) -> Self {
        let state = Arc::new(RunState::new(TraceeInterrupt::new(tracee.pid, tracee.tid)));
        let lease = state.begin_lease();
        let kicker = Arc::new(Kicker { state: Arc::clone(&state), lease, faults: vm.faults.get() });
        Self {
            walker: Walker::new(Arc::clone(&vm.pool), root),
            xsave: None,
            vm,
            tracee,
            hold: Hold::Waiting,
            state,
            kicker,
            regs: Regs::default(),
            time_stamps: TimeStamps::OfTheCpu,
            time_stamps_set: TimeStamps::OfTheCpu,
            expected: None,
            taken_for_read: None,
            decoder: AccessDecoder::new(),
            shortage: Shortage::default(),
        }
    }

    /// The thread of the process.
    #[cfg(test)]
    pub(super) fn tid(&self) -> libc::pid_t {
        self.tracee.tid
    }

    /// What the thread enters the guest with.
    fn registers(&self) -> user_regs_struct {
        let Regs { fs_base, gs_base, .. } = self.regs;
        let eflags = self.regs.entry_flags();
        with_general_registers!(self.regs, user_regs_struct { eflags, fs_base, gs_base, ..plain_registers() })
    }

    fn attach(&mut self) -> Result<(), EngineError> {
        match self.hold {
            Hold::Traced(_) => return Ok(()),
            Hold::Lost => {
                return Err(EngineError::lost("running a vCPU", io::Error::other("it failed before")));
            }
            Hold::Waiting => {}
        }
        if let Err(source) = self.tracee.seize() {
            // It may be ours all the same, and its process cannot be waited for before it is.
            self.hold = Hold::Lost;
            let source = self.vm.service.how_it_ended(source);
            self.vm.service.kill(&source);
            self.tracee.wait_until_gone();
            let source = io::Error::other(self.vm.service.why(source).to_owned());
            return Err(EngineError::lost("attaching to a thread of the guest's process", source));
        }
        self.hold = Hold::Traced(self.vm.pairs.join(self.tracee));
        Ok(())
    }

    /// What was asked of the vCPU while it was outside, for its thread in the process.
    fn prepare(&mut self) -> Result<(), EngineError> {
        if let Some(mut xsave) = self.xsave.take() {
            // The kernel takes its own length only.
            xsave.resize(self.vm.fpu.host_bytes(), 0);
            self.tracee
                .set_xstate(&xsave)
                .map_err(|source| EngineError::lost("PTRACE_SETREGSET of the XSAVE area", source))?;
        }
        if self.time_stamps != self.time_stamps_set {
            let setting = match self.time_stamps {
                TimeStamps::OfTheCpu => libc::PR_TSC_ENABLE,
                TimeStamps::Trapped => libc::PR_TSC_SIGSEGV,
            };
            self.tracee
                .call(libc::SYS_prctl, &[libc::PR_SET_TSC as u64, setting as u64])
                .map_err(|source| EngineError::lost("prctl(PR_SET_TSC) in the guest's process", source))?;
            self.time_stamps_set = self.time_stamps;
        }
        if let Some((addr, access)) = self.expected.take() {
            // What comes of it the access finds out.
            let _ = self.fill(addr, access)?;
        }
        Ok(())
    }

    /// The thread exists no more; `how` it ended is what is said unless umbra ended it.
    fn ended(&mut self, how: io::Error) -> EngineError {
        if let Hold::Traced(pair) = std::mem::replace(&mut self.hold, Hold::Lost) {
            pair.forget_tracee();
        }
        EngineError::lost("the vCPU's thread is gone", io::Error::other(self.vm.service.why(how).to_owned()))
    }

    /// One run of the thread, to its next stop.
    fn enter(&mut self) -> Result<Outcome, EngineError> {
        let Hold::Traced(pair) = &mut self.hold else {
            return Err(EngineError::lost("running a vCPU", io::Error::other("it is not attached")));
        };
        let (tracee, service) = (self.tracee, &self.vm.service);
        let came_back = match injected(&self.kicker.faults) {
            Some(Injected::Errno(errno)) => Err(io::Error::from_raw_os_error(errno)),
            Some(Injected::Exit(source)) => return Err(EngineError::lost(NO_REASON, source)),
            None => pair.around(
                || tracee.resume(Resume::Guest).and_then(|()| tracee.wait()),
                || service.watch_pairs(),
            ),
        };
        let lost = |source| EngineError::lost("PTRACE_SYSEMU", source);
        came_back.map(Outcome::Stopped).or_else(|error| match error.raw_os_error() {
            Some(libc::EINTR | libc::EAGAIN) => Ok(Outcome::Interrupted),
            Some(libc::ENOMEM) => Ok(Outcome::NoMemory(lost(error))),
            _ => Err(lost(error)),
        })
    }

    /// Runs until there is something to report. Every error is the end of this vCPU.
    fn drive(&mut self) -> Result<Exit, EngineError> {
        self.attach()?;
        set_own(self.tracee);
        self.prepare()?;
        loop {
            if let Some(exit) = self.regs.refused(self.vm.address_bits) {
                return Ok(exit);
            }
            // Before the entry: bases may be set by the stub, and who runs that drops kicks.
            self.tracee
                .set_guest_registers(&self.registers())
                .map_err(|source| EngineError::lost("PTRACE_SETREGS", source))?;
            if let Err(requests) = self.state.enter(Requests::empty()) {
                self.state.take(requests);
                return Ok(Exit::Kicked);
            }
            let outcome = self.enter();
            self.state.leave();
            let stop = match outcome? {
                Outcome::Stopped(stop) => stop,
                Outcome::Interrupted => continue,
                Outcome::NoMemory(error) => {
                    match self.shortage.sit_out(|| self.state.wants(Requests::all())) {
                        Next::Again => continue,
                        Next::GiveUp => return Err(error),
                    }
                }
            };
            // What it needed to run it had.
            self.shortage = Shortage::default();
            let registers = match stop {
                Stop::Gone(status) => return Err(self.ended(gone(status))),
                _ => self.tracee.registers().map_err(|source| EngineError::lost("PTRACE_GETREGS", source))?,
            };
            self.regs = stop::from_user(&registers);
            let meaning = match stop {
                Stop::Syscall => stop::syscall(self.tracee, &registers, &mut self.regs),
                Stop::Signal(signal) => self.signal(signal, &registers),
                Stop::Attached | Stop::Gone(_) => Ok(Meaning::Nothing),
            };
            match meaning.map_err(|source| EngineError::lost("asking a tracee why it stopped", source))? {
                Meaning::Exit(Exit::Exception { vector: GENERAL_PROTECTION, .. }) => {
                    let error_code = int_gate(&self.walker, self.regs.rip).unwrap_or(0);
                    return Ok(Exit::Exception { vector: GENERAL_PROTECTION, error_code });
                }
                Meaning::Exit(exit) => return Ok(exit),
                Meaning::Nothing => {}
                Meaning::Fault(addr) => {
                    if let Some(exit) = self.fault(addr)? {
                        return Ok(exit);
                    }
                }
                Meaning::NoMemory(addr) => {
                    let source = io::Error::other("SIGBUS: no memory, or it failed");
                    return Err(EngineError::lost(
                        format!("the host has nothing behind the guest's page at {addr:#x}"),
                        source,
                    ));
                }
                Meaning::Filtered => {
                    let source = io::Error::other("SIGSYS from the engine's own filter");
                    return Err(EngineError::lost(
                        format!("a system call got past the tracer at {:#x}", self.regs.rip),
                        source,
                    ));
                }
            }
        }
    }

    fn signal(&mut self, signal: libc::c_int, registers: &user_regs_struct) -> io::Result<Meaning> {
        if signal == TraceeInterrupt::SIGNAL && registers.cs == USER_CS {
            // A kick; whether it is still wanted the run state knows.
            return Ok(Meaning::Nothing);
        }
        let info = self.tracee.signal_info()?;
        let mut regs = self.regs;
        let code = || {
            let mut code = [0; CODE_BYTES];
            let bytes = self.walker.fetch(Gpa(registers.rip), &mut code);
            code[..bytes].to_vec()
        };
        let meaning = stop::signal(signal, &info, registers, &mut regs, || self.read_xstate(), code)?;
        self.regs = regs;
        Ok(meaning)
    }

    fn read_xstate(&self) -> io::Result<Vec<u8>> {
        let mut state = vec![0; self.vm.fpu.host_bytes()];
        let bytes = self.tracee.xstate(&mut state)?;
        state.truncate(bytes);
        self.vm.fpu.sanitised(&state)
    }
}

impl Vcpu for PtraceVcpu {
    fn run(&mut self) -> Result<Exit, EngineError> {
        self.drive().map_err(|mut error| {
            // It may have died while it was stopped.
            if let Hold::Traced(_) = self.hold
                && let Some(how) = self.tracee.ended_with(&error.source)
            {
                error = self.ended(how);
            }
            forget_own(self.tracee);
            let snapshot = match self.hold {
                Hold::Traced(_) => Some(Box::new(snapshot(self.tracee, self.regs))),
                Hold::Waiting | Hold::Lost => None,
            };
            // Nothing of the guest runs on with a part of it in an unknown state.
            self.vm.service.kill(&error.source);
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
        match (&self.xsave, &self.hold) {
            (Some(state), _) => Ok(state.clone()),
            (None, Hold::Waiting) => Ok(self.vm.fpu.initial()),
            (None, _) => self
                .read_xstate()
                .map_err(|source| EngineError::lost("PTRACE_GETREGSET of the XSAVE area", source)),
        }
    }

    fn set_xsave(&mut self, state: &[u8]) -> Result<(), EngineError> {
        self.xsave = Some(
            self.vm
                .fpu
                .sanitised(state)
                .map_err(|source| EngineError::lost("loading an XSAVE area", source))?,
        );
        Ok(())
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        Arc::<Kicker>::clone(&self.kicker)
    }
}

impl Drop for PtraceVcpu {
    fn drop(&mut self) {
        if let Hold::Waiting = self.hold
            && let Err(error) = self.attach()
        {
            log::debug!("a thread of the guest's process cannot be ended alone: {error}");
            self.vm.service.kill(&error);
        }
        if let Hold::Traced(pair) = std::mem::replace(&mut self.hold, Hold::Lost) {
            // While the number is the thread's.
            drop(pair);
            if let Err(source) = self.tracee.exit() {
                let error = self.tracee.ended_with(&source).unwrap_or(source);
                log::debug!("a thread of the guest's process was not ended alone: {error}");
                self.vm.service.kill(&error);
                self.tracee.wait_until_gone();
            }
            forget_own(self.tracee);
        }
        self.vm.vcpu_gone();
    }
}
