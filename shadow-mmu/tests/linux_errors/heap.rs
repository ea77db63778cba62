// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! brk, compared in a child process: a heap is a process's own, and the test's is in use.

use super::common::{Machine, RW};
use shadow_mmu::addr::{Hva, PAGE_SIZE};
use shadow_mmu::mm::{Backing, MapFlags};
use std::fs::File;
use std::io::Read;
use std::os::fd::{FromRawFd, RawFd};

/// A step. Addresses are bytes from where the heap starts.
#[derive(Debug, Clone, Copy)]
pub(super) enum Step {
    /// Moves the break.
    Brk(i64),
    /// Maps a page.
    Map(u64),
    /// Unmaps a page.
    Unmap(u64),
}

/// Most steps in a script.
pub(super) const STEPS: usize = 32;

/// Where the break is after each step, by the kernel.
pub(super) fn kernel(script: &[Step]) -> Vec<i64> {
    // On the stack: the child's heap is about to go.
    let mut steps = [Step::Brk(0); STEPS];
    steps[..script.len()].copy_from_slice(script);
    let start = start_of_heap();
    let mut ends: [RawFd; 2] = [0; 2];
    // SAFETY: the call writes the two descriptors into the array that it is given.
    assert_eq!(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) }, 0);
    // SAFETY: the child makes system calls only and leaves by `_exit`: it takes no lock and touches no heap, so it does not
    // matter what other threads held at the fork.
    let child = unsafe { libc::fork() };
    if child == 0 {
        run_child(start, &steps[..script.len()], ends[1]);
    }
    assert!(child > 0, "fork failed");
    // SAFETY: the descriptor is ours and nobody else closes it; the child has its own.
    drop(unsafe { File::from_raw_fd(ends[1]) });
    // SAFETY: as above.
    let mut answers = unsafe { File::from_raw_fd(ends[0]) };
    let mut bytes = Vec::new();
    answers.read_to_end(&mut bytes).unwrap();
    let mut status = 0;
    // SAFETY: the call writes the status into the variable that it is given.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert_eq!((status, bytes.len()), (0, 8 * script.len()), "the child failed");
    bytes.as_chunks().0.iter().map(|word| i64::from_ne_bytes(*word)).collect()
}

fn run_child(start: u64, steps: &[Step], answers: RawFd) -> ! {
    let brk = |to: u64| {
        // SAFETY: moves the break of this process, which uses its heap no more.
        unsafe { libc::syscall(libc::SYS_brk, to) as u64 }
    };
    let (len, flags) = (PAGE_SIZE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED);
    brk(start);
    for step in steps {
        match *step {
            Step::Brk(to) => _ = brk(start.wrapping_add_signed(to)),
            Step::Map(at) => {
                let prot = libc::PROT_READ | libc::PROT_WRITE;
                // SAFETY: maps where the heap was or may be; nobody uses that.
                unsafe { libc::syscall(libc::SYS_mmap, start + at, len, prot, flags, -1, 0) };
            }
            Step::Unmap(at) => {
                // SAFETY: unmaps what the step above mapped, or a page of the heap.
                unsafe { libc::syscall(libc::SYS_munmap, start + at, len) };
            }
        }
        let now = (brk(0) as i64).wrapping_sub(start as i64).to_ne_bytes();
        // SAFETY: reads the eight bytes of `now`, on the stack.
        unsafe { libc::write(answers, now.as_ptr().cast(), 8) };
    }
    // SAFETY: ends this process.
    unsafe { libc::_exit(0) }
}

/// `start_brk`, field 47 of `/proc/self/stat`; the second field is a name in parentheses and may hold anything.
fn start_of_heap() -> u64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let after_name = stat.rsplit_once(')').unwrap().1;
    after_name.split_ascii_whitespace().nth(47 - 3).unwrap().parse().unwrap()
}

/// The same by an `Mm`.
pub(super) fn ours(script: &[Step]) -> Vec<i64> {
    const START: u64 = 0x5555_0000_0000;
    let machine = Machine::new(4096);
    let mm = &machine.mm;
    mm.set_brk_start(Hva(START));
    let mut answers = Vec::new();
    for step in script {
        match *step {
            Step::Brk(to) => _ = mm.brk(Hva(START.wrapping_add_signed(to))),
            Step::Map(at) => {
                let flags = MapFlags::PRIVATE | MapFlags::FIXED;
                mm.mmap(Hva(START + at), PAGE_SIZE, RW, flags, Backing::Anonymous).unwrap();
            }
            Step::Unmap(at) => mm.munmap(Hva(START + at), PAGE_SIZE).unwrap(),
        }
        answers.push(mm.brk(Hva(0)).0 as i64 - START as i64);
    }
    machine.check();
    machine.finish();
    answers
}
