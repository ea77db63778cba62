// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#![allow(clippy::single_range_in_vec_init, reason = "lists of ranges, of which some have one")]

use super::*;
use crate::addr::PAGE_SIZE;
use crate::frame::{FramePool, FreedFrames, Purpose};
use crate::shadow::Spte;
use crate::sync::Arc;
use crate::sync::atomic::Ordering;
use crate::table::{LOWER_HALF_PAGES, Tables, index};

const READ: Access = Access::READ;
const RW: Access = Access::READ.union(Access::WRITE);
/// Where the frames of the pages are: that of page n is FIRST + n, up to the end of the pool.
const FIRST: u64 = 100;
const FRAMES: u64 = 4096;

#[derive(Debug, Clone, PartialEq, Eq)]
enum Call {
    Map(Range<u64>),
    Unmap(Vec<Range<u64>>),
    UnmapAll,
}
use Call::{Map, Unmap, UnmapAll};

#[derive(Debug, PartialEq, Eq)]
struct Refused;

/// A process, as its page table and the calls that it made.
#[derive(Debug, Default)]
struct Host {
    mapped: BTreeMap<u64, (u32, Access)>,
    calls: Vec<Call>,
    /// Calls to come that fail, and have done half of their work.
    refused_maps: usize,
    refused_unmaps: usize,
}

impl Host {
    fn take_calls(&mut self) -> Vec<Call> {
        std::mem::take(&mut self.calls)
    }
}

fn fails(left: &mut usize) -> bool {
    let fails = *left > 0;
    *left -= usize::from(fails);
    fails
}

impl HostMappings for Host {
    type Error = Refused;

    fn map(&mut self, translation: &Translation) -> Result<(), Refused> {
        let first = translation.gfn.0;
        self.calls.push(Map(first..first + translation.pages));
        let refused = fails(&mut self.refused_maps);
        let done = if refused { translation.pages.div_ceil(2) } else { translation.pages };
        for n in 0..done {
            self.mapped.insert(first + n, (translation.pfn.0 + n as u32, translation.rights));
        }
        if refused { Err(Refused) } else { Ok(()) }
    }

    fn unmap(&mut self, pages: &[Range<u64>]) -> Result<(), Refused> {
        self.calls.push(Unmap(pages.to_vec()));
        if fails(&mut self.refused_unmaps) {
            return Err(Refused);
        }
        self.mapped.retain(|page, _| !pages.iter().any(|pages| pages.contains(page)));
        Ok(())
    }

    fn unmap_all(&mut self) -> Result<(), Refused> {
        self.calls.push(UnmapAll);
        if fails(&mut self.refused_unmaps) {
            return Err(Refused);
        }
        self.mapped.clear();
        Ok(())
    }
}

/// A TLB over tables whose leaves a test writes.
struct Guest {
    tables: Tables,
    walker: Walker,
    tlb: SoftTlb,
    host: Host,
}

impl Guest {
    fn new(most: usize) -> Self {
        let pool = Arc::new(FramePool::new(FRAMES * PAGE_SIZE, FreedFrames::Poison).unwrap());
        let tables = Tables::new(Arc::clone(&pool), Purpose::Table).unwrap();
        let walker = Walker::new(pool, tables.root());
        Self { tables, walker, tlb: SoftTlb::new(most), host: Host::default() }
    }

    /// One with leaves for `pages` that were read and may be written.
    fn with_read(most: usize, pages: impl IntoIterator<Item = u64>) -> Self {
        let guest = Self::new(most);
        pages.into_iter().for_each(|page| guest.put(page, leaf(page).touched(READ)));
        guest
    }

    fn put(&self, page: u64, spte: Spte) {
        self.tables.leaf_table_or_new(page).unwrap()[index(page, 1)].store(spte.0, Ordering::Release);
    }

    fn fill(&mut self, page: u64, access: Access) -> Result<Filled, Refused> {
        let filled = self.tlb.fill(&self.walker, Gfn(page), access, &mut self.host);
        self.check();
        filled
    }

