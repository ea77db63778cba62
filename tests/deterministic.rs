// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `umbra run --deterministic`: the same seed gives the same run, exit by exit and notifier event by notifier event; other seeds
//! give others; a search finds a planted race, and the command that it prints replays it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use common::{STATIC, cc, code, finish, folder, guests, kvm, run, stderr};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(120);

/// Runs `line`, a program with its arguments, with a seed; with nothing on stdin.
fn seeded(seed: u64, options: &[&str], line: &str) -> Output {
    let seed = seed.to_string();
    let options = [&["--deterministic", "--seed", &seed][..], options].concat();
    let words: Vec<_> = line.split_whitespace().collect();
    finish(&mut run(&options, &words), b"", LIMIT)
}

/// The same with the trace of it.
fn traced(folder: &Path, seed: u64, options: &[&str], line: &str) -> (Output, String) {
    let path = folder.join("trace");
    let with_trace = [&["--deterministic-trace", path.to_str().unwrap()][..], options].concat();
    let output = seeded(seed, &with_trace, line);
    (output, fs::read_to_string(path).unwrap())
}

/// What `--stats=json` says of the mode.
fn summary(output: &Output) -> Value {
    let text = stderr(output);
    let line =
        text.lines().find(|line| line.starts_with('{')).unwrap_or_else(|| panic!("no numbers in {text}"));
    serde_json::from_str::<Value>(line).unwrap()["deterministic"].clone()
}

fn digest(output: &Output) -> String {
    let summary = summary(output);
    assert_eq!(summary["exact"], true, "{summary}");
    summary["digest"].as_str().unwrap().to_owned()
}

/// Two runs with each of `seeds` must not differ; returns the traces.
fn same_twice(test: &str, seeds: &[u64], options: &[&str], line: &str) -> BTreeSet<String> {
    let folder = folder(test);
    let twice = |&seed: &u64| {
        let (first, trace) = traced(&folder, seed, options, line);
        let (second, again) = traced(&folder, seed, options, line);
        let what = format!("seed {seed} {options:?} {line}");
        assert!(!stderr(&first).contains("cannot be replayed"), "{what}: {}", stderr(&first));
        assert_eq!(code(first.status), code(second.status), "{what}: {}", stderr(&second));
        assert_eq!(first.stdout, second.stdout, "{what}");
        let differs = trace.lines().zip(again.lines()).enumerate().find(|(_, (one, two))| one != two);
        assert!(trace == again, "{what}: {differs:?}");
        assert!(trace.lines().count() > 10, "{what}: {trace}");
        trace
    };
    seeds.iter().map(twice).collect()
}

#[test]
fn a_seed_decides_every_exit_and_every_notifier_event() {
    if !guests() {
        return;
    }
    let test = "deterministic-images";
    for line in ["hello", "hello-pie", "touch --pages 300 --order random --verify", "torture 7 --ops 200"] {
        // One thread: only what is random in the guest's stack differs.
        same_twice(test, &[1, 2], &[], line);
    }
    let traces = same_twice(test, &[1, 2, 3], &[], "threads --rounds 20 --writers 3");
    assert_eq!(traces.len(), 3, "seeds give different schedules");
    assert!(traces.iter().all(|trace| trace.contains("\nstart ") && trace.contains("\nswitch 1003 ")));
    assert_eq!(same_twice(test, &[1, 2, 3], &[], "race exits --threads 4").len(), 3);
    same_twice(test, &[1, 2], &["--fault-around", "off", "--memory", "8M"], "threads --rounds 10");
    same_twice(test, &[1], &["--check"], "threads --rounds 10");
}

