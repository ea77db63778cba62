// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How long each page has been idle, in the manner of the multi-generation LRU (`mm/vmscan.c`, `lru_gen`).
//!
//! A *pass* ([`Mm::age`]) begins a generation: it asks every secondary which pages were accessed since the last pass, looks
//! at the primary's own marks, and notes the new generation at each page that was. A page's age is the number of passes
//! since. Nothing else is kept: five bits of the primary pte say in which generation a page was last found young, so that a
//! page takes its age along when it moves, and a secondary that loses its entry loses nothing. What that entry knew of
//! accesses since the last pass it tells the frame, and the pass asks the frame. Only where one pte maps it: of a frame that
//! several share (the zero frame always) an access whose entry was lost before the pass goes unnoticed, as nobody can say
//! whose it was.
//!
//! # Five bits
//! 0 says that no pass has found the page young. Otherwise they hold the generation modulo 31, plus 1: good for ages up to
//! 30. Every [`LEVEL`] passes, ages above [`OLDEST`], which are not told apart, are set back to it; so no age comes near 30,
//! not even of a page that moves behind the back of a pass and is missed by it.
//!
//! # Cost
//! A pass reads the leaf tables of the primary once. Of those of a shadow map it reads the ones that a CPU went through
//! ([`Look`]); every [`FULL_LOOK`] passes it reads all. Memory in no table costs nothing, however much is mapped.
//!
//! # Locks
//! `pass` over everything: one pass at a time. The mmap lock for reading and the page-table lock, for 32 MiB at a time: who
//! changes the address space waits for one part, not for the pass. Secondaries are asked before the page-table lock is taken,
//! for they may flush: a page that changes in between gets an age that its predecessor had earned, which is a guess like
//! every age.

use super::{Mm, Pte, Vma};
use crate::addr::{Hva, HvaRange, PAGE_SIZE};
use crate::frame::FrameFlags;
use crate::notifier::{Look, YoungPages};
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicU64, Ordering};

/// The age that stands for all that are as high or higher.
pub const OLDEST: u8 = 7;
/// Every this many passes a secondary looks at everything.
pub const FULL_LOOK: u64 = 16;
/// Every this many passes the ages of old pages are levelled.
const LEVEL: u64 = 8;
/// Pages of one part of a pass.
const PART: u64 = 8192;
/// Generations that the tag tells apart.
const GENERATIONS: u64 = Pte::TAGS as u64 - 1;

/// How long a page has been idle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PageAge {
    /// The last pass but this many found it young: 0 is the last one, [`OLDEST`] all that came before the others.
    Passes(u8),
    /// It was brought in, ahead of need for example, and no pass has found it young.
    Untouched,
}

/// What one pass came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AgingPass {
    /// Its number: the first is 1.
    pub generation: u64,
    /// Pages that were found young.
    pub young: u64,
    /// Pages there are.
    pub present: u64,
}

/// Whether a pass looks at frames too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Frames {
    /// Some may have been told of an access.
    Ask,
    /// None was since the last pass.
    Skip,
}

/// Where an address space is with its passes.
#[derive(Debug, Default)]
pub(super) struct Generations {
    /// Held throughout a pass.
    pass: Mutex<()>,
    /// Passes so far.
    done: AtomicU64,
    /// [`FramePool::accesses_lost`](crate::frame::FramePool::accesses_lost) when the last pass began.
    lost: AtomicU64,
}

impl Generations {
    /// The space is a copy of one that has done so many passes: its pages have that one's ages.
    pub(super) fn begin_at(&self, passes: u64) {
        self.done.store(passes, Ordering::Release);
    }
}

/// The tag of a page that was found `age` passes before `generation`.
fn tag_of(generation: u64, age: u64) -> u8 {
    ((generation + GENERATIONS - age % GENERATIONS) % GENERATIONS) as u8 + 1
}

fn age_of(pte: Pte, generation: u64) -> PageAge {
    match u64::from(pte.tag()) {
        // Brought in by an access since the last pass.
        _ if pte.is_young() => PageAge::Passes(0),
        0 => PageAge::Untouched,
        tag => {
            let age = (generation + GENERATIONS - (tag - 1)) % GENERATIONS;
            PageAge::Passes((age as u8).min(OLDEST))
        }
    }
}

/// Notes `generation` at each of 64 pages that is young by its own mark, or by its bit in `young`. The caller holds the
/// page-table lock.
fn age_entries(entries: &[AtomicU64; 64], young: u64, generation: u64, pass: &mut AgingPass) {
    let now = tag_of(generation, 0);
    // Eight at a time: most are idle, and eight are asked as fast as one.
    for (eight, first) in entries.as_chunks::<8>().0.iter().zip((0..).step_by(8)) {
        let ptes = eight.each_ref().map(|entry| Pte(entry.load(Ordering::Relaxed)));
        pass.present += ptes.iter().map(|pte| u64::from(pte.is_present())).sum::<u64>();
        let mut young = young >> first & 0xff;
        for (at, pte) in ptes.iter().enumerate() {
            young |= u64::from(pte.is_young()) << at;
        }
        if young == 0 {
            continue;
        }
        for (at, (entry, pte)) in eight.iter().zip(ptes).enumerate() {
            if young >> at & 1 != 0 && pte.is_present() {
                pass.young += 1;
                entry.store(pte.old().with_tag(now).0, Ordering::Relaxed);
            }
        }
    }
}

impl Mm {
    /// Passes so far.
    pub fn generation(&self) -> u64 {
        self.generations.done.load(Ordering::Acquire)
    }

