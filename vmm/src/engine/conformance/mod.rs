// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What every engine must do, as tests of each engine that this host offers: a few instructions as the guest, through
//! [`Engine`] and [`Vcpu`] and nothing else. What only one engine has is tested with that engine.
//!
//! | module | what |
//! | --- | --- |
//! | [`guest`] | the guest: a pool, a root table and pages that are mapped by hand |
//! | `registers` | what goes in and comes out: registers, FPU, time stamps |
//! | `exits` | system calls and exceptions, each as its own exit |
//! | `faults` | page faults: the byte and what was wanted of it |
//! | `hostile` | what a guest may try |
//! | `kicks` | kicks, from before the entry to after the vCPU's end |
//! | `flush` | what holds once a flush has returned |
//! | `track` | aging and the dirty log, over a whole address space |
//! | `shortage` | a host that is short of memory (feature `inject`) |
//!
//! A test does what it does for each of [`engines`] in turn; what it prints says which came last. `UMBRA_ENGINE` narrows
//! them to one.

mod exits;
mod faults;
pub(super) mod flush;
pub(super) mod guest;
pub(super) mod hostile;
mod kicks;
mod registers;
#[cfg(feature = "inject")]
pub(super) mod shortage;
mod track;

use super::kvm::host_facts;
use super::{Engine, EngineChoice, EngineConfig, EngineKind, choice, ptrace};
use guest::Guest;
use shadow_mmu::frame::{FramePool, FreedFrames};
use std::sync::Arc;

/// The engines to test here. One that the host does not offer is left out, which is said; where the environment has
/// `UMBRA_REQUIRE_KVM`, that is a failure for KVM.
fn engines() -> Vec<EngineConfig> {
    let config = crate::cli::engine();
    let wanted = |choice| config.choice == EngineChoice::Auto || config.choice == choice;
    let mut engines = Vec::new();
    let mut offer = |choice, obstacle: Option<String>| match obstacle {
        None => engines.push(EngineConfig { choice, kvm_device: config.kvm_device.clone() }),
        Some(obstacle) => println!("skipped: {obstacle}"),
    };
    if wanted(EngineChoice::Kvm) {
        let obstacle = host_facts(&config.kvm_device).obstacle;
        let required = std::env::var_os("UMBRA_REQUIRE_KVM").is_some();
        assert!(!required || obstacle.is_none(), "KVM is required here: {obstacle:?}");
        offer(EngineChoice::Kvm, obstacle);
    }
    if wanted(EngineChoice::Ptrace) {
        offer(EngineChoice::Ptrace, ptrace::probe().err().map(|error| error.to_string()));
    }
    engines
}

/// A machine of each engine, over a pool of its own.
fn machines(freed: FreedFrames) -> impl Iterator<Item = (Arc<FramePool>, Arc<dyn Engine>)> {
    engines().into_iter().map(move |config| {
        println!("the {} engine:", config.choice);
        let pool = Arc::new(FramePool::new(64 << 20, freed).unwrap());
        let engine = choice::open(&config, Arc::clone(&pool)).unwrap();
        (pool, engine)
    })
}

/// A guest of each engine, with `code` and a stack.
fn guests(code: &[u8]) -> impl Iterator<Item = Guest> {
    machines(FreedFrames::Keep).map(move |(pool, engine)| Guest::over(pool, engine, code))
}

/// Whether the CPU marks accesses when they are made, and nothing else: not ahead of them, as one that walks the tables may.
fn marks_are_exact(engine: &dyn Engine) -> bool {
    match engine.kind() {
        EngineKind::Kvm => engine.facts().kvm_backend.walks_in_software(),
        EngineKind::Ptrace => true,
    }
}
