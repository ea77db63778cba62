// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One notifier event, and the only place that says how it is written.
//!
//! A pair of `invalidate_range_start` and `_end` is one event: when it began, and how long it was open. Every other op is an
//! event without a duration.
//!
//! An event carries the thread it was made on. That is the thread which changed the address space, with one exception: what the
//! host does to adopted memory is announced by the thread that reads of it, the watch's, which is umbra's own, or the vCPU that
//! came upon the change and settled it (see [`watch`](shadow_mmu::mm::watch)).
//!
//! # Text
//! Columns: seconds since the trace began, thread, op, reason, range, pages, and what else there is to say. A dash stands for
//! what an op has not.
//! ```text
//!     0.003214 s  tid 4711    invalidate         Unmap           [0x7fffff5fa000, 0x7fffff5fd000)            3 pages  12.4 us
//!     0.003318 s  tid 4711    change_pte         -               [0x7fffff5fe000, 0x7fffff5ff000)            1 page   anonymous 0x1f rw--
//! ```
//!
//! # JSON
//! One object a line; see [`JsonEvent`] for the fields.

use serde::Serialize;
use shadow_mmu::addr::{Hva, HvaRange};
use shadow_mmu::mm::Pte;
use shadow_mmu::notifier::{Blockable, Event, Invalidation};
use std::cell::Cell;
use std::fmt;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

thread_local!(static GUEST_THREAD: Cell<Option<i32>> = const { Cell::new(None) });

/// Says that this thread runs the guest's thread `tid`: events made here carry its number.
pub fn set_guest_thread(tid: i32) {
    GUEST_THREAD.set(Some(tid));
}

/// The guest's thread that this thread runs; `None` on a thread of umbra's own.
pub(crate) fn guest_thread() -> Option<i32> {
    GUEST_THREAD.get()
}

/// One clock in the process, so that an event has the same time in a trace and in a death report.
static BEGAN: LazyLock<Instant> = LazyLock::new(Instant::now);

/// Starts the clock that events are timed by, unless it runs already.
pub fn start_clock() {
    LazyLock::force(&BEGAN);
}

/// The time on that clock.
pub(super) fn now() -> Duration {
    BEGAN.elapsed()
}

/// What listeners were told. The ops are those of [`MmuNotifier`](shadow_mmu::notifier::MmuNotifier), but for
/// `invalidate_range`, which only devices are told that walk the primary's tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// A pair: `invalidate_range_start` to `invalidate_range_end`.
    Invalidate(Invalidation),
    /// A pte is about to change.
    ChangePte(Hva, Pte),
    /// A page has lost its pte.
    InvalidatePage(Hva),
    /// "Accessed" is tested, cleared and flushed.
    ClearFlushYoung(HvaRange),
    /// "Accessed" is tested and cleared.
    ClearYoung(HvaRange),
    /// "Accessed" is tested and cleared, page by page.
    TestClearYoung(HvaRange),
    /// Asks about single pages in the range.
    TestClearDirty(HvaRange),
    /// "Accessed" is tested.
    TestYoung(Hva),
    /// The address space goes.
    Release,
}

impl Op {
    /// Its name, in text and in JSON.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Invalidate(_) => "invalidate",
            Self::ChangePte(..) => "change_pte",
            Self::InvalidatePage(_) => "invalidate_page",
            Self::ClearFlushYoung(_) => "clear_flush_young",
            Self::ClearYoung(_) => "clear_young",
            Self::TestClearYoung(_) => "test_clear_young",
            Self::TestClearDirty(_) => "test_clear_dirty",
            Self::TestYoung(_) => "test_young",
            Self::Release => "release",
        }
    }

    /// The addresses it is about; `None` where it is about all.
    pub fn range(&self) -> Option<HvaRange> {
        match *self {
            Self::Invalidate(invalidation) => Some(invalidation.range),
            Self::ChangePte(hva, _) | Self::InvalidatePage(hva) | Self::TestYoung(hva) => {
                Some(HvaRange::page(hva))
            }
            Self::ClearFlushYoung(range)
            | Self::ClearYoung(range)
            | Self::TestClearYoung(range)
            | Self::TestClearDirty(range) => Some(range),
            Self::Release => None,
        }
    }

    fn invalidation(&self) -> Option<&Invalidation> {
        match self {
            Self::Invalidate(invalidation) => Some(invalidation),
            _ => None,
        }
    }

    /// Why; only pairs say.
    pub fn reason(&self) -> Option<&'static str> {
        Some(match self.invalidation()?.event {
            Event::Unmap => "Unmap",
            Event::Clear => "Clear",
            Event::ProtectionVma => "ProtectionVma",
            Event::ProtectionPage => "ProtectionPage",
            Event::Release => "Release",
        })
    }
}

