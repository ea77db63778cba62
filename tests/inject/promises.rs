// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What single points promise, looked at more closely than `every_fault` does.

use super::guest::{Guest, images};
use super::*;

/// Runs `guest` under `plan`, in which every rule must fire, and asserts that nobody noticed.
#[track_caller]
fn assert_unseen(folder: &Path, guest: &Guest, plan: &str) -> Injected {
    let run = inject(folder, plan, guest);
    run.assert_unseen(guest, &guest.native());
    for rule in 0..run.account["rules"].as_array().unwrap().len() {
        assert!(run.fired(rule) > 0, "rule {rule} never fired\n{plan}\n{}", run.said);
    }
    run
}

#[test]
fn a_vcpu_that_is_interrupted_at_every_other_entry_computes_the_same() {
    if !guests() {
        return;
    }
    let (folder, images) = (folder("inject-eintr"), images("inject-eintr"));
    for guest in [Guest::torture(&images), Guest::threads(&images)] {
        let plan = "seed = 3
            [[fault]]\npoint = 'vcpu-run'\nprobability = 0.3\nerror = 'EINTR'
            [[fault]]\npoint = 'vcpu-run'\nprobability = 0.3\nerror = 'EAGAIN'
            [[fault]]\npoint = 'vcpu-run'\nevery = 50\ntimes = 20\ndelay = '1ms'";
        let run = assert_unseen(&folder, &guest, plan);
        assert!(run.fired(0) > 100 && run.fired(1) > 100, "{}", run.account);
    }
}

#[test]
fn a_vcpu_that_the_engine_gives_up_is_umbras_failure_in_one_line() {
    if !guests() {
        return;
    }
    let (folder, images) = (folder("inject-lost"), images("inject-lost"));
    let guest = Guest::torture(&images);
    let mut ends = vec!["point = 'sync-regs'\nnth = 9\nerror = 'EINVAL'".to_owned()];
    // For as long as it is tried.
    ends.extend(["EFAULT", "ENOMEM"].map(|error| format!("point = 'vcpu-run'\nerror = '{error}'")));
    let exits = ["unknown", "hlt", "shutdown", "fail-entry", "internal-error"];
    ends.extend(exits.map(|exit| format!("point = 'vcpu-run'\nnth = 9\nexit = '{exit}'")));
    for end in ends {
        let run = inject(&folder, &format!("[[fault]]\n{end}"), &guest);
        run.assert_sound();
        assert_eq!(run.code(), FAILED, "{end}\n{}", run.said);
        let lost: Vec<_> =
            run.complaints().into_iter().filter(|line| line.contains(") lost a vCPU")).collect();
        assert_eq!(lost.len(), 1, "{end}\n{}", run.said);
        assert_eq!(run.output.stdout, b"", "{end}: a result of a guest that was lost");
    }
}

/// `threads` tells when a translation was not flushed: a store reaches a page that is gone.
#[test]
fn a_flush_whose_discards_are_refused_is_made_by_other_means() {
    if !kvm() {
        return;
    }
    let (folder, images) = (folder("inject-madvise"), images("inject-madvise"));
    for (error, when) in [("ENOMEM", ""), ("EPERM", "nth = 20"), ("EINVAL", "after = 'kick'")] {
        let plan = format!("[[fault]]\npoint = 'window-madvise'\nerror = '{error}'\n{when}");
        for guest in [Guest::threads(&images), Guest::torture(&images)] {
            let run = assert_unseen(&folder, &guest, &plan);
            assert!(run.said.contains("failed and is given up"), "{plan}\n{}", run.said);
        }
    }
}

