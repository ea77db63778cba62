// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One guest, put together: frame pool, address space, shadow map, engine, process, and a host thread for each vCPU.
//! Several may share a frame pool ([`VmConfig::pool`]); they share nothing else.
//!
//! # Who holds whom
//! ```text
//! Vm ──► Process ──► Machine ──► ShadowMmu ──► Mm ──► FramePool
//!  └────────────────►   │  └────► Engine ─────────────►  ▲
//! ```
//! The process calls back into the [`Machine`] (its [`Host`]), so the machine does not hold the process. vCPU threads hold
//! the machine; they are joined in [`Vm::wait`], so when a [`Vm`] is dropped after it nobody walks the shadow map any more.

mod config;
mod faults;
mod memory_faults;
mod rings;

pub use config::{Accesses, AdBitsUse, Frames, Tracking, VmConfig, WindowFill};

use crate::causes::one_line;
use crate::crash;
use crate::deterministic::Interval;
use crate::engine::{Engine, EngineError, Regs, SetupError, TimeStamps, choice};
use crate::guest::{self, Arguments, Death, ExitStatus, Files, Host, Process, Setup, Thread};
use crate::inject::NotifierFaults;
use crate::inject::points::{THREAD_START, TICK_TIME};
use crate::recorder::Recorder;
use crate::stalls::{MachineStalls, StallSummary};
use crate::trace::{Observer, set_guest_thread};
use anyhow::{Context, Result};
use config::ConfiguredTlb;
use faults::VcpuFaults;
use memory_faults::{MemoryFaults, Ticker};
use rings::Rings;
use shadow_mmu::addr::{Gfn, Hva, HvaRange, PAGE_SIZE};
use shadow_mmu::frame::FramePool;
use shadow_mmu::ksm::{Domain, Ksm, KsmError, KsmMember};
use shadow_mmu::mm::Mm;
use shadow_mmu::mm::watch::{Forks, Watch};
use shadow_mmu::shadow::{AdBits, AuditReport, DirtyPages, Memslot, ShadowMmu, SlotAccess};
use shadow_mmu::table::LOWER_HALF_PAGES;
use std::sync::{Arc, Mutex, Once, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;
use vmm_sys_util::eventfd::EventFd;

/// What a machine runs.
#[derive(Debug, Clone)]
pub struct Program {
    /// The file.
    pub elf: Arc<[u8]>,
    /// Its path, arguments and environment.
    pub arguments: Arguments,
}

/// The part of a VM that its process calls: memory, engine, threads.
#[derive(Debug)]
pub struct Machine {
    config: VmConfig,
    pool: Arc<FramePool>,
    mm: Arc<Mm>,
    shadow: Arc<ShadowMmu>,
    engine: Arc<dyn Engine>,
    recorder: Arc<Observer<Recorder>>,
    exited: EventFd,
    threads: Mutex<Vec<JoinHandle<()>>>,
    death: Mutex<Option<Death>>,
    lost: Mutex<Option<EngineError>>,
    /// The report on the first vCPU that was lost.
    crash: OnceLock<String>,
    /// Of vCPUs, where they have dirty rings.
    rings: Option<Rings>,
    /// Page sharing, where it takes part.
    sharing: OnceLock<Arc<Ksm>>,
    /// What the threads that ended waited for.
    stalls: Mutex<MachineStalls>,
    /// The operator has been told that the guest wants adopted memory which the host cannot reach.
    told_unreachable: Once,
    /// Over mappings of this process that the guest sees, from the first on.
    watch: Mutex<Option<Arc<Watch>>>,
    /// What a plan does to its memory.
    memory_faults: MemoryFaults,
    /// Keeps the window's handler while the machine runs.
    _handler: Option<crate::bench::WindowHandler>,
}

/// What [`Machine::audit_all`] saw.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MachineAudit {
    /// Ptes of the address space looked at.
    pub ptes: u64,
    /// Leaves of the shadow map looked at.
    pub leaves: u64,
    /// What was wrong, a line each. Empty is good.
    pub violations: Vec<String>,
}

