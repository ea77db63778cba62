// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `umbra run --guests`: copies of one program that share a pool, and what becomes of each.
//!
//! The copies are the same but for their stdin: guest 0 has umbra's, the others have none. So a program can tell whether it is
//! guest 0, and a test can hold that one back until what must come first has come.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use common::{STATIC, cc, code, finish, folder, guests, native_images, run, stderr};
use serde_json::Value;
use shadow_mmu::addr::PAGE_SIZE;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStderr, ChildStdout, Command, Stdio};
use std::time::Duration;
use vmm::fleet::Fleet;
use vmm::guest::Arguments;
use vmm::vm::{Program, VmConfig};

const LIMIT: Duration = Duration::from_secs(120);

/// A program that reads all of its input and does what the first word says; without input, what its arguments say. `exit N`;
/// `eat N`: write N MiB, say `ate` and go on; `crash`; `idle`: say `idle` and do nothing, for ever.
fn program(test: &str) -> PathBuf {
    let source = r#"
        #include <stdio.h>
        #include <stdlib.h>
        #include <string.h>
        #include <sys/mman.h>
        #include <time.h>
        #include <unistd.h>
        static void say(const char *word) { write(1, word, strlen(word)); }
        int main(int argc, char **argv) {
            char input[256], *words[16];
            int len = 0, got, count = 0;
            while ((got = read(0, input + len, sizeof input - 1 - len)) > 0) len += got;
            input[len] = 0;
            for (char *w = strtok(input, " \n"); w && count < 15; w = strtok(0, " \n")) words[count++] = w;
            if (!count) for (; count + 1 < argc && count < 15; count++) words[count] = argv[count + 1];
            words[count] = 0;
            for (int at = 0; words[at]; at++) {
                if (!strcmp(words[at], "exit")) return atoi(words[at + 1]);
                if (!strcmp(words[at], "crash")) *(volatile int *)16 = 1;
                if (!strcmp(words[at], "eat")) {
                    size_t size = (size_t)atoi(words[++at]) << 20;
                    char *p = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
                    for (size_t i = 0; i < size; i += 4096) p[i] = 1;
                    say("ate\n");
                }
                if (!strcmp(words[at], "idle")) {
                    struct timespec tick = { 0, 1000000 };
                    for (int n = 0;; n++) { nanosleep(&tick, 0); if (n == 3) say("idle\n"); }
                }
            }
            return 0;
        }"#;
    cc(&folder(test), "fleet", source, STATIC)
}

/// `umbra run OPTIONS program ARGS`, running. Its reader drops it at the end of a test that fails.
struct Running {
    child: Child,
    stdout: BufReader<ChildStdout>,
    stderr: BufReader<ChildStderr>,
}

impl Running {
    fn start(test: &str, options: &[&str], args: &[&str]) -> Self {
        let mut command = run(&[options, &["--timeout", "100s"]].concat(), &[program(test)]);
        command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let stderr = BufReader::new(child.stderr.take().unwrap());
        Self { child, stdout, stderr }
    }

    /// Reads what umbra says until a line holds `words`.
    fn await_said(&mut self, words: &str) -> String {
        let mut all = String::new();
        while !all.contains(words) {
            assert!(self.stderr.read_line(&mut all).unwrap() > 0, "`{words}` is not in: {all}");
        }
        all
    }

    /// Reads what the guests print until there are `count` more lines of this kind.
    fn await_printed(&mut self, line: &str, mut count: usize) {
        while count > 0 {
            let mut got = String::new();
            assert!(self.stdout.read_line(&mut got).unwrap() > 0, "{count} more `{line}` must come");
            count -= usize::from(got.trim() == line);
        }
    }

    /// Gives guest 0 its input, all of it.
    fn input(&mut self, words: &str) {
        self.child.stdin.take().unwrap().write_all(words.as_bytes()).unwrap();
    }

    fn signal(&self, signal: i32) {
        // SAFETY: our child, which was not waited for yet.
        assert_eq!(unsafe { libc::kill(self.child.id() as i32, signal) }, 0);
    }

    /// Waits for the end; the exit status and what else was said.
    fn end(mut self) -> (i32, String) {
        let mut rest = String::new();
        self.stderr.read_to_string(&mut rest).unwrap();
        (code(self.child.wait().unwrap()), rest)
    }
}

#[test]
fn copies_of_a_program_each_do_what_one_does() {
    if !guests() {
        return;
    }
    let one = finish(Command::new(native_images("fleet-native").join("hello")).args([""; 0]), b"", LIMIT);
    for count in [1, 2, 8] {
        let options = ["--guests", &count.to_string(), "--memory", "8M", "--check"];
        let all = finish(&mut run(&options, &["hello"]), b"", LIMIT);
        assert_eq!(code(all.status), 0, "{}", stderr(&all));
        assert_eq!(all.stdout, one.stdout.repeat(count), "{count}");
        assert!(stderr(&all).contains("audits clean"), "{}", stderr(&all));
    }
}

