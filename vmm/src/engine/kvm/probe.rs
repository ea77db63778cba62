// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which flush methods this host honours, found out by running a guest.
//!
//! Two vCPUs run `inc [rdi]; jmp` in ring 3, each on a counter of its own, both through one leaf entry. The prober
//! changes that entry, flushes, and looks whether a vCPU still writes through the old translation. A vCPU either shows
//! the new translation (it faults; the counter in the new frame moves; D comes back) or the old one (the counter in the
//! old frame moves): one of the two happens, so a verdict does not depend on how long the prober waits.
//!
//! The small guest has tables and frames of its own, from the pool; its two vCPUs stay parked for the first guest
//! threads. It must run before other guests do: the methods flush the whole VM.

use super::error::SetupError;
use super::flush::FlushMethod;
use super::host::Backend;
use super::window::Run;
use super::{KvmVcpu, KvmVm};
use crate::engine::{Exit, Kick, Regs, Vcpu};
use serde::Serialize;
use shadow_mmu::addr::{Access, Gfn, Pfn};
use shadow_mmu::frame::{Fill, FramePool, OutOfFrames};
use shadow_mmu::shadow::Spte;
use shadow_mmu::sync::{Condvar, Mutex};
use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How much the probe does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effort {
    /// The methods that fit the backend, a few rounds each: for every start.
    Quick,
    /// All methods, so many rounds of each kind of change, and the control: for `umbra doctor`.
    Thorough {
        /// Rounds for each method and kind; "stale" in any of them condemns the method.
        rounds: u32,
    },
}

/// What the probe does to the entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// The entry goes; the vCPUs must fault.
    Zap,
    /// Another frame takes its place; the old one must not be written any more.
    ChangeFrame,
    /// W goes; the vCPUs must fault.
    WriteProtect,
    /// D goes; the next write must set it again.
    ClearDirty,
}

impl Change {
    const ALL: [Self; 4] = [Self::Zap, Self::ChangeFrame, Self::WriteProtect, Self::ClearDirty];
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Zap => "zap",
            Self::ChangeFrame => "change frame",
            Self::WriteProtect => "write-protect",
            Self::ClearDirty => "clear D",
        })
    }
}

/// What became of one method and one kind of change.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FlushRow {
    /// How it was flushed.
    pub method: FlushMethod,
    /// What was changed before.
    pub change: Change,
    /// How often.
    pub rounds: u32,
    /// In how many rounds a vCPU used the old translation after the flush had returned.
    pub stale: u32,
    /// Median time of the flush, with both vCPUs running; microseconds.
    pub median_us: f64,
    /// Why the host refused the method; it was not tried then.
    pub refused: Option<String>,
}

/// What [`KvmVm::probe_flush`] found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FlushReport {
    /// How KVM runs guests here.
    pub backend: Backend,
    /// A row for every method and kind of change that was tried.
    pub rows: Vec<FlushRow>,
    /// The methods that may be used: tried, and never stale.
    pub chosen: Vec<FlushMethod>,
    /// Whether A, once cleared, stays clear under accesses until the entry is flushed.
    pub a_bit_needs_flush: bool,
}

/// The code's place; the data page is the one behind.
const CODE: Gfn = Gfn(0x200);
const DATA: Gfn = Gfn(0x201);
/// Bytes between the counters of the two vCPUs: not on one cache line.
const COUNTER_STRIDE: u64 = 64;
/// inc qword ptr [rdi]; jmp to it.
const LOOP: [u8; 5] = [0x48, 0xff, 0x07, 0xeb, 0xfb];
const VCPUS: usize = 2;
/// How long a vCPU may take to show something: far more than a busy machine needs.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often the prober looks at the counters while it waits.
const GLANCE: Duration = Duration::from_micros(20);
/// Increments through a cached translation after which a cleared A counts as staying clear.
const A_BIT_PATIENCE: u64 = 10_000;

/// What a vCPU's thread and the prober tell each other.
#[derive(Debug, Default)]
struct Seat {
    state: Mutex<SeatState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct SeatState {
    /// The vCPU faulted and waits.
    faulted: bool,
    quit: bool,
    failure: Option<String>,
}

impl Seat {
    /// The life of a vCPU's thread.
    fn run(&self, mut vcpu: KvmVcpu) {
        loop {
            let exit = vcpu.run();
            let mut state = self.state.lock();
            match exit {
                Ok(Exit::PageFault { .. }) => state.faulted = true,
                Ok(Exit::Kicked) => {}
                Ok(other) => state.failure = Some(format!("{other:?} at {:#x}", vcpu.regs().rip)),
                Err(error) => state.failure = Some(error.to_string()),
            }
            self.changed.notify_all();
            while state.faulted && !state.quit {
                state = self.changed.wait(state);
            }
            if state.quit || state.failure.is_some() {
                return;
            }
        }
    }

