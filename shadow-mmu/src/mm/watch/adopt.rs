// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Taking a mapping of the host in: checks, alias, registration, slot, VMA, in that order; what fails undoes what was done.
//!
//! The alias of a shared mapping is made before the range is registered and before any lock is taken: mremap of registered
//! memory is an event, and waits for the watch.

use super::slots::{Anonymous, Piece, State};
use super::uffd::Mode;
use super::{Watch, is_page_range, maps};
use crate::addr::{Access, Hva, HvaRange, PAGE_SIZE, TASK_SIZE};
use crate::mm::vma::{MAX_MAP_COUNT, MMAP_MIN_ADDR};
use crate::mm::{Backing, MMAP_BASE, Map, Mm, MmError, Vma, VmaFlags};
use crate::sync::Arc;
use std::io;
use std::ops::Range;
use std::time::Duration;

/// Why a mapping cannot be adopted. Nothing has changed then.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    /// Empty, or not whole pages.
    #[error("[{:#x}, {:#x}) is empty or not page aligned: adopt whole pages of 4 KiB", .0.start, .0.end)]
    Range(Range<u64>),
    /// A part of it is not mapped.
    #[error("[{:#x}, {:#x}) is not all mapped in this process", .0.start, .0.end)]
    NotMapped(Range<u64>),
    /// It lies in more than one mapping.
    #[error("[{:#x}, {:#x}) is not one mapping but {count}: adopt them one by one", .range.start, .range.end)]
    Several {
        /// What was asked for.
        range: Range<u64>,
        /// Mappings in it.
        count: usize,
    },
    /// The host's mapping does not allow what the guest is to have.
    #[error("[{:#x}, {:#x}) does not allow {wanted} to this process itself", .range.start, .range.end)]
    Access {
        /// What was asked for.
        range: Range<u64>,
        /// What the guest was to have.
        wanted: Access,
    },
    /// It is adopted already.
    #[error("a part of [{:#x}, {:#x}) is adopted already", .0.start, .0.end)]
    Adopted(Range<u64>),
    /// The watch is over another address space.
    #[error("the watch given is that of another address space")]
    OtherSpace,
    /// The kernel sends no events about such memory.
    #[error(
        "[{:#x}, {:#x}) cannot be watched ({source}): before Linux 6.7 private files cannot, a shared file must be open for \
         writing, and nobody else may have the range registered with userfaultfd", .range.start, .range.end
    )]
    Unwatchable {
        /// What was asked for.
        range: Range<u64>,
        /// The kernel's word.
        source: io::Error,
    },
    /// The guest has no room there.
    #[error("no room in the guest's address space: {0}")]
    Guest(#[from] MmError),
    /// The host refused something else.
    #[error("cannot {what}: {source}")]
    Host {
        /// The step.
        what: &'static str,
        /// The host's word.
        source: io::Error,
    },
}

/// How long [`Mm::adopt`] waits for others to pause.
const SETTLE_LIMIT: Duration = Duration::from_secs(5);

impl State {
    fn check_free(&self, host: &Range<u64>) -> Result<(), AdoptError> {
        let taken = |piece: &Piece| piece.host.start < host.end && host.start < piece.host.end;
        if self.pieces.iter().any(taken) { Err(AdoptError::Adopted(host.clone())) } else { Ok(()) }
    }
}

