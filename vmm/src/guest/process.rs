// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A process of the guest: one address space, one table of files, one group of threads.
//!
//! # Lock order
//! Every lock of `guest/`, outermost first. None is held while the guest runs or while anything blocks.
//!
//! 1. the futex table ([`futex`](super::futex)); below it the locks of Mm, since a futex word is read under it
//! 2. the group ([`group`](super::group)): threads, dispositions, pending signals
//! 3. a [`Waker`]'s state: a leaf, but for the vCPU's kick, which does not wait
//! 4. leaves that are never held together with another: the file table, the limits
//!
//! Guest memory is reached (and Mm's locks are taken) with the futex table's lock or with none.

use super::clock::Clock;
use super::errno::Errno;
use super::files::Files;
use super::futex::Futexes;
use super::group::{ExitStatus, Group};
use super::host;
use super::info::Limits;
use super::signal::SigSet;
use super::syscall::UnknownCalls;
use super::thread::Thread;
use super::uaccess::UserMemory;
use super::waker::Waker;
use crate::deterministic::{Deterministic, PID};
use crate::engine::{EngineError, Regs};
use shadow_mmu::addr::{Access, Gpa, HvaRange};
use shadow_mmu::mm::Mm;
use shadow_mmu::notifier::Misuse;
use shadow_mmu::sync::{Mutex, MutexGuard};
use std::fmt::Debug;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// The death of a process by a signal, as the thread saw it that died first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Death {
    /// The signal's number.
    pub signal: i32,
    /// Why it was sent: `si_code`.
    pub code: i32,
    /// The first byte that could not be reached, where that is the reason.
    pub address: Option<Gpa>,
    /// What was wanted of it.
    pub access: Option<Access>,
    /// The instruction: for a fault the one that caused it, otherwise where the thread was.
    pub rip: u64,
    /// All registers of the thread.
    pub regs: Regs,
    /// The thread.
    pub tid: i32,
    /// The CPU's exception vector, where an instruction is the reason.
    pub vector: Option<u8>,
}

/// What a process needs from the machine around it.
///
/// A process holds its host for as long as it lives, so a host that holds the process must do so weakly, or be an object
/// of its own.
pub trait Host: Debug + Send + Sync {
    /// Makes a vCPU with these registers and this FPU state, and a host thread that calls [`Thread::run`] with it. The
    /// thread may run before this returns.
    ///
    /// # Errors
    /// The error number that the guest gets: `EAGAIN` where there is no vCPU left.
    fn start_thread(&self, thread: Thread, regs: Regs, xsave: Vec<u8>) -> Result<(), i32>;

    /// A signal ends the process. Called once, before [`exited`](Self::exited).
    fn report_death(&self, death: &Death);

    /// The vCPU of this thread is lost, and the process is about to be ended for that.
    fn vcpu_lost(&self, tid: i32, error: &EngineError);

    /// The last thread has left; [`Process::status`] is known.
    fn exited(&self);

    /// These whole pages were just filled from a file. Others may have the same (KSM++, USENIX ATC 2013).
    fn filled(&self, range: HvaRange);

    /// The CPU time that the process's threads have used outside umbra's own process, those that ended included.
    fn cpu_time_outside(&self) -> Duration;
}

/// What a process is made of.
#[derive(Debug)]
pub struct Setup {
    /// Its address space, with a program loaded.
    pub mm: Arc<Mm>,
    /// Its open files.
    pub files: Files,
    /// The machine.
    pub host: Arc<dyn Host>,
    /// The program's path, for `/proc/self/exe` and the main thread's name.
    pub exe: Vec<u8>,
    /// Threads it may have at once.
    pub max_threads: usize,
    /// What decides everything that a run may differ in from the next, where something does.
    pub deterministic: Option<Arc<Deterministic>>,
}

/// A process of the guest.
#[derive(Debug)]
pub struct Process {
    setup: Setup,
    clock: Clock,
    user: UserMemory,
    pid: i32,
    next_tid: AtomicI32,
    group: Mutex<Group>,
    futexes: Futexes,
    limits: Limits,
    unknown_calls: UnknownCalls,
    status: OnceLock<ExitStatus>,
}

impl Process {
    /// A process without threads. Its pid is that of umbra itself; in deterministic mode [`PID`].
    ///
    /// # Errors
    /// The address space was released.
    pub fn new(setup: Setup) -> Result<Arc<Self>, Misuse> {
        let pid = match setup.deterministic {
            Some(_) => PID,
            None => host::identity(libc::SYS_getpid) as i32,
        };
        let clock = setup
            .deterministic
            .as_ref()
            .map_or(Clock::Host, |deterministic| Clock::Virtual(Arc::clone(deterministic.baton().clock())));
        Ok(Arc::new(Self {
            user: UserMemory::new(&setup.mm)?,
            limits: Limits::new(setup.files.capacity(), setup.max_threads),
            setup,
            clock,
            pid,
            next_tid: AtomicI32::new(pid),
            group: Mutex::default(),
            futexes: Futexes::default(),
            unknown_calls: UnknownCalls::default(),
            status: OnceLock::new(),
        }))
    }

    /// The first thread; its registers come from [`load`](super::load::load).
    ///
    /// # Errors
    /// The host has no descriptor left, or the process has ended already.
    pub fn main_thread(self: &Arc<Self>) -> Result<Thread, Errno> {
        self.new_thread(SigSet::EMPTY, name_of(&self.setup.exe))
    }