    fn resume(&self) {
        self.state.lock().faulted = false;
        self.changed.notify_all();
    }

    fn quit(&self, kicker: &Arc<dyn Kick>) {
        self.state.lock().quit = true;
        self.changed.notify_all();
        kicker.kick();
    }

    /// Waits until the vCPU faults (then what `on_fault` says) or `look` sees something.
    fn wait<T>(&self, on_fault: Option<T>, look: impl Fn() -> Option<T>) -> Result<T, SetupError> {
        let start = Instant::now();
        let mut state = self.state.lock();
        loop {
            if let Some(failure) = &state.failure {
                return Err(SetupError::Probe(failure.clone()));
            }
            if let Some(seen) = look() {
                return Ok(seen);
            }
            match on_fault {
                Some(verdict) if state.faulted => return Ok(verdict),
                _ if start.elapsed() > PATIENCE => {
                    return Err(SetupError::Probe("a vCPU neither ran nor faulted".to_owned()));
                }
                _ => state = self.changed.wait_timeout(state, GLANCE),
            }
        }
    }
}

/// Whether a vCPU used the old translation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Verdict {
    Fresh,
    Stale,
}

/// The small guest's memory.
#[derive(Debug)]
struct Memory<'a> {
    pool: &'a FramePool,
    frames: Vec<Pfn>,
}

impl<'a> Memory<'a> {
    fn new(vm: &KvmVm, pool: &'a FramePool) -> Result<Self, OutOfFrames> {
        const FRAMES: usize = 7;
        let mut memory = Self { pool, frames: Vec::new() };
        if pool.alloc_up_to(FRAMES, Fill::Zeros, &mut memory.frames) < FRAMES {
            return Err(OutOfFrames);
        }
        let set = |table: Pfn, index: usize, entry: u64| {
            pool.words(table)[index].store(entry, Ordering::SeqCst);
        };
        let (monitor_index, monitor) = vm.monitor_entry();
        set(memory.root(), monitor_index, monitor);
        for level in (1..=3).rev() {
            let index = (CODE.0 >> (9 * level) & 511) as usize;
            set(memory.frames[3 - level], index, Spte::table(memory.frames[4 - level]).0);
        }
        pool.write(memory.frames[4], 0, &LOOP);
        let code = Spte::leaf(memory.frames[4], Access::READ | Access::EXEC);
        set(memory.frames[3], (CODE.0 & 511) as usize, code.0);
        Ok(memory)
    }

    fn root(&self) -> Pfn {
        self.frames[0]
    }

    /// The leaf entry that everything is about.
    fn entry(&self) -> &AtomicU64 {
        &self.pool.words(self.frames[3])[(DATA.0 & 511) as usize]
    }

    fn data(&self, which: usize) -> Pfn {
        self.frames[5 + which]
    }

    fn counter(&self, frame: Pfn, vcpu: usize) -> u64 {
        self.pool.words(frame)[vcpu * COUNTER_STRIDE as usize / 8].load(Ordering::SeqCst)
    }

    fn counters(&self, frame: Pfn) -> [u64; VCPUS] {
        std::array::from_fn(|vcpu| self.counter(frame, vcpu))
    }
}

impl Drop for Memory<'_> {
    fn drop(&mut self) {
        self.pool.put_all(&self.frames);
    }
}

/// The probe while its vCPUs run.
#[derive(Debug)]
struct Prober<'a> {
    vm: &'a KvmVm,
    memory: &'a Memory<'a>,
    seats: &'a [Seat; VCPUS],
    /// Which of the two data frames the entry maps between rounds.
    current: usize,
}

