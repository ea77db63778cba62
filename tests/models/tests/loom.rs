// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The small protocols of shadow-mmu under loom: every schedule within stated bounds, and every value that a load may return.
//!
//! This file is the root of a woven copy of those files of the crate that need neither frame memory nor a kernel (see
//! `build.rs`). How a model is run is at the top of [`exhaust`].
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

include!(concat!(env!("OUT_DIR"), "/loom/lib.rs"));

#[path = "../sync/loom.rs"]
#[warn(unused, clippy::all)]
pub mod sync;

#[path = "loom/entries.rs"]
#[warn(dead_code, unused, clippy::all)]
mod entries;
#[path = "loom/exhaust.rs"]
#[warn(dead_code, unused, clippy::all)]
mod exhaust;
#[path = "loom/frames.rs"]
#[warn(dead_code, unused, clippy::all)]
mod frames;
#[path = "loom/listeners.rs"]
#[warn(dead_code, unused, clippy::all)]
mod listeners;
#[path = "loom/records.rs"]
#[warn(dead_code, unused, clippy::all)]
mod records;
#[path = "loom/sections.rs"]
#[warn(dead_code, unused, clippy::all)]
mod sections;
#[path = "loom/sequence.rs"]
#[warn(dead_code, unused, clippy::all)]
mod sequence;
#[path = "loom/tracking.rs"]
#[warn(dead_code, unused, clippy::all)]
mod tracking;
