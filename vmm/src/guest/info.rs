// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a program asks about itself and the machine: names, limits, usage, random numbers, thread settings.

use super::errno::{Errno, SysResult};
use super::host::{self, ClockQuery};
use super::thread::Thread;
use super::uaccess::{Record, UserMemory};
use crate::engine::Vcpu;
use shadow_mmu::addr::{PAGE_SIZE, TASK_SIZE};
use shadow_mmu::mm::MergeAny;
use shadow_mmu::sync::Mutex;

/// The stack's size limit, bytes; the stack is mapped as large as that from the start.
pub(super) const STACK_LIMIT: u64 = 8 << 20;
const INFINITY: u64 = u64::MAX;
const RESOURCES: usize = 16;

/// A soft and a hard limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Limit {
    soft: u64,
    hard: u64,
}

/// Resource limits. That of open files is obeyed; the others are kept and reported.
#[derive(Debug)]
pub(super) struct Limits(Mutex<[Limit; RESOURCES]>);

impl Limits {
    /// The limits of a process that may have `files` open and run `threads` threads.
    pub(super) fn new(files: u32, threads: usize) -> Self {
        let mut limits = [Limit { soft: INFINITY, hard: INFINITY }; RESOURCES];
        limits[libc::RLIMIT_STACK as usize].soft = STACK_LIMIT;
        limits[libc::RLIMIT_CORE as usize].soft = 0;
        limits[libc::RLIMIT_NOFILE as usize] = Limit { soft: files.into(), hard: files.into() };
        limits[libc::RLIMIT_NPROC as usize] = Limit { soft: threads as u64, hard: threads as u64 };
        Self(Mutex::new(limits))
    }

    /// Descriptors are below this.
    pub(super) fn files(&self) -> u64 {
        self.0.lock()[libc::RLIMIT_NOFILE as usize].soft
    }
}

/// Whether `id` names this process (0, its pid or one of its tids).
///
/// # Errors
/// `ESRCH`: there is no other process.
pub(super) fn own(t: &Thread, id: i32) -> Result<(), Errno> {
    if id == 0 || id == t.process.pid() || t.process.group().contains(id) {
        Ok(())
    } else {
        Err(Errno::ESRCH)
    }
}

/// The process group is umbra's own and stays so; saying that it is one's own is accepted.
pub(super) fn setpgid(t: &Thread, pid: i32, group: i32) -> SysResult {
    if group < 0 || group == 0 && pid < 0 {
        return Err(Errno::EINVAL);
    }
    own(t, pid).map(|()| 0)
}

/// `prlimit64`.
pub(super) fn prlimit(t: &mut Thread, pid: i32, resource: u32, new: u64, old: u64) -> SysResult {
    let user = t.process.user();
    let new = match new {
        0 => None,
        at => {
            let record: Record<16> = user.record(at)?;
            Some(Limit { soft: record.u64(0), hard: record.u64(8) })
        }
    };
    own(t, pid)?;
    let index = resource as usize;
    let before = {
        let mut limits = t.process.limits().0.lock();
        let before = *limits.get(index).ok_or(Errno::EINVAL)?;
        if let Some(new) = new {
            if new.soft > new.hard {
                return Err(Errno::EINVAL);
            }
            if new.hard > before.hard {
                return Err(Errno::EPERM);
            }
            limits[index] = new;
        }
        before
    };
    if old != 0 {
        let mut record = Record::<16>::zeroed();
        record.put_u64(0, before.soft).put_u64(8, before.hard);
        user.write(old, &record.0)?;
    }
    Ok(0)
}

pub(super) fn getrlimit(t: &mut Thread, resource: u32, into: u64) -> SysResult {
    if into == 0 {
        return Err(if resource < RESOURCES as u32 { Errno::EFAULT } else { Errno::EINVAL });
    }
    prlimit(t, 0, resource, 0, into)
}

pub(super) fn setrlimit(t: &mut Thread, resource: u32, new: u64) -> SysResult {
    if new == 0 {
        return Err(Errno::EFAULT);
    }
    prlimit(t, 0, resource, new, 0)
}

