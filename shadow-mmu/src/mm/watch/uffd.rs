// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! userfaultfd(2): the ABI, as much of it as umbra needs, and one safe type around it.
//!
//! Declared here because the crate for it needs libclang to build. Numbers and layouts are those of the kernel's
//! `include/uapi/linux/userfaultfd.h`. Two users: [`watch`](super) listens to events and never to faults; the benchmark's
//! window handler serves missing pages.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};

/// Numbers and layouts.
mod abi {
    use super::Range;
    use vmm_sys_util::{ioctl_ior_nr, ioctl_iowr_nr};

    pub(super) const UFFD: u32 = 0xaa;
    pub(super) const UFFD_API: u64 = 0xaa;
    pub(super) const USER_MODE_ONLY: i32 = 1;
    pub(super) const EVENT_PAGEFAULT: u8 = 0x12;
    pub(super) const EVENT_FORK: u8 = 0x13;
    pub(super) const EVENT_REMAP: u8 = 0x14;
    pub(super) const EVENT_REMOVE: u8 = 0x15;
    pub(super) const EVENT_UNMAP: u8 = 0x16;
    /// Size of `struct uffd_msg`.
    pub(super) const MESSAGE: usize = 32;

    #[repr(C)]
    #[derive(Debug, Default)]
    pub(super) struct UffdioApi {
        pub(super) api: u64,
        pub(super) features: u64,
        pub(super) ioctls: u64,
    }

    #[repr(C)]
    #[derive(Debug, Default)]
    pub(super) struct UffdioRange {
        pub(super) start: u64,
        pub(super) len: u64,
    }

    impl From<&Range<u64>> for UffdioRange {
        fn from(range: &Range<u64>) -> Self {
            Self { start: range.start, len: range.end - range.start }
        }
    }

    #[repr(C)]
    #[derive(Debug, Default)]
    pub(super) struct UffdioRegister {
        pub(super) range: UffdioRange,
        pub(super) mode: u64,
        pub(super) ioctls: u64,
    }

    #[repr(C)]
    #[derive(Debug, Default)]
    pub(super) struct UffdioZeropage {
        pub(super) range: UffdioRange,
        pub(super) mode: u64,
        pub(super) zeropage: i64,
    }

    #[repr(C)]
    #[derive(Debug, Default)]
    pub(super) struct UffdioWriteprotect {
        pub(super) range: UffdioRange,
        pub(super) mode: u64,
    }

    ioctl_iowr_nr!(UFFDIO_API, UFFD, 0x3f, UffdioApi);
    ioctl_iowr_nr!(UFFDIO_REGISTER, UFFD, 0x00, UffdioRegister);
    ioctl_ior_nr!(UFFDIO_UNREGISTER, UFFD, 0x01, UffdioRange);
    ioctl_ior_nr!(UFFDIO_WAKE, UFFD, 0x02, UffdioRange);
    ioctl_iowr_nr!(UFFDIO_ZEROPAGE, UFFD, 0x04, UffdioZeropage);
    ioctl_iowr_nr!(UFFDIO_WRITEPROTECT, UFFD, 0x06, UffdioWriteprotect);
}
use abi::*;

bitflags::bitflags! {
    /// What a descriptor is asked to tell or to do (`UFFD_FEATURE_*`).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct Features: u64 {
        /// A process that has the mapping forks. Needs CAP_SYS_PTRACE.
        const EVENT_FORK = 1 << 1;
        /// mremap moved pages.
        const EVENT_REMAP = 1 << 2;
        /// madvise is about to discard pages.
        const EVENT_REMOVE = 1 << 3;
        /// Addresses were unmapped.
        const EVENT_UNMAP = 1 << 6;
        /// Write protection resolves itself, on mappings of every kind (Linux 6.7).
        const WP_ASYNC = 1 << 15;
    }
}

/// Which faults of a range are reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Those on pages that are missing.
    Missing,
    /// Those on pages that were write-protected through the descriptor; none where nobody does that.
    WriteProtect,
}

/// What a descriptor tells.
#[derive(Debug)]
pub enum UffdEvent {
    /// Somebody waits for the page at this address.
    PageFault(u64),
    /// The process forked; the child's mappings belong to this new descriptor.
    Fork(OwnedFd),
    /// `len` bytes went from one address to another.
    Remap {
        /// Where they were.
        from: u64,
        /// Where they are.
        to: u64,
        /// How many. 0 for a second mapping of the same memory (mremap with an old length of 0).
        len: u64,
    },
    /// The pages of the range are about to be discarded; the mapping stays.
    Remove(Range<u64>),
    /// Nothing of what was in the range is mapped there any more.
    Unmap(Range<u64>),
}

