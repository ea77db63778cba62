// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest without a CPU, for tests: the test says what each thread does next, and sees the registers it goes on with.
//!
//! Everything but the vCPU is real: address space, files (pipes), threads, signals.

use super::*;
use crate::deterministic::{Deterministic, Quantum};
use crate::engine::{EngineError, Exit, Kick, Regs, TimeStamps, Vcpu};
use shadow_mmu::addr::{Hva, HvaRange, PAGE_SIZE};
use shadow_mmu::frame::{FramePool, FreedFrames};
use shadow_mmu::mm::{Backing, MapFlags, Mm};
use shadow_mmu::sync::Mutex;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use uaccess::UserMemory;
use vmm_sys_util::eventfd::EventFd;

/// Long enough for anything that is going to happen.
const PATIENCE: Duration = Duration::from_secs(20);

type Step = Box<dyn FnOnce(&mut Regs) -> Exit + Send>;

enum Command {
    Run(Step),
    Kick,
}

/// The CPU time that the fake engine says each thread used outside this process: more than a test does inside.
pub(super) const USED_OUTSIDE_BY_THREAD: Duration = Duration::from_secs(1_000_000);
/// The same of all threads.
pub(super) const USED_OUTSIDE_BY_PROCESS: Duration = Duration::from_secs(3_000_000);

#[derive(Debug)]
struct FakeKick(Mutex<Sender<Command>>);

impl Kick for FakeKick {
    fn kick(&self) {
        let _ = self.0.lock().send(Command::Kick);
    }
    fn cpu_time_outside(&self) -> Duration {
        USED_OUTSIDE_BY_THREAD
    }
}

/// A vCPU that does what the test says.
pub(super) struct FakeVcpu {
    regs: Regs,
    xsave: Vec<u8>,
    commands: Receiver<Command>,
    entries: Sender<Regs>,
    kick: Arc<FakeKick>,
    /// The test waits to hear of the next entry.
    owes_entry: bool,
}

impl Debug for FakeVcpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FakeVcpu").field("regs", &self.regs).finish_non_exhaustive()
    }
}

impl Vcpu for FakeVcpu {
    fn run(&mut self) -> Result<Exit, EngineError> {
        if std::mem::take(&mut self.owes_entry) {
            let _ = self.entries.send(self.regs);
        }
        Ok(match self.commands.recv() {
            Ok(Command::Run(step)) => {
                self.owes_entry = true;
                step(&mut self.regs)
            }
            // The vCPU's own kicker keeps the channel open, so there is no other end.
            Ok(Command::Kick) | Err(_) => Exit::Kicked,
        })
    }
    fn regs(&self) -> &Regs {
        &self.regs
    }
    fn regs_mut(&mut self) -> &mut Regs {
        &mut self.regs
    }
    fn set_time_stamps(&mut self, _time_stamps: TimeStamps) {}
    fn xsave(&self) -> Result<Vec<u8>, EngineError> {
        Ok(self.xsave.clone())
    }
    fn set_xsave(&mut self, state: &[u8]) -> Result<(), EngineError> {
        self.xsave = state.to_vec();
        Ok(())
    }
    fn kicker(&self) -> Arc<dyn Kick> {
        Arc::clone(&self.kick) as Arc<dyn Kick>
    }
}

/// The test's end of a guest thread.
#[derive(Debug)]
pub(super) struct Remote {
    pub(super) tid: i32,
    commands: Sender<Command>,
    entries: Receiver<Regs>,
}

impl Remote {
    /// Starts a step without waiting for its result.
    pub(super) fn begin(&self, step: impl FnOnce(&mut Regs) -> Exit + Send + 'static) {
        let _ = self.commands.send(Command::Run(Box::new(step)));
    }
    /// The registers with which the guest is entered after the last step; `None` if it never will be.
    pub(super) fn finish(&self) -> Option<Regs> {
        match self.entries.recv_timeout(PATIENCE) {
            Ok(regs) => Some(regs),
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => panic!("thread {} hangs", self.tid),
        }
    }
    pub(super) fn step(&self, step: impl FnOnce(&mut Regs) -> Exit + Send + 'static) -> Option<Regs> {
        self.begin(step);
        self.finish()
    }
    pub(super) fn begin_call(&self, number: i64, args: &[u64]) {
        let mut all = [0; 6];
        all[..args.len()].copy_from_slice(args);
        self.begin(move |regs| {
            regs.rax = number as u64;
            [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9] = all;
            regs.rip += 2;
            Exit::Syscall
        });
    }
    /// A system call, to its result.
    pub(super) fn call(&self, number: i64, args: &[u64]) -> i64 {
        self.begin_call(number, args);
        self.finish().expect("the thread is gone").rax as i64
    }
    /// The registers now.
    pub(super) fn regs(&self) -> Regs {
        self.step(|_| Exit::Kicked).expect("the thread is gone")
    }
}

