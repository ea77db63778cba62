// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `bench notifier`: what it costs to tell listeners of one pair, beside other ways to guard their list.
//!
//! | contestant | the list of listeners is |
//! | --- | --- |
//! | `umbra` | [`Notifiers`](shadow_mmu::notifier::Notifiers): a vector that read sections of sleepable RCU keep alive |
//! | `rwlock` | `RwLock<Vec<Arc<dyn MmuNotifier>>>` of the standard library, locked for reading around each walk |
//! | `arc-swap` | `ArcSwap<Vec<Arc<dyn MmuNotifier>>>`, loaded for each walk |
//!
//! A pair is two walks: `invalidate_range_start` of every listener, then `invalidate_range_end` of each. (None of the
//! listeners is a device that walks the primary's tables, which would also be told `invalidate_range`.) The walks, the
//! listeners and the arguments are the same for all three. What the other two do not give is what umbra's list is for: that
//! unregistering waits for running ops (a writer of the lock does, and keeps every later reader out meanwhile), and that it
//! may be done while an op sleeps.
//!
//! | row | what |
//! | --- | --- |
//! | `X.N` | a pair with N listeners, one thread |
//! | `X.N.threads` | the same on a thread for every core at once, each on its own; time of one pair on one thread |
//! | `X.N.threads.throughput` | pairs that all threads together make in a second |
//!
//! Two ratios a contestant: `Y.N/umbra.N`, and `X.N.threads.speedup`, throughput of all threads over that of one.

use super::{Host, Measure, Report, Row, measure, ratios};
use anyhow::{Context, Result};
use arc_swap::ArcSwap;
use shadow_mmu::addr::{Hva, HvaRange, PAGE_SIZE};
use shadow_mmu::frame::{FramePool, FreedFrames};
use shadow_mmu::mm::Mm;
use shadow_mmu::notifier::{Blockable, Event, Invalidation, MmuNotifier, WouldBlock};
use std::cell::RefCell;
use std::hint::black_box;
use std::sync::{Arc, Barrier, PoisonError, RwLock};
use std::time::{Duration, Instant};

/// Numbers of listeners that are measured.
const LISTENERS: [usize; 3] = [0, 1, 4];

/// Pairs between two looks at the clock.
const BLOCK: u32 = 1024;

type List = Vec<Arc<dyn MmuNotifier>>;

/// A listener with nothing to do, which the compiler may not know.
#[derive(Debug)]
struct Idle;

impl MmuNotifier for Idle {
    fn invalidate_range_start(&self, invalidation: &Invalidation) -> Result<(), WouldBlock> {
        black_box(invalidation);
        Ok(())
    }
    fn invalidate_range_end(&self, invalidation: &Invalidation) {
        black_box(invalidation);
    }
}

fn listeners(count: usize) -> List {
    (0..count).map(|_| Arc::new(Idle) as Arc<dyn MmuNotifier>).collect()
}

/// A guarded list of listeners.
trait Contestant: Sync {
    /// Opens and closes [`BLOCK`] pairs over the page at `at`, one after the other.
    fn pairs(&self, at: Hva);
}

#[derive(Debug)]
struct Umbra(Arc<Mm>);

impl Umbra {
    fn new(count: usize) -> Result<Self> {
        let pool = FramePool::new(1 << 20, FreedFrames::Keep).context("cannot make a frame pool")?;
        let mm = Mm::new(Arc::new(pool))?;
        for listener in listeners(count) {
            mm.register(listener)?;
        }
        Ok(Self(mm))
    }
}

impl Contestant for Umbra {
    fn pairs(&self, at: Hva) {
        for _ in 0..BLOCK {
            let pair = self.0.notifiers().invalidate(range(at), Event::Clear);
            // Here the primary would change its ptes.
            black_box(at);
            drop(pair);
        }
    }
}

/// One page, of which the compiler knows nothing.
#[inline]
fn range(at: Hva) -> HvaRange {
    let start = black_box(at.0);
    HvaRange { start: Hva(start), end: Hva(start + PAGE_SIZE) }
}

