// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Dropping cached translations: the methods, the choice between them, and what happens when none works.
//!
//! # What is flushed
//!
//! umbra has changed sptes already. What may still be out there: entries of the CPUs' TLBs and, on a KVM that shadows
//! guest tables, KVM's own copy of the sptes, which it does not refresh by itself (it only follows writes that it sees
//! the *guest* make). A method must reach both. [`FlushMethod`] has what is known of each; the probe finds out which
//! of them hold on this host.
//!
//! # Kick and wait (AlternateRoot)
//!
//! The window and memslot methods are the kernel's: when the system call returns, no vCPU uses the old translations. The
//! alternate root is umbra's, in the manner of `kvm_flush_remote_tlbs` with the vCPU mode and `vcpu->requests`:
//!
//! 1. The flusher requests FLUSH of every vCPU there is. The request is a locked read-modify-write of the word that the
//!    vCPU's entry also has to compare-exchange, so each entry is either before it (then the flusher sees IN_GUEST and
//!    kicks) or after it (then the entry fails, the thread sees FLUSH and serves it first). The spte was changed before
//!    the request: an entry after it walks the new one.
//! 2. The flusher waits until each vCPU is outside or has served the request. A vCPU outside uses no translation, and
//!    serves before it gets in again.
//! 3. The vCPU's thread takes the request, then loads another root table and the old one again (`switch_root_and_back`).
//!    KVM forgets what it had cached for the first when the second is loaded.
//!
//! A vCPU's thread does nothing between being kicked and leaving the guest, so the wait needs none of its locks. New
//! vCPUs have nothing cached. Stopping the VM for good is the same protocol with STOP, which is never taken.
//!
//! # Kick and hold (DummySlot, and the window methods for many runs)
//!
//! KVM waits for an RCU grace period when a memslot changes, and that needs CPU time: against vCPUs that fill all CPUs
//! it takes scheduler ticks, 4 to 15 ms; against none, 0.1 ms. And each discarded run kicks every vCPU that is in the
//! guest. So the vCPUs are kept out meanwhile:
//!
//! 1. The holder counts itself in `holders`, requests HOLD of every vCPU and waits until each is outside.
//! 2. A vCPU's thread that meets HOLD takes it and sleeps while there are holders. A holder counts itself before it
//!    requests, so who takes the request sees the holder, and who took it too early for a second holder meets HOLD again.
//! 3. The last holder to go wakes them.
//!
//! # Locks
//!
//! The caller holds `mmu_lock`. The registry of run states and `holders` are leaf locks; the dummy slot's is held across its
//! two system calls.

use super::KvmVm;
use super::probe::FlushReport;
use super::window::{Run, Window};
use crate::engine::kick::{Requests, RunState};
use crate::inject::Armed;
use crate::inject::points::{KICK, WINDOW_MADVISE};
use kvm_bindings::kvm_userspace_memory_region;
use serde::Serialize;
use shadow_mmu::addr::{PAGE_SIZE, Pfn};
use shadow_mmu::shadow::{AdBits, Tlb, Zapped};
use shadow_mmu::sync::{Arc, Condvar, Mutex};
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::{Duration, Instant};
use vm_memory::MmapRegion;

/// A way to make the host drop cached translations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FlushMethod {
    /// Nothing: the control of the probe. Never chosen.
    Nothing,
    /// madvise(MADV_DONTNEED) on the frames' pages in the window, a call a run.
    WindowMadvise,
    /// The same through process_madvise(2), up to 1,024 runs a call; since Linux 6.13.
    ProcessMadvise,
    /// Every vCPU out of the guest and through another root table. Worth something with two-dimensional paging only.
    AlternateRoot,
    /// Adding and deleting a memslot that nobody uses: KVM drops everything it has for the VM.
    DummySlot,
}

impl FlushMethod {
    /// The ones that can be chosen.
    pub const ALL: [Self; 4] =
        [Self::WindowMadvise, Self::ProcessMadvise, Self::AlternateRoot, Self::DummySlot];

    /// Whether the method also drops what KVM remembers of tables, not of leaves alone. [`Tlb::flush_all`] needs one that
    /// does: a KVM that shadows guest tables goes on using the table that it knows under a changed entry of an upper level
    /// (`kvm_mmu_get_child_sp` finds it present), and fills it with leaves that belong elsewhere.
    pub const fn is_full(self) -> bool {
        matches!(self, Self::AlternateRoot | Self::DummySlot)
    }

