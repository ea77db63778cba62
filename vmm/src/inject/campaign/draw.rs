// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Draws cases: case i of seed S is the same wherever and whenever.
//!
//! Only what a point offers is drawn, from the points' own data; so a new point is in the next campaign. A rule waits two
//! milliseconds a hit at most and fires a bounded number of times, so no run lasts long. Half of the cases have only rules that
//! nobody must notice, for those can be judged the most strictly.

use super::super::plan::{After, Memory, Pick, Plan, Rule, What};
use super::super::{points, regions, words};
use super::case::{Case, Dirty, Settings};
use super::dice::Dice;
use super::program::{Program, image_names};
use crate::engine::EngineChoice;
use shadow_mmu::inject::{Effects, Outcome, Point};
use std::time::Duration;

/// The most rules of a plan.
const RULES: u64 = 5;
/// The most microseconds that a hit waits.
const WAIT: u64 = 2000;
/// How often a rule fires at most.
const TIMES: u64 = 40;
/// System calls that are made to fail. Not those by which threads wake each other or end: without them a program waits for ever,
/// and is right to.
const CALLS: [&str; 12] = [
    "mmap",
    "munmap",
    "mprotect",
    "mremap",
    "madvise",
    "brk",
    "read",
    "write",
    "clone",
    "rt_sigaction",
    "clock_gettime",
    "arch_prctl",
];
const KSM: [&str; 6] = [
    "madvise",
    "all",
    "all,scan=500/1ms",
    "all,copy-on-access",
    "all,max-page-sharing=2,no-smart-scan,scan=500/1ms",
    "all,no-zero-pages",
];

/// Whether data may be corrupted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Corruption {
    /// Never: whatever a guest says must be right.
    #[default]
    Never,
    /// It is drawn like any other effect.
    Drawn,
}

/// What cases are drawn from.
#[derive(Debug, Clone)]
pub struct Deck {
    /// Of all that is random.
    pub seed: u64,
    /// Bundled guests, out of [`image_names`]; a case has one of them.
    pub images: Vec<&'static str>,
    /// Whether data may be corrupted.
    pub corruption: Corruption,
    /// What runs the guests, if that is to be said. Cases are the same with each.
    pub engine: Option<EngineChoice>,
}

impl Deck {
    /// All programs, and no corruption.
    pub fn new(seed: u64) -> Self {
        Self { seed, images: image_names().collect(), corruption: Corruption::Never, engine: None }
    }

    /// Case `number`.
    pub fn case(&self, number: u64) -> Case {
        let dice = &mut Dice::new(self.seed, number);
        let program = Program::draw(&self.images, dice);
        let mut settings = settings(program.memory(), dice);
        settings.engine = self.engine;
        let plan = self.plan(&program, settings.guests, dice);
        // Last, so that all else of a case is what it would be without it.
        settings.deterministic =
            (dice.one_in(8) && settings.may_be_deterministic()).then(|| dice.from(0, 9999));
        Case { number, program, settings, plan }
    }

    fn plan(&self, program: &Program, guests: u8, dice: &mut Dice) -> Plan {
        let worst = match dice.from(1, 20) {
            1..=10 => Outcome::Unseen,
            11..=16 => Outcome::GuestFails,
            _ => Outcome::RunFails,
        };
        let (count, seed) = (dice.from(1, RULES), dice.from(0, u64::MAX >> 1));
        let mut rules: Vec<Rule> = Vec::new();
        while (rules.len() as u64) < count {
            let Some(rule) = rule(guests, dice) else { continue };
            let is_meant = self.corruption == Corruption::Drawn || !rule.corrupts();
            let is_told = rule.changes_memory() && program.tells_of_memory();
            if is_told || !is_lawful(&rule) {
                continue;
            }
            // The first one is as bad as it gets, or most plans would do no harm.
            let is_bad_enough = !rules.is_empty() || rule.outcome() == worst;
            if is_meant && is_bad_enough && rule.outcome() <= worst {
                rules.push(rule);
            }
        }
        Plan { seed, rules }
    }
}

