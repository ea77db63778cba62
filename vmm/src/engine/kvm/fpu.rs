// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Reading and loading a vCPU's XSAVE area through KVM.

use crate::engine::fpu::{FpuLayout, XSAVE_LEAF, component_place, word32};
use kvm_bindings::{CpuId, Xsave, kvm_xsave};
use kvm_ioctls::VcpuFd;
use std::io;

impl FpuLayout {
    /// The layout that KVM's CPUID describes. `xsave2`: the value of KVM_CAP_XSAVE2, 0 where KVM does not know it. The host's
    /// buffer is what KVM copies: 4,096 bytes, or more if KVM_CAP_XSAVE2 says so.
    pub(super) fn of_kvm(cpuid: &CpuId, xsave2: i32) -> Self {
        let leaf = |index| cpuid.as_slice().iter().find(|e| e.function == XSAVE_LEAF && e.index == index);
        let supported = leaf(0).map_or(0, |e| u64::from(e.eax) | u64::from(e.edx) << 32);
        let host_bytes = usize::try_from(xsave2).unwrap_or(0).max(size_of::<kvm_xsave>());
        Self::new(supported, |n| leaf(n).map(|e| component_place(e.eax, e.ebx)), host_bytes)
    }

    /// Reads a vCPU's state.
    pub(super) fn get(&self, vcpu: &VcpuFd) -> io::Result<Vec<u8>> {
        let mut state = self.buffer()?;
        if self.host_bytes() > size_of::<kvm_xsave>() {
            // SAFETY: the buffer has the bytes that KVM_CAP_XSAVE2 asked for, and this process enables no dynamic
            // features afterwards.
            unsafe { vcpu.get_xsave2(&mut state) }?;
        } else {
            let read = vcpu.get_xsave()?;
            // SAFETY: the length of the buffer is not touched.
            unsafe { state.as_mut_fam_struct() }.xsave.region = read.region;
        }
        let head = &state.as_fam_struct_ref().xsave.region;
        let words = head.iter().chain(state.as_slice());
        let mut area: Vec<u8> = words.flat_map(|word| word.to_le_bytes()).collect();
        area.truncate(self.bytes());
        Ok(area)
    }

    /// Loads `state` into a vCPU, sanitised.
    pub(super) fn set(&self, vcpu: &VcpuFd, state: &[u8]) -> io::Result<()> {
        let area = self.sanitised(state)?;
        let mut buffer = self.buffer()?;
        let words: Vec<u32> = (0..area.len() / 4).map(|n| word32(&area, n * 4)).collect();
        // SAFETY: the length of the buffer is not touched.
        let region = unsafe { &mut buffer.as_mut_fam_struct().xsave.region };
        let head = words.len().min(region.len());
        region[..head].copy_from_slice(&words[..head]);
        buffer.as_mut_slice()[..words.len() - head].copy_from_slice(&words[head..]);
        // SAFETY: the buffer has the bytes that KVM_CAP_XSAVE2 asked for, and this process enables no dynamic features
        // afterwards.
        Ok(unsafe { vcpu.set_xsave2(&buffer) }?)
    }

    fn buffer(&self) -> io::Result<Xsave> {
        let extra = (self.host_bytes() - size_of::<kvm_xsave>()).div_ceil(size_of::<u32>());
        Xsave::new(extra).map_err(|error| io::Error::other(format!("{error:?}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings::kvm_cpuid_entry2;

    #[test]
    fn the_layout_is_what_cpuid_says() {
        let leaf =
            |index, eax, ebx| kvm_cpuid_entry2 { function: 0xd, index, eax, ebx, ..Default::default() };
        let leaves =
            [leaf(0, 0x600e7, 0x980), leaf(2, 0x100, 0x240), leaf(5, 0x40, 0x340), leaf(6, 0x200, 0x380)];
        let layout = |xsave2| FpuLayout::of_kvm(&CpuId::from_entries(&leaves).unwrap(), xsave2);
        assert_eq!(layout(0).xcr0, 0xe7);
        assert_eq!(layout(0).bytes(), 0x580);
        assert_eq!(layout(0).host_bytes(), 4096);
        assert_eq!(layout(8192).host_bytes(), 8192);
    }
}
