// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The bundled `mix`, as a guest or as a process: what either side's scanner works on.

use super::mix::Content;
use crate::bench::told::Told;
use crate::vm::VmConfig;
use anyhow::{Context, Result, bail};
use shadow_mmu::addr::PAGE_SIZE;
use std::time::{Duration, Instant};

/// Longer than any command takes for a page: filling, comparing and being copied, with a fault each.
const PER_PAGE: Duration = Duration::from_millis(1);

/// Times of single writes, by the program's own clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct WriteTimes {
    pub(super) pages: u64,
    pub(super) median: Duration,
    pub(super) p99: Duration,
}

/// A running `mix`.
#[derive(Debug)]
pub(super) struct Program {
    told: Told,
    pages: u64,
}

impl Program {
    /// As a guest.
    ///
    /// # Errors
    /// What keeps umbra from running a guest.
    pub(super) fn guest(config: VmConfig, words: &[String], pages: u64) -> Result<Self> {
        Ok(Self { told: Told::guest(config, "mix", words, longest(pages))?, pages })
    }

    /// As a process.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn native(words: &[String], pages: u64) -> Result<Self> {
        Ok(Self { told: Told::native("mix", words, longest(pages))?, pages })
    }

    pub(super) fn pages(&self) -> u64 {
        self.pages
    }

    pub(super) fn told(&self) -> &Told {
        &self.told
    }

    /// Fills the memory with `content`, its own or what is loaded.
    ///
    /// # Errors
    /// The program ended.
    pub(super) fn fill(&mut self, content: &Content) -> Result<()> {
        match content.image.len() as u64 / PAGE_SIZE {
            0 => self.told.command("fill mix").map(drop),
            pages => {
                let command = format!("load {pages}");
                self.told.send(&command)?;
                self.told.send_bytes(&content.image)?;
                self.told.answer(&command).map(drop)
            }
        }
    }

    /// A command whose answer is of no interest.
    ///
    /// # Errors
    /// The program ended.
    pub(super) fn command(&mut self, command: &str) -> Result<()> {
        self.told.command(command).map(drop)
    }

    /// A command that is answered by a time: `T ns`, or that behind a comma.
    ///
    /// # Errors
    /// The program ended.
    pub(super) fn timed(&mut self, command: &str) -> Result<Duration> {
        let answer = self.told.command(command)?;
        let time = answer.split(", ").find_map(nanoseconds);
        time.with_context(|| format!("mix answered `{command}` with `{answer}`"))
    }

    /// Looks at every byte. A checksum of all.
    ///
    /// # Errors
    /// A page holds something else than was written to it: the program says which, and ends.
    pub(super) fn verify(&mut self) -> Result<String> {
        self.told.command("verify").context("the content is not what the program wrote")
    }

    /// Writes to `count` pages that equal others (`shared`) or none (`own`).
    ///
    /// # Errors
    /// The program ended.
    pub(super) fn write(&mut self, count: u64, which: &str) -> Result<WriteTimes> {
        let command = format!("write {count} {which}");
        let answer = self.told.command(&command)?;
        parse_writes(&answer).with_context(|| format!("mix answered `{command}` with `{answer}`"))
    }

    /// Lets it end, and looks at how.
    ///
    /// # Errors
    /// It did not end with status 0.
    pub(super) fn finish(self) -> Result<()> {
        self.told.finish()
    }
}

fn longest(pages: u64) -> Duration {
    PER_PAGE.saturating_mul(u32::try_from(pages).unwrap_or(u32::MAX))
}

/// `T ns`.
fn nanoseconds(text: &str) -> Option<Duration> {
    Some(Duration::from_nanos(text.strip_suffix(" ns")?.parse().ok()?))
}

/// `N pages, median T ns, p99 T ns`.
fn parse_writes(answer: &str) -> Option<WriteTimes> {
    let [pages, median, p99] = answer.split(", ").collect::<Vec<_>>().try_into().ok()?;
    Some(WriteTimes {
        pages: pages.strip_suffix(" pages")?.parse().ok()?,
        median: nanoseconds(median.strip_prefix("median ")?)?,
        p99: nanoseconds(p99.strip_prefix("p99 ")?)?,
    })
}

/// Whose pages are rewritten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rewritten {
    /// Anybody's.
    Any,
    /// Those that are like no other, so that as many pages as before can be saved.
    Own,
}

