// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Error numbers, as a system call returns them.

use shadow_mmu::mm::MmError;
use std::fmt;
use std::io;

/// A Linux error number, positive.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(pub i32);

/// What a system call gives back: a value, or an error number.
pub(super) type SysResult = Result<u64, Errno>;

macro_rules! errnos {
    ($($name:ident),* $(,)?) => {
        #[allow(missing_docs, reason = "the names are Linux's")]
        impl Errno {
            $(pub const $name: Self = Self(libc::$name);)*
        }
    };
}

errnos!(
    E2BIG,
    EACCES,
    EAGAIN,
    EBADF,
    EBUSY,
    EFAULT,
    EINTR,
    EINVAL,
    EIO,
    EMFILE,
    ENAMETOOLONG,
    ENODEV,
    ENOENT,
    ENOMEM,
    ENOSYS,
    ENOTTY,
    EOPNOTSUPP,
    EPERM,
    EPIPE,
    ERANGE,
    ESPIPE,
    ESRCH,
    ETIMEDOUT,
);

/// What a call that a signal interrupted asks for (`include/linux/errno.h`). The guest never sees these numbers.
impl Errno {
    /// `ERESTARTSYS`: again, unless the signal's handler was set up without `SA_RESTART`.
    pub const RESTART_SYS: Self = Self(512);
    /// `ERESTARTNOHAND`: again, unless a handler runs.
    pub const RESTART_NO_HANDLER: Self = Self(514);
    /// `ERESTART_RESTARTBLOCK`: again with what is left of the time, unless a handler runs.
    pub const RESTART_BLOCK: Self = Self(516);

    /// Whether this is one of the numbers that the guest never sees.
    pub(super) fn is_restart(self) -> bool {
        [Self::RESTART_SYS, Self::RESTART_NO_HANDLER, Self::RESTART_BLOCK].contains(&self)
    }

    /// The value of rax that reports this error.
    pub fn as_rax(self) -> u64 {
        i64::from(self.0).wrapping_neg() as u64
    }

    /// What the last call to the host reported.
    pub(super) fn of_host() -> Self {
        io::Error::last_os_error().into()
    }
}

impl From<io::Error> for Errno {
    fn from(error: io::Error) -> Self {
        Self(error.raw_os_error().unwrap_or(libc::EIO))
    }
}

impl From<MmError> for Errno {
    fn from(error: MmError) -> Self {
        Self(error.errno())
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Errno({}: {self})", self.0)
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&io::Error::from_raw_os_error(self.0), f)
    }
}
