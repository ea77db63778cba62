// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The system calls about memory: each is a call into [`Mm`](shadow_mmu::mm::Mm), behind the checks of what `Mm` has no words
//! for (descriptors, unknown flag bits). Mm does the others, in Linux's order.

use super::errno::{Errno, SysResult};
use super::files::Mappable;
use super::thread::Thread;
use super::uaccess::UserMemory;
use shadow_mmu::addr::{Access, Hva, PAGE_SIZE, TASK_SIZE};
use shadow_mmu::mm::{Advice, Backing, MapFlags, RemapFlags};

/// Rights from `PROT_*`; unknown bits mean nothing here.
fn rights(prot: i32) -> Access {
    let mut rights = Access::empty();
    rights.set(Access::READ, prot & libc::PROT_READ != 0);
    rights.set(Access::WRITE, prot & libc::PROT_WRITE != 0);
    rights.set(Access::EXEC, prot & libc::PROT_EXEC != 0);
    rights
}

/// `mmap(addr, len, prot, flags, fd, offset)`.
pub(super) fn mmap(t: &mut Thread, args: &[u64; 6]) -> SysResult {
    const MAP_TYPE: i32 = 0xf;
    let [addr, len, prot, flags, fd, offset] = *args;
    let (prot, flags) = (prot as i32, flags as i32);
    if !offset.is_multiple_of(PAGE_SIZE) {
        return Err(Errno::EINVAL);
    }
    let file = match flags & libc::MAP_ANONYMOUS {
        0 => Some(t.process.files().get(fd as u32)?),
        _ => None,
    };
    if len == 0 {
        return Err(Errno::EINVAL);
    }
    if flags & libc::MAP_HUGETLB != 0 {
        // As on a machine without huge pages set aside.
        return Err(Errno::ENOMEM);
    }
    let shared = match flags & MAP_TYPE {
        libc::MAP_PRIVATE => MapFlags::PRIVATE,
        libc::MAP_SHARED => MapFlags::SHARED,
        libc::MAP_SHARED_VALIDATE if file.is_some() => MapFlags::SHARED,
        _ => return Err(Errno::EINVAL),
    };
    let backing = match file {
        None => Backing::Anonymous,
        Some(file) => {
            let object = match file.mappable(t.process.mm().pool()) {
                Mappable::Object(object) => object,
                Mappable::Unreadable => return Err(Errno::EACCES),
                Mappable::No => return Err(Errno::ENODEV),
            };
            // A write through a shared mapping would have to reach the host's file; there is no way back to it.
            if shared == MapFlags::SHARED {
                return Err(if prot & libc::PROT_WRITE != 0 { Errno::EACCES } else { Errno::ENODEV });
            }
            Backing::Object { object, offset }
        }
    };
    let flags = (MapFlags::from_bits_truncate(flags as u32) - MapFlags::SHARED - MapFlags::PRIVATE) | shared;
    Ok(t.process.mm().mmap(Hva(addr), len, rights(prot), flags, backing)?.0)
}

pub(super) fn munmap(t: &mut Thread, addr: u64, len: u64) -> SysResult {
    t.process.mm().munmap(Hva(addr), len)?;
    Ok(0)
}

pub(super) fn mprotect(t: &mut Thread, addr: u64, len: u64, prot: i32) -> SysResult {
    const PROT_SEM: i32 = 8;
    const KNOWN: i32 = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC | PROT_SEM;
    // PROT_GROWSDOWN and PROT_GROWSUP ask for what only a growing mapping can do, and there is none.
    if prot & !KNOWN != 0 {
        return Err(Errno::EINVAL);
    }
    t.process.mm().mprotect(Hva(addr), len, rights(prot))?;
    Ok(0)
}

pub(super) fn mremap(t: &mut Thread, args: &[u64; 6]) -> SysResult {
    let [old, old_len, new_len, flags, new, _] = *args;
    let flags = u32::try_from(flags).ok().and_then(RemapFlags::from_bits).ok_or(Errno::EINVAL)?;
    Ok(t.process.mm().mremap(Hva(old), old_len, new_len, flags, Hva(new))?.0)
}

pub(super) fn brk(t: &mut Thread, to: u64) -> SysResult {
    Ok(t.process.mm().brk(Hva(to)).0)
}

pub(super) fn madvise(t: &mut Thread, addr: u64, len: u64, advice: i32) -> SysResult {
    let advice = Advice::from_raw(advice).ok_or(Errno::EINVAL)?;
    t.process.mm().madvise(Hva(addr), len, advice)?;
    Ok(0)
}

pub(super) fn mincore(t: &mut Thread, addr: u64, len: u64, into: u64) -> SysResult {
    /// Pages asked for at once: what bounds our own memory.
    const BATCH: u64 = 4096;
    if !addr.is_multiple_of(PAGE_SIZE) {
        return Err(Errno::EINVAL);
    }
    UserMemory::check_range(addr, len).map_err(|_| Errno::ENOMEM)?;
    let pages = len.div_ceil(PAGE_SIZE);
    UserMemory::check_range(into, pages)?;
    let mut done = 0;
    while done < pages {
        let batch = (pages - done).min(BATCH);
        let seen = t.process.mm().mincore(Hva(addr + done * PAGE_SIZE), batch * PAGE_SIZE)?;
        t.process.user().write(into + done, &seen)?;
        done += batch;
        if t.process.group().is_over() {
            return Err(Errno::EINTR);
        }
    }
    Ok(0)
}

