// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A CPU's page walk in software: [`access`](Walker::access) for engines whose CPU does not walk the shadow map itself, and
//! [`fetch`](Walker::fetch) for every engine that has to look at the guest's code.
//!
//! An access does to the tables what the CPU does: goes from the root to the leaf, sets A in the links on its way, A in the leaf, and D
//! there for a write; in a leaf that allows the access, and by compare-exchange, so that of two that race none loses the other's
//! marks (R11). It holds no lock of the shadow map, as the CPU holds none.
//!
//! A CPU has its walks ordered against flushes by the flush itself, which reaches each CPU. Here that is the caller's to do: a
//! walk and what is made of its result happen under a lock that the flush takes, too ([`SoftTlb`](super::SoftTlb)). Tables and
//! frames are freed after the flush only, so under that lock they stay. A table may be unlinked under it: it is empty then.

use super::Spte;
use super::entry;
use crate::addr::{Access, Gfn, Gpa, PAGE_SIZE, Pfn};
use crate::frame::FramePool;
use crate::sync::Arc;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::table::{ENTRIES, LOWER_HALF_PAGES, Link, TOP, Table, index};

/// Neighbouring pages in neighbouring frames, with the rights that all of them have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Translation {
    /// The first page.
    pub gfn: Gfn,
    /// How many.
    pub pages: u64,
    /// The first page's frame.
    pub pfn: Pfn,
    /// What may be done with them.
    pub rights: Access,
}

/// Walks the tables under one root.
#[derive(Debug, Clone)]
pub struct Walker {
    pool: Arc<FramePool>,
    root: Pfn,
}

/// What a cached translation of `spte` may allow, so that no access goes unmarked: nothing without A, and no write without D.
fn allowed_unseen(spte: Spte) -> Access {
    if !spte.is_leaf() || !spte.is_present() || !spte.is_accessed() {
        return Access::empty();
    }
    let mut rights = spte.rights();
    rights.set(Access::WRITE, spte.is_writable() && spte.is_dirty());
    rights
}

/// Reads a link.
fn look(entry: &AtomicU64) -> Link {
    Link(entry.load(Ordering::Acquire))
}

/// Reads a link and sets its A. Only while it is present: an empty table is unlinked before the flush, and a mark in the place of
/// a link that went would keep the next table from being linked there.
fn go_through(entry: &AtomicU64) -> Link {
    let mut link = look(entry);
    while link.is_present() && !link.is_accessed() {
        let marked = link.0 | Link::ACCESSED;
        match entry.compare_exchange(link.0, marked, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => return Link(marked),
            Err(now) => link = Link(now),
        }
    }
    link
}

impl Walker {
    /// For the tables under `root`, in frames of `pool`.
    pub fn new(pool: Arc<FramePool>, root: Pfn) -> Self {
        Self { pool, root }
    }

    /// The root table.
    pub fn root(&self) -> Pfn {
        self.root
    }

    /// The entries of the table at `pfn`; `None` where it is no frame of the pool.
    fn table(&self, pfn: Pfn) -> Option<&Table> {
        self.pool.contains(pfn).then(|| self.pool.words(pfn))
    }

    /// The leaf table for `gfn`; `follow` reads each link on the way.
    fn leaf_table(&self, gfn: Gfn, follow: impl Fn(&AtomicU64) -> Link) -> Option<&Table> {
        if gfn.0 >= LOWER_HALF_PAGES {
            return None;
        }
        let mut table = self.table(self.root)?;
        for level in (2..=TOP).rev() {
            let link = follow(&table[index(gfn.0, level)]);
            if !link.is_present() {
                return None;
            }
            table = self.table(link.pfn())?;
        }
        Some(table)
    }

    /// The access, as the CPU makes it: what the leaf of `gfn` translates to, with its neighbours as far as a cached translation
    /// may cover them without hiding an access from their marks. `None`: the shadow map does not allow it, a page fault.
    pub fn access(&self, gfn: Gfn, access: Access) -> Option<Translation> {
        let table = self.leaf_table(gfn, go_through)?;
        let at = index(gfn.0, 1);
        let leaf = entry::access(&table[at], access)?;
        if !self.pool.contains(leaf.pfn()) {
            return None;
        }
        let rights = allowed_unseen(leaf);
        let joins = |other: &usize| {
            let spte = Spte(table[*other].load(Ordering::Acquire));
            let expected = i64::from(leaf.pfn().0) + *other as i64 - at as i64;
            i64::from(spte.pfn().0) == expected
                && allowed_unseen(spte) == rights
                && self.pool.contains(spte.pfn())
        };
        let before = (0..at).rev().take_while(joins).count();
        let after = (at + 1..ENTRIES as usize).take_while(joins).count();
        Some(Translation {
            gfn: Gfn(gfn.0 - before as u64),
            pages: (before + 1 + after) as u64,
            pfn: Pfn(leaf.pfn().0 - before as u32),
            rights,
        })
    }

    /// Copies code of the guest: bytes from `at` on that the shadow map lets it fetch, up to the length of `bytes`. Returns how
    /// many there were. Nothing is marked. Without the lock that orders walks and flushes what is read is a guess, and safe to be
    /// wrong.
    pub fn fetch(&self, at: Gpa, bytes: &mut [u8]) -> usize {
        let mut done = 0;
        while done < bytes.len() {
            let Some(address) = at.checked_add(done as u64) else { break };
            let Some(table) = self.leaf_table(address.gfn(), look) else { break };
            let spte = Spte(table[index(address.gfn().0, 1)].load(Ordering::Acquire));
            if !spte.rights().contains(Access::EXEC) || !self.pool.contains(spte.pfn()) {
                break;
            }
            let frame = self.pool.words(spte.pfn());
            let from = (address.0 % PAGE_SIZE) as usize;
            let count = (PAGE_SIZE as usize - from).min(bytes.len() - done);
            for (byte, at) in bytes[done..done + count].iter_mut().zip(from..) {
                *byte = frame[at / 8].load(Ordering::Relaxed).to_le_bytes()[at % 8];
            }
            done += count;
        }
        done
    }
}

#[cfg(test)]
mod tests;
