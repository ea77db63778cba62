// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Fault points: places where the outside can fail, or where a race can be made wider, that somebody may take into his hands.
//!
//! A [`Point`] is a constant that says what can happen there, what that models and what is promised then. The code at the
//! place asks [`Faults::hit`] and does what the [`Effect`] says, as if the outside had done it. Whoever decides is an
//! [`Injector`], one for each run; there are no globals, so machines in one process do not disturb each other.
//!
//! # Cost
//! Without the feature `inject` a [`Faults`] has no size and [`hit`](Faults::hit) is a constant. With it, and with no injector,
//! a hit is a load and a branch that is never taken.
//!
//! # Locks
//! A point may be hit with locks held; its injector may sleep there, for as long as it was told to, and must take no lock of this
//! crate and wait for nobody without a limit.

use crate::addr::HvaRange;
#[cfg(feature = "inject")]
use crate::sync::Arc;
use bitflags::bitflags;
use std::fmt::Debug;
use std::time::Duration;

bitflags! {
    /// What can be made to happen at a point, errors aside.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    pub struct Effects: u8 {
        /// The thread waits there for a time.
        const DELAY = 1;
        /// It waits until something else has happened, or a time is over.
        const STALL = 1 << 1;
        /// A bit of the data is flipped.
        const CORRUPT = 1 << 2;
        /// What is done at once is done in parts, and in another order where there is none.
        const SPLIT = 1 << 3;
        /// The vCPU comes out with an exit that no guest can cause.
        const EXIT = 1 << 4;
        /// Something happens to memory of the guest ([`MemoryFault`]).
        const MEMORY = 1 << 5;
        /// Waiting, for a time or for something: no point is without it.
        const WAIT = Self::DELAY.bits() | Self::STALL.bits();
    }
}

/// What an injected failure may come to, for the guest and for who started it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Outcome {
    /// Nobody notices: the guest computes what it computes without it.
    Unseen,
    /// The guest may get an error or a signal that Linux programs get in such a case, and ends as it decides, or is killed by that
    /// signal. What it says that it computed is right.
    GuestFails,
    /// The run may end with umbra's own failure, in one line that says why. The guest did not compute anything wrong before.
    RunFails,
}

/// Whose a point is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scope {
    /// One machine's.
    Vm,
    /// The frame pool's, which several machines may share.
    Pool,
}

/// What the address of a hit is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Addressed {
    /// There is none.
    No,
    /// An address of the guest, in bytes.
    Guest,
}

/// A place where faults can be injected.
#[derive(Debug)]
pub struct Point {
    /// Its name, as plans have it.
    pub name: &'static str,
    /// What is about to be done there.
    pub place: &'static str,
    /// What an injected fault stands for.
    pub models: &'static str,
    /// What umbra promises then.
    pub promise: &'static str,
    /// Error numbers that the outside may answer with there, and what each may come to.
    pub errors: &'static [(i32, Outcome)],
    /// What else can be made to happen.
    pub effects: Effects,
    /// What those of [`effects`](Self::effects) that are no waiting may come to.
    pub outcome: Outcome,
    /// Whose it is.
    pub scope: Scope,
    /// Whether plans can choose by address.
    pub addressed: Addressed,
}

impl PartialEq for Point {
    /// By name, which is unique.
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl Eq for Point {}

/// What happens to a page of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MemoryFault {
    /// An access gets SIGBUS, as beyond the end of a file (`BUS_ADRERR`).
    Bus,
    /// Its content is lost, and an access gets SIGBUS, as from memory that has failed (`BUS_MCEERR_AR`).
    Poison,
    /// An access gets SIGSEGV, as if the page had been taken away (`SEGV_ACCERR`).
    Revoke,
    /// One bit of it is flipped, chosen by this number, and nobody says so.
    Flip(u64),
    /// It is far away: this fetch of it costs so much time.
    Slow(Duration),
    /// So many thousandths of the pool's frames are somebody else's now.
    Pressure(u32),
}

/// Which memory of the guest something happens to, as far as the plan says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Where {
    /// Anywhere.
    Anywhere,
    /// These addresses.
    At(HvaRange),
    /// A kind of mapping that the machine knows by this name.
    Region(&'static str),
}

