// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Futexes between threads of a fake guest, each on a host thread of its own.

use super::*;
use crate::guest::ExitStatus;
use crate::guest::testing::{Fixture, Remote};
use std::time::Duration;

const WAIT: u64 = (libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG) as u64;
const WAKE: u64 = (libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG) as u64;

fn call(remote: &Remote, args: &[u64]) -> i64 {
    remote.call(libc::SYS_futex, args)
}
fn errno(errno: Errno) -> i64 {
    -i64::from(errno.0)
}
/// Waits until `count` threads wait at `addr`.
fn until_waiting(fixture: &Fixture, addr: u64, count: usize) {
    let waiting = || fixture.process.futexes().0.lock().0.get(&addr).map_or(0, VecDeque::len);
    let start = Instant::now();
    while waiting() != count {
        assert!(start.elapsed() < Duration::from_secs(10), "{} of {count} wait", waiting());
        std::thread::yield_now();
    }
}
fn time_at(fixture: &Fixture, time: Duration) -> u64 {
    let at = fixture.map_pages(1);
    fixture.user().write(at, &Timespec(time).record().0).unwrap();
    at
}

#[test]
fn waiters_are_woken_one_by_one_and_counted() {
    let fixture = Fixture::new();
    let word = fixture.map_pages(1);
    let others = [fixture.new_thread(), fixture.new_thread(), fixture.new_thread()];
    assert_eq!(call(&fixture.main, &[word, WAIT, 1]), errno(Errno::EAGAIN), "the word is not 1");
    assert_eq!(call(&fixture.main, &[word, WAKE, 5]), 0);
    others.iter().for_each(|other| other.begin_call(libc::SYS_futex, &[word, WAIT, 0]));
    until_waiting(&fixture, word, 3);
    assert_eq!(call(&fixture.main, &[word, WAKE, 1]), 1);
    assert_eq!(call(&fixture.main, &[word, WAKE, i32::MAX as u64]), 2);
    assert!(others.iter().all(|other| other.finish().unwrap().rax == 0));
    until_waiting(&fixture, word, 0);
}

#[test]
fn time_runs_out_relative_and_absolute() {
    let fixture = Fixture::new();
    let word = fixture.map_pages(1);
    let short = time_at(&fixture, Duration::from_millis(20));
    let start = Instant::now();
    assert_eq!(call(&fixture.main, &[word, WAIT, 0, short]), errno(Errno::ETIMEDOUT));
    assert!(start.elapsed() >= Duration::from_millis(20));
    let any = u64::from(MATCH_ANY);
    for flag in [0, libc::FUTEX_CLOCK_REALTIME] {
        let operation = (libc::FUTEX_WAIT_BITSET | flag) as u64;
        // An absolute time that has passed long ago.
        assert_eq!(call(&fixture.main, &[word, operation, 0, short, 0, any]), errno(Errno::ETIMEDOUT));
    }
    let bad = fixture.map_pages(1);
    fixture.user().write_u64(bad + 8, 1_000_000_000).unwrap();
    assert_eq!(call(&fixture.main, &[word, WAIT, 0, bad]), errno(Errno::EINVAL));
    assert_eq!(call(&fixture.main, &[word, WAIT, 0, 1]), errno(Errno::EFAULT));
    until_waiting(&fixture, word, 0);
}

#[test]
fn bits_decide_who_is_woken() {
    let fixture = Fixture::new();
    let word = fixture.map_pages(1);
    let other = fixture.new_thread();
    let (wait, wake) = (libc::FUTEX_WAIT_BITSET as u64, libc::FUTEX_WAKE_BITSET as u64);
    assert_eq!(call(&fixture.main, &[word, wait, 0, 0, 0, 0]), errno(Errno::EINVAL));
    assert_eq!(call(&fixture.main, &[word, wake, 1, 0, 0, 0]), errno(Errno::EINVAL));
    other.begin_call(libc::SYS_futex, &[word, wait, 0, 0, 0, 0b10]);
    until_waiting(&fixture, word, 1);
    assert_eq!(call(&fixture.main, &[word, wake, 1, 0, 0, 0b01]), 0);
    assert_eq!(call(&fixture.main, &[word, wake, 1, 0, 0, 0b11]), 1);
    assert_eq!(other.finish().unwrap().rax, 0);
}

#[test]
fn waiters_are_requeued_and_found_at_their_new_place() {
    let fixture = Fixture::new();
    let word = fixture.map_pages(1);
    let others = [fixture.new_thread(), fixture.new_thread(), fixture.new_thread()];
    others.iter().for_each(|other| other.begin_call(libc::SYS_futex, &[word, WAIT, 0]));
    until_waiting(&fixture, word, 3);
    let requeue = libc::FUTEX_CMP_REQUEUE as u64;
    assert_eq!(call(&fixture.main, &[word, requeue, 1, 1, word + 4, 9]), errno(Errno::EAGAIN));
    assert_eq!(call(&fixture.main, &[word, requeue, 1 << 31, 1, word + 4, 0]), errno(Errno::EINVAL));
    assert_eq!(call(&fixture.main, &[word, requeue, 1, 1, word + 4, 0]), 2);
    until_waiting(&fixture, word, 1);
    until_waiting(&fixture, word + 4, 1);
    assert_eq!(call(&fixture.main, &[word + 4, WAKE, 9]), 1);
    assert_eq!(call(&fixture.main, &[word, WAKE, 9]), 1);
    assert!(others.iter().all(|other| other.finish().unwrap().rax == 0));
}

