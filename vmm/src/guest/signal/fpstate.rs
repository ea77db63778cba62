// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The FPU state in a signal frame (`arch/x86/kernel/fpu/signal.c`): the CPU's XSAVE image in standard form, with a note
//! for the program in the bytes that FXSAVE leaves to software, and a mark behind its end.
//!
//! Offsets are in bytes from the start of the image. What comes back from the guest is checked as the CPU's XRSTOR
//! would check it, since a bad image must be the guest's SIGSEGV and not a refusal of the host.

use super::super::errno::Errno;
use super::super::uaccess::{Record, UserMemory};
use std::arch::x86_64::__cpuid_count;
use std::sync::LazyLock;

/// The x87 and SSE part.
const LEGACY: usize = 512;
/// The header behind it.
const HEADER: usize = 64;
/// `struct _fpx_sw_bytes`: magic1 u32, extended_size u32, xfeatures u64, xstate_size u32.
const SW_BYTES: usize = 464;
const MAGIC1: u32 = 0x4650_5853;
const MAGIC2: u32 = 0x4650_5845;
/// MXCSR and, behind it, the bits of it that this CPU has.
const MXCSR: usize = 24;
const MXCSR_MASK: usize = 28;
const XSTATE_BV: usize = LEGACY;
const XCOMP_BV: usize = LEGACY + 8;

/// The state components that a program has without asking, and the size of their XSAVE image in standard form.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::guest) struct Features {
    mask: u64,
    size: usize,
}

/// [`Features`] of this CPU: all user components but AMX, which a program must request (`fpu_user_cfg.default_*`).
pub(in crate::guest) fn default_features() -> Features {
    const XSAVE: u32 = 1 << 26;
    const AMX: u64 = 1 << 17 | 1 << 18;
    const FPU_SSE: u64 = 3;
    static FEATURES: LazyLock<Features> = LazyLock::new(|| {
        let mut features = Features { mask: FPU_SSE, size: LEGACY + HEADER };
        if __cpuid_count(1, 0).ecx & XSAVE == 0 {
            return features;
        }
        let leaf = __cpuid_count(0xd, 0);
        features.mask |= (u64::from(leaf.eax) | u64::from(leaf.edx) << 32) & !AMX;
        for component in (2..63).filter(|component| features.mask >> component & 1 == 1) {
            let leaf = __cpuid_count(0xd, component);
            features.size = features.size.max((leaf.eax + leaf.ebx) as usize);
        }
        features
    });
    *FEATURES
}

/// The most bytes that delivering a signal takes from the stack: `AT_MINSIGSTKSZ`.
pub(in crate::guest) fn signal_frame_size() -> u64 {
    const RED_ZONE_AND_ALIGNMENT: usize = 128 + 64 + 16;
    let bytes = super::frame::FRAME + default_features().size + size_of::<u32>() + RED_ZONE_AND_ALIGNMENT;
    bytes.next_multiple_of(16) as u64
}

/// The image to put into a frame, made from the vCPU's `xsave`.
pub(super) fn to_frame(xsave: &[u8]) -> Vec<u8> {
    let features = default_features();
    let size = features.size.min(xsave.len());
    let mut image = xsave[..size].to_vec();
    let mut note = Record::<48>::zeroed();
    note.put_u32(0, MAGIC1).put_u32(4, (size + size_of::<u32>()) as u32);
    note.put_u64(8, features.mask).put_u32(16, size as u32);
    if let Some(bytes) = image.get_mut(SW_BYTES..LEGACY) {
        bytes.copy_from_slice(&note.0);
    }
    image.extend_from_slice(&MAGIC2.to_le_bytes());
    image
}

/// The state that a handler starts with, in an image of `bytes` bytes (`fpu__clear_user_states`): that of a new process.
pub(super) fn initial(bytes: usize) -> Vec<u8> {
    let mut state = vec![0; bytes.max(LEGACY + HEADER)];
    state[..2].copy_from_slice(&0x37f_u16.to_le_bytes());
    state[MXCSR..MXCSR + 4].copy_from_slice(&0x1f80_u32.to_le_bytes());
    state
}

