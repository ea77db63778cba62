// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a vCPU was when the engine lost it, taken while the engine still has it.
//!
//! It holds registers and what the host says of the exit: numbers under names, so that a report can print them without
//! knowing the engine. No memory of the guest is in it.

use super::Regs;

/// Facts of one kind: a title, and values under the names that the kernel's documentation has for them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// What they are about.
    pub title: String,
    /// Name and value.
    pub values: Vec<(&'static str, u64)>,
}

impl Facts {
    /// Facts about `title`.
    pub fn new(title: impl Into<String>, values: Vec<(&'static str, u64)>) -> Self {
        Self { title: title.into(), values }
    }
}

/// A vCPU at the moment of its loss.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VcpuSnapshot {
    /// The guest's registers, as far as they are known: those of ring 3, even where the CPU was in the monitor.
    pub guest: Regs,
    /// The CPU's own registers, as the host last had them.
    pub cpu: Regs,
    /// CR2: the address of the last page fault.
    pub cr2: u64,
    /// Everything else, in the order in which it is to be read: the exit, system registers, events.
    pub facts: Vec<Facts>,
    /// What could not be read any more, and why.
    pub unread: Vec<String>,
}
