// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The monitor: the few supervisor-only pages in the upper half through which a guest's exceptions reach umbra.
//!
//! ```text
//! 0xffffffff80000000  stubs    executable      one a vector, and one for `syscall`
//!            + 0x1000  tables   read-only       IDT, GDT
//!            + 0x2000  TSS 0    read-only   ┐
//!            + 0x3000  stack 0  writable    ┘   two pages a vCPU
//!            + 0x4000  TSS 1 …
//! ```
//!
//! A fault in ring 3 goes through the IDT to its stub, which is `out PORT, al`: KVM gives control to umbra. The CPU has
//! put the exception's frame on the vCPU's stack page, where umbra reads it through the direct map. umbra goes back to
//! ring 3 by writing registers, so a stub is never left by running on; the instructions behind `out` are there in case
//! (`hlt` leaves KVM as well, and the jump makes it the last one). `syscall` comes to the stub in LSTAR in the same way.
//!
//! Frames come from the pool and are mapped by tables of their own, so that every root table gets the whole monitor by
//! one entry. Pages are mapped and never unmapped while the VM lives: nothing here needs a flush. Ring 3 can neither
//! read nor enter them: no entry has the user bit. They hold no secrets either.

use shadow_mmu::addr::{PAGE_SIZE, Pfn};
use shadow_mmu::frame::{Fill, FramePool, OutOfFrames};
use shadow_mmu::sync::Mutex;
use shadow_mmu::table::index;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Selectors, the same as Linux has: a guest that looks at them sees what it would see natively.
pub(super) const KERNEL_CS: u16 = 0x10;
pub(super) const USER_SS: u16 = 0x2b;
pub(super) const USER_CS: u16 = 0x33;
pub(super) const TSS_SELECTOR: u16 = 0x40;
/// SYSRET would take its selectors from here up; nobody executes it, but the value is Linux's.
const USER32_CS: u16 = 0x23;
/// IA32_STAR for these selectors.
pub(super) const STAR: u64 = (USER32_CS as u64) << 48 | (KERNEL_CS as u64) << 32;

/// First byte of the monitor.
const BASE: u64 = 0xffff_ffff_8000_0000;
const STUBS: u64 = BASE;
const TABLES: u64 = BASE + PAGE_SIZE;
const PER_VCPU: u64 = BASE + 2 * PAGE_SIZE;

/// Exception vectors with a gate. `int n` beyond them is a general-protection fault, as `int 0x80` has to be.
const VECTORS: u64 = 32;
/// The stub behind those of the vectors.
const SYSCALL_STUB: u64 = VECTORS;
const STUB_BYTES: u64 = 8;
/// What LSTAR points to.
pub(super) const SYSCALL_ENTRY: u64 = STUBS + SYSCALL_STUB * STUB_BYTES;

const IDT_OFFSET: u64 = 0;
const GDT_OFFSET: u64 = 0x800;
/// (base, limit) of the descriptor tables.
pub(super) const IDT: (u64, u16) = (TABLES + IDT_OFFSET, (VECTORS * 16 - 1) as u16);
pub(super) const GDT: (u64, u16) = (TABLES + GDT_OFFSET, USER_CS | 7);
/// Limit of a TSS without an I/O bitmap: every port is closed to ring 3.
pub(super) const TSS_LIMIT: u32 = 0x67;

const PRESENT: u64 = 1;
const WRITE: u64 = 1 << 1;
/// Set beforehand, so that nobody ever writes these tables behind us.
const ACCESSED_DIRTY: u64 = 1 << 5 | 1 << 6;
const NO_EXEC: u64 = 1 << 63;
const READ_ONLY: u64 = PRESENT | ACCESSED_DIRTY | NO_EXEC;
const WRITABLE: u64 = READ_ONLY | WRITE;
const EXECUTABLE: u64 = PRESENT | ACCESSED_DIRTY;
/// For entries that lead to a table: the leaf decides.
const TABLE: u64 = PRESENT | WRITE | ACCESSED_DIRTY;

/// How a guest arrived in the monitor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Arrival {
    /// Through the IDT; the frame is on the stack page.
    Exception(u8),
    /// Through LSTAR; return address in rcx, flags in r11, everything else as the guest had it.
    Syscall,
}

impl Arrival {
    /// By the port that a stub wrote to.
    pub(super) fn by_port(port: u16) -> Option<Self> {
        match u64::from(port) {
            SYSCALL_STUB => Some(Self::Syscall),
            vector if vector < VECTORS => Some(Self::Exception(vector as u8)),
            _ => None,
        }
    }

    /// By the address of a stub, for a vCPU that was interrupted between arriving and `out`.
    pub(super) fn by_rip(rip: u64) -> Option<Self> {
        let stub = rip.checked_sub(STUBS)? / STUB_BYTES;
        Self::by_port(u16::try_from(stub).ok()?)
    }
}

