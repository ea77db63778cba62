// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Signals from cause to handler and back, with a fake guest.

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
        *regs =
            Regs { rax: libc::SYS_rt_sigreturn as u64, rsp, rbx: 0xbad, rflags: 0x202, ..Regs::default() };
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
        let expected = if restarts { (libc::SYS_read as u64, rip) } else { (Errno::EINTR.as_rax(), rip + 2) };
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

#[test]
fn a_call_that_finds_no_frame_kills_as_a_touch_would() {
    use shadow_mmu::addr::Hva;
    use shadow_mmu::mm::{Backing, MapFlags};
    let fixture = with_stack();
    let (rights, flags) = (Access::READ | Access::WRITE, MapFlags::PRIVATE | MapFlags::NORESERVE);
    let huge = fixture.mm.mmap(Hva(0), 64 << 20, rights, flags, Backing::Anonymous).unwrap();
    fixture.main.begin_call(libc::SYS_getrandom, &[huge.0, 64 << 20, 0]);
    assert!(fixture.main.finish().is_none());
    assert_eq!(fixture.join(), ExitStatus::Signaled(libc::SIGKILL));
    assert_eq!(fixture.host.deaths.lock()[0].code, SI_KERNEL);
}
