// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Whether somebody logs writes. Nobody does most of the time, so who writes without a vCPU looks here before telling anybody.
//!
//! # Protocol
//! ```text
//! who writes                      who begins a log
//! D1  the bytes                   L1  open += 1
//! D2  light fence                 L2  heavy fence
//! D3  open > 0? then tell         L3  the bytes, as what the log begins with
//! ```
//! Either D3 sees L1, and the write is told; or D1 came before L2, and L3 reads what was written (I37). Without the fences a
//! CPU may still have the bytes in its store buffer when it finds no log open, and the write would be in neither.

#[cfg(feature = "mmu-notifier")]
use crate::sync::Arc;
use crate::sync::AsymmetricFence;
use crate::sync::atomic::{AtomicUsize, Ordering};

/// The logs of writes to one address space.
#[derive(Debug, Default)]
pub(crate) struct WriteLogs {
    open: AtomicUsize,
    fence: AsymmetricFence,
}

/// A log of writes is open: until this is dropped, secondaries are told of writes that no vCPU makes.
#[cfg(feature = "mmu-notifier")]
#[derive(Debug)]
pub(crate) struct WriteLogging(Arc<WriteLogs>);

impl WriteLogs {
    /// Opens a log. Every write that is not told from now on was made before, and its bytes can be seen.
    #[cfg(feature = "mmu-notifier")]
    pub(crate) fn begin(logs: &Arc<Self>) -> WriteLogging {
        logs.open.fetch_add(1, Ordering::Relaxed);
        logs.fence.heavy();
        WriteLogging(Arc::clone(logs))
    }

    /// Whether a write that the caller has just made is to be told.
    pub(crate) fn is_open(&self) -> bool {
        self.fence.light();
        self.open.load(Ordering::Relaxed) > 0
    }
}

#[cfg(feature = "mmu-notifier")]
impl Drop for WriteLogging {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}
