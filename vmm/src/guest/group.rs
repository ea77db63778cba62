// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The threads of the process and the signals that are on their way to them: what Linux keeps under `siglock`.
//!
//! Plain data with rules; [`Process`](super::process::Process) keeps it under one lock. Every method that makes a signal
//! deliverable to a thread, or ends the process, also interrupts the threads concerned ([`Waker::interrupt`]), under that
//! lock, so that [`Waker::set_attention`] can never lose one.

use super::errno::Errno;
use super::signal::{Action, NSIG, Pending, QueueFull, SIG_DFL, SigInfo, SigSet, Signal};
use super::waker::Waker;
use std::collections::BTreeMap;
use std::sync::Arc;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitStatus {
    /// It said so: the exit code, 0 to 255.
    Exited(i32),
    /// A signal ended it: the signal's number. Shells report 128 + this.
    Signaled(i32),
}

/// One thread, as the others see it.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) waker: Arc<Waker>,
    /// Signals that it does not take now.
    pub(super) mask: SigSet,
    /// What it blocks apart from a wait in `rt_sigtimedwait`, which unblocks what it waits for.
    waiting_mask: SigSet,
    pending: Pending,
}

impl Member {
    fn blocks(&self, signal: Signal) -> bool {
        self.mask.with(self.waiting_mask).contains(signal)
    }
}

/// What a thread is to do about its signals.
#[derive(Debug)]
pub(super) enum Next {
    /// Nothing.
    None,
    /// Run this handler. The action is as the guest set it; `SA_RESETHAND` was obeyed.
    Handle(Signal, SigInfo, Action),
    /// The process dies of it.
    Die(Signal, SigInfo),
    /// The process is over already.
    Over,
}

/// The thread group.
#[derive(Debug)]
pub(super) struct Group {
    actions: [Action; NSIG as usize],
    shared: Pending,
    members: BTreeMap<i32, Member>,
    /// Set once, when the process ends as a whole.
    over: Option<ExitStatus>,
    /// It ended by a signal and nobody has said so yet.
    report_due: bool,
}

impl Default for Group {
    fn default() -> Self {
        Self {
            actions: [Action::default(); NSIG as usize],
            shared: Pending::default(),
            members: BTreeMap::new(),
            over: None,
            report_due: false,
        }
    }
}

impl Group {
    /// Adds a thread.
    ///
    /// # Errors
    /// `EAGAIN`: there are `most` already, or the process is ending.
    pub(super) fn join(
        &mut self,
        tid: i32,
        waker: Arc<Waker>,
        mask: SigSet,
        most: usize,
    ) -> Result<(), Errno> {
        if self.over.is_some() || self.members.len() >= most || self.members.contains_key(&tid) {
            return Err(Errno::EAGAIN);
        }
        let member = Member { waker, mask, waiting_mask: SigSet::EMPTY, pending: Pending::default() };
        self.members.insert(tid, member);
        Ok(())
    }

    /// Removes a thread that ends with `code`. Returns the status of the process if this was its last one.
    pub(super) fn leave(&mut self, tid: i32, code: i32) -> Option<ExitStatus> {
        self.members.remove(&tid)?;
        // Somebody else has to take what it was to take.
        self.interrupt_takers(SigSet(u64::MAX), tid);
        // As `synchronize_group_exit`: the code of the last thread is that of the process.
        self.members.is_empty().then(|| *self.over.get_or_insert(ExitStatus::Exited(code)))
    }

    pub(super) fn contains(&self, tid: i32) -> bool {
        self.members.contains_key(&tid)
    }
    pub(super) fn len(&self) -> usize {
        self.members.len()
    }
    pub(super) fn is_over(&self) -> bool {
        self.over.is_some()
    }

    /// Ends the process as a whole. Returns whether this call decided its status.
    pub(super) fn end(&mut self, status: ExitStatus) -> bool {
        let first = self.over.is_none();
        self.over.get_or_insert(status);
        if first {
            self.report_due = matches!(status, ExitStatus::Signaled(_));
            self.members.values().for_each(|member| member.waker.interrupt());
        }
        first
    }

    /// Whether the caller is the one to report that a signal ended the process: true once.
    pub(super) fn claim_report(&mut self) -> bool {
        std::mem::take(&mut self.report_due)
    }

    /// The status that [`end`](Self::end) decided.
    pub(super) fn over(&self) -> Option<ExitStatus> {
        self.over
    }

    pub(super) fn action(&self, signal: Signal) -> Action {
        self.actions[signal.index()]
    }

    /// Changes a disposition. What is pending of a signal that is ignored now is forgotten (POSIX 3.3.1.3).
    pub(super) fn set_action(&mut self, signal: Signal, action: Action) {
        self.actions[signal.index()] = action;
        if action.ignores(signal) {
            let gone = SigSet::of(signal);
            self.shared.flush(gone);
            self.members.values_mut().for_each(|member| member.pending.flush(gone));
        }
    }

