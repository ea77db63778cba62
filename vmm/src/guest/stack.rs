// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a program finds on its stack when it starts: argc, argv, environment and auxiliary vector, and above them the
//! strings that those point to. The layout is that of the x86-64 psABI, section 3.4.1, as `create_elf_tables` makes it.

use super::errno::Errno;
use super::host;
use super::info::STACK_LIMIT;
use super::signal::signal_frame_size;
use std::arch::x86_64::__cpuid_count;

/// What a program is started with.
#[derive(Debug, Clone, Default)]
pub struct Arguments {
    /// argv, the program's name first.
    pub args: Vec<Vec<u8>>,
    /// The environment: `NAME=value`.
    pub env: Vec<Vec<u8>>,
    /// The program's path, for `AT_EXECFN`.
    pub exe: Vec<u8>,
    /// The 16 bytes of `AT_RANDOM`; from the host if not given.
    pub random: Option<[u8; 16]>,
}

/// Why arguments cannot be passed on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ArgumentsError {
    /// `E2BIG`.
    #[error(
        "arguments and environment take {bytes:#x} bytes, and at most {limit:#x} fit: pass fewer of them"
    )]
    TooLong {
        /// Bytes of all strings and of the pointers to them.
        bytes: u64,
        /// A quarter of the stack.
        limit: u64,
    },
    /// One string is longer than 128 KiB (`MAX_ARG_STRLEN`).
    #[error("an argument or an environment string of {0:#x} bytes is longer than {MAX_ARG_STRLEN:#x}")]
    StringTooLong(u64),
    /// A C string cannot hold it.
    #[error("an argument or an environment string contains a NUL")]
    Nul,
    /// The host has none.
    #[error("no random numbers for AT_RANDOM: {0}")]
    Random(Errno),
}

const MAX_ARG_STRLEN: u64 = 128 << 10;

/// The program headers in memory; all zeros if they are not.
#[derive(Debug, Clone, Copy)]
pub(super) struct ProgramHeaders {
    pub(super) addr: u64,
    pub(super) count: u64,
}

/// The stack's upper end, filled from the top down.
struct Builder {
    top: u64,
    /// The bytes below `top`, last byte first.
    reversed: Vec<u8>,
}

impl Builder {
    fn at(&self) -> u64 {
        self.top - self.reversed.len() as u64
    }
    /// Puts `bytes` below what is there, and returns their address.
    fn push(&mut self, bytes: &[u8]) -> u64 {
        self.reversed.extend(bytes.iter().rev());
        self.at()
    }
    fn push_string(&mut self, text: &[u8]) -> u64 {
        self.push(&[0]);
        self.push(text)
    }
    /// Leaves bytes out so that, after `bytes` more of them, the address is a multiple of 16.
    fn align_for(&mut self, bytes: u64) {
        let pad = (self.at() - bytes) % 16;
        self.push(&[0; 16][..pad as usize]);
    }
}

/// The bytes below `top`, and the stack pointer: their first address, a multiple of 16.
///
/// # Errors
/// [`ArgumentsError`].
pub(super) fn build(
    top: u64,
    arguments: &Arguments,
    entry: u64,
    headers: ProgramHeaders,
) -> Result<(u64, Vec<u8>), ArgumentsError> {
    check(arguments)?;
    let random = match arguments.random {
        Some(random) => random,
        None => {
            let mut random = [0; 16];
            // 16 bytes come at once or not at all.
            host::random(&mut random, 0).map_err(ArgumentsError::Random)?;
            random
        }
    };
    let mut stack = Builder { top, reversed: Vec::new() };
    stack.push(&[0; 8]);
    let exe_at = stack.push_string(&arguments.exe);
    // The first string gets the lowest address.
    let strings = |list: &[Vec<u8>], stack: &mut Builder| {
        let mut at: Vec<u64> = list.iter().rev().map(|text| stack.push_string(text)).collect();
        at.reverse();
        at
    };
    let env_at = strings(&arguments.env, &mut stack);
    let args_at = strings(&arguments.args, &mut stack);
    let platform_at = stack.push_string(b"x86_64");
    stack.align_for(random.len() as u64);
    let random_at = stack.push(&random);

    let mut words = vec![args_at.len() as u64];
    words.extend(args_at);
    words.push(0);
    words.extend(env_at);
    words.push(0);
    words.extend(auxiliary_vector(entry, headers, exe_at, platform_at, random_at).into_iter().flatten());
    stack.align_for(8 * words.len() as u64);
    for word in words.iter().rev() {
        stack.push(&word.to_le_bytes());
    }
    let rsp = stack.at();
    stack.reversed.reverse();
    Ok((rsp, stack.reversed))
}

/// Linux's limits: each string, and all of it together with its pointers (`bprm_stack_limits`).
fn check(arguments: &Arguments) -> Result<(), ArgumentsError> {
    let limit = STACK_LIMIT / 4;
    let mut bytes = arguments.exe.len() as u64 + 1;
    for text in arguments.args.iter().chain(&arguments.env).chain([&arguments.exe]) {
        let len = text.len() as u64 + 1;
        if len > MAX_ARG_STRLEN {
            return Err(ArgumentsError::StringTooLong(len));
        }
        if text.contains(&0) {
            return Err(ArgumentsError::Nul);
        }
        bytes += len + 8;
    }
    if bytes > limit { Err(ArgumentsError::TooLong { bytes, limit }) } else { Ok(()) }
}

