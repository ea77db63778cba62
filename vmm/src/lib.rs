// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! umbra: runs a static Linux program in ring 3, under KVM or traced, on page tables that umbra writes itself.
//!
//! | module | what |
//! | --- | --- |
//! | [`engine`] | a vCPU that runs ring-3 code until something needs umbra |
//! | [`guest`] | what a program sees: ELF loading and the Linux system calls |
//! | [`vm`] | one guest, put together: pool, address space, shadow map, engine, threads |
//! | [`fleet`] | guests that share a pool |
//! | [`reactor`] | the event loop around them |
//! | [`aging`], [`dirty_rate`] | which pages the guest uses, and which it writes |
//! | [`stalls`] | what it waited for |
//! | [`inject`] | breaking things on purpose |
//! | [`deterministic`] | the same run again, from a seed |
//! | [`random`] | the generator behind what a seed decides |
//! | [`trace`] | notifier events, to be read |
//! | [`recorder`], [`report`] | what is said of a guest that died, and of one that ran |
//! | [`crash`] | the report on umbra's own failures, in a file |
//! | [`mod@bench`], [`cli`] | the commands |

// A full or closed stderr is no panic: `causes::say`.
#![cfg_attr(not(test), deny(clippy::print_stderr))]

pub mod aging;
pub mod bench;
mod causes;
pub mod cli;
pub mod crash;
pub mod deterministic;
pub mod dirty_rate;
pub mod engine;
pub mod fleet;
pub mod guest;
pub mod inject;
pub mod ksm;
pub mod random;
pub mod reactor;
pub mod recorder;
pub mod report;
pub mod stalls;
pub mod trace;
pub mod vm;
mod whole_file;
