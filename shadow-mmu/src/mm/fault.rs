// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Demand faults of the primary: a page that must be there, and neighbours that may be.
//!
//! [`Mm::fault`] is `get_user_pages` for secondaries: it makes the page at an address reachable for an access, and returns
//! its frame *pinned*: with a reference, so that it cannot be freed while the caller looks at it or installs it. A
//! secondary drops the pin once it has installed (I23: no long-term references); whether what it installs is still true
//! is checked by sequence and retry, not by the pin.
//!
//! One fault at a page, step by step, with the mmap lock held for reading throughout:
//! 1. VMA and rights.
//! 2. Under the page-table lock: is the pte good enough? Then done.
//! 3. If not, let go of the lock, get what is needed (frames, file pages), take it again, look again, install: a race
//!    lost is a step repeated.
//!
//! Filling an empty pte, and giving the same frame more rights, is not notified; copy-on-write is a pair of its own.

use super::{Mm, Pte, Vma, VmaFlags, count};
use crate::addr::{Access, Hva, HvaRange, PAGE_SIZE, Pfn};
use crate::frame::{Fill, FrameFlags, FramePool, OutOfFrames, Purpose};
use crate::mm::object::NoPage;
use crate::notifier::Event;
use crate::table::index;

/// Share of the pool that pages brought in ahead may not touch: need goes before guesses.
const RESERVE_SHARE: usize = 16;

/// What else a fault may bring in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ahead {
    /// Neighbours that the primary maps already.
    MappedOnly,
    /// Those, and new pages for the rest: fresh memory, or the file read ahead.
    Populate,
}

/// A question to [`Mm::fault`].
#[derive(Debug, Clone, Copy)]
pub struct FaultRequest {
    /// The page that must be there.
    pub hva: Hva,
    /// What will be done to it.
    pub access: Access,
    /// Pages that may come along; cut off at the VMA's ends.
    pub around: HvaRange,
    /// What may be done for them.
    pub ahead: Ahead,
}

impl FaultRequest {
    /// One page and no neighbours.
    pub fn one_page(hva: Hva, access: Access) -> Self {
        Self { hva, access, around: HvaRange::page(hva), ahead: Ahead::MappedOnly }
    }
}

/// Why an access cannot be made possible.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FaultError {
    /// Nothing is mapped there (SIGSEGV, `SEGV_MAPERR`).
    #[error("nothing is mapped there")]
    NoMapping,
    /// The mapping does not allow it (SIGSEGV, `SEGV_ACCERR`).
    #[error("the mapping does not allow it")]
    NoAccess,
    /// The mapping reaches beyond its object (SIGBUS, `BUS_ADRERR`).
    #[error("the mapping reaches beyond the end of its file")]
    BusError,
    /// The page has failed, and its content is lost (SIGBUS, `BUS_MCEERR_AR`).
    #[error("the page is poisoned")]
    Poisoned,
    /// No frame is free, or the space was [reaped](Mm::reap) (SIGKILL, as from the OOM killer).
    #[error("out of memory")]
    OutOfMemory,
}

impl From<OutOfFrames> for FaultError {
    fn from(_: OutOfFrames) -> Self {
        Self::OutOfMemory
    }
}

impl From<NoPage> for FaultError {
    fn from(error: NoPage) -> Self {
        match error {
            NoPage::PastEnd | NoPage::Io => Self::BusError,
            NoPage::OutOfFrames => Self::OutOfMemory,
        }
    }
}

/// A page that cannot be freed for now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PinnedPage {
    /// Its address.
    pub hva: Hva,
    /// Its frame.
    pub pfn: Pfn,
    /// What the primary allows without a further fault.
    pub rights: Access,
}

/// What had to be done for the page that was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Brought {
    /// It was there.
    Present,
    /// It was brought in.
    New,
    /// It was there, and a write got a copy of its own.
    Copied,
}

/// Pages with a reference each, which goes when this is dropped. The first is the one that had to be there.
#[derive(Debug)]
pub struct Pinned<'a> {
    pool: &'a FramePool,
    pages: Vec<PinnedPage>,
    brought: Brought,
}

