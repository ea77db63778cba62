// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which page has which content: a hash table over the frames of a pool, in flat arrays. The kernel's two trees, stable and
//! unstable, are one here; whether an entry is of a page of KSM or of one that may become one, its frame's flags say.
//!
//! # 16 bytes a frame
//! | bytes | array | what |
//! | --- | --- | --- |
//! | 2 | `heads` | first entry of each bucket; a bucket for two frames |
//! | 4 | `next` | the next entry of the same bucket |
//! | 4 | `hashes` | half of the content's xxh3 |
//! | 6 | `places` | where the page is mapped, or whose it is |
//!
//! The arrays are zeroed by the host as they are touched: a large pool costs nothing until it is used.
//!
//! # Entries that are out of date
//! An entry holds no reference. Its frame may have been freed, handed out again, and be another page: then the flags that
//! made it an entry are gone, and whoever comes upon it takes it out (R26 is about the moment in between; see
//! [`FramePool::get_ksm`](crate::frame::FramePool)). So nobody has to tell the table of pages that go.
//!
//! # Hostile content
//! Whoever can choose pages that share a bucket could make it long. The hash has a seed that nobody knows, and beside [`LONGEST`]
//! entries of other hashes none is added: what does not fit is not merged. Entries of one hash there may be as many as frames of
//! one content; the latest are found first, and no more than [`LONGEST`] of them are looked at.

use crate::addr::Pfn;

/// Entries of other hashes beside which one is added, and entries of one hash that are looked at.
const LONGEST: usize = 32;
/// Entries that are counted when one is added: behind so many of one content there are few others.
const WALK: usize = 512;
/// Spaces that a place can name.
pub(super) const SPACES: usize = 1 << 13;
/// Bits of a page number: the lower half.
const PAGE_BITS: u32 = 35;
/// In `next`: not an entry.
const NONE: u32 = 0;
/// In `next` and `heads`: no further entry. In `heads`, 0 says the same.
const END: u32 = 1;
/// What is added to a frame number in them.
const FIRST: u64 = 2;

/// Where the page of an entry is, in 48 bits: for one that is not merged, space and page; for a page of KSM its domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place(u64);

impl Place {
    /// A page of a space.
    pub(super) fn of_page(space: usize, page: u64) -> Self {
        debug_assert!(space < SPACES && page >> PAGE_BITS == 0, "space {space}, page {page:#x}");
        Self((space as u64) << PAGE_BITS | page)
    }
    /// A page of KSM, for those of one domain.
    pub(super) fn of_domain(domain: u32) -> Self {
        Self(domain.into())
    }
    pub(super) fn space(self) -> usize {
        (self.0 >> PAGE_BITS) as usize
    }
    pub(super) fn page(self) -> u64 {
        self.0 & ((1 << PAGE_BITS) - 1)
    }
    pub(super) fn domain(self) -> u32 {
        self.0 as u32
    }
}

/// What to do after one entry of a bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Go on.
    Next,
    /// Take it out, for it is out of date, and go on.
    Remove,
    /// It is the one.
    Stop,
}

/// The table.
#[derive(Debug)]
pub(super) struct Index {
    heads: Box<[u32]>,
    next: Box<[u32]>,
    hashes: Box<[u32]>,
    places: Box<[[u16; 3]]>,
}

fn zeroed<T: Default + Clone>(len: usize) -> Box<[T]> {
    // `vec!` of zeros asks the host for zeroed pages.
    vec![T::default(); len].into_boxed_slice()
}

impl Index {
    /// For a pool of `frames` frames. `None` if it has more than the table can name.
    pub(super) fn new(frames: usize) -> Option<Self> {
        if frames as u64 + FIRST > u64::from(u32::MAX) {
            return None;
        }
        Some(Self {
            heads: zeroed(frames.div_ceil(2)),
            next: zeroed(frames),
            hashes: zeroed(frames),
            places: vec![[0; 3]; frames].into_boxed_slice(),
        })
    }

    /// Bytes of the arrays.
    pub(super) fn bytes(&self) -> u64 {
        let all = size_of_val(&*self.heads) + size_of_val(&*self.next) + size_of_val(&*self.hashes);
        (all + size_of_val(&*self.places)) as u64
    }

