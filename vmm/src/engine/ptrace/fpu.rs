// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The XSAVE area of a process on this CPU, as ptrace hands it over (NT_X86_XSTATE).

use crate::engine::fpu::{FpuLayout, XSAVE_LEAF, component_place};
use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};

/// CPUID leaf 1, ECX: the operating system has enabled XSAVE.
const OSXSAVE: u32 = 1 << 27;

impl FpuLayout {
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
}

#[cfg(test)]
mod tests {
    use super::super::testing::Spinning;
    use super::*;
    use crate::engine::fpu::{
        AMX, INITIAL_MXCSR, LEGACY, LEGACY_AND_HEADER, MXCSR, SOFTWARE, XSTATE_BV, word32,
    };

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
        let Some(tracee) = Spinning::new() else { return };
        let mut buffer = vec![0; 1 << 16];
        let length = tracee.xstate(&mut buffer).unwrap();
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
        let Some(tracee) = Spinning::new() else { return };
        let wild = vec![0xff; layout.host_bytes()];
        let load = |area: Vec<u8>| tracee.set_xstate(&filled_up(&layout, area));
        assert_eq!(load(wild.clone()).unwrap_err().raw_os_error(), Some(libc::EINVAL));

        let clean = layout.sanitised(&wild).unwrap();
        // Each of the three that must be clear is refused alone.
        for at in [MXCSR + 3, XSTATE_BV + 7, XSTATE_BV + 8, LEGACY_AND_HEADER - 1] {
            let mut spoilt = clean.clone();
            spoilt[at] = 0xff;
            let refusal = load(spoilt).map_err(|error| error.raw_os_error());
            assert_eq!(refusal, Err(Some(libc::EINVAL)), "byte {at}");
        }
        load(clean.clone()).unwrap();

        let mut seen = vec![0; layout.host_bytes()];
        tracee.xstate(&mut seen).unwrap();
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
