// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! System calls about descriptors that move no bytes.

use super::super::errno::{Errno, SysResult};
use super::super::host;
use super::super::thread::Thread;
use super::OnExec;

pub(in crate::guest) fn close(t: &Thread, fd: u32) -> SysResult {
    t.process.files().close(fd).map(|()| 0)
}

pub(in crate::guest) fn lseek(t: &Thread, fd: u32, offset: i64, whence: u32) -> SysResult {
    const SEEK_MAX: u32 = libc::SEEK_HOLE as u32;
    let file = t.process.files().get(fd)?;
    if whence > SEEK_MAX {
        return Err(Errno::EINVAL);
    }
    host::seek(file.fd(), offset, whence as i32)
}

pub(in crate::guest) fn dup(t: &Thread, fd: u32) -> SysResult {
    let limit = t.process.limits().files();
    Ok(t.process.files().duplicate(fd, 0, limit, OnExec::Keep)?.into())
}

pub(in crate::guest) fn dup2(t: &Thread, fd: u32, new: u32) -> SysResult {
    if fd == new {
        return t.process.files().get(fd).map(|_| new.into());
    }
    dup3(t, fd, new, 0)
}

pub(in crate::guest) fn dup3(t: &Thread, fd: u32, new: u32, flags: i32) -> SysResult {
    if flags & !libc::O_CLOEXEC != 0 || fd == new {
        return Err(Errno::EINVAL);
    }
    let on_exec = if flags & libc::O_CLOEXEC != 0 { OnExec::Close } else { OnExec::Keep };
    t.process.files().duplicate_to(fd, new, t.process.limits().files(), on_exec)?;
    Ok(new.into())
}

pub(in crate::guest) fn fcntl(t: &Thread, fd: u32, command: i32, argument: u64) -> SysResult {
    let files = t.process.files();
    let file = files.get(fd)?;
    match command {
        libc::F_DUPFD | libc::F_DUPFD_CLOEXEC => {
            let limit = t.process.limits().files();
            let from = u32::try_from(argument).ok().filter(|from| u64::from(*from) < limit);
            let on_exec = if command == libc::F_DUPFD { OnExec::Keep } else { OnExec::Close };
            Ok(files.duplicate(fd, from.ok_or(Errno::EINVAL)?, limit, on_exec)?.into())
        }
        libc::F_GETFD => Ok(match files.on_exec(fd)? {
            OnExec::Keep => 0,
            OnExec::Close => libc::FD_CLOEXEC as u64,
        }),
        libc::F_SETFD => {
            let close = argument & libc::FD_CLOEXEC as u64 != 0;
            files.set_on_exec(fd, if close { OnExec::Close } else { OnExec::Keep })?;
            Ok(0)
        }
        libc::F_GETFL => Ok(file.flags() as u64),
        libc::F_SETFL => {
            file.set_flags(argument as i32);
            Ok(0)
        }
        _ => Err(Errno::EINVAL),
    }
}

/// No file here has controls: a program that asks whether it writes to a terminal hears that it does not.
pub(in crate::guest) fn ioctl(t: &Thread, fd: u32) -> SysResult {
    t.process.files().get(fd)?;
    Err(Errno::ENOTTY)
}

