// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The baton without a VM: host threads that take turns.

#![allow(clippy::unwrap_used, reason = "a failed test may panic")]

use super::*;
use crate::engine::Kick;
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

const EXIT: Exit = Exit::Syscall;

/// What a thread does from its first turn on.
type Body = Box<dyn FnOnce(&Seat) + Send>;

fn mode(seed: u64) -> Arc<Deterministic> {
    Deterministic::new(seed, Quantum::Exits(4), None).unwrap()
}

/// Runs each of `bodies` on a thread of its own, as a VM does: seats first, in order. Host threads start late and in any order.
fn run(deterministic: &Arc<Deterministic>, bodies: Vec<Body>) {
    let seats: Vec<_> =
        (0..bodies.len()).map(|n| Arc::new(deterministic.baton().seat(PID + n as i32))).collect();
    // The first claims the baton; as in a VM, the others are there by then only as seats.
    thread::scope(|scope| {
        for (number, (seat, body)) in seats.into_iter().zip(bodies).enumerate().rev() {
            let leaving = Leaving(Arc::clone(&seat));
            scope.spawn(move || {
                let _leaving = leaving;
                thread::sleep(Duration::from_millis(number as u64 % 3));
                seat.begin();
                body(&seat);
            });
        }
    });
}

/// The order in which four threads get to make their exits.
fn order(seed: u64) -> (Vec<i32>, Summary) {
    let (deterministic, order) = (mode(seed), Arc::<Mutex<Vec<i32>>>::default());
    let body = |_| -> Body {
        let (deterministic, order) = (Arc::clone(&deterministic), Arc::clone(&order));
        Box::new(move |seat| {
            for number in 0..40 {
                seat.turn();
                order.lock().push(seat.tid());
                deterministic.exit(seat, &EXIT, &Regs::default());
                if number % 7 == 0 {
                    seat.prepare_to_wait();
                    seat.sleep(Some(seat.now() + Duration::from_micros(100)));
                }
            }
        })
    };
    run(&deterministic, (0..4).map(body).collect());
    let order = order.lock().clone();
    (order, deterministic.summary())
}

#[test]
fn the_same_seed_gives_the_same_order_and_another_one_another() {
    let mut orders = Vec::new();
    for seed in 0..5 {
        let first = order(seed);
        assert_eq!(first.0.len(), 160);
        for _ in 0..5 {
            assert_eq!(order(seed), first, "seed {seed}");
        }
        assert!(!orders.contains(&first.0), "seed {seed} is no other");
        orders.push(first.0);
    }
}

#[test]
fn one_thread_runs_at_a_time() {
    let (deterministic, inside) = (mode(1), Arc::new(AtomicU32::new(0)));
    let body = |_| -> Body {
        let (deterministic, inside) = (Arc::clone(&deterministic), Arc::clone(&inside));
        Box::new(move |seat| {
            for _ in 0..200 {
                seat.turn();
                assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                thread::yield_now();
                inside.fetch_sub(1, Ordering::SeqCst);
                deterministic.exit(seat, &EXIT, &Regs::default());
            }
        })
    };
    run(&deterministic, (0..4).map(body).collect());
    assert!(deterministic.summary().switches > 100);
}

#[test]
fn time_jumps_to_the_earliest_deadline_where_nobody_can_run() {
    let deterministic = mode(2);
    let clock = Arc::clone(deterministic.baton().clock());
    let hour = Duration::from_secs(3600);
    let woken = Arc::<Mutex<Vec<u64>>>::default();
    let body = |hours: u32| -> Body {
        let woken = Arc::clone(&woken);
        Box::new(move |seat| {
            let deadline = seat.now() + hours * hour;
            seat.prepare_to_wait();
            seat.sleep(Some(deadline));
            assert_eq!(seat.now(), deadline);
            woken.lock().push(hours.into());
        })
    };
    run(&deterministic, [3, 1, 2].map(body).into());
    assert_eq!(*woken.lock(), [1, 2, 3]);
    assert_eq!(clock.elapsed(), 3 * hour);
}

#[test]
fn what_wakes_a_thread_before_it_waits_is_not_lost() {
    let deterministic = mode(3);
    let seat = deterministic.baton().seat(PID);
    seat.begin();
    seat.prepare_to_wait();
    seat.wake();
    seat.sleep(None);
}

