// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Reports while a guest runs, to stderr, by a thread of their own.
//!
//! Who reads stderr may stop to: a terminal after Ctrl-S, a pager. The event loop must not wait for that, or nobody could end
//! the guest any more, and vCPUs would wait for it in turn. So it hands reports over, and of those for which there is no room it
//! keeps count. They are written through a descriptor and not through std's stderr, which has a lock that vCPU threads take when they log.

use anyhow::{Context, Result};
use std::fs::File;
use std::io::{Write, stderr};
use std::os::fd::AsFd;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;

/// Reports that may wait to be written.
const WAITING: usize = 64;

/// Writes reports.
#[derive(Debug)]
pub(super) struct Reports {
    queue: SyncSender<String>,
    writer: JoinHandle<()>,
    lost: u64,
}

impl Reports {
    /// Starts the thread.
    pub(super) fn to_stderr() -> Result<Self> {
        let out = stderr().as_fd().try_clone_to_owned().context("cannot duplicate stderr")?;
        Self::to(File::from(out))
    }

    fn to(mut out: File) -> Result<Self> {
        let (queue, waiting) = sync_channel::<String>(WAITING);
        let writer = std::thread::Builder::new().name("reports".into()).spawn(move || {
            for report in waiting {
                // A reader that is gone wants no reports; the guest goes on.
                let _ = out.write_all(report.as_bytes());
            }
        });
        Ok(Self { queue, writer: writer.context("cannot start a thread for reports")?, lost: 0 })
    }

    /// Has `report`, whole lines, written; never waits.
    pub(super) fn send(&mut self, report: String) {
        if self.queue.try_send(report).is_err() {
            self.lost += 1;
        }
    }

    /// Has `reports` written too, and waits for who reads them: signals must be able to end umbra by now.
    pub(super) fn finish(self, reports: impl IntoIterator<Item = String>) {
        let lost = (self.lost > 0)
            .then(|| format!("umbra: {} reports were left out: nobody read them in time\n", self.lost));
        for report in lost.into_iter().chain(reports) {
            // Fails only if the writer is gone.
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

    #[test]
    fn nobody_waits_for_a_reader_that_stopped_and_what_is_lost_is_told() {
        let (mut reader, writer) = pipe().unwrap();
        let mut reports = Reports::to(File::from(OwnedFd::from(writer))).unwrap();
        // One fills the pipe, one may be in the writer's hands, `WAITING` are in the queue, the rest finds no room.
        let sent = WAITING + 20;
        for _ in 0..sent {
            reports.send(format!("{}\n", "x".repeat(1 << 17)));
        }
        assert!(reports.lost >= 18, "{}", reports.lost);
        let lost = reports.lost;
        let read = std::thread::spawn(move || {
            let mut all = String::new();
            reader.read_to_string(&mut all).unwrap();
            all
        });
        reports.finish(["the end\n".to_owned()]);
        let all = read.join().unwrap();
        let lines: Vec<_> = all.lines().collect();
        assert_eq!(lines.len() as u64, sent as u64 - lost + 2);
        assert!(lines[lines.len() - 2].contains(&format!("{lost} reports were left out")));
        assert_eq!(lines[lines.len() - 1], "the end");
    }
}
