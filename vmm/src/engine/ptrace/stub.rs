// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The stub: the two pages of the engine in the guest's process, through which that process makes system calls for the engine.
//!
//! They lie right above what a guest may map ([`TASK_SIZE`]), in frames of the pool, written by umbra through its own mapping. They
//! have no secrets and need no protection from the guest: a `syscall` that a guest thread executes, in the stub or anywhere, is a
//! stop of that thread like any other (PTRACE_SYSEMU), and a stop with rip in here is reported as the page fault that jumping here
//! would have been.
//!
//! ```text
//! code  read, execute   one call; clone; bases; a list of calls: entered with registers set, left by int3, of which the rest is full
//! list  read            up to 73 calls of 56 bytes: number and six arguments in the order of registers below
//! ```
//!
//! The code has no byte at which a guest could jump in and find an instruction that stores to memory or returns; a test holds that.

use super::boot;
use shadow_mmu::addr::{PAGE_SIZE, TASK_SIZE};
use std::arch::global_asm;

/// Where it is in the guest's process.
pub(super) const STUB: u64 = TASK_SIZE;
/// Where its list is.
pub(super) const LIST: u64 = STUB + PAGE_SIZE;
/// First byte behind it.
pub(super) const STUB_END: u64 = LIST + PAGE_SIZE;
/// Bytes of an entry of the list.
pub(super) const LIST_ENTRY: usize = 56;
/// Entries of the list.
pub(super) const LIST_ENTRIES: usize = PAGE_SIZE as usize / LIST_ENTRY;
/// The descriptor of the pool in the guest's process, its only one.
pub(super) const POOL_FD: u64 = 0;

/// How a frame may be mapped, with or without MAP_POPULATE.
pub(super) const MAP_FLAGS: i32 = libc::MAP_SHARED | libc::MAP_FIXED;
/// How a thread is made.
pub(super) const CLONE_FLAGS: i32 = libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM;

global_asm!(
    ".pushsection .rodata",
    ".globl umbra_stub_begin, umbra_stub_call, umbra_stub_clone, umbra_stub_bases, umbra_stub_list",
    ".globl umbra_stub_end",
    "umbra_stub_begin:",
    "umbra_stub_call:", // registers as for the call
    "syscall",
    "int3",
    "nop", // no entry is where another ends
    "umbra_stub_clone:",
    "syscall",
    "xchg rax, rcx", // of all 64 bits: an error is negative
    "jrcxz 2f",
    "xchg rax, rcx",
    "int3",
    "nop",
    "2:", // the new thread waits for its tracer here
    "lea eax, [rcx + {pause}]",
    "syscall",
    "xor ecx, ecx",
    "jmp 2b",
    "umbra_stub_bases:", // rax: of fs, rdx: of gs
    "wrfsbase rax",
    "wrgsbase rdx",
    "int3",
    "nop",
    "umbra_stub_list:", // rsp: the first entry, rbp: behind the last
    "3:",
    "pop rax",
    "pop rdi",
    "pop rsi",
    "pop rdx",
    "pop r10",
    "pop r8",
    "pop r9",
    "syscall",
    "nop", // so that no displacement is an opcode that stores
    "bt rax, 63", // an error is negative, an address is not
    "jc 4f",
    "cmp rsp, rbp",
    "jb 3b",
    "xor eax, eax",
    "4:", // rax: 0, or what the call said that failed
    "int3",
    "umbra_stub_end:",
    ".popsection",
    pause = const libc::SYS_pause,
);

unsafe extern "C" {
    static umbra_stub_begin: u8;
    static umbra_stub_call: u8;
    static umbra_stub_clone: u8;
    static umbra_stub_bases: u8;
    static umbra_stub_list: u8;
    static umbra_stub_end: u8;
}

/// Bytes of a `syscall` instruction.
const SYSCALL_BYTES: u64 = 2;
const INT3: u8 = 0xcc;

