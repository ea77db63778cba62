// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! shadow-mmu as a whole under shuttle: `Mm`, `ShadowMmu` and the notifier layer, with vCPUs in software.
//!
//! This file is the root of a woven copy of the crate (see `build.rs`), so that its `crate::` paths work. What is checked
//! and how is at the top of [`explore`], [`machine`] and [`cpu`].
//!
//! # To replay a failure
//! A failed test prints its scenario and shuttle's schedule of the execution. To run that execution alone, say
//! `UMBRA_SHUTTLE_REPLAY=<scenario>:<schedule> cargo test -p umbra-models --test shuttle <scenario>`.
//! The same number in `UMBRA_SEED` draws the same schedules again, as long as the code is the same.
// The sources are linted where they are; here they have mutants in them, and most of what is public is not used.
#![allow(
    dead_code,
    missing_debug_implementations,
    missing_docs,
    unreachable_pub,
    unused,
    clippy::all,
    clippy::undocumented_unsafe_blocks,
    clippy::unwrap_used,
    reason = "the woven sources are linted in shadow-mmu; tests may panic"
)]

include!(concat!(env!("OUT_DIR"), "/shuttle/lib.rs"));

#[path = "../sync/shuttle.rs"]
#[warn(unused, clippy::all)]
pub mod sync;

#[path = "shuttle/aging.rs"]
#[warn(dead_code, unused, clippy::all)]
mod aging;
#[path = "shuttle/changes.rs"]
#[warn(dead_code, unused, clippy::all)]
mod changes;
#[path = "shuttle/cpu.rs"]
#[warn(dead_code, unused, clippy::all)]
mod cpu;
#[path = "shuttle/dirty.rs"]
#[warn(dead_code, unused, clippy::all)]
mod dirty;
#[path = "shuttle/entries.rs"]
#[warn(dead_code, unused, clippy::all)]
mod entries;
#[path = "shuttle/explore.rs"]
#[warn(dead_code, unused, clippy::all)]
mod explore;
#[path = "shuttle/faults.rs"]
#[warn(dead_code, unused, clippy::all)]
mod faults;
#[path = "shuttle/filled.rs"]
#[warn(dead_code, unused, clippy::all)]
mod filled;
#[path = "shuttle/intervals.rs"]
#[warn(dead_code, unused, clippy::all)]
mod intervals;
#[path = "shuttle/iotlb.rs"]
#[warn(dead_code, unused, clippy::all)]
mod iotlb;
#[path = "shuttle/lifetimes.rs"]
#[warn(dead_code, unused, clippy::all)]
mod lifetimes;
#[path = "shuttle/listeners.rs"]
#[warn(dead_code, unused, clippy::all)]
mod listeners;
#[path = "shuttle/machine.rs"]
#[warn(dead_code, unused, clippy::all)]
mod machine;
#[path = "shuttle/merging.rs"]
#[warn(dead_code, unused, clippy::all)]
mod merging;
#[path = "shuttle/migration.rs"]
#[warn(dead_code, unused, clippy::all)]
mod migration;
#[path = "shuttle/process.rs"]
#[warn(dead_code, unused, clippy::all)]
mod process;
#[path = "shuttle/quarantine.rs"]
#[warn(dead_code, unused, clippy::all)]
mod quarantine;
#[path = "shuttle/shared.rs"]
#[warn(dead_code, unused, clippy::all)]
mod shared;
#[path = "shuttle/sharing.rs"]
#[warn(dead_code, unused, clippy::all)]
mod sharing;
#[path = "shuttle/slots.rs"]
#[warn(dead_code, unused, clippy::all)]
mod slots;
#[path = "shuttle/storm.rs"]
#[warn(dead_code, unused, clippy::all)]
mod storm;
#[path = "shuttle/written.rs"]
#[warn(dead_code, unused, clippy::all)]
mod written;
