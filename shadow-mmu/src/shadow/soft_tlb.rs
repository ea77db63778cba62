// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A TLB in software: host mappings of the process that runs the guest, as cached translations of the shadow map.
//!
//! An entry is a run of neighbouring pages in neighbouring frames with the same rights, which is one mapping of the host: the host
//! joins mappings that continue each other, so there are at most as many of those as of these. The number of entries is bounded;
//! where the bound is reached, an eighth goes, by address, round and round. Nothing depends on an entry staying.
//!
//! # Protocol
//! One lock, a leaf below `mmu_lock`, held for a whole fill and for a whole flush, the host's part included:
//!
//! 1. *Fill*: walk the shadow map ([`Walker::access`], which sets A and D), have the host map what was found, note the entry.
//! 2. *Flush*: have the host unmap every page that an entry covers, forget the entries. Who flushes changed sptes before.
//!
//! So a fill is either before the flush, and what it mapped is unmapped by it, or after it, and its walk sees the changed spte:
//! there is no third case in which a mapping of an old spte is left when the flush returns (`r34_a_fill_races_a_zap`). The host's
//! unmapping returns when no CPU has the translation any more, whoever runs in that process, so nobody has to be kicked.
//!
//! # Marks
//! An entry allows what the marks of each of its leaves say already, and no more: no access without A, no write without D. A page
//! that was only read is mapped read-only; its first write faults, and the fill for it sets D. Whoever clears A or D must flush
//! ([`AdBits::AfterFlush`](super::AdBits::AfterFlush)).
//!
//! # Errors
//! Where the host could neither map nor unmap, something may be mapped that nobody knows. An entry without rights stands for it: no
//! access finds it good enough, and each flush of its pages tries again.

use super::tlb::Zapped;
use super::walker::{Translation, Walker};
use crate::addr::{Access, Gfn, PAGE_SHIFT, Pfn, TASK_SIZE};
use crate::sync::Mutex;
use std::collections::BTreeMap;
use std::ops::Range;

/// Every page that a guest can have.
const EVERYTHING: Range<u64> = 0..TASK_SIZE >> PAGE_SHIFT;

/// The host's part of a TLB: the mappings of the process that runs the guest. Called with the TLB's lock held; must not call into
/// the TLB, the shadow map or the address space behind it.
pub trait HostMappings {
    /// Why the host would not.
    type Error;
    /// Maps the frames at these pages with these rights, in place of whatever was there.
    ///
    /// # Errors
    /// Any: nothing is known of what is mapped there now.
    fn map(&mut self, translation: &Translation) -> Result<(), Self::Error>;
    /// Unmaps these ranges of pages. When it returns, no CPU reaches memory through what was mapped there.
    ///
    /// # Errors
    /// Any: what was mapped may still be. [`unmap_all`](Self::unmap_all) follows.
    fn unmap(&mut self, pages: &[Range<u64>]) -> Result<(), Self::Error>;
    /// The same for every page that a guest can have.
    ///
    /// # Errors
    /// Any: what was mapped may still be.
    fn unmap_all(&mut self) -> Result<(), Self::Error>;
}

/// What a fill came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filled {
    /// The access is possible until the next flush of its page.
    Allowed,
    /// The shadow map does not allow the access: a page fault.
    NotAllowed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    pages: u64,
    pfn: Pfn,
    rights: Access,
}

#[derive(Debug, Default)]
struct State {
    /// By first page; they do not overlap.
    entries: BTreeMap<u64, Entry>,
    /// Times that something was unmapped.
    drops: u64,
    /// Where eviction goes on.
    hand: u64,
}

/// The TLB of one guest.
#[derive(Debug)]
pub struct SoftTlb {
    state: Mutex<State>,
    most: usize,
}

impl State {
    /// The entry that covers `gfn`.
    fn find(&self, gfn: u64) -> Option<(u64, Entry)> {
        let (&start, &entry) = self.entries.range(..=gfn).next_back()?;
        (gfn - start < entry.pages).then_some((start, entry))
    }

