// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How a model is run: every schedule with at most so many preemptions, and with each mutant that it must find.
//!
//! A model is a function with threads of loom. Switches where a thread waits or ends are free; a *preemption* takes the CPU
//! from a thread that could go on. Without a bound every schedule is tried.

use crate::mutant::{self, M};
use crate::sync::THREADS;
use std::any::Any;
use std::cell::Cell;
use std::panic::catch_unwind;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Once};
use std::time::Instant;
use umbra_models::Mutants;

/// How far a model is explored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Preemptions {
    /// Every schedule.
    Any,
    /// Every schedule with at most this many.
    AtMost(usize),
}

thread_local! {
    static EXPECTED: Cell<bool> = const { Cell::new(false) };
}

/// Runs `model` in every schedule within the bound, and with each of `mutants` until it fails.
///
/// # Panics
/// If an execution fails, or none does with a mutant.
#[track_caller]
pub(crate) fn exhaust(name: &str, preemptions: Preemptions, model: fn(), mutants: &[M]) {
    hush_expected_panics();
    let (mutants, as_code) = Mutants::of_environment().choose(mutants, M::ALL);
    let start = Instant::now();
    mutant::choose(as_code);
    let executions = run(preemptions, model);
    println!(
        "model {name}: {executions} executions ({preemptions:?}), {:.2} s",
        start.elapsed().as_secs_f64()
    );
    for &mutant in mutants {
        mutant::choose(Some(mutant));
        EXPECTED.set(true);
        let result = catch_unwind(|| run(preemptions, model));
        EXPECTED.set(false);
        mutant::choose(None);
        match result {
            Ok(executions) => {
                panic!("`{name}` does not find the mutant {mutant:?} in {executions} executions")
            }
            Err(panic) => println!("  {mutant:?} found: {}", message(panic.as_ref())),
        }
    }
}

/// Runs a `model` that lacks something, and checks that it fails.
///
/// # Panics
/// If no execution does.
#[track_caller]
pub(crate) fn refute(name: &str, preemptions: Preemptions, model: fn()) {
    hush_expected_panics();
    EXPECTED.set(true);
    let result = catch_unwind(|| run(preemptions, model));
    EXPECTED.set(false);
    match result {
        Ok(executions) => panic!("`{name}` does not fail in {executions} executions"),
        Err(panic) => println!("model {name} fails, as it must: {}", message(panic.as_ref())),
    }
}

/// Returns the number of executions.
fn run(preemptions: Preemptions, model: fn()) -> usize {
    let executions = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&executions);
    let mut builder = loom::model::Builder::new();
    builder.max_threads = THREADS;
    builder.max_branches = 5_000;
    builder.preemption_bound = match preemptions {
        Preemptions::Any => None,
        Preemptions::AtMost(bound) => Some(bound),
    };
    builder.check(move || {
        counter.fetch_add(1, Ordering::Relaxed);
        model();
    });
    executions.load(Ordering::Relaxed)
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic without words");
    text.lines().next().unwrap_or_default().to_owned()
}

/// loom runs an execution on the thread that asked for it, so the thread knows which panics are wanted.
fn hush_expected_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !EXPECTED.get() {
                hook(info);
            }
        }));
    });
}
