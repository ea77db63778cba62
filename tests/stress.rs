// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Long runs with umbra watching itself (`--check`): the answers are the native ones, every audit is clean, and no frame is
//! written after it was freed.
//!
//! The last one is of page sharing. UMBRA_SEED makes it another run; `scripts/soak ksm` does that again and again.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use common::{STATIC, assert_same, cc, code, finish, folder, guests, native_images, run, stderr};
use serde_json::Value;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(900);

#[test]
fn a_thousand_tortures() {
    if !guests() {
        return;
    }
    let native = native_images("torture");
    let expected = finish(Command::new(native.join("torture")).arg("1..1000"), b"", LIMIT);
    let got = finish(&mut run(&["--check"], &["torture", "1..1000"]), b"", LIMIT);
    assert_same(&expected, &got, "torture 1..1000");
    assert_eq!(got.stdout.iter().filter(|&&byte| byte == b'\n').count(), 1000);
    assert!(stderr(&got).contains("audits clean"), "{}", stderr(&got));
}

#[test]
fn a_torture_in_scarce_memory_and_without_fault_around() {
    if !guests() {
        return;
    }
    let native = native_images("torture-scarce");
    let expected = finish(Command::new(native.join("torture")).arg("2000..2020"), b"", LIMIT);
    for options in [["--fault-around", "off", "--memory", "24M"], ["--fault-around", "2M", "--memory", "64M"]]
    {
        let got =
            finish(run(&["--check"], &[""; 0]).args(options).args(["torture", "2000..2020"]), b"", LIMIT);
        assert_same(&expected, &got, &format!("{options:?}"));
    }
}

#[test]
fn threads_race_with_unmap_for_a_minute() {
    if !guests() {
        return;
    }
    let native = native_images("threads");
    // The checksum depends on the seed, not on how long it ran.
    let expected = finish(Command::new(native.join("threads")).args(["--rounds", "50"]), b"", LIMIT);
    let got = finish(&mut run(&["--check"], &["threads", "--seconds", "60"]), b"", LIMIT);
    assert_same(&expected, &got, "threads");
    assert!(stderr(&got).contains("audits clean"), "{}", stderr(&got));
}

/// A program that knows what each of its pages must hold. Arguments: a seed, and either `seconds S` or `rounds R`. In a round it
/// rewrites, unmaps, maps anew, moves, discards, protects and unmerges random parts of its regions, or leaves them to be merged;
/// with `seconds` it waits in between. Another thread writes words meanwhile, whatever is being merged, such that the page always
/// equals some others. Every word is compared with what it must be. What is printed depends on the seed and on how many rounds
/// there were: that number, and a checksum of all that was read.
fn churn(test: &str) -> PathBuf {
    let source = r#"
        #define _GNU_SOURCE
        #include <pthread.h>
        #include <stdio.h>
        #include <stdlib.h>
        #include <string.h>
        #include <sys/mman.h>
        #include <time.h>
        #include <unistd.h>
        enum { REGIONS = 8, PAGES = 256, WORDS = 512, OWN = 1024, RW = PROT_READ | PROT_WRITE };
        typedef unsigned long u64;
        typedef struct { u64 content, at, word; } Page;
        static u64 *region[REGIONS];
        static Page must[REGIONS][PAGES];
        static volatile int stop;
        static u64 next(u64 *state) {
            u64 z = *state += 0x9e3779b97f4a7c15;
            z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
            z = (z ^ z >> 27) * 0x94d049bb133111eb;
            return z ^ z >> 31;
        }
        static u64 word(u64 content, u64 at) { return content ? content * 0x9e3779b97f4a7c15 + at : 0; }
        static u64 *map(void *where, long pages, int fixed) {
            u64 *at = mmap(where, pages << 12, RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | fixed, -1, 0);
            if (at == MAP_FAILED) perror("mmap"), _exit(8);
            return at;
        }
        static void nap(long us) { struct timespec t = { 0, us * 1000 }; nanosleep(&t, 0); }
        static void wrong(const char *what, long page, long at, u64 is, u64 must) {
            fprintf(stderr, "%s: page %ld, word %ld is %lx, must be %lx\n", what, page, at, is, must);
            _exit(1);
        }
        static void fill(int r, int p, u64 content) {
            for (long at = 0; at < WORDS; at++) region[r][p * WORDS + at] = word(content, at);
            must[r][p] = (Page){ content, 0, word(content, 0) };
        }
        static u64 check(int r, u64 sum) {
            for (int p = 0; p < PAGES; p++) for (long at = 0; at < WORDS; at++) {
                Page page = must[r][p];
                u64 is = region[r][p * WORDS + at], want = at == page.at ? page.word : word(page.content, at);
                if (is != want) wrong("region", r * PAGES + p, at, is, want);
                sum = (sum ^ is) * 0x100000001b3;
            }
            return sum;
        }
        /* Each page is written every 130 ms or so: often enough that it happens while it is merged, and seldom enough for it to be. */
        static void *scribble(void *seed) {
            u64 random = (u64)seed, is[OWN] = { 0 }, *own = map(0, OWN, 0);
            madvise(own, OWN << 12, MADV_MERGEABLE);
            for (long p = 0; p < OWN; p++) own[p * WORDS + 7] = 77;
            while (!stop) {
                for (int i = 0; i < 8; i++) {
                    long p = next(&random) % OWN, at = next(&random) % WORDS;
                    u64 want = at == 0 ? is[p] : at == 7 ? 77 : 0, found = own[p * WORDS + at];
                    if (found != want) wrong("own", p, at, found, want);
                    if (own[p * WORDS] != is[p]) wrong("own", p, 0, own[p * WORDS], is[p]);
                    own[p * WORDS] = is[p] = 1 + next(&random) % 4;
                }
                nap(1000);
            }
            return 0;
        }
        static void change(int r, u64 *random) {
            int from = next(random) % PAGES, len = 1 + next(random) % (PAGES - from), how = next(random) % 10;
            u64 *part = region[r] + from * WORDS, *other;
            switch (how) {
            case 0: /* One content, or few, or all different, also from what was there. */
            case 1:
                for (int p = from; p < from + len; p++) fill(r, p, next(random) % (how ? 6 : 1L << 40));
                break;
            case 2:
                for (int p = from; p < from + len; p++) {
                    fill(r, p, must[r][p].content);
                    must[r][p] = (Page){ must[r][p].content, next(random) % WORDS, next(random) % 4 };
                    region[r][p * WORDS + must[r][p].at] = must[r][p].word;
                }
                break;
            case 3:
                munmap(part, (long)len << 12);
                map(part, len, MAP_FIXED);
                madvise(part, (long)len << 12, MADV_MERGEABLE);
                memset(must[r] + from, 0, len * sizeof(Page));
                break;
            case 4:
                madvise(part, (long)len << 12, MADV_DONTNEED);
                memset(must[r] + from, 0, len * sizeof(Page));
                break;
            case 5:
                other = map(0, PAGES, 0);
                if (mremap(region[r], PAGES << 12, PAGES << 12, MREMAP_MAYMOVE | MREMAP_FIXED, other) != other) _exit(7);
                region[r] = other;
                break;
            case 6:
                if (mprotect(part, (long)len << 12, PROT_READ) || mprotect(part, (long)len << 12, RW)) _exit(6);
                break;
            case 7:
                madvise(part, (long)len << 12, MADV_UNMERGEABLE);
                madvise(part, (long)len << 12, MADV_MERGEABLE);
                break;
            }
        }
        int main(int argc, char **argv) {
            u64 random = atol(argv[1]), sum = 0xcbf29ce484222325;
            int timed = !strcmp(argv[2], "seconds");
            long limit = atol(argv[3]), rounds = 0;
            pthread_t thread;
            for (int r = 0; r < REGIONS; r++) {
                region[r] = map(0, PAGES, 0);
                madvise(region[r], PAGES << 12, MADV_MERGEABLE);
                for (int p = 0; p < PAGES; p++) fill(r, p, next(&random) % 6);
            }
            if (pthread_create(&thread, 0, scribble, (void *)random)) return 9;
            time_t end = time(0) + limit;
            while (timed ? time(0) < end : rounds < limit) {
                for (int r = 0; r < REGIONS; r++) {
                    if (next(&random) % 2) sum = check(r, sum);
                    change(r, &random);
                }
                if (timed) nap(60000 + random % 100000);
                rounds++;
            }
            for (int r = 0; r < REGIONS; r++) sum = check(r, sum);
            stop = 1;
            pthread_join(thread, 0);
            printf("%ld rounds, checksum %016lx\n", rounds, sum);
            return 0;
        }"#;
    cc(&folder(test), "churn", source, STATIC)
}

