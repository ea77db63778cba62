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
//!
//! # Filter
//! From the end of the process's start on, a seccomp filter stands behind PTRACE_SYSEMU: a call is made only if it comes from one of
//! the stub's `syscall` instructions and is one that the engine makes: mapping frames of the pool, unmapping, making a thread,
//! waiting for its tracer, ending it, and what `rdtsc` does. Everything else is SIGSYS. So even a guest thread that ran without its tracer could do
//! nothing to the host, and no more than that to its own process.

use libc::{sock_filter, sock_fprog};
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
    rip == BOOT_END || usize::try_from(offset).is_ok_and(|at| code().get(at) == Some(&INT3))
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
fn sites() -> Vec<u64> {
    let calls = code().windows(2).enumerate().filter(|(_, bytes)| bytes == b"\x0f\x05");
    calls.map(|(offset, _)| STUB + offset as u64 + SYSCALL_BYTES).collect()
}

// Offsets in seccomp_data.
const NR: u32 = 0;
const ARCH: u32 = 4;
const IP_LOW: u32 = 8;
const IP_HIGH: u32 = 12;
/// Low half of an argument.
const fn low(argument: u32) -> u32 {
    16 + 8 * argument
}
/// High half of an argument.
const fn high(argument: u32) -> u32 {
    low(argument) + 4
}
/// System calls of 64-bit code, in seccomp_data and in ptrace_syscall_info.
pub(super) const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;

const fn statement(code: u32, k: u32) -> sock_filter {
    sock_filter { code: code as u16, jt: 0, jf: 0, k }
}
const fn load(offset: u32) -> sock_filter {
    statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset)
}
const REFUSE: sock_filter = statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_TRAP);
const ALLOW: sock_filter = statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW);

/// Refuses unless what was loaded is `value`.
fn must_be(value: u32) -> [sock_filter; 2] {
    [
        sock_filter { code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16, jt: 1, jf: 0, k: value },
        REFUSE,
    ]
}

/// What follows for call `nr`: `rules`, then it is allowed.
fn case(nr: libc::c_long, rules: &[sock_filter]) -> Vec<sock_filter> {
    let skip = u8::try_from(rules.len() + 1).unwrap_or(u8::MAX);
    let jump = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    let mut case = vec![load(NR), sock_filter { code: jump, jt: 0, jf: skip, k: nr as u32 }];
    case.extend_from_slice(rules);
    case.push(ALLOW);
    case
}

/// Argument `n` must be `value`, all 64 bits of it.
fn argument_is(n: u32, value: u64) -> Vec<sock_filter> {
    let (low_half, high_half) = (must_be(value as u32), must_be((value >> 32) as u32));
    [&[load(low(n))], &low_half[..], &[load(high(n))], &high_half[..]].concat()
}

/// The first argument must be an address below the stub.
fn below_the_stub() -> Vec<sock_filter> {
    let jump = |comparison: u32, k: u64, skip: u8| sock_filter {
        code: (libc::BPF_JMP | comparison | libc::BPF_K) as u16,
        jt: 0,
        jf: skip,
        k: k as u32,
    };
    let high_half = STUB >> 32;
    vec![
        load(high(0)),
        jump(libc::BPF_JGT, high_half, 1),
        REFUSE,
        jump(libc::BPF_JEQ, high_half, 3),
        load(low(0)),
        jump(libc::BPF_JGE, STUB & 0xffff_ffff, 1),
        REFUSE,
    ]
}

