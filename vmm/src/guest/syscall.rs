// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The table of system calls: number → function. What is not in it is `ENOSYS`, and said once in the log.
//!
//! Arguments are narrowed as the kernel's prototypes narrow them: `int` and `unsigned int` are the low 32 bits.

use super::errno::{Errno, SysResult};
use super::files::{calls as files, rw, stat};
use super::host::{self, ClockQuery};
use super::names::other_name;
use super::signal::calls as signal;
use super::signal::deliver::{Flow, Interrupted};
use super::thread::Thread;
use super::{call_name, clone, futex, info, memory, poll, restart, robust, time};
use crate::engine::{EngineError, Vcpu};
use crate::inject::points::SYSCALL;
use shadow_mmu::inject::Effect;
use std::sync::atomic::{AtomicU64, Ordering};

/// Makes the system call that the vCPU's registers ask for, and puts the result into rax.
pub(super) fn handle(t: &mut Thread, vcpu: &mut dyn Vcpu) -> Result<Flow, EngineError> {
    let regs = vcpu.regs();
    let args = [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9];
    // The kernel, too, looks at the low half only.
    let number = regs.rax & u64::from(u32::MAX);
    if number == libc::SYS_rt_sigreturn as u64 {
        return signal::rt_sigreturn(t, vcpu);
    }
    let faults = t.process.mm().faults();
    let injected = match faults.are_armed().then(|| faults.hit_with(&SYSCALL, None, call_name(number))) {
        Some(Effect::Fail(errno)) => Some(Errno(errno)),
        _ => None,
    };
    let result = if let Some(errno) = injected {
        Err(errno)
    } else if number == libc::SYS_clone as u64 {
        clone::clone(t, vcpu, &args)
    } else if number == libc::SYS_clone3 as u64 {
        clone::clone3(t, vcpu, args[0], args[1])
    } else if number == libc::SYS_arch_prctl as u64 {
        info::arch_prctl(t, vcpu, args[0] as i32, args[1])
    } else if number == libc::SYS_sigaltstack as u64 {
        signal::sigaltstack(t, vcpu, args[0], args[1])
    } else {
        call(t, number as i64, &args)
    };
    log::trace!("{}: call {number} {args:x?} = {result:x?}", t.tid);
    if t.process.user().is_starved() {
        return t.out_of_memory(vcpu, None);
    }
    vcpu.regs_mut().rax = match result {
        Ok(value) => value,
        Err(errno) => {
            if errno.is_restart() {
                t.interrupted = Some(Interrupted { number, errno });
            }
            errno.as_rax()
        }
    };
    Ok(if t.exit_code.is_some() { Flow::Leave } else { Flow::Enter })
}

