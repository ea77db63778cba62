// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What an address space tells its listeners, as something to be read: for `umbra run --trace notifier`, and for the report on
//! a guest that died ([`Recorder`](crate::recorder::Recorder)).
//!
//! | file | what |
//! | --- | --- |
//! | [`event`] | one event, as a line of text and as a JSON object |
//! | [`pairs`] | which end belongs to which start |
//! | [`observe`] | a listener that only listens |
//! | [`tracer`] | events from the threads that make them to a thread that writes them |

pub mod event;
pub mod observe;
pub mod pairs;
pub mod tracer;

pub(crate) use event::guest_thread;
pub use event::{Op, TraceEvent, set_guest_thread, start_clock};
pub use observe::{Observe, Observer};
pub use pairs::Pairs;
pub use tracer::Tracer;
