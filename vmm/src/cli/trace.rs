// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The options of `umbra run` that trace a guest, and what they start.

use super::{Format, parse};
use crate::trace::Tracer;
use crate::trace::tracer::Style;
use anyhow::{Context, Result};
use clap::Args;
use std::fs::File;
use std::io::{Write, stderr};
use std::path::PathBuf;

/// What is to be traced, and how it is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Traced {
    /// Events of the notifier layer.
    pub(super) notifier: Option<Format>,
}

#[derive(Debug, Args)]
pub(super) struct TraceArgs {
    /// Print events while the guest runs, to stderr: a list, with commas, of `notifier` or `notifier=json`.
    ///
    /// `notifier`: everything that the guest's address space tells its listeners, an event a line: seconds since the start,
    /// the guest's thread (`umbra` before it runs and after), op, reason, range, pages, and how long a pair was open. A pair,
    /// invalidate_range_start to _end, is one line, `invalidate`, written at its end; other ops have their kernel names.
    /// `notifier=json`: one object a line {time_ns, tid, op, reason, start, end, pages, blockable, duration_ns, pte}, without
    /// what an op has not; {op: "lost", events} where the reader was too slow. A guest never waits for its trace.
    #[arg(long, value_name = "LIST", value_parser = parse::traced)]
    trace: Option<Traced>,
    /// Write the trace to PATH, anew, and not to stderr.
    #[arg(long, value_name = "PATH", requires = "trace")]
    trace_file: Option<PathBuf>,
}

impl TraceArgs {
    /// Starts to write what is to be traced; `None` if nothing is.
    pub(super) fn start(&self) -> Result<Option<Tracer>> {
        let Some(Traced { notifier: Some(format) }) = self.trace else { return Ok(None) };
        let style = match format {
            Format::Text => Style::Text,
            Format::Json => Style::Json,
        };
        let out: Box<dyn Write + Send> = match &self.trace_file {
            Some(path) => Box::new(
                File::create(path)
                    .with_context(|| format!("cannot write the trace to {}", path.display()))?,
            ),
            None => Box::new(stderr()),
        };
        Ok(Some(Tracer::start(style, out).context("cannot start a thread that writes the trace")?))
    }
}

/// Writes the rest. A trace that cannot be written is no reason to hide how the guest ended, so it is only told.
pub(super) fn finish(tracer: Option<Tracer>) {
    if let Some(Err(error)) = tracer.map(Tracer::finish) {
        // It may be stderr that is gone.
        let _ = writeln!(stderr(), "umbra: the trace is not complete: {error}");
    }
}
