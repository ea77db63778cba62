// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The language of plans: TOML, read strictly. Whatever is not understood is an error that names the line and says what could
//! stand there.
//!
//! ```toml
//! seed = 7                    # of what is random in it; 0 if not given
//! allow-corruption = true     # without it nothing is corrupted
//!
//! [[fault]]
//! point = "syscall"           # where; `umbra inject --list`
//! call = "mmap"               # which: a system call, or an event of the notifier (event = "unmap")
//! vm = 0                      # whose, where there are several guests
//! at = "0x10000-0x20000"      # which page, where the point has an address; or "heap", "stack", "image", "mappings"
//! nth = 5                     # when: the fifth hit; or every = 3; or probability = 0.1; every hit otherwise
//! after = "100ms"             # not before: a time of the run, or a point that was hit
//! times = 1                   # how often: 1 if nth is given, without end otherwise
//! error = "ENOMEM"            # what, one of: error, delay, stall, corrupt, split, exit, memory
//! ```
//!
//! What happens: `error = "ENOMEM"`; `delay = "10ms"`; `stall = "notifier-end"`, until that point is hit or `at-most = "1s"` is over;
//! `corrupt = true`; `split = true`; `exit = "shutdown"`; `memory = "sigbus"`, `"poison"`, `"revoke"`, `"flip"`, `"slow"` with
//! `latency = "100us"`, `"pressure"` with `take = "25%"`; all but flip and slow may have `hold = "1s"`, after
//! which it is over. With `at` by address, a `tick` does it to all of that range; otherwise to one page that is in memory, by chance.

use super::points;
use super::words;
use crate::cli::parse;
use crate::guest::call_name;
use serde::{Deserialize, Serialize};
use shadow_mmu::addr::HvaRange;
use shadow_mmu::inject::{Addressed, Effects, Outcome, Point, Scope};
use std::fmt::Write;
use std::str::FromStr;
use std::time::Duration;
use toml::Spanned;

/// The longest time that one hit may wait.
const LONGEST_WAIT: Duration = Duration::from_secs(10);
/// How long a stall waits for its point if the plan does not say.
const STALL: Duration = Duration::from_secs(1);

/// A plan that cannot be followed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}{what}", Line(.line))]
pub struct PlanError {
    /// Where, counted from 1.
    pub line: Option<usize>,
    /// What is wrong, and what could stand there.
    pub what: String,
}

struct Line<'a>(&'a Option<usize>);

impl std::fmt::Display for Line<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.map_or(Ok(()), |line| write!(f, "line {line}: "))
    }
}

/// What goes wrong in a run.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// Of what is random.
    pub seed: u64,
    /// In the order of the file: where several fire, waits add up, and the first that does something else wins.
    pub rules: Vec<Rule>,
}

/// Which of a rule's hits fire.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Pick {
    /// All.
    All,
    /// This one and those after it.
    From(u64),
    /// Each that is a multiple.
    Every(u64),
    /// Each with this probability, 0 to 1.
    Probability(f64),
}

/// What a rule waits for before it looks at hits.
#[derive(Debug, Clone, PartialEq)]
pub enum After {
    /// So much of the run, in ticks of ten milliseconds.
    Time(Duration),
    /// A hit of this point.
    Point(&'static Point),
}

/// What happens when a rule fires.
#[derive(Debug, Clone, PartialEq)]
pub enum What {
    /// The outside answers with this error number.
    Error(i32),
    /// The thread waits.
    Delay(Duration),
    /// It waits until the point is hit, so long at most.
    Stall(&'static Point, Duration),
    /// A bit flips.
    Corrupt,
    /// It is done in parts.
    Split,
    /// KVM's exit reason.
    Exit(u32),
    /// Something happens to memory, and is over after this time, if there is one.
    Memory(Memory, Option<Duration>),
}

/// What happens to memory of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Memory {
    /// SIGBUS, `BUS_ADRERR`.
    Sigbus,
    /// SIGBUS, `BUS_MCEERR_AR`, and the content is lost.
    Poison,
    /// SIGSEGV, `SEGV_ACCERR`.
    Revoke,
    /// A bit flips.
    Flip,
    /// So much time for each fetch.
    Slow(Duration),
    /// So many thousandths of the pool are somebody else's.
    Pressure(u32),
}

/// One `[[fault]]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Rule {
    /// Where.
    pub point: &'static Point,
    /// Which system call or event of the notifier; which of [`regions`](super::regions).
    pub what: Option<String>,
    /// Which machine; any if none is given.
    pub vm: Option<u32>,
    /// Which addresses.
    pub at: Option<HvaRange>,
    /// Which hits.
    pub pick: Pick,
    /// Not before this.
    pub after: Option<After>,
    /// How often at most.
    pub times: Option<u64>,
    /// What happens.
    pub effect: What,
}

