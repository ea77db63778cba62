// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The system calls about signals. Order of checks and error numbers are those of `kernel/signal.c`.

use super::super::errno::{Errno, SysResult};
use super::super::thread::Thread;
use super::super::time::{self, Timespec};
use super::super::uaccess::Record;
use super::super::waker::Parked;
use super::deliver::{Flow, Forced};
use super::frame::{self, AltStack};
use super::{Action, QueueFull, SigInfo, SigSet, Signal, fpstate};
use crate::engine::{EngineError, Vcpu};

const SIGSET_SIZE: u64 = 8;
/// Flags that the kernel knows (`UAPI_SA_FLAGS`); others are dropped.
const KNOWN_FLAGS: u64 = 0xdc00_0807;

fn check_size(size: u64) -> Result<(), Errno> {
    if size == SIGSET_SIZE { Ok(()) } else { Err(Errno::EINVAL) }
}

pub(in crate::guest) fn rt_sigaction(
    t: &mut Thread,
    number: i32,
    new: u64,
    old: u64,
    size: u64,
) -> SysResult {
    check_size(size)?;
    let user = t.process.user();
    let new = if new == 0 { None } else { Some(Action::from_record(&user.record(new)?)) };
    let signal = Signal::new(number).ok_or(Errno::EINVAL)?;
    if new.is_some() && [Signal::KILL, Signal::STOP].contains(&signal) {
        return Err(Errno::EINVAL);
    }
    let before = {
        let mut group = t.process.group();
        let before = group.action(signal);
        if let Some(new) = new {
            group.set_action(signal, Action { flags: new.flags & KNOWN_FLAGS, ..new });
        }
        before
    };
    if old != 0 {
        user.write(old, &before.to_record().0)?;
    }
    Ok(0)
}

pub(in crate::guest) fn rt_sigprocmask(t: &mut Thread, how: i32, new: u64, old: u64, size: u64) -> SysResult {
    check_size(size)?;
    let before = t.process.group().mask(t.tid);
    if new != 0 {
        let set = SigSet::mask(t.process.user().read_u64(new)?);
        let mask = match how {
            libc::SIG_BLOCK => before.with(set),
            libc::SIG_UNBLOCK => before.without(set),
            libc::SIG_SETMASK => set,
            _ => return Err(Errno::EINVAL),
        };
        t.process.group().set_mask(t.tid, mask);
    }
    if old != 0 {
        t.process.user().write_u64(old, before.0)?;
    }
    Ok(0)
}

pub(in crate::guest) fn rt_sigpending(t: &mut Thread, set: u64, size: u64) -> SysResult {
    if size > SIGSET_SIZE {
        return Err(Errno::EINVAL);
    }
    let pending = {
        let group = t.process.group();
        group.pending(t.tid).and(group.mask(t.tid))
    };
    t.process.user().write(set, &pending.0.to_le_bytes()[..size as usize])?;
    Ok(0)
}

/// Puts `mask` in place for the duration of a call. It is undone before the guest runs again, and a handler that runs
/// before that returns to the mask from before the call (`set_user_sigmask`).
pub(in crate::guest) fn set_temporary_mask(t: &mut Thread, mask: SigSet) {
    let mut group = t.process.group();
    let before = group.mask(t.tid);
    group.set_mask(t.tid, mask);
    drop(group);
    t.saved_mask = Some(before);
}

/// Reads the mask argument of `ppoll` and `pselect6`: nothing for a null pointer.
pub(in crate::guest) fn temporary_mask(t: &mut Thread, set: u64, size: u64) -> Result<(), Errno> {
    if set != 0 {
        check_size(size)?;
        let mask = SigSet::mask(t.process.user().read_u64(set)?);
        set_temporary_mask(t, mask);
    }
    Ok(())
}

pub(in crate::guest) fn rt_sigsuspend(t: &mut Thread, set: u64, size: u64) -> SysResult {
    check_size(size)?;
    let mask = SigSet::mask(t.process.user().read_u64(set)?);
    set_temporary_mask(t, mask);
    pause(t)
}

