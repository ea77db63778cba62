// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Every allocation fails once: a run for each, in the manner of Linux's `fail-nth`. What comes of it is the right answer, the
//! guest's own complaint, the end by the OOM killer, or a refusal before the guest runs; never anything else.

use super::guest::{Guest, images};
use super::*;

/// Fails hit 1, 1 + `step`, 1 + 2 `step` … of `fault`, a point with what narrows it down, until one run has fewer; at most `most`
/// runs. Returns how many there were.
fn sweep(folder: &Path, guest: &Guest, fault: &str, step: usize, most: usize) -> usize {
    let native = guest.native();
    for run in 0..most {
        let plan = format!("[[fault]]\n{fault}\nnth = {}\n", 1 + run * step);
        let injected = inject(folder, &plan, guest);
        injected.assert_within(Outcome::GuestFails, guest, &native);
        if injected.fired(0) == 0 {
            injected.assert_unseen(guest, &native);
            return run;
        }
    }
    most
}

const FRAME: &str = "point = 'frame-alloc'\nerror = 'ENOMEM'";
const TABLE: &str = "point = 'table-alloc'\nerror = 'ENOMEM'";

#[test]
fn every_frame_of_a_guest_may_be_refused_once() {
    if !guests() {
        return;
    }
    let (folder, images) = (folder("inject-frames"), images("inject-frames"));
    let touch = Guest::bundled(&images, "touch --pages 64 --verify");
    assert!(sweep(&folder, &touch, FRAME, 1, 100) > 30);
    // More of umbra than every one of a run: forks, swapping, moves.
    assert!(sweep(&folder, &Guest::torture(&images), FRAME, 7, 100) > 20);
    assert!(sweep(&folder, &Guest::threads(&images), FRAME, 5, 100) > 10);
}

#[test]
fn every_page_table_of_a_guest_may_be_refused_once() {
    if !guests() {
        return;
    }
    let (folder, images) = (folder("inject-tables"), images("inject-tables"));
    assert!(sweep(&folder, &Guest::torture(&images), TABLE, 1, 100) > 8);
    // Tables one after the other: a page in each 2 MiB, and what is mapped far away.
    assert!(sweep(&folder, &every_fault::varied(&folder), TABLE, 3, 100) > 5);
}

#[test]
fn every_memory_call_of_a_guest_may_be_refused_once() {
    if !guests() {
        return;
    }
    let (folder, images) = (folder("inject-calls"), images("inject-calls"));
    for call in ["mmap", "brk", "mremap", "mprotect", "munmap", "madvise"] {
        let fault = format!("point = 'syscall'\ncall = '{call}'\nerror = 'ENOMEM'");
        assert!(sweep(&folder, &Guest::torture(&images), &fault, 4, 5) > 0, "{call}");
    }
}

#[test]
fn every_thread_of_a_guest_may_be_refused_once() {
    if !guests() {
        return;
    }
    let (folder, images) = (folder("inject-threads"), images("inject-threads"));
    for error in ["EAGAIN", "ENOMEM"] {
        let fault = format!("point = 'thread-start'\nerror = '{error}'");
        assert_eq!(sweep(&folder, &Guest::threads(&images), &fault, 1, 10), 3);
    }
}
