// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Why no VM can be had, each in one line that says what to do.

use shadow_mmu::frame::{OutOfFrames, PoolError};
use std::io;
use std::ops::Range;
use std::path::PathBuf;

/// The KVM engine cannot be set up, or cannot be given one more vCPU.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// No device file.
    #[error(
        "{} does not exist: load KVM (modprobe kvm_amd or kvm_intel, virtualisation on in the firmware), or give this \
         container the device",
        .0.display()
    )]
    DeviceMissing(PathBuf),
    /// The device file may not be opened.
    #[error(
        "no permission to open {}: join the group that owns it (usually kvm: usermod -aG kvm USER, then log in again) \
         or chmod it",
        .0.display()
    )]
    DevicePermission(PathBuf),
    /// The device file is there but KVM does not answer.
    #[error("cannot use {}: {source}; is it KVM's device, and is a KVM module loaded?", path.display())]
    Device {
        /// The device file.
        path: PathBuf,
        /// The host's word.
        source: io::Error,
    },
    /// Not the KVM that everybody has had since Linux 2.6.22.
    #[error("KVM speaks API version {found}, umbra speaks 12: use a Linux kernel's own KVM")]
    ApiVersion {
        /// What KVM_GET_API_VERSION said.
        found: i32,
    },
    /// KVM lacks something the engine is built on.
    #[error("KVM lacks {name} ({why}): use a newer kernel")]
    MissingCapability {
        /// The capability's name in the kernel's documentation.
        name: &'static str,
        /// What it is needed for.
        why: &'static str,
    },
    /// KVM has no more vCPUs for one VM.
    #[error("KVM allows {limit} vCPUs in one VM and all are running: the guest has too many threads")]
    VcpuLimit {
        /// KVM_CAP_MAX_VCPUS.
        limit: usize,
    },
    /// The pool has no frame for the monitor.
    #[error(transparent)]
    Frames(#[from] OutOfFrames),
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
    #[error("the flush probe failed: {0}; please report it with the output of `umbra doctor`")]
    Probe(String),
    /// Too many flush methods left stale translations behind, or were refused.
    #[error(
        "no way to flush all translations works on this host (tried {tried}): a guest could reach freed memory, so none is \
         started; please report it with the output of `umbra doctor`"
    )]
    NoFlush {
        /// The methods and what went wrong.
        tried: String,
    },
}

impl SetupError {
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