pub(super) fn getrusage(t: &mut Thread, who: i32, into: u64) -> SysResult {
    t.process.user().write(into, &t.process.clock().rusage(t, who)?)?;
    Ok(0)
}

pub(super) fn uname(t: &mut Thread, into: u64) -> SysResult {
    const FIELD: usize = 65;
    const FIELDS: [&[u8]; 6] = [b"Linux", b"umbra", b"6.1.0-umbra", b"#1 SMP", b"x86_64", b"(none)"];
    let mut record = Record::<{ 6 * FIELD }>::zeroed();
    for (field, text) in record.0.chunks_exact_mut(FIELD).zip(FIELDS) {
        field[..text.len()].copy_from_slice(text);
    }
    t.process.user().write(into, &record.0)?;
    Ok(0)
}

/// `struct sysinfo`: the machine's memory is the frame pool.
pub(super) fn sysinfo(t: &mut Thread, into: u64) -> SysResult {
    let (uptime, _) = t.process.clock().query(t, libc::CLOCK_BOOTTIME, ClockQuery::Time)?;
    let pool = t.process.mm().pool().stats();
    let mut record = Record::<112>::zeroed();
    record.put_i64(0, uptime);
    record.put_u64(32, pool.frames as u64 * PAGE_SIZE).put_u64(40, pool.free as u64 * PAGE_SIZE);
    record.put_u16(80, t.process.group().len() as u16);
    record.put_u32(104, 1);
    t.process.user().write(into, &record.0)?;
    Ok(0)
}

pub(super) fn getrandom(t: &mut Thread, into: u64, len: u64, flags: u32) -> SysResult {
    const INSECURE: u32 = 4;
    const CHUNK: usize = 4096;
    const MAX_RW_COUNT: u64 = 0x7fff_f000;
    if flags & !(libc::GRND_NONBLOCK | libc::GRND_RANDOM | INSECURE) != 0
        || flags & (libc::GRND_RANDOM | INSECURE) == libc::GRND_RANDOM | INSECURE
    {
        return Err(Errno::EINVAL);
    }
    let len = len.min(MAX_RW_COUNT);
    UserMemory::check_range(into, len)?;
    let mut done = 0;
    while done < len {
        let mut bytes = [0; CHUNK];
        let wanted = (len - done).min(CHUNK as u64) as usize;
        let got = match t.process.random(&mut bytes[..wanted], flags) {
            Ok(got) => got,
            Err(errno) if done == 0 => return Err(errno),
            Err(_) => break,
        };
        let written = t.process.user().write_prefix(into + done, &bytes[..got]);
        done += written as u64;
        if written < got {
            break;
        }
        if t.waker.has_attention() {
            break;
        }
    }
    if done == 0 && len > 0 { Err(Errno::EFAULT) } else { Ok(done) }
}

pub(super) fn prctl(t: &mut Thread, option: i32, arguments: [u64; 4]) -> SysResult {
    let [argument, rest @ ..] = arguments;
    match option {
        libc::PR_SET_NAME => {
            let mut name = [0; 16];
            // Up to 15 bytes, or as many as there are before a NUL: the rest need not be readable.
            let read = t.process.user().read_prefix(argument, &mut name[..15]);
            let end = name[..read].iter().position(|&byte| byte == 0);
            match end {
                Some(end) => name[end..].fill(0),
                None if read < 15 => return Err(Errno::EFAULT),
                None => {}
            }
            t.name = name;
            Ok(0)
        }
        libc::PR_GET_NAME => {
            t.process.user().write(argument, &t.name)?;
            Ok(0)
        }
        libc::PR_SET_MEMORY_MERGE if rest == [0; 3] => {
            let any = if argument == 0 { MergeAny::Off } else { MergeAny::On };
            t.process.mm().set_merge_any(any)?;
            Ok(0)
        }
        libc::PR_GET_MEMORY_MERGE if arguments == [0; 4] => {
            Ok(u64::from(t.process.mm().merge_any() == MergeAny::On))
        }
        _ => Err(Errno::EINVAL),
    }
}

