// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What only this engine has: a process for the guest. What is in it and what is not, what its filter refuses, and what
//! becomes of everybody when it is killed. What every engine must do is in `conformance`.

#![allow(clippy::unwrap_used, reason = "a failed test may panic")]

use super::*;
use crate::engine::conformance::flush::{COUNT, wait_for_change, zapped};
use crate::engine::conformance::guest::{self, CODE, DATA, RW, SYSCALL, start};
use crate::engine::{EngineError, EngineKind, Exit, testing};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::{Duration, Instant};
use stub::{LIST, MAP_FLAGS, POOL_FD, STUB, STUB_END};

type Guest = guest::Guest<PtraceVm>;

/// mov [rdi], rdi; add rdi, rsi; dec rcx; jnz to it; syscall
const TOUCH: [u8; 14] = [0x48, 0x89, 0x3f, 0x48, 0x01, 0xf7, 0x48, 0xff, 0xc9, 0x75, 0xf5, 0x0f, 0x05, 0x90];

/// A guest with a TLB of `most` entries, or `None` where this engine is not tested.
fn guest_with_entries(code: &[u8], most: usize) -> Option<Guest> {
    testing::config(EngineKind::Ptrace)?;
    let pool = Arc::new(FramePool::new(64 << 20, FreedFrames::Keep).unwrap());
    let vm = PtraceVm::with_entries(Arc::clone(&pool), most).unwrap();
    Some(Guest::over(pool, vm, code))
}

fn guest(code: &[u8]) -> Option<Guest> {
    guest_with_entries(code, MOST_ENTRIES)
}

impl Guest {
    fn vcpu(&self) -> PtraceVcpu {
        let mut vcpu = self.vm.new_vcpu(self.root).unwrap();
        start(&mut vcpu);
        vcpu.regs_mut().rdi = DATA;
        vcpu
    }

    fn pid(&self) -> libc::pid_t {
        self.vm.service.worker.pid
    }

    fn proc(&self, file: &str) -> PathBuf {
        format!("/proc/{}/{file}", self.pid()).into()
    }

    fn signal(&self, signal: libc::c_int) {
        // SAFETY: takes numbers; the process is our child.
        assert_eq!(unsafe { libc::kill(self.pid(), signal) }, 0);
    }

    /// The states of its threads, a letter each.
    fn threads(&self) -> Vec<char> {
        let Ok(tasks) = fs::read_dir(self.proc("task")) else { return Vec::new() };
        let stats = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("stat")).ok());
        stats.filter_map(|stat| stat.rsplit(')').next()?.trim_start().chars().next()).collect()
    }

    fn is_dead(&self) -> bool {
        self.threads().iter().all(|state| matches!(state, 'Z' | 'X'))
    }

    fn mappings(&self) -> Vec<String> {
        fs::read_to_string(self.proc("maps")).unwrap().lines().map(str::to_owned).collect()
    }
}

/// The process is gone: whoever runs a vCPU of it is told so.
fn assert_lost(result: Result<Exit, EngineError>) {
    let error = result.unwrap_err().to_string();
    let told = ["was ended by signal 9", "No such process", "has ended", "failed before"];
    assert!(told.iter().any(|told| error.contains(told)), "{error}");
}

