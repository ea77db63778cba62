// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! poll, ppoll, select and pselect6: waiting for the host's files, in the host's `ppoll`.

use super::errno::{Errno, SysResult};
use super::restart::Restart;
use super::signal::calls::temporary_mask;
use super::thread::Thread;
use super::time::{self, Timespec};
use super::uaccess::{Record, UserMemory};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

/// `struct pollfd`: fd i32, events i16, revents i16.
const POLLFD: u64 = 8;

/// `poll(fds, count, milliseconds)`.
pub(super) fn poll(t: &mut Thread, fds: u64, count: u32, milliseconds: i32) -> SysResult {
    let deadline = u64::try_from(milliseconds)
        .ok()
        .and_then(|milliseconds| t.process.clock().now().checked_add(Duration::from_millis(milliseconds)));
    poll_until(t, fds, count, deadline)
}

/// Polls, or goes on with a poll.
pub(super) fn poll_until(t: &mut Thread, fds: u64, count: u32, deadline: Option<Instant>) -> SysResult {
    match poll_guest(t, fds, count, deadline) {
        Err(Errno::EINTR) => {
            t.restart = Restart::Poll { fds, count, deadline };
            Err(Errno::RESTART_BLOCK)
        }
        result => result,
    }
}

/// `ppoll(fds, count, time, mask, mask size)`.
pub(super) fn ppoll(t: &mut Thread, fds: u64, count: u32, time: u64, mask: u64, size: u64) -> SysResult {
    let limit = read_time(t, time)?;
    temporary_mask(t, mask, size)?;
    let deadline = limit.and_then(|limit| time::deadline_after(t, limit));
    let result = poll_guest(t, fds, count, deadline);
    finish(t, time, deadline, result)
}

fn read_time(t: &Thread, at: u64) -> Result<Option<Timespec>, Errno> {
    if at == 0 { Ok(None) } else { Timespec::read(t.process.user(), at).map(Some) }
}

/// Tells how much time is left, where there was a limit; whether that can be stored does not matter
/// (`poll_select_finish`).
fn finish(t: &Thread, time: u64, deadline: Option<Instant>, result: SysResult) -> SysResult {
    if time != 0 && deadline.is_some() {
        let _ = t.process.user().write(time, &time::left(t, deadline).record().0);
    }
    result.map_err(|errno| if errno == Errno::EINTR { Errno::RESTART_NO_HANDLER } else { errno })
}

/// The poll itself: reads the array, waits, writes every `revents`.
fn poll_guest(t: &Thread, fds: u64, count: u32, deadline: Option<Instant>) -> SysResult {
    if u64::from(count) > t.process.limits().files() {
        return Err(Errno::EINVAL);
    }
    let user = t.process.user();
    let mut records = vec![0; count as usize * POLLFD as usize];
    user.read(fds, &mut records)?;
    let wanted = records.chunks_exact(POLLFD as usize).map(|entry| Wanted {
        fd: i32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]]),
        events: i16::from_le_bytes([entry[4], entry[5]]),
    });
    let events = poll_files(t, &wanted.collect::<Vec<_>>(), deadline)?;
    for (index, revents) in events.iter().enumerate() {
        user.write(fds + index as u64 * POLLFD + 6, &revents.to_le_bytes())?;
    }
    Ok(events.iter().filter(|revents| **revents != 0).count() as u64)
}

/// What to wait for at a descriptor of the guest's.
#[derive(Debug, Clone, Copy)]
struct Wanted {
    fd: i32,
    events: i16,
}

/// Waits until one of `wanted` is ready, and returns what each is ready for. A negative descriptor is passed over; one
/// that is not open is ready with `POLLNVAL`.
fn poll_files(t: &Thread, wanted: &[Wanted], deadline: Option<Instant>) -> Result<Vec<i16>, Errno> {
    let files: Vec<_> = wanted.iter().map(|entry| t.process.files().get(entry.fd as u32).ok()).collect();
    let mut revents = vec![0; wanted.len()];
    // Only what is open is given to the host: it counts the entries against its own limit.
    let (mut places, mut polled) = (Vec::new(), Vec::new());
    for (place, (entry, file)) in
        wanted.iter().zip(&files).enumerate().filter(|(_, (entry, _))| entry.fd >= 0)
    {
        match file {
            None => revents[place] = libc::POLLNVAL,
            Some(file) => {
                places.push(place);
                polled.push(libc::pollfd { fd: file.fd().as_raw_fd(), events: entry.events, revents: 0 });
            }
        }
    }
    let ready_now = revents.contains(&libc::POLLNVAL);
    let deadline = if ready_now { Some(t.process.clock().now()) } else { deadline };
    match t.poll(&mut polled, deadline) {
        Err(Errno::EINTR) if ready_now => {}
        result => {
            result?;
        }
    }
    for (place, entry) in places.into_iter().zip(polled) {
        revents[place] = entry.revents;
    }
    Ok(revents)
}

