// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the engine's tests share: a guest of a few pages, mapped by hand.

use super::{KvmVcpu, KvmVm};
use crate::engine::{Exit, Vcpu};
use shadow_mmu::addr::{Access, Gpa, PAGE_SIZE, Pfn};
use shadow_mmu::frame::{Fill, FramePool, FreedFrames};
use shadow_mmu::shadow::Spte;
use shadow_mmu::sync::Mutex;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

pub(super) const RW: Access = Access::READ.union(Access::WRITE);
pub(super) const RX: Access = Access::READ.union(Access::EXEC);
/// Where test code lies.
pub(super) const CODE: u64 = 0x20_0000;
/// A stack page below this address.
pub(super) const STACK_TOP: u64 = 0x7fff_0000_0000;
/// Data pages, mapped by who needs them.
pub(super) const DATA: u64 = 0x4_0000_0000;

/// The device to test with. `None`: there is none, and the test has nothing to do. One that exists but cannot be used
/// makes the test fail where it uses it.
pub(super) fn test_device() -> Option<PathBuf> {
    let path = std::env::var_os("UMBRA_KVM_DEVICE").map_or_else(|| PathBuf::from("/dev/kvm"), PathBuf::from);
    if path.exists() {
        return Some(path);
    }
    // Where KVM is known to be, a missing device must not pass as "skipped".
    let required = std::env::var_os("UMBRA_REQUIRE_KVM").is_some();
    assert!(!required, "{} is required here and missing", path.display());
    println!("skipped: no {}", path.display());
    None
}

/// A VM with one root table and the pages that a test maps.
#[derive(Debug)]
pub(super) struct Guest {
    pub(super) pool: Arc<FramePool>,
    pub(super) vm: Arc<KvmVm>,
    pub(super) root: Pfn,
    /// Tables and pages, all still held.
    frames: Mutex<Vec<Pfn>>,
}

impl Guest {
    /// A guest with `code` at [`CODE`] and a stack, or `None` without a device.
    pub(super) fn new(code: &[u8]) -> Option<Self> {
        Self::with_pool(code, FreedFrames::Keep)
    }

    pub(super) fn with_pool(code: &[u8], freed: FreedFrames) -> Option<Self> {
        let device = test_device()?;
        let pool = Arc::new(FramePool::new(64 << 20, freed).unwrap());
        let vm = KvmVm::new(&device, Arc::clone(&pool)).unwrap();
        let root = pool.alloc(Fill::Zeros).unwrap();
        let (index, entry) = vm.monitor_entry();
        pool.words(root)[index].store(entry, Ordering::SeqCst);
        let guest = Self { pool, vm, root, frames: Mutex::new(vec![root]) };
        guest.load(CODE, code);
        guest.map_new(STACK_TOP - PAGE_SIZE, RW);
        Some(guest)
    }

    fn alloc(&self) -> Pfn {
        let frame = self.pool.alloc(Fill::Zeros).unwrap();
        self.frames.lock().push(frame);
        frame
    }

    /// Frames that this guest has, the engine's not counted.
    pub(super) fn frame_count(&self) -> usize {
        self.frames.lock().len()
    }

    /// Maps a page of code.
    pub(super) fn load(&self, address: u64, code: &[u8]) {
        let frame = self.map_new(address, RX);
        self.pool.write(frame, 0, code);
    }

    /// Puts other bytes into a page that is mapped.
    pub(super) fn rewrite(&self, address: u64, code: &[u8]) {
        let frame = Spte(self.spte(address).load(Ordering::SeqCst)).pfn();
        self.pool.zero(frame);
        self.pool.write(frame, 0, code);
    }

    /// Table and index of the entry for `address` at `level`; makes the tables above it.
    pub(super) fn entry(&self, address: u64, level: u32) -> (Pfn, usize) {
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
    pub(super) fn spte(&self, address: u64) -> &AtomicU64 {
        let (table, index) = self.entry(address, 1);
        &self.pool.words(table)[index]
    }

    pub(super) fn map(&self, address: u64, frame: Pfn, rights: Access) {
        self.spte(address).store(Spte::leaf(frame, rights).0, Ordering::SeqCst);
    }

    /// Maps a new frame of zeros.
    pub(super) fn map_new(&self, address: u64, rights: Access) -> Pfn {
        let frame = self.alloc();
        self.map(address, frame, rights);
        frame
    }

    /// A vCPU at the start of the code.
    pub(super) fn vcpu(&self) -> KvmVcpu {
        let mut vcpu = self.vm.create_vcpu(self.root).unwrap();
        start(&mut vcpu);
        vcpu
    }

    pub(super) fn word(&self, frame: Pfn, index: usize) -> u64 {
        self.pool.words(frame)[index].load(Ordering::SeqCst)
    }
}

/// Puts a vCPU at the start of the code.
pub(super) fn start(vcpu: &mut KvmVcpu) {
    *vcpu.regs_mut() = crate::engine::Regs { rip: CODE, rsp: STACK_TOP - 0x100, ..Default::default() };
}

pub(super) fn exception(vector: u8, error_code: u32) -> Exit {
    Exit::Exception { vector, error_code }
}

pub(super) fn page_fault(addr: u64, access: Access) -> Exit {
    Exit::PageFault { addr: Gpa(addr), access }
}

/// `syscall`, which ends most test programs.
pub(super) const SYSCALL: [u8; 2] = [0x0f, 0x05];
