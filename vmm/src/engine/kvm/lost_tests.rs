// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! vCPUs that are lost: for what, after how many tries, and what is known of them afterwards.

#![allow(clippy::unwrap_used, reason = "a failed test may panic")]

use super::testing::*;
use crate::engine::{EngineError, Exit, Vcpu, VcpuSnapshot};
use crate::inject::points::VCPU_RUN;
use shadow_mmu::inject::{Effect, Faults, Hit, Injector};
use shadow_mmu::sync::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// mov al, [rdi]; syscall
const LOAD: [u8; 4] = [0x8a, 0x07, 0x0f, 0x05];
/// Under another entry of the root than code and stack.
const FAR: u64 = 0x6000_0000_0000;

/// What the next KVM_RUNs fail with.
#[derive(Debug, Default)]
struct Planted(Mutex<VecDeque<i32>>);

impl Planted {
    /// For the vCPUs that `guest` gets from now on.
    fn in_(guest: &Guest) -> Arc<Self> {
        let planted = Arc::<Self>::default();
        guest.vm.arm(Faults::new(Arc::clone(&planted) as _));
        planted
    }

    /// `errno`, so often.
    fn plant(&self, errno: i32, times: usize) {
        self.0.lock().extend(std::iter::repeat_n(errno, times));
    }
}

impl Injector for Planted {
    fn hit(&self, hit: &Hit) -> Effect {
        let next = || self.0.lock().pop_front();
        if *hit.point == VCPU_RUN { next().map_or(Effect::Go, Effect::Fail) } else { Effect::Go }
    }
}

fn snapshot_of(error: &EngineError) -> &VcpuSnapshot {
    error.snapshot.as_deref().unwrap()
}

fn fact(snapshot: &VcpuSnapshot, title: &str, name: &str) -> u64 {
    let facts = snapshot.facts.iter().find(|facts| facts.title.starts_with(title)).unwrap();
    facts.values.iter().find(|(of, _)| *of == name).unwrap().1
}

#[test]
fn a_broken_table_is_umbras_own_fault_and_the_snapshot_has_the_guest() {
    let Some(guest) = Guest::new(&LOAD) else { return };
    let mut vcpu = guest.vcpu();
    guest.map_new(FAR, RW);
    // A large page in the root: reserved on every CPU.
    let (root, index) = guest.entry(FAR, 4);
    guest.pool.words(root)[index].fetch_or(1 << 7, Ordering::SeqCst);
    (vcpu.regs_mut().rdi, vcpu.regs_mut().r15) = (FAR + 8, 0x1515);
    let error = vcpu.run().unwrap_err();
    assert!(error.what.starts_with("an exception that no guest can cause"), "{error}");
    let snapshot = snapshot_of(&error);
    assert_eq!((snapshot.guest.rip, snapshot.guest.r15, snapshot.cr2), (CODE, 0x1515, FAR + 8));
    assert_eq!(snapshot.guest.rsp, STACK_TOP - 0x100);
    assert_ne!(snapshot.cpu.rip, CODE, "the CPU is in the monitor");
    assert_eq!(fact(snapshot, "frame of the exception", "vector"), 14);
    assert_eq!(fact(snapshot, "frame of the exception", "error code") & 8, 8, "a reserved bit");
    assert_eq!(fact(snapshot, "KVM's exit 2 (KVM_EXIT_IO)", "port"), 14);
    assert_eq!(fact(snapshot, "control registers", "cr3"), guest.root.offset());
    assert!(snapshot.unread.is_empty(), "{:?}", snapshot.unread);
    let again = vcpu.run().unwrap_err();
    assert!(again.snapshot.is_none() && again.to_string().contains("failed before"), "{again}");
}

#[test]
fn an_error_of_kvm_runs_loses_the_vcpu_at_once_with_its_registers() {
    for errno in [libc::EFAULT, libc::EIO, libc::EINVAL] {
        let Some(guest) = Guest::new(&LOAD) else { return };
        let planted = Planted::in_(&guest);
        let mut vcpu = guest.vcpu();
        vcpu.regs_mut().r15 = 0x1515;
        planted.plant(errno, 1);
        let error = vcpu.run().unwrap_err();
        assert_eq!(error.source.raw_os_error(), Some(errno), "{error}");
        assert_eq!(fact(snapshot_of(&error), "segment cs", "dpl"), 0, "it has not entered: as KVM made it");
        assert_eq!(snapshot_of(&error).guest.r15, 0x1515);
    }
}

#[test]
fn a_host_that_is_short_of_memory_for_a_moment_costs_nothing_but_time() {
    let Some(guest) = Guest::new(&LOAD) else { return };
    let planted = Planted::in_(&guest);
    let mut vcpu = guest.vcpu();
    let frame = guest.map_new(DATA, RW);
    guest.pool.write(frame, 0, b"x");
    // Together more than a vCPU puts up with in a row.
    for _ in 0..2 {
        planted.plant(libc::ENOMEM, 6);
        start(&mut vcpu);
        (vcpu.regs_mut().rdi, vcpu.regs_mut().r15) = (DATA, 0x1515);
        assert_eq!(vcpu.run().unwrap(), Exit::Syscall);
        assert_eq!((vcpu.regs().rax, vcpu.regs().r15, vcpu.regs().rip), (u64::from(b'x'), 0x1515, CODE + 4));
        assert!(planted.0.lock().is_empty());
    }
}

#[test]
fn a_host_that_stays_short_of_memory_loses_the_vcpu() {
    let Some(guest) = Guest::new(&LOAD) else { return };
    let planted = Planted::in_(&guest);
    let mut vcpu = guest.vcpu();
    planted.plant(libc::ENOMEM, 1000);
    let error = vcpu.run().unwrap_err();
    assert_eq!(error.source.raw_os_error(), Some(libc::ENOMEM), "{error}");
    assert!(error.snapshot.is_some());
}

#[test]
fn pauses_that_others_cut_short_are_no_shortage() {
    let Some(guest) = Guest::new(&LOAD) else { return };
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
        let (done, kicker) = (std::sync::atomic::AtomicBool::new(false), &kicker);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::SeqCst) {
                    kicker.kick();
                }
            });
            for _ in 0..20 {
                assert!(matches!(vcpu.run().unwrap(), Exit::Kicked | Exit::Syscall));
                start(&mut vcpu);
                vcpu.regs_mut().rdi = DATA;
            }
            done.store(true, Ordering::SeqCst);
        });
    }
}

#[test]
fn a_kick_is_served_while_the_host_is_short_of_memory() {
    let Some(guest) = Guest::new(&LOAD) else { return };
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
    start(&mut vcpu);
    vcpu.regs_mut().rdi = DATA;
    assert_eq!(vcpu.run().unwrap(), Exit::Syscall);
}
