// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One run's plan at work: every hit comes here, the rules are asked, and who is to wait waits.
//!
//! # Locks
//! None while a rule is asked; counters are atomics. A stalled thread waits on a condition variable of its own lock, a leaf, for
//! hits of the point that it is stalled until. Each wait has a limit, so that whatever locks the thread holds come back.

use super::plan::{Memory, Plan, What};
use super::points;
use super::rule::Watched;
use serde::Serialize;
use shadow_mmu::inject::{Effect, Hit, Injector, MemoryFault, Point};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How much of the run a hit of `tick` stands for.
pub const TICK: Duration = Duration::from_millis(10);

/// The rules of one run, and what became of them.
#[derive(Debug)]
pub struct Registry {
    rules: Vec<Watched>,
    /// Hits of each point so far, in the order of [`points::all`].
    hits: Vec<(&'static Point, AtomicU64)>,
    /// How often each point was hit that some thread may be stalled until.
    heard: Mutex<BTreeMap<&'static str, u64>>,
    changed: Condvar,
}

/// What became of a rule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RuleAccount {
    /// What happens where.
    pub rule: String,
    /// Hits that it was asked about.
    pub eligible: u64,
    /// Hits at which it happened.
    pub fired: u64,
}

/// What became of a plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Account {
    /// In the order of the plan.
    pub rules: Vec<RuleAccount>,
    /// Hits of each point, those that were never hit left out.
    pub hits: BTreeMap<String, u64>,
}

impl Registry {
    /// The rules of `plan`, with nothing seen yet.
    pub fn new(plan: &Plan) -> Arc<Self> {
        let rules = plan.rules.iter().enumerate();
        let rules: Vec<_> = rules.map(|(index, rule)| Watched::new(rule.clone(), plan.seed, index)).collect();
        let heard = rules.iter().filter_map(|watched| match &watched.rule.effect {
            What::Stall(until, _) => Some((until.name, 0)),
            _ => None,
        });
        Arc::new(Self {
            heard: Mutex::new(heard.collect()),
            changed: Condvar::new(),
            hits: points::all().map(|point| (point, AtomicU64::new(0))).collect(),
            rules,
        })
    }

    /// What became of the rules so far.
    pub fn account(&self) -> Account {
        let rules = self.rules.iter().map(|watched| RuleAccount {
            rule: watched.rule.headline(),
            eligible: watched.eligible(),
            fired: watched.fired(),
        });
        let hits =
            self.hits.iter().map(|(point, hits)| (point.name.to_owned(), hits.load(Ordering::Relaxed)));
        Account { rules: rules.collect(), hits: hits.filter(|(_, hits)| *hits > 0).collect() }
    }

    /// Whether some rule does something at `point`.
    pub fn uses(&self, point: &Point) -> bool {
        self.rules.iter().any(|watched| watched.rule.point == point)
    }

    /// The rules that do something at a hit, each with the number that its chances are made of. In the order of the plan.
    pub(super) fn firing(&self, hit: &Hit) -> impl Iterator<Item = (&super::Rule, u64)> {
        self.rules.iter().filter_map(|watched| Some((&watched.rule, watched.fires(hit)?)))
    }

