// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What this host is: the KVM backend, the kernel, the CPU, the capabilities. Every figure umbra prints names them.
//!
//! [`host_facts`] needs no permission: what it cannot learn it leaves out, and says why.

use super::error::SetupError;
use crate::engine::EngineKind;
use kvm_ioctls::{Cap, Kvm};
use serde::Serialize;
use std::ffi::{CStr, CString, c_ulong};
use std::fmt;
use std::fs;
use std::mem::MaybeUninit;
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
    /// KVM is not in use: its device cannot be used, or nothing runs on it.
    None,
}

impl Backend {
    /// Whether guests' page tables are walked by the CPU, with a second stage below them.
    pub fn is_two_dimensional(self) -> bool {
        matches!(self, Self::Npt | Self::Ept)
    }

    /// Whether guests' page tables are walked in software, by KVM or another engine, which sets A and D there for accesses
    /// that have happened. A CPU that walks them may set A for prefetches and speculative accesses too (Intel SDM vol. 3,
    /// 4.10.2.3); D it sets for writes alone.
    pub fn walks_in_software(self) -> bool {
        matches!(self, Self::Pvm | Self::Shadow | Self::None)
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
            Self::None => "none",
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

/// What this host is.
#[derive(Debug, Clone, Serialize)]
pub struct HostFacts {
    /// How KVM runs guests.
    pub kvm_backend: Backend,
    /// Kernel release, as `uname -r` prints it.
    pub kernel: String,
    /// The CPU's name for itself.
    pub cpu: String,
    /// CPUs that this process may use.
    pub cpus: usize,
    /// The capabilities umbra looks at; empty where the device cannot be opened.
    pub capabilities: Vec<Capability>,
    /// Why the device cannot be used, in one line; `None` where it can.
    pub obstacle: Option<String>,
}

impl HostFacts {
    /// Those of an engine that is not KVM, or of none.
    pub fn without_kvm() -> Self {
        Self { kvm_backend: Backend::None, ..machine_facts() }
    }

    /// The engine that they are of.
    pub fn engine(&self) -> EngineKind {
        match self.kvm_backend {
            Backend::None => EngineKind::Ptrace,
            Backend::Pvm | Backend::Npt | Backend::Ept | Backend::Shadow | Backend::Unknown => {
                EngineKind::Kvm
            }
        }
    }

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
/// Every [`SetupError`] about the device and its capabilities.
pub(super) fn open(device: &Path) -> Result<(Kvm, HostFacts), SetupError> {
    let mut facts = machine_facts();
    let missing = || SetupError::DeviceMissing(device.to_owned());
    let name = CString::new(device.as_os_str().as_bytes()).map_err(|_| missing())?;
    let kvm = Kvm::new_with_path(name).map_err(|error| match error.errno() {
        libc::ENOENT | libc::ENOTDIR => missing(),
        libc::EACCES | libc::EPERM => SetupError::DevicePermission(device.to_owned()),
        errno => {
            SetupError::Device { path: device.to_owned(), source: std::io::Error::from_raw_os_error(errno) }
        }
    })?;
    match kvm.get_api_version() {
        12 => {}
        negative if negative < 0 => {
            let source = std::io::Error::last_os_error();
            return Err(SetupError::Device { path: device.to_owned(), source });
        }
        found => return Err(SetupError::ApiVersion { found }),
    }
    facts.capabilities = WANTED
        .iter()
        .map(|&(name, cap, ..)| Capability { name, value: kvm.check_extension_raw(cap as c_ulong) })
        .collect();
    for (name, _, least, why) in WANTED {
        let value = facts.capability(name);
        if value < least || name == "KVM_CAP_SYNC_REGS" && value & least != least {
            return Err(SetupError::MissingCapability { name, why });
        }
    }
    Ok((kvm, facts))
}

/// What this host is, as far as it can be learned without running a guest.
pub fn host_facts(device: &Path) -> HostFacts {
    match open(device) {
        Ok((_, facts)) => facts,
        Err(obstacle) => HostFacts { obstacle: Some(obstacle.to_string()), ..HostFacts::without_kvm() },
    }
}

/// The facts that need no device.
fn machine_facts() -> HostFacts {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = cpuinfo.lines().find(|line| line.split(':').next().is_some_and(|key| key.trim() == name));
        line.and_then(|line| line.split_once(':')).map_or("unknown", |(_, value)| value.trim())
    };
    HostFacts {
        kvm_backend: backend(Path::new("/sys/module"), field("vendor_id")),
        kernel: kernel_release(),
        cpu: field("model name").to_owned(),
        cpus: std::thread::available_parallelism().map_or(1, usize::from),
        capabilities: Vec::new(),
        obstacle: None,
    }
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

fn kernel_release() -> String {
    let mut name = MaybeUninit::<libc::utsname>::zeroed();
    // SAFETY: the buffer is a utsname; the call writes nothing else.
    if unsafe { libc::uname(name.as_mut_ptr()) } != 0 {
        return "unknown".to_owned();
    }
    // SAFETY: zeroed is a valid utsname, and the kernel has filled it since.
    let name = unsafe { name.assume_init() };
    // SAFETY: the kernel ends every field with a zero byte.
    let release = unsafe { CStr::from_ptr(name.release.as_ptr()) };
    release.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_device_is_said_in_one_line_and_the_rest_is_known() {
        let facts = host_facts(Path::new("/nonexistent/kvm"));
        let obstacle = facts.obstacle.unwrap();
        assert!(
            obstacle.contains("/nonexistent/kvm does not exist") && !obstacle.contains('\n'),
            "{obstacle}"
        );
        assert!(!facts.kernel.is_empty() && facts.cpus > 0);
        assert_eq!(facts.kvm_backend, Backend::None);
    }

    #[test]
    fn a_device_that_is_not_kvm_is_refused() {
        assert!(matches!(open(Path::new("/dev/null")), Err(SetupError::Device { .. })));
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
