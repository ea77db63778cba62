// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A case: one run of a campaign, with all that it depends on.

use super::super::Plan;
use super::program::Program;
use crate::engine::EngineChoice;
use std::fmt::Write;

/// How writes are logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dirty {
    /// `--dirty-log bitmap`, by the CPU's Dirty bits.
    Bits,
    /// `--dirty-log bitmap`, by faults.
    Protect,
    /// `--dirty-log ring:128`, which is full all the time.
    Ring,
}

/// The options of `umbra run`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// `--engine`, if it is given. It is not drawn.
    pub engine: Option<EngineChoice>,
    /// MiB for each guest.
    pub memory: u64,
    /// `--fault-around`.
    pub fault_around: &'static str,
    /// How many guests there are, 1 to 64. Several cannot be aged and their writes not be logged.
    pub guests: u8,
    /// MiB for all of several guests, where they share less than `guests` times `memory`.
    pub pool: Option<u64>,
    /// `--ksm`'s list.
    pub ksm: Option<&'static str>,
    /// `--age`, in milliseconds.
    pub age: Option<u64>,
    /// `--ad-bits`.
    pub ad_bits: &'static str,
    /// Whether and how writes are logged.
    pub dirty: Option<Dirty>,
    /// `--deterministic`, with this seed. Only a single guest whose writes are not logged has that.
    pub deterministic: Option<u64>,
}

impl Default for Settings {
    /// Nothing but what every case has.
    fn default() -> Self {
        Self {
            engine: None,
            memory: 64,
            fault_around: "adaptive",
            guests: 1,
            pool: None,
            ksm: None,
            age: None,
            ad_bits: "on",
            dirty: None,
            deterministic: None,
        }
    }
}

impl Settings {
    /// The options, as words of the command line; without the program.
    pub fn words(&self) -> Vec<String> {
        let mut line = format!("--check --memory {}M --fault-around {}", self.memory, self.fault_around);
        // Writing to a string cannot fail.
        let _ = || -> std::fmt::Result {
            if let Some(engine) = self.engine {
                write!(line, " --engine {engine}")?;
            }
            if self.guests > 1 {
                write!(line, " --guests {}", self.guests)?;
            }
            if let Some(pool) = self.pool {
                write!(line, " --pool {pool}M")?;
            }
            if let Some(ksm) = self.ksm {
                write!(line, " --ksm={ksm}")?;
            }
            if let Some(age) = self.age {
                write!(line, " --age {age}ms")?;
            }
            if self.ad_bits != "on" {
                write!(line, " --ad-bits {}", self.ad_bits)?;
            }
            if let Some(seed) = self.deterministic {
                write!(line, " --deterministic --seed {seed}")?;
            }
            match self.dirty {
                None => Ok(()),
                Some(Dirty::Bits) => write!(line, " --dirty-rate=5ms"),
                Some(Dirty::Protect) => write!(line, " --dirty-rate=5ms --dirty-method write-protect"),
                Some(Dirty::Ring) => write!(line, " --dirty-rate=5ms --dirty-log ring:128"),
            }
        }();
        line.split_whitespace().map(Into::into).collect()
    }
}

/// One run of a campaign.
#[derive(Debug, Clone, PartialEq)]
pub struct Case {
    /// Its number in the campaign, from 0.
    pub number: u64,
    /// What is run.
    pub program: Program,
    /// How.
    pub settings: Settings,
    /// What goes wrong meanwhile.
    pub plan: Plan,
}

impl Case {
    /// `run` and what follows it, as words of the command line.
    pub fn words(&self) -> Vec<String> {
        let mut words = vec!["run".to_owned()];
        words.extend(self.settings.words());
        // A flipped bit may send a program into a loop for ever; that umbra ends it is what is to be seen then.
        if self.plan.rules.iter().any(super::super::Rule::corrupts) {
            words.extend(["--timeout".to_owned(), "3s".to_owned()]);
        }
        words.push(self.program.image.to_owned());
        words.extend(self.program.args.iter().cloned());
        words
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_words_of_the_command_line() {
        let all = Settings {
            engine: Some(EngineChoice::Ptrace),
            memory: 32,
            fault_around: "64K",
            guests: 2,
            pool: Some(48),
            ksm: Some("all"),
            age: Some(5),
            ad_bits: "off",
            dirty: Some(Dirty::Ring),
            deterministic: None,
        };
        assert_eq!(
            all.words().join(" "),
            "--check --memory 32M --fault-around 64K --engine ptrace --guests 2 --pool 48M --ksm=all --age 5ms \
             --ad-bits off --dirty-rate=5ms --dirty-log ring:128"
        );
        let deterministic = Settings { deterministic: Some(17), ..Settings::default() };
        assert!(deterministic.words().join(" ").ends_with(" --deterministic --seed 17"));
        assert_eq!(Settings::default().words().join(" "), "--check --memory 64M --fault-around adaptive");
    }
}
