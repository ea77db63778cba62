// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The machine's memory: one sparse memfd, cut into frames.
//!
//! * [`FramePool`] owns the file, the *direct map* (our view of every frame) and the metadata.
//! * A *window* is a second mapping of the same file ([`FramePool::map_window`]); a VM gives it to KVM as its RAM slot.
//!   Two views, because discarding a page of the window is how a translation is flushed on hosts that shadow guest
//!   tables, and that must not cost us our own view.
//! * [`Frame`] is `struct page` in miniature: references, map count, flags, in one flat array.
//! * `alloc` knows which frames are free and which of those hold old bytes.
//!
//! A frame is *returned* when the last reference goes. A returned frame keeps its bytes until it is handed out again
//! (then it is zeroed) or until enough have gathered to punch them out of the file in one go; one punch costs 3–6 µs,
//! zeroing costs 0.1 µs, so reuse comes first.
//!
//! Locks: the free list's mutex is a leaf lock. Nothing is called with it held.

mod alloc;
mod audit;
mod hook;
mod meta;
mod pool;

pub use audit::PoolAudit;
pub use hook::{WriteHook, WriteSink};
pub use meta::{Frame, FrameFlags};
pub use pool::{Fill, FrameMemory, FramePool, FreedFrames, OutOfFrames, PoolError, PoolStats, Purpose};
