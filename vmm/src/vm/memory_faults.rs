// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a plan does to the memory of a machine: at page faults (the point `page`) and as time passes (`tick`).
//!
//! # At a page fault
//! Before the shadow map is asked, and with no lock held: traps are set at the page ([`Mm::trap`](shadow_mmu::mm::Mm::trap)), so this
//! very access is refused as the trap says; a slow fetch takes its time. A bit is flipped after the fault was resolved, before the
//! guest goes on. Pages that such rules name by address or region come by a fault each, so none of them is reached without a hit;
//! elsewhere a fault brings its neighbours along as ever, and its hit stands for all of them.
//!
//! # As time passes
//! [`MemoryFaults::tick`] is one tick: it hits the point, does what comes of that, ends what is over, and takes slow memory from
//! the shadow map, so that each page of it is fetched anew. Nothing in there reads a clock: `hold` counts ticks of this machine.
//! Whoever makes time pass calls it: the thread of [`Ticker`], every ten milliseconds; in deterministic mode the baton, on virtual time.
//!
//! What has no `hold` lasts as long as the machine: with it, frames that were taken go back to the pool.
//!
//! # Locks
//! `pending` is a leaf, and never held while memory is changed.

use super::{Machine, lock};
use crate::inject::points::{PAGE, TICK, TICK_TIME};
use crate::inject::regions;
use shadow_mmu::addr::{Hva, HvaRange, PAGE_SIZE, Pfn, TASK_SIZE};
use shadow_mmu::frame::{Fill, FramePool};
use shadow_mmu::inject::{MemoryEvent, MemoryFault, MemoryRule, Where};
use shadow_mmu::mm::Trap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Frames that somebody else has, as long as this lives.
#[derive(Debug)]
struct Taken {
    pool: Arc<FramePool>,
    frames: Vec<Pfn>,
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.pool.put_all(&self.frames);
    }
}

/// What ends when its time is over.
#[derive(Debug)]
enum Lasting {
    /// Set by this number.
    Trap(u64),
    Pressure(Taken),
}

#[derive(Debug, Default)]
struct Pending {
    ticks: u64,
    /// With the tick at which it ends; `None`: with the run.
    lasting: Vec<(Option<u64>, Lasting)>,
}

/// What happens to one machine's memory.
#[derive(Debug)]
pub(super) struct MemoryFaults {
    rules: Vec<MemoryRule>,
    pending: Mutex<Pending>,
    /// What the next trap is set by.
    setters: AtomicU64,
}

/// What is left to do of a page fault when it is resolved: bits to flip.
#[derive(Debug, Default)]
pub(super) struct Flips(Vec<u64>);

fn trap_of(fault: MemoryFault) -> Option<Trap> {
    match fault {
        MemoryFault::Bus => Some(Trap::Bus),
        MemoryFault::Poison => Some(Trap::Poison),
        MemoryFault::Revoke => Some(Trap::Revoke),
        MemoryFault::Flip(_) | MemoryFault::Slow(_) | MemoryFault::Pressure(_) => None,
    }
}

impl MemoryFaults {
    pub(super) fn new(rules: Vec<MemoryRule>) -> Self {
        Self { rules, pending: Mutex::default(), setters: AtomicU64::new(1) }
    }

    fn of_page(&self) -> impl Iterator<Item = &MemoryRule> {
        self.rules.iter().filter(|rule| rule.point == &PAGE)
    }

    /// Where each page must come by a fault of its own, for a fault at `hva` in `region`.
    fn alone(&self, hva: Hva, region: Option<&'static str>) -> Vec<HvaRange> {
        let everything = HvaRange { start: Hva(0), end: Hva(TASK_SIZE) };
        let alone = self.of_page().filter_map(|rule| match (rule.at, rule.fault) {
            (Where::At(range), _) => Some(range),
            (Where::Region(name), _) => (region == Some(name)).then(|| HvaRange::page(hva.page_floor())),
            (Where::Anywhere, MemoryFault::Slow(_)) => Some(everything),
            (Where::Anywhere, _) => None,
        });
        alone.collect()
    }

    /// A vCPU of `machine` is about to fault at `hva`. Returns where pages must come alone, and what is left to do.
    pub(super) fn page(&self, machine: &Machine, hva: Hva) -> (Vec<HvaRange>, Flips) {
        let region = machine.mm.vma(hva).map(|vma| regions::region_of(&machine.mm, &vma));
        let mut flips = Flips::default();
        for event in machine.config.faults.hit_memory(&PAGE, Some(hva.0), region) {
            match event.rule.fault {
                MemoryFault::Flip(number) => flips.0.push(number),
                MemoryFault::Slow(latency) => match &machine.config.deterministic {
                    Some(deterministic) => deterministic.baton().clock().pass(latency),
                    None => std::thread::sleep(latency),
                },
                MemoryFault::Pressure(_) => {}
                _ => self.set_trap(machine, &event, &[HvaRange::page(hva.page_floor())]),
            }
        }
        (self.alone(hva, region), flips)
    }

    /// One tick of `machine`'s time.
    pub(super) fn tick(&self, machine: &Machine) {
        let over = {
            let mut pending = lock(&self.pending);
            pending.ticks += 1;
            let now = pending.ticks;
            pending.lasting.extract_if(.., |(end, _)| end.is_some_and(|end| end <= now)).collect::<Vec<_>>()
        };
        for (_, lasting) in over {
            match lasting {
                Lasting::Trap(setter) => {
                    machine.mm.untrap_by(setter);
                }
                Lasting::Pressure(taken) => drop(taken),
            }
        }
        for event in machine.config.faults.hit_memory(&TICK, None, None) {
            self.happen(machine, &event);
        }
        for rule in self.of_page().filter(|rule| matches!(rule.fault, MemoryFault::Slow(_))) {
            for range in regions::mapped(&machine.mm, rule.at) {
                machine.mm.invalidate_secondaries(range);
            }
        }
    }

