// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The six functions that the compiler and `core` call by name. Each is one string instruction, for two
//! reasons: written as a loop the optimiser would turn it into a call of itself, and a string instruction
//! that faults half way is a good test of a VMM, since it must be resumed in the middle.

use core::arch::asm;

/// # Safety
/// As C's `memcpy`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, bytes: usize) -> *mut u8 {
    // SAFETY: the caller promises both ranges; the ABI promises a clear direction flag.
    unsafe {
        asm!("rep movsb", inout("rdi") to => _, inout("rsi") from => _, inout("rcx") bytes => _,
             options(nostack, preserves_flags));
    }
    to
}

/// # Safety
/// As C's `memmove`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, bytes: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= bytes {
        // SAFETY: the destination does not start inside the source, so forward copying reads each byte before
        // it is overwritten; the ranges are the caller's promise.
        return unsafe { memcpy(to, from, bytes) };
    }
    // SAFETY: the caller promises both ranges. They overlap, so bytes >= 1 and the last bytes exist; the
    // direction flag is clear again at the end, as the ABI wants it.
    unsafe {
        asm!("std", "rep movsb", "cld",
             inout("rdi") to.wrapping_add(bytes - 1) => _, inout("rsi") from.wrapping_add(bytes - 1) => _,
             inout("rcx") bytes => _, options(nostack));
    }
    to
}

/// # Safety
/// As C's `memset`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memset(to: *mut u8, byte: i32, bytes: usize) -> *mut u8 {
    // SAFETY: the caller promises the range; the ABI promises a clear direction flag.
    unsafe {
        asm!("rep stosb", inout("rdi") to => _, inout("rcx") bytes => _, in("al") byte as u8,
             options(nostack, preserves_flags));
    }
    to
}

/// # Safety
/// As C's `memcmp`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memcmp(left: *const u8, right: *const u8, bytes: usize) -> i32 {
    let (above, below): (u8, u8);
    // SAFETY: the caller promises both ranges. `cmp eax, eax` sets ZF, so that no bytes compare equal.
    unsafe {
        asm!("cmp eax, eax", "repe cmpsb", "seta {above}", "setb {below}",
             inout("rsi") left => _, inout("rdi") right => _, inout("rcx") bytes => _,
             above = lateout(reg_byte) above, below = lateout(reg_byte) below, options(nostack, readonly));
    }
    i32::from(above) - i32::from(below)
}

/// # Safety
/// As `memcmp`, of which it keeps only whether the ranges differ.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bcmp(left: *const u8, right: *const u8, bytes: usize) -> i32 {
    // SAFETY: the caller's promise is the one that `memcmp` asks for.
    unsafe { memcmp(left, right, bytes) }
}

/// # Safety
/// As C's `strlen`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn strlen(text: *const u8) -> usize {
    let left: usize;
    // SAFETY: the caller promises a zero byte, where the scan ends; the ABI promises a clear direction flag.
    unsafe {
        asm!("repne scasb", inout("rdi") text => _, inout("rcx") usize::MAX => left, in("al") 0_u8,
             options(nostack, readonly));
    }
    // The count went down by one for each byte, the zero included.
    usize::MAX - left - 1
}
