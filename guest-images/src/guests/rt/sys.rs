// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Linux system calls, as thin as they can be. Addresses are `usize`, because most of them are not pointers
//! to anything that Rust knows; what may pull memory away from under Rust is an unsafe function.

use core::arch::asm;
use core::fmt;
use core::sync::atomic::AtomicU32;

/// A system call's error number.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Errno(pub i32);

pub const EINTR: Errno = Errno(4);
pub const EBADF: Errno = Errno(9);
pub const ENOMEM: Errno = Errno(12);
pub const EFAULT: Errno = Errno(14);
pub const EEXIST: Errno = Errno(17);
pub const EINVAL: Errno = Errno(22);

pub const PROT_NONE: usize = 0;
pub const PROT_READ: usize = 1;
pub const PROT_WRITE: usize = 2;
pub const PROT_RW: usize = PROT_READ | PROT_WRITE;

pub const MAP_SHARED: usize = 0x01;
pub const MAP_PRIVATE: usize = 0x02;
pub const MAP_FIXED: usize = 0x10;
pub const MAP_ANONYMOUS: usize = 0x20;
pub const MAP_NORESERVE: usize = 0x4000;
pub const MAP_POPULATE: usize = 0x8000;
pub const MAP_FIXED_NOREPLACE: usize = 0x10_0000;

pub const MREMAP_MAYMOVE: usize = 1;
pub const MREMAP_FIXED: usize = 2;

pub const MADV_DONTNEED: usize = 4;
pub const MADV_MERGEABLE: usize = 12;
pub const MADV_UNMERGEABLE: usize = 13;
pub const MADV_NOHUGEPAGE: usize = 15;

/// Standard input.
pub const STDIN: usize = 0;

const READ: usize = 0;
const WRITE: usize = 1;
const MMAP: usize = 9;
const MPROTECT: usize = 10;
const MUNMAP: usize = 11;
const BRK: usize = 12;
const RT_SIGACTION: usize = 13;
const SCHED_YIELD: usize = 24;
const MREMAP: usize = 25;
const MADVISE: usize = 28;
const NANOSLEEP: usize = 35;
const GETPID: usize = 39;
const FUTEX: usize = 202;
const CLOCK_GETTIME: usize = 228;
const EXIT_GROUP: usize = 231;

/// What a system call returns: a number, or an error.
pub type Return = Result<usize, Errno>;

