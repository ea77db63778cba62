// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Threads come and go: `clone`, `clone3`, `exit`. Only threads: `fork` and `vfork` in all their forms are `ENOSYS`.
//!
//! A thread shares files and working directory with its process whether or not it asks for that.

use super::errno::{Errno, SysResult};
use super::group::ExitStatus;
use super::thread::Thread;
use super::uaccess::Record;
use crate::engine::Vcpu;
use shadow_mmu::addr::{PAGE_SIZE, TASK_SIZE};

const CLONE_VM: u64 = libc::CLONE_VM as u64;
const CLONE_SIGHAND: u64 = libc::CLONE_SIGHAND as u64;
const CLONE_THREAD: u64 = libc::CLONE_THREAD as u64;
const CLONE_SETTLS: u64 = libc::CLONE_SETTLS as u64;
const CLONE_PARENT_SETTID: u64 = libc::CLONE_PARENT_SETTID as u64;
const CLONE_CHILD_SETTID: u64 = libc::CLONE_CHILD_SETTID as u64;
const CLONE_CHILD_CLEARTID: u64 = libc::CLONE_CHILD_CLEARTID as u64;

/// What a thread may ask for: the above; what is so without asking; and what has no meaning without a debugger or I/O
/// scheduling. Not namespaces, a pidfd, or a parent that waits.
const SUPPORTED: u64 = CLONE_VM
    | CLONE_SIGHAND
    | CLONE_THREAD
    | CLONE_SETTLS
    | CLONE_PARENT_SETTID
    | CLONE_CHILD_SETTID
    | CLONE_CHILD_CLEARTID
    | (libc::CLONE_FS | libc::CLONE_FILES | libc::CLONE_SYSVSEM | libc::CLONE_IO) as u64
    | (libc::CLONE_PARENT | libc::CLONE_PTRACE | libc::CLONE_UNTRACED | libc::CLONE_DETACHED) as u64;

/// What both calls ask for (`struct kernel_clone_args`).
#[derive(Debug)]
struct Request {
    flags: u64,
    /// The new stack pointer; 0 for the parent's.
    stack: u64,
    parent_tid: u64,
    child_tid: u64,
    tls: u64,
}

/// `clone(flags, stack, parent_tid, child_tid, tls)`.
pub(super) fn clone(t: &mut Thread, vcpu: &dyn Vcpu, args: &[u64; 6]) -> SysResult {
    let [flags, stack, parent_tid, child_tid, tls, _] = *args;
    // The low byte is the signal to the parent, which a thread does not send.
    let flags = flags & u64::from(u32::MAX) & !0xff;
    start(t, vcpu, &Request { flags, stack, parent_tid, child_tid, tls })
}

/// `clone3(args, size)`.
pub(super) fn clone3(t: &mut Thread, vcpu: &dyn Vcpu, args: u64, size: u64) -> SysResult {
    const FIRST_SIZE: u64 = 64;
    const KNOWN_SIZE: usize = 88;
    if size > PAGE_SIZE {
        return Err(Errno::E2BIG);
    }
    if size < FIRST_SIZE {
        return Err(Errno::EINVAL);
    }
    let mut bytes = vec![0; size as usize];
    t.process.user().read(args, &mut bytes)?;
    if bytes.iter().skip(KNOWN_SIZE).any(|&byte| byte != 0) {
        return Err(Errno::E2BIG);
    }
    bytes.resize(KNOWN_SIZE, 0);
    let mut record = Record::<KNOWN_SIZE>::zeroed();
    record.0.copy_from_slice(&bytes);
    let [
        flags,
        _pidfd,
        child_tid,
        parent_tid,
        exit_signal,
        stack,
        stack_size,
        tls,
        set_tid,
        set_tid_size,
        _cgroup,
    ] = std::array::from_fn(|index| record.u64(8 * index));
    const DETACHED_OR_SIGNAL: u64 = 0x0040_00ff;
    let bad_stack = (stack == 0) != (stack_size == 0);
    let bad_thread = flags & CLONE_THREAD != 0 && exit_signal != 0;
    let names_tids = set_tid != 0 || set_tid_size != 0;
    if flags & DETACHED_OR_SIGNAL != 0 || exit_signal & !0xff != 0 || bad_stack || bad_thread || names_tids {
        return Err(Errno::EINVAL);
    }
    let stack = stack.checked_add(stack_size).filter(|top| *top <= TASK_SIZE).ok_or(Errno::EINVAL)?;
    start(t, vcpu, &Request { flags, stack, parent_tid, child_tid, tls })
}

