// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `umbra inject`.

use super::campaign::CampaignArgs;
use super::replacement::Replacement;
use super::{Cli, Command, Format, parse_words, run};
use crate::causes::{answer, say, tell};
use crate::inject::campaign::RunReport;
use crate::inject::campaign::leaks::Census;
use crate::inject::{Account, Plan, Registry, points, ready};
use anyhow::{Context, Result};
use clap::{ArgGroup, Args};
use shadow_mmu::inject::{Effects, Faults, Outcome, Point, Scope};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

/// Run a program while things go wrong, as a plan says: see how it, and umbra, take it.
///
/// A plan is a small TOML file: where (a fault point), when (the nth hit, a probability with a seed, an address range, after an
/// event), what (an error, a delay, a stall, a memory fault) and how often. The guest's exit status is umbra's. What fired, and
/// what never did, is said on stderr at the end.
#[derive(Debug, Args)]
#[command(
    override_usage = "umbra inject PLAN.toml [--report[=FORMAT]] -- run [OPTIONS] <PROGRAM|IMAGE> [ARGS]...\n       \
                      umbra inject --campaign N [--seed S] [OPTIONS]\n       \
                      umbra inject --list [--json]",
    after_help = EXAMPLES,
    group = ArgGroup::new("printed").args(["list", "campaign"])
)]
pub(super) struct InjectArgs {
    /// The plan: a file, or a ready plan by its name.
    #[arg(value_name = "PLAN", required_unless_present = "printed")]
    plan: Option<PathBuf>,
    /// List every fault point with what it models and what umbra promises, and the ready plans.
    #[arg(long, conflicts_with_all = ["plan", "command"])]
    list: bool,
    #[command(flatten)]
    campaign: CampaignArgs,
    /// Print the list, or what came of the campaign, as JSON.
    #[arg(long, requires = "printed")]
    json: bool,
    /// Say at the end what became of every rule, how often each point was hit, and what umbra still had when every guest was
    /// gone. `json`: as one object {rules: [{rule, eligible, fired}], hits: {POINT: N}, notes: [LINE], leaks: [LINE]}, notes (what was done to memory, and where)
    /// only where there are some; with a path, into that file.
    #[arg(
        long,
        value_name = "text|json[:PATH]",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "text",
        value_parser = report
    )]
    report: Option<ReportArg>,
    /// `run` and its options, as without `umbra`.
    #[arg(last = true, value_name = "COMMAND", required_unless_present = "printed")]
    command: Vec<OsString>,
}

/// `--report`.
#[derive(Debug, Clone, PartialEq, Eq)]
enum ReportArg {
    Text,
    Json,
    File(PathBuf),
}

fn report(text: &str) -> Result<ReportArg, String> {
    match (text, text.strip_prefix("json:")) {
        ("text", _) => Ok(ReportArg::Text),
        ("json", _) => Ok(ReportArg::Json),
        (_, Some(path)) if !path.is_empty() => Ok(ReportArg::File(path.into())),
        _ => Err(format!("`{text}` is neither `text`, `json` nor `json:PATH`")),
    }
}

const EXAMPLES: &str = "\
Examples:
  umbra inject --list                                  every point, and the ready plans
  umbra inject oom-at-5th -- run ./my-static-program   a ready plan: the fifth mmap fails
  umbra inject plan.toml --report=json -- run --stats touch
  umbra inject --campaign 200 --seed 1                 200 random plans; is umbra's promise kept?

A plan:
  [[fault]]
  point = \"syscall\"
  call = \"mmap\"
  nth = 5
  error = \"ENOMEM\"

docs/fault-injection.md has the whole language.";

/// Does what the command line says.
pub(super) fn run(args: InjectArgs) -> Result<ExitCode> {
    let format = if args.json { Format::Json } else { Format::Text };
    if args.list {
        return list(format);
    }
    if args.campaign.is_asked_for() {
        return super::campaign::run(&args.campaign, format);
    }
    let plan = match read(args.plan.as_deref().unwrap_or(Path::new(""))) {
        Ok(plan) => plan,
        Err(refusal) => {
            say(format_args!("{refusal:#}"));
            return Ok(ExitCode::from(2));
        }
    };
    let words = std::iter::once(OsString::from("umbra")).chain(args.command).collect();
    let Cli { command: Command::Run(command) } = parse_words(words) else {
        say(format_args!("only `run` can be injected into: write umbra inject PLAN -- run PROGRAM"));
        return Ok(ExitCode::from(2));
    };
    let registry = Registry::new(&plan);
    let before = Census::take();
    let result = run::run(*command, &Faults::new(Arc::clone(&registry) as _), registry.waits());
    // Every machine is gone, so nothing of theirs may be left.
    let leaks = before.and_then(|before| before.leaks());
    let leaks =
        leaks.unwrap_or_else(|error| vec![format!("perhaps something: cannot look into /proc: {error}")]);
    let Account { rules, hits, notes } = registry.account();
    let report = RunReport { rules, hits, notes, leaks };
    // What the run came to is the news, so that is what the status says.
    match report_rules(&report, args.report.as_ref()) {
        Err(error) if result.is_err() => say(format_args!("inject: {error:#}")),
        told => told?,
    }
    result
}

