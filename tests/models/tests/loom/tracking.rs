// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A leaf entry that is aged and logged: access tracking, the fault that gives back what it took, write protection, the D bit
//! (R11, I48, I50). Whoever needs `mmu_lock` for writing in the real code is alone here with the CPU; the others meet each
//! other.

use crate::addr::Access;
use crate::entries::{PFN, RW, cpu_writes, now, spawn};
use crate::exhaust::{Preemptions, exhaust};
use crate::mutant::M;
use crate::shadow::entry::{self, Installed, Restored};
use crate::shadow::{AdBits, Spte};
use crate::sync::Arc;
use crate::sync::atomic::{AtomicU64, Ordering};

const READ: Access = Access::READ;
const RX: Access = Access::READ.union(Access::EXEC);

fn entry_of(spte: Spte) -> Arc<AtomicU64> {
    Arc::new(AtomicU64::new(spte.0))
}

/// The CPU reads through the entry: sets A. Whether it could.
fn cpu_reads(entry: &AtomicU64) -> bool {
    let mut old = Spte(entry.load(Ordering::Relaxed));
    loop {
        if !old.rights().contains(READ) {
            return false;
        }
        match entry.compare_exchange(old.0, old.touched(READ).0, Ordering::AcqRel, Ordering::Relaxed) {
            Ok(_) => return true,
            Err(now) => old = Spte(now),
        }
    }
}

/// A report takes W from a leaf that the CPU writes through.
fn write_protect() {
    let entry = entry_of(Spte::leaf(PFN, RW));
    let cpu = spawn(&entry, cpu_writes);
    let taken = entry::write_protect(&entry).expect("it had W, and nobody else takes it");
    let (wrote, left) = (cpu.join().unwrap(), now(&entry));
    assert!(!left.is_writable() && left.is_mmu_writable() && left.is_legal(), "{left:?}");
    assert_eq!(wrote, left.is_dirty(), "the CPU wrote: {wrote}; what is left: {left:?} (I25)");
    assert_eq!(taken.pfn(), PFN);
}

#[test]
fn r11_write_protection_takes_w_and_nothing_else() {
    exhaust("write_protect", Preemptions::Any, write_protect, &[M::WriteProtectByStore]);
}

/// A report takes D while the CPU sets A, and D again.
fn clear_dirty() {
    let entry = entry_of(Spte::leaf(PFN, RW).touched(Access::WRITE).old());
    let cpu = spawn(&entry, cpu_writes);
    let taken = entry::clear_dirty(&entry).expect("it had D, and nobody else takes it");
    assert!(cpu.join().unwrap(), "clearing D takes no right away");
    let left = now(&entry);
    assert!(taken.is_dirty() && left.rights() == RW, "{taken:?}, then {left:?}");
    assert!(left.is_accessed(), "the CPU has set A, and only D was cleared: {left:?}");
}

#[test]
fn r11_clearing_d_clears_nothing_else() {
    exhaust("clear_dirty", Preemptions::Any, clear_dirty, &[M::ClearDirtyByStore]);
}

/// On a CPU that sets neither mark: two who age, and a fault that gives W back.
fn track() {
    let entry = entry_of(Spte::leaf(PFN, RW).write_protected());
    let fault = spawn(&entry, |entry| entry::restore(entry, RW, || {}));
    let ager = spawn(&entry, |entry| entry::clear_young(entry, AdBits::None).is_some());
    let here = entry::clear_young(&entry, AdBits::None).is_some();
    let (restored, there) = (fault.join().unwrap(), ager.join().unwrap());
    let left = now(&entry);
    let gave_write = matches!(restored, Restored::Write | Restored::AccessAndWrite);
    assert!(gave_write, "the leaf had no W, and may have it: {restored:?}");
    assert!(left.is_dirty(), "W came back, and D with it: {left:?} (I25)");
    assert!(left.is_leaf() && left.is_legal() && left.pfn() == PFN, "{left:?}");
    // Tracked last, or restored last: then with all that was asked for (I50).
    assert!(left.rights().is_empty() || left.rights() == RW, "{left:?}");
    assert!(here || there, "the leaf was young, and nobody found it so");
}

#[test]
fn i48_i50_tracking_and_a_fault_lose_nothing_of_each_other() {
    let mutants = [M::AccessTrackByStore, M::RestoreByStore, M::TrackedForgetsDirty];
    exhaust("track", Preemptions::Any, track, &mutants);
}

/// Two faults at a leaf that is tracked: one reads, one writes.
fn restore() {
    let entry = entry_of(Spte::leaf(PFN, RW).access_tracked());
    let writer = spawn(&entry, |entry| entry::restore(entry, RW, || {}));
    let reader = entry::restore(&entry, READ, || {});
    let writer = writer.join().unwrap();
    let left = now(&entry);
    let gave_write = matches!(writer, Restored::Write | Restored::AccessAndWrite);
    assert!(gave_write, "who gives W says so, for the statistics: {writer:?}");
    assert!(matches!(reader, Restored::Access | Restored::Already), "{reader:?}");
    assert!(left.rights() == RW && left.is_dirty(), "a write or a right is lost: {left:?}");
}

#[test]
fn i50_of_two_faults_none_takes_from_the_other() {
    exhaust("restore", Preemptions::Any, restore, &[M::RestoreByStore]);
}

