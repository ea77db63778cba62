// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest that the flush probe runs, and one round of it.
//!
//! Two vCPUs run `inc [rdi]` in a loop in ring 3, each on a counter of its own, both through one leaf entry. The prober
//! changes that entry, flushes, and looks whether a vCPU still writes through the old translation. A vCPU either shows
//! the new translation (it faults; the counter in the new frame moves; D comes back) or the old one (the counter in the
//! old frame moves): one of the two happens, so a verdict does not depend on how long the prober waits.
//!
//! Tables and frames are the guest's own, from the pool, and go back to it.

use super::error::KvmError;
use super::flush::{FlushMethod, KvmTlb};
use super::probe::Change;
use super::window::Run;
use super::{KvmVcpu, KvmVm};
use crate::engine::{Exit, Kick, Regs, SetupError, Vcpu};
use shadow_mmu::addr::{Access, Gfn, Pfn};
use shadow_mmu::frame::{Fill, FramePool, OutOfFrames};
use shadow_mmu::shadow::{Spte, Tlb};
use shadow_mmu::sync::{Arc, Condvar, Mutex};
use shadow_mmu::table::{TOP, index};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The code's place; the data page is the one behind.
const CODE: Gfn = Gfn(0x200);
const DATA: Gfn = Gfn(0x201);
/// Bytes between the counters of the two vCPUs: not on one cache line.
const COUNTER_STRIDE: u64 = 64;
/// `mov ecx, 150000; again: inc qword ptr [rdi]; dec ecx; jnz again; syscall`; jmp to the start.
const LOOP: [u8; 16] =
    [0xb9, 0xf0, 0x49, 0x02, 0, 0x48, 0xff, 0x07, 0xff, 0xc9, 0x75, 0xf9, 0x0f, 0x05, 0xeb, 0xf0];
const VCPUS: usize = 2;
/// How long a napping vCPU's thread sleeps; timers make it about 100 µs.
const NAP: Duration = Duration::from_micros(50);
/// How long a vCPU may take to show something: far more than a busy machine needs.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often the prober looks at the counters while it waits.
const GLANCE: Duration = Duration::from_micros(20);
/// Increments through a cached translation after which a cleared A counts as staying clear.
const A_BIT_PATIENCE: u64 = 10_000;

