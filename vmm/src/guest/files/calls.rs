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
