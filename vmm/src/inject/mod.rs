// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Breaking things on purpose: a plan says what goes wrong where and when, and the guest runs under it.
//!
//! ```text
//!  plan.toml ──► Plan ──► Registry (an Injector) ◄── hits ── fault points in shadow-mmu, the engine, the guest's kernel
//!                            │                                 Faults: one handle a machine
//!                            └──► Account: which rules fired, and how often
//! ```
//!
//! | file | what |
//! | --- | --- |
//! | `points` | the points of this crate; those of the library are in [`shadow_mmu::inject`] |
//! | [`plan`](Plan) | the language: TOML, checked against the points |
//! | [`regions`] | memory of a guest by name |
//! | `words` | durations, sizes, error numbers and addresses as plans write them |
//! | `rule` | when a rule fires |
//! | [`registry`](Registry) | one run's rules, counters, and threads that are stalled |
//! | [`ready`] | the plans that umbra brings along |
//! | [`campaign`] | random plans, each run judged |
//! | `waits` | what delays go by: the host's clock or virtual time |
//! | `listener` | the points that are notifier callbacks |
//! | `armed` | the points of an engine, which is made before |
//!
//! docs/fault-injection.md is the page for people.
//!
//! # Determinism
//! Whether a hit fires depends on the plan's seed, the rule and how many hits it has seen, and on nothing else: no clock, no thread.
//! So a plan without times does the same to each run in which the points are hit in the same order.

mod armed;
#[cfg(feature = "inject")]
pub mod campaign;
mod listener;
#[cfg(feature = "inject")]
mod plan;
pub mod points;
#[cfg(feature = "inject")]
pub mod ready;
pub mod regions;
#[cfg(feature = "inject")]
mod registry;
#[cfg(feature = "inject")]
mod rule;
mod waits;
#[cfg(feature = "inject")]
mod words;

pub(crate) use armed::Armed;
pub use listener::NotifierFaults;
#[cfg(feature = "inject")]
pub use plan::{After, Memory, Pick, Plan, PlanError, Rule, What};
#[cfg(feature = "inject")]
pub use registry::{Account, Registry, RuleAccount, TICK};
pub use waits::Waits;
#[cfg(feature = "inject")]
pub(crate) use words::effect_names;
#[cfg(feature = "inject")]
pub use words::errno_name;
