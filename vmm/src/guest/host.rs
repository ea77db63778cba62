// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The host's system calls that serve the guest's, as safe functions.
//!
//! None of them blocks except [`poll`] until its deadline, and reads and writes of descriptors that do not support
//! "do not wait", which callers make only after a poll. Structures stay the bytes that the kernel wrote: the guest's ABI
//! is the host's.

use super::errno::Errno;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Instant;

fn checked(result: i64) -> Result<u64, Errno> {
    if result < 0 { Err(Errno::of_host()) } else { Ok(result as u64) }
}

/// Polls until a descriptor is ready or `deadline` is reached; `None` waits for as long as it takes. Returns how many
/// are ready.
pub(super) fn poll(fds: &mut [libc::pollfd], deadline: Option<Instant>) -> Result<usize, Errno> {
    let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
    let left = left.map(|left| libc::timespec {
        tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(left.subsec_nanos()),
    });
    let left = left.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: `fds` is a live array of that length, `left` null or a live timespec; no signal mask is given.
    let ready = unsafe { libc::ppoll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, left, std::ptr::null()) };
    Ok(checked(i64::from(ready))? as usize)
}

/// Whether a read or a write may wait until it can go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wait {
    /// As the descriptor is set up.
    AsOpened,
    /// Never: `EAGAIN`, or `EOPNOTSUPP` where the descriptor cannot do that.
    Never,
}

impl Wait {
    fn flags(self) -> libc::c_int {
        match self {
            Self::AsOpened => 0,
            Self::Never => libc::RWF_NOWAIT,
        }
    }
}

/// Reads at `offset`, or at the file's own position for `None`.
pub(super) fn read(
    fd: BorrowedFd<'_>,
    into: &mut [u8],
    offset: Option<u64>,
    wait: Wait,
) -> Result<usize, Errno> {
    let iov = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
    let offset = offset.map_or(-1, |offset| offset as i64);
    // SAFETY: the one iovec describes `into`, which is ours to write.
    let read = unsafe { libc::preadv2(fd.as_raw_fd(), &iov, 1, offset, wait.flags()) };
    Ok(checked(read as i64)? as usize)
}

/// Writes at `offset`, or at the file's own position for `None`.
pub(super) fn write(
    fd: BorrowedFd<'_>,
    from: &[u8],
    offset: Option<u64>,
    wait: Wait,
) -> Result<usize, Errno> {
    let iov = libc::iovec { iov_base: from.as_ptr().cast_mut().cast(), iov_len: from.len() };
    let offset = offset.map_or(-1, |offset| offset as i64);
    // SAFETY: the one iovec describes `from`, which the kernel only reads.
    let written = unsafe { libc::pwritev2(fd.as_raw_fd(), &iov, 1, offset, wait.flags()) };
    Ok(checked(written as i64)? as usize)
}

/// `lseek`.
pub(super) fn seek(fd: BorrowedFd<'_>, offset: i64, whence: i32) -> Result<u64, Errno> {
    // SAFETY: moves the position of a descriptor that is borrowed to us; touches no memory.
    checked(unsafe { libc::lseek(fd.as_raw_fd(), offset, whence) })
}

/// `fsync` or `fdatasync`, by number.
pub(super) fn sync(fd: BorrowedFd<'_>, call: i64) -> Result<u64, Errno> {
    debug_assert!([libc::SYS_fsync, libc::SYS_fdatasync].contains(&call));
    // SAFETY: both calls take a descriptor and touch no memory.
    checked(unsafe { libc::syscall(call, fd.as_raw_fd()) })
}

/// `struct stat` of an open descriptor, as its 144 bytes.
pub(super) fn stat(fd: BorrowedFd<'_>) -> Result<[u8; 144], Errno> {
    const _: () = assert!(size_of::<libc::stat>() == 144);
    let mut stat = [0; 144];
    // SAFETY: the kernel writes a `struct stat`, 144 bytes, wherever they lie.
    checked(unsafe { libc::syscall(libc::SYS_fstat, fd.as_raw_fd(), stat.as_mut_ptr()) })?;
    Ok(stat)
}

/// `struct statx` of an open descriptor, as its 256 bytes.
pub(super) fn statx(fd: BorrowedFd<'_>, flags: i32, mask: u32) -> Result<[u8; 256], Errno> {
    const _: () = assert!(size_of::<libc::statx>() == 256);
    let mut statx = [0; 256];
    let (empty, into) = (c"".as_ptr(), statx.as_mut_ptr());
    // SAFETY: the path is a C string; the kernel writes a `struct statx`, 256 bytes, wherever they lie.
    checked(unsafe { libc::syscall(libc::SYS_statx, fd.as_raw_fd(), empty, flags, mask, into) })?;
    Ok(statx)
}

