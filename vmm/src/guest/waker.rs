// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How a thread of the guest waits, and how others make it stop: the one place for both.
//!
//! A host thread that runs a guest thread is in one of four places, and a [`Waker`] reaches it in each:
//!
//! | the thread is | what makes it return |
//! | --- | --- |
//! | in the guest, or about to enter it | the vCPU's kick |
//! | asleep ([`park`](Waker::park): futex, sleep, pause) | the condition variable |
//! | in the host's `ppoll` ([`poll`](Waker::poll): read, write, poll) | an eventfd that is polled along |
//! | running in umbra | the `attention` flag, which it looks at before it does any of the above |
//!
//! `attention` is `TIF_SIGPENDING`: a signal may be deliverable, or the process ends. It is set and cleared with the
//! group's lock held, so it is never cleared for a reason that came up meanwhile. The lock in here is a leaf lock; it
//! orders "look at the flag, then wait" against "set the flag, then wake".
//!
//! In deterministic mode a thread has a [`Seat`] and waits there instead, in both cases: it passes the baton on, and what wakes
//! it makes it one of those that may get it next. The seat's lock is below the one in here.

use super::errno::Errno;
use super::host;
use crate::deterministic::Seat;
use crate::engine::Kick;
use shadow_mmu::sync::{Arc, Condvar, Mutex};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::EventFd;

/// Why [`Waker::park`] returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Parked {
    /// What was waited for has happened.
    Done,
    /// The thread is wanted for something else ([`Waker::interrupt`]).
    Interrupted,
    /// The time is over.
    TimedOut,
}

/// One thread's way to wait and to be woken.
#[derive(Debug)]
pub(super) struct Waker {
    attention: AtomicBool,
    event: EventFd,
    state: Mutex<State>,
    asleep: Condvar,
    /// Where the thread waits in deterministic mode.
    seat: Option<Arc<Seat>>,
}

#[derive(Debug, Default)]
struct State {
    /// The vCPU that runs the thread, while one does.
    kick: Option<Arc<dyn Kick>>,
    /// The thread is in the host's `ppoll`.
    polling: bool,
}

impl Waker {
    /// For a thread with this seat, if it has one.
    ///
    /// # Errors
    /// The host's, where it has no descriptor left.
    pub(super) fn new(seat: Option<Seat>) -> Result<Self, Errno> {
        Ok(Self {
            attention: AtomicBool::new(false),
            event: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            state: Mutex::default(),
            asleep: Condvar::new(),
            seat: seat.map(Arc::new),
        })
    }

    /// The thread's place in the order of deterministic mode.
    pub(super) fn seat(&self) -> Option<&Arc<Seat>> {
        self.seat.as_ref()
    }

    /// From here on `kick` is how to get the thread out of the guest.
    pub(super) fn attach(&self, kick: Arc<dyn Kick>) {
        if let Some(seat) = &self.seat {
            seat.attach(Some(Arc::clone(&kick)));
        }
        self.state.lock().kick = Some(kick);
    }

    /// The thread will not enter the guest again. Under the lock: once this has returned, nobody is about to kick.
    pub(super) fn detach(&self) {
        if let Some(seat) = &self.seat {
            seat.attach(None);
        }
        self.state.lock().kick = None;
    }

    /// The CPU time that the thread has used in the guest and not as the host's thread that it is.
    pub(super) fn cpu_time_outside(&self) -> Duration {
        let kick = self.state.lock().kick.clone();
        kick.map_or(Duration::ZERO, |kick| kick.cpu_time_outside())
    }

    /// Whether the thread should look at its signals before it goes on.
    pub(super) fn has_attention(&self) -> bool {
        self.attention.load(Ordering::Acquire)
    }

    /// Makes the thread look at its signals now, wherever it is. With the group's lock held.
    pub(super) fn interrupt(&self) {
        let state = self.state.lock();
        self.attention.store(true, Ordering::Release);
        self.asleep.notify_all();
        if state.polling {
            // Fails only when the counter is full; then it is readable already.
            let _ = self.event.write(1);
        }
        if let Some(kick) = &state.kick {
            kick.kick();
        }
        if let Some(seat) = &self.seat {
            seat.wake();
        }
    }

    /// Says whether there is something to look at. With the group's lock held, by the thread itself: it waits nowhere.
    pub(super) fn set_attention(&self, wanted: bool) {
        self.attention.store(wanted, Ordering::Release);
    }

    /// Something that the thread may be parked for has happened: it looks at its condition again.
    pub(super) fn notify(&self) {
        let _ordered_after_the_look = self.state.lock();
        self.asleep.notify_all();
        if let Some(seat) = &self.seat {
            seat.wake();
        }
    }