#[test]
fn the_process_has_the_pool_the_stub_and_nothing_of_umbras() {
    let Some(guest) = guest(&TOUCH) else { return };
    let mut vcpu = guest.vcpu();
    (0..4).for_each(|n| _ = guest.map_new(DATA + n * PAGE_SIZE, RW));
    (vcpu.regs_mut().rsi, vcpu.regs_mut().rcx) = (PAGE_SIZE, 4);
    assert_eq!(vcpu.run().unwrap(), Exit::Syscall);

    let descriptors: Vec<_> =
        fs::read_dir(guest.proc("fd")).unwrap().map(|fd| fd.unwrap().file_name()).collect();
    assert_eq!(descriptors, [POOL_FD.to_string().as_str()]);
    let (theirs, ours) = (fs::metadata(guest.proc("fd/0")).unwrap(), guest.pool.file().metadata().unwrap());
    assert_eq!((theirs.dev(), theirs.ino()), (ours.dev(), ours.ino()));

    let stub = [format!("{STUB:x}-{LIST:x} r-xs"), format!("{LIST:x}-{STUB_END:x} r--s")];
    let mut stubs = 0;
    for line in guest.mappings() {
        let fields: Vec<_> = line.split_whitespace().collect();
        stubs += usize::from(stub.iter().any(|page| line.starts_with(page)));
        let of_the_pool = fields[4] == ours.ino().to_string() && fields[1].ends_with('s');
        assert!(of_the_pool || fields.last() == Some(&"[vsyscall]"), "{line}");
    }
    assert_eq!(stubs, 2);

    let status = fs::read_to_string(guest.proc("status")).unwrap();
    for line in ["NoNewPrivs:\t1", "Seccomp:\t2", "Name:\tumbra-guest"] {
        assert!(status.lines().any(|have| have == line), "{line} in {status}");
    }
    // What they are read from is unmapped.
    for file in ["cmdline", "environ"] {
        assert!(fs::read(guest.proc(file)).is_ok_and(|bytes| bytes.is_empty()), "{file}");
    }
}

#[test]
fn the_process_ends_with_the_vm() {
    let Some(guest) = guest(&SYSCALL) else { return };
    assert_eq!(guest.vcpu().run().unwrap(), Exit::Syscall);
    let proc = guest.proc("");
    assert!(proc.exists());
    drop(guest);
    assert!(!proc.exists());
}

#[test]
fn the_process_ends_with_the_thread_that_serves_it() {
    let Some(guest) = guest(&COUNT) else { return };
    let frame = guest.map_new(DATA, RW);
    let mut vcpu = guest.vcpu();
    std::thread::scope(|scope| {
        let runner = scope.spawn(move || vcpu.run());
        wait_for_change(&guest, frame);
        assert!(guest.vm.service.ask::<()>(|_| panic!("a test's: this thread is to end")).is_err());
        assert_lost(runner.join().unwrap());
    });
    while !guest.is_dead() {
        std::thread::yield_now();
    }
    assert!(guest.vm.new_vcpu(guest.root).is_err());
}

#[test]
fn a_killed_process_is_an_error_that_says_so_for_every_vcpu() {
    let Some(guest) = guest(&COUNT) else { return };
    let frame = guest.map_new(DATA, RW);
    let (mut vcpu, mut idle, mut waiting) = (guest.vcpu(), guest.vcpu(), guest.vcpu());
    idle.kicker().kick();
    assert_eq!(idle.run().unwrap(), Exit::Kicked);
    std::thread::scope(|scope| {
        let runner = scope.spawn(move || vcpu.run());
        wait_for_change(&guest, frame);
        guest.signal(libc::SIGKILL);
        let error = runner.join().unwrap().unwrap_err().to_string();
        assert!(error.contains("was ended by signal 9, from outside umbra"), "{error}");
    });
    assert!(guest.is_dead(), "{:?}", guest.threads());
    assert_lost(idle.run());
    assert_lost(waiting.run());
    assert_lost(waiting.run());
    assert!(guest.vm.new_vcpu(guest.root).is_err());
    // A flush has nobody to wait for.
    Arc::clone(&guest.vm).tlb().flush_all();
}

/// At whatever step the process is killed, nobody waits for what will not come: faults, flushes by others, new and dropped vCPUs,
/// the end of the VM.
#[test]
fn a_process_that_is_killed_at_any_moment_leaves_nobody_waiting() {
    for round in 0..60 {
        let Some(guest) = guest(&COUNT) else { return };
        let frame = guest.map_new(DATA, RW);
        let dead = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let guest = &guest;
            for _ in 0..2 {
                let mut vcpu = guest.vcpu();
                scope.spawn(move || {
                    loop {
                        match vcpu.run() {
                            Ok(Exit::PageFault { .. }) => guest.map(DATA, frame, RW),
                            Ok(exit) => panic!("{exit:?}"),
                            Err(_) => return,
                        }
                    }
                });
            }
            scope.spawn(|| {
                while !dead.load(Ordering::SeqCst) {
                    let old = guest.spte(DATA).swap(0, Ordering::SeqCst);
                    Arc::clone(&guest.vm).tlb().flush(&[zapped(DATA, old)]);
                }
            });
            scope.spawn(|| {
                // Half of them are never run.
                let mut runs = false;
                while let Ok(mut vcpu) = guest.vm.new_vcpu(guest.root) {
                    let _ = runs && vcpu.run().is_err();
                    runs = !runs;
                }
            });
            std::thread::sleep(Duration::from_micros(round * 113 % 4000));
            guest.signal(libc::SIGKILL);
            while !guest.is_dead() {
                std::thread::yield_now();
            }
            dead.store(true, Ordering::SeqCst);
        });
    }
}

