// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Futexes (`kernel/futex/`): wait for a word in guest memory to change, wake those who wait.
//!
//! A futex is known by its address. That is exact for private futexes, and for shared ones as long as nobody maps the
//! same memory twice: a process here has no other to share with.
//!
//! # Why no wake-up is lost
//! The table's lock is held from reading the word until the waiter is in its queue. A waker changes the word before it
//! takes the lock; so either the waiter reads the new value, or the waker finds it queued. A [`Waiter`] that was taken off a
//! queue is marked `woken` first and notified then; the sleeper looks at the mark under its own
//! [`Waker`]'s lock. Reading the word may fault and so takes Mm's locks, which come below the table's.
//!
//! Priority-inheriting operations are not implemented (`ENOSYS`).

use super::errno::{Errno, SysResult};
use super::restart::Restart;
use super::thread::Thread;
use super::time::{self, Timespec};
use super::uaccess::UserMemory;
use super::waker::{Parked, Waker};
use shadow_mmu::sync::Mutex;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

const MATCH_ANY: u32 = u32::MAX;

/// A thread that waits.
#[derive(Debug)]
struct Waiter {
    waker: Arc<Waker>,
    bitset: u32,
    /// Off every queue for good; nothing but this ends a wait with success.
    woken: AtomicBool,
}

impl Waiter {
    fn wake(&self) {
        self.woken.store(true, Ordering::Release);
        self.waker.notify();
    }
}

#[derive(Debug, Default)]
struct Queues(HashMap<u64, VecDeque<Arc<Waiter>>>);

impl Queues {
    /// Wakes up to `most` waiters of `addr` that wait for a bit of `bitset`, in order.
    fn wake(&mut self, addr: u64, most: u32, bitset: u32) -> u64 {
        let Some(queue) = self.0.get_mut(&addr) else { return 0 };
        let mut woken = 0;
        queue.retain(|waiter| {
            let wakes = woken < u64::from(most) && waiter.bitset & bitset != 0;
            if wakes {
                waiter.wake();
                woken += 1;
            }
            !wakes
        });
        if queue.is_empty() {
            self.0.remove(&addr);
        }
        woken
    }

    /// Moves up to `most` waiters from one queue to the end of another.
    fn requeue(&mut self, from: u64, to: u64, most: u32) -> u64 {
        let Some(queue) = self.0.get_mut(&from) else { return 0 };
        let moved: Vec<_> = queue.drain(..queue.len().min(most as usize)).collect();
        if queue.is_empty() {
            self.0.remove(&from);
        }
        let count = moved.len() as u64;
        if count > 0 {
            self.0.entry(to).or_default().extend(moved);
        }
        count
    }

    /// Takes one waiter off, wherever it was moved to. Not often: only when a wait ends early.
    fn remove(&mut self, gone: &Arc<Waiter>) {
        self.0.retain(|_, queue| {
            queue.retain(|waiter| !Arc::ptr_eq(waiter, gone));
            !queue.is_empty()
        });
    }
}

/// All futexes of a process.
#[derive(Debug, Default)]
pub(super) struct Futexes(Mutex<Queues>);

impl Futexes {
    /// Wakes one waiter of `addr`.
    pub(super) fn wake_one(&self, addr: u64) {
        self.0.lock().wake(addr, 1, MATCH_ANY);
    }
}

/// A wait: everything that `restart_syscall` needs to go on with it.
#[derive(Debug, Clone, Copy)]
pub(super) struct FutexWait {
    addr: u64,
    expected: u32,
    bitset: u32,
    deadline: Option<Instant>,
}

/// How many to wake: at least one, as `futex_wake` counts after it has woken.
fn at_least_one(count: u32) -> u32 {
    (count as i32).max(1) as u32
}

fn check_word(addr: u64) -> Result<(), Errno> {
    if !addr.is_multiple_of(4) {
        return Err(Errno::EINVAL);
    }
    UserMemory::check_range(addr, 4)
}

