// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Real host mappings: memory of this very process, shown to the guest, and what others do to it.
//!
//! [`Mm::adopt`] takes a mapping that exists (anonymous, a memfd, a file) and gives the guest a VMA that shows it. Any code
//! of the process may go on to munmap, mremap or madvise it, C libraries included. The kernel tells a [`Watch`] by
//! userfaultfd, and the watch makes of it what every other change of the [`Mm`] is: a pair of the notifier layer, heard by
//! every listener.
//!
//! | file | what |
//! | --- | --- |
//! | `mod` | the watch: when events are read, who reads them, the end |
//! | `adopt` | taking a mapping in: checks, alias, slot, VMA |
//! | `apply` | from an event to changes of VMAs, ptes and slots |
//! | `late` | events that come late or in another order because somebody wants them to |
//! | `slots` | frame numbers beyond the pool's, and the engine's memslots behind them |
//! | `maps` | what /proc/self/maps knows of a range |
//! | [`uffd`] | userfaultfd(2) |
//!
//! # What the kernel sends
//! Seen on Linux 6.18 for private anonymous memory, shared memfd, shared anonymous memory, private file and private memfd; all
//! five alike unless noted. "after": the change has been made when the event comes; "before": it has not.
//!
//! | call | event | change | what becomes of the guest's view |
//! | --- | --- | --- | --- |
//! | munmap, all or part; mmap or mremap `MAP_FIXED` over it | UNMAP | after | that part goes: SIGSEGV |
//! | mremap that moves all or part, also to grow | REMAP, then UNMAP of the old place | after | it follows, without what was grown |
//! | mremap with `DONTUNMAP` | REMAP alone | after | it follows |
//! | mremap that grows in place | none | | as before |
//! | mremap that shrinks | UNMAP of the tail | after | the tail goes |
//! | mremap with an old length of 0 (shared only) | REMAP of 0 bytes | after | as before |
//! | madvise `DONTNEED`; `FREE` (the event comes also where the call then fails) | REMOVE | before | a pair, then what is there |
//! | madvise `REMOVE` (shared) | REMOVE | before | a pair, then zeros |
//! | fork | FORK, if asked for | after | a pair; the child's mapping is its own |
//! | vfork, fork after `MADV_DONTFORK` | none | | as before |
//! | mprotect, `PAGEOUT`, `COLLAPSE`, guard pages; fallocate or ftruncate of the file | none | | see *What has no event* |
//!
//! The range is registered for *write-protection* faults ([`uffd::Mode::WriteProtect`]) and nothing is ever write-protected: so
//! events come and faults never do, and nobody is ever blocked by an access. With `UFFD_FEATURE_WP_ASYNC` (6.7) mappings of
//! every kind can be registered; without it anonymous and shared memory alone.
//!
//! # The order
//! In all these cases the kernel makes the caller wait until its event was *read*. So for each batch of events the watch
//! 1. is told by poll that there is an event;
//! 2. takes the mmap lock of the `Mm` for writing and opens pairs over everything that is adopted, one for each run of such VMAs
//!    or, where there are many, one from the first to the last: which range it is about would be known only after the read. When the
//!    starts have returned, no vCPU can reach any adopted page;
//! 3. reads the events, which lets their callers go on;
//! 4. applies them: inner pairs, with the range and the reason of each, around changes of VMAs, ptes and slots;
//! 5. ends the pairs and lets go of the lock.
//!
//! Hence the promise: **when munmap or mremap returns to its caller, no guest reaches the page at its old address, and
//! none ever will again.** With a caller that waits, step 3 is the latest moment; steps 4 and 5 happen behind its back, but
//! what the guest wants meanwhile waits in the windows of step 2.
//!
//! # The gap
//! * *UNMAP, REMAP, FORK come after the kernel's change.* From that change to step 2 the shadow map still has the leaves. KVM
//!   has not: its own MMU notifier ran inside the kernel's change, and it looks the address up anew at the next access. For
//!   a *shared* mapping it finds the page, because its slot points at an alias of the watch's own, which nobody unmaps:
//!   the guest reads and writes the same memory a little longer, while munmap has not returned. For a *private* one it finds
//!   nothing, and KVM_RUN fails with `EFAULT`; the engine answers by [`Watch::settle`] and another try, and a
//!   guest that has no luck then gets SIGBUS (at that address, where KVM names it). Never is it an error of the engine's,
//!   and stale it cannot be: there is no translation left to be stale.
//! * *REMOVE comes before it.* After step 5 a guest may fault the old content in again, before the caller, now awake, zaps it;
//!   KVM's notifier takes it away with that zap. Old content before and zeros after: both are right while madvise has not
//!   returned, and for a CPU of the host it is no different.
//! * *Private memory and reuse.* KVM resolves a slot by address, as for every user of KVM. What somebody maps at the old
//!   addresses of a private mapping between the kernel's change and step 2 (another thread by chance, or mmap `MAP_FIXED` in
//!   the very same call) the guest may see for that long. It is a condition of [`Mm::adopt`]; after [`Watch::settle`]
//!   addresses may be reused for anything.
//!
//! # What has no event
//! The kernel's own notifier tells KVM, so the guest sees the host's *content* in every case. What the guest may *do* is
//! checked by KVM at the next access: where mprotect took the right, or the file ends before, KVM_RUN fails with `EFAULT` and
//! the guest gets SIGBUS. A shared mapping's alias keeps the rights that the mapping had when it was adopted.
//!
//! # Deadlocks, and how not to have one
//! The callers wait for the watch, so the watch must wait for none of them.
//! * Nobody munmaps, mremaps, madvises (or forks, with [`Forks::Report`]) while holding a lock of the `Mm` or anything that a
//!   listener's start waits for, from inside a notifier callback, or on the watch's own thread.
//! * Memory that the allocator itself manages is not for adoption: it is trimmed with the allocator's locks held, and the
//!   watch allocates.
//! * glibc's fork holds them too: see [`Forks`].
//!
//! # Locks
//! mmap lock → `Watcher::state` → the engine's, in [`HostSlots`]. Without them: [`Watch::settle`] and poll.
//!
//! # Limits
//! One watch an address space. Devices and system calls cannot reach adopted pages (`EFAULT`, as `get_user_pages` refuses
//! `VM_PFNMAP`), guest mremap cannot grow the view (`EFAULT`, as `VM_DONTEXPAND`), and a fork of the guest must leave it out
//! (`VM_DONTCOPY`). A thread that moves a mapping to addresses whose munmap by another thread is not settled yet loses the
//! guest's view of it: the events have no order then.