/// The calls that need no vCPU.
#[rustfmt::skip]
fn call(t: &mut Thread, number: i64, args: &[u64; 6]) -> SysResult {
    let [a, b, c, d, e, f] = *args;
    let (int_a, int_b, int_c, int_d) = (a as i32, b as i32, c as i32, d as i32);
    let fd = a as u32;
    match number {
        // Files.
        libc::SYS_read => rw::read(t, fd, b, c, None),
        libc::SYS_write => rw::write(t, fd, b, c, None),
        libc::SYS_pread64 => rw::read(t, fd, b, c, Some(d as i64)),
        libc::SYS_pwrite64 => rw::write(t, fd, b, c, Some(d as i64)),
        libc::SYS_readv => rw::readv(t, fd, b, c, None),
        libc::SYS_writev => rw::writev(t, fd, b, c, None),
        libc::SYS_preadv => rw::readv(t, fd, b, c, Some(d as i64)),
        libc::SYS_pwritev => rw::writev(t, fd, b, c, Some(d as i64)),
        libc::SYS_close => files::close(t, fd),
        libc::SYS_lseek => files::lseek(t, fd, b as i64, c as u32),
        libc::SYS_dup => files::dup(t, fd),
        libc::SYS_dup2 => files::dup2(t, fd, b as u32),
        libc::SYS_dup3 => files::dup3(t, fd, b as u32, int_c),
        libc::SYS_fcntl => files::fcntl(t, fd, int_b, c),
        libc::SYS_ioctl => files::ioctl(t, fd),
        libc::SYS_fsync | libc::SYS_fdatasync => files::sync(t, fd, number),
        libc::SYS_fstat => stat::fstat(t, fd, b),
        libc::SYS_stat | libc::SYS_lstat => stat::path(t, a),
        libc::SYS_newfstatat => stat::newfstatat(t, int_a, b, c, int_d),
        libc::SYS_statx => stat::statx(t, int_a, b, int_c, d as u32, e),
        libc::SYS_open | libc::SYS_creat | libc::SYS_access => stat::path(t, a),
        libc::SYS_openat | libc::SYS_openat2 | libc::SYS_faccessat | libc::SYS_faccessat2 => stat::path(t, b),
        libc::SYS_readlink => stat::readlink(t, a, b, int_c),
        libc::SYS_readlinkat => stat::readlink(t, b, c, int_d),
        libc::SYS_getcwd => stat::getcwd(t, a, b),
        libc::SYS_poll => poll::poll(t, a, b as u32, int_c),
        libc::SYS_ppoll => poll::ppoll(t, a, b as u32, c, d, e),
        libc::SYS_select => poll::select(t, int_a, [b, c, d], e),
        libc::SYS_pselect6 => poll::pselect6(t, int_a, [b, c, d], e, f),

        // Memory.
        libc::SYS_mmap => memory::mmap(t, args),
        libc::SYS_munmap => memory::munmap(t, a, b),
        libc::SYS_mprotect => memory::mprotect(t, a, b, int_c),
        libc::SYS_mremap => memory::mremap(t, args),
        libc::SYS_brk => memory::brk(t, a),
        libc::SYS_madvise => memory::madvise(t, a, b, int_c),
        libc::SYS_mincore => memory::mincore(t, a, b, c),
        libc::SYS_msync => memory::msync(t, a, b, int_c),
        libc::SYS_mlock | libc::SYS_mlock2 | libc::SYS_munlock => memory::lock(a, b),
        libc::SYS_mlockall | libc::SYS_munlockall => Ok(0),

        // Threads.
        libc::SYS_exit => clone::exit(t, int_a),
        libc::SYS_exit_group => clone::exit_group(t, int_a),
        libc::SYS_futex => futex::futex(t, args),
        libc::SYS_set_tid_address => clone::set_tid_address(t, a),
        libc::SYS_set_robust_list => robust::set_robust_list(t, a, b),
        libc::SYS_get_robust_list => robust::get_robust_list(t, int_a, b, c),
        libc::SYS_gettid => Ok(t.tid as u64),
        libc::SYS_sched_yield => {
            t.sched_yield();
            Ok(0)
        }
        libc::SYS_sched_getaffinity => info::sched_getaffinity(t, int_a, b as u32, c),
        libc::SYS_sched_setaffinity => info::sched_setaffinity(t, int_a, b as u32, c),
        libc::SYS_getcpu => info::getcpu(t, a, b),

        // Time.
        libc::SYS_clock_gettime => time::clock_query(t, int_a, b, ClockQuery::Time),
        libc::SYS_clock_getres => time::clock_query(t, int_a, b, ClockQuery::Resolution),
        libc::SYS_clock_nanosleep => time::clock_nanosleep(t, int_a, int_b, c, d),
        libc::SYS_nanosleep => time::nanosleep(t, a, b),
        libc::SYS_gettimeofday => time::gettimeofday(t, a, b),
        libc::SYS_time => time::time(t, a),
        libc::SYS_times => time::times(t, a),
        libc::SYS_restart_syscall => restart::restart_syscall(t),

        // Signals.
        libc::SYS_rt_sigaction => signal::rt_sigaction(t, int_a, b, c, d),
        libc::SYS_rt_sigprocmask => signal::rt_sigprocmask(t, int_a, b, c, d),
        libc::SYS_rt_sigpending => signal::rt_sigpending(t, a, b),
        libc::SYS_rt_sigsuspend => signal::rt_sigsuspend(t, a, b),
        libc::SYS_rt_sigtimedwait => signal::rt_sigtimedwait(t, a, b, c, d),
        libc::SYS_rt_sigqueueinfo => signal::queue(t, int_a, None, int_b, c),
        libc::SYS_rt_tgsigqueueinfo => signal::queue(t, int_a, Some(int_b), int_c, d),
        libc::SYS_pause => signal::pause(t),
        libc::SYS_kill => signal::kill(t, int_a, int_b),
        libc::SYS_tkill => signal::tkill(t, int_a, int_b),
        libc::SYS_tgkill => signal::tgkill(t, int_a, int_b, int_c),

        // Who and where am I.
        libc::SYS_getpid => Ok(t.process.pid() as u64),
        libc::SYS_getppid | libc::SYS_getpgrp | libc::SYS_getuid | libc::SYS_geteuid | libc::SYS_getgid
        | libc::SYS_getegid => Ok(t.process.identity(number)),
        libc::SYS_getpgid => info::own(t, int_a).map(|()| t.process.identity(libc::SYS_getpgrp)),
        libc::SYS_getsid => info::own(t, int_a).and_then(|()| t.process.session()),
        libc::SYS_setpgid => info::setpgid(t, int_a, int_b),
        libc::SYS_getresuid => info::three_ids(t, host::identity(libc::SYS_getuid), [a, b, c]),
        libc::SYS_getresgid => info::three_ids(t, host::identity(libc::SYS_getgid), [a, b, c]),
        libc::SYS_getgroups => if int_a < 0 { Err(Errno::EINVAL) } else { Ok(0) },
        libc::SYS_umask => Ok(0o022),
        libc::SYS_getpriority => info::getpriority(int_a, int_b),
        libc::SYS_uname => info::uname(t, a),
        libc::SYS_sysinfo => info::sysinfo(t, a),
        libc::SYS_getrandom => info::getrandom(t, a, b, c as u32),
        libc::SYS_prctl => info::prctl(t, int_a, [b, c, d, e]),
        libc::SYS_getrlimit => info::getrlimit(t, a as u32, b),
        libc::SYS_setrlimit => info::setrlimit(t, a as u32, b),
        libc::SYS_prlimit64 => info::prlimit(t, int_a, b as u32, c, d),
        libc::SYS_getrusage => info::getrusage(t, int_a, b),

        // Programs ask for these to see whether they are there, and have another way: nothing worth a mention.
        libc::SYS_rseq | libc::SYS_membarrier | libc::SYS_copy_file_range | libc::SYS_sendfile | libc::SYS_splice =>
            Err(Errno::ENOSYS),
        _ => {
            t.process.unknown_calls().note(number as u64);
            Err(Errno::ENOSYS)
        }
    }
}

