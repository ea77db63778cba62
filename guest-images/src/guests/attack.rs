// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `attack`: code that tries to get out of umbra, or at umbra; one attack a run.
//!
//! An attack that is contained prints one line of what it saw and ends with status 0, or dies by the signal that its test
//! names. Whatever got through prints a line that begins with `broken:`, and ends with status 1. Natively most attacks
//! succeed, in part: only umbra's answers are right.

#![no_std]
#![no_main]

#[path = "attack/attempt.rs"]
mod attempt;
#[path = "attack/bystander.rs"]
mod bystander;
#[path = "attack/calls.rs"]
mod calls;
#[path = "attack/doors.rs"]
mod doors;
#[path = "attack/reach.rs"]
mod reach;
#[allow(dead_code, reason = "the runtime serves all guests, and none uses all of it")]
mod rt;
#[path = "attack/signals.rs"]
mod signals;
#[path = "attack/state.rs"]
mod state;
#[path = "attack/storm.rs"]
mod storm;
#[allow(dead_code, reason = "each guest prints one of the usage lines")]
#[path = "../usage.rs"]
mod usage;

use attempt::Catcher;
use bystander::Bystander;
use rt::args::{Args, Cli};
use rt::out::outln;

/// Something got through. It was printed where it was found.
pub struct Broken;
pub type Verdict = Result<(), Broken>;

/// Says what got through.
pub fn broken(what: core::fmt::Arguments<'_>) -> Verdict {
    outln!("broken: {what}");
    Err(Broken)
}

type Attack = fn(&Catcher) -> Verdict;

/// What goes on after each: then the bystander must be unharmed.
const ATTACKS: [(&str, Attack); 24] = [
    ("calls", calls::calls),
    ("numbers", calls::numbers),
    ("top-calls", calls::top),
    ("int", doors::int),
    ("sysenter", doors::sysenter),
    ("far-int", doors::far_int),
    ("far-sysenter", doors::far_sysenter),
    ("far-syscall", doors::far_syscall),
    ("far-data", doors::far_data),
    ("far-segments", doors::far_segments),
    ("vsyscall", doors::vsyscall),
    ("changing", doors::changing),
    ("top-jumps", reach::jumps),
    ("top-accesses", reach::accesses),
    ("edges", reach::edges),
    ("signals", signals::signals),
    ("neighbours", signals::neighbours),
    ("altstack", signals::altstack),
    ("sigreturn", signals::sigreturn),
    ("flags", state::flags),
    ("segments", state::segments),
    ("privileged", state::privileged),
    ("bases", state::bases),
    ("storm", storm::storm),
];

/// What ends the program by itself, in a way that the test knows; returning is an end, too.
const ENDS: [(&str, Attack); 5] = [
    ("exit-thread", calls::exit_thread),
    ("blocked-fault", signals::blocked_fault),
    ("no-altstack", signals::no_altstack),
    ("protection-keys", state::protection_keys),
    ("outlive", storm::outlive),
];

fn run(args: Args) -> i32 {
    let mut cli = Cli::new(args, usage::ATTACK);
    let Some(name) = cli.word() else { cli.refuse(format_args!("which attack? `attack list` names them")) };
    let signal = (name == "raise").then(|| cli.number("raise", 1, 64) as u32);
    if let Some(word) = cli.word() {
        cli.unknown(word);
    }
    if name == "list" {
        ATTACKS.iter().chain(&ENDS).for_each(|(name, _)| outln!("{name}"));
        outln!("raise");
        return 0;
    }
    let Ok(catcher) = attempt::install().and_then(|()| Catcher::new()) else {
        outln!("attack: signals cannot be caught");
        return 2;
    };
    let find = |attacks: &[(&str, Attack)]| attacks.iter().find(|(it, _)| *it == name).map(|(_, it)| *it);
    let verdict = if let Some(signal) = signal {
        signals::raise(signal)
    } else if let Some(attack) = find(&ENDS) {
        attack(&catcher)
    } else if let Some(attack) = find(&ATTACKS) {
        let Ok(bystander) = Bystander::start() else {
            outln!("attack: no memory for a bystander");
            return 2;
        };
        let attacked = attack(&catcher);
        bystander.check().and(attacked)
    } else {
        cli.unknown(name)
    };
    i32::from(verdict.is_err())
}