/// A guest.
#[derive(Debug)]
pub struct Vm {
    machine: Arc<Machine>,
    process: Arc<Process>,
    /// Makes time pass, where a plan needs it.
    ticker: Mutex<Option<Ticker>>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Machine {
    fn new(config: VmConfig) -> Result<Arc<Self>> {
        let pool = match &config.pool {
            Some(pool) => Arc::clone(pool),
            None => Arc::new(FramePool::with_faults(config.memory, config.freed, config.faults.clone())?),
        };
        let engine = choice::open(&config.engine, Arc::clone(&pool))?;
        engine.arm(config.faults.clone());
        let mm = Mm::with_faults(Arc::clone(&pool), config.faults.clone())?;
        let engine_tlb = Arc::clone(&engine).tlb();
        let tlb = ConfiguredTlb {
            ad_bits: config.tracking.ad_bits.of(&*engine_tlb),
            engine: engine_tlb,
            window: config.window,
            faults: config.faults.clone(),
        };
        let shadow = Arc::new(ShadowMmu::new(Arc::clone(&mm), Arc::new(tlb))?);
        // Behind the shadow map, hence called before it: what they see of a pair includes its zap and flush.
        let recorder = Arc::<Observer<Recorder>>::default();
        mm.register(Arc::clone(&recorder) as _)?;
        if config.faults.are_armed() {
            mm.register(Arc::new(NotifierFaults::new(config.faults.clone())))?;
        }
        if let Some(deterministic) = &config.deterministic {
            mm.register(Arc::clone(deterministic.trace()) as _)?;
        }
        for listener in &config.listeners {
            mm.register(Arc::clone(listener))?;
        }
        if config.tracking.accesses == Accesses::Untold {
            shadow.set_prefaulted(engine.prefaulted());
        }
        if let Some((index, entry)) = engine.upper_entry() {
            shadow.set_upper(index, entry);
        }
        // The guest has no paging of its own and its addresses are those of its address space: one slot, one to one.
        shadow.add_slot(Memslot {
            gfn: Gfn(0),
            pages: LOWER_HALF_PAGES,
            hva: Hva(0),
            access: SlotAccess::ReadWrite,
        })?;
        let handler = match config.window {
            WindowFill::Userfaultfd(delay) => {
                let window = engine.window().ok_or_else(|| SetupError::Unsupported {
                    engine: engine.kind(),
                    what: "has no window that userfaultfd could fill",
                    instead: "leave that out, or take --engine kvm",
                })?;
                Some(crate::bench::WindowHandler::start(window, delay).context("cannot serve the window")?)
            }
            WindowFill::Ahead | WindowFill::OnDemand => None,
        };
        let ring = |entries| Rings::new(entries, pool.frame_count());
        let rings = config.tracking.ring_entries.map(ring).transpose()?;
        let memory_faults = MemoryFaults::new(config.faults.memory_rules());
        Ok(Arc::new(Self {
            config,
            pool,
            mm,
            shadow,
            engine,
            recorder,
            exited: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).context("cannot make an eventfd")?,
            threads: Mutex::default(),
            death: Mutex::default(),
            lost: Mutex::default(),
            crash: OnceLock::new(),
            rings,
            sharing: OnceLock::new(),
            stalls: Mutex::default(),
            told_unreachable: Once::new(),
            watch: Mutex::default(),
            memory_faults,
            _handler: handler,
        }))
    }

    /// The address space.
    pub fn mm(&self) -> &Arc<Mm> {
        &self.mm
    }
    /// The shadow map.
    pub fn shadow(&self) -> &ShadowMmu {
        &self.shadow
    }
    /// The frames.
    pub fn pool(&self) -> &Arc<FramePool> {
        &self.pool
    }
    /// Whether others have them too.
    pub fn frames(&self) -> Frames {
        if self.config.pool.is_some() { Frames::Shared } else { Frames::Own }
    }
    /// The engine.
    pub fn engine(&self) -> &Arc<dyn Engine> {
        &self.engine
    }
    /// The watch over what is adopted into the guest, for [`Mm::adopt`]; made when it is first asked for.
    ///
    /// # Errors
    /// The engine cannot show memory of this process, or the host has no userfaultfd for us.
    pub fn watch(&self) -> Result<Arc<Watch>> {
        let mut watch = lock(&self.watch);
        if let Some(watch) = &*watch {
            return Ok(Arc::clone(watch));
        }
        let slots = Arc::clone(&self.engine).host_slots()?;
        let made = Arc::new(Watch::with_thread(&self.mm, slots, Forks::Ignore)?);
        *watch = Some(Arc::clone(&made));
        Ok(made)
    }
    /// Lets the address space take part in page sharing, once, and has `ksm` hear which pages were just read from files.
    ///
    /// # Errors
    /// [`KsmError`]: it is not to be had with this address space.
    pub fn share(&self, ksm: &Arc<Ksm>, domain: Domain) -> Result<KsmMember, KsmError> {
        let member = ksm.enter(&self.mm, domain)?;
        self.sharing.get_or_init(|| Arc::clone(ksm));
        Ok(member)
    }
    /// The last notifier events.
    pub fn recorder(&self) -> &Recorder {
        &self.recorder.0
    }
    /// How the guest died, if a signal ended it.
    pub fn death(&self) -> Option<Death> {
        lock(&self.death).clone()
    }
    /// The report on the first vCPU that the engine lost, if one was: see [`crash`].
    pub fn crash(&self) -> Option<&str> {
        self.crash.get().map(String::as_str)
    }
    /// What marks the CPU sets, as far as they are used.
    pub fn ad_bits(&self) -> AdBits {
        self.config.tracking.ad_bits.of(&*Arc::clone(&self.engine).tlb())
    }
    /// Readable when a vCPU waits for [`collect_dirty_rings`](Self::collect_dirty_rings); `None` without rings.
    ///
    /// # Errors
    /// No descriptor left.
    pub fn dirty_ring_full(&self) -> Result<Option<EventFd>> {
        self.rings.as_ref().map(Rings::full).transpose()
    }
    /// Empties the dirty rings of all vCPUs, and lets those go on that waited for room.
    pub fn collect_dirty_rings(&self) {
        if let Some(rings) = &self.rings {
            rings.collect(&self.shadow);
        }
    }
    /// What was in dirty rings that were emptied since the last time, by page number.
    pub fn take_ring_pages(&self) -> DirtyPages {
        self.rings.as_ref().map(Rings::take_pages).unwrap_or_default()
    }
    /// What vCPUs waited for, as far as their threads have ended; after [`Vm::wait`] that is all.
    pub fn stalls(&self) -> StallSummary {
        lock(&self.stalls).summary()
    }
    /// Checks the shadow map and the free frames now.
    pub fn check(&self) -> (AuditReport, u64) {
        (self.audit(), self.pool.check_poison())
    }
    /// Checks everything of this guest alone that can be checked while it runs: its address space, then the shadow map. One
    /// after the other, each under the locks that it needs. What guests share is checked by whoever has all of them.
    pub fn audit_all(&self) -> MachineAudit {
        let primary = self.mm.audit();
        let mut audit = MachineAudit { ptes: primary.ptes, ..MachineAudit::default() };
        audit.violations = primary.violations.iter().map(ToString::to_string).collect();
        if primary.violations.iter().any(|one| one.at.is_none()) {
            // Tables that cannot be walked. The shadow map's are checked against them.
            return audit;
        }
        let shadow = self.audit();
        audit.leaves = shadow.leaves;
        audit.violations.extend(shadow.violations.iter().map(ToString::to_string));
        audit
    }
    /// Checks the shadow map alone now: the frames may be those of other machines too.
    pub fn audit(&self) -> AuditReport {
        self.shadow.audit(&self.mm)
    }

