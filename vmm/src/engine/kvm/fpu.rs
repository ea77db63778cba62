// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The FPU, SSE and AVX registers as bytes: the XSAVE area in standard form.
//!
//! The bytes come from KVM and go into a guest's signal frame; what comes back from there is the guest's word. The CPU
//! (through KVM) refuses an area with a reserved bit in MXCSR or with a header it does not like, and a guest could leave
//! one behind that makes every later load fail. So [`FpuLayout::sanitised`] clears what must be clear, as
//! `copy_uabi_to_xstate` and `fpu__restore_sig` demand it in Linux.

use kvm_bindings::{CpuId, Xsave, kvm_xsave};
use kvm_ioctls::VcpuFd;
use std::arch::x86_64::_fxsave;
use std::io;

/// Bytes of the FXSAVE part.
const LEGACY: usize = 512;
/// FXSAVE part and header.
const LEGACY_AND_HEADER: usize = LEGACY + 64;
const FCW: usize = 0;
const MXCSR: usize = 24;
const MXCSR_MASK: usize = 28;
/// Left to software; Linux keeps the size of the frame here.
const SOFTWARE: usize = 464;
const XSTATE_BV: usize = LEGACY;

/// x87 and SSE: always there.
const X87_SSE: u64 = 0b11;
/// TILECFG and TILEDATA: 8 KiB that KVM only gives to processes that asked the kernel for them.
const AMX: u64 = 0b11 << 17;

/// What the x87 control word and MXCSR are in a new Linux process: all exceptions masked, round to nearest.
const INITIAL_FCW: u16 = 0x37f;
const INITIAL_MXCSR: u32 = 0x1f80;
/// What MXCSR_MASK means where the CPU says 0.
const DEFAULT_MXCSR_MASK: u32 = 0xffbf;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Component {
    bit: u64,
    end: usize,
}

/// Where the components of the XSAVE area are, and what the CPU accepts.
#[derive(Debug, Clone)]
pub(super) struct FpuLayout {
    /// The components that a guest may use.
    pub(super) xcr0: u64,
    components: Vec<Component>,
    mxcsr_mask: u32,
    /// Bytes that KVM copies: 4,096, or more if KVM_CAP_XSAVE2 says so.
    kvm_bytes: usize,
}

impl FpuLayout {
    /// The layout that CPUID leaf 0xd describes. `xsave2`: the value of KVM_CAP_XSAVE2, 0 where KVM does not know it.
    pub(super) fn new(cpuid: &CpuId, xsave2: i32) -> Self {
        let leaf = |index| cpuid.as_slice().iter().find(|e| e.function == 0xd && e.index == index);
        let supported = leaf(0).map_or(0, |e| u64::from(e.eax) | u64::from(e.edx) << 32);
        let xcr0 = supported & !AMX | X87_SSE;
        let kvm_bytes = usize::try_from(xsave2).unwrap_or(0).max(size_of::<kvm_xsave>());
        let components = (2..63u32)
            .filter(|n| xcr0 >> n & 1 != 0)
            .filter_map(|n| leaf(n).map(|e| Component { bit: 1 << n, end: (e.ebx + e.eax) as usize }))
            .filter(|component| component.end <= kvm_bytes)
            .collect();
        Self { xcr0, components, mxcsr_mask: mxcsr_mask(), kvm_bytes }
    }

    /// The same with fewer components, for a KVM that refuses some.
    pub(super) fn limited_to(&self, xcr0: u64) -> Self {
        Self { xcr0: self.xcr0 & xcr0 | X87_SSE, ..self.clone() }
    }

    /// Bytes of the area that a guest can see.
    fn bytes(&self) -> usize {
        let used = self.components.iter().filter(|component| component.bit & self.xcr0 != 0);
        used.map(|component| component.end).fold(LEGACY_AND_HEADER, usize::max)
    }

    /// The state of a new Linux process.
    pub(super) fn initial(&self) -> Vec<u8> {
        let mut area = vec![0; self.bytes()];
        area[FCW..FCW + 2].copy_from_slice(&INITIAL_FCW.to_le_bytes());
        area[MXCSR..MXCSR + 4].copy_from_slice(&INITIAL_MXCSR.to_le_bytes());
        area[MXCSR_MASK..MXCSR_MASK + 4].copy_from_slice(&self.mxcsr_mask.to_le_bytes());
        area[XSTATE_BV..XSTATE_BV + 8].copy_from_slice(&X87_SSE.to_le_bytes());
        area
    }

