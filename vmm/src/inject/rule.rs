// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! When a rule fires.
//!
//! A hit is *eligible* for a rule if it is of its point, machine, address and name, and what the rule waits for has happened. The
//! eligible hits of a rule are counted from 1; whether number n fires depends on the rule, the plan's seed and n alone.

use super::plan::{After, Pick, Rule};
use crate::random::mix;
use shadow_mmu::inject::Hit;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// A rule and what it has seen.
#[derive(Debug)]
pub(super) struct Watched {
    pub(super) rule: Rule,
    /// Of the plan, and of the rule's place in it.
    seed: u64,
    ready: AtomicBool,
    eligible: AtomicU64,
    fired: AtomicU64,
}

impl Watched {
    pub(super) fn new(rule: Rule, seed: u64, index: usize) -> Self {
        let ready = AtomicBool::new(rule.after.is_none());
        let seed = mix(seed ^ mix(index as u64 + 1));
        Self { rule, seed, ready, eligible: AtomicU64::new(0), fired: AtomicU64::new(0) }
    }

    /// Hits that were eligible so far.
    pub(super) fn eligible(&self) -> u64 {
        self.eligible.load(Ordering::Relaxed)
    }

    /// Hits that fired so far.
    pub(super) fn fired(&self) -> u64 {
        self.fired.load(Ordering::Relaxed)
    }

    /// Something has happened that the rule may wait for: this hit, with so much of the run over.
    pub(super) fn hear(&self, hit: &Hit, run_for: Duration) {
        let happened = match &self.rule.after {
            None => return,
            Some(After::Time(time)) => run_for >= *time,
            Some(After::Point(point)) => *point == hit.point,
        };
        if happened {
            self.ready.store(true, Ordering::Release);
        }
    }

    /// Whether this hit fires; with its number, which whatever is random about it is made of.
    pub(super) fn fires(&self, hit: &Hit) -> Option<u64> {
        let rule = &self.rule;
        // A tick is about no address: there `at` says what it happens to.
        let timed = rule.point == &super::points::TICK;
        let eligible = rule.point == hit.point
            && rule.vm.is_none_or(|vm| vm == hit.vm)
            && (timed
                || rule
                    .at
                    .is_none_or(|range| hit.at.is_some_and(|at| (range.start.0..range.end.0).contains(&at))))
            && (timed || rule.what.as_deref().is_none_or(|what| hit.what == Some(what)))
            && self.ready.load(Ordering::Acquire);
        if !eligible {
            return None;
        }
        let number = self.eligible.fetch_add(1, Ordering::Relaxed) + 1;
        let random = mix(self.seed ^ number);
        let picked = match rule.pick {
            Pick::All => true,
            Pick::From(first) => number >= first,
            Pick::Every(every) => number.is_multiple_of(every),
            // 53 bits, which an f64 holds exactly.
            Pick::Probability(probability) => ((random >> 11) as f64) < probability * (1u64 << 53) as f64,
        };
        let times = rule.times.unwrap_or(u64::MAX);
        let counted = picked
            && self
                .fired
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |fired| {
                    (fired < times).then(|| fired + 1)
                })
                .is_ok();
        counted.then_some(random)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Plan;
    use super::super::points::{FILE_READ, KICK, PAGE};
    use super::*;

    fn watched(toml: &str) -> Watched {
        let plan: Plan = toml.parse().unwrap();
        Watched::new(plan.rules[0].clone(), plan.seed, 0)
    }

    fn hit(at: u64) -> Hit {
        Hit { point: &PAGE, vm: 0, at: Some(at), what: None }
    }

    /// Which of the first `n` hits fire.
    fn fired(watched: &Watched, n: u64) -> Vec<u64> {
        (1..=n).filter(|_| watched.fires(&hit(0x1000)).is_some()).collect()
    }

    #[test]
    fn nth_every_and_times_count_eligible_hits() {
        let rule = |when: &str| watched(&format!("[[fault]]\npoint = 'page'\ndelay = '1us'\n{when}"));
        assert_eq!(fired(&rule("nth = 3"), 9), [3]);
        assert_eq!(fired(&rule("nth = 3\ntimes = 2"), 9), [3, 4]);
        assert_eq!(fired(&rule("every = 3"), 9), [3, 6, 9]);
        assert_eq!(fired(&rule("every = 3\ntimes = 2"), 9), [3, 6]);
        assert_eq!(fired(&rule("times = 2"), 9), [1, 2]);
        assert_eq!(fired(&rule("times = 2\nnth = 8"), 9), [8, 9]);
        assert_eq!(fired(&rule(""), 3), [1, 2, 3]);
    }

    #[test]
    fn probability_is_the_seeds_and_about_right() {
        let rule = |seed: u64| {
            watched(&format!("seed = {seed}\n[[fault]]\npoint = 'page'\ndelay = '1us'\nprobability = 0.25"))
        };
        let (one, again, other) = (fired(&rule(1), 4000), fired(&rule(1), 4000), fired(&rule(2), 4000));
        assert_eq!(one, again);
        assert_ne!(one, other);
        assert!((850..1150).contains(&one.len()), "{}", one.len());
        assert!(fired(&watched("[[fault]]\npoint='page'\ndelay='1us'\nprobability=0.0"), 100).is_empty());
        assert_eq!(fired(&watched("[[fault]]\npoint='page'\ndelay='1us'\nprobability=1.0"), 100).len(), 100);
    }

    #[test]
    fn only_hits_of_its_point_machine_and_address_count() {
        let rule = watched("[[fault]]\npoint='page'\nvm=1\nat='0x1000-0x3000'\ndelay='1us'\nnth=2");
        assert!(rule.fires(&hit(0x1000)).is_none(), "another machine");
        let of_vm = |at| Hit { vm: 1, ..hit(at) };
        for outside in [0xfff, 0x3000] {
            assert!(rule.fires(&of_vm(outside)).is_none());
        }
        assert!(rule.fires(&Hit { point: &KICK, ..of_vm(0x1000) }).is_none());
        assert_eq!(rule.eligible(), 0);
        assert!(rule.fires(&of_vm(0x1000)).is_none());
        assert!(rule.fires(&of_vm(0x2fff)).is_some());
    }

    #[test]
    fn a_rule_waits_for_its_event() {
        let rule = watched("[[fault]]\npoint='page'\nafter='file-read'\ndelay='1us'");
        assert!(rule.fires(&hit(0)).is_none());
        rule.hear(&hit(0), Duration::MAX);
        assert!(rule.fires(&hit(0)).is_none());
        rule.hear(&Hit { point: &FILE_READ, ..hit(0) }, Duration::ZERO);
        assert!(rule.fires(&hit(0)).is_some());
        let timed = watched("[[fault]]\npoint='page'\nafter='20ms'\ndelay='1us'");
        timed.hear(&hit(0), Duration::from_millis(19));
        assert!(timed.fires(&hit(0)).is_none());
        timed.hear(&hit(0), Duration::from_millis(20));
        assert!(timed.fires(&hit(0)).is_some());
    }
}
