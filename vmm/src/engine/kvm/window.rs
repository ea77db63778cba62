// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The window: the mapping of the frame pool that KVM has as its RAM, and what is done to it.
//!
//! Nobody but KVM looks through the window; umbra uses the direct map. So its pages can be discarded at any time: the
//! file keeps the content, and KVM, told by the kernel's MMU notifier, forgets every translation to them and waits
//! until no vCPU uses one (`kvm_mmu_notifier_invalidate_range_start`). That is a flush, and it needs no kick.

use shadow_mmu::addr::{PAGE_SIZE, Pfn};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use vm_memory::MmapRegion;

/// Ranges that one process_madvise(2) takes (`UIO_MAXIOV`).
const RANGES_PER_CALL: usize = 1024;

/// `len` frames from `start` on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    start: u64,
    len: u64,
}

impl Run {
    /// `len` frames from `start` on.
    pub(super) fn new(start: Pfn, len: u64) -> Self {
        Self { start: u64::from(start.0), len }
    }

    /// How many frames.
    pub(super) fn frames(&self) -> usize {
        self.len as usize
    }

    /// Sorts frames and joins what touches or overlaps: the same frame many times over is common (the zero page).
    pub(super) fn coalesce(mut runs: Vec<Self>) -> Vec<Self> {
        runs.sort_unstable_by_key(|run| run.start);
        let mut joined: Vec<Self> = Vec::new();
        for run in runs {
            match joined.last_mut() {
                Some(last) if run.start <= last.start + last.len => {
                    last.len = last.len.max(run.start + run.len - last.start);
                }
                _ => joined.push(run),
            }
        }
        joined
    }
}

/// The pool's mapping for KVM.
#[derive(Debug)]
pub(super) struct Window {
    region: MmapRegion,
    /// This process, for process_madvise(2); `None` where the kernel has no pidfds.
    process: Option<OwnedFd>,
}

impl Window {
    pub(super) fn new(region: MmapRegion) -> Self {
        // SAFETY: takes plain numbers and returns a descriptor or -1.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, std::process::id(), 0) };
        // SAFETY: the kernel just gave us this descriptor and nobody else knows it.
        let process = (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd as i32) });
        Self { region, process }
    }

    /// Address of the first byte in this process.
    pub(super) fn address(&self) -> u64 {
        self.region.as_ptr() as u64
    }

    /// Size in bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.region.size() as u64
    }

    /// All of it.
    pub(super) fn whole(&self) -> Run {
        Run { start: 0, len: self.bytes() / PAGE_SIZE }
    }

    /// The bytes of `run`, cut to the window: what lies outside is no memory of ours, whoever asks.
    fn range(&self, run: Run) -> libc::iovec {
        let frames = self.bytes() / PAGE_SIZE;
        let start = run.start.min(frames);
        let len = run.len.min(frames - start) * PAGE_SIZE;
        libc::iovec {
            iov_base: self.region.as_ptr().wrapping_add((start * PAGE_SIZE) as usize).cast(),
            iov_len: len as usize,
        }
    }

    fn advise(&self, run: Run, advice: i32) -> io::Result<()> {
        let range = self.range(run);
        // SAFETY: the range lies inside the window, which no Rust reference points into; both kinds of advice that are
        // given here leave the bytes as they are, for the window is a shared mapping of a file.
        let result = unsafe { libc::madvise(range.iov_base, range.iov_len, advice) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// The same for many runs at once. On one's own process the kernel takes either advice since Linux 6.13 (before:
    /// `EINVAL`).
    fn advise_many(&self, runs: &[Run], advice: i32) -> io::Result<()> {
        let process = self.process.as_ref().ok_or_else(|| io::Error::from_raw_os_error(libc::ENOSYS))?;
        for batch in runs.chunks(RANGES_PER_CALL) {
            let ranges: Vec<libc::iovec> = batch.iter().map(|&run| self.range(run)).collect();
            let wanted: usize = ranges.iter().map(|range| range.iov_len).sum();
            let fd = process.as_raw_fd();
            // SAFETY: as in `advise`; the vector of ranges lives across the call.
            let done = unsafe {
                libc::syscall(libc::SYS_process_madvise, fd, ranges.as_ptr(), ranges.len(), advice, 0)
            };
            if done < 0 {
                return Err(io::Error::last_os_error());
            }
            if done as usize != wanted {
                // It stopped half-way; which part does not matter, giving advice twice does no harm.
                batch.iter().try_for_each(|&run| self.advise(run, advice))?;
            }
        }
        Ok(())
    }

    /// Discards the pages of `runs`, a call a run.
    pub(super) fn discard(&self, runs: &[Run]) -> io::Result<()> {
        runs.iter().try_for_each(|&run| self.advise(run, libc::MADV_DONTNEED))
    }

    /// The same with up to 1,024 runs a call, since Linux 6.13.
    pub(super) fn discard_many(&self, runs: &[Run]) -> io::Result<()> {
        self.advise_many(runs, libc::MADV_DONTNEED)
    }

    /// Makes the host map the pages of `runs` now. A hint: what fails is left to the guest's first touch.
    pub(super) fn populate(&self, runs: &[Run]) {
        if runs.len() > 1 && self.advise_many(runs, libc::MADV_POPULATE_WRITE).is_ok() {
            return;
        }
        for &run in runs {
            let _ = self.advise(run, libc::MADV_POPULATE_WRITE);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_sorted_and_joined_and_each_frame_is_named_once() {
        let run = |start, len| Run { start, len };
        let given = vec![run(9, 1), run(3, 1), run(3, 1), run(4, 1), run(512, 512), run(600, 1), run(10, 1)];
        assert_eq!(Run::coalesce(given), [run(3, 2), run(9, 2), run(512, 512)]);
        assert!(Run::coalesce(Vec::new()).is_empty());
    }

    #[test]
    fn ranges_outside_the_window_are_cut() {
        let window = Window::new(MmapRegion::new(4 * PAGE_SIZE as usize).unwrap());
        assert_eq!(window.range(Run { start: 3, len: 5 }).iov_len, PAGE_SIZE as usize);
        assert_eq!(window.range(Run { start: 9, len: 5 }).iov_len, 0);
        window.discard(&[window.whole()]).unwrap();
    }
}
