// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The event loop of a running guest: signals to umbra, the time limit, the guest's end.
//!
//! It runs on the main thread, on event-manager; vCPUs have threads of their own. SIGINT, SIGTERM and SIGHUP are blocked in
//! every thread ([`block_signals`], before the first one is started) and read here from a signalfd, so that a guest that
//! loops for ever ends at once, whatever its threads are doing. When the loop is over nobody reads them any more, so they are
//! unblocked ([`unblock_signals`]) and do what they do to every process: umbra may still have to wait for a reader of what it
//! has to say.

use anyhow::{Context, Result};
use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::create_sigset;
use vmm_sys_util::timerfd::TimerFd;

const SIGNALS: [libc::c_int; 3] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP];

/// What the loop woke up for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// umbra was sent this signal.
    Signal(i32),
    /// The time limit is over.
    TimeLimit,
    /// The guest has ended.
    Exited,
}

/// Blocks the signals that [`Reactor`] reads, in this thread and all it starts.
///
/// # Errors
/// The host's.
pub fn block_signals() -> Result<()> {
    mask_signals(libc::SIG_BLOCK).context("cannot block signals")
}

/// Unblocks them in this thread: from now on each ends umbra, one that came meanwhile at once. May be done twice.
///
/// # Errors
/// The host's.
pub fn unblock_signals() -> Result<()> {
    mask_signals(libc::SIG_UNBLOCK).context("cannot unblock signals")
}

fn mask_signals(how: libc::c_int) -> Result<()> {
    let signals = create_sigset(&SIGNALS).context("cannot make a signal set")?;
    // SAFETY: reads a live set; the old mask is not asked for.
    let result = unsafe { libc::pthread_sigmask(how, &signals, std::ptr::null_mut()) };
    if result == 0 { Ok(()) } else { Err(std::io::Error::from_raw_os_error(result).into()) }
}

fn signal_fd() -> Result<OwnedFd> {
    let signals = create_sigset(&SIGNALS).context("cannot make a signal set")?;
    // SAFETY: reads a live set and makes a new descriptor.
    let fd = unsafe { libc::signalfd(-1, &signals, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error()).context("cannot make a signalfd");
    }
    // SAFETY: the kernel just made it for us and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The loop.
pub struct Reactor {
    manager: EventManager<Arc<Mutex<Sources>>>,
    sources: Arc<Mutex<Sources>>,
}

impl std::fmt::Debug for Reactor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reactor").field("sources", &self.sources).finish_non_exhaustive()
    }
}

/// What the loop listens to, and what it heard.
#[derive(Debug)]
struct Sources {
    signals: OwnedFd,
    exited: EventFd,
    limit: Option<TimerFd>,
    heard: Vec<Event>,
}

impl Reactor {
    /// A loop that ends when `exited` is written to, and tells when `limit` is over.
    ///
    /// # Errors
    /// The host's.
    pub fn new(exited: EventFd, limit: Option<Duration>) -> Result<Self> {
        let limit = limit
            .map(|limit| -> Result<TimerFd> {
                let mut timer = TimerFd::new().context("cannot make a timer")?;
                timer.reset(limit, None).context("cannot start a timer")?;
                Ok(timer)
            })
            .transpose()?;
        let sources =
            Arc::new(Mutex::new(Sources { signals: signal_fd()?, exited, limit, heard: Vec::new() }));
        let mut manager = EventManager::new().context("cannot make an event loop")?;
        manager.add_subscriber(Arc::clone(&sources));
        Ok(Self { manager, sources })
    }

    /// Waits, and calls `handle` for each event; returns after [`Event::Exited`] was handled.
    ///
    /// # Errors
    /// The host's, where epoll fails.
    pub fn run(&mut self, mut handle: impl FnMut(Event)) -> Result<()> {
        loop {
            self.manager.run().context("the event loop failed")?;
            let heard = match self.sources.lock() {
                Ok(mut sources) => std::mem::take(&mut sources.heard),
                Err(_) => anyhow::bail!("the event loop panicked"),
            };
            for event in heard {
                handle(event);
                if event == Event::Exited {
                    return Ok(());
                }
            }
        }
    }
}

impl Sources {
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
        } else if fd == self.exited.as_raw_fd() {
            let _ = self.exited.read();
            self.heard.push(Event::Exited);
        } else if let Some(limit) = self.limit.as_mut().filter(|limit| limit.as_raw_fd() == fd) {
            let _ = limit.wait();
            self.heard.push(Event::TimeLimit);
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        let limit = self.limit.as_ref().map(|limit| limit.as_raw_fd());
        for fd in [Some(self.signals.as_raw_fd()), Some(self.exited.as_raw_fd()), limit].into_iter().flatten()
        {
            // Fails only for a descriptor that is closed or added twice; these are ours and three.
            if let Err(error) = ops.add(Events::new_raw(fd, EventSet::IN)) {
                log::error!("cannot listen to descriptor {fd}: {error}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_comes_before_an_exit_that_comes_later() {
        let exited = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let mut reactor = Reactor::new(exited.try_clone().unwrap(), Some(Duration::from_millis(5))).unwrap();
        let mut heard = Vec::new();
        reactor
            .run(|event| {
                heard.push(event);
                if event == Event::TimeLimit {
                    exited.write(1).unwrap();
                }
            })
            .unwrap();
        assert_eq!(heard, [Event::TimeLimit, Event::Exited]);
    }
}