/// For a program that needs `least` MiB.
fn settings(least: u64, dice: &mut Dice) -> Settings {
    let guests = [1, 1, 1, 2, 3][dice.from(0, 4) as usize];
    let memory = dice.pick(&[16, 32, 64, 256]).unwrap_or(64).max(least);
    let pool = (guests > 1 && dice.one_in(2)).then(|| 16 + memory * u64::from(guests) / 2);
    let single = guests == 1;
    Settings {
        engine: None,
        memory,
        fault_around: dice.pick(&["adaptive", "adaptive", "off", "16K", "2M"]).unwrap_or("adaptive"),
        guests,
        pool,
        ksm: if dice.one_in(2) { dice.pick(&KSM) } else { None },
        age: (single && dice.one_in(3)).then(|| dice.from(1, 8)),
        ad_bits: if dice.one_in(4) { "off" } else { "on" },
        dirty: match dice.from(1, 9) {
            1 if single => Some(Dirty::Bits),
            2 if single => Some(Dirty::Protect),
            3 if single => Some(Dirty::Ring),
            _ => None,
        },
        deterministic: None,
    }
    .lawful()
}

impl Settings {
    /// Without what does not go together.
    fn lawful(mut self) -> Self {
        // There are no Dirty bits to log by.
        if self.ad_bits == "off" && self.dirty == Some(Dirty::Bits) {
            self.dirty = Some(Dirty::Protect);
        }
        self
    }

    /// Whether umbra runs that in deterministic mode. (None of [`KSM`] has an advisor.)
    fn may_be_deterministic(&self) -> bool {
        self.guests == 1 && self.dirty.is_none()
    }
}

/// Whether plans may say that: what the language refuses, a point's data do not tell.
fn is_lawful(rule: &Rule) -> bool {
    let text = Plan { seed: 0, rules: vec![rule.clone()] }.to_toml();
    text.is_ok_and(|text| text.parse::<Plan>().is_ok())
}

/// A rule that the language has, but for whether it may be meant; `None` if this throw made none.
fn rule(guests: u8, dice: &mut Dice) -> Option<Rule> {
    let all: Vec<&'static Point> = points::all().collect();
    let point = dice.pick(&all)?;
    let effect = effect(point, &all, dice)?;
    let is_wait = matches!(effect, What::Delay(_) | What::Stall(..) | What::Split);
    let what = match point {
        _ if point == &points::SYSCALL && !is_wait => Some(dice.pick(&CALLS)?.to_owned()),
        _ if point == &points::NOTIFIER_START || point == &points::NOTIFIER_END => {
            let names: Vec<_> = super::super::listener::event_names().collect();
            if dice.one_in(3) { Some(dice.pick(&names)?.to_owned()) } else { None }
        }
        _ if point == &points::PAGE || point == &points::TICK => {
            if dice.one_in(3) {
                Some(dice.pick(&regions::NAMES)?.to_owned())
            } else {
                None
            }
        }
        _ => None,
    };
    let vm = (guests > 1 && point.scope == shadow_mmu::inject::Scope::Vm && dice.one_in(3))
        .then(|| dice.from(0, u64::from(guests) - 1) as u32);
    let pick = match dice.from(1, 4) {
        1 => {
            let most = skewed(dice, 200);
            Pick::From(skewed(dice, most))
        }
        2 => Pick::Every(skewed(dice, 20)),
        3 => Pick::Probability(dice.pick(&[0.01, 0.05, 0.25, 0.5])?),
        _ => Pick::All,
    };
    let after = match dice.from(1, 16) {
        1 => Some(After::Time(Duration::from_millis(10 * dice.from(1, 3)))),
        2 => Some(After::Point(dice.pick(&all)?)),
        _ => None,
    };
    let times = Some(if dice.one_in(2) { 1 } else { skewed(dice, TIMES) });
    Some(Rule { point, what, vm, at: None, pick, after, times, effect })
}

/// A number from 1 to `most`, small ones more often.
fn skewed(dice: &mut Dice, most: u64) -> u64 {
    let high = dice.from(1, most);
    dice.from(1, high)
}

