// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Why the ptrace engine cannot be had, each in one line; and what to do about it.

use std::io;

/// The ptrace engine cannot be set up, or cannot be given one more vCPU: what is wrong. [`advice`](Self::advice) is what to do.
#[derive(Debug, thiserror::Error)]
pub enum PtraceError {
    /// The registers of a guest could not be read and set.
    #[error("this CPU has no XSAVE, or the kernel does not use it")]
    NoXsave,
    /// The guest's process could not be made, or did not come so far as to be a guest's.
    #[error("cannot start a process for the guest: {what}: {source}")]
    Child {
        /// The step.
        what: &'static str,
        /// The host's word.
        source: io::Error,
    },
    /// No further thread for a guest thread.
    #[error("cannot make a further thread in the guest's process: {source}")]
    Thread {
        /// The host's word.
        source: io::Error,
    },
}

/// The advice for a step that the host refused.
fn after(what: &str, error: &io::Error) -> &'static str {
    match (what, error.raw_os_error()) {
        (TRACE | SEIZE, Some(libc::EPERM)) => {
            "; tracing is forbidden here: is umbra itself traced (strace -f, a debugger), is kernel.yama.ptrace_scope 2 or 3, or \
             does the container's seccomp profile forbid ptrace?"
        }
        (EXEC, Some(libc::EACCES | libc::EPERM)) => {
            "; programs in memory must not be started here: see vm.memfd_noexec and this system's security module"
        }
        (UNMAP, Some(libc::EPERM)) => {
            "; this kernel seals mappings of its own (CONFIG_MSEAL_SYSTEM_MAPPINGS): the guest's process cannot be emptied, use KVM or \
             another kernel"
        }
        (_, Some(libc::EAGAIN)) => "; see ulimit -u and the pids limit of this container",
        (_, Some(libc::EMFILE | libc::ENFILE)) => "; see ulimit -n",
        (_, Some(libc::ENOSYS)) => "; the kernel or the container's seccomp profile lacks this system call",
        _ => "",
    }
}

/// The step in which the process asks to be traced.
pub(super) const TRACE: &str = "ptrace(PTRACE_TRACEME)";
/// The step in which a thread of it is attached to.
pub(super) const SEIZE: &str = "ptrace(PTRACE_SEIZE)";
/// The step in which it becomes another program.
pub(super) const EXEC: &str = "starting a program from memory (memfd_create, execveat)";
/// The step in which it is emptied.
pub(super) const UNMAP: &str = "unmapping what the kernel put there (munmap)";

impl PtraceError {
    /// What an operator can do about it, to be put behind the message; empty where nothing is known that would help.
    pub fn advice(&self) -> &'static str {
        match self {
            Self::NoXsave => ": use KVM, or a kernel without `noxsave`",
            Self::Child { what, source } => after(what, source),
            Self::Thread { source } => after("", source),
        }
    }

    /// For `map_err`: a refusal of `what`.
    pub(super) fn child(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Child { what, source }
    }
}