    const fn bit(self) -> u8 {
        match self {
            Self::Nothing => 0,
            Self::WindowMadvise => 1,
            Self::ProcessMadvise => 2,
            Self::AlternateRoot => 4,
            Self::DummySlot => 8,
        }
    }
}

impl fmt::Display for FlushMethod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nothing => "nothing",
            Self::WindowMadvise => "madvise",
            Self::ProcessMadvise => "process_madvise",
            Self::AlternateRoot => "alternate root",
            Self::DummySlot => "dummy memslot",
        })
    }
}

// The choice by batch size. Measured by `measure::flushes` on nested PVM (Linux 6.18, two CPUs), with frames that guests had
// touched, no two of them neighbours; medians in µs for no vCPU, one, and two spinning in the guest:
//
//   runs    madvise each    process_madvise    with vCPUs held    dummy slot
//      1      8  13  39         8  10  43                          75 260 460
//      2     10  10  65        10  12  71                          80 280 310
//      4     14  20 119        15  18 112                          93 265 380
//      8     27  22 190        21  17 222        21 180 193         71 130 460
//     64    146   –   –        97 1604 1818      97 196 270        105   –  360
//   1024   2834   –   –      1600 1728 57252   1600 1679 1934      145 300 380
//   4096  13244   –   –      8249 18710 137032 8249 10509 9681     394 570 410
//
// (–: not measured.) A run kicks every vCPU that is in the guest, about 30 µs each here; vCPUs that are held are kicked once.

/// Runs from which on process_madvise(2) is no worse than a madvise(2) each.
const PROCESS_MADVISE_RUNS: usize = 2;
/// Runs from which on vCPUs are held while pages are discarded.
const HOLD_RUNS: usize = 8;
/// Runs from which on kicking every vCPU is taken to beat dropping second-stage entries run by run, each of which interrupts
/// the vCPUs as well, and which the guest must fault in again. Not measured: no such machine was at hand.
const ALTERNATE_ROOT_RUNS: usize = 16;
/// What a run costs while vCPUs are held, what the dummy slot costs, and what it costs KVM to map a page again that was
/// dropped for no reason (`measure::prefaults`); nanoseconds.
const RUN_NS: usize = 2_000;
const DUMMY_SLOT_NS: usize = 300_000;
const REFAULT_NS: usize = 4_000;

/// What the flush methods need.
#[derive(Debug)]
pub(super) struct Flusher {
    pub(super) window: Window,
    /// A page for the dummy slot; the lock keeps its two steps together.
    dummy: Mutex<MmapRegion>,
    /// Methods that work, by [`FlushMethod::bit`].
    working: AtomicU8,
    /// As in [`FlushReport`].
    a_bit_needs_flush: AtomicBool,
    stopped: AtomicBool,
    states: Mutex<Vec<Arc<RunState>>>,
    /// Flushers that want all vCPUs outside.
    holders: Mutex<usize>,
    released: Condvar,
    /// Empty until [`Engine::arm`](crate::engine::Engine::arm): what the probes find is to be true.
    pub(super) faults: Armed,
}

impl Flusher {
    pub(super) fn new(window: Window) -> io::Result<Self> {
        let dummy = MmapRegion::new(PAGE_SIZE as usize).map_err(io::Error::other)?;
        // Until the probe has spoken: the methods that hold on every kernel known.
        let working = FlushMethod::WindowMadvise.bit() | FlushMethod::DummySlot.bit();
        Ok(Self {
            window,
            dummy: Mutex::new(dummy),
            working: AtomicU8::new(working),
            a_bit_needs_flush: AtomicBool::new(true),
            stopped: AtomicBool::new(false),
            states: Mutex::new(Vec::new()),
            holders: Mutex::new(0),
            released: Condvar::new(),
            faults: Armed::default(),
        })
    }

    /// The methods to use from now on.
    pub(super) fn set_working(&self, methods: &[FlushMethod]) {
        self.working.store(methods.iter().fold(0, |bits, method| bits | method.bit()), Ordering::Release);
    }

