// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The thread of umbra that serves the guest's process: it forked it, so it traces its first thread, and it must live as long as
//! the process does (PR_SET_PDEATHSIG goes by threads).
//!
//! Others send it work to do with another thread of the process, the worker, one piece after another, and wait for the answer.
//! Work never waits for a lock that somebody holds who waits for it: it makes system calls in the guest's process, nothing else.

use super::StubFrames;
use super::child;
use super::error::PtraceError;
use super::gone::is_end;
use super::pair::{self, LOOK, Pairs};
use super::proc;
use super::tracee::Tracee;
use shadow_mmu::frame::FramePool;
use std::convert::Infallible;
use std::fmt;
use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel, sync_channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;

type Work = Box<dyn FnOnce(Tracee) + Send>;

/// The service of one guest's process, until [`end`](Service::end).
pub(super) struct Service {
    /// `None` at the end.
    work: Mutex<Option<Sender<Work>>>,
    thread: Option<JoinHandle<()>>,
    /// The thread of the process that makes calls for the service.
    pub(super) worker: Tracee,
    /// Why the process ended: what was known first.
    why: Arc<OnceLock<String>>,
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
    /// [`PtraceError`].
    pub(super) fn start(
        pool: &Arc<FramePool>,
        stub: StubFrames,
        pairs: Arc<Pairs>,
    ) -> Result<Self, PtraceError> {
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
            .map_err(PtraceError::child("a thread that serves it"))?;
        let died = || PtraceError::child("a thread that serves it")(io::Error::other("it panicked"));
        let worker = told.recv().map_err(|_| died())??;
        Ok(Self { work: Mutex::new(Some(work)), thread: Some(thread), worker, why: Arc::default() })
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
    /// Those of the work; or the service has ended: the process is gone.
    pub(super) fn ask<T: Send + 'static>(
        &self,
        work: impl FnOnce(Tracee) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let (answer, answered) = sync_channel(1);
        let why = Arc::clone(&self.why);
        let work: Work = Box::new(move |worker| {
            let done = pair::with_tracee(worker, || work(worker));
            if let Err(error) = &done
                && is_end(error)
            {
                // The next one is not told any more how.
                why.get_or_init(|| error.to_string());
            }
            let _ = answer.send(done);
        });
        let ended = || io::Error::other("the guest's process has ended");
        let sender = self.work.lock().unwrap_or_else(PoisonError::into_inner).clone().ok_or_else(ended)?;
        sender.send(work).map_err(|_| ended())?;
        answered.recv().map_err(|_| ended())?
    }

    /// How the process ended, by what the worker's tracer is told: for who traces none of its threads, and had `error` of one.
    pub(super) fn how_it_ended(&self, error: io::Error) -> io::Error {
        match self.ask::<Infallible>(move |worker| Err(worker.ended_with(&error).unwrap_or(error))) {
            Ok(never) => match never {},
            Err(how) => how,
        }
    }

    /// Why the process ended: `why`, unless something is known from before. The same for everybody who asks.
    pub(super) fn why(&self, why: impl fmt::Display) -> &str {
        self.why.get_or_init(|| why.to_string())
    }

    /// Ends the process, because of `why`. None of its threads runs when this returns.
    pub(super) fn kill(&self, why: impl fmt::Display) {
        self.why(why);
        self.end_now();
    }

    /// The same for one that is gone already, by what is known: who waits for its threads learns why.
    pub(super) fn end_now(&self) {
        let pid = self.worker.pid;
        // SAFETY: takes numbers; the process is our child and not waited for before `end`, so the number is its.
        unsafe { libc::kill(pid, libc::SIGKILL) };
        proc::wait_until_nothing_runs(pid);
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
