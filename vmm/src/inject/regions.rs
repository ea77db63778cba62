// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory of a guest by name, for plans that do not know addresses.
//!
//! | name | what |
//! | --- | --- |
//! | `heap` | what `brk` moves |
//! | `stack` | the main thread's stack |
//! | `image` | the program: code, data and bss |
//! | `mappings` | everything else: what the program mapped, stacks of threads among it |
//!
//! A name is looked up when it is used, so it is about what is mapped then.

use shadow_mmu::addr::HvaRange;
use shadow_mmu::inject::Where;
use shadow_mmu::mm::{Mm, Vma, VmaFlags};

/// The names.
pub const NAMES: [&str; 4] = [HEAP, STACK, IMAGE, MAPPINGS];
const HEAP: &str = "heap";
const STACK: &str = "stack";
const IMAGE: &str = "image";
const MAPPINGS: &str = "mappings";

/// The region of this name.
pub fn named(name: &str) -> Option<&'static str> {
    NAMES.into_iter().find(|known| *known == name)
}

/// Which region of `mm` a VMA of it belongs to.
pub fn region_of(mm: &Mm, vma: &Vma) -> &'static str {
    if vma.flags.contains(VmaFlags::HEAP) {
        HEAP
    } else if vma.flags.contains(VmaFlags::STACK) {
        STACK
    } else if vma.range.end <= mm.brk_start() {
        IMAGE
    } else {
        MAPPINGS
    }
}

/// What of `mm` is meant, as far as it is mapped, ascending.
pub fn mapped(mm: &Mm, at: Where) -> Vec<HvaRange> {
    let vmas = mm.vmas().into_iter();
    let parts = vmas.map(|vma| match at {
        Where::Anywhere => vma.range,
        Where::At(range) => vma.range.intersect(range),
        Where::Region(name) if region_of(mm, &vma) == name => vma.range,
        Where::Region(_) => HvaRange { end: vma.range.start, ..vma.range },
    });
    parts.filter(|range| !range.is_empty()).collect()
}