pub(in crate::guest) fn pause(t: &mut Thread) -> SysResult {
    t.sleep(None, || false);
    Err(Errno::RESTART_NO_HANDLER)
}

pub(in crate::guest) fn rt_sigtimedwait(
    t: &mut Thread,
    set: u64,
    info: u64,
    time: u64,
    size: u64,
) -> SysResult {
    check_size(size)?;
    let set = SigSet::mask(t.process.user().read_u64(set)?);
    let deadline = match time {
        0 => None,
        at => time::deadline_after(t, Timespec::read(t.process.user(), at)?),
    };
    let take = |t: &Thread| t.process.group().take(t.tid, set);
    let mut taken = take(t);
    let mut outcome = Parked::TimedOut;
    if taken.is_none() {
        t.process.group().begin_wait(t.tid, set);
        outcome = t.sleep(deadline, || false);
        // Taken before the mask comes back: what arrived is ours, not a handler's.
        taken = take(t);
        t.process.group().end_wait(t.tid);
    }
    match taken {
        Some((signal, data)) => {
            if info != 0 {
                t.process.user().write(info, &data.0.0)?;
            }
            Ok(signal.number() as u64)
        }
        None if outcome == Parked::Interrupted => Err(Errno::EINTR),
        None => Err(Errno::EAGAIN),
    }
}

pub(in crate::guest) fn sigaltstack(t: &mut Thread, vcpu: &dyn Vcpu, new: u64, old: u64) -> SysResult {
    let user = t.process.user();
    let (before, sp) = (t.alt_stack, vcpu.regs().rsp);
    if new != 0 {
        let new = AltStack::from_record(&user.record(new)?);
        t.alt_stack.replace(new, sp)?;
    }
    if old != 0 {
        t.process.user().write(old, &before.to_record(before.reported_flags(sp)).0)?;
    }
    Ok(0)
}

/// `rt_sigreturn` has no result of its own: all registers come from the frame. A frame that makes no sense is a SIGSEGV.
pub(in crate::guest) fn rt_sigreturn(t: &mut Thread, vcpu: &mut dyn Vcpu) -> Result<Flow, EngineError> {
    let now = vcpu.xsave()?;
    let user = t.process.user();
    let restored = frame::pop(user, vcpu.regs())
        .and_then(|restored| Ok((fpstate::from_frame(user, restored.fpstate, &now)?, restored)));
    let loaded = match restored {
        // A state that our checks let through and the CPU does not is the guest's fault all the same.
        Ok((state, restored)) => vcpu.set_xsave(&state).is_ok().then_some(restored),
        Err(_) => None,
    };
    let Some(restored) = loaded else {
        let info = SigInfo::kernel(Signal::SEGV);
        let fault = Forced { signal: Signal::SEGV, info, trap: t.trap, cause: None };
        return t.fault(vcpu, fault);
    };
    *vcpu.regs_mut() = restored.regs;
    t.process.group().set_mask(t.tid, restored.mask);
    // As Linux: an alternate stack that cannot be taken back is passed over.
    let _ = t.alt_stack.replace(restored.alt_stack, restored.regs.rsp);
    Ok(Flow::Enter)
}

/// Sends `number` to a thread or to the process; 0 only checks. The receiver is known to exist.
fn send(t: &Thread, to: Option<i32>, number: i32, info: impl FnOnce(Signal) -> SigInfo) -> Result<(), Errno> {
    if number == 0 {
        return Ok(());
    }
    let signal = Signal::new(number).ok_or(Errno::EINVAL)?;
    let info = info(signal);
    // Only a program that queues data is told when there is no room for it.
    let by_hand = info.code() == libc::SI_USER || info.code() == libc::SI_TKILL;
    match t.process.group().send(to, signal, info) {
        Err(QueueFull) if !by_hand => Err(Errno::EAGAIN),
        _ => Ok(()),
    }
}

