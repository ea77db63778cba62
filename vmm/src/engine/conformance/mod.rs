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

use super::{Engine, EngineChoice, EngineConfig, choice};
use crate::causes::one_line;
use guest::Guest;
use shadow_mmu::frame::{FramePool, FreedFrames};
use std::sync::Arc;

/// The engines to test here. One that the host does not offer is left out, which is said; where the environment has
/// `UMBRA_REQUIRE_KVM`, that is a failure for KVM.
fn engines() -> Vec<EngineConfig> {
    let config = crate::cli::engine();
    let mut engines = Vec::new();
    for choice in [EngineChoice::Kvm, EngineChoice::Ptrace] {
        if config.choice != EngineChoice::Auto && config.choice != choice {
            continue;
        }
        let config = EngineConfig { choice, ..config.clone() };
        match choice::kind(&config) {
            Ok(_) => engines.push(config),
            Err(error) => {
                let required = choice == EngineChoice::Kvm && std::env::var_os("UMBRA_REQUIRE_KVM").is_some();
                assert!(!required, "KVM is required here: {}", one_line(&error));
                println!("skipped: {}", one_line(&error));
            }
        }
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
