// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a scenario of page sharing races on: two guests of one pool, a page sharer over both, and its oracle.
//!
//! Both guests have their pages at the same addresses, so that a page's `n`-th value ([`tagged`]) is the same in both: pages of
//! one value are equal, and whoever merges them may not change what either guest reads (I58).
//!
//! # The oracle
//! * A page is written by one task of its own guest. What that reads behind a write is what it wrote; what nobody writes stays.
//! * [`Guests::settle`]: when nobody writes any more, some passes merge what is equal (I51). So a mark of a write that got lost
//!   shows: its page keeps a hash that is not its own, and is merged with nothing.
//! * [`Guests::finish`]: `Ksm::audit`, then all that must hold at the end of any scenario.

use crate::addr::{Hva, PAGE_SIZE};
use crate::cpu::{Vcpu, tagged};
use crate::ksm::{CandidateAccess, Domain, Ksm, KsmSettings, SmartScan, ZeroPages};
use crate::machine::{Machine, RW, page};
use crate::mm::{Advice, FaultRequest, Mm};
use crate::shadow::AdBits;
use crate::sync::Arc;
use crate::sync::atomic::Ordering;

/// Where the pages of a guest are.
pub(crate) const AT: Hva = Hva(0x40_0000);
/// As much as a scan may cost.
pub(crate) const ALL: u64 = 1 << 20;
/// Passes after which everything is merged that can be: one finds what was written, one that it is quiet, one that its twin is.
const PASSES: usize = 4;

/// Settings under which every pass looks at every page.
pub(crate) fn settings() -> KsmSettings {
    KsmSettings {
        max_page_sharing: 8,
        zero_pages: ZeroPages::Share,
        smart_scan: SmartScan::Off,
        access: CandidateAccess::Normal,
        reserve: 0,
        seed: Some(1),
    }
}

/// See the top of the file.
#[derive(Debug)]
pub(crate) struct Guests {
    pub(crate) ksm: Arc<Ksm>,
    pub(crate) of: [Machine; 2],
}

impl Guests {
    /// Two guests of the domains `domains` with `pages` pages each, all of the first value, written by their CPUs.
    pub(crate) fn with(ad: AdBits, settings: KsmSettings, domains: [u32; 2], pages: u64) -> Self {
        let first = Machine::small(ad);
        let second = first.small_beside(ad);
        let ksm = Ksm::new(Arc::clone(&first.pool), settings).unwrap();
        let guests = Self { ksm, of: [first, second] };
        for (guest, domain) in guests.of.iter().zip(domains) {
            guest.map_at(AT, pages, RW);
            guest.mm.madvise(AT, pages * PAGE_SIZE, Advice::Mergeable).unwrap();
            (0..pages).for_each(|n| guest.vcpu(0).write(page(AT, n), 1).unwrap());
            guests.ksm.enter(&guest.mm, Domain(domain)).unwrap();
        }
        guests
    }

    /// Two guests of one domain with a page each. A pass has seen them written: the next one merges.
    pub(crate) fn about_to_merge(ad: AdBits) -> Self {
        let guests = Self::with(ad, settings(), [0, 0], 1);
        guests.ksm.scan(ALL);
        guests
    }

    /// The same, merged.
    pub(crate) fn merged(ad: AdBits) -> Self {
        let guests = Self::about_to_merge(ad);
        guests.ksm.scan(ALL);
        assert!(guests.of.iter().all(|guest| is_merged(&guest.mm, AT)), "two passes merge what is quiet");
        guests
    }

    /// The guests.
    pub(crate) fn both(&self) -> (&Machine, &Machine) {
        (&self.of[0], &self.of[1])
    }

    /// One pass.
    pub(crate) fn scan(&self) {
        self.ksm.scan(ALL);
    }

    /// Nobody writes any more: makes passes, then the pages at `at`, which are equal, are merged.
    pub(crate) fn settle(&self, at: Hva) {
        (0..PASSES).for_each(|_| self.scan());
        for guest in &self.of {
            let merged = is_merged(&guest.mm, at);
            guest.must(merged, || {
                let pte = guest.mm.lookup(at).map(|(pte, _)| pte);
                format!("{at} is {pte:?}, and its twin is the same: a write is not known of (I51)")
            });
        }
        let frames = self.of.each_ref().map(|guest| guest.mm.lookup(at).map(|(pte, _)| pte.pfn()));
        self.of[0].must(frames[0] == frames[1], || format!("{frames:?} have the same content (I51)"));
    }

    /// What the page sharer's audit says must hold.
    pub(crate) fn audit(&self) {
        let first = self.ksm.audit().into_iter().next();
        self.of[0]
            .must(first.is_none(), || first.map_or_else(String::new, |wrong| format!("{wrong}: {wrong:?}")));
    }

    /// Checks and takes apart.
    pub(crate) fn finish(self) {
        self.audit();
        let Self { ksm, of } = self;
        of[0].pool.set_reserve(0);
        drop(ksm);
        Machine::finish_all(of.into());
    }
}

/// Whether the page at `at` is one of the page sharer's.
pub(crate) fn is_merged(mm: &Mm, at: Hva) -> bool {
    mm.lookup(at).is_some_and(|(pte, _)| pte.is_ksm())
}

/// `vcpu` of `guest`, whose only writer it is, writes the `n`-th value of the page at `at`, and reads it.
pub(crate) fn writes(guest: &Machine, vcpu: &mut Vcpu<'_>, at: Hva, n: u64) {
    vcpu.write(at, n).unwrap();
    reads(guest, vcpu, at, n);
}

/// `vcpu` of `guest` reads the page at `at`, which has its `n`-th value.
pub(crate) fn reads(guest: &Machine, vcpu: &mut Vcpu<'_>, at: Hva, n: u64) {
    let seen = vcpu.read(at).unwrap();
    guest.must(seen == tagged(at, n), || {
        format!("V reads {seen:#x} at {at}, which holds {:#x} (I58)", tagged(at, n))
    });
}

/// The first word of the page at `at` of `mm`, as its owner reads it.
pub(crate) fn word(mm: &Mm, at: Hva) -> u64 {
    let pinned = mm.fault(&FaultRequest::one_page(at, crate::machine::READ)).unwrap();
    mm.pool().words(pinned.required().pfn)[0].load(Ordering::SeqCst)
}