pub(in crate::guest) fn kill(t: &mut Thread, pid: i32, number: i32) -> SysResult {
    let process = &t.process;
    let own_group = process.process_group();
    // The process is alone: its group has nobody else in it, and "everyone" leaves out the sender.
    if pid != process.pid() && pid != 0 && (pid == -1 || pid.checked_neg() != Some(own_group)) {
        return Err(Errno::ESRCH);
    }
    let (pid, uid) = (process.pid(), process.uid());
    send(t, None, number, |signal| SigInfo::from_user(signal, libc::SI_USER, pid, uid))?;
    Ok(0)
}

pub(in crate::guest) fn tkill(t: &mut Thread, tid: i32, number: i32) -> SysResult {
    let pid = t.process.pid();
    tgkill(t, pid, tid, number)
}

pub(in crate::guest) fn tgkill(t: &mut Thread, pid: i32, tid: i32, number: i32) -> SysResult {
    if pid <= 0 || tid <= 0 {
        return Err(Errno::EINVAL);
    }
    if pid != t.process.pid() || !t.process.group().contains(tid) {
        return Err(Errno::ESRCH);
    }
    let uid = t.process.uid();
    send(t, Some(tid), number, |signal| SigInfo::from_user(signal, libc::SI_TKILL, pid, uid))?;
    Ok(0)
}