    fn flush(&mut self, pages: &[u64]) -> Result<(), Refused> {
        let zapped = |&page: &u64| Zapped { gfn: Gfn(page), level: 1, old: Spte::NONE };
        let flushed = self.tlb.flush(&pages.iter().map(zapped).collect::<Vec<_>>(), &mut self.host);
        self.check();
        flushed
    }

    /// The ranges of the entries.
    fn ranges(&self) -> Vec<Range<u64>> {
        let state = self.tlb.state.lock();
        state.entries.iter().map(|(&start, entry)| start..start + entry.pages).collect()
    }

    /// The host has what the entries say; only where they say that nothing is known it may have anything.
    #[track_caller]
    fn check(&self) {
        let state = self.tlb.state.lock();
        let mut end = 0;
        let mut pages = BTreeMap::new();
        for (&start, entry) in &state.entries {
            assert!(start >= end && entry.pages > 0, "{:?} overlap", state.entries);
            end = start + entry.pages;
            if !entry.rights.is_empty() {
                pages.extend((0..entry.pages).map(|n| (start + n, (entry.pfn.0 + n as u32, entry.rights))));
            }
        }
        assert!(state.entries.len() <= self.tlb.most, "{} entries", state.entries.len());
        let known = |page: &u64| state.find(*page).is_none_or(|(_, entry)| !entry.rights.is_empty());
        let mapped: BTreeMap<_, _> =
            self.host.mapped.iter().filter(|(page, _)| known(page)).map(|(&page, &it)| (page, it)).collect();
        assert_eq!(mapped, pages);
    }
}

fn leaf(page: u64) -> Spte {
    Spte::leaf(Pfn((FIRST + page) as u32), RW)
}

#[test]
fn a_fill_maps_what_the_walk_found_and_nothing_twice() {
    let mut guest = Guest::with_read(64, 10..14);
    guest.put(12, leaf(12));
    assert_eq!(guest.fill(10, READ), Ok(Filled::Allowed));
    assert_eq!(guest.fill(11, READ), Ok(Filled::Allowed), "it came with its neighbour");
    assert_eq!(guest.fill(9, READ), Ok(Filled::NotAllowed));
    assert_eq!(guest.fill(10, Access::EXEC), Ok(Filled::NotAllowed));
    assert_eq!(guest.fill(LOWER_HALF_PAGES, READ), Ok(Filled::NotAllowed));
    assert_eq!(guest.host.take_calls(), [Map(10..12)]);
    assert_eq!(guest.tlb.rights(Gfn(12)), Access::empty(), "what was not accessed is not mapped ahead");
    // The first write faults, though the leaf has W: D is set by the fill for it.
    assert_eq!(guest.fill(11, Access::WRITE), Ok(Filled::Allowed));
    assert_eq!([10, 11].map(|page| guest.tlb.rights(Gfn(page))), [READ, RW]);
    assert_eq!(guest.fill(11, READ), Ok(Filled::Allowed));
    assert_eq!(guest.host.take_calls(), [Map(11..12)], "the read needed none");
    assert_eq!((guest.tlb.len(), guest.tlb.drops()), (2, 0));
}

#[test]
fn entries_join_where_the_host_joins_its_mappings() {
    // Two tables: two walks, one mapping.
    let mut guest = Guest::with_read(64, 510..514);
    guest.fill(510, READ).unwrap();
    guest.fill(513, READ).unwrap();
    assert_eq!(guest.ranges(), [510..514]);
    // The other way round, and into a gap.
    guest.flush(&[511, 512]).unwrap();
    assert_eq!(guest.ranges(), [510..511, 513..514]);
    guest.fill(512, READ).unwrap();
    assert_eq!(guest.ranges(), [510..511, 512..514]);
    guest.fill(511, READ).unwrap();
    assert_eq!(guest.ranges(), [510..514]);
    // Not with other rights, and not in another frame.
    let mut guest = Guest::with_read(64, 510..512);
    guest.put(512, leaf(512).touched(Access::WRITE));
    guest.put(1023, leaf(1023).touched(READ));
    guest.put(1024, leaf(1026).touched(READ));
    for page in [510, 512, 1023, 1024] {
        guest.fill(page, READ).unwrap();
    }
    assert_eq!(guest.ranges(), [510..512, 512..513, 1023..1024, 1024..1025]);
}