/// Where a vCPU's own two pages are.
#[derive(Debug, Clone, Copy)]
pub(super) struct VcpuPages {
    /// Guest address of the TSS.
    pub(super) tss: u64,
    /// The frame that exception frames are pushed to the end of.
    pub(super) stack: Pfn,
}

/// What the CPU pushes when ring 3 faults.
#[derive(Debug, Clone, Copy)]
pub(super) struct ExceptionFrame {
    pub(super) error_code: u32,
    pub(super) rip: u64,
    pub(super) cs: u64,
    pub(super) rflags: u64,
    pub(super) rsp: u64,
}

/// Vectors for which the CPU pushes an error code.
const fn has_error_code(vector: u8) -> bool {
    matches!(vector, 8 | 10..=14 | 17 | 21 | 29 | 30)
}

/// The monitor of one VM. Dropping it frees its frames: the VM must be gone by then.
#[derive(Debug)]
pub(super) struct Monitor {
    pool: Arc<FramePool>,
    /// The tables below the root's entry: one of level 3, one of level 2.
    level3: Pfn,
    level2: Pfn,
    /// A root table with nothing in it but the monitor.
    bare_root: Pfn,
    frames: Mutex<Vec<Pfn>>,
}

impl Monitor {
    /// Writes stubs and descriptor tables and maps them.
    pub(super) fn new(pool: Arc<FramePool>) -> Result<Self, OutOfFrames> {
        const FIXED: usize = 5;
        let mut frames = Vec::new();
        if pool.alloc_up_to(FIXED, Fill::Zeros, &mut frames) < FIXED {
            pool.put_all(&frames);
            return Err(OutOfFrames);
        }
        let (level3, level2, bare_root, stubs, tables) =
            (frames[0], frames[1], frames[2], frames[3], frames[4]);
        let monitor = Self { pool, level3, level2, bare_root, frames: Mutex::new(frames) };
        monitor.write_stubs(stubs);
        monitor.write_tables(tables);
        monitor.set(level3, index(BASE / PAGE_SIZE, 3), level2.offset() | TABLE);
        let (root_index, entry) = monitor.entry();
        monitor.set(bare_root, root_index, entry);
        monitor.map(STUBS, stubs, EXECUTABLE)?;
        monitor.map(TABLES, tables, READ_ONLY)?;
        Ok(monitor)
    }

    /// Place and value of the entry that puts the monitor into a root table.
    pub(super) fn entry(&self) -> (usize, u64) {
        (index(BASE / PAGE_SIZE, 4), self.level3.offset() | TABLE)
    }

    /// The pool that the monitor's frames are from.
    pub(super) fn pool(&self) -> &Arc<FramePool> {
        &self.pool
    }

    /// A root table that maps the monitor alone.
    pub(super) fn bare_root(&self) -> Pfn {
        self.bare_root
    }

    /// Makes the two pages of the vCPU with this number. Called with a number once, and for one vCPU at a time.
    pub(super) fn add_vcpu(&self, number: usize) -> Result<VcpuPages, OutOfFrames> {
        let tss = PER_VCPU + number as u64 * 2 * PAGE_SIZE;
        let tss_frame = self.alloc()?;
        let stack = self.alloc()?;
        // RSP0, at byte 4: the end of the stack page, which is the page behind. The I/O bitmap, at byte 102, lies
        // beyond the limit.
        self.pool.write(tss_frame, 4, &(tss + 2 * PAGE_SIZE).to_le_bytes());
        self.pool.write(tss_frame, 102, &(TSS_LIMIT as u16 + 1).to_le_bytes());
        self.map(tss, tss_frame, READ_ONLY)?;
        self.map(tss + PAGE_SIZE, stack, WRITABLE)?;
        Ok(VcpuPages { tss, stack })
    }

    /// The frame that the CPU pushed last for `vector`.
    pub(super) fn exception_frame(&self, pages: VcpuPages, vector: u8) -> ExceptionFrame {
        // Error code, rip, cs, rflags, rsp, ss end where the page does.
        let words = self.pool.words(pages.stack);
        let word = |from_end: usize| words[512 - from_end].load(Ordering::Acquire);
        ExceptionFrame {
            error_code: if has_error_code(vector) { word(6) as u32 } else { 0 },
            rip: word(5),
            cs: word(4),
            rflags: word(3),
            rsp: word(2),
        }
    }

    fn alloc(&self) -> Result<Pfn, OutOfFrames> {
        let pfn = self.pool.alloc(Fill::Zeros)?;
        self.frames.lock().push(pfn);
        Ok(pfn)
    }

    fn set(&self, table: Pfn, index: usize, entry: u64) {
        self.pool.words(table)[index].store(entry, Ordering::Release);
    }