/// A `[[fault]]` as it is written.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct RawRule {
    point: String,
    call: Option<toml::Value>,
    event: Option<String>,
    vm: Option<u32>,
    at: Option<String>,
    nth: Option<u64>,
    every: Option<u64>,
    probability: Option<f64>,
    after: Option<String>,
    times: Option<u64>,
    error: Option<String>,
    delay: Option<String>,
    stall: Option<String>,
    at_most: Option<String>,
    corrupt: Option<bool>,
    split: Option<bool>,
    exit: Option<String>,
    memory: Option<String>,
    latency: Option<String>,
    take: Option<String>,
    hold: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct RawPlan {
    #[serde(default)]
    seed: u64,
    #[serde(default)]
    allow_corruption: bool,
    #[serde(default)]
    fault: Vec<Spanned<RawRule>>,
}

/// The same, to be written.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct WrittenPlan {
    seed: u64,
    allow_corruption: bool,
    fault: Vec<RawRule>,
}

impl FromStr for Plan {
    type Err = PlanError;

    fn from_str(text: &str) -> Result<Self, PlanError> {
        let line = |at: usize| Some(text.get(..at).unwrap_or(text).lines().count().max(1));
        let raw: RawPlan = toml::from_str(text).map_err(|error| PlanError {
            line: error.span().and_then(|span| line(span.start + 1)),
            what: error.message().to_owned(),
        })?;
        if raw.fault.is_empty() {
            return Err(PlanError {
                line: None,
                what: "there is no [[fault]] in it: nothing would happen".into(),
            });
        }
        let mut rules = Vec::with_capacity(raw.fault.len());
        for fault in raw.fault {
            let at = fault.span().start;
            let rule = rule(fault.into_inner()).and_then(|rule| match rule.effect {
                What::Corrupt | What::Memory(Memory::Flip, _) if !raw.allow_corruption => Err(
                    "it corrupts data: say `allow-corruption = true` at the top of the plan if that is meant"
                        .into(),
                ),
                _ => Ok(rule),
            });
            rules.push(rule.map_err(|what| PlanError { line: line(at + 1), what })?);
        }
        Ok(Self { seed: raw.seed, rules })
    }
}

/// What a point offers, as a list for people.
fn offers(point: &Point) -> String {
    let mut offered: Vec<String> = Vec::new();
    if !point.errors.is_empty() {
        let names: Vec<_> = point.errors.iter().map(|(errno, _)| words::errno_name(*errno)).collect();
        offered.push(format!("error ({})", names.join(", ")));
    }
    offered.extend(words::effect_names(point).map(Into::into));
    offered.join(", ")
}

fn point(name: &str) -> Result<&'static Point, String> {
    points::find(name).ok_or_else(|| {
        let names: Vec<_> = points::all().map(|point| point.name).collect();
        format!("there is no point `{name}`; there are: {}", names.join(", "))
    })
}

fn wait(text: &str) -> Result<Duration, String> {
    let wait = parse::duration(text)?;
    if wait > LONGEST_WAIT {
        return Err(format!("{text} is longer than one hit may wait, {}s", LONGEST_WAIT.as_secs()));
    }
    Ok(wait)
}

/// At most one of these is given.
fn one_of<const N: usize>(given: [(&str, bool); N]) -> Result<(), String> {
    let names: Vec<_> =
        given.iter().filter(|(_, given)| *given).map(|(name, _)| format!("`{name}`")).collect();
    match names.as_slice() {
        [] | [_] => Ok(()),
        _ => Err(format!("{} do not go together: give one of them", names.join(" and "))),
    }
}