/// The filter.
pub(super) fn filter() -> Vec<sock_filter> {
    let mask = |bits: i32| statement(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, bits as u32);
    let one_of = |values: &[u32]| -> Vec<sock_filter> {
        let jump = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
        let n = values.len();
        let each =
            values.iter().enumerate().map(|(i, &k)| sock_filter { code: jump, jt: (n - i) as u8, jf: 0, k });
        each.chain([REFUSE]).collect()
    };
    let sites = sites();
    let mut filter = vec![load(ARCH)];
    filter.extend(must_be(AUDIT_ARCH_X86_64));
    filter.push(load(IP_HIGH));
    filter.extend(must_be((STUB >> 32) as u32));
    filter.push(load(IP_LOW));
    filter.extend(one_of(&sites.iter().map(|&site| site as u32).collect::<Vec<_>>()));
    // Frames of the pool, in place of others, and nothing else.
    let mut frames = below_the_stub();
    frames.extend([load(low(2)), mask(!(libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC))]);
    frames.extend(must_be(0));
    frames.extend([load(low(3)), mask(!libc::MAP_POPULATE)]);
    frames.extend(must_be(MAP_FLAGS as u32));
    frames.extend(argument_is(4, POOL_FD));
    filter.extend(case(libc::SYS_mmap, &frames));
    filter.extend(case(libc::SYS_munmap, &below_the_stub()));
    filter.extend(case(libc::SYS_clone, &argument_is(0, CLONE_FLAGS as u64)));
    filter.extend(case(libc::SYS_pause, &[]));
    filter.extend(case(libc::SYS_exit, &[]));
    filter.extend(case(libc::SYS_prctl, &argument_is(0, libc::PR_SET_TSC as u64)));
    filter.push(REFUSE);
    filter
}

/// The filter as the stub's list holds it while it is installed: `sock_fprog`, then its instructions.
pub(super) fn filter_as_bytes() -> Vec<u8> {
    let filter = filter();
    let instructions = LIST + size_of::<sock_fprog>() as u64;
    let mut bytes = (filter.len() as u16).to_le_bytes().to_vec();
    bytes.resize(8, 0);
    bytes.extend(instructions.to_le_bytes());
    for sock_filter { code, jt, jf, k } in filter {
        bytes.extend(code.to_le_bytes());
        bytes.extend([jt, jf]);
        bytes.extend(k.to_le_bytes());
    }
    bytes
}

/// Where [`BOOT`] is loaded.
pub(super) const BOOT_BASE: u64 = 0x40_0000;
/// Where its code is: behind the headers.
pub(super) const BOOT_CODE: u64 = BOOT_BASE + 64 + 56;
/// Behind its code.
const BOOT_END: u64 = BOOT_CODE + 3;

/// The program that the guest's process is started with: an ELF file with one call of the stub's in it, and nothing more. It is
/// what is there until the stub is mapped.
pub(super) fn boot_program() -> Vec<u8> {
    let mut elf = Vec::with_capacity(128);
    elf.extend(b"\x7fELF\x02\x01\x01");
    elf.resize(16, 0);
    let word16 = |elf: &mut Vec<u8>, value: u16| elf.extend(value.to_le_bytes());
    let word32 = |elf: &mut Vec<u8>, value: u32| elf.extend(value.to_le_bytes());
    let word64 = |elf: &mut Vec<u8>, value: u64| elf.extend(value.to_le_bytes());
    word16(&mut elf, 2); // ET_EXEC
    word16(&mut elf, 62); // EM_X86_64
    word32(&mut elf, 1);
    word64(&mut elf, BOOT_CODE); // entry
    word64(&mut elf, 64); // program headers
    word64(&mut elf, 0); // sections
    word32(&mut elf, 0);
    for value in [64, 56, 1, 0, 0, 0] {
        word16(&mut elf, value);
    }
    word32(&mut elf, 1); // PT_LOAD
    word32(&mut elf, 5); // read, execute
    let bytes = BOOT_END - BOOT_BASE;
    for value in [0, BOOT_BASE, BOOT_BASE, bytes, bytes, PAGE_SIZE] {
        word64(&mut elf, value);
    }
    elf.extend(b"\x0f\x05\xcc"); // syscall; int3
    elf
}

#[cfg(test)]
mod tests {
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
        assert!([call(), clone(), bases(), list(), BOOT_CODE].iter().all(|&entry| !is_behind_int3(entry)));
        let ends = (STUB..STUB_END).filter(|&rip| is_behind_int3(rip)).count();
        assert_eq!(ends, 4);
    }

    #[test]
    fn the_boot_program_ends_where_its_header_says() {
        let elf = boot_program();
        assert_eq!(elf.len() as u64, BOOT_END - BOOT_BASE);
    }

    #[test]
    fn the_filter_and_its_header_fit_into_the_list() {
        assert!(filter_as_bytes().len() <= PAGE_SIZE as usize);
    }
}