/// How the vCPUs use their CPUs.
///
/// Two vCPUs that spin and a prober that waits for both are one thread too many for a machine with two CPUs: each wait may
/// last until the next scheduler tick, 4 ms. A vCPU that sleeps after each 300 µs of spinning keeps the waits short.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pace {
    /// Back into the guest at once.
    Spinning,
    /// A nap after each call that the guest makes.
    Napping,
}

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
    fn run(&self, mut vcpu: KvmVcpu, pace: Pace) {
        loop {
            let exit = vcpu.run();
            if exit.as_ref().is_ok_and(|exit| *exit == Exit::Syscall) && pace == Pace::Napping {
                std::thread::sleep(NAP);
            }
            let mut state = self.state.lock();
            match exit {
                Ok(Exit::Syscall) => {}
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

    /// Waits until `look` sees something, or until the vCPU faults if that means something. If it does not, the fault is
    /// an old one, of the time before the entry was what it is now, and the vCPU tries again.
    fn wait<T: Copy>(&self, on_fault: Option<T>, look: impl Fn() -> Option<T>) -> Result<T, KvmError> {
        let start = Instant::now();
        let mut state = self.state.lock();
        loop {
            if let Some(failure) = &state.failure {
                return Err(KvmError::Probe(failure.clone()));
            }
            if let Some(seen) = look() {
                return Ok(seen);
            }
            if state.faulted {
                if let Some(verdict) = on_fault {
                    return Ok(verdict);
                }
                state.faulted = false;
                self.changed.notify_all();
            }
            if start.elapsed() > PATIENCE {
                return Err(KvmError::Probe("a vCPU neither ran nor faulted".to_owned()));
            }
            state = self.changed.wait_timeout(state, GLANCE);
        }
    }
}

/// Which translation a vCPU used after the flush.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Fresh,
    Stale,
}

/// One change and one flush.
#[derive(Debug, Clone, Copy)]
pub(super) struct Round {
    /// Whether a vCPU used the old translation.
    pub(super) stale: bool,
    /// What the flush took.
    pub(super) took: Duration,
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
        let (monitor_index, monitor) = vm.monitor.entry();
        set(memory.root(), monitor_index, monitor);
        for depth in 0..3 {
            let entry = Spte::table(memory.frames[depth + 1]);
            set(memory.frames[depth], index(CODE.0, TOP - depth as u8), entry.0);
        }
        pool.write(memory.frames[4], 0, &LOOP);
        let code = Spte::leaf(memory.frames[4], Access::READ | Access::EXEC);
        set(memory.frames[3], index(CODE.0, 1), code.0);
        Ok(memory)
    }

    fn root(&self) -> Pfn {
        self.frames[0]
    }

    /// The leaf entry that everything is about.
    fn entry(&self) -> &AtomicU64 {
        &self.pool.words(self.frames[3])[index(DATA.0, 1)]
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
pub(super) struct Prober<'a> {
    vm: &'a KvmVm,
    memory: &'a Memory<'a>,
    seats: &'a [Seat; VCPUS],
    /// Which of the two data frames the entry maps between rounds.
    current: usize,
}

impl Prober<'_> {
    /// Installs the entry for the current frame, all rights and marks, and waits until every vCPU writes through it.
    fn set_up(&self) -> Result<(), KvmError> {
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

    /// One change, one flush, one verdict.
    ///
    /// # Errors
    /// Outside: the guest misbehaves. Inside: the host refuses the method.
    pub(super) fn round(
        &mut self,
        method: FlushMethod,
        change: Change,
    ) -> Result<io::Result<Round>, KvmError> {
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
        let mut verdicts = [Verdict::Fresh; VCPUS];
        for (vcpu, seat) in self.seats.iter().enumerate() {
            verdicts[vcpu] = verdict(vcpu, seat)?;
        }
        let stale = verdicts.contains(&Verdict::Stale);
        if change == Change::ChangeFrame {
            if !stale {
                self.current = 1 - self.current;
            } else if verdicts.contains(&Verdict::Fresh) {
                self.reunite();
            }
        }
        Ok(Ok(Round { stale, took }))
    }

    /// Two vCPUs that see different frames: brings both back to the entry by all means there are.
    fn reunite(&self) {
        self.memory.entry().store(0, Ordering::SeqCst);
        let frames = [Run::new(self.memory.data(0), 1), Run::new(self.memory.data(1), 1)];
        for method in FlushMethod::ALL {
            // One that the host refuses is no help, but no harm either.
            let _ = self.vm.flush_by(method, &frames);
        }
    }

    /// Clears A and flushes nothing; whether A stays clear while both vCPUs go on.
    pub(super) fn a_stays_clear(&self) -> Result<bool, KvmError> {
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
}

/// Runs `probe` beside the guest's two running vCPUs.
pub(super) fn with_guest<T>(
    vm: &Arc<KvmVm>,
    pace: Pace,
    probe: impl FnOnce(&mut Prober<'_>) -> Result<T, KvmError>,
) -> Result<T, SetupError> {
    let memory = Memory::new(vm, vm.monitor.pool())?;
    let seats: [Seat; VCPUS] = Default::default();
    let mut vcpus = Vec::new();
    for number in 0..VCPUS as u64 {
        let mut vcpu = vm.new_vcpu(memory.root())?;
        let counter = DATA.gpa().0 + number * COUNTER_STRIDE;
        *vcpu.regs_mut() = Regs { rip: CODE.gpa().0, rdi: counter, ..Regs::default() };
        vcpus.push(vcpu);
    }
    let kickers: Vec<_> = vcpus.iter().map(Vcpu::kicker).collect();
    let result = std::thread::scope(|scope| {
        for (seat, vcpu) in seats.iter().zip(vcpus) {
            scope.spawn(move || seat.run(vcpu, pace));
        }
        let result = probe(&mut Prober { vm, memory: &memory, seats: &seats, current: 0 });
        seats.iter().zip(&kickers).for_each(|(seat, kicker)| seat.quit(kicker));
        result
    });
    // The tables go back to the pool; what KVM remembers of them must be gone before they are something else.
    KvmTlb { vm: Arc::clone(vm) }.flush_all();
    Ok(result?)
}
