// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The index against a list; and against a tree by content, by the clock.

use super::*;
use crate::addr::PAGE_SIZE;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::hint::black_box;
use std::time::Instant;
use xxhash_rust::xxh3::xxh3_64;

fn all(index: &mut Index, hash: u32) -> Vec<u32> {
    let mut found = Vec::new();
    index.find(hash, |_, pfn| {
        found.push(pfn.0);
        Step::Next
    });
    found
}

#[test]
fn a_frame_costs_sixteen_bytes() {
    for frames in [2, 1000, 65536] {
        assert_eq!(Index::new(frames).map(|index| index.bytes()), Some(16 * frames as u64));
    }
    assert!(Index::new(u32::MAX as usize).is_none());
}

#[test]
fn entries_are_found_by_hash_and_taken_out_anywhere() {
    let mut index = Index::new(8).unwrap();
    // All in the first bucket.
    for (pfn, hash) in [(0, 5), (1, 6), (2, 5), (3, 5)] {
        assert!(index.insert(Pfn(pfn), hash, Place::of_page(7, 0x123)));
    }
    assert_eq!(all(&mut index, 5), [3, 2, 0]);
    index.remove(Pfn(2));
    index.remove(Pfn(4));
    assert_eq!((all(&mut index, 5), all(&mut index, 6)), (vec![3, 0], vec![1]));
    index.remove(Pfn(3));
    index.remove(Pfn(0));
    assert!(all(&mut index, 5).is_empty() && !index.is_entry(Pfn(0)) && index.is_entry(Pfn(1)));
    assert!(index.insert(Pfn(0), 6, Place::of_domain(u32::MAX)));
    assert_eq!(all(&mut index, 6), [0, 1]);
    assert_eq!(index.place(Pfn(0)).domain(), u32::MAX);
}

#[test]
fn a_place_is_what_it_was_made_of() {
    let mut index = Index::new(1).unwrap();
    for (space, page) in [(0, 0), (SPACES - 1, (1 << PAGE_BITS) - 1), (1, 0x7_0000_0001)] {
        index.set_place(Pfn(0), Place::of_page(space, page));
        assert_eq!((index.place(Pfn(0)).space(), index.place(Pfn(0)).page()), (space, page));
    }
}

#[test]
fn a_bucket_takes_so_many_other_hashes_and_any_number_of_one() {
    let mut index = Index::new(1024).unwrap();
    let place = Place::of_page(0, 0);
    let inserted = (0..100).filter(|&pfn| index.insert(Pfn(pfn), pfn, place)).count();
    assert_eq!(inserted, LONGEST);
    index.remove(Pfn(0));
    assert!(index.insert(Pfn(99), 99, place));
    // Of one hash there may be any number; those that are looked at are few.
    assert!((100..1000).all(|pfn| index.insert(Pfn(pfn), 1, place)));
    assert_eq!(all(&mut index, 1).len(), LONGEST);
    index.remove(Pfn(500));
    assert!(!index.is_entry(Pfn(500)) && index.is_entry(Pfn(501)) && index.is_entry(Pfn(1)));
}

/// Frames of the table that scripts run on: more than one bucket takes.
const FRAMES: u32 = 256;
/// A few hashes, of which most share a bucket.
const HASHES: [u32; 5] = [0, 1, 2, 1 << 24, u32::MAX];

#[derive(Debug, Clone)]
enum Op {
    Insert(u32, usize),
    Remove(u32),
    /// Visits the entries of a hash: takes out those whose number has one of these bits, stops at one with one of those.
    Find(usize, u32, u32),
    SetPlace(u32, u64),
}

fn op() -> impl Strategy<Value = Op> {
    let (pfn, hash) = (0..FRAMES, 0..HASHES.len());
    prop_oneof![
        6 => (pfn.clone(), hash.clone()).prop_map(|(pfn, hash)| Op::Insert(pfn, hash)),
        2 => pfn.clone().prop_map(Op::Remove),
        2 => (hash, any::<u32>(), any::<u32>())
            .prop_map(|(hash, remove, stop)| Op::Find(hash, remove & remove >> 16 & 0x1f, stop & 0x60)),
        1 => (pfn, 0..1u64 << 48).prop_map(|(pfn, place)| Op::SetPlace(pfn, place)),
    ]
}

