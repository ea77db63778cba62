// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What happens between an exit of the vCPU and the next entry: signals are taken, interrupted system calls are finished
//! or set up to run again, and where a signal says so the process dies.
//!
//! After `exit_to_user_mode_loop` and `arch_do_signal_or_restart`. The group's lock is never held while guest memory is
//! written.

use super::super::errno::Errno;
use super::super::group::{ExitStatus, Next};
use super::super::process::Death;
use super::super::thread::Thread;
use super::frame::{self, AltStack, Delivery, SS_AUTODISARM, Trap};
use super::{Action, SI_KERNEL, SigInfo, SigSet, Signal};
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
                self.saved_mask = None;
                if self.alt_stack.flags & SS_AUTODISARM != 0 {
                    self.alt_stack = AltStack::default();
                }
                let own = if action.has(libc::SA_NODEFER) { SigSet::EMPTY } else { SigSet::of(signal) };
                self.process.group().set_mask(self.tid, blocked.with(action.mask).with(own));
                Ok(Flow::Enter)
            }
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
mod tests {
    use super::*;
    use crate::engine::{Exit, Regs};
    use crate::guest::testing::{Fixture, Remote};
    use std::io::Write;
    use std::time::Duration;

    const HANDLER: u64 = 0x40_1000;
    const STACK: u64 = 4 * 4096;

    /// A fixture whose main thread has a stack.
    fn with_stack() -> Fixture {
        let fixture = Fixture::new();
        let top = fixture.map_pages(4) + STACK;
        fixture.main.step(move |regs| {
            regs.rsp = top;
            Exit::Kicked
        });
        fixture
    }

    fn page_fault(remote: &Remote, addr: u64, access: Access) -> Option<Regs> {
        remote.step(move |_| Exit::PageFault { addr: Gpa(addr), access })
    }
    fn exception(remote: &Remote, vector: u8) -> Option<Regs> {
        remote.step(move |_| Exit::Exception { vector, error_code: 0 })
    }
    fn blocked(remote: &Remote, fixture: &Fixture) -> u64 {
        let page = fixture.map_pages(1);
        assert_eq!(remote.call(libc::SYS_rt_sigprocmask, &[0, 0, page, 8]), 0);
        fixture.user().read_u64(page).unwrap()
    }
    /// The `ret` of the handler and the restorer's call.
    fn sigreturn(remote: &Remote, handler: &Regs) -> Option<Regs> {
        let rsp = handler.rsp.wrapping_add(8);
        remote.step(move |regs| {
            *regs = Regs {
                rax: libc::SYS_rt_sigreturn as u64,
                rsp,
                rbx: 0xbad,
                rflags: 0x202,
                ..Regs::default()
            };
            Exit::Syscall
        })
    }

    #[test]
    fn a_handled_fault_comes_back_to_where_it_was() {
        let fixture = with_stack();
        fixture.handle(libc::SIGSEGV, libc::SA_SIGINFO);
        fixture.main.step(|regs| {
            regs.rbx = 0x1234;
            regs.r15 = 0x5678;
            Exit::Kicked
        });
        let before = fixture.main.regs();
        let handler = page_fault(&fixture.main, 0xdead_0008, Access::WRITE).unwrap();
        assert_eq!((handler.rip, handler.rdi), (HANDLER, libc::SIGSEGV as u64));
        let info = handler.rsi;
        assert_eq!(fixture.user().read_u32(info + 8), Ok(1), "SEGV_MAPERR");
        assert_eq!(fixture.user().read_u64(info + 16), Ok(0xdead_0008));
        let greg = |register: i32| fixture.user().read_u64(handler.rdx + 40 + 8 * register as u64).unwrap();
        assert_eq!((greg(libc::REG_TRAPNO), greg(libc::REG_ERR)), (14, 6));
        assert_eq!(blocked(&fixture.main, &fixture), 1 << (libc::SIGSEGV - 1));
        let after = sigreturn(&fixture.main, &handler).unwrap();
        assert_eq!(after, before);
        assert_eq!(blocked(&fixture.main, &fixture), 0);
    }

