// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Races of CPUs against changes of the address space that leave the page a page: rights that go (mprotect), pages that are
//! shared (fork), moved (mremap), or taken for want of memory: R21, R22.

use crate::addr::{Hva, PAGE_SIZE};
use crate::cpu::tagged;
use crate::explore::explore;
use crate::machine::{Machine, READ, RW, task};
use crate::mm::{FaultRequest, Mm, RemapFlags};
use crate::mutant::M;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// mprotect takes the right to write. When it has returned, no write succeeds.
fn r21() {
    let machine = Machine::new();
    let a = machine.map(1, RW);
    let protected = AtomicBool::new(false);
    machine.race([
        task(|| {
            let mut vcpu = machine.vcpu(0);
            for n in 1..4 {
                let protected = protected.load(Ordering::SeqCst);
                let wrote = vcpu.write(a, n).is_ok();
                machine.must(!(protected && wrote), || "V wrote to a page that is read-only (I14)".into());
            }
        }),
        task(|| {
            machine.mm.mprotect(a, PAGE_SIZE, READ).unwrap();
            protected.store(true, Ordering::SeqCst);
            let before = machine.peek(a);
            let after = machine.peek(a);
            machine.must(before == after, || "a page changes that nobody may write to (I14)".into());
        }),
    ]);
    machine.finish();
}

#[test]
fn r21_no_write_succeeds_when_mprotect_has_returned() {
    explore("r21", r21, &[M::ProtectOutsidePair, M::FlushNever]);
}

/// fork shares the pages, and takes the right to write from the parent. What `write` writes behind it, to the page and the
/// value that it is given, is in the parent and not in the child.
fn r21_fork(write: fn(&Machine, Hva, u64)) {
    let machine = Machine::new();
    let a = machine.map(1, RW);
    machine.poke(a, tagged(a, 1));
    let in_child = |child: &Mm| {
        let pinned = child.fault(&FaultRequest::one_page(a, READ)).unwrap();
        machine.pool.words(pinned.required().pfn)[0].load(Ordering::SeqCst)
    };
    machine.race([
        task(|| {
            write(&machine, a, 2);
            write(&machine, a, 3);
        }),
        task(|| {
            let child = machine.mm.fork().unwrap();
            let before = in_child(&child);
            let after = in_child(&child);
            machine.must(before == after, || {
                format!("the child's page goes from {before:#x} to {after:#x} (I15)")
            });
        }),
    ]);
    let seen = machine.peek(a);
    machine.must(seen == Some(tagged(a, 3)), || {
        format!("the parent has {seen:x?}, not what was written last (I24)")
    });
    machine.finish();
}

/// V writes. A fault in flight holds a pin, so fork copies its page at once: no lookup that it finds is too old.
#[test]
fn r21_what_a_guest_writes_behind_a_fork_is_not_in_the_child() {
    let scenario = || r21_fork(|machine, at, n| machine.vcpu(0).write(at, n).unwrap());
    explore("r21_fork", scenario, &[M::ForkOutsidePair, M::FlushNever]);
}

/// The host writes through a pin, which no pte's rights can stop.
#[test]
fn r21_what_is_written_through_a_pin_is_not_in_the_child() {
    let scenario = || {
        r21_fork(|machine, at, n| {
            machine.poke(at, tagged(at, n));
        });
    };
    explore("r21_pin", scenario, &[M::ForkSharesPinned]);
}

/// The reaper takes pages from under a guest that is to die. What V has written is there, or nothing is.
fn reap() {
    let machine = Machine::new();
    let a = machine.map(1, RW);
    machine.race([
        task(|| {
            let mut vcpu = machine.vcpu(0);
            if vcpu.write(a, 1).is_ok() {
                let seen = vcpu.read(a);
                machine.must(seen.is_err() || seen == Ok(tagged(a, 1)), || {
                    format!("V wrote, and reads {seen:x?} (I24)")
                });
            }
        }),
        task(|| {
            // Not while the VMAs change, which they do not.
            machine.must(machine.mm.reap().is_some(), || "the reaper gave up".into());
        }),
    ]);
    machine.finish();
}

#[test]
fn a_page_that_was_reaped_does_not_come_back_as_zeros() {
    explore("reap", reap, &[M::ReapUnmarked, M::FlushNever]);
}

/// mremap moves a page. Every write that succeeded at the old address is in the page at the new one.
fn moved() {
    let machine = Machine::new();
    let a = machine.map(1, RW);
    let last = AtomicU64::new(0);
    machine.vcpu(0).write(a, 9).unwrap();
    let mut to = None;
    machine.race([
        task(|| {
            let mut vcpu = machine.vcpu(0);
            for n in 1..4 {
                if vcpu.write(a, n).is_ok() {
                    last.store(n, Ordering::SeqCst);
                }
            }
        }),
        task(|| {
            let target = Hva(0x40_0000);
            let flags = RemapFlags::MAYMOVE | RemapFlags::FIXED;
            to = machine.mm.mremap(a, PAGE_SIZE, PAGE_SIZE, flags, target).ok();
            // What V writes from here on is nobody's page.
            let before = machine.peek(target);
            let after = machine.peek(target);
            machine
                .must(before == after, || format!("{target} changes from {before:x?} to {after:x?} (I24)"));
        }),
    ]);
    let (seen, last) = (machine.peek(to.unwrap()), last.load(Ordering::Relaxed));
    let expected = tagged(a, if last == 0 { 9 } else { last });
    machine.must(seen == Some(expected), || format!("{seen:x?} was moved, not {expected:#x} (I24)"));
    machine.finish();
}

#[test]
fn a_write_to_a_page_that_moves_moves_with_it() {
    explore("moved", moved, &[M::MoveOutsidePair]);
}