fn start(t: &mut Thread, vcpu: &dyn Vcpu, request: &Request) -> SysResult {
    let has = |flag| request.flags & flag != 0;
    if has(CLONE_THREAD) && !has(CLONE_SIGHAND) || has(CLONE_SIGHAND) && !has(CLONE_VM) {
        return Err(Errno::EINVAL);
    }
    if !has(CLONE_THREAD) {
        log::warn!(
            "the guest wants a new process (clone flags {:#x}): only threads are supported",
            request.flags
        );
        return Err(Errno::ENOSYS);
    }
    if request.flags & !SUPPORTED != 0 {
        return Err(Errno::EINVAL);
    }
    if has(CLONE_SETTLS) && request.tls >= TASK_SIZE {
        return Err(Errno::EPERM);
    }
    let xsave = vcpu.xsave().map_err(|error| {
        log::error!("no new thread: {error}");
        Errno::EAGAIN
    })?;
    let mask = t.process.group().mask(t.tid);
    let mut child = t.process.new_thread(mask, t.name)?;
    let tid = child.tid;
    let user = t.process.user();
    // As on Linux: an address that cannot be written does not keep the thread from starting.
    if has(CLONE_PARENT_SETTID) {
        let _ = user.write_u32(request.parent_tid, tid as u32);
    }
    if has(CLONE_CHILD_SETTID) {
        let _ = user.write_u32(request.child_tid, tid as u32);
    }
    if has(CLONE_CHILD_CLEARTID) {
        child.clear_child_tid = request.child_tid;
    }
    let mut regs = *vcpu.regs();
    regs.rax = 0;
    if request.stack != 0 {
        regs.rsp = request.stack;
    }
    if has(CLONE_SETTLS) {
        regs.fs_base = request.tls;
    }
    t.process.host().start_thread(child, regs, xsave).map_err(Errno)?;
    Ok(tid as u64)
}

pub(super) fn exit(t: &mut Thread, code: i32) -> SysResult {
    t.exit_code = Some(code & 0xff);
    Ok(0)
}

pub(super) fn exit_group(t: &mut Thread, code: i32) -> SysResult {
    t.process.end(ExitStatus::Exited(code & 0xff));
    exit(t, code)
}

