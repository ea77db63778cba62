// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What this host is: the kernel, the CPU, and KVM where it is in use. Every figure umbra prints names them.

use super::kvm::{Capability, KvmFacts};
use serde::ser::SerializeStruct;
use serde::{Serialize, Serializer};
use std::ffi::CStr;
use std::fs;
use std::mem::MaybeUninit;

/// What this host is.
#[derive(Debug, Clone)]
pub struct HostFacts {
    /// Kernel release, as `uname -r` prints it.
    pub kernel: String,
    /// The CPU's name for itself.
    pub cpu: String,
    /// CPUs that this process may use.
    pub cpus: usize,
    /// What KVM is here; `None` where it is not in use: its device cannot be used, or nothing runs on it.
    pub kvm: Option<KvmFacts>,
}

impl HostFacts {
    /// What this process runs on, with what is known of KVM.
    pub fn with(kvm: Option<KvmFacts>) -> Self {
        Self {
            kernel: kernel_release(),
            cpu: cpuinfo("model name"),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            kvm,
        }
    }

    /// What KVM runs on, in a word; `none` where it is not in use.
    pub fn kvm_backend(&self) -> String {
        self.kvm.as_ref().map_or_else(|| "none".to_owned(), |kvm| kvm.backend.to_string())
    }

    /// What KVM says of the capabilities that umbra looks at; nothing where it is not in use.
    pub fn capabilities(&self) -> &[Capability] {
        self.kvm.as_ref().map_or(&[], |kvm| &kvm.capabilities)
    }
}

/// KVM's facts stand among the others.
impl Serialize for HostFacts {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut object = serializer.serialize_struct("HostFacts", 5)?;
        object.serialize_field("kvm_backend", &self.kvm_backend())?;
        object.serialize_field("kernel", &self.kernel)?;
        object.serialize_field("cpu", &self.cpu)?;
        object.serialize_field("cpus", &self.cpus)?;
        object.serialize_field("capabilities", self.capabilities())?;
        object.end()
    }
}

/// A field of /proc/cpuinfo, of the first CPU; `unknown` where there is none.
pub(super) fn cpuinfo(name: &str) -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find(|line| line.split(':').next().is_some_and(|key| key.trim() == name));
    line.and_then(|line| line.split_once(':')).map_or("unknown", |(_, value)| value.trim()).to_owned()
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
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

    use super::*;
    use crate::engine::kvm::Backend;

    #[test]
    fn json_has_kvm_among_the_other_facts() {
        let json = |kvm| serde_json::to_value(HostFacts::with(kvm)).unwrap();
        let capabilities = vec![Capability { name: "KVM_CAP_XSAVE", value: 1 }];
        let of_kvm = json(Some(KvmFacts { backend: Backend::Npt, capabilities }));
        assert_eq!((&of_kvm["kvm_backend"], &of_kvm["capabilities"][0]["value"]), (&"npt".into(), &1.into()));
        let of_none = json(None);
        assert_eq!(
            (&of_none["kvm_backend"], &of_none["capabilities"]),
            (&"none".into(), &serde_json::json!([]))
        );
        assert!(!of_none["kernel"].as_str().unwrap().is_empty() && of_none["cpus"].as_u64() > Some(0));
    }
}