    /// Sleeps until `done`, which must become true before a call of [`notify`](Self::notify); until an interruption; or
    /// until `deadline`, `None` for never.
    pub(super) fn park(&self, deadline: Option<Instant>, done: impl Fn() -> bool) -> Parked {
        if let Some(seat) = &self.seat {
            return self.park_at(seat, deadline, done);
        }
        let mut state = self.state.lock();
        loop {
            if done() {
                return Parked::Done;
            }
            if self.has_attention() {
                return Parked::Interrupted;
            }
            state = match deadline {
                None => self.asleep.wait(state),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Parked::TimedOut;
                    }
                    self.asleep.wait_timeout(state, left)
                }
            };
        }
    }

    fn park_at(&self, seat: &Seat, deadline: Option<Instant>, done: impl Fn() -> bool) -> Parked {
        loop {
            seat.prepare_to_wait();
            if done() {
                return Parked::Done;
            }
            if self.has_attention() {
                return Parked::Interrupted;
            }
            if deadline.is_some_and(|deadline| deadline <= seat.now()) {
                return Parked::TimedOut;
            }
            seat.sleep(deadline);
        }
    }

    /// The host's `poll` of `fds` until one is ready, `deadline` is reached (`None`: never), or an interruption.
    /// Returns how many are ready; what is ready is reported even to a thread that is wanted elsewhere.
    ///
    /// # Errors
    /// `EINTR`: nothing is ready, and the thread is wanted elsewhere. Otherwise the host's.
    pub(super) fn poll(&self, fds: &mut [libc::pollfd], deadline: Option<Instant>) -> Result<usize, Errno> {
        // Room in what umbra's reader has not read yet is waited for with the baton in hand: the order in which guest threads run must not
        // depend on how fast somebody reads their output.
        let only_writes =
            deadline.is_none() && !fds.is_empty() && fds.iter().all(|fd| fd.events == libc::POLLOUT);
        if let Some(seat) = self.seat.as_ref().filter(|_| !only_writes) {
            return self.poll_at(seat, fds, deadline);
        }
        let mut with_event = fds.to_vec();
        with_event.push(libc::pollfd { fd: self.event.as_raw_fd(), events: libc::POLLIN, revents: 0 });
        loop {
            let wanted_elsewhere = {
                let mut state = self.state.lock();
                state.polling = true;
                self.has_attention()
            };
            let until = if wanted_elsewhere { Some(Instant::now()) } else { deadline };
            let result = host::poll(&mut with_event, until);
            {
                let mut state = self.state.lock();
                state.polling = false;
                // Drains what an interruption wrote; there may be nothing.
                let _ = self.event.read();
            }
            if !matches!(result, Ok(_) | Err(Errno::EINTR)) {
                return result;
            }
            let ready = with_event[..fds.len()].iter().filter(|fd| fd.revents != 0).count();
            if result.is_ok() && ready > 0 {
                fds.copy_from_slice(&with_event[..fds.len()]);
                return Ok(ready);
            }
            if wanted_elsewhere || self.has_attention() {
                return Err(Errno::EINTR);
            }
            if deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                fds.iter_mut().for_each(|fd| fd.revents = 0);
                return Ok(0);
            }
        }
    }

    fn poll_at(
        &self,
        seat: &Seat,
        fds: &mut [libc::pollfd],
        deadline: Option<Instant>,
    ) -> Result<usize, Errno> {
        loop {
            seat.prepare_to_wait();
            let at_once = Some(Instant::now());
            match host::poll(fds, at_once) {
                Ok(0) | Err(Errno::EINTR) => {}
                result => return result,
            }
            if self.has_attention() {
                return Err(Errno::EINTR);
            }
            if deadline.is_some_and(|deadline| deadline <= seat.now()) {
                return Ok(0);
            }
            seat.poll(fds, deadline);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    const SOON: Duration = Duration::from_millis(20);

    #[test]
    fn an_interruption_before_the_wait_is_not_lost() {
        let waker = Waker::new(None).unwrap();
        waker.interrupt();
        assert_eq!(waker.park(None, || false), Parked::Interrupted);
        assert_eq!(waker.poll(&mut [], None), Err(Errno::EINTR));
        waker.set_attention(false);
        assert_eq!(waker.park(Some(Instant::now() + SOON), || false), Parked::TimedOut);
        assert_eq!(waker.poll(&mut [], Some(Instant::now() + SOON)), Ok(0));
    }

    #[test]
    fn an_interruption_reaches_a_sleeper_and_a_poller() {
        for round in 0..100 {
            let waker = Waker::new(None).unwrap();
            thread::scope(|scope| {
                let sleeper = scope.spawn(|| match round % 2 {
                    0 => assert_eq!(waker.park(None, || false), Parked::Interrupted),
                    _ => assert_eq!(waker.poll(&mut [], None), Err(Errno::EINTR)),
                });
                if round % 3 == 0 {
                    thread::sleep(Duration::from_millis(1));
                }
                waker.interrupt();
                sleeper.join().unwrap();
            });
        }
    }

    #[test]
    fn what_is_ready_is_reported_even_under_attention() {
        let waker = Waker::new(None).unwrap();
        let ready = EventFd::new(0).unwrap();
        ready.write(1).unwrap();
        waker.interrupt();
        let mut fds = [libc::pollfd { fd: ready.as_raw_fd(), events: libc::POLLIN, revents: 0 }];
        assert_eq!(waker.poll(&mut fds, None), Ok(1));
        assert_eq!(fds[0].revents, libc::POLLIN);
    }
}
