// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What happens between an exit of the vCPU and the next entry: signals are taken, interrupted system calls are finished
//! or set up to run again, and where a signal says so the process dies.
//!
//! After `exit_to_user_mode_loop` and `arch_do_signal_or_restart`. The group's lock is never held while guest memory is
//! written.

use super::super::errno::Errno;
use super::super::group::{ExitStatus, Next};
use super::super::process::Death;
use super::super::restart::Restart;
use super::super::thread::Thread;
use super::frame::{self, AltStack, Delivery, SS_AUTODISARM, Trap};
use super::{Action, SI_KERNEL, SigInfo, SigSet, Signal, fpstate};
use crate::engine::{EngineError, Vcpu};
use shadow_mmu::addr::{Access, Gpa};

/// Whether a thread goes back to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::guest) enum Flow {
    /// It enters the guest.
    Enter,
    /// It is over.
    Leave,
}

/// A system call that a signal interrupted, until it is clear how it goes on.
#[derive(Debug, Clone, Copy)]
pub(in crate::guest) struct Interrupted {
    /// The call's number, to be put back into rax.
    pub(in crate::guest) number: u64,
    /// Which kind of restart it asks for.
    pub(in crate::guest) errno: Errno,
}

/// An exception of the guest's own making.
#[derive(Debug, Clone)]
pub(in crate::guest) struct Forced {
    pub(in crate::guest) signal: Signal,
    pub(in crate::guest) info: SigInfo,
    pub(in crate::guest) trap: Trap,
    /// What did it; `None` where it was no exception of the CPU's.
    pub(in crate::guest) cause: Option<Cause>,
}

/// The instruction's part in a signal.
#[derive(Debug, Clone, Copy)]
pub(in crate::guest) struct Cause {
    /// The CPU's exception.
    pub(in crate::guest) vector: u8,
    /// The access that failed, if it was one.
    pub(in crate::guest) access: Option<(Gpa, Access)>,
}

/// Bytes of the `syscall` instruction.
const SYSCALL_INSTRUCTION: u64 = 2;

impl Thread {
    /// Takes what signals there are before the guest is entered. The fast path is one load.
    pub(in crate::guest) fn settle(&mut self, vcpu: &mut dyn Vcpu) -> Result<Flow, EngineError> {
        while self.waker.has_attention() || self.interrupted.is_some() || self.saved_mask.is_some() {
            if self.exit_code.is_some() {
                break;
            }
            let next = self.process.group().next(self.tid);
            if matches!(next, Next::None) {
                self.finish_interrupted(vcpu);
                if let Some(mask) = self.saved_mask.take() {
                    self.process.group().set_mask(self.tid, mask);
                }
            } else if self.obey(vcpu, next, None)? == Flow::Leave {
                return Ok(Flow::Leave);
            }
        }
        Ok(if self.exit_code.is_some() { Flow::Leave } else { Flow::Enter })
    }

    /// Takes the signal that the guest's own instruction caused.
    pub(in crate::guest) fn fault(
        &mut self,
        vcpu: &mut dyn Vcpu,
        fault: Forced,
    ) -> Result<Flow, EngineError> {
        self.trap = fault.trap;
        let next = self.process.group().force(self.tid, fault.signal, fault.info);
        self.obey(vcpu, next, fault.cause)
    }

    /// No frame is left for what the thread needs: the process dies as of the OOM killer, whatever it handles or blocks.
    pub(in crate::guest) fn out_of_memory(
        &mut self,
        vcpu: &mut dyn Vcpu,
        cause: Option<Cause>,
    ) -> Result<Flow, EngineError> {
        self.die(vcpu, Signal::KILL, SI_KERNEL, cause);
        Ok(Flow::Leave)
    }

    fn obey(&mut self, vcpu: &mut dyn Vcpu, next: Next, cause: Option<Cause>) -> Result<Flow, EngineError> {
        match next {
            Next::None => Ok(Flow::Enter),
            Next::Over => {
                self.report_foreign_death(vcpu);
                Ok(Flow::Leave)
            }
            Next::Die(signal, info) => {
                self.die(vcpu, signal, info.code(), cause);
                Ok(Flow::Leave)
            }
            Next::Handle(signal, info, action) => self.handle(vcpu, signal, &info, &action),
        }
    }

