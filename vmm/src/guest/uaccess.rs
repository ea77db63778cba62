// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest memory, as a system call reaches it: every address is a claim, and what cannot be reached is `EFAULT`.
//!
//! All access goes through vm-memory's [`GuestMemory`], translated by the IOTLB of the [`Mm`], a page at a time: so a copy
//! stops exactly where the reachable bytes end, an invalidation waits for one page's copy at most, and no lock is held
//! between two pages. Addresses and lengths are in bytes. Nothing here allocates by a length that the guest chose
//! without the caller having bounded it.
//!
//! Memory that could be reached if a frame were left is no `EFAULT`: a program that hears of bad addresses where it has
//! mapped memory could not go on anyway. That is noted ([`UserMemory::is_starved`]), and the process dies of it as it does
//! when an instruction of its own touches the page.

use super::errno::Errno;
use shadow_mmu::addr::{Access, Hva, PAGE_SIZE, TASK_SIZE};
use shadow_mmu::iommu::{self, GuestView};
use shadow_mmu::mm::{FaultError, FaultRequest, Mm};
use shadow_mmu::notifier::Misuse;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions, VolatileMemory};

/// The guest's memory.
#[derive(Debug)]
pub(super) struct UserMemory {
    mm: Arc<Mm>,
    view: GuestView,
    starved: AtomicBool,
}

/// `addr..addr + len` cut at page boundaries, as (address, offset in the range, length). Ends early where user
/// addresses end.
fn pieces(addr: u64, len: usize) -> impl Iterator<Item = (GuestAddress, usize, usize)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == len {
            return None;
        }
        let at = addr.checked_add(done as u64).filter(|at| *at < TASK_SIZE)?;
        let piece = ((PAGE_SIZE - at % PAGE_SIZE) as usize).min(len - done);
        let item = (GuestAddress(at), done, piece);
        done += piece;
        Some(item)
    })
}

impl UserMemory {
    pub(super) fn new(mm: &Arc<Mm>) -> Result<Self, Misuse> {
        Ok(Self { mm: Arc::clone(mm), view: iommu::view(mm)?, starved: AtomicBool::new(false) })
    }

    /// Whether an access failed for want of a frame, at any time so far.
    pub(super) fn is_starved(&self) -> bool {
        self.starved.load(Ordering::Relaxed)
    }

    /// An access of the page at `addr` failed: finds out whether for want of a frame.
    fn failed(&self, addr: GuestAddress, access: Access) -> Errno {
        let request = FaultRequest::one_page(Hva(addr.0).page_floor(), access);
        if matches!(self.mm.fault(&request), Err(FaultError::OutOfMemory)) {
            self.starved.store(true, Ordering::Relaxed);
        }
        Errno::EFAULT
    }

    /// Whether `addr..addr + len` could be user memory at all (`access_ok`).
    pub(super) fn check_range(addr: u64, len: u64) -> Result<(), Errno> {
        match addr.checked_add(len) {
            Some(end) if end <= TASK_SIZE => Ok(()),
            _ => Err(Errno::EFAULT),
        }
    }

    /// Fills `into` from `addr` on as far as the guest's memory goes; returns the bytes that were read.
    pub(super) fn read_prefix(&self, addr: u64, into: &mut [u8]) -> usize {
        for (at, offset, len) in pieces(addr, into.len()) {
            if self.view.read_slice(&mut into[offset..offset + len], at).is_err() {
                self.failed(at, Access::READ);
                return offset;
            }
        }
        reachable(addr, into.len())
    }

    /// Writes `from` to `addr` as far as the guest's memory goes; returns the bytes that were written.
    pub(super) fn write_prefix(&self, addr: u64, from: &[u8]) -> usize {
        for (at, offset, len) in pieces(addr, from.len()) {
            if self.view.write_slice(&from[offset..offset + len], at).is_err() {
                self.failed(at, Access::WRITE);
                return offset;
            }
        }
        reachable(addr, from.len())
    }

    /// How many of the `len` bytes at `addr` can be written, counted from the first. Brings the pages in.
    pub(super) fn writable_prefix(&self, addr: u64, len: usize) -> usize {
        for (at, offset, len) in pieces(addr, len) {
            if !self.view.check_range(at, len, Permissions::Write) {
                self.failed(at, Access::WRITE);
                return offset;
            }
        }
        reachable(addr, len)
    }

    /// Fills `into` from `addr`.
    pub(super) fn read(&self, addr: u64, into: &mut [u8]) -> Result<(), Errno> {
        if self.read_prefix(addr, into) == into.len() { Ok(()) } else { Err(Errno::EFAULT) }
    }

