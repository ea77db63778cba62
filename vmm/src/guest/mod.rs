// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest: a static Linux program and the system-call ABI it runs on.
//!
//! ```text
//!  load     ELF image ──► segments, stack, registers          elf, load, stack
//!  run      Thread::run: enter ─► exit ─► what for? ─► enter  thread
//!             ├─ syscall    number ──► function               syscall ─► memory, files, poll, futex, time, clone, info
//!             ├─ page fault ──► FaultHandler (the VM's)
//!             ├─ exception  ──► signal                        signal
//!             └─ kick       ──► signals, the end              group, waker
//! ```
//!
//! The ABI is Linux's for x86-64, with its errors in its order, so that every guest also runs natively and the native run
//! says what is right. What is not implemented is `ENOSYS`. [`Process`] states the lock order.
//!
//! Everything that a guest passes in is a claim: pointers go through `uaccess`, lengths are bounded before anything is
//! allocated, and there is no argument that panics, hangs or leaks a descriptor of the host's.

mod clock;
mod clone;
mod elf;
mod errno;
mod files;
mod futex;
mod group;
mod host;
mod info;
mod load;
mod memory;
mod names;
mod poll;
mod process;
mod restart;
mod robust;
mod signal;
mod stack;
mod step;
mod syscall;
#[cfg(test)]
mod testing;
mod thread;
mod time;
mod time_stamp;
mod uaccess;
mod waker;

pub use clock::Clock;
pub use elf::{ElfError, check_elf};
pub use errno::Errno;
pub use files::Files;
pub use group::ExitStatus;
pub use load::{LoadError, load};
pub use names::{call_name, call_names};
pub use process::{Death, Host, Process, Setup};
pub use stack::{Arguments, ArgumentsError};
pub use thread::Thread;

use shadow_mmu::addr::{Access, Gpa, Pfn};
use std::fmt::Debug;
use std::os::fd::RawFd;

/// What came of a page fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The access can be tried again.
    Resolved,
    /// Nothing is mapped there: SIGSEGV, `SEGV_MAPERR`.
    NoMapping,
    /// The mapping does not allow it: SIGSEGV, `SEGV_ACCERR`.
    NoAccess,
    /// The mapping's object ends before: SIGBUS, `BUS_ADRERR`.
    BusError,
    /// The page has failed and its content is lost: SIGBUS, `BUS_MCEERR_AR`.
    Poisoned,
    /// No frame is left: the guest dies of SIGKILL, as of the OOM killer.
    OutOfMemory,
}

/// What is to be done where the host has nothing to show for an adopted mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostFault {
    /// Look again: the mapping has changed, or was just changing.
    Retry,
    /// The page that begins at this address cannot be had (`None`: one that the host does not name): SIGBUS, `BUS_ADRERR`,
    /// with that address or 0.
    Unreachable(Option<Gpa>),
}

/// Resolves page faults of one vCPU; the VM's part.
pub trait FaultHandler: Debug + Send {
    /// Makes `addr` reachable for `access`, or says why it is not.
    fn fault(&mut self, addr: Gpa, access: Access) -> Fault;

    /// Asked before each entry: what must become readable before the vCPU may run, and then be asked again; `None` if it may
    /// run. The descriptor stays open at least until the next call. The thread can be reached while it waits.
    fn held_back(&mut self) -> Option<RawFd> {
        None
    }

    /// The host could not reach frame `pfn` of an adopted mapping for the guest.
    fn host_fault(&mut self, pfn: Option<Pfn>) -> HostFault;
}