#[test]
fn wake_op_changes_the_second_word_and_looks_at_what_it_was() {
    let fixture = Fixture::new();
    let word = fixture.map_pages(1);
    let other = fixture.new_thread();
    other.begin_call(libc::SYS_futex, &[word + 4, WAIT, 0]);
    until_waiting(&fixture, word + 4, 1);
    // word2 += 5, wake its waiters if it was 0.
    let encoded = 1 << 28 | 5 << 12;
    assert_eq!(call(&fixture.main, &[word, libc::FUTEX_WAKE_OP as u64, 1, 1, word + 4, encoded]), 1);
    assert_eq!(fixture.user().load_u32(word + 4), Ok(5));
    assert_eq!(other.finish().unwrap().rax, 0);
    let refused = [(1, encoded, Errno::EINVAL), (4096, encoded, Errno::EFAULT), (4, 7 << 28, Errno::ENOSYS)];
    for (offset, encoded, expected) in refused {
        let args = [word, libc::FUTEX_WAKE_OP as u64, 1, 1, word + offset, encoded];
        assert_eq!(call(&fixture.main, &args), errno(expected), "{offset}");
    }
}

#[test]
fn the_wake_op_arithmetic_is_linux_own() {
    let apply = |encoded, old| WakeOp::decode(encoded).unwrap().apply(old);
    assert_eq!(apply(0xfff << 12, 7), u32::MAX, "operands are signed");
    assert_eq!(apply(1 << 28 | 3 << 12, u32::MAX), 2);
    assert_eq!(apply((8 | 2) << 28 | 4 << 12, 1), 17, "a shifted operand");
    assert_eq!(apply(3 << 28 | 1 << 12, 3), 2);
    assert_eq!(apply(4 << 28 | 1 << 12, 3), 2);
    let holds = |comparison: u32, old| WakeOp::decode(comparison << 24 | 0xfff).unwrap().holds(old);
    let table = [
        (0, false, true),
        (1, true, false),
        (2, false, false),
        (3, false, true),
        (4, true, false),
        (5, true, true),
    ];
    for (comparison, at_zero, at_minus_one) in table {
        assert_eq!(
            (holds(comparison, 0), holds(comparison, u32::MAX)),
            (at_zero, at_minus_one),
            "{comparison}"
        );
    }
}

#[test]
fn bad_words_and_unknown_operations_are_refused() {
    let fixture = Fixture::new();
    let word = fixture.map_pages(1);
    assert_eq!(call(&fixture.main, &[word + 1, WAIT, 0]), errno(Errno::EINVAL));
    assert_eq!(call(&fixture.main, &[word + 4096, WAIT, 0]), errno(Errno::EFAULT));
    assert_eq!(call(&fixture.main, &[1 << 63, WAKE, 0]), errno(Errno::EFAULT));
    assert_eq!(call(&fixture.main, &[word + 4096, WAKE, 1]), 0, "a private address need not exist");
    assert_eq!(call(&fixture.main, &[word + 4096, libc::FUTEX_WAKE as u64, 1]), errno(Errno::EFAULT));
    for operation in [libc::FUTEX_LOCK_PI, libc::FUTEX_FD, 99, libc::FUTEX_WAKE | libc::FUTEX_CLOCK_REALTIME]
    {
        assert_eq!(call(&fixture.main, &[word, operation as u64, 0]), errno(Errno::ENOSYS), "{operation}");
    }
}

#[test]
fn a_waiter_ends_with_its_process_and_leaves_no_trace() {
    let fixture = Fixture::new();
    let word = fixture.map_pages(1);
    let other = fixture.new_thread();
    other.begin_call(libc::SYS_futex, &[word, WAIT, 0]);
    until_waiting(&fixture, word, 1);
    fixture.main.begin_call(libc::SYS_exit_group, &[3]);
    assert_eq!(fixture.join(), ExitStatus::Exited(3));
    assert!(fixture.process.futexes().0.lock().0.is_empty());
}

#[test]
fn a_wake_and_a_signal_at_once_agree_on_who_ended_the_wait() {
    let fixture = Fixture::new();
    let word = fixture.map_pages(1);
    fixture.handle(libc::SIGUSR1, 0);
    let (waiter, waker) = (fixture.new_thread(), fixture.new_thread());
    let stack = fixture.map_pages(4) + 4 * 4096;
    let empty = fixture.map_pages(1);
    let mut woken = 0;
    for _ in 0..200 {
        waiter.step(move |regs| {
            regs.rsp = stack;
            crate::engine::Exit::Kicked
        });
        waiter.call(libc::SYS_rt_sigprocmask, &[libc::SIG_SETMASK as u64, empty, 0, 8]);
        waiter.begin_call(libc::SYS_futex, &[word, WAIT, 0]);
        until_waiting(&fixture, word, 1);
        waker.begin_call(libc::SYS_futex, &[word, WAKE, 1]);
        fixture.main.call(libc::SYS_tkill, &[waiter.tid as u64, libc::SIGUSR1 as u64]);
        let reported = waker.finish().unwrap().rax;
        let mut handler = waiter.finish().unwrap();
        if handler.rip != 0x40_1000 {
            // Woken and back in the guest before the signal came.
            assert_eq!((handler.rax, reported), (0, 1));
            handler = waiter.regs();
        }
        assert_eq!(handler.rip, 0x40_1000);
        let saved_rax = fixture.user().read_u64(handler.rdx + 40 + 8 * libc::REG_RAX as u64).unwrap();
        let expected = if reported == 1 { 0 } else { Errno::EINTR.as_rax() };
        assert_eq!(saved_rax, expected);
        until_waiting(&fixture, word, 0);
        woken += reported;
    }
    println!("{woken} of 200 waits ended by the wake");
}