    /// Ten milliseconds of the guest's run are over: does what the plan, if there is one, has for that. For whoever makes time pass.
    pub fn tick(&self) {
        self.memory_faults.tick(self);
    }

    /// Frames that a plan has taken now (`memory = "pressure"`).
    pub fn pressed_frames(&self) -> usize {
        self.memory_faults.pressed_frames()
    }

    fn spawn(self: Arc<Self>, thread: Thread, regs: Regs, xsave: Option<Vec<u8>>) -> Result<()> {
        if let Some(errno) = self.config.faults.fail(&THREAD_START) {
            return Err(std::io::Error::from_raw_os_error(errno)).context(NO_THREAD);
        }
        let mut vcpu = Arc::clone(&self.engine).create_vcpu(self.shadow.root())?;
        *vcpu.regs_mut() = regs;
        if self.config.deterministic.is_some() {
            vcpu.set_time_stamps(TimeStamps::Trapped);
        }
        if let Some(xsave) = xsave {
            vcpu.set_xsave(&xsave)?;
        }
        let machine = Arc::clone(&self);
        let faults = VcpuFaults::new(&machine, thread.tid())?;
        let leaving = thread.leaving();
        let handle = std::thread::Builder::new().name(format!("vcpu {}", thread.tid())).spawn(move || {
            // Dropped in the opposite order: the seat goes when all that others may find is where it belongs.
            let (_leaving, mut vcpu, mut faults) = (leaving, vcpu, faults);
            set_guest_thread(thread.tid());
            if let Err(error) = thread.run(&mut *vcpu, &mut faults) {
                lock(&machine.lost).get_or_insert(error);
            }
        });
        let handle = handle.context(NO_THREAD)?;
        let mut threads = lock(&self.threads);
        // Those that ended need no join for anything but their resources; a guest that starts threads all day must not
        // make the list grow.
        threads.retain(|thread| !thread.is_finished());
        threads.push(handle);
        Ok(())
    }
}

/// A guest thread is one of umbra's, too.
const NO_THREAD: &str =
    "cannot start a thread (ulimit -u and the pids limit of a container say how many there may be)";

/// Threads that a guest with this much memory may have: one for every 32 frames, as Linux's `threads-max`.
fn max_threads(memory: u64) -> usize {
    usize::try_from(memory.div_ceil(PAGE_SIZE) / 32).unwrap_or(usize::MAX).max(20)
}

/// The machine as its process sees it.
#[derive(Debug)]
struct MachineHost(Arc<Machine>);