    /// Sets up a frame; where the stack does not take it, that is a SIGSEGV of its own (`force_sigsegv`).
    fn handle(
        &mut self,
        vcpu: &mut dyn Vcpu,
        signal: Signal,
        info: &SigInfo,
        action: &Action,
    ) -> Result<Flow, EngineError> {
        self.restart_before_handler(vcpu, action);
        let xsave = vcpu.xsave()?;
        let blocked = self.process.group().mask(self.tid);
        let delivery = Delivery {
            signal,
            info,
            action,
            mask: self.saved_mask.unwrap_or(blocked),
            alt_stack: &self.alt_stack,
            trap: &self.trap,
        };
        match frame::push(self.process.user(), vcpu.regs(), &xsave, &delivery) {
            Ok(regs) => {
                *vcpu.regs_mut() = regs;
                vcpu.set_xsave(&fpstate::initial(xsave.len()))?;
                self.saved_mask = None;
                if self.alt_stack.flags & SS_AUTODISARM != 0 {
                    self.alt_stack = AltStack::default();
                }
                let own = if action.has(libc::SA_NODEFER) { SigSet::EMPTY } else { SigSet::of(signal) };
                self.process.group().set_mask(self.tid, blocked.with(action.mask).with(own));
                Ok(Flow::Enter)
            }
            Err(_) if self.process.user().is_starved() => self.out_of_memory(vcpu, None),
            Err(_) if signal == Signal::SEGV => {
                self.die(vcpu, signal, SI_KERNEL, None);
                Ok(Flow::Leave)
            }
            Err(_) => {
                let next = self.process.group().force(self.tid, Signal::SEGV, SigInfo::kernel(Signal::SEGV));
                self.obey(vcpu, next, None)
            }
        }
    }

    /// A handler is about to run: the interrupted call reports `EINTR` or runs again afterwards, as `SA_RESTART` says.
    fn restart_before_handler(&mut self, vcpu: &mut dyn Vcpu, action: &Action) {
        let Some(Interrupted { number, errno }) = self.interrupted.take() else { return };
        self.restart = Restart::None;
        let regs = vcpu.regs_mut();
        if errno == Errno::RESTART_SYS && action.has(libc::SA_RESTART) {
            regs.rax = number;
            regs.rip = regs.rip.wrapping_sub(SYSCALL_INSTRUCTION);
        } else {
            regs.rax = Errno::EINTR.as_rax();
        }
    }

    /// No handler runs: the interrupted call goes on as if nothing had been.
    fn finish_interrupted(&mut self, vcpu: &mut dyn Vcpu) {
        let Some(Interrupted { number, errno }) = self.interrupted.take() else { return };
        let regs = vcpu.regs_mut();
        let restart = libc::SYS_restart_syscall as u64;
        regs.rax = if errno == Errno::RESTART_BLOCK { restart } else { number };
        regs.rip = regs.rip.wrapping_sub(SYSCALL_INSTRUCTION);
    }

    /// Ends the process by `signal` and says why, unless it was ending already.
    fn die(&self, vcpu: &dyn Vcpu, signal: Signal, code: i32, cause: Option<Cause>) {
        let first = {
            let mut group = self.process.group();
            group.end(ExitStatus::Signaled(signal.number())) && group.claim_report()
        };
        if first {
            self.report(vcpu, signal.number(), code, cause);
        }
    }

    /// A signal from outside, or from another thread without a fault, ended the process: the first to notice says so.
    fn report_foreign_death(&self, vcpu: &dyn Vcpu) {
        let death = {
            let mut group = self.process.group();
            group.over().filter(|_| group.claim_report())
        };
        if let Some(ExitStatus::Signaled(signal)) = death {
            self.report(vcpu, signal, libc::SI_USER, None);
        }
    }

    fn report(&self, vcpu: &dyn Vcpu, signal: i32, code: i32, cause: Option<Cause>) {
        let regs = *vcpu.regs();
        let access = cause.and_then(|cause| cause.access);
        self.process.host().report_death(&Death {
            signal,
            code,
            address: access.map(|(addr, _)| addr),
            access: access.map(|(_, access)| access),
            rip: regs.rip,
            regs,
            tid: self.tid,
            vector: cause.map(|cause| cause.vector),
        });
    }
}

#[cfg(test)]
mod tests;
