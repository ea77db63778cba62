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
//! A test does what it does for each of [`configs`] in turn; what it prints says which came last.

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

use super::testing::configs;
use super::{Engine, choice};
use guest::Guest;
use shadow_mmu::frame::{FramePool, FreedFrames};
use std::sync::Arc;

/// A machine of each engine, over a pool of its own.
fn machines(freed: FreedFrames) -> impl Iterator<Item = (Arc<FramePool>, Arc<dyn Engine>)> {
    configs().into_iter().map(move |config| {
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