#[test]
fn frames_go_from_guest_to_guest_and_nothing_of_the_one_is_seen_by_the_other() {
    if !guests() {
        return;
    }
    let native = native_images("fleet-torture");
    let one = finish(Command::new(native.join("torture")).arg("3000..3012"), b"", LIMIT);
    let options = ["--guests", "4", "--pool", "96M", "--check"];
    let all = finish(&mut run(&options, &["torture", "3000..3012"]), b"", LIMIT);
    assert_eq!(code(all.status), 0, "{}", stderr(&all));
    // Lines of four guests, each whole, in any order between them.
    let count = |bytes: &[u8], times: usize| {
        let mut lines = BTreeMap::new();
        for line in bytes.split_inclusive(|&byte| byte == b'\n') {
            *lines.entry(line.to_vec()).or_insert(0) += times;
        }
        lines
    };
    assert_eq!(count(&all.stdout, 1), count(&one.stdout, 4));
    assert!(stderr(&all).contains("audits clean"), "{}", stderr(&all));
}

#[test]
fn stdin_is_the_first_guests_and_its_status_counts_first() {
    if !guests() {
        return;
    }
    let program = program("fleet-status");
    let program = program.to_str().unwrap();
    for (guests, input, others, status, said) in [
        ("3", "exit 0", ["exit", "0"], 0, &[][..]),
        ("3", "exit 7", ["exit", "3"], 7, &["guest 0 exited with status 7", "guest 2 exited with status 3"]),
        ("3", "exit 0", ["exit", "3"], 3, &["guest 1 exited with status 3", "guest 2 exited with status 3"]),
        ("2", "crash", ["exit", "3"], 128 + libc::SIGSEGV, &["guest 0 died of SIGSEGV", "guest 1 exited"]),
        ("2", "exit 0", ["crash", ""], 128 + libc::SIGSEGV, &["guest 1 died of SIGSEGV"]),
        // One guest says it by the exit status alone.
        ("1", "exit 7", ["exit", "3"], 7, &[]),
    ] {
        let mut command = run(&["--guests", guests, "--memory", "16M"], &[program]);
        let output = finish(command.args(others), input.as_bytes(), LIMIT);
        let told = stderr(&output);
        assert_eq!(code(output.status), status, "{input}, {others:?}: {told}");
        for words in said {
            assert!(told.contains(words), "no `{words}` in: {told}");
        }
        let lines = told.lines().filter(|line| line.starts_with("umbra: guest ")).count();
        let failed = [input == "exit 0", others == ["exit", "0"]].map(|is_good| usize::from(!is_good));
        let others: usize = guests.parse::<usize>().unwrap() - 1;
        assert_eq!(lines, if others == 0 { 0 } else { failed[0] + others * failed[1] }, "{told}");
    }
}

#[test]
fn a_signal_to_umbra_and_the_time_limit_end_all_guests() {
    if !guests() {
        return;
    }
    let mut running = Running::start("fleet-signal", &["--guests", "3", "--memory", "8M"], &["idle"]);
    running.input("idle");
    running.await_printed("idle", 3);
    running.signal(libc::SIGTERM);
    let (status, said) = running.end();
    assert_eq!(status, 128 + libc::SIGTERM, "{said}");
    let ended = (0..3).all(|n| said.contains(&format!("guest {n} was ended by SIGTERM")));
    assert!(ended, "{said}");

    let program = program("fleet-limit");
    let options = ["--guests", "3", "--memory", "8M", "--timeout", "200ms"];
    let output = finish(run(&options, &[program]).arg("idle"), b"idle", LIMIT);
    assert_eq!(code(output.status), 128 + libc::SIGKILL, "{}", stderr(&output));
    assert_eq!(stderr(&output).matches("was ended by SIGKILL").count(), 3, "{}", stderr(&output));
}

#[test]
fn what_a_guest_leaves_behind_the_others_get() {
    if !guests() {
        return;
    }
    // Room for one to eat, not for both.
    let options = ["--guests", "2", "--pool", "32M", "--stats=json"];
    let mut running = Running::start("fleet-gone", &options, &["eat", "20", "exit", "3"]);
    running.await_said("guest 1 exited with status 3\n");
    running.input("eat 20");
    running.await_printed("ate", 2);
    let (status, said) = running.end();
    assert_eq!(status, 3, "{said}");
    let stats: Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
    let peak = stats["guests"][0]["frames_peak"].as_u64().unwrap() * PAGE_SIZE;
    assert!((20 << 20..=32 << 20).contains(&peak), "{stats}");
}

#[test]
fn a_guest_that_needs_a_frame_when_none_is_left_is_killed_and_the_others_live_on() {
    if !guests() {
        return;
    }
    let options = ["--guests", "3", "--pool", "16M", "--check"];
    let mut running = Running::start("fleet-full", &options, &["idle"]);
    running.await_printed("idle", 2);
    running.input("eat 64");
    let said = running.await_said("guest 0 died of SIGKILL");
    assert!(said.contains("every frame that the guests share is in use"), "{said}");
    running.signal(libc::SIGINT);
    let (status, said) = running.end();
    assert_eq!(status, 128 + libc::SIGKILL, "{said}");
    for n in 1..3 {
        assert!(said.contains(&format!("guest {n} was ended by SIGINT")), "{said}");
    }
    assert!(said.contains("audits clean"), "{said}");
}