/// `futex(addr, op, value, timeout or value2, addr2, value3)`.
pub(super) fn futex(t: &mut Thread, args: &[u64; 6]) -> SysResult {
    const CMD: i32 = !(libc::FUTEX_PRIVATE_FLAG | libc::FUTEX_CLOCK_REALTIME);
    let [addr, op, value, fourth, addr2, value3] = *args;
    let (op, value, value2, value3) = (op as i32, value as u32, fourth as u32, value3 as u32);
    let command = op & CMD;
    let waits = [libc::FUTEX_WAIT, libc::FUTEX_WAIT_BITSET].contains(&command);
    let time = match fourth {
        at if waits && at != 0 => Some(Timespec::read(t.process.user(), at)?),
        _ => None,
    };
    let realtime = op & libc::FUTEX_CLOCK_REALTIME != 0;
    if realtime && command != libc::FUTEX_WAIT_BITSET {
        return Err(Errno::ENOSYS);
    }
    // Memory that several mappings may show is looked up by Linux and must exist; a private address need not.
    if op & libc::FUTEX_PRIVATE_FLAG == 0 && addr.is_multiple_of(4) {
        t.process.user().load_u32(addr)?;
    }
    match command {
        libc::FUTEX_WAIT | libc::FUTEX_WAIT_BITSET => {
            let absolute = command == libc::FUTEX_WAIT_BITSET;
            let deadline = match time {
                None => None,
                Some(time) if !absolute => time::deadline_after(t, time),
                Some(time) => {
                    let clock = if realtime { libc::CLOCK_REALTIME } else { libc::CLOCK_MONOTONIC };
                    time::deadline_at(t, clock, time)?
                }
            };
            let bitset = if absolute { value3 } else { MATCH_ANY };
            wait_with(t, FutexWait { addr, expected: value, bitset, deadline }, time.is_some())
        }
        libc::FUTEX_WAKE => wake(t, addr, value, MATCH_ANY),
        libc::FUTEX_WAKE_BITSET => wake(t, addr, value, value3),
        libc::FUTEX_REQUEUE => requeue(t, (addr, addr2), (value, value2), None),
        libc::FUTEX_CMP_REQUEUE => requeue(t, (addr, addr2), (value, value2), Some(value3)),
        libc::FUTEX_WAKE_OP => wake_op(t, (addr, addr2), (value, value2), value3),
        _ => Err(Errno::ENOSYS),
    }
}

/// Goes on with a wait that had a time limit.
pub(super) fn wait(t: &mut Thread, wait: FutexWait) -> SysResult {
    wait_with(t, wait, true)
}

fn wait_with(t: &mut Thread, wait: FutexWait, timed: bool) -> SysResult {
    if wait.bitset == 0 {
        return Err(Errno::EINVAL);
    }
    check_word(wait.addr)?;
    let waiter = {
        let mut queues = t.process.futexes().0.lock();
        if t.process.user().load_u32(wait.addr)? != wait.expected {
            return Err(Errno::EAGAIN);
        }
        let woken = AtomicBool::new(false);
        let waiter = Arc::new(Waiter { waker: Arc::clone(&t.waker), bitset: wait.bitset, woken });
        queues.0.entry(wait.addr).or_default().push_back(Arc::clone(&waiter));
        waiter
    };
    let is_woken = || waiter.woken.load(Ordering::Acquire);
    let parked = t.sleep(wait.deadline, is_woken);
    if parked == Parked::Done {
        return Ok(0);
    }
    {
        // A wake-up that came in between counts: its sender counted it.
        let mut queues = t.process.futexes().0.lock();
        if is_woken() {
            return Ok(0);
        }
        queues.remove(&waiter);
    }
    match parked {
        Parked::TimedOut => Err(Errno::ETIMEDOUT),
        _ if timed => {
            t.restart = Restart::Futex(wait);
            Err(Errno::RESTART_BLOCK)
        }
        _ => Err(Errno::RESTART_SYS),
    }
}