fn rule(raw: RawRule) -> Result<Rule, String> {
    let point = point(&raw.point)?;
    let what = match (&raw.call, &raw.event) {
        (None, None) => None,
        (Some(call), None) if point == &points::SYSCALL => Some(match call {
            toml::Value::Integer(number) => {
                let name = u64::try_from(*number).ok().and_then(call_name);
                name.ok_or_else(|| format!("umbra has no system call {number}"))?.to_owned()
            }
            toml::Value::String(name) if crate::guest::call_names().any(|known| known == name) => {
                name.clone()
            }
            other => return Err(format!("umbra has no system call {other}: give its name or its number")),
        }),
        (None, Some(event)) if [&points::NOTIFIER_START, &points::NOTIFIER_END].contains(&point) => {
            if !super::listener::event_names().any(|known| known == event) {
                let names: Vec<_> = super::listener::event_names().collect();
                return Err(format!("there is no event `{event}`; there are: {}", names.join(", ")));
            }
            Some(event.clone())
        }
        (Some(_), _) => return Err("`call` is for the point `syscall` only".into()),
        (_, Some(_)) => {
            return Err("`event` is for the points `notifier-start` and `notifier-end` only".into());
        }
    };
    let region = raw.at.as_deref().and_then(super::regions::named);
    let at = match region {
        Some(_) => None,
        None => raw.at.as_deref().map(words::range).transpose()?,
    };
    if region.is_some() && ![&points::PAGE, &points::TICK].contains(&point) {
        return Err("`at` by name is for the points `page` and `tick` only: give an address".into());
    }
    let what = region.map(str::to_owned).or(what);
    if at.is_some() && point.addressed == Addressed::No && point != &points::TICK {
        return Err(format!("hits of `{}` have no address: leave `at` out", point.name));
    }
    if raw.vm.is_some_and(|vm| vm > 0) && point.scope == Scope::Pool {
        return Err(format!("`{}` is the pool's, which guests share: leave `vm` out", point.name));
    }
    one_of([
        ("nth", raw.nth.is_some()),
        ("every", raw.every.is_some()),
        ("probability", raw.probability.is_some()),
    ])?;
    let pick = match (raw.nth, raw.every, raw.probability) {
        (Some(0), ..) | (_, Some(0), _) => return Err("hits are counted from 1".into()),
        (Some(nth), ..) => Pick::From(nth),
        (_, Some(every), _) => Pick::Every(every),
        (.., Some(p)) if (0.0..=1.0).contains(&p) => Pick::Probability(p),
        (.., Some(p)) => return Err(format!("{p} is no probability: it lies between 0 and 1")),
        _ => Pick::All,
    };
    let after = match raw.after.as_deref() {
        None => None,
        Some(text) if text.starts_with(|c: char| c.is_ascii_digit()) => {
            Some(After::Time(parse::duration(text)?))
        }
        Some(name) => Some(After::Point(self::point(name)?)),
    };
    let effect = effect(&raw, point)?;
    if point == &points::TICK && raw.at.is_some() && !matches!(effect, What::Memory(..)) {
        return Err("hits of `tick` have no address: `at` is for what happens to memory".into());
    }
    if matches!(effect, What::Memory(Memory::Pressure(_), _)) && raw.at.is_some() {
        return Err("pressure is on all of the memory: leave `at` out".into());
    }
    let times = raw.times.or(raw.nth.map(|_| 1));
    Ok(Rule { point, what, vm: raw.vm, at, pick, after, times, effect })
}