#[test]
fn an_order_from_outside_reaches_a_vm_in_which_nobody_can_run() {
    for poll in [false, true] {
        let deterministic = mode(4);
        let seat = Arc::new(deterministic.baton().seat(PID));
        let (never, _other_end) = std::io::pipe().unwrap();
        thread::scope(|scope| {
            let waiter = Arc::clone(&seat);
            let (asleep, told) = channel();
            scope.spawn(move || {
                waiter.begin();
                waiter.prepare_to_wait();
                asleep.send(()).unwrap();
                let fd = std::os::fd::AsRawFd::as_raw_fd(&never);
                match poll {
                    true => waiter.poll(&[libc::pollfd { fd, events: libc::POLLIN, revents: 0 }], None),
                    false => waiter.sleep(None),
                }
            });
            told.recv().unwrap();
            thread::sleep(Duration::from_millis(10));
            seat.wake();
        });
    }
}

#[test]
fn files_of_the_host_are_really_waited_for() {
    let deterministic = mode(5);
    let seat = deterministic.baton().seat(PID);
    let (reader, mut writer) = std::io::pipe().unwrap();
    thread::scope(|scope| {
        let began = Instant::now();
        scope.spawn(move || {
            thread::sleep(Duration::from_millis(20));
            std::io::Write::write_all(&mut writer, b"x").unwrap();
            thread::sleep(Duration::from_millis(20));
        });
        seat.begin();
        seat.prepare_to_wait();
        let fd = std::os::fd::AsRawFd::as_raw_fd(&reader);
        seat.poll(&[libc::pollfd { fd, events: libc::POLLIN, revents: 0 }], None);
        assert!(began.elapsed() >= Duration::from_millis(20));
        assert_eq!(deterministic.baton().clock().elapsed(), Duration::ZERO, "virtual time stood still");
    });
}

/// More than half of the descriptors that this process may have.
fn more_than_half_of_the_descriptors() -> usize {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the limit is ours to write.
    assert_eq!(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) }, 0);
    limit.rlim_cur as usize / 2 + 1
}