    /// Writes all of `from` to `addr`. On an error part of it may have been written, as on Linux.
    pub(super) fn write(&self, addr: u64, from: &[u8]) -> Result<(), Errno> {
        if self.write_prefix(addr, from) == from.len() { Ok(()) } else { Err(Errno::EFAULT) }
    }

    /// The `N` bytes at `addr`.
    pub(super) fn record<const N: usize>(&self, addr: u64) -> Result<Record<N>, Errno> {
        let mut record = Record::zeroed();
        self.read(addr, &mut record.0)?;
        Ok(record)
    }

    /// The 32-bit number at `addr`.
    pub(super) fn read_u32(&self, addr: u64) -> Result<u32, Errno> {
        Ok(self.record::<4>(addr)?.u32(0))
    }

    /// The 64-bit number at `addr`.
    pub(super) fn read_u64(&self, addr: u64) -> Result<u64, Errno> {
        Ok(self.record::<8>(addr)?.u64(0))
    }

    /// Stores a 32-bit number.
    pub(super) fn write_u32(&self, addr: u64, value: u32) -> Result<(), Errno> {
        self.write(addr, &value.to_le_bytes())
    }

    /// Stores a 64-bit number.
    pub(super) fn write_u64(&self, addr: u64, value: u64) -> Result<(), Errno> {
        self.write(addr, &value.to_le_bytes())
    }

    /// The bytes at `addr` up to a NUL, which is not part of them. `Ok(None)` if there is none in the first `most`
    /// bytes.
    pub(super) fn c_string(&self, addr: u64, most: usize) -> Result<Option<Vec<u8>>, Errno> {
        let mut bytes = vec![0; most];
        let read = self.read_prefix(addr, &mut bytes);
        match bytes[..read].iter().position(|&byte| byte == 0) {
            Some(len) => {
                bytes.truncate(len);
                Ok(Some(bytes))
            }
            None if read < most => Err(Errno::EFAULT),
            None => Ok(None),
        }
    }

    /// The word at `addr`, read atomically. `addr` is a multiple of 4.
    pub(super) fn load_u32(&self, addr: u64) -> Result<u32, Errno> {
        Self::check_range(addr, 4)?;
        let at = GuestAddress(addr);
        self.view.load::<u32>(at, Ordering::SeqCst).map_err(|_| self.failed(at, Access::READ))
    }

    /// Changes the word at `addr` atomically from what it holds to what `change` makes of that, unless `change` gives
    /// `None`. Returns what it held. `addr` is a multiple of 4.
    pub(super) fn update_u32(
        &self,
        addr: u64,
        mut change: impl FnMut(u32) -> Option<u32>,
    ) -> Result<u32, Errno> {
        Self::check_range(addr, 4)?;
        let fault = |_| Errno::EFAULT;
        let mut slices =
            self.view.get_slices(GuestAddress(addr), 4, Permissions::ReadWrite).map_err(fault)?;
        let slice = slices.next().ok_or(Errno::EFAULT)?.map_err(fault)?;
        let word = slice.get_atomic_ref::<AtomicU32>(0).map_err(|_| Errno::EFAULT)?;
        let old = word.fetch_update(Ordering::SeqCst, Ordering::SeqCst, &mut change);
        if old.is_ok() {
            // vm-memory does not tell of what goes through a reference.
            slice.bitmap().mark_dirty(0, 4);
        }
        Ok(old.unwrap_or_else(|unchanged| unchanged))
    }
}

/// How many of `len` bytes from `addr` lie among user addresses.
fn reachable(addr: u64, len: usize) -> usize {
    TASK_SIZE.saturating_sub(addr).min(len as u64) as usize
}

/// A structure of the ABI as its bytes, little-endian, with numbers at fixed offsets. Offsets out of range panic: they are
/// constants of this program, never the guest's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Record<const N: usize>(pub(super) [u8; N]);

macro_rules! numbers {
    ($($get:ident $put:ident $type:ty),*) => {$(
        #[allow(dead_code, reason = "each width is there in both directions")]
        pub(super) fn $get(&self, at: usize) -> $type {
            let mut bytes = [0; size_of::<$type>()];
            bytes.copy_from_slice(&self.0[at..at + size_of::<$type>()]);
            <$type>::from_le_bytes(bytes)
        }
        #[allow(dead_code, reason = "each width is there in both directions")]
        pub(super) fn $put(&mut self, at: usize, value: $type) -> &mut Self {
            self.0[at..at + size_of::<$type>()].copy_from_slice(&value.to_le_bytes());
            self
        }
    )*};
}