#[test]
fn signals_from_outside_change_nothing() {
    // again: syscall; inc rbx; mov [rdi], rbx; jmp again
    let Some(guest) = guest(&[0x0f, 0x05, 0x48, 0xff, 0xc3, 0x48, 0x89, 0x1f, 0xeb, 0xf6]) else { return };
    let frame = guest.map_new(DATA, RW);
    let signals = [
        libc::SIGTERM,
        libc::SIGSTOP,
        libc::SIGCONT,
        libc::SIGUSR1,
        libc::SIGTRAP,
        libc::SIGCHLD,
        libc::SIGSEGV,
    ];
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let mut sent = 0;
            while !done.load(Ordering::SeqCst) {
                guest.signal(signals[sent % signals.len()]);
                sent += 1;
                std::thread::sleep(Duration::from_micros(sent as u64 * 37 % 400));
            }
            sent
        });
        let mut vcpu = guest.vcpu();
        for call in 0..4000 {
            assert_eq!(vcpu.run().unwrap(), Exit::Syscall);
            assert_eq!((vcpu.regs().rbx, vcpu.regs().rip), (call, CODE + 2));
            if call > 0 {
                assert_eq!(guest.word(frame, 0), call);
            }
            if call % 8 == 0 {
                // Calls by the worker, and threads that nobody traces yet.
                let old = guest.spte(DATA).load(Ordering::SeqCst);
                std::thread::scope(|scope| {
                    let tlb = Arc::clone(&guest.vm).tlb();
                    scope.spawn(move || tlb.flush(&[zapped(DATA, old)]));
                });
                let mut other = guest.vcpu();
                if call % 16 == 0 {
                    assert_eq!(other.run().unwrap(), Exit::Syscall);
                }
            }
        }
        done.store(true, Ordering::SeqCst);
        assert!(sender.join().unwrap() > 100);
    });
    // Those that nobody sees in time: with a thread that waits for its tracer.
    let mut waiting = guest.vcpu();
    for signal in signals {
        guest.signal(signal);
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(waiting.run().unwrap(), Exit::Syscall);
}