/// `select(count, [read, write, except], time as struct timeval)`.
pub(super) fn select(t: &mut Thread, count: i32, sets: [u64; 3], time: u64) -> SysResult {
    let limit = match time {
        0 => None,
        at => {
            let record: Record<16> = t.process.user().record(at)?;
            let (Ok(seconds), Ok(micros)) = (u64::try_from(record.i64(0)), u64::try_from(record.i64(8)))
            else {
                return Err(Errno::EINVAL);
            };
            let time = Duration::from_secs(seconds).checked_add(Duration::from_micros(micros));
            Some(Timespec(time.unwrap_or(Duration::MAX)))
        }
    };
    let deadline = limit.and_then(|limit| time::deadline_after(t, limit));
    let result = select_guest(t, count, sets, deadline);
    if time != 0 && deadline.is_some() {
        let left = time::left(t, deadline).0;
        let mut record = Record::<16>::zeroed();
        record.put_u64(0, left.as_secs()).put_u64(8, left.subsec_micros().into());
        let _ = t.process.user().write(time, &record.0);
    }
    result.map_err(|errno| if errno == Errno::EINTR { Errno::RESTART_NO_HANDLER } else { errno })
}

/// `pselect6(count, [read, write, except], time, pointer to (mask, mask size))`.
pub(super) fn pselect6(t: &mut Thread, count: i32, sets: [u64; 3], time: u64, mask: u64) -> SysResult {
    let (mask, size) = match mask {
        0 => (0, 0),
        at => {
            let record: Record<16> = t.process.user().record(at)?;
            (record.u64(0), record.u64(8))
        }
    };
    let limit = read_time(t, time)?;
    temporary_mask(t, mask, size)?;
    let deadline = limit.and_then(|limit| time::deadline_after(t, limit));
    let result = select_guest(t, count, sets, deadline);
    finish(t, time, deadline, result)
}

/// What each set waits for, and what makes a descriptor ready in it (`POLLIN_SET` and so on in `fs/select.c`).
const SETS: [(i16, i16); 3] = [
    (libc::POLLIN | libc::POLLRDNORM | libc::POLLRDBAND, libc::POLLHUP | libc::POLLERR),
    (libc::POLLOUT | libc::POLLWRNORM | libc::POLLWRBAND, libc::POLLERR),
    (libc::POLLPRI, 0),
];

