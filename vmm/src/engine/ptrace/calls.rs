// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! System calls that a thread of the guest's process makes for the engine, through the stub. For the thread that traces it, while it is
//! stopped.
//!
//! # Errors
//! The call's own, as an OS error. Any other: the tracee is lost ([`gone`](super::gone) if it is gone).

use super::gone::{gone, is_of_its_end};
use super::stub::{self, LIST, LIST_ENTRIES, LIST_ENTRY};
use super::tracee::{Resume, Stop, Tracee, plain_registers};
use libc::{c_int, c_long, pid_t, user_regs_struct};
use shadow_mmu::addr::Pfn;
use shadow_mmu::frame::FramePool;
use std::io;

/// One call for a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Call {
    pub(super) number: c_long,
    pub(super) arguments: [u64; 6],
}

impl Tracee {
    /// Whether the signal that it stopped with is of what it did, not somebody's.
    fn is_fault(self, signal: c_int) -> io::Result<bool> {
        const FAULTS: [c_int; 5] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGSYS];
        Ok(FAULTS.contains(&signal) && self.signal_info()?.si_code > 0)
    }

    /// Runs the stub from `rip` with these registers to its `int3`; signals that come meanwhile are dropped.
    pub(super) fn run_stub(self, registers: &user_regs_struct) -> io::Result<user_regs_struct> {
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
                    return Err(io::Error::other(format!(
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
    /// Some of the calls may have been made.
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
                    return Err(io::Error::other(format!("signal {signal} in place of its end")));
                }
                _ => {}
            }
        }
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
