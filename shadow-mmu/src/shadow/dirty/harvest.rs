// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Reports: taking records, and arming the pages again. See the [module](super) for the order.
//!
//! A report goes through the slot 128 MiB at a time, each under its own hold of `mmu_lock` for writing, with its own flush in
//! it; so a fault waits for one part at most. The log is no snapshot of one moment, as KVM's is none: what it promises, it
//! promises for each page.

use super::pages::{PART, WORDS, bits, place};
use super::{DirtyGfn, DirtyLog, DirtyLogError, DirtyMethod, DirtyPages, ProtectOn};
use crate::addr::Gfn;
use crate::shadow::gather::Gather;
use crate::shadow::{Core, Memslot, ShadowMmu, SlotError, Spte, entry};
use crate::sync::Arc;
use crate::sync::atomic::{AtomicU64, Ordering};
use std::collections::BTreeMap;
use std::ops::Range;

type Words = [u64; WORDS];
const EVERY: Words = [!0; WORDS];

impl ShadowMmu {
    fn logged(&self, slot: Gfn) -> Result<(Memslot, Arc<DirtyLog>), DirtyLogError> {
        let slots = self.slots();
        let memslot = slots.find(slot).filter(|found| found.gfn == slot);
        let memslot = *memslot.ok_or(SlotError::Missing(slot))?;
        let log = slots.log_of(slot).ok_or(DirtyLogError::NotLogged(slot))?;
        Ok((memslot, Arc::clone(log)))
    }

    /// The pages written since they were reported or, with [`ProtectOn::Clear`], cleared (`KVM_GET_DIRTY_LOG`). With
    /// [`ProtectOn::Get`] they are armed again: from the return on, each further write is reported anew (I32).
    ///
    /// # Errors
    /// [`DirtyLogError`]: no such slot, or it is not logged, or its log ended meanwhile.
    pub fn get_dirty_log(&self, slot: Gfn) -> Result<DirtyPages, DirtyLogError> {
        let (memslot, log) = self.logged(slot)?;
        let core = &*self.core;
        let mut pages = DirtyPages::default();
        let mut next = 0;
        while let Some(part) = core.next_part(&memslot, &log, next) {
            match log.config.protect {
                ProtectOn::Get => {
                    let _exclusive = core.windows.write();
                    core.still_logs(&log)?;
                    let mut gather = Gather::new(core.tlb.as_ref());
                    let taken = core.take_and_arm(&memslot, &log, part, &EVERY, &mut gather);
                    // Before the lock goes, and before anybody is told (R12, R20b).
                    core.finish(gather);
                    or_into(&taken, &mut pages, part);
                }
                ProtectOn::Clear => {
                    // Nothing is taken, so nothing is excluded but the removal of tables.
                    let _stable = core.windows.read();
                    core.still_logs(&log)?;
                    let mut words = [0; WORDS];
                    log.bitmap.copy(part, &mut words);
                    if log.config.method == DirtyMethod::DirtyBit {
                        core.for_each_entry(&memslot, part, &EVERY, |page, _, leaf| {
                            let dirty = Spte(leaf.load(Ordering::Acquire)).is_dirty();
                            words[page / 64] |= u64::from(dirty) << (page % 64);
                        });
                    }
                    or_into(&words, &mut pages, part);
                }
            }
            next = part + 1;
        }
        // Last, as what D told of moves here and never back. And whoever found nothing at all must have looked at a log that
        // is there.
        let exclusive = core.windows.write();
        core.still_logs(&log)?;
        let whole = match log.config.protect {
            ProtectOn::Clear => log.bitmap.whole(),
            ProtectOn::Get => {
                let taken = log.bitmap.take_whole(0..memslot.pages);
                let mut gather = Gather::new(core.tlb.as_ref());
                taken.iter().for_each(|run| core.arm_run(&memslot, &log, run, &mut gather));
                core.finish(gather);
                taken
            }
        };
        drop(exclusive);
        whole.iter().for_each(|run| pages.add_whole(run));
        Ok(pages)
    }

