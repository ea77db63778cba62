// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The memory calls of [`Mm`] against those of the kernel that this test runs on.
//!
//! Each script of calls is made twice with the same addresses: to an `Mm`, and to the kernel, in a part of this process's
//! own address space that nothing else uses (16 TiB up; the kernel places mappings by itself near the top). After every
//! call the results are compared, and after the script what is mapped with which rights, and the first word of every
//! page that can be read. One property makes scripts up; the table holds the corners that chance would not find, and,
//! each with its reason, the places where `Mm` deviates on purpose.
#![cfg(feature = "mmu-notifier")]
// What a test does not expect may end it.
#![allow(clippy::unwrap_used)]

mod common;
#[path = "linux_errors/heap.rs"]
mod heap;
#[path = "linux_errors/sides.rs"]
mod sides;

use common::{NONE, READ, RW, RX};
use heap::Step;
use proptest::prelude::*;
use shadow_mmu::addr::{Access, PAGE_SIZE};
use sides::Answer::{self, *};
use sides::Call::{self, *};
use sides::{ARENA_PAGES, FILE_PAGES, Kernel, NULL, Ours};

const PRIVATE: i32 = libc::MAP_PRIVATE;
const SHARED: i32 = libc::MAP_SHARED;
const FIXED: i32 = libc::MAP_FIXED;
const NOREPLACE: i32 = libc::MAP_FIXED_NOREPLACE;
const MAYMOVE: i32 = libc::MREMAP_MAYMOVE;
const MOVE_TO: i32 = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
const KEEP: i32 = libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP;
/// A length that rounding up to pages takes past 64 bits, and one that ends past the user half.
const HUGE: u64 = u64::MAX;
const HALF: u64 = 1 << 47;

/// Makes the calls of `script` to both; how they differ, if they do.
fn compare(script: &[Call]) -> Result<(), String> {
    let (mut kernel, ours) = (Kernel::new(), Ours::new());
    for (step, &call) in script.iter().enumerate() {
        let (theirs, our) = (kernel.call(call), ours.call(call));
        if is_known_deviation(call, &theirs, &our) {
            return Ok(());
        }
        if theirs != our {
            return Err(format!("step {step}, {call:x?}: the kernel answers {theirs:x?}, Mm {our:x?}"));
        }
    }
    let (theirs, our) = (kernel.shape(), ours.shape());
    if theirs != our {
        return Err(format!("afterwards the kernel has {theirs:?}, Mm has {our:?}"));
    }
    for (page, prot, _) in theirs {
        let (theirs, our) = (kernel.call(Read(p(page))), ours.call(Read(p(page))));
        if !prot.is_empty() && theirs != our {
            return Err(format!(
                "afterwards page {page} reads {theirs:x?} from the kernel, {our:x?} from Mm"
            ));
        }
    }
    let Ours { machine, file } = ours;
    drop(file);
    machine.check();
    machine.finish();
    Ok(())
}

/// Pages.
const fn p(n: u64) -> u64 {
    n * PAGE_SIZE
}

/// Three mappings, [2, 6) RW, [6, 8) R and [8, 10) RW, a hole, and [12, 16) shared.
const LANDSCAPE: [Call; 6] = [
    Map(p(2), p(8), RW, PRIVATE | FIXED),
    Map(p(12), p(4), RW, SHARED | FIXED),
    Protect(p(6), p(2), READ),
    Write(p(2), 0x22),
    Write(p(9), 0x99),
    Write(p(13), 0xdd),
];

