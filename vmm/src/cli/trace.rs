// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The options of `umbra run` that trace a guest, and what they start.

use super::{Format, parse};
use crate::causes::say;
use crate::trace::Tracer;
use crate::trace::tracer::Style;
use anyhow::{Context, Result};
use clap::Args;
use std::fs::File;
use std::io::stderr;
use std::os::fd::AsFd;
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
    /// the guest's thread (`umbra` before it runs, after it, and for changes of adopted memory), op, reason, range, pages,
    /// and how long a pair was open. A pair, invalidate_range_start to _end, is one line, `invalidate`, written at its end.
    /// `test_clear_young`, one line for 32 MiB in each pass of `--age`, asks which pages were accessed; no released kernel
    /// has it. Other ops have their kernel names. Not traced are `invalidate_range`, for devices that walk the primary's page
    /// tables, and `written`, for logs of writes. `notifier=json`: one object a line {time_ns, tid, op, reason, start, end,
    /// pages, blockable, duration_ns, pte}, without what an op has not; {op: "lost", events} where the reader was too slow. A
    /// guest never waits for its trace.
    #[arg(long, value_name = "LIST", value_parser = parse::traced)]
    trace: Option<Traced>,
    /// Write the trace to PATH, anew, and not to stderr.
    #[arg(long, value_name = "PATH", requires = "trace")]
    trace_file: Option<PathBuf>,
}

/// Where a trace goes, and how it is written.
#[derive(Debug)]
pub(super) struct Output {
    style: Style,
    file: File,
}

impl TraceArgs {
    /// An option that shows a guest, if one is given.
    pub(super) fn given(&self) -> Option<&'static str> {
        self.trace.map(|_| "--trace")
    }

    /// Opens what the trace is to be written to; `None` if nothing is traced. May wait: a FIFO has no reader at first.
    pub(super) fn open(&self) -> Result<Option<Output>> {
        let Some(Traced { notifier: Some(format) }) = self.trace else { return Ok(None) };
        let style = match format {
            Format::Text => Style::Text,
            Format::Json => Style::Json,
        };
        let file = match &self.trace_file {
            Some(path) => {
                File::create(path).with_context(|| format!("cannot write the trace to {}", path.display()))?
            }
            // The descriptor alone: std's stderr has a lock, and whoever writes a line of the log would wait for it while a
            // trace that nobody reads is being written.
            None => File::from(stderr().as_fd().try_clone_to_owned().context("cannot duplicate stderr")?),
        };
        Ok(Some(Output { style, file }))
    }
}

impl Output {
    /// Starts to write.
    pub(super) fn start(self) -> Result<Tracer> {
        Tracer::start(self.style, self.file).context("cannot start a thread that writes the trace")
    }
}

/// Writes the rest, and waits for who reads it. A trace that cannot be written is no reason to hide how the guest ended, so it
/// is only told.
pub(super) fn finish(tracer: Option<Tracer>) {
    if let Some(Err(error)) = tracer.map(Tracer::finish) {
        say(format_args!("the trace is not complete: {error}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Duration;

    #[test]
    fn a_trace_to_stderr_does_not_wait_for_who_writes_there_nor_the_other_way_round() {
        let args = TraceArgs { trace: Some(Traced { notifier: Some(Format::Text) }), trace_file: None };
        let locked = stderr().lock();
        let tracer = args.open().unwrap().unwrap().start().unwrap();
        tracer.listener().release();
        let (tell, told) = mpsc::channel();
        std::thread::spawn(move || tell.send(tracer.finish().is_ok()));
        let written = told.recv_timeout(Duration::from_secs(60));
        drop(locked);
        assert_eq!(written, Ok(true), "the writer waits for the lock of std's stderr");
    }
}