fn auxiliary_vector(
    entry: u64,
    headers: ProgramHeaders,
    exe_at: u64,
    platform_at: u64,
    random_at: u64,
) -> Vec<[u64; 2]> {
    const AT_MINSIGSTKSZ: u64 = 51;
    const PROGRAM_HEADER_SIZE: u64 = 56;
    const HWCAP2_FSGSBASE: u64 = 1 << 1;
    const CPUID_FSGSBASE: u32 = 1;
    let fsgsbase = __cpuid_count(0, 0).eax >= 7 && __cpuid_count(7, 0).ebx & CPUID_FSGSBASE != 0;
    vec![
        [AT_MINSIGSTKSZ, signal_frame_size()],
        [libc::AT_HWCAP, __cpuid_count(1, 0).edx.into()],
        [libc::AT_PAGESZ, shadow_mmu::addr::PAGE_SIZE],
        [libc::AT_CLKTCK, 100],
        [libc::AT_PHDR, headers.addr],
        [libc::AT_PHENT, PROGRAM_HEADER_SIZE],
        [libc::AT_PHNUM, headers.count],
        [libc::AT_BASE, 0],
        [libc::AT_FLAGS, 0],
        [libc::AT_ENTRY, entry],
        [libc::AT_UID, host::identity(libc::SYS_getuid)],
        [libc::AT_EUID, host::identity(libc::SYS_geteuid)],
        [libc::AT_GID, host::identity(libc::SYS_getgid)],
        [libc::AT_EGID, host::identity(libc::SYS_getegid)],
        [libc::AT_SECURE, 0],
        [libc::AT_RANDOM, random_at],
        [libc::AT_HWCAP2, if fsgsbase { HWCAP2_FSGSBASE } else { 0 }],
        [libc::AT_EXECFN, exe_at],
        [libc::AT_PLATFORM, platform_at],
        [libc::AT_NULL, 0],
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOP: u64 = 0x7fff_ffff_f000;

    struct Stack {
        rsp: u64,
        bytes: Vec<u8>,
    }

    impl Stack {
        fn word(&self, at: u64) -> u64 {
            let at = (at - self.rsp) as usize;
            u64::from_le_bytes(self.bytes[at..at + 8].try_into().unwrap())
        }
        fn string(&self, at: u64) -> &[u8] {
            let rest = &self.bytes[(at - self.rsp) as usize..];
            &rest[..rest.iter().position(|&byte| byte == 0).unwrap()]
        }
    }

    fn stack(args: &[&str], env: &[&str]) -> Result<Stack, ArgumentsError> {
        let list = |texts: &[&str]| texts.iter().map(|text| text.as_bytes().to_vec()).collect();
        let arguments = Arguments {
            args: list(args),
            env: list(env),
            exe: b"/bin/prog".to_vec(),
            random: Some(*b"0123456789abcdef"),
        };
        let headers = ProgramHeaders { addr: 0x40_0040, count: 5 };
        let (rsp, bytes) = build(TOP, &arguments, 0x40_1234, headers)?;
        Ok(Stack { rsp, bytes })
    }

    #[test]
    fn the_stack_reads_as_a_c_runtime_reads_it() {
        for count in 0..5 {
            let args = ["prog", "a", "", "bcd", "e"];
            let stack = stack(&args[..count], &["HOME=/", "X=yz"]).unwrap();
            assert_eq!(stack.rsp % 16, 0);
            assert_eq!(stack.rsp + stack.bytes.len() as u64, TOP);
            assert_eq!(stack.word(stack.rsp), count as u64);
            let mut at = stack.rsp + 8;
            for arg in &args[..count] {
                assert_eq!(stack.string(stack.word(at)), arg.as_bytes());
                at += 8;
            }
            assert_eq!(stack.word(at), 0);
            assert_eq!(stack.string(stack.word(at + 8)), b"HOME=/");
            assert_eq!(stack.string(stack.word(at + 16)), b"X=yz");
            assert_eq!(stack.word(at + 24), 0);
            let mut auxv = std::collections::HashMap::new();
            at += 32;
            while stack.word(at) != libc::AT_NULL {
                auxv.insert(stack.word(at), stack.word(at + 8));
                at += 16;
            }
            assert_eq!(auxv[&libc::AT_ENTRY], 0x40_1234);
            assert_eq!((auxv[&libc::AT_PHDR], auxv[&libc::AT_PHNUM]), (0x40_0040, 5));
            assert_eq!(stack.string(auxv[&libc::AT_EXECFN]), b"/bin/prog");
            assert_eq!(stack.string(auxv[&libc::AT_PLATFORM]), b"x86_64");
            assert_eq!(stack.word(auxv[&libc::AT_RANDOM]), u64::from_le_bytes(*b"01234567"));
            assert!(auxv[&51] > 1000, "AT_MINSIGSTKSZ");
            assert!(!auxv.contains_key(&libc::AT_SYSINFO_EHDR));
        }
    }

    #[test]
    fn arguments_are_limited_as_on_linux() {
        let long = "x".repeat(MAX_ARG_STRLEN as usize - 1);
        assert!(stack(&[&long], &[]).is_ok());
        assert!(matches!(stack(&[&format!("{long}x")], &[]), Err(ArgumentsError::StringTooLong(_))));
        assert!(matches!(stack(&[long.as_str(); 16], &[]), Err(ArgumentsError::TooLong { .. })));
        assert!(matches!(stack(&[], &vec!["x"; 300_000]), Err(ArgumentsError::TooLong { .. })));
        assert!(matches!(stack(&["a\0b"], &[]), Err(ArgumentsError::Nul)));
    }
}