#[test]
fn aging_and_sharing_go_by_virtual_time() {
    if !guests() {
        return;
    }
    let test = "deterministic-jobs";
    let all = ["--age", "5ms", "--ksm=all,scan=10000/2ms"];
    for options in [&all[..2], &all[2..], &all] {
        let traces = same_twice(test, &[1, 2], options, "threads --rounds 15");
        assert_eq!(traces.len(), 2, "{options:?}");
        if options.contains(&"--age") {
            assert!(traces.iter().all(|trace| trace.contains(" test_clear_young ")), "{options:?}");
        }
    }
    let sleeps = cc(
        &folder("deterministic-sharing"),
        "sleeps",
        r#"
        #include <string.h>
        #include <sys/mman.h>
        #include <time.h>
        int main(void) {
            char *p = mmap(0, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            memset(p, 7, 1 << 20);
            struct timespec two = { 2, 0 };
            nanosleep(&two, 0);
            return p[4096] != 7;
        }"#,
        STATIC,
    );
    let line = sleeps.to_str().unwrap();
    let options = ["--stats=json", "--ksm=all", "--age", "100ms"];
    same_twice(test, &[1], &options, line);
    let text = stderr(&seeded(1, &options, line));
    let numbers: Value =
        serde_json::from_str(text.lines().find(|line| line.starts_with('{')).unwrap()).unwrap();
    assert!(
        numbers["ksm"]["pages_sharing"].as_u64().unwrap() > 200,
        "nothing was scanned while it slept: {numbers}"
    );
    let passes = numbers["aging"]["count"].as_u64().unwrap();
    assert!((10..=50).contains(&passes), "two seconds of passes, not {passes}");
}

/// The release of an address space is the run's end; so is what a guest is told of time, chance and itself.
#[test]
fn time_and_chance_come_from_the_seed() {
    if !guests() {
        return;
    }
    let program = cc(
        &folder("deterministic-time"),
        "time",
        r#"
        #include <stdio.h>
        #include <sys/auxv.h>
        #include <sys/random.h>
        #include <sys/resource.h>
        #include <sys/times.h>
        #include <time.h>
        #include <unistd.h>
        int main(void) {
            for (int i = 0; i < 3; i++) for (int clock = 0; clock < 12; clock++) {
                struct timespec t;
                if (clock != 10 && !clock_gettime(clock, &t)) printf("%d %ld.%09ld\n", clock, t.tv_sec, t.tv_nsec);
            }
            unsigned char bytes[20], *at_random = (void *)getauxval(AT_RANDOM);
            getrandom(bytes, sizeof bytes, 0);
            for (int i = 0; i < 20; i++) printf("%02x", bytes[i]);
            for (int i = 0; i < 16; i++) printf("%02x", at_random[i]);
            struct rusage usage;
            struct tms tms;
            getrusage(RUSAGE_SELF, &usage);
            printf("\n%d %d %ld %ld %ld\n", getpid(), getppid(), usage.ru_utime.tv_usec, usage.ru_stime.tv_usec, times(&tms));
            unsigned cpu;
            unsigned long long stamp = __builtin_ia32_rdtsc(), later = __builtin_ia32_rdtscp(&cpu);
            printf("%llu %llu %u\n", stamp, later, cpu);
            struct timespec day = { 86400, 0 };
            time_t before = time(0);
            nanosleep(&day, 0);
            printf("%ld\n", time(0) - before);
            return 0;
        }"#,
        STATIC,
    );
    let line = program.to_str().unwrap();
    let first = seeded(1, &[], line);
    assert_eq!(code(first.status), 0, "{}", stderr(&first));
    assert_eq!(first.stdout, seeded(1, &[], line).stdout);
    assert_ne!(first.stdout, seeded(2, &[], line).stdout);
    let text = String::from_utf8(first.stdout).unwrap();
    assert!(text.starts_with("0 1577836800."), "{text}");
    assert!(text.contains("\n1000 1 "), "{text}");
    assert_eq!(text.lines().last(), Some("86400"), "{text}");
}

/// Two runs with each of a hundred seeds.
#[test]
fn a_hundred_seeds_give_equal_digests_twice() {
    if !guests() {
        return;
    }
    let mut digests = BTreeSet::new();
    for seed in 0..100 {
        let line = "race exits --threads 3 --iterations 30";
        let digest_of = |output: &Output| digest(output);
        let first = digest_of(&seeded(seed, &["--stats=json"], line));
        assert_eq!(first, digest_of(&seeded(seed, &["--stats=json"], line)), "seed {seed}");
        digests.insert(first);
    }
    assert!(digests.len() > 95, "{} schedules of 100", digests.len());
}

/// Searches, and runs what the search prints. Returns what the search said.
fn found_and_replayed(options: &[&str], line: &str) -> String {
    let options = [&["--deterministic", "--seeds", "0..1000"][..], options].concat();
    let words: Vec<_> = line.split_whitespace().collect();
    let search = finish(&mut run(&options, &words), b"", LIMIT);
    let text = stderr(&search);
    assert_eq!(code(search.status), 1, "{text}");
    let replay = text
        .lines()
        .find_map(|line| line.strip_prefix("umbra: to replay it: "))
        .unwrap_or_else(|| panic!("{text}"));
    for _ in 0..2 {
        let again = Command::new("sh").args(["-c", replay]).stdin(Stdio::null()).output().unwrap();
        assert_eq!(code(again.status), 1, "{replay}: {}", stderr(&again));
        assert!(stderr(&again).contains("updates are lost"), "{}", stderr(&again));
        // It says how to do it once more, which is the same but for the input.
        assert!(stderr(&again).contains(replay.trim_end_matches(" < /dev/null")), "{}", stderr(&again));
    }
    text
}

#[test]
fn a_planted_race_is_found_by_search_and_replayed() {
    if !guests() {
        return;
    }
    let text = found_and_replayed(&[], "race exits");
    assert!(!text.contains("number 1 of"), "it needs a search: {text}");
    let none = run(&["--deterministic", "--seeds", "5..8"], &["hello"]).output().unwrap();
    assert_eq!(code(none.status), 0, "{}", stderr(&none));
    assert!(stderr(&none).contains("none of the 3 seeds 5..8 fails"), "{}", stderr(&none));
}

#[test]
fn a_race_between_two_instructions_is_found_by_single_steps() {
    if !guests() {
        return;
    }
    found_and_replayed(&["--quantum", "steps"], "race steps");
    let traces =
        same_twice("deterministic-steps", &[1, 2], &["--quantum", "steps=50"], "race steps --iterations 20");
    assert_eq!(traces.len(), 2);
}

/// The trap flag is umbra's own: a program that pushes, pops and saves its flags finds them as they are without it.
#[test]
fn a_guest_does_not_see_that_it_is_single_stepped() {
    if !guests() {
        return;
    }
    let program = cc(
        &folder("deterministic-flags"),
        "flags",
        r#"
        #define _GNU_SOURCE
        #include <pthread.h>
        #include <signal.h>
        #include <stdio.h>
        #include <string.h>
        #include <sys/syscall.h>
        #include <ucontext.h>
        #include <unistd.h>
        static volatile long bad, traps;
        static unsigned long flags(void) {
            unsigned long f;
            asm volatile("pushfq; pop %0" : "=r"(f));
            return f;
        }
        static void usr1(int s, siginfo_t *i, void *c) {
            if (((ucontext_t *)c)->uc_mcontext.gregs[REG_EFL] & 0x100) bad |= 1;
            if (flags() & 0x100) bad |= 2;
        }
        static void trap(int s, siginfo_t *i, void *c) { traps++; }
        static void *work(void *arg) {
            for (int i = 0; i < 30; i++) {
                if (flags() & 0x100) bad |= 4;
                unsigned long r11, result;
                asm volatile("syscall; mov %%r11, %1" : "=a"(result), "=r"(r11) : "0"(39L) : "rcx", "r11", "memory");
                if (r11 & 0x100) bad |= 8;
                asm volatile("pushfq; popfq" ::: "cc", "memory");
                if (flags() & 0x100) bad |= 16;
            }
            syscall(SYS_tgkill, getpid(), syscall(SYS_gettid), SIGUSR1);
            return 0;
        }
        int main(void) {
            struct sigaction a = { .sa_sigaction = usr1, .sa_flags = SA_SIGINFO }, t = { .sa_sigaction = trap, .sa_flags = SA_SIGINFO };
            sigaction(SIGUSR1, &a, 0);
            sigaction(SIGTRAP, &t, 0);
            pthread_t one, two;
            pthread_create(&one, 0, work, 0);
            pthread_create(&two, 0, work, 0);
            // The program's own single step: three instructions, of which each traps.
            asm volatile("pushfq; orq $0x100, (%%rsp); popfq; nop; nop; pushfq; andq $~0x100, (%%rsp); popfq" ::: "cc", "memory");
            asm volatile("int3");
            pthread_join(one, 0);
            pthread_join(two, 0);
            printf("bad %ld, traps %ld\n", bad, traps);
            return 0;
        }"#,
        // The red zone would be below what is pushed.
        &[STATIC, &["-mno-red-zone"]].concat(),
    );
    let native = finish(&mut Command::new(&program), b"", LIMIT);
    assert!(native.stdout.starts_with(b"bad 0, traps "), "{native:?}");
    for seed in 0..3 {
        let output = seeded(seed, &["--quantum", "steps=20"], program.to_str().unwrap());
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!(text, String::from_utf8_lossy(&native.stdout), "seed {seed}: {}", stderr(&output));
    }
}

#[test]
fn a_thread_that_spins_does_not_hang_the_run() {
    if !guests() {
        return;
    }
    let spins = "race spin --threads 3";
    let output = seeded(1, &["--stats=json"], spins);
    assert_eq!((code(output.status), &output.stdout[..]), (0, &b"race: 3 threads have spun\n"[..]));
    assert!(stderr(&output).contains("use --quantum steps"), "{}", stderr(&output));
    assert_eq!(stderr(&output).matches("cannot be replayed").count(), 1);
    assert_eq!(summary(&output)["exact"], false);
    same_twice("deterministic-spin", &[1, 2], &["--quantum", "steps"], "race spin");
}

#[test]
fn a_guest_that_dies_is_told_with_the_command_that_replays_it() {
    if !guests() {
        return;
    }
    let program =
        cc(&folder("deterministic death"), "dies", "int main(void) { *(volatile int *)0 = 0; }", STATIC);
    let output = seeded(7, &["--env", "A=it's"], "./dies");
    assert_eq!(code(output.status), 125, "there is no such file here: {}", stderr(&output));
    let mut command =
        run(&["--deterministic", "--seed", "7", "--env", "A=it's"], &[program.to_str().unwrap(), "a b"]);
    let output = finish(&mut command, b"", LIMIT);
    assert_eq!(code(output.status), 128 + libc::SIGSEGV, "{}", stderr(&output));
    let text = stderr(&output);
    let replay = text
        .lines()
        .find_map(|line| line.strip_prefix("umbra: to replay it: "))
        .unwrap_or_else(|| panic!("{text}"));
    assert!(replay.contains(r"--seed 7 --env 'A=it'\''s' '") && replay.ends_with("/dies' 'a b'"), "{replay}");
    let again = Command::new("sh").args(["-c", replay]).stdin(Stdio::null()).output().unwrap();
    assert_eq!(code(again.status), 128 + libc::SIGSEGV, "{}", stderr(&again));
}

/// However late they come: virtual time stands still while nobody can run.
#[test]
fn input_that_one_thread_waits_for_is_the_same_whenever_it_comes() {
    if !guests() {
        return;
    }
    let path = folder("deterministic-input").join("trace");
    let with = |pause: u64| {
        let options = [
            &["--deterministic", "--seed", "3", "--ksm=all,scan=10000/1ms", "--age", "3ms"][..],
            &["--timeout", "100s", "--deterministic-trace", path.to_str().unwrap()],
        ]
        .concat();
        let mut command = run(&options, &["mix", "--pages", "256"]);
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let (mut answers, mut said) = (BufReader::new(child.stdout.take().unwrap()), String::new());
        for line in ["fill mix\n", "mergeable\n", "work 3\n", "verify\n", "quit\n"] {
            std::thread::sleep(Duration::from_millis(pause));
            stdin.write_all(line.as_bytes()).unwrap();
            // One command at a time, so that each is read by itself; `quit` has no answer.
            answers.read_line(&mut said).unwrap();
        }
        assert!(child.wait().unwrap().success());
        (said, fs::read_to_string(&path).unwrap())
    };
    let (first, trace) = with(30);
    assert!(!first.is_empty());
    for pause in [0, 10, 60] {
        assert!(with(pause).1 == trace, "{pause} ms that pass outside are seen inside");
    }
}

/// The trace of a run under a ready plan, what it printed, and the plan's report.
fn under_plan(folder: &Path, plan: &str, line: &str) -> (String, Vec<u8>, Value) {
    let path = folder.join("trace");
    let mut command = common::umbra();
    command.args(["inject", plan, "--report=json", "--", "run", "--deterministic", "--seed", "1"]);
    command.args(["--deterministic-trace", path.to_str().unwrap()]);
    command.args(line.split_whitespace());
    let output = finish(&mut command, b"", LIMIT);
    let text = stderr(&output);
    assert!(!text.contains("cannot be replayed"), "{plan}: {text}");
    let report = text.lines().find(|line| line.starts_with('{')).unwrap_or_else(|| panic!("{plan}: {text}"));
    let mut report: Value = serde_json::from_str(report).unwrap();
    report["status"] = code(output.status).into();
    (fs::read_to_string(path).unwrap(), output.stdout, report)
}

/// Ticks, delays and slow fetches go by virtual time, so how fast the host is decides nothing.
#[test]
fn a_plan_does_the_same_in_each_run_with_a_seed() {
    if !guests() {
        return;
    }
    let folder = folder("deterministic-plans");
    let waits = cc(
        &folder,
        "waits",
        r#"
        #include <poll.h>
        #include <stdio.h>
        #include <sys/mman.h>
        #include <time.h>
        int main(void) {
            volatile char *p = mmap(0, 1 << 16, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            struct timespec ms = { 0, 1000000 }, now;
            for (int i = 0; i < 700; i++) {
                p[i % 16 * 4096]++;
                i % 2 ? nanosleep(&ms, 0) : poll(0, 0, 1);
                poll(0, 0, 0);
            }
            clock_gettime(CLOCK_MONOTONIC, &now);
            printf("%ld.%09ld\n", now.tv_sec, now.tv_nsec);
            return 0;
        }"#,
        STATIC,
    );
    let waits = waits.to_str().unwrap();
    for plan in ["busy-host", "slow-memory", "poisoned-later"] {
        for line in [waits, "threads --rounds 10"] {
            let first = under_plan(&folder, plan, line);
            let second = under_plan(&folder, plan, line);
            assert_eq!((&first.1, &first.2), (&second.1, &second.2), "{plan} {line}");
            let differs = first.0.lines().zip(second.0.lines()).find(|(one, two)| one != two);
            assert!(first.0 == second.0, "{plan} {line}: {differs:?}");
            let (rules, what) = (first.2["rules"].as_array().unwrap(), &first.2);
            assert!(
                line != waits || rules.iter().any(|rule| rule["fired"].as_u64() > Some(0)),
                "{plan}: {what}"
            );
            // A poll of nothing waits for no timer, whatever the host's clock says.
            assert!(line != waits || plan != "busy-host" || what["hits"]["timer"] == 700, "{what}");
        }
    }
}

#[test]
fn a_guest_in_which_nothing_can_wake_anybody_is_ended() {
    if !guests() {
        return;
    }
    let program = cc(
        &folder("deterministic-stuck"),
        "stuck",
        r#"
        #include <pthread.h>
        #include <unistd.h>
        static pthread_mutex_t a = PTHREAD_MUTEX_INITIALIZER, b = PTHREAD_MUTEX_INITIALIZER;
        static void *work(void *arg) {
            pthread_mutex_lock(&b);
            usleep(1000);
            pthread_mutex_lock(&a);
            return 0;
        }
        int main(int argc, char **argv) {
            pthread_t one;
            if (argc > 1) pause();
            pthread_create(&one, 0, work, 0);
            pthread_mutex_lock(&a);
            usleep(1000);
            pthread_mutex_lock(&b);
            return 0;
        }"#,
        STATIC,
    );
    let program = program.to_str().unwrap();
    for line in [program.to_owned(), format!("{program} alone")] {
        same_twice("deterministic-stuck-trace", &[1, 2], &[], &line);
        let output = seeded(1, &[], &line);
        assert_eq!(code(output.status), 128 + libc::SIGKILL, "{}", stderr(&output));
        assert_eq!(stderr(&output).matches("nothing can wake one").count(), 1, "{}", stderr(&output));
    }
    let search = run(&["--deterministic", "--seeds", "3..9"], &[program]).output().unwrap();
    assert!(stderr(&search).contains("seed 3 fails with exit status 137"), "{}", stderr(&search));
}

#[test]
fn a_seed_that_does_not_end_is_told_as_such() {
    if !guests() {
        return;
    }
    let program = cc(&folder("deterministic-endless"), "endless", "int main(void) { for (;;) ; }", STATIC);
    let options = ["--deterministic", "--seeds", "3..9", "--timeout", "300ms"];
    let output = run(&options, &[program]).output().unwrap();
    let text = stderr(&output);
    assert!(text.contains("seed 3 does not end within --timeout"), "{text}");
}

#[test]
fn a_run_that_umbra_fails_itself_is_told_with_the_command_that_replays_it() {
    if !kvm() {
        return;
    }
    let plan = folder("deterministic-lost").join("lost.toml");
    fs::write(&plan, "[[fault]]\npoint = 'vcpu-run'\nnth = 20\nexit = 'shutdown'\n").unwrap();
    let mut command = common::umbra();
    command.args([
        "inject",
        plan.to_str().unwrap(),
        "--",
        "run",
        "--deterministic",
        "--seed",
        "5",
        "--report-dir",
    ]);
    command.args([plan.parent().unwrap().to_str().unwrap(), "touch"]);
    let output = finish(&mut command, b"", LIMIT);
    let text = stderr(&output);
    assert_eq!(code(output.status), 125, "{text}");
    let replay = text.lines().find_map(|line| line.strip_prefix("umbra: to replay it: "));
    assert!(replay.is_some_and(|replay| replay.contains("--seed 5")), "{text}");
    // What did not come to run says nothing of the seed.
    let never = stderr(&seeded(5, &[], "./no-such-file"));
    assert!(!never.contains("to replay it"), "{never}");
}

#[test]
fn what_cannot_be_repeated_is_refused() {
    for (options, says) in [
        (&["--seed", "1"][..], "--deterministic"),
        (&["--deterministic", "--seed", "x"], "no seed"),
        (&["--deterministic", "--seeds", "3..3"], "no range of seeds"),
        (&["--deterministic", "--seeds", "0..3", "--seed", "1"], "--seed"),
        (&["--deterministic", "--quantum", "steps=0"], "no quantum"),
        (&["--deterministic", "--guests", "2"], "--guests"),
        (&["--deterministic", "--dirty-rate"], "--dirty-rate"),
        (&["--deterministic", "--ksm=advisor"], "advisor"),
        (&["--deterministic", "--seeds", "0..3", "--trace", "notifier"], "--trace"),
    ] {
        let output = run(options, &["hello"]).output().unwrap();
        assert_eq!(code(output.status), 2, "{options:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(says), "{options:?}: {}", stderr(&output));
    }
}
