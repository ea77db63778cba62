// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the integration tests share: a machine to test on, a CPU in software, and things that block on demand.
//!
//! * [`Machine`] is a pool (freed frames poisoned), an `Mm`, a `ShadowMmu` over it and a [`Hook`] on either side.
//! * [`Vcpu`] walks the sptes word by word as an x86 CPU does: P, U, W and NX are checked, A and D are set by
//!   compare-exchange, and what was walked is kept in a TLB that only flushes and faults at the page empty.
//!   A flush waits until the CPU is not in the middle of an access, like KVM's kick. Each access checks that its frame
//!   is not free (I21) and notes it if it is.
//! * [`Gate`] stops whoever passes it while it is shut. Gates sit in [`Hook`] (before or after the shadow map's own
//!   notifier ops), in [`TestFile`] (inside a fault) and in [`SoftTlb`] (inside a flush, with `mmu_lock` held): together
//!   they force the interleavings of the contract's races without touching the code under test.
//! * [`SoftHost`] stands for KVM's memslots of adopted memory.
//!
//! A gate gives up after [`PATIENCE`], and [`limit_run_time`] after all patience: a broken protocol makes a test fail, not
//! hang.
// Each test file uses its part; and what a test does not expect may end it.
#![allow(dead_code, unused_imports, clippy::unwrap_used)]

mod cpu;
mod gate;
mod host;
mod machine;
mod track;

pub(crate) use cpu::{Cached, SoftTlb, Vcpu};
pub(crate) use gate::{Gate, Hook, TestFile};
pub(crate) use host::{SlotCall, SoftHost};
pub(crate) use machine::Machine;
pub(crate) use track::{bitmap_log, ring_log, vcpu_of};

use shadow_mmu::addr::{Access, Hva, PAGE_SIZE};
use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How long a test waits for something that must happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);
/// How long a test watches something that must not happen.
pub(crate) const WATCH: Duration = Duration::from_millis(40);

pub(crate) const READ: Access = Access::READ;
pub(crate) const RW: Access = Access::READ.union(Access::WRITE);
pub(crate) const RX: Access = Access::READ.union(Access::EXEC);
pub(crate) const NONE: Access = Access::empty();

/// Guest frames that the slot of a [`Machine`] covers: all of them, gpa = hva.
pub(crate) const ALL_GFNS: u64 = 1 << 35;

/// The `n`-th page from `base` on.
pub(crate) fn page(base: Hva, n: u64) -> Hva {
    Hva(base.0 + n * PAGE_SIZE)
}

/// `n` pages in bytes.
pub(crate) fn pages(n: u64) -> u64 {
    n * PAGE_SIZE
}

/// Waits until `condition` holds.
#[track_caller]
pub(crate) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "waited in vain until {what}");
        std::thread::sleep(Duration::from_micros(50));
    }
}

/// Ends the process if its tests take longer than ever: where a lock or a retry never ends, that is an answer too.
pub(crate) fn limit_run_time() {
    const LIMIT: Duration = Duration::from_secs(180);
    static WATCH: Once = Once::new();
    WATCH.call_once(|| {
        std::thread::spawn(|| {
            std::thread::sleep(LIMIT);
            eprintln!("the tests have run for {LIMIT:?}: one of them hangs");
            std::process::abort();
        });
    });
}

/// Tells threads to stop, also where the test that would tell them has failed.
#[derive(Debug)]
pub(crate) struct StopOnDrop<'a>(pub(crate) &'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// A small generator, so that a test needs nothing but its seed to be run again (splitmix64).
#[derive(Debug, Clone)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}
