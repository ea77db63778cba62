// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Files: the three standard descriptors of umbra, passed through, and no others.
//!
//! * this file: the table of descriptors
//! * [`host_file`]: one open file, read and written without ever blocking out of reach of a signal
//! * [`rw`]: read, write and their kin, between a file and guest memory
//! * [`calls`], [`stat`]: the other system calls about descriptors and paths
//!
//! Closing a descriptor in the guest closes nothing of umbra's own: the table holds duplicates. The table's lock is a leaf;
//! nothing is read, written or closed under it.

pub(super) mod calls;
mod host_file;
pub(super) mod rw;
pub(super) mod stat;

pub(super) use host_file::{HostFile, Mappable};

use super::errno::Errno;
use super::host;
use shadow_mmu::sync::Mutex;
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Descriptors that a process may have at most.
const CAPACITY: u32 = 1024;

/// Whether a descriptor is closed by `execve`. Nothing here executes; the flag is kept for `fcntl`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OnExec {
    Keep,
    Close,
}

#[derive(Debug, Clone)]
struct Descriptor {
    file: Arc<HostFile>,
    on_exec: OnExec,
}

/// The open files of a process.
#[derive(Debug)]
pub struct Files {
    table: Mutex<BTreeMap<u32, Descriptor>>,
}

impl Files {
    /// Standard input, output and error are what umbra itself has there. One that umbra does not have is closed.
    pub fn inherit() -> Self {
        Self::new([0, 1, 2].map(|fd| host::duplicate(fd).ok()))
    }

    /// The same, but that there is nothing to read: what all guests have but one, where several share umbra's files.
    ///
    /// # Errors
    /// `/dev/null` cannot be opened.
    pub fn inherit_output() -> std::io::Result<Self> {
        let nothing = OwnedFd::from(std::fs::File::open("/dev/null")?);
        Ok(Self::new([Some(nothing), host::duplicate(1).ok(), host::duplicate(2).ok()]))
    }

    /// Standard input, output and error are these; `None` for a closed one.
    pub fn new(standard: [Option<OwnedFd>; 3]) -> Self {
        let names = ["/dev/stdin", "/dev/stdout", "/dev/stderr"];
        let open = |((fd, descriptor), name): ((u32, Option<OwnedFd>), &'static str)| {
            let file = Arc::new(HostFile::new(descriptor?, name).ok()?);
            Some((fd, Descriptor { file, on_exec: OnExec::Keep }))
        };
        let table = (0..).zip(standard).zip(names).filter_map(open).collect();
        Self { table: Mutex::new(table) }
    }

    /// The most descriptors there can be.
    pub(super) fn capacity(&self) -> u32 {
        CAPACITY
    }

    /// The file at `fd`.
    ///
    /// # Errors
    /// `EBADF`.
    pub(super) fn get(&self, fd: u32) -> Result<Arc<HostFile>, Errno> {
        self.table.lock().get(&fd).map(|descriptor| Arc::clone(&descriptor.file)).ok_or(Errno::EBADF)
    }

    pub(super) fn on_exec(&self, fd: u32) -> Result<OnExec, Errno> {
        self.table.lock().get(&fd).map(|descriptor| descriptor.on_exec).ok_or(Errno::EBADF)
    }

    pub(super) fn set_on_exec(&self, fd: u32, on_exec: OnExec) -> Result<(), Errno> {
        self.table.lock().get_mut(&fd).ok_or(Errno::EBADF)?.on_exec = on_exec;
        Ok(())
    }

    /// A second descriptor of the file at `fd`: the lowest free one from `from` to below `limit`.
    ///
    /// # Errors
    /// `EBADF`; `EMFILE`: none is free.
    pub(super) fn duplicate(&self, fd: u32, from: u32, limit: u64, on_exec: OnExec) -> Result<u32, Errno> {
        let mut table = self.table.lock();
        let file = Arc::clone(&table.get(&fd).ok_or(Errno::EBADF)?.file);
        let limit = limit.min(CAPACITY.into()) as u32;
        let new = (from..limit).find(|new| !table.contains_key(new)).ok_or(Errno::EMFILE)?;
        table.insert(new, Descriptor { file, on_exec });
        Ok(new)
    }

    /// Makes `new` a second descriptor of the file at `fd`; what was open there is closed.
    ///
    /// # Errors
    /// `EBADF`, also where `new` is not below `limit`.
    pub(super) fn duplicate_to(&self, fd: u32, new: u32, limit: u64, on_exec: OnExec) -> Result<(), Errno> {
        let replaced = {
            let mut table = self.table.lock();
            let file = Arc::clone(&table.get(&fd).ok_or(Errno::EBADF)?.file);
            if u64::from(new) >= limit.min(CAPACITY.into()) {
                return Err(Errno::EBADF);
            }
            table.insert(new, Descriptor { file, on_exec })
        };
        drop(replaced);
        Ok(())
    }

    /// # Errors
    /// `EBADF`.
    pub(super) fn close(&self, fd: u32) -> Result<(), Errno> {
        let closed = self.table.lock().remove(&fd);
        closed.map(drop).ok_or(Errno::EBADF)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_the_lowest_free_ones_and_share_their_file() {
        let files = Files::inherit();
        assert_eq!(files.duplicate(1, 0, 1024, OnExec::Keep), Ok(3));
        assert_eq!(files.duplicate(1, 10, 1024, OnExec::Close), Ok(10));
        assert_eq!(files.on_exec(10), Ok(OnExec::Close));
        assert!(Arc::ptr_eq(&files.get(1).unwrap(), &files.get(10).unwrap()));
        files.close(0).unwrap();
        assert_eq!(files.close(0), Err(Errno::EBADF));
        assert_eq!(files.duplicate(2, 0, 1024, OnExec::Keep), Ok(0));
        assert!(Arc::ptr_eq(&files.get(0).unwrap(), &files.get(2).unwrap()));
    }

    #[test]
    fn the_limit_holds_for_every_way_to_make_one() {
        let files = Files::inherit();
        assert_eq!(files.duplicate(1, 0, 3, OnExec::Keep), Err(Errno::EMFILE));
        assert_eq!(files.duplicate_to(1, 8, 8, OnExec::Keep), Err(Errno::EBADF));
        assert_eq!(files.duplicate_to(1, u32::MAX, u64::MAX, OnExec::Keep), Err(Errno::EBADF));
        assert_eq!(files.duplicate_to(9, 1, 8, OnExec::Keep), Err(Errno::EBADF));
        let made = (0..).take_while(|_| files.duplicate(1, 0, u64::MAX, OnExec::Keep).is_ok()).count();
        assert_eq!(made, CAPACITY as usize - 3);
    }
}
