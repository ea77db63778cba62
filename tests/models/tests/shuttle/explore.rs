// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How a scenario is explored, and how it is shown that it can fail.
//!
//! A scenario is a function that builds a [`Machine`](crate::machine::Machine), lets tasks race on it and checks it. It is
//! run in many schedules: half of them drawn at random, half by PCT, which finds bugs that need few preemptions at the right
//! places. Then it is run with each mutant that it must find, until it fails; if it does not, the test does.
//!
//! Seeds are fixed (see `umbra_models`), so that a run of the tests is the same each time.

use crate::mutant::{self, M};
use crate::quarantine;
use crate::sync::{Points, points};
use shuttle::scheduler::{PctScheduler, RandomScheduler, ReplayScheduler, Scheduler};
use shuttle::{Config, FailurePersistence, MaxSteps, Runner};
use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;
use std::time::Instant;
use umbra_models::{Exploration, Mutants};

/// Steps of an execution, after which it is taken for one that never ends. The longest takes a tenth of that.
const MOST_STEPS: usize = 100_000;
/// Schedules in which a mutant must be found.
const MUTANT_SCHEDULES: usize = 50_000;
/// Priority changes that PCT makes in an execution, and one more.
const PCT_DEPTHS: [usize; 2] = [3, 5];

thread_local! {
    static EXPECTED: Cell<bool> = const { Cell::new(false) };
    static EXECUTIONS: Cell<usize> = const { Cell::new(0) };
}

/// Explores `scenario`, and checks that it finds each of `mutants`.
///
/// # Panics
/// If an execution fails, or none does with a mutant.
#[track_caller]
pub(crate) fn explore(name: &str, scenario: fn(), mutants: &[M]) {
    hush_expected_panics();
    let (mutants, as_code) = Mutants::of_environment().choose(mutants, M::ALL);
    mutant::choose(as_code);
    let (schedules, seed) = match Exploration::of(name) {
        Exploration::Skip => return,
        Exploration::Replay(schedule) => {
            let mut scheduler = ReplayScheduler::new_from_encoded(&schedule);
            scheduler.set_allow_incomplete();
            run(scheduler, scenario);
            return;
        }
        Exploration::Draw { schedules, seed } => (schedules, seed),
    };
    let start = Instant::now();
    if let Err(panic) = catch_unwind(|| draw(scenario, schedules, seed)) {
        eprintln!(
            "the scenario is `{name}`: replay it with UMBRA_SHUTTLE_REPLAY={name}:<the schedule that is printed above>"
        );
        std::panic::resume_unwind(panic);
    }
    println!("model {name}: {schedules} schedules, {:.2} s", start.elapsed().as_secs_f64());
    for &mutant in mutants {
        match find(mutant, scenario, seed) {
            Some((schedules, message)) => {
                println!("  {mutant:?} found after {schedules} schedules: {message}")
            }
            None => panic!("`{name}` does not find the mutant {mutant:?} in {MUTANT_SCHEDULES} schedules"),
        }
    }
}

/// Runs `scenario` in `schedules` schedules.
fn draw(scenario: fn(), schedules: usize, seed: u64) {
    let random = schedules.div_ceil(2);
    run(RandomScheduler::new_from_seed(seed, random), scenario);
    let pct = (schedules - random).div_ceil(PCT_DEPTHS.len());
    for depth in PCT_DEPTHS {
        run(PctScheduler::new_from_seed(seed ^ depth as u64, depth, pct), scenario);
    }
}

/// Runs `scenario` with `mutant` until it fails. Returns the number of schedules that took, and what failed.
fn find(mutant: M, scenario: fn(), seed: u64) -> Option<(usize, String)> {
    mutant::choose(Some(mutant));
    EXPECTED.set(true);
    EXECUTIONS.set(0);
    let mut found = None;
    let mut round = 0;
    while found.is_none() && EXECUTIONS.get() < MUTANT_SCHEDULES {
        round += 1;
        let result = catch_unwind(|| draw(scenario, 100 << round, seed.wrapping_add(round)));
        found = result.err().map(|panic| (EXECUTIONS.get(), message(panic.as_ref())));
    }
    EXPECTED.set(false);
    mutant::choose(None);
    points(Points::Off);
    found
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic without words");
    text.lines().next().unwrap_or_default().to_owned()
}

fn run(scheduler: impl Scheduler + 'static, scenario: fn()) {
    let mut config = Config::new();
    config.stack_size = 256 << 10;
    config.max_steps = MaxSteps::FailAfter(MOST_STEPS);
    config.silence_warnings = true;
    config.failure_persistence =
        if EXPECTED.get() { FailurePersistence::None } else { FailurePersistence::Print };
    Runner::new(scheduler, config).run(move || {
        EXECUTIONS.set(EXECUTIONS.get() + 1);
        points(Points::Off);
        quarantine::begin();
        scenario();
    });
}

/// shuttle's panic hook prints the schedule. It is wanted for failures that nobody expects, and only for those.
fn hush_expected_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // shuttle puts its hook in place when it first runs.
        Runner::new(RandomScheduler::new_from_seed(0, 1), Config::new()).run(|| {});
        let hook = AssertUnwindSafe(std::panic::take_hook());
        std::panic::set_hook(Box::new(move |info| {
            if !EXPECTED.get() {
                hook(info);
            }
        }));
    });
}