fn invalidation(at: Hva) -> Invalidation {
    Invalidation { range: range(at), event: Event::Clear, blockable: Blockable::Yes }
}

/// The first walk of a pair, as umbra's.
fn walk_start(list: &List, invalidation: &Invalidation) {
    for listener in list {
        if listener.invalidate_range_start(invalidation).is_err() {
            log::error!("{listener:?} refused a blockable invalidation");
        }
    }
}

/// The second.
fn walk_end(list: &List, invalidation: &Invalidation) {
    for listener in list {
        listener.invalidate_range_end(invalidation);
    }
}

#[derive(Debug)]
struct Locked(RwLock<List>);

impl Contestant for Locked {
    fn pairs(&self, at: Hva) {
        for _ in 0..BLOCK {
            let invalidation = invalidation(at);
            walk_start(&self.0.read().unwrap_or_else(PoisonError::into_inner), &invalidation);
            black_box(at);
            walk_end(&self.0.read().unwrap_or_else(PoisonError::into_inner), &invalidation);
        }
    }
}

#[derive(Debug)]
struct Swapped(ArcSwap<List>);

impl Contestant for Swapped {
    fn pairs(&self, at: Hva) {
        for _ in 0..BLOCK {
            let invalidation = invalidation(at);
            walk_start(&self.0.load(), &invalidation);
            black_box(at);
            walk_end(&self.0.load(), &invalidation);
        }
    }
}

/// Makes pairs for about `window`, over page `n` of an address space; returns nanoseconds a pair.
fn nanoseconds_a_pair(contestant: &dyn Contestant, n: u64, window: Duration) -> f64 {
    let at = Hva((1 << 30) + (n << 12));
    let began = Instant::now();
    let mut pairs = 0u64;
    loop {
        contestant.pairs(at);
        pairs += u64::from(BLOCK);
        let took = began.elapsed();
        if took >= window {
            return took.as_nanos() as f64 / pairs as f64;
        }
    }
}

/// The same on `threads` threads at once; each one's.
fn nanoseconds_on_threads(contestant: &dyn Contestant, threads: usize, window: Duration) -> Vec<f64> {
    let together = Barrier::new(threads);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads as u64)
            .map(|n| {
                let together = &together;
                scope.spawn(move || {
                    together.wait();
                    nanoseconds_a_pair(contestant, n, window)
                })
            })
            .collect();
        // A thread that panicked took its message to stderr; the others' figures are then of no use.
        threads.into_iter().map(|thread| thread.join().unwrap_or(f64::NAN)).collect()
    })
}

