// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Sequence, windows and retry: a secondary MMU of one page, whose faults look the page up without its lock.

use crate::exhaust::{Preemptions, exhaust};
use crate::mutant::M;
use crate::notifier::windows::{Sequence, Windows};
use crate::notifier::{Invalidation, MmuNotifier, WouldBlock};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Arc, Mutex, RwLock};

/// The page that everything is about; frames are numbers from 1, and 0 is none.
const PAGE: std::ops::Range<u64> = 5..6;
const OTHER: std::ops::Range<u64> = 8..9;

/// The secondary, and the primary's pte for the page.
#[derive(Debug)]
pub(crate) struct Mmu {
    sequence: Sequence,
    windows: RwLock<Windows>,
    spte: AtomicU64,
    /// The primary's pte, under its own lock.
    pte: Mutex<u64>,
}

impl Mmu {
    pub(crate) fn new() -> Arc<Self> {
        let (sequence, windows) = (Sequence::default(), RwLock::default());
        Arc::new(Self { sequence, windows, spte: AtomicU64::new(0), pte: Mutex::new(1) })
    }

    /// One try of a fault, in the order of the protocol: F1, F2, F3.
    pub(crate) fn fault(&self) {
        let begun = self.sequence.snapshot();
        let pfn = *self.pte.lock();
        let windows = self.windows.read();
        if pfn != 0 && !windows.must_retry(begun, &self.sequence, &PAGE) {
            self.spte.store(pfn, Ordering::Relaxed);
        }
    }

    /// A pair over the page, in which its pte becomes `pfn`.
    fn change(&self, pfn: u64) {
        self.start(PAGE);
        self.set_pte(pfn);
        self.end(PAGE);
    }

    /// Inside a pair.
    pub(crate) fn set_pte(&self, pfn: u64) {
        *self.pte.lock() = pfn;
    }

    fn start(&self, pages: std::ops::Range<u64>) {
        let mut windows = self.windows.write();
        if pages == PAGE {
            self.spte.store(0, Ordering::Relaxed);
        }
        windows.open(pages);
    }

    fn end(&self, pages: std::ops::Range<u64>) {
        // Whether it finds its start is not what is asked here: with some mutants it does not.
        let _ = self.windows.write().close(&pages, &self.sequence);
    }

    /// With no window open: the secondary has nothing, or what the primary has (I13).
    pub(crate) fn check(&self) {
        let (spte, pte) = (self.spte.load(Ordering::Relaxed), *self.pte.lock());
        assert!(spte == 0 || spte == pte, "the secondary has frame {spte}, the primary {pte} (I13)");
    }
}

/// As a listener: whatever the range is, it is about the page.
impl MmuNotifier for Mmu {
    fn invalidate_range_start(&self, _: &Invalidation) -> Result<(), WouldBlock> {
        self.start(PAGE);
        Ok(())
    }
    fn invalidate_range_end(&self, _: &Invalidation) {
        self.end(PAGE);
    }
}

fn spawn(mmu: &Arc<Mmu>, run: fn(&Mmu)) -> loom::thread::JoinHandle<()> {
    let mmu = Arc::clone(mmu);
    loom::thread::spawn(move || run(&mmu))
}

/// A fault and a pair, which takes the page away.
fn one_pair() {
    let mmu = Mmu::new();
    let fault = spawn(&mmu, Mmu::fault);
    mmu.change(0);
    fault.join().unwrap();
    mmu.check();
}

#[test]
fn r1_r4_a_fault_and_a_pair() {
    exhaust("one_pair", Preemptions::Any, one_pair, &[M::NoWindow, M::EndDoesNotStep]);
}

/// A fault and two pairs, which replace the frame twice (R5), by threads of their own.
fn two_pairs() {
    let mmu = Mmu::new();
    let fault = spawn(&mmu, Mmu::fault);
    let second = spawn(&mmu, |mmu| mmu.change(3));
    mmu.change(2);
    fault.join().unwrap();
    second.join().unwrap();
    mmu.check();
}

#[test]
fn r5_a_fault_and_two_pairs() {
    exhaust(
        "two_pairs",
        Preemptions::AtMost(3),
        two_pairs,
        &[M::NoWindow, M::EndDoesNotStep, M::EndClosesAll],
    );
}

/// A fault, a pair, and a pair over another page that ends at any time (R6).
fn other_window() {
    let mmu = Mmu::new();
    mmu.start(OTHER);
    let fault = spawn(&mmu, Mmu::fault);
    let other = spawn(&mmu, |mmu| mmu.end(OTHER));
    mmu.start(PAGE);
    mmu.set_pte(0);
    let spte = mmu.spte.load(Ordering::Relaxed);
    assert_eq!(spte, 0, "the secondary has a frame in the window (I2)");
    mmu.end(PAGE);
    fault.join().unwrap();
    other.join().unwrap();
    mmu.check();
}

#[test]
fn r6_a_fault_and_two_windows() {
    exhaust("other_window", Preemptions::Any, other_window, &[M::EndClosesAll, M::NoWindow]);
}

/// A fault, and the end of the address space (R17): what is looked up before it is not installed behind it.
fn released() {
    let mmu = Mmu::new();
    let fault = spawn(&mmu, |mmu| {
        mmu.fault();
        mmu.fault();
    });
    {
        let mut windows = mmu.windows.write();
        windows.release(&mmu.sequence);
        mmu.spte.store(0, Ordering::Relaxed);
    }
    fault.join().unwrap();
    assert_eq!(mmu.spte.load(Ordering::Relaxed), 0, "a frame is mapped after release (I8)");
}

#[test]
fn r17_a_fault_and_the_end_of_the_space() {
    exhaust("released", Preemptions::Any, released, &[M::ReleaseForgotten]);
}