fn effect(raw: &RawRule, point: &'static Point) -> Result<What, String> {
    let given = [
        ("error", raw.error.is_some()),
        ("delay", raw.delay.is_some()),
        ("stall", raw.stall.is_some()),
        ("corrupt", raw.corrupt == Some(true)),
        ("split", raw.split == Some(true)),
        ("exit", raw.exit.is_some()),
        ("memory", raw.memory.is_some()),
    ];
    one_of(given)?;
    let belongs = [
        ("at-most", raw.at_most.is_some(), raw.stall.is_some(), "stall"),
        ("latency", raw.latency.is_some(), raw.memory.as_deref() == Some("slow"), "memory = \"slow\""),
        ("take", raw.take.is_some(), raw.memory.as_deref() == Some("pressure"), "memory = \"pressure\""),
        (
            "hold",
            raw.hold.is_some(),
            raw.memory.as_deref().is_some_and(|it| it != "flip" && it != "slow"),
            "memory",
        ),
    ];
    if let Some((name, .., with)) = belongs.iter().find(|(_, given, with, _)| *given && !with) {
        return Err(format!("`{name}` goes with `{with}`"));
    }
    let Some((name, _)) = given.iter().find(|(_, given)| *given) else {
        return Err(format!("it does not say what is to happen; `{}` offers {}", point.name, offers(point)));
    };
    let not_here = || format!("`{name}` cannot be had at `{}`, which offers {}", point.name, offers(point));
    let offered = |effect: Effects| if point.effects.contains(effect) { Ok(()) } else { Err(not_here()) };
    Ok(match *name {
        "error" => {
            let text = raw.error.as_deref().unwrap_or_default();
            let errno =
                words::errno(text).filter(|errno| point.errors.iter().any(|(known, _)| known == errno));
            What::Error(errno.ok_or_else(|| {
                format!("`{text}` is no error that `{}` has; it offers {}", point.name, offers(point))
            })?)
        }
        "delay" => {
            offered(Effects::DELAY)?;
            What::Delay(wait(raw.delay.as_deref().unwrap_or_default())?)
        }
        "stall" => {
            offered(Effects::STALL)?;
            let until = self::point(raw.stall.as_deref().unwrap_or_default())?;
            What::Stall(until, raw.at_most.as_deref().map_or(Ok(STALL), wait)?)
        }
        "corrupt" => offered(Effects::CORRUPT).map(|()| What::Corrupt)?,
        "split" => offered(Effects::SPLIT).map(|()| What::Split)?,
        "exit" => {
            offered(Effects::EXIT)?;
            let text = raw.exit.as_deref().unwrap_or_default();
            What::Exit(words::exit(text).ok_or_else(|| {
                let names: Vec<_> = words::exit_names().collect();
                format!("`{text}` is no exit; there are: {}", names.join(", "))
            })?)
        }
        _ => {
            offered(Effects::MEMORY)?;
            let hold = raw.hold.as_deref().map(parse::duration).transpose()?;
            What::Memory(memory(raw, point)?, hold)
        }
    })
}

fn memory(raw: &RawRule, point: &Point) -> Result<Memory, String> {
    Ok(match raw.memory.as_deref().unwrap_or_default() {
        "sigbus" => Memory::Sigbus,
        "poison" => Memory::Poison,
        "revoke" => Memory::Revoke,
        "flip" => Memory::Flip,
        "slow" if point == &points::TICK => {
            return Err(
                "memory is slow when it is accessed: use the point `page`, with `after` if need be".into()
            );
        }
        "slow" => Memory::Slow(wait(
            raw.latency.as_deref().ok_or("slow memory needs a `latency`, as in \"100us\"")?,
        )?),
        "pressure" if point != &points::TICK => {
            return Err("pressure comes with time: use the point `tick`".into());
        }
        "pressure" => Memory::Pressure(words::share(
            raw.take.as_deref().ok_or("pressure needs `take`, as in \"25%\"")?,
        )?),
        other => {
            return Err(format!(
                "memory = `{other}` is not known; there are: sigbus, poison, revoke, flip, slow, pressure"
            ));
        }
    })
}

impl Rule {
    /// What it may come to when it fires.
    pub fn outcome(&self) -> Outcome {
        match &self.effect {
            What::Delay(_) | What::Stall(..) | What::Split => Outcome::Unseen,
            What::Memory(Memory::Slow(_), _) => Outcome::Unseen,
            What::Error(errno) => {
                let known = self.point.errors.iter().find(|(known, _)| known == errno);
                known.map_or(self.point.outcome, |(_, outcome)| *outcome)
            }
            What::Corrupt | What::Exit(_) | What::Memory(..) => self.point.outcome,
        }
    }

