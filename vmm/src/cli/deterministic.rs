// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The options of `umbra run` for deterministic mode, the search for a seed that fails, and the command that replays one.

use super::{engine, replay};
use crate::causes::say;
use crate::deterministic::{Deterministic, Quantum};
use crate::engine::choice;
use anyhow::{Context, Result};
use clap::Args;
use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Between lines that tell how far a search is.
const PROGRESS: Duration = Duration::from_secs(2);

#[derive(Debug, Args)]
pub(super) struct DeterministicArgs {
    /// Run one guest thread at a time, in an order, a time and a randomness that `--seed` decides: the same seed, the same run.
    ///
    /// If the guest fails, the command that replays it is printed to stderr. The same needs the same program, arguments,
    /// environment and input, and a guest that leaves for umbra often enough: docs/deterministic.md says what is covered.
    #[arg(long, conflicts_with = "adopt_demo")]
    deterministic: bool,
    /// The seed; one is drawn and printed if not given.
    #[arg(long, value_name = "S", requires = "deterministic", value_parser = seed)]
    seed: Option<u64>,
    /// Run with each of these seeds, up to the first with which the guest fails, which is told; the guest's stdin is empty.
    #[arg(long, value_name = "A..B", requires = "deterministic", conflicts_with = "seed", value_parser = seeds)]
    seeds: Option<Range<u64>>,
    /// What a thread may do before another runs, counted in exits from the guest (16 at most) or in instructions (256 at most);
    /// the seed says how many. `steps` leaves the guest after each instruction while others could run.
    #[arg(long, value_name = "exits[=N]|steps[=N]", requires = "deterministic", value_parser = quantum)]
    quantum: Option<Quantum>,
    /// Write what happened to PATH, anew: each exit, each switch of threads, each notifier event, a line each.
    #[arg(long, value_name = "PATH", requires = "deterministic", conflicts_with = "seeds")]
    deterministic_trace: Option<PathBuf>,
}

fn seed(text: &str) -> Result<u64, String> {
    let number = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    number.map_err(|_| format!("`{text}` is no seed: write a number of 64 bits, decimal or with 0x"))
}

fn seeds(text: &str) -> Result<Range<u64>, String> {
    let bad = || {
        format!("`{text}` is no range of seeds: write the first and the one behind the last, as in 0..1000")
    };
    let (first, end) = text.split_once("..").ok_or_else(bad)?;
    let range = seed(first).map_err(|_| bad())?..seed(end).map_err(|_| bad())?;
    if range.is_empty() { Err(bad()) } else { Ok(range) }
}

fn quantum(text: &str) -> Result<Quantum, String> {
    const MOST: u64 = 1_000_000;
    let bad =
        || format!("`{text}` is no quantum: write exits or steps, or how many at most, as in steps=100");
    let (unit, most) = match text.split_once('=') {
        Some((unit, most)) => {
            (unit, Some(most.parse().ok().filter(|most| (1..=MOST).contains(most)).ok_or_else(bad)?))
        }
        None => (text, None),
    };
    match unit {
        "exits" => Ok(Quantum::Exits(most.unwrap_or(Quantum::EXITS))),
        "steps" => Ok(Quantum::Steps(most.unwrap_or(Quantum::STEPS))),
        _ => Err(bad()),
    }
}

/// What else the command line asks for, as far as it matters here.
#[derive(Debug)]
pub(super) struct Besides {
    /// An option for several guests, if one is given.
    pub(super) several: Option<&'static str>,
    /// An option that logs writes.
    pub(super) dirty: Option<&'static str>,
    /// `--trace`.
    pub(super) trace: Option<&'static str>,
    /// Page sharing at a pace that goes by the host's clock.
    pub(super) advisor: bool,
}

impl DeterministicArgs {
    /// Why these options make no sense beside others, if they do not.
    pub(super) fn refusal(&self, besides: &Besides) -> Option<String> {
        if !self.deterministic {
            return None;
        }
        let searched = besides.trace.filter(|_| self.seeds.is_some());
        if let Some(option) = searched {
            return Some(format!(
                "{option} is of one run and --seeds makes many: leave out either, and trace the replay"
            ));
        }
        if let Some(option) = besides.several {
            return Some(format!("--deterministic runs one guest alone: leave out {option}"));
        }
        if let Some(option) = besides.dirty {
            return Some(format!(
                "{option} has vCPUs wait for the event loop, which --deterministic cannot order: leave out either"
            ));
        }
        besides.advisor.then(|| {
            "the advisor of --ksm goes by the host's CPU time, which --deterministic cannot repeat: give scan=PAGES/INTERVAL".to_owned()
        })
    }

    /// Seeds to search, if any.
    pub(super) fn seeds(&self) -> Option<Range<u64>> {
        self.seeds.clone()
    }

    /// The mode of the one run that is asked for, if it is.
    ///
    /// # Errors
    /// The trace's file cannot be made; the host's.
    pub(super) fn one(&self) -> Result<Option<Arc<Deterministic>>> {
        if !self.deterministic {
            return Ok(None);
        }
        let open = |path: &PathBuf| {
            let file = OpenOptions::new().write(true).create(true).truncate(true).open(path);
            file.with_context(|| format!("cannot write the trace to {}", path.display()))
        };
        let file = self.deterministic_trace.as_ref().map(open).transpose()?;
        let seed = match self.seed {
            Some(seed) => seed,
            None => {
                let drawn = draw()?;
                say(format_args!("deterministic: no --seed is given, this is seed {drawn}"));
                drawn
            }
        };
        self.with_seed(seed, file).map(Some)
    }

