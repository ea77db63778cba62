// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One open file of the host's, used without blocking out of reach.
//!
//! A read or write that could wait for somebody else (pipe, terminal, socket) is tried with "do not wait"; if it would
//! have to, the thread waits in [`Thread::poll`], which signals interrupt. Where the host cannot try (`RWF_NOWAIT` of a
//! terminal, of a pipe before Linux 6.x), it is polled with no time-out first, and writes are cut to what a ready pipe
//! takes without waiting. The host's own flags of the file are never changed: others share it.

use super::super::errno::Errno;
use super::super::host::{self, Wait};
use super::super::thread::Thread;
use crate::inject::points::FILE_READ;
use shadow_mmu::frame::FramePool;
use shadow_mmu::inject::Effect;
use shadow_mmu::mm::{FileSource, Object};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

/// What a pipe takes at once when it says that it is writable.
const PIPE_BUF: usize = 4096;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Reads and writes go through at once: regular files, block devices, directories.
    Immediate,
    /// A stream that is read until it is empty.
    Pipe,
    /// Anything else that may have to wait; one read is one read of the host's.
    Device,
}

/// What a mapping of a file can show.
#[derive(Debug)]
pub(in crate::guest) enum Mappable {
    /// This.
    Object(Arc<Object>),
    /// The file is not open for reading.
    Unreadable,
    /// The file is no regular file.
    No,
}

/// An open file.
#[derive(Debug)]
pub(in crate::guest) struct HostFile {
    /// Shared with [`Source`], so that a mapping outlives the descriptor.
    fd: Arc<OwnedFd>,
    name: &'static str,
    kind: Kind,
    is_regular: bool,
    is_seekable: bool,
    /// `F_GETFL` of the host when the guest got it.
    flags: i32,
    /// `O_NONBLOCK` as the guest set it.
    nonblocking: AtomicBool,
    /// The host can try without waiting.
    can_try: AtomicBool,
    /// Its page cache, once mapped.
    object: OnceLock<Arc<Object>>,
}

impl HostFile {
    /// # Errors
    /// The host's, for a descriptor of no use.
    pub(super) fn new(fd: OwnedFd, name: &'static str) -> Result<Self, Errno> {
        const MODE: usize = 24;
        let stat = host::stat(fd.as_fd())?;
        let mode = u32::from_le_bytes([stat[MODE], stat[MODE + 1], stat[MODE + 2], stat[MODE + 3]]);
        let kind = match mode & libc::S_IFMT {
            libc::S_IFREG | libc::S_IFBLK | libc::S_IFDIR => Kind::Immediate,
            libc::S_IFIFO => Kind::Pipe,
            _ => Kind::Device,
        };
        let flags = host::file_flags(fd.as_fd())?;
        Ok(Self {
            is_seekable: host::seek(fd.as_fd(), 0, libc::SEEK_CUR).is_ok(),
            fd: Arc::new(fd),
            name,
            kind,
            is_regular: mode & libc::S_IFMT == libc::S_IFREG,
            flags,
            nonblocking: AtomicBool::new(flags & libc::O_NONBLOCK != 0),
            can_try: AtomicBool::new(true),
            object: OnceLock::new(),
        })
    }

    /// The host's descriptor, for polling and asking.
    pub(in crate::guest) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    pub(super) fn is_readable(&self) -> bool {
        self.flags & libc::O_ACCMODE != libc::O_WRONLY
    }

    pub(super) fn is_writable(&self) -> bool {
        self.flags & libc::O_ACCMODE != libc::O_RDONLY
    }

    /// Whether a read goes on where the last one ended, until the buffer is full.
    pub(super) fn is_read_until_full(&self) -> bool {
        self.kind != Kind::Device
    }

    /// `F_GETFL`.
    pub(super) fn flags(&self) -> i32 {
        let nonblocking = if self.nonblocking.load(Ordering::Relaxed) { libc::O_NONBLOCK } else { 0 };
        self.flags & !libc::O_NONBLOCK | nonblocking
    }

    /// `F_SETFL`, as far as the guest can change what is shared with others: `O_NONBLOCK`.
    pub(super) fn set_flags(&self, flags: i32) {
        self.nonblocking.store(flags & libc::O_NONBLOCK != 0, Ordering::Relaxed);
    }

    /// # Errors
    /// `ESPIPE` for an offset in what has none; `EINVAL` for a negative one.
    pub(super) fn check_offset(&self, offset: Option<i64>) -> Result<Option<u64>, Errno> {
        match offset {
            None => Ok(None),
            Some(offset) if offset < 0 => Err(Errno::EINVAL),
            Some(_) if !self.is_seekable => Err(Errno::ESPIPE),
            Some(offset) => Ok(Some(offset as u64)),
        }
    }

