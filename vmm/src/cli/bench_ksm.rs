// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `umbra bench ksm`: its options, those of the kernel's ksm_tests among them.

use super::parse;
use super::replacement::Replacement;
use crate::bench::{
    Compat, CompatMode, Host, KsmWork, MergeType, Mix, Report, bench_ksm, bench_ksm_compat, draw_ksm,
};
use anyhow::{Result, bail};
use clap::Args;
use shadow_mmu::ksm::ZeroPages;
use std::path::PathBuf;
use std::time::Duration;

#[derive(Debug, Args)]
pub(super) struct KsmArgs {
    /// Content of the memory: percentages, as zero=25,dup=50,unique=25; `rewrite`: the same, and all the time a hundredth of the
    /// pages a second is rewritten; `image`: copies of umbra's own executable.
    #[arg(long, value_name = "MIX", default_value = "zero=25,dup=50,unique=25", value_parser = Mix::parse)]
    mix: Mix,
    /// Equal pages of a group; of an image, how often it is there at least.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u64).range(2..=256))]
    copies: u64,
    /// Memory, in MiB.
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u64).range(1..=65_536))]
    mib: u64,
    /// Seed of the random numbers.
    #[arg(long, value_name = "SEED", default_value_t = 1)]
    seed: u64,
    /// How long rewriting is measured; what else takes time takes a part of it.
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = parse::interval)]
    window: Duration,
    /// How long the saving may take to be complete.
    #[arg(long, value_name = "DURATION", default_value = "120s", value_parser = parse::interval)]
    limit: Duration,
    /// Also draw the medians as bars, an SVG file.
    #[arg(long, value_name = "FILE", conflicts_with = "kernel_compat")]
    plot: Option<PathBuf>,
    /// Go through a mode of the kernel's ksm_tests instead, with umbra's page sharing: -M, -U, -Z, -P, -D or -C.
    #[arg(long, requires = "mode", conflicts_with_all = ["mix", "copies", "mib", "seed", "window", "limit"])]
    kernel_compat: bool,
    #[command(flatten)]
    compat: CompatArgs,
}

/// Options of the kernel's ksm_tests.
#[derive(Debug, Args)]
struct CompatArgs {
    #[command(flatten)]
    mode: ModeArgs,
    /// Pages of -M and -Z.
    #[arg(short = 'p', value_name = "PAGES", default_value_t = 10, requires = "kernel_compat", value_parser = clap::value_parser!(u64).range(1..=1 << 24))]
    pages: u64,
    /// Seconds in which passes must be over.
    #[arg(short = 'l', value_name = "SECONDS", default_value_t = 120, requires = "kernel_compat", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    limit_seconds: u64,
    /// Whether pages of zeros become the zero page.
    #[arg(short = 'z', value_name = "0|1", default_value_t = 0, requires = "kernel_compat", value_parser = clap::value_parser!(u8).range(0..=1))]
    use_zero_pages: u8,
    /// Area of -P and -D, in MiB.
    #[arg(short = 's', value_name = "MIB", requires = "kernel_compat", value_parser = clap::value_parser!(u64).range(1..=65_536))]
    size: Option<u64>,
    /// How memory becomes mergeable: 0 by madvise, 1 all of it, as by prctl.
    #[arg(short = 't', value_name = "0|1", default_value_t = 0, requires = "kernel_compat", value_parser = clap::value_parser!(u8).range(0..=1))]
    merge_type: u8,
}

#[derive(Debug, Args)]
#[group(id = "mode", multiple = false)]
struct ModeArgs {
    /// Equal pages are merged.
    #[arg(short = 'M', requires = "kernel_compat")]
    merge: bool,
    /// Merged pages that are written are merged no longer.
    #[arg(short = 'U', requires = "kernel_compat")]
    unmerge: bool,
    /// Pages of zeros are merged.
    #[arg(short = 'Z', requires = "kernel_compat")]
    zero: bool,
    /// How fast an area of -s MiB is merged.
    #[arg(short = 'P', requires = "kernel_compat")]
    merge_time: bool,
    /// How fast madvise takes that back.
    #[arg(short = 'D', requires = "kernel_compat")]
    unmerge_time: bool,
    /// What writing to merged pages takes, and to others.
    #[arg(short = 'C', requires = "kernel_compat")]
    cow_time: bool,
}

impl ModeArgs {
    fn chosen(&self) -> Option<CompatMode> {
        let Self { merge, unmerge, zero, merge_time, unmerge_time, cow_time } = *self;
        let modes = [
            (merge, CompatMode::Merge),
            (unmerge, CompatMode::Unmerge),
            (zero, CompatMode::ZeroPages),
            (merge_time, CompatMode::MergeTime),
            (unmerge_time, CompatMode::UnmergeTime),
            (cow_time, CompatMode::CowTime),
        ];
        modes.into_iter().find_map(|(is_chosen, mode)| is_chosen.then_some(mode))
    }
}

pub(super) fn measure(
    host: &Host,
    args: KsmArgs,
    runs: usize,
    progress: &mut dyn FnMut(&str),
) -> Result<Report> {
    if args.kernel_compat {
        return compat(host, &args.compat, runs, progress);
    }
    // Before minutes of measuring.
    let plot = args.plot.as_deref().map(Replacement::prepare).transpose()?;
    let work = KsmWork {
        mix: args.mix.with_copies(args.copies),
        pages: args.mib << 8,
        seed: args.seed,
        window: args.window,
        limit: args.limit,
    };
    let report = bench_ksm(host, &work, runs, progress)?;
    if let Some(plot) = plot {
        plot.write(draw_ksm(&report)?.as_bytes())?;
    }
    Ok(report)
}

fn compat(host: &Host, args: &CompatArgs, runs: usize, progress: &mut dyn FnMut(&str)) -> Result<Report> {
    let Some(mode) = args.mode.chosen() else {
        bail!("--kernel-compat needs one of -M, -U, -Z, -P, -D and -C");
    };
    let options = Compat {
        mode,
        pages: args.pages,
        limit: Duration::from_secs(args.limit_seconds),
        zero_pages: if args.use_zero_pages == 1 { ZeroPages::Share } else { ZeroPages::Keep },
        mib: args.size,
        merge_type: if args.merge_type == 1 { MergeType::Prctl } else { MergeType::Madvise },
    };
    bench_ksm_compat(host, &options, runs, progress)
}
