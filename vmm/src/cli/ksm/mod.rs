// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The options of `umbra run` for page sharing, what they start, and what is told of it.
//!
//! The scanner has its own thread ([`Ksmd`]), in deterministic mode it is a job of the baton's; everything in here is on the event loop's. A tick reads counters that need no lock;
//! only where more is saved than ever before, once a second at most, and when a guest ends, a whole report is taken, which waits
//! for the scan that is under way. That is why `scan=` has a bound.
//!
//! Drop order: a guest's address space leaves the scanner when it is dropped, and whatever is to be told of it has been asked for
//! by then ([`Sharing::guest_ends`]).

mod domains;
mod words;

pub(super) use words::join;

use super::Format;
use super::replacement::Replacement;
use crate::causes::say;
use crate::deterministic::{Deterministic, Interval};
use crate::fleet::Fleet;
use crate::ksm::guest::GuestSharing;
use crate::ksm::history::{History, Sample};
use crate::ksm::report::{Besides, SharingReport, SharingStats};
use crate::ksm::svg::draw;
use crate::ksm::{Ksmd, Pace, Turns, mib};
use anyhow::{Context, Result};
use clap::Args;
use domains::{DomainArg, Domains};
use shadow_mmu::addr::PAGE_SIZE;
use shadow_mmu::ksm::{Ksm, KsmMember, KsmMemberReport, KsmReport, KsmSettings, KsmStats};
use shadow_mmu::mm::MergeAny;
use std::ffi::OsStr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use words::{Merge, ReportArg, SharingArg};

/// Between looks at what is saved.
const TICK: Duration = Duration::from_millis(50);
/// Between reports of more and more that is saved.
const REPORTS: Duration = Duration::from_secs(1);
/// Which part of the pool the reserve is, where it is not given.
const RESERVE_SHARE: usize = 32;

#[derive(Debug, Args)]
pub(super) struct KsmArgs {
    /// Give pages of equal content one frame, until somebody writes them. Off if not given: a guest that shares can find out, by
    /// how long its writes take, what others have in memory.
    ///
    /// LIST, with commas: `madvise` (if nothing is said): memory that the guest advises itself, by madvise(MADV_MERGEABLE) or
    /// prctl(PR_SET_MEMORY_MERGE); or `all` private memory. `scan=PAGES/INTERVAL`: look at so many pages (1000) and then pause
    /// (20ms, 1ms at least); never more often than 20 times a second at all of them, for a page is only shared that is quiet. Or `advisor[=TIME]`: as many as it takes for a pass to last so long (200s), with `cpu=PERCENT` of a
    /// CPU at most (70). `max-page-sharing=N`: so many pages share a frame at most (256). `no-zero-pages`: no pages of zeros are
    /// merged with the zero page. `no-smart-scan`: pages that change all the time are looked at in each pass. `copy-on-access`:
    /// whoever reads or writes a page that may be shared gets a copy, so that nobody can tell those apart that are.
    /// `reserve=SIZE`: memory that is kept for pages that stop being shared (1/32 of the pool; less than half of it).
    #[arg(
        long,
        value_name = "LIST",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "madvise",
        value_parser = words::sharing
    )]
    ksm: Option<SharingArg>,
    /// Let these guests share pages with each other only, by number: `0-3` or `0,2,5`; all that are in no other domain, if no
    /// numbers are given. May be given several times. Guests in no domain share with nobody but themselves.
    #[arg(long, value_name = "NAME[=GUESTS]", requires = "ksm", value_parser = domains::domain)]
    ksm_domain: Vec<DomainArg>,
    /// Print what sharing came to, at the end, to stderr: counters by the kernel's names, and why pages were not shared, by
    /// mapping. `json`: as one object {report: "ksm", at_s, pages_shared, …, guests: [{guest, share_domain, ksm_rmap_items, …,
    /// vmas: [{start, end, rights, name, pages, shared, zero, volatile, unique, pinned, domain, limit}]}]}. With the path of an
    /// SVG, also with a comma behind `json`, draw it into that: what was saved over time.
    #[arg(
        long,
        value_name = "json|PATH.svg",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "text",
        requires = "ksm",
        value_parser = words::report
    )]
    ksm_report: Option<ReportArg>,
}