#[test]
fn a_flush_takes_its_pages_out_of_an_entry_and_leaves_the_rest() {
    let mut guest = Guest::with_read(64, 10..20);
    guest.fill(15, READ).unwrap();
    guest.flush(&[13]).unwrap();
    assert_eq!(guest.ranges(), [10..13, 14..20]);
    guest.flush(&[10, 19]).unwrap();
    assert_eq!(guest.ranges(), [11..13, 14..19]);
    guest.flush(&[12, 16, 16, 14]).unwrap();
    assert_eq!(guest.ranges(), [11..12, 15..16, 17..19]);
    assert_eq!(guest.tlb.drops(), 3);
    guest.host.take_calls();
    guest.flush(&[9, 14, 16, 400]).unwrap();
    assert_eq!(guest.host.take_calls(), [], "nothing is mapped there");
    let zapped = |gfn, level| Zapped { gfn: Gfn(gfn), level, old: Spte::NONE };
    guest.tlb.flush(&[zapped(11, 1), zapped(0, 2)], &mut guest.host).unwrap();
    assert_eq!(guest.host.take_calls(), [Unmap(vec![11..19])], "a large leaf has all that it covers");
    guest.check();
    assert!(guest.tlb.is_empty());
}

#[test]
fn one_call_unmaps_over_gaps_and_never_over_what_stays() {
    let mut guest = Guest::with_read(64, [10, 12, 14, 16]);
    let fill_all = |guest: &mut Guest| [10, 12, 14, 16].map(|page| guest.fill(page, READ).unwrap());
    fill_all(&mut guest);
    guest.host.take_calls();
    guest.flush(&[14, 10, 12]).unwrap();
    assert_eq!(guest.host.take_calls(), [Unmap(vec![10..15])]);
    fill_all(&mut guest);
    guest.host.take_calls();
    guest.flush(&[16, 10, 14]).unwrap();
    assert_eq!(guest.host.take_calls(), [Unmap(vec![10..11, 14..17])], "12 stays");
    fill_all(&mut guest);
    guest.host.take_calls();
    guest.tlb.flush_all(&mut guest.host).unwrap();
    guest.tlb.flush_all(&mut guest.host).unwrap();
    assert_eq!(guest.host.take_calls(), [Unmap(vec![10..17])]);
    guest.check();
    // Two of one entry.
    let mut guest = Guest::with_read(64, 10..20);
    guest.fill(15, READ).unwrap();
    guest.host.take_calls();
    guest.flush(&[12, 13, 17]).unwrap();
    assert_eq!(guest.host.take_calls(), [Unmap(vec![12..14, 17..18])]);
}

#[test]
fn i60_there_are_never_more_entries_than_the_most_and_every_fill_succeeds() {
    // A multiplier that is odd visits every page, in an order that has nothing to do with addresses.
    for (most, factor) in [(8, 1), (8, 511), (8, 173), (9, 37), (20, 205), (64, 299)] {
        let mut guest = Guest::with_read(most, 0..512);
        for n in 0..2048 {
            let page = n * factor % 512;
            // Writes divide what was read: in the middle of an entry each makes two more.
            let access = if n % 3 == 0 { Access::WRITE } else { READ };
            assert_ne!(guest.fill(page, access), Ok(Filled::NotAllowed), "page {page} of {most}");
            assert!(guest.tlb.rights(Gfn(page)).contains(access));
            guest.put(page * 7 % 512, leaf(page * 7 % 512));
            guest.flush(&[page * 7 % 512]).unwrap();
        }
        assert!(guest.tlb.drops() > 2048 / most as u64, "nothing was evicted");
    }
    assert_eq!(SoftTlb::new(0).most, 8);
}

