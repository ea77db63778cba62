// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What is in the process and what is not, what its filter refuses, and what signals from outside do.

use super::*;

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