    /// Forgets what is known of `pages`. Returns what of it was covered, from the first such page to behind the last.
    fn forget(&mut self, pages: Range<u64>) -> Option<Range<u64>> {
        let first = self.find(pages.start).map_or(pages.start, |(start, _)| start);
        let touched: Vec<_> =
            self.entries.range(first..pages.end).map(|(&start, &entry)| (start, entry)).collect();
        for &(start, entry) in &touched {
            self.entries.remove(&start);
            let end = start + entry.pages;
            if start < pages.start {
                self.entries.insert(start, Entry { pages: pages.start - start, ..entry });
            }
            if end > pages.end {
                let cut = pages.end - start;
                let pfn = Pfn(entry.pfn.0.wrapping_add(cut as u32));
                self.entries.insert(pages.end, Entry { pages: end - pages.end, pfn, ..entry });
            }
        }
        let (first, _) = touched.first()?;
        let (last, entry) = touched.last()?;
        Some(pages.start.max(*first)..pages.end.min(last + entry.pages))
    }

    /// Notes a mapping, as one with what it continues and what continues it.
    fn note(&mut self, new: &Translation) {
        let (mut start, mut pages, mut pfn) = (new.gfn.0, new.pages, new.pfn);
        self.forget(start..start + pages);
        if let Some((&before, &entry)) = self.entries.range(..start).next_back()
            && before + entry.pages == start
            && u64::from(entry.pfn.0) + entry.pages == u64::from(pfn.0)
            && entry.rights == new.rights
        {
            self.entries.remove(&before);
            (start, pages, pfn) = (before, pages + entry.pages, entry.pfn);
        }
        if let Some(&entry) = self.entries.get(&(start + pages))
            && u64::from(pfn.0) + pages == u64::from(entry.pfn.0)
            && entry.rights == new.rights
        {
            self.entries.remove(&(start + pages));
            pages += entry.pages;
        }
        self.entries.insert(start, Entry { pages, pfn, rights: new.rights });
    }

    /// The part of `all` around `gfn` up to what has the same rights already: to map that once more would cost as much as the first
    /// time, and a run that grows page by page would be mapped whole for each.
    fn missing(&self, all: Translation, gfn: u64) -> Translation {
        let is_same = |entry: &Entry| entry.rights == all.rights;
        let (first, end) = (all.gfn.0, all.gfn.0 + all.pages);
        let before = self.entries.range(..gfn).rev().map(|(&start, entry)| (start + entry.pages, entry));
        let before = before.take_while(|&(end, _)| end > first).find(|(_, entry)| is_same(entry));
        let after = self.entries.range(gfn + 1..end).find(|(_, entry)| is_same(entry));
        let start = before.map_or(first, |(end, _)| end);
        let end = after.map_or(end, |(&start, _)| start);
        let pfn = Pfn(all.pfn.0 + (start - first) as u32);
        Translation { gfn: Gfn(start), pages: end - start, pfn, rights: all.rights }
    }

    /// Unmaps `pages` where something is mapped there.
    fn drop_pages<M: HostMappings>(
        &mut self,
        pages: impl Iterator<Item = Range<u64>>,
        host: &mut M,
    ) -> Result<(), M::Error> {
        let mut gone: Vec<Range<u64>> = Vec::new();
        for pages in pages {
            let Some(covered) = self.forget(pages) else { continue };
            match gone.last_mut() {
                // Between the two nothing is mapped: one call for both.
                Some(last)
                    if last.end <= covered.start
                        && self.entries.range(last.end..covered.start).next().is_none()
                        && self.find(last.end).is_none() =>
                {
                    last.end = covered.end;
                }
                _ => gone.push(covered),
            }
        }
        if gone.is_empty() {
            return Ok(());
        }
        self.drops += 1;
        match host.unmap(&gone) {
            Ok(()) => Ok(()),
            Err(_) => self.drop_everything(host),
        }
    }

    /// One call for all: it cannot fail for want of a mapping that the rest of a divided one would need.
    fn drop_everything<M: HostMappings>(&mut self, host: &mut M) -> Result<(), M::Error> {
        self.drops += 1;
        self.entries.clear();
        host.unmap_all().inspect_err(|_| self.suspect(EVERYTHING))
    }

