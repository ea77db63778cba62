// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What should be in the arena, by Linux's rules: per page the mapping, its protection and its content.

use crate::content::Content;
use crate::rt::PAGE;
use crate::rt::fault::{BUS_ADRERR, SEGV_ACCERR, SEGV_MAPERR, SIGBUS, SIGSEGV};
use crate::rt::sys::{self, Errno, PROT_NONE, PROT_READ, PROT_RW, PROT_WRITE};

/// The largest arena. Object numbers fit into 16 bits.
pub const MAX_PAGES: usize = 4096;
/// The smallest arena, which must have room for any range.
pub const MIN_PAGES: usize = 64;
/// The longest range that one operation works on, before it grows.
pub const MAX_RANGE: usize = 16;
/// The most pages that mremap adds.
pub const MAX_GROWTH: usize = 8;

/// What one page of the arena is.
#[derive(Clone, Copy)]
pub enum Backing {
    /// Nothing is mapped.
    Free,
    /// Anonymous private memory with this content.
    Private(Content),
    /// Page `offset` of a shared anonymous object.
    Shared { object: u16, offset: u32 },
}

/// One page of the arena.
#[derive(Clone, Copy)]
pub struct Page {
    pub backing: Backing,
    pub prot: usize,
    /// This page and the next lie in one mapping for certain: one call made both, and nothing has set them
    /// apart since. Otherwise the kernel may or may not have merged them, and the model must not depend on
    /// it.
    pub joined: bool,
}

/// The pages behind a shared anonymous mapping. They live as long as any page of the arena, inside their
/// length or not, is mapped to the object, so unmapped ones come back when a mapping grows over them again.
#[derive(Clone, Copy)]
struct Object {
    /// Pages of the arena that are mapped to it; an object without is free to be used for another.
    mapped: usize,
    /// Its length in pages, for ever. An access behind it is a SIGBUS.
    pages: usize,
    contents: [Content; MAX_RANGE],
}

/// Whether two neighbours are in one mapping.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Border {
    Same,
    Different,
    Unknown,
}

pub struct Model {
    pub pages: &'static mut [Page],
    objects: &'static mut [Object],
}

impl Model {
    /// A model of an arena of that many pages. Its memory is mapped once and lies outside the arena.
    pub fn new(pages: usize) -> Result<Self, Errno> {
        let page = Page { backing: Backing::Free, prot: PROT_NONE, joined: false };
        let object = Object { mapped: 0, pages: 0, contents: [Content::ZERO; MAX_RANGE] };
        // Each object in use has a page of the arena, so there are never more objects than pages.
        Ok(Self { pages: table(pages, page)?, objects: table(pages, object)? })
    }

    /// Whether nothing at all is mapped in a range, which must lie in the arena.
    pub fn is_free(&self, first: usize, count: usize) -> bool {
        self.range(first, count).iter().all(|page| matches!(page.backing, Backing::Free))
    }

    /// Whether all of a range is mapped.
    pub fn is_mapped(&self, first: usize, count: usize) -> bool {
        self.range(first, count).iter().all(|page| !matches!(page.backing, Backing::Free))
    }

    fn range(&self, first: usize, count: usize) -> &[Page] {
        &self.pages[first..first + count]
    }

    /// The mapping around a mapped page, as far as it is certain: first page and length.
    pub fn mapping(&self, page: usize) -> (usize, usize) {
        let joined = |page: usize| self.pages[page].joined;
        let first = (0..page).rev().take_while(|&page| joined(page)).last().unwrap_or(page);
        let last = (page..self.pages.len()).find(|&page| !joined(page)).unwrap_or(page);
        (first, last - first + 1)
    }

    /// What is known of the border between a page and the next.
    pub fn border(&self, page: usize) -> Border {
        if self.pages[page].joined {
            return Border::Same;
        }
        let (this, Some(next)) = (&self.pages[page], self.pages.get(page + 1)) else {
            return Border::Different;
        };
        let alike = this.prot == next.prot
            && match (this.backing, next.backing) {
                (Backing::Private(_), Backing::Private(_)) => true,
                (Backing::Shared { object, offset }, Backing::Shared { object: other, offset: behind }) => {
                    object == other && offset + 1 == behind
                }
                _ => false,
            };
        if alike { Border::Unknown } else { Border::Different }
    }

    /// munmap.
    pub fn unmap(&mut self, first: usize, count: usize) {
        self.cut(first, count);
        for page in &mut self.pages[first..first + count] {
            if let Backing::Shared { object, .. } = page.backing {
                self.objects[usize::from(object)].mapped -= 1;
            }
            *page = Page { backing: Backing::Free, prot: PROT_NONE, joined: false };
        }
    }

    /// mmap at just this place, replacing what is there.
    pub fn map(&mut self, first: usize, count: usize, prot: usize, shared: bool) {
        self.unmap(first, count);
        let object = if shared { self.create(count) } else { 0 };
        for (offset, page) in self.pages[first..first + count].iter_mut().enumerate() {
            let backing = if shared {
                Backing::Shared { object: object as u16, offset: offset as u32 }
            } else {
                Backing::Private(Content::ZERO)
            };
            *page = Page { backing, prot, joined: offset + 1 < count };
        }
    }