/// `fsync` and `fdatasync`, by number.
pub(in crate::guest) fn sync(t: &Thread, fd: u32, number: i64) -> SysResult {
    host::sync(t.process.files().get(fd)?.fd(), number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::testing::Fixture;
    use std::io::Read;

    fn errno(errno: Errno) -> i64 {
        -i64::from(errno.0)
    }

    #[test]
    fn duplicates_live_on_when_the_first_is_closed() {
        let mut fixture = Fixture::new();
        let page = fixture.map_pages(1);
        let call = |number, args: &[u64]| fixture.main.call(number, args);
        assert_eq!(call(libc::SYS_dup, &[1]), 3);
        assert_eq!(call(libc::SYS_dup2, &[1, 1]), 1);
        assert_eq!(call(libc::SYS_dup2, &[1, 2]), 2);
        assert_eq!(call(libc::SYS_dup3, &[1, 1, 0]), errno(Errno::EINVAL));
        assert_eq!(call(libc::SYS_dup3, &[1, 7, libc::O_CLOEXEC as u64]), 7);
        assert_eq!(call(libc::SYS_fcntl, &[7, libc::F_GETFD as u64]), i64::from(libc::FD_CLOEXEC));
        assert_eq!(call(libc::SYS_dup2, &[9, 1]), errno(Errno::EBADF));
        assert_eq!(call(libc::SYS_dup2, &[1, u64::MAX]), errno(Errno::EBADF));
        assert_eq!(call(libc::SYS_close, &[1]), 0);
        assert_eq!(call(libc::SYS_close, &[1]), errno(Errno::EBADF));
        assert_eq!(call(libc::SYS_write, &[2, page, 5]), 5, "where fd 1 went");
        let mut got = [0; 5];
        fixture.stdout.take().unwrap().read_exact(&mut got).unwrap();
        for fd in [2, 3, 7] {
            assert_eq!(fixture.main.call(libc::SYS_close, &[fd]), 0);
        }
        // The last one closed the pipe, and dup2 the other.
        let mut rest = Vec::new();
        fixture.stderr.take().unwrap().read_to_end(&mut rest).unwrap();
        assert!(rest.is_empty());
    }

    #[test]
    fn descriptors_have_flags_and_no_controls() {
        let fixture = Fixture::new();
        let call = |number, args: &[u64]| fixture.main.call(number, args);
        let fcntl =
            |fd: u64, command: i32, argument: u64| call(libc::SYS_fcntl, &[fd, command as u64, argument]);
        assert_eq!(fcntl(1, libc::F_GETFL, 0) & i64::from(libc::O_ACCMODE), i64::from(libc::O_WRONLY));
        assert_eq!(fcntl(0, libc::F_SETFD, 1), 0);
        assert_eq!(fcntl(0, libc::F_GETFD, 0), 1);
        assert_eq!(fcntl(0, libc::F_DUPFD, 100), 100);
        assert_eq!(fcntl(0, libc::F_DUPFD, 1024), errno(Errno::EINVAL));
        assert_eq!(fcntl(0, libc::F_DUPFD, u64::MAX), errno(Errno::EINVAL));
        assert_eq!(fcntl(0, 9999, 0), errno(Errno::EINVAL));
        assert_eq!(fcntl(55, libc::F_GETFD, 0), errno(Errno::EBADF));
        assert_eq!(call(libc::SYS_ioctl, &[1, libc::TCGETS, 0]), errno(Errno::ENOTTY));
        assert_eq!(call(libc::SYS_ioctl, &[55, 0, 0]), errno(Errno::EBADF));
        assert_eq!(call(libc::SYS_lseek, &[0, 0, 0]), errno(Errno::ESPIPE));
        assert_eq!(call(libc::SYS_lseek, &[0, 0, 9]), errno(Errno::EINVAL));
        assert_eq!(call(libc::SYS_fsync, &[1]), errno(Errno::EINVAL));
    }

    #[test]
    fn the_limit_of_open_files_can_be_lowered() {
        let fixture = Fixture::new();
        let page = fixture.map_pages(1);
        let set = |soft: u64, hard: u64| {
            fixture.user().write_u64(page, soft).unwrap();
            fixture.user().write_u64(page + 8, hard).unwrap();
            let nofile = u64::from(libc::RLIMIT_NOFILE);
            fixture.main.call(libc::SYS_prlimit64, &[0, nofile, page, page + 16])
        };
        assert_eq!(set(4, 1024), 0);
        assert_eq!(fixture.user().read_u64(page + 16), Ok(1024));
        assert_eq!(fixture.main.call(libc::SYS_dup, &[1]), 3);
        assert_eq!(fixture.main.call(libc::SYS_dup, &[1]), errno(Errno::EMFILE));
        assert_eq!(set(5, 4), errno(Errno::EINVAL));
        assert_eq!(set(5, 2048), errno(Errno::EPERM));
    }
}
