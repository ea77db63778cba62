// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Signals: numbers, sets, dispositions, and what is queued.
//!
//! * this file: the plain data
//! * [`group`](super::group): who has what pending, and who is to take it
//! * [`calls`]: the system calls
//! * [`deliver`]: from "pending" to "the handler runs", restarts of interrupted calls, and death
//! * [`frame`]: the frame on the guest's stack, and the way back
//! * [`fpstate`]: the FPU state in that frame
//!
//! A signal's number counts from 1 to 64; bit `n - 1` of a set stands for signal `n`.

pub(super) mod calls;
pub(super) mod deliver;
mod fpstate;
mod frame;

pub(super) use fpstate::signal_frame_size;
pub(super) use frame::{AltStack, Trap};

use super::uaccess::Record;
use std::collections::VecDeque;

/// Signals that are queued with their data, at most; as `RLIMIT_SIGPENDING`.
const MOST_QUEUED: usize = 1024;

pub(super) const SIG_DFL: u64 = 0;
pub(super) const SIG_IGN: u64 = 1;
/// `SI_KERNEL`: sent by the kernel for a reason that has no code of its own.
pub(super) const SI_KERNEL: i32 = 0x80;
/// The highest signal number.
pub(super) const NSIG: i32 = 64;

/// A signal number, 1 to 64.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Signal(i32);

impl Signal {
    pub(super) const ILL: Self = Self(libc::SIGILL);
    pub(super) const TRAP: Self = Self(libc::SIGTRAP);
    pub(super) const BUS: Self = Self(libc::SIGBUS);
    pub(super) const FPE: Self = Self(libc::SIGFPE);
    pub(super) const KILL: Self = Self(libc::SIGKILL);
    pub(super) const SEGV: Self = Self(libc::SIGSEGV);
    pub(super) const PIPE: Self = Self(libc::SIGPIPE);
    pub(super) const STOP: Self = Self(libc::SIGSTOP);

    pub(super) fn new(number: i32) -> Option<Self> {
        (1..=NSIG).contains(&number).then_some(Self(number))
    }
    pub(super) fn number(self) -> i32 {
        self.0
    }
    /// Its place in an array of 64.
    pub(super) fn index(self) -> usize {
        self.0 as usize - 1
    }
    /// What happens where the guest did not say. Stopping is not supported and left out.
    pub(super) fn is_ignored_by_default(self) -> bool {
        const IGNORED: [i32; 8] = [
            libc::SIGCHLD,
            libc::SIGCONT,
            libc::SIGURG,
            libc::SIGWINCH,
            libc::SIGSTOP,
            libc::SIGTSTP,
            libc::SIGTTIN,
            libc::SIGTTOU,
        ];
        IGNORED.contains(&self.0)
    }
}

/// A set of signals, in the kernel's 64-bit form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct SigSet(pub(super) u64);

impl SigSet {
    pub(super) const EMPTY: Self = Self(0);
    /// What cannot be blocked, caught or ignored.
    const UNMASKABLE: Self = Self(1 << (libc::SIGKILL - 1) | 1 << (libc::SIGSTOP - 1));
    /// What an instruction causes; delivered before anything else (`SYNCHRONOUS_MASK`).
    const SYNCHRONOUS: Self = Self(
        1 << (libc::SIGSEGV - 1)
            | 1 << (libc::SIGBUS - 1)
            | 1 << (libc::SIGILL - 1)
            | 1 << (libc::SIGTRAP - 1)
            | 1 << (libc::SIGFPE - 1)
            | 1 << (libc::SIGSYS - 1),
    );

    /// A set that the guest gave, without what cannot be blocked.
    pub(super) fn mask(bits: u64) -> Self {
        Self(bits).without(Self::UNMASKABLE)
    }
    pub(super) fn of(signal: Signal) -> Self {
        Self(1 << signal.index())
    }
    pub(super) fn contains(self, signal: Signal) -> bool {
        self.0 & Self::of(signal).0 != 0
    }
    pub(super) fn is_empty(self) -> bool {
        self.0 == 0
    }
    pub(super) fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
    pub(super) fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
    pub(super) fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
    /// The signal of the set that goes first (`next_signal`).
    pub(super) fn next(self) -> Option<Signal> {
        let first = self.and(Self::SYNCHRONOUS);
        let bits = if first.is_empty() { self.0 } else { first.0 };
        Signal::new(bits.trailing_zeros() as i32 + 1)
    }
}

/// `siginfo_t` in the kernel's layout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SigInfo(pub(super) Record<128>);

impl SigInfo {
    fn new(signal: Signal, code: i32) -> Self {
        let mut record = Record::zeroed();
        record.put_i32(0, signal.0).put_i32(8, code);
        Self(record)
    }
    /// From `kill`, `tkill` or the like.
    pub(super) fn from_user(signal: Signal, code: i32, pid: i32, uid: u32) -> Self {
        let mut info = Self::new(signal, code);
        info.0.put_i32(16, pid).put_u32(20, uid);
        info
    }
    /// From an instruction: `si_addr` is what it touched or where it is.
    pub(super) fn fault(signal: Signal, code: i32, addr: u64) -> Self {
        let mut info = Self::new(signal, code);
        info.0.put_u64(16, addr);
        info
    }
    /// The same, with how much failed there: `si_addr_lsb`, the lowest bit of the address that matters (`force_sig_mceerr`).
    pub(super) fn with_failed_bits(mut self, lsb: u32) -> Self {
        self.0.put_u16(24, lsb as u16);
        self
    }
    /// From the kernel, with nothing more to say.
    pub(super) fn kernel(signal: Signal) -> Self {
        Self::new(signal, SI_KERNEL)
    }
    /// As the guest made it up (`rt_sigqueueinfo`), but for the number.
    pub(super) fn queued(signal: Signal, mut record: Record<128>) -> Self {
        record.put_i32(0, signal.0);
        Self(record)
    }
    /// `si_code`.
    pub(super) fn code(&self) -> i32 {
        self.0.i32(8)
    }
    /// `si_signo`.
    pub(super) fn number(&self) -> i32 {
        self.0.i32(0)
    }
}

