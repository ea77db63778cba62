// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What KVM is on this host: the backend and the capabilities.

use super::error::KvmError;
use crate::engine::host::cpuinfo;
use crate::engine::{Marks, SetupError};
use kvm_ioctls::{Cap, Kvm};
use serde::Serialize;
use std::ffi::{CString, c_ulong};
use std::fmt;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// How KVM runs guests here, which decides what a flush costs and which methods work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// Nested, without hardware help: KVM shadows guest tables and emulates ring 0.
    Pvm,
    /// AMD with nested page tables.
    Npt,
    /// Intel with extended page tables.
    Ept,
    /// Hardware virtualisation with two-dimensional paging switched off: KVM shadows guest tables.
    Shadow,
    /// No KVM module that this program knows.
    Unknown,
}

impl Backend {
    /// Whether guests' page tables are walked by the CPU, with a second stage below them.
    pub fn is_two_dimensional(self) -> bool {
        matches!(self, Self::Npt | Self::Ept)
    }

    /// Who walks guests' page tables, and so what A says there: KVM, where it shadows them, or a CPU.
    pub fn marks(self) -> Marks {
        match self {
            Self::Pvm | Self::Shadow => Marks::Exact,
            Self::Npt | Self::Ept | Self::Unknown => Marks::CpuGuesses,
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pvm => "pvm",
            Self::Npt => "npt",
            Self::Ept => "ept",
            Self::Shadow => "shadow",
            Self::Unknown => "unknown",
        })
    }
}

/// A KVM capability and what KVM_CHECK_EXTENSION says of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Capability {
    /// Its name in the kernel's documentation.
    pub name: &'static str,
    /// 0: absent. The meaning of other values is the capability's.
    pub value: i32,
}

/// What KVM is here.
#[derive(Debug, Clone)]
pub struct KvmFacts {
    /// How it runs guests.
    pub backend: Backend,
    /// The capabilities umbra looks at.
    pub capabilities: Vec<Capability>,
}

impl KvmFacts {
    /// The value of a capability that umbra looks at; 0 for others.
    pub fn capability(&self, name: &str) -> i32 {
        self.capabilities.iter().find(|capability| capability.name == name).map_or(0, |found| found.value)
    }
}

/// A capability, the least value that will do (0: it is only of interest), and what it is for.
type Wanted = (&'static str, Cap, i32, &'static str);

/// KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS.
const SYNC_REGS_AND_SREGS: i32 = 3;

const WANTED: [Wanted; 11] = [
    ("KVM_CAP_USER_MEMORY", Cap::UserMemory, 1, "gives KVM the frame pool"),
    (
        "KVM_CAP_SYNC_MMU",
        Cap::SyncMmu,
        1,
        "KVM follows changes of the pool's mapping; flushing depends on it",
    ),
    ("KVM_CAP_SYNC_REGS", Cap::SyncRegs, SYNC_REGS_AND_SREGS, "registers without a system call for each"),
    ("KVM_CAP_IMMEDIATE_EXIT", Cap::ImmediateExit, 1, "kicks a vCPU without a race"),
    ("KVM_CAP_XSAVE", Cap::Xsave, 1, "vector registers"),
    ("KVM_CAP_XCRS", Cap::Xcrs, 1, "vector registers"),
    ("KVM_CAP_EXT_CPUID", Cap::ExtCpuid, 1, "shows the guest the host's CPU"),
    ("KVM_CAP_XSAVE2", Cap::Xsave2, 0, ""),
    ("KVM_CAP_NR_VCPUS", Cap::NrVcpus, 0, ""),
    ("KVM_CAP_MAX_VCPUS", Cap::MaxVcpus, 0, ""),
    ("KVM_CAP_NR_MEMSLOTS", Cap::NrMemslots, 0, ""),
];

