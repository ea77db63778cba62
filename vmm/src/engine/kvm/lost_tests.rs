// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! vCPUs that are lost: for what, and what is known of them afterwards. How long a host may be short of memory before that is in
//! `conformance::shortage`.

#![allow(clippy::unwrap_used, reason = "a failed test may panic")]

use super::testing::*;
use crate::engine::conformance::shortage::{LOAD, Planted};
use crate::engine::{Engine, EngineError, Exit, Vcpu, VcpuSnapshot};
use crate::inject::points::VCPU_RUN;
use kvm_bindings::KVM_EXIT_SHUTDOWN;
use shadow_mmu::inject::{Effect, Faults, Hit, Injector};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Under another entry of the root than code and stack.
const FAR: u64 = 0x6000_0000_0000;

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

/// Invents exits once it is told to.
#[derive(Debug, Default)]
struct Inventor(AtomicBool);

impl Injector for Inventor {
    fn hit(&self, hit: &Hit) -> Effect {
        let invents = *hit.point == VCPU_RUN && self.0.load(Ordering::SeqCst);
        if invents { Effect::Exit(KVM_EXIT_SHUTDOWN) } else { Effect::Go }
    }
}

#[test]
fn an_invented_exit_is_none_of_the_facts() {
    let Some(guest) = Guest::new(&SYSCALL) else { return };
    let inventor = Arc::<Inventor>::default();
    guest.vm.arm(Faults::new(Arc::clone(&inventor) as _));
    let mut vcpu = guest.vcpu();
    assert_eq!(vcpu.run().unwrap(), Exit::Syscall);
    let last = vcpu.raw_mut().fd.get_kvm_run().exit_reason;
    inventor.0.store(true, Ordering::SeqCst);
    let error = vcpu.run().unwrap_err();
    assert!(error.to_string().contains(&format!("injected exit reason {KVM_EXIT_SHUTDOWN}")), "{error}");
    assert_eq!(fact(snapshot_of(&error), "KVM's exit", "exit_reason"), u64::from(last));
}