    /// `state` as the CPU accepts it: reserved bits cleared; components that are unknown, or cut off at the end, in their
    /// initial state. 512 bytes are taken for an FXSAVE area.
    ///
    /// # Errors
    /// `InvalidInput` for less than that.
    fn sanitised(&self, state: &[u8]) -> io::Result<Vec<u8>> {
        if state.len() < LEGACY {
            let what = format!("an XSAVE area of {} bytes; the least is {LEGACY}", state.len());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        let mut area = self.initial();
        let given = state.len().min(area.len());
        area[..given].copy_from_slice(&state[..given]);
        let mxcsr = word32(&area, MXCSR) & self.mxcsr_mask;
        area[MXCSR..MXCSR + 4].copy_from_slice(&mxcsr.to_le_bytes());
        area[MXCSR_MASK..MXCSR_MASK + 4].copy_from_slice(&self.mxcsr_mask.to_le_bytes());
        area[SOFTWARE..LEGACY].fill(0);
        let present = if given < LEGACY_AND_HEADER {
            X87_SSE
        } else {
            let whole = self.components.iter().filter(|component| component.end <= given);
            let known = whole.fold(X87_SSE, |bits, component| bits | component.bit) & self.xcr0;
            let low = u64::from(word32(&area, XSTATE_BV));
            (low | u64::from(word32(&area, XSTATE_BV + 4)) << 32) & known
        };
        area[XSTATE_BV..LEGACY_AND_HEADER].fill(0);
        area[XSTATE_BV..XSTATE_BV + 8].copy_from_slice(&present.to_le_bytes());
        Ok(area)
    }

    /// Reads a vCPU's state.
    pub(super) fn get(&self, vcpu: &VcpuFd) -> io::Result<Vec<u8>> {
        let mut state = self.buffer()?;
        if self.kvm_bytes > size_of::<kvm_xsave>() {
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
        let extra = (self.kvm_bytes - size_of::<kvm_xsave>()).div_ceil(size_of::<u32>());
        Xsave::new(extra).map_err(|error| io::Error::other(format!("{error:?}")))
    }
}

fn word32(area: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([area[at], area[at + 1], area[at + 2], area[at + 3]])
}

/// The bits of MXCSR that this CPU has; the kernel checks against the same.
fn mxcsr_mask() -> u32 {
    #[repr(C, align(16))]
    struct Area([u8; LEGACY]);
    let mut area = Area([0; LEGACY]);
    // SAFETY: the area has the size and alignment that the instruction needs, and every x86-64 CPU has it.
    unsafe { _fxsave(area.0.as_mut_ptr()) };
    match word32(&area.0, MXCSR_MASK) {
        0 => DEFAULT_MXCSR_MASK,
        mask => mask,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings::kvm_cpuid_entry2;

    fn layout() -> FpuLayout {
        let leaf =
            |index, eax, ebx| kvm_cpuid_entry2 { function: 0xd, index, eax, ebx, ..Default::default() };
        let leaves =
            [leaf(0, 0x600e7, 0x980), leaf(2, 0x100, 0x240), leaf(5, 0x40, 0x340), leaf(6, 0x200, 0x380)];
        FpuLayout::new(&CpuId::from_entries(&leaves).unwrap(), 0)
    }

    #[test]
    fn amx_is_left_out() {
        assert_eq!(layout().xcr0, 0xe7);
    }

    #[test]
    fn whatever_a_guest_wrote_becomes_acceptable() {
        let layout = layout();
        let clean = layout.sanitised(&vec![0xff; 8192]).unwrap();
        assert_eq!(clean.len(), 0x580);
        assert_eq!(word32(&clean, MXCSR) & !layout.mxcsr_mask, 0);
        assert_eq!(word32(&clean, XSTATE_BV), 0x67);
        assert!(clean[XSTATE_BV + 4..LEGACY_AND_HEADER].iter().all(|&byte| byte == 0));
        assert!(clean[LEGACY_AND_HEADER..].iter().all(|&byte| byte == 0xff));
    }

    #[test]
    fn components_cut_off_at_the_end_are_dropped() {
        let clean = layout().sanitised(&vec![0xff; 0x340]).unwrap();
        assert_eq!(word32(&clean, XSTATE_BV), 0b111);
        assert_eq!(word32(&layout().sanitised(&[0; LEGACY]).unwrap(), XSTATE_BV), 0b11);
        assert!(layout().sanitised(&[0; LEGACY - 1]).is_err());
    }
}