    fn bucket(&self, hash: u32) -> usize {
        ((u64::from(hash) * self.heads.len() as u64) >> 32) as usize
    }

    fn link_to(pfn: Pfn) -> u32 {
        (u64::from(pfn.0) + FIRST) as u32
    }

    fn target(link: u32) -> Option<Pfn> {
        u64::from(link).checked_sub(FIRST).map(|pfn| Pfn(pfn as u32))
    }

    pub(super) fn is_entry(&self, pfn: Pfn) -> bool {
        self.next[pfn.index()] != NONE
    }
    pub(super) fn hash(&self, pfn: Pfn) -> u32 {
        self.hashes[pfn.index()]
    }
    /// Notes the hash of a page that is no entry.
    pub(super) fn set_hash(&mut self, pfn: Pfn, hash: u32) {
        debug_assert!(!self.is_entry(pfn), "{pfn:?} is an entry");
        self.hashes[pfn.index()] = hash;
    }
    pub(super) fn place(&self, pfn: Pfn) -> Place {
        let [low, mid, high] = self.places[pfn.index()].map(u64::from);
        Place(low | mid << 16 | high << 32)
    }
    pub(super) fn set_place(&mut self, pfn: Pfn, place: Place) {
        self.places[pfn.index()] = [place.0 as u16, (place.0 >> 16) as u16, (place.0 >> 32) as u16];
    }

    /// Adds `pfn`, which is no entry; whether there was room.
    pub(super) fn insert(&mut self, pfn: Pfn, hash: u32, place: Place) -> bool {
        debug_assert!(!self.is_entry(pfn), "{pfn:?} is an entry");
        let bucket = self.bucket(hash);
        let head = self.heads[bucket];
        let mut others = 0;
        let mut link = head;
        let mut walked = 0;
        while let Some(pfn) = Self::target(link)
            && walked < WALK
        {
            walked += 1;
            others += usize::from(self.hashes[pfn.index()] != hash);
            link = self.next[pfn.index()];
        }
        if others >= LONGEST {
            return false;
        }
        self.next[pfn.index()] = head.max(END);
        self.hashes[pfn.index()] = hash;
        self.set_place(pfn, place);
        self.heads[bucket] = Self::link_to(pfn);
        true
    }

    /// Takes `pfn` out, if it is an entry.
    pub(super) fn remove(&mut self, pfn: Pfn) {
        if !self.is_entry(pfn) {
            return;
        }
        let bucket = self.bucket(self.hash(pfn));
        let mut before = None;
        let mut link = self.heads[bucket];
        while let Some(entry) = Self::target(link) {
            if entry == pfn {
                return self.unlink(bucket, before, pfn);
            }
            before = Some(entry);
            link = self.next[entry.index()];
        }
    }

    fn unlink(&mut self, bucket: usize, before: Option<Pfn>, pfn: Pfn) {
        let next = std::mem::replace(&mut self.next[pfn.index()], NONE);
        match before {
            Some(before) => self.next[before.index()] = next,
            None => self.heads[bucket] = next,
        }
    }

    /// Calls `visit` with entries of one hash, the latest first, until it stops at one.
    pub(super) fn find(&mut self, hash: u32, mut visit: impl FnMut(&Self, Pfn) -> Step) -> Option<Pfn> {
        let bucket = self.bucket(hash);
        let mut before: Option<Pfn> = None;
        let mut link = self.heads[bucket];
        let mut visited = 0;
        while let Some(pfn) = Self::target(link)
            && visited < LONGEST
        {
            let next = self.next[pfn.index()];
            visited += usize::from(self.hashes[pfn.index()] == hash);
            let step = if self.hashes[pfn.index()] == hash { visit(self, pfn) } else { Step::Next };
            match step {
                Step::Next => before = Some(pfn),
                Step::Stop => return Some(pfn),
                Step::Remove => self.unlink(bucket, before, pfn),
            }
            link = next;
        }
        None
    }
}

#[cfg(test)]
mod tests;
