// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The event loop of running guests: signals to umbra, the time limit, what is done regularly, the end of each guest.
//!
//! It runs on the main thread, on event-manager; vCPUs have threads of their own. SIGINT, SIGTERM and SIGHUP are blocked in
//! every thread ([`block_signals`], before the first one is started) and read here from a signalfd, so that a guest that
//! loops for ever ends at once, whatever its threads are doing. When the loop is over nobody reads them any more, so they are
//! unblocked ([`unblock_signals`]) and do what they do to every process: umbra may still have to wait for a reader of what it
//! has to say.
//!
//! SIGUSR1 is read only for who asks for reports by it ([`Sources::with_report_signal`]); otherwise it does what it does to
//! every process. Once it is blocked it stays so: a request for a report that comes too late is to be lost, not to end umbra.
//!
//! What is done regularly must not make the loop fall behind: where one turn takes longer than the interval, the ticks that
//! fell into it are left out and counted ([`Reactor::skipped`]), and the next turn waits for the next tick that is still to
//! come.

use anyhow::{Context, Result};
use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::create_sigset;
use vmm_sys_util::timerfd::TimerFd;

const SIGNALS: [libc::c_int; 3] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP];
/// Asks for a report.
const REPORT: libc::c_int = libc::SIGUSR1;

/// What the loop woke up for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// umbra was sent this signal.
    Signal(i32),
    /// The time limit is over.
    TimeLimit,
    /// It is time to age the guest's pages.
    Age,
    /// It is time to look which pages were written.
    CollectDirty,
    /// It is time to look how much is saved by sharing pages.
    LookAtSharing,
    /// A vCPU waits for its dirty ring to be emptied.
    RingFull,
    /// This guest has ended: its place among those that the loop was given.
    Exited(usize),
}

/// Has children be waited for, also where who started umbra ignores their ends: then the kernel would not tell how they ended.
pub fn heed_children() {
    // SAFETY: the action that every program begins with, no handler.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
}

/// Blocks the signals that [`Reactor`] reads, in this thread and all it starts.
///
/// # Errors
/// The host's.
pub fn block_signals() -> Result<()> {
    mask_signals(libc::SIG_BLOCK).context("cannot block signals")
}

/// Whether one of them has come since they were blocked. It stays pending, so it ends umbra when they are unblocked.
pub fn pending_signal() -> bool {
    let mut pending = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: writes one set, of that type.
    if unsafe { libc::sigpending(pending.as_mut_ptr()) } != 0 {
        return false;
    }
    // SAFETY: sigpending has written it.
    let pending = unsafe { pending.assume_init() };
    // SAFETY: reads a live set.
    SIGNALS.iter().any(|&signal| unsafe { libc::sigismember(&raw const pending, signal) } == 1)
}

/// Unblocks them in this thread: from now on each ends umbra, one that came meanwhile at once. May be done twice.
///
/// # Errors
/// The host's.
pub fn unblock_signals() -> Result<()> {
    mask_signals(libc::SIG_UNBLOCK).context("cannot unblock signals")
}

/// Blocks the signal that asks for a report, in this thread and all it starts, for good.
///
/// # Errors
/// The host's.
pub fn block_report_signal() -> Result<()> {
    mask(&[REPORT], libc::SIG_BLOCK).context("cannot block SIGUSR1")
}

fn mask_signals(how: libc::c_int) -> Result<()> {
    mask(&SIGNALS, how)
}

fn mask(signals: &[libc::c_int], how: libc::c_int) -> Result<()> {
    let signals = create_sigset(signals).context("cannot make a signal set")?;
    // SAFETY: reads a live set; the old mask is not asked for.
    let result = unsafe { libc::pthread_sigmask(how, &signals, std::ptr::null_mut()) };
    if result == 0 { Ok(()) } else { Err(std::io::Error::from_raw_os_error(result).into()) }
}

fn signal_fd(signals: &[libc::c_int]) -> Result<OwnedFd> {
    let signals = create_sigset(signals).context("cannot make a signal set")?;
    // SAFETY: reads a live set and makes a new descriptor.
    let fd = unsafe { libc::signalfd(-1, &signals, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error()).context("cannot make a signalfd");
    }
    // SAFETY: the kernel just made it for us and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn timer(first: Duration, every: Option<Duration>) -> Result<TimerFd> {
    let mut timer = TimerFd::new().context("cannot make a timer")?;
    timer.reset(first, every).context("cannot start a timer")?;
    Ok(timer)
}

/// Something that is done regularly.
#[derive(Debug)]
struct Ticker {
    event: Event,
    every: Duration,
    timer: TimerFd,
    skipped: u64,
}