#[test]
fn slow_flushes_kicks_and_listeners_lose_no_store() {
    if !guests() {
        return;
    }
    let (folder, images) = (folder("inject-slow"), images("inject-slow"));
    let plans = [
        "[[fault]]\npoint = 'flush'\nsplit = true\n[[fault]]\npoint = 'flush'\nevery = 5\ndelay = '1ms'",
        // vCPUs leave the guest late for the flushes that need them out.
        "[[fault]]\npoint = 'window-madvise'\nerror = 'EINVAL'
         [[fault]]\npoint = 'kick'\nevery = 5\ndelay = '1ms'",
        "[[fault]]\npoint = 'notifier-start'\nevery = 5\ndelay = '1ms'
         [[fault]]\npoint = 'notifier-start'\nerror = 'EAGAIN'",
        "[[fault]]\npoint = 'notifier-end'\nevery = 3\nstall = 'vcpu-run'\nat-most = '3ms'
         [[fault]]\npoint = 'notifier-end'\nevent = 'unmap'\nevery = 3\ndelay = '1ms'",
    ];
    for plan in plans {
        if plan.contains("window-madvise") && engine() != EngineKind::Kvm {
            println!("without that plan: only by KVM has a vCPU to leave the guest for a flush: {plan}");
            continue;
        }
        for guest in [Guest::threads(&images), Guest::torture(&images)] {
            assert_unseen(&folder, &guest, plan);
        }
    }
}

/// Waits by clock, by futex and by poll; says which ended early, and what ended those that others end.
const WAITS: &str = r#"
    #define _GNU_SOURCE
    #include <errno.h>
    #include <linux/futex.h>
    #include <poll.h>
    #include <pthread.h>
    #include <signal.h>
    #include <stdio.h>
    #include <stdlib.h>
    #include <sys/syscall.h>
    #include <time.h>
    #include <unistd.h>
    static long now(void) {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return t.tv_sec * 1000 + t.tv_nsec / 1000000;
    }
    static int word;
    static pthread_t first;
    static volatile int stage;
    static void nothing(int signal) {}
    static void *wake(void *none) {
        // Again and again: the other may not wait yet.
        while (stage == 0) { usleep(1000); syscall(SYS_futex, &word, FUTEX_WAKE, 1, 0, 0, 0); }
        while (stage == 1) { usleep(1000); pthread_kill(first, SIGUSR1); }
        while (stage == 2) { usleep(1000); pthread_kill(first, SIGUSR1); }
        return 0;
    }
    int main(int argc, char **argv) {
        long least = atol(argv[1]), began = now();
        struct timespec little = { 0, 5000000 }, much = { 1000, 0 };
        if (least) {
            nanosleep(&little, 0);
            printf("sleep: %s\n", now() - began >= 5 + least ? "late" : "early");
            began = now();
            syscall(SYS_futex, &word, FUTEX_WAIT, 0, &little, 0, 0);
            printf("futex: %s\n", errno == ETIMEDOUT && now() - began >= 5 + least ? "late" : "early");
            began = now();
            printf("poll: %d ", poll(0, 0, 5));
            puts(now() - began >= 5 + least ? "late" : "early");
            // No timer's: it asks what is ready.
            for (int i = 0; i < 1000; i++) poll(0, 0, 0);
            return 0;
        }
        struct sigaction action = { .sa_handler = nothing };
        sigaction(SIGUSR1, &action, 0);
        first = pthread_self();
        pthread_t waker;
        pthread_create(&waker, 0, wake, 0);
        printf("futex: %ld\n", syscall(SYS_futex, &word, FUTEX_WAIT, 0, &much, 0, 0));
        stage = 1;
        printf("sleep: %d", nanosleep(&much, 0));
        printf(" %d\n", errno == EINTR);
        stage = 2;
        printf("poll: %d", poll(0, 0, 1000000));
        printf(" %d\n", errno == EINTR);
        stage = 3;
        return 0;
    }"#;

