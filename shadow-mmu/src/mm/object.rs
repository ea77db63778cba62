// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A memory object: pages that exist apart from any mapping. A file's page cache, or shared anonymous memory.
//!
//! Lock: `pages`, taken below the mmap lock and never together with a page-table lock. Reading a file happens under it, so
//! that a page is read once however many threads fault on it.

use crate::addr::{PAGE_SIZE, Pfn};
use crate::frame::{Fill, FramePool, OutOfFrames};
use crate::sync::{Arc, Mutex};
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::io;

/// Where the bytes of a file mapping come from.
pub trait FileSource: Debug + Send + Sync {
    /// Bytes in the file now.
    fn len(&self) -> u64;
    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Reads at `offset`, as `pread` does: fewer bytes than asked for at the end of the file.
    ///
    /// # Errors
    /// The file's own.
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<usize>;
    /// What to call the mapping in reports.
    fn name(&self) -> &str;
}

/// Why an object has no such page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoPage {
    /// The page lies behind the end of the file.
    PastEnd,
    /// The file could not be read.
    Io,
    /// No frame is free.
    OutOfFrames,
}

impl From<OutOfFrames> for NoPage {
    fn from(_: OutOfFrames) -> Self {
        Self::OutOfFrames
    }
}

/// What an object's pages are made of at first.
#[derive(Debug)]
enum Origin {
    File(Arc<dyn FileSource>),
    /// Zeros; this many pages, for mremap may make a mapping longer than what it maps.
    Zeros {
        pages: u64,
    },
}

/// Pages shared by every mapping of this object.
#[derive(Debug)]
pub struct Object {
    pool: Arc<FramePool>,
    origin: Origin,
    /// By page offset. The object holds one reference to each frame.
    pages: Mutex<BTreeMap<u64, Pfn>>,
}

impl Object {
    /// The page cache of a file, empty.
    pub fn file(pool: &Arc<FramePool>, source: Arc<dyn FileSource>) -> Arc<Self> {
        Arc::new(Self { pool: Arc::clone(pool), origin: Origin::File(source), pages: Mutex::default() })
    }

    /// Shared anonymous memory of `pages` pages: zeros until written.
    pub fn shared_memory(pool: &Arc<FramePool>, pages: u64) -> Arc<Self> {
        Arc::new(Self { pool: Arc::clone(pool), origin: Origin::Zeros { pages }, pages: Mutex::default() })
    }

    /// What to call a mapping of it in reports.
    pub fn name(&self) -> &str {
        match &self.origin {
            Origin::File(source) => source.name(),
            Origin::Zeros { .. } => "[shared]",
        }
    }

    /// The frame of page `page`, read in if it must be, with a reference for the caller.
    ///
    /// # Errors
    /// [`NoPage`].
    pub fn page(&self, page: u64) -> Result<Pfn, NoPage> {
        let mut pages = self.pages.lock();
        if let Some(&pfn) = pages.get(&page) {
            self.pool.get(pfn);
            return Ok(pfn);
        }
        let pfn = match &self.origin {
            Origin::File(source) => self.read_in(source.as_ref(), page)?,
            Origin::Zeros { pages } if page >= *pages => return Err(NoPage::PastEnd),
            Origin::Zeros { .. } => self.pool.alloc(Fill::Zeros)?,
        };
        pages.insert(page, pfn);
        self.pool.get(pfn);
        Ok(pfn)
    }

    fn read_in(&self, source: &dyn FileSource, page: u64) -> Result<Pfn, NoPage> {
        let offset = page.checked_mul(PAGE_SIZE).ok_or(NoPage::PastEnd)?;
        if offset >= source.len() {
            return Err(NoPage::PastEnd);
        }
        let mut bytes = [0; PAGE_SIZE as usize];
        let mut filled = 0;
        while filled < bytes.len() {
            match source.read_at(offset + filled as u64, &mut bytes[filled..]) {
                Ok(0) => break,
                Ok(read) => filled += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    log::warn!("cannot read {} at {offset:#x}: {error}", source.name());
                    return Err(NoPage::Io);
                }
            }
        }
        let pfn = self.pool.alloc(Fill::Overwritten)?;
        self.pool.slice(pfn).copy_from(&bytes);
        Ok(pfn)
    }

    /// The frame of page `page` if it is there already, with a reference for the caller.
    pub fn cached_page(&self, page: u64) -> Option<Pfn> {
        let pages = self.pages.lock();
        let pfn = *pages.get(&page)?;
        self.pool.get(pfn);
        Some(pfn)
    }

    /// Drops pages `pages` (a hole is punched): the next look finds zeros. For shared memory only; a file's pages come
    /// back from the file. The caller has unmapped them everywhere.
    pub fn drop_pages(&self, range: std::ops::Range<u64>) {
        let mut pages = self.pages.lock();
        let dropped: Vec<_> = pages.range(range).map(|(&page, &pfn)| (page, pfn)).collect();
        dropped.iter().for_each(|(page, _)| {
            pages.remove(page);
        });
        drop(pages);
        self.pool.put_all(&dropped.iter().map(|&(_, pfn)| pfn).collect::<Vec<_>>());
    }
}

impl Drop for Object {
    fn drop(&mut self) {
        let pages: Vec<_> = self.pages.lock().values().copied().collect();
        self.pool.put_all(&pages);
    }
}