pub(super) fn set_tid_address(t: &mut Thread, addr: u64) -> SysResult {
    t.clear_child_tid = addr;
    Ok(t.tid as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::testing::Fixture;
    use std::sync::atomic::Ordering;
    use std::time::Duration;

    const THREAD: u64 = CLONE_VM | CLONE_SIGHAND | CLONE_THREAD;

    fn errno(errno: Errno) -> i64 {
        -i64::from(errno.0)
    }

    #[test]
    fn a_thread_starts_as_its_parent_asked() {
        let fixture = Fixture::new();
        let page = fixture.map_pages(1);
        let flags = THREAD | CLONE_SETTLS | CLONE_PARENT_SETTID | CLONE_CHILD_SETTID | CLONE_CHILD_CLEARTID;
        let tid = fixture.main.call(libc::SYS_clone, &[flags, 0x7000, page, page + 8, 0x1234_5000]);
        let child = fixture.host.take_started();
        assert_eq!(tid, i64::from(child.tid));
        let regs = child.regs();
        assert_eq!((regs.rax, regs.rsp, regs.fs_base), (0, 0x7000, 0x1234_5000));
        assert_eq!(regs.rip, fixture.main.regs().rip);
        assert_eq!(fixture.user().load_u32(page), Ok(tid as u32));
        assert_eq!(fixture.user().load_u32(page + 8), Ok(tid as u32));
        assert_eq!(child.call(libc::SYS_gettid, &[]), tid);
        assert_eq!(child.call(libc::SYS_getpid, &[]), fixture.main.call(libc::SYS_gettid, &[]));
        fixture.main.begin_call(libc::SYS_futex, &[page + 8, libc::FUTEX_WAIT as u64, tid as u64]);
        std::thread::sleep(Duration::from_millis(5));
        child.begin_call(libc::SYS_exit, &[0]);
        let joined = fixture.main.finish().unwrap().rax;
        assert!(joined == 0 || joined == Errno::EAGAIN.as_rax());
        assert_eq!(fixture.user().load_u32(page + 8), Ok(0));
    }

    #[test]
    fn clone3_takes_what_clone_takes_and_checks_its_structure() {
        let fixture = Fixture::new();
        let page = fixture.map_pages(2);
        let clone3 = |words: &[(u64, u64)], size: u64| {
            fixture.user().write(page, &[0; 200]).unwrap();
            for (index, word) in words {
                fixture.user().write_u64(page + 8 * index, *word).unwrap();
            }
            fixture.main.call(libc::SYS_clone3, &[page, size])
        };
        assert_eq!(clone3(&[(0, THREAD)], 63), errno(Errno::EINVAL));
        assert_eq!(clone3(&[(0, THREAD)], 4097), errno(Errno::E2BIG));
        assert_eq!(clone3(&[(0, THREAD), (11, 1)], 96), errno(Errno::E2BIG));
        assert_eq!(clone3(&[(0, THREAD), (4, 17)], 88), errno(Errno::EINVAL), "a thread has no exit signal");
        assert_eq!(clone3(&[(0, THREAD), (5, 0x7000)], 88), errno(Errno::EINVAL), "a stack without a size");
        assert_eq!(clone3(&[(0, THREAD), (5, u64::MAX), (6, 2)], 88), errno(Errno::EINVAL));
        assert_eq!(clone3(&[(4, 17)], 88), errno(Errno::ENOSYS), "fork");
        assert_eq!(fixture.main.call(libc::SYS_clone3, &[1, 64]), errno(Errno::EFAULT));
        let tid = clone3(&[(0, THREAD), (5, 0x7000), (6, 0x1000)], 96);
        let child = fixture.host.take_started();
        assert_eq!((child.regs().rsp, i64::from(child.tid)), (0x8000, tid));
    }

    #[test]
    fn only_threads_can_be_made_and_only_so_many() {
        let fixture = Fixture::new();
        let clone = |flags: u64| fixture.main.call(libc::SYS_clone, &[flags, 0, 0, 0, 1 << 47]);
        assert_eq!(clone(17), errno(Errno::ENOSYS));
        assert_eq!(clone(CLONE_VM | libc::CLONE_VFORK as u64), errno(Errno::ENOSYS));
        assert_eq!(clone(CLONE_VM | CLONE_THREAD), errno(Errno::EINVAL));
        assert_eq!(clone(CLONE_SIGHAND | CLONE_THREAD), errno(Errno::EINVAL));
        assert_eq!(clone(THREAD | CLONE_SETTLS), errno(Errno::EPERM));
        for refused in [libc::CLONE_PIDFD, libc::CLONE_NEWNS, libc::CLONE_VFORK] {
            assert_eq!(clone(THREAD | refused as u64), errno(Errno::EINVAL), "{refused:#x}");
        }
        assert_eq!(fixture.main.call(libc::SYS_fork, &[]), errno(Errno::ENOSYS));
        fixture.host.refuse_threads.store(true, Ordering::Relaxed);
        assert_eq!(clone(THREAD), errno(Errno::EAGAIN));
        fixture.host.refuse_threads.store(false, Ordering::Relaxed);
        let threads: Vec<_> = (0..7).map(|_| fixture.new_thread()).collect();
        assert_eq!(clone(THREAD), errno(Errno::EAGAIN), "a refused thread took no place, the limit is 8");
        threads[3].begin_call(libc::SYS_exit, &[0]);
        assert!(threads[3].finish().is_none());
        fixture.new_thread();
    }

    #[test]
    fn the_process_outlives_its_main_thread_and_ends_with_the_last() {
        let fixture = Fixture::new();
        let other = fixture.new_thread();
        fixture.main.begin_call(libc::SYS_exit, &[3]);
        assert!(fixture.main.finish().is_none());
        assert_eq!(other.call(libc::SYS_getpid, &[]), i64::from(fixture.process.pid()));
        assert_eq!(fixture.process.status(), None);
        other.begin_call(libc::SYS_exit, &[0x105]);
        assert_eq!(fixture.join(), ExitStatus::Exited(5));
    }

    #[test]
    fn exit_group_ends_threads_wherever_they_are() {
        let fixture = Fixture::new();
        let page = fixture.map_pages(1);
        let others: Vec<_> = (0..5).map(|_| fixture.new_thread()).collect();
        others[0].begin_call(libc::SYS_pause, &[]);
        others[1].begin_call(libc::SYS_read, &[0, page, 1]);
        others[2].begin_call(libc::SYS_poll, &[0, 0, u64::MAX]);
        others[3].begin_call(libc::SYS_futex, &[page, 0, 0]);
        // The fifth is in the guest.
        fixture.main.begin_call(libc::SYS_exit_group, &[7]);
        assert_eq!(fixture.join(), ExitStatus::Exited(7));
        assert!(fixture.host.deaths.lock().is_empty());
    }
}
