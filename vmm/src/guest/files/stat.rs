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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::testing::Fixture;

    fn errno(errno: Errno) -> i64 {
        -i64::from(errno.0)
    }

    #[test]
    fn descriptors_have_a_stat_and_paths_have_none() {
        let fixture = Fixture::new();
        let page = fixture.map_pages(2);
        let (path, into) = (page, page + 64);
        let empty = libc::AT_EMPTY_PATH as u64;
        let call = |number, args: &[u64]| fixture.main.call(number, args);
        let mode = |at: u64| fixture.user().read_u32(at).unwrap() & libc::S_IFMT;
        assert_eq!(call(libc::SYS_fstat, &[1, into]), 0);
        assert_eq!(mode(into + 24), libc::S_IFIFO);
        assert_eq!(call(libc::SYS_newfstatat, &[1, path, into, empty]), 0);
        assert_eq!(call(libc::SYS_statx, &[1, path, empty, 0xfff, into]), 0);
        assert_eq!(mode(into + 28) & 0xffff, libc::S_IFIFO);
        assert_eq!(call(libc::SYS_newfstatat, &[1, path, into, 0]), errno(Errno::ENOENT));
        assert_eq!(call(libc::SYS_newfstatat, &[1, path, into, 1]), errno(Errno::EINVAL));
        assert_eq!(call(libc::SYS_fstat, &[9, into]), errno(Errno::EBADF));
        assert_eq!(call(libc::SYS_fstat, &[1, 1]), errno(Errno::EFAULT));
        fixture.user().write(path, b"/etc/passwd\0").unwrap();
        assert_eq!(call(libc::SYS_openat, &[-100i64 as u64, path, 0]), errno(Errno::ENOENT));
        assert_eq!(call(libc::SYS_open, &[path, 0]), errno(Errno::ENOENT));
        assert_eq!(call(libc::SYS_open, &[1, 0]), errno(Errno::EFAULT));
        fixture.user().write(page, &[b'x'; 4200]).unwrap();
        assert_eq!(call(libc::SYS_access, &[path, 0]), errno(Errno::ENAMETOOLONG));
    }

    #[test]
    fn the_program_knows_its_own_path() {
        let fixture = Fixture::new();
        let page = fixture.map_pages(1);
        let call = |number, args: &[u64]| fixture.main.call(number, args);
        fixture.user().write(page, b"/proc/self/exe\0").unwrap();
        assert_eq!(call(libc::SYS_readlink, &[page, page + 64, 4]), 4);
        assert_eq!(call(libc::SYS_readlinkat, &[0, page, page + 64, 64]), 9);
        let mut exe = [0; 9];
        fixture.user().read(page + 64, &mut exe).unwrap();
        assert_eq!(&exe, b"/bin/fake");
        assert_eq!(call(libc::SYS_readlink, &[page, page + 64, 0]), errno(Errno::EINVAL));
        assert_eq!(call(libc::SYS_readlink, &[page + 1, page + 64, 9]), errno(Errno::ENOENT));
        assert_eq!(call(libc::SYS_getcwd, &[page, 64]), 2);
        assert_eq!(call(libc::SYS_getcwd, &[page, 1]), errno(Errno::ERANGE));
    }
}
