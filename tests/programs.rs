// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Programs that know nothing of umbra: Debian's busybox, a Rust std program, C programs. Output and status must be those of
//! the native run, byte for byte.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use common::{STATIC, assert_same, busybox, cc, finish, folder, guests, run, text};
use std::io::ErrorKind;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(300);
const INPUT: usize = 4 << 20;

fn compare(program: &Path, args: &[&str], input: &[u8]) {
    let native = finish(Command::new(program).args(args).env_clear(), input, LIMIT);
    let mut words = vec![program.to_str().unwrap()];
    words.extend(args);
    let guest = finish(&mut run(&["--check"], &words), input, LIMIT);
    assert_same(&native, &guest, &format!("{} {args:?}", program.display()));
}

#[test]
fn busybox_works_on_four_mebibytes() {
    if !guests() {
        return;
    }
    let Some(busybox) = busybox() else { return };
    let input = text(INPUT);
    compare(busybox, &["sha256sum"], &input);
    compare(busybox, &["sort", "-n"], &input);
    compare(
        busybox,
        &["awk", "{ s += $1; n[NF]++ } END { print s, NR; for (i = 0; i < 12; i++) print i, n[i] }"],
        &input,
    );
    compare(busybox, &["gzip", "-c"], &input);
    compare(busybox, &["wc"], &input);
    compare(busybox, &["grep", "-c", "spte.*zap"], &input);
    compare(busybox, &["grep", "no such words"], &input);
    compare(busybox, &["no-such-applet"], b"");
}

const RUST_PROGRAM: &str = r#"
use std::collections::HashMap;
use std::io::Read;
use std::sync::{Arc, Mutex, mpsc};
fn main() {
    let mut input = Vec::new();
    std::io::stdin().read_to_end(&mut input).unwrap();
    let input = Arc::new(input);
    let words = Arc::new(Mutex::new(HashMap::<Vec<u8>, u64>::new()));
    let (send, receive) = mpsc::channel();
    let threads: Vec<_> = (0..3usize).map(|n| {
        let (input, words, send) = (input.clone(), words.clone(), send.clone());
        std::thread::Builder::new().name(format!("worker {n}")).spawn(move || {
            let mut own = HashMap::<Vec<u8>, u64>::new();
            for line in input.split(|b| *b == b'\n').skip(n).step_by(3) {
                for word in line.split(|b| *b == b' ') { *own.entry(word.to_vec()).or_default() += 1; }
            }
            send.send(own.len()).unwrap();
            let mut all = words.lock().unwrap();
            for (word, n) in own { *all.entry(word).or_default() += n; }
        }).unwrap()
    }).collect();
    drop(send);
    let seen: usize = receive.iter().sum();
    for thread in threads { thread.join().unwrap(); }
    let all = words.lock().unwrap();
    let mut top: Vec<_> = all.iter().map(|(w, n)| (*n, String::from_utf8_lossy(w).into_owned())).collect();
    top.sort_by(|a, b| b.cmp(a));
    println!("{} bytes, {} words, seen by a thread: {}", input.len(), all.len(), seen > 0);
    for (n, word) in top.iter().take(40) { println!("{n:8} {word}"); }
    let caught = std::panic::catch_unwind(|| { if top.len() > 3 { panic!("on purpose") } });
    println!("caught a panic: {}", caught.is_err());
    std::process::exit(if std::env::args().count() == 3 { 7 } else { 1 });
}
"#;

#[test]
fn a_rust_program_with_three_threads() {
    if !guests() {
        return;
    }
    let folder = folder("rust-program");
    let (source, program) = (folder.join("words.rs"), folder.join("words"));
    std::fs::write(&source, RUST_PROGRAM).unwrap();
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let built = Command::new(rustc)
        .args(["--edition", "2021", "-O", "-C", "target-feature=+crt-static"])
        .args(["--target", "x86_64-unknown-linux-gnu", "-o"])
        .args([&program, &source])
        .output();
    let built = match built {
        // The test may have been built by another user, whose toolchain this one must not use.
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            println!("skipped: this user may not run rustc");
            return;
        }
        built => built.unwrap(),
    };
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    compare(&program, &["two", "words"], &text(INPUT));
}

