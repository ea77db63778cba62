// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Scripts: what can be done to an address space, and how to make it up.

use super::common::{NONE, READ, RW, RX, pages};
use proptest::prelude::*;
use shadow_mmu::addr::{Access, Hva, PAGE_SIZE};
use shadow_mmu::mm::{Advice, MMAP_BASE, MapFlags, RemapFlags, Trap};

/// First page of the arena; it lies across the ends of a leaf table and of the table above it.
pub(super) const ARENA: u64 = (0x20_0000_0000 >> 12) - 24;
pub(super) const ARENA_PAGES: u64 = 64;
/// Where in the arena the heap starts.
pub(super) const HEAP: u64 = 48;
/// Spaces there may be at a time.
pub(super) const SPACES: usize = 4;
/// Pages of the file; the last is half.
pub(super) const FILE_PAGES: u64 = 12;

/// A place that calls aim at: in the arena, or (beyond it) counted down from where mappings go by themselves.
pub(super) type Spot = u64;

pub(super) fn page_of(spot: Spot) -> u64 {
    if spot < ARENA_PAGES { ARENA + spot } else { MMAP_BASE.page() - (spot - ARENA_PAGES) - 1 }
}

pub(super) fn hva(page: u64) -> Hva {
    Hva(page * PAGE_SIZE)
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Where {
    Anywhere,
    Hint(Spot),
    Fixed(Spot),
    NoReplace(Spot),
}

#[derive(Debug, Clone, Copy)]
pub(super) enum What {
    Private,
    Shared,
    File { from: u64 },
}

/// What is asked about the age of a page, or of the 2 MiB around it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Age {
    Test,
    ClearFlush,
    Clear,
    ClearFlushPmd,
    ClearPmd,
}

/// What a child begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Child {
    /// Only what fork gave it.
    AsForked,
    /// All of its pages read once.
    HasRead,
}

/// How a space ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Death {
    ByExit,
    ByReaper,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Op {
    Map(Where, u64, Access, What, MapFlags),
    Unmap(Spot, u64),
    Protect(Spot, u64, Access),
    Remap {
        old: Spot,
        old_len: u64,
        new_len: u64,
        flags: RemapFlags,
        to: Spot,
    },
    Advise(Spot, u64, Advice),
    Brk {
        bytes: u64,
    },
    Read(Spot),
    Fetch(Spot),
    Write(Spot, u64),
    HostRead(Spot),
    HostWrite(Spot, u64),
    ReadAll,
    /// A word of its own to each page.
    WriteAll(u64),
    /// The same word to each page.
    WriteSame(u64),
    /// A scan of so many pages of all spaces.
    Scan(u64),
    /// Every merge of every space is taken back.
    Unmerge,
    Age(Spot, Age),
    /// Every access is refused.
    Trap(Spot, u64, Trap),
    /// Traps of this kind are lifted.
    Untrap(Spot, u64, Trap),
    /// A child, if there are not too many spaces. The script goes on in the parent.
    Fork(Child),
    /// The script goes on in that space.
    Switch(usize),
    /// The current space goes, unless it is the last; the script goes on in another one.
    Die(Death),
    Register,
    Unregister(usize),
    UnregisterNoRelease(usize),
}

pub(super) fn spot() -> impl Strategy<Value = Spot> {
    prop_oneof![8 => 0..ARENA_PAGES, 2 => ARENA_PAGES..ARENA_PAGES + 24]
}

pub(super) fn len() -> impl Strategy<Value = u64> {
    prop_oneof![8 => 1..9u64, 2 => 9..40u64]
}

pub(super) fn prot() -> impl Strategy<Value = Access> {
    let write_only = Access::WRITE;
    prop_oneof![
        8 => Just(RW),
        2 => Just(READ),
        1 => Just(RX),
        1 => Just(Access::all()),
        1 => Just(NONE),
        1 => Just(write_only)
    ]
}

