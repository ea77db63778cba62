// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What only this engine has: vCPUs that are parked and change threads, signals at the thread that runs one. What every engine
//! must do is in `conformance`, the monitor in `hostile`, flush methods in `flush_tests`, lost vCPUs in `lost_tests`.

use super::testing::*;
use crate::engine::{Exit, Vcpu};
use std::time::Duration;

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

/// That nothing of the old one is in the new one is what every engine must see to.
#[test]
fn a_parked_vcpu_is_used_again() {
    let Some(guest) = Guest::new(&SYSCALL) else { return };
    drop(guest.vcpu());
    let made = guest.vm.making.lock().made;
    let _vcpu = guest.vcpu();
    assert_eq!(guest.vm.making.lock().made, made);
}