/// The state that the frame's image at `addr` stands for, in the form and length of `now`, the vCPU's present state.
///
/// # Errors
/// `EFAULT`, where the CPU would refuse the image or it cannot be read.
pub(super) fn from_frame(user: &UserMemory, addr: u64, now: &[u8]) -> Result<Vec<u8>, Errno> {
    let header = |state: &mut Vec<u8>, at: usize, value: u64| match state.get_mut(at..at + 8) {
        Some(bytes) => bytes.copy_from_slice(&value.to_le_bytes()),
        None => debug_assert!(false, "an XSAVE image has a header"),
    };
    if now.len() < LEGACY + HEADER {
        return Err(Errno::EFAULT);
    }
    if addr == 0 {
        return Ok(initial(now.len()));
    }
    let mut state = vec![0; now.len()];
    if !addr.is_multiple_of(64) {
        return Err(Errno::EFAULT);
    }
    let features = default_features();
    let legacy: Record<LEGACY> = user.record(addr)?;
    let (magic, extended) = (legacy.u32(SW_BYTES), legacy.u32(SW_BYTES + 4) as usize);
    let (asked, size) = (legacy.u64(SW_BYTES + 8), legacy.u32(SW_BYTES + 16) as usize);
    let whole = magic == MAGIC1
        && size >= LEGACY + HEADER
        && size <= features.size.min(now.len())
        && size <= extended
        && user.read_u32(addr.saturating_add(size as u64))? == MAGIC2;
    if whole {
        user.read(addr, &mut state[..size])?;
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|byte| state[at + byte]));
        let reserved = state[XCOMP_BV..LEGACY + HEADER].iter().any(|&byte| byte != 0);
        if word(XSTATE_BV) & !features.mask != 0 || reserved {
            return Err(Errno::EFAULT);
        }
        // Only what the frame says it has is taken from it; the rest starts anew.
        let present = word(XSTATE_BV) & asked;
        header(&mut state, XSTATE_BV, present);
    } else {
        // A program put a bare FXSAVE image there, as the ABI allows.
        state[..LEGACY].copy_from_slice(&legacy.0);
        header(&mut state, XSTATE_BV, 3);
    }
    let number = |bytes: &[u8], at: usize| u32::from_le_bytes(std::array::from_fn(|byte| bytes[at + byte]));
    let valid = match number(now, MXCSR_MASK) {
        0 => 0xffbf,
        mask => mask,
    };
    if number(&state, MXCSR) & !valid != 0 {
        return Err(Errno::EFAULT);
    }
    // Ours and the CPU's, not the guest's.
    state[MXCSR_MASK..MXCSR_MASK + 4].copy_from_slice(&now[MXCSR_MASK..MXCSR_MASK + 4]);
    state[SW_BYTES..LEGACY].fill(0);
    Ok(state)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::testing::Fixture;

    fn state() -> Vec<u8> {
        let mut state = vec![0; 4096];
        state[..2].copy_from_slice(&0x37f_u16.to_le_bytes());
        state[MXCSR..MXCSR + 4].copy_from_slice(&0x1f80_u32.to_le_bytes());
        state[160..176].fill(0xaa); // xmm0
        state[XSTATE_BV] = 3;
        state
    }

    #[test]
    fn a_state_survives_the_frame() {
        let fixture = Fixture::new();
        let (user, page) = (fixture.user(), fixture.map_pages(2));
        user.write(page, &to_frame(&state())).unwrap();
        assert_eq!(from_frame(user, page, &vec![0; 4096]).unwrap(), state());
    }

    #[test]
    fn a_broken_mark_falls_back_to_the_legacy_part() {
        let fixture = Fixture::new();
        let (user, page) = (fixture.user(), fixture.map_pages(2));
        let mut image = to_frame(&state());
        let last = image.len() - 1;
        image[last] ^= 1;
        image[700] = 1;
        user.write(page, &image).unwrap();
        let restored = from_frame(user, page, &vec![0; 4096]).unwrap();
        assert_eq!(restored[160..176], [0xaa; 16]);
        assert!(restored[LEGACY + HEADER..].iter().all(|&byte| byte == 0));
    }

    #[test]
    fn what_the_cpu_would_refuse_is_refused() {
        let fixture = Fixture::new();
        let (user, page) = (fixture.user(), fixture.map_pages(2));
        let spoil: [(usize, u8); 4] =
            [(XSTATE_BV + 7, 0x80), (XCOMP_BV, 1), (LEGACY + HEADER - 1, 1), (MXCSR + 3, 1)];
        for (at, value) in spoil {
            let mut image = to_frame(&state());
            image[at] = value;
            user.write(page, &image).unwrap();
            assert_eq!(from_frame(user, page, &vec![0; 4096]), Err(Errno::EFAULT), "byte {at}");
        }
        for addr in [page + 16, u64::MAX - 63, 1 << 46] {
            assert_eq!(from_frame(user, addr, &vec![0; 4096]), Err(Errno::EFAULT), "{addr:#x}");
        }
    }

    #[test]
    fn no_image_means_the_initial_state() {
        let fixture = Fixture::new();
        let restored = from_frame(fixture.user(), 0, &vec![0; 4096]).unwrap();
        assert_eq!(restored[..2], 0x37f_u16.to_le_bytes());
    }
}
