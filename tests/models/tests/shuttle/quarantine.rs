// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Who walks which list of listeners. The woven copy of `notifier/list.rs` says so here (see `build.rs`), and frees lists
//! through [`free`]: one that is freed too early is a failure and not an access to freed memory.

use std::cell::RefCell;

thread_local! {
    /// Addresses of the lists that are walked, once for each walk. An execution runs on one OS thread.
    static WALKED: RefCell<Vec<usize>> = const { RefCell::new(Vec::new()) };
}

/// A walk of a list, until it is dropped.
#[derive(Debug)]
pub(crate) struct Reader(usize);

impl Reader {
    pub(crate) fn of<T>(list: &T) -> Self {
        let at = std::ptr::from_ref(list).addr();
        WALKED.with_borrow_mut(|walked| walked.push(at));
        Self(at)
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        WALKED.with_borrow_mut(|walked| {
            if let Some(at) = walked.iter().position(|&at| at == self.0) {
                walked.swap_remove(at);
            }
        });
    }
}

/// Frees a list.
///
/// # Panics
/// If it is walked.
pub(crate) fn free<T>(list: Box<T>) {
    let at = std::ptr::from_ref(&*list).addr();
    if WALKED.with_borrow(|walked| walked.contains(&at)) {
        std::mem::forget(list);
        panic!("a list of listeners is freed while an op walks it (R19)");
    }
}

/// A new execution begins; what one that failed has left is forgotten.
pub(crate) fn begin() {
    WALKED.take();
}
