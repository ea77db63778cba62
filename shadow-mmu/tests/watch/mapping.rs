// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Mappings of the test process, and what is done to them by plain system calls.

use shadow_mmu::addr::PAGE_SIZE;
use shadow_mmu::mm::FaultError;
use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd};
use std::sync::atomic::{AtomicU64, Ordering};

/// A way to fork.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PlainCall {
    /// The C library's, with its locks.
    GlibcFork,
    /// The bare system call.
    Fork,
}

/// Pages of this process, wherever each is now. The first word of each holds its [tag](Mapping::tag) at first.
#[derive(Debug)]
pub(crate) struct Mapping {
    /// Address of each page; `None` once it is unmapped.
    pages: Vec<Option<u64>>,
    /// What a page reads as once it is discarded: of a private file the file's, of shared memory what was there.
    discarded: fn(u64) -> u64,
}

type Make = fn(u64) -> Mapping;

/// Every kind of mapping that can be adopted.
pub(crate) const KINDS: [(&str, Make); 5] = [
    ("private anonymous", Mapping::anonymous),
    ("shared memfd", Mapping::shared_memfd),
    ("private file", Mapping::private_file),
    ("shared file", Mapping::shared_file),
    ("shared anonymous", Mapping::shared_anonymous),
];

/// Addresses that no test has used. They are never used again: what is mapped in the place of a private mapping before the
/// watch has settled may be seen by the guest, and whoever adopts promises that nothing is.
fn fresh(len: u64) -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0x1000_0000_0000);
    // A page between any two, or the kernel makes one mapping of them.
    NEXT.fetch_add(len + PAGE_SIZE, Ordering::SeqCst)
}

fn map(at: u64, len: u64, prot: i32, flags: i32, file: Option<&File>) -> u64 {
    let fd = file.map_or(-1, |file| file.as_raw_fd());
    // SAFETY: with MAP_FIXED over addresses of the test's own, otherwise somewhere new.
    let at = unsafe { libc::mmap(at as *mut libc::c_void, len as usize, prot, flags, fd, 0) };
    assert_ne!(at, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
    at as u64
}

/// Whether something is mapped at the start of `range`.
pub(crate) fn is_mapped(range: &Range<u64>) -> bool {
    let mut resident = 0u8;
    // SAFETY: writes one byte for one page; addresses are not touched.
    let result =
        unsafe { libc::mincore(range.start as *mut libc::c_void, PAGE_SIZE as usize, &mut resident) };
    result == 0
}

/// Waits for an event.
pub(crate) fn wait_readable(fd: BorrowedFd<'_>) {
    let mut fds = [libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 }];
    // SAFETY: a live array of one.
    assert_eq!(unsafe { libc::poll(fds.as_mut_ptr(), 1, 10_000) }, 1, "no event came");
}

fn memfd() -> File {
    // SAFETY: a C string; makes a descriptor.
    let fd = unsafe { libc::memfd_create(c"watch".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0);
    // SAFETY: the kernel just made it for us.
    unsafe { File::from_raw_fd(fd) }
}

/// A file on a disk, without a name.
fn file() -> File {
    let path = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!(
        "watch-{}-{:?}",
        std::process::id(),
        std::thread::current().id()
    ));
    let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
    std::fs::remove_file(path).unwrap();
    file
}

impl Mapping {
    pub(crate) fn tag(page: u64) -> u64 {
        0xad0b_7ed0_0000 + page
    }

