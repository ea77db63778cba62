// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What only this engine has: vCPUs that are parked and change threads, signals at the thread that runs one. What every engine
//! must do is in `conformance`, the monitor in `hostile`, flush methods in `flush_tests`, lost vCPUs in `lost_tests`.

use super::testing::*;
use crate::engine::{Exit, Regs, Vcpu};
use std::time::Duration;

/// jmp to itself.
const FOREVER: [u8; 2] = [0xeb, 0xfe];

/// ptrace ties a vCPU to the first thread that runs it; here each may.
#[test]
fn a_vcpu_goes_from_thread_to_thread_and_is_kicked_in_each() {
    let Some(guest) = Guest::new(&SYSCALL) else { return };
    let mut next = guest.vcpu();
    assert_eq!(next.run().unwrap(), Exit::Syscall);
    // Of a thread that has ended.
    let kicker = std::thread::scope(|scope| {
        scope
            .spawn(|| {
                start(&mut next);
                assert_eq!(next.run().unwrap(), Exit::Syscall);
                next.kicker()
            })
            .join()
            .unwrap()
    });
    kicker.kick();
    assert_eq!(next.run().unwrap(), Exit::Kicked);
}

/// ptrace refuses such a base.
#[test]
fn a_segment_base_in_the_upper_half_goes_in_and_comes_out() {
    let Some(guest) = Guest::new(&[0xcc]) else { return };
    let mut vcpu = guest.vcpu();
    vcpu.regs_mut().gs_base = 0xffff_8000_0000_0000;
    assert_eq!(vcpu.run().unwrap(), exception(3, 0));
    assert_eq!(vcpu.regs().gs_base, 0xffff_8000_0000_0000);
}

#[test]
fn signals_that_are_no_kicks_do_not_end_run() {
    let Some(guest) = Guest::new(&FOREVER) else { return };
    let mut vcpu = guest.vcpu();
    let kicker = vcpu.kicker();
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let runner = scope.spawn(|| {
            // SAFETY: takes nothing, cannot fail.
            tell.send(unsafe { libc::gettid() }).unwrap();
            vcpu.run().unwrap()
        });
        let (thread, process) = (told.recv().unwrap(), std::process::id());
        std::thread::sleep(Duration::from_millis(5));
        // The same signal from elsewhere, without a request.
        let signal = vmm_sys_util::signal::SIGRTMIN();
        for _ in 0..20 {
            // SAFETY: plain numbers; the thread is running and the signal has a handler.
            let result = unsafe { libc::syscall(libc::SYS_tgkill, process, thread, signal) };
            assert_eq!(result, 0);
            std::thread::sleep(Duration::from_micros(200));
        }
        assert!(!runner.is_finished());
        kicker.kick();
        assert_eq!(runner.join().unwrap(), Exit::Kicked);
    });
}

#[test]
fn a_parked_vcpu_comes_back_as_new() {
    // fld1; syscall
    let Some(guest) = Guest::new(&[0xd9, 0xe8, 0x0f, 0x05]) else { return };
    let mut vcpu = guest.vcpu();
    let fresh = vcpu.xsave().unwrap();
    *vcpu.regs_mut() = Regs { rip: CODE, rax: 5, r9: 9, fs_base: 0x1000, gs_base: 0x2000, ..Regs::default() };
    assert_eq!(vcpu.run().unwrap(), Exit::Syscall);
    assert_ne!(vcpu.xsave().unwrap(), fresh);
    drop(vcpu);
    let made = guest.vm.making.lock().made;
    let vcpu = guest.vm.create_vcpu(guest.root).unwrap();
    assert_eq!(guest.vm.making.lock().made, made, "reused, not made");
    assert_eq!(*vcpu.regs(), Regs::default());
    assert_eq!(vcpu.xsave().unwrap(), fresh);
}
