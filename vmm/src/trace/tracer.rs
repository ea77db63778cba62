// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Events from the threads that make them to a thread that writes them.
//!
//! # Protocol
//! Ops run under the locks of the address space, so they do no I/O: they put the event into a queue of [`CAPACITY`] under a
//! lock that is held for a few stores, and wake the writer if it sleeps. The writer takes the whole queue at once, leaves an
//! empty one, and writes without the lock. When the queue is full, events are counted instead: a guest never waits for whoever
//! reads its trace. The count stands where the events are missing.
//!
//! [`Tracer::finish`] writes what is left, pairs that are still open included, and waits for it; so does a drop. It waits for
//! the reader of a full pipe, as every program does that writes to one; so signals must be able to end the process then. The
//! writer may sit in a write at any time, so what it writes to must need no lock that others take: not std's stderr, whose lock
//! every line of the log wants.

use super::event::{Op, TraceEvent, start_clock};
use super::observe::{Observe, Observer};
use super::pairs::Pairs;
use shadow_mmu::notifier::{Invalidation, MmuNotifier};
use shadow_mmu::sync::{Arc, Condvar, Mutex};
use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Write};
use std::thread::JoinHandle;

/// Events that wait for the writer at most: a few hundred milliseconds of a guest that does nothing but unmap.
pub const CAPACITY: usize = 1 << 14;

/// Bytes that are written at once at most: what a pipe takes in one piece (`PIPE_BUF`), so that lines stay whole between what
/// others write to the same pipe.
const PIECE: usize = 4096;

/// How a trace is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// Columns.
    Text,
    /// One JSON object a line.
    Json,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Entry {
    Event(TraceEvent),
    /// This many events are missing here.
    Lost(u64),
}

impl Entry {
    fn write(&self, style: Style, line: &mut String) -> fmt::Result {
        use fmt::Write;
        match (self, style) {
            (Self::Event(event), Style::Text) => writeln!(line, "{event}"),
            (Self::Lost(events), Style::Text) => {
                writeln!(line, "umbra: {events} events lost here: the reader is slower than the guest")
            }
            (Self::Event(event), Style::Json) => {
                writeln!(line, "{}", serde_json::to_string(&event.json()).map_err(|_| fmt::Error)?)
            }
            (Self::Lost(events), Style::Json) => writeln!(line, r#"{{"op":"lost","events":{events}}}"#),
        }
    }
}

#[derive(Debug)]
struct Queue {
    entries: VecDeque<Entry>,
    /// Events that found no room since one did.
    lost: u64,
}

impl Queue {
    fn push(&mut self, event: TraceEvent) {
        // Room for the event, and for the count of those before it.
        if self.entries.len() + 2 > CAPACITY {
            self.lost += 1;
            return;
        }
        self.push_lost();
        self.entries.push_back(Entry::Event(event));
    }

    fn push_lost(&mut self) {
        if self.lost > 0 {
            self.entries.push_back(Entry::Lost(std::mem::take(&mut self.lost)));
        }
    }
}

#[derive(Debug)]
struct State {
    pairs: Pairs,
    queue: Queue,
    writer_sleeps: bool,
    /// Nothing is taken any more.
    over: bool,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// There is something to write, or nothing will come any more.
    news: Condvar,
}

impl Shared {
    fn new() -> Self {
        start_clock();
        let state = State {
            pairs: Pairs::default(),
            queue: Queue { entries: VecDeque::with_capacity(CAPACITY), lost: 0 },
            writer_sleeps: false,
            over: false,
        };
        Self { state: Mutex::new(state), news: Condvar::new() }
    }

    fn tell(&self, change: impl FnOnce(&mut Pairs, &mut Queue)) {
        let mut state = self.state.lock();
        if state.over {
            return;
        }
        let State { pairs, queue, .. } = &mut *state;
        change(pairs, queue);
        // Waking is a system call; one a batch is enough.
        if state.writer_sleeps && !state.queue.entries.is_empty() {
            state.writer_sleeps = false;
            self.news.notify_one();
        }
    }