mod adopt;
mod apply;
mod late;
mod maps;
mod slots;
pub mod uffd;

pub use adopt::AdoptError;
pub use slots::{HostSlot, HostSlots};

use super::{Backing, Map, Mm};
use crate::addr::{HvaRange, PAGE_SIZE};
use crate::inject::UFFD_EVENT;
use crate::notifier::Event;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Arc, Mutex, thread};
use slots::{Anonymous, State};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};
use uffd::{Features, Mode, Uffd};
use vmm_sys_util::eventfd::EventFd;

/// Events that are read in one go.
const BATCH: usize = 256;
/// How long the thread waits after a failure before it tries again.
const RETRY_MS: i32 = 20;

/// Whether forks of this process are events.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Forks {
    /// They are not. Nothing is missed that matters to the guest: its view stays with the parent's memory, and the kernel
    /// write-protects and copies under KVM as under every CPU.
    #[default]
    Ignore,
    /// Each opens a pair over everything adopted ([`Event::ProtectionPage`]), for listeners that keep something of their own.
    /// Needs CAP_SYS_PTRACE; without it as [`Ignore`](Self::Ignore).
    ///
    /// Not for a process that calls glibc's `fork` while other threads run: that holds the locks of `malloc` across the
    /// system call, which waits for the watch, which allocates. (`posix_spawn`, `vfork` and a plain `clone` hold none.)
    Report,
}