impl<'a> Pinned<'a> {
    /// The page that was asked for.
    pub fn required(&self) -> PinnedPage {
        self.pages[0]
    }
    /// What had to be done for it.
    pub fn brought(&self) -> Brought {
        self.brought
    }
    /// The neighbours that came along, ascending.
    pub fn around(&self) -> &[PinnedPage] {
        &self.pages[1..]
    }
    /// A page of an adopted mapping is no frame of the pool and cannot be pinned: it is the host's to take away, and whoever
    /// got here by such a page learns it from sequence and retry alone.
    fn pin(&mut self, hva: Hva, pte: Pte, vma: &Vma) {
        if !pte.is_adopted() {
            self.pool.get(pte.pfn());
        }
        self.pages.push(PinnedPage { hva, pfn: pte.pfn(), rights: rights(vma, pte) });
    }
    /// The pool that the pages belong to.
    pub fn pool(&self) -> &'a FramePool {
        self.pool
    }
}

impl Drop for Pinned<'_> {
    fn drop(&mut self) {
        let pfns = self.pages.iter().map(|page| page.pfn);
        let frames: Vec<Pfn> = pfns.filter(|&pfn| self.pool.contains(pfn)).collect();
        self.pool.put_all(&frames);
    }
}

/// What may be done through `pte` without a fault in the primary.
pub(crate) fn rights(vma: &Vma, pte: Pte) -> Access {
    let mut rights = Access::empty();
    for access in [Access::READ, Access::WRITE, Access::EXEC] {
        rights.set(access, vma.allows(access));
    }
    if !pte.is_writable() {
        rights -= Access::WRITE;
    }
    rights
}

/// What for a page gets a frame in the place of that of `pte`.
fn purpose_of(pte: Pte) -> Purpose {
    if pte.is_ksm() { Purpose::Unshare } else { Purpose::New }
}

