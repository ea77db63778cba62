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
