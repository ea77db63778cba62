// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One thread of the guest's process, as its tracer sees it: ptrace(2).
//!
//! Linux ties a tracee to the *thread* that traces it. So everything here is to be called by
//! that thread, and but for [`wait`](Tracee::wait) while the tracee is stopped. From any other thread the kernel answers ESRCH.
//!
//! Signals that come to the guest's process from outside (its terminal, an operator) are not the guest's. They are blocked, and
//! where one cannot be blocked it is not delivered; SIGKILL is, and ends the process.

use super::filter::AUDIT_ARCH_X86_64;
use super::gone::gone;
use super::interrupt::TraceeInterrupt;
use super::stub;
use crate::engine::regs::FIXED_FLAGS;
use libc::{c_int, c_long, c_uint, pid_t, user_regs_struct};
use shadow_mmu::addr::LINUX_TASK_SIZE;
use std::io;
use std::mem::offset_of;

/// The selectors of 64-bit ring 3.
pub(super) const USER_CS: u64 = 0x33;
const USER_SS: u64 = 0x2b;
/// It dies with its tracer, and its system call stops are told from SIGTRAP.
const OPTIONS: c_int = libc::PTRACE_O_EXITKILL | libc::PTRACE_O_TRACESYSGOOD;
/// `PTRACE_O_TRACESYSGOOD` makes system call stops SIGTRAP with this bit.
const SYSGOOD: c_int = 0x80;
const PTRACE_EVENT_STOP: c_int = 128;

/// Requests that take numbers: none of umbra's memory is read or written for them.
#[derive(Debug, Clone, Copy)]
#[repr(u32)]
enum Plain {
    PokeUser = libc::PTRACE_POKEUSER,
    Continue = libc::PTRACE_CONT,
    Sysemu = 31,
    SetOptions = libc::PTRACE_SETOPTIONS,
    Seize = libc::PTRACE_SEIZE,
    Interrupt = libc::PTRACE_INTERRUPT,
}

/// Why a tracee stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    /// It made a system call, which was not carried out.
    Syscall,
    /// A signal is about to be delivered to it.
    Signal(c_int),
    /// It was attached to.
    Attached,
    /// It exists no more. The status as wait(2) gives it.
    Gone(c_int),
}

/// How it goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Resume {
    /// As the guest: system calls are stops.
    Guest,
    /// As the engine: system calls are made.
    Engine,
}

/// A thread of the guest's process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tracee {
    pub(super) pid: pid_t,
    pub(super) tid: pid_t,
}

fn checked(result: c_long) -> io::Result<()> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

impl Tracee {
    fn request(self, request: Plain, address: usize, data: usize) -> io::Result<()> {
        // SAFETY: takes numbers; the kernel checks who may.
        checked(unsafe { libc::ptrace(request as c_uint, self.tid, address, data) })
    }

    /// A request that the kernel answers by filling in `data`.
    ///
    /// # Safety
    /// With this `address` the kernel writes no more than a `T`, any bytes of which are one, and nothing else.
    unsafe fn get<T>(self, request: c_uint, address: usize, data: &mut T) -> io::Result<()> {
        // SAFETY: the caller's word; the kernel checks who may.
        checked(unsafe { libc::ptrace(request, self.tid, address, std::ptr::from_mut(data)) })
    }

    /// A request for which the kernel reads `data`.
    ///
    /// # Safety
    /// With this `address` the kernel reads no more than a `T`, and writes nothing.
    unsafe fn set<T>(self, request: c_uint, address: usize, data: &T) -> io::Result<()> {
        // SAFETY: the caller's word; the kernel checks who may.
        checked(unsafe { libc::ptrace(request, self.tid, address, std::ptr::from_ref(data)) })
    }

    /// Attaches to a thread that runs, and waits until it has stopped.
    pub(super) fn seize(self) -> io::Result<()> {
        self.request(Plain::Seize, 0, OPTIONS as usize)?;
        self.request(Plain::Interrupt, 0, 0)?;
        loop {
            match self.wait()? {
                Stop::Attached => break,
                Stop::Gone(status) => return Err(gone(status)),
                Stop::Signal(_) | Stop::Syscall => self.resume(Resume::Engine)?,
            }
        }
        // What comes from outside stays pending and stops nothing; faults and kicks do.
        let stops = [
            libc::SIGSEGV,
            libc::SIGBUS,
            libc::SIGILL,
            libc::SIGFPE,
            libc::SIGTRAP,
            libc::SIGSYS,
            TraceeInterrupt::SIGNAL,
        ];
        self.block_signals(!stops.iter().fold(0, |mask, signal| mask | 1 << (signal - 1)))
    }

    /// Blocks these signals (bit 0 is signal 1) for the tracee. Threads that it makes begin with the same.
    pub(super) fn block_signals(self, mask: u64) -> io::Result<()> {
        const PTRACE_SETSIGMASK: c_uint = 0x420b;
        // SAFETY: the address is the size of the mask.
        unsafe { self.set(PTRACE_SETSIGMASK, size_of::<u64>(), &mask) }
    }

    /// Sets the options of one that asked to be traced.
    pub(super) fn set_options(self) -> io::Result<()> {
        self.request(Plain::SetOptions, 0, OPTIONS as usize)
    }

    /// Lets it go on.
    pub(super) fn resume(self, how: Resume) -> io::Result<()> {
        match how {
            Resume::Guest => self.request(Plain::Sysemu, 0, 0),
            Resume::Engine => self.request(Plain::Continue, 0, 0),
        }
    }

