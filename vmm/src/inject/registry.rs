// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One run's plan at work: every hit comes here, the rules are asked, and who is to wait waits.
//!
//! # Locks
//! None while a rule is asked; counters are atomics. A stalled thread waits on a condition variable of its own lock, a leaf, for
//! hits of the point that it is stalled until. Each wait has a limit, so that whatever locks the thread holds come back.

use super::plan::{After, Memory, Plan, Rule, What};
use super::rule::Watched;
use super::{Waits, points, regions};
use serde::{Deserialize, Serialize};
use shadow_mmu::inject::{Effect, Hit, Injector, MemoryEvent, MemoryFault, MemoryRule, Point, Where};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How much of the run a hit of `tick` stands for.
pub const TICK: Duration = points::TICK_TIME;

/// Lines that are kept of what was done to memory.
const NOTES: usize = 64;

/// The rules of one run, and what became of them.
#[derive(Debug)]
pub struct Registry {
    rules: Vec<Watched>,
    /// Hits of each point so far, in the order of [`points::all`].
    hits: Vec<(&'static Point, AtomicU64)>,
    /// How often each point was hit that some thread may be stalled until.
    heard: Mutex<BTreeMap<&'static str, u64>>,
    changed: Condvar,
    /// Ticks of each machine.
    ticks: Mutex<BTreeMap<u32, u64>>,
    /// The most that one has had.
    run_for: AtomicU64,
    notes: Mutex<Vec<String>>,
    waits: Arc<Waits>,
}

/// What became of a rule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
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
    /// What was done to memory, and where: the first of it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
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
            ticks: Mutex::default(),
            run_for: AtomicU64::new(0),
            notes: Mutex::default(),
            waits: Arc::default(),
            hits: points::all().map(|point| (point, AtomicU64::new(0))).collect(),
            rules,
        })
    }

    /// What the waits of the plan go by.
    pub fn waits(&self) -> &Arc<Waits> {
        &self.waits
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
        let notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Account { rules: rules.collect(), hits: hits.filter(|(_, hits)| *hits > 0).collect(), notes }
    }

    /// Whether some rule does something at `point`.
    pub fn uses(&self, point: &Point) -> bool {
        self.rules.iter().any(|watched| watched.rule.point == point)
    }

    /// The rules that do something at a hit, each with the number that its chances are made of. In the order of the plan.
    pub(super) fn firing(&self, hit: &Hit) -> impl Iterator<Item = (&Rule, u64)> {
        self.rules.iter().filter_map(|watched| Some((&watched.rule, watched.fires(hit)?)))
    }

    fn heard(&self) -> MutexGuard<'_, BTreeMap<&'static str, u64>> {
        // Nothing is done under the lock that leaves it half done.
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a hit, and tells rules and threads that wait for it.
    pub(super) fn count(&self, hit: &Hit) {
        if let Some((_, hits)) = self.hits.iter().find(|(point, _)| *point == hit.point) {
            hits.fetch_add(1, Ordering::Relaxed);
        }
        if *hit.point == points::TICK {
            // Guests that run side by side have the same time.
            let mut of_vms = self.ticks.lock().unwrap_or_else(PoisonError::into_inner);
            let ticks = of_vms.entry(hit.vm).or_insert(0);
            *ticks += 1;
            self.run_for.fetch_max(*ticks, Ordering::Relaxed);
        }
        let ticks = self.run_for.load(Ordering::Relaxed);
        let run_for = TICK.saturating_mul(ticks.try_into().unwrap_or(u32::MAX));
        self.rules.iter().for_each(|watched| watched.hear(hit, run_for));
        let mut heard = self.heard();
        if let Some(hits) = heard.get_mut(hit.point.name) {
            *hits += 1;
            self.changed.notify_all();
        }
    }

    fn stall(&self, until: &Point, most: Duration) {
        if self.waits.are_virtual() {
            // Who would hit the point waits for this thread.
            return self.waits.sleep(most);
        }
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
        self.decide(hit, &mut Vec::new())
    }

    fn hit_memory(&self, hit: &Hit) -> Vec<MemoryEvent> {
        let mut events = Vec::new();
        self.count(hit);
        self.decide(hit, &mut events);
        events
    }

    fn memory_rules(&self, vm: u32) -> Vec<MemoryRule> {
        let of_vm =
            self.rules.iter().map(|watched| &watched.rule).filter(|rule| rule.vm.is_none_or(|of| of == vm));
        of_vm.filter_map(|rule| memory_rule(rule, 0)).collect()
    }

    fn note(&self, vm: u32, line: &str) {
        log::debug!("machine {vm}: {line}");
        let mut notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
        if notes.len() < NOTES {
            notes.push(if vm == 0 { line.to_owned() } else { format!("machine {vm}: {line}") });
        }
    }

    fn counts_time(&self) -> bool {
        self.rules.iter().any(|Watched { rule, .. }| {
            rule.point == &points::TICK
                || rule.after == Some(After::Point(&points::TICK))
                || matches!(rule.effect, What::Stall(until, _) if until == &points::TICK)
                || matches!(rule.after, Some(After::Time(_)))
                || matches!(rule.effect, What::Memory(_, Some(_)) | What::Memory(Memory::Slow(_), _))
        })
    }
}