    /// Whether data may be wrong after it, without anybody saying so.
    pub fn corrupts(&self) -> bool {
        matches!(self.effect, What::Corrupt | What::Memory(Memory::Flip, _))
    }

    /// Whether an access to memory may come to something else after it, or find something else.
    pub fn changes_memory(&self) -> bool {
        let changes = |memory: &Memory| !matches!(memory, Memory::Slow(_) | Memory::Pressure(_));
        matches!(&self.effect, What::Memory(memory, _) if changes(memory))
    }

    fn written(&self) -> RawRule {
        let mut raw = RawRule { point: self.point.name.into(), vm: self.vm, ..RawRule::default() };
        match (&self.what, self.point == &points::SYSCALL) {
            (Some(call), true) => raw.call = Some(toml::Value::String(call.clone())),
            (what, _) if [&points::PAGE, &points::TICK].contains(&self.point) => raw.at.clone_from(what),
            (event, _) => raw.event.clone_from(event),
        }
        if let Some(range) = self.at {
            raw.at = Some(words::range_text(range));
        }
        match self.pick {
            Pick::All => {}
            Pick::From(nth) => raw.nth = Some(nth),
            Pick::Every(every) => raw.every = Some(every),
            Pick::Probability(p) => raw.probability = Some(p),
        }
        raw.after = self.after.as_ref().map(|after| match after {
            After::Time(time) => words::duration_text(*time),
            After::Point(point) => point.name.into(),
        });
        raw.times = self.times;
        let text = |duration: &Duration| Some(words::duration_text(*duration));
        match &self.effect {
            What::Error(errno) => raw.error = Some(words::errno_name(*errno)),
            What::Delay(delay) => raw.delay = text(delay),
            What::Stall(until, most) => (raw.stall, raw.at_most) = (Some(until.name.into()), text(most)),
            What::Corrupt => raw.corrupt = Some(true),
            What::Split => raw.split = Some(true),
            What::Exit(reason) => raw.exit = Some(words::exit_name(*reason).into()),
            What::Memory(memory, hold) => {
                raw.hold = hold.as_ref().and_then(text);
                raw.memory = Some(
                    match memory {
                        Memory::Sigbus => "sigbus",
                        Memory::Poison => "poison",
                        Memory::Revoke => "revoke",
                        Memory::Flip => "flip",
                        Memory::Slow(latency) => {
                            raw.latency = text(latency);
                            "slow"
                        }
                        Memory::Pressure(thousandths) => {
                            raw.take = Some(format!("{}%", f64::from(*thousandths) / 10.0));
                            "pressure"
                        }
                    }
                    .into(),
                );
            }
        }
        raw
    }

    /// The rule in one line: what happens where.
    pub fn headline(&self) -> String {
        let mut line = format!("{}: ", self.point.name);
        if let Some(what) = &self.what {
            line.insert_str(line.len() - 2, &format!(" {what}"));
        }
        let effect = match &self.effect {
            What::Error(errno) => words::errno_name(*errno),
            What::Delay(delay) => format!("a delay of {}", words::duration_text(*delay)),
            What::Stall(until, most) => {
                format!("a stall until {}, {} at most", until.name, words::duration_text(*most))
            }
            What::Corrupt => "a flipped bit".into(),
            What::Split => "done in parts".into(),
            What::Exit(reason) => format!("exit {}", words::exit_name(*reason)),
            What::Memory(memory, _) => format!("memory {memory:?}").to_lowercase(),
        };
        let _ = write!(line, "{effect}");
        line
    }
}

impl Plan {
    /// The plan as text that [`from_str`](Self::from_str) reads.
    ///
    /// # Errors
    /// TOML cannot hold it: a seed beyond 63 bits.
    pub fn to_toml(&self) -> Result<String, PlanError> {
        let written = WrittenPlan {
            seed: self.seed,
            allow_corruption: self.rules.iter().any(Rule::corrupts),
            fault: self.rules.iter().map(Rule::written).collect(),
        };
        toml::to_string(&written).map_err(|error| PlanError { line: None, what: error.to_string() })
    }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