/// What the primary alone may give is not given back: W of a page that is read-only there, and anything where there is no leaf.
fn no_leave() {
    let read_only = entry_of(Spte::leaf(PFN, READ));
    let ager = spawn(&read_only, |entry| entry::clear_young(entry, AdBits::None).is_some());
    let restored = entry::restore(&read_only, RW, || {});
    ager.join().unwrap();
    assert_eq!(restored, Restored::No, "{:?}", now(&read_only));
    assert!(now(&read_only).is_legal() && !now(&read_only).is_writable(), "{:?}", now(&read_only));
    let none = AtomicU64::new(0);
    assert_eq!((entry::restore(&none, READ, || {}), now(&none)), (Restored::No, Spte::NONE));
}

#[test]
fn i50_only_the_primary_gives_what_tracking_has_not_taken() {
    let mutants = [M::RestoreWithoutLeave, M::RestoreOfNothing];
    exhaust("no_leave", Preemptions::Any, no_leave, &mutants);
}

/// A leaf that is tracked while another fault adds to it what it may have by now.
fn track_and_upgrade() {
    let entry = entry_of(Spte::leaf(PFN, READ).touched(READ));
    let ager = spawn(&entry, |entry| entry::clear_young(entry, AdBits::None).is_some());
    let reader = spawn(&entry, |entry| entry::restore(entry, READ, || {}));
    let installed = entry::install(&entry, Spte::leaf(PFN, RW).touched(RW));
    ager.join().unwrap();
    let (restored, left) = (reader.join().unwrap(), now(&entry));
    assert_eq!(installed, Installed::Upgraded, "there was a leaf without W");
    assert_ne!(restored, Restored::No, "a leaf can be read, tracked or not");
    assert!(left.is_leaf() && left.is_legal() && left.is_mmu_writable(), "{left:?}");
    assert!(left.is_dirty(), "a leaf that was installed for a write has lost D: {left:?} (I25)");
}

#[test]
fn an_upgrade_and_tracking_lose_nothing_of_each_other() {
    let mutants = [M::InstallByStore, M::AccessTrackByStore, M::TrackedForgetsDirty];
    exhaust("track_and_upgrade", Preemptions::Any, track_and_upgrade, &mutants);
}

/// A CPU that sets the marks, a report that takes D, then one that takes the leaf: what was written is in one of the two (I25).
fn dirty_then_gone() {
    let entry = entry_of(Spte::leaf(PFN, RX | RW));
    let cpu = spawn(&entry, |entry| (cpu_reads(entry), cpu_writes(entry)));
    let reported = entry::clear_dirty(&entry).is_some();
    let removed = entry::take(&entry);
    let (_, wrote) = cpu.join().unwrap();
    assert_eq!(
        wrote,
        reported || removed.is_dirty(),
        "the CPU wrote: {wrote}; {reported}, {removed:?} (I25)"
    );
    assert_eq!(now(&entry), Spte::NONE);
}

#[test]
fn i25_d_is_reported_or_goes_with_the_leaf() {
    exhaust("dirty_then_gone", Preemptions::Any, dirty_then_gone, &[M::ZapByStore]);
}

/// A scan takes D while the CPU sets it.
fn clear_written() {
    let entry = entry_of(Spte::leaf(PFN, RW).touched(Access::WRITE));
    let cpu = spawn(&entry, |entry| (cpu_reads(entry), cpu_writes(entry)));
    let taken = entry::clear_written(&entry, AdBits::AfterFlush).expect("it had D, and nobody else takes it");
    let (_, wrote) = cpu.join().unwrap();
    let left = now(&entry);
    assert!(wrote && taken.is_dirty() && left.rights() == RW, "{taken:?}, then {left:?}");
    assert!(left.is_accessed(), "A was there, and only D was cleared: {left:?}");
}

#[test]
fn r11_a_scan_takes_d_and_nothing_else() {
    let cleared_of_a = || {
        let entry = entry_of(Spte::leaf(PFN, RW).touched(Access::WRITE).old());
        let cpu = spawn(&entry, cpu_reads);
        assert!(entry::clear_written(&entry, AdBits::Unflushed).is_some());
        assert!(cpu.join().unwrap());
        assert!(now(&entry).is_accessed(), "the CPU has set A: {:?}", now(&entry));
    };
    exhaust("clear_written", Preemptions::Any, clear_written, &[]);
    exhaust("clear_written_accessed", Preemptions::Any, cleared_of_a, &[M::ClearWrittenByStore]);
}

/// On a CPU that sets no marks: a scan takes D, and W with it; a fault gives both back.
fn clear_written_without_marks() {
    let entry = entry_of(Spte::leaf(PFN, RW).touched(Access::WRITE));
    let vcpu = spawn(&entry, |entry| {
        let restored = entry::restore(entry, RW, || {});
        // The CPU sets nothing.
        let writes = now(entry).is_writable();
        (restored, writes)
    });
    let first = entry::clear_written(&entry, AdBits::None);
    let second = entry::clear_written(&entry, AdBits::None);
    let (restored, _) = vcpu.join().unwrap();
    let left = now(&entry);
    assert!(first.is_some(), "the leaf had D");
    assert!(!left.is_writable() || left.is_dirty(), "W without D: {left:?} (I25)");
    assert!(left.is_mmu_writable() && left.is_legal(), "{left:?}");
    if matches!(restored, Restored::Write) {
        assert!(second.is_some() || left.is_dirty(), "W was given back, and nobody knows of it (I25)");
    }
}

#[test]
fn i25_where_cpus_set_no_marks_w_goes_with_d() {
    let mutants = [M::ClearWrittenKeepsWrite];
    exhaust("clear_written_without_marks", Preemptions::Any, clear_written_without_marks, &mutants);
}
