// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The bundled `memstress`, as a guest in this process or as a process of its own, told what to touch and when.
//!
//! Commands go through a pipe to its stdin, answers come back through one from its stdout; between the two all its threads
//! sleep. So whoever holds a [`Memstress`] knows exactly which pages were touched between two of its own actions, and
//! disturbs nothing while it looks.
//!
//! One thread drives. It never waits for ever: an answer, the program's end and a limit all wake it. The limit grows with the
//! memory; who asks for what takes longer than touching it says so by [`Memstress::expect`]. Dropping a [`Memstress`] ends
//! the program, whatever it is doing; [`Memstress::finish`] lets it end by itself and looks at how.

#[cfg(test)]
mod tests;
mod work;

pub use work::Work;

use super::told::Told;
use crate::vm::{Machine, VmConfig};
use anyhow::{Context, Result};
use shadow_mmu::addr::HvaRange;
use std::os::fd::BorrowedFd;
use std::time::Duration;

/// What the program says of one pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pass {
    /// From the first thread's start to the last one's end, by the program's own clock.
    pub time: Duration,
    /// Accesses of all threads.
    pub accesses: u64,
}

/// A running `memstress`.
#[derive(Debug)]
pub struct Memstress(Told);

impl Memstress {
    /// Starts it as a guest. Once it has answered, its threads are there and its first page has been touched.
    ///
    /// # Errors
    /// What keeps umbra from running a guest.
    pub fn guest(config: VmConfig, work: &Work) -> Result<Self> {
        Told::guest(config, "memstress", &work.words(), work.pass_at_most()).map(Self)
    }

    /// Starts it as a process.
    ///
    /// # Errors
    /// The host's.
    pub fn native(work: &Work) -> Result<Self> {
        Told::native("memstress", &work.words(), work.pass_at_most()).map(Self)
    }

    /// From now on commands may take this much longer than touching all memory once.
    pub fn expect(&mut self, longer: Duration) {
        self.0.expect(longer);
    }

    /// The machine, if it is a guest.
    pub fn machine(&self) -> Option<&Machine> {
        self.0.machine()
    }

    /// The machine of one that was started as a guest.
    ///
    /// # Errors
    /// It was not.
    pub fn expect_machine(&self) -> Result<&Machine> {
        self.0.expect_machine()
    }

    /// The process, if it is one.
    pub fn pid(&self) -> Option<u32> {
        self.0.pid()
    }

    /// Sends `command` and waits for the answer: what follows `verb: `.
    ///
    /// # Errors
    /// The program ended, or took much longer than [expected](Self::expect).
    pub fn command(&mut self, command: &str) -> Result<String> {
        self.0.command(command)
    }

    /// Sends `command`; the caller asks for the [`answer`](Self::answer) later.
    ///
    /// # Errors
    /// The program ended.
    pub fn send(&mut self, command: &str) -> Result<()> {
        self.0.send(command)
    }

    /// Waits for the answer to `command`, the oldest that has not been answered.
    ///
    /// # Errors
    /// As those of [`command`](Self::command).
    pub fn answer(&mut self, command: &str) -> Result<String> {
        self.0.answer(command)
    }

    /// `read`, `write` or `mix`, with what may follow (the guest's own documentation has it), or `stop`.
    ///
    /// # Errors
    /// As those of [`command`](Self::command).
    pub fn pass(&mut self, command: &str) -> Result<Pass> {
        self.send(command)?;
        self.pass_answer(command)
    }

    /// Waits until `other` is readable, or there is an answer (or none will come, as asking for it tells). Whether `other` is.
    ///
    /// # Errors
    /// Nothing of that for as long.
    pub fn wait_beside(&self, other: BorrowedFd<'_>) -> Result<bool> {
        self.0.wait_beside(other)
    }

    /// The answer to such a command that was [sent](Self::send).
    ///
    /// # Errors
    /// As those of [`command`](Self::command).
    pub fn pass_answer(&mut self, command: &str) -> Result<Pass> {
        let answer = self.answer(command)?;
        parse_pass(&answer).with_context(|| format!("memstress answered `{command}` with `{answer}`"))
    }

    /// All the memory that is touched, in the program's own address space.
    ///
    /// # Errors
    /// As those of [`command`](Self::command).
    pub fn region(&mut self) -> Result<HvaRange> {
        self.0.region()
    }

    /// Lets it end, and waits for it.
    ///
    /// # Errors
    /// It did not end with status 0.
    pub fn finish(self) -> Result<()> {
        self.0.finish()
    }
}

/// `T ns, A accesses`.
fn parse_pass(answer: &str) -> Option<Pass> {
    let (time, accesses) = answer.split_once(" ns, ")?;
    let accesses = accesses.strip_suffix(" accesses")?.parse().ok()?;
    Some(Pass { time: Duration::from_nanos(time.parse().ok()?), accesses })
}
