// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The tracer, fed by an address space and by hand, with writers of all kinds.

use super::*;
use crate::trace::set_guest_thread;
use serde_json::Value;
use shadow_mmu::addr::{Access, Hva, HvaRange};
use shadow_mmu::frame::{FramePool, FreedFrames};
use shadow_mmu::mm::{Backing, FaultRequest, MapFlags, Mm};
use shadow_mmu::notifier::{Blockable, Event};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// What was written, in the pieces in which it was.
#[derive(Debug, Clone, Default)]
struct Pieces(Arc<Mutex<Vec<String>>>);

impl Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().push(String::from_utf8(bytes.to_vec()).unwrap());
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Pieces {
    fn text(&self) -> String {
        self.0.lock().concat()
    }
    fn json(&self) -> Vec<Value> {
        self.text().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

/// Lets nothing through before it is told to.
#[derive(Debug)]
struct Stuck {
    gate: mpsc::Receiver<()>,
    pieces: Pieces,
}

impl Write for Stuck {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // An error says that the gate is gone: open for good.
        let _ = self.gate.recv();
        self.pieces.write(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn mm() -> Arc<Mm> {
    Mm::new(Arc::new(FramePool::new(1 << 20, FreedFrames::Keep).unwrap())).unwrap()
}

fn page(n: u64) -> HvaRange {
    HvaRange::page(Hva(n << 12))
}

#[test]
fn a_trace_has_every_event_of_an_address_space() {
    let (mm, pieces) = (mm(), Pieces::default());
    let tracer = Tracer::start(Style::Json, pieces.clone()).unwrap();
    mm.register(tracer.listener()).unwrap();
    let rw = Access::READ | Access::WRITE;
    let at = mm.mmap(Hva(0), 0x3000, rw, MapFlags::PRIVATE, Backing::Anonymous).unwrap();
    // A zero page that is then written: copied, which takes a pte away.
    mm.fault(&FaultRequest::one_page(at, Access::READ)).unwrap();
    mm.fault(&FaultRequest::one_page(at, Access::WRITE)).unwrap();
    mm.mprotect(at, 0x3000, Access::READ).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            set_guest_thread(77);
            mm.munmap(at, 0x2000).unwrap();
        });
    });
    mm.release();
    tracer.finish().unwrap();
    let told: Vec<_> = pieces
        .json()
        .iter()
        .map(|line| {
            let of = |key: &str| line[key].as_str().unwrap_or("-").to_owned();
            (of("op"), of("reason"), line["pages"].as_u64().unwrap_or(0), line["tid"].as_i64())
        })
        .collect();
    let event = |op: &str, reason: &str, pages, tid| (op.to_owned(), reason.to_owned(), pages, tid);
    assert_eq!(
        told,
        [
            event("change_pte", "-", 1, None),
            event("invalidate", "Clear", 1, None),
            event("invalidate", "ProtectionVma", 3, None),
            event("invalidate", "Unmap", 2, Some(77)),
            event("release", "-", 0, None),
        ]
    );
    for line in pieces.json() {
        assert_eq!(line["duration_ns"].is_u64(), line["op"] == "invalidate", "{line}");
    }
}

#[test]
fn the_ops_of_aging_are_told_and_no_page_is_young_because_of_it() {
    let (mm, pieces) = (mm(), Pieces::default());
    let tracer = Tracer::start(Style::Text, pieces.clone()).unwrap();
    mm.register(tracer.listener()).unwrap();
    assert!(!mm.notifiers().clear_flush_young(page(1)));
    assert!(!mm.notifiers().clear_young(page(2)));
    assert!(!mm.notifiers().test_young(Hva(0x3000)));
    mm.notifiers().invalidate_page(Hva(0x4000));
    tracer.finish().unwrap();
    let text = pieces.text();
    let ops: Vec<_> = text.lines().filter_map(|line| line.split_whitespace().nth(3)).collect();
    assert_eq!(ops, ["clear_flush_young", "clear_young", "test_young", "invalidate_page"], "{text}");
}