#[test]
fn corners() {
    #[rustfmt::skip]
    let rows: &[(&str, &[Call])] = &[
        ("mmap of nothing", &[Map(p(1), 0, RW, PRIVATE | FIXED)]),
        ("mmap that rounds past 64 bits", &[Map(NULL, HUGE, RW, PRIVATE)]),
        ("mmap longer than the user half", &[Map(NULL, HALF, RW, PRIVATE)]),
        ("mmap of all but a page", &[Map(NULL, HALF - p(2), NONE, PRIVATE)]),
        ("mmap fixed inside a page", &[Map(0x800, p(1), RW, PRIVATE | FIXED)]),
        ("mmap fixed at the end", &[Map(HALF - p(1), p(1), RW, PRIVATE | FIXED)]),
        ("mmap fixed across the end", &[Map(HALF - p(2), p(2), RW, PRIVATE | FIXED)]),
        ("mmap fixed inside a page past the end", &[Map(HALF - 0x800, p(1), RW, PRIVATE | FIXED)]),
        ("mmap fixed, end wraps", &[Map(HUGE - 0xfff, p(2), RW, PRIVATE | FIXED)]),
        ("mmap with both, anonymous", &[Map(NULL, p(1), RW, SHARED | PRIVATE)]),
        ("mmap shared and growing down", &[Map(NULL, p(1), RW, SHARED | libc::MAP_GROWSDOWN)]),
        ("mmap hint inside a page", &[Map(p(20) + 0x800, p(1), RW, PRIVATE)]),
        ("mmap anywhere", &[Map(NULL, p(1), RW, PRIVATE), Map(NULL, p(1), RW, SHARED)]),
        ("mmap hint taken", &[Map(p(3), p(1), RW, PRIVATE | FIXED), Map(p(2), p(2), RW, PRIVATE)]),
        ("mmap hint free between", &[Map(p(3), p(1), RW, PRIVATE | FIXED), Map(p(2), p(1), RW, PRIVATE)]),
        ("mmap hint past the end", &[Map(HALF, p(1), RW, PRIVATE)]),
        ("noreplace over something", &[Map(p(3), p(1), RW, PRIVATE | FIXED), Map(p(2), p(2), RW, PRIVATE | NOREPLACE)]),
        ("noreplace beside something", &[Map(p(3), p(1), RW, PRIVATE | FIXED), Map(p(1), p(2), RW, PRIVATE | NOREPLACE)]),
        ("noreplace inside a page", &[Map(0x800, p(1), RW, PRIVATE | NOREPLACE)]),
        ("populate and look", &[Map(p(1), p(3), RW, PRIVATE | FIXED | libc::MAP_POPULATE), Resident(p(1), p(3))]),
        ("populate without rights", &[Map(p(1), p(3), NONE, PRIVATE | FIXED | libc::MAP_POPULATE), Resident(p(1), p(3))]),
        ("file at an odd offset", &[MapFile(p(1), p(1), RW, PRIVATE | FIXED, 0x800)]),
        ("file past its end", &[MapFile(p(1), p(4), RW, PRIVATE | FIXED, p(4)), Read(p(1)), Read(p(2)), Read(p(3)), Write(p(4), 1)]),
        ("file written privately", &[MapFile(p(1), p(4), RW, PRIVATE | FIXED, 0), Write(p(2), 7), Read(p(2)), Advise(p(1), p(4), libc::MADV_DONTNEED), Read(p(2))]),
        ("replacing the middle", &[Map(p(1), p(6), RW, PRIVATE | FIXED), Write(p(3), 3), Map(p(3), p(2), READ, PRIVATE | FIXED), Read(p(3))]),

        ("munmap of nothing", &[Unmap(p(1), 0)]),
        ("munmap inside a page", &[Unmap(0x800, p(1))]),
        ("munmap that rounds past 64 bits", &[Unmap(p(1), HUGE)]),
        ("munmap past the end", &[Unmap(HALF - p(1), p(1))]),
        ("munmap of holes", &[Unmap(p(0), p(12))]),
        ("munmap across everything", &[Unmap(p(3), p(10))]),
        ("munmap of half a page", &[Unmap(p(3), 1)]),

        ("mprotect of nothing", &[Protect(p(1), 0, READ)]),
        ("mprotect of nothing inside a page", &[Protect(0x800, 0, READ)]),
        ("mprotect inside a page", &[Protect(p(3) + 8, p(1), READ)]),
        ("mprotect that rounds past 64 bits", &[Protect(p(3), HUGE, READ)]),
        ("mprotect past the end", &[Protect(HALF, p(1), READ)]),
        ("mprotect into a hole", &[Protect(p(8), p(4), NONE)]),
        ("mprotect across a hole", &[Protect(p(8), p(6), READ)]),
        ("mprotect from a hole", &[Protect(p(10), p(4), READ)]),
        ("mprotect across mappings", &[Protect(p(3), p(6), RX), Write(p(2), 5), Write(p(3), 5), Read(p(9))]),
        ("mprotect and back", &[Protect(p(2), p(4), NONE), Read(p(2)), Protect(p(2), p(4), RW), Read(p(2)), Write(p(2), 6)]),

        ("mremap inside a page", &[Remap(p(2) + 8, p(1), p(2), MAYMOVE, NULL)]),
        ("mremap to nothing", &[Remap(p(2), p(1), 0, MAYMOVE, NULL)]),
        ("mremap to more than 64 bits", &[Remap(p(2), p(1), HUGE, MAYMOVE, NULL)]),
        ("mremap from more than 64 bits", &[Remap(p(2), HUGE, p(1), MAYMOVE, NULL)]),
        ("mremap from more than there is", &[Remap(p(2), HALF, p(1), MAYMOVE, NULL)]),
        ("mremap of a hole", &[Remap(p(10), p(1), p(2), MAYMOVE, NULL)]),
        ("mremap of a hole, same size", &[Remap(p(10), p(1), p(1), 0, NULL)]),
        ("mremap with unknown flags", &[Remap(p(2), p(1), p(1), 8, 0)]),
        ("mremap fixed but not movable", &[Remap(p(2), p(1), p(1), libc::MREMAP_FIXED, p(20))]),
        ("mremap kept but not movable", &[Remap(p(2), p(1), p(1), libc::MREMAP_DONTUNMAP, p(20))]),
        ("mremap kept and resized", &[Remap(p(2), p(1), p(2), KEEP, NULL)]),
        ("mremap shrinks", &[Remap(p(2), p(4), p(1), 0, NULL)]),
        ("mremap shrinks over mappings", &[Remap(p(2), p(7), p(1), 0, NULL)]),
        ("mremap shrinks over a hole", &[Remap(p(8), p(6), p(1), 0, NULL)]),
        ("mremap shrinks from a hole", &[Remap(p(10), p(4), p(1), 0, NULL)]),
        ("mremap same size over mappings", &[Remap(p(2), p(7), p(7), 0, NULL)]),
        ("mremap same size into a hole", &[Remap(p(8), p(4), p(4), 0, NULL)]),
        ("mremap grows in place", &[Remap(p(8), p(2), p(4), 0, NULL), Read(p(9)), Write(p(11), 4)]),
        ("mremap grows in place from the middle", &[Remap(p(9), p(1), p(2), 0, NULL)]),
        ("mremap has no room to grow", &[Remap(p(8), p(2), p(5), 0, NULL)]),
        ("mremap has no room and moves", &[Remap(p(8), p(2), p(5), MAYMOVE, NULL)]),
        ("mremap grows the middle", &[Remap(p(2), p(2), p(3), 0, NULL)]),
        ("mremap grows the middle by moving", &[Remap(p(2), p(2), p(3), MAYMOVE, NULL)]),
        ("mremap grows across mappings", &[Remap(p(2), p(5), p(6), MAYMOVE, NULL)]),
        ("mremap moves", &[Remap(p(2), p(4), p(4), MOVE_TO, p(20)), Read(p(20)), Read(p(2))]),
        ("mremap moves and grows", &[Remap(p(2), p(4), p(6), MOVE_TO, p(20)), Write(p(25), 5)]),
        ("mremap moves and shrinks", &[Remap(p(2), p(4), p(2), MOVE_TO, p(20))]),
        ("mremap moves over something", &[Remap(p(2), p(4), p(4), MOVE_TO, p(8)), Read(p(8))]),
        ("mremap moves inside a page", &[Remap(p(2), p(4), p(4), MOVE_TO, p(20) + 8)]),
        ("mremap moves past the end", &[Remap(p(2), p(4), p(4), MOVE_TO, HALF - p(4))]),
        ("mremap moves to the bottom", &[Remap(p(2), p(4), p(4), MOVE_TO, HALF * 2)]),
        ("mremap moves onto itself", &[Remap(p(2), p(4), p(4), MOVE_TO, p(2))]),
        ("mremap moves onto its start", &[Remap(p(2), p(4), p(4), MOVE_TO, p(5))]),
        ("mremap moves onto its end", &[Remap(p(4), p(4), p(4), MOVE_TO, p(2))]),
        ("mremap moves onto what it cuts off", &[Remap(p(2), p(4), p(2), MOVE_TO, p(4))]),
        ("mremap moves onto its own tail, growing", &[Remap(p(4), p(2), p(4), MOVE_TO, p(1))]),
        ("mremap shrinks and moves mappings", &[Remap(p(2), p(7), p(2), MOVE_TO, p(20))]),
        ("mremap grows and moves mappings", &[Remap(p(2), p(7), p(8), MOVE_TO, p(20))]),
        ("mremap moves into a hole", &[Remap(p(8), p(4), p(5), MOVE_TO, p(20)), Read(p(20))]),
        ("mremap moves a hole", &[Remap(p(10), p(2), p(2), MOVE_TO, p(20))]),
        ("mremap keeps", &[Remap(p(2), p(4), p(4), KEEP, NULL), Read(p(2)), Write(p(3), 3)]),
        ("mremap keeps, with a hint", &[Remap(p(2), p(4), p(4), KEEP, p(20)), Read(p(20)), Read(p(2))]),
        ("mremap keeps, hint taken", &[Remap(p(2), p(4), p(4), KEEP, p(8))]),
        ("mremap keeps, hint inside a page", &[Remap(p(2), p(4), p(4), KEEP, p(20) + 8)]),
        ("mremap keeps, hint on itself", &[Remap(p(2), p(4), p(4), KEEP, p(4))]),
        ("mremap keeps, fixed", &[Remap(p(2), p(4), p(4), KEEP | MOVE_TO, p(20)), Read(p(20)), Read(p(2))]),
        ("mremap keeps shared memory", &[Remap(p(12), p(4), p(4), KEEP | MOVE_TO, p(20)), Read(p(21)), Write(p(22), 5), Read(p(14))]),
        ("mremap keeps a part", &[Remap(p(3), p(2), p(2), KEEP | MOVE_TO, p(20)), Read(p(20)), Read(p(3))]),
        ("mremap doubles shared memory", &[Remap(p(12), 0, p(4), MOVE_TO, p(20)), Read(p(21)), Write(p(22), 5), Read(p(14))]),
        ("mremap doubles a part", &[Remap(p(13), 0, p(1), MAYMOVE, NULL)]),
        ("mremap doubles private memory", &[Remap(p(2), 0, p(4), MOVE_TO, p(20))]),
        ("mremap doubles private memory onto itself", &[Remap(p(3), 0, p(4), MOVE_TO, p(2))]),
        ("mremap doubles onto itself", &[Remap(p(13), 0, p(2), MOVE_TO, p(13))]),
        ("mremap doubles over its start", &[Remap(p(13), 0, p(2), MOVE_TO, p(12))]),
        ("mremap doubles but may not move", &[Remap(p(12), 0, p(4), 0, NULL)]),
        ("mremap doubles a hole", &[Remap(p(10), 0, p(4), MAYMOVE, NULL)]),
        ("mremap grows shared memory", &[Remap(p(12), p(4), p(6), 0, NULL), Write(p(17), 5)]),
        ("mremap moves a file", &[MapFile(p(30), p(2), RW, PRIVATE | FIXED, p(1)), Write(p(31), 5), Remap(p(30), p(2), p(4), MOVE_TO, p(20)), Read(p(20)), Read(p(21)), Read(p(23))]),

        ("madvise of nothing", &[Advise(p(10), 0, libc::MADV_DONTNEED)]),
        ("madvise random of nothing in a mapping", &[Advise(p(3), 0, libc::MADV_RANDOM)]),
        ("madvise remove of nothing in a mapping", &[Advise(p(3), 0, libc::MADV_REMOVE)]),
        ("madvise free of nothing in shared memory", &[Advise(p(13), 0, libc::MADV_FREE)]),
        ("madvise inside a page", &[Advise(p(3) + 8, p(1), libc::MADV_DONTNEED)]),
        ("madvise with unknown advice", &[Advise(p(3), p(1), 77)]),
        ("madvise that rounds past 64 bits", &[Advise(p(3), HUGE, libc::MADV_DONTNEED)]),
        ("madvise, end wraps", &[Advise(p(3), HUGE - 0xfff, libc::MADV_DONTNEED)]),
        ("madvise past the end", &[Advise(HALF, p(1), libc::MADV_DONTNEED)]),
        ("madvise dontneed", &[Advise(p(2), p(1), libc::MADV_DONTNEED), Read(p(2)), Resident(p(2), p(2))]),
        ("madvise dontneed across a hole", &[Advise(p(9), p(5), libc::MADV_DONTNEED), Read(p(9)), Read(p(13))]),
        ("madvise dontneed read-only", &[Advise(p(6), p(2), libc::MADV_DONTNEED)]),
        ("madvise free on shared", &[Advise(p(12), p(1), libc::MADV_FREE), Read(p(13))]),
        ("madvise free on a file", &[MapFile(p(30), p(2), RW, PRIVATE | FIXED, 0), Advise(p(30), p(1), libc::MADV_FREE)]),
        ("madvise remove on shared", &[Advise(p(12), p(4), libc::MADV_REMOVE), Read(p(13))]),
        ("madvise remove on private", &[Advise(p(2), p(1), libc::MADV_REMOVE), Read(p(2))]),
        ("madvise remove on a private file", &[MapFile(p(30), p(2), RW, PRIVATE | FIXED, 0), Advise(p(30), p(1), libc::MADV_REMOVE)]),
        ("madvise remove across a hole", &[Advise(p(13), p(6), libc::MADV_REMOVE), Read(p(13))]),
        ("madvise remove seen by the double", &[Remap(p(12), 0, p(4), MOVE_TO, p(20)), Read(p(21)), Advise(p(12), p(4), libc::MADV_REMOVE), Read(p(21))]),
        ("madvise populate for reading", &[Advise(p(2), p(2), libc::MADV_POPULATE_READ), Resident(p(2), p(2))]),
        ("madvise populate for writing", &[Advise(p(2), p(2), libc::MADV_POPULATE_WRITE), Resident(p(2), p(2))]),
        ("madvise populate read-only for writing", &[Advise(p(6), p(1), libc::MADV_POPULATE_WRITE)]),
        ("madvise populate without rights", &[Protect(p(6), p(1), NONE), Advise(p(6), p(1), libc::MADV_POPULATE_READ)]),
        ("madvise populate past a file", &[MapFile(p(30), p(2), RW, PRIVATE | FIXED, p(5)), Advise(p(30), p(2), libc::MADV_POPULATE_READ)]),
        ("madvise random across a hole", &[Advise(p(8), p(6), libc::MADV_RANDOM)]),
        ("madvise willneed on a file", &[MapFile(p(30), p(2), RW, PRIVATE | FIXED, 0), Advise(p(30), p(2), libc::MADV_WILLNEED)]),
        ("madvise dontfork into a hole", &[Advise(p(8), p(3), libc::MADV_DONTFORK)]),
        ("madvise cold, pageout", &[Advise(p(2), p(2), libc::MADV_COLD), Advise(p(2), p(2), libc::MADV_PAGEOUT), Read(p(2))]),

        ("mincore of nothing", &[Resident(p(10), 0)]),
        ("mincore of a hole", &[Resident(p(9), p(2))]),
        ("mincore inside a page", &[Resident(p(2) + 8, 8)]),
        ("mincore past the end", &[Resident(HALF, p(1))]),
        ("mincore of half a page", &[Resident(p(2), 1)]),
        ("mincore across mappings", &[Resident(p(2), p(8))]),
        ("mincore of shared memory that was dropped", &[Advise(p(12), p(4), libc::MADV_DONTNEED), Resident(p(12), p(4))]),
        ("mincore of a file", &[MapFile(p(30), p(8), RW, PRIVATE | FIXED, 0), Resident(p(37), p(1))]),

        ("msync of nothing", &[Sync(p(10), 0, libc::MS_SYNC)]),
        ("msync inside a page", &[Sync(p(2) + 8, 8, libc::MS_SYNC)]),
        ("msync both ways", &[Sync(p(2), p(1), libc::MS_ASYNC | libc::MS_SYNC)]),
        ("msync neither way", &[Sync(p(2), p(1), 0)]),
        ("msync with unknown flags", &[Sync(p(2), p(1), 8)]),
        ("msync across a hole", &[Sync(p(8), p(6), libc::MS_ASYNC)]),
        ("msync, end wraps", &[Sync(p(2), HUGE - 0xfff, libc::MS_SYNC)]),
        ("msync past the end", &[Sync(HALF, p(1), libc::MS_SYNC)]),
    ];
    agree(rows);
}