/// Each is asked for what it wants: one that waits for another event of the same file sleeps on.
#[test]
fn many_threads_may_wait_for_the_same_file() {
    const MANY: usize = 600_000;
    // The host takes no more in one poll(2) than there may be descriptors: each alone would be taken, all together refused.
    let mut each = more_than_half_of_the_descriptors();
    if each > MANY {
        println!("not tested: more entries than poll(2) takes, as there may be that many descriptors");
        each = 2;
    }
    let deterministic = mode(16);
    let (mut ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let fd = std::os::fd::AsRawFd::as_raw_fd(&theirs);
    let woken = Arc::<Mutex<Vec<i32>>>::default();
    let body = |events: libc::c_short, deadline: Option<Duration>| -> Body {
        let woken = Arc::clone(&woken);
        Box::new(move |seat| {
            seat.prepare_to_wait();
            let deadline = deadline.map(|time| seat.now() + time);
            seat.poll(&vec![libc::pollfd { fd, events, revents: 0 }; each], deadline);
            woken.lock().push(seat.tid());
            seat.prepare_to_wait();
        })
    };
    let bodies = vec![body(libc::POLLIN, None), body(libc::POLLIN, None), body(0, None)];
    let of_input = thread::scope(|scope| {
        let (woken, baton) = (&woken, deterministic.baton());
        let sender = scope.spawn(move || {
            let began = Instant::now();
            let wait_for_the_host = |count: usize| {
                while (woken.lock().len(), baton.state.lock().idle) < (count, true)
                    && began.elapsed() < Duration::from_secs(60)
                {
                    thread::sleep(Duration::from_millis(1));
                }
            };
            wait_for_the_host(0);
            std::io::Write::write_all(&mut ours, b"x").unwrap();
            wait_for_the_host(2);
            let of_input = woken.lock().clone();
            // The end of the other side reaches who asked for no event at all.
            drop(ours);
            of_input
        });
        run(&deterministic, bodies);
        sender.join().unwrap()
    });
    assert!(of_input.len() == 2 && !of_input.contains(&(PID + 2)), "{of_input:?}");
    let woken = woken.lock().clone();
    assert_eq!((woken.len(), woken.last()), (3, Some(&(PID + 2))), "{woken:?}");
}

#[test]
fn jobs_are_done_in_virtual_time_by_who_has_the_baton() {
    let times = |seed| {
        let deterministic = mode(seed);
        let (clock, times) =
            (Arc::clone(deterministic.baton().clock()), Arc::<Mutex<Vec<Duration>>>::default());
        let (theirs, me) = (Arc::clone(&times), thread::current().id());
        deterministic.baton().every(Interval::About(Duration::from_millis(10)), move || {
            assert_eq!(thread::current().id(), me);
            theirs.lock().push(clock.elapsed());
        });
        let seat = deterministic.baton().seat(PID);
        seat.begin();
        for _ in 0..1000 {
            seat.turn();
            deterministic.exit(&seat, &EXIT, &Regs::default());
        }
        let before = times.lock().len();
        assert!((3..=11).contains(&before), "{before} in about 50 ms");
        seat.prepare_to_wait();
        seat.sleep(Some(seat.now() + Duration::from_secs(1)));
        let times = times.lock().clone();
        assert!((60..=210).contains(&(times.len() - before)), "{} in 1 s", times.len() - before);
        times
    };
    assert_eq!(times(6), times(6));
    assert_ne!(times(6), times(7), "the seed jitters the interval");
}

#[derive(Debug, Default)]
struct Flag(AtomicU64);

impl Kick for Flag {
    fn kick(&self) {
        self.0.store(1, Ordering::SeqCst);
    }
}

#[test]
fn a_thread_that_never_leaves_the_guest_is_interrupted_once_others_could_run() {
    let deterministic = mode(8);
    let ran = Arc::new(AtomicU32::new(0));
    let spins = || -> Body {
        let ran = Arc::clone(&ran);
        Box::new(move |seat| {
            let kick = Arc::<Flag>::default();
            seat.attach(Some(Arc::clone(&kick) as _));
            seat.turn();
            if ran.fetch_add(1, Ordering::SeqCst) == 0 {
                seat.cross_into_guest_or_back();
                while kick.0.load(Ordering::SeqCst) == 0 {
                    std::hint::spin_loop();
                }
                seat.cross_into_guest_or_back();
                seat.turn();
                assert_eq!(ran.load(Ordering::SeqCst), 2, "the other ran meanwhile");
            }
        })
    };
    run(&deterministic, vec![spins(), spins()]);
    let summary = deterministic.summary();
    assert!(!summary.exact && summary.text().ends_with("not exact"));
    assert!(order(8).1.exact);
}

/// A vCPU that some other process runs, all the time.
#[derive(Debug)]
struct Elsewhere {
    kicked: Flag,
    since: Instant,
}

impl Kick for Elsewhere {
    fn kick(&self) {
        self.kicked.kick();
    }

    fn cpu_time_outside(&self) -> Duration {
        self.since.elapsed()
    }
}

#[test]
fn a_thread_that_another_process_runs_is_interrupted_as_well() {
    let deterministic = mode(8);
    let spins: Body = Box::new(|seat| {
        let kick = Arc::new(Elsewhere { kicked: Flag::default(), since: Instant::now() });
        seat.attach(Some(Arc::clone(&kick) as _));
        seat.turn();
        seat.cross_into_guest_or_back();
        while kick.kicked.0.load(Ordering::SeqCst) == 0 {
            thread::sleep(Duration::from_millis(1));
        }
        seat.cross_into_guest_or_back();
    });
    run(&deterministic, vec![spins, Box::new(|seat| seat.turn())]);
    assert!(!deterministic.summary().exact);
}

/// As one does that is stopped, or whose host has other things to do.
#[test]
fn a_thread_that_the_host_does_not_run_is_not_interrupted() {
    let deterministic = mode(8);
    let theirs = Arc::clone(&deterministic);
    let stopped: Body = Box::new(move |seat| {
        let kick = Arc::<Flag>::default();
        seat.attach(Some(Arc::clone(&kick) as _));
        seat.turn();
        seat.cross_into_guest_or_back();
        thread::sleep(watchdog::GUARD * 2);
        seat.cross_into_guest_or_back();
        assert_eq!(kick.0.load(Ordering::SeqCst), 0);
        theirs.exit(seat, &EXIT, &Regs::default());
    });
    run(&deterministic, vec![stopped, Box::new(|seat| seat.turn())]);
    assert!(deterministic.summary().exact);
}

#[test]
fn who_waits_where_nothing_can_wake_him_is_told_once_and_ended() {
    for others in 0..3 {
        let deterministic = mode(14);
        let told = Arc::new(AtomicU32::new(0));
        let seats: Vec<_> = (0..=others).map(|n| Arc::new(deterministic.baton().seat(PID + n))).collect();
        let (count, all) = (Arc::clone(&told), seats.iter().map(Arc::downgrade).collect::<Vec<_>>());
        deterministic.baton().when_stuck(move || {
            count.fetch_add(1, Ordering::SeqCst);
            all.iter().filter_map(std::sync::Weak::upgrade).for_each(|seat| seat.wake());
        });
        thread::scope(|scope| {
            for seat in seats {
                scope.spawn(move || {
                    let _leaving = Leaving(Arc::clone(&seat));
                    seat.begin();
                    seat.prepare_to_wait();
                    seat.sleep(None);
                });
            }
        });
        assert_eq!(told.load(Ordering::SeqCst), 1, "{others} others");
    }
}

#[test]
fn an_exact_job_makes_up_for_a_jump_and_does_not_count_its_own_time() {
    const EVERY: Duration = Duration::from_millis(10);
    for own in [Duration::ZERO, EVERY / 2, EVERY * 3] {
        let deterministic = mode(15);
        let (clock, times) =
            (Arc::clone(deterministic.baton().clock()), Arc::<Mutex<Vec<Duration>>>::default());
        let (theirs, of_job) = (Arc::clone(&times), Arc::clone(&clock));
        deterministic.baton().every(Interval::Exactly(EVERY), move || {
            theirs.lock().push(of_job.elapsed());
            of_job.pass(own);
        });
        let seat = deterministic.baton().seat(PID);
        seat.begin();
        clock.pass(EVERY * 7);
        seat.turn();
        assert_eq!(times.lock().len(), 7, "{own:?}");
        seat.prepare_to_wait();
        seat.sleep(Some(seat.now() + (EVERY + own) * 5));
        let times = times.lock().clone();
        assert_eq!(times.len(), 12, "{own:?}");
        assert!(times[7..].windows(2).all(|pair| pair[1] - pair[0] == EVERY + own), "{times:?}");
    }
}

#[test]
fn a_thread_that_is_alone_may_stay_in_the_guest() {
    let deterministic = mode(9);
    let seat = deterministic.baton().seat(PID);
    seat.attach(Some(Arc::<Flag>::default() as _));
    seat.begin();
    assert_eq!(deterministic.baton().force(), None);
    let other = deterministic.baton().seat(PID + 1);
    assert_eq!(deterministic.baton().force(), Some(PID));
    drop(other);
}

#[test]
fn a_seat_whose_thread_never_came_to_be_is_given_up() {
    let deterministic = mode(10);
    let seat = deterministic.baton().seat(PID);
    seat.begin();
    drop(deterministic.baton().seat(PID + 1));
    for _ in 0..100 {
        seat.turn();
        deterministic.exit(&seat, &EXIT, &Regs::default());
    }
    assert_eq!(deterministic.summary().switches, 1);
}

#[test]
fn only_threads_that_others_wait_for_are_single_stepped() {
    let deterministic = Deterministic::new(11, Quantum::Steps(10), None).unwrap();
    let seat = deterministic.baton().seat(PID);
    seat.begin();
    assert!(!seat.single_steps());
    let other = deterministic.baton().seat(PID + 1);
    assert!(seat.single_steps());
    drop(other);
    assert!(!seat.single_steps());
    let exits = mode(11);
    let (first, _second) = (exits.baton().seat(PID), exits.baton().seat(PID + 1));
    assert!(!first.single_steps());
}

#[test]
fn streams_of_a_seed_are_independent_of_each_other() {
    let deterministic = mode(12);
    let (at_random, sharing) = (deterministic.at_random(), deterministic.sharing_seed());
    let mut bytes = [0; 16];
    deterministic.fill_random(&mut bytes);
    assert_ne!(bytes, at_random);
    assert_eq!((deterministic.at_random(), deterministic.sharing_seed()), (at_random, sharing));
    let (mut same, mut other) = ([0; 16], [0; 16]);
    mode(12).fill_random(&mut same);
    mode(13).fill_random(&mut other);
    assert_eq!(same, bytes);
    assert_ne!(other, bytes);
}
