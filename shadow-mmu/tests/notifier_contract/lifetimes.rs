// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Listeners come and go: registration, unregistration with and without release, the end of the space, and who waits for whom.

use super::*;

#[test]
fn a_released_space_takes_no_listeners_and_calls_release_once_for_those_it_had() {
    let (mm, log) = (space(16), Log::default());
    map(&mm, BASE, 4, RW, MapFlags::PRIVATE, Backing::Anonymous);
    touch(&mm, BASE, RW);
    let subscriptions = three(&mm, &log, false, false);
    mm.release();
    mm.release();
    assert_eq!(take(&log), [3, 2, 1].map(|n| (n, Op::Release)), "and nothing else: no pair reaches them");
    assert!(mm.vmas().is_empty());
    assert_eq!(mm.register(Recorder::new(4, &log)).err(), Some(Misuse::Released));
    assert_eq!(mm.unregister(&subscriptions[0]), Err(Misuse::NotRegistered));
}

/// A listener's op is stopped inside the op; meanwhile another thread unregisters the listener.
#[test]
fn i7_unregister_returns_when_no_op_of_the_listener_runs() {
    let (mm, hook) = (space(16), Arc::<Hook>::default());
    let subscription = mm.register(hook.clone()).unwrap();
    hook.end.shut();
    let caller = {
        let mm = Arc::clone(&mm);
        std::thread::spawn(move || drop(mm.notifiers().invalidate(span(0, 1), Event::Clear)))
    };
    hook.end.wait_for_arrival();
    let unregister = {
        let mm = Arc::clone(&mm);
        std::thread::spawn(move || mm.unregister(&subscription))
    };
    wait_until("release was called", || hook.released.load(Ordering::SeqCst) == 1);
    assert_waits(&unregister, "unregister returned while an op was running");
    hook.end.open();
    assert_eq!(unregister.join().unwrap(), Ok(()));
    caller.join().unwrap();
    // None runs afterwards: the gate would stop it.
    hook.start.shut();
    drop(mm.notifiers().invalidate(span(0, 1), Event::Clear));
}

/// Unregisters itself in whichever op it is told to, in the way that it is told to.
#[derive(Debug, Default)]
struct Suicidal {
    space: OnceLock<(Arc<Mm>, Subscription)>,
    quietly: bool,
    result: Mutex<Vec<Result<(), Misuse>>>,
    callback_ran: Arc<AtomicBool>,
    still_inside: Arc<AtomicBool>,
}

impl Suicidal {
    fn unregister(&self) {
        let (mm, subscription) = self.space.get().unwrap();
        self.still_inside.store(true, Ordering::SeqCst);
        let result = if self.quietly {
            let (ran, inside) = (Arc::clone(&self.callback_ran), Arc::clone(&self.still_inside));
            let result = mm.notifiers().unregister_no_release(subscription);
            mm.notifiers().call_srcu(move || {
                assert!(!inside.load(Ordering::SeqCst), "the callback ran before the op was over (R19)");
                ran.store(true, Ordering::SeqCst);
            });
            std::thread::sleep(WATCH);
            result
        } else {
            mm.unregister(subscription)
        };
        self.result.lock().unwrap().push(result);
        self.still_inside.store(false, Ordering::SeqCst);
    }
    fn register(mm: &Arc<Mm>, quietly: bool) -> (Arc<Self>, Subscription) {
        let listener = Arc::new(Self { quietly, ..Self::default() });
        let subscription = mm.register(listener.clone()).unwrap();
        listener.space.set((Arc::clone(mm), subscription.clone())).unwrap();
        (listener, subscription)
    }
}

impl MmuNotifier for Suicidal {
    fn release(&self) {
        self.unregister();
    }
    fn invalidate_range_end(&self, _: &Invalidation) {
        self.unregister();
    }
}

