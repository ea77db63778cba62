// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest of a few pages, mapped by hand.

use crate::engine::{Engine, Exit, Regs, Vcpu};
use shadow_mmu::addr::{Access, Gpa, PAGE_SIZE, Pfn};
use shadow_mmu::frame::{Fill, FramePool};
use shadow_mmu::shadow::{Spte, Tlb};
use shadow_mmu::sync::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

pub(in crate::engine) const RW: Access = Access::READ.union(Access::WRITE);
pub(in crate::engine) const RX: Access = Access::READ.union(Access::EXEC);
/// Where test code lies.
pub(in crate::engine) const CODE: u64 = 0x20_0000;
/// A stack page below this address.
pub(in crate::engine) const STACK_TOP: u64 = 0x7fff_0000_0000;
/// Data pages, mapped by who needs them.
pub(in crate::engine) const DATA: u64 = 0x4_0000_0000;

/// A VM with one root table and the pages that a test maps.
#[derive(Debug)]
pub(in crate::engine) struct Guest<E: ?Sized = dyn Engine> {
    pub(in crate::engine) pool: Arc<FramePool>,
    pub(in crate::engine) vm: Arc<E>,
    pub(in crate::engine) root: Pfn,
    /// Tables and pages, all still held.
    frames: Mutex<Vec<Pfn>>,
}

impl<E: Engine + ?Sized> Guest<E> {
    /// A guest over `pool` with `code` at [`CODE`] and a stack.
    pub(in crate::engine) fn over(pool: Arc<FramePool>, vm: Arc<E>, code: &[u8]) -> Self {
        let root = pool.alloc(Fill::Zeros).unwrap();
        if let Some((index, entry)) = vm.upper_entry() {
            pool.words(root)[index].store(entry, Ordering::SeqCst);
        }
        let guest = Self { pool, vm, root, frames: Mutex::new(vec![root]) };
        guest.load(CODE, code);
        guest.map_new(STACK_TOP - PAGE_SIZE, RW);
        guest
    }

    fn alloc(&self) -> Pfn {
        let frame = self.pool.alloc(Fill::Zeros).unwrap();
        self.frames.lock().push(frame);
        frame
    }

    /// Frames that this guest has, the engine's not counted.
    pub(in crate::engine) fn frame_count(&self) -> usize {
        self.frames.lock().len()
    }

    /// Maps a page of code.
    pub(in crate::engine) fn load(&self, address: u64, code: &[u8]) {
        let frame = self.map_new(address, RX);
        self.pool.write(frame, 0, code);
    }

    /// Puts other bytes into a page that is mapped.
    pub(in crate::engine) fn rewrite(&self, address: u64, code: &[u8]) {
        let frame = Spte(self.spte(address).load(Ordering::SeqCst)).pfn();
        self.pool.zero(frame);
        self.pool.write(frame, 0, code);
    }

    /// Table and index of the entry for `address` at `level`; makes the tables above it.
    pub(in crate::engine) fn entry(&self, address: u64, level: u32) -> (Pfn, usize) {
        let index = |level| (address >> (12 + 9 * (level - 1)) & 511) as usize;
        let mut table = self.root;
        for level in (level + 1..=4).rev() {
            let entry = &self.pool.words(table)[index(level)];
            if entry.load(Ordering::SeqCst) == 0 {
                entry.store(Spte::table(self.alloc()).0, Ordering::SeqCst);
            }
            table = Spte(entry.load(Ordering::SeqCst)).pfn();
        }
        (table, index(level))
    }

    /// The leaf entry of `address`; makes the tables above it.
    pub(in crate::engine) fn spte(&self, address: u64) -> &AtomicU64 {
        let (table, index) = self.entry(address, 1);
        &self.pool.words(table)[index]
    }

    pub(in crate::engine) fn map(&self, address: u64, frame: Pfn, rights: Access) {
        self.spte(address).store(Spte::leaf(frame, rights).0, Ordering::SeqCst);
    }

    /// Maps a new frame of zeros.
    pub(in crate::engine) fn map_new(&self, address: u64, rights: Access) -> Pfn {
        let frame = self.alloc();
        self.map(address, frame, rights);
        frame
    }

    pub(in crate::engine) fn word(&self, frame: Pfn, index: usize) -> u64 {
        self.pool.words(frame)[index].load(Ordering::SeqCst)
    }
}

impl Guest {
    /// A vCPU at the start of the code.
    pub(in crate::engine) fn vcpu(&self) -> Box<dyn Vcpu> {
        let mut vcpu = Arc::clone(&self.vm).create_vcpu(self.root).unwrap();
        start(&mut *vcpu);
        vcpu
    }

    pub(in crate::engine) fn tlb(&self) -> Arc<dyn Tlb> {
        Arc::clone(&self.vm).tlb()
    }
}

/// Puts a vCPU at the start of the code.
pub(in crate::engine) fn start(vcpu: &mut (impl Vcpu + ?Sized)) {
    *vcpu.regs_mut() = Regs { rip: CODE, rsp: STACK_TOP - 0x100, ..Regs::default() };
}

pub(in crate::engine) fn exception(vector: u8, error_code: u32) -> Exit {
    Exit::Exception { vector, error_code }
}

pub(in crate::engine) fn page_fault(addr: u64, access: Access) -> Exit {
    Exit::PageFault { addr: Gpa(addr), access }
}

/// `syscall`, which ends most test programs.
pub(in crate::engine) const SYSCALL: [u8; 2] = [0x0f, 0x05];
/// jmp to itself.
pub(in crate::engine) const FOREVER: [u8; 2] = [0xeb, 0xfe];