    #[test]
    fn every_fault_has_its_signal_and_code() {
        let read_only = |fixture: &Fixture| {
            let page = fixture.map_pages(1);
            fixture.main.call(libc::SYS_mprotect, &[page, 4096, libc::PROT_READ as u64]);
            page
        };
        let table: [(u8, i32, i32); 9] = [
            (0, libc::SIGFPE, 1),
            (1, libc::SIGTRAP, 2),
            (3, libc::SIGTRAP, SI_KERNEL),
            (6, libc::SIGILL, 2),
            (13, libc::SIGSEGV, SI_KERNEL),
            (16, libc::SIGFPE, 7),
            (17, libc::SIGBUS, 1),
            (19, libc::SIGFPE, 7),
            (14, libc::SIGSEGV, 2),
        ];
        for (vector, signal, code) in table {
            let fixture = with_stack();
            let addr = read_only(&fixture);
            let is_page_fault = vector == 14;
            let gone = match is_page_fault {
                true => page_fault(&fixture.main, addr, Access::WRITE),
                false => exception(&fixture.main, vector),
            };
            assert!(gone.is_none());
            assert_eq!(fixture.join(), ExitStatus::Signaled(signal), "vector {vector}");
            let deaths = fixture.host.deaths.lock();
            let [death] = deaths.as_slice() else { panic!("{} reports", deaths.len()) };
            assert_eq!((death.signal, death.code, death.vector), (signal, code, Some(vector)));
            assert_eq!(death.address, is_page_fault.then_some(Gpa(addr)));
        }
    }

    #[test]
    fn a_blocked_or_ignored_fault_kills() {
        for ignore in [false, true] {
            let fixture = with_stack();
            let page = fixture.map_pages(1);
            if ignore {
                fixture.user().write_u64(page, 1).unwrap();
                fixture.main.call(libc::SYS_rt_sigaction, &[libc::SIGSEGV as u64, page, 0, 8]);
            } else {
                fixture.handle(libc::SIGSEGV, 0);
                fixture.user().write_u64(page, 1 << (libc::SIGSEGV - 1)).unwrap();
                fixture.main.call(libc::SYS_rt_sigprocmask, &[0, page, 0, 8]);
            }
            assert!(page_fault(&fixture.main, 8, Access::READ).is_none());
            assert_eq!(fixture.join(), ExitStatus::Signaled(libc::SIGSEGV));
        }
    }

    #[test]
    fn a_stack_that_takes_no_frame_kills_unless_there_is_another() {
        let fixture = Fixture::new();
        fixture.handle(libc::SIGUSR1, 0);
        fixture.main.begin_call(libc::SYS_tkill, &[fixture.main.tid as u64, libc::SIGUSR1 as u64]);
        assert!(fixture.main.finish().is_none());
        assert_eq!(fixture.join(), ExitStatus::Signaled(libc::SIGSEGV));

        let fixture = Fixture::new();
        let stack = fixture.map_pages(4);
        fixture.handle(libc::SIGUSR1, 0);
        fixture.handle(libc::SIGSEGV, libc::SA_ONSTACK);
        let new = fixture.map_pages(1);
        fixture.user().write_u64(new, stack).unwrap();
        fixture.user().write_u64(new + 16, STACK).unwrap();
        assert_eq!(fixture.main.call(libc::SYS_sigaltstack, &[new, new + 32]), 0);
        assert_eq!(fixture.user().read_u32(new + 40), Ok(super::super::frame::SS_DISABLE));
        fixture.main.begin_call(libc::SYS_tkill, &[fixture.main.tid as u64, libc::SIGUSR1 as u64]);
        let handler = fixture.main.finish().unwrap();
        assert_eq!(handler.rdi, libc::SIGSEGV as u64);
        assert!((stack..stack + STACK).contains(&handler.rsp));
    }

    #[test]
    fn sa_restart_runs_an_interrupted_read_again() {
        for (flags, restarts) in [(libc::SA_RESTART, true), (0, false)] {
            let fixture = with_stack();
            let other = fixture.new_thread();
            let page = fixture.map_pages(1);
            fixture.handle(libc::SIGUSR1, flags);
            let rip = fixture.main.regs().rip;
            fixture.main.begin_call(libc::SYS_read, &[0, page, 10]);
            std::thread::sleep(Duration::from_millis(10));
            let pid = fixture.process.pid() as u64;
            assert_eq!(other.call(libc::SYS_tgkill, &[pid, pid, libc::SIGUSR1 as u64]), 0);
            let handler = fixture.main.finish().unwrap();
            assert_eq!(handler.rip, HANDLER);
            let back = sigreturn(&fixture.main, &handler).unwrap();
            let expected =
                if restarts { (libc::SYS_read as u64, rip) } else { (Errno::EINTR.as_rax(), rip + 2) };
            assert_eq!((back.rax, back.rip), expected);
            if restarts {
                fixture.stdin.as_ref().unwrap().write_all(b"abc").unwrap();
                let again = fixture.main.step(|regs| {
                    regs.rip += 2;
                    Exit::Syscall
                });
                assert_eq!(again.unwrap().rax, 3);
            }
        }
    }