    fn new(count: u64, flags: i32, file: Option<&File>, discarded: fn(u64) -> u64) -> Self {
        if let Some(file) = file {
            file.set_len(count * PAGE_SIZE).unwrap();
        }
        let (len, flags) = (count * PAGE_SIZE, flags | libc::MAP_FIXED_NOREPLACE);
        let start = map(fresh(len), len, libc::PROT_READ | libc::PROT_WRITE, flags, file);
        let mapping = Self { pages: (0..count).map(|n| Some(start + n * PAGE_SIZE)).collect(), discarded };
        (0..count).for_each(|n| mapping.poke(n, Self::tag(n)));
        mapping
    }
    pub(crate) fn anonymous(count: u64) -> Self {
        Self::new(count, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None, |_| 0)
    }
    /// Private memory at `range`, where nothing is any more. Its pages hold the tags that come after those of as many pages.
    pub(crate) fn anonymous_at(range: &Range<u64>) -> Self {
        let len = range.end - range.start;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        map(range.start, len, libc::PROT_READ | libc::PROT_WRITE, flags, None);
        let count = len / PAGE_SIZE;
        let mapping =
            Self { pages: (0..count).map(|n| Some(range.start + n * PAGE_SIZE)).collect(), discarded: |_| 0 };
        (0..count).for_each(|n| mapping.poke(n, Self::tag(count + n)));
        mapping
    }
    pub(crate) fn shared_memfd(count: u64) -> Self {
        Self::new(count, libc::MAP_SHARED, Some(&memfd()), Self::tag)
    }
    pub(crate) fn private_file(count: u64) -> Self {
        Self::new(count, libc::MAP_PRIVATE, Some(&file()), |_| 0)
    }
    pub(crate) fn shared_file(count: u64) -> Self {
        Self::new(count, libc::MAP_SHARED, Some(&file()), Self::tag)
    }
    pub(crate) fn shared_anonymous(count: u64) -> Self {
        Self::new(count, libc::MAP_SHARED | libc::MAP_ANONYMOUS, None, Self::tag)
    }

    /// Address of page `n`.
    pub(crate) fn address(&self, n: u64) -> u64 {
        match self.pages.get(n as usize) {
            Some(page) => page.unwrap(),
            None => self.address(n - 1) + PAGE_SIZE,
        }
    }
    /// All of it, while it is in one piece.
    pub(crate) fn range(&self) -> Range<u64> {
        self.address(0)..self.address(0) + self.pages.len() as u64 * PAGE_SIZE
    }
    /// What is read in each page as long as nothing was written or discarded.
    pub(crate) fn tags(&self) -> Vec<Result<u64, FaultError>> {
        (0..self.pages.len() as u64).map(|n| Ok(Self::tag(n))).collect()
    }
    /// The same once `gone` was discarded.
    pub(crate) fn discarded(&self, gone: Range<u64>) -> Vec<Result<u64, FaultError>> {
        let value = |n| if gone.contains(&n) { (self.discarded)(n) } else { Self::tag(n) };
        (0..self.pages.len() as u64).map(|n| Ok(value(n))).collect()
    }
    pub(crate) fn peek(&self, n: u64) -> u64 {
        // SAFETY: a page of ours, read as a word; the guest may write it, hence volatile.
        unsafe { (self.address(n) as *const u64).read_volatile() }
    }
    pub(crate) fn poke(&self, n: u64, value: u64) {
        // SAFETY: as in `peek`.
        unsafe { (self.address(n) as *mut u64).write_volatile(value) }
    }

    pub(crate) fn munmap(&mut self, pages: Range<u64>) {
        let len = (pages.end - pages.start) * PAGE_SIZE;
        // SAFETY: pages of ours, in one run, to which nobody has a reference.
        let result = unsafe { libc::munmap(self.address(pages.start) as *mut libc::c_void, len as usize) };
        assert_eq!(result, 0);
        self.pages[pages.start as usize..pages.end as usize].fill(None);
    }
    /// Unmaps what is left, page by page.
    pub(crate) fn munmap_all(&mut self) {
        for n in 0..self.pages.len() as u64 {
            if self.pages[n as usize].is_some() {
                self.munmap(n..n + 1);
            }
        }
    }