impl Host for MachineHost {
    fn start_thread(&self, thread: Thread, regs: Regs, xsave: Vec<u8>) -> Result<(), i32> {
        Arc::clone(&self.0).spawn(thread, regs, Some(xsave)).map_err(|error| {
            log::warn!("the guest gets no further thread: {}", one_line(&error));
            libc::EAGAIN
        })
    }

    fn report_death(&self, death: &Death) {
        lock(&self.0.death).get_or_insert_with(|| death.clone());
    }

    fn vcpu_lost(&self, tid: i32, error: &EngineError) {
        self.0.crash.get_or_init(|| crash::vcpu_lost(tid, error, &self.0));
    }

    fn filled(&self, range: HvaRange) {
        if let Some(ksm) = self.0.sharing.get() {
            ksm.hint(&self.0.mm, range);
        }
    }

    fn cpu_time_outside(&self) -> Duration {
        self.0.engine.cpu_time_outside()
    }

    fn exited(&self) {
        if let Err(error) = self.0.exited.write(1) {
            log::error!("cannot tell that the guest has ended: {error}");
        }
    }
}

impl Vm {
    /// A machine with `program` loaded, not running yet. Its standard files are umbra's own.
    ///
    /// # Errors
    /// Whatever keeps the program from being run, in one line that says what to do.
    pub fn new(config: VmConfig, program: Program) -> Result<(Self, Regs)> {
        Self::with_files(config, program, Files::inherit())
    }

    /// The same with other files.
    ///
    /// # Errors
    /// As those of [`new`](Self::new).
    pub fn with_files(config: VmConfig, program: Program, files: Files) -> Result<(Self, Regs)> {
        let machine = Machine::new(config)?;
        let deterministic = machine.config.deterministic.clone();
        let mut arguments = program.arguments;
        if let Some(deterministic) = &deterministic {
            arguments.random.get_or_insert_with(|| deterministic.at_random());
        }
        let entry = guest::load(&machine.mm, program.elf, &arguments)?;
        let process = Process::new(Setup {
            mm: Arc::clone(&machine.mm),
            files,
            host: Arc::new(MachineHost(Arc::clone(&machine))),
            exe: arguments.exe,
            max_threads: machine.engine.max_vcpus().min(max_threads(machine.config.memory)),
            deterministic,
        })?;
        Ok((Self { machine, process, ticker: Mutex::default() }, entry))
    }

    /// Starts the first thread.
    ///
    /// # Errors
    /// No vCPU, or no host thread.
    pub fn start(&self, entry: Regs) -> Result<()> {
        let thread = self
            .process
            .main_thread()
            .map_err(|error| anyhow::anyhow!("cannot make the guest's first thread: {error}"))?;
        if let Some(deterministic) = &self.machine.config.deterministic {
            let process = Arc::downgrade(&self.process);
            deterministic.baton().when_stuck(move || {
                if let Some(process) = process.upgrade() {
                    process.kill(libc::SIGKILL);
                }
            });
        }
        if let (Some(deterministic), true) =
            (&self.machine.config.deterministic, self.machine.config.faults.counts_time())
        {
            let machine = Arc::downgrade(&self.machine);
            deterministic.baton().every(Interval::Exactly(TICK_TIME), move || {
                if let Some(machine) = machine.upgrade() {
                    machine.tick();
                }
            });
        }
        // Before the guest runs: what cannot be started must not leave one behind that does.
        let by_the_clock =
            self.machine.config.faults.counts_time() && self.machine.config.deterministic.is_none();
        let ticker = by_the_clock.then(|| Ticker::start(&self.machine)).transpose();
        let ticker = ticker.context("cannot start the thread that makes time pass")?;
        Arc::clone(&self.machine).spawn(thread, entry, None)?;
        *lock(&self.ticker) = ticker;
        Ok(())
    }

    /// Readable when the guest has ended.
    ///
    /// # Errors
    /// No descriptor left.
    pub fn exited(&self) -> Result<EventFd> {
        self.machine.exited.try_clone().context("cannot duplicate an eventfd")
    }

    /// The machine that the guest runs on.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Ends the guest as by `signal`. Does not wait.
    pub fn kill(&self, signal: i32) {
        self.process.kill(signal);
    }

    /// Waits for every vCPU thread, and returns how the guest ended.
    ///
    /// # Errors
    /// The engine lost a vCPU.
    pub fn wait(&self) -> Result<ExitStatus> {
        loop {
            let Some(thread) = lock(&self.machine.threads).pop() else { break };
            if thread.join().is_err() {
                anyhow::bail!("a vCPU thread panicked: this is a bug of umbra's");
            }
        }
        drop(lock(&self.ticker).take());
        if let Some(error) = lock(&self.machine.lost).take() {
            let engine = self.machine.engine.kind();
            return Err(error).with_context(|| format!("the engine ({engine}) lost a vCPU"));
        }
        self.process.status().context("the guest did not end")
    }
}
