// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The FPU, SSE and AVX registers as bytes: the XSAVE area in standard form.
//!
//! The bytes come from the engine and go into a guest's signal frame; what comes back from there is the guest's word. The
//! host (KVM, or ptrace's NT_X86_XSTATE) refuses an area with a reserved bit in MXCSR or with a header it does not like, and
//! a guest could leave one behind that makes every later load fail. So [`FpuLayout::sanitised`] clears what must be clear,
//! as `copy_uabi_to_xstate` and `fpu__restore_sig` demand it in Linux.
//!
//! A guest sees [`bytes`](FpuLayout::bytes) of an area. The host's buffer has [`host_bytes`](FpuLayout::host_bytes), which is
//! that or more: the engine cuts off the rest of what it reads, and fills what it loads up with zeroes.

use std::arch::x86_64::_fxsave;
use std::io;
use std::ops::Range;

/// Bytes of the FXSAVE part.
pub(super) const LEGACY: usize = 512;
/// FXSAVE part and header.
pub(super) const LEGACY_AND_HEADER: usize = LEGACY + 64;
const FCW: usize = 0;
pub(super) const MXCSR: usize = 24;
const MXCSR_MASK: usize = 28;
/// Left to software; Linux keeps the size of the frame here.
pub(super) const SOFTWARE: usize = 464;
pub(super) const XSTATE_BV: usize = LEGACY;

/// x87 and SSE: always there.
const X87_SSE: u64 = 0b11;
/// TILECFG and TILEDATA: 8 KiB that the kernel only gives to processes that asked for them, and KVM only to theirs.
pub(super) const AMX: u64 = 0b11 << 17;

/// What the x87 control word and MXCSR are in a new Linux process: all exceptions masked, round to nearest.
const INITIAL_FCW: u16 = 0x37f;
pub(super) const INITIAL_MXCSR: u32 = 0x1f80;
/// What MXCSR_MASK means where the CPU says 0.
const DEFAULT_MXCSR_MASK: u32 = 0xffbf;

/// A part of the area behind the header: its bit in XCR0, and where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Component {
    pub(super) bit: u64,
    pub(super) place: Range<usize>,
}

/// Where the components of the XSAVE area are, and what the CPU accepts.
#[derive(Debug, Clone)]
pub(super) struct FpuLayout {
    /// The components that a guest may use.
    pub(super) xcr0: u64,
    pub(super) components: Vec<Component>,
    mxcsr_mask: u32,
    host_bytes: usize,
}

/// The CPUID leaf that describes the XSAVE area.
pub(super) const XSAVE_LEAF: u32 = 0xd;

impl FpuLayout {
    /// The layout of the components in `supported`, without AMX. `place`: where CPUID leaf 0xd has the component with this
    /// number. `host_bytes`: the size of the host's buffer; a component that is not in there is left out of the area.
    pub(super) fn new(
        supported: u64,
        place: impl Fn(u32) -> Option<Range<usize>>,
        host_bytes: usize,
    ) -> Self {
        let xcr0 = supported & !AMX | X87_SSE;
        let components = (2..63u32)
            .filter(|n| xcr0 >> n & 1 != 0)
            .filter_map(|n| place(n).map(|place| Component { bit: 1 << n, place }))
            .filter(|component| component.place.end <= host_bytes)
            .collect();
        Self { xcr0, components, mxcsr_mask: mxcsr_mask(), host_bytes }
    }

    /// The same with fewer components, for a KVM that refuses some.
    pub(super) fn limited_to(&self, xcr0: u64) -> Self {
        Self { xcr0: self.xcr0 & xcr0 | X87_SSE, ..self.clone() }
    }

    /// Bytes of the area that a guest can see.
    pub(super) fn bytes(&self) -> usize {
        let used = self.components.iter().filter(|component| component.bit & self.xcr0 != 0);
        used.map(|component| component.place.end).fold(LEGACY_AND_HEADER, usize::max)
    }

    /// Bytes of the buffer in which the host hands the area over.
    pub(super) fn host_bytes(&self) -> usize {
        self.host_bytes
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
    pub(super) fn sanitised(&self, state: &[u8]) -> io::Result<Vec<u8>> {
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
            let whole = self.components.iter().filter(|component| component.place.end <= given);
            let known = whole.fold(X87_SSE, |bits, component| bits | component.bit) & self.xcr0;
            let low = u64::from(word32(&area, XSTATE_BV));
            (low | u64::from(word32(&area, XSTATE_BV + 4)) << 32) & known
        };
        area[XSTATE_BV..LEGACY_AND_HEADER].fill(0);
        area[XSTATE_BV..XSTATE_BV + 8].copy_from_slice(&present.to_le_bytes());
        Ok(area)
    }
}

/// Where a component is: its size and offset, EAX and EBX of its CPUID subleaf.
pub(super) fn component_place(size: u32, offset: u32) -> Range<usize> {
    offset as usize..offset as usize + size as usize
}

/// The 32-bit word at byte `at`.
pub(super) fn word32(area: &[u8], at: usize) -> u32 {
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

    fn layout() -> FpuLayout {
        let place = |n| match n {
            2 => Some(0x240..0x340),
            5 => Some(0x340..0x380),
            6 => Some(0x380..0x580),
            _ => None,
        };
        FpuLayout::new(0x600e7, place, 4096)
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