/// The plan in the file at `path`, or the ready one of that name.
fn read(path: &Path) -> Result<Plan> {
    let text = match path.to_str().and_then(ready::find) {
        Some(ready) => ready.text.to_owned(),
        None => std::fs::read_to_string(path).with_context(|| {
            format!("cannot read the plan {} (`umbra inject --list` names the ready ones)", path.display())
        })?,
    };
    text.parse().with_context(|| format!("the plan {} cannot be followed", path.display()))
}

/// What became of the rules.
fn report_rules(account: &RunReport, report: Option<&ReportArg>) -> Result<()> {
    let json = || serde_json::to_string(account);
    match report {
        Some(ReportArg::Json) => {
            tell(format_args!("{}\n", json()?));
            return Ok(());
        }
        Some(ReportArg::File(path)) => {
            return write_report(path, &(json()? + "\n"))
                .with_context(|| format!("cannot write the report {}", path.display()));
        }
        Some(ReportArg::Text) | None => {}
    }
    for leak in &account.leaks {
        say(format_args!("inject: left behind: {leak}; this is a bug of umbra's"));
    }
    for (number, rule) in account.rules.iter().enumerate().map(|(index, rule)| (index + 1, rule)) {
        if rule.fired == 0 {
            say(format_args!(
                "inject: rule {number} ({}) never fired: it was asked {} times",
                rule.rule, rule.eligible
            ));
        } else if report.is_some() {
            say(format_args!(
                "inject: rule {number} ({}) fired {} of {} times",
                rule.rule, rule.fired, rule.eligible
            ));
        }
    }
    if report.is_some() {
        let hits: Vec<_> = account.hits.iter().map(|(point, hits)| format!("{point} {hits}")).collect();
        say(format_args!("inject: hits: {}", hits.join(", ")));
        account.notes.iter().for_each(|note| say(format_args!("inject: {note}")));
    }
    Ok(())
}

/// Writes the report to `path`: as a whole or not at all, but where that is no regular file and so cannot be replaced (a pipe).
fn write_report(path: &Path, text: &str) -> Result<()> {
    match std::fs::metadata(path) {
        Ok(there) if !there.is_file() => Ok(std::fs::write(path, text)?),
        _ => Replacement::prepare(path)?.write(text.as_bytes()),
    }
}

fn effects(point: &Point) -> Vec<String> {
    let errors = point.errors.iter().map(|(errno, _)| crate::inject::errno_name(*errno));
    errors.chain(crate::inject::effect_names(point).map(Into::into)).collect()
}

/// What each error, and whatever else is no waiting, may come to.
fn outcomes(point: &Point) -> serde_json::Map<String, serde_json::Value> {
    let text = |outcome: Outcome| match outcome {
        Outcome::Unseen => "unseen",
        Outcome::GuestFails => "guest-fails",
        Outcome::RunFails => "run-fails",
    };
    let errors = point.errors.iter().map(|(errno, outcome)| (crate::inject::errno_name(*errno), *outcome));
    let waits = Effects::WAIT | Effects::SPLIT;
    let rest = (!(point.effects - waits).is_empty()).then(|| ("other".to_owned(), point.outcome));
    errors.chain(rest).map(|(name, outcome)| (name, text(outcome).into())).collect()
}

fn list(format: Format) -> Result<ExitCode> {
    answer(match format {
        Format::Json => {
            let points: Vec<_> = points::all()
                .map(|point| {
                    serde_json::json!({
                        "name": point.name, "place": point.place, "models": point.models, "promise": point.promise,
                        "effects": effects(point), "outcomes": outcomes(point), "of": if point.scope == Scope::Pool { "pool" } else { "vm" },
                    })
                })
                .collect();
            let plans: Vec<_> = ready::all()
                .map(|plan| serde_json::json!({"name": plan.name, "summary": plan.summary(), "text": plan.text}))
                .collect();
            serde_json::to_string_pretty(&serde_json::json!({"points": points, "plans": plans}))? + "\n"
        }
        Format::Text => {
            let points = points::all().map(|point| {
                format!(
                    "\n  {}\n    when      {}\n    models    {}\n    promise   {}\n    offers    {}\n",
                    point.name,
                    point.place,
                    point.models,
                    point.promise,
                    effects(point).join(", ")
                )
            });
            let plans = ready::all().map(|plan| format!("  {:<16} {}\n", plan.name, plan.summary()));
            format!(
                "Fault points:\n{}\nReady plans, by name:\n\n{}",
                points.collect::<String>(),
                plans.collect::<String>()
            )
        }
    })?;
    Ok(ExitCode::SUCCESS)
}