#[test]
fn a_late_timer_ends_waits_later_and_keeps_no_one_from_being_woken() {
    if !guests() {
        return;
    }
    let folder = folder("inject-timer");
    let late = Guest::c(&folder, "waits", WAITS, &["100"]);
    let run = inject(&folder, "[[fault]]\npoint = 'timer'\ndelay = '100ms'", &late);
    run.assert_sound();
    assert_eq!(late.answer(&run.output.stdout), "sleep: late\nfutex: late\npoll: 0 late", "{}", run.said);
    assert_eq!(run.fired(0), 3, "polls that do not wait have no timer");
    // Not the waker's own naps of 1 ms, which are the others.
    let woken = Guest::c(&folder, "woken", WAITS, &["0"]);
    let plan = "[[fault]]\npoint = 'timer'\nnth = 1\ndelay = '10s'\n[[fault]]\npoint = 'timer'\nevery = 5\ndelay = '5ms'";
    let run = assert_unseen(&folder, &woken, plan);
    assert_eq!(woken.answer(&run.output.stdout), "futex: 0\nsleep: -1 1\npoll: -1 1");
}

#[test]
fn a_system_call_that_is_refused_returns_that_error_and_does_nothing() {
    if !guests() {
        return;
    }
    let folder = folder("inject-syscall");
    let source = r#"
        #include <errno.h>
        #include <stdio.h>
        #include <unistd.h>
        int main() {
            for (int n = 0; n < 13; n++) {
                errno = 0;
                int error = dup2(1, 50 + n) < 0 ? errno : 0;
                printf("%d %d ", error, close(50 + n));
            }
            return 0;
        }"#;
    let guest = Guest::c(&folder, "refused", source, &[]);
    let errors = vmm::inject::points::SYSCALL.errors;
    let rule = |(index, (errno, _)): (usize, &(i32, Outcome))| {
        let name = vmm::inject::errno_name(*errno);
        format!("[[fault]]\npoint = 'syscall'\ncall = 'dup2'\nnth = {}\nerror = '{name}'\n", index + 1)
    };
    let plan: String = errors.iter().enumerate().map(rule).collect();
    let run = inject(&folder, &plan, &guest);
    run.assert_sound();
    // A descriptor that was not made cannot be closed.
    let expected: String = errors.iter().map(|(errno, _)| format!("{errno} -1 ")).collect();
    assert_eq!(guest.answer(&run.output.stdout), format!("{expected}0 0 "), "{}", run.said);
}

#[test]
fn a_file_that_cannot_be_read_or_reads_wrong_is_the_guests_affair() {
    if !guests() {
        return;
    }
    let folder = folder("inject-file");
    let source = r#"
        #include <errno.h>
        #include <stdio.h>
        #include <unistd.h>
        int main() {
            char text[100];
            for (int n = 0; n < 4; n++) {
                long got = read(0, text, 100);
                printf("%ld", got < 0 ? -errno : got);
                for (long i = 0; i < got; i++) printf(" %d", text[i]);
                puts("");
            }
            return 0;
        }"#;
    let guest = Guest::c(&folder, "reads", source, &[]).with_input(&[0; 200]);
    let plan = "allow-corruption = true
        [[fault]]\npoint = 'file-read'\nnth = 1\nerror = 'EIO'
        [[fault]]\npoint = 'file-read'\nnth = 2\nerror = 'EINTR'
        [[fault]]\npoint = 'file-read'\nnth = 3\ncorrupt = true";
    let run = inject(&folder, plan, &guest);
    run.assert_sound();
    let answer = guest.answer(&run.output.stdout);
    let lines: Vec<Vec<i32>> =
        answer.lines().map(|line| line.split(' ').map(|word| word.parse().unwrap()).collect()).collect();
    assert_eq!((&lines[0], &lines[1]), (&vec![-libc::EIO], &vec![-libc::EINTR]));
    let bits = |line: &[i32]| line[1..].iter().map(|byte| (*byte as u8).count_ones()).sum::<u32>();
    assert_eq!((lines[2][0], bits(&lines[2])), (100, 1), "one bit, no more");
    assert_eq!((lines[3][0], bits(&lines[3])), (100, 0));
}