impl Prober<'_> {
    /// Installs the entry for the current frame, all rights and marks, and waits until every vCPU writes through it.
    fn set_up(&self) -> Result<(), SetupError> {
        let frame = self.memory.data(self.current);
        let before = self.memory.counters(frame);
        let entry = Spte::leaf(frame, Access::READ | Access::WRITE).touched(Access::WRITE);
        self.memory.entry().store(entry.0, Ordering::SeqCst);
        self.seats.iter().for_each(Seat::resume);
        for (vcpu, seat) in self.seats.iter().enumerate() {
            seat.wait(None, || (self.memory.counter(frame, vcpu) > before[vcpu]).then_some(()))?;
        }
        Ok(())
    }

    /// One change, one flush, one verdict, and the flush's time.
    fn round(
        &mut self,
        method: FlushMethod,
        change: Change,
    ) -> Result<io::Result<(Verdict, Duration)>, SetupError> {
        self.set_up()?;
        let (old, new) = (self.memory.data(self.current), self.memory.data(1 - self.current));
        let new_before = self.memory.counters(new);
        let writable = |frame| Spte::leaf(frame, Access::READ | Access::WRITE);
        let changed = match change {
            Change::Zap => Spte::NONE,
            Change::ChangeFrame => writable(new).touched(Access::WRITE),
            Change::WriteProtect => Spte::leaf(old, Access::READ).touched(Access::READ),
            Change::ClearDirty => writable(old).touched(Access::READ),
        };
        self.memory.entry().store(changed.0, Ordering::SeqCst);
        let start = Instant::now();
        if let Err(error) = self.vm.flush_by(method, &[Run::new(old, 1)]) {
            return Ok(Err(error));
        }
        let took = start.elapsed();
        let old_after = self.memory.counters(old);
        let verdict = |vcpu: usize, seat: &Seat| {
            let wrote_old = || self.memory.counter(old, vcpu) > old_after[vcpu];
            let stale = || wrote_old().then_some(Verdict::Stale);
            match change {
                Change::Zap | Change::WriteProtect => seat.wait(Some(Verdict::Fresh), stale),
                Change::ChangeFrame => seat.wait(None, || {
                    let wrote_new = self.memory.counter(new, vcpu) > new_before[vcpu];
                    stale().or(wrote_new.then_some(Verdict::Fresh))
                }),
                Change::ClearDirty => seat.wait(None, || {
                    // The first increment may have begun before the flush returned.
                    let ran = self.memory.counter(old, vcpu) > old_after[vcpu] + 1;
                    let dirty = Spte(self.memory.entry().load(Ordering::SeqCst)).is_dirty();
                    ran.then_some(if dirty { Verdict::Fresh } else { Verdict::Stale })
                }),
            }
        };
        let mut worst = Verdict::Fresh;
        for (vcpu, seat) in self.seats.iter().enumerate() {
            worst = worst.max(verdict(vcpu, seat)?);
        }
        if change == Change::ChangeFrame && worst == Verdict::Fresh {
            self.current = 1 - self.current;
        }
        Ok(Ok((worst, took)))
    }

    /// All rounds of one method and one kind of change.
    fn row(&mut self, method: FlushMethod, change: Change, rounds: u32) -> Result<FlushRow, SetupError> {
        let mut row = FlushRow { method, change, rounds, stale: 0, median_us: 0.0, refused: None };
        let mut times = Vec::new();
        for _ in 0..rounds {
            match self.round(method, change)? {
                Ok((verdict, took)) => {
                    row.stale += u32::from(verdict == Verdict::Stale);
                    times.push(took.as_secs_f64() * 1e6);
                }
                Err(error) => {
                    row.refused = Some(error.to_string());
                    break;
                }
            }
        }
        times.sort_by(f64::total_cmp);
        row.median_us = times.get(times.len() / 2).copied().unwrap_or(0.0);
        Ok(row)
    }

    /// All kinds of change with one method; stops at the first that the host refuses.
    fn rows(&mut self, method: FlushMethod, rounds: u32, rows: &mut Vec<FlushRow>) -> Result<(), SetupError> {
        for change in Change::ALL {
            rows.push(self.row(method, change, rounds)?);
            if rows.last().is_some_and(|row| row.refused.is_some()) {
                break;
            }
        }
        Ok(())
    }

    /// Clears A and flushes nothing; whether A stays clear while both vCPUs go on.
    fn a_stays_clear(&self) -> Result<bool, SetupError> {
        self.set_up()?;
        let frame = self.memory.data(self.current);
        self.memory.entry().store(Spte::leaf(frame, Access::READ | Access::WRITE).0, Ordering::SeqCst);
        let before = self.memory.counters(frame);
        for (vcpu, seat) in self.seats.iter().enumerate() {
            let ran = || self.memory.counter(frame, vcpu) > before[vcpu] + A_BIT_PATIENCE;
            seat.wait(None, || ran().then_some(()))?;
        }
        Ok(!Spte(self.memory.entry().load(Ordering::SeqCst)).is_accessed())
    }

    fn probe(&mut self, effort: Effort) -> Result<FlushReport, SetupError> {
        let backend = self.vm.facts().kvm_backend;
        let mut rows = Vec::new();
        let (rounds, first): (u32, &[FlushMethod]) = match effort {
            Effort::Quick => (QUICK_ROUNDS, quick_methods(backend)),
            Effort::Thorough { rounds } => (rounds.max(1), &FlushMethod::ALL),
        };
        if effort != Effort::Quick {
            self.rows(FlushMethod::Nothing, rounds, &mut rows)?;
        }
        let a_bit_needs_flush = self.a_stays_clear()?;
        let works = |rows: &[FlushRow], method| {
            let mut tried = rows.iter().filter(|row| row.method == method).peekable();
            tried.peek().is_some() && tried.all(|row| row.stale == 0 && row.refused.is_none())
        };
        let others = FlushMethod::ALL.iter().filter(|method| !first.contains(method));
        for &method in first.iter().chain(others) {
            let enough = FlushMethod::ALL.iter().any(|&method| works(&rows, method));
            if first.contains(&method) || !enough {
                self.rows(method, rounds, &mut rows)?;
            }
        }
        let chosen: Vec<_> = FlushMethod::ALL.into_iter().filter(|&method| works(&rows, method)).collect();
        if chosen.is_empty() {
            return Err(SetupError::NoFlush { tried: summary(&rows) });
        }
        Ok(FlushReport { backend, rows, chosen, a_bit_needs_flush })
    }
}