    /// `mremap` of one run of pages.
    fn remap(&mut self, pages: Range<u64>, new_pages: u64, flags: i32, to: u64) {
        let (old, new) = (pages.end - pages.start, new_pages);
        // SAFETY: pages of ours; nothing is at the target.
        let at = unsafe {
            libc::mremap(
                self.address(pages.start) as *mut libc::c_void,
                (old * PAGE_SIZE) as usize,
                (new * PAGE_SIZE) as usize,
                flags,
                to as *mut libc::c_void,
            )
        };
        assert_ne!(at, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        for (n, page) in (0..).zip(pages) {
            self.pages[page as usize] = (n < new).then(|| at as u64 + n * PAGE_SIZE);
        }
    }
    /// Moves `pages` somewhere else. If they are in several pieces, one by one.
    pub(crate) fn move_away(&mut self, pages: Range<u64>) {
        let in_one_run = pages
            .clone()
            .all(|n| self.address(n) == self.address(pages.start) + (n - pages.start) * PAGE_SIZE);
        if !in_one_run {
            pages.for_each(|n| self.move_away(n..n + 1));
            return;
        }
        let count = pages.end - pages.start;
        self.remap(pages, count, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, fresh(count * PAGE_SIZE));
    }
    /// Makes all of it `count` pages long, and moves it.
    pub(crate) fn grow_away(&mut self, count: u64) {
        let pages = 0..self.pages.len() as u64;
        self.remap(pages, count, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, fresh(count * PAGE_SIZE));
    }
    /// Makes all of it `count` pages long, where it is.
    pub(crate) fn shrink(&mut self, count: u64) {
        self.remap(0..self.pages.len() as u64, count, 0, 0);
    }
    /// Moves all of it and leaves an empty mapping behind.
    pub(crate) fn move_and_keep(&mut self) {
        let count = self.pages.len() as u64;
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP;
        self.remap(0..count, count, flags, fresh(count * PAGE_SIZE));
    }
    pub(crate) fn madvise(&self, pages: Range<u64>, advice: i32) {
        let len = (pages.end - pages.start) * PAGE_SIZE;
        // SAFETY: pages of ours that hold numbers.
        let result =
            unsafe { libc::madvise(self.address(pages.start) as *mut libc::c_void, len as usize, advice) };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    }
    pub(crate) fn mprotect(&self, pages: Range<u64>, prot: i32) {
        let len = (pages.end - pages.start) * PAGE_SIZE;
        // SAFETY: pages of ours, to which nobody has a reference.
        let result =
            unsafe { libc::mprotect(self.address(pages.start) as *mut libc::c_void, len as usize, prot) };
        assert_eq!(result, 0);
    }
    /// Maps something else in the place of `pages`.
    pub(crate) fn map_over(&mut self, pages: Range<u64>) {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        map(self.address(pages.start), (pages.end - pages.start) * PAGE_SIZE, libc::PROT_READ, flags, None);
        self.pages[pages.start as usize..pages.end as usize].fill(None);
    }

    /// Forks; the child overwrites the memory, unmaps it and ends.
    pub(crate) fn fork_and_spoil(&self, call: PlainCall) {
        let child = match call {
            // SAFETY: the child does nothing below that needs a lock.
            PlainCall::GlibcFork => unsafe { libc::fork() },
            // SAFETY: the same.
            PlainCall::Fork => unsafe { libc::syscall(libc::SYS_fork) as i32 },
        };
        assert!(child >= 0);
        if child == 0 {
            let start = self.address(0) as *mut libc::c_void;
            let len = self.pages.len() * PAGE_SIZE as usize;
            // SAFETY: the child's copy of pages of ours.
            unsafe { start.write_bytes(0xee, len) };
            // SAFETY: the same.
            unsafe { libc::munmap(start, len) };
            // SAFETY: ends the child, and nothing of it is needed.
            unsafe { libc::_exit(0) };
        }
        let mut status = 0;
        // SAFETY: writes to `status`.
        assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
        assert_eq!(status, 0);
    }
}