/// `F_GETFL`: access mode and status flags.
pub(super) fn file_flags(fd: BorrowedFd<'_>) -> Result<i32, Errno> {
    // SAFETY: reads flags of a descriptor that is borrowed to us.
    Ok(checked(i64::from(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) }))? as i32)
}

/// A second descriptor of the same open file, close-on-exec. By number, since what a process inherited has no owner.
///
/// # Errors
/// `EBADF`: nothing is open at `fd`.
pub(super) fn duplicate(fd: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: makes a new descriptor; does not touch `fd`.
    let new = checked(i64::from(unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) }))? as i32;
    // SAFETY: the kernel just made `new` for us and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(new) })
}

/// A clock's reading, or its resolution.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ClockQuery {
    /// `clock_gettime`.
    Time,
    /// `clock_getres`.
    Resolution,
}

/// Asks a clock; (seconds, nanoseconds).
pub(super) fn clock(clock: i32, query: ClockQuery) -> Result<(i64, i64), Errno> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    let result = match query {
        // SAFETY: `time` is ours to write.
        ClockQuery::Time => unsafe { libc::clock_gettime(clock, &mut time) },
        // SAFETY: as above.
        ClockQuery::Resolution => unsafe { libc::clock_getres(clock, &mut time) },
    };
    checked(i64::from(result))?;
    Ok((time.tv_sec, time.tv_nsec))
}

/// Random bytes; returns how many.
pub(super) fn random(into: &mut [u8], flags: u32) -> Result<usize, Errno> {
    // SAFETY: `into` is ours to write.
    let got = unsafe { libc::getrandom(into.as_mut_ptr().cast(), into.len(), flags) };
    Ok(checked(got as i64)? as usize)
}

/// `struct rusage` as its 144 bytes.
pub(super) fn rusage(who: i32) -> Result<[u8; 144], Errno> {
    const _: () = assert!(size_of::<libc::rusage>() == 144);
    let mut rusage = [0; 144];
    // SAFETY: the kernel writes a `struct rusage`, 144 bytes, wherever they lie.
    checked(unsafe { libc::syscall(libc::SYS_getrusage, who, rusage.as_mut_ptr()) })?;
    Ok(rusage)
}

/// `struct tms` as its 32 bytes, and the ticks that `times` returns.
pub(super) fn times() -> Result<([u8; 32], u64), Errno> {
    const _: () = assert!(size_of::<libc::tms>() == 32);
    let mut tms = [0; 32];
    // SAFETY: the kernel writes a `struct tms`, 32 bytes, wherever they lie.
    let ticks = checked(unsafe { libc::syscall(libc::SYS_times, tms.as_mut_ptr()) })?;
    Ok((tms, ticks))
}

/// The CPUs that umbra may run on, as the kernel's bit mask: as many bytes as the kernel uses.
pub(super) fn affinity() -> Result<Vec<u8>, Errno> {
    let mut mask = vec![0u8; 1024];
    // SAFETY: the kernel writes at most the length given.
    let len = unsafe { libc::syscall(libc::SYS_sched_getaffinity, 0, mask.len(), mask.as_mut_ptr()) };
    mask.truncate(checked(len)? as usize);
    Ok(mask)
}

/// The CPU and the NUMA node that this thread runs on.
pub(super) fn cpu() -> Result<(u32, u32), Errno> {
    let (mut cpu, mut node) = (0u32, 0u32);
    // SAFETY: both results are ours to write.
    checked(unsafe { libc::syscall(libc::SYS_getcpu, &mut cpu, &mut node, 0) })?;
    Ok((cpu, node))
}

/// Lets another thread run.
pub(super) fn sched_yield() {
    std::thread::yield_now();
}

/// A system call without arguments that cannot fail: an identity of umbra's own process.
pub(super) fn identity(call: i64) -> u64 {
    debug_assert!(
        [
            libc::SYS_getpid,
            libc::SYS_getppid,
            libc::SYS_getpgrp,
            libc::SYS_getuid,
            libc::SYS_geteuid,
            libc::SYS_getgid,
            libc::SYS_getegid
        ]
        .contains(&call)
    );
    // SAFETY: these calls take no arguments and touch no memory.
    (unsafe { libc::syscall(call) }) as u64
}

/// The session of umbra's own process.
pub(super) fn session() -> Result<u64, Errno> {
    // SAFETY: takes a number and touches no memory.
    checked(i64::from(unsafe { libc::getsid(0) }))
}

/// `getpriority(PRIO_PROCESS, 0)` as the system call gives it: 20 minus the nice value.
pub(super) fn priority() -> Result<u64, Errno> {
    // SAFETY: takes numbers and touches no memory.
    checked(unsafe { libc::syscall(libc::SYS_getpriority, libc::PRIO_PROCESS, 0) })
}