/// Something that may happen to memory of a machine in the course of the run: for who prepares for it.
#[derive(Debug, Clone, Copy)]
pub struct MemoryRule {
    /// At hits of this point.
    pub point: &'static Point,
    /// What.
    pub fault: MemoryFault,
    /// To which memory.
    pub at: Where,
    /// Over after so much of the run.
    pub hold: Option<Duration>,
}

/// Something that happens to memory now.
#[derive(Debug, Clone, Copy)]
pub struct MemoryEvent {
    /// By which rule.
    pub rule: MemoryRule,
    /// What is left to chance is chosen by this number.
    pub random: u64,
}

/// What a hit comes to. Waiting is over already, but for [`Late`](Self::Late).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Effect {
    /// Nothing: go on.
    #[default]
    Go,
    /// The outside answers with this error number, positive.
    Fail(i32),
    /// Flip a bit of the data, chosen by this number.
    Corrupt(u64),
    /// Do it in parts.
    Split,
    /// Be late by this: where a delay is one of a deadline, and the thread must stay where others can wake it.
    Late(Duration),
    /// The vCPU comes out with this exit reason of KVM's.
    Exit(u32),
}

/// A hit: a thread is about to do what a point is about.
#[derive(Debug, Clone, Copy)]
pub struct Hit {
    /// The point.
    pub point: &'static Point,
    /// Which machine's, counted from 0; the pool's hits have 0.
    pub vm: u32,
    /// The address, where the point has one.
    pub at: Option<u64>,
    /// A name of what is going on, for points with several kinds of it: a system call, an event of the notifier.
    pub what: Option<&'static str>,
}

/// Who decides what happens at the points of a run.
pub trait Injector: Debug + Send + Sync {
    /// Decides, and waits if that is what is to happen.
    fn hit(&self, hit: &Hit) -> Effect;

    /// The same for a point with [`Effects::MEMORY`]: all that happens to memory at this hit, in the order of the plan.
    fn hit_memory(&self, hit: &Hit) -> Vec<MemoryEvent> {
        self.hit(hit);
        Vec::new()
    }

    /// What may happen to memory of machine `vm`.
    fn memory_rules(&self, vm: u32) -> Vec<MemoryRule> {
        let _ = vm;
        Vec::new()
    }

    /// Keeps a line about what came of something that it decided, for its report.
    fn note(&self, vm: u32, line: &str) {
        let _ = (vm, line);
    }

    /// Whether it wants to be told that time passes, by hits of a point for that.
    fn counts_time(&self) -> bool {
        false
    }
}

/// One machine's way to its injector, if it has one.
#[derive(Debug, Clone, Default)]
pub struct Faults {
    #[cfg(feature = "inject")]
    armed: Option<(Arc<dyn Injector>, u32)>,
}

impl Faults {
    /// Those of machine 0 of a run that `injector` decides over.
    #[cfg(feature = "inject")]
    pub fn new(injector: Arc<dyn Injector>) -> Self {
        Self { armed: Some((injector, 0)) }
    }

    /// The same for machine `vm`.
    #[must_use]
    pub fn of_vm(&self, vm: u32) -> Self {
        #[cfg(feature = "inject")]
        return Self { armed: self.armed.as_ref().map(|(injector, _)| (Arc::clone(injector), vm)) };
        #[cfg(not(feature = "inject"))]
        {
            let _ = vm;
            Self {}
        }
    }

    /// Whether anything can happen.
    #[inline]
    pub fn are_armed(&self) -> bool {
        #[cfg(feature = "inject")]
        return self.armed.is_some();
        #[cfg(not(feature = "inject"))]
        false
    }

    /// A thread comes to `point`.
    #[inline]
    pub fn hit(&self, point: &'static Point) -> Effect {
        self.hit_with(point, None, None)
    }

    /// The same for a point that is about an address of the guest.
    #[inline]
    pub fn hit_at(&self, point: &'static Point, at: u64) -> Effect {
        self.hit_with(point, Some(at), None)
    }

    /// The same, with a name for what is going on.
    #[inline]
    pub fn hit_with(&self, point: &'static Point, at: Option<u64>, what: Option<&'static str>) -> Effect {
        #[cfg(feature = "inject")]
        if let Some((injector, vm)) = &self.armed {
            return ask(injector.as_ref(), &Hit { point, vm: *vm, at, what });
        }
        let _ = (point, at, what);
        Effect::Go
    }