    /// Adds a thread to the group. It is a member until its [`Thread`] is dropped.
    pub(super) fn new_thread(self: &Arc<Self>, mask: SigSet, name: [u8; 16]) -> Result<Thread, Errno> {
        let tid = loop {
            let tid = self.next_tid.fetch_add(1, Ordering::Relaxed);
            // A futex word has 30 bits for a tid; once around, numbers in use are skipped.
            const MOST: i32 = 0x3fff_ffff;
            if tid >= MOST {
                self.next_tid.store(2, Ordering::Relaxed);
            }
            if (1..MOST).contains(&tid) && !self.group().contains(tid) {
                break tid;
            }
        };
        let seat = self.setup.deterministic.as_ref().map(|deterministic| deterministic.baton().seat(tid));
        let waker = Arc::new(Waker::new(seat).map_err(|_| Errno::EAGAIN)?);
        self.group().join(tid, Arc::clone(&waker), mask, self.setup.max_threads)?;
        Ok(Thread::new(Arc::clone(self), tid, waker, name))
    }

    /// How it ended; `None` while a thread of it is left.
    pub fn status(&self) -> Option<ExitStatus> {
        self.status.get().copied()
    }

    /// Its process id, as it sees itself.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Ends it as `signal` would by default, whatever the guest thinks of that signal. Does not wait: the threads leave
    /// on their own, and [`Host::exited`] is called by the last.
    pub fn kill(&self, signal: i32) {
        self.end(ExitStatus::Signaled(signal));
    }

    /// Ends it as `exit_group` does, or notes that it did not come to run at all. Does not wait.
    pub fn end(&self, status: ExitStatus) {
        self.group().end(status);
    }

    /// A thread is gone.
    pub(super) fn thread_left(&self, tid: i32, code: i32) {
        let last = self.group().leave(tid, code);
        if let Some(status) = last
            && self.status.set(status).is_ok()
        {
            if let Some(deterministic) = self.deterministic() {
                deterministic.trace().0.finish();
            }
            self.setup.host.exited();
        }
    }

    pub(super) fn group(&self) -> MutexGuard<'_, Group> {
        self.group.lock()
    }
    pub(super) fn user(&self) -> &UserMemory {
        &self.user
    }
    pub(super) fn mm(&self) -> &Arc<Mm> {
        &self.setup.mm
    }
    pub(super) fn files(&self) -> &Files {
        &self.setup.files
    }
    pub(super) fn host(&self) -> &dyn Host {
        self.setup.host.as_ref()
    }
    pub(super) fn exe(&self) -> &[u8] {
        &self.setup.exe
    }
    pub(super) fn futexes(&self) -> &Futexes {
        &self.futexes
    }
    pub(super) fn limits(&self) -> &Limits {
        &self.limits
    }
    pub(super) fn unknown_calls(&self) -> &UnknownCalls {
        &self.unknown_calls
    }
    /// The time that it lives in.
    pub(super) fn clock(&self) -> &Clock {
        &self.clock
    }
    /// What decides everything that a run may differ in from the next, where something does.
    pub(super) fn deterministic(&self) -> Option<&Arc<Deterministic>> {
        self.setup.deterministic.as_ref()
    }
    pub(super) fn uid(&self) -> u32 {
        host::identity(libc::SYS_getuid) as u32
    }
    pub(super) fn process_group(&self) -> i32 {
        self.identity(libc::SYS_getpgrp) as i32
    }
    /// A system call without arguments that cannot fail; umbra's own numbers, but for those of processes in deterministic mode.
    pub(super) fn identity(&self, call: i64) -> u64 {
        const PARENT: u64 = 1;
        match call {
            libc::SYS_getppid if self.deterministic().is_some() => PARENT,
            libc::SYS_getpgrp if self.deterministic().is_some() => self.pid as u64,
            _ => host::identity(call),
        }
    }
    /// The session.
    pub(super) fn session(&self) -> Result<u64, Errno> {
        if self.deterministic().is_some() { Ok(self.pid as u64) } else { host::session() }
    }
    /// The CPUs that it may run on, as the kernel's bit mask.
    pub(super) fn affinity(&self) -> Result<Vec<u8>, Errno> {
        if self.deterministic().is_some() { Ok(vec![1, 0, 0, 0, 0, 0, 0, 0]) } else { host::affinity() }
    }
    /// The CPU and the NUMA node that the calling thread runs on.
    pub(super) fn cpu(&self) -> Result<(u32, u32), Errno> {
        if self.deterministic().is_some() { Ok((0, 0)) } else { host::cpu() }
    }
    /// Random bytes; returns how many.
    pub(super) fn random(&self, into: &mut [u8], flags: u32) -> Result<usize, Errno> {
        match self.deterministic() {
            Some(deterministic) => {
                deterministic.fill_random(into);
                Ok(into.len())
            }
            None => host::random(into, flags),
        }
    }
}

/// The last component of a path, cut to what a thread's name holds: 15 bytes and a NUL.
fn name_of(path: &[u8]) -> [u8; 16] {
    let base = path.rsplit(|&byte| byte == b'/').next().unwrap_or_default();
    let mut name = [0; 16];
    let len = base.len().min(15);
    name[..len].copy_from_slice(&base[..len]);
    name
}
