// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The engines held against each other, and against the native run: the same program does the same under each, fault by fault
//! where numbers can be compared.
//!
//! Every engine that this host offers takes part, whichever is in use; one that it does not offer is skipped with a line. Nothing
//! here depends on how fast a machine is.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use common::pages::{NEVER, marks, program, reports, row};
use common::{STATIC, assert_same, cc, code, finish, folder, native_images, offered, run, stderr};
use serde_json::Value;
use std::fs;
use std::process::{Command, Output};
use std::time::Duration;
use vmm::engine::Marks;

const LIMIT: Duration = Duration::from_secs(120);

/// `program` under `engine`.
fn under(engine: &str, options: &[&str], program: &[&str], input: &[u8]) -> Output {
    let options = [&["--engine", engine][..], options].concat();
    finish(&mut run(&options, program), input, LIMIT)
}

fn words(line: &str) -> Vec<&str> {
    line.split_whitespace().collect()
}

/// `tell` of each engine must be the same; one that is alone is asked all the same.
fn same_under_each<T: PartialEq + std::fmt::Debug>(what: &str, tell: impl Fn(&str) -> T) {
    let told: Vec<_> = offered().into_iter().map(|engine| (engine, tell(engine))).collect();
    for pair in told.windows(2) {
        assert_eq!(pair[0].1, pair[1].1, "{what}: {} (left) and {} (right)", pair[0].0, pair[1].0);
    }
}

#[test]
fn bundled_guests_print_and_return_the_same() {
    let images = native_images("engines-images");
    // With what they find on stdin. What prints times is not here.
    let lines = [
        ("hello", ""),
        ("hello-pie", ""),
        ("touch --pages 600 --verify", ""),
        ("touch --pages 300 --order random --write 50 --passes 3 --verify", ""),
        ("threads --rounds 5", ""),
        ("torture 1..5", ""),
        ("victim --rounds 3", ""),
        // The only answer is a line on stderr.
        ("touch --nonsense", ""),
        ("mix --pages 64", "fill mix\nverify\nfill pairs\nverify\nquit\n"),
    ];
    for (line, input) in lines {
        let words = words(line);
        let native = finish(Command::new(images.join(words[0])).args(&words[1..]), input.as_bytes(), LIMIT);
        for engine in offered() {
            let guest = under(engine, &[], &words, input.as_bytes());
            assert_same(&native, &guest, &format!("{engine}: {line}"));
            assert_eq!(stderr(&native), stderr(&guest), "{engine}: {line}");
        }
    }
    // Times aside.
    same_under_each("compute", |engine| {
        let output = under(engine, &[], &["compute", "--rounds", "3"], b"");
        assert_eq!(code(output.status), 0, "{}", stderr(&output));
        let text = String::from_utf8(output.stdout).unwrap();
        let sums = text.split_whitespace().skip_while(|word| *word != "checksum").step_by(1);
        let is_sum = |word: &&str| word.len() == 16 && word.bytes().all(|byte| byte.is_ascii_hexdigit());
        let sums: Vec<_> = sums.filter(is_sum).map(str::to_owned).collect();
        assert_eq!(sums.len(), 5, "{text}");
        sums
    });
}