    /// Waits until it stops or is gone.
    pub(super) fn wait(self) -> io::Result<Stop> {
        let mut status = 0;
        loop {
            // SAFETY: the status is ours, and this thread is the tracer.
            let result = unsafe { libc::waitpid(self.tid, &raw mut status, libc::__WALL) };
            if result == self.tid {
                break;
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
        if !libc::WIFSTOPPED(status) {
            return Ok(Stop::Gone(status));
        }
        Ok(match libc::WSTOPSIG(status) {
            signal if signal == libc::SIGTRAP | SYSGOOD => Stop::Syscall,
            _ if status >> 16 == PTRACE_EVENT_STOP => Stop::Attached,
            signal => Stop::Signal(signal),
        })
    }

    /// All general registers, segments and bases.
    pub(super) fn registers(self) -> io::Result<user_regs_struct> {
        let mut registers = plain_registers();
        // SAFETY: fills in a user_regs_struct.
        unsafe { self.get(libc::PTRACE_GETREGS, 0, &mut registers) }?;
        Ok(registers)
    }

    /// Sets them.
    pub(super) fn set_registers(self, registers: &user_regs_struct) -> io::Result<()> {
        // SAFETY: reads a user_regs_struct.
        unsafe { self.set(libc::PTRACE_SETREGS, 0, registers) }
    }

    /// Sets them for a guest, whose bases of fs and gs may be where `wrfsbase` puts them and ptrace does not.
    pub(super) fn set_guest_registers(self, registers: &user_regs_struct) -> io::Result<()> {
        if registers.fs_base < LINUX_TASK_SIZE && registers.gs_base < LINUX_TASK_SIZE {
            return self.set_registers(registers);
        }
        let bases = user_regs_struct {
            rip: stub::bases(),
            rax: registers.fs_base,
            rdx: registers.gs_base,
            ..plain_registers()
        };
        self.run_stub(&bases)?;
        // One by one, all but these two and the segments behind them.
        // SAFETY: the structure is 27 words, as the kernel has it, and any words are an array.
        let words: [u64; size_of::<user_regs_struct>() / size_of::<u64>()] =
            unsafe { std::mem::transmute(*registers) };
        let first = offset_of!(user_regs_struct, fs_base) / size_of::<u64>();
        words[..first]
            .iter()
            .enumerate()
            .try_for_each(|(n, &word)| self.request(Plain::PokeUser, n * size_of::<u64>(), word as usize))
    }

    /// What the signal says that it stopped for.
    pub(super) fn signal_info(self) -> io::Result<libc::siginfo_t> {
        // SAFETY: a siginfo_t is plain data, and zeros are one.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        // SAFETY: fills in a siginfo_t.
        unsafe { self.get(libc::PTRACE_GETSIGINFO, 0, &mut info) }?;
        Ok(info)
    }

    /// The XSAVE area, up to `state.len()` bytes of it; how many there were.
    pub(super) fn xstate(self, state: &mut [u8]) -> io::Result<usize> {
        let mut area = libc::iovec { iov_base: state.as_mut_ptr().cast(), iov_len: state.len() };
        // SAFETY: sets the length in the iovec, and fills in up to so many bytes of `state`, which is borrowed for that.
        unsafe { self.get(libc::PTRACE_GETREGSET, NT_X86_XSTATE, &mut area) }?;
        Ok(area.iov_len)
    }

    /// Sets it.
    pub(super) fn set_xstate(self, state: &[u8]) -> io::Result<()> {
        let mut area = libc::iovec { iov_base: state.as_ptr().cast_mut().cast(), iov_len: state.len() };
        // SAFETY: sets the length in the iovec, which is ours, and reads `state`.
        unsafe { self.get(libc::PTRACE_SETREGSET, NT_X86_XSTATE, &mut area) }
    }

    /// Which of the two ways into the kernel a system call took.
    pub(super) fn is_64_bit_call(self) -> io::Result<bool> {
        const PTRACE_GET_SYSCALL_INFO: c_uint = 0x420e;
        /// The head of ptrace_syscall_info; the kernel copies as much as it is asked for.
        #[repr(C)]
        #[derive(Default)]
        struct Head {
            op: u8,
            pad: [u8; 3],
            arch: u32,
        }
        let mut head = Head::default();
        // SAFETY: the address is the size of the head, and the kernel writes no more.
        unsafe { self.get(PTRACE_GET_SYSCALL_INFO, size_of::<Head>(), &mut head) }?;
        Ok(head.arch == AUDIT_ARCH_X86_64)
    }
}

const NT_X86_XSTATE: usize = 0x202;

/// Registers with which the stub can run.
pub(super) fn plain_registers() -> user_regs_struct {
    user_regs_struct {
        r15: 0,
        r14: 0,
        r13: 0,
        r12: 0,
        rbp: 0,
        rbx: 0,
        r11: 0,
        r10: 0,
        r9: 0,
        r8: 0,
        rax: 0,
        rcx: 0,
        rdx: 0,
        rsi: 0,
        rdi: 0,
        // No system call to be restarted.
        orig_rax: u64::MAX,
        rip: 0,
        cs: USER_CS,
        eflags: FIXED_FLAGS,
        rsp: 0,
        ss: USER_SS,
        fs_base: 0,
        gs_base: 0,
        ds: 0,
        es: 0,
        fs: 0,
        gs: 0,
    }
}
