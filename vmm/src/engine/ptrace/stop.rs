// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a stop of a guest thread means: signals and system call stops, told as the exceptions of the CPU that caused them.
//!
//! The kernel has turned exceptions into signals (`arch/x86/kernel/traps.c`, `mm/fault.c`); this goes back. Of a page fault the
//! signal tells the address, but not what the access was; [`access`](super::access) finds that out.
//!
//! System calls by another door than `syscall` (`int 0x80`, `sysenter`, code of the 32-bit segment) are no calls of a guest's: they
//! are the general-protection exceptions that they are where nobody serves them.

use super::access::is_x87;
use super::stub;
use super::tracee::{Tracee, USER_CS};
use crate::engine::exception::{
    ALIGNMENT, BREAKPOINT, DEBUG, DIVIDE_ERROR, GENERAL_PROTECTION, INVALID_OPCODE, SIMD, STACK_SEGMENT, X87,
};
use crate::engine::regs::with_general_registers;
use crate::engine::{Exit, Regs};
use libc::{c_int, user_regs_struct};
use shadow_mmu::addr::{Access, Gpa};
use std::io;

// si_code
const SI_KERNEL: c_int = 0x80;
const SEGV_MAPERR: c_int = 1;
const SEGV_ACCERR: c_int = 2;
const BUS_ADRALN: c_int = 1;
const FPE_INTDIV: c_int = 1;
const SYS_SECCOMP: c_int = 1;

/// The page of calls from before the vDSO, which the kernel serves to every process.
const VSYSCALL: u64 = 0xffff_ffff_ff60_0000;

/// What a stop is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Meaning {
    /// For whoever runs the vCPU.
    Exit(Exit),
    /// An access to this address failed in the guest's process.
    Fault(u64),
    /// A signal that is nobody's: the thread goes on.
    Nothing,
    /// The host has nothing behind a mapping of the pool.
    NoMemory(u64),
    /// The filter refused a call that is not the guest's doing.
    Filtered,
}

const fn exception(vector: u8) -> Meaning {
    Meaning::Exit(Exit::Exception { vector, error_code: 0 })
}

const fn fetch(addr: u64) -> Meaning {
    Meaning::Exit(Exit::PageFault { addr: Gpa(addr), access: Access::EXEC })
}

/// The guest's registers, from the kernel's.
pub(super) fn from_user(registers: &user_regs_struct) -> Regs {
    let user_regs_struct { fs_base, gs_base, .. } = *registers;
    with_general_registers!(registers, Regs { rflags: registers.eflags, fs_base, gs_base })
}

/// The stop of a system call; `registers` are those at it. Makes `regs` those behind the instruction, or those at it.
pub(super) fn syscall(tracee: Tracee, registers: &user_regs_struct, regs: &mut Regs) -> io::Result<Meaning> {
    // The kernel has put -ENOSYS into rax.
    regs.rax = registers.orig_rax;
    // A guest's last two bytes may be a `syscall`, and no call of the stub's comes back to its first byte.
    if stub::contains(registers.rip) && registers.rip != stub::STUB {
        return Ok(fetch(registers.rip));
    }
    // `syscall` leaves the return address in rcx; who has it there by another door gets what he could have had by this one.
    let by_syscall =
        registers.cs == USER_CS && (registers.rcx == registers.rip || tracee.is_64_bit_call()?);
    if by_syscall {
        return Ok(Meaning::Exit(Exit::Syscall));
    }
    // Two bytes back: `int 0x80`, or `sysenter`, of which the kernel does not tell where it was.
    regs.rip = registers.rip.wrapping_sub(2);
    Ok(exception(GENERAL_PROTECTION))
}

/// The stop before a signal is delivered.
pub(super) fn signal(
    signal: c_int,
    info: &libc::siginfo_t,
    registers: &user_regs_struct,
    regs: &mut Regs,
    xstate: impl FnOnce() -> io::Result<Vec<u8>>,
    code: impl FnOnce() -> Vec<u8>,
) -> io::Result<Meaning> {
    // Codes of the kernel's own are positive; 0 and below are somebody's.
    if registers.cs == USER_CS && info.si_code <= 0 {
        return Ok(Meaning::Nothing);
    }
    if registers.cs != USER_CS {
        // Where no guest has a segment. It comes back to its own with the next entry.
        return Ok(exception(GENERAL_PROTECTION));
    }
    // SAFETY: faults have an address there, and all others something else of the same size.
    let address = unsafe { info.si_addr() }.addr() as u64;
    if signal == libc::SIGSYS && info.si_code == SYS_SECCOMP {
        if address & !0xfff != VSYSCALL {
            return Ok(Meaning::Filtered);
        }
        // The kernel has gone back to the caller already.
        regs.rip = address;
        regs.rsp = regs.rsp.wrapping_sub(8);
        return Ok(fetch(address));
    }
    // The kernel looks at the caller's stack before it serves a call there, and blames the call for a page that is not mapped.
    if stub::contains(registers.rip) || registers.rip & !0xfff == VSYSCALL {
        return Ok(fetch(registers.rip));
    }
    Ok(match (signal, info.si_code) {
        (libc::SIGSEGV, SEGV_MAPERR | SEGV_ACCERR) => Meaning::Fault(address),
        // Whatever else it is (SEGV_PKUERR for one), no mapping would help.
        (libc::SIGSEGV, _) => exception(GENERAL_PROTECTION),
        (libc::SIGILL, _) => exception(INVALID_OPCODE),
        (libc::SIGTRAP, SI_KERNEL) => exception(BREAKPOINT),
        (libc::SIGTRAP, _) => exception(DEBUG),
        (libc::SIGFPE, FPE_INTDIV) => exception(DIVIDE_ERROR),
        (libc::SIGFPE, _) => exception(float_vector(&xstate()?, code)),
        (libc::SIGBUS, BUS_ADRALN) => exception(ALIGNMENT),
        (libc::SIGBUS, SI_KERNEL) => exception(STACK_SEGMENT),
        (libc::SIGBUS, _) => Meaning::NoMemory(address),
        _ => Meaning::Nothing,
    })
}

/// Which of the two units raised an exception: the one that has one which is not masked. Both may have, one of them from before;
/// then `code`, the instruction, says it.
fn float_vector(xstate: &[u8], code: impl FnOnce() -> Vec<u8>) -> u8 {
    let word = |at: usize| xstate.get(at..at + 2).map_or(0, |bytes| u16::from_le_bytes([bytes[0], bytes[1]]));
    let (control, status, mxcsr) = (word(0), word(2), word(24));
    let x87 = status & !control & 0x3f != 0;
    let simd = mxcsr & !(mxcsr >> 7) & 0x3f != 0;
    if x87 && (!simd || is_x87(&code())) { X87 } else { SIMD }
}