pub(super) fn msync(t: &mut Thread, addr: u64, len: u64, flags: i32) -> SysResult {
    t.process.mm().msync(Hva(addr), len, flags)?;
    Ok(0)
}

/// `mlock` and its kind: nothing is ever paged out behind a guest's back, so there is nothing to do.
pub(super) fn lock(addr: u64, len: u64) -> SysResult {
    match addr.checked_add(len) {
        Some(end) if end <= TASK_SIZE => Ok(0),
        _ => Err(Errno::ENOMEM),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::testing::{Fixture, file_with};

    const PRIVATE: u64 = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
    const RW: u64 = (libc::PROT_READ | libc::PROT_WRITE) as u64;

    #[test]
    fn anonymous_memory_comes_changes_and_goes() {
        let fixture = Fixture::new();
        let call = |number, args: &[u64]| fixture.main.call(number, args);
        let at = call(libc::SYS_mmap, &[0, 0x3000, RW, PRIVATE, u64::MAX, 0]) as u64;
        fixture.user().write_u64(at + 0x1000, 7).unwrap();
        assert_eq!(call(libc::SYS_mprotect, &[at + 0x1000, 0x1000, libc::PROT_READ as u64]), 0);
        assert!(fixture.user().write_u64(at + 0x1000, 8).is_err());
        assert_eq!(fixture.user().read_u64(at + 0x1000), Ok(7));
        assert_eq!(call(libc::SYS_munmap, &[at, 0x3000]), 0);
        assert!(fixture.user().read_u64(at).is_err());
    }

    #[test]
    fn nonsense_is_refused_in_linux_words() {
        let fixture = Fixture::new();
        let call = |number, args: &[u64]| fixture.main.call(number, args);
        let refused = |args: &[u64], errno: i32| {
            assert_eq!(call(libc::SYS_mmap, args), -i64::from(errno), "mmap {args:x?}");
        };
        refused(&[0, 0, RW, PRIVATE, u64::MAX, 0], libc::EINVAL);
        refused(&[0, 0x1000, RW, PRIVATE, u64::MAX, 1], libc::EINVAL);
        refused(&[0, 0x1000, RW, libc::MAP_ANONYMOUS as u64, u64::MAX, 0], libc::EINVAL);
        refused(&[0, u64::MAX, RW, PRIVATE, u64::MAX, 0], libc::ENOMEM);
        refused(&[0, 1 << 46, RW, PRIVATE, u64::MAX, 0], libc::ENOMEM);
        refused(&[1, 0x1000, RW, PRIVATE | libc::MAP_FIXED as u64, u64::MAX, 0], libc::EINVAL);
        refused(&[0, 0x1000, RW, libc::MAP_PRIVATE as u64, 77, 0], libc::EBADF);
        refused(&[0, 0x1000, RW, libc::MAP_PRIVATE as u64, 0, 0], libc::ENODEV);
        refused(&[0, 0x1000, RW, libc::MAP_PRIVATE as u64, 1, 0], libc::EACCES);
        let invalid = -i64::from(libc::EINVAL);
        assert_eq!(call(libc::SYS_mprotect, &[0x10_0000, 0x1000, 0x80]), invalid);
        assert_eq!(call(libc::SYS_mremap, &[0x10_0000, 0x1000, 0x1000, 1 << 40, 0]), invalid);
        assert_eq!(call(libc::SYS_madvise, &[0x10_0000, 0x1000, 999]), invalid);
        assert_eq!(call(libc::SYS_mincore, &[1, 0x1000, 0]), invalid);
        assert_eq!(call(libc::SYS_mincore, &[0x1000, 1 << 63, 0]), -i64::from(libc::ENOMEM));
    }

    #[test]
    fn standard_input_can_be_mapped_privately_if_it_is_a_file() {
        let file = file_with(b"from the file");
        let fixture = Fixture::with_stdin(file.into(), None);
        let map = |flags: i32| fixture.main.call(libc::SYS_mmap, &[0, 0x2000, RW, flags as u64, 0, 0]);
        let at = map(libc::MAP_PRIVATE) as u64;
        let mut text = [0; 14];
        fixture.user().read(at, &mut text).unwrap();
        assert_eq!(&text, b"from the file\0");
        fixture.user().write(at, b"copy").unwrap();
        assert!(fixture.user().read_u64(at + 0x1000).is_err(), "behind the end of the file");
        let again = map(libc::MAP_PRIVATE) as u64;
        fixture.user().read(again, &mut text).unwrap();
        assert_eq!(&text, b"from the file\0");
        assert_eq!(map(libc::MAP_SHARED), -i64::from(libc::EACCES));
    }

    #[test]
    fn mincore_writes_no_further_than_its_vector_goes() {
        let fixture = Fixture::new();
        let (range, vector) = (fixture.map_pages(20), fixture.map_pages(1));
        let call = |into: u64| fixture.main.call(libc::SYS_mincore, &[range, 20 * PAGE_SIZE, into]);
        assert_eq!(call(vector), 0);
        assert_eq!(call(vector + 4096 - 19), -i64::from(libc::EFAULT));
    }
}