pub(super) fn op() -> impl Strategy<Value = Op> {
    let place = prop_oneof![
        2 => Just(Where::Anywhere),
        2 => spot().prop_map(Where::Hint),
        6 => spot().prop_map(Where::Fixed),
        1 => spot().prop_map(Where::NoReplace),
    ];
    let what = prop_oneof![
        4 => Just(What::Private),
        2 => Just(What::Shared),
        2 => (0..FILE_PAGES).prop_map(|from| What::File { from }),
    ];
    let extra = prop_oneof![4 => Just(MapFlags::empty()), 1 => Just(MapFlags::POPULATE)];
    let advice = prop_oneof![
        4 => Just(Advice::DontNeed),
        2 => Just(Advice::Free),
        4 => Just(Advice::Remove),
        1 => Just(Advice::PopulateRead),
        1 => Just(Advice::PopulateWrite),
        1 => Just(Advice::Random),
        1 => Just(Advice::Normal),
        2 => Just(Advice::DontFork),
        1 => Just(Advice::DoFork),
        1 => Just(Advice::NoEffect),
        8 => Just(Advice::Mergeable),
        2 => Just(Advice::Unmergeable),
    ];
    let (fixed, keep) = (RemapFlags::FIXED, RemapFlags::DONTUNMAP);
    let remap_flags = prop_oneof![
        2 => Just(RemapFlags::empty()),
        4 => Just(RemapFlags::MAYMOVE),
        4 => Just(RemapFlags::MAYMOVE | fixed),
        2 => Just(RemapFlags::MAYMOVE | keep),
        2 => Just(RemapFlags::MAYMOVE | fixed | keep),
        1 => prop_oneof![Just(fixed), Just(keep)],
    ];
    // Half of the time the length stays, as moving needs it.
    let lengths = (0..12u64, 0..12u64, any::<bool>()).prop_map(|(a, b, same)| (a, if same { a } else { b }));
    let word = 1..u64::MAX;
    let age = prop_oneof![
        2 => Just(Age::Test),
        1 => Just(Age::ClearFlush),
        1 => Just(Age::Clear),
        1 => Just(Age::ClearFlushPmd),
        1 => Just(Age::ClearPmd),
    ];
    let trap = prop_oneof![Just(Trap::Bus), Just(Trap::Poison), Just(Trap::Revoke)];
    prop_oneof![
        8 => (place, len(), prot(), what, extra).prop_map(|(at, n, prot, what, extra)| Op::Map(at, n, prot, what, extra)),
        3 => (spot(), len()).prop_map(|(at, n)| Op::Unmap(at, n)),
        5 => (spot(), len(), prot()).prop_map(|(at, n, prot)| Op::Protect(at, n, prot)),
        6 => (spot(), lengths, remap_flags, spot())
            .prop_map(|(old, (old_len, new_len), flags, to)| Op::Remap { old, old_len, new_len, flags, to }),
        5 => (spot(), prop_oneof![9 => len(), 1 => Just(0)], advice).prop_map(|(at, n, advice)| Op::Advise(at, n, advice)),
        2 => (0..pages(24)).prop_map(|bytes| Op::Brk { bytes }),
        8 => spot().prop_map(Op::Read),
        1 => spot().prop_map(Op::Fetch),
        12 => (spot(), word.clone()).prop_map(|(at, word)| Op::Write(at, word)),
        2 => spot().prop_map(Op::HostRead),
        4 => (spot(), word.clone()).prop_map(|(at, word)| Op::HostWrite(at, word)),
        1 => Just(Op::ReadAll),
        2 => word.clone().prop_map(Op::WriteAll),
        2 => word.prop_map(Op::WriteSame),
        8 => prop_oneof![Just(3u64), Just(10_000)].prop_map(Op::Scan),
        1 => Just(Op::Unmerge),
        6 => (spot(), age).prop_map(|(at, age)| Op::Age(at, age)),
        3 => (spot(), len(), trap.clone()).prop_map(|(at, n, trap)| Op::Trap(at, n, trap)),
        3 => (spot(), len(), trap).prop_map(|(at, n, trap)| Op::Untrap(at, n, trap)),
        3 => prop_oneof![Just(Child::AsForked), Just(Child::HasRead)].prop_map(Op::Fork),
        3 => (0..SPACES).prop_map(Op::Switch),
        1 => prop_oneof![Just(Death::ByExit), Just(Death::ByReaper)].prop_map(Op::Die),
        2 => Just(Op::Register),
        1 => (0..4usize).prop_map(Op::Unregister),
        1 => (0..4usize).prop_map(Op::UnregisterNoRelease),
    ]
}
