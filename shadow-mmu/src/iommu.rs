// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest memory as rust-vmm code sees it: vm-memory's [`Iommu`] over an [`Mm`].
//!
//! A [`GuestView`] is a `GuestMemory` whose addresses are those of the address space. Every access translates anew, brings
//! pages in as a guest access would, and holds them pinned until the access is over: a page that is unmapped meanwhile stays
//! a frame of nobody until then, as with `get_user_pages`, and is never another guest page.

use crate::addr::{Access, Hva, PAGE_SIZE};
use crate::mm::{FaultRequest, Mm, Pinned};
use crate::sync::Arc;
use std::fmt;
use std::ops::Deref;
use vm_memory::iommu::{Error, IotlbIterator, IovaRange};
use vm_memory::{GuestAddress, GuestMemoryMmap, Iommu, IommuMemory, Iotlb, Permissions};

/// vm-memory's view of an address space: `Bytes<GuestAddress>` over its addresses.
pub type GuestView = IommuMemory<GuestMemoryMmap, MmIommu>;

/// A view of `mm`.
pub fn view(mm: &Arc<Mm>) -> GuestView {
    IommuMemory::new(mm.pool().memory().clone(), MmIommu { mm: Arc::clone(mm) }, true, ())
}

/// Translates addresses of an [`Mm`] to offsets in its pool's file.
#[derive(Debug)]
pub struct MmIommu {
    mm: Arc<Mm>,
}

/// The translations of one access, with the pins that keep them true.
pub struct PinnedIotlb<'a> {
    iotlb: Iotlb,
    _pins: Vec<Pinned<'a>>,
}

impl fmt::Debug for PinnedIotlb<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PinnedIotlb").field("pages", &self._pins.len()).finish()
    }
}

impl Deref for PinnedIotlb<'_> {
    type Target = Iotlb;
    fn deref(&self) -> &Iotlb {
        &self.iotlb
    }
}

impl Iommu for MmIommu {
    type IotlbGuard<'a> = PinnedIotlb<'a>;

    fn translate(
        &self,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<IotlbIterator<PinnedIotlb<'_>>, Error> {
        let range = || IovaRange { base: iova, length };
        let fail = |reason: String| Error::CannotResolve { iova_range: range(), reason };
        let end = iova.0.checked_add(length as u64).ok_or_else(|| fail("wraps around".into()))?;
        let mut wanted = Access::READ;
        wanted.set(Access::WRITE, access.has_write());
        let mut iotlb = Iotlb::new();
        let mut pins = Vec::new();
        let mut page = Hva(iova.0).page_floor();
        while page.0 < end {
            let pinned = self
                .mm
                .fault(&FaultRequest::one_page(page, wanted))
                .map_err(|error| fail(format!("{error} at {page}")))?;
            if !pinned.pool().contains(pinned.required().pfn) {
                // As `get_user_pages` refuses VM_PFNMAP: the page cannot be pinned, so no device may hold on to it.
                return Err(fail(format!(
                    "{page} is an adopted mapping of the host, which no device can reach"
                )));
            }
            let target = GuestAddress(pinned.required().pfn.offset());
            iotlb.set_mapping(GuestAddress(page.0), target, PAGE_SIZE as usize, access)?;
            pins.push(pinned);
            page = match page.checked_add(PAGE_SIZE) {
                Some(next) => next,
                None => break,
            };
        }
        Iotlb::lookup(PinnedIotlb { iotlb, _pins: pins }, iova, length, access)
            .map_err(|_| fail("not mapped".into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::{FramePool, FreedFrames};
    use crate::mm::{Backing, MapFlags};
    use vm_memory::Bytes;

    fn space() -> (Arc<Mm>, GuestView) {
        let pool = FramePool::new(64 * PAGE_SIZE, FreedFrames::Poison).unwrap();
        let mm = Mm::new(Arc::new(pool)).unwrap();
        let view = view(&mm);
        (mm, view)
    }

    fn map(mm: &Mm, pages: u64, prot: Access) -> Hva {
        mm.mmap(Hva(0), pages * PAGE_SIZE, prot, MapFlags::PRIVATE, Backing::Anonymous).unwrap()
    }

    #[test]
    fn bytes_cross_pages_and_come_back() {
        let (mm, view) = space();
        let at = map(&mm, 3, Access::READ | Access::WRITE);
        let text: Vec<u8> = (0..PAGE_SIZE * 2).map(|n| n as u8).collect();
        view.write_slice(&text, GuestAddress(at.0 + 100)).unwrap();
        let mut back = vec![0; text.len()];
        view.read_slice(&mut back, GuestAddress(at.0 + 100)).unwrap();
        assert_eq!(back, text);
    }

    #[test]
    fn rights_of_the_mapping_hold_for_us_too() {
        let (mm, view) = space();
        let at = map(&mm, 1, Access::READ);
        assert!(view.write_slice(b"x", GuestAddress(at.0)).is_err());
        assert_eq!(view.read_obj::<u64>(GuestAddress(at.0)).unwrap(), 0);
        let none = map(&mm, 1, Access::empty());
        assert!(view.read_obj::<u64>(GuestAddress(none.0)).is_err());
    }

    #[test]
    fn wild_addresses_are_errors() {
        let (_mm, view) = space();
        for wild in [0, 1, 0xdead_beef_0000, u64::MAX - 3, u64::MAX] {
            assert!(view.read_obj::<u64>(GuestAddress(wild)).is_err(), "{wild:#x}");
        }
    }

    #[test]
    fn i23_no_pin_outlives_its_access() {
        let (mm, view) = space();
        let free = mm.pool().free_frames();
        let at = map(&mm, 1, Access::READ | Access::WRITE);
        view.write_obj(7u64, GuestAddress(at.0)).unwrap();
        mm.munmap(at, PAGE_SIZE).unwrap();
        assert_eq!(mm.pool().free_frames(), free);
    }
}