fn select_guest(t: &Thread, count: i32, sets: [u64; 3], deadline: Option<Instant>) -> SysResult {
    let count = u64::try_from(count).map_err(|_| Errno::EINVAL)?.min(t.process.files().capacity().into());
    let bytes = (count.div_ceil(64) * 8) as usize;
    let user = t.process.user();
    let mut bits: [Vec<u8>; 3] = Default::default();
    for (bits, &at) in bits.iter_mut().zip(&sets) {
        bits.resize(bytes, 0);
        if at != 0 {
            UserMemory::check_range(at, bytes as u64)?;
            user.read(at, bits)?;
        }
    }
    let is_in = |set: &[u8], fd: u64| set[(fd / 8) as usize] >> (fd % 8) & 1 == 1;
    let mut wanted = Vec::new();
    for fd in 0..count {
        let of_set = |(bits, (events, _)): (&Vec<u8>, &(i16, i16))| if is_in(bits, fd) { *events } else { 0 };
        let events = bits.iter().zip(&SETS).map(of_set).fold(0, |all, events| all | events);
        if events != 0 {
            t.process.files().get(fd as u32)?;
            wanted.push(Wanted { fd: fd as i32, events });
        }
    }
    let ready = poll_files(t, &wanted, deadline)?;
    let mut found = 0;
    for ((bits, &(events, always)), &at) in bits.iter_mut().zip(&SETS).zip(&sets) {
        let mut result = vec![0u8; bytes];
        for (entry, revents) in wanted.iter().zip(&ready) {
            let fd = entry.fd as u64;
            if is_in(bits, fd) && revents & (events | always) != 0 {
                result[(fd / 8) as usize] |= 1 << (fd % 8);
                found += 1;
            }
        }
        if at != 0 {
            user.write(at, &result)?;
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::testing::Fixture;
    use std::io::Write;

    fn errno(errno: Errno) -> i64 {
        -i64::from(errno.0)
    }
    fn put(fixture: &Fixture, entries: &[(i32, i16)]) -> u64 {
        let at = fixture.map_pages(1);
        for (index, (fd, events)) in entries.iter().enumerate() {
            fixture.user().write_u32(at + 8 * index as u64, *fd as u32).unwrap();
            fixture.user().write_u32(at + 8 * index as u64 + 4, *events as u32).unwrap();
        }
        at
    }
    fn revents(fixture: &Fixture, at: u64, index: u64) -> i16 {
        (fixture.user().read_u32(at + 8 * index + 4).unwrap() >> 16) as i16
    }

    #[test]
    fn poll_reports_what_is_ready_and_what_is_not_open() {
        let fixture = Fixture::new();
        let at = put(&fixture, &[(0, libc::POLLIN), (1, libc::POLLOUT), (-1, libc::POLLIN)]);
        assert_eq!(fixture.main.call(libc::SYS_poll, &[at, 3, u64::MAX]), 1);
        assert_eq!([0, 1, 2].map(|index| revents(&fixture, at, index)), [0, libc::POLLOUT, 0]);
        let at = put(&fixture, &[(0, libc::POLLIN), (9, libc::POLLIN)]);
        assert_eq!(fixture.main.call(libc::SYS_poll, &[at, 2, u64::MAX]), 1);
        assert_eq!([0, 1].map(|index| revents(&fixture, at, index)), [0, libc::POLLNVAL]);
        assert_eq!(fixture.main.call(libc::SYS_poll, &[at, 1, 10]), 0);
        assert_eq!(fixture.main.call(libc::SYS_poll, &[at, 1025, 0]), errno(Errno::EINVAL));
        assert_eq!(fixture.main.call(libc::SYS_poll, &[1, 1, 0]), errno(Errno::EFAULT));
    }

    #[test]
    fn poll_wakes_up_when_input_comes() {
        let fixture = Fixture::new();
        let at = put(&fixture, &[(0, libc::POLLIN)]);
        fixture.main.begin_call(libc::SYS_ppoll, &[at, 1, 0, 0, 8]);
        std::thread::sleep(Duration::from_millis(10));
        fixture.stdin.as_ref().unwrap().write_all(b"x").unwrap();
        assert_eq!(fixture.main.finish().unwrap().rax, 1);
        assert_eq!(revents(&fixture, at, 0), libc::POLLIN);
    }

    #[test]
    fn select_rewrites_its_sets_and_its_time() {
        let fixture = Fixture::new();
        let page = fixture.map_pages(1);
        let (read, write, time) = (page, page + 128, page + 256);
        fixture.user().write_u64(read, 1).unwrap();
        fixture.user().write_u64(write, 2).unwrap();
        fixture.user().write_u64(time, 100).unwrap();
        assert_eq!(fixture.main.call(libc::SYS_select, &[3, read, write, 0, time]), 1);
        assert_eq!((fixture.user().read_u64(read), fixture.user().read_u64(write)), (Ok(0), Ok(2)));
        assert!(fixture.user().read_u64(time).unwrap() <= 100);
        fixture.user().write_u64(read, 1 << 40).unwrap();
        assert_eq!(fixture.main.call(libc::SYS_select, &[64, read, 0, 0, time]), errno(Errno::EBADF));
        assert_eq!(fixture.main.call(libc::SYS_select, &[u64::MAX, 0, 0, 0, time]), errno(Errno::EINVAL));
        assert_eq!(fixture.main.call(libc::SYS_select, &[1, 1, 0, 0, time]), errno(Errno::EFAULT));
        fixture.user().write_u64(time, 0).unwrap();
        assert_eq!(fixture.main.call(libc::SYS_pselect6, &[1024, 0, 0, 0, time, 0]), 0);
    }
}