    fn heard(&self) -> MutexGuard<'_, BTreeMap<&'static str, u64>> {
        // Nothing is done under the lock that leaves it half done.
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a hit, and tells rules and threads that wait for it.
    pub(super) fn count(&self, hit: &Hit) {
        let mut run_for = Duration::ZERO;
        for (point, hits) in &self.hits {
            let so_far = match *point == hit.point {
                true => hits.fetch_add(1, Ordering::Relaxed) + 1,
                false => hits.load(Ordering::Relaxed),
            };
            if **point == points::TICK {
                run_for = TICK.saturating_mul(so_far.try_into().unwrap_or(u32::MAX));
            }
        }
        self.rules.iter().for_each(|watched| watched.hear(hit, run_for));
        let mut heard = self.heard();
        if let Some(hits) = heard.get_mut(hit.point.name) {
            *hits += 1;
            self.changed.notify_all();
        }
    }

    fn stall(&self, until: &Point, most: Duration) {
        let end = Instant::now() + most;
        let mut heard = self.heard();
        let before = heard.get(until.name).copied();
        while heard.get(until.name).copied() == before {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            heard = self.changed.wait_timeout(heard, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Injector for Registry {
    fn hit(&self, hit: &Hit) -> Effect {
        self.count(hit);
        let mut effect = Effect::Go;
        let mut late = Duration::ZERO;
        for (rule, random) in self.firing(hit) {
            log::debug!("injected at {:x?}, machine {}: {}", hit.at, hit.vm, rule.headline());
            let this = match &rule.effect {
                // Signals must go on to end the wait: so it is the deadline that moves.
                What::Delay(delay) if *hit.point == points::TIMER => {
                    late += *delay;
                    continue;
                }
                What::Delay(delay) => {
                    std::thread::sleep(*delay);
                    continue;
                }
                What::Stall(until, most) => {
                    self.stall(until, *most);
                    continue;
                }
                What::Error(errno) => Effect::Fail(*errno),
                What::Corrupt => Effect::Corrupt(random),
                What::Split => Effect::Split,
                What::Exit(reason) => Effect::Exit(*reason),
                What::Memory(memory, _) => match memory {
                    Memory::Sigbus => Effect::Memory(MemoryFault::Bus),
                    Memory::Poison => Effect::Memory(MemoryFault::Poison),
                    Memory::Revoke => Effect::Memory(MemoryFault::Revoke),
                    Memory::Flip => Effect::Memory(MemoryFault::Flip(random)),
                    Memory::Slow(latency) => Effect::Memory(MemoryFault::Slow(*latency)),
                    // With time only, where whoever makes time pass asks for the rules themselves.
                    Memory::Pressure(_) => continue,
                },
            };
            if effect == Effect::Go {
                effect = this;
            }
        }
        match effect {
            Effect::Go if !late.is_zero() => Effect::Late(late),
            effect => effect,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shadow_mmu::inject::Faults;

    fn registry(plan: &str) -> Arc<Registry> {
        Registry::new(&plan.parse().unwrap())
    }

    #[test]
    fn the_first_effect_wins_and_each_rule_is_accounted_for() {
        let registry = registry(
            "[[fault]]\npoint='punch'\nnth=2\nerror='EINTR'
             [[fault]]\npoint='punch'\ndelay='1us'
             [[fault]]\npoint='punch'\nerror='ENOSPC'
             [[fault]]\npoint='kick'\ndelay='1us'",
        );
        let faults = Faults::new(Arc::clone(&registry) as _);
        let errors: Vec<_> = (0..3).map(|_| faults.fail(&shadow_mmu::inject::PUNCH)).collect();
        assert_eq!(errors, [Some(libc::ENOSPC), Some(libc::EINTR), Some(libc::ENOSPC)]);
        let account = registry.account();
        let counts: Vec<_> = account.rules.iter().map(|rule| (rule.eligible, rule.fired)).collect();
        assert_eq!(counts, [(3, 1), (3, 3), (3, 3), (0, 0)]);
        assert_eq!(account.hits, BTreeMap::from([("punch".into(), 3)]));
    }

    #[test]
    fn a_stall_ends_with_its_point_or_its_limit() {
        let registry = registry("[[fault]]\npoint='punch'\nstall='kick'\nat-most='10s'");
        let faults = Faults::new(Arc::clone(&registry) as _);
        let released = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            let stalled = scope.spawn(|| {
                faults.hit(&shadow_mmu::inject::PUNCH);
                assert!(released.load(Ordering::SeqCst), "it did not wait");
            });
            while registry.account().hits.is_empty() {
                std::thread::yield_now();
            }
            std::thread::sleep(Duration::from_millis(20));
            released.store(true, Ordering::SeqCst);
            while !stalled.is_finished() {
                faults.hit(&points::KICK);
            }
        });
        let registry = self::registry("[[fault]]\npoint='punch'\nstall='kick'\nat-most='5ms'");
        let began = Instant::now();
        Faults::new(Arc::clone(&registry) as _).hit(&shadow_mmu::inject::PUNCH);
        assert!(began.elapsed() >= Duration::from_millis(5));
    }

    #[test]
    fn a_late_timer_is_a_later_deadline_and_no_wait() {
        let registry =
            registry("[[fault]]\npoint='timer'\ndelay='10s'\n[[fault]]\npoint='timer'\ndelay='5s'");
        let began = Instant::now();
        let effect = Faults::new(Arc::clone(&registry) as _).hit(&points::TIMER);
        assert_eq!(effect, Effect::Late(Duration::from_secs(15)));
        assert!(began.elapsed() < Duration::from_secs(5), "it waited itself");
    }

    #[test]
    fn time_is_counted_in_ticks() {
        let registry = registry("[[fault]]\npoint='punch'\nafter='30ms'\nerror='EINTR'");
        let faults = Faults::new(Arc::clone(&registry) as _);
        for _ in 0..2 {
            faults.hit(&points::TICK);
        }
        assert_eq!(faults.fail(&shadow_mmu::inject::PUNCH), None);
        faults.hit(&points::TICK);
        assert_eq!(faults.fail(&shadow_mmu::inject::PUNCH), Some(libc::EINTR));
    }
}