    /// One pass over the address space. What was accessed since the last one has age 0 now.
    ///
    /// May wait for the mmap lock and for flushes. Not to be called inside a pair or an op of this space.
    pub fn age(&self) -> AgingPass {
        let _one = self.generations.pass.lock();
        let generation = self.generation() + 1;
        // First: whoever reports ages meanwhile sees pages that the pass has not reached yet one pass older than they are.
        self.generations.done.store(generation, Ordering::Release);
        let look = if generation.is_multiple_of(FULL_LOOK) { Look::Everything } else { Look::Marked };
        // Most passes need not look at frames at all.
        let lost = self.pool.accesses_lost();
        let seen = self.generations.lost.swap(lost, Ordering::Relaxed);
        let frames = if seen == lost { Frames::Skip } else { Frames::Ask };
        let mut pass = AgingPass { generation, young: 0, present: 0 };
        let mut young = YoungPages::new(HvaRange::page(Hva(0)), look);
        let mut next = 0;
        loop {
            let _map = self.map.read();
            let Some(page) = self.tables.next_leaf_table(next) else { break };
            let first = page & !(PART - 1);
            next = first + PART;
            let part = HvaRange::pages_from(Hva(first * PAGE_SIZE), PART);
            young.reset(part, look);
            self.notifiers.test_clear_young(&mut young);
            self.age_part(part, generation, &young, frames, &mut pass);
        }
        pass
    }

    /// Notes `generation` at each page of `part` that is young, here or in `young`. The caller holds the mmap lock.
    fn age_part(
        &self,
        part: HvaRange,
        generation: u64,
        young: &YoungPages,
        frames: Frames,
        pass: &mut AgingPass,
    ) {
        self.for_each_leaf(part, |base, leaf, _| {
            // A part is made of whole tables.
            for (entries, &bits) in leaf.entries().as_chunks().0.iter().zip(young.of_table(base.page())) {
                let told = match frames {
                    Frames::Ask => self.accesses_of(entries),
                    Frames::Skip => 0,
                };
                age_entries(entries, bits | told, generation, pass);
            }
        });
        if generation.is_multiple_of(LEVEL) {
            self.level(part, generation);
        }
    }

    /// Sets ages that are not told apart back to the least of them.
    fn level(&self, part: HvaRange, generation: u64) {
        let oldest = tag_of(generation, OLDEST.into());
        // A bit for each tag of a higher age.
        let older =
            (u64::from(OLDEST) + 1..GENERATIONS).fold(0u32, |tags, age| tags | 1 << tag_of(generation, age));
        self.for_each_leaf(part, |_, leaf, _| {
            for entry in leaf.entries() {
                let pte = Pte(entry.load(Ordering::Relaxed));
                if older >> pte.tag() & 1 != 0 {
                    entry.store(pte.with_tag(oldest).0, Ordering::Relaxed);
                }
            }
        });
    }

    /// Of which of these pages the frames were told that they were accessed, a bit each.
    fn accesses_of(&self, entries: &[AtomicU64]) -> u64 {
        entries.iter().enumerate().fold(0, |bits, (at, entry)| {
            let pte = Pte(entry.load(Ordering::Relaxed));
            bits | u64::from(self.take_accessed(pte)) << at
        })
    }

    /// Whether the frame of `pte` was told of an access, by an entry that only this page can have had. The mark goes in any
    /// case: a later pass could not say of when it is.
    fn take_accessed(&self, pte: Pte) -> bool {
        pte.counted_frame().is_some_and(|pfn| {
            let frame = self.pool.frame(pfn);
            !frame.take_flags(FrameFlags::ACCESSED).is_empty() && frame.map_count() == 1
        })
    }

    /// Calls `visit` with every run of present pages that have one VMA and one age, ascending. Ages are those of the last
    /// pass; a page that was faulted in since has age 0.
    ///
    /// `visit` is called with the mmap lock and a page-table lock held, and must not call this `Mm`.
    pub fn for_each_age(&self, mut visit: impl FnMut(&Vma, HvaRange, PageAge)) {
        let map = self.map.read();
        for vma in map.vmas.iter() {
            self.for_each_leaf(vma.range, |base, leaf, entries| {
                // Under the lock of the table: a pass that has been here has told its number before.
                let generation = self.generation();
                let mut run: Option<(HvaRange, PageAge)> = None;
                for at in entries {
                    let pte = leaf.get(at);
                    let page = HvaRange::page(Hva(base.0 + at as u64 * PAGE_SIZE));
                    let age = pte.is_present().then(|| age_of(pte, generation));
                    match (&mut run, age) {
                        (Some((range, of_run)), Some(age)) if *of_run == age => range.end = page.end,
                        _ => {
                            if let Some((range, age)) = run.take() {
                                visit(vma, range, age);
                            }
                            run = age.map(|age| (page, age));
                        }
                    }
                }
                if let Some((range, age)) = run {
                    visit(vma, range, age);
                }
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Pfn;

    #[test]
    fn a_tag_tells_ages_up_to_thirty_in_every_generation() {
        for generation in 1..100 {
            for age in 0..GENERATIONS {
                let pte = Pte::anonymous(Pfn(1)).with_tag(tag_of(generation, age));
                assert_eq!(age_of(pte, generation), PageAge::Passes((age as u8).min(OLDEST)));
            }
        }
    }

    #[test]
    fn a_page_of_no_pass_is_untouched_until_it_is_touched() {
        let pte = Pte::anonymous(Pfn(1));
        assert_eq!(age_of(pte, 5), PageAge::Untouched);
        assert_eq!(age_of(pte.touched(crate::addr::Access::READ), 5), PageAge::Passes(0));
    }
}
