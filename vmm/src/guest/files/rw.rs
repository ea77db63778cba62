// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! read, write and their kin: bytes between a file and guest memory, in chunks of at most [`CHUNK`] bytes.
//!
//! As on Linux, what was transferred before something went wrong is the result; the error shows only where nothing was.
//! Before bytes are taken from a file, the place in the guest's memory they go to is known to be there, so that none are
//! lost to a bad pointer.

use super::super::errno::{Errno, SysResult};
use super::super::host::Wait;
use super::super::signal::{SigInfo, Signal};
use super::super::thread::Thread;
use super::super::uaccess::UserMemory;
use super::HostFile;

/// What is copied at once: bounds our own memory, whatever the guest asks for.
const CHUNK: usize = 128 << 10;
/// The most bytes of one call (`MAX_RW_COUNT`).
const MAX_RW_COUNT: u64 = 0x7fff_f000;
/// The most pieces of one call (`UIO_MAXIOV`).
const MAX_PIECES: u64 = 1024;

/// A piece of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Piece {
    addr: u64,
    len: u64,
}

/// Where a transfer is in the pieces that it is made of.
#[derive(Debug)]
struct Cursor {
    pieces: Vec<Piece>,
    /// The first piece that is not done.
    next: usize,
}

impl Cursor {
    fn one(addr: u64, len: u64) -> Result<Self, Errno> {
        UserMemory::check_range(addr, len)?;
        Ok(Self { pieces: vec![Piece { addr, len: len.min(MAX_RW_COUNT) }], next: 0 })
    }

    /// Reads an array of `struct iovec` (`import_iovec`).
    fn many(t: &Thread, array: u64, count: u64) -> Result<Self, Errno> {
        const SIZE: u64 = 16;
        if count > MAX_PIECES {
            return Err(Errno::EINVAL);
        }
        UserMemory::check_range(array, count * SIZE)?;
        let mut pieces = Vec::with_capacity(count as usize);
        let mut total = 0;
        for index in 0..count {
            let record = t.process.user().record::<{ SIZE as usize }>(array + index * SIZE)?;
            let (addr, len) = (record.u64(0), record.u64(8));
            if len > i64::MAX as u64 {
                return Err(Errno::EINVAL);
            }
            UserMemory::check_range(addr, len)?;
            let len = len.min(MAX_RW_COUNT - total);
            total += len;
            pieces.push(Piece { addr, len });
        }
        Ok(Self { pieces, next: 0 })
    }

    fn left(&self) -> u64 {
        self.pieces[self.next..].iter().map(|piece| piece.len).sum()
    }

    /// Calls `each` for what comes next, up to `most` bytes, until it handles less than it was given. Returns the bytes
    /// handled; the cursor stays.
    fn look(&self, most: usize, mut each: impl FnMut(u64, usize) -> usize) -> usize {
        let mut done = 0;
        for piece in &self.pieces[self.next..] {
            let len = piece.len.min((most - done) as u64) as usize;
            let handled = each(piece.addr, len);
            done += handled;
            if handled < len || done == most {
                break;
            }
        }
        done
    }

    fn advance(&mut self, mut bytes: u64) {
        while let Some(piece) = self.pieces.get_mut(self.next) {
            let step = piece.len.min(bytes);
            piece.addr += step;
            piece.len -= step;
            bytes -= step;
            if piece.len > 0 {
                break;
            }
            self.next += 1;
        }
    }
}

/// A result, unless something was done before it.
fn after(done: u64, errno: Errno) -> SysResult {
    if done > 0 { Ok(done) } else { Err(errno) }
}

pub(in crate::guest) fn read(t: &Thread, fd: u32, addr: u64, len: u64, offset: Option<i64>) -> SysResult {
    let file = t.process.files().get(fd)?;
    let offset = readable(&file, offset)?;
    from_file(t, &file, Cursor::one(addr, len)?, offset)
}