fn wake(t: &Thread, addr: u64, count: u32, bitset: u32) -> SysResult {
    if bitset == 0 {
        return Err(Errno::EINVAL);
    }
    check_word(addr)?;
    Ok(t.process.futexes().0.lock().wake(addr, at_least_one(count), bitset))
}

/// Wakes `counts.0` waiters of `addrs.0` and moves `counts.1` more to `addrs.1`; if the word still holds `expected`.
fn requeue(t: &Thread, addrs: (u64, u64), counts: (u32, u32), expected: Option<u32>) -> SysResult {
    if (counts.0 as i32) < 0 || (counts.1 as i32) < 0 {
        return Err(Errno::EINVAL);
    }
    check_word(addrs.0)?;
    check_word(addrs.1)?;
    let mut queues = t.process.futexes().0.lock();
    if let Some(expected) = expected
        && t.process.user().load_u32(addrs.0)? != expected
    {
        return Err(Errno::EAGAIN);
    }
    let woken = queues.wake(addrs.0, counts.0, MATCH_ANY);
    Ok(woken + queues.requeue(addrs.0, addrs.1, counts.1))
}

/// Changes the second word as `encoded` says, wakes waiters of the first, and of the second if its old value says so.
fn wake_op(t: &Thread, addrs: (u64, u64), counts: (u32, u32), encoded: u32) -> SysResult {
    check_word(addrs.0)?;
    check_word(addrs.1)?;
    let operation = WakeOp::decode(encoded)?;
    let mut queues = t.process.futexes().0.lock();
    let old = t.process.user().update_u32(addrs.1, |old| Some(operation.apply(old)))?;
    let mut woken = queues.wake(addrs.0, at_least_one(counts.0), MATCH_ANY);
    if operation.holds(old) {
        woken += queues.wake(addrs.1, at_least_one(counts.1), MATCH_ANY);
    }
    Ok(woken)
}

/// The operation and the comparison of `FUTEX_WAKE_OP` (`futex_atomic_op_inuser`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct WakeOp {
    operation: u32,
    operand: u32,
    comparison: u32,
    against: i32,
}

impl WakeOp {
    fn decode(encoded: u32) -> Result<Self, Errno> {
        const OPERAND_IS_SHIFT: u32 = 8;
        let signed_12_bits = |value: u32| ((value << 20) as i32) >> 20;
        let (operation, comparison) = (encoded >> 28, encoded >> 24 & 0xf);
        let operand = signed_12_bits(encoded >> 12 & 0xfff);
        let operand = match operation & OPERAND_IS_SHIFT {
            0 => operand as u32,
            _ => 1u32 << (operand & 31),
        };
        let operation = operation & !OPERAND_IS_SHIFT;
        if operation > libc::FUTEX_OP_XOR as u32 || comparison > libc::FUTEX_OP_CMP_GE as u32 {
            return Err(Errno::ENOSYS);
        }
        Ok(Self { operation, operand, comparison, against: signed_12_bits(encoded & 0xfff) })
    }

    fn apply(self, old: u32) -> u32 {
        match self.operation as i32 {
            libc::FUTEX_OP_SET => self.operand,
            libc::FUTEX_OP_ADD => old.wrapping_add(self.operand),
            libc::FUTEX_OP_OR => old | self.operand,
            libc::FUTEX_OP_ANDN => old & !self.operand,
            _ => old ^ self.operand,
        }
    }

    fn holds(self, old: u32) -> bool {
        let (old, against) = (old as i32, self.against);
        match self.comparison as i32 {
            libc::FUTEX_OP_CMP_EQ => old == against,
            libc::FUTEX_OP_CMP_NE => old != against,
            libc::FUTEX_OP_CMP_LT => old < against,
            libc::FUTEX_OP_CMP_LE => old <= against,
            libc::FUTEX_OP_CMP_GT => old > against,
            _ => old >= against,
        }
    }
}

#[cfg(test)]
mod tests;