const C_PROGRAM: &str = r#"
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <signal.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#include <math.h>
static sigjmp_buf back;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t turn = PTHREAD_COND_INITIALIZER;
static int whose;
static double sum;
static void *player(void *arg) {
    int me = (int)(long)arg;
    volatile double x = me + 1.5;
    for (int round = 0; round < 200; round++) {
        pthread_mutex_lock(&lock);
        while (whose != me) pthread_cond_wait(&turn, &lock);
        for (int i = 0; i < 50; i++) x = sqrt(x * 1.25 + round);
        sum += x;
        whose = (whose + 1) % 3;
        pthread_cond_broadcast(&turn);
        pthread_mutex_unlock(&lock);
    }
    return (void *)(long)(me * 10);
}
static void caught(int signal, siginfo_t *info, void *context) {
    siglongjmp(back, info->si_code);
}
int main(int argc, char **argv) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    printf("%d args, %s, %s\n", argc, argv[1], getenv("NOTHING") ? "env" : "no env");
    pthread_t threads[3];
    for (long i = 0; i < 3; i++) pthread_create(&threads[i], NULL, player, (void *)i);
    long results = 0;
    for (int i = 0; i < 3; i++) { void *r; pthread_join(threads[i], &r); results += (long)r; }
    printf("results %ld, sum %.12f\n", results, sum);
    char *big = malloc(64 << 20);
    for (size_t i = 0; i < 64 << 20; i += 4096) big[i] = i >> 12;
    unsigned check = 0;
    for (size_t i = 0; i < 64 << 20; i += 4096) check = check * 31 + (unsigned char)big[i];
    big = realloc(big, 96 << 20);
    for (size_t i = 0; i < 64 << 20; i += 4096) check = check * 31 + (unsigned char)big[i];
    free(big);
    printf("check %u\n", check);
    struct sigaction action = { .sa_sigaction = caught, .sa_flags = SA_SIGINFO | SA_ONSTACK };
    stack_t alt = { .ss_sp = malloc(65536), .ss_size = 65536 };
    sigaltstack(&alt, NULL);
    sigaction(SIGSEGV, &action, NULL);
    char *page = mmap(NULL, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int code;
    if ((code = sigsetjmp(back, 1)) == 0) *(volatile char *)page = 1;
    printf("write to a read-only page: code %d\n", code);
    munmap(page, 4096);
    if ((code = sigsetjmp(back, 1)) == 0) *(volatile char *)page;
    printf("read of no page: code %d\n", code);
    struct timespec t = { 0, 20000000 }, before, after;
    clock_gettime(CLOCK_MONOTONIC, &before);
    nanosleep(&t, NULL);
    clock_gettime(CLOCK_MONOTONIC, &after);
    double slept = after.tv_sec - before.tv_sec + (after.tv_nsec - before.tv_nsec) * 1e-9;
    printf("slept %s\n", slept >= 0.02 && slept < 5 ? "well" : "badly");
    char line[256];
    int lines = 0;
    while (fgets(line, sizeof line, stdin)) lines++;
    printf("%d lines\n", lines);
    fprintf(stderr, "to stderr\n");
    if (argc > 2) { signal(SIGABRT, SIG_DFL); abort(); }
    return 42;
}
"#;

#[test]
fn a_c_program_with_threads_signals_and_a_heap() {
    if !guests() {
        return;
    }
    let folder = folder("c-program");
    let program = cc(&folder, "mix", C_PROGRAM, &["-static", "-pthread", "-lm"]);
    compare(&program, &["one"], &text(10_000));
    compare(&program, &["abort", "now"], b"");
    let pie = cc(&folder, "mix-pie", C_PROGRAM, &["-static-pie", "-pthread", "-lm"]);
    compare(&pie, &["one"], b"a\nb\n");
}