#[test]
fn i60_a_flush_that_divides_an_entry_keeps_to_the_most_too() {
    let mut guest = Guest::with_read(8, 0..512);
    guest.fill(0, READ).unwrap();
    let even: Vec<u64> = (0..512).step_by(2).collect();
    guest.flush(&even).unwrap();
    assert!((1..=8).contains(&guest.tlb.len()), "{} entries", guest.tlb.len());
    assert_eq!(guest.fill(1, READ).map(|_| guest.tlb.rights(Gfn(1))), Ok(READ));
}

#[test]
fn eviction_goes_round() {
    let pages = || (0..40).map(|n| 2 * n);
    let mut guest = Guest::with_read(16, pages());
    for _ in 0..3 {
        let mut evicted = [false; 80];
        for page in pages() {
            let before = guest.ranges();
            guest.fill(page, READ).unwrap();
            let after = guest.ranges();
            before.iter().filter(|it| !after.contains(it)).for_each(|it| evicted[it.start as usize] = true);
        }
        assert!(pages().take(20).all(|page| evicted[page as usize]), "none stays for ever");
    }
}

#[test]
fn where_the_host_cannot_map_everything_goes_and_it_is_tried_again() {
    let mut guest = Guest::with_read(64, [10, 20, 21, 22]);
    guest.fill(10, READ).unwrap();
    guest.host.take_calls();
    guest.host.refused_maps = 1;
    assert_eq!(guest.fill(21, READ), Ok(Filled::Allowed));
    assert_eq!(guest.host.take_calls(), [Map(20..23), UnmapAll, Map(20..23)]);
    assert_eq!(guest.ranges(), [20..23]);
    assert_eq!(guest.tlb.drops(), 1);
}

#[test]
fn where_the_host_cannot_unmap_one_call_takes_everything() {
    let mut guest = Guest::with_read(64, 10..20);
    guest.fill(10, READ).unwrap();
    guest.host.take_calls();
    guest.host.refused_unmaps = 1;
    assert_eq!(guest.flush(&[15]), Ok(()));
    assert_eq!(guest.host.take_calls(), [Unmap(vec![15..16]), UnmapAll]);
    assert!(guest.tlb.is_empty());
}

#[test]
fn i60_what_the_host_may_have_mapped_is_flushed_though_its_fill_failed() {
    let mut guest = Guest::with_read(64, 10..20);
    guest.host.refused_maps = 2;
    assert_eq!(guest.fill(10, READ), Err(Refused));
    assert!(guest.host.mapped.contains_key(&10), "the half of it");
    assert_eq!(guest.tlb.rights(Gfn(10)), Access::empty());
    guest.flush(&[11]).unwrap();
    assert!(!guest.host.mapped.contains_key(&11));
    assert_eq!(guest.fill(10, READ), Ok(Filled::Allowed));
    assert_eq!(guest.ranges(), [10..20], "known again");
}

#[test]
fn i60_a_flush_whose_unmapping_failed_for_good_is_an_error_and_the_next_one_tries_again() {
    let mut guest = Guest::with_read(64, 10..20);
    guest.fill(10, READ).unwrap();
    guest.host.refused_unmaps = 4;
    assert_eq!(guest.flush(&[15]), Err(Refused));
    assert_eq!(guest.tlb.rights(Gfn(10)), Access::empty());
    assert_eq!(guest.flush(&[15]), Err(Refused), "not a word of success while 15 is mapped");
    guest.flush(&[15]).unwrap();
    assert!(!guest.host.mapped.contains_key(&15));
    guest.tlb.flush_all(&mut guest.host).unwrap();
    assert!(guest.host.mapped.is_empty() && guest.tlb.is_empty());
}

#[test]
fn a_fill_that_cannot_make_room_is_an_error() {
    let mut guest = Guest::with_read(8, (0..8).map(|n| 2 * n));
    (0..7).for_each(|n| _ = guest.fill(2 * n, READ).unwrap());
    guest.host.refused_unmaps = 2;
    assert_eq!(guest.fill(14, READ), Err(Refused));
    assert_eq!(guest.fill(14, READ), Ok(Filled::Allowed));
}