    fn with_seed(&self, seed: u64, file: Option<File>) -> Result<Arc<Deterministic>> {
        let quantum = self.quantum.unwrap_or(Quantum::Exits(Quantum::EXITS));
        Deterministic::new(seed, quantum, file).context("cannot start deterministic mode")
    }

    /// Runs with one seed after another until one fails; the exit status. `run` runs once and returns the guest's status.
    /// `words`: how many of the command line's are the program's.
    ///
    /// # Errors
    /// Those of `run`.
    pub(super) fn search(
        &self,
        seeds: Range<u64>,
        words: usize,
        run: impl Fn(Arc<Deterministic>) -> Result<u8>,
    ) -> Result<u8> {
        empty_stdin()?;
        let (began, all) = (Instant::now(), seeds.end - seeds.start);
        let (mut told, mut tried) = (began, 0);
        for seed in seeds.clone() {
            let deterministic = self.with_seed(seed, None)?;
            let status = match run(Arc::clone(&deterministic)) {
                Ok(status) => status,
                Err(error) if !deterministic.has_begun() => return Err(error),
                Err(error) => {
                    say(format_args!("the run with seed {seed} fails, number {} of {all} seeds", tried + 1));
                    tell_replay(seed, words, Stdin::Empty);
                    return Err(error);
                }
            };
            if deterministic.ended_from_outside() {
                say(format_args!(
                    "the search was ended at seed {seed}: {tried} of {all} seeds ran, none failed"
                ));
                return Ok(status);
            }
            tried += 1;
            let seconds = began.elapsed().as_secs_f64();
            if status != 0 {
                let how = match deterministic.is_out_of_time() {
                    true => "does not end within --timeout".to_owned(),
                    false => format!("fails with exit status {status}"),
                };
                say(format_args!("seed {seed} {how}: number {tried} of {all} seeds, after {seconds:.1} s"));
                tell_replay(seed, words, Stdin::Empty);
                return Ok(status);
            }
            if told.elapsed() >= PROGRESS {
                told = Instant::now();
                say(format_args!(
                    "{tried} of {all} seeds ran, none failed, {:.1} a second",
                    f64::from(tried as u32) / seconds
                ));
            }
        }
        let seconds = began.elapsed().as_secs_f64();
        say(format_args!("none of the {all} seeds {}..{} fails ({seconds:.1} s)", seeds.start, seeds.end));
        Ok(0)
    }
}

/// What the guest read in the run that is to be replayed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stdin {
    /// umbra's.
    Own,
    /// Nothing.
    Empty,
}

/// Tells the command that runs the same again.
pub(super) fn tell_replay(seed: u64, words: usize, stdin: Stdin) {
    let argv: Vec<OsString> = std::env::args_os().collect();
    let config = engine();
    // It ran, so this is known.
    let engine = choice::kind(&config).map_or(config.choice, Into::into);
    let command = replay::command(&argv, words, engine, seed);
    let input = if stdin == Stdin::Empty { " < /dev/null" } else { "" };
    say(format_args!("to replay it: {command}{input}"));
}

/// A seed of 32 bits, which is easier to pass on than one of 64.
fn draw() -> Result<u64> {
    let mut bytes = [0; 4];
    // SAFETY: `bytes` is ours to write.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if got != bytes.len() as isize {
        return Err(std::io::Error::last_os_error()).context("cannot draw a seed: give one with --seed");
    }
    Ok(u32::from_le_bytes(bytes).into())
}

/// Makes umbra's own stdin an empty one, so that every run reads the same.
fn empty_stdin() -> Result<()> {
    let nothing = File::open("/dev/null").context("cannot open /dev/null, which guests read in a search")?;
    // SAFETY: replaces descriptor 0, which nobody here reads, by another.
    if unsafe { libc::dup2(nothing.as_raw_fd(), 0) } < 0 {
        return Err(std::io::Error::last_os_error()).context("cannot replace stdin");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_and_quanta_are_numbers_that_make_sense() {
        assert_eq!((seed("17"), seed("0x10")), (Ok(17), Ok(16)));
        assert_eq!(seed("18446744073709551615"), Ok(u64::MAX));
        assert!(seed("-1").is_err() && seed("").is_err() && seed("18446744073709551616").is_err());
        assert_eq!(seeds("0..10"), Ok(0..10));
        for bad in ["", "5", "5..5", "6..5", "..5", "1..", "1..=2"] {
            assert!(seeds(bad).is_err(), "{bad}");
        }
        assert_eq!(quantum("exits"), Ok(Quantum::Exits(Quantum::EXITS)));
        assert_eq!(quantum("steps=7"), Ok(Quantum::Steps(7)));
        for bad in ["", "steps=", "steps=0", "exits=x", "time", "steps=1000001"] {
            assert!(quantum(bad).is_err(), "{bad}");
        }
    }
}
