// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The thread of umbra that serves the guest's process: it forked it, so it traces its first thread, and it must live as long as
//! the process does (PR_SET_PDEATHSIG goes by threads).
//!
//! Others send it work to do with another thread of the process, the worker, one piece after another, and wait for the answer.
//! Work never waits for a lock that somebody holds who waits for it: it makes system calls in the guest's process, nothing else.

use super::StubFrames;
use super::child;
use super::error::SetupError;
use super::pair::{self, LOOK, Pairs};
use super::tracee::Tracee;
use shadow_mmu::frame::FramePool;
use std::fmt;
use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel, sync_channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

type Work = Box<dyn FnOnce(Tracee) + Send>;

/// The service of one guest's process, until [`end`](Service::end).
pub(super) struct Service {
    /// `None` at the end.
    work: Mutex<Option<Sender<Work>>>,
    thread: Option<JoinHandle<()>>,
    /// The thread of the process that makes calls for the service.
    pub(super) worker: Tracee,
    /// Why the engine ended the process, where it did.
    killed: OnceLock<String>,
}

impl fmt::Debug for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Service").field("pid", &self.worker.pid).finish_non_exhaustive()
    }
}

impl Service {
    /// Starts a process whose stub is in the frames `stub` of `pool`.
    ///
    /// # Errors
    /// [`SetupError`].
    pub(super) fn start(
        pool: &Arc<FramePool>,
        stub: StubFrames,
        pairs: Arc<Pairs>,
    ) -> Result<Self, SetupError> {
        let (work, works) = channel::<Work>();
        let (tell, told) = sync_channel(1);
        let pool = Arc::clone(pool);
        let thread = std::thread::Builder::new()
            .name("umbra guest".to_owned())
            .spawn(move || match child::start(&pool, stub) {
                Ok(worker) => {
                    // Who asked is there, for it waits.
                    let _ = tell.send(Ok(worker));
                    serve(worker, &works, &pairs);
                }
                Err(error) => {
                    let _ = tell.send(Err(error));
                }
            })
            .map_err(SetupError::child("a thread that serves it"))?;
        let died = || SetupError::child("a thread that serves it")(io::Error::other("it panicked"));
        let worker = told.recv().map_err(|_| died())??;
        Ok(Self { work: Mutex::new(Some(work)), thread: Some(thread), worker, killed: OnceLock::new() })
    }

    /// Has the service look after tied [`Pairs`] from now on, until there are none. Does not wait.
    pub(super) fn watch_pairs(&self) {
        if let Some(sender) = &*self.work.lock().unwrap_or_else(PoisonError::into_inner) {
            let _ = sender.send(Box::new(|_| {}));
        }
    }

    /// Ends the process and its service, and waits for both.
    pub(super) fn end(&mut self) {
        drop(self.work.lock().unwrap_or_else(PoisonError::into_inner).take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the thread that served the guest's process panicked");
        }
    }

    /// Has `work` done by the tracer of the worker.
    ///
    /// # Errors
    /// The service has ended: the process is gone.
    pub(super) fn ask<T: Send + 'static>(
        &self,
        work: impl FnOnce(Tracee) -> T + Send + 'static,
    ) -> io::Result<T> {
        let (answer, answered) = sync_channel(1);
        let work: Work = Box::new(move |worker| {
            let _ = answer.send(pair::with_tracee(worker, || work(worker)));
        });
        let ended = || io::Error::other("the guest's process has ended");
        let sender = self.work.lock().unwrap_or_else(PoisonError::into_inner).clone().ok_or_else(ended)?;
        sender.send(work).map_err(|_| ended())?;
        answered.recv().map_err(|_| ended())
    }

    /// Why the engine ended the process, where it did.
    pub(super) fn killed(&self) -> Option<&str> {
        self.killed.get().map(String::as_str)
    }

    /// Ends the process, because of `why`. None of its threads runs when this returns.
    pub(super) fn kill(&self, why: &dyn fmt::Display) {
        self.killed.get_or_init(|| why.to_string());
        self.make_sure_of_its_end();
    }

    /// The same for one that is gone already, by what is known: nobody is told that umbra did it.
    pub(super) fn make_sure_of_its_end(&self) {
        let pid = self.worker.pid;
        // SAFETY: takes numbers; the process is our child and not waited for before `end`, so the number is its.
        unsafe { libc::kill(pid, libc::SIGKILL) };
        // Its threads may still be on a CPU: those of a process that is being killed leave it at once, and are zombies then.
        let running = || {
            let tasks = match std::fs::read_dir(format!("/proc/{pid}/task")) {
                // No descriptor or no memory left: again.
                Err(error)
                    if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM)) =>
                {
                    return true;
                }
                Err(_) => {
                    // Without a /proc nothing can be asked: a CPU leaves a thread that is killed within a tick.
                    if !std::path::Path::new("/proc/self").exists() {
                        std::thread::sleep(Duration::from_millis(100));
                    }
                    return false;
                }
                tasks => tasks,
            };
            tasks.is_ok_and(|mut tasks| {
                tasks.any(|task| {
                    let stat = task
                        .map(|task| std::fs::read_to_string(task.path().join("stat")).unwrap_or_default());
                    let state =
                        stat.ok().and_then(|stat| stat.rsplit(')').next()?.trim_start().chars().next());
                    state.is_some_and(|state| !matches!(state, 'Z' | 'X'))
                })
            })
        };
        while running() {
            std::thread::sleep(Duration::from_micros(50));
        }
    }
}

/// Works until nobody can send any more work, then ends the process.
fn serve(worker: Tracee, works: &Receiver<Work>, pairs: &Pairs) {
    loop {
        let next = if pairs.look() {
            works.recv_timeout(LOOK)
        } else {
            works.recv().map_err(|_| RecvTimeoutError::Disconnected)
        };
        match next {
            Ok(work) => work(worker),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    child::end(worker);
}