/// Why a watch cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// There is one already.
    #[error("the address space has a watch already")]
    Watched,
    /// The kernel has no such thing, or does not give it to us.
    #[error(
        "userfaultfd with write protection is refused ({0}): Linux 5.7 or newer is needed, no seccomp filter against it (as \
         containers have), and root or vm.unprivileged_userfaultfd=1 or a kernel that has UFFD_USER_MODE_ONLY"
    )]
    Userfaultfd(io::Error),
    /// Something else that the host refused.
    #[error("cannot {what}: {source}")]
    Host {
        /// The step.
        what: &'static str,
        /// The host's word.
        source: io::Error,
    },
}

/// The watch over the adopted mappings of one address space. See the [module](self) for what it promises.
///
/// Dropping it takes every adopted mapping from the guest; the mappings themselves stay as they are. It takes the mmap lock.
#[derive(Debug)]
pub struct Watch {
    watcher: Arc<Watcher>,
    thread: Option<(EventFd, thread::JoinHandle<()>)>,
}

/// What the watch and its thread share.
#[derive(Debug)]
struct Watcher {
    mm: Arc<Mm>,
    engine: Arc<dyn HostSlots>,
    /// Closed after everything was taken from the guest: that lets go who still waits for an event to be read.
    uffd: Uffd,
    /// A page registered for nothing but asking whether a change is in flight.
    scratch: Anonymous,
    /// Taken below the mmap lock; held while events are read and applied.
    state: Mutex<State>,
    /// What it really does.
    forks: Forks,
    events: AtomicU64,
}

/// A descriptor with as much as there is to be had of what `forks` asks for, and what that is.
fn open_uffd(forks: Forks) -> io::Result<(Uffd, Features)> {
    let least = Features::EVENT_REMAP | Features::EVENT_REMOVE | Features::EVENT_UNMAP;
    let fork = if forks == Forks::Report { Features::EVENT_FORK } else { Features::empty() };
    let mut first = None;
    for features in [least | Features::WP_ASYNC | fork, least | Features::WP_ASYNC, least | fork, least] {
        for open in [Uffd::new, Uffd::user_mode_only] {
            match open(features) {
                Ok(uffd) => return Ok((uffd, features)),
                Err(error) => {
                    first.get_or_insert(error);
                }
            }
        }
    }
    Err(first.unwrap_or_else(|| io::Error::from_raw_os_error(libc::ENOSYS)))
}

/// Which mappings this host lets us watch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Watchable {
    /// All of them: files too (Linux 6.7).
    EveryKind,
    /// Anonymous memory and shared memory.
    NoFiles,
}

/// What a [`Watch`] could do here.
///
/// # Errors
/// [`WatchError::Userfaultfd`].
pub fn watchable() -> Result<Watchable, WatchError> {
    let (_, features) = open_uffd(Forks::Ignore).map_err(WatchError::Userfaultfd)?;
    let every = features.contains(Features::WP_ASYNC);
    Ok(if every { Watchable::EveryKind } else { Watchable::NoFiles })
}

impl Watch {
    /// A watch that works only when it is told: whoever makes it polls [`fd`](Self::fd) and calls [`handle`](Self::handle).
    /// `engine` gives the guest's CPUs their way to adopted memory.
    ///
    /// # Errors
    /// [`WatchError`].
    pub fn new(mm: &Arc<Mm>, engine: Arc<dyn HostSlots>, forks: Forks) -> Result<Self, WatchError> {
        // Dropped after the descriptor, here as in the watcher: unmapping it is an event for nobody then.
        let scratch = Anonymous::page().map_err(|source| WatchError::Host { what: "map a page", source })?;
        let (uffd, features) = open_uffd(forks).map_err(WatchError::Userfaultfd)?;
        let forks = if features.contains(Features::EVENT_FORK) { Forks::Report } else { Forks::Ignore };
        uffd.register(&scratch.range(), Mode::WriteProtect).map_err(WatchError::Userfaultfd)?;
        if mm.watched.swap(true, Ordering::AcqRel) {
            return Err(WatchError::Watched);
        }
        let state = Mutex::new(State::new(mm.pool().frame_count()));
        let (mm, events) = (Arc::clone(mm), AtomicU64::new(0));
        let watcher = Arc::new(Watcher { mm, engine, uffd, scratch, state, forks, events });
        Ok(Self { watcher, thread: None })
    }

