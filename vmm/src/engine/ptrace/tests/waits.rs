// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a thread waits for, where it runs, and how it gets out: kicks, memory, the bound of the TLB, CPUs.

use super::*;

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