/// Runs the benchmark, `runs` times `window` for each of 18 rows.
///
/// # Errors
/// No memory for an address space of a few pages.
pub fn bench_notifier(window: Duration, runs: usize, progress: &mut dyn FnMut(&str)) -> Result<Report> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut contestants: Vec<(String, Box<dyn Contestant>)> = Vec::new();
    for count in LISTENERS {
        contestants.push((format!("umbra.{count}"), Box::new(Umbra::new(count)?)));
        contestants.push((format!("rwlock.{count}"), Box::new(Locked(RwLock::new(listeners(count))))));
        let swapped = Swapped(ArcSwap::from_pointee(listeners(count)));
        contestants.push((format!("arc-swap.{count}"), Box::new(swapped)));
    }
    let together: Vec<_> = contestants.iter().map(|(name, _)| format!("{name}.threads")).collect();
    // Of each contestant, in every run, the one that does not count included.
    let throughputs: Vec<_> = contestants.iter().map(|_| RefCell::new(Vec::new())).collect();

    let mut measures: Vec<Measure<'_>> = Vec::new();
    for (name, contestant) in &contestants {
        measures.push(Measure::required(name, || Ok(nanoseconds_a_pair(&**contestant, 0, window))));
    }
    for (((_, contestant), name), throughput) in contestants.iter().zip(&together).zip(&throughputs) {
        measures.push(Measure::required(name, move || {
            let each = nanoseconds_on_threads(&**contestant, threads, window);
            throughput.borrow_mut().push(each.iter().map(|nanoseconds| 1e9 / nanoseconds).sum());
            Ok(each.iter().sum::<f64>() / each.len() as f64)
        }));
    }
    let (mut rows, missing) = measure("ns/pair", runs, measures, progress)?;

    let mut pairs = Vec::new();
    for count in LISTENERS {
        for threads in ["", ".threads"] {
            for other in ["rwlock", "arc-swap"] {
                pairs.push((format!("{other}.{count}{threads}"), format!("umbra.{count}{threads}")));
            }
        }
    }
    let pairs: Vec<_> = pairs.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
    let mut ratios = ratios(&rows, &pairs);
    for ((name, _), throughput) in contestants.iter().zip(throughputs) {
        let counted = throughput.into_inner().split_off(1);
        let row = Row::of(&format!("{name}.threads.throughput"), "pairs/s", counted);
        if let Some(alone) = rows.iter().find(|row| row.name == *name) {
            ratios.insert(format!("{name}.threads.speedup"), row.median * alone.median / 1e9);
        }
        rows.push(row);
    }
    Ok(Report {
        bench: "notifier".into(),
        host: Host::without_guests(),
        rows,
        ratios,
        missing,
        notes: Vec::new(),
        lines: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    /// Counts what it hears.
    #[derive(Debug, Default)]
    struct Counter {
        starts: AtomicU64,
        ends: AtomicU64,
    }

    impl MmuNotifier for Counter {
        fn invalidate_range_start(&self, _: &Invalidation) -> Result<(), WouldBlock> {
            self.starts.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
        fn invalidate_range_end(&self, _: &Invalidation) {
            self.ends.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn all_contestants_tell_the_same() {
        let umbra = Umbra::new(1).unwrap();
        let (ours, locked, swapped) =
            (Arc::<Counter>::default(), Arc::<Counter>::default(), Arc::<Counter>::default());
        umbra.0.register(Arc::clone(&ours) as _).unwrap();
        let list = |counter: &Arc<Counter>| vec![Arc::clone(counter) as Arc<dyn MmuNotifier>];
        let contestants: [(Box<dyn Contestant>, _); 3] = [
            (Box::new(umbra), ours),
            (Box::new(Locked(RwLock::new(list(&locked)))), locked),
            (Box::new(Swapped(ArcSwap::from_pointee(list(&swapped)))), swapped),
        ];
        for (contestant, counter) in contestants {
            contestant.pairs(Hva(0x1000));
            for heard in [&counter.starts, &counter.ends] {
                assert_eq!(heard.load(Ordering::Relaxed), u64::from(BLOCK), "{counter:?}");
            }
        }
    }

    #[test]
    fn the_report_has_every_row_and_ratio() {
        let report = bench_notifier(Duration::from_nanos(1), 2, &mut |_| {}).unwrap();
        assert!(report.missing.is_empty(), "{:?}", report.missing);
        assert!(report.text().starts_with("notifier, Linux "), "{}", report.text());
        for contestant in ["umbra", "rwlock", "arc-swap"] {
            for count in LISTENERS {
                for (suffix, unit) in
                    [("", "ns/pair"), (".threads", "ns/pair"), (".threads.throughput", "pairs/s")]
                {
                    let name = format!("{contestant}.{count}{suffix}");
                    let row = report.rows.iter().find(|row| row.name == name).expect(&name);
                    assert_eq!((row.unit.as_str(), row.runs), (unit, 2), "{name}");
                    assert!(row.min > 0.0 && row.max.is_finite(), "{row:?}");
                }
                let speedup = format!("{contestant}.{count}.threads.speedup");
                assert!(report.ratios.contains_key(&speedup), "{speedup}");
                for threads in ["", ".threads"] {
                    let ratio = format!("{contestant}.{count}{threads}/umbra.{count}{threads}");
                    assert_eq!(report.ratios.contains_key(&ratio), contestant != "umbra", "{ratio}");
                }
            }
        }
        assert_eq!(report.rows.len(), 27);
    }
}
