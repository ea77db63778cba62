// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The layer compiled out (`CONFIG_MMU_NOTIFIER=n`): the types and the calls of a primary MMU stay, are empty and cost nothing.
//! There is no registration, so what listens does not compile without the feature.

use super::{Event, Misuse, WouldBlock, WrittenPages, YoungPages};
use crate::addr::{Hva, HvaRange};
use crate::mm::Pte;
use std::marker::PhantomData;

/// Nobody listens, ever.
#[derive(Debug, Default)]
pub struct Notifiers;

/// A pair that nobody hears of.
#[derive(Debug)]
#[must_use = "the pair ends when this is dropped: bind it to a name and drop it after the change"]
pub struct InvalidateGuard<'a>(PhantomData<&'a Notifiers>);

impl Notifiers {
    /// Nobody listens.
    pub const fn new() -> Self {
        Self
    }
    /// False.
    #[inline]
    pub const fn has_listeners(&self) -> bool {
        false
    }
    /// False.
    #[inline]
    pub const fn inside(&self) -> bool {
        false
    }
    /// Nothing.
    ///
    /// # Errors
    /// Never.
    #[inline]
    pub const fn release(&self) -> Result<(), Misuse> {
        Ok(())
    }
    /// Nothing.
    #[inline]
    pub const fn invalidate(&self, _: HvaRange, _: Event) -> InvalidateGuard<'_> {
        InvalidateGuard(PhantomData)
    }
    /// Nothing.
    ///
    /// # Errors
    /// Never.
    #[inline]
    pub const fn invalidate_nonblock(
        &self,
        _: HvaRange,
        _: Event,
    ) -> Result<InvalidateGuard<'_>, WouldBlock> {
        Ok(InvalidateGuard(PhantomData))
    }
    /// False.
    #[inline]
    pub const fn clear_flush_young(&self, _: HvaRange) -> bool {
        false
    }
    /// False.
    #[inline]
    pub const fn clear_young(&self, _: HvaRange) -> bool {
        false
    }
    /// Nothing.
    #[inline]
    pub const fn test_clear_young(&self, _: &mut YoungPages) {}
    /// Nothing.
    #[inline]
    pub const fn test_clear_dirty(&self, _: &mut WrittenPages) {}
    /// Nothing.
    #[inline]
    pub const fn written(&self, _: HvaRange) {}
    /// False.
    #[inline]
    pub const fn test_young(&self, _: Hva) -> bool {
        false
    }
    /// Nothing.
    #[inline]
    pub const fn change_pte(&self, _: Hva, _: Pte) {}
    /// Nothing.
    #[inline]
    pub const fn invalidate_page(&self, _: Hva) {}
    /// Nothing.
    #[inline]
    pub const fn invalidate_range(&self, _: HvaRange) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layer_takes_no_room() {
        assert_eq!(size_of::<Notifiers>() + size_of::<InvalidateGuard<'_>>(), 0);
        assert!(!std::mem::needs_drop::<InvalidateGuard<'_>>());
    }
}