pub(super) fn arch_prctl(t: &mut Thread, vcpu: &mut dyn Vcpu, option: i32, argument: u64) -> SysResult {
    const ARCH_SET_GS: i32 = 0x1001;
    const ARCH_SET_FS: i32 = 0x1002;
    const ARCH_GET_FS: i32 = 0x1003;
    const ARCH_GET_GS: i32 = 0x1004;
    match option {
        ARCH_SET_FS | ARCH_SET_GS if argument >= TASK_SIZE => return Err(Errno::EPERM),
        ARCH_SET_FS => vcpu.regs_mut().fs_base = argument,
        ARCH_SET_GS => vcpu.regs_mut().gs_base = argument,
        ARCH_GET_FS => t.process.user().write_u64(argument, vcpu.regs().fs_base)?,
        ARCH_GET_GS => t.process.user().write_u64(argument, vcpu.regs().gs_base)?,
        _ => return Err(Errno::EINVAL),
    }
    Ok(0)
}

/// The CPUs that umbra may run on; a guest may not choose among them.
pub(super) fn sched_getaffinity(t: &mut Thread, tid: i32, len: u32, into: u64) -> SysResult {
    let mask = t.process.affinity()?;
    let enough = mask.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
    if !len.is_multiple_of(8) || (len as usize) < enough {
        return Err(Errno::EINVAL);
    }
    own(t, tid)?;
    let len = mask.len().min(len as usize);
    t.process.user().write(into, &mask[..len])?;
    Ok(len as u64)
}

pub(super) fn sched_setaffinity(t: &mut Thread, tid: i32, len: u32, from: u64) -> SysResult {
    let mut mask = vec![0; (len as usize).min(1024)];
    t.process.user().read(from, &mut mask)?;
    own(t, tid)?;
    if mask.iter().all(|&byte| byte == 0) {
        return Err(Errno::EINVAL);
    }
    Ok(0)
}

pub(super) fn getcpu(t: &mut Thread, cpu_to: u64, node_to: u64) -> SysResult {
    let (cpu, node) = t.process.cpu()?;
    for (to, value) in [(cpu_to, cpu), (node_to, node)] {
        if to != 0 {
            t.process.user().write_u32(to, value)?;
        }
    }
    Ok(0)
}

/// `getresuid` and `getresgid`: real, effective and saved are one.
pub(super) fn three_ids(t: &mut Thread, id: u64, into: [u64; 3]) -> SysResult {
    for to in into {
        t.process.user().write_u32(to, id as u32)?;
    }
    Ok(0)
}