fn effect(point: &'static Point, all: &[&'static Point], dice: &mut Dice) -> Option<What> {
    let wait = |dice: &mut Dice| Duration::from_micros(skewed(dice, WAIT));
    let mut kinds: Vec<Effects> = point.effects.iter().collect();
    // An error number each: they are what differs most.
    kinds.extend(point.errors.iter().map(|_| Effects::empty()));
    Some(match dice.pick(&kinds)? {
        Effects::DELAY => What::Delay(wait(dice)),
        Effects::STALL => What::Stall(dice.pick(all)?, wait(dice)),
        Effects::CORRUPT => What::Corrupt,
        Effects::SPLIT => What::Split,
        Effects::EXIT => {
            let names: Vec<_> = words::exit_names().collect();
            What::Exit(words::exit(dice.pick(&names)?)?)
        }
        Effects::MEMORY => {
            let memory = match dice.from(1, 6) {
                1 => Memory::Sigbus,
                2 => Memory::Poison,
                3 => Memory::Revoke,
                4 => Memory::Flip,
                5 => Memory::Slow(wait(dice)),
                _ if point == &points::TICK => Memory::Pressure(dice.from(1, 9) as u32 * 100),
                _ => return None,
            };
            let holds = dice.one_in(2);
            What::Memory(memory, holds.then(|| Duration::from_millis(dice.from(1, 30))))
        }
        _ => What::Error(dice.pick(point.errors)?.0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_case_is_its_seeds_and_its_numbers() {
        let (one, other) = (Deck::new(1), Deck::new(2));
        for number in 0..200 {
            assert_eq!(one.case(number), one.case(number));
            assert_ne!(one.case(number).plan, other.case(number).plan);
            assert_ne!(one.case(number).plan, one.case(number + 1).plan);
        }
    }

    #[test]
    fn plans_are_lawful_and_are_read_back_as_they_were() {
        let deck = Deck { corruption: Corruption::Drawn, ..Deck::new(7) };
        for number in 0..3000 {
            let case = deck.case(number);
            let text = case.plan.to_toml().unwrap();
            let read: Plan = text.parse().unwrap_or_else(|error| panic!("{error} in\n{text}"));
            assert_eq!(read, case.plan, "{text}");
            assert!((1..=RULES as usize).contains(&case.plan.rules.len()));
            for rule in &case.plan.rules {
                assert!(rule.times.is_some_and(|times| (1..=TIMES).contains(&times)), "{text}");
                let waits = match rule.effect {
                    What::Delay(wait) | What::Stall(_, wait) | What::Memory(Memory::Slow(wait), _) => wait,
                    _ => Duration::ZERO,
                };
                assert!(waits <= Duration::from_micros(WAIT), "{text}");
            }
        }
    }

    #[test]
    fn everything_that_points_offer_is_drawn() {
        let deck = Deck { corruption: Corruption::Drawn, ..Deck::new(3) };
        let cases: Vec<Case> = (0..6000).map(|number| deck.case(number)).collect();
        let rules = || cases.iter().flat_map(|case| &case.plan.rules);
        for point in points::all() {
            for (errno, _) in point.errors {
                let drawn = rules().any(|rule| rule.point == point && rule.effect == What::Error(*errno));
                assert!(drawn, "{} never fails with {errno}", point.name);
            }
            assert!(rules().any(|rule| rule.point == point), "{}", point.name);
        }
        let images: BTreeSet<_> = cases.iter().map(|case| case.program.image).collect();
        assert_eq!(images.len(), image_names().count());
        assert!(rules().any(Rule::corrupts));
        assert!(cases.iter().any(|case| case.settings.pool.is_some()));
        let deterministic =
            || cases.iter().map(|case| &case.settings).filter(|it| it.deterministic.is_some());
        assert!(deterministic().count() > 100);
        assert!(deterministic().all(|it| it.guests == 1 && it.dirty.is_none() && it.pool.is_none()));
        assert!(!KSM.iter().any(|list| list.contains("advisor")), "it cannot be deterministic");
    }

    #[test]
    fn nothing_is_corrupted_unless_asked_for_and_half_of_the_cases_must_not_be_noticed() {
        let deck = Deck::new(5);
        let cases: Vec<Case> = (0..2000).map(|number| deck.case(number)).collect();
        assert!(!cases.iter().any(|case| case.plan.rules.iter().any(Rule::corrupts)));
        let quiet =
            cases.iter().filter(|case| case.plan.rules.iter().all(|rule| rule.outcome() == Outcome::Unseen));
        assert!(quiet.count() >= 900);
    }

    #[test]
    fn only_the_images_that_were_asked_for_are_drawn() {
        let deck = Deck { images: vec!["touch"], ..Deck::new(5) };
        assert!((0..50).all(|number| deck.case(number).program.image == "touch"));
    }
}