impl Ticker {
    /// The turn took this long: leaves out the ticks that fell into it.
    fn turn_took(&mut self, took: Duration) {
        let every = self.every.as_nanos();
        let over = took.as_nanos() / every;
        if over == 0 {
            return;
        }
        self.skipped = self.skipped.saturating_add(over.try_into().unwrap_or(u64::MAX));
        let left = every - took.as_nanos() % every;
        let left = Duration::from_nanos(left.try_into().unwrap_or(u64::MAX));
        if let Err(error) = self.timer.reset(left, Some(self.every)) {
            log::error!("cannot set the timer of {:?}: {error}", self.event);
        }
    }
}

/// What the loop listens to, and what it heard.
#[derive(Debug)]
pub struct Sources {
    signals: OwnedFd,
    exited: Vec<EventFd>,
    limit: Option<TimerFd>,
    tickers: Vec<Ticker>,
    ring_full: Option<EventFd>,
    heard: Vec<Event>,
}

impl Sources {
    /// Signals that end umbra; and `exited`, one a guest, each of which is written to once, when its guest has ended.
    ///
    /// # Errors
    /// The host's.
    pub fn new(exited: impl IntoIterator<Item = EventFd>) -> Result<Self> {
        let signals = signal_fd(&SIGNALS)?;
        let exited = exited.into_iter().collect();
        Ok(Self { signals, exited, limit: None, tickers: Vec::new(), ring_full: None, heard: Vec::new() })
    }

    /// Tells once when `limit`, if there is one, is over.
    ///
    /// # Errors
    /// The host's.
    pub fn with_limit(mut self, limit: Option<Duration>) -> Result<Self> {
        self.limit = limit.map(|limit| timer(limit, None)).transpose()?;
        Ok(self)
    }

    /// Tells `event` every so often; never, if there is no interval.
    ///
    /// # Errors
    /// The host's.
    pub fn with_ticks(mut self, event: Event, every: Option<Duration>) -> Result<Self> {
        if let Some(every) = every {
            self.tickers.push(Ticker { event, every, timer: timer(every, Some(every))?, skipped: 0 });
        }
        Ok(self)
    }

    /// Tells [`Event::RingFull`] when this is written to.
    pub fn with_ring_full(mut self, ring_full: Option<EventFd>) -> Self {
        self.ring_full = ring_full;
        self
    }

    /// Reads SIGUSR1 too, which must be blocked ([`block_report_signal`]).
    ///
    /// # Errors
    /// The host's.
    pub fn with_report_signal(mut self) -> Result<Self> {
        self.signals = signal_fd(&[&SIGNALS[..], &[REPORT]].concat())?;
        Ok(self)
    }

    fn read_signals(&mut self) {
        let mut info = [0u8; size_of::<libc::signalfd_siginfo>()];
        loop {
            // SAFETY: the kernel writes at most the length of `info`.
            let read = unsafe { libc::read(self.signals.as_raw_fd(), info.as_mut_ptr().cast(), info.len()) };
            if read != info.len() as isize {
                return;
            }
            // `ssi_signo` is the first word.
            let signal = i32::from_ne_bytes([info[0], info[1], info[2], info[3]]);
            self.heard.push(Event::Signal(signal));
        }
    }
}

impl MutEventSubscriber for Sources {
    fn process(&mut self, events: Events, _: &mut EventOps<'_>) {
        let fd = events.fd();
        if fd == self.signals.as_raw_fd() {
            self.read_signals();
        } else if let Some(guest) = self.exited.iter().position(|exited| exited.as_raw_fd() == fd) {
            let _ = self.exited[guest].read();
            self.heard.push(Event::Exited(guest));
        } else if let Some(limit) = self.limit.as_mut().filter(|limit| limit.as_raw_fd() == fd) {
            let _ = limit.wait();
            self.heard.push(Event::TimeLimit);
        } else if let Some(ticker) = self.tickers.iter_mut().find(|it| it.timer.as_raw_fd() == fd) {
            // More than one where the loop was busy with something else.
            let ticks = ticker.timer.wait().unwrap_or(1);
            ticker.skipped = ticker.skipped.saturating_add(ticks.saturating_sub(1));
            self.heard.push(ticker.event);
        } else if let Some(full) = self.ring_full.as_ref().filter(|full| full.as_raw_fd() == fd) {
            let _ = full.read();
            self.heard.push(Event::RingFull);
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        let exited = self.exited.iter().map(AsRawFd::as_raw_fd);
        let limit = self.limit.iter().map(AsRawFd::as_raw_fd);
        let tickers = self.tickers.iter().map(|ticker| ticker.timer.as_raw_fd());
        let ring_full = self.ring_full.iter().map(AsRawFd::as_raw_fd);
        for fd in std::iter::once(self.signals.as_raw_fd())
            .chain(exited)
            .chain(limit)
            .chain(tickers)
            .chain(ring_full)
        {
            // Fails only for a descriptor that is closed or added twice; these are ours, and few.
            if let Err(error) = ops.add(Events::new_raw(fd, EventSet::IN)) {
                log::error!("cannot listen to descriptor {fd}: {error}");
            }
        }
    }
}

/// The loop.
pub struct Reactor {
    manager: EventManager<Arc<Mutex<Sources>>>,
    sources: Arc<Mutex<Sources>>,
    /// Guests whose end was not told yet.
    running: usize,
}

impl std::fmt::Debug for Reactor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reactor").field("sources", &self.sources).finish_non_exhaustive()
    }
}