    /// A watch with a thread of its own, named `watch`.
    ///
    /// # Errors
    /// [`WatchError`].
    pub fn with_thread(mm: &Arc<Mm>, engine: Arc<dyn HostSlots>, forks: Forks) -> Result<Self, WatchError> {
        let mut watch = Self::new(mm, engine, forks)?;
        let host = |what| move |source| WatchError::Host { what, source };
        let stop = EventFd::new(libc::EFD_CLOEXEC).map_err(host("make an eventfd"))?;
        let stopped = stop.try_clone().map_err(host("duplicate an eventfd"))?;
        let watcher = Arc::clone(&watch.watcher);
        let thread = thread::Builder::new()
            .name("watch".into())
            .spawn(move || watcher.run(&stopped))
            .map_err(host("start a thread"))?;
        watch.thread = Some((stop, thread));
        Ok(watch)
    }

    /// Readable when there is something to [`handle`](Self::handle).
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.watcher.uffd.fd()
    }

    /// Handles events that are there now, up to 256, and returns how many. Does not wait; polling tells of what is left.
    ///
    /// # Errors
    /// The kernel's. Callers whose events were not read go on waiting, and the descriptor stays readable.
    pub fn handle(&self) -> io::Result<usize> {
        self.watcher.handle_batch()
    }

    /// Returns when every change that was made to adopted memory before this call is one of the `Mm`, too, and its pairs have
    /// ended: also one whose event is not even sent yet. Handles events itself if need be. The addresses may then be reused.
    ///
    /// The kernel says only whether *any* change is under way, so where others go on changing adopted memory without a pause this
    /// may take as long as `limit`.
    ///
    /// # Errors
    /// [`io::ErrorKind::TimedOut`], and the kernel's.
    pub fn settle(&self, limit: Duration) -> io::Result<()> {
        self.watcher.settle(limit)
    }

    /// Whether forks are events: [`Forks::Ignore`] also where the kernel did not let us ask for them.
    pub fn forks(&self) -> Forks {
        self.watcher.forks
    }

    /// Events handled so far.
    pub fn events(&self) -> u64 {
        self.watcher.events.load(Ordering::Relaxed)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.thread.take() {
            if let Err(error) = stop.write(1) {
                log::error!("cannot stop the watch's thread: {error}");
            } else if thread.join().is_err() {
                log::error!("the watch's thread panicked: this is a bug of umbra's");
            }
        }
    }
}

fn readable(fds: &mut [libc::pollfd], timeout_ms: i32) -> io::Result<bool> {
    loop {
        // SAFETY: `fds` is a live array of that length.
        let ready = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout_ms) };
        match ready {
            0.. => return Ok(ready > 0),
            _ => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
}

fn pollfd(fd: i32) -> libc::pollfd {
    libc::pollfd { fd, events: libc::POLLIN, revents: 0 }
}

impl Watcher {
    fn run(&self, stop: &EventFd) {
        loop {
            let mut fds = [pollfd(stop.as_raw_fd()), pollfd(self.uffd.fd().as_raw_fd())];
            let result = readable(&mut fds, -1).and_then(|_| match fds[0].revents {
                0 => self.handle_batch().map(|_| false),
                _ => Ok(true),
            });
            match result {
                Ok(false) => {}
                Ok(true) => return,
                Err(error) => {
                    // Never given up: somebody may be waiting for us to read.
                    log::error!("events of adopted memory cannot be read, trying again: {error}");
                    let _ = readable(&mut fds[..1], RETRY_MS);
                }
            }
        }
    }