#[test]
fn the_filter_refuses_what_the_engine_does_not_do() {
    let Some(guest) = guest(&SYSCALL) else { return };
    let ask = |number: libc::c_long, arguments: &[u64]| {
        let arguments = arguments.to_vec();
        guest.vm.service.ask(move |worker| worker.call(number, &arguments))
    };
    let frame = |flags: i32, fd: u64| [DATA, PAGE_SIZE, 1, flags as u64, fd, 0];
    let private = libc::MAP_PRIVATE | libc::MAP_FIXED;
    let refused: [(&str, libc::c_long, &[u64]); 17] = [
        ("getpid", libc::SYS_getpid, &[]),
        ("open", libc::SYS_open, &[STUB, 0]),
        ("openat", libc::SYS_openat, &[u64::MAX - 99, STUB, 0]),
        ("read", libc::SYS_read, &[POOL_FD, STUB, 1]),
        ("write", libc::SYS_write, &[POOL_FD, STUB, 1]),
        ("mmap, private", libc::SYS_mmap, &frame(private, POOL_FD)),
        ("mmap, anonymous", libc::SYS_mmap, &frame(MAP_FLAGS | libc::MAP_ANONYMOUS, POOL_FD)),
        ("mmap, not fixed", libc::SYS_mmap, &frame(libc::MAP_SHARED, POOL_FD)),
        ("mmap, another file", libc::SYS_mmap, &frame(MAP_FLAGS, 1)),
        ("mmap, another file by its high half", libc::SYS_mmap, &frame(MAP_FLAGS, 1 << 32)),
        ("mprotect", libc::SYS_mprotect, &[STUB, PAGE_SIZE, 7]),
        ("clone, a process", libc::SYS_clone, &[libc::SIGCHLD as u64]),
        ("clone, one flag more", libc::SYS_clone, &[(stub::CLONE_FLAGS | libc::CLONE_SETTLS) as u64]),
        ("prctl", libc::SYS_prctl, &[libc::PR_SET_DUMPABLE as u64, 1]),
        ("execve", libc::SYS_execve, &[STUB, 0, 0]),
        ("exit_group", libc::SYS_exit_group, &[0]),
        ("a number of the x32 kind", libc::SYS_munmap | 1 << 30, &[DATA, PAGE_SIZE]),
    ];
    for (name, number, arguments) in refused {
        let error = ask(number, arguments).unwrap_err();
        let sigsys = format!("signal {}", libc::SIGSYS);
        assert!(error.raw_os_error().is_none() && error.to_string().contains(&sigsys), "{name}: {error}");
    }
    // What it does is let through, by the same thread.
    ask(libc::SYS_mmap, &frame(MAP_FLAGS, POOL_FD)).unwrap();
    ask(libc::SYS_munmap, &[DATA, PAGE_SIZE]).unwrap();
    assert_eq!(guest.vcpu().run().unwrap(), Exit::Syscall);
    // From another place than the stub's three, not even that.
    let elsewhere =
        guest.vm.service.ask(|worker| worker.call_at(STUB + 0x80, libc::SYS_munmap, &[DATA, PAGE_SIZE]));
    assert!(elsewhere.is_err());
    assert_eq!(guest.vcpu().run().unwrap(), Exit::Syscall);
}

#[test]
fn a_guest_that_touches_more_than_the_tlb_holds_works_within_its_bound() {
    const MOST: usize = 32;
    const PAGES: u64 = 10 * MOST as u64;
    let Some(guest) = guest_with_entries(&TOUCH, MOST) else { return };
    // Every second page, so that no mapping continues another.
    let frames: Vec<_> = (0..PAGES).map(|n| guest.map_new(DATA + 2 * n * PAGE_SIZE, RW)).collect();
    let mut vcpu = guest.vcpu();
    let mut fullest = 0;
    for part in (0..PAGES).step_by(16).chain((0..PAGES).step_by(16)) {
        start(&mut vcpu);
        let regs = vcpu.regs_mut();
        (regs.rdi, regs.rsi, regs.rcx) = (DATA + 2 * part * PAGE_SIZE, 2 * PAGE_SIZE, 16);
        assert_eq!(vcpu.run().unwrap(), Exit::Syscall);
        fullest = fullest.max(guest.mappings().len());
    }
    // And the stub, and the kernel's own.
    assert!((MOST / 2..=MOST + 2).contains(&fullest), "{fullest}");
    for (n, &frame) in (0..).zip(&frames) {
        assert_eq!(guest.word(frame, 0), DATA + 2 * n * PAGE_SIZE);
    }
}

#[test]
fn vcpus_that_are_made_and_dropped_leave_no_thread() {
    let Some(guest) = guest(&SYSCALL) else { return };
    let before = guest.threads().len();
    for n in 0..500 {
        let mut vcpu = guest.vcpu();
        if n % 2 == 0 {
            assert_eq!(vcpu.run().unwrap(), Exit::Syscall);
        }
    }
    assert_eq!(guest.threads().len(), before);
    assert_eq!(guest.vm.vcpus.load(Ordering::Relaxed), 0);
}