    /// A thread comes to `point`, which has [`Effects::MEMORY`]: what happens to memory.
    #[inline]
    pub fn hit_memory(
        &self,
        point: &'static Point,
        at: Option<u64>,
        what: Option<&'static str>,
    ) -> Vec<MemoryEvent> {
        #[cfg(feature = "inject")]
        if let Some((injector, vm)) = &self.armed {
            return injector.hit_memory(&Hit { point, vm: *vm, at, what });
        }
        let _ = (point, at, what);
        Vec::new()
    }

    /// What may happen to memory of this machine.
    pub fn memory_rules(&self) -> Vec<MemoryRule> {
        #[cfg(feature = "inject")]
        if let Some((injector, vm)) = &self.armed {
            return injector.memory_rules(*vm);
        }
        Vec::new()
    }

    /// Keeps a line for the report of what was injected.
    pub fn note(&self, line: &str) {
        #[cfg(feature = "inject")]
        if let Some((injector, vm)) = &self.armed {
            injector.note(*vm, line);
        }
        let _ = line;
    }

    /// Whether somebody wants to be told that time passes.
    pub fn counts_time(&self) -> bool {
        #[cfg(feature = "inject")]
        if let Some((injector, _)) = &self.armed {
            return injector.counts_time();
        }
        false
    }

    /// The error number that `point` fails with, if it does.
    #[inline]
    pub fn fail(&self, point: &'static Point) -> Option<i32> {
        match self.hit(point) {
            Effect::Fail(errno) => Some(errno),
            _ => None,
        }
    }
}

/// Not where everybody comes by.
#[cfg(feature = "inject")]
#[cold]
#[inline(never)]
fn ask(injector: &dyn Injector, hit: &Hit) -> Effect {
    injector.hit(hit)
}

/// A frame is taken from the pool, for a page of a guest, its file cache or a copy.
pub static FRAME_ALLOC: Point = Point {
    name: "frame-alloc",
    place: "a frame is taken from the pool, or several at once; for page tables, too",
    models: "a host without memory, a guest at its limit",
    promise: "the guest's call fails with ENOMEM, or the guest is ended as by the OOM killer (SIGKILL); what a fault would only have \
              brought along stays away; before the guest runs, umbra says that the pool is too small",
    errors: &[(libc::ENOMEM, Outcome::GuestFails)],
    effects: Effects::WAIT,
    outcome: Outcome::Unseen,
    scope: Scope::Pool,
    addressed: Addressed::No,
};

/// A frame is taken for a page table, of the primary or of a secondary.
pub static TABLE_ALLOC: Point = Point {
    name: "table-alloc",
    place: "a page table gets a further table",
    models: "a host without memory, just where a fault or a mapping needs one more table",
    promise: "a fault reclaims empty tables and tries once more; then as frame-alloc",
    errors: &[(libc::ENOMEM, Outcome::GuestFails)],
    effects: Effects::WAIT,
    outcome: Outcome::Unseen,
    scope: Scope::Pool,
    addressed: Addressed::No,
};

/// The pool's file gets its size.
pub static POOL_GROW: Point = Point {
    name: "pool-grow",
    place: "the pool's memfd is given its size (ftruncate)",
    models: "a limit on file sizes or on shared memory (RLIMIT_FSIZE, a memory cgroup)",
    promise: "nothing is started; umbra says what to ask for less",
    errors: &[
        (libc::ENOSPC, Outcome::RunFails),
        (libc::EFBIG, Outcome::RunFails),
        (libc::ENOMEM, Outcome::RunFails),
    ],
    effects: Effects::WAIT,
    outcome: Outcome::Unseen,
    scope: Scope::Pool,
    addressed: Addressed::No,
};

/// Freed frames go back to the host.
pub static PUNCH: Point = Point {
    name: "punch",
    place: "freed frames are punched out of the pool's file (fallocate)",
    models: "a host that does not take pages back, or takes its time",
    promise: "the frames stay usable, only the host's memory is not freed",
    errors: &[
        (libc::ENOSPC, Outcome::Unseen),
        (libc::EINTR, Outcome::Unseen),
        (libc::ENOMEM, Outcome::Unseen),
        (libc::EOPNOTSUPP, Outcome::Unseen),
    ],
    effects: Effects::WAIT,
    outcome: Outcome::Unseen,
    scope: Scope::Pool,
    addressed: Addressed::No,
};

