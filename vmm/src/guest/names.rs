// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The names of system calls, for people: those that umbra knows, for which `syscall` has a line, and the others of Linux.

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

/// Those that umbra has no line for.
#[rustfmt::skip]
const OTHERS: &[(u64, &str)] = names![
    SYS__sysctl, SYS_accept, SYS_accept4, SYS_acct, SYS_add_key, SYS_adjtimex, SYS_afs_syscall, SYS_alarm,
    SYS_bind, SYS_bpf, SYS_capget, SYS_capset, SYS_chdir, SYS_chmod, SYS_chown, SYS_chroot, SYS_clock_adjtime,
    SYS_clock_settime, SYS_close_range, SYS_connect, SYS_delete_module, SYS_epoll_create, SYS_epoll_create1,
    SYS_epoll_ctl, SYS_epoll_ctl_old, SYS_epoll_pwait, SYS_epoll_pwait2, SYS_epoll_wait, SYS_epoll_wait_old,
    SYS_eventfd, SYS_eventfd2, SYS_execve, SYS_execveat, SYS_fadvise64, SYS_fallocate, SYS_fanotify_init,
    SYS_fanotify_mark, SYS_fchdir, SYS_fchmod, SYS_fchmodat, SYS_fchmodat2, SYS_fchown, SYS_fchownat,
    SYS_fgetxattr, SYS_finit_module, SYS_flistxattr, SYS_flock, SYS_fork, SYS_fremovexattr, SYS_fsconfig,
    SYS_fsetxattr, SYS_fsmount, SYS_fsopen, SYS_fspick, SYS_fstatfs, SYS_ftruncate, SYS_futex_waitv,
    SYS_futimesat, SYS_get_mempolicy, SYS_get_thread_area, SYS_getdents, SYS_getdents64, SYS_getitimer,
    SYS_getpeername, SYS_getpmsg, SYS_getsockname, SYS_getsockopt, SYS_getxattr, SYS_init_module,
    SYS_inotify_add_watch, SYS_inotify_init, SYS_inotify_init1, SYS_inotify_rm_watch, SYS_io_cancel,
    SYS_io_destroy, SYS_io_getevents, SYS_io_setup, SYS_io_submit, SYS_io_uring_enter, SYS_io_uring_register,
    SYS_io_uring_setup, SYS_ioperm, SYS_iopl, SYS_ioprio_get, SYS_ioprio_set, SYS_kcmp, SYS_kexec_file_load,
    SYS_kexec_load, SYS_keyctl, SYS_landlock_add_rule, SYS_landlock_create_ruleset, SYS_landlock_restrict_self,
    SYS_lchown, SYS_lgetxattr, SYS_link, SYS_linkat, SYS_listen, SYS_listxattr, SYS_llistxattr,
    SYS_lookup_dcookie, SYS_lremovexattr, SYS_lsetxattr, SYS_mbind, SYS_memfd_create, SYS_memfd_secret,
    SYS_migrate_pages, SYS_mkdir, SYS_mkdirat, SYS_mknod, SYS_mknodat, SYS_modify_ldt, SYS_mount,
    SYS_mount_setattr, SYS_move_mount, SYS_move_pages, SYS_mq_getsetattr, SYS_mq_notify, SYS_mq_open,
    SYS_mq_timedreceive, SYS_mq_timedsend, SYS_mq_unlink, SYS_mseal, SYS_msgctl, SYS_msgget, SYS_msgrcv,
    SYS_msgsnd, SYS_name_to_handle_at, SYS_nfsservctl, SYS_open_by_handle_at, SYS_open_tree,
    SYS_perf_event_open, SYS_personality, SYS_pidfd_getfd, SYS_pidfd_open, SYS_pidfd_send_signal, SYS_pipe,
    SYS_pipe2, SYS_pivot_root, SYS_pkey_alloc, SYS_pkey_free, SYS_pkey_mprotect, SYS_preadv2,
    SYS_process_madvise, SYS_process_mrelease, SYS_process_vm_readv, SYS_process_vm_writev, SYS_ptrace,
    SYS_putpmsg, SYS_pwritev2, SYS_quotactl, SYS_quotactl_fd, SYS_readahead, SYS_reboot, SYS_recvfrom,
    SYS_recvmmsg, SYS_recvmsg, SYS_remap_file_pages, SYS_removexattr, SYS_rename, SYS_renameat, SYS_renameat2,
    SYS_request_key, SYS_rmdir, SYS_sched_get_priority_max, SYS_sched_get_priority_min, SYS_sched_getattr,
    SYS_sched_getparam, SYS_sched_getscheduler, SYS_sched_rr_get_interval, SYS_sched_setattr,
    SYS_sched_setparam, SYS_sched_setscheduler, SYS_seccomp, SYS_security, SYS_semctl, SYS_semget, SYS_semop,
    SYS_semtimedop, SYS_sendmmsg, SYS_sendmsg, SYS_sendto, SYS_set_mempolicy, SYS_set_mempolicy_home_node,
    SYS_set_thread_area, SYS_setdomainname, SYS_setfsgid, SYS_setfsuid, SYS_setgid, SYS_setgroups,
    SYS_sethostname, SYS_setitimer, SYS_setns, SYS_setpriority, SYS_setregid, SYS_setresgid, SYS_setresuid,
    SYS_setreuid, SYS_setsid, SYS_setsockopt, SYS_settimeofday, SYS_setuid, SYS_setxattr, SYS_shmat, SYS_shmctl,
    SYS_shmdt, SYS_shmget, SYS_shutdown, SYS_signalfd, SYS_signalfd4, SYS_socket, SYS_socketpair, SYS_statfs,
    SYS_swapoff, SYS_swapon, SYS_symlink, SYS_symlinkat, SYS_sync, SYS_sync_file_range, SYS_syncfs, SYS_sysfs,
    SYS_syslog, SYS_tee, SYS_timer_create, SYS_timer_delete, SYS_timer_getoverrun, SYS_timer_gettime,
    SYS_timer_settime, SYS_timerfd_create, SYS_timerfd_gettime, SYS_timerfd_settime, SYS_truncate, SYS_tuxcall,
    SYS_umount2, SYS_unlink, SYS_unlinkat, SYS_unshare, SYS_uselib, SYS_userfaultfd, SYS_ustat, SYS_utime,
    SYS_utimensat, SYS_utimes, SYS_vfork, SYS_vhangup, SYS_vmsplice, SYS_vserver, SYS_wait4, SYS_waitid,
];

fn name_in(names: &[(u64, &'static str)], number: u64) -> Option<&'static str> {
    names.iter().find(|(known, _)| *known == number).map(|(_, name)| *name)
}

/// The name of a system call that umbra knows, as `mmap`.
pub fn call_name(number: u64) -> Option<&'static str> {
    name_in(NAMES, number)
}

/// The name of a system call of Linux that umbra does not know, as `fork`.
pub(super) fn other_name(number: u64) -> Option<&'static str> {
    name_in(OTHERS, number)
}

/// All that umbra knows.
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
        assert_eq!((call_name(9), other_name(9)), (Some("mmap"), None));
        assert_eq!((call_name(57), other_name(57)), (None, Some("fork")));
    }
}