/// `rt_sigqueueinfo` for `to: None`, `rt_tgsigqueueinfo` otherwise.
pub(in crate::guest) fn queue(
    t: &mut Thread,
    pid: i32,
    to: Option<i32>,
    number: i32,
    info: u64,
) -> SysResult {
    let record: Record<128> = t.process.user().record(info)?;
    if to.is_some_and(|tid| tid <= 0) || pid <= 0 && to.is_some() {
        return Err(Errno::EINVAL);
    }
    if pid != t.process.pid() || to.is_some_and(|tid| !t.process.group().contains(tid)) {
        return Err(Errno::ESRCH);
    }
    send(t, to, number, |signal| SigInfo::queued(signal, record))?;
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::testing::Fixture;

    fn errno(errno: Errno) -> i64 {
        -i64::from(errno.0)
    }

    #[test]
    fn dispositions_are_kept_but_for_unknown_flags_and_two_signals() {
        let fixture = Fixture::new();
        let page = fixture.map_pages(1);
        let call = |args: &[u64]| fixture.main.call(libc::SYS_rt_sigaction, args);
        for (index, word) in [0x1000, 0xffff_ffff, 0x2000, u64::MAX].into_iter().enumerate() {
            fixture.user().write_u64(page + 8 * index as u64, word).unwrap();
        }
        assert_eq!(call(&[10, page, 0, 8]), 0);
        assert_eq!(call(&[10, 0, page + 64, 8]), 0);
        let old: Record<32> = fixture.user().record(page + 64).unwrap();
        assert_eq!((old.u64(0), old.u64(8), old.u64(16)), (0x1000, KNOWN_FLAGS, 0x2000));
        assert_eq!(old.u64(24), !(1 << (libc::SIGKILL - 1) | 1 << (libc::SIGSTOP - 1)));
        for signal in [0, 65, -1, i32::MIN, libc::SIGKILL, libc::SIGSTOP] {
            assert_eq!(call(&[signal as u64, page, 0, 8]), errno(Errno::EINVAL), "{signal}");
        }
        assert_eq!(call(&[9, 0, page, 8]), 0, "asking is allowed");
        assert_eq!(call(&[10, page, 0, 16]), errno(Errno::EINVAL));
        assert_eq!(call(&[10, 1, 0, 8]), errno(Errno::EFAULT));
        assert_eq!(call(&[10, 0, 1, 8]), errno(Errno::EFAULT));
    }

    #[test]
    fn masks_add_up() {
        let fixture = Fixture::new();
        let page = fixture.map_pages(1);
        let mask = |how: i32, set: u64| {
            fixture.user().write_u64(page, set).unwrap();
            let result = fixture.main.call(libc::SYS_rt_sigprocmask, &[how as u64, page, page + 8, 8]);
            (result, fixture.user().read_u64(page + 8).unwrap())
        };
        assert_eq!(mask(libc::SIG_BLOCK, 0b1100), (0, 0));
        assert_eq!(mask(libc::SIG_UNBLOCK, 0b0100), (0, 0b1100));
        assert_eq!(mask(libc::SIG_SETMASK, u64::MAX), (0, 0b1000));
        assert_eq!(mask(libc::SIG_SETMASK, 0).1, !(1 << 8 | 1 << 18));
        assert_eq!(mask(99, 0).0, errno(Errno::EINVAL));
    }

    #[test]
    fn only_its_own_threads_can_be_signalled() {
        let fixture = Fixture::new();
        let (pid, other) = (fixture.process.pid() as u64, fixture.new_thread());
        let call = |number, args: &[u64]| fixture.main.call(number, args);
        assert_eq!(call(libc::SYS_kill, &[1, 9]), errno(Errno::ESRCH));
        assert_eq!(call(libc::SYS_kill, &[-1i64 as u64, 9]), errno(Errno::ESRCH));
        assert_eq!(call(libc::SYS_kill, &[i32::MIN as u32 as u64, 9]), errno(Errno::ESRCH));
        assert_eq!(call(libc::SYS_kill, &[pid, 65]), errno(Errno::EINVAL));
        assert_eq!(call(libc::SYS_kill, &[0, 0]), 0);
        assert_eq!(call(libc::SYS_tgkill, &[pid, other.tid as u64, 0]), 0);
        assert_eq!(call(libc::SYS_tgkill, &[pid, 0, 0]), errno(Errno::EINVAL));
        assert_eq!(call(libc::SYS_tgkill, &[pid + 1, other.tid as u64, 0]), errno(Errno::ESRCH));
        assert_eq!(call(libc::SYS_tkill, &[other.tid as u64 + 1, 0]), errno(Errno::ESRCH));
    }

    #[test]
    fn a_waiting_thread_takes_a_queued_signal_with_its_data() {
        let fixture = Fixture::new();
        let page = fixture.map_pages(1);
        let (pid, other) = (fixture.process.pid() as u64, fixture.new_thread());
        let usr1 = libc::SIGUSR1 as u64;
        fixture.user().write_u64(page, 1 << (usr1 - 1)).unwrap();
        for remote in [&fixture.main, &other] {
            assert_eq!(remote.call(libc::SYS_rt_sigprocmask, &[0, page, 0, 8]), 0);
        }
        let (time, info) = (page + 16, page + 128);
        let wait = [page, info, time, 8];
        assert_eq!(fixture.main.call(libc::SYS_rt_sigtimedwait, &wait), errno(Errno::EAGAIN));
        fixture.user().write_u32(info + 8, libc::SI_QUEUE as u32).unwrap();
        fixture.user().write_u64(info + 24, 4711).unwrap();
        assert_eq!(fixture.main.call(libc::SYS_rt_sigqueueinfo, &[pid, usr1, info]), 0);
        fixture.user().write_u64(info + 24, 0).unwrap();
        assert_eq!(other.call(libc::SYS_rt_sigtimedwait, &wait), usr1 as i64);
        assert_eq!(fixture.user().read_u64(info + 24), Ok(4711));
        // And one that has to be waited for.
        fixture.main.begin_call(libc::SYS_rt_sigtimedwait, &[page, 0, 0, 8]);
        std::thread::sleep(std::time::Duration::from_millis(10));
        assert_eq!(other.call(libc::SYS_kill, &[pid, usr1]), 0);
        assert_eq!(fixture.main.finish().unwrap().rax, usr1);
    }
}