/// While they run, while they are stopped, while they make calls for a flush: whoever learns of it first.
#[test]
fn killed_at_any_moment_every_vcpu_says_by_what() {
    for n in 0..200_u32 {
        let Some(guest) = guest(&TOUCH) else { return };
        (0..4).for_each(|n| _ = guest.map_new(DATA + n * PAGE_SIZE, RW));
        let run = |mut vcpu: PtraceVcpu| loop {
            (vcpu.regs_mut().rip, vcpu.regs_mut().rdi) = (CODE, DATA);
            (vcpu.regs_mut().rsi, vcpu.regs_mut().rcx) = (PAGE_SIZE, 4);
            match vcpu.run() {
                Ok(exit) => assert_eq!(exit, Exit::Syscall),
                Err(error) => return error.to_string(),
            }
        };
        std::thread::scope(|scope| {
            let runners = [guest.vcpu(), guest.vcpu()].map(|vcpu| scope.spawn(move || run(vcpu)));
            let tlb = Arc::clone(&guest.vm).tlb();
            for _ in 0..n % 8 {
                tlb.flush_all();
            }
            (0..n * 500).for_each(|_| std::hint::spin_loop());
            guest.signal(libc::SIGKILL);
            tlb.flush_all();
            for runner in runners {
                let error = runner.join().unwrap();
                assert!(error.contains("was ended by signal 9, from outside umbra"), "{n}: {error}");
            }
        });
    }
}

/// Linux refuses a thread where there are too many; the stub's entry for it is asked for a call here that it refuses too.
#[test]
fn what_the_host_refuses_a_new_thread_for_is_an_error() {
    let Some(guest) = guest(&SYSCALL) else { return };
    let refused = guest.vm.service.ask(|worker| worker.call_at(stub::clone(), libc::SYS_munmap, &[1, 1]));
    assert_eq!(refused.unwrap_err().raw_os_error(), Some(libc::EINVAL));
    assert_eq!(guest.vcpu().run().unwrap(), Exit::Syscall);
}

/// Only the thread that traces it could end it alone. So everything of the guest ends, and nobody waits.
#[test]
fn a_vcpu_that_is_dropped_by_another_thread_than_ran_it_ends_the_guest() {
    let Some(guest) = guest(&SYSCALL) else { return };
    let mut other = guest.vcpu();
    assert_eq!(other.run().unwrap(), Exit::Syscall);
    let (give, given) = std::sync::mpsc::channel();
    let (release, released) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let mut vcpu = guest.vcpu();
        scope.spawn(move || {
            assert_eq!(vcpu.run().unwrap(), Exit::Syscall);
            give.send(vcpu).unwrap();
            // Still there while it is dropped.
            released.recv().unwrap();
        });
        drop(given.recv().unwrap());
        assert!(guest.is_dead(), "{:?}", guest.threads());
        assert_lost(other.run());
        drop(other);
        drop(guest);
        release.send(()).unwrap();
    });
}

/// A base in the kernel's half is set by the stub, before each entry; what comes meanwhile must not be dropped with it.
#[test]
fn no_kick_is_lost_while_the_stub_sets_bases() {
    const KERNEL_HALF: u64 = 0xffff_8000_0000_0000;
    const KICKS: u64 = 500;
    let Some(guest) = guest(&COUNT) else { return };
    guest.map_new(DATA, RW);
    let mut vcpu = guest.vcpu();
    vcpu.regs_mut().gs_base = KERNEL_HALF;
    let kicker = vcpu.kicker();
    let returned = AtomicU64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for n in 0..KICKS {
                assert_eq!(vcpu.run().unwrap(), Exit::Kicked);
                assert_eq!(vcpu.regs().gs_base, KERNEL_HALF);
                returned.store(n + 1, Ordering::SeqCst);
            }
        });
        let mut delay = 0;
        for n in 0..KICKS {
            // At another moment of the way into the guest each time.
            (0..delay).for_each(|_| std::hint::spin_loop());
            delay = (delay + 17) % 1_500;
            kicker.kick();
            let asked = Instant::now();
            while returned.load(Ordering::SeqCst) <= n {
                if asked.elapsed() > Duration::from_secs(20) {
                    // So that the other thread comes back, and the test fails there.
                    guest.signal(libc::SIGKILL);
                    return;
                }
                std::thread::yield_now();
            }
        }
    });
}

/// The CPUs that a thread may use, as its status says.
fn cpus_of(status: &str) -> String {
    let status = fs::read_to_string(status).unwrap();
    status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap().trim().to_owned()
}

