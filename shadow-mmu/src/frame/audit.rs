// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What must be true of the free list, checked while frames come and go.
//!
//! The free list's lock is held, so the bitmaps and their counters stand still. A frame goes into the bitmap after its last
//! reference went and out of it before it gets its first, so what is free there has neither references nor ptes. The
//! converse cannot be asked: a frame without references may be on its way to the list.

use super::FramePool;
use crate::addr::Pfn;

/// Frames whose metadata one audit looks at: 4 GiB of memory, about 2 ms. The bitmaps are looked at whole.
const FRAMES_A_TIME: usize = 1 << 20;

/// What an audit of the free list saw.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PoolAudit {
    /// Free frames whose metadata was looked at.
    pub looked_at: usize,
    /// The frame to begin with next time: a large pool is looked at by parts.
    pub next: usize,
    /// What was wrong, a line each. Empty is good.
    pub violations: Vec<String>,
}

impl FramePool {
    /// Checks the free list: its counters against its bitmaps, and the metadata of free frames from frame `from` on. Whoever
    /// wants a frame waits meanwhile; about 1 ns a frame.
    pub fn audit(&self, from: usize) -> PoolAudit {
        let count = self.frames.len();
        let from = if from < count { from } else { 0 };
        let to = count.min(from.saturating_add(FRAMES_A_TIME));
        let mut audit = PoolAudit { next: if to == count { 0 } else { to }, ..PoolAudit::default() };
        let free = self.free.lock();
        let found = free.recount();
        let counted = (free.free_count(), free.used_count());
        if found.free != counted.0 || found.used != counted.1 {
            audit.violations.push(format!(
                "the free list counts {} frames, {} of them used, and has {} and {}",
                counted.0, counted.1, found.free, found.used
            ));
        }
        if found.used_not_free > 0 {
            audit.violations.push(format!("{} frames are used free ones and not free", found.used_not_free));
        }
        for pfn in free.free_in(from..to) {
            audit.looked_at += 1;
            let frame = self.frame(pfn);
            let (refs, maps) = (frame.ref_count(), frame.map_count());
            if refs > 0 || maps > 0 {
                let Pfn(number) = pfn;
                let held = format!("{refs} references and {maps} ptes");
                audit.violations.push(format!("the free frame {number:#x} has {held}"));
            }
        }
        audit
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed test may panic")]
    use super::super::{Fill, FreedFrames};
    use super::*;
    use crate::addr::PAGE_SIZE;

    fn pool() -> FramePool {
        FramePool::new(200 * PAGE_SIZE, FreedFrames::Keep).unwrap()
    }

    #[test]
    fn a_sound_pool_has_no_violations_whatever_came_and_went() {
        let pool = pool();
        let mut frames = Vec::new();
        pool.alloc_up_to(150, Fill::Zeros, &mut frames);
        pool.put_all(&frames[40..90]);
        let audit = pool.audit(0);
        assert_eq!(audit, PoolAudit { looked_at: 100, next: 0, violations: Vec::new() });
        assert_eq!(pool.audit(150).looked_at, 50, "from there on");
        assert_eq!(pool.audit(1000).looked_at, 100, "from the start where there is no such frame");
    }

    #[test]
    fn a_free_frame_that_is_mapped_is_found() {
        let pool = pool();
        let pfn = pool.alloc(Fill::Zeros).unwrap();
        pool.put(pfn);
        pool.frame(pfn).add_map();
        let audit = pool.audit(0);
        assert_eq!(audit.violations, [format!("the free frame {:#x} has 0 references and 1 ptes", pfn.0)]);
        pool.frame(pfn).remove_map();
        assert!(pool.audit(0).violations.is_empty());
    }

    #[test]
    fn counters_and_bitmaps_that_differ_are_found() {
        let pool = pool();
        let frames: Vec<_> = (0..3).map(|_| pool.alloc(Fill::Zeros).unwrap()).collect();
        pool.put_all(&frames);
        pool.free.lock().miscount();
        let lines = pool.audit(0).violations;
        assert_eq!(
            lines[0], "the free list counts 199 frames, 3 of them used, and has 200 and 3",
            "{lines:?}"
        );
    }
}