    /// Clears the records of those of `pages`, by offset in the slot, that `dirty` has, and arms them again
    /// (`KVM_CLEAR_DIRTY_LOG`). From the return on, each further write is reported anew (I32); so the reader copies pages
    /// behind it.
    ///
    /// # Errors
    /// [`DirtyLogError`]; `pages` must begin at a multiple of 64, and end at one or with the slot.
    pub fn clear_dirty_log(
        &self,
        slot: Gfn,
        pages: Range<u64>,
        dirty: &DirtyPages,
    ) -> Result<(), DirtyLogError> {
        let (memslot, log) = self.logged(slot)?;
        if log.config.protect == ProtectOn::Get {
            return Err(DirtyLogError::ClearedByGet);
        }
        let aligned = |page: u64| page.is_multiple_of(64) || page == memslot.pages;
        if !pages.start.is_multiple_of(64) || !aligned(pages.end) || pages.end > memslot.pages {
            return Err(DirtyLogError::Range { start: pages.start, end: pages.end });
        }
        let core = &*self.core;
        for (part, words) in dirty.parts() {
            let mut wanted = *words;
            let mut any = 0;
            for (at, word) in wanted.iter_mut().enumerate() {
                let first = part * PART + at as u64 * 64;
                *word = if pages.contains(&first) { *word } else { 0 };
                any |= *word;
            }
            if any != 0 {
                let _exclusive = core.windows.write();
                core.still_logs(&log)?;
                log.bitmap.give_bits_of_its_own(part);
                let mut gather = Gather::new(core.tlb.as_ref());
                core.take_and_arm(&memslot, &log, part, &wanted, &mut gather);
                core.finish(gather);
            }
        }
        for run in dirty.whole_runs() {
            let run = run.start.max(pages.start)..run.end.min(pages.end);
            if run.is_empty() {
                continue;
            }
            let _exclusive = core.windows.write();
            core.still_logs(&log)?;
            let mut gather = Gather::new(core.tlb.as_ref());
            log.bitmap.take_whole(run.clone());
            let mut next = run.start / PART;
            while let Some(part) = log.bitmap.next_part(next).filter(|part| part * PART < run.end) {
                log.bitmap.take(part, &words_of(part, &run));
                next = part + 1;
            }
            core.arm_run(&memslot, &log, run, &mut gather);
            core.finish(gather);
        }
        Ok(())
    }

    /// Takes back every harvested entry of every ring, and arms their pages again (`KVM_RESET_DIRTY_RINGS`). From the return
    /// on, each further write makes a further entry (I32); so whoever collects reads pages behind it. Returns how many
    /// entries there were.
    pub fn reset_dirty_rings(&self) -> u64 {
        let core = &*self.core;
        // Held to the end: entries are taken back by one thread at a time (I36).
        let mut rings = core.rings.lock();
        let mut pages: BTreeMap<u64, DirtyPages> = BTreeMap::new();
        let mut count = 0;
        for ring in rings.iter() {
            count += u64::from(ring.take_back(|DirtyGfn { slot, page }| {
                pages.entry(slot.0).or_default().insert(page);
            }));
        }
        for (slot, pages) in &pages {
            // A slot that is gone, or no longer logged, has nothing to arm.
            let Ok((memslot, log)) = self.logged(Gfn(*slot)) else { continue };
            for (part, words) in pages.parts() {
                let _exclusive = core.windows.write();
                let mut gather = Gather::new(core.tlb.as_ref());
                if log.protects() {
                    core.write_protect(&memslot, part, words, &mut gather);
                }
                core.finish(gather);
            }
        }
        // Those whose vCPU is gone and that nobody collects from.
        rings.retain(|ring| Arc::strong_count(ring) > 1);
        let all = rings.clone();
        drop(rings);
        if count > 0 {
            all.iter().for_each(|ring| ring.wake());
        }
        count
    }
}

/// The words of those pages of a part that lie in `run`.
fn words_of(part: u64, run: &Range<u64>) -> Words {
    let mut words = [0; WORDS];
    let first = part * PART;
    for page in run.start.max(first)..run.end.min(first + PART) {
        let (_, word, bit) = place(page);
        words[word] |= bit;
    }
    words
}

/// Adds the words of one part, if they have a bit.
fn or_into(words: &Words, pages: &mut DirtyPages, part: u64) {
    if words.iter().any(|&word| word != 0) {
        pages.part(part).iter_mut().zip(words).for_each(|(into, word)| *into |= word);
    }
}

impl Core {
    /// An error if `log` has ended since it was looked up: what is taken now may be missing in the next one. The caller holds
    /// `mmu_lock`, for which that one waits before it arms. Nobody waits for `mmu_lock` with the lock of the slots held, so
    /// that may be taken here.
    fn still_logs(&self, log: &Arc<DirtyLog>) -> Result<(), DirtyLogError> {
        let slots = self.slots.read();
        let now = slots.log_of(log.slot);
        if now.is_some_and(|now| Arc::ptr_eq(now, log)) {
            Ok(())
        } else {
            Err(DirtyLogError::NotLogged(log.slot))
        }
    }