/// Content oracle of page sharing (I58, R10, R10b).
#[test]
fn i58_guests_that_change_what_they_share_read_what_they_wrote_for_a_minute() {
    const GUESTS: usize = 3;
    /// Of each variant.
    const SECONDS: &str = "20";
    if !guests() {
        return;
    }
    let program = churn("churn");
    let seed: u64 = std::env::var("UMBRA_SEED").map_or(1, |seed| seed.parse().unwrap());
    for (variant, number) in ["", ",max-page-sharing=2", ",copy-on-access"].iter().zip(0..) {
        let ksm = format!("--ksm=all,scan=1000000/1ms,no-smart-scan{variant}");
        let (seed, guests) = ((3 * seed + number).to_string(), GUESTS.to_string());
        let options = ["--guests", &guests, "--memory", "32M", "--check", &ksm, "--ksm-report=json"];
        let got = finish(run(&options, &[&program]).args([&seed, "seconds", SECONDS]), b"", LIMIT);
        let said = stderr(&got);
        assert_eq!(code(got.status), 0, "{ksm}, seed {seed}: {said}");
        assert!(said.contains("audits clean"), "{ksm}, seed {seed}: {said}");
        let lines = String::from_utf8(got.stdout).unwrap();
        assert_eq!(lines.lines().count(), GUESTS, "{lines}");
        // Each guest came as far as it came; the native program does as much.
        for line in lines.lines() {
            let rounds = line.split(' ').next().unwrap();
            let native = finish(Command::new(&program).args([&seed, "rounds", rounds]), b"", LIMIT);
            assert_eq!(String::from_utf8(native.stdout).unwrap().trim_end(), line, "{ksm}, seed {seed}");
        }
        // Otherwise nothing was tried.
        let report = said.lines().find(|line| line.starts_with('{')).unwrap();
        let report: Value = serde_json::from_str(report).unwrap();
        for counter in ["pages_sharing", "cow_ksm", "full_scans"] {
            assert!(report[counter].as_u64() > Some(0), "{ksm}, seed {seed}: no {counter} in {report}");
        }
        println!(
            "{ksm}, seed {seed}: {SECONDS} s, {} full scans, {} merged pages copied",
            report["full_scans"], report["cow_ksm"]
        );
    }
}
