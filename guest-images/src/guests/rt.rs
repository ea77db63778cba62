// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a guest has instead of a standard library: entry, system calls, arguments, output, faults, threads.
//!
//! It is compiled into each guest (`mod rt;`), so a guest is one translation unit and needs nothing but
//! `core`. It asks the kernel for little, and for nothing that a guest does not use: no TLS, no vDSO, no
//! auxiliary vector.

pub mod args;
pub mod fault;
pub mod input;
mod mem;
pub mod out;
pub mod random;
#[cfg(pie)]
mod reloc;
pub mod sys;
pub mod thread;

use core::arch::global_asm;

/// Bytes in a page.
pub const PAGE: usize = 4096;
/// 64-bit words in a page.
pub const WORDS: usize = PAGE / 8;

// The kernel enters here with rsp at argc and every other register undefined. The frame pointer is cleared so
// that a backtrace ends, and the stack is aligned as the C ABI wants it at a call.
#[cfg(not(pie))]
global_asm!(
    ".globl _start",
    ".type _start, @function",
    "_start:",
    "xor ebp, ebp",
    "mov rdi, rsp",
    "and rsp, -16",
    "call {start}",
    "ud2",
    start = sym start,
);

// A static-pie has no loader to relocate it, so it does that itself, and here in assembly: any Rust function
// might already read a pointer that has not been relocated yet.
#[cfg(pie)]
global_asm!(
    ".globl _start",
    ".type _start, @function",
    ".hidden __ehdr_start",
    ".hidden _DYNAMIC",
    "_start:",
    "xor ebp, ebp",
    "mov rbx, rsp",
    "and rsp, -16",
    "lea rdi, [rip + __ehdr_start]",
    "lea rsi, [rip + _DYNAMIC]",
    "call {relocate}",
    "mov rdi, rbx",
    "call {start}",
    "ud2",
    relocate = sym reloc::relocate,
    start = sym start,
);

/// Runs the guest's `run` and ends the process with what it returns.
extern "C" fn start(stack: *const usize) -> ! {
    // SAFETY: `_start` passes the stack pointer that the kernel set, which points at argc and argv.
    let args = unsafe { args::Args::from_stack(stack) };
    sys::exit_group(crate::run(args))
}