/// Pages that are to be merged have lost W.
pub static MERGE_PROTECT: Point = Point {
    name: "merge-protect",
    place: "a page that is to be merged was write-protected, and is compared next",
    models: "a scanner that loses its CPU there while the guest writes",
    promise: "whoever wrote meanwhile keeps what he wrote: the page is not merged; an error gives the merge up",
    errors: &[(libc::EAGAIN, Outcome::Unseen)],
    effects: Effects::WAIT,
    outcome: Outcome::Unseen,
    scope: Scope::Vm,
    addressed: Addressed::Guest,
};

/// Pages that are to be merged were found equal.
pub static MERGE_COMPARE: Point = Point {
    name: "merge-compare",
    place: "a page was compared, and gets the shared frame next",
    models: "a scanner that loses its CPU between its look and its change",
    promise: "as merge-protect",
    errors: &[(libc::EAGAIN, Outcome::Unseen)],
    effects: Effects::WAIT,
    outcome: Outcome::Unseen,
    scope: Scope::Vm,
    addressed: Addressed::Guest,
};

/// Pages have their shared frame.
pub static MERGE_REPLACE: Point = Point {
    name: "merge-replace",
    place: "a page has the shared frame, and its pair is still open",
    models: "a scanner that loses its CPU inside the pair",
    promise: "faults of the page wait for the pair's end",
    errors: &[],
    effects: Effects::WAIT,
    outcome: Outcome::Unseen,
    scope: Scope::Vm,
    addressed: Addressed::Guest,
};

/// An event of a watched mapping was read.
pub static UFFD_EVENT: Point = Point {
    name: "uffd-event",
    place: "the watch over adopted memory is about to read events of userfaultfd, and then to act on each that it has read",
    models: "a watch that gets no CPU: the kernel's events come late; split: in parts, and those that were read together in \
             another order where they are about different addresses, as several threads may send them",
    promise: "who changes the mapping waits; the guest reaches no page that is gone when that call returns",
    errors: &[],
    effects: Effects::WAIT.union(Effects::SPLIT),
    outcome: Outcome::Unseen,
    scope: Scope::Vm,
    // Events are about addresses of the host.
    addressed: Addressed::No,
};

/// Every point of this crate.
pub static POINTS: [&Point; 8] = [
    &FRAME_ALLOC,
    &TABLE_ALLOC,
    &POOL_GROW,
    &PUNCH,
    &MERGE_PROTECT,
    &MERGE_COMPARE,
    &MERGE_REPLACE,
    &UFFD_EVENT,
];

#[cfg(all(test, feature = "inject"))]
mod tests {
    use super::*;
    use crate::sync::Mutex;

    #[derive(Debug, Default)]
    struct Notes(Mutex<Vec<(&'static str, u32, Option<u64>)>>);

    impl Injector for Notes {
        fn hit(&self, hit: &Hit) -> Effect {
            self.0.lock().push((hit.point.name, hit.vm, hit.at));
            Effect::Fail(libc::ENOMEM)
        }
    }

    #[test]
    fn a_hit_says_which_point_and_whose() {
        let notes = Arc::<Notes>::default();
        let faults = Faults::new(Arc::clone(&notes) as _);
        assert_eq!(faults.fail(&PUNCH), Some(libc::ENOMEM));
        faults.of_vm(3).hit_at(&MERGE_COMPARE, 0x1000);
        let seen = notes.0.lock();
        assert_eq!(*seen, [("punch", 0, None), ("merge-compare", 3, Some(0x1000))]);
    }

    #[test]
    fn without_an_injector_nothing_happens() {
        let faults = Faults::default().of_vm(1);
        assert!(!faults.are_armed());
        assert_eq!(faults.hit(&PUNCH), Effect::Go);
    }

    /// `cargo test --release -p shadow-mmu --features inject --lib -- --include-ignored measure_a_hit --nocapture`
    #[test]
    #[ignore = "prints a figure"]
    fn measure_a_hit_that_nobody_decides_over() {
        const HITS: u32 = 100_000_000;
        let faults = std::hint::black_box(Faults::default());
        let loops = |hit: &dyn Fn(&Faults)| {
            let began = std::time::Instant::now();
            (0..HITS).for_each(|_| hit(std::hint::black_box(&faults)));
            began.elapsed().as_secs_f64() * 1e9 / f64::from(HITS)
        };
        let (empty, hit) = (loops(&|_| ()), loops(&|faults| assert_eq!(faults.fail(&PUNCH), None)));
        println!("{:.2} ns a hit, the loop's {empty:.2} ns taken off", hit - empty);
    }
}
