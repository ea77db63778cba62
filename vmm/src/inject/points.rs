// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The fault points of this crate, and the list of all.
//!
//! A point without a promise is a bug: docs/fault-injection.md has a line for each, with the tests that hold it.

use shadow_mmu::inject::{Addressed, Effects, Outcome, Point, Scope};
use std::time::Duration;

/// KVM_RUN, or PTRACE_SYSEMU.
pub static VCPU_RUN: Point = Point {
    name: "vcpu-run",
    place: "a vCPU enters the guest (KVM_RUN; by ptrace PTRACE_SYSEMU)",
    models: "signals that come all the time, a host that is short of memory, a broken KVM",
    promise: "EINTR and EAGAIN: the vCPU enters again. ENOMEM: it tries for about a second. EFAULT, ENOMEM for longer, and an exit \
              that no guest can cause: the run ends with 125 and a report in a file",
    errors: &[
        (libc::EINTR, Outcome::Unseen),
        (libc::EAGAIN, Outcome::Unseen),
        (libc::ENOMEM, Outcome::RunFails),
        (libc::EFAULT, Outcome::RunFails),
    ],
    effects: Effects::WAIT.union(Effects::EXIT),
    outcome: Outcome::RunFails,
    scope: Scope::Vm,
    addressed: Addressed::No,
};

/// Registers are handed to KVM in the page shared with it, or to ptrace.
pub static SYNC_REGS: Point = Point {
    name: "sync-regs",
    place: "the engine takes a vCPU's registers (KVM's shared page; by ptrace PTRACE_SETREGS)",
    models: "a host that refuses registers (KVM_CAP_SYNC_REGS)",
    promise: "the run ends with 125 and a report in a file",
    errors: &[(libc::EINVAL, Outcome::RunFails)],
    effects: Effects::WAIT,
    outcome: Outcome::Unseen,
    scope: Scope::Vm,
    addressed: Addressed::No,
};

/// A vCPU is asked to leave the guest.
pub static KICK: Point = Point {
    name: "kick",
    place: "a vCPU is made to leave the guest",
    models: "an interrupt that is late, a host thread that gets no CPU",
    promise: "whoever needs the vCPU out waits for it; signals, ends and flushes are late, never lost",
    errors: &[],
    effects: Effects::WAIT,
    outcome: Outcome::Unseen,
    scope: Scope::Vm,
    addressed: Addressed::No,
};

/// Pages of the window are discarded, so that KVM drops its translations of them; by ptrace, pages of the guest's process are unmapped.
pub static WINDOW_MADVISE: Point = Point {
    name: "window-madvise",
    place: "pages of KVM's view of the frames are discarded (madvise, process_madvise); by ptrace pages are unmapped",
    models: "a host that refuses: a seccomp filter, a kernel without process_madvise, no memory",
    promise: "the method is given up for this machine, and another flushes; if none is left, the run ends with 125. By ptrace \
              everything is unmapped instead",
    errors: &[
        (libc::EPERM, Outcome::RunFails),
        (libc::EINVAL, Outcome::RunFails),
        (libc::ENOMEM, Outcome::RunFails),
        (libc::EAGAIN, Outcome::RunFails),
    ],
    effects: Effects::WAIT,
    outcome: Outcome::Unseen,
    scope: Scope::Vm,
    addressed: Addressed::No,
};

/// Cached translations are flushed.
pub static FLUSH: Point = Point {
    name: "flush",
    place: "translations that were taken out of the shadow map are flushed",
    models: "a shootdown that takes its time, or is done page by page",
    promise: "the change waits for the flush, and no frame is freed before it",
    errors: &[],
    effects: Effects::WAIT.union(Effects::SPLIT),
    outcome: Outcome::Unseen,
    scope: Scope::Vm,
    addressed: Addressed::Guest,
};

/// A pair opens.
pub static NOTIFIER_START: Point = Point {
    name: "notifier-start",
    place: "a listener is told that a range is about to change (invalidate_range_start)",
    models: "a secondary MMU that is slow, or cannot answer without sleeping (EAGAIN, only where it must not sleep)",
    promise: "the change waits; a change that must not wait is given up, and every listener that agreed hears the end",
    errors: &[(libc::EAGAIN, Outcome::Unseen)],
    effects: Effects::WAIT,
    outcome: Outcome::Unseen,
    scope: Scope::Vm,
    addressed: Addressed::Guest,
};

/// A pair closes.
pub static NOTIFIER_END: Point = Point {
    name: "notifier-end",
    place: "a listener is told that a range has changed (invalidate_range_end)",
    models: "a secondary MMU that is slow; faults of the range wait for it",
    promise: "faults of other pages go on; those of the range retry until the end",
    errors: &[],
    effects: Effects::WAIT,
    outcome: Outcome::Unseen,
    scope: Scope::Vm,
    addressed: Addressed::Guest,
};