#[test]
fn unregistering_inside_an_op_is_refused() {
    let mm = space(16);
    let (listener, subscription) = Suicidal::register(&mm, false);
    drop(mm.notifiers().invalidate(span(0, 1), Event::Clear));
    // Also in the release that unregister itself calls.
    assert_eq!(mm.unregister(&subscription), Ok(()));
    assert_eq!(*listener.result.lock().unwrap(), [Err(Misuse::InsideCallback); 2]);
    let (listener, _) = Suicidal::register(&mm, false);
    mm.notifiers().release().unwrap();
    assert_eq!(*listener.result.lock().unwrap(), [Err(Misuse::InsideCallback)]);
}

#[test]
fn r19_unregister_no_release_works_inside_release_and_its_callback_waits() {
    let mm = space(16);
    let (listener, _) = Suicidal::register(&mm, true);
    mm.release();
    mm.notifiers().synchronize().unwrap();
    assert_eq!(*listener.result.lock().unwrap(), [Ok(())]);
    assert!(listener.callback_ran.load(Ordering::SeqCst));
}

/// As drivers do it: the first call of release does the work, a second one finds nothing to do.
#[derive(Debug, Default)]
struct OnceReleased {
    begun: AtomicBool,
    work: Gate,
    done: AtomicBool,
}

impl MmuNotifier for OnceReleased {
    fn release(&self) {
        if !self.begun.swap(true, Ordering::SeqCst) {
            self.work.pass();
            self.done.store(true, Ordering::SeqCst);
        }
    }
}

/// One of the end of the space and of unregister is stopped inside release, in its work; the other comes second. It must
/// not return before the work is done: it goes on to free what the work still uses.
#[test]
fn r18_the_end_of_the_space_and_unregister_wait_for_each_other() {
    let release: fn(&Notifiers, &Subscription) = |notifiers, _| notifiers.release().unwrap();
    let unregister: fn(&Notifiers, &Subscription) =
        |notifiers, subscription| _ = notifiers.unregister(subscription);
    for (what, first, second) in [("unregister", release, unregister), ("release", unregister, release)] {
        let (mm, listener) = (space(16), Arc::<OnceReleased>::default());
        let subscription = mm.register(listener.clone()).unwrap();
        listener.work.shut();
        let [first, second] = [first, second].map(|call| {
            let (mm, subscription) = (Arc::clone(&mm), subscription.clone());
            let (listener, listener_work) = (Arc::clone(&listener), &listener.work);
            let thread = std::thread::spawn(move || {
                call(mm.notifiers(), &subscription);
                listener.done.load(Ordering::SeqCst)
            });
            wait_until("it got there", || listener_work.is_occupied() || thread.is_finished());
            thread
        });
        assert_waits(&second, what);
        listener.work.open();
        assert_eq!(
            [first, second].map(|thread| thread.join().unwrap()),
            [true, true],
            "{what} came back early"
        );
    }
}

/// A pair of madvise is stopped inside, before its end; a listener registers meanwhile.
#[test]
fn i9_a_listener_that_registers_during_a_pair_hears_of_no_end_alone() {
    let (mm, hook, log) = (space(16), Arc::<Hook>::default(), Log::default());
    map(&mm, BASE, 1, RW, MapFlags::PRIVATE, Backing::Anonymous);
    touch(&mm, BASE, RW);
    mm.register(hook.clone()).unwrap();
    hook.start.shut();
    let advise = {
        let mm = Arc::clone(&mm);
        std::thread::spawn(move || mm.madvise(BASE, PAGE_SIZE, Advice::DontNeed))
    };
    hook.start.wait_for_arrival();
    let register = {
        let (mm, log) = (Arc::clone(&mm), Arc::clone(&log));
        std::thread::spawn(move || mm.register(Recorder::new(1, &log)).map(drop))
    };
    assert_waits(&register, "registered while a pair was open");
    hook.start.open();
    assert_eq!(advise.join().unwrap(), Ok(()));
    assert_eq!(register.join().unwrap(), Ok(()));
    assert_eq!(take(&log), [], "the end of a pair that began before");
    mm.madvise(BASE, PAGE_SIZE, Advice::DontNeed).unwrap();
    assert_eq!(take(&log).len(), 3, "start, invalidate_range, end of one that began after");
}