/// Opens KVM's device and checks that it can do what the engine needs.
///
/// # Errors
/// Every [`KvmError`] about the device and its capabilities.
pub(super) fn open(device: &Path) -> Result<(Kvm, KvmFacts), KvmError> {
    let missing = || KvmError::DeviceMissing(device.to_owned());
    let name = CString::new(device.as_os_str().as_bytes()).map_err(|_| missing())?;
    let kvm = Kvm::new_with_path(name).map_err(|error| match error.errno() {
        libc::ENOENT | libc::ENOTDIR => missing(),
        libc::EACCES | libc::EPERM => KvmError::DevicePermission(device.to_owned()),
        errno => {
            KvmError::Device { path: device.to_owned(), source: std::io::Error::from_raw_os_error(errno) }
        }
    })?;
    match kvm.get_api_version() {
        12 => {}
        negative if negative < 0 => {
            let source = std::io::Error::last_os_error();
            return Err(KvmError::Device { path: device.to_owned(), source });
        }
        found => return Err(KvmError::ApiVersion { found }),
    }
    let of_kvm =
        |&(name, cap, ..): &Wanted| Capability { name, value: kvm.check_extension_raw(cap as c_ulong) };
    let facts = KvmFacts {
        backend: backend(Path::new("/sys/module"), &cpuinfo("vendor_id")),
        capabilities: WANTED.iter().map(of_kvm).collect(),
    };
    for (name, _, least, why) in WANTED {
        let value = facts.capability(name);
        if value < least || name == "KVM_CAP_SYNC_REGS" && value & least != least {
            return Err(KvmError::MissingCapability { name, why });
        }
    }
    Ok((kvm, facts))
}

/// What KVM is here, without a VM.
///
/// # Errors
/// Those about the device and its capabilities.
pub fn facts(device: &Path) -> Result<KvmFacts, SetupError> {
    Ok(open(device)?.1)
}

/// The backend, from the modules that are loaded. A kernel with KVM built in shows both vendors' modules, hence `vendor`.
fn backend(modules: &Path, vendor: &str) -> Backend {
    let flag = |name: &str| {
        let text = fs::read_to_string(modules.join(name)).ok()?;
        Some(matches!(text.trim(), "Y" | "1"))
    };
    let two_stage = |name, backend| flag(name).map(|on| if on { backend } else { Backend::Shadow });
    if modules.join("kvm_pvm").is_dir() {
        return Backend::Pvm;
    }
    let (amd, intel) = ("kvm_amd/parameters/npt", "kvm_intel/parameters/ept");
    let found = match vendor {
        "AuthenticAMD" | "HygonGenuine" => two_stage(amd, Backend::Npt),
        "GenuineIntel" | "CentaurHauls" | "  Shanghai  " => two_stage(intel, Backend::Ept),
        _ => two_stage(amd, Backend::Npt).or_else(|| two_stage(intel, Backend::Ept)),
    };
    found.unwrap_or(Backend::Unknown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_device_is_said_in_one_line() {
        let obstacle = facts(Path::new("/nonexistent/kvm")).unwrap_err().to_string();
        assert!(
            obstacle.contains("/nonexistent/kvm does not exist") && !obstacle.contains('\n'),
            "{obstacle}"
        );
    }

    #[test]
    fn a_device_that_is_not_kvm_is_refused() {
        assert!(matches!(open(Path::new("/dev/null")), Err(KvmError::Device { .. })));
    }

    #[test]
    fn the_backend_follows_modules_and_parameters() {
        let root = std::env::temp_dir().join(format!("umbra-modules-{}", std::process::id()));
        let parameter = |name: &str, value: &str| {
            let path = root.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, value).unwrap();
        };
        assert_eq!(backend(&root, "AuthenticAMD"), Backend::Unknown);
        parameter("kvm_amd/parameters/npt", "Y\n");
        parameter("kvm_intel/parameters/ept", "N\n");
        assert_eq!(backend(&root, "AuthenticAMD"), Backend::Npt);
        assert_eq!(backend(&root, "GenuineIntel"), Backend::Shadow);
        parameter("kvm_pvm/parameters/force", "N\n");
        assert_eq!(backend(&root, "AuthenticAMD"), Backend::Pvm);
        fs::remove_dir_all(&root).unwrap();
    }
}
