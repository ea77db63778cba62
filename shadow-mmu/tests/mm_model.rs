// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Random scripts of memory calls, guest accesses, host accesses, aging and forks against a model of a few dozen lines.
//!
//! The [`Model`] knows, page by page, what is mapped, with which rights, and which word the page begins with. After every
//! step: calls returned what the model returned, the VMAs are the model's pages in maximal runs, every page that is in
//! memory holds the model's word and every page that is not holds nothing to lose (I24), the audit is clean (I13–I17,
//! I21, I43), nothing is cached that no leaf backs (I28), no freed frame was written (I22). All of it for every space of
//! the family that the script has forked, whichever it is in; each has a shadow map of its own. At the end the vCPUs read
//! every page, and every frame comes back (I23). The second property runs out of memory all the time: calls may fail for
//! that, but only then, and nothing else changes.
//!
//! Listeners come and go. Each op reaches all that are registered, the newest first (I12), and nobody else (I7); pairs are
//! pairs (I1, I9); and what a listener mirrors is true, or it was told (I13, I14).
//!
//! Pages of all spaces are merged now and then, and nothing of the above is different for that (I51, I53, I55, I58).
//!
//! A failure prints the smallest script that fails; it goes into [`scripts_that_failed_once`].
#![cfg(feature = "mmu-notifier")]
// What a test does not expect may end it.
#![allow(clippy::unwrap_used)]

mod common;
#[path = "mm_model/listener.rs"]
mod listener;
#[path = "mm_model/model.rs"]
mod model;
#[path = "mm_model/script.rs"]
mod script;
#[path = "mm_model/space.rs"]
mod space;

use common::RW;
use proptest::prelude::*;
use script::{Child, Death, Op, SPACES, What, Where, op};
use shadow_mmu::ksm::{Domain, Ksm, KsmSettings};
use shadow_mmu::mm::{Advice, MapFlags, RemapFlags};
use shadow_mmu::shadow::FaultAroundPolicy;
use space::Space;
use std::sync::Arc;

/// A family of spaces, and the one that the script is in.
struct World {
    spaces: Vec<Space>,
    current: usize,
    ksm: Arc<Ksm>,
    short: bool,
}

impl World {
    fn new(frames: u64, policy: FaultAroundPolicy, short: bool) -> Self {
        let first = Space::new(frames, policy, short);
        let settings = KsmSettings { max_page_sharing: 4, ..KsmSettings::default() };
        let ksm = Ksm::new(Arc::clone(first.mm().pool()), settings).unwrap();
        ksm.enter(first.mm(), Domain(0)).unwrap();
        Self { spaces: vec![first], current: 0, ksm, short }
    }

    fn step(&mut self, op: Op) {
        match op {
            Op::Fork(child) if self.spaces.len() < SPACES => {
                if let Some(mut new) = self.spaces[self.current].fork() {
                    if child == Child::HasRead {
                        new.step(Op::ReadAll);
                    }
                    self.spaces.push(new);
                }
            }
            Op::Switch(to) => self.current = to % self.spaces.len(),
            Op::Die(death) if self.spaces.len() > 1 => {
                self.spaces.remove(self.current).die(death);
                self.current = 0;
            }
            Op::Scan(pages) => _ = self.ksm.scan(pages),
            Op::Unmerge => {
                let unmerged = self.ksm.unmerge();
                assert!(unmerged.is_ok() || self.short, "{unmerged:?}");
            }
            Op::Fork(_) | Op::Die(_) => {}
            op => self.spaces[self.current].step(op),
        }
        // All of them: what is done to one must leave the others as they are.
        self.spaces.iter().for_each(Space::check);
        assert_eq!(self.ksm.audit(), []);
    }

    fn run(mut self, script: &[Op]) {
        script.iter().for_each(|&op| self.step(op));
        for space in 0..self.spaces.len() {
            self.step(Op::Switch(space));
            self.step(Op::ReadAll);
        }
        while self.spaces.len() > 1 {
            self.step(Op::Die(Death::ByExit));
        }
        self.spaces.into_iter().for_each(Space::finish);
    }
}

fn policy() -> impl Strategy<Value = FaultAroundPolicy> {
    prop_oneof![
        Just(FaultAroundPolicy::Off),
        Just(FaultAroundPolicy::Fixed(8)),
        Just(FaultAroundPolicy::Fixed(64)),
        Just(FaultAroundPolicy::Adaptive)
    ]
}

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, failure_persistence: None, max_shrink_iters: 4000, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(config(1500))]

    #[test]
    fn i13_i14_i21_i24_i28_scripts_do_what_the_model_does(
        script in prop::collection::vec(op(), 1..80),
        policy in policy(),
    ) {
        World::new(512, policy, false).run(&script);
    }

    #[test]
    fn i23_running_out_of_memory_fails_calls_and_changes_nothing_else(
        script in prop::collection::vec(op(), 1..80),
        policy in policy(),
        frames in 41..72u64,
    ) {
        World::new(frames, policy, true).run(&script);
    }
}

#[test]
fn scripts_that_failed_once() {
    let map = |at, len, what| Op::Map(Where::Fixed(at), len, RW, what, MapFlags::empty());
    // Advice on no page split a mapping and lost the second half.
    let nothing = [map(0, 6, What::Private), Op::Write(4, 7), Op::Advise(3, 0, Advice::Random), Op::Read(4)];
    // A move that was refused had unmapped its target already.
    let (old_len, new_len, flags) = (0, 4, RemapFlags::MAYMOVE | RemapFlags::FIXED);
    let refused =
        [map(0, 6, What::Private), Op::Write(2, 7), Op::Remap { old: 1, old_len, new_len, flags, to: 0 }];
    for script in [&nothing[..], &refused[..]] {
        World::new(512, FaultAroundPolicy::Off, false).run(script);
    }
}