/// A userfaultfd.
#[derive(Debug)]
pub struct Uffd {
    fd: OwnedFd,
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn open(flags: i32) -> io::Result<OwnedFd> {
    // SAFETY: makes a descriptor; touches no memory.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK | flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made it for us and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

impl Uffd {
    /// A descriptor with `features`, that reports the faults of user code and of the kernel.
    ///
    /// # Errors
    /// `EPERM`: not allowed to this user, or [`Features::EVENT_FORK`] is not. `EINVAL`: the kernel lacks a feature.
    /// `ENOSYS`: it lacks all of it.
    pub fn new(features: Features) -> io::Result<Self> {
        Self::with_api(open(0)?, features)
    }

    /// The same for who needs no faults of the kernel's, which every user may have.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn user_mode_only(features: Features) -> io::Result<Self> {
        Self::with_api(open(USER_MODE_ONLY)?, features)
    }

    fn with_api(fd: OwnedFd, features: Features) -> io::Result<Self> {
        let mut api = UffdioApi { api: UFFD_API, features: features.bits(), ioctls: 0 };
        // SAFETY: the ioctl reads and writes one `UffdioApi`.
        check(unsafe { ioctl_with_mut_ref(&fd, UFFDIO_API(), &mut api) })?;
        Ok(Self { fd })
    }

    /// Begins to report what happens to `range`, page-aligned addresses of this process.
    ///
    /// # Errors
    /// `EINVAL`: a part is not mapped, or of a kind that cannot be watched. `EBUSY`: another descriptor has a part.
    pub fn register(&self, range: &Range<u64>, mode: Mode) -> io::Result<()> {
        let mode = match mode {
            Mode::Missing => 1,
            Mode::WriteProtect => 2,
        };
        let mut register = UffdioRegister { range: range.into(), mode, ioctls: 0 };
        // SAFETY: the ioctl reads and writes one `UffdioRegister`. Who registers for faults serves them.
        check(unsafe { ioctl_with_mut_ref(&self.fd, UFFDIO_REGISTER(), &mut register) })
    }

    /// Ends it.
    ///
    /// # Errors
    /// `EINVAL`: nothing is mapped there, or what is cannot be watched.
    pub fn unregister(&self, range: &Range<u64>) -> io::Result<()> {
        // SAFETY: the ioctl reads one `UffdioRange`.
        check(unsafe { ioctl_with_ref(&self.fd, UFFDIO_UNREGISTER(), &UffdioRange::from(range)) })
    }

    /// Fills a missing page with zeros and wakes who waits for it; only the latter if it is there already.
    ///
    /// # Errors
    /// The kernel's.
    pub fn fill_with_zeros(&self, page: Range<u64>) -> io::Result<()> {
        let mut zero = UffdioZeropage { range: (&page).into(), ..UffdioZeropage::default() };
        // SAFETY: the ioctl reads and writes one `UffdioZeropage`. It fills only what nobody has seen yet.
        match check(unsafe { ioctl_with_mut_ref(&self.fd, UFFDIO_ZEROPAGE(), &mut zero) }) {
            // Somebody else was faster; who waits only has to look again.
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
                // SAFETY: the ioctl reads one `UffdioRange`.
                check(unsafe { ioctl_with_ref(&self.fd, UFFDIO_WAKE(), &zero.range) })
            }
            result => result,
        }
    }

    /// Lifts the write protection of `range`, which is registered with [`Mode::WriteProtect`].
    ///
    /// # Errors
    /// `EAGAIN`: somewhere in this process the effect of a change to registered memory is there already but its event has
    /// not been read (`mmap_changing`). It takes the mmap lock, so a change that was made before the call is seen.
    pub(super) fn lift_write_protection(&self, range: &Range<u64>) -> io::Result<()> {
        let mut lift = UffdioWriteprotect { range: range.into(), mode: 0 };
        // SAFETY: the ioctl reads one `UffdioWriteprotect`; giving write access back changes no content.
        check(unsafe { ioctl_with_mut_ref(&self.fd, UFFDIO_WRITEPROTECT(), &mut lift) })
    }

    /// The next event. Reading it lets the thread go on that caused it. `None`: there is none now.
    ///
    /// # Errors
    /// The kernel's; `EMFILE` where a fork's descriptor finds no room, and then the event is there again.
    pub fn read(&self) -> io::Result<Option<UffdEvent>> {
        loop {
            let mut message = [0u8; MESSAGE];
            // SAFETY: the kernel writes one message, at most the length of the array.
            let read = unsafe { libc::read(self.fd.as_raw_fd(), message.as_mut_ptr().cast(), MESSAGE) };
            if read == MESSAGE as isize {
                return event(&message).map(Some);
            }
            let error = io::Error::last_os_error();
            match error.kind() {
                _ if read >= 0 => return Ok(None),
                io::ErrorKind::WouldBlock => return Ok(None),
                io::ErrorKind::Interrupted => {}
                _ => return Err(error),
            }
        }
    }