/// Runs threads on host threads of their own.
#[derive(Debug, Default)]
pub(super) struct FakeHost {
    pub(super) deaths: Mutex<Vec<Death>>,
    pub(super) exits: Mutex<u32>,
    pub(super) filled: Mutex<Vec<HvaRange>>,
    pub(super) refuse_threads: AtomicBool,
    started: Mutex<Vec<Remote>>,
    joins: Mutex<Vec<JoinHandle<()>>>,
    mm: Mutex<Option<Arc<Mm>>>,
    /// Shared with every thread's fault handler.
    pub(super) hold: Arc<Hold>,
}

/// What keeps threads from entering the guest.
#[derive(Debug)]
pub(super) struct Hold {
    /// Never written.
    event: EventFd,
    /// The next that asks is held back, until something else reaches it.
    armed: AtomicBool,
    /// How often one was.
    pub(super) held: AtomicU32,
}

impl Default for Hold {
    fn default() -> Self {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).unwrap();
        Self { event, armed: AtomicBool::new(false), held: AtomicU32::new(0) }
    }
}

impl Hold {
    /// Has `thread`, which is in the guest, held back at its next entry; returns when it is.
    pub(super) fn hold(&self, thread: &Remote) {
        let before = self.held.load(Ordering::Acquire);
        self.armed.store(true, Ordering::Release);
        thread.begin(|_| Exit::Kicked);
        let began = Instant::now();
        while self.held.load(Ordering::Acquire) == before {
            assert!(began.elapsed() < PATIENCE, "nobody asks whether thread {} may run", thread.tid);
            std::thread::yield_now();
        }
        // Most often it polls by then; where it does not yet, it must be found all the same.
        std::thread::sleep(Duration::from_millis(20));
    }
}

impl FakeHost {
    fn spawn(&self, thread: Thread, regs: Regs, xsave: Vec<u8>) -> Remote {
        let (commands, commands_in) = channel();
        let (entries_out, entries) = channel();
        let tid = thread.tid();
        let kick = Arc::new(FakeKick(Mutex::new(commands.clone())));
        let mut vcpu =
            FakeVcpu { regs, xsave, commands: commands_in, entries: entries_out, kick, owes_entry: false };
        let mm = self.mm.lock().clone().expect("set by the fixture");
        let mut faults = FakeFaults { mm, hold: Arc::clone(&self.hold) };
        let leaving = thread.leaving();
        let run = move || {
            let _leaving = leaving;
            thread.run(&mut vcpu, &mut faults).expect("a fake vCPU does not fail");
        };
        self.joins.lock().push(std::thread::spawn(run));
        Remote { tid, commands, entries }
    }
    /// The thread that was started last and has not been asked for.
    pub(super) fn take_started(&self) -> Remote {
        self.started.lock().pop().expect("no thread was started")
    }
}

impl Host for FakeHost {
    fn start_thread(&self, thread: Thread, regs: Regs, xsave: Vec<u8>) -> Result<(), i32> {
        if self.refuse_threads.load(Ordering::Relaxed) {
            return Err(libc::EAGAIN);
        }
        let remote = self.spawn(thread, regs, xsave);
        self.started.lock().push(remote);
        Ok(())
    }
    fn report_death(&self, death: &Death) {
        self.deaths.lock().push(death.clone());
    }
    fn vcpu_lost(&self, _: i32, _: &EngineError) {}
    fn exited(&self) {
        *self.exits.lock() += 1;
    }
    fn filled(&self, range: HvaRange) {
        self.filled.lock().push(range);
    }
    fn cpu_time_outside(&self) -> Duration {
        USED_OUTSIDE_BY_PROCESS
    }
}

#[derive(Debug)]
struct FakeFaults {
    mm: Arc<Mm>,
    hold: Arc<Hold>,
}

impl FaultHandler for FakeFaults {
    fn fault(&mut self, addr: Gpa, access: Access) -> Fault {
        match self.mm.vma(Hva(addr.0)) {
            None => Fault::NoMapping,
            Some(vma) if !vma.allows(access) => Fault::NoAccess,
            Some(_) => Fault::Resolved,
        }
    }
    fn held_back(&mut self) -> Option<RawFd> {
        if !self.hold.armed.swap(false, Ordering::AcqRel) {
            return None;
        }
        self.hold.held.fetch_add(1, Ordering::AcqRel);
        Some(self.hold.event.as_raw_fd())
    }
    fn host_fault(&mut self, _: Option<Pfn>) -> HostFault {
        HostFault::Unreachable(None)
    }
}

/// A pipe: (read end, write end).
pub(super) fn pipe() -> (OwnedFd, OwnedFd) {
    let mut ends = [0; 2];
    // SAFETY: the result is ours to write.
    assert_eq!(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) }, 0);
    // SAFETY: the kernel just made both for us.
    ends.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }).into()
}

