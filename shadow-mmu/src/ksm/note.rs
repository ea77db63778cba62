// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What is remembered of a page that is not merged: in the note of its frame, so that it is gone with the frame.

use super::report::NotShared;

/// Why a page that was quiet is not merged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Why {
    /// There is no other like it.
    #[default]
    Unique = 0,
    /// There is one, in another domain.
    Domain = 1,
    /// There are others, and as many share a frame as may.
    Limit = 2,
    /// There is something to merge it with, and it waits for the sweep.
    Wanted = 3,
}

/// What a page is compared by when something like it is looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Finds {
    /// Its hash, which is as good as always enough.
    #[default]
    ByHash,
    /// Its bytes too: it was found to have the hash of other bytes, and would find those each time.
    ByBytes,
}

/// What is remembered of a page that is not merged, in its frame's note.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Note {
    /// Looks in a row that found it written.
    pub(super) streak: u16,
    /// Passes that are to pass over it.
    pub(super) skip: u16,
    /// Why it is not merged.
    pub(super) why: Why,
    /// What its hash finds.
    pub(super) finds: Finds,
}

impl Note {
    pub(super) fn of(bits: u16) -> Self {
        let why = match bits & 3 {
            0 => Why::Unique,
            1 => Why::Domain,
            2 => Why::Limit,
            _ => Why::Wanted,
        };
        let finds = if bits & 1 << 10 == 0 { Finds::ByHash } else { Finds::ByBytes };
        Self { streak: bits >> 2 & 0xf, skip: bits >> 6 & 0xf, why, finds }
    }

    pub(super) fn bits(self) -> u16 {
        self.why as u16 | self.streak << 2 | self.skip << 6 | (self.finds as u16) << 10
    }

    /// After one more look that found it written. The steps are the kernel's (`skip_age`).
    pub(super) fn written(self) -> Self {
        let streak = (self.streak + 1).min(15);
        let skip = match streak {
            0..3 => 0,
            3 => 1,
            4..=5 => 2,
            6..=8 => 4,
            _ => 8,
        };
        Self { streak, skip, ..Self::default() }
    }
}

impl NotShared {
    pub(super) fn count(&mut self, why: Why) {
        match why {
            Why::Unique => self.unique += 1,
            Why::Domain => self.domain += 1,
            Why::Limit => self.limit += 1,
            // The sweep says what became of it.
            Why::Wanted => {}
        }
    }

    pub(super) fn uncount(&mut self, why: Why) {
        let counter = match why {
            Why::Unique => &mut self.unique,
            Why::Domain => &mut self.domain,
            Why::Limit => &mut self.limit,
            Why::Wanted => return,
        };
        *counter = counter.saturating_sub(1);
    }
}