impl<const N: usize> Record<N> {
    pub(super) fn zeroed() -> Self {
        Self([0; N])
    }
    numbers!(u16 put_u16 u16, i32 put_i32 i32, u32 put_u32 u32, i64 put_i64 i64, u64 put_u64 u64);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::testing::Fixture;

    #[test]
    fn copies_stop_where_the_mapping_ends() {
        let fixture = Fixture::new();
        let user = fixture.user();
        let page = fixture.map_pages(1);
        assert_eq!(user.write_prefix(page + 4000, &[7; 200]), 96);
        assert_eq!(user.writable_prefix(page + 4000, 200), 96);
        assert_eq!(user.read_prefix(page + 4090, &mut [0; 10]), 6);
        assert_eq!(user.write(page + 4095, &[1, 2]), Err(Errno::EFAULT));
        assert_eq!(user.read_u64(page + 4089), Err(Errno::EFAULT));
    }

    #[test]
    fn wild_addresses_are_efault() {
        let fixture = Fixture::new();
        let user = fixture.user();
        for addr in [0, 1, TASK_SIZE - 1, TASK_SIZE, 1 << 63, u64::MAX, u64::MAX - 3] {
            assert_eq!(user.read(addr, &mut [0; 8]), Err(Errno::EFAULT), "{addr:#x}");
            assert_eq!(user.write(addr, &[0; 8]), Err(Errno::EFAULT), "{addr:#x}");
            assert_eq!(user.load_u32(addr & !3), Err(Errno::EFAULT), "{addr:#x}");
            assert_eq!(user.update_u32(addr & !3, Some), Err(Errno::EFAULT), "{addr:#x}");
            assert_eq!(user.c_string(addr, 16), Err(Errno::EFAULT), "{addr:#x}");
        }
    }

    #[test]
    fn strings_end_at_their_nul_or_not_at_all() {
        let fixture = Fixture::new();
        let user = fixture.user();
        let page = fixture.map_pages(1);
        user.write(page + 4092, b"abc\0").unwrap();
        assert_eq!(user.c_string(page + 4092, 4096), Ok(Some(b"abc".to_vec())));
        assert_eq!(user.c_string(page + 4092, 3), Ok(None));
        user.write(page + 4095, b"x").unwrap();
        assert_eq!(user.c_string(page + 4092, 4096), Err(Errno::EFAULT));
    }

    #[test]
    fn an_update_is_atomic_and_may_decline() {
        let fixture = Fixture::new();
        let user = fixture.user();
        let page = fixture.map_pages(1);
        assert_eq!(user.update_u32(page, |old| Some(old + 5)), Ok(0));
        assert_eq!(user.update_u32(page, |_| None), Ok(5));
        assert_eq!(user.load_u32(page), Ok(5));
    }

    #[test]
    fn what_umbra_writes_is_in_a_log_of_writes() {
        use shadow_mmu::addr::Gfn;
        use shadow_mmu::shadow::{
            DirtyLogConfig, DirtyMethod, DirtyRecords, Initially, Memslot, NoTlb, ProtectOn, ShadowMmu,
            SlotAccess,
        };
        let fixture = Fixture::new();
        let user = fixture.user();
        let (words, bytes) = (fixture.map_pages(1), fixture.map_pages(1));
        let shadow = ShadowMmu::new(Arc::clone(&user.mm), Arc::new(NoTlb)).unwrap();
        let all = Memslot { gfn: Gfn(0), pages: 1 << 35, hva: Hva(0), access: SlotAccess::ReadWrite };
        shadow.add_slot(all).unwrap();
        let log = DirtyLogConfig {
            method: DirtyMethod::WriteProtect,
            records: DirtyRecords::Bitmap,
            protect: ProtectOn::Get,
            initially: Initially::Clean,
        };
        shadow.enable_dirty_log(Gfn(0), log).unwrap();
        let written = || shadow.get_dirty_log(Gfn(0)).unwrap().iter().collect::<Vec<_>>();
        user.update_u32(words + 8, |_| None).unwrap();
        assert!(written().is_empty());
        user.update_u32(words + 8, Some).unwrap();
        assert_eq!(written(), [words / PAGE_SIZE]);
        user.write(bytes, b"x").unwrap();
        user.load_u32(words).unwrap();
        assert_eq!(written(), [bytes / PAGE_SIZE]);
    }
}