/// An open regular file that holds `bytes`, at its start, and has no name any more.
pub(super) fn file_with(bytes: &[u8]) -> File {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let path = std::env::temp_dir().join(format!("umbra-test-{}-{number}", std::process::id()));
    std::fs::write(&path, bytes).unwrap();
    let file = File::open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    file
}

/// A process with a main thread, and the other ends of its files.
#[derive(Debug)]
pub(super) struct Fixture {
    pub(super) process: Arc<Process>,
    pub(super) host: Arc<FakeHost>,
    pub(super) mm: Arc<Mm>,
    /// The main thread.
    pub(super) main: Remote,
    pub(super) stdin: Option<File>,
    pub(super) stdout: Option<File>,
    pub(super) stderr: Option<File>,
}

impl Fixture {
    pub(super) fn new() -> Self {
        let (stdin, to_stdin) = pipe();
        Self::with_stdin(stdin, Some(to_stdin.into()))
    }

    /// One whose time, randomness and order come from `seed`.
    pub(super) fn deterministic(seed: u64) -> Self {
        let (stdin, to_stdin) = pipe();
        let mode = Deterministic::new(seed, Quantum::Exits(4), None).unwrap();
        Self::made(stdin, Some(to_stdin.into()), Some(mode))
    }

    /// `stdin` is what the guest reads; `other_end` is kept for the test.
    pub(super) fn with_stdin(stdin: OwnedFd, other_end: Option<File>) -> Self {
        Self::made(stdin, other_end, None)
    }

    fn made(stdin: OwnedFd, other_end: Option<File>, deterministic: Option<Arc<Deterministic>>) -> Self {
        let (from_stdout, stdout) = pipe();
        let (from_stderr, stderr) = pipe();
        let pool = Arc::new(FramePool::new(16 << 20, FreedFrames::Poison).unwrap());
        let mm = Mm::new(pool).unwrap();
        let host = Arc::new(FakeHost::default());
        *host.mm.lock() = Some(Arc::clone(&mm));
        let process = Process::new(Setup {
            mm: Arc::clone(&mm),
            files: Files::new([Some(stdin), Some(stdout), Some(stderr)]),
            host: Arc::clone(&host) as Arc<dyn Host>,
            exe: b"/bin/fake".to_vec(),
            max_threads: 8,
            deterministic,
        })
        .unwrap();
        let mut xsave = vec![0; 4096];
        xsave[24..28].copy_from_slice(&0x1f80_u32.to_le_bytes());
        xsave[28..32].copy_from_slice(&0xffff_u32.to_le_bytes());
        let regs = Regs { rip: 0x40_0000, rflags: 0x202, ..Regs::default() };
        let main = host.spawn(process.main_thread().unwrap(), regs, xsave);
        Self {
            process,
            host,
            mm,
            main,
            stdin: other_end,
            stdout: Some(from_stdout.into()),
            stderr: Some(from_stderr.into()),
        }
    }

    pub(super) fn user(&self) -> &UserMemory {
        self.process.user()
    }

    /// Fresh readable and writable pages, with nothing mapped behind them.
    pub(super) fn map_pages(&self, pages: u64) -> u64 {
        let flags = MapFlags::PRIVATE | MapFlags::ANONYMOUS;
        let len = (pages + 1) * PAGE_SIZE;
        let at = self.mm.mmap(Hva(0), len, Access::READ | Access::WRITE, flags, Backing::Anonymous).unwrap();
        self.mm.munmap(Hva(at.0 + pages * PAGE_SIZE), PAGE_SIZE).unwrap();
        at.0
    }

    /// A second thread, made by the main one.
    pub(super) fn new_thread(&self) -> Remote {
        let flags = libc::CLONE_VM | libc::CLONE_THREAD | libc::CLONE_SIGHAND;
        let tid = self.main.call(libc::SYS_clone, &[flags as u64, 0x7000_0000]);
        assert!(tid > 0, "{tid}");
        self.host.take_started()
    }

    /// Waits until every thread has left; the process must be ending.
    pub(super) fn join(&self) -> ExitStatus {
        for join in std::mem::take(&mut *self.host.joins.lock()) {
            join.join().expect("a guest thread panicked");
        }
        assert_eq!(*self.host.exits.lock(), 1);
        self.process.status().expect("every thread has left")
    }

    /// Sets a handler at `0x40_1000` with `flags`.
    pub(super) fn handle(&self, signal: i32, flags: i32) {
        let page = self.map_pages(1);
        let words = [0x40_1000, (flags | 0x0400_0000) as u32 as u64, 0x40_2000, 0];
        for (index, word) in words.into_iter().enumerate() {
            self.user().write_u64(page + 8 * index as u64, word).unwrap();
        }
        assert_eq!(self.main.call(libc::SYS_rt_sigaction, &[signal as u64, page, 0, 8]), 0);
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        self.process.end(ExitStatus::Exited(0));
        for join in std::mem::take(&mut *self.host.joins.lock()) {
            let result = join.join();
            assert!(std::thread::panicking() || result.is_ok(), "a guest thread panicked");
        }
    }
}