    /// A memory event that is about no address of its own.
    fn happen(&self, machine: &Machine, event: &MemoryEvent) {
        let at = event.rule.at;
        if let MemoryFault::Pressure(thousandths) = event.rule.fault {
            return self.press(machine, event, thousandths);
        }
        let mut ranges = regions::mapped(&machine.mm, at);
        let flip = matches!(event.rule.fault, MemoryFault::Flip(_));
        if flip || !matches!(at, Where::At(_)) {
            let page = machine.mm.pick_resident(&ranges, event.random);
            ranges = page.map(HvaRange::page).into_iter().collect();
        }
        match event.rule.fault {
            MemoryFault::Flip(number) => ranges.iter().for_each(|page| flip_bit(machine, page.start, number)),
            _ => self.set_trap(machine, event, &ranges),
        }
    }

    fn set_trap(&self, machine: &Machine, event: &MemoryEvent, ranges: &[HvaRange]) {
        let Some(trap) = trap_of(event.rule.fault) else { return };
        for &range in ranges {
            // Who tries again and again is refused by what is there, and has one that ends.
            if range.page_count() == 1 && machine.mm.trapped(range.start) == Some(trap) {
                continue;
            }
            let setter = self.setters.fetch_add(1, Ordering::Relaxed);
            if machine.mm.trap_by(setter, range, trap) > 0 {
                note(machine, &format!("{trap:?}").to_lowercase(), range);
                if event.rule.hold.is_some() {
                    self.last(event.rule.hold, Lasting::Trap(setter));
                }
            }
        }
    }

    fn press(&self, machine: &Machine, event: &MemoryEvent, thousandths: u32) {
        let pool = &machine.pool;
        let want = (pool.frame_count() as u64 * u64::from(thousandths) / 1000) as usize;
        let mut frames = Vec::new();
        pool.alloc_up_to(want, Fill::Overwritten, &mut frames);
        if !frames.is_empty() {
            machine.config.faults.note(&format!(
                "pressure takes {} frames ({} MiB)",
                frames.len(),
                (frames.len() as u64 * PAGE_SIZE) >> 20
            ));
            self.last(event.rule.hold, Lasting::Pressure(Taken { pool: Arc::clone(pool), frames }));
        }
    }

    fn last(&self, hold: Option<Duration>, lasting: Lasting) {
        let mut pending = lock(&self.pending);
        let ticks = |hold: Duration| hold.as_nanos().div_ceil(TICK_TIME.as_nanos()).max(1);
        let end = hold.map(|hold| pending.ticks.saturating_add(ticks(hold).try_into().unwrap_or(u64::MAX)));
        pending.lasting.push((end, lasting));
    }

    /// Frames that are taken now.
    pub(super) fn pressed_frames(&self) -> usize {
        let pending = lock(&self.pending);
        let taken = pending.lasting.iter().map(|(_, lasting)| match lasting {
            Lasting::Pressure(taken) => taken.frames.len(),
            Lasting::Trap(_) => 0,
        });
        taken.sum()
    }
}

impl Flips {
    /// The fault at `hva` was resolved.
    pub(super) fn finish(&self, machine: &Machine, hva: Hva) {
        self.0.iter().for_each(|&number| flip_bit(machine, hva, number));
    }
}

fn flip_bit(machine: &Machine, hva: Hva, number: u64) {
    if machine.mm.flip_bit(hva, number) {
        note(machine, "flip", HvaRange::page(hva.page_floor()));
    }
}

/// Keeps for the report what was done where.
fn note(machine: &Machine, what: &str, range: HvaRange) {
    machine.config.faults.note(&format!("{what} at {:#x}-{:#x}", range.start.0, range.end.0));
}

/// The thread that makes time pass for a machine while its guest runs. Dropping it ends it.
#[derive(Debug)]
pub(super) struct Ticker {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Ticker {
    /// Starts it.
    ///
    /// # Errors
    /// No host thread.
    pub(super) fn start(machine: &Arc<Machine>) -> std::io::Result<Self> {
        let (over, machine) = (Arc::new(AtomicBool::new(false)), Arc::downgrade(machine));
        let ended = Arc::clone(&over);
        let thread = std::thread::Builder::new().name("ticks".into()).spawn(move || run(&machine, &ended))?;
        Ok(Self { over, thread: Some(thread) })
    }
}

fn run(machine: &Weak<Machine>, over: &AtomicBool) {
    // By the clock, so that what a tick does takes nothing from the time until the next; ticks that fell into it are left out.
    let mut next = Instant::now() + TICK_TIME;
    loop {
        std::thread::park_timeout(next.saturating_duration_since(Instant::now()));
        if over.load(Ordering::Acquire) {
            return;
        }
        // Not the one who keeps the machine.
        let Some(machine) = machine.upgrade() else { return };
        if Instant::now() >= next {
            machine.tick();
            next = (next + TICK_TIME).max(Instant::now());
        }
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            if thread.join().is_err() {
                log::error!("the thread that makes time pass panicked: this is a bug of umbra's");
            }
        }
    }
}
