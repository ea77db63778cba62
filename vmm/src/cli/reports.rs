// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Reports while a guest runs, to stderr, by a thread of their own.
//!
//! Who reads stderr may stop to: a terminal after Ctrl-S, a pager. The event loop must not wait for that, or nobody could end
//! the guest any more, and vCPUs would wait for it in turn. So it hands reports over, and of those for which there is no room
//! it keeps count. A guest decides how long a report is, by its mappings; so what may wait is bounded in bytes too. They are
//! written through a descriptor and not through std's stderr, which has a lock that vCPU threads take when they log.

use super::Format;
use anyhow::{Context, Result};
use std::fs::File;
use std::io::{Write, stderr};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;

/// Reports that may wait to be written.
const WAITING: usize = 64;
/// Bytes of them, but for a single report that is longer.
const WAITING_BYTES: usize = 16 << 20;

/// Writes reports.
#[derive(Debug)]
pub(super) struct Reports {
    queue: SyncSender<String>,
    writer: JoinHandle<()>,
    /// Of those that wait or are being written. Only this side adds.
    bytes: Arc<AtomicUsize>,
    lost: Lost,
}

/// How many reports there was no room for, by how they would have been written.
#[derive(Debug, Default)]
struct Lost {
    text: u64,
    json: u64,
}

impl Lost {
    fn count(&mut self, format: Format) {
        match format {
            Format::Text => self.text += 1,
            Format::Json => self.json += 1,
        }
    }

    /// Who reads objects is told by one.
    fn lines(&self) -> Vec<String> {
        let Self { text, json } = self;
        let text =
            (*text > 0).then(|| format!("umbra: {text} reports were left out: nobody read them in time\n"));
        let json = (*json > 0).then(|| format!("{{\"report\":\"lost\",\"reports\":{json}}}\n"));
        text.into_iter().chain(json).collect()
    }
}

impl Reports {
    /// Starts the thread.
    pub(super) fn to_stderr() -> Result<Self> {
        let out = stderr().as_fd().try_clone_to_owned().context("cannot duplicate stderr")?;
        Self::to(File::from(out))
    }

    fn to(mut out: File) -> Result<Self> {
        let (queue, waiting) = sync_channel::<String>(WAITING);
        let bytes = Arc::<AtomicUsize>::default();
        let waits = Arc::clone(&bytes);
        let writer = std::thread::Builder::new().name("reports".into()).spawn(move || {
            for report in waiting {
                // A reader that is gone wants no reports; the guest goes on.
                let _ = out.write_all(report.as_bytes());
                let length = report.len();
                drop(report);
                // A count of its own: nothing else is ordered by it.
                waits.fetch_sub(length, Ordering::Relaxed);
            }
        });
        let writer = writer.context("cannot start a thread for reports")?;
        Ok(Self { queue, writer, bytes, lost: Lost::default() })
    }

    /// Has `report`, whole lines, written; never waits.
    pub(super) fn send(&mut self, format: Format, report: String) {
        let (length, waits) = (report.len(), self.bytes.load(Ordering::Relaxed));
        if waits > 0 && waits + length > WAITING_BYTES {
            return self.lost.count(format);
        }
        // First, so that the writer takes away what is there.
        self.bytes.fetch_add(length, Ordering::Relaxed);
        if self.queue.try_send(report).is_err() {
            self.bytes.fetch_sub(length, Ordering::Relaxed);
            self.lost.count(format);
        }
    }

    /// Has `reports` written too, and waits for who reads them: signals must be able to end umbra by now.
    pub(super) fn finish(self, reports: impl IntoIterator<Item = String>) {
        for report in self.lost.lines().into_iter().chain(reports) {
            // Bounded by the queue alone; it waits. Fails only if the writer is gone, which counts nothing any more.
            self.bytes.fetch_add(report.len(), Ordering::Relaxed);
            let _ = self.queue.send(report);
        }
        drop(self.queue);
        let _ = self.writer.join();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed test may panic")]
    use super::*;
    use std::io::{Read, pipe};
    use std::os::fd::OwnedFd;

    /// What `reports` has written when its reader goes on.
    fn read_all(reports: Reports, mut reader: std::io::PipeReader) -> String {
        let read = std::thread::spawn(move || {
            let mut all = String::new();
            reader.read_to_string(&mut all).unwrap();
            all
        });
        reports.finish(["the end\n".to_owned()]);
        read.join().unwrap()
    }

    #[test]
    fn nobody_waits_for_a_reader_that_stopped_and_what_is_lost_is_told() {
        let (reader, writer) = pipe().unwrap();
        let mut reports = Reports::to(File::from(OwnedFd::from(writer))).unwrap();
        // One fills the pipe, one may be in the writer's hands, `WAITING` are in the queue, the rest finds no room.
        let sent = WAITING + 20;
        for n in 0..sent {
            let format = if n % 2 == 0 { Format::Text } else { Format::Json };
            reports.send(format, format!("{}\n", "x".repeat(1 << 17)));
        }
        let (text, json) = (reports.lost.text, reports.lost.json);
        assert!(text >= 9 && json >= 9, "{text} {json}");
        let all = read_all(reports, reader);
        let lines: Vec<_> = all.lines().collect();
        assert_eq!(lines.len() as u64, sent as u64 - text - json + 3);
        let [.., told, object, end] = lines[..] else { panic!("{}", lines.len()) };
        assert!(told.contains(&format!("{text} reports were left out")));
        let object: serde_json::Value = serde_json::from_str(object).unwrap();
        assert_eq!(object, serde_json::json!({"report": "lost", "reports": json}));
        assert_eq!(end, "the end");
    }

    #[test]
    fn long_reports_are_bounded_by_their_bytes_and_one_is_always_taken() {
        let (reader, writer) = pipe().unwrap();
        let mut reports = Reports::to(File::from(OwnedFd::from(writer))).unwrap();
        let long = "x".repeat(WAITING_BYTES / 3);
        for _ in 0..9 {
            reports.send(Format::Text, long.clone());
        }
        assert_eq!(reports.lost.text, 6);
        assert!(reports.bytes.load(Ordering::Relaxed) <= WAITING_BYTES);
        assert_eq!(read_all(reports, reader).matches('x').count(), 3 * long.len());

        let (reader, writer) = pipe().unwrap();
        let mut reports = Reports::to(File::from(OwnedFd::from(writer))).unwrap();
        (0..2).for_each(|_| reports.send(Format::Text, "x".repeat(2 * WAITING_BYTES)));
        assert_eq!(reports.lost.text, 1);
        assert_eq!(read_all(reports, reader).matches('x').count(), 2 * WAITING_BYTES);
    }
}