/// Any system call, by its number.
///
/// # Safety
/// The kernel does what the call says, to this process: see the call's manual page.
#[inline(always)]
pub unsafe fn syscall(number: usize, args: [usize; 6]) -> Return {
    let result: isize;
    // SAFETY: the registers are those of the x86-64 system-call ABI; `syscall` clobbers rcx and r11, and
    // memory, which is asm's default. What the call does is the caller's business.
    unsafe {
        asm!("syscall", inlateout("rax") number => result,
             in("rdi") args[0], in("rsi") args[1], in("rdx") args[2],
             in("r10") args[3], in("r8") args[4], in("r9") args[5],
             lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    if (-4095..0).contains(&result) { Err(Errno(-result as i32)) } else { Ok(result as usize) }
}

/// Reads bytes from a descriptor; returns how many, zero at the end.
pub fn read(fd: usize, bytes: &mut [u8]) -> Return {
    // SAFETY: the kernel writes the slice and nothing else.
    unsafe { syscall(READ, [fd, bytes.as_mut_ptr() as usize, bytes.len(), 0, 0, 0]) }
}

/// Writes bytes to a descriptor; returns how many.
pub fn write(fd: usize, bytes: &[u8]) -> Return {
    // SAFETY: the kernel reads the slice and nothing else.
    unsafe { syscall(WRITE, [fd, bytes.as_ptr() as usize, bytes.len(), 0, 0, 0]) }
}

/// Ends the process, all its threads.
pub fn exit_group(status: i32) -> ! {
    loop {
        // SAFETY: it does not return. If it did, trying again is all that is left.
        let _ = unsafe { syscall(EXIT_GROUP, [status as usize, 0, 0, 0, 0, 0]) };
    }
}

/// Maps anonymous memory.
///
/// # Safety
/// With MAP_FIXED, nothing that Rust knows may lie in the range.
pub unsafe fn mmap(addr: usize, len: usize, prot: usize, flags: usize) -> Return {
    // SAFETY: the caller's promise.
    unsafe { mmap_raw([addr, len, prot, flags | MAP_ANONYMOUS, usize::MAX, 0]) }
}

/// `mmap` with all its arguments: address, length, protection, flags, descriptor, offset.
///
/// # Safety
/// As `mmap`.
pub unsafe fn mmap_raw(args: [usize; 6]) -> Return {
    // SAFETY: the caller's promise.
    unsafe { syscall(MMAP, args) }
}

/// Maps `len` bytes of zeroed private memory at an address of the kernel's choice.
pub fn map_anywhere(len: usize, prot: usize) -> Return {
    // SAFETY: without MAP_FIXED no existing mapping is touched.
    unsafe { mmap(0, len, prot, MAP_PRIVATE | MAP_NORESERVE) }
}

/// # Safety
/// Nothing that Rust knows may lie in the range.
pub unsafe fn munmap(addr: usize, len: usize) -> Return {
    // SAFETY: the caller's promise.
    unsafe { syscall(MUNMAP, [addr, len, 0, 0, 0, 0]) }
}

/// # Safety
/// Nothing that Rust knows may lie in the range.
pub unsafe fn mprotect(addr: usize, len: usize, prot: usize) -> Return {
    // SAFETY: the caller's promise.
    unsafe { syscall(MPROTECT, [addr, len, prot, 0, 0, 0]) }
}

/// # Safety
/// Nothing that Rust knows may lie in the old range nor, with MREMAP_FIXED, in the new one.
pub unsafe fn mremap(addr: usize, old: usize, new: usize, flags: usize, to: usize) -> Return {
    // SAFETY: the caller's promise.
    unsafe { syscall(MREMAP, [addr, old, new, flags, to, 0]) }
}

/// # Safety
/// Nothing that Rust knows may lie in the range.
pub unsafe fn madvise(addr: usize, len: usize, advice: usize) -> Return {
    // SAFETY: the caller's promise.
    unsafe { syscall(MADVISE, [addr, len, advice, 0, 0, 0]) }
}

/// Moves the end of the heap and returns where it is now; an address below the heap (as 0) only asks.
///
/// # Safety
/// Nothing that Rust knows may lie in the part of the heap that goes away.
pub unsafe fn brk(end: usize) -> usize {
    // SAFETY: the caller's promise. brk returns an address in any case, never an error.
    unsafe { syscall(BRK, [end, 0, 0, 0, 0, 0]) }.unwrap_or(0)
}

/// The kernel's `struct sigaction` (not the C library's).
#[repr(C)]
pub struct SigAction {
    pub handler: usize,
    pub flags: usize,
    pub restorer: usize,
    pub mask: u64,
}

/// Sets what a signal does.
///
/// # Safety
/// `handler` must be a function that may run between any two instructions, `restorer` one that calls
/// `rt_sigreturn`.
pub unsafe fn rt_sigaction(signal: usize, action: &SigAction) -> Return {
    // SAFETY: the kernel reads `action`, whose mask is 8 bytes; the rest is the caller's promise.
    unsafe { syscall(RT_SIGACTION, [signal, &raw const *action as usize, 0, 8, 0, 0]) }
}

/// Asks for the process's id: a system call that does nothing.
pub fn getpid() {
    // SAFETY: it touches no memory.
    let _ = unsafe { syscall(GETPID, [0; 6]) };
}

/// Lets another thread run.
pub fn sched_yield() {
    // SAFETY: it touches no memory.
    let _ = unsafe { syscall(SCHED_YIELD, [0; 6]) };
}

/// Sleeps about so many nanoseconds (below one second); a signal ends it early.
pub fn nanosleep(nanoseconds: u64) {
    let time = [0, nanoseconds];
    // SAFETY: the kernel reads `time`, two words as a timespec has them.
    let _ = unsafe { syscall(NANOSLEEP, [time.as_ptr() as usize, 0, 0, 0, 0, 0]) };
}

/// CLOCK_MONOTONIC in nanoseconds, by a real system call: a guest has no vDSO.
pub fn now() -> u64 {
    let mut time = [0_u64; 2];
    // SAFETY: the kernel writes a timespec, two words, to `time`. The clock exists, so it cannot fail.
    let _ = unsafe { syscall(CLOCK_GETTIME, [1, time.as_mut_ptr() as usize, 0, 0, 0, 0]) };
    time[0] * 1_000_000_000 + time[1]
}

/// Waits until somebody wakes `word`, unless it is no longer `value`. Not FUTEX_PRIVATE: the wake at a
/// thread's exit, which is what the guests wait for, is a shared one.
pub fn futex_wait(word: &AtomicU32, value: u32) {
    // SAFETY: the kernel reads `word`. Errors (EAGAIN, EINTR) mean that the caller must look again, as it
    // does anyway.
    let _ = unsafe { syscall(FUTEX, [word.as_ptr() as usize, 0, value as usize, 0, 0, 0]) };
}

/// Wakes up to `count` threads that wait for `word` to change, however they wait.
pub fn futex_wake(word: &AtomicU32, count: usize) {
    // SAFETY: the kernel uses the address of `word` only. It cannot fail.
    let _ = unsafe { syscall(FUTEX, [word.as_ptr() as usize, 1, count, 0, 0, 0]) };
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            EBADF => f.write_str("EBADF"),
            ENOMEM => f.write_str("ENOMEM"),
            EFAULT => f.write_str("EFAULT"),
            EEXIST => f.write_str("EEXIST"),
            EINVAL => f.write_str("EINVAL"),
            Errno(38) => f.write_str("ENOSYS"),
            Errno(number) => write!(f, "errno {number}"),
        }
    }
}