/// Makes the calls of each row after those of [`LANDSCAPE`].
#[track_caller]
fn agree(rows: &[(&str, &[Call])]) {
    let mut failed = Vec::new();
    for (name, calls) in rows {
        let script: Vec<Call> = LANDSCAPE.iter().chain(*calls).copied().collect();
        if let Err(difference) = compare(&script) {
            failed.push(format!("{name}: {difference}"));
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

/// Release of the kernel that this test runs on.
fn kernel_release() -> (u32, u32) {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|number| number.parse().ok());
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

#[test]
fn corners_that_newer_kernels_changed() {
    if kernel_release() < (6, 17) {
        return;
    }
    #[rustfmt::skip]
    agree(&[
        ("mremap to more than there is", &[Remap(p(2), p(1), HALF, MAYMOVE, NULL)]),
        ("mremap to more than there is, fixed", &[Remap(p(2), p(1), HALF, MOVE_TO, p(20))]),
        ("mremap of a hole to nothing", &[Remap(p(10), p(1), 0, MAYMOVE, NULL)]),
        ("mremap of a hole inside a page", &[Remap(p(10), p(1), p(1), MOVE_TO, p(20) + 8)]),
        ("mremap keeps, hint past the end", &[Remap(p(2), p(4), p(4), KEEP, HALF)]),
        ("madvise remove on read-only shared", &[Protect(p(12), p(4), READ), Advise(p(12), p(4), libc::MADV_REMOVE), Read(p(13))]),
    ]);
}

/// Where `Mm` deviates on purpose, with the answer that it gives to the last call.
#[test]
fn deviations() {
    #[rustfmt::skip]
    let rows: &[(&str, &[Call], Answer)] = &[
        // MapFlags without SHARED means private; the guest ABI above refuses what is neither.
        ("mmap with neither shared nor private", &[Map(p(20), p(1), RW, 0)], At(p(20))),
        // Since 6.17 the kernel moves several mappings at once if their size stays; before, and here, a move is of one.
        ("mremap moves mappings", &[Remap(p(2), p(7), p(7), MOVE_TO, p(20))], Errno(libc::EFAULT)),
        // Advice without effect here is a flag there, and splits the mapping; so one move is of two.
        ("mremap moves across a change of advice", &[Advise(p(2), p(1), libc::MADV_SEQUENTIAL), Remap(p(2), p(2), p(2), KEEP, p(20))], At(p(20))),
        // Lazily freed pages may be read until memory is short; here they go at once, as they may.
        ("madvise free", &[Advise(p(2), p(4), libc::MADV_FREE), Read(p(2))], Word(0)),
        ("madvise free across a hole", &[Advise(p(9), p(2), libc::MADV_FREE)], Errno(libc::ENOMEM)),
        // The CPU reads what it may write, so this populates; the kernel goes by the letter of the rights.
        ("madvise populate write-only for reading", &[Protect(p(6), p(1), Access::WRITE), Advise(p(6), p(1), libc::MADV_POPULATE_READ)], Done),
        // The hole is found first, and nothing is populated; the kernel finds it after what lies before it.
        ("madvise populate into a hole", &[Advise(p(8), p(3), libc::MADV_POPULATE_WRITE), Resident(p(8), p(2))], Pages(vec![0, 1])),
        // The kernel's rounding wraps to an empty range, which is good; such a length is refused here.
        ("msync that rounds past 64 bits", &[Sync(p(2), HUGE, libc::MS_SYNC)], Errno(libc::ENOMEM)),
    ];
    for (name, calls, answer) in rows {
        let ours = Ours::new();
        let last = LANDSCAPE.iter().chain(*calls).fold(Done, |_, &call| ours.call(call));
        assert_eq!(last, *answer, "{name}");
        ours.machine.check();
    }
}

fn at() -> impl Strategy<Value = u64> {
    (0..ARENA_PAGES - 16).prop_map(p)
}

fn len() -> impl Strategy<Value = u64> {
    prop_oneof![20 => (1..12u64).prop_map(p), 1 => Just(0), 1 => Just(p(2) - 1)]
}

fn rights() -> impl Strategy<Value = Access> {
    prop_oneof![4 => Just(RW), 2 => Just(READ), 1 => Just(RX), 1 => Just(NONE)]
}

fn call() -> impl Strategy<Value = Call> {
    let place = prop_oneof![6 => Just(FIXED), 1 => Just(NOREPLACE)];
    let advice = prop_oneof![
        3 => Just(libc::MADV_DONTNEED),
        2 => Just(libc::MADV_REMOVE),
        1 => prop_oneof![Just(libc::MADV_RANDOM), Just(libc::MADV_NORMAL)],
    ];
    let how = prop_oneof![3 => Just(0), 4 => Just(MAYMOVE), 6 => Just(MOVE_TO), 2 => Just(KEEP), 3 => Just(KEEP | MOVE_TO)];
    let lengths = (len(), len(), any::<bool>()).prop_map(|(a, b, same)| (a, if same { a } else { b }));
    prop_oneof![
        6 => (at(), len(), rights(), prop_oneof![Just(PRIVATE), Just(SHARED)], place)
            .prop_map(|(at, len, prot, kind, place)| Map(at, len, prot, kind | place)),
        3 => (at(), len(), rights(), 0..FILE_PAGES)
            .prop_map(|(at, len, prot, from)| MapFile(at, len, prot, PRIVATE | FIXED, p(from))),
        2 => (at(), len()).prop_map(|(at, len)| Unmap(at, len)),
        4 => (at(), len(), rights()).prop_map(|(at, len, prot)| Protect(at, len, prot)),
        6 => (at(), lengths, how, at()).prop_map(|(at, (old, new), how, to)| Remap(at, old, new, how, to)),
        3 => (at(), len(), advice).prop_map(|(at, len, advice)| Advise(at, len, advice)),
        1 => (at(), len()).prop_map(|(at, len)| Sync(at, len, libc::MS_SYNC)),
        10 => (at(), 1..u64::MAX).prop_map(|(at, value)| Write(at, value)),
        4 => at().prop_map(Read),
    ]
}

/// Whether the kernel's answer is one that a [deviation](deviations) explains; what follows is not comparable.
fn is_known_deviation(call: Call, theirs: &Answer, ours: &Answer) -> bool {
    let same = |old: u64, new: u64| old.div_ceil(PAGE_SIZE) == new.div_ceil(PAGE_SIZE);
    matches!((call, theirs, ours), (Remap(_, old, new, ..), At(_), Errno(libc::EFAULT)) if same(old, new))
}

fn step() -> impl Strategy<Value = Step> {
    let near = 0..p(12) as i64;
    let far = prop_oneof![Just(-1), Just(i64::MIN), Just(i64::MAX), Just(1 << 46)];
    let at = (0..14u64).prop_map(p);
    prop_oneof![
        12 => near.prop_map(Step::Brk),
        1 => far.prop_map(Step::Brk),
        3 => at.clone().prop_map(Step::Map),
        2 => at.prop_map(Step::Unmap),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_scripts(script in prop::collection::vec(call(), 1..50)) {
        // Before, mremap unmapped its target first and asked later.
        prop_assume!(kernel_release() >= (6, 17));
        prop_assert_eq!(compare(&script), Ok(()));
    }
    #[test]
    fn random_heaps(script in prop::collection::vec(step(), 1..heap::STEPS)) {
        prop_assert_eq!(heap::ours(&script), heap::kernel(&script));
    }
}
