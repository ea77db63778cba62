// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One thread of the guest's process, as its tracer sees it: ptrace(2), and system calls that the thread makes for the engine.
//!
//! Linux ties a tracee to the *thread* that traces it. So everything here but [`interrupt`](Tracee::interrupt) is to be called by
//! that thread, and but for [`wait`](Tracee::wait) while the tracee is stopped. From any other thread the kernel answers ESRCH.
//!
//! Signals that come to the guest's process from outside (its terminal, an operator) are not the guest's. They are blocked, and
//! where one cannot be blocked it is not delivered; SIGKILL is, and ends the process.

use super::interrupt::TraceeInterrupt;
use super::stub::{self, AUDIT_ARCH_X86_64, LIST, LIST_ENTRIES, LIST_ENTRY};
use crate::engine::regs::FIXED_FLAGS;
use libc::{c_int, c_long, c_uint, pid_t, user_regs_struct};
use shadow_mmu::addr::{LINUX_TASK_SIZE, Pfn};
use shadow_mmu::frame::FramePool;
use std::io;
use std::mem::offset_of;
use std::time::{Duration, Instant};

/// The selectors of 64-bit ring 3.
pub(super) const USER_CS: u64 = 0x33;
const USER_SS: u64 = 0x2b;
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

/// One call for a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Call {
    pub(super) number: c_long,
    pub(super) arguments: [u64; 6],
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

/// Something that a tracee did which the engine did not ask it for.
fn unexpected(what: impl std::fmt::Display) -> io::Error {
    io::Error::other(format!("{what}"))
}

/// A tracee is gone, and this is why.
#[derive(Debug, Clone, thiserror::Error)]
#[error("the guest's process {0}")]
struct Ended(String);

/// Why a tracee is gone, for one that umbra did not end itself.
pub(super) fn gone(status: c_int) -> io::Error {
    io::Error::other(Ended(if libc::WIFSIGNALED(status) {
        let signal = libc::WTERMSIG(status);
        format!("was ended by signal {signal}, from outside umbra (by hand, or by the OOM killer)")
    } else {
        format!("ended by itself, status {status:#x}")
    }))
}

fn how_it_ended(error: &io::Error) -> Option<&Ended> {
    error.get_ref()?.downcast_ref()
}

/// Whether `error` tells how a tracee ended.
pub(super) fn is_end(error: &io::Error) -> bool {
    how_it_ended(error).is_some()
}