#[test]
fn a_pair_that_is_open_at_the_end_is_told_without_a_duration() {
    let pieces = Pieces::default();
    let tracer = Tracer::start(Style::Text, pieces.clone()).unwrap();
    // As a listener sees it that is taken off the list inside the pair.
    let pair = Invalidation { range: page(1), event: Event::Clear, blockable: Blockable::Yes };
    tracer.listener().invalidate_range_start(&pair).unwrap();
    let listener = tracer.listener();
    tracer.finish().unwrap();
    listener.invalidate_range_end(&pair);
    let text = pieces.text();
    assert!(text.contains("Clear") && text.ends_with("  not ended\n"), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
}

#[test]
fn whoever_makes_events_never_waits_for_the_reader_and_losses_are_counted_where_they_are() {
    let (open, gate) = mpsc::channel();
    let pieces = Pieces::default();
    let tracer = Tracer::start(Style::Json, Stuck { gate, pieces: pieces.clone() }).unwrap();
    let listener = tracer.listener();
    // One queue may be with the writer and one waits for it; the third finds no room.
    let told = 3 * CAPACITY as u64;
    (0..told).for_each(|n| listener.invalidate_page(Hva(n << 12)));
    drop(open);
    // The writer comes and takes them: from then on there is room, and the gap has its place.
    let began = Instant::now();
    while listener_lost(&tracer) {
        assert!(began.elapsed() < Duration::from_secs(60), "there is room, and nobody is told of the gap");
        listener.invalidate_page(Hva(told << 12));
        std::thread::yield_now();
    }
    tracer.finish().unwrap();
    let lines = pieces.json();
    let (mut next, mut lost) = (0, 0);
    for line in lines.iter().filter(|line| line["start"] != told << 12) {
        match line["op"].as_str().unwrap() {
            "lost" => {
                let events = line["events"].as_u64().unwrap();
                lost += events;
                next += events;
            }
            _ => {
                assert_eq!(line["start"], next << 12, "events are missing before this one, and not counted");
                next += 1;
            }
        }
    }
    assert!(lost >= told - 2 * CAPACITY as u64, "{lost} of {told}");
    assert!(next >= told, "{next} of {told}");
    assert_ne!(lines.last().unwrap()["op"], "lost", "the gap was not at the end");
}

/// Whether there are losses that nobody was told of yet.
fn listener_lost(tracer: &Tracer) -> bool {
    tracer.shared.0.state.lock().queue.lost > 0
}

#[test]
fn losses_at_the_end_are_counted_too() {
    let (open, gate) = mpsc::channel();
    let pieces = Pieces::default();
    let tracer = Tracer::start(Style::Text, Stuck { gate, pieces: pieces.clone() }).unwrap();
    let listener = tracer.listener();
    listener.release();
    // Once the writer has that, it is stuck, and nobody empties the queue.
    while !tracer.shared.0.state.lock().queue.entries.is_empty() {
        std::thread::yield_now();
    }
    (0..2 * CAPACITY as u64).for_each(|n| listener.invalidate_page(Hva(n << 12)));
    std::thread::scope(|scope| {
        let finished = scope.spawn(|| tracer.finish());
        drop(open);
        finished.join().unwrap().unwrap();
    });
    let text = pieces.text();
    let last = text.lines().last().unwrap();
    assert!(last.starts_with("umbra: ") && last.contains("events lost here"), "{last}");
}

#[test]
fn pieces_are_whole_lines_and_fit_into_a_pipe() {
    let pieces = Pieces::default();
    let tracer = Tracer::start(Style::Text, pieces.clone()).unwrap();
    let listener = tracer.listener();
    (0..5000).for_each(|n| listener.invalidate_page(Hva(n << 12)));
    tracer.finish().unwrap();
    let pieces = pieces.0.lock();
    assert!(pieces.iter().all(|piece| piece.len() <= PIECE && piece.ends_with('\n')));
    assert_eq!(pieces.iter().flat_map(|piece| piece.lines()).count(), 5000);
}

#[test]
fn an_error_of_the_writer_is_told_and_harms_nobody() {
    struct Full;
    impl Write for Full {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::StorageFull.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let tracer = Tracer::start(Style::Text, Full).unwrap();
    let listener = tracer.listener();
    (0..2 * CAPACITY as u64).for_each(|n| listener.invalidate_page(Hva(n << 12)));
    assert_eq!(tracer.finish().unwrap_err().kind(), io::ErrorKind::StorageFull);
    listener.release();
}