/// Removal, unlike registration, may fall into a pair. Unregistering waits for its end, which the listener hears; without
/// release it does not wait, and the end reaches the listener all the same: who heard the start hears the end (I1).
#[test]
fn i1_a_listener_that_leaves_during_a_pair_hears_its_end() {
    let (mm, log) = (space(16), Log::default());
    let subscriptions = three(&mm, &log, false, false);
    let pair = mm.notifiers().invalidate(span(0, 1), Event::Unmap);
    take(&log);
    assert_eq!(
        mm.unregister(&subscriptions[1]),
        Err(Misuse::InsideCallback),
        "by the thread whose pair it is"
    );
    let leave = {
        let (mm, subscription) = (Arc::clone(&mm), subscriptions[1].clone());
        std::thread::spawn(move || mm.unregister(&subscription))
    };
    assert_waits(&leave, "unregistered while a pair was open");
    assert_eq!(take(&log), [(2, Op::Release)]);
    mm.notifiers().unregister_no_release(&subscriptions[0]).unwrap();
    drop(pair);
    assert_eq!(leave.join().unwrap(), Ok(()));
    let ended: Vec<_> =
        take(&log).into_iter().filter(|(_, op)| matches!(op, Op::End(..))).map(|(n, _)| n).collect();
    assert_eq!(ended, [3, 2, 1]);
    drop(mm.notifiers().invalidate(span(0, 1), Event::Unmap));
    assert!(take(&log).iter().all(|(name, _)| *name == 3), "and nothing after that");
}

/// What `__mmu_notifier_register` is for: a listener that copies what is there and registers under one hold of the mmap lock
/// misses no change, though another thread changes all the time.
#[test]
fn i9_a_listener_under_the_lock_begins_with_what_is_there() {
    /// A copy of one pte, which a start takes away.
    #[derive(Debug, Default)]
    struct Copy(Mutex<Option<shadow_mmu::mm::Pte>>);
    impl MmuNotifier for Copy {
        fn invalidate_range_start(&self, _: &Invalidation) -> Result<(), WouldBlock> {
            *self.0.lock().unwrap() = None;
            Ok(())
        }
    }

    let mm = space(64);
    map(&mm, BASE, 1, RW, MapFlags::PRIVATE, Backing::Anonymous);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                touch(&mm, BASE, RW);
                mm.madvise(BASE, PAGE_SIZE, Advice::DontNeed).unwrap();
            }
        });
        let mut copied = 0;
        while copied < 200 {
            let listener = Arc::<Copy>::default();
            let lock = mm.mmap_write_lock();
            assert_eq!(lock.vmas().count(), 1);
            let pte = lock.pte(BASE);
            *listener.0.lock().unwrap() = Some(pte).filter(|pte| pte.is_present());
            copied += u32::from(pte.is_present());
            let subscription = lock.register(Arc::clone(&listener) as _).unwrap();
            drop(lock);
            std::thread::yield_now();
            let lock = mm.mmap_write_lock();
            if let Some(copy) = *listener.0.lock().unwrap() {
                assert_eq!(lock.pte(BASE).pfn(), copy.pfn(), "a change was missed");
            }
            drop(lock);
            mm.unregister(&subscription).unwrap();
        }
        over.store(true, Ordering::Relaxed);
    });
}

/// As a driver that lets go of the address space where it frees itself (`mmdrop` in the kernel).
#[test]
fn the_last_owner_of_a_space_may_be_a_callback() {
    let mm = space(16);
    let pool = Arc::clone(mm.pool());
    let whole = pool.frame_count();
    mm.register(Recorder::new(1, &Log::default())).unwrap();
    let ((go, wait), (sender, done)) = (std::sync::mpsc::channel(), std::sync::mpsc::channel());
    let last = Arc::clone(&mm);
    mm.notifiers().call_srcu(move || {
        wait.recv().unwrap();
        assert_eq!(last.notifiers().synchronize(), Err(Misuse::InsideCallback));
        drop(last);
        sender.send(()).unwrap();
    });
    drop(mm);
    go.send(()).unwrap();
    done.recv_timeout(std::time::Duration::from_secs(60)).unwrap();
    assert_eq!(pool.free_frames(), whole);
}
