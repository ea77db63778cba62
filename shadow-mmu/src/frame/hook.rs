// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Who wants to hear of writes through vm-memory: its dirty bitmap, as a call.
//!
//! vm-memory marks a bitmap after each write through its slices. Who writes through a reference or a pointer that a slice
//! gave (`get_atomic_ref`, `ptr_guard_mut`) marks it himself, with the slice's `bitmap()`. The pool's own memory has an empty
//! one: what is a frame's, no log is about. A [`GuestView`](crate::iommu::GuestView) has one for its addresses.

use crate::sync::Arc;
use std::fmt::Debug;
use vm_memory::bitmap::{Bitmap, NewBitmap, RefSlice, WithBitmapSlice};

/// Hears of writes.
pub trait WriteSink: Debug + Send + Sync {
    /// `len` bytes from `addr` on were written, or may have been.
    fn written(&self, addr: u64, len: usize);
}

/// A bitmap of vm-memory's that tells a [`WriteSink`], or nobody, and remembers nothing.
#[derive(Debug, Clone, Default)]
pub struct WriteHook(Option<Arc<dyn WriteSink>>);

impl WriteHook {
    /// Tells `sink`, by the addresses of whatever the bitmap is for.
    pub fn new(sink: Arc<dyn WriteSink>) -> Self {
        Self(Some(sink))
    }
}

impl<'a> WithBitmapSlice<'a> for WriteHook {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for WriteHook {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if let Some(sink) = &self.0
            && len > 0
        {
            sink.written(offset as u64, len);
        }
    }
    /// False: whom it told remembers.
    fn dirty_at(&self, _: usize) -> bool {
        false
    }
    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

impl NewBitmap for WriteHook {
    fn with_len(_: usize) -> Self {
        Self::default()
    }
}
