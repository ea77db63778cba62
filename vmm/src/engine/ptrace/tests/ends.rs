// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Who ends with whom, and what everybody is told.

use super::*;

fn assert_killed(error: &str) {
    assert!(error.contains("was ended by signal 9, from outside umbra"), "{error}");
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
        assert_killed(&runner.join().unwrap().unwrap_err().to_string());
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
                            Err(error) => return assert_killed(&error.to_string()),
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
                assert_killed(&error);
            }
        });
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
