// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `bench ksm`: umbra's page sharing beside the kernel's ksmd, on the same bytes.
//!
//! The bundled program `mix` runs once as a guest, scanned by umbra, and once as a process, scanned by ksmd; a
//! [content](mix::Content) says what it holds and how much of that can be saved, and both sides go through the same
//! [steps](phases). They take turns; while it is not the kernel's, ksmd is stopped. Its settings are [put back](restore)
//! however this process ends.
//!
//! "Full pace" is what a scanner does when it is given no pause: ksmd scans all the time, umbra's thread makes 20 passes a second
//! at most, which is a rule of its own and no setting (`SHORTEST_PASS`).
//!
//! | file | what |
//! | --- | --- |
//! | `mix`, `program` | the bytes, and the program that holds them |
//! | `phases`, `targets` | what is measured, and what was promised |
//! | `ksmd`, `sysfs`, `restore` | the kernel's side |
//! | `umbra` | umbra's |
//! | `compat` | the modes of the kernel's ksm_tests |
//! | `plot` | a picture |

mod compat;
mod ksmd;
mod mix;
mod phases;
mod plot;
mod program;
mod restore;
mod sysfs;
mod targets;
mod umbra;

pub use compat::{Compat, CompatMode, MergeType, NotOk, bench_ksm_compat};
pub use mix::{Mix, Shares};
pub use plot::draw_ksm;

use super::contestant::Contestant;
use super::phases::{Phase, measure_phases};
use super::{Host, Report, linux};
use crate::causes::one_line;
use anyhow::{Result, bail};
use ksmd::{Ksmd, KsmdSide};
use mix::Content;
use phases::{Measured, Plan, measure};
use program::{Program, Rewritten};
use shadow_mmu::addr::PAGE_SIZE;
use shadow_mmu::ksm::{KsmSettings, ZeroPages};
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::time::Duration;
use umbra::UmbraSide;

/// What is measured.
#[derive(Debug, Clone)]
pub struct KsmWork {
    /// Content of the memory.
    pub mix: Mix,
    /// Pages of it, at least 2.
    pub pages: u64,
    /// Of the random numbers.
    pub seed: u64,
    /// How long rewriting is measured; other things take a part of it.
    pub window: Duration,
    /// The saving is given up as incomplete after this.
    pub limit: Duration,
}

/// Whether the host has the memory for the program, scanned, and a quarter more.
fn expect_room(pages: u64) -> Result<()> {
    let needed = (pages.saturating_mul(PAGE_SIZE) / 4).saturating_mul(5).saturating_add(64 << 20);
    match linux::available_memory() {
        Some(available) if available < needed => bail!(
            "this takes {} MiB of memory and the host has {} MiB available: give it less (--mib, -s or -p)",
            needed >> 20,
            available >> 20
        ),
        _ => Ok(()),
    }
}

/// Runs the benchmark, `runs` times a side.
///
/// # Errors
/// What keeps umbra from running a guest at all; content that changed by sharing.
pub fn bench_ksm(
    host: &Host,
    options: &KsmWork,
    runs: usize,
    progress: &mut dyn FnMut(&str),
) -> Result<Report> {
    expect_room(options.pages)?;
    let plan = Plan {
        content: Content::new(&options.mix, options.pages, options.seed)?,
        background: matches!(options.mix, Mix::Rewrite(_)).then_some(Rewritten::Own),
        window: options.window,
        limit: options.limit,
    };
    // First of all: the process that will put its settings back should be a small one.
    let ksmd = Ksmd::take();
    let notes = RefCell::new(BTreeSet::new());
    let mut settings = KsmSettings { zero_pages: ZeroPages::Share, ..KsmSettings::default() };
    if let Ok(ksmd) = &ksmd {
        notes.borrow_mut().extend(ksmd.note());
        // The host's cannot be changed while anything on it is merged; so umbra gets it.
        let limit = ksmd.sharing_limit();
        if std::mem::replace(&mut settings.max_page_sharing, limit) != limit {
            notes.borrow_mut().insert(format!("max_page_sharing is {limit}, the host's, on both sides"));
        }
    }
    let noted = |who: &str, measured: Measured| -> Vec<Phase> {
        notes.borrow_mut().extend(measured.note.map(|note| format!("{who}: {note}")));
        measured.phases
    };
    let contestants = vec![
        Contestant::required("umbra", || Ok(noted("umbra", umbra_run(settings, &plan)?))),
        Contestant::optional("ksmd", || match &ksmd {
            Ok(ksmd) => Ok(noted("ksmd", ksmd_run(ksmd, &plan)?)),
            Err(error) => bail!("{}", one_line(error)),
        }),
    ];
    let (rows, missing) = measure_phases(runs, contestants, progress)?;
    let notes = notes.into_inner().into_iter().collect();
    let (ratios, lines) = targets::targets(&rows, plan.background);
    Ok(Report { bench: "ksm".into(), host: host.clone(), rows, ratios, missing, notes, lines })
}

fn umbra_run(settings: KsmSettings, plan: &Plan) -> Result<Measured> {
    let mut side = UmbraSide::start(&plan.content.words, plan.content.pages, settings)?;
    side.fill(&plan.content)?;
    let measured = measure(&mut side, plan)?;
    side.finish()?;
    Ok(measured)
}

fn ksmd_run(ksmd: &Ksmd, plan: &Plan) -> Result<Measured> {
    let mut program = Program::native(&plan.content.words, plan.content.pages)?;
    program.fill(&plan.content)?;
    let mut side = KsmdSide::new(ksmd, program)?;
    let measured = measure(&mut side, plan)?;
    side.finish()?;
    Ok(measured)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_is_not_there_is_refused() {
        assert!(expect_room(256).is_ok());
        let error = expect_room(u64::MAX).map_err(|error| error.to_string());
        assert!(error.is_err_and(|why| why.contains("MiB available")));
    }
}