    /// Something may be mapped at `pages`, of which nothing is known.
    fn suspect(&mut self, pages: Range<u64>) {
        let entry = Entry { pages: pages.end - pages.start, pfn: Pfn(0), rights: Access::empty() };
        self.entries.insert(pages.start, entry);
    }

    /// Evicts until there are at most `most` entries, and an eighth more: the next ones need room, too.
    fn limit<M: HostMappings>(&mut self, most: usize, host: &mut M) -> Result<(), M::Error> {
        while self.entries.len() > most {
            self.evict(self.entries.len() - most + most / 8, host)?;
        }
        Ok(())
    }

    /// What is mapped in the next part of the address space goes, about `count` entries.
    fn evict<M: HostMappings>(&mut self, count: usize, host: &mut M) -> Result<(), M::Error> {
        let from = self.hand;
        let next = self.entries.range(from..).nth(count).map(|(&start, _)| start);
        self.hand = next.unwrap_or(0);
        self.drop_pages(std::iter::once(from..next.unwrap_or(EVERYTHING.end)), host)
    }
}

impl SoftTlb {
    /// An empty one for at most `most` entries, eight at least.
    pub fn new(most: usize) -> Self {
        Self { state: Mutex::default(), most: most.max(8) }
    }

    /// Makes `access` at `gfn` possible, if the shadow map allows it.
    ///
    /// # Errors
    /// The host's, if it could not map even when everything else had been unmapped; or it could not unmap, and what it had mapped may
    /// still be used.
    pub fn fill<M: HostMappings>(
        &self,
        walker: &Walker,
        gfn: Gfn,
        access: Access,
        host: &mut M,
    ) -> Result<Filled, M::Error> {
        let mut state = self.state.lock();
        if state.find(gfn.0).is_some_and(|(_, entry)| entry.rights.contains(access)) {
            return Ok(Filled::Allowed);
        }
        let Some(translation) = walker.access(gfn, access) else { return Ok(Filled::NotAllowed) };
        // A mapping in the middle of another makes two more.
        state.limit(self.most - 2, host)?;
        let translation = state.missing(translation, gfn.0);
        if host.map(&translation).is_err() {
            // Perhaps for want of mappings; what is mapped there is not known.
            state.drop_everything(host)?;
            let pages = translation.gfn.0..translation.gfn.0 + translation.pages;
            host.map(&translation).inspect_err(|_| state.suspect(pages))?;
        }
        state.note(&translation);
        Ok(Filled::Allowed)
    }

    /// Drops every translation through one of `zapped`.
    ///
    /// # Errors
    /// The host's: some may still be used.
    pub fn flush<M: HostMappings>(&self, zapped: &[Zapped], host: &mut M) -> Result<(), M::Error> {
        let mut pages: Vec<_> = zapped.iter().map(Zapped::pages).collect();
        pages.sort_unstable_by_key(|pages| pages.start);
        let mut state = self.state.lock();
        state.drop_pages(pages.into_iter(), host)?;
        // Each page in the middle of an entry has made two of it.
        state.limit(self.most, host)
    }

    /// Drops all.
    ///
    /// # Errors
    /// As for [`flush`](Self::flush).
    pub fn flush_all<M: HostMappings>(&self, host: &mut M) -> Result<(), M::Error> {
        self.state.lock().drop_pages(std::iter::once(EVERYTHING), host)
    }

    /// What may be done at `gfn` now.
    pub fn rights(&self, gfn: Gfn) -> Access {
        self.state.lock().find(gfn.0).map_or(Access::empty(), |(_, entry)| entry.rights)
    }

    /// How often something was unmapped. While this stays the same, what was mapped stays mapped.
    pub fn drops(&self) -> u64 {
        self.state.lock().drops
    }

    /// The most entries that there can be.
    pub fn most(&self) -> usize {
        self.most
    }

    /// Entries now.
    pub fn len(&self) -> usize {
        self.state.lock().entries.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests;