    /// The descriptor: readable when there is an event.
    pub fn fd(&self) -> BorrowedFd<'_> {
        use std::os::fd::AsFd;
        self.fd.as_fd()
    }
}

/// `struct uffd_msg`: the event, seven bytes of nothing, and the event's own part.
fn event(message: &[u8; MESSAGE]) -> io::Result<UffdEvent> {
    let word = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&message[at..at + 8]);
        u64::from_ne_bytes(bytes)
    };
    Ok(match message[0] {
        EVENT_PAGEFAULT => UffdEvent::PageFault(word(16)),
        EVENT_FORK => {
            // SAFETY: the kernel just put this descriptor into our table and told nobody else.
            UffdEvent::Fork(unsafe { OwnedFd::from_raw_fd(word(8) as u32 as i32) })
        }
        EVENT_REMAP => UffdEvent::Remap { from: word(8), to: word(16), len: word(24) },
        EVENT_REMOVE => UffdEvent::Remove(word(8)..word(16)),
        EVENT_UNMAP => UffdEvent::Unmap(word(8)..word(16)),
        other => return Err(io::Error::other(format!("userfaultfd event {other:#x} was not asked for"))),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = crate::addr::PAGE_SIZE;

    fn map(flags: i32, fd: i32) -> Range<u64> {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping where the kernel likes.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), PAGE as usize, prot, flags, fd, 0) };
        assert_ne!(at, libc::MAP_FAILED);
        at as u64..at as u64 + PAGE
    }

    /// What [`Watch`](crate::mm::watch::Watch) falls back to on older kernels and for users without privileges tells the same.
    #[test]
    fn every_way_to_a_descriptor_tells_of_an_unmapping() {
        let least = Features::EVENT_REMAP | Features::EVENT_REMOVE | Features::EVENT_UNMAP;
        let mut heard = 0;
        for open in [Uffd::new, Uffd::user_mode_only] {
            for features in
                [least | Features::WP_ASYNC | Features::EVENT_FORK, least | Features::WP_ASYNC, least]
            {
                let range = map(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1);
                let uffd = match open(features) {
                    Ok(uffd) => uffd,
                    Err(error) => {
                        println!("skipped: {features:?} is refused here: {error}");
                        continue;
                    }
                };
                uffd.register(&range, Mode::WriteProtect).unwrap();
                assert!(uffd.read().unwrap().is_none());
                std::thread::scope(|scope| {
                    let start = range.start as usize;
                    // SAFETY: our own mapping, without references into it.
                    scope.spawn(move || unsafe { libc::munmap(start as *mut libc::c_void, PAGE as usize) });
                    let event = loop {
                        match uffd.read().unwrap() {
                            Some(event) => break event,
                            None => std::thread::yield_now(),
                        }
                    };
                    assert!(matches!(event, UffdEvent::Unmap(gone) if gone == range), "{features:?}");
                });
                heard += 1;
            }
        }
        let required = std::env::var_os("UMBRA_REQUIRE_KVM").is_some();
        assert!(heard > 0 || !required, "userfaultfd is required here");
    }

    #[test]
    fn a_change_in_flight_is_told_from_none() {
        let features = Features::EVENT_UNMAP;
        let Ok(uffd) = Uffd::new(features).or_else(|_| Uffd::user_mode_only(features)) else {
            println!("skipped: the host refuses userfaultfd");
            return;
        };
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let (range, scratch) = (map(flags, -1), map(flags, -1));
        uffd.register(&range, Mode::WriteProtect).unwrap();
        uffd.register(&scratch, Mode::WriteProtect).unwrap();
        uffd.lift_write_protection(&scratch).unwrap();
        std::thread::scope(|scope| {
            let start = range.start as usize;
            // SAFETY: our own mapping, without references into it.
            scope.spawn(move || unsafe { libc::munmap(start as *mut libc::c_void, PAGE as usize) });
            let error = loop {
                match uffd.lift_write_protection(&scratch) {
                    Ok(()) => std::thread::yield_now(),
                    Err(error) => break error,
                }
            };
            assert_eq!(error.raw_os_error(), Some(libc::EAGAIN));
            while uffd.read().unwrap().is_none() {}
        });
        uffd.lift_write_protection(&scratch).unwrap();
    }
}