impl Reactor {
    /// A loop over `sources`.
    ///
    /// # Errors
    /// The host's.
    pub fn new(sources: Sources) -> Result<Self> {
        let running = sources.exited.len();
        let sources = Arc::new(Mutex::new(sources));
        let mut manager = EventManager::new().context("cannot make an event loop")?;
        manager.add_subscriber(Arc::clone(&sources));
        Ok(Self { manager, sources, running })
    }

    fn sources(&self) -> MutexGuard<'_, Sources> {
        // Nothing is done under the lock that leaves it half done.
        self.sources.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits, and calls `handle` for each event; returns after the last guest's [`Event::Exited`] was handled.
    ///
    /// # Errors
    /// The host's, where epoll fails.
    pub fn run(&mut self, mut handle: impl FnMut(Event)) -> Result<()> {
        while self.running > 0 {
            self.manager.run().context("the event loop failed")?;
            let heard = std::mem::take(&mut self.sources().heard);
            for event in heard {
                let began = Instant::now();
                handle(event);
                if matches!(event, Event::Exited(_)) {
                    self.running -= 1;
                    if self.running == 0 {
                        return Ok(());
                    }
                }
                if let Some(ticker) = self.sources().tickers.iter_mut().find(|it| it.event == event) {
                    ticker.turn_took(began.elapsed());
                }
            }
        }
        Ok(())
    }

    /// Ticks of `event` that were left out because the loop was busy.
    pub fn skipped(&self, event: Event) -> u64 {
        self.sources().tickers.iter().filter(|it| it.event == event).map(|it| it.skipped).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_comes_before_an_exit_that_comes_later() {
        let exited = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let sources = Sources::new([exited.try_clone().unwrap()]).unwrap();
        let mut reactor = Reactor::new(sources.with_limit(Some(Duration::from_millis(5))).unwrap()).unwrap();
        let mut heard = Vec::new();
        reactor
            .run(|event| {
                heard.push(event);
                if event == Event::TimeLimit {
                    exited.write(1).unwrap();
                }
            })
            .unwrap();
        assert_eq!(heard, [Event::TimeLimit, Event::Exited(0)]);
    }

    #[test]
    fn the_loop_waits_for_every_guest_and_says_which_has_ended() {
        let exited: [EventFd; 3] = std::array::from_fn(|_| EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let sources = Sources::new(exited.iter().map(|it| it.try_clone().unwrap())).unwrap();
        let mut reactor = Reactor::new(sources).unwrap();
        let mut heard = Vec::new();
        exited[1].write(1).unwrap();
        reactor
            .run(|event| {
                heard.push(event);
                // Each is followed by another, the last one excepted.
                if let Some(next) = [2, 0].get(heard.len() - 1) {
                    exited[*next].write(1).unwrap();
                }
            })
            .unwrap();
        assert_eq!(heard, [Event::Exited(1), Event::Exited(2), Event::Exited(0)]);
    }

    #[test]
    fn ticks_that_fall_into_a_long_turn_are_left_out_and_counted() {
        const EVERY: Duration = Duration::from_millis(5);
        let exited = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let sources = Sources::new([exited.try_clone().unwrap()]).unwrap();
        let sources = sources.with_ticks(Event::Age, Some(EVERY)).unwrap();
        let mut reactor = Reactor::new(sources).unwrap();
        let mut turns = 0u64;
        reactor
            .run(|event| {
                if event != Event::Age {
                    return;
                }
                turns += 1;
                // Three ticks and a bit.
                std::thread::sleep(EVERY * 3 + EVERY / 2);
                if turns == 4 {
                    exited.write(1).unwrap();
                }
            })
            .unwrap();
        assert!(turns >= 4);
        // At least three a turn, the last one's perhaps not told.
        assert!(reactor.skipped(Event::Age) >= 3 * (turns - 1), "{turns}, {}", reactor.skipped(Event::Age));
        assert_eq!(reactor.skipped(Event::CollectDirty), 0);
    }
}