    /// A new object, all of whose pages are about to be mapped.
    fn create(&mut self, pages: usize) -> usize {
        let unused = self.objects.iter().position(|object| object.mapped == 0);
        let number = unused.expect("there are fewer objects in use than pages");
        self.objects[number] = Object { mapped: pages, pages, contents: [Content::ZERO; MAX_RANGE] };
        number
    }

    /// mprotect: changes the pages before the first hole, and returns whether there was none.
    pub fn protect(&mut self, first: usize, count: usize, prot: usize) -> bool {
        let done =
            self.range(first, count).iter().take_while(|page| !matches!(page.backing, Backing::Free)).count();
        for page in &mut self.pages[first..first + done] {
            page.prot = prot;
        }
        for border in [first.checked_sub(1), (first + done).checked_sub(1)].into_iter().flatten() {
            let next = self.pages.get(border + 1);
            if next.is_some_and(|next| next.prot != self.pages[border].prot) {
                self.pages[border].joined = false;
            }
        }
        done == count
    }

    /// madvise(MADV_DONTNEED): private pages are zero again, shared ones keep what their object holds; holes
    /// are skipped. Returns whether there was none.
    pub fn drop_content(&mut self, first: usize, count: usize) -> bool {
        for page in &mut self.pages[first..first + count] {
            if let Backing::Private(content) = &mut page.backing {
                *content = Content::ZERO;
            }
        }
        self.is_mapped(first, count)
    }

    /// mremap to another place: `old` pages, at most `MAX_RANGE`, which are one mapping, become `new` pages
    /// at `to`. The places may overlap: for the kernel's mremap they must not, but two calls in a row can
    /// move by less.
    pub fn relocate(&mut self, from: usize, old: usize, to: usize, new: usize) {
        let kept = old.min(new);
        self.unmap(from + kept, old - kept);
        self.cut(from, kept);
        let hole = Page { backing: Backing::Free, prot: PROT_NONE, joined: false };
        let mut moved = [hole; MAX_RANGE];
        for (place, page) in moved.iter_mut().zip(&mut self.pages[from..from + kept]) {
            *place = core::mem::replace(page, hole);
        }
        self.unmap(to, new);
        for (offset, page) in moved[..kept].iter().enumerate() {
            self.pages[to + offset] = Page { joined: offset + 1 < kept, ..*page };
        }
        self.grow(to, kept, new);
    }

    /// mremap in place, from `old` to more pages; what is behind them is free.
    pub fn grow(&mut self, first: usize, old: usize, new: usize) {
        for page in first + old..first + new {
            let before = &mut self.pages[page - 1];
            before.joined = true;
            let mut next = Page { joined: false, ..*before };
            match &mut next.backing {
                Backing::Free => {}
                Backing::Private(content) => *content = Content::ZERO,
                Backing::Shared { object, offset } => {
                    *offset += 1;
                    self.objects[usize::from(*object)].mapped += 1;
                }
            }
            self.pages[page] = next;
        }
    }

    /// Ends mappings at the ends of a range.
    fn cut(&mut self, first: usize, count: usize) {
        for border in [first.checked_sub(1), (first + count).checked_sub(1)].into_iter().flatten() {
            self.pages[border].joined = false;
        }
    }

    /// The content of a page as an access sees it, or the signal and code that the access earns. On x86 what
    /// may be written may also be read.
    pub fn content(&mut self, page: usize, write: bool) -> Result<&mut Content, (u32, u32)> {
        let Page { backing, prot, .. } = &mut self.pages[page];
        let needed = if write { PROT_WRITE } else { PROT_RW };
        match backing {
            Backing::Free => Err((SIGSEGV, SEGV_MAPERR)),
            _ if *prot & needed == PROT_NONE => Err((SIGSEGV, SEGV_ACCERR)),
            Backing::Private(content) => Ok(content),
            Backing::Shared { object, offset } => {
                let object = &mut self.objects[usize::from(*object)];
                let offset = *offset as usize;
                if offset < object.pages {
                    Ok(&mut object.contents[offset])
                } else {
                    Err((SIGBUS, BUS_ADRERR))
                }
            }
        }
    }

    /// Text for a page's protection.
    pub const fn rights(prot: usize) -> &'static str {
        match prot {
            PROT_NONE => "none",
            PROT_READ => "r",
            PROT_WRITE => "w",
            PROT_RW => "rw",
            _ => "?",
        }
    }
}

/// Maps memory for `count` values and fills it with copies of `value`.
fn table<T: Copy>(count: usize, value: T) -> Result<&'static mut [T], Errno> {
    let start: *mut T =
        sys::map_anywhere((count * size_of::<T>()).next_multiple_of(PAGE), PROT_RW)? as *mut T;
    for index in 0..count {
        // SAFETY: the mapping is new, long enough and aligned for any type.
        unsafe { start.wrapping_add(index).write(value) };
    }
    // SAFETY: all values have just been written, the mapping is never taken away, and nobody else knows of
    // it.
    Ok(unsafe { core::slice::from_raw_parts_mut(start, count) })
}
