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

use std::arch::x86_64::{__cpuid, __cpuid_count, _fxsave, _xgetbv};
use std::io;
use std::ops::Range;

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
/// TILECFG and TILEDATA: 8 KiB that the kernel only gives to processes that asked for them, and KVM only to theirs.
const AMX: u64 = 0b11 << 17;

/// What the x87 control word and MXCSR are in a new Linux process: all exceptions masked, round to nearest.
const INITIAL_FCW: u16 = 0x37f;
const INITIAL_MXCSR: u32 = 0x1f80;
/// What MXCSR_MASK means where the CPU says 0.
const DEFAULT_MXCSR_MASK: u32 = 0xffbf;

#[derive(Debug, Clone, PartialEq, Eq)]
struct Component {
    bit: u64,
    place: Range<usize>,
}

/// Where the components of the XSAVE area are, and what the CPU accepts.
#[derive(Debug, Clone)]
pub(super) struct FpuLayout {
    /// The components that a guest may use.
    pub(super) xcr0: u64,
    components: Vec<Component>,
    mxcsr_mask: u32,
    host_bytes: usize,
}

/// The CPUID leaf that describes the XSAVE area.
pub(super) const XSAVE_LEAF: u32 = 0xd;
/// CPUID leaf 1, ECX: the operating system has enabled XSAVE.
const OSXSAVE: u32 = 1 << 27;

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

    /// What a process on this CPU has without asking the kernel for more, with the size of ptrace's NT_X86_XSTATE. That size
    /// includes AMX where there is AMX. PKRU (component 9) is part of it if the operating system has enabled protection
    /// keys; in the initial state it is 0, all access. `None`: the operating system does not use XSAVE.
    pub(super) fn of_this_cpu() -> Option<Self> {
        if __cpuid(1).ecx & OSXSAVE == 0 {
            return None;
        }
        // SAFETY: OSXSAVE says that the instruction is there and enabled.
        let xcr0 = unsafe { _xgetbv(0) };
        let place = |n| {
            let leaf = __cpuid_count(XSAVE_LEAF, n);
            Some(component_place(leaf.eax, leaf.ebx))
        };
        // EBX: the size of the area in standard form with all that XCR0 has. The kernel takes the same for the buffer.
        Some(Self::new(xcr0, place, __cpuid_count(XSAVE_LEAF, 0).ebx as usize))
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
    use crate::engine::traced_child::Tracee;

    /// ptrace's name of the XSAVE area.
    const NT_X86_XSTATE: usize = 0x202;

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

    /// The host's buffer with `area` in it.
    fn filled_up(layout: &FpuLayout, mut area: Vec<u8>) -> Vec<u8> {
        area.resize(layout.host_bytes(), 0);
        area
    }

    fn word64(area: &[u8], at: usize) -> u64 {
        u64::from(word32(area, at)) | u64::from(word32(area, at + 4)) << 32
    }

    #[test]
    fn this_cpus_layout_is_the_one_of_ptrace() {
        let layout = FpuLayout::of_this_cpu().unwrap();
        let tracee = Tracee::spinning();
        let mut buffer = vec![0; 1 << 16];
        let length = tracee.register_set(NT_X86_XSTATE, &mut buffer).unwrap();
        assert_eq!(length, layout.host_bytes());
        assert!(layout.bytes() <= length);
        assert_eq!(word64(&buffer, XSTATE_BV) & !(layout.xcr0 | AMX), 0);
        // In the first bytes that are left to software, Linux has the components that it has enabled.
        assert_eq!(word64(&buffer, SOFTWARE) & !AMX, layout.xcr0);
        assert_eq!(word32(&buffer, MXCSR), INITIAL_MXCSR);
    }

    #[test]
    fn ptrace_accepts_whatever_a_guest_wrote_once_it_is_sanitised() {
        let layout = FpuLayout::of_this_cpu().unwrap();
        let tracee = Tracee::spinning();
        let wild = vec![0xff; layout.host_bytes()];
        let load = |area: Vec<u8>| tracee.set_register_set(NT_X86_XSTATE, &mut filled_up(&layout, area));
        assert_eq!(load(wild.clone()).unwrap_err().raw_os_error(), Some(libc::EINVAL));

        let clean = layout.sanitised(&wild).unwrap();
        // Each of the three that must be clear is refused alone.
        for at in [MXCSR + 3, XSTATE_BV + 7, XSTATE_BV + 8, LEGACY_AND_HEADER - 1] {
            let mut spoilt = clean.clone();
            spoilt[at] = 0xff;
            let refusal = load(spoilt).map_err(|error| error.raw_os_error());
            assert_eq!(refusal, Err(Some(libc::EINVAL)), "byte {at}");
        }
        assert_eq!(load(clean.clone()).unwrap(), layout.host_bytes());

        let mut seen = vec![0; layout.host_bytes()];
        tracee.register_set(NT_X86_XSTATE, &mut seen).unwrap();
        assert_eq!(word64(&seen, XSTATE_BV), layout.xcr0);
        // All but PKRU, of which the kernel keeps four bytes.
        for component in layout.components.iter().filter(|component| component.bit < 1 << 9) {
            assert_eq!(seen[component.place.clone()], clean[component.place.clone()], "{component:x?}");
        }

        load(layout.initial()).unwrap();
        // A guest's FXSAVE area is enough.
        load(layout.sanitised(&[0xff; LEGACY]).unwrap()).unwrap();
    }
}
