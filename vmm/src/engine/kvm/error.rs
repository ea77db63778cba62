// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Why no VM can be had, each in one line; and what to do about it.

use shadow_mmu::frame::PoolError;
use std::io;
use std::ops::Range;
use std::path::PathBuf;

/// The KVM engine cannot be set up, or cannot be given one more vCPU: what is wrong. [`advice`](Self::advice) is what to do.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// No device file.
    #[error("{} does not exist", .0.display())]
    DeviceMissing(PathBuf),
    /// The device file may not be opened.
    #[error("no permission to open {}", .0.display())]
    DevicePermission(PathBuf),
    /// The device file is there but KVM does not answer.
    #[error("{}: {source}", path.display())]
    Device {
        /// The device file.
        path: PathBuf,
        /// The host's word.
        source: io::Error,
    },
    /// Not the KVM that everybody has had since Linux 2.6.22.
    #[error("KVM speaks API version {found}, umbra speaks 12")]
    ApiVersion {
        /// What KVM_GET_API_VERSION said.
        found: i32,
    },
    /// KVM lacks something the engine is built on.
    #[error("KVM lacks {name} ({why})")]
    MissingCapability {
        /// The capability's name in the kernel's documentation.
        name: &'static str,
        /// What it is needed for.
        why: &'static str,
    },
    /// The pool's file cannot be mapped for KVM.
    #[error(transparent)]
    Window(#[from] PoolError),
    /// The host refused a step.
    #[error("{what}{}: {source}", Addresses(.addresses))]
    Host {
        /// The step.
        what: String,
        /// The bytes it was about, if any: in KVM's guest physical space or in a guest's.
        addresses: Option<Range<u64>>,
        /// The host's word.
        source: io::Error,
    },
    /// The small guest that tries flush methods did not behave as a guest does.
    #[error("the flush probe failed: {0}")]
    Probe(String),
    /// Too many flush methods left stale translations behind, or were refused.
    #[error(
        "no way to flush all translations works on this host (tried {tried}): a guest could reach freed memory, so none is \
         started"
    )]
    NoFlush {
        /// The methods and what went wrong.
        tried: String,
    },
}

impl KvmError {
    /// What an operator can do about it, to be put behind the message; empty where nothing is known that would help.
    pub fn advice(&self) -> &'static str {
        match self {
            Self::DeviceMissing(_) => {
                ": load KVM (modprobe kvm_amd or kvm_intel, virtualisation on in the firmware), or give this container the device"
            }
            Self::DevicePermission(_) => {
                ": join the group that owns it (usually kvm: usermod -aG kvm USER, then log in again) or chmod it"
            }
            Self::Device { .. } => "; is it KVM's device, and is a KVM module loaded?",
            Self::ApiVersion { .. } => ": use a Linux kernel's own KVM",
            Self::MissingCapability { .. } => ": use a newer kernel",
            Self::Window(_) | Self::Host { .. } => "",
            Self::Probe(_) | Self::NoFlush { .. } => "; please report it with the output of `umbra doctor`",
        }
    }

    /// A refusal by the host, from an errno.
    pub(super) fn host(what: impl Into<String>, addresses: Option<Range<u64>>, errno: i32) -> Self {
        Self::Host { what: what.into(), addresses, source: io::Error::from_raw_os_error(errno) }
    }

    /// For `map_err` on an ioctl: a refusal of `what`.
    pub(super) fn ioctl(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |error| Self::host(what, None, error.errno())
    }
}

struct Addresses<'a>(&'a Option<Range<u64>>);

impl std::fmt::Display for Addresses<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(range) => write!(f, " [{:#x}, {:#x})", range.start, range.end),
            None => Ok(()),
        }
    }
}
