// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Campaigns: random plans × programs × settings, each run as a process of its own and judged.
//!
//! ```text
//!  (seed, i) ──► Dice ──► draw ──► Case ──► run: `umbra inject plan.toml --report=json:… -- run … PROGRAM` ──► Observed
//!                                    │                                                                          │
//!                                    └──────────────► native run ──► Native ──────────────────► judge ◄─────────┘
//!                                                                                                 │ Failure
//!                                                               Kept ◄── shrink ◄─────────────────┘
//! ```
//!
//! | file | what |
//! | --- | --- |
//! | `dice` | the generator that all is drawn from |
//! | `program` | the bundled programs, with arguments that take little time |
//! | `case` | one run: program, settings, plan |
//! | `draw` | makes one of a seed and a number |
//! | `spawn` | starts processes that do not outlive the campaign |
//! | `run` | one case as a child process, and what was seen of it |
//! | `native` | the same program without umbra: what is right |
//! | `judge` | what may have happened, and what must not |
//! | [`leaks`] | what a process looks for in itself when a run is over |
//! | `shrink` | the smallest case that fails in the same way |
//! | `keep` | the folder of a failure: minimal plan, command, output |
//! | `report` | what came of all |
//! | `workers` | several cases at a time, until all are done or somebody says stop |
//!
//! docs/campaigns.md is the page for people.
//!
//! # Determinism
//! Case i of seed S depends on S, i, and which programs and effects may be drawn; on no clock, no host and no other case. What the
//! threads of a run do meanwhile is the scheduler's; so a failure may be there one time in three, and the shrinker says so.

mod case;
mod dice;
mod draw;
mod judge;
mod keep;
pub mod leaks;
mod native;
mod program;
mod report;
mod run;
mod shrink;
mod spawn;
mod workers;

pub use case::{Case, Dirty, Settings};
pub use draw::{Corruption, Deck};
pub use judge::{Ending, Failure, Judge, Kind, judge};
pub use native::Native;
pub use program::{Program, image_names};
pub use report::{FailedRun, PointCount, Progress, Summary};
pub use run::{End, Observed, RunReport};
pub use shrink::{Again, Failed, Shrunk, Tried, shrink};
pub use workers::Campaign;