/// Whether `error` is that the tracee is gone, or about to be.
pub(super) fn is_of_its_end(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ESRCH) || is_end(error)
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
        const OPTIONS: c_int = libc::PTRACE_O_EXITKILL | libc::PTRACE_O_TRACESYSGOOD;
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

    /// The same options for one that asked to be traced.
    pub(super) fn set_options(self) -> io::Result<()> {
        const OPTIONS: c_int = libc::PTRACE_O_EXITKILL | libc::PTRACE_O_TRACESYSGOOD;
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

    /// Whether the signal that it stopped with is of what it did, not somebody's.
    fn is_fault(self, signal: c_int) -> io::Result<bool> {
        const FAULTS: [c_int; 5] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGSYS];
        Ok(FAULTS.contains(&signal) && self.signal_info()?.si_code > 0)
    }

    /// Runs the stub from `rip` with these registers to its `int3`; signals that come meanwhile are dropped.
    fn run_stub(self, registers: &user_regs_struct) -> io::Result<user_regs_struct> {
        self.set_registers(registers)?;
        loop {
            self.resume(Resume::Engine)?;
            match self.wait()? {
                Stop::Signal(libc::SIGTRAP) => {
                    let registers = self.registers()?;
                    if stub::is_behind_int3(registers.rip) {
                        return Ok(registers);
                    }
                    // Somebody's signal.
                }
                Stop::Signal(signal) if self.is_fault(signal)? => {
                    let registers = self.registers()?;
                    return Err(unexpected(format!(
                        "signal {signal} at {:#x} in place of system call {}",
                        registers.rip, registers.rax as i64
                    )));
                }
                Stop::Gone(status) => return Err(gone(status)),
                // A kick that came late, or somebody's signal. The kick is known from the run state.
                Stop::Signal(_) | Stop::Attached | Stop::Syscall => {}
            }
        }
    }

    /// Has it make one system call, by the instruction at `site`. Its registers are not what they were.
    ///
    /// # Errors
    /// The call's own, as an OS error. Any other: the tracee is lost.
    pub(super) fn call_at(self, site: u64, number: c_long, arguments: &[u64]) -> io::Result<u64> {
        let argument = |n: usize| arguments.get(n).copied().unwrap_or(0);
        let done = self.run_stub(&user_regs_struct {
            rip: site,
            rax: number as u64,
            rdi: argument(0),
            rsi: argument(1),
            rdx: argument(2),
            r10: argument(3),
            r8: argument(4),
            r9: argument(5),
            ..plain_registers()
        })?;
        result(done.rax)
    }

    /// The same by the stub.
    pub(super) fn call(self, number: c_long, arguments: &[u64]) -> io::Result<u64> {
        self.call_at(stub::call(), number, arguments)
    }

    /// Makes a further thread of the process, which waits for a tracer. For the thread that runs no guest.
    ///
    /// Until the new one is attached to nobody is there to drop signals from outside, which would end the process. So it
    /// inherits that all are blocked.
    pub(super) fn new_thread(self) -> io::Result<Self> {
        self.block_signals(u64::MAX)?;
        let tid = self.call_at(stub::clone(), libc::SYS_clone, &[stub::CLONE_FLAGS as u64])?;
        Ok(Self { pid: self.pid, tid: tid as pid_t })
    }

    /// Has it make many calls, in as few stops as the list allows. `list` is the list's frame; the caller sees to it that nobody
    /// else uses it.
    ///
    /// # Errors
    /// As for [`call_at`](Self::call_at): some of the calls may have been made.
    pub(super) fn calls(self, calls: &[Call], pool: &FramePool, list: Pfn) -> io::Result<()> {
        if let [call] = calls {
            return self.call(call.number, &call.arguments).map(drop);
        }
        for calls in calls.chunks(LIST_ENTRIES) {
            let mut entries = Vec::with_capacity(calls.len() * LIST_ENTRY);
            for call in calls {
                entries.extend((call.number as u64).to_le_bytes());
                call.arguments.iter().for_each(|word| entries.extend(word.to_le_bytes()));
            }
            pool.write(list, 0, &entries);
            let end = LIST + entries.len() as u64;
            let entry = user_regs_struct { rip: stub::list(), rsp: LIST, rbp: end, ..plain_registers() };
            match self.run_stub(&entry) {
                Ok(done) => drop(result(done.rax)?),
                Err(error) if is_of_its_end(&error) => return Err(error),
                // A guest may have forbidden its thread to read anything (PKRU). One by one nothing is read.
                Err(_) => {
                    calls.iter().try_for_each(|call| self.call(call.number, &call.arguments).map(drop))?
                }
            }
        }
        Ok(())
    }

    /// Ends the thread, and waits until it has. For the tracer, while the tracee is stopped.
    pub(super) fn exit(self) -> io::Result<()> {
        self.set_registers(&user_regs_struct {
            rip: stub::call(),
            rax: libc::SYS_exit as u64,
            ..plain_registers()
        })?;
        loop {
            self.resume(Resume::Engine)?;
            match self.wait()? {
                Stop::Gone(_) => return Ok(()),
                Stop::Signal(signal) if self.is_fault(signal)? => {
                    return Err(unexpected(format!("signal {signal} in place of its end")));
                }
                _ => {}
            }
        }
    }

    /// How it ended, if it has; for its tracer.
    pub(super) fn ended(self) -> Option<io::Error> {
        let mut status = 0;
        // SAFETY: the status is ours.
        match unsafe { libc::waitpid(self.tid, &raw mut status, libc::__WALL | libc::WNOHANG) } {
            0 => None,
            // It was waited for before.
            -1 => Some(io::Error::other(Ended("has ended".to_owned()))),
            _ => (!libc::WIFSTOPPED(status)).then(|| gone(status)),
        }
    }

    /// The same after `error`, which it gave. Of one that is being killed ptrace says that there is none (ESRCH), or that it must not
    /// be attached to (EPERM), some time before there is anything to wait for.
    pub(super) fn ended_with(self, error: &io::Error) -> Option<io::Error> {
        const PATIENCE: Duration = Duration::from_secs(1);
        if let Some(ended) = how_it_ended(error) {
            return Some(io::Error::other(ended.clone()));
        }
        let began = Instant::now();
        loop {
            let ended = self.ended();
            let may_be_dying = matches!(error.raw_os_error(), Some(libc::ESRCH | libc::EPERM));
            if ended.is_some() || !may_be_dying || began.elapsed() > PATIENCE {
                return ended;
            }
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    /// Waits until it exists no more: it ends already.
    pub(super) fn wait_until_gone(self) {
        while let Ok(stop) = self.wait() {
            if let Stop::Gone(_) = stop {
                return;
            }
        }
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

/// What a system call's rax says.
fn result(rax: u64) -> io::Result<u64> {
    if rax > -4096i64 as u64 {
        Err(io::Error::from_raw_os_error((rax as i64).wrapping_neg() as i32))
    } else {
        Ok(rax)
    }
}