#[test]
fn a_pool_that_the_host_refuses_starts_nothing_and_says_what_to_do() {
    if !guests() {
        return;
    }
    let (folder, images) = (folder("inject-grow"), images("inject-grow"));
    let run = inject(&folder, "[[fault]]\npoint = 'pool-grow'\nerror = 'ENOSPC'", &Guest::torture(&images));
    assert_eq!((run.code(), run.complaints().len()), (FAILED, 1), "{}", run.said);
    assert!(run.said.contains("ask for less with --memory"), "{}", run.said);
    assert_eq!(run.account["hits"].as_object().unwrap().len(), 1, "{}", run.account);
}

#[test]
fn a_thread_that_the_host_refuses_is_eagain_to_the_guest() {
    if !guests() {
        return;
    }
    let (folder, images) = (folder("inject-thread"), images("inject-thread"));
    for error in ["EAGAIN", "ENOMEM"] {
        let fault = format!("[[fault]]\npoint = 'thread-start'\nerror = '{error}'\nnth = ");
        let run = inject(&folder, &format!("{fault} 2"), &Guest::threads(&images));
        run.assert_sound();
        assert_eq!(run.code(), 1, "{}", run.said);
        assert!(run.said.contains(&format!("errno {}", libc::EAGAIN)), "{}", run.said);
        let run = inject(&folder, &format!("{fault} 1"), &Guest::threads(&images));
        run.assert_sound();
        assert_eq!((run.code(), run.complaints().len()), (FAILED, 1), "{}", run.said);
    }
}

/// A pool of 40 MiB and three times 24 MiB one after the other: frames that could not be given back are handed out again.
#[test]
fn frames_that_the_host_does_not_take_back_are_used_again() {
    if !guests() {
        return;
    }
    let folder = folder("inject-punch");
    let guest = every_fault::varied(&folder);
    for error in ["ENOSPC", "EINTR", "ENOMEM", "EOPNOTSUPP"] {
        assert_unseen(&folder, &guest, &format!("[[fault]]\npoint = 'punch'\nerror = '{error}'"));
    }
}

/// `mix` writes random pages while the scanner is held between its steps, and checks every byte.
#[test]
fn a_scanner_that_loses_its_cpu_between_its_steps_loses_no_write() {
    if !guests() {
        return;
    }
    let (folder, images) = (folder("inject-merge"), images("inject-merge"));
    let plan = "[[fault]]\npoint = 'merge-protect'\ntimes = 20\nstall = 'notifier-end'\nat-most = '2ms'
        [[fault]]\npoint = 'merge-compare'\ntimes = 20\ndelay = '2ms'
        [[fault]]\npoint = 'merge-replace'\ntimes = 20\nstall = 'vcpu-run'\nat-most = '2ms'
        [[fault]]\npoint = 'merge-compare'\ntimes = 2\nerror = 'EAGAIN'";
    assert_unseen(&folder, &Guest::mix(&images), plan);
}

#[test]
fn a_watch_that_is_late_keeps_every_promise_of_the_demo() {
    if !kvm() {
        return;
    }
    let folder = folder("inject-uffd");
    for effect in ["delay = '5ms'", "split = true", "stall = 'vcpu-run'\nat-most = '5ms'"] {
        let run = inject(&folder, &format!("[[fault]]\npoint = 'uffd-event'\n{effect}"), &Guest::adopted());
        if run.said.contains("userfaultfd") {
            assert!(std::env::var_os("UMBRA_REQUIRE_KVM").is_none(), "{}", run.said);
            println!("skipped: {}", run.said);
            return;
        }
        run.assert_sound();
        let text = String::from_utf8_lossy(&run.output.stdout).into_owned();
        assert!(
            text.lines().last().unwrap().starts_with("as promised: 14 looks"),
            "{effect}\n{text}\n{}",
            run.said
        );
        assert!(run.code() == 0 && run.fired(0) > 8, "{effect}: {}", run.account);
    }
}