#[test]
fn vector_registers_survive_faults_system_calls_and_threads() {
    if !guests() {
        return;
    }
    let source = r#"
        #include <immintrin.h>
        #include <pthread.h>
        #include <stdio.h>
        #include <sys/mman.h>
        #include <unistd.h>
        __attribute__((target("avx"))) static void *avx(void *arg) {
            __m256 a = _mm256_set1_ps(1.5f + (long)arg), b = _mm256_set1_ps(0.25f);
            for (int i = 0; i < 200; i++) {
                char *p = mmap(0, 8192, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
                asm volatile("" : "+x"(a), "+x"(b));
                p[0] = 1; p[4096] = 2;
                asm volatile("" : "+x"(a), "+x"(b));
                getppid();
                a = _mm256_add_ps(a, b);
                munmap(p, 8192);
            }
            float out[8];
            _mm256_storeu_ps(out, a);
            for (int i = 1; i < 8; i++) if (out[i] != out[0]) return (void *)-1;
            return (void *)(long)(out[0] * 100);
        }
        int main(void) {
            if (!__builtin_cpu_supports("avx")) { puts("no avx"); return 0; }
            pthread_t t[3]; long sum = 0;
            for (long i = 0; i < 3; i++) pthread_create(&t[i], 0, avx, (void *)i);
            for (int i = 0; i < 3; i++) { void *r; pthread_join(t[i], &r); printf("%ld\n", (long)r); }
            return 0;
        }"#;
    let program = cc(&folder("avx"), "avx", source, STATIC);
    compare(&program, &[], b"");
}

/// Each step is an instruction that needs the one before it. No CPU does 100 million of them in less than 10 ms.
const CPU_TIMES: &str = r#"
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <sys/resource.h>
#include <sys/times.h>
#include <time.h>
#include <unistd.h>
enum { STEPS = 100000000, LEAST = 10000000 };
static int bad;
#define GOOD(what) do { if (!(what)) { printf("line %d: not %s\n", __LINE__, #what); bad = 1; } } while (0)
static long long clock_ns(clockid_t clock) {
    struct timespec t;
    GOOD(!clock_gettime(clock, &t));
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}
static long long usage_ns(int who) {
    struct rusage u;
    GOOD(!getrusage(who, &u));
    return (u.ru_utime.tv_sec + u.ru_stime.tv_sec) * 1000000000LL + (u.ru_utime.tv_usec + u.ru_stime.tv_usec) * 1000LL;
}
static long long ticks_ns(void) {
    struct tms t;
    GOOD(times(&t) != -1);
    return (t.tms_utime + t.tms_stime) * (1000000000LL / sysconf(_SC_CLK_TCK));
}
struct used { long long clock, usage; };
static void *spin(void *into) {
    struct used *used = into;
    long long clock = clock_ns(CLOCK_THREAD_CPUTIME_ID), usage = usage_ns(RUSAGE_THREAD);
    GOOD(clock >= 0 && usage >= 0);
    for (long n = 0; n < STEPS; n++) __asm__ volatile("" : "+r"(n));
    used->clock = clock_ns(CLOCK_THREAD_CPUTIME_ID);
    used->usage = usage_ns(RUSAGE_THREAD);
    GOOD(used->clock >= clock + LEAST);
    GOOD(used->usage >= usage + LEAST);
    GOOD(clock_ns(CLOCK_THREAD_CPUTIME_ID) >= used->clock);
    return 0;
}
int main(void) {
    struct used used[3];
    pthread_t threads[2];
    long long ticks = ticks_ns(), clock = clock_ns(CLOCK_PROCESS_CPUTIME_ID), usage = usage_ns(RUSAGE_SELF);
    for (int n = 0; n < 2; n++) GOOD(!pthread_create(&threads[n], 0, spin, &used[n]));
    for (int n = 0; n < 2; n++) GOOD(!pthread_join(threads[n], 0));
    spin(&used[2]);
    long long clocks = 0, usages = 0;
    for (int n = 0; n < 3; n++) clocks += used[n].clock, usages += used[n].usage;
    for (int n = 0; n < 2; n++) {
        GOOD(clock_ns(CLOCK_PROCESS_CPUTIME_ID) >= clocks);
        GOOD(clock_ns(CLOCK_PROCESS_CPUTIME_ID) >= clock + 3 * LEAST);
        GOOD(usage_ns(RUSAGE_SELF) >= usages);
        GOOD(usage_ns(RUSAGE_SELF) >= usage + 3 * LEAST);
        GOOD(ticks_ns() >= ticks + LEAST);
    }
    puts("spun");
    return bad;
}
"#;

/// Threads that computed have used CPU time, and their process has used all of it, also when they have ended.
#[test]
fn cpu_clocks_count_what_threads_compute() {
    if !guests() {
        return;
    }
    let program = cc(&folder("cpu-times"), "cpu-times", CPU_TIMES, STATIC);
    compare(&program, &[], b"");
}