/// An [`Op`], and when, where and how long it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceEvent {
    /// When it was, or began, since the trace began.
    pub at: Duration,
    /// The guest's thread that it was made on. `None`: on a thread of umbra's own, before the guest ran, after it, or, where
    /// the host has changed adopted memory, while it runs.
    pub tid: Option<i32>,
    /// What.
    pub op: Op,
    /// From the start of a pair to its end. `None` for other ops, and for a pair whose end was not seen.
    pub took: Option<Duration>,
}

impl TraceEvent {
    /// `op`, here and now.
    pub fn now(op: Op) -> Self {
        Self { at: now(), tid: guest_thread(), op, took: None }
    }

    /// The event as it is written in JSON.
    pub fn json(&self) -> JsonEvent {
        let range = self.op.range();
        JsonEvent {
            time_ns: nanoseconds(self.at),
            tid: self.tid,
            op: self.op.name(),
            reason: self.op.reason(),
            start: range.map(|range| range.start.0),
            end: range.map(|range| range.end.0),
            pages: range.map(HvaRange::page_count),
            blockable: self.op.invalidation().map(|it| it.blockable == Blockable::Yes),
            duration_ns: self.took.map(nanoseconds),
            pte: match self.op {
                Op::ChangePte(_, pte) => Some(JsonPte::from(pte)),
                _ => None,
            },
        }
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

impl fmt::Display for TraceEvent {
    /// One line without its end.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let thread = self.tid.map_or_else(|| "umbra".to_owned(), |tid| format!("tid {tid}"));
        let op = self.op.name();
        let reason = self.op.reason().unwrap_or("-");
        write!(f, "{:>12.6} s  {thread:<11} {op:<17}  {reason:<14}", self.at.as_secs_f64())?;
        let rest = match (&self.op, self.took) {
            (Op::Invalidate(_), Some(took)) => format!("{:.1} us", took.as_secs_f64() * 1e6),
            (Op::Invalidate(_), None) => "not ended".to_owned(),
            (Op::ChangePte(_, pte), _) => format!("{pte:?}"),
            _ => String::new(),
        };
        let Some(range) = self.op.range() else { return write!(f, "  -") };
        let pages = range.page_count();
        let unit = if pages == 1 { "page" } else { "pages" };
        write!(f, "  {:<32}  {pages:>11} ", range.to_string())?;
        if rest.is_empty() {
            return f.write_str(unit);
        }
        write!(f, "{unit:<5}  {rest}")?;
        match self.op.invalidation() {
            Some(Invalidation { blockable: Blockable::No, .. }) => f.write_str("  nonblock"),
            _ => Ok(()),
        }
    }
}

/// A [`TraceEvent`] in JSON. Fields that an op has not are left out; `tid` is null for umbra itself. Fields may be added, none
/// will change.
#[derive(Debug, Clone, Serialize)]
pub struct JsonEvent {
    /// Nanoseconds since the trace began, of the start of a pair.
    pub time_ns: u64,
    /// The guest's thread.
    pub tid: Option<i32>,
    /// [`Op::name`].
    pub op: &'static str,
    /// Why; pairs only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<&'static str>,
    /// First byte of the range. Below 2^47, so exact also where numbers are floating-point.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start: Option<u64>,
    /// First byte past it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub end: Option<u64>,
    /// Pages in it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pages: Option<u64>,
    /// Whether listeners may sleep; pairs only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blockable: Option<bool>,
    /// From start to end; pairs that ended only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub duration_ns: Option<u64>,
    /// The new pte; `change_pte` only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pte: Option<JsonPte>,
}

/// A pte in JSON.
#[derive(Debug, Clone, Serialize)]
pub struct JsonPte {
    /// The frame.
    pub pfn: u32,
    /// Whether there is a page.
    pub present: bool,
    /// Whether a write needs no fault.
    pub writable: bool,
    /// Whether it is the shared zero frame.
    pub zero: bool,
}

impl From<Pte> for JsonPte {
    fn from(pte: Pte) -> Self {
        Self { pfn: pte.pfn().0, present: pte.is_present(), writable: pte.is_writable(), zero: pte.is_zero() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shadow_mmu::addr::Pfn;

    fn pair(blockable: Blockable) -> Op {
        let range = HvaRange::pages_from(Hva(0x7fff_ff5f_a000), 3);
        Op::Invalidate(Invalidation { range, event: Event::Unmap, blockable })
    }

    fn event(op: Op, tid: Option<i32>, took: Option<u64>) -> TraceEvent {
        TraceEvent { at: Duration::from_micros(3214), tid, op, took: took.map(Duration::from_nanos) }
    }

    #[test]
    fn lines_are_as_documented() {
        let pte = Pte::anonymous(Pfn(0x1f)).writable();
        assert_eq!(
            event(pair(Blockable::Yes), Some(4711), Some(12_400)).to_string(),
            "    0.003214 s  tid 4711    invalidate         Unmap           \
             [0x7fffff5fa000, 0x7fffff5fd000)            3 pages  12.4 us"
        );
        assert_eq!(
            event(Op::ChangePte(Hva(0x7fff_ff5f_e000), pte), Some(4711), None).to_string(),
            "    0.003214 s  tid 4711    change_pte         -               \
             [0x7fffff5fe000, 0x7fffff5ff000)            1 page   anonymous 0x1f rw--"
        );
        assert_eq!(
            event(Op::ClearYoung(HvaRange::page(Hva(0x1000))), Some(1), None).to_string(),
            "    0.003214 s  tid 1       clear_young        -               \
             [0x1000, 0x2000)                            1 page"
        );
        assert_eq!(
            event(Op::Release, None, None).to_string(),
            "    0.003214 s  umbra       release            -               -"
        );
    }

    #[test]
    fn a_pair_says_whether_it_ended_and_whether_listeners_may_sleep() {
        let open = event(pair(Blockable::No), None, None);
        assert!(open.to_string().ends_with("  not ended  nonblock"), "{open}");
        let json = serde_json::to_value(open.json()).unwrap();
        assert_eq!(json["blockable"], false);
        assert!(json.get("duration_ns").is_none(), "{json}");
    }

    #[test]
    fn json_has_what_an_op_has_and_no_more() {
        let json = |event: TraceEvent| serde_json::to_string(&event.json()).unwrap();
        assert_eq!(
            json(event(pair(Blockable::Yes), Some(7), Some(12_400))),
            r#"{"time_ns":3214000,"tid":7,"op":"invalidate","reason":"Unmap","start":140737477844992,"end":140737477857280,"pages":3,"blockable":true,"duration_ns":12400}"#
        );
        assert_eq!(
            json(event(Op::ChangePte(Hva(0x1000), Pte::zero(Pfn(2))), None, None)),
            r#"{"time_ns":3214000,"tid":null,"op":"change_pte","start":4096,"end":8192,"pages":1,"pte":{"pfn":2,"present":true,"writable":false,"zero":true}}"#
        );
        assert_eq!(json(event(Op::Release, None, None)), r#"{"time_ns":3214000,"tid":null,"op":"release"}"#);
    }
}