    /// Goes by what the probe found from now on.
    pub(super) fn learn(&self, report: &FlushReport) {
        self.set_working(&report.chosen);
        self.a_bit_needs_flush.store(report.a_bit_needs_flush, Ordering::Release);
    }

    /// The methods in use.
    pub(super) fn methods(&self) -> Vec<FlushMethod> {
        FlushMethod::ALL.into_iter().filter(|&method| self.works(method)).collect()
    }

    fn works(&self, method: FlushMethod) -> bool {
        self.working.load(Ordering::Acquire) & method.bit() != 0
    }

    /// Makes a new vCPU known: from now on it is flushed and stopped with the others.
    pub(super) fn register(&self, state: &Arc<RunState>) {
        let mut states = self.states.lock();
        states.push(Arc::clone(state));
        // `stop` sets the flag before it looks at the list under this lock, so one of the two sees the other.
        if self.stopped.load(Ordering::SeqCst) {
            state.request(Requests::STOP, None);
        }
    }

    /// Requests something of every vCPU and waits until none is in the guest without having served it.
    fn request_of_all(&self, request: Requests) {
        let states = self.states.lock().clone();
        for state in &states {
            self.faults.hit(&KICK);
            state.request(request, None);
        }
        for state in &states {
            wait_until(|| state.is_out(request));
        }
    }

    /// Does something while no vCPU is in the guest.
    pub(super) fn with_all_held<T>(&self, action: impl FnOnce() -> T) -> T {
        *self.holders.lock() += 1;
        self.request_of_all(Requests::HOLD);
        let result = action();
        let mut holders = self.holders.lock();
        *holders -= 1;
        if *holders == 0 {
            self.released.notify_all();
        }
        result
    }

    /// Sleeps until nobody holds the vCPUs. For the thread of one, which has taken its HOLD.
    pub(super) fn wait_until_released(&self) {
        let mut holders = self.holders.lock();
        while *holders > 0 {
            holders = self.released.wait(holders);
        }
    }

    /// Ends the guest: no vCPU runs any more when this returns, nor ever will.
    fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        self.request_of_all(Requests::STOP);
    }
}

/// Waits for a vCPU to come out: a few microseconds where it has a core of its own. Where it has not, sleeping is what
/// gives it one; yielding keeps this core for up to a scheduler tick.
fn wait_until(done: impl Fn() -> bool) {
    const SPIN: Duration = Duration::from_micros(50);
    const NAP: Duration = Duration::from_micros(10);
    let start = Instant::now();
    while !done() {
        if start.elapsed() < SPIN { std::hint::spin_loop() } else { std::thread::sleep(NAP) }
    }
}

impl KvmVm {
    /// Flushes `runs` by `method`, or more than that.
    pub(super) fn flush_by(&self, method: FlushMethod, runs: &[Run]) -> io::Result<()> {
        if matches!(method, FlushMethod::WindowMadvise | FlushMethod::ProcessMadvise)
            && let Some(errno) = self.flusher.faults.fail(&WINDOW_MADVISE)
        {
            return Err(io::Error::from_raw_os_error(errno));
        }
        match method {
            FlushMethod::Nothing => Ok(()),
            FlushMethod::WindowMadvise if runs.len() < HOLD_RUNS => self.flusher.window.discard(runs),
            FlushMethod::WindowMadvise => self.flusher.with_all_held(|| self.flusher.window.discard(runs)),
            FlushMethod::ProcessMadvise if runs.len() < HOLD_RUNS => self.flusher.window.discard_many(runs),
            FlushMethod::ProcessMadvise => {
                self.flusher.with_all_held(|| self.flusher.window.discard_many(runs))
            }
            FlushMethod::AlternateRoot => {
                self.flusher.request_of_all(Requests::FLUSH);
                Ok(())
            }
            FlushMethod::DummySlot => self.flusher.with_all_held(|| self.touch_dummy_slot()),
        }
    }