    pub(super) fn mask(&self, tid: i32) -> SigSet {
        self.members.get(&tid).map_or(SigSet::EMPTY, |member| member.mask)
    }

    /// Changes the mask of `tid`.
    pub(super) fn set_mask(&mut self, tid: i32, mask: SigSet) {
        let Some(member) = self.members.get_mut(&tid) else { return };
        let newly_blocked = mask.without(member.mask);
        member.mask = mask;
        self.refresh(tid);
        // As `retarget_shared_pending`: somebody else may take what this thread does not take any more.
        self.interrupt_takers(newly_blocked, tid);
    }

    /// Unblocks `wanted` for a wait and remembers that they were blocked.
    pub(super) fn begin_wait(&mut self, tid: i32, wanted: SigSet) {
        let Some(member) = self.members.get_mut(&tid) else { return };
        member.waiting_mask = member.mask;
        let mask = member.mask.without(wanted);
        self.set_mask(tid, mask);
    }

    /// Undoes [`begin_wait`](Self::begin_wait).
    pub(super) fn end_wait(&mut self, tid: i32) {
        let Some(member) = self.members.get_mut(&tid) else { return };
        let mask = std::mem::take(&mut member.waiting_mask);
        self.set_mask(tid, mask);
    }

    /// Makes threads other than `not` look that could take a shared signal of `among`.
    fn interrupt_takers(&self, among: SigSet, not: i32) {
        let waiting = self.shared.set().and(among);
        if waiting.is_empty() {
            return;
        }
        for (_, member) in self.members.iter().filter(|(tid, _)| **tid != not) {
            if !waiting.without(member.mask).is_empty() {
                member.waker.interrupt();
            }
        }
    }

    /// What is pending for `tid`, blocked or not.
    pub(super) fn pending(&self, tid: i32) -> SigSet {
        let own = self.members.get(&tid).map_or(SigSet::EMPTY, |member| member.pending.set());
        own.with(self.shared.set())
    }

    /// Sets or clears the attention flag of `tid`, the calling thread, by what is true now (`recalc_sigpending`).
    /// Returns whether it is set.
    pub(super) fn refresh(&mut self, tid: i32) -> bool {
        let Some(member) = self.members.get(&tid) else { return self.is_over() };
        let wanted = self.is_over() || !self.pending(tid).without(member.mask).is_empty();
        member.waker.set_attention(wanted);
        wanted
    }

    /// Sends a signal to one thread, or to whichever thread of the process takes it.
    ///
    /// # Errors
    /// [`QueueFull`]: it arrives without its data. `ESRCH` is for the caller to find first, with
    /// [`contains`](Self::contains).
    pub(super) fn send(&mut self, to: Option<i32>, signal: Signal, info: SigInfo) -> Result<(), QueueFull> {
        if signal == Signal::KILL {
            self.end(ExitStatus::Signaled(signal.number()));
            return Ok(());
        }
        let ignored = self.action(signal).ignores(signal);
        match to {
            Some(tid) => {
                let Some(member) = self.members.get_mut(&tid) else { return Ok(()) };
                if ignored && !member.blocks(signal) {
                    return Ok(());
                }
                let result = member.pending.add(signal, info);
                if !member.mask.contains(signal) {
                    member.waker.interrupt();
                }
                result
            }
            None => {
                // The main thread decides about "blocked", as in `__send_signal`.
                if ignored && self.members.values().next().is_none_or(|main| !main.blocks(signal)) {
                    return Ok(());
                }
                let result = self.shared.add(signal, info);
                if let Some(taker) = self.members.values().find(|member| !member.mask.contains(signal)) {
                    taker.waker.interrupt();
                }
                result
            }
        }
    }

    /// Takes a pending signal of `among` for `tid`: its own ones first.
    pub(super) fn take(&mut self, tid: i32, among: SigSet) -> Option<(Signal, SigInfo)> {
        let member = self.members.get_mut(&tid)?;
        member.pending.take(among).or_else(|| self.shared.take(among))
    }

    /// What `tid` is to do next about its signals (`get_signal`).
    pub(super) fn next(&mut self, tid: i32) -> Next {
        if self.is_over() {
            return Next::Over;
        }
        let unblocked = SigSet(!self.mask(tid).0);
        while let Some((signal, info)) = self.take(tid, unblocked) {
            let action = self.action(signal);
            if action.ignores(signal) {
                continue;
            }
            if action.handler == SIG_DFL {
                return Next::Die(signal, info);
            }
            self.reset_if_asked(signal);
            return Next::Handle(signal, info, action);
        }
        self.refresh(tid);
        Next::None
    }