    #[test]
    fn a_signal_without_effect_does_not_end_a_wait() {
        let fixture = with_stack();
        let other = fixture.new_thread();
        let page = fixture.map_pages(1);
        let pid = fixture.process.pid() as u64;
        fixture.main.begin_call(libc::SYS_read, &[0, page, 10]);
        std::thread::sleep(Duration::from_millis(5));
        for signal in [libc::SIGCHLD, libc::SIGWINCH, libc::SIGCONT, libc::SIGTSTP, 0] {
            assert_eq!(other.call(libc::SYS_kill, &[pid, signal as u64]), 0);
        }
        fixture.stdin.as_ref().unwrap().write_all(b"abc").unwrap();
        assert_eq!(fixture.main.finish().unwrap().rax, 3);
    }

    #[test]
    fn a_suspended_mask_is_undone_by_the_handlers_return() {
        let fixture = with_stack();
        let other = fixture.new_thread();
        fixture.handle(libc::SIGUSR1, 0);
        let page = fixture.map_pages(1);
        let usr1 = 1 << (libc::SIGUSR1 - 1);
        fixture.user().write_u64(page, usr1).unwrap();
        assert_eq!(fixture.main.call(libc::SYS_rt_sigprocmask, &[0, page, 0, 8]), 0);
        // `other` must not take it.
        assert_eq!(other.call(libc::SYS_rt_sigprocmask, &[0, page, 0, 8]), 0);
        let pid = fixture.process.pid() as u64;
        assert_eq!(other.call(libc::SYS_kill, &[pid, libc::SIGUSR1 as u64]), 0);
        assert_eq!(fixture.main.call(libc::SYS_rt_sigpending, &[page + 8, 8]), 0);
        assert_eq!(fixture.user().read_u64(page + 8), Ok(usr1));
        fixture.main.begin_call(libc::SYS_rt_sigsuspend, &[page + 16, 8]);
        let handler = fixture.main.finish().unwrap();
        assert_eq!(handler.rip, HANDLER);
        let back = sigreturn(&fixture.main, &handler).unwrap();
        assert_eq!(back.rax, Errno::EINTR.as_rax());
        assert_eq!(blocked(&fixture.main, &fixture), usr1);
    }

    #[test]
    fn nested_handlers_unwind_in_order() {
        let fixture = with_stack();
        fixture.handle(libc::SIGUSR1, 0);
        fixture.handle(libc::SIGUSR2, 0);
        let before = fixture.main.regs();
        let pid = fixture.main.tid as u64;
        fixture.main.begin_call(libc::SYS_tkill, &[pid, libc::SIGUSR1 as u64]);
        let first = fixture.main.finish().unwrap();
        fixture.main.begin_call(libc::SYS_tkill, &[pid, libc::SIGUSR1 as u64]);
        assert_eq!(fixture.main.finish().unwrap().rip, HANDLER + 2, "blocked while it is handled");
        fixture.main.begin_call(libc::SYS_tkill, &[pid, libc::SIGUSR2 as u64]);
        let second = fixture.main.finish().unwrap();
        assert!(second.rsp < first.rsp);
        sigreturn(&fixture.main, &second).unwrap();
        let third = sigreturn(&fixture.main, &first).unwrap();
        assert_eq!((third.rip, third.rdi), (HANDLER, libc::SIGUSR1 as u64), "the one that waited");
        let end = sigreturn(&fixture.main, &third).unwrap();
        assert_eq!((end.rsp, end.rip), (before.rsp, before.rip + 2));
    }

    #[test]
    fn a_made_up_frame_is_a_segv_and_not_a_panic() {
        for rsp in [0, 8, 1 << 63, u64::MAX, u64::MAX - 400, 0x7fff_ffff_f000] {
            let fixture = Fixture::new();
            let gone = sigreturn(&fixture.main, &Regs { rsp, ..Regs::default() });
            assert!(gone.is_none(), "{rsp:#x}");
            assert_eq!(fixture.join(), ExitStatus::Signaled(libc::SIGSEGV));
        }
    }

    #[test]
    fn a_kill_from_outside_needs_no_consent_and_is_reported_once() {
        let fixture = with_stack();
        let others = [fixture.new_thread(), fixture.new_thread()];
        fixture.handle(libc::SIGTERM, 0);
        fixture.process.kill(libc::SIGTERM);
        assert_eq!(fixture.join(), ExitStatus::Signaled(libc::SIGTERM));
        assert_eq!(fixture.host.deaths.lock().len(), 1);
        drop(others);
    }
}
