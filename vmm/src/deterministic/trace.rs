// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a deterministic run did, line by line, and a digest of it: two runs that did the same have the same lines.
//!
//! ```text
//! switch 1001 steps 0                                          the baton goes to this thread
//! exit 1001 syscall 39 rip 0x401234 regs 8c1f2a5533e0c1d2 steps 0
//! exit 1001 fault 0x7fff00001000 w rip 0x40120a regs 5b6a19c3bd0e7781 steps 0
//! start 1001 Unmap 0x7fff00001000 0x7fff00002000               a notifier pair opens, and its end
//! end 1001 Unmap 0x7fff00001000 0x7fff00002000
//! op 1001 test_clear_young 0x400000 0x402000                   any other notifier event
//! ```
//! `regs` is the xxh3 of all general registers, flags and segment bases when the guest was left; `steps` the instructions that
//! were single-stepped so far. A dash for the thread: the event was made by a thread of umbra's own. The digest is the xxh3
//! of the text. It ends when the guest's last thread does.

use super::baton::Baton;
use crate::causes::say;
use crate::engine::{Exit, Regs};
use crate::trace::{Observe, Op, guest_thread};
use serde::Serialize;
use shadow_mmu::addr::{Access, HvaRange};
use shadow_mmu::notifier::{Event, Invalidation};
use shadow_mmu::sync::Mutex;
use std::fmt::{self, Write as _};
use std::fs::File;
use std::io::{BufWriter, Write as _};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

/// The trace of one run. Held by the VM as a listener.
#[derive(Debug)]
pub struct DeterministicTrace(Mutex<State>);

struct State {
    line: String,
    digest: Xxh3,
    file: Option<BufWriter<File>>,
    exits: u64,
    events: u64,
    over: bool,
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("State")
            .field("exits", &self.exits)
            .field("events", &self.events)
            .finish_non_exhaustive()
    }
}

/// What is told of a deterministic run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// The seed.
    pub seed: u64,
    /// Exits that the guest caused.
    pub exits: u64,
    /// Instructions that were single-stepped.
    pub steps: u64,
    /// Times another thread got to run.
    pub switches: u64,
    /// Notifier events, starts and ends of pairs counted apart.
    pub notifier_events: u64,
    /// The xxh3 of the trace, as 16 hexadecimal digits.
    pub digest: String,
    /// Whether nothing but the seed and the input decided: if not, a thread was interrupted by the watchdog.
    pub exact: bool,
}

impl Summary {
    /// For people, one line.
    pub fn text(&self) -> String {
        format!(
            "umbra: deterministic: seed {}, {} exits, {} steps, {} switches, {} notifier events, digest {}{}",
            self.seed,
            self.exits,
            self.steps,
            self.switches,
            self.notifier_events,
            self.digest,
            if self.exact { "" } else { ", not exact" }
        )
    }
}

fn hash(regs: &Regs) -> u64 {
    let Regs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rbp,
        rsp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip,
        rflags,
        fs_base,
        gs_base,
    } = *regs;
    let words = [
        rax, rbx, rcx, rdx, rsi, rdi, rbp, rsp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags, fs_base,
        gs_base,
    ];
    let mut bytes = [0; 20 * 8];
    for (to, word) in bytes.chunks_exact_mut(8).zip(words) {
        to.copy_from_slice(&word.to_le_bytes());
    }
    xxh3_64(&bytes)
}

/// The thread that an event is made on.
struct By(Option<i32>);

impl fmt::Display for By {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(tid) => write!(f, "{tid}"),
            None => f.write_str("-"),
        }
    }
}

fn event_name(event: Event) -> &'static str {
    match event {
        Event::Unmap => "Unmap",
        Event::Clear => "Clear",
        Event::ProtectionVma => "ProtectionVma",
        Event::ProtectionPage => "ProtectionPage",
        Event::Release => "Release",
    }
}

impl State {
    /// Takes `line` in and empties it.
    fn end_line(&mut self) {
        self.line.push('\n');
        self.digest.update(self.line.as_bytes());
        if let Some(file) = &mut self.file
            && let Err(error) = file.write_all(self.line.as_bytes())
        {
            say(format_args!("the rest of the deterministic trace is lost: {error}"));
            self.file = None;
        }
        self.line.clear();
    }

    fn event(&mut self, what: &str, name: &str, range: Option<HvaRange>) {
        let (start, end) = range.map_or((0, u64::MAX), |range| (range.start.0, range.end.0));
        // Writing to a string cannot fail; here and below.
        let _ = write!(self.line, "{what} {} {name} {start:#x} {end:#x}", By(guest_thread()));
        self.events += 1;
        self.end_line();
    }
}

impl DeterministicTrace {
    pub(super) fn new(file: Option<File>) -> Self {
        Self(Mutex::new(State {
            line: String::new(),
            digest: Xxh3::new(),
            file: file.map(BufWriter::new),
            exits: 0,
            events: 0,
            over: false,
        }))
    }

    fn note(&self, line: impl FnOnce(&mut State)) {
        let mut state = self.0.lock();
        if !state.over {
            line(&mut state);
        }
    }

    pub(super) fn exit(&self, tid: i32, exit: &Exit, regs: &Regs, steps: u64) {
        self.note(|state| {
            let line = &mut state.line;
            let _ = match *exit {
                Exit::Syscall => write!(line, "exit {tid} syscall {}", regs.rax),
                Exit::PageFault { addr, access } => {
                    let access = match access {
                        access if access.contains(Access::EXEC) => 'x',
                        access if access.contains(Access::WRITE) => 'w',
                        _ => 'r',
                    };
                    write!(line, "exit {tid} fault {:#x} {access}", addr.0)
                }
                Exit::HostFault { pfn } => {
                    write!(line, "exit {tid} host-fault {:#x}", pfn.map_or(u32::MAX, |pfn| pfn.0))
                }
                Exit::Exception { vector, error_code } => {
                    write!(line, "exit {tid} exception {vector} {error_code:#x}")
                }
                Exit::Kicked => write!(line, "exit {tid} kicked"),
            };
            let _ = write!(line, " rip {:#x} regs {:016x} steps {steps}", regs.rip, hash(regs));
            state.exits += 1;
            state.end_line();
        });
    }

    pub(super) fn switch(&self, tid: i32, steps: u64) {
        self.note(|state| {
            let _ = write!(state.line, "switch {tid} steps {steps}");
            state.end_line();
        });
    }

    /// The guest's last thread ends: what comes after it is not the guest's.
    pub fn finish(&self) {
        let mut state = self.0.lock();
        state.over = true;
        if let Some(Err(error)) = state.file.as_mut().map(|file| file.flush()) {
            say(format_args!("the end of the deterministic trace is lost: {error}"));
        }
        state.file = None;
    }

    pub(super) fn summary(&self, seed: u64, baton: &Baton) -> Summary {
        let (switches, exact) = baton.switches();
        let state = self.0.lock();
        Summary {
            seed,
            exits: state.exits,
            steps: baton.steps(),
            switches,
            notifier_events: state.events,
            digest: format!("{:016x}", state.digest.digest()),
            exact,
        }
    }
}

impl Observe for DeterministicTrace {
    fn start(&self, invalidation: &Invalidation) {
        self.note(|state| state.event("start", event_name(invalidation.event), Some(invalidation.range)));
    }
    fn end(&self, invalidation: &Invalidation) {
        self.note(|state| state.event("end", event_name(invalidation.event), Some(invalidation.range)));
    }
    fn op(&self, op: Op) {
        self.note(|state| state.event("op", op.name(), op.range()));
    }
}
