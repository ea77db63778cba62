// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A host that is short of memory when a vCPU is to run.

use super::guest::{CODE, DATA, Guest, RW, start};
use super::guests;
use crate::engine::{Engine, Exit};
use crate::inject::points::VCPU_RUN;
use shadow_mmu::inject::{Effect, Faults, Hit, Injector};
use shadow_mmu::sync::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// mov al, [rdi]; syscall
pub(in crate::engine) const LOAD: [u8; 4] = [0x8a, 0x07, 0x0f, 0x05];

/// What the next entries fail with.
#[derive(Debug, Default)]
pub(in crate::engine) struct Planted(pub(in crate::engine) Mutex<VecDeque<i32>>);

impl Planted {
    /// For the vCPUs that `guest` gets from now on.
    pub(in crate::engine) fn in_<E: Engine + ?Sized>(guest: &Guest<E>) -> Arc<Self> {
        let planted = Arc::<Self>::default();
        guest.vm.arm(Faults::new(Arc::clone(&planted) as _));
        planted
    }

    /// `errno`, so often.
    pub(in crate::engine) fn plant(&self, errno: i32, times: usize) {
        self.0.lock().extend(std::iter::repeat_n(errno, times));
    }
}

impl Injector for Planted {
    fn hit(&self, hit: &Hit) -> Effect {
        let next = || self.0.lock().pop_front();
        if *hit.point == VCPU_RUN { next().map_or(Effect::Go, Effect::Fail) } else { Effect::Go }
    }
}

#[test]
fn a_host_that_is_short_of_memory_for_a_moment_costs_nothing_but_time() {
    for guest in guests(&LOAD) {
        let planted = Planted::in_(&guest);
        let mut vcpu = guest.vcpu();
        let frame = guest.map_new(DATA, RW);
        guest.pool.write(frame, 0, b"x");
        // Together more than a vCPU puts up with in a row.
        for _ in 0..2 {
            planted.plant(libc::ENOMEM, 6);
            start(&mut *vcpu);
            (vcpu.regs_mut().rdi, vcpu.regs_mut().r15) = (DATA, 0x1515);
            assert_eq!(vcpu.run().unwrap(), Exit::Syscall);
            assert_eq!(
                (vcpu.regs().rax, vcpu.regs().r15, vcpu.regs().rip),
                (u64::from(b'x'), 0x1515, CODE + 4)
            );
            assert!(planted.0.lock().is_empty());
        }
    }
}

#[test]
fn a_host_that_stays_short_of_memory_loses_the_vcpu() {
    for guest in guests(&LOAD) {
        let planted = Planted::in_(&guest);
        let mut vcpu = guest.vcpu();
        planted.plant(libc::ENOMEM, 1000);
        let error = vcpu.run().unwrap_err();
        assert_eq!(error.source.raw_os_error(), Some(libc::ENOMEM), "{error}");
        assert!(error.snapshot.is_some());
    }
}

#[test]
fn pauses_that_others_cut_short_are_no_shortage() {
    for guest in guests(&LOAD) {
        let planted = Planted::in_(&guest);
        let mut vcpu = guest.vcpu();
        guest.map_new(DATA, RW);
        vcpu.regs_mut().rdi = DATA;
        let kicker = vcpu.kicker();
        // Each entry is refused once, and each pause is cut short by a kick that is pending: far more often than pauses are sat out.
        planted.plant(libc::ENOMEM, 100);
        while !planted.0.lock().is_empty() {
            kicker.kick();
            assert_eq!(vcpu.run().unwrap(), Exit::Kicked);
            // The kick came before the entry; the next one comes into the pause.
            let (done, kicker) = (AtomicBool::new(false), &kicker);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    while !done.load(Ordering::SeqCst) {
                        kicker.kick();
                    }
                });
                for _ in 0..20 {
                    assert!(matches!(vcpu.run().unwrap(), Exit::Kicked | Exit::Syscall));
                    start(&mut *vcpu);
                    vcpu.regs_mut().rdi = DATA;
                }
                done.store(true, Ordering::SeqCst);
            });
        }
    }
}

#[test]
fn a_kick_is_served_while_the_host_is_short_of_memory() {
    for guest in guests(&LOAD) {
        let planted = Planted::in_(&guest);
        let mut vcpu = guest.vcpu();
        planted.plant(libc::ENOMEM, 1000);
        let kicker = vcpu.kicker();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // Most often into a pause; before the first try it does the same.
                std::thread::sleep(Duration::from_millis(20));
                kicker.kick();
            });
            assert_eq!(vcpu.run().unwrap(), Exit::Kicked);
        });
        planted.0.lock().clear();
        guest.map_new(DATA, RW);
        start(&mut *vcpu);
        vcpu.regs_mut().rdi = DATA;
        assert_eq!(vcpu.run().unwrap(), Exit::Syscall);
    }
}
