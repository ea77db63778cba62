// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `bench start`: from the command to its end, for the smallest guest there is.

use super::{Contestant, Host, Measure, NativeImage, Report, measure, output, ratios, umbra};
use crate::engine::choice;
use anyhow::Result;
use std::process::Command;
use std::time::Instant;

/// Runs `hello` as a guest and natively, `runs` times each; the whole process, in milliseconds.
///
/// # Errors
/// What keeps umbra from running a guest at all.
pub fn bench_start(host: &Host, runs: usize, progress: &mut dyn FnMut(&str)) -> Result<Report> {
    // Found out before, so that no run does it again.
    let engine = choice::kind(&crate::cli::engine())?.to_string();
    let native = NativeImage::new("hello")?;
    let timed = |command: &mut Command| -> Result<f64> {
        let began = Instant::now();
        output(command)?;
        Ok(began.elapsed().as_secs_f64() * 1e3)
    };
    let rows: Vec<Measure<'_>> = vec![
        Contestant::required("umbra", || timed(umbra()?.args(["run", "--engine", &engine, "hello"]))),
        Contestant::optional("native", || timed(&mut native.command())),
    ];
    let (rows, missing) = measure("ms", runs, rows, progress)?;
    let ratios = ratios(&rows, &[("umbra", "native")]);
    Ok(Report {
        bench: "start".into(),
        host: host.clone(),
        rows,
        ratios,
        missing,
        notes: Vec::new(),
        lines: Vec::new(),
    })
}