/// Which unknown calls the log has mentioned.
#[derive(Debug, Default)]
pub(super) struct UnknownCalls {
    /// One bit a number.
    seen: [AtomicU64; 8],
}

impl UnknownCalls {
    /// Says once that the guest made a call that does not exist here. Numbers beyond the table share one mention.
    pub(super) fn note(&self, number: u64) {
        let bit = number.min(self.seen.len() as u64 * 64 - 1);
        let before = self.seen[bit as usize / 64].fetch_or(1 << (bit % 64), Ordering::Relaxed);
        if before >> (bit % 64) & 1 == 0 {
            let name = other_name(number).map_or_else(String::new, |name| format!(" ({name})"));
            log::warn!("the guest made system call {number}{name}, which is not implemented: ENOSYS");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::testing::Fixture;
    use std::fs::File;

    /// Calls that end the thread or may rightly wait for ever.
    const NOT_HERE: [i64; 9] = [
        libc::SYS_exit,
        libc::SYS_exit_group,
        libc::SYS_rt_sigreturn,
        libc::SYS_pause,
        libc::SYS_rt_sigsuspend,
        libc::SYS_poll,
        libc::SYS_ppoll,
        libc::SYS_select,
        libc::SYS_pselect6,
    ];
    const HIGHEST: i64 = 470;

    /// A guest whose input is empty and whose signals can do no harm.
    fn fixture() -> Fixture {
        let fixture = Fixture::with_stdin(File::open("/dev/null").unwrap().into(), None);
        let all = fixture.map_pages(1);
        fixture.user().write_u64(all, u64::MAX).unwrap();
        assert_eq!(fixture.main.call(libc::SYS_rt_sigprocmask, &[libc::SIG_SETMASK as u64, all, 0, 8]), 0);
        fixture
    }

    /// Whether a result is one that a program may see.
    fn is_lawful(result: i64) -> bool {
        !(-4095..0).contains(&result) || result > -134
    }

    #[test]
    fn wild_pointers_are_survived_by_every_call() {
        let wild =
            [0, 1, 0x1000, 0x7fff_ffff_efff, 0x7fff_ffff_f000, 1 << 47, 1 << 63, u64::MAX - 4095, u64::MAX];
        let mut fixture = fixture();
        fixture.stdout = None;
        let mut faults = 0;
        for number in (0..=HIGHEST).filter(|number| !NOT_HERE.contains(number)) {
            for pointer in wild {
                for first in [pointer, 0, 1] {
                    let args = [first, pointer, pointer, pointer, pointer, pointer];
                    let result = fixture.main.call(number, &args);
                    assert!(is_lawful(result), "call {number} {args:x?}: {result}");
                    faults += i32::from(result == -i64::from(libc::EFAULT));
                }
            }
        }
        assert!(faults > 500, "{faults}");
    }

    #[test]
    fn calls_that_wait_check_their_pointers_first() {
        let fixture = fixture();
        for number in
            [libc::SYS_rt_sigsuspend, libc::SYS_poll, libc::SYS_ppoll, libc::SYS_select, libc::SYS_pselect6]
        {
            for pointer in [1, 1 << 47, 1 << 63, u64::MAX] {
                let args = match number {
                    libc::SYS_rt_sigsuspend => [pointer, 8, 0, 0, 0, 0],
                    libc::SYS_poll => [pointer, 1, u64::MAX, 0, 0, 0],
                    libc::SYS_ppoll => [pointer, 1, 0, 0, 8, 0],
                    _ => [1, pointer, 0, 0, 0, 0],
                };
                assert_eq!(
                    fixture.main.call(number, &args),
                    -i64::from(libc::EFAULT),
                    "{number} {pointer:#x}"
                );
            }
        }
    }

    /// Calls with arguments that are partly right, in an order that is the same in every run.
    #[test]
    fn random_calls_neither_hang_nor_panic() {
        // What sleeps for as long as it is told, makes threads, or writes into the test's own pipes.
        const SLOW: [i64; 12] = [
            libc::SYS_nanosleep,
            libc::SYS_clock_nanosleep,
            libc::SYS_rt_sigtimedwait,
            libc::SYS_futex,
            libc::SYS_clone,
            libc::SYS_clone3,
            libc::SYS_kill,
            libc::SYS_tkill,
            libc::SYS_tgkill,
            libc::SYS_rt_sigqueueinfo,
            libc::SYS_rt_tgsigqueueinfo,
            libc::SYS_rt_sigprocmask,
        ];
        let mut fixture = fixture();
        fixture.stdout = None;
        fixture.stderr = None;
        let page = fixture.map_pages(4);
        let pool = [
            0,
            1,
            2,
            3,
            7,
            8,
            16,
            24,
            64,
            88,
            100,
            4095,
            4096,
            4097,
            0x22,
            0x32,
            0x1002,
            page,
            page + 1,
            page + 8,
            page + 0x3ff8,
            page + 0x4000,
            1 << 31,
            u64::from(u32::MAX),
            1 << 40,
            1 << 47,
            1 << 63,
            u64::MAX,
        ];
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        for _ in 0..60_000 {
            let number = (random() % (HIGHEST as u64 + 1)) as i64;
            if NOT_HERE.contains(&number) || SLOW.contains(&number) {
                continue;
            }
            let args: [u64; 6] = std::array::from_fn(|_| pool[random() as usize % pool.len()]);
            let result = fixture.main.call(number, &args);
            assert!(is_lawful(result), "call {number} {args:x?}: {result}");
        }
    }

    #[test]
    fn unknown_calls_are_noted_once_each() {
        let calls = UnknownCalls::default();
        for number in [0, 63, 64, 511, 512, u64::MAX] {
            calls.note(number);
            calls.note(number);
        }
        let seen: u32 = calls.seen.iter().map(|word| word.load(Ordering::Relaxed).count_ones()).sum();
        assert_eq!(seen, 4);
    }

    #[test]
    fn only_the_low_half_of_the_number_counts() {
        let fixture = fixture();
        assert_eq!(fixture.main.call(libc::SYS_getpid | 1 << 32, &[]), i64::from(fixture.process.pid()));
        assert_eq!(fixture.main.call(libc::SYS_getpid | 1 << 30, &[]), -i64::from(libc::ENOSYS), "no x32");
    }
}
