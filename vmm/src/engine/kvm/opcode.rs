// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A look at the guest's code, for one case: on nested PVM `int n` arrives as an invalid opcode.
//!
//! Natively it is a general-protection fault whose error code names the gate, and a Linux program that does it gets
//! SIGSEGV, not SIGILL. Two bytes at rip tell the two apart.

use shadow_mmu::addr::{PAGE_SIZE, Pfn};
use shadow_mmu::frame::FramePool;
use shadow_mmu::shadow::Spte;
use std::sync::atomic::Ordering;

/// The opcode of `int n`; n follows.
const INT: u8 = 0xcd;
/// A leaf above the lowest level (PS).
const LARGE_PAGE: u64 = 1 << 7;

/// The byte at `address` as the CPU would fetch it through `root`; `None` where nothing is mapped, or another vCPU just
/// unmapped it: what is read there is a guess, and safe to be wrong.
fn byte(pool: &FramePool, root: Pfn, address: u64) -> Option<u8> {
    let mut table = root;
    for level in (1..=4).rev() {
        let index = address >> (12 + 9 * (level - 1)) & 511;
        let entry = Spte(pool.words(table)[index as usize].load(Ordering::Acquire));
        let known = entry.pfn().offset() < pool.bytes() && (level == 1 || entry.0 & LARGE_PAGE == 0);
        if !entry.is_present() || !known {
            return None;
        }
        table = entry.pfn();
    }
    let offset = address % PAGE_SIZE;
    let word = pool.words(table)[(offset / 8) as usize].load(Ordering::Relaxed);
    Some(word.to_le_bytes()[(offset % 8) as usize])
}

/// The vector, if the instruction at `rip` is `int n`.
pub(super) fn software_interrupt(pool: &FramePool, root: Pfn, rip: u64) -> Option<u8> {
    (byte(pool, root, rip)? == INT).then(|| byte(pool, root, rip.wrapping_add(1))).flatten()
}
