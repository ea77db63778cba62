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
use shadow_mmu::addr::{Hva, HvaRange, PAGE_SIZE};

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
            let written = user.write_prefix(addr, now);
            tell_filled(t, addr, written as u64);
            written
        });
        done += copied as u64;
        cursor.advance(copied as u64);
        if copied < got {
            return after(done, Errno::EFAULT);
        }
        if got < room || !file.is_read_until_full() || t.process.group().is_over() {
            break;
        }
    }
    Ok(done)
}

/// Tells the machine of the whole pages in the `len` bytes at `addr`, which were just read.
fn tell_filled(t: &Thread, addr: u64, len: u64) {
    if len < PAGE_SIZE {
        return;
    }
    let (start, end) = (addr.next_multiple_of(PAGE_SIZE), (addr + len) & !(PAGE_SIZE - 1));
    if start < end {
        t.process.host().filled(HvaRange { start: Hva(start), end: Hva(end) });
    }
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
                if written == 0 || t.process.group().is_over() {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::ExitStatus;
    use crate::guest::testing::{Fixture, file_with};
    use std::io::{Read, Write};
    use std::time::Duration;

    /// An array of pieces in guest memory.
    fn pieces(fixture: &Fixture, pieces: &[(u64, u64)]) -> u64 {
        let array = fixture.map_pages(8);
        for (index, (addr, len)) in pieces.iter().enumerate() {
            fixture.user().write_u64(array + 16 * index as u64, *addr).unwrap();
            fixture.user().write_u64(array + 16 * index as u64 + 8, *len).unwrap();
        }
        array
    }

    fn errno(errno: Errno) -> i64 {
        -i64::from(errno.0)
    }

    #[test]
    fn output_is_passed_on_byte_for_byte_up_to_a_bad_pointer() {
        let mut fixture = Fixture::new();
        let page = fixture.map_pages(1);
        let text: Vec<u8> = (0..=255).collect();
        fixture.user().write(page + 4096 - 256, &text).unwrap();
        let call = |args: &[u64]| fixture.main.call(libc::SYS_write, args);
        assert_eq!(call(&[1, page + 4096 - 256, 1000]), 256);
        assert_eq!(call(&[1, page + 4096, 1]), errno(Errno::EFAULT));
        assert_eq!(call(&[1, page, u64::MAX]), errno(Errno::EFAULT));
        assert_eq!(call(&[1, 0, 0]), 0);
        assert_eq!(call(&[0, page, 1]), errno(Errno::EBADF));
        assert_eq!(call(&[7, page, 1]), errno(Errno::EBADF));
        let mut got = vec![0; 256];
        fixture.stdout.take().unwrap().read_exact(&mut got).unwrap();
        assert_eq!(got, text);
    }

    #[test]
    fn input_waits_for_the_first_byte_and_loses_none_to_a_bad_pointer() {
        let fixture = Fixture::new();
        let page = fixture.map_pages(1);
        let mut stdin = fixture.stdin.as_ref().unwrap();
        fixture.main.begin_call(libc::SYS_read, &[0, page, 100]);
        std::thread::sleep(Duration::from_millis(20));
        stdin.write_all(b"hello world").unwrap();
        assert_eq!(fixture.main.finish().unwrap().rax, 11);
        stdin.write_all(b"abcdef").unwrap();
        let call = |args: &[u64]| fixture.main.call(libc::SYS_read, args);
        assert_eq!(call(&[0, page + 4096, 6]), errno(Errno::EFAULT));
        assert_eq!(call(&[0, 0, 6]), errno(Errno::EFAULT));
        assert_eq!(call(&[0, page + 4094, 6]), 2);
        assert_eq!(call(&[0, page, 6]), 4);
        let mut text = [0; 4];
        fixture.user().read(page, &mut text).unwrap();
        assert_eq!(&text, b"cdef");
        assert_eq!(fixture.main.call(libc::SYS_pread64, &[0, page, 6, 0]), errno(Errno::ESPIPE));
        assert_eq!(fixture.main.call(libc::SYS_pread64, &[0, page, 6, u64::MAX]), errno(Errno::EINVAL));
    }

    #[test]
    fn the_end_of_input_is_zero_and_nonblocking_input_is_eagain() {
        let mut fixture = Fixture::new();
        let page = fixture.map_pages(1);
        let set = [0, libc::F_SETFL as u64, libc::O_NONBLOCK as u64];
        assert_eq!(fixture.main.call(libc::SYS_fcntl, &set), 0);
        assert_eq!(fixture.main.call(libc::SYS_read, &[0, page, 6]), errno(Errno::EAGAIN));
        fixture.stdin = None;
        assert_eq!(fixture.main.call(libc::SYS_read, &[0, page, 6]), 0);
    }

    #[test]
    fn pieces_are_gathered_and_scattered_in_order() {
        let mut fixture = Fixture::new();
        let page = fixture.map_pages(1);
        fixture.user().write(page, b"onetwothree").unwrap();
        let array = pieces(&fixture, &[(page + 3, 3), (page, 0), (page, 3), (page + 6, 5)]);
        assert_eq!(fixture.main.call(libc::SYS_writev, &[1, array, 4]), 11);
        let mut got = [0; 11];
        fixture.stdout.take().unwrap().read_exact(&mut got).unwrap();
        assert_eq!(&got, b"twoonethree");
        fixture.stdin.as_ref().unwrap().write_all(b"12345").unwrap();
        let array = pieces(&fixture, &[(page + 100, 2), (page + 50, 10)]);
        assert_eq!(fixture.main.call(libc::SYS_readv, &[0, array, 2]), 5);
        let mut text = [0; 3];
        fixture.user().read(page + 50, &mut text).unwrap();
        assert_eq!(&text, b"345");
    }

    #[test]
    fn piece_lists_are_bounded_and_checked() {
        let fixture = Fixture::new();
        let page = fixture.map_pages(1);
        let writev = |array: u64, count: u64| fixture.main.call(libc::SYS_writev, &[1, array, count]);
        assert_eq!(writev(0, 1025), errno(Errno::EINVAL));
        assert_eq!(writev(0, u64::MAX), errno(Errno::EINVAL));
        assert_eq!(writev(0, 1), errno(Errno::EFAULT));
        assert_eq!(writev(0, 0), 0);
        assert_eq!(writev(pieces(&fixture, &[(page, 1 << 63)]), 1), errno(Errno::EINVAL));
        assert_eq!(writev(pieces(&fixture, &[(u64::MAX, 2)]), 1), errno(Errno::EFAULT));
        assert_eq!(writev(pieces(&fixture, &[(page, 1); 1024]), 1024), 1024);
        assert_eq!(writev(pieces(&fixture, &[(page, 2), (page + 4095, 2)]), 2), 3, "up to what can be read");
    }

    #[test]
    fn large_transfers_through_a_small_pipe_are_whole() {
        let mut fixture = Fixture::new();
        const LEN: usize = 1 << 20;
        let at = fixture.map_pages(LEN as u64 / 4096);
        let bytes: Vec<u8> = (0..LEN).map(|n| (n / 7) as u8).collect();
        fixture.user().write(at, &bytes).unwrap();
        fixture.main.begin_call(libc::SYS_write, &[1, at, LEN as u64]);
        let mut got = vec![0; LEN];
        fixture.stdout.take().unwrap().read_exact(&mut got).unwrap();
        assert!(got == bytes);
        assert_eq!(fixture.main.finish().unwrap().rax, LEN as u64);
    }

    #[test]
    fn a_write_that_nobody_reads_is_a_signal() {
        let mut fixture = Fixture::new();
        let page = fixture.map_pages(1);
        fixture.stdout = None;
        fixture.main.begin_call(libc::SYS_write, &[1, page, 1]);
        assert!(fixture.main.finish().is_none());
        assert_eq!(fixture.join(), ExitStatus::Signaled(libc::SIGPIPE));
    }

    #[test]
    fn a_blocked_write_ends_with_the_process() {
        let fixture = Fixture::new();
        let at = fixture.map_pages(64);
        fixture.main.begin_call(libc::SYS_write, &[1, at, 64 * 4096]);
        std::thread::sleep(Duration::from_millis(20));
        fixture.process.kill(libc::SIGTERM);
        assert_eq!(fixture.join(), ExitStatus::Signaled(libc::SIGTERM));
    }

    #[test]
    fn a_regular_file_is_read_in_one_go_and_by_offset() {
        let bytes: Vec<u8> = (0..300_000u32).map(|n| (n % 251) as u8).collect();
        let file = file_with(&bytes);
        let fixture = Fixture::with_stdin(file.into(), None);
        let at = fixture.map_pages(80);
        assert_eq!(fixture.main.call(libc::SYS_read, &[0, at, 1 << 20]), 300_000);
        // 73 whole pages, and what the machine heard of them.
        let filled = || {
            fixture
                .host
                .filled
                .lock()
                .drain(..)
                .map(|it| (it.start.0, (it.end.0 - it.start.0) >> 12))
                .collect::<Vec<_>>()
        };
        assert_eq!(filled(), [(at, 32), (at + (32 << 12), 32), (at + (64 << 12), 9)]);
        assert_eq!(fixture.main.call(libc::SYS_pread64, &[0, at + 1, 8192, 0]), 8192);
        assert_eq!(fixture.main.call(libc::SYS_pread64, &[0, at + 1, 8190, 0]), 8190);
        assert_eq!(filled(), [(at + 4096, 1)]);
        assert_eq!(fixture.main.call(libc::SYS_pread64, &[0, at, 10, 299_995]), 5);
        assert_eq!(fixture.main.call(libc::SYS_lseek, &[0, 100, 0]), 100);
        assert_eq!(fixture.main.call(libc::SYS_read, &[0, at, 4]), 4);
        let mut text = [0; 4];
        fixture.user().read(at, &mut text).unwrap();
        assert_eq!(text, bytes[100..104]);
    }
}
