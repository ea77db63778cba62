// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A leaf entry between us and the CPU: no mark is lost, no right is lost, nothing is counted twice (R11). With aging on
//! CPUs that set no marks, and with dirty logs: [`tracking`](crate::tracking).

use crate::addr::{Access, Pfn};
use crate::exhaust::{Preemptions, exhaust};
use crate::mutant::M;
use crate::shadow::entry::{self, Installed};
use crate::shadow::{AdBits, Spte};
use crate::sync::Arc;
use crate::sync::atomic::{AtomicU64, Ordering};

pub(crate) const RW: Access = Access::READ.union(Access::WRITE);
pub(crate) const PFN: Pfn = Pfn(7);

/// The CPU writes through the entry, as the walk of the Intel manual does: checks the rights, sets A and D. Whether it could.
pub(crate) fn cpu_writes(entry: &AtomicU64) -> bool {
    let mut old = Spte(entry.load(Ordering::Relaxed));
    loop {
        if !old.rights().contains(Access::WRITE) {
            return false;
        }
        let new = old.touched(Access::WRITE);
        match entry.compare_exchange(old.0, new.0, Ordering::AcqRel, Ordering::Relaxed) {
            Ok(_) => return true,
            Err(now) => old = Spte(now),
        }
    }
}

pub(crate) fn spawn<R: 'static>(
    entry: &Arc<AtomicU64>,
    run: impl FnOnce(&AtomicU64) -> R + 'static,
) -> loom::thread::JoinHandle<R> {
    let entry = Arc::clone(entry);
    loom::thread::spawn(move || run(&entry))
}

pub(crate) fn now(entry: &AtomicU64) -> Spte {
    Spte(entry.load(Ordering::Relaxed))
}

/// The CPU, and a zap. Three threads with aging.
fn zap() {
    let entry = Arc::new(AtomicU64::new(Spte::leaf(PFN, RW).0));
    let cpu = spawn(&entry, cpu_writes);
    let taken = entry::take(&entry);
    let wrote = cpu.join().unwrap();
    assert_eq!(taken.pfn(), PFN);
    assert_eq!(wrote, taken.is_dirty(), "the CPU wrote: {wrote}; the leaf that was taken: {taken:?}");
    assert_eq!(now(&entry), Spte::NONE);
}

#[test]
fn what_the_cpu_marked_before_a_leaf_was_taken_is_in_what_was_taken() {
    exhaust("zap", Preemptions::Any, zap, &[M::ZapByStore]);
}

/// The CPU, and two who age.
fn age() {
    let entry = Arc::new(AtomicU64::new(Spte::leaf(PFN, RW).touched(Access::READ).0));
    let cpu = spawn(&entry, cpu_writes);
    let ager = spawn(&entry, |entry| entry::clear_young(entry, AdBits::AfterFlush).is_some());
    let _ = entry::clear_young(&entry, AdBits::AfterFlush);
    assert!(cpu.join().unwrap(), "aging takes no right away");
    ager.join().unwrap();
    let left = now(&entry);
    assert!(left.is_dirty() && left.is_writable(), "aging left {left:?}");
}

#[test]
fn aging_clears_a_and_nothing_else() {
    exhaust("age", Preemptions::Any, age, &[M::AgeByStore]);
}

/// Two installs, one of them read-only, and the CPU.
fn install() {
    let entry = Arc::new(AtomicU64::new(0));
    let writer = spawn(&entry, |entry| {
        let installed = entry::install(entry, Spte::leaf(PFN, RW));
        (installed, cpu_writes(entry))
    });
    let here = entry::install(&entry, Spte::leaf(PFN, Access::READ).touched(Access::READ));
    let (there, wrote) = writer.join().unwrap();
    let left = now(&entry);
    assert!(wrote, "the CPU that installed a writable leaf cannot write: {left:?}");
    assert!(left.is_dirty() && left.is_writable(), "a write or a right is lost: {left:?}");
    let new = [here, there].iter().filter(|&&one| one == Installed::New).count();
    assert_eq!(new, 1, "{here:?} and {there:?}: one leaf is new, and is counted once");
}

#[test]
fn of_two_installs_one_is_new_and_no_right_is_lost() {
    exhaust("install", Preemptions::Any, install, &[M::InstallByStore]);
}

/// An upgrade of a leaf that the CPU marks at the same time, and aging.
fn upgrade() {
    let entry = Arc::new(AtomicU64::new(Spte::leaf(PFN, RW).0));
    let cpu = spawn(&entry, cpu_writes);
    let ager = spawn(&entry, |entry| entry::clear_young(entry, AdBits::AfterFlush).is_some());
    let _ = entry::install(&entry, Spte::leaf(PFN, Access::all()));
    assert!(cpu.join().unwrap());
    ager.join().unwrap();
    let left = now(&entry);
    assert!(left.is_dirty() && left.rights() == Access::all(), "an upgrade left {left:?}");
}

#[test]
fn an_upgrade_keeps_the_marks() {
    exhaust("upgrade", Preemptions::Any, upgrade, &[M::UpgradeForgetsMarks, M::InstallByStore]);
}