/// The guest faults.
pub static PAGE: Point = Point {
    name: "page",
    place: "the guest's access to a page has come to umbra",
    models: "far or failing memory: slow pages, pages that are gone, poisoned, or flip bits",
    promise: "the program gets the signal that Linux gives (SIGBUS with BUS_ADRERR or BUS_MCEERR_AR, SIGSEGV with SEGV_ACCERR); a system \
              call that touches the page gets EFAULT; a flipped bit is there, and nobody says so",
    errors: &[],
    effects: Effects::WAIT.union(Effects::MEMORY),
    outcome: Outcome::GuestFails,
    scope: Scope::Vm,
    addressed: Addressed::Guest,
};

/// How much of the run a hit of `tick` stands for.
pub const TICK_TIME: Duration = Duration::from_millis(10);

/// Time passes while the guest runs.
pub static TICK: Point = Point {
    name: "tick",
    place: "ten milliseconds of the guest's run are over",
    models: "what happens to memory with time: failing memory, revoked pages, pressure by others",
    promise: "as page; memory that was taken comes back when the rule says so; a guest that needs more meanwhile gets ENOMEM or is \
              ended as by the OOM killer",
    errors: &[],
    effects: Effects::WAIT.union(Effects::MEMORY),
    outcome: Outcome::GuestFails,
    scope: Scope::Vm,
    addressed: Addressed::No,
};

/// The guest makes a system call.
pub static SYSCALL: Point = Point {
    name: "syscall",
    place: "the guest makes a system call; `call` chooses by name or number",
    models: "a kernel that refuses: limits, memory, interrupted and would-block calls",
    promise: "the call is not made and returns this error; what the program does then is the program's",
    errors: &[
        (libc::ENOMEM, Outcome::GuestFails),
        (libc::EINTR, Outcome::GuestFails),
        (libc::EAGAIN, Outcome::GuestFails),
        (libc::EIO, Outcome::GuestFails),
        (libc::EINVAL, Outcome::GuestFails),
        (libc::EPERM, Outcome::GuestFails),
        (libc::EACCES, Outcome::GuestFails),
        (libc::ENOSYS, Outcome::GuestFails),
        (libc::ENOSPC, Outcome::GuestFails),
        (libc::EMFILE, Outcome::GuestFails),
        (libc::EPIPE, Outcome::GuestFails),
        (libc::EFAULT, Outcome::GuestFails),
    ],
    effects: Effects::WAIT,
    outcome: Outcome::Unseen,
    scope: Scope::Vm,
    addressed: Addressed::No,
};

/// A file is read for the guest.
pub static FILE_READ: Point = Point {
    name: "file-read",
    place: "umbra reads a file for the guest",
    models: "a disk that fails, is slow, or returns other bytes than were written",
    promise: "the guest's read returns the error, is late, or has one bit flipped",
    errors: &[(libc::EIO, Outcome::GuestFails), (libc::EINTR, Outcome::GuestFails)],
    effects: Effects::WAIT.union(Effects::CORRUPT),
    outcome: Outcome::GuestFails,
    scope: Scope::Vm,
    addressed: Addressed::No,
};

/// A thread of the guest gets a vCPU and a host thread.
pub static THREAD_START: Point = Point {
    name: "thread-start",
    place: "a new thread of the guest gets a vCPU and a host thread",
    models: "a host without threads, vCPUs or memory left",
    promise: "clone returns EAGAIN; for the guest's first thread the run ends with 125",
    errors: &[(libc::EAGAIN, Outcome::GuestFails), (libc::ENOMEM, Outcome::GuestFails)],
    effects: Effects::WAIT,
    outcome: Outcome::Unseen,
    scope: Scope::Vm,
    addressed: Addressed::No,
};

/// A wait with a deadline begins.
pub static TIMER: Point = Point {
    name: "timer",
    place: "a thread of the guest begins a wait with a deadline",
    models: "timers that fire late, as on a busy host",
    promise: "the wait ends later by the delay, never earlier; signals and wake-ups still end it at once",
    errors: &[],
    effects: Effects::DELAY,
    outcome: Outcome::Unseen,
    scope: Scope::Vm,
    addressed: Addressed::No,
};

/// Every point there is.
pub fn all() -> impl Iterator<Item = &'static Point> {
    const OURS: [&Point; 13] = [
        &VCPU_RUN,
        &SYNC_REGS,
        &KICK,
        &WINDOW_MADVISE,
        &FLUSH,
        &NOTIFIER_START,
        &NOTIFIER_END,
        &PAGE,
        &TICK,
        &SYSCALL,
        &FILE_READ,
        &THREAD_START,
        &TIMER,
    ];
    shadow_mmu::inject::POINTS.into_iter().chain(OURS)
}

/// The point of this name.
pub fn find(name: &str) -> Option<&'static Point> {
    all().find(|point| point.name == name)
}
