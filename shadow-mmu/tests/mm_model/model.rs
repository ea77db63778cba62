// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What an address space is, page by page, in as few lines as possible.

use super::common::{READ, RW, TestFile};
use super::script::{FILE_PAGES, HEAP, What, Where, hva, page_of};
use shadow_mmu::addr::{Access, PAGE_SIZE};
use shadow_mmu::mm::{Advice, FaultError, MMAP_BASE, MmError, RemapFlags, Trap};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Content {
    Anonymous(u64),
    /// Page of the file, and the word of a private copy.
    File(u64, Option<u64>),
    /// Shared object and page of it.
    Shared(usize, u64),
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Page {
    pub(super) prot: Access,
    pub(super) heap: bool,
    pub(super) random: bool,
    pub(super) dont_fork: bool,
    pub(super) mergeable: bool,
    /// Accessed since it was last aged: it may be young. What was not, must not be.
    pub(super) touched: bool,
    pub(super) trap: Option<Trap>,
    pub(super) content: Content,
}

impl Page {
    /// The page `n` pages on in the same mapping, as it is before anything is written.
    pub(super) fn fresh(&self, n: u64) -> Self {
        let content = match self.content {
            Content::Anonymous(_) => Content::Anonymous(0),
            Content::File(index, _) => Content::File(index + n, None),
            Content::Shared(object, index) => Content::Shared(object, index + n),
        };
        Self { content, touched: false, trap: None, ..self.clone() }
    }
    fn continues_as(&self, next: &Self) -> bool {
        self.fresh(1) == next.fresh(0)
    }
    fn allows(&self, access: Access) -> bool {
        access.is_empty() || !self.prot.is_empty() && (self.prot | READ).contains(access)
    }
    pub(super) fn is_shared(&self) -> bool {
        matches!(self.content, Content::Shared(..))
    }
}

/// Pages, and the words they begin with.
pub(super) type SharedMemory = (u64, BTreeMap<u64, u64>);

pub(super) type Result<T, E = MmError> = std::result::Result<T, E>;

#[derive(Debug, Clone, Default)]
pub(super) struct Model {
    pub(super) pages: BTreeMap<u64, Page>,
    /// One list for a family of spaces: clones share it.
    pub(super) objects: Rc<RefCell<Vec<SharedMemory>>>,
    pub(super) brk: u64,
}

impl Model {
    fn is_free(&self, range: Range<u64>) -> bool {
        self.pages.range(range).next().is_none()
    }
    fn find_free(&self, len: u64) -> u64 {
        (0..MMAP_BASE.page() - len).rev().map(|n| n + 1).find(|&at| self.is_free(at..at + len)).unwrap()
    }
    /// Runs of pages that are one mapping.
    pub(super) fn runs(&self) -> Vec<(Range<u64>, &Page)> {
        let mut runs: Vec<(Range<u64>, &Page)> = Vec::new();
        for (&at, page) in &self.pages {
            match runs.last_mut() {
                Some((run, _)) if run.end == at && self.pages[&(at - 1)].continues_as(page) => run.end += 1,
                _ => runs.push((at..at + 1, page)),
            }
        }
        runs
    }
    pub(super) fn word(&self, page: &Page) -> u64 {
        match &page.content {
            Content::Anonymous(word) => *word,
            Content::File(index, copy) => copy.unwrap_or(TestFile::tag(*index)),
            Content::Shared(object, index) => {
                self.objects.borrow()[*object].1.get(index).copied().unwrap_or(0)
            }
        }
    }
    /// Where the mapping that holds page `at` ends.
    fn run_end(&self, at: u64) -> u64 {
        self.runs().iter().map(|(run, _)| run.clone()).find(|run| run.contains(&at)).unwrap().end
    }
    /// What an access must find.
    pub(super) fn access(&self, at: u64, access: Access) -> Result<u64, FaultError> {
        let page = self.pages.get(&at).ok_or(FaultError::NoMapping)?;
        match page.content {
            _ if !page.allows(access) => Err(FaultError::NoAccess),
            _ if page.trap.is_some() => Err(page.trap.unwrap().into()),
            Content::File(index, None) if index >= FILE_PAGES => Err(FaultError::BusError),
            Content::Shared(object, index) if index >= self.objects.borrow()[object].0 => {
                Err(FaultError::BusError)
            }
            _ => Ok(self.word(page)),
        }
    }
    /// Somebody has accessed `range`, or tried to.
    pub(super) fn touch(&mut self, range: Range<u64>) {
        self.pages.range_mut(range).for_each(|(_, page)| page.touched = true);
    }
    /// The marks of `range` go; whether some page may have been young.
    pub(super) fn age(&mut self, range: Range<u64>) -> bool {
        self.pages.range_mut(range).fold(false, |young, (_, page)| std::mem::take(&mut page.touched) | young)
    }
    /// What a child begins with.
    pub(super) fn fork(&self) -> Self {
        let mut child = self.clone();
        child.pages.retain(|_, page| !page.dont_fork);
        child.pages.values_mut().for_each(|page| page.touched = false);
        child
    }
    pub(super) fn write(&mut self, at: u64, value: u64) {
        match &mut self.pages.get_mut(&at).unwrap().content {
            Content::Anonymous(word) => *word = value,
            Content::File(_, copy) => *copy = Some(value),
            Content::Shared(object, index) => _ = self.objects.borrow_mut()[*object].1.insert(*index, value),
        }
    }

    pub(super) fn map(&mut self, place: Where, len: u64, prot: Access, what: What) -> Result<u64> {
        let at = match place {
            Where::Hint(spot) if self.is_free(page_of(spot)..page_of(spot) + len) => page_of(spot),
            Where::Anywhere | Where::Hint(_) => self.find_free(len),
            Where::NoReplace(spot) if !self.is_free(page_of(spot)..page_of(spot) + len) => {
                return Err(MmError::Exists);
            }
            Where::Fixed(spot) | Where::NoReplace(spot) => page_of(spot),
        };
        self.unmap(at, len);
        let content = match what {
            What::Private => Content::Anonymous(0),
            What::File { from } => Content::File(from, None),
            What::Shared => {
                let mut objects = self.objects.borrow_mut();
                objects.push((len, BTreeMap::new()));
                Content::Shared(objects.len() - 1, 0)
            }
        };
        let first = Page {
            prot,
            heap: false,
            random: false,
            dont_fork: false,
            mergeable: false,
            touched: false,
            trap: None,
            content,
        };
        self.pages.extend((0..len).map(|n| (at + n, first.fresh(n))));
        Ok(at)
    }
    pub(super) fn unmap(&mut self, at: u64, len: u64) {
        self.pages.retain(|page, _| !(at..at + len).contains(page));
    }
    /// Sets a trap; poison takes the content away. Returns at how many pages.
    pub(super) fn trap(&mut self, range: Range<u64>, trap: Trap) -> u64 {
        let mut pages = 0;
        for (_, page) in self.pages.range_mut(range) {
            if trap == Trap::Poison {
                *page = page.fresh(0);
            }
            page.trap = Some(trap);
            pages += 1;
        }
        pages
    }
    pub(super) fn untrap(&mut self, range: Range<u64>, trap: Trap) -> u64 {
        let trapped = self.pages.range_mut(range).filter(|(_, page)| page.trap == Some(trap));
        trapped.map(|(_, page)| page.trap = None).count() as u64
    }
    /// Changes pages one by one up to the first hole, which is an error.
    pub(super) fn each(
        &mut self,
        range: Range<u64>,
        mut change: impl FnMut(&mut Page) -> Result<()>,
    ) -> Result<()> {
        range.into_iter().try_for_each(|at| change(self.pages.get_mut(&at).ok_or(MmError::NoMemory)?))
    }
    pub(super) fn remap(
        &mut self,
        old: u64,
        mut old_len: u64,
        len: u64,
        flags: RemapFlags,
        to: u64,
    ) -> Result<u64> {
        let [fixed, keep, may_move] =
            [RemapFlags::FIXED, RemapFlags::DONTUNMAP, RemapFlags::MAYMOVE].map(|flag| flags.contains(flag));
        let overlap = to < old + old_len && old < to + len;
        if (fixed || keep) && (!may_move || overlap) || keep && old_len != len || len == 0 {
            return Err(MmError::Invalid);
        }
        let first = self.pages.get(&old).ok_or(MmError::Fault)?.clone();
        if fixed || keep || len > old_len {
            if old_len == 0 && !first.is_shared() {
                return Err(MmError::Invalid);
            }
            if old + old_len.min(len) > self.run_end(old) {
                return Err(MmError::Fault);
            }
        }
        self.remap_clear(old, old_len, len, flags, to);
        old_len = old_len.min(len);
        if !fixed && !keep && old_len == len {
            return Ok(old);
        }
        // With an old length of 0, it may have been in the target.
        self.pages.get(&old).ok_or(MmError::Fault)?;
        let end = self.run_end(old);
        if !fixed && !keep && old_len > 0 && end == old + old_len && self.is_free(end..old + len) {
            self.pages.extend((old_len..len).map(|n| (old + n, first.fresh(n))));
            return Ok(old);
        }
        if !may_move {
            return Err(MmError::NoMemory);
        }
        let at = if fixed || keep && self.is_free(to..to + len) { to } else { self.find_free(len) };
        for n in 0..len {
            let mut page = first.fresh(n);
            if n < old_len {
                page = self.pages[&(old + n)].clone();
                if keep {
                    self.pages.insert(old + n, page.fresh(0));
                } else {
                    self.pages.remove(&(old + n));
                }
            }
            self.pages.insert(at + n, Page { heap: false, ..page });
        }
        Ok(at)
    }
    /// What mremap does before it can fail for want of memory.
    pub(super) fn remap_clear(&mut self, old: u64, old_len: u64, len: u64, flags: RemapFlags, to: u64) {
        if flags.contains(RemapFlags::FIXED) {
            self.unmap(to, len);
        }
        self.unmap(old + len, old_len.saturating_sub(len));
    }
    pub(super) fn advise(&mut self, range: Range<u64>, advice: Advice) -> Result<()> {
        let hole = range.clone().any(|at| !self.pages.contains_key(&at));
        let mapped: Vec<u64> = self.pages.range(range).map(|(&at, _)| at).collect();
        let populate = matches!(advice, Advice::PopulateRead | Advice::PopulateWrite);
        if populate && hole {
            return Err(MmError::NoMemory);
        }
        for at in mapped {
            let page = self.pages[&at].clone();
            match (advice, &page.content) {
                (Advice::Free, Content::Anonymous(_)) | (Advice::DontNeed, _) => {
                    let trap = page.trap.filter(|trap| *trap != Trap::Poison);
                    self.pages.insert(at, Page { trap, ..page.fresh(0) });
                }
                (Advice::Remove, Content::Shared(object, index)) => {
                    self.objects.borrow_mut()[*object].1.remove(index);
                }
                (Advice::Remove, Content::File(..)) => return Err(MmError::Access),
                (Advice::Free | Advice::Remove, _) => return Err(MmError::Invalid),
                (Advice::Random, _) => self.pages.get_mut(&at).unwrap().random = true,
                (Advice::Normal, _) => self.pages.get_mut(&at).unwrap().random = false,
                (Advice::PopulateRead | Advice::PopulateWrite, _) => {
                    self.touch(at..at + 1);
                    let access = if advice == Advice::PopulateRead { READ } else { RW };
                    self.access(at, access).map_err(|error| match error {
                        FaultError::BusError => MmError::Fault,
                        FaultError::Poisoned => MmError::Poisoned,
                        _ => MmError::Invalid,
                    })?;
                }
                (Advice::DontFork, _) => self.pages.get_mut(&at).unwrap().dont_fork = true,
                (Advice::DoFork, _) => self.pages.get_mut(&at).unwrap().dont_fork = false,
                (Advice::Mergeable, content) => {
                    let mergeable = !matches!(content, Content::Shared(..));
                    self.pages.get_mut(&at).unwrap().mergeable |= mergeable;
                }
                (Advice::Unmergeable, _) => self.pages.get_mut(&at).unwrap().mergeable = false,
                (Advice::NoEffect, _) => {}
            }
        }
        if hole { Err(MmError::NoMemory) } else { Ok(()) }
    }
    pub(super) fn brk(&mut self, to: u64) -> u64 {
        let (start, ceil) = (hva(page_of(HEAP)).0, |bytes: u64| bytes.div_ceil(PAGE_SIZE));
        let (old, new) = (ceil(self.brk), ceil(to));
        // Upward there must be room and a page beyond, downward something to unmap.
        let stuck = new > old && !self.is_free(old..new + 1) || new < old && self.is_free(new..old);
        if to < start || stuck {
            return self.brk;
        }
        self.unmap(new, old.saturating_sub(new));
        let content = Content::Anonymous(0);
        let page = Page {
            prot: RW,
            heap: true,
            random: false,
            dont_fork: false,
            mergeable: false,
            touched: false,
            trap: None,
            content,
        };
        self.pages.extend((old..new).map(|at| (at, page.clone())));
        self.brk = to;
        to
    }
}
