// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How long each page has been idle, in the manner of the multi-generation LRU (`mm/vmscan.c`, `lru_gen`).
//!
//! A *pass* ([`Mm::age`]) begins a generation: it asks every secondary which pages were accessed since the last pass, looks at the
//! primary's own marks, and notes the new generation at each page that was. A page's age is the number of passes since. Nothing
//! else is kept: four bits of the primary pte say in which generation a page was last found young, so that a page takes
//! its age along when it moves, and a secondary that loses its entry loses nothing.
//!
//! # Four bits
//! 0 says that no pass has found the page young. Otherwise they hold the generation modulo 15, plus 1: good for ages up to 14. A pass
//! that comes upon an age of 14 sets it back to [`OLDEST`], above which ages are not told apart; so a page that stays idle is written
//! every seventh pass, and every page is looked at in every pass.
//!
//! # Cost
//! A pass reads the leaf tables of the primary once. Of those of a shadow map it reads the ones that a CPU went through ([`Look`]); every
//! [`FULL_LOOK`] passes it reads all. Memory in no table costs nothing, however much is mapped.
//!
//! # Locks
//! `pass` over everything: one pass at a time. The mmap lock for reading and the page-table lock, for 32 MiB at a time: who changes the
//! address space waits for one part, not for the pass. Secondaries are asked before the page-table lock is taken, for they may
//! flush: a page that changes in between gets an age that its predecessor had earned, which is a guess like every age.

use super::{Mm, Pte, Vma};
use crate::addr::{Hva, HvaRange, PAGE_SIZE};
use crate::notifier::{Look, YoungPages};
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicU64, Ordering};

/// The age that stands for all that are as high or higher.
pub const OLDEST: u8 = 7;
/// Every this many passes a secondary looks at everything.
pub const FULL_LOOK: u64 = 16;
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

/// Where an address space is with its passes.
#[derive(Debug, Default)]
pub(super) struct Generations {
    /// Held throughout a pass.
    pass: Mutex<()>,
    /// Passes so far.
    done: AtomicU64,
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
            self.age_part(part, generation, &young, &mut pass);
        }
        pass
    }

    /// Notes `generation` at each page of `part` that is young, here or in `young`. The caller holds the mmap lock.
    fn age_part(&self, part: HvaRange, generation: u64, young: &YoungPages, pass: &mut AgingPass) {
        let (now, wraps, oldest) =
            (tag_of(generation, 0), tag_of(generation, GENERATIONS - 1), tag_of(generation, OLDEST.into()));
        self.for_each_leaf(part, |base, leaf, _| {
            // A part is made of whole tables.
            for (entries, &bits) in leaf.entries().chunks(64).zip(young.of_table(base.page())) {
                for (at, entry) in entries.iter().enumerate() {
                    let pte = Pte(entry.load(Ordering::Relaxed));
                    pass.present += u64::from(pte.is_present());
                    if pte.is_present() && (pte.is_young() || bits >> at & 1 != 0) {
                        pass.young += 1;
                        entry.store(pte.old().with_tag(now).0, Ordering::Relaxed);
                    } else if pte.tag() == wraps {
                        entry.store(pte.with_tag(oldest).0, Ordering::Relaxed);
                    }
                }
            }
        });
    }

    /// Calls `visit` with every run of present pages that have one VMA and one age, ascending. Ages are those of the last pass; a page that was
    /// faulted in since has age 0.
    ///
    /// `visit` is called with the mmap lock and a page-table lock held, and must not call this `Mm`.
    pub fn for_each_age(&self, mut visit: impl FnMut(&Vma, HvaRange, PageAge)) {
        let map = self.map.read();
        let generation = self.generation();
        for vma in map.vmas.iter() {
            self.for_each_leaf(vma.range, |base, leaf, entries| {
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
    fn a_tag_tells_ages_up_to_fourteen_in_every_generation() {
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