impl Mm {
    /// Shows the host's mapping at `host` (addresses of this process) to the guest, at `at` if given, else anywhere, with the
    /// rights `access`. Returns where. `watch` sees to it that the view stays true.
    ///
    /// `host` must lie in one mapping, and may be a part of it. What the guest writes is written there, also where the host's
    /// mapping is private: as if this process had written it.
    ///
    /// # Errors
    /// [`AdoptError`].
    ///
    /// # Safety
    /// From now on the guest may read the memory, and with [`Access::WRITE`] write it, at any moment, until the mapping is
    /// unmapped or the watch is dropped.
    /// * Nothing that Rust relies on may lie in it: no references other than to atomics or by volatile access, with
    ///   [`Access::WRITE`] no value that could become invalid; read-only, nothing that the guest must not learn.
    /// * Nobody moves a private mapping again, or maps anything over its new place, before the call that moved it there has
    ///   returned: of two threads' events the later may be read first, and the guest would go on seeing the place in between.
    /// * For a private mapping: from its unmapping (or moving, or mapping something over it) by anybody until the
    ///   watch has handled that ([`Watch::settle`]), nothing that the guest must not see or write may be mapped at the same
    ///   addresses.
    pub unsafe fn adopt(
        &self,
        watch: &Watch,
        host: Range<u64>,
        access: Access,
        at: Option<Hva>,
    ) -> Result<Hva, AdoptError> {
        let watcher = &*watch.watcher;
        if !std::ptr::eq(self, Arc::as_ptr(&watcher.mm)) {
            return Err(AdoptError::OtherSpace);
        }
        if !is_page_range(&host) {
            return Err(AdoptError::Range(host));
        }
        let failed = |what| move |source| AdoptError::Host { what, source };
        // What was unmapped here before is forgotten, or its late event would be taken for one of the new mapping.
        watch
            .settle(SETTLE_LIMIT)
            .map_err(failed("wait for a moment in which nobody changes adopted memory"))?;
        {
            let map = self.map.write();
            let mut state = watcher.state.lock();
            watcher.prune(&map, &mut state);
            state.check_free(&host)?;
        }
        let shared = check_mapping(&host, access)?;
        // What was moved or grown may be registered still, and an alias of registered memory is an event for nobody but us.
        let _ = watcher.uffd.unregister(&host);
        let alias = if shared {
            let alias = Anonymous::alias(&host).map_err(failed("map the memory a second time"))?;
            // Were the original registered, its copy would be as well, and unmapping it an event.
            match watcher.uffd.unregister(&alias.range()) {
                // Of a kind that only a registered mapping can be unregistered of, so it is not.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                result => result.map_err(failed("stop watching an alias"))?,
            }
            Some(alias)
        } else {
            None
        };

        let mut map = self.map.write();
        let mut state = watcher.state.lock();
        watcher.prune(&map, &mut state);
        state.check_free(&host)?;
        let range = place(&map, host.end - host.start, at)?;
        let registered = watcher.uffd.register(&host, Mode::WriteProtect);
        registered.map_err(|source| AdoptError::Unwatchable { range: host.clone(), source })?;
        // SAFETY: the caller's promise.
        let first = match unsafe { watcher.add_slot(&mut state, &host, alias, access) } {
            Ok(first) => first,
            Err(source) => {
                let _ = watcher.uffd.unregister(&host);
                return Err(AdoptError::Host { what: "give the guest a slot for it", source });
            }
        };
        state.pieces.push(Piece { host, first });
        // Shared, as far as the guest is concerned: what it writes is not its own. Not for children: this watch is not over them.
        let mut flags = VmaFlags::SHARED | VmaFlags::DONT_FORK;
        flags.set(VmaFlags::MAY_NOT_WRITE, !access.contains(Access::WRITE));
        let backing = Backing::Adopted { first: crate::addr::Pfn(first) };
        map.vmas.insert(Vma { range, prot: access, flags, backing });
        Ok(range.start)
    }

    /// Where the guest sees frame `pfn` of an adopted mapping; `None` if it does not any more.
    pub fn adopted_at(&self, pfn: crate::addr::Pfn) -> Option<Hva> {
        let map = self.map.read();
        map.vmas.iter().find_map(|vma| {
            let first = vma.adopted_pfn(vma.range.start)?;
            let index = u64::from(pfn.0.checked_sub(first.0)?);
            (index < vma.range.page_count()).then(|| Hva(vma.range.start.0 + index * PAGE_SIZE))
        })
    }
}

/// Whether the one mapping that `host` lies in is shared, if it allows `access`.
fn check_mapping(host: &Range<u64>, access: Access) -> Result<bool, AdoptError> {
    let source = |source| AdoptError::Host { what: "read /proc/self/maps", source };
    let mappings = maps::mappings_of(host).map_err(source)?;
    let mapped: u64 =
        mappings.iter().map(|one| one.range.end.min(host.end) - one.range.start.max(host.start)).sum();
    if mapped < host.end - host.start {
        return Err(AdoptError::NotMapped(host.clone()));
    }
    let [mapping] = &mappings[..] else {
        return Err(AdoptError::Several { range: host.clone(), count: mappings.len() });
    };
    if !mapping.readable || access.contains(Access::WRITE) && !mapping.writable {
        return Err(AdoptError::Access { range: host.clone(), wanted: access });
    }
    Ok(mapping.shared)
}

/// Where in the guest `len` bytes go.
fn place(map: &Map, len: u64, at: Option<Hva>) -> Result<HvaRange, MmError> {
    if map.vmas.count() >= MAX_MAP_COUNT {
        return Err(MmError::NoMemory);
    }
    let start = match at {
        Some(at) if !at.is_page_aligned() || at.0 < MMAP_MIN_ADDR || at.0 >= TASK_SIZE => {
            return Err(MmError::Invalid);
        }
        Some(at) => at,
        None => map.vmas.find_free(len, MMAP_BASE).ok_or(MmError::NoMemory)?,
    };
    let end = start.checked_add(len).filter(|end| end.0 <= TASK_SIZE).ok_or(MmError::NoMemory)?;
    let range = HvaRange { start, end };
    if map.vmas.is_free(range) { Ok(range) } else { Err(MmError::Exists) }
}