#[test]
fn numbers_of_several_guests_are_an_object_a_guest_and_those_of_one_are_as_they_were() {
    if !guests() {
        return;
    }
    let stats = |options: &[&str]| {
        let output = finish(&mut run(options, &["touch", "--pages", "300"]), b"", LIMIT);
        assert_eq!(code(output.status), 0, "{}", stderr(&output));
        stderr(&output)
    };
    let one: Value = serde_json::from_str(&stats(&["--guests", "1", "--stats=json"])).unwrap();
    assert!(one["guests"].is_null() && one["guest"].is_null() && one["pf_taken"].is_u64(), "{one}");
    let all: Value =
        serde_json::from_str(&stats(&["--guests", "3", "--memory", "8M", "--stats=json"])).unwrap();
    let guests = all["guests"].as_array().unwrap();
    assert_eq!(guests.len(), 3);
    for (number, guest) in guests.iter().enumerate() {
        assert_eq!((&guest["guest"], &guest["exit_status"]), (&number.into(), &0.into()), "{guest}");
        // Each touched its own pages; the frames are everyone's.
        assert!(guest["demand_pages"].as_u64() > Some(0) && guest["frames"] == 3 * 2048, "{guest}");
        for key in one.as_object().unwrap().keys() {
            assert!(!guest[key].is_null(), "{key} is missing in {guest}");
        }
    }
    let text = stats(&["--guests", "2", "--memory", "8M", "--stats"]);
    for heading in ["guest 0, exit status 0\numbra: ran", "guest 1, exit status 0\numbra: ran"] {
        assert!(text.contains(heading), "{text}");
    }
    assert!(!stats(&["--stats"]).contains("guest 0"));
}

#[test]
fn every_pool_is_large_enough_or_said_to_be_too_small() {
    if !guests() {
        return;
    }
    let elf = guest_images::find("hello").unwrap().elf;
    let arguments =
        Arguments { exe: b"/hello".to_vec(), args: vec![b"hello".to_vec()], env: vec![], random: None };
    let program = Program { elf: elf.into(), arguments };
    let config = VmConfig::new(vmm::cli::engine(), 1 << 20);
    let mut refused = 0;
    for pages in 1.. {
        match Fleet::new(2, Some(pages * PAGE_SIZE), config.clone(), &program) {
            Ok(_) => break,
            Err(error) => {
                let line = format!("{error:#}");
                assert!(
                    line.contains("too small to start 2 guests") && !line.contains('\n'),
                    "{pages}: {line}"
                );
                refused += 1;
            }
        }
    }
    assert!(refused > 10, "{refused}");
}

#[test]
fn bad_numbers_of_guests_and_what_shows_one_guest_are_refused_in_one_line() {
    for (options, status, words) in [
        (&["--guests", "0"][..], 2, &["1..=64"][..]),
        (&["--guests", "65"], 2, &["1..=64"]),
        (&["--guests", "some"], 2, &["--guests"]),
        (&["--pool", "64M"], 2, &["--guests"]),
        (&["--guests", "2", "--pool", "1K"], 2, &["1M"]),
        (&["--guests", "2", "--wss"], 2, &["--wss", "--guests 2"]),
        (&["--guests", "2", "--age", "1s"], 2, &["--age"]),
        (&["--guests", "2", "--heatmap", "x.svg"], 2, &["--heatmap"]),
        (&["--guests", "2", "--dirty-rate"], 2, &["--dirty-rate"]),
        (&["--guests", "2", "--trace", "notifier"], 2, &["--trace"]),
        (&["--guests", "64", "--memory", "1T"], 2, &["64 guests", "16T", "--pool"]),
        (&["--guests", "2", "--adopt-demo"], 2, &["--adopt-demo"]),
    ] {
        let output = finish(&mut run(options, &["hello"]), b"", LIMIT);
        let said = stderr(&output);
        assert_eq!(code(output.status), status, "{options:?}: {said}");
        assert!(output.stdout.is_empty());
        for word in words {
            assert!(said.contains(word), "no `{word}` in: {said}");
        }
        // clap says what the usage is; umbra's own are one line.
        assert!(said.starts_with("error: ") || said.trim_end().lines().count() == 1, "{said}");
    }
    if !guests() {
        return;
    }
    let output = finish(&mut run(&["--guests", "64", "--pool", "1M"], &["hello"]), b"", LIMIT);
    let said = stderr(&output);
    assert_eq!((code(output.status), said.trim_end().lines().count()), (125, 1), "{said}");
    assert!(said.contains("too small") && said.contains("--pool"), "{said}");
}