/// What to do about a signal: `struct kernel_sigaction`, 32 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Action {
    /// [`SIG_DFL`], [`SIG_IGN`] or the handler's address.
    pub(super) handler: u64,
    pub(super) flags: u64,
    pub(super) restorer: u64,
    pub(super) mask: SigSet,
}

impl Action {
    pub(super) fn has(&self, flag: i32) -> bool {
        self.flags & u64::from(flag as u32) != 0
    }
    /// Whether it makes `signal` go away unseen.
    pub(super) fn ignores(&self, signal: Signal) -> bool {
        self.handler == SIG_IGN || self.handler == SIG_DFL && signal.is_ignored_by_default()
    }
    pub(super) fn from_record(record: &Record<32>) -> Self {
        Self {
            handler: record.u64(0),
            flags: record.u64(8),
            restorer: record.u64(16),
            mask: SigSet::mask(record.u64(24)),
        }
    }
    pub(super) fn to_record(self) -> Record<32> {
        let mut record = Record::zeroed();
        record
            .put_u64(0, self.handler)
            .put_u64(8, self.flags)
            .put_u64(16, self.restorer)
            .put_u64(24, self.mask.0);
        record
    }
}

/// Signals that wait to be taken, by one thread or by any of the process.
#[derive(Debug, Default)]
pub(super) struct Pending {
    set: SigSet,
    /// In order of arrival. A signal may be in the set without being here: its data did not fit.
    queue: VecDeque<SigInfo>,
}

/// The queue of signals with data is full.
#[derive(Debug)]
pub(super) struct QueueFull;

impl Pending {
    pub(super) fn set(&self) -> SigSet {
        self.set
    }

    /// Queues a signal. A classic one that is pending already stays as it is; a real-time one is queued every time.
    ///
    /// # Errors
    /// [`QueueFull`]: the signal is pending now, but without its data.
    pub(super) fn add(&mut self, signal: Signal, info: SigInfo) -> Result<(), QueueFull> {
        const FIRST_REAL_TIME: i32 = 32;
        if self.set.contains(signal) && signal.0 < FIRST_REAL_TIME {
            return Ok(());
        }
        self.set = self.set.with(SigSet::of(signal));
        if self.queue.len() >= MOST_QUEUED {
            return Err(QueueFull);
        }
        self.queue.push_back(info);
        Ok(())
    }

    /// Takes the signal of `among` that goes first.
    pub(super) fn take(&mut self, among: SigSet) -> Option<(Signal, SigInfo)> {
        let signal = self.set.and(among).next()?;
        let mut of_it = self.queue.iter().enumerate().filter(|(_, info)| info.number() == signal.0);
        let first = of_it.next().map(|(at, _)| at);
        if of_it.next().is_none() {
            self.set = self.set.without(SigSet::of(signal));
        }
        let info = first.and_then(|at| self.queue.remove(at));
        Some((signal, info.unwrap_or_else(|| SigInfo::from_user(signal, libc::SI_USER, 0, 0))))
    }

    /// Forgets `signals`.
    pub(super) fn flush(&mut self, signals: SigSet) {
        self.set = self.set.without(signals);
        self.queue.retain(|info| Signal::new(info.number()).is_none_or(|signal| !signals.contains(signal)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(signal: Signal, pid: i32) -> SigInfo {
        SigInfo::from_user(signal, libc::SI_USER, pid, 0)
    }

    #[test]
    fn faults_go_first_then_the_lowest_number() {
        let mut pending = Pending::default();
        for number in [34, 10, 11, 2] {
            let signal = Signal::new(number).unwrap();
            pending.add(signal, info(signal, 0)).unwrap();
        }
        let order: Vec<i32> =
            std::iter::from_fn(|| pending.take(SigSet(u64::MAX))).map(|(s, _)| s.0).collect();
        assert_eq!(order, [11, 2, 10, 34]);
    }

    #[test]
    fn classic_signals_collapse_and_real_time_ones_queue_in_order() {
        let mut pending = Pending::default();
        let (usr1, rt) = (Signal(libc::SIGUSR1), Signal(40));
        for pid in 1..=3 {
            pending.add(usr1, info(usr1, pid)).unwrap();
            pending.add(rt, info(rt, pid)).unwrap();
        }
        let taken: Vec<(i32, i32)> =
            std::iter::from_fn(|| pending.take(SigSet(u64::MAX))).map(|(s, i)| (s.0, i.0.i32(16))).collect();
        assert_eq!(taken, [(10, 1), (40, 1), (40, 2), (40, 3)]);
    }

    #[test]
    fn a_full_queue_keeps_the_signal_and_drops_its_data() {
        let mut pending = Pending::default();
        let (rt, other) = (Signal(40), Signal(41));
        for _ in 0..MOST_QUEUED {
            pending.add(rt, info(rt, 1)).unwrap();
        }
        assert!(pending.add(other, info(other, 1)).is_err());
        pending.flush(SigSet::of(rt));
        assert_eq!(pending.take(SigSet(u64::MAX)).unwrap().0, other);
        assert!(pending.take(SigSet(u64::MAX)).is_none());
    }

    #[test]
    fn what_cannot_be_blocked_is_not_in_a_mask() {
        let mask = SigSet::mask(u64::MAX);
        assert!(!mask.contains(Signal::KILL) && !mask.contains(Signal::STOP) && mask.contains(Signal::SEGV));
    }
}