    /// Adds and deletes the dummy slot. The deletion is what flushes (`kvm_arch_flush_shadow_memslot`).
    fn touch_dummy_slot(&self) -> io::Result<()> {
        const SLOT: u32 = 1;
        let page = self.flusher.dummy.lock();
        let mut slot = kvm_userspace_memory_region {
            slot: SLOT,
            flags: 0,
            // Right behind the pool, where no spte points.
            guest_phys_addr: self.flusher.window.bytes(),
            memory_size: PAGE_SIZE,
            userspace_addr: page.as_ptr() as u64,
        };
        // SAFETY: the page lives as long as the VM, and the slot overlaps no other.
        unsafe { self.vm.set_user_memory_region(slot) }?;
        slot.memory_size = 0;
        // SAFETY: a slot of size 0 is deleted.
        Ok(unsafe { self.vm.set_user_memory_region(slot) }?)
    }

    /// Whether dropping everything costs less than dropping `runs` one by one.
    fn is_dummy_slot_cheaper(&self, runs: &[Run]) -> bool {
        let one_by_one = runs.len() * RUN_NS;
        if one_by_one <= DUMMY_SLOT_NS {
            return false;
        }
        let stats = self.monitor.pool().stats();
        let dropped: usize = runs.iter().map(Run::frames).sum();
        let bystanders = (stats.frames - stats.free).saturating_sub(dropped);
        DUMMY_SLOT_NS.saturating_add(bystanders.saturating_mul(REFAULT_NS)) < one_by_one
    }

    /// Tries the methods that work, in this order, until one succeeds; stops the VM if none does.
    fn flush_by_first(&self, order: &[FlushMethod], runs: &[Run]) {
        for &method in order {
            if !self.flusher.works(method) {
                continue;
            }
            match self.flush_by(method, runs) {
                Ok(()) => return,
                Err(error) => {
                    log::warn!("flushing by {method} failed and is given up: {error}");
                    self.flusher.working.fetch_and(!method.bit(), Ordering::AcqRel);
                }
            }
        }
        log::error!("no flush method works any more: the guest is stopped");
        self.flusher.stop();
    }
}

/// The flush strategy of one VM.
#[derive(Debug)]
pub(super) struct KvmTlb {
    pub(super) vm: Arc<KvmVm>,
}

impl Tlb for KvmTlb {
    fn flush(&self, zapped: &[Zapped]) {
        use FlushMethod::{AlternateRoot, DummySlot, ProcessMadvise, WindowMadvise};
        if zapped.iter().any(|zap| zap.old.pfn().offset() >= self.vm.flusher.window.bytes()) {
            // A page of an adopted mapping. Discarding it where KVM looks at it would be a flush, too, but it would be the
            // end of private memory. What drops everything drops that.
            return self.flush_all();
        }
        let frames = |zap: &Zapped| Run::new(zap.old.pfn(), zap.pages().end - zap.pages().start);
        let runs = Run::coalesce(zapped.iter().map(frames).collect());
        let order = match runs.len() {
            0 => return,
            n if n >= ALTERNATE_ROOT_RUNS && self.vm.facts.backend.is_two_dimensional() => {
                [AlternateRoot, ProcessMadvise, WindowMadvise, DummySlot]
            }
            _ if self.vm.is_dummy_slot_cheaper(&runs) => {
                [DummySlot, ProcessMadvise, WindowMadvise, AlternateRoot]
            }
            n if n >= PROCESS_MADVISE_RUNS => [ProcessMadvise, WindowMadvise, DummySlot, AlternateRoot],
            _ => [WindowMadvise, ProcessMadvise, DummySlot, AlternateRoot],
        };
        self.vm.flush_by_first(&order, &runs);
    }

    fn flush_all(&self) {
        use FlushMethod::{AlternateRoot, DummySlot};
        let order = if self.vm.facts.backend.is_two_dimensional() {
            [AlternateRoot, DummySlot]
        } else {
            [DummySlot, AlternateRoot]
        };
        self.vm.flush_by_first(&order, &[self.vm.flusher.window.whole()]);
    }

    /// As the probe found; before it, the more careful answer. Every CPU with KVM sets both bits in tables that ring 3 walks.
    fn ad_bits(&self) -> AdBits {
        match self.vm.flusher.a_bit_needs_flush.load(Ordering::Acquire) {
            true => AdBits::AfterFlush,
            false => AdBits::Unflushed,
        }
    }

    fn prefault(&self, frames: &[Pfn]) {
        let runs = Run::coalesce(frames.iter().map(|&pfn| Run::new(pfn, 1)).collect());
        self.vm.flusher.window.populate(&runs);
    }
}