pub(in crate::guest) fn readv(t: &Thread, fd: u32, array: u64, count: u64, offset: Option<i64>) -> SysResult {
    let file = t.process.files().get(fd)?;
    let offset = readable(&file, offset)?;
    from_file(t, &file, Cursor::many(t, array, count)?, offset)
}

pub(in crate::guest) fn write(t: &Thread, fd: u32, addr: u64, len: u64, offset: Option<i64>) -> SysResult {
    let file = t.process.files().get(fd)?;
    let offset = writable(&file, offset)?;
    to_file(t, &file, Cursor::one(addr, len)?, offset)
}

pub(in crate::guest) fn writev(
    t: &Thread,
    fd: u32,
    array: u64,
    count: u64,
    offset: Option<i64>,
) -> SysResult {
    let file = t.process.files().get(fd)?;
    let offset = writable(&file, offset)?;
    to_file(t, &file, Cursor::many(t, array, count)?, offset)
}

fn readable(file: &HostFile, offset: Option<i64>) -> Result<Option<u64>, Errno> {
    let offset = file.check_offset(offset)?;
    if file.is_readable() { Ok(offset) } else { Err(Errno::EBADF) }
}

fn writable(file: &HostFile, offset: Option<i64>) -> Result<Option<u64>, Errno> {
    let offset = file.check_offset(offset)?;
    if file.is_writable() { Ok(offset) } else { Err(Errno::EBADF) }
}

fn from_file(t: &Thread, file: &HostFile, mut cursor: Cursor, offset: Option<u64>) -> SysResult {
    let user = t.process.user();
    let mut done = 0;
    while cursor.left() > 0 {
        let room = cursor.look(CHUNK, |addr, len| user.writable_prefix(addr, len));
        if room == 0 {
            return after(done, Errno::EFAULT);
        }
        let mut chunk = vec![0; room];
        // Having something to return, a read does not wait for more.
        let wait = if done > 0 { Wait::Never } else { Wait::AsOpened };
        let got = match file.read(t, &mut chunk, offset.map(|offset| offset.saturating_add(done)), wait) {
            Ok(got) => got,
            Err(errno) => return after(done, errno),
        };
        let mut rest = &chunk[..got];
        let copied = cursor.look(got, |addr, len| {
            let (now, later) = rest.split_at(len);
            rest = later;
            user.write_prefix(addr, now)
        });
        done += copied as u64;
        cursor.advance(copied as u64);
        if copied < got {
            return after(done, Errno::EFAULT);
        }
        if got < room || !file.is_read_until_full() || t.waker.has_attention() {
            break;
        }
    }
    Ok(done)
}

fn to_file(t: &Thread, file: &HostFile, mut cursor: Cursor, offset: Option<u64>) -> SysResult {
    let user = t.process.user();
    let mut done = 0;
    while cursor.left() > 0 {
        let mut chunk = vec![0; cursor.left().min(CHUNK as u64) as usize];
        let mut filled = 0;
        let ready = cursor.look(chunk.len(), |addr, len| {
            let read = user.read_prefix(addr, &mut chunk[filled..filled + len]);
            filled += read;
            read
        });
        if ready == 0 {
            return after(done, Errno::EFAULT);
        }
        let offset = offset.map(|offset| offset.saturating_add(done));
        match file.write(t, &chunk[..ready], offset) {
            Ok(written) => {
                done += written as u64;
                cursor.advance(written as u64);
                if written == 0 {
                    break;
                }
            }
            Err(errno) => {
                if errno == Errno::EPIPE {
                    raise_sigpipe(t);
                }
                return after(done, errno);
            }
        }
    }
    Ok(done)
}

/// Nobody reads what the thread writes.
fn raise_sigpipe(t: &Thread) {
    let info = SigInfo::from_user(Signal::PIPE, libc::SI_USER, t.process.pid(), t.process.uid());
    // A full queue leaves the signal pending without its data, which carries nothing.
    let _ = t.process.group().send(Some(t.tid), Signal::PIPE, info);
}