    /// Steps 2 to 5 of the order at the top.
    fn handle_batch(&self) -> io::Result<usize> {
        if !readable(&mut [pollfd(self.uffd.fd().as_raw_fd())], 0)? {
            return Ok(0);
        }
        self.mm.faults.hit(&UFFD_EVENT);
        let mut map = self.mm.map.write();
        let mut state = self.state.lock();
        let views = Self::views(&map).into_iter();
        let mut pairs: Vec<_> = views.map(|view| self.mm.notifiers.invalidate(view, Event::Clear)).collect();
        let mut events = Vec::new();
        let mut result = Ok(());
        while events.len() < BATCH {
            match self.uffd.read() {
                Ok(Some(event)) => events.push(event),
                Ok(None) => break,
                // What was read before it is applied all the same: its callers have gone on.
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
        }
        let count = events.len();
        for event in late::disturbed(&self.mm.faults, events) {
            self.apply(&mut map, &mut state, event);
        }
        self.prune(&map, &mut state);
        // Inside out, as pairs of one thread nest.
        while pairs.pop().is_some() {}
        self.events.fetch_add(count as u64, Ordering::Relaxed);
        result.map(|()| count)
    }

    /// Ranges that together cover everything adopted: a run of such VMAs with nothing else mapped between them is one, for each
    /// costs a flush. Where the guest has put much in between, it is all from the first to the last: what the host's own munmap
    /// waits for must not grow with what the guest does.
    fn views(map: &Map) -> Vec<HvaRange> {
        const MOST: usize = 8;
        let mut runs: Vec<HvaRange> = Vec::new();
        let mut goes_on = false;
        for vma in map.vmas.iter() {
            let is_adopted = matches!(vma.backing, Backing::Adopted { .. });
            match runs.last_mut() {
                Some(run) if is_adopted && goes_on => run.end = vma.range.end,
                _ if is_adopted => runs.push(vma.range),
                _ => {}
            }
            goes_on = is_adopted;
        }
        match (runs.first(), runs.last()) {
            (Some(first), Some(last)) if runs.len() > MOST => {
                vec![HvaRange { start: first.start, end: last.end }]
            }
            _ => runs,
        }
    }

    fn settle(&self, limit: Duration) -> io::Result<()> {
        let end = Instant::now() + limit;
        loop {
            self.handle_batch()?;
            match self.uffd.lift_write_protection(&self.scratch.range()) {
                Ok(()) => break,
                // A change is made and its event is on the way, or read and its caller not awake yet.
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {
                    if Instant::now() >= end {
                        return Err(io::ErrorKind::TimedOut.into());
                    }
                    readable(&mut [pollfd(self.uffd.fd().as_raw_fd())], 1)?;
                }
                Err(error) => return Err(error),
            }
        }
        // Read is not applied: whoever read the last one does both under this lock, and the mmap lock around it.
        drop(self.mm.map.read());
        Ok(())
    }
}

impl Drop for Watcher {
    /// Takes everything from the guest; then the descriptor is closed, by which the kernel forgets what was registered and
    /// wakes who waits.
    fn drop(&mut self) {
        let mut map = self.mm.map.write();
        let mut state = self.state.lock();
        let adopted: Vec<_> = map
            .vmas
            .iter()
            .filter(|vma| matches!(vma.backing, Backing::Adopted { .. }))
            .map(|vma| vma.range)
            .collect();
        for range in adopted {
            self.mm.unmap(&mut map, range, Event::Unmap);
        }
        self.prune(&map, &mut state);
        self.mm.watched.store(false, Ordering::Release);
    }
}

/// Whether both ends of a range of host addresses are page aligned and it is not empty.
fn is_page_range(range: &std::ops::Range<u64>) -> bool {
    range.start < range.end && range.start.is_multiple_of(PAGE_SIZE) && range.end.is_multiple_of(PAGE_SIZE)
}