    /// Reads once. `wait`: what to do where there is nothing yet.
    ///
    /// # Errors
    /// `EAGAIN`: nothing there; [`Errno::RESTART_SYS`]: a signal came while waiting. Otherwise the host's.
    pub(super) fn read(
        &self,
        t: &Thread,
        into: &mut [u8],
        offset: Option<u64>,
        wait: Wait,
    ) -> Result<usize, Errno> {
        let effect = t.process.mm().faults().hit(&FILE_READ);
        if let Effect::Fail(errno) = effect {
            return Err(Errno(errno));
        }
        let got = self.retry(t, libc::POLLIN, wait, |wait| host::read(self.fd(), into, offset, wait))?;
        if let (Effect::Corrupt(random), true) = (effect, got > 0) {
            into[(random >> 3) as usize % got] ^= 1 << (random & 7);
        }
        Ok(got)
    }

    /// Writes once, perhaps less than all. Errors as those of [`read`](Self::read).
    pub(super) fn write(&self, t: &Thread, from: &[u8], offset: Option<u64>) -> Result<usize, Errno> {
        self.retry(t, libc::POLLOUT, Wait::AsOpened, |wait| {
            let waits_for_room = self.kind != Kind::Immediate && wait == Wait::AsOpened;
            let most = if waits_for_room { from.len().min(PIPE_BUF) } else { from.len() };
            host::write(self.fd(), &from[..most], offset, wait)
        })
    }

    fn retry(
        &self,
        t: &Thread,
        event: i16,
        wait: Wait,
        mut attempt: impl FnMut(Wait) -> Result<usize, Errno>,
    ) -> Result<usize, Errno> {
        loop {
            match self.try_once(event, &mut attempt) {
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) if wait == Wait::AsOpened && !self.nonblocking.load(Ordering::Relaxed) => {
                    t.poll(&mut [self.polled_for(event)], None).map_err(|errno| match errno {
                        Errno::EINTR => Errno::RESTART_SYS,
                        errno => errno,
                    })?;
                }
                result => return result,
            }
        }
    }

    fn try_once(
        &self,
        event: i16,
        attempt: &mut impl FnMut(Wait) -> Result<usize, Errno>,
    ) -> Result<usize, Errno> {
        if self.kind == Kind::Immediate {
            return attempt(Wait::AsOpened);
        }
        if self.can_try.load(Ordering::Relaxed) {
            match attempt(Wait::Never) {
                Err(Errno::EOPNOTSUPP) => self.can_try.store(false, Ordering::Relaxed),
                result => return result,
            }
        }
        match host::poll(&mut [self.polled_for(event)], Some(Instant::now()))? {
            0 => Err(Errno::EAGAIN),
            _ => attempt(Wait::AsOpened),
        }
    }

    fn polled_for(&self, events: i16) -> libc::pollfd {
        libc::pollfd { fd: self.fd.as_raw_fd(), events, revents: 0 }
    }

    /// What a private mapping of the file shows: its page cache, filled from the host's file.
    pub(in crate::guest) fn mappable(&self, pool: &Arc<FramePool>) -> Mappable {
        if !self.is_readable() {
            return Mappable::Unreadable;
        }
        if !self.is_regular {
            return Mappable::No;
        }
        let object = self.object.get_or_init(|| {
            let source = Source { fd: Arc::clone(&self.fd), name: self.name };
            Object::file(pool, Arc::new(source))
        });
        Mappable::Object(Arc::clone(object))
    }
}

/// A file of the host's as the source of a mapping. Apart from [`HostFile`], which holds the mapping's object.
#[derive(Debug)]
struct Source {
    fd: Arc<OwnedFd>,
    name: &'static str,
}

impl FileSource for Source {
    fn len(&self) -> u64 {
        const SIZE: usize = 48;
        match host::stat(self.fd.as_fd()) {
            Ok(stat) => u64::from_le_bytes(std::array::from_fn(|byte| stat[SIZE + byte])),
            // Without a length nothing of it can be shown: SIGBUS.
            Err(_) => 0,
        }
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<usize> {
        host::read(self.fd.as_fd(), into, Some(offset), Wait::AsOpened)
            .map_err(|errno| io::Error::from_raw_os_error(errno.0))
    }

    fn name(&self) -> &str {
        self.name
    }
}