/// What `rule` does to memory, if it does.
fn memory_rule(rule: &Rule, random: u64) -> Option<MemoryRule> {
    let What::Memory(memory, hold) = rule.effect else { return None };
    let fault = match memory {
        Memory::Sigbus => MemoryFault::Bus,
        Memory::Poison => MemoryFault::Poison,
        Memory::Revoke => MemoryFault::Revoke,
        Memory::Flip => MemoryFault::Flip(random),
        Memory::Slow(latency) => MemoryFault::Slow(latency),
        Memory::Pressure(thousandths) => MemoryFault::Pressure(thousandths),
    };
    let region = rule.what.as_deref().and_then(regions::named);
    let at = match (rule.at, region) {
        (Some(range), _) => Where::At(range),
        (None, Some(region)) => Where::Region(region),
        (None, None) => Where::Anywhere,
    };
    Some(MemoryRule { point: rule.point, fault, at, hold })
}

impl Registry {
    /// What a hit comes to, but for what happens to memory, which goes to `memory`. Waits.
    fn decide(&self, hit: &Hit, memory: &mut Vec<MemoryEvent>) -> Effect {
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
                    self.waits.sleep(*delay);
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
                What::Memory(..) => {
                    memory.extend(memory_rule(rule, random).map(|rule| MemoryEvent { rule, random }));
                    continue;
                }
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
    fn waits_are_jumps_of_virtual_time_where_that_is_given() {
        let registry = registry(
            "[[fault]]\npoint='punch'\nnth=1\ndelay='10s'
             [[fault]]\npoint='punch'\nnth=2\nstall='kick'\nat-most='9s'",
        );
        let clock = Arc::<crate::deterministic::VirtualClock>::default();
        registry.waits().go_by(&clock);
        let faults = Faults::new(Arc::clone(&registry) as _);
        let times = [10, 19, 19].map(Duration::from_secs);
        for time in times {
            faults.hit(&shadow_mmu::inject::PUNCH);
            assert_eq!(clock.elapsed(), time);
        }
    }

    #[test]
    fn late_timers_add_up_to_one_later_deadline() {
        let registry =
            registry("[[fault]]\npoint='timer'\ndelay='10s'\n[[fault]]\npoint='timer'\ndelay='5s'");
        let effect = Faults::new(Arc::clone(&registry) as _).hit(&points::TIMER);
        assert_eq!(effect, Effect::Late(Duration::from_secs(15)));
    }

    #[test]
    fn everything_that_happens_to_memory_at_a_hit_happens() {
        let registry = registry(
            "[[fault]]\npoint='page'\nat='heap'\nmemory='poison'\nhold='1s'
             [[fault]]\npoint='page'\nat='0x1000-0x3000'\nmemory='slow'\nlatency='1ms'
             [[fault]]\npoint='tick'\nvm=1\nat='stack'\nmemory='revoke'
             [[fault]]\npoint='page'\ndelay='1us'",
        );
        let faults = Faults::new(Arc::clone(&registry) as _);
        let at = |at: u64, region| -> Vec<_> {
            let events = faults.hit_memory(&points::PAGE, Some(at), Some(region));
            events.into_iter().map(|event| (event.rule.fault, event.rule.hold)).collect()
        };
        let (poison, slow) = (
            (MemoryFault::Poison, Some(Duration::from_secs(1))),
            (MemoryFault::Slow(Duration::from_millis(1)), None),
        );
        assert_eq!(at(0x2fff, "heap"), [poison, slow]);
        assert_eq!(at(0x3000, "heap"), [poison]);
        assert_eq!(at(0x1000, "stack"), [slow]);
        assert_eq!(at(0, "image"), []);
        assert!(faults.hit_memory(&points::TICK, None, None).is_empty(), "another machine's");
        let other = faults.of_vm(1).hit_memory(&points::TICK, None, None);
        assert_eq!(other.iter().map(|event| event.rule.at).collect::<Vec<_>>(), [Where::Region("stack")]);
        assert_eq!((faults.memory_rules().len(), faults.of_vm(1).memory_rules().len()), (2, 3));
        assert_eq!(registry.account().hits["page"], 4);
    }

    #[test]
    fn who_needs_no_time_gets_no_ticks() {
        let counts =
            |rule: &str| registry(&format!("allow-corruption=true\n[[fault]]\n{rule}")).counts_time();
        for rule in [
            "point='tick'\nmemory='poison'",
            "point='punch'\nafter='30ms'\nerror='EINTR'",
            "point='page'\nmemory='revoke'\nhold='1s'",
            "point='page'\nmemory='slow'\nlatency='1ms'",
            "point='punch'\nafter='tick'\nerror='EINTR'",
            "point='punch'\nstall='tick'",
        ] {
            assert!(counts(rule), "{rule}");
        }
        for rule in
            ["point='page'\nmemory='revoke'", "point='page'\nmemory='flip'", "point='punch'\nerror='EINTR'"]
        {
            assert!(!counts(rule), "{rule}");
        }
    }

    #[test]
    fn machines_that_run_side_by_side_have_one_time() {
        let registry = registry("[[fault]]\npoint='punch'\nafter='30ms'\nerror='EINTR'");
        let faults = Faults::new(Arc::clone(&registry) as _);
        for _ in 0..2 {
            faults.hit(&points::TICK);
            faults.of_vm(1).hit(&points::TICK);
        }
        assert_eq!(faults.fail(&shadow_mmu::inject::PUNCH), None);
        faults.of_vm(1).hit(&points::TICK);
        assert_eq!(faults.fail(&shadow_mmu::inject::PUNCH), Some(libc::EINTR));
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
