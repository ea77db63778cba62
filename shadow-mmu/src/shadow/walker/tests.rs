// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use super::*;
use crate::frame::{Fill, FreedFrames, Purpose};
use crate::table::Tables;

const RW: Access = Access::READ.union(Access::WRITE);
const RX: Access = Access::READ.union(Access::EXEC);
/// Frames of the pool; the last ones are no tables.
const FRAMES: u64 = 64;

/// Tables whose leaves a test writes.
struct Map {
    pool: Arc<FramePool>,
    tables: Tables,
}

impl Map {
    fn new() -> Self {
        let pool = Arc::new(FramePool::new(FRAMES * PAGE_SIZE, FreedFrames::Poison).unwrap());
        Self { tables: Tables::new(Arc::clone(&pool), Purpose::Table).unwrap(), pool }
    }
    fn walker(&self) -> Walker {
        Walker::new(Arc::clone(&self.pool), self.tables.root())
    }
    fn put(&self, gfn: u64, spte: Spte) {
        self.tables.leaf_table_or_new(gfn).unwrap()[index(gfn, 1)].store(spte.0, Ordering::Release);
    }
    fn spte(&self, gfn: u64) -> Spte {
        Spte(self.tables.leaf_table(gfn).unwrap()[index(gfn, 1)].load(Ordering::Acquire))
    }
    /// The links on the way to `gfn`, which must be there.
    fn links(&self, gfn: u64) -> Vec<&AtomicU64> {
        let mut table = self.tables.root();
        (2..=TOP)
            .rev()
            .map(|level| {
                let entry = &self.pool.words(table)[index(gfn, level)];
                table = look(entry).pfn();
                entry
            })
            .collect()
    }
    fn access(&self, gfn: u64, access: Access) -> Option<(u64, u64, u32, Access)> {
        let found = self.walker().access(Gfn(gfn), access)?;
        Some((found.gfn.0, found.pages, found.pfn.0, found.rights))
    }
}

fn leaf(pfn: u64, rights: Access) -> Spte {
    Spte::leaf(Pfn(pfn as u32), rights)
}

/// A leaf that was read, and one that was written.
fn read(pfn: u64, rights: Access) -> Spte {
    leaf(pfn, rights).touched(Access::READ)
}
fn written(pfn: u64) -> Spte {
    leaf(pfn, RW).touched(Access::WRITE)
}

#[test]
fn i59_a_walk_sets_a_on_its_way_and_d_for_a_write() {
    let map = Map::new();
    map.put(7, leaf(40, RW));
    map.links(7).iter().for_each(|link| _ = link.fetch_and(!Link::ACCESSED, Ordering::AcqRel));
    assert_eq!(map.access(7, Access::READ), Some((7, 1, 40, Access::READ)), "W is for later");
    assert!(map.links(7).iter().all(|link| look(link).is_accessed()));
    assert!(map.spte(7).is_accessed() && !map.spte(7).is_dirty());
    assert_eq!(map.access(7, Access::WRITE), Some((7, 1, 40, RW)));
    assert!(map.spte(7).is_dirty());
    map.put(7, map.spte(7).clean());
    assert_eq!(map.access(7, Access::READ), Some((7, 1, 40, Access::READ)), "D was taken, and W with it");
}

#[test]
fn what_the_leaf_does_not_allow_is_a_page_fault_that_leaves_no_mark() {
    let map = Map::new();
    let logged = leaf(42, RW).write_protected();
    for (gfn, spte, access) in [
        (0, Spte::NONE, Access::READ),
        (1, leaf(40, Access::READ), Access::WRITE),
        (2, leaf(41, RW), Access::EXEC),
        (3, logged, Access::WRITE),
        (4, leaf(43, RW).access_tracked(), Access::READ),
        (5, leaf(44, RX), RW),
    ] {
        map.put(gfn, spte);
        assert_eq!(map.access(gfn, access), None, "{spte:?} for {access}");
        assert_eq!(map.spte(gfn), spte);
    }
    assert_eq!(map.access(2, Access::READ), Some((2, 1, 41, Access::READ)));
    assert_eq!(map.access(5, Access::EXEC), Some((5, 1, 44, RX)));
}

#[test]
fn where_no_table_or_no_frame_of_the_pool_is_nothing_is_found() {
    let map = Map::new();
    assert_eq!(map.access(7, Access::READ), None, "a root without links");
    map.tables.set_upper(256, Link::to(map.tables.root()).0);
    for gfn in [LOWER_HALF_PAGES, LOWER_HALF_PAGES + 7, u64::MAX] {
        assert_eq!(map.access(gfn, Access::READ), None, "{gfn:#x} is the engine's");
    }
    map.put(7, leaf(FRAMES, RW));
    assert_eq!(map.access(7, Access::READ), None);
    map.links(7)[2].store(Link::to(Pfn(FRAMES as u32)).0, Ordering::Release);
    assert_eq!(map.access(7, Access::READ), None);
    map.links(7)[2].store(0, Ordering::Release);
}