impl KsmArgs {
    /// Why these options make no sense for so many guests, that many bytes of memory for all of them, and `program`, if there is
    /// one, if they do not.
    pub(super) fn refusal(&self, guests: usize, pool: u64, program: Option<&OsStr>) -> Option<String> {
        let reserve = self.ksm.and_then(|arg| arg.reserve).map_or(0, |frames| frames as u64);
        if reserve > 0 && reserve >= pool / PAGE_SIZE / 2 {
            return Some(format!(
                "a reserve of {:.1} MiB is half of the {:.1} MiB that the guests have, or more, and they could not use it: give less \
                 with reserve=",
                mib(reserve),
                mib(pool / PAGE_SIZE)
            ));
        }
        let report = self.ksm_report.as_ref();
        let refusal = report.zip(program).and_then(|(report, program)| report.refusal(program));
        refusal.or_else(|| Domains::new(&self.ksm_domain, guests).err())
    }

    /// Makes sure of the file for the picture, before there is anything to lose.
    pub(super) fn open(&self) -> Result<Option<Replacement>> {
        let picture = self.ksm_report.as_ref().and_then(|report| report.picture.as_deref());
        picture.map(Replacement::prepare).transpose()
    }

    /// Whether the pace is one that goes by the time that a pass takes.
    pub(super) fn has_advisor(&self) -> bool {
        self.ksm.is_some_and(|arg| matches!(arg.pace, Pace::Advisor { .. }))
    }

    /// How often to look at what is saved; `None` without sharing.
    pub(super) fn interval(&self) -> Option<Duration> {
        self.ksm.map(|_| TICK)
    }

    /// Lets the guests of `fleet`, which do not run yet, share pages, if they are to.
    pub(super) fn start(
        &self,
        fleet: &Fleet,
        deterministic: Option<&Deterministic>,
        began: Instant,
        picture: Option<Replacement>,
    ) -> Result<Option<Sharing>> {
        let Some(arg) = self.ksm else { return Ok(None) };
        let domains = Domains::new(&self.ksm_domain, fleet.count()).map_err(anyhow::Error::msg)?;
        if let Some(warning) = domains.warning() {
            say(warning);
        }
        let reserve = arg.reserve.unwrap_or(fleet.pool().frame_count() / RESERVE_SHARE);
        let seed = deterministic.map(Deterministic::sharing_seed).or(arg.settings.seed);
        let ksm = Ksm::new(Arc::clone(fleet.pool()), KsmSettings { reserve, seed, ..arg.settings })?;
        let mut members = Vec::new();
        for (number, vm) in fleet.left() {
            if arg.merge == Merge::All {
                vm.machine().mm().set_merge_any(MergeAny::On).context("cannot let all memory be merged")?;
            }
            members.push((vm.machine().share(&ksm, domains.of(number))?, number));
        }
        let ksmd = match deterministic {
            None => Some(Ksmd::start(Arc::clone(&ksm), arg.pace)?),
            Some(deterministic) => {
                let baton = deterministic.baton();
                let (clock, mut turns) = (Arc::clone(baton.clock()), Turns::new(Arc::clone(&ksm), arg.pace));
                baton.every(Interval::About(arg.pace.interval()), move || turns.turn(clock.now()));
                None
            }
        };
        Ok(Some(Sharing {
            report: self.ksm_report.clone(),
            picture,
            began,
            domains,
            members,
            history: History::default(),
            best: None,
            reserve_told: false,
            ksmd,
            ksm,
        }))
    }
}

/// The moment at which most was saved.
#[derive(Debug)]
struct Best {
    at: Duration,
    stats: KsmStats,
    guests: Vec<GuestSharing>,
}

fn saved(stats: &KsmStats) -> u64 {
    stats.pages_sharing + stats.ksm_zero_pages
}

/// Page sharing among the guests that run.
#[derive(Debug)]
pub(super) struct Sharing {
    report: Option<ReportArg>,
    picture: Option<Replacement>,
    began: Instant,
    domains: Domains,
    /// Which guest is which.
    members: Vec<(KsmMember, usize)>,
    history: History,
    best: Option<Best>,
    reserve_told: bool,
    /// `None` in deterministic mode, where the threads of the guest scan.
    ksmd: Option<Ksmd>,
    ksm: Arc<Ksm>,
}