/// What the first page holds: the code, and nothing that does anything behind it.
pub(super) fn page() -> Vec<u8> {
    let mut page = code().to_vec();
    page.resize(PAGE_SIZE as usize, INT3);
    page
}

/// The code.
fn code() -> &'static [u8] {
    let (begin, end) = (&raw const umbra_stub_begin, &raw const umbra_stub_end);
    // SAFETY: both labels are of one piece of read-only data of this program, one behind the other.
    unsafe { std::slice::from_raw_parts(begin, end.addr() - begin.addr()) }
}

fn at(label: *const u8) -> u64 {
    STUB + (label.addr() - (&raw const umbra_stub_begin).addr()) as u64
}

/// Where one call begins.
pub(super) fn call() -> u64 {
    at(&raw const umbra_stub_call)
}

/// Whether `rip` is behind an `int3` of the stub or of the boot program: where a call for the engine ends.
pub(super) fn is_behind_int3(rip: u64) -> bool {
    let offset = rip.wrapping_sub(STUB + 1);
    rip == boot::END || usize::try_from(offset).is_ok_and(|at| code().get(at) == Some(&INT3))
}

/// Where making a thread begins.
pub(super) fn clone() -> u64 {
    at(&raw const umbra_stub_clone)
}

/// Where the bases of fs and gs are set, to any address that the CPU takes. Only for those that `wrfsbase` gave a guest.
pub(super) fn bases() -> u64 {
    at(&raw const umbra_stub_bases)
}

/// Where a list of calls begins.
pub(super) fn list() -> u64 {
    at(&raw const umbra_stub_list)
}

/// Whether `rip` is in here.
pub(super) fn contains(rip: u64) -> bool {
    (STUB..STUB_END).contains(&rip)
}

/// Where rip may be when the filter sees a call: behind the `syscall` instructions. They are the only 0f 05 in there, a test holds.
pub(super) fn sites() -> Vec<u64> {
    let calls = code().windows(2).enumerate().filter(|(_, bytes)| bytes == b"\x0f\x05");
    calls.map(|(offset, _)| STUB + offset as u64 + SYSCALL_BYTES).collect()
}

#[cfg(test)]
mod tests {
    use super::super::boot;
    use super::*;

    #[test]
    fn wherever_a_guest_jumps_into_the_stub_nothing_is_stored() {
        use iced_x86::{Decoder, DecoderOptions, FlowControl, InstructionInfoFactory, OpAccess};
        let page = page();
        let mut factory = InstructionInfoFactory::new();
        for at in 0..code().len() {
            let instruction = Decoder::with_ip(64, &page[at..], STUB, DecoderOptions::NONE).decode();
            assert_ne!(instruction.flow_control(), FlowControl::Return, "{at}: {:?}", instruction.code());
            let reads =
                |access| matches!(access, OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess);
            let info = factory.info(&instruction);
            assert!(
                instruction.is_invalid() || info.used_memory().iter().all(|memory| reads(memory.access())),
                "{at}: {:?}",
                instruction.code()
            );
        }
    }

    #[test]
    fn the_filter_knows_every_call_of_the_stub() {
        let code = code();
        let mut decoder = iced_x86::Decoder::with_ip(64, code, STUB, iced_x86::DecoderOptions::NONE);
        let calls = decoder.iter().filter(|instruction| instruction.code() == iced_x86::Code::Syscall);
        assert_eq!(calls.map(|call| call.next_ip()).collect::<Vec<_>>(), sites());
        assert_eq!(sites().len(), 4);
        // A thread that has not left an entry yet has not come to an end.
        assert!([call(), clone(), bases(), list(), boot::CODE].iter().all(|&entry| !is_behind_int3(entry)));
        let ends = (STUB..STUB_END).filter(|&rip| is_behind_int3(rip)).count();
        assert_eq!(ends, 4);
    }
}
