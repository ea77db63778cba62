// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A campaign at work: several cases at a time, each taken by whoever is free, until all are judged or somebody says stop.
//!
//! Who finds a failure shrinks it, while the others go on. The thread that started the campaign counts, and tells how far it is.

use super::case::Case;
use super::draw::Deck;
use super::judge::{Ending, Failure, Judge};
use super::keep::{command, keep};
use super::native::Natives;
use super::report::{FailedRun, Progress, Summary};
use super::run::{Observed, RunReport, Runner};
use super::shrink::{Failed, Shrunk, Tried, shrink};
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

/// Failures that are shrunk. Where there are more, they are most likely the same.
const SHRUNK: u64 = 10;
/// Between looks whether there is something to tell.
const TURN: Duration = Duration::from_millis(100);

/// A campaign that is to be run.
#[derive(Debug)]
pub struct Campaign<'a> {
    /// What cases are drawn from.
    pub deck: Deck,
    /// Number of the first case.
    pub first: u64,
    /// How many there are.
    pub runs: u64,
    /// How many are run at a time; at least one is.
    pub jobs: usize,
    /// How long each may take.
    pub limit: Duration,
    /// Where failures are kept; it is only made if there is one.
    pub keep: PathBuf,
    /// umbra, as an absolute path.
    pub umbra: PathBuf,
    /// Who says whether a run was right.
    pub judge: Judge,
    /// Set by anybody: all ends soon, and what was judged by then is told.
    pub stop: &'a AtomicBool,
}

/// What a worker tells.
enum News {
    /// A case was judged.
    Judged(Box<Case>, Option<RunReport>, Result<Ending, Failure>),
    /// Its failure was looked into.
    Shrunk(Box<FailedRun>),
    /// It could not be run.
    Broken(anyhow::Error),
}

/// A folder that is removed when it is dropped.
#[derive(Debug)]
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("umbra-campaign-{}-{number}", std::process::id());
        let folder = std::env::temp_dir().join(name);
        fs::create_dir(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        Ok(Self(folder))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            log::warn!("cannot remove {}: {error}", self.0.display());
        }
    }
}

impl Campaign<'_> {
    /// Runs it. `tell` is called several times a second, by the calling thread.
    ///
    /// # Errors
    /// The campaign could not be done: no process, no folder, a program that fails natively. What cases came to is no error.
    pub fn run(&self, tell: &mut dyn FnMut(&Progress)) -> Result<Summary> {
        let began = Instant::now();
        let scratch = Scratch::new()?;
        let natives = Natives::new(&scratch.0)?;
        let mut summary = Summary::new(self.deck.seed, self.first, self.runs);
        let (next, to_shrink) = (AtomicU64::new(0), AtomicU64::new(SHRUNK));
        let mut broken = None;
        let mut wrong = 0;
        std::thread::scope(|scope| {
            let (tells, news) = channel();
            for number in 0..self.jobs.max(1) {
                let folder = scratch.0.join(format!("job-{number}"));
                let (tells, natives, next, to_shrink) = (tells.clone(), &natives, &next, &to_shrink);
                scope.spawn(move || {
                    let runner = Runner { umbra: &self.umbra, folder, limit: self.limit, stop: self.stop };
                    let worker = Worker { campaign: self, runner, natives, tells: &tells };
                    while !self.stop.load(Ordering::Relaxed) {
                        let index = next.fetch_add(1, Ordering::Relaxed);
                        if index >= self.runs {
                            break;
                        }
                        if let Err(error) = worker.case(self.first.wrapping_add(index), to_shrink) {
                            // Nobody listens any more if the receiver is gone.
                            let _ = tells.send(News::Broken(error));
                            break;
                        }
                    }
                });
            }
            drop(tells);
            loop {
                match news.recv_timeout(TURN) {
                    Ok(News::Judged(case, report, verdict)) => {
                        summary.count(&case, report.as_ref(), verdict.as_ref().ok().copied());
                        wrong += u64::from(verdict.is_err());
                    }
                    Ok(News::Shrunk(failed)) => summary.failures.push(*failed),
                    Ok(News::Broken(error)) => {
                        self.stop.store(true, Ordering::Relaxed);
                        broken.get_or_insert(error);
                    }
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => break,
                }
                tell(&Progress {
                    runs: summary.runs,
                    asked: self.runs,
                    failures: wrong,
                    covered: summary.covered(),
                    took: began.elapsed(),
                });
            }
        });
        if let Some(error) = broken {
            return Err(error);
        }
        summary.interrupted = summary.runs < self.runs;
        summary.seconds = began.elapsed().as_secs_f64();
        summary.failures.sort_by_key(|failed| failed.run);
        Ok(summary)
    }
}

/// One of the threads.
struct Worker<'a> {
    campaign: &'a Campaign<'a>,
    runner: Runner<'a>,
    natives: &'a Natives,
    tells: &'a Sender<News>,
}

impl Worker<'_> {
    /// Runs case `number`, and shrinks it if it fails and `to_shrink` is not used up.
    fn case(&self, number: u64, to_shrink: &AtomicU64) -> Result<()> {
        let case = self.campaign.deck.case(number);
        let Some((seen, verdict)) = self.judged(&case)? else { return Ok(()) };
        let news = News::Judged(Box::new(case.clone()), seen.report.clone(), verdict.clone());
        let _ = self.tells.send(news);
        let Err(failure) = verdict else { return Ok(()) };
        let first = Failed { failure, seen };
        let is_worth_it =
            to_shrink.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok();
        let shrunk = match is_worth_it {
            true => {
                let mut run = |case: &Case| {
                    Ok(match self.judged(case)? {
                        None => Tried::Stopped,
                        Some((_, Ok(_))) => Tried::Right,
                        Some((seen, Err(failure))) => Tried::Wrong(Box::new(Failed { failure, seen })),
                    })
                };
                Some(shrink(&case, first.clone(), &mut run)?)
            }
            false => None,
        };
        let _ = self.tells.send(News::Shrunk(Box::new(self.kept(&case, &first, shrunk)?)));
        Ok(())
    }

    /// Runs `case` and judges it; `None` if the campaign was stopped meanwhile.
    fn judged(&self, case: &Case) -> Result<Option<(Observed, Result<Ending, Failure>)>> {
        let native = self.natives.of(&case.program)?;
        let Some(seen) = self.runner.run(case)? else { return Ok(None) };
        let verdict = (self.campaign.judge)(case, &native, &seen);
        Ok(Some((seen, verdict)))
    }

    fn kept(&self, case: &Case, first: &Failed, shrunk: Option<Shrunk>) -> Result<FailedRun> {
        let umbra: &Path = &self.campaign.umbra;
        let (smallest, last, again, runs) = match shrunk {
            Some(shrunk) => (shrunk.case, shrunk.last, Some(shrunk.again), shrunk.runs),
            None => (case.clone(), first.clone(), None, 0),
        };
        let native = self.natives.of(&smallest.program)?.first;
        let (before, after) = ((case, &first.seen), (&smallest, &last.seen));
        Ok(FailedRun {
            run: case.number,
            folder: keep(&self.campaign.keep, umbra, before, after, &native)?,
            command: command(umbra, &smallest),
            plan: smallest.plan.to_toml()?,
            failure: last.failure,
            again,
            shrink_runs: runs,
        })
    }
}