/// Raises each exception that a program can cause and prints all that its handler is told; then threads that take turns, and
/// memory calls, with what lies in the memory afterwards. It dies of SIGSEGV.
///
/// Without `exact`, bit 0 of a page fault's error code is left out below the kernel's addresses: it is not Linux's for every fault
/// (docs/guest-abi.md).
const EXCEPTIONS: &str = r#"
#define _GNU_SOURCE
#include <fenv.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>
static sigjmp_buf back;
static int exact;
static char *const at = (char *)0x500000000000, *const kernels = (char *)0xffffffff81000000;
static void caught(int signal, siginfo_t *info, void *context) {
    // AC is still as the program had it; x87 and SSE are fresh.
    unsigned mxcsr;
    unsigned short control;
    asm volatile("pushfq\n andl $~0x40000, (%%rsp)\n popfq\n stmxcsr %0\n fnstcw %1" : "=m"(mxcsr), "=m"(control) :: "cc", "memory");
    greg_t *regs = ((ucontext_t *)context)->uc_mcontext.gregs;
    int is_fault = regs[REG_TRAPNO] == 14;
    int is_inexact = is_fault && !exact && (char *)regs[REG_CR2] < kernels;
    printf(" signal %d code %d addr %p trapno %lld err %llx rip %llx cr2 %llx fpu %x %x\n", signal, info->si_code,
           info->si_addr, regs[REG_TRAPNO], is_inexact ? regs[REG_ERR] & ~1 : regs[REG_ERR], regs[REG_RIP],
           is_fault ? regs[REG_CR2] : 0, mxcsr, control);
    siglongjmp(back, 1);
}
#define TRY(what) do { printf("%s:", #what); if (!sigsetjmp(back, 1)) { what; puts(" nothing"); } } while (0)
#define PAGE(n) (at + (n) * 4096)
static void map(int n, int rights) {
    if (mmap(PAGE(n), 4096, rights, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != PAGE(n)) exit(9);
}
static void load(volatile char *p) { *p; }
static void store(volatile char *p) { *p = 1; }
static void jump(char *p) { ((void (*)(void))p)(); }
static void noncanonical(void) { asm volatile("movb (%0), %%al" :: "r"(0x8000000000000000) : "eax"); }
static void divide(void) { asm volatile("xorl %%ecx, %%ecx\n movl $1, %%eax\n cltd\n idivl %%ecx" ::: "eax", "ecx", "edx"); }
static void breakpoint(void) { asm volatile("int3"); }
static void int_20(void) { asm volatile("int $0x20"); }
static void int_77(void) { asm volatile("int $0x77"); }
static void invalid(void) { asm volatile("ud2"); }
static void privileged(void) { asm volatile("hlt"); }
static void port(void) { asm volatile("inb $0x80, %%al" ::: "eax"); }
static void unaligned(void) {
    asm volatile("pushfq\n orl $0x40000, (%%rsp)\n popfq\n movl 1(%0), %%eax" :: "r"(PAGE(0)) : "eax", "cc");
}
static void movaps(void) { asm volatile("movaps 8(%0), %%xmm0" :: "r"(PAGE(0)) : "xmm0"); }
static void sse(void) { feenableexcept(FE_DIVBYZERO); volatile double zero = 0, one = 1; zero = one / zero; }
static void x87(void) { feenableexcept(FE_DIVBYZERO); asm volatile("fld1\n fldz\n fdivrp\n fwait"); }
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t turn = PTHREAD_COND_INITIALIZER;
static int whose;
static long sum;
static void *player(void *arg) {
    long me = (long)arg;
    for (int round = 0; round < 100; round++) {
        pthread_mutex_lock(&lock);
        while (whose != me) pthread_cond_wait(&turn, &lock);
        sum = sum * 31 + me;
        whose = (whose + 1) % 3;
        pthread_cond_broadcast(&turn);
        pthread_mutex_unlock(&lock);
    }
    return (void *)(me * 10);
}
int main(int argc, char **argv) {
    exact = argc > 1;
    struct sigaction action = { .sa_sigaction = caught, .sa_flags = SA_SIGINFO };
    int signals[] = { SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP };
    for (int i = 0; i < 5; i++) sigaction(signals[i], &action, 0);
    map(0, PROT_READ | PROT_WRITE), map(1, PROT_READ), map(2, PROT_NONE), map(3, PROT_READ | PROT_WRITE);
    memset(PAGE(0), 0x90, 4096);
    TRY(load(PAGE(9) + 5)); TRY(store(PAGE(9) + 5)); TRY(jump(PAGE(9) + 5));
    TRY(load(PAGE(1) + 5)); TRY(store(PAGE(1) + 5)); TRY(jump(PAGE(1) + 5));
    TRY(load(PAGE(2) + 5)); TRY(store(PAGE(2) + 5)); TRY(jump(PAGE(2) + 5));
    TRY(load(PAGE(0) + 5)); TRY(store(PAGE(0) + 5)); TRY(jump(PAGE(0) + 5));
    TRY(jump(PAGE(3) + 5));
    TRY(load(0)); TRY(store(0)); TRY(jump(0));
    TRY(load(kernels)); TRY(store(kernels)); TRY(jump(kernels));
    TRY(noncanonical()); TRY(divide()); TRY(breakpoint()); TRY(int_20()); TRY(int_77()); TRY(invalid());
    TRY(privileged()); TRY(port()); TRY(unaligned()); TRY(movaps()); TRY(sse()); TRY(x87());

    pthread_t threads[3];
    for (long i = 0; i < 3; i++) pthread_create(&threads[i], 0, player, (void *)i);
    long ends = 0;
    for (int i = 0; i < 3; i++) { void *end; pthread_join(threads[i], &end); ends += (long)end; }
    printf("threads: %lx %ld\n", sum, ends);

    char *many = mmap(PAGE(32), 16 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    for (int i = 0; i < 16; i++) many[i * 4096] = i;
    mprotect(many + 4 * 4096, 4 * 4096, PROT_READ);
    TRY(store(PAGE(32 + 5)));
    char *moved = mremap(many + 4 * 4096, 4 * 4096, 8 * 4096, MREMAP_MAYMOVE | MREMAP_FIXED, PAGE(96));
    printf("moved: %d %d\n", moved == PAGE(96), moved[4096]);
    TRY(load(PAGE(32 + 5))); TRY(store(PAGE(96 + 1)));
    munmap(many, 4096);
    TRY(store(PAGE(32)));
    mprotect(moved, 4096, PROT_NONE);
    TRY(load(moved));
    mprotect(moved, 4096, PROT_READ | PROT_WRITE);
    printf("back: %d\n", moved[0]);
    madvise(many + 4096, 4096, MADV_DONTNEED);
    printf("dropped: %d %d\n", many[4096], many[2 * 4096]);
    fflush(stdout);
    write(2, "on stderr\n", 10);
    signal(SIGSEGV, SIG_DFL);
    store(PAGE(9));
}"#;

#[test]
fn every_exception_tells_a_handler_the_same() {
    let flags = [STATIC, &["-no-pie", "-lm"]].concat();
    let path = cc(&folder("engines-exceptions"), "exceptions", EXCEPTIONS, &flags);
    let program = path.to_str().unwrap();
    let native = finish(&mut Command::new(program), b"", LIMIT);
    assert_eq!(code(native.status), 128 + libc::SIGSEGV, "{}", stderr(&native));
    assert_eq!(native.stdout.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()).count(), 40);
    for engine in offered() {
        let guest = under(engine, &["--check"], &[program], b"");
        assert_same(&native, &guest, engine);
        // Behind it umbra says what the guest died of.
        assert!(
            stderr(&guest).starts_with("on stderr\numbra: the guest died of SIGSEGV"),
            "{}",
            stderr(&guest)
        );
    }
    same_under_each("with whole error codes", |engine| {
        let guest = under(engine, &[], &[program, "exact"], b"");
        assert!(!guest.stdout.is_empty() && code(guest.status) == 128 + libc::SIGSEGV, "{}", stderr(&guest));
        String::from_utf8(guest.stdout).unwrap()
    });
}

/// Of one thread, or of threads whose turns a seed decides, each fault and what it comes to is the same.
///
/// `frames_peak` is not: KVM's monitor has frames of the pool for code, stacks and tables of its own.
#[test]
fn faults_pages_and_flushes_are_counted_alike() {
    let one_thread: &[&str] = &["--stats=json", "--fault-around", "off"];
    let seeded = [one_thread, &["--deterministic", "--seed", "2"]].concat();
    let around = ["--stats=json", "--fault-around", "64K"];
    for (options, line) in [
        (one_thread, "touch --pages 500 --verify"),
        (one_thread, "touch --pages 500 --order random --write 50 --passes 3"),
        (one_thread, "torture 3"),
        (&around, "touch --pages 500 --verify"),
        (&seeded, "threads --rounds 5"),
    ] {
        same_under_each(&format!("{options:?} {line}"), |engine| {
            let output = under(engine, options, &words(line), b"");
            assert_eq!(code(output.status), 0, "{}", stderr(&output));
            let said = stderr(&output);
            let stats = said.lines().find(|line| line.starts_with('{')).unwrap();
            let stats: Value = serde_json::from_str(stats).unwrap();
            assert_eq!(stats["engine"], engine);
            assert!(stats["pf_taken"].as_u64().unwrap() > 0 && stats["demand_pages"].as_u64().unwrap() > 0);
            [
                "pf_taken",
                "pf_fixed",
                "pf_spurious",
                "pf_retried",
                "around_installed",
                "pages_4k",
                "zapped",
                "flushes",
                "tables",
                "demand_pages",
                "ahead_pages",
                "copied_pages",
                "zero_pages",
            ]
            .map(|name| (name, stats[name].as_u64().unwrap()))
        });
    }
}

/// With A bits of the CPU's own, which guess, nothing is compared; without them every access is a fault.
#[test]
fn what_is_young_is_the_same_under_each() {
    let path = program("engines-aging");
    let program = path.to_str().unwrap();
    for bits in ["on", "off"] {
        if marks(bits) == Marks::CpuGuesses {
            println!("skipped with --ad-bits {bits}: the CPU sets A for pages that nobody touched");
            continue;
        }
        same_under_each(bits, |engine| {
            let options = ["--age", NEVER, "--wss=json", "--fault-around", "256K", "--ad-bits", bits];
            let output = under(engine, &options, &[program, "touch", "11", "cow", "17"], b"");
            assert_eq!(code(output.status), 0, "{}", stderr(&output));
            let at = String::from_utf8_lossy(&output.stdout).trim().parse().unwrap();
            let told = reports(&stderr(&output), "working_set");
            let row = row(&told[0], at).unwrap();
            // Pages 0 to 16, of the block that was brought in.
            assert_eq!((&row["age_kib"][0], &row["untouched_kib"]), (&68.into(), &188.into()), "{row}");
            let total = &told[0]["total"];
            ["resident_kib", "age_kib", "untouched_kib"].map(|name| (row[name].clone(), total[name].clone()))
        });
    }
}

#[test]
fn a_seed_gives_the_same_trace_under_each() {
    let folder = folder("engines-traces");
    for line in ["race exits --threads 3", "race steps"] {
        for seed in ["1", "2", "3", "4"] {
            same_under_each(&format!("seed {seed}: {line}"), |engine| {
                let path = folder.join(engine);
                let options =
                    ["--deterministic", "--seed", seed, "--deterministic-trace", path.to_str().unwrap()];
                let output = under(engine, &options, &words(line), b"");
                let trace = fs::read_to_string(&path).unwrap();
                assert!(trace.lines().count() > 20, "{trace}\n{}", stderr(&output));
                // Line by line, so that a failure shows where they part.
                let lines: Vec<_> = trace.lines().map(str::to_owned).collect();
                (code(output.status), output.stdout, lines)
            });
        }
    }
}
