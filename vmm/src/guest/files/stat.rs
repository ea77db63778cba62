// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Files by descriptor and by path. Descriptors are the host's; paths lead nowhere: there is no file system, and every name
//! is `ENOENT`, but for the program's own in `/proc/self/exe`.

use super::super::errno::{Errno, SysResult};
use super::super::host;
use super::super::thread::Thread;

const PATH_MAX: usize = 4096;

/// Reads a path as `getname` does.
fn read_path(t: &Thread, path: u64) -> Result<Vec<u8>, Errno> {
    t.process.user().c_string(path, PATH_MAX)?.ok_or(Errno::ENAMETOOLONG)
}

/// Any call that wants to find something at a path.
pub(in crate::guest) fn path(t: &Thread, path: u64) -> SysResult {
    read_path(t, path)?;
    Err(Errno::ENOENT)
}

pub(in crate::guest) fn fstat(t: &Thread, fd: u32, into: u64) -> SysResult {
    let file = t.process.files().get(fd)?;
    t.process.user().write(into, &host::stat(file.fd())?)?;
    Ok(0)
}

pub(in crate::guest) fn newfstatat(t: &Thread, fd: i32, path: u64, into: u64, flags: i32) -> SysResult {
    const KNOWN: i32 = libc::AT_SYMLINK_NOFOLLOW | libc::AT_NO_AUTOMOUNT | libc::AT_EMPTY_PATH;
    if flags & !KNOWN != 0 {
        return Err(Errno::EINVAL);
    }
    if !read_path(t, path)?.is_empty() || flags & libc::AT_EMPTY_PATH == 0 {
        return Err(Errno::ENOENT);
    }
    fstat(t, fd as u32, into)
}

pub(in crate::guest) fn statx(t: &Thread, fd: i32, path: u64, flags: i32, mask: u32, into: u64) -> SysResult {
    const SYNC_TYPE: i32 = libc::AT_STATX_FORCE_SYNC | libc::AT_STATX_DONT_SYNC;
    const RESERVED: u32 = 1 << 31;
    if mask & RESERVED != 0 || flags & SYNC_TYPE == SYNC_TYPE {
        return Err(Errno::EINVAL);
    }
    if !read_path(t, path)?.is_empty() || flags & libc::AT_EMPTY_PATH == 0 {
        return Err(Errno::ENOENT);
    }
    let file = t.process.files().get(fd as u32)?;
    t.process.user().write(into, &host::statx(file.fd(), flags, mask)?)?;
    Ok(0)
}

pub(in crate::guest) fn readlink(t: &Thread, path: u64, into: u64, size: i32) -> SysResult {
    if size <= 0 {
        return Err(Errno::EINVAL);
    }
    let path = read_path(t, path)?;
    let own = format!("/proc/{}/exe", t.process.pid());
    if path != b"/proc/self/exe" && path != own.as_bytes() {
        return Err(Errno::ENOENT);
    }
    let exe = t.process.exe();
    let exe = &exe[..exe.len().min(size as usize)];
    t.process.user().write(into, exe)?;
    Ok(exe.len() as u64)
}

pub(in crate::guest) fn getcwd(t: &Thread, into: u64, size: u64) -> SysResult {
    const ROOT: &[u8] = b"/\0";
    if size < ROOT.len() as u64 {
        return Err(Errno::ERANGE);
    }
    t.process.user().write(into, ROOT)?;
    Ok(ROOT.len() as u64)
}
