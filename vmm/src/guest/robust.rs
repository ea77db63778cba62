// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Robust futexes (`exit_robust_list`): locks that a thread holds when it ends are marked, and one waiter each is woken.
//!
//! The list lives in guest memory and is the guest's claim: it is walked for at most [`MOST_ENTRIES`] entries, and ends at
//! the first address that cannot be read.

use super::errno::{Errno, SysResult};
use super::thread::Thread;

/// `ROBUST_LIST_LIMIT`.
const MOST_ENTRIES: u32 = 2048;
/// `sizeof(struct robust_list_head)`: first entry, offset from an entry to its futex, entry about to be added.
const HEAD_SIZE: u64 = 24;
const WAITERS: u32 = 0x8000_0000;
const OWNER_DIED: u32 = 0x4000_0000;
const TID_MASK: u32 = 0x3fff_ffff;

/// Where a thread's list starts; 0 for no list.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct RobustList {
    head: u64,
}

/// Which part of the list an entry is from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Entry {
    Listed,
    /// The thread was about to take or to release it.
    Pending,
}

pub(super) fn set_robust_list(t: &mut Thread, head: u64, len: u64) -> SysResult {
    if len != HEAD_SIZE {
        return Err(Errno::EINVAL);
    }
    t.robust_list = RobustList { head };
    Ok(0)
}

/// For the calling thread; another one's list is that thread's own affair here.
pub(super) fn get_robust_list(t: &mut Thread, tid: i32, head: u64, len: u64) -> SysResult {
    if tid != 0 && tid != t.tid {
        return Err(if t.process.group().contains(tid) { Errno::EPERM } else { Errno::ESRCH });
    }
    t.process.user().write_u64(len, HEAD_SIZE)?;
    t.process.user().write_u64(head, t.robust_list.head)?;
    Ok(0)
}

impl Thread {
    /// Walks the list of a thread that ends.
    pub(super) fn release_robust_list(&mut self) {
        let head = std::mem::take(&mut self.robust_list).head;
        if head != 0 {
            // Where the list cannot be read it ends.
            let _ = self.walk_robust_list(head);
        }
    }

    fn walk_robust_list(&self, head: u64) -> Result<(), Errno> {
        let user = self.process.user();
        let header = user.record::<24>(head)?;
        let (mut entry, offset, pending) = (header.u64(0), header.u64(8), header.u64(16));
        let mut left = MOST_ENTRIES;
        while entry & !1 != head && left > 0 {
            // Read before the futex is released: then its memory may be gone.
            let next = user.read_u64(entry & !1);
            if entry & !1 != pending & !1 {
                self.release_robust_futex(entry, offset, Entry::Listed)?;
            }
            entry = next?;
            left -= 1;
        }
        if pending != 0 {
            self.release_robust_futex(pending, offset, Entry::Pending)?;
        }
        Ok(())
    }

    /// `handle_futex_death`. Bit 0 of an entry says that its futex inherits priorities; nobody waits for one here.
    fn release_robust_futex(&self, entry: u64, offset: u64, kind: Entry) -> Result<(), Errno> {
        let addr = (entry & !1).wrapping_add(offset);
        let inherits = entry & 1 != 0;
        if !addr.is_multiple_of(4) {
            return Err(Errno::EINVAL);
        }
        let owned = |word: u32| word & TID_MASK == self.tid as u32;
        let old = self
            .process
            .user()
            .update_u32(addr, |word| owned(word).then_some(word & WAITERS | OWNER_DIED))?;
        let lost_wake_up = kind == Entry::Pending && old & TID_MASK == 0;
        if !inherits && (lost_wake_up || owned(old) && old & WAITERS != 0) {
            self.process.futexes().wake_one(addr);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::testing::Fixture;

    /// A list of one entry: head at the page, entry at +64, futex 32 bytes behind an entry.
    fn list(fixture: &Fixture, word: u32) -> u64 {
        let page = fixture.map_pages(1);
        let user = fixture.user();
        for (at, value) in [(0, page + 64), (8, 32), (16, 0), (64, page)] {
            user.write_u64(page + at, value).unwrap();
        }
        user.write_u32(page + 96, word).unwrap();
        page
    }

    #[test]
    fn a_held_lock_is_marked_and_its_waiter_woken() {
        let fixture = Fixture::new();
        let other = fixture.new_thread();
        let page = list(&fixture, other.tid as u32 | WAITERS);
        assert_eq!(other.call(libc::SYS_set_robust_list, &[page, 24]), 0);
        assert_eq!(other.call(libc::SYS_get_robust_list, &[0, page + 200, page + 208]), 0);
        assert_eq!(fixture.user().read_u64(page + 200), Ok(page));
        let word = other.tid as u64 | u64::from(WAITERS);
        fixture.main.begin_call(libc::SYS_futex, &[page + 96, 0, word]);
        other.begin_call(libc::SYS_exit, &[0]);
        // Woken, or late: then it sees that the word has changed.
        let result = fixture.main.finish().unwrap().rax;
        assert!(result == 0 || result == Errno::EAGAIN.as_rax(), "{result:#x}");
        assert!(other.finish().is_none());
        assert_eq!(fixture.user().load_u32(page + 96), Ok(WAITERS | OWNER_DIED));
    }

    #[test]
    fn locks_of_others_stay_and_bad_lists_end() {
        let fixture = Fixture::new();
        for head in [1, 1 << 63, u64::MAX - 7, 0x1000] {
            let other = fixture.new_thread();
            assert_eq!(other.call(libc::SYS_set_robust_list, &[head, 24]), 0);
            other.begin_call(libc::SYS_exit, &[0]);
            assert!(other.finish().is_none(), "{head:#x}");
        }
        let page = list(&fixture, 77);
        // A ring that never comes back to its head.
        fixture.user().write_u64(page + 64, page + 64).unwrap();
        let other = fixture.new_thread();
        assert_eq!(other.call(libc::SYS_set_robust_list, &[page, 24]), 0);
        assert_eq!(other.call(libc::SYS_set_robust_list, &[page, 23]), -i64::from(libc::EINVAL));
        other.begin_call(libc::SYS_exit, &[0]);
        assert!(other.finish().is_none());
        assert_eq!(fixture.user().load_u32(page + 96), Ok(77));
    }
}