/// Lets a program rewrite a hundredth of its pages a second, a little each time it is asked.
#[derive(Debug)]
pub(super) struct Rewriter {
    began: Instant,
    rewritten: Rewritten,
    done: u64,
}

impl Rewriter {
    pub(super) fn new(rewritten: Rewritten) -> Self {
        Self { began: Instant::now(), rewritten, done: 0 }
    }

    /// What is due by now.
    ///
    /// # Errors
    /// The program ended.
    pub(super) fn tick(&mut self, program: &mut Program) -> Result<()> {
        let due = (program.pages as f64 / 100.0 * self.began.elapsed().as_secs_f64()) as u64;
        let count = due.saturating_sub(self.done);
        if count == 0 {
            return Ok(());
        }
        let whose = match self.rewritten {
            Rewritten::Any => "",
            Rewritten::Own => " own",
        };
        let command = format!("rewrite {count}{whose}");
        let answer = program.told.command(&command)?;
        if answer != format!("{count} pages") {
            bail!("mix answered `{command}` with `{answer}`: too few pages are like no other");
        }
        self.done = due;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

    use super::super::mix::Mix;
    use super::super::phases::{ScanPace, Side, wait_for_passes};
    use super::super::umbra::UmbraSide;
    use super::*;
    use shadow_mmu::ksm::KsmSettings;

    fn native(mix: &str, pages: u64) -> (Program, Content) {
        let content = Content::new(&Mix::parse(mix).unwrap(), pages, 7).unwrap();
        let mut program = Program::native(&content.words, pages).unwrap();
        program.fill(&content).unwrap();
        (program, content)
    }

    #[test]
    fn answers_are_understood() {
        let times = WriteTimes { pages: 3, median: Duration::from_nanos(20), p99: Duration::from_nanos(50) };
        assert_eq!(parse_writes("3 pages, median 20 ns, p99 50 ns"), Some(times));
        for bad in ["", "3 pages", "3 pages, median 20 ns", "3 pages, median 20, p99 50", "x pages, a, b"] {
            assert_eq!(parse_writes(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_program_holds_what_it_was_given() {
        for mix in ["zero=25,dup=50,unique=25", "image"] {
            let (mut program, _) = native(mix, 256);
            let first = program.verify().unwrap();
            program.command("rewrite 10").unwrap();
            let second = program.verify().unwrap();
            assert_ne!(first, second, "{mix}");
            let times = program.write(20, "shared").unwrap();
            assert!(times.pages == 20 && times.median <= times.p99, "{mix}: {times:?}");
            assert_ne!(program.verify().unwrap(), second, "{mix}");
            assert!(program.timed("work 2").unwrap() > Duration::ZERO);
            assert!(program.timed("poke 7").unwrap() > Duration::ZERO);
            program.finish().unwrap();
        }
    }

    #[test]
    fn the_same_bytes_are_in_both_places_merged_or_not() {
        if crate::engine::testing::guests().is_none() {
            return;
        }
        for mix in ["zero=25,dup=50,unique=25", "image"] {
            let (mut native, content) = native(mix, 512);
            let mut side = UmbraSide::start(&content.words, 512, KsmSettings::default()).unwrap();
            side.fill(&content).unwrap();
            side.scan(ScanPace::Full).unwrap();
            for _ in 0..5 {
                wait_for_passes(&mut side, 2, Duration::from_secs(60)).unwrap();
                assert_eq!(side.program().verify().unwrap(), native.verify().unwrap(), "{mix}");
                for program in [&mut native, side.program()] {
                    program.command("rewrite 40").unwrap();
                    program.write(10, "shared").unwrap();
                }
            }
            assert!(side.sample().unwrap().saved_pages > 0, "{mix}");
            side.finish().unwrap();
        }
    }

    #[test]
    fn pages_of_a_kind_run_out() {
        // Groups of 4, 4 and 2; of 4, 4, and one that is alone.
        for (mix, shared) in [("dup=50,unique=50", 10), ("dup=45,unique=55", 8)] {
            let (mut program, _) = native(mix, 20);
            assert_eq!(program.write(100, "shared").unwrap().pages, shared);
            assert_eq!(program.write(100, "own").unwrap().pages, 20);
        }
        let (mut program, _) = native("zero=100", 20);
        assert_eq!(program.write(1, "own").unwrap().pages, 0);
        let mut rewriter = Rewriter::new(Rewritten::Own);
        rewriter.began -= Duration::from_secs(10);
        assert!(rewriter.tick(&mut program).is_err());
    }
}