pub(super) fn getpriority(which: i32, who: i32) -> SysResult {
    match (which, who) {
        (0..=2, 0) => host::priority(),
        (0..=2, _) => Err(Errno::ESRCH),
        _ => Err(Errno::EINVAL),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::testing::Fixture;

    fn errno(errno: Errno) -> i64 {
        -i64::from(errno.0)
    }

    #[test]
    fn a_thread_has_segment_bases_and_a_name() {
        let fixture = Fixture::new();
        let page = fixture.map_pages(1);
        let call = |number, args: &[u64]| fixture.main.call(number, args);
        assert_eq!(call(libc::SYS_arch_prctl, &[0x1002, 0x5000]), 0);
        assert_eq!(call(libc::SYS_arch_prctl, &[0x1003, page]), 0);
        assert_eq!(fixture.user().read_u64(page), Ok(0x5000));
        assert_eq!(call(libc::SYS_arch_prctl, &[0x1001, 1 << 47]), errno(Errno::EPERM));
        assert_eq!(call(libc::SYS_arch_prctl, &[0x1002, u64::MAX]), errno(Errno::EPERM));
        assert_eq!(call(libc::SYS_arch_prctl, &[0x3001, 0]), errno(Errno::EINVAL));
        assert_eq!(call(libc::SYS_prctl, &[libc::PR_GET_NAME as u64, page]), 0);
        assert_eq!(fixture.user().read_u64(page), Ok(u64::from_le_bytes(*b"fake\0\0\0\0")));
        fixture.user().write(page + 4091, b"name\0").unwrap();
        assert_eq!(call(libc::SYS_prctl, &[libc::PR_SET_NAME as u64, page + 4091]), 0);
        assert_eq!(call(libc::SYS_prctl, &[libc::PR_SET_NAME as u64, page + 4096]), errno(Errno::EFAULT));
        assert_eq!(call(libc::SYS_prctl, &[libc::PR_GET_NAME as u64, page]), 0);
        assert_eq!(fixture.user().read_u32(page), Ok(u32::from_le_bytes(*b"name")));
    }

    #[test]
    fn all_memory_is_let_be_merged_and_none_any_more() {
        let fixture = Fixture::new();
        let prctl = |args: &[u64]| fixture.main.call(libc::SYS_prctl, args);
        let (set, get) = (libc::PR_SET_MEMORY_MERGE as u64, libc::PR_GET_MEMORY_MERGE as u64);
        assert_eq!(prctl(&[get, 0, 0, 0, 0]), 0);
        assert_eq!(prctl(&[set, 5, 0, 0, 0]), 0, "anything but 0 is yes");
        assert_eq!(prctl(&[get, 0, 0, 0, 0]), 1);
        assert_eq!(prctl(&[set, 0, 0, 0, 0]), 0);
        assert_eq!(prctl(&[get, 0, 0, 0, 0]), 0);
        for at in 2..5 {
            let mut args = [set, 1, 0, 0, 0];
            args[at] = 1;
            assert_eq!(prctl(&args), errno(Errno::EINVAL), "argument {at}");
        }
        for at in 1..5 {
            let mut args = [get, 0, 0, 0, 0];
            args[at] = 1;
            assert_eq!(prctl(&args), errno(Errno::EINVAL), "argument {at}");
        }
        assert_eq!(prctl(&[get, 0, 0, 0, 0]), 0, "what was refused changed nothing");
    }

    #[test]
    fn the_machine_describes_itself() {
        let fixture = Fixture::new();
        let page = fixture.map_pages(1);
        let call = |number, args: &[u64]| fixture.main.call(number, args);
        assert_eq!(call(libc::SYS_uname, &[page]), 0);
        assert_eq!(fixture.user().c_string(page, 65), Ok(Some(b"Linux".to_vec())));
        assert_eq!(fixture.user().c_string(page + 4 * 65, 65), Ok(Some(b"x86_64".to_vec())));
        assert_eq!(call(libc::SYS_sysinfo, &[page]), 0);
        assert_eq!(fixture.user().read_u64(page + 32), Ok(16 << 20));
        assert!(fixture.user().read_u64(page + 40).unwrap() < 16 << 20);
        assert!(call(libc::SYS_sched_getaffinity, &[0, 128, page]) >= 8);
        assert_ne!(fixture.user().read_u64(page), Ok(0));
        assert_eq!(call(libc::SYS_sched_getaffinity, &[0, 7, page]), errno(Errno::EINVAL));
        assert_eq!(call(libc::SYS_sched_getaffinity, &[1, 128, page]), errno(Errno::ESRCH));
        assert_eq!(call(libc::SYS_getcpu, &[page, page + 4]), 0);
        assert_eq!(call(libc::SYS_getrusage, &[0, page]), 0);
        assert_eq!(call(libc::SYS_getrusage, &[77, page]), errno(Errno::EINVAL));
    }

    #[test]
    fn random_bytes_stop_at_a_bad_pointer() {
        let fixture = Fixture::new();
        let page = fixture.map_pages(3);
        let call = |args: &[u64]| fixture.main.call(libc::SYS_getrandom, args);
        assert_eq!(call(&[page, 3 * 4096, 0]), 3 * 4096);
        assert_eq!(call(&[page + 4096, 1 << 20, 0]), 2 * 4096);
        assert_eq!(call(&[page, 1 << 40, 0]), errno(Errno::EFAULT), "cut to 2 GiB, that is still too far");
        assert_eq!(call(&[page + 3 * 4096, 1, 0]), errno(Errno::EFAULT));
        assert_eq!(call(&[page, 1, 8]), errno(Errno::EINVAL));
        assert_eq!(call(&[page, 1, 6]), errno(Errno::EINVAL));
        assert_eq!(call(&[0, 0, 0]), 0);
    }
}
