// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `umbra inject --campaign`.

use super::{Format, choose_engine, parse};
use crate::causes::{answer, tell};
use crate::engine::{EngineChoice, choice};
use crate::inject::campaign::{Campaign, Corruption, Deck, Progress, image_names, judge};
use crate::reactor::{block_signals, pending_signal};
use anyhow::{Context, Result};
use clap::Args;
use std::io::{IsTerminal, stderr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Between lines of progress that are not rewritten.
const LINES: Duration = Duration::from_secs(5);

#[derive(Debug, Args)]
pub(super) struct CampaignArgs {
    /// Run N random plans, each against a random bundled guest with random options, and judge each run by what the fault
    /// points promise. Exits with 1 if a run was wrong; its plan is then made as small as it goes, and kept.
    #[arg(long, value_name = "N", conflicts_with_all = ["plan", "command", "report"])]
    campaign: Option<u64>,
    /// What is random: run i of a seed is the same everywhere. 0 if not given.
    #[arg(long, value_name = "S", requires = "campaign")]
    seed: Option<u64>,
    /// Number of the first run; 0 if not given.
    #[arg(long, value_name = "I", requires = "campaign")]
    first: Option<u64>,
    /// Run so many at a time; as many as there are CPUs if not given.
    #[arg(long, value_name = "J", requires = "campaign", value_parser = clap::value_parser!(u16).range(1..=1024))]
    jobs: Option<u16>,
    /// Only these bundled guests, by name, with commas.
    #[arg(long, value_name = "LIST", requires = "campaign", value_delimiter = ',', value_parser = image)]
    images: Vec<&'static str>,
    /// What runs the guests: auto, kvm or ptrace, as `umbra run --help` has it. The commands that replay failures have it too.
    #[arg(long, value_name = "ENGINE", requires = "campaign", hide_possible_values = true)]
    engine: Option<EngineChoice>,
    /// Draw flipped bits, too. What a guest says is not looked at then.
    #[arg(long, requires = "campaign")]
    corruption: bool,
    /// Where failures are kept; ./umbra-campaign-S if not given. It is only made if there is one.
    #[arg(long, value_name = "DIR", requires = "campaign")]
    keep: Option<PathBuf>,
    /// A run that takes longer hangs; 20s if not given.
    #[arg(long = "timeout", value_name = "DURATION", requires = "campaign", value_parser = parse::duration)]
    limit: Option<Duration>,
}

impl CampaignArgs {
    pub(super) fn is_asked_for(&self) -> bool {
        self.campaign.is_some()
    }
}

fn image(name: &str) -> Result<&'static str, String> {
    image_names().find(|known| *known == name).ok_or_else(|| {
        let names: Vec<_> = image_names().collect();
        format!("campaigns have no guest `{name}`; there are: {}", names.join(", "))
    })
}

/// Says how far it is, on stderr: on one line that is rewritten, where that is a terminal; a line now and then otherwise.
#[derive(Debug)]
struct Teller {
    is_terminal: bool,
    last: Option<Instant>,
}

impl Teller {
    fn tell(&mut self, progress: &Progress) {
        let pause = if self.is_terminal { Duration::from_millis(200) } else { LINES };
        let began = Instant::now();
        if self.last.is_some_and(|last| began.duration_since(last) < pause) {
            return;
        }
        // The first line comes when there is something to say.
        if self.last.replace(began).is_none() && !self.is_terminal {
            return;
        }
        match self.is_terminal {
            true => tell(format_args!("\r\x1b[K{}", progress.line())),
            false => tell(format_args!("{}\n", progress.line())),
        }
    }

    fn end(&self) {
        if self.is_terminal {
            tell("\r\x1b[K");
        }
    }
}

/// Runs the campaign that the command line asks for.
pub(super) fn run(args: &CampaignArgs, format: Format) -> Result<ExitCode> {
    let seed = args.seed.unwrap_or(0);
    let mut deck = Deck::new(seed);
    if !args.images.is_empty() {
        deck.images.clone_from(&args.images);
    }
    if args.corruption {
        deck.corruption = Corruption::Drawn;
    }
    // Found out once, and each run is told: what it would say of it were read as what its guest brought about.
    deck.engine = Some(choice::kind(&choose_engine(args.engine)?)?.into());
    let cpus = || std::thread::available_parallelism().map_or(1, usize::from);
    let stop = AtomicBool::new(false);
    let campaign = Campaign {
        deck,
        first: args.first.unwrap_or(0),
        runs: args.campaign.unwrap_or(0),
        jobs: args.jobs.map_or_else(cpus, usize::from),
        limit: args.limit.unwrap_or(Duration::from_secs(20)),
        keep: args.keep.clone().unwrap_or_else(|| format!("umbra-campaign-{seed}").into()),
        umbra: std::env::current_exe().context("cannot find umbra's own file, which each run needs")?,
        judge,
        stop: &stop,
    };
    // Before the first thread, so that all inherit it. Runs and native programs would, too; they are started with no signal blocked.
    block_signals()?;
    let mut teller = Teller { is_terminal: stderr().is_terminal(), last: None };
    let summary = campaign.run(&mut |progress| {
        if pending_signal() {
            stop.store(true, Ordering::Relaxed);
        }
        teller.tell(progress);
    });
    teller.end();
    let summary = summary?;
    answer(match format {
        Format::Json => serde_json::to_string_pretty(&summary)? + "\n",
        Format::Text => summary.text(),
    })?;
    Ok(if summary.failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(1) })
}
