// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What keeps a guest thread that spins without an exit from hanging the run: a thread of umbra's own that looks
//! whether the holder of the baton has been in the guest for too long while others could run. What counts is the CPU time that the
//! holder's thread has used there: one that the host does not run, because it is busy or umbra is stopped, is not too long there.
//!
//! Such a thread is kicked and the baton passes on. Where it was then depends on the host's clock, so from there on the run cannot be
//! replayed exactly; that is said once. In the quantum that counts instructions every thread that others wait for leaves the
//! guest after each instruction, and this never happens.

use super::baton::Baton;
use crate::causes::say;
use std::sync::Arc;
use std::time::Duration;

/// How long a thread may stay in the guest while others could run: CPU time.
pub(super) const GUARD: Duration = Duration::from_secs(1);
/// The same, once a run cannot be replayed exactly any more.
const GUARD_WHEN_INEXACT: Duration = Duration::from_millis(10);

/// Starts it. It ends with the last seat.
///
/// # Errors
/// The host has no thread left.
pub(super) fn start(baton: &Arc<Baton>) -> std::io::Result<()> {
    let baton = Arc::clone(baton);
    std::thread::Builder::new().name("watchdog".into()).spawn(move || watch(&baton)).map(drop)
}

fn watch(baton: &Baton) {
    let mut guard = GUARD;
    // An entry, and the CPU time of the thread that made it when it was first seen.
    let mut since = None;
    while baton.pause(guard / 4) {
        let entries = baton.entries();
        // Where the baton passes on in between, the next look finds other entries.
        let Some(used) = baton.cpu_time_of_holder() else { continue };
        let (seen, began) = *since.get_or_insert((entries, used));
        if seen != entries {
            since = Some((entries, used));
        } else if used.saturating_sub(began) >= guard && Baton::is_in_guest(entries) {
            let Some(tid) = baton.force() else { continue };
            if guard == GUARD {
                say(format_args!(
                    "deterministic: thread {tid} ran for {} s without leaving the guest while others could run, so it was \
                     interrupted; from here on this run cannot be replayed exactly: use --quantum steps",
                    GUARD.as_secs()
                ));
            }
            guard = GUARD_WHEN_INEXACT;
            since = Some((entries, used));
        }
    }
}