    /// A signal that `tid` must take now because of its own instruction (`force_sig_info_to_task`): ignoring or
    /// blocking it does not help.
    pub(super) fn force(&mut self, tid: i32, signal: Signal, info: SigInfo) -> Next {
        if self.is_over() {
            return Next::Over;
        }
        let action = self.action(signal);
        if self.mask(tid).contains(signal) || action.ignores(signal) || action.handler == SIG_DFL {
            return Next::Die(signal, info);
        }
        self.reset_if_asked(signal);
        Next::Handle(signal, info, action)
    }

    fn reset_if_asked(&mut self, signal: Signal) {
        let action = &mut self.actions[signal.index()];
        if action.has(libc::SA_RESETHAND) {
            action.handler = SIG_DFL;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const USR1: i32 = libc::SIGUSR1;

    fn signal(number: i32) -> Signal {
        Signal::new(number).unwrap()
    }
    fn info(number: i32) -> SigInfo {
        SigInfo::from_user(signal(number), libc::SI_USER, 1, 0)
    }
    fn group(tids: &[i32]) -> (Group, Vec<Arc<Waker>>) {
        let mut group = Group::default();
        let wakers: Vec<_> = tids.iter().map(|_| Arc::new(Waker::new(None).unwrap())).collect();
        for (&tid, waker) in tids.iter().zip(&wakers) {
            group.join(tid, Arc::clone(waker), SigSet::EMPTY, 8).unwrap();
        }
        (group, wakers)
    }
    fn handle(group: &mut Group, number: i32, flags: i32) {
        group
            .set_action(signal(number), Action { handler: 0x1000, flags: flags as u64, ..Action::default() });
    }

    #[test]
    fn a_process_signal_goes_to_a_thread_that_takes_it() {
        let (mut group, wakers) = group(&[1, 2]);
        handle(&mut group, USR1, 0);
        group.set_mask(1, SigSet::of(signal(USR1)));
        group.send(None, signal(USR1), info(USR1)).unwrap();
        assert!(!wakers[0].has_attention() && wakers[1].has_attention());
        assert!(matches!(group.next(1), Next::None));
        assert!(matches!(group.next(2), Next::Handle(..)));
        assert!(matches!(group.next(2), Next::None));
        assert!(!wakers[1].has_attention());
    }

    #[test]
    fn a_thread_that_blocks_or_leaves_hands_shared_signals_on() {
        let (mut group, wakers) = group(&[1, 2, 3]);
        handle(&mut group, USR1, 0);
        group.send(None, signal(USR1), info(USR1)).unwrap();
        assert!(wakers[0].has_attention() && !wakers[1].has_attention());
        group.set_mask(1, SigSet::of(signal(USR1)));
        assert!(!wakers[0].has_attention() && wakers[1].has_attention());
        wakers[2].set_attention(false);
        group.leave(2, 0);
        assert!(wakers[2].has_attention());
    }

    #[test]
    fn ignored_signals_vanish_unless_blocked() {
        let (mut group, _wakers) = group(&[1]);
        group.send(None, signal(libc::SIGCHLD), info(libc::SIGCHLD)).unwrap();
        assert!(group.pending(1).is_empty());
        group.set_mask(1, SigSet::of(signal(libc::SIGCHLD)));
        group.send(None, signal(libc::SIGCHLD), info(libc::SIGCHLD)).unwrap();
        assert!(group.pending(1).contains(signal(libc::SIGCHLD)));
        group.set_action(signal(libc::SIGCHLD), Action { handler: 1, ..Action::default() });
        assert!(group.pending(1).is_empty());
    }

    #[test]
    fn a_forced_signal_kills_when_blocked_ignored_or_default() {
        let (mut group, _wakers) = group(&[1]);
        let segv = libc::SIGSEGV;
        assert!(matches!(group.force(1, Signal::SEGV, info(segv)), Next::Die(..)));
        handle(&mut group, segv, libc::SA_RESETHAND);
        assert!(matches!(group.force(1, Signal::SEGV, info(segv)), Next::Handle(..)));
        assert!(
            matches!(group.force(1, Signal::SEGV, info(segv)), Next::Die(..)),
            "reset by its own handler"
        );
        handle(&mut group, segv, 0);
        group.set_mask(1, SigSet::of(Signal::SEGV));
        assert!(matches!(group.force(1, Signal::SEGV, info(segv)), Next::Die(..)));
    }

    #[test]
    fn the_end_is_decided_once_and_wakes_everybody() {
        let (mut group, wakers) = group(&[1, 2]);
        assert!(group.end(ExitStatus::Exited(3)));
        assert!(!group.end(ExitStatus::Signaled(9)));
        assert!(wakers.iter().all(|waker| waker.has_attention()));
        let waker = Arc::new(Waker::new(None).unwrap());
        assert_eq!(group.join(3, waker, SigSet::EMPTY, 8), Err(Errno::EAGAIN));
        assert_eq!(group.leave(1, 0), None);
        assert_eq!(group.leave(2, 0), Some(ExitStatus::Exited(3)));
    }
}