/// Rounds of each kind of change in a quick probe.
const QUICK_ROUNDS: u32 = 2;

/// What a quick probe tries first: what the strategy of this backend is made of.
const fn quick_methods(backend: Backend) -> &'static [FlushMethod] {
    match backend {
        Backend::Npt | Backend::Ept => &[FlushMethod::WindowMadvise, FlushMethod::AlternateRoot],
        _ => &[FlushMethod::WindowMadvise, FlushMethod::ProcessMadvise, FlushMethod::DummySlot],
    }
}

fn summary(rows: &[FlushRow]) -> String {
    let words =
        rows.iter().filter(|row| row.stale != 0 || row.refused.is_some()).map(|row| match &row.refused {
            Some(refused) => format!("{}: {refused}", row.method),
            None => {
                format!("{}: stale after {:?} {} of {} times", row.method, row.change, row.stale, row.rounds)
            }
        });
    words.collect::<Vec<_>>().join("; ")
}

impl KvmVm {
    /// Finds out which flush methods this host honours and uses those from now on. To be called once, before guests run.
    ///
    /// # Errors
    /// [`SetupError::NoFlush`] if none works, [`SetupError::Probe`] if the probe's guest does not run, and what
    /// [`create_vcpu`](Self::create_vcpu) says.
    pub fn probe_flush(self: &Arc<Self>, effort: Effort) -> Result<FlushReport, SetupError> {
        let memory = Memory::new(self, self.monitor.pool())?;
        let seats: [Seat; VCPUS] = Default::default();
        let mut vcpus = Vec::new();
        for number in 0..VCPUS as u64 {
            let mut vcpu = self.create_vcpu(memory.root())?;
            let counter = DATA.gpa().0 + number * COUNTER_STRIDE;
            *vcpu.regs_mut() = Regs { rip: CODE.gpa().0, rdi: counter, ..Regs::default() };
            vcpus.push(vcpu);
        }
        let kickers: Vec<_> = vcpus.iter().map(Vcpu::kicker).collect();
        let report = std::thread::scope(|scope| {
            for (seat, vcpu) in seats.iter().zip(vcpus) {
                scope.spawn(move || seat.run(vcpu));
            }
            let report = Prober { vm: self, memory: &memory, seats: &seats, current: 0 }.probe(effort);
            seats.iter().zip(&kickers).for_each(|(seat, kicker)| seat.quit(kicker));
            report
        })?;
        self.flusher.set_working(&report.chosen);
        // The tables go back to the pool.
        self.tlb().flush_all();
        Ok(report)
    }
}