    /// Maps one page of the monitor, which was not mapped before.
    fn map(&self, address: u64, pfn: Pfn, bits: u64) -> Result<(), OutOfFrames> {
        let slot = index(address / PAGE_SIZE, 2);
        let level1 = match self.pool.words(self.level2)[slot].load(Ordering::Acquire) {
            0 => {
                let table = self.alloc()?;
                self.set(self.level2, slot, table.offset() | TABLE);
                table
            }
            entry => Pfn((entry >> 12) as u32),
        };
        self.set(level1, index(address / PAGE_SIZE, 1), pfn.offset() | bits);
        Ok(())
    }

    fn write_stubs(&self, page: Pfn) {
        for port in 0..=SYSCALL_STUB {
            // out PORT, al; hlt; jmp to the hlt
            let code = [0xe6, port as u8, 0xf4, 0xeb, 0xfd];
            self.pool.write(page, (port * STUB_BYTES) as usize, &code);
        }
    }

    fn write_tables(&self, page: Pfn) {
        for vector in 0..VECTORS {
            let stub = STUBS + vector * STUB_BYTES;
            // Breakpoint and overflow are the two that Linux lets ring 3 raise by `int n`.
            let dpl = if matches!(vector, 3 | 4) { 3 } else { 0 };
            let low = stub & 0xffff
                | u64::from(KERNEL_CS) << 16
                | (0x8e | dpl << 5) << 40
                | (stub >> 16 & 0xffff) << 48;
            let at = (IDT_OFFSET + vector * 16) as usize;
            self.pool.write(page, at, &low.to_le_bytes());
            self.pool.write(page, at + 8, &(stub >> 32).to_le_bytes());
        }
        // No 32-bit code segment: a far jump cannot leave 64-bit mode. The accessed bits are set beforehand.
        for (selector, descriptor) in [
            (KERNEL_CS, 0x00af_9b00_0000_ffff_u64),
            (KERNEL_CS + 8, 0x00cf_9300_0000_ffff),
            (USER_SS & !7, 0x00cf_f300_0000_ffff),
            (USER_CS & !7, 0x00af_fb00_0000_ffff),
        ] {
            self.pool.write(page, (GDT_OFFSET + u64::from(selector)) as usize, &descriptor.to_le_bytes());
        }
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.pool.put_all(&self.frames.lock());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shadow_mmu::frame::FreedFrames;

    #[test]
    fn arrivals_are_told_by_port_and_by_address() {
        assert_eq!(Arrival::by_port(14), Some(Arrival::Exception(14)));
        assert_eq!(Arrival::by_rip(STUBS + 14 * STUB_BYTES + 2), Some(Arrival::Exception(14)));
        assert_eq!(Arrival::by_rip(SYSCALL_ENTRY), Some(Arrival::Syscall));
        for elsewhere in [0, STUBS - 1, SYSCALL_ENTRY + STUB_BYTES, u64::MAX] {
            assert_eq!(Arrival::by_rip(elsewhere), None, "{elsewhere:#x}");
        }
    }

    #[test]
    fn no_entry_of_the_monitor_has_the_user_bit_and_all_frames_come_back() {
        let pool = Arc::new(FramePool::new(64 * PAGE_SIZE, FreedFrames::Poison).unwrap());
        let monitor = Monitor::new(Arc::clone(&pool)).unwrap();
        let vcpu = monitor.add_vcpu(0).unwrap();
        let mut leaves = 0;
        let mut tables = vec![(monitor.bare_root(), 4)];
        while let Some((table, level)) = tables.pop() {
            for word in pool.words(table).iter().map(|word| word.load(Ordering::Relaxed)) {
                assert_eq!(word & 4, 0, "{word:#x}");
                let pfn = Pfn((word >> 12) as u32 & 0xfff_ffff);
                match (word & PRESENT != 0, level) {
                    (false, _) => {}
                    (true, 1) => {
                        leaves += 1;
                        assert_eq!(word & WRITE != 0, pfn == vcpu.stack);
                        assert!(word & WRITE == 0 || word & NO_EXEC != 0);
                    }
                    (true, _) => tables.push((pfn, level - 1)),
                }
            }
        }
        assert_eq!(leaves, 4);
        drop(monitor);
        assert_eq!(pool.free_frames(), 64);
    }

    #[test]
    fn running_out_of_frames_loses_none() {
        for frames in 1..9 {
            let pool = Arc::new(FramePool::new(frames * PAGE_SIZE, FreedFrames::Keep).unwrap());
            let monitor = Monitor::new(Arc::clone(&pool));
            let _ = monitor.as_ref().map(|monitor| monitor.add_vcpu(0));
            drop(monitor);
            assert_eq!(pool.free_frames(), frames as usize);
        }
    }
}
