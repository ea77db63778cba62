// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The seccomp filter of the guest's process, behind PTRACE_SYSEMU from the end of the process's start on: a call is made only if it
//! comes from one of the stub's `syscall` instructions and is one that the engine makes: mapping frames of the pool, unmapping, making
//! a thread, waiting for its tracer, ending it, and what `rdtsc` does. Everything else is SIGSYS. So even a guest thread that ran
//! without its tracer could do nothing to the host, and no more than that to its own process.

use super::stub::{CLONE_FLAGS, LIST, MAP_FLAGS, POOL_FD, STUB, sites};
use libc::{sock_filter, sock_fprog};

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
fn filter() -> Vec<sock_filter> {
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
pub(super) fn as_bytes() -> Vec<u8> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use shadow_mmu::addr::PAGE_SIZE;

    #[test]
    fn the_filter_and_its_header_fit_into_the_list() {
        assert!(as_bytes().len() <= PAGE_SIZE as usize);
    }
}
