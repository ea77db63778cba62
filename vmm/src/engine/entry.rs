// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What an armed plan does in place of an entry into the guest: the same fault points in every engine.

use crate::inject::points::{SYNC_REGS, VCPU_RUN};
use shadow_mmu::inject::{Effect, Faults};
use std::io;

/// What is said of a vCPU that is lost by an exit that no guest can cause.
pub(super) const NO_REASON: &str = "the vCPU stopped for no reason of the guest's";

/// What an entry came back with that was not made.
#[derive(Debug)]
pub(super) enum Injected {
    /// The host refused it with this error number.
    Errno(i32),
    /// An exit that no guest can cause, in words.
    Exit(io::Error),
}

/// What `faults` has for this entry. `None`: it is to be made.
pub(super) fn injected(faults: &Faults) -> Option<Injected> {
    if let Some(errno) = faults.fail(&SYNC_REGS) {
        return Some(Injected::Errno(errno));
    }
    match faults.hit(&VCPU_RUN) {
        Effect::Fail(errno) => Some(Injected::Errno(errno)),
        Effect::Exit(reason) => {
            Some(Injected::Exit(io::Error::other(format!("injected exit reason {reason}"))))
        }
        _ => None,
    }
}
