// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The fault points of what is made, and tried, before it is known who decides over them: an engine.

use shadow_mmu::inject::{Effect, Faults, Point};
use std::sync::OnceLock;

/// No faults until [`arm`](Self::arm): what is found out before is to be true.
#[derive(Debug, Default)]
pub(crate) struct Armed(OnceLock<Faults>);

impl Armed {
    /// From now on `faults` decides. Once: later ones are ignored.
    pub(crate) fn arm(&self, faults: Faults) {
        let _ = self.0.set(faults);
    }

    /// Those that decide now.
    pub(crate) fn get(&self) -> Faults {
        self.0.get().cloned().unwrap_or_default()
    }

    /// A thread comes to `point`.
    pub(crate) fn hit(&self, point: &'static Point) -> Effect {
        self.0.get().map_or(Effect::Go, |faults| faults.hit(point))
    }

    /// The error number that `point` fails with, if it does.
    pub(crate) fn fail(&self, point: &'static Point) -> Option<i32> {
        self.0.get()?.fail(point)
    }
}