impl Mm {
    /// Makes the page at `request.hva` reachable for `request.access`, and returns it pinned, with neighbours.
    ///
    /// # Errors
    /// [`FaultError`], about the required page only.
    pub fn fault(&self, request: &FaultRequest) -> Result<Pinned<'_>, FaultError> {
        let hva = request.hva.page_floor();
        let map = self.map.read();
        let vma = map.vmas.find(hva).ok_or(FaultError::NoMapping)?;
        if !vma.allows(request.access) {
            return Err(FaultError::NoAccess);
        }
        if let Some(trap) = map.trap(hva) {
            return Err(trap.into());
        }
        self.refuse_reaped(vma)?;
        let mut around = map.traps.clear_around(request.around.intersect(vma.range), hva);
        if !around.contains(hva) || vma.flags.contains(VmaFlags::RANDOM) {
            around = HvaRange::page(hva);
        }
        let ahead = match request.ahead {
            Ahead::Populate => around,
            Ahead::MappedOnly => HvaRange::page(hva),
        };
        let mut pinned = Pinned {
            pool: &self.pool,
            pages: Vec::with_capacity(around.page_count() as usize),
            brought: Brought::Present,
        };
        self.fault_required(vma, hva, request.access, ahead, &mut pinned)?;
        if around.page_count() > 1 {
            self.for_each_leaf(around, |base, leaf, entries| {
                for at in entries {
                    let neighbour = Hva(base.0 + at as u64 * PAGE_SIZE);
                    let pte = leaf.get(at);
                    if pte.is_present() && neighbour != hva && !self.copies_on_access(pte) {
                        pinned.pin(neighbour, pte, vma);
                    }
                }
            });
        }
        // Again, so that no page is handed out that is fresh only because the old one was reaped meanwhile.
        self.refuse_reaped(vma)?;
        Ok(pinned)
    }

    /// The loop of steps 2 and 3. Returns with the page pinned.
    fn fault_required(
        &self,
        vma: &Vma,
        hva: Hva,
        access: Access,
        ahead: HvaRange,
        pinned: &mut Pinned<'_>,
    ) -> Result<(), FaultError> {
        let at = index(hva.page(), 1);
        loop {
            let pte = {
                let leaf = self.lock_leaf_or_new(hva)?;
                let pte = leaf.get(at);
                let write_protected =
                    access.contains(Access::WRITE) && !pte.is_writable() || self.copies_on_access(pte);
                if pte.is_present() && (!write_protected || self.reuse(vma, pte)) {
                    let pte = if write_protected { pte.writable() } else { pte };
                    let pte = pte.touched(access);
                    leaf.set(at, pte);
                    pinned.pin(hva, pte, vma);
                    return Ok(());
                }
                pte
            };
            pinned.brought = if pte.is_present() { Brought::Copied } else { Brought::New };
            if let Some(pfn) = vma.adopted_pfn(hva) {
                debug_assert!(!pte.is_present(), "{pte:?} at {hva} of adopted {pfn:?} is not good enough");
                self.map_adopted_pages(vma, hva, ahead)?;
            } else if pte.is_zero() {
                // Pages that were merged come back one by one, as their owner writes them.
                self.replace_zero_pages(hva, if pte.is_ksm() { HvaRange::page(hva) } else { ahead })?;
            } else if pte.is_present() {
                self.copy_on_write(hva, pte)?;
            } else if vma.object_page(hva).is_some() {
                self.map_object_pages(vma, hva, access, ahead)?;
            } else if access.contains(Access::WRITE) {
                self.map_new_pages(hva, ahead)?;
            } else {
                self.map_zero_pages(hva, ahead)?;
            }
        }
    }

    /// Whether a write may go to the frame of this write-protected pte as it is (`wp_can_reuse_anon_folio`): shared memory,
    /// or an anonymous page that nobody else has.
    fn reuse(&self, vma: &Vma, pte: Pte) -> bool {
        if pte.is_object() || pte.is_adopted() {
            return vma.is_shared();
        }
        let frame = || self.pool.frame(pte.pfn());
        // A page of KSM stays what it is until it is freed: who looks for its content finds it (I51).
        !pte.is_zero() && frame().map_count() == 1 && !frame().flags().contains(FrameFlags::KSM)
    }

    /// Replaces the frame of the write-protected `pte` at `hva` by a private copy (`wp_page_copy`). Returns also when it lost
    /// a race; the caller looks again.
    fn copy_on_write(&self, hva: Hva, pte: Pte) -> Result<(), FaultError> {
        let new = self.pool.alloc_for(purpose_of(pte), Fill::Overwritten)?;
        // The old frame cannot go away under the copy only while its pte is there and locked, so pin it first.
        let pinned = self.lock_leaf(hva).is_some_and(|leaf| {
            let now = leaf.get(index(hva.page(), 1));
            let same = now.is_present() && now.pfn() == pte.pfn();
            if same {
                self.pool.get(pte.pfn());
            }
            same
        });
        if !pinned {
            self.pool.put(new);
            return Ok(());
        }
        self.pool.copy(pte.pfn(), new);
        let replaced = {
            let _pair = self.notifiers.invalidate(HvaRange::page(hva), Event::Clear);
            self.replace_frame(hva, pte, new)
        };
        if replaced {
            self.pool.frame(pte.pfn()).remove_map();
            self.pool.put(pte.pfn());
            count(&self.stats.copied_pages, 1);
        } else {
            self.pool.put(new);
        }
        // The pin. Held until here, the frame cannot have gone and come back as another page of the same address, of which
        // `new` would be no copy.
        self.pool.put(pte.pfn());
        Ok(())
    }

    /// Gives every page of `ahead` that maps the zero frame a frame of its own, inside one pair: one flush for all of them.
    /// `ahead` holds `hva`, which alone gets one if memory is short.
    fn replace_zero_pages(&self, hva: Hva, ahead: HvaRange) -> Result<(), FaultError> {
        let mut pages = Vec::new();
        self.for_each_leaf(ahead, |base, leaf, entries| {
            for at in entries {
                let (pte, page) = (leaf.get(at), base.page() + at as u64);
                if pte.is_zero() && (page == hva.page() || !pte.is_ksm()) {
                    pages.push(page);
                }
            }
        });
        let mut frames = self.alloc_instead_of_zero(hva, &mut pages)?.into_iter();
        {
            // Only part of the range may hold zero pages; a secondary loses what else it has there, and finds it again.
            let _pair = self.notifiers.invalidate(ahead, Event::Clear);
            let zero = Pte::zero(self.zero_frame);
            for page in pages {
                let Some(new) = frames.next() else { break };
                if self.replace_frame(Hva(page * PAGE_SIZE), zero, new) {
                    count(&self.stats.copied_pages, 1);
                } else {
                    self.pool.put(new);
                }
            }
        }
        // One for each page was asked for; a page that was replaced meanwhile gave its own back above.
        frames.for_each(|pfn| self.pool.put(pfn));
        Ok(())
    }

    /// Points the pte at `hva` at `new`, writable, if it still is the write-protected `old` but for marks. Inside a pair.
    fn replace_frame(&self, hva: Hva, old: Pte, new: Pfn) -> bool {
        let at = index(hva.page(), 1);
        let Some(leaf) = self.lock_leaf(hva) else { return false };
        let now = leaf.get(at);
        if !now.is_present() || now.pfn() != old.pfn() || now.is_writable() {
            return false;
        }
        self.ptep_clear_flush_notify(&leaf, hva);
        self.copied_merged(now);
        self.pool.frame(new).add_map();
        // The page is as old as it was, whichever frame it has.
        self.set_pte_at_notify(&leaf, hva, Pte::anonymous(new).writable().with_age_of(now));
        true
    }

    /// A frame of zeros for each of `pages`, as below; for a page that was merged, and comes alone, out of the reserve.
    fn alloc_instead_of_zero(&self, hva: Hva, pages: &mut Vec<u64>) -> Result<Vec<Pfn>, OutOfFrames> {
        match pages.as_slice() {
            [page] if *page == hva.page() => {
                Ok(vec![self.pool.alloc_for(purpose_of(self.pte(hva)), Fill::Zeros)?])
            }
            _ => self.alloc_ahead(hva, pages),
        }
    }

    /// A frame of zeros for each of `pages`, which hold the page of `hva`; for that one alone if memory is short: then `pages`
    /// is cut to it.
    fn alloc_ahead(&self, hva: Hva, pages: &mut Vec<u64>) -> Result<Vec<Pfn>, OutOfFrames> {
        let spare = self.pool.free_frames().saturating_sub(self.pool.frame_count() / RESERVE_SHARE);
        if pages.len() > spare {
            *pages = vec![hva.page()];
        }
        let mut frames = Vec::with_capacity(pages.len());
        self.pool.alloc_up_to(pages.len(), Fill::Zeros, &mut frames);
        if frames.len() < pages.len() {
            self.pool.put_all(&frames.split_off(frames.len().min(1)));
            *pages = vec![hva.page()];
        }
        if frames.is_empty() && !pages.is_empty() { Err(OutOfFrames) } else { Ok(frames) }
    }

    /// Maps the zero frame at every empty page of `ahead`, which holds `hva`.
    fn map_zero_pages(&self, hva: Hva, ahead: HvaRange) -> Result<(), FaultError> {
        let mut mapped = 0;
        for page in ahead.page_numbers() {
            let leaf = match self.lock_leaf_or_new(Hva(page * PAGE_SIZE)) {
                Err(_) if page != hva.page() => continue,
                leaf => leaf?,
            };
            if !leaf.get(index(page, 1)).is_present() {
                leaf.set(index(page, 1), Pte::zero(self.zero_frame));
                mapped += 1;
            }
        }
        count(&self.stats.zero_pages, mapped);
        Ok(())
    }

    /// Puts a new frame at every empty page of `ahead`, which holds `hva`; at `hva` alone if memory is short.
    fn map_new_pages(&self, hva: Hva, ahead: HvaRange) -> Result<(), FaultError> {
        let mut pages = Vec::with_capacity(ahead.page_count() as usize);
        self.for_each_empty(ahead, |page| pages.push(page));
        let frames = self.alloc_ahead(hva, &mut pages)?;
        let mut unused = Vec::new();
        let mut result = Ok(());
        for (page, pfn) in pages.into_iter().zip(frames) {
            match self.lock_leaf_or_new(Hva(page * PAGE_SIZE)) {
                Ok(leaf) if !leaf.get(index(page, 1)).is_present() => {
                    self.pool.frame(pfn).add_map();
                    leaf.set(index(page, 1), Pte::anonymous(pfn).writable());
                    let counter =
                        if page == hva.page() { &self.stats.demand_pages } else { &self.stats.ahead_pages };
                    count(counter, 1);
                }
                Ok(_) => unused.push(pfn),
                Err(error) => {
                    unused.push(pfn);
                    if page == hva.page() {
                        result = Err(error.into());
                    }
                }
            }
        }
        self.pool.put_all(&unused);
        result
    }

    /// Maps every empty page of `ahead`, which holds `hva` and lies in a VMA of an adopted mapping. The frames are there
    /// already, whatever the host has at them; what it has not, KVM finds out when the guest gets there.
    fn map_adopted_pages(&self, vma: &Vma, hva: Hva, ahead: HvaRange) -> Result<(), FaultError> {
        for page in ahead.page_numbers() {
            let Some(pfn) = vma.adopted_pfn(Hva(page * PAGE_SIZE)) else { continue };
            let leaf = match self.lock_leaf_or_new(Hva(page * PAGE_SIZE)) {
                Err(_) if page != hva.page() => continue,
                leaf => leaf?,
            };
            if !leaf.get(index(page, 1)).is_present() {
                let pte = Pte::adopted(pfn);
                let writable = vma.allows(Access::WRITE);
                leaf.set(index(page, 1), if writable { pte.writable() } else { pte });
            }
        }
        Ok(())
    }

    /// Calls `visit` for each page of `range` without a pte.
    fn for_each_empty(&self, range: HvaRange, mut visit: impl FnMut(u64)) {
        let mut next = range.start.page();
        self.for_each_leaf(range, |base, leaf, entries| {
            for at in entries {
                let page = base.page() + at as u64;
                (next..page).for_each(&mut visit);
                if !leaf.get(at).is_present() {
                    visit(page);
                }
                next = page + 1;
            }
        });
        (next..range.end.page()).for_each(&mut visit);
    }

    /// Maps pages of the VMA's object at the empty pages of `ahead`, which holds `hva`. A private write gets a copy at once.
    fn map_object_pages(
        &self,
        vma: &Vma,
        hva: Hva,
        access: Access,
        ahead: HvaRange,
    ) -> Result<(), FaultError> {
        let mut empty = Vec::new();
        self.for_each_empty(ahead, |page| empty.push(Hva(page * PAGE_SIZE)));
        // Need goes before guesses: the page that must be there is the first to get a frame, and the others leave some.
        empty.sort_by_key(|&page| page != hva);
        let reserve = self.pool.frame_count() / RESERVE_SHARE;
        for page in empty {
            let required = page == hva;
            if !required && self.pool.free_frames() <= reserve {
                break;
            }
            let Some((object, at)) = vma.object_page(page) else { continue };
            let (pfn, mut pte) = match object.page(at) {
                Ok(pfn) => (pfn, Pte::object(pfn)),
                Err(error) if required => return Err(error.into()),
                Err(_) => continue,
            };
            let (mut frame, mut copied) = (pfn, false);
            if vma.is_shared() {
                if vma.allows(Access::WRITE) {
                    pte = pte.writable();
                }
            } else if required && access.contains(Access::WRITE) {
                let copy = self.pool.alloc(Fill::Overwritten);
                if let Ok(copy) = copy {
                    self.pool.copy(pfn, copy);
                }
                self.pool.put(pfn);
                frame = copy?;
                pte = Pte::anonymous(frame).writable();
                copied = true;
            }
            let leaf = match self.lock_leaf_or_new(page) {
                Ok(leaf) if !leaf.get(index(page.page(), 1)).is_present() => leaf,
                other => {
                    let failed = other.err();
                    self.pool.put(frame);
                    match failed {
                        Some(error) if required => return Err(error.into()),
                        _ => continue,
                    }
                }
            };
            if self.pool.frame(frame).map_count() == 0 {
                // What was known of it is of who had it mapped before.
                self.pool.frame(frame).take_flags(FrameFlags::ACCESSED);
            }
            self.pool.frame(frame).add_map();
            leaf.set(index(page.page(), 1), pte);
            count(if required { &self.stats.demand_pages } else { &self.stats.ahead_pages }, 1);
            count(&self.stats.copied_pages, u64::from(copied));
        }
        Ok(())
    }
}
