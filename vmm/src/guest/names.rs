// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The names of the system calls that umbra knows, for people: what `syscall` has a line for.

macro_rules! names {
    ($($number:ident),* $(,)?) => {
        // Without `SYS_`.
        &[$((libc::$number as u64, stringify!($number).split_at(4).1)),*]
    };
}

#[rustfmt::skip]
const NAMES: &[(u64, &str)] = names![
    SYS_access, SYS_arch_prctl, SYS_brk, SYS_clock_getres, SYS_clock_gettime, SYS_clock_nanosleep,
    SYS_clone, SYS_clone3, SYS_close, SYS_copy_file_range, SYS_creat, SYS_dup, SYS_dup2, SYS_dup3,
    SYS_exit, SYS_exit_group, SYS_faccessat, SYS_faccessat2, SYS_fcntl, SYS_fdatasync, SYS_fstat,
    SYS_fsync, SYS_futex, SYS_get_robust_list, SYS_getcpu, SYS_getcwd, SYS_getegid, SYS_geteuid,
    SYS_getgid, SYS_getgroups, SYS_getpgid, SYS_getpgrp, SYS_getpid, SYS_getppid, SYS_getpriority,
    SYS_getrandom, SYS_getresgid, SYS_getresuid, SYS_getrlimit, SYS_getrusage, SYS_getsid, SYS_gettid,
    SYS_gettimeofday, SYS_getuid, SYS_ioctl, SYS_kill, SYS_lseek, SYS_lstat, SYS_madvise, SYS_membarrier,
    SYS_mincore, SYS_mlock, SYS_mlock2, SYS_mlockall, SYS_mmap, SYS_mprotect, SYS_mremap, SYS_msync,
    SYS_munlock, SYS_munlockall, SYS_munmap, SYS_nanosleep, SYS_newfstatat, SYS_open, SYS_openat,
    SYS_openat2, SYS_pause, SYS_poll, SYS_ppoll, SYS_prctl, SYS_pread64, SYS_preadv, SYS_prlimit64,
    SYS_pselect6, SYS_pwrite64, SYS_pwritev, SYS_read, SYS_readlink, SYS_readlinkat, SYS_readv,
    SYS_restart_syscall, SYS_rseq, SYS_rt_sigaction, SYS_rt_sigpending, SYS_rt_sigprocmask,
    SYS_rt_sigqueueinfo, SYS_rt_sigreturn, SYS_rt_sigsuspend, SYS_rt_sigtimedwait, SYS_rt_tgsigqueueinfo,
    SYS_sched_getaffinity, SYS_sched_setaffinity, SYS_sched_yield, SYS_select, SYS_sendfile,
    SYS_set_robust_list, SYS_set_tid_address, SYS_setpgid, SYS_setrlimit, SYS_sigaltstack, SYS_splice,
    SYS_stat, SYS_statx, SYS_sysinfo, SYS_tgkill, SYS_time, SYS_times, SYS_tkill, SYS_umask, SYS_uname,
    SYS_write, SYS_writev,
];

/// The name of a system call, as `mmap`.
pub fn call_name(number: u64) -> Option<&'static str> {
    NAMES.iter().find(|(known, _)| *known == number).map(|(_, name)| *name)
}

/// All of them.
pub fn call_names() -> impl Iterator<Item = &'static str> {
    NAMES.iter().map(|(_, name)| *name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::testing::Fixture;

    /// Those that end the thread, or may rightly wait for ever.
    const NOT_HERE: [&str; 9] = [
        "exit",
        "exit_group",
        "rt_sigreturn",
        "pause",
        "rt_sigsuspend",
        "poll",
        "ppoll",
        "select",
        "pselect6",
    ];

    #[test]
    fn every_call_that_exists_here_has_a_name() {
        const UNNAMED: i64 = -(libc::ENOSYS as i64);
        let mut fixture = Fixture::with_stdin(std::fs::File::open("/dev/null").unwrap().into(), None);
        (fixture.stdout, fixture.stderr) = (None, None);
        for number in (0..470).filter(|number| call_name(*number).is_none()) {
            assert_eq!(fixture.main.call(number as i64, &[u64::MAX; 6]), UNNAMED, "call {number}");
        }
        assert!(NOT_HERE.iter().all(|name| call_names().any(|known| known == *name)));
        assert_eq!(call_name(9), Some("mmap"));
    }
}