    /// Ends the trace: what is still open will not end in it.
    fn finish(&self) {
        self.tell(|pairs, queue| {
            queue.push_lost();
            queue.entries.extend(pairs.open().into_iter().map(Entry::Event));
        });
        self.state.lock().over = true;
        self.news.notify_one();
    }

    /// Waits for entries and takes them all, leaving the empty `spare`; `None` at the end.
    fn take(&self, spare: VecDeque<Entry>) -> Option<VecDeque<Entry>> {
        let mut state = self.state.lock();
        loop {
            if !state.queue.entries.is_empty() {
                return Some(std::mem::replace(&mut state.queue.entries, spare));
            }
            if state.over {
                return None;
            }
            state.writer_sleeps = true;
            state = self.news.wait(state);
        }
    }

    fn write(&self, style: Style, out: &mut dyn Write) -> io::Result<()> {
        let result = self.write_until_over(style, out);
        // Whoever cannot write need not be given more.
        self.state.lock().over = true;
        result
    }

    fn write_until_over(&self, style: Style, out: &mut dyn Write) -> io::Result<()> {
        let (mut piece, mut line) = (String::with_capacity(PIECE), String::new());
        let mut spare = VecDeque::with_capacity(CAPACITY);
        while let Some(mut entries) = self.take(spare) {
            for entry in entries.drain(..) {
                line.clear();
                entry.write(style, &mut line).map_err(io::Error::other)?;
                if piece.len() + line.len() > PIECE {
                    out.write_all(piece.as_bytes())?;
                    piece.clear();
                }
                piece.push_str(&line);
            }
            out.write_all(piece.as_bytes())?;
            piece.clear();
            spare = entries;
        }
        out.flush()
    }
}

impl Observe for Shared {
    fn start(&self, invalidation: &Invalidation) {
        self.tell(|pairs, queue| {
            if let Some(never_ended) = pairs.start(invalidation) {
                queue.push(never_ended);
            }
        });
    }

    fn end(&self, invalidation: &Invalidation) {
        self.tell(|pairs, queue| {
            if let Some(event) = pairs.end(invalidation) {
                queue.push(event);
            }
        });
    }

    fn op(&self, op: Op) {
        self.tell(|_, queue| queue.push(TraceEvent::now(op)));
    }
}

/// Writes the events of an address space while they happen.
#[derive(Debug)]
pub struct Tracer {
    shared: Arc<Observer<Shared>>,
    writer: Option<JoinHandle<io::Result<()>>>,
}

impl Tracer {
    /// Starts a writer to `out`, which need not be buffered, and must not hold a lock that others wait for while it writes.
    ///
    /// # Errors
    /// No thread.
    pub fn start(style: Style, mut out: impl Write + Send + 'static) -> io::Result<Self> {
        let shared = Arc::new(Observer(Shared::new()));
        let theirs = Arc::clone(&shared);
        let writer = std::thread::Builder::new()
            .name("trace".into())
            .spawn(move || theirs.0.write(style, &mut out))?;
        Ok(Self { shared, writer: Some(writer) })
    }

    /// What is to be registered with the address space.
    pub fn listener(&self) -> Arc<dyn MmuNotifier> {
        Arc::clone(&self.shared) as _
    }

    /// Returns when everything that was told so far is written. What is told later is not.
    ///
    /// # Errors
    /// What kept the writer from writing; the trace ends there.
    pub fn finish(mut self) -> io::Result<()> {
        self.join()
    }

    fn join(&mut self) -> io::Result<()> {
        let Some(writer) = self.writer.take() else { return Ok(()) };
        self.shared.0.finish();
        writer
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the writer panicked: this is a bug of umbra's")))
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        // Only an error that is on its way to the operator already leaves the tracer to be dropped.
        if let Err(error) = self.join() {
            log::warn!("the trace is not complete: {error}");
        }
    }
}

#[cfg(test)]
mod tests;