proptest! {
    /// A list of entries, the latest first, is all that the table is.
    #[test]
    fn a_table_is_a_list(ops in prop::collection::vec(op(), 1..900)) {
        let mut index = Index::new(FRAMES as usize).unwrap();
        let mut list: Vec<(Pfn, u32)> = Vec::new();
        let mut places: BTreeMap<Pfn, Place> = BTreeMap::new();
        for op in ops {
            match op {
                Op::Insert(pfn, hash) => {
                    let (pfn, hash) = (Pfn(pfn), HASHES[hash]);
                    prop_assert_eq!(index.is_entry(pfn), list.iter().any(|one| one.0 == pfn));
                    if !index.is_entry(pfn) {
                        let bucket = index.bucket(hash);
                        let others = list.iter().filter(|one| one.1 != hash && index.bucket(one.1) == bucket);
                        let room = others.count() < LONGEST;
                        let place = Place::of_page(pfn.index(), hash.into());
                        prop_assert_eq!(index.insert(pfn, hash, place), room);
                        if room {
                            list.insert(0, (pfn, hash));
                            places.insert(pfn, place);
                        }
                    }
                }
                Op::Remove(pfn) => {
                    index.remove(Pfn(pfn));
                    list.retain(|one| one.0 != Pfn(pfn));
                }
                Op::Find(hash, remove, stop) => {
                    let hash = HASHES[hash];
                    let step = |pfn: Pfn| match pfn.0 {
                        n if n & remove != 0 => Step::Remove,
                        n if n & stop != 0 => Step::Stop,
                        _ => Step::Next,
                    };
                    let mut visited = Vec::new();
                    let found = index.find(hash, |_, pfn| {
                        visited.push(pfn);
                        step(pfn)
                    });
                    let mut expected = Vec::new();
                    for pfn in list.iter().filter(|one| one.1 == hash).map(|one| one.0).take(LONGEST) {
                        expected.push(pfn);
                        if step(pfn) == Step::Stop {
                            break;
                        }
                    }
                    prop_assert_eq!(found, expected.last().copied().filter(|&pfn| step(pfn) == Step::Stop));
                    list.retain(|one| !expected.contains(&one.0) || step(one.0) != Step::Remove);
                    prop_assert_eq!(visited, expected);
                }
                Op::SetPlace(pfn, place) => {
                    index.set_place(Pfn(pfn), Place(place));
                    places.insert(Pfn(pfn), Place(place));
                }
            }
        }
        for hash in HASHES {
            let of_hash = list.iter().filter(|one| one.1 == hash);
            let expected: Vec<u32> = of_hash.map(|one| one.0.0).take(LONGEST).collect();
            prop_assert_eq!(all(&mut index, hash), expected);
        }
        for (pfn, place) in places {
            prop_assert_eq!(index.place(pfn), place);
        }
        for (pfn, hash) in list {
            prop_assert_eq!(index.hash(pfn), hash);
        }
    }
}

/// Not a test: prints what it costs to find a page by its hash, compared with a tree by its bytes, of pages that differ in their
/// first word, and of pages that differ in their last.
#[test]
#[ignore = "prints figures"]
fn measure_a_look_up_by_hash_and_by_tree() {
    const PAGES: u32 = 131_072;
    const BYTES: usize = PAGE_SIZE as usize;
    let mut memory = vec![7u8; PAGES as usize * BYTES];
    let shuffled = |n: u32| n.wrapping_mul(0x9e37_79b1) % PAGES;
    let nanoseconds = |what: &mut dyn FnMut(u32)| {
        let began = Instant::now();
        (0..PAGES).for_each(|n| what(shuffled(n)));
        began.elapsed().as_nanos() as f64 / f64::from(PAGES)
    };
    for (name, at) in [("first", 0), ("last", BYTES - 8)] {
        for (page, n) in memory.chunks_exact_mut(BYTES).zip(0u64..) {
            page.fill(7);
            page[at..at + 8].copy_from_slice(&n.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
        }
        let page = |n: u32| &memory[n as usize * BYTES..][..BYTES];
        for _ in 0..2 {
            let mut hashes = vec![0; PAGES as usize];
            let hash = nanoseconds(&mut |n| hashes[n as usize] = (xxh3_64(page(n)) >> 32) as u32);
            let mut index = Index::new(PAGES as usize).unwrap();
            let insert = nanoseconds(&mut |n| {
                assert!(index.insert(Pfn(n), hashes[n as usize], Place::of_page(0, n.into())));
            });
            let find = nanoseconds(&mut |n| {
                let same =
                    |_: &Index, entry: Pfn| if page(entry.0) == page(n) { Step::Stop } else { Step::Next };
                assert!(black_box(index.find(hashes[n as usize], same)).is_some());
            });
            let mut tree = BTreeMap::new();
            let tree_insert = nanoseconds(&mut |n| _ = tree.insert(page(n), n));
            let tree_find = nanoseconds(&mut |n| assert_eq!(tree.get(page(n)), Some(&n)));
            println!(
                "{PAGES} pages that differ in their {name} word: hash {hash:.0} ns; by hash: insert {insert:.0} ns, find and \
                 compare {find:.0} ns; by tree: insert {tree_insert:.0} ns, find {tree_find:.0} ns"
            );
        }
    }
}