/// What there is to say at the end.
#[derive(Debug)]
pub(super) struct Shared {
    /// The counters.
    pub(super) stats: SharingStats,
    /// What `--ksm-report` is to print, whole lines.
    pub(super) report: Option<String>,
}

impl Sharing {
    /// What shares pages.
    pub(super) fn ksm(&self) -> Arc<Ksm> {
        Arc::clone(&self.ksm)
    }

    fn sample(began: Instant, fleet: &Fleet) -> Sample {
        let guests = fleet.left();
        let merged = guests.iter().map(|(_, vm)| {
            let mm = vm.machine().mm();
            mm.ksm_merging_pages() + mm.ksm_zero_pages()
        });
        let frames = fleet.pool().ksm_frames() as u64;
        Sample { at: began.elapsed(), saved: merged.sum::<u64>().saturating_sub(frames) }
    }

    /// Takes a report, and keeps it if no more was saved before. Returns its counters.
    fn take_report(&mut self) -> KsmStats {
        let KsmReport { stats, members } = self.ksm.report();
        if self.best.as_ref().is_none_or(|best| saved(&stats) >= saved(&best.stats)) {
            let guest = |report: &KsmMemberReport| {
                let &(_, number) = self.members.iter().find(|(known, _)| *known == report.member)?;
                Some(GuestSharing::new(number, self.domains.name(number), report))
            };
            let guests = members.iter().filter_map(guest).collect();
            self.best = Some(Best { at: self.began.elapsed(), stats, guests });
        }
        stats
    }

    /// Looks at what is saved. Returns what the operator is to be told, a line.
    pub(super) fn tick(&mut self, fleet: &Fleet) -> Option<String> {
        let sample = Self::sample(self.began, fleet);
        self.history.add(sample);
        let is_more = |best: &Best| sample.saved >= saved(&best.stats) && sample.at >= best.at + REPORTS;
        if self.best.as_ref().is_none_or(is_more) {
            self.take_report();
        }
        self.warning(fleet)
    }

    /// A guest has ended, and its memory is still there. Returns what the operator is to be told, a line.
    pub(super) fn guest_ends(&mut self, fleet: &Fleet) -> Option<String> {
        self.take_report();
        self.warning(fleet)
    }

    /// Once: that the reserve is being used.
    fn warning(&mut self, fleet: &Fleet) -> Option<String> {
        let pool = fleet.pool().stats();
        if pool.reserve_taken == 0 || std::mem::replace(&mut self.reserve_told, true) {
            return None;
        }
        Some(format!(
            "umbra: pages that stop being shared take frames from the reserve ({} are left): a guest that finds no frame is \
             killed; give more with --memory or --pool\n",
            pool.free
        ))
    }

    /// All guests have ended, and the memory of the last one is still there. Stops; what there is to tell. A picture that cannot
    /// be drawn is no reason to hide how the guests ended, so it is only told.
    pub(super) fn finish(mut self, fleet: &Fleet) -> Result<Shared> {
        self.history.add_last(Self::sample(self.began, fleet));
        let end = self.take_report();
        let cpu = self.ksmd.map_or(Duration::ZERO, Ksmd::stop);
        let pool = fleet.pool().stats();
        let besides = Besides {
            metadata_bytes: self.ksm.metadata_bytes(),
            cpu_s: cpu.as_secs_f64(),
            reserve_pages: pool.reserve as u64,
            reserve_taken: pool.reserve_taken,
        };
        let Best { at, stats, guests } = self.best.context("there is no report of page sharing")?;
        let stats = SharingStats::new(at.as_secs_f64(), &stats, &end, besides);
        let report = SharingReport { report: "ksm", stats, guests };
        if let Some(picture) = self.picture
            && let Err(error) = draw(&report, &self.history).and_then(|svg| picture.write(svg.as_bytes()))
        {
            say(format_args!("there is no picture of page sharing: {error:#}"));
        }
        let text = match self.report.map(|report| report.format) {
            None => None,
            Some(Format::Text) => Some(report.text()),
            Some(Format::Json) => Some(serde_json::to_string(&report)? + "\n"),
        };
        Ok(Shared { stats, report: text })
    }
}