#[test]
fn i59_only_what_was_marked_with_the_same_rights_in_the_next_frame_is_joined() {
    let map = Map::new();
    (10..20).for_each(|gfn| map.put(gfn, read(gfn + 30, Access::READ)));
    assert_eq!(map.access(14, Access::READ), Some((10, 10, 40, Access::READ)));
    for (what, odd) in [
        ("old", leaf(46, Access::READ)),
        ("tracked", read(46, Access::READ).access_tracked()),
        ("absent", Spte::NONE),
        ("executable", read(46, RX)),
        ("written", written(46)),
        ("in another frame", read(47, Access::READ)),
    ] {
        map.put(16, odd);
        assert_eq!(map.access(14, Access::READ), Some((10, 6, 40, Access::READ)), "{what}");
        assert_eq!(map.access(17, Access::READ), Some((17, 3, 47, Access::READ)), "{what}");
        assert_eq!(map.spte(16), odd, "a neighbour gets no mark");
    }
    // What may be written and was not is as good as read-only.
    map.put(16, read(46, RW));
    assert_eq!(map.access(14, Access::READ), Some((10, 10, 40, Access::READ)));
    (10..20).for_each(|gfn| map.put(gfn, written(gfn + 30)));
    map.put(12, leaf(42, RW).touched(Access::READ));
    assert_eq!(map.access(14, Access::READ), Some((13, 7, 43, RW)), "without D it is not joined for writing");
}

#[test]
fn a_translation_ends_with_its_table_and_with_the_pool() {
    let map = Map::new();
    (508..516).for_each(|gfn| map.put(gfn, read(gfn - 508 + 40, Access::READ)));
    assert_eq!(map.access(511, Access::READ), Some((508, 4, 40, Access::READ)));
    assert_eq!(map.access(512, Access::READ), Some((512, 4, 44, Access::READ)));
    (0..4).for_each(|gfn| map.put(gfn, read(FRAMES - 2 + gfn, Access::READ)));
    assert_eq!(map.access(0, Access::READ), Some((0, 2, FRAMES as u32 - 2, Access::READ)));
    // Frame 0 has no frame before it.
    (20..23).for_each(|gfn| map.put(gfn, read(gfn - 20, Access::READ)));
    assert_eq!(map.access(20, Access::READ), Some((20, 3, 0, Access::READ)));
}

#[test]
fn code_is_copied_as_far_as_it_may_be_fetched_and_nothing_is_marked() {
    let map = Map::new();
    let frames: Vec<Pfn> = (0..4).map(|_| map.pool.alloc(Fill::Zeros).unwrap()).collect();
    for (&pfn, n) in frames.iter().zip(1..) {
        map.pool.words(pfn).iter().for_each(|word| word.store(0x0101_0101_0101_0101 * n, Ordering::Relaxed));
    }
    let [one, two, three, four] = frames[..] else { unreachable!() };
    // The frames are not in the order of the pages, and one of the pages is not code.
    map.put(511, Spte::leaf(three, RX));
    map.put(512, Spte::leaf(one, RX));
    map.put(513, Spte::leaf(two, RW));
    map.put(LOWER_HALF_PAGES - 1, Spte::leaf(four, RX));
    map.pool.words(three)[511].store(0x8877_6655_4433_2211, Ordering::Relaxed);
    let walker = map.walker();
    let fetch = |at: u64, count: usize| {
        let mut bytes = vec![0xee; count];
        let done = walker.fetch(Gpa(at), &mut bytes);
        assert!(bytes[done..].iter().all(|&byte| byte == 0xee), "beyond what was read");
        bytes.truncate(done);
        bytes
    };
    assert_eq!(fetch(0x20_0000 - 5, 9), [0x44, 0x55, 0x66, 0x77, 0x88, 1, 1, 1, 1]);
    assert_eq!(fetch(0x20_1000 - 3, 15), [1, 1, 1], "the next page is not executable");
    assert_eq!(fetch(0x20_1000, 15), []);
    assert_eq!(fetch(0x1f_e000, 15), [], "a hole");
    assert_eq!(fetch((1 << 47) - 2, 15), [4, 4], "the end of the lower half");
    assert_eq!([fetch(1 << 47, 15), fetch(u64::MAX, 15), fetch(0x20_0000, 0)], [const { Vec::new() }; 3]);
    assert_eq!(fetch(0x1f_f000, 8192).len(), 8192);
    for gfn in [511, 512] {
        assert!(!map.spte(gfn).is_accessed());
    }
    map.put(512, Spte::leaf(one, RX).access_tracked());
    assert_eq!(fetch(0x20_0000, 15), [], "not without a fault");
    map.put(512, leaf(FRAMES, RX));
    assert_eq!(fetch(0x20_0000, 15), [], "no frame of the pool");
    map.pool.put_all(&frames);
}