/// A guest that stopped often and then waits for something: its threads are let go, and nobody looks after them any more.
#[test]
fn who_waits_outside_is_not_tied() {
    let Some(guest) = guest(&SYSCALL) else { return };
    let all = cpus_of("/proc/self/status");
    let mut vcpu = guest.vcpu();
    let began = Instant::now();
    let is_tied = || cpus_of("/proc/thread-self/status") != all;
    while !is_tied() {
        if all.bytes().all(|byte| byte.is_ascii_digit()) || began.elapsed() > Duration::from_secs(20) {
            println!("skipped: no pair is tied to one of the CPUs {all}");
            return;
        }
        start(&mut vcpu);
        assert_eq!(vcpu.run().unwrap(), Exit::Syscall);
    }
    let began = Instant::now();
    while is_tied() {
        assert!(began.elapsed() < Duration::from_secs(20), "it waits, and is tied");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(cpus_of(&format!("/proc/{0}/task/{1}/status", guest.pid(), vcpu.tid())), all);
}

/// A tracer that is tied to a CPU makes threads, and so does the worker, which is tied while it works.
#[test]
fn threads_are_not_tied_because_who_made_them_was() {
    let Some(guest) = guest(&SYSCALL) else { return };
    let all = cpus_of("/proc/self/status");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut stops_often = guest.vcpu();
            for _ in 0..500 {
                start(&mut stops_often);
                assert_eq!(stops_often.run().unwrap(), Exit::Syscall);
            }
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    let mut vcpu = guest.vcpu();
                    assert_eq!(vcpu.run().unwrap(), Exit::Syscall);
                    assert_eq!(cpus_of("/proc/thread-self/status"), all);
                    let tracee = format!("/proc/{0}/task/{1}/status", guest.pid(), vcpu.tid());
                    assert_eq!(cpus_of(&tracee), all);
                });
            });
        });
    });
}

/// Sets how much the process may map, in bytes, and returns what it was. The hard limit stays: it takes root to raise it.
fn limit_mappings(pid: libc::pid_t, bytes: libc::rlim_t) -> libc::rlim_t {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the limit is ours to write; null sets none.
    let result = unsafe { libc::prlimit(pid, libc::RLIMIT_AS, std::ptr::null(), &raw mut limit) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    let before = std::mem::replace(&mut limit.rlim_cur, bytes);
    // SAFETY: the limit is ours; null has the old one not told.
    let result = unsafe { libc::prlimit(pid, libc::RLIMIT_AS, &raw const limit, std::ptr::null_mut()) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    before
}

/// Pauses that are cut short are not counted, so who is kicked all the time is neither lost nor stuck.
#[test]
fn a_kick_ends_the_wait_for_memory_that_a_mapping_needs() {
    let Some(guest) = guest(&COUNT) else { return };
    let frame = guest.map_new(DATA, RW);
    let mut vcpu = guest.vcpu();
    let kicker = vcpu.kicker();
    let before = limit_mappings(guest.pid(), 0);
    let (returned, stuck) = (AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let began = Instant::now();
            while returned.load(Ordering::SeqCst) < 100 && !stuck.load(Ordering::SeqCst) {
                kicker.kick();
                std::thread::sleep(Duration::from_millis(1));
                if began.elapsed() > Duration::from_secs(30) {
                    stuck.store(true, Ordering::SeqCst);
                    // So that it comes back.
                    limit_mappings(guest.pid(), before);
                }
            }
            kicker.kick();
        });
        for n in 1..=100 {
            if stuck.load(Ordering::SeqCst) {
                break;
            }
            assert_eq!(vcpu.run().unwrap(), Exit::Kicked);
            returned.store(n, Ordering::SeqCst);
        }
    });
    assert!(!stuck.load(Ordering::SeqCst), "it returned {} times", returned.load(Ordering::SeqCst));
    assert_eq!(guest.word(frame, 0), 0, "it ran without memory");
    limit_mappings(guest.pid(), before);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            wait_for_change(&guest, frame);
            kicker.kick();
        });
        while guest.word(frame, 0) == 0 {
            assert_eq!(vcpu.run().unwrap(), Exit::Kicked);
        }
    });
}