    /// The first part at or behind `part` in which a page may have been written.
    fn next_part(&self, memslot: &Memslot, log: &DirtyLog, part: u64) -> Option<u64> {
        // The tables first: D moves from a leaf that is removed to the bitmap, before its table can go, and never back.
        let in_tables = match log.config.method {
            DirtyMethod::WriteProtect => None,
            DirtyMethod::DirtyBit => {
                let from = memslot.gfn.0.saturating_add(part.saturating_mul(PART));
                let _stable = self.windows.read();
                let table = self.tables.next_leaf_table(from).filter(|table| *table < memslot.gfns().end);
                table.map(|table| (table.max(from) - memslot.gfn.0) / PART)
            }
        };
        let in_bitmap = log.bitmap.next_part(part);
        in_bitmap.into_iter().chain(in_tables).min()
    }

    /// Takes the records of `wanted` pages of a part and arms those that had one. The caller holds `mmu_lock` for writing, and
    /// flushes before it tells anybody.
    fn take_and_arm(
        &self,
        memslot: &Memslot,
        log: &DirtyLog,
        part: u64,
        wanted: &Words,
        gather: &mut Gather<'_>,
    ) -> Box<Words> {
        let mut taken = log.bitmap.take(part, wanted);
        match log.config.method {
            DirtyMethod::WriteProtect => self.write_protect(memslot, part, &taken, gather),
            DirtyMethod::DirtyBit => self.for_each_entry(memslot, part, wanted, |page, gfn, leaf| {
                if let Some(old) = entry::clear_dirty(leaf) {
                    taken[page / 64] |= 1 << (page % 64);
                    // D is lost here; A is not.
                    self.hand_over_marks(old.old());
                    gather.add(gfn, 1, old);
                }
            }),
        }
        taken
    }

    /// Takes W from each of `pages` of a part. The caller as above.
    fn write_protect(&self, memslot: &Memslot, part: u64, pages: &Words, gather: &mut Gather<'_>) {
        self.for_each_entry(memslot, part, pages, |_, gfn, leaf| {
            if let Some(old) = entry::write_protect(leaf) {
                gather.add(gfn, 1, old);
            }
        });
    }

    /// Arms every leaf of a slot whose log was just published; in a log that begins with every page written, notes those that
    /// have W instead (I33). The caller holds `mmu_lock` for writing, and flushes.
    pub(in crate::shadow) fn arm_slot(&self, memslot: &Memslot, log: &DirtyLog, gather: &mut Gather<'_>) {
        if log.begins_clean() {
            return self.arm_run(memslot, log, 0..memslot.pages, gather);
        }
        self.tables.for_each_leaf_table(memslot.gfns(), |base, table, entries| {
            for at in entries {
                if Spte(table[at].load(Ordering::Acquire)).is_writable() {
                    let gfn = Gfn(base + at as u64);
                    log.mark(gfn);
                }
            }
        });
    }

    /// Makes the next write of each of `pages` of the slot be seen. The caller as above.
    fn arm_run(&self, memslot: &Memslot, log: &DirtyLog, pages: Range<u64>, gather: &mut Gather<'_>) {
        let gfns = memslot.gfn.0 + pages.start..memslot.gfn.0 + pages.end;
        self.tables.for_each_leaf_table(gfns, |base, table, entries| {
            for at in entries {
                let gfn = Gfn(base + at as u64);
                let old = match log.config.method {
                    DirtyMethod::WriteProtect => entry::write_protect(&table[at]),
                    DirtyMethod::DirtyBit => {
                        entry::clear_dirty(&table[at]).inspect(|old| self.hand_over_marks(old.old()))
                    }
                };
                if let Some(old) = old {
                    gather.add(gfn, 1, old);
                }
            }
        });
    }

    /// Calls `visit(page in the part, gfn, entry)` for those of `pages` of a part that have a table.
    fn for_each_entry(
        &self,
        memslot: &Memslot,
        part: u64,
        pages: &Words,
        mut visit: impl FnMut(usize, Gfn, &AtomicU64),
    ) {
        let first = memslot.gfn.0 + part * PART;
        let gfns = first..(first + PART).min(memslot.gfns().end);
        self.tables.for_each_leaf_table(gfns, |base, table, entries| {
            let offset = |entry: usize| (base + entry as u64 - first) as usize;
            let (mut page, end) = (offset(entries.start), offset(entries.end));
            while page < end {
                let word = page / 64;
                let next = (word * 64 + 64).min(end);
                let of_table = !0 << (page % 64) & !0 >> (63 - (next - 1) % 64);
                for bit in bits(pages[word] & of_table) {
                    let page = word * 64 + bit as usize;
                    let gfn = first + page as u64;
                    visit(page, Gfn(gfn), &table[(gfn - base) as usize]);
                }
                page = next;
            }
        });
    }
}
