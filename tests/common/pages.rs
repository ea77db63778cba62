// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest whose accesses are known page by page, and what umbra reports of it while it runs and at its end.

use super::{STATIC, cc, code, finish, folder, run, stderr};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, Output, Stdio};
use std::time::{Duration, Instant};
use vmm::engine::{EngineConfig, Marks, choice};

const LIMIT: Duration = Duration::from_secs(60);
/// An interval so long that the only pass, and the only reading, is the one at the end.
pub const NEVER: &str = "600m";

/// How exactly A says what was accessed, on this host with `--ad-bits BITS`.
#[allow(dead_code, reason = "not every test looks at A")]
pub fn marks(bits: &str) -> Marks {
    if bits == "off" {
        // Accesses are faults.
        return Marks::Exact;
    }
    let config = EngineConfig { choice: super::engine().into(), ..vmm::cli::engine() };
    choice::trial(&config).unwrap().marks()
}

/// Every report of this kind on stderr.
pub fn reports(said: &str, kind: &str) -> Vec<Value> {
    let objects = said.lines().filter(|line| line.starts_with('{'));
    let objects =
        objects.map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("no JSON: {line}")));
    objects.filter(|object: &Value| object["report"] == kind).collect()
}

/// The row of the mapping that holds `at`.
pub fn row(report: &Value, at: u64) -> Option<&Value> {
    report["vmas"].as_array().unwrap().iter().find(|row| {
        row["start"].as_u64().is_some_and(|start| start <= at)
            && row["end"].as_u64().is_some_and(|end| at < end)
    })
}

/// A program that maps 64 pages, prints where, and does as told: `touch N`: write the first N, once; `keep N`: then go on
/// writing the N pages behind those, and reading the rest of 32, until its input ends; `cow N`: read N pages, then write
/// them.
pub fn program(test: &str) -> PathBuf {
    let source = r#"
        #define _GNU_SOURCE
        #include <poll.h>
        #include <stdio.h>
        #include <stdlib.h>
        #include <string.h>
        #include <sys/mman.h>
        int main(int argc, char **argv) {
            // On a boundary of 256 KiB, so that a block of that size is this mapping and nothing else.
            char *all = mmap(0, 128 * 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            volatile char *p = (char *)(((unsigned long)all + 0x3ffff) & ~0x3ffffUL);
            mprotect((void *)p, 64 * 4096, PROT_READ | PROT_WRITE);
            printf("%lu\n", (unsigned long)p);
            fflush(stdout);
            for (int arg = 1; arg + 1 < argc; arg += 2) {
                int n = atoi(argv[arg + 1]);
                if (!strcmp(argv[arg], "touch")) for (int i = 0; i < n; i++) p[i * 4096] = 1;
                if (!strcmp(argv[arg], "cow")) {
                    for (int i = 0; i < n; i++) (void)p[i * 4096];
                    for (int i = 0; i < n; i++) p[i * 4096] = 1;
                }
                if (!strcmp(argv[arg], "keep")) {
                    struct pollfd in = { 0, POLLIN, 0 };
                    while (poll(&in, 1, 0) == 0) for (int i = 0; i < 32; i++)
                        if (i < n) p[(16 + i) * 4096]++; else (void)p[(16 + i) * 4096];
                }
            }
            return 0;
        }"#;
    cc(&folder(test), "pages", source, STATIC)
}

/// Runs [`program`] with these options, and returns where its pages are too.
pub fn pages(test: &str, options: &[&str], args: &[&str]) -> (Output, u64) {
    let mut command = run(options, &[program(test)]);
    let output = finish(command.args(args), b"", LIMIT);
    assert_eq!(code(output.status), 0, "{}", stderr(&output));
    let at = String::from_utf8_lossy(&output.stdout).trim().parse().unwrap();
    (output, at)
}

/// A guest that runs until its stdin is dropped.
pub struct Running {
    pub child: Child,
    stderr: BufReader<std::process::ChildStderr>,
    pub at: u64,
}

impl Running {
    pub fn start(test: &str, options: &[&str], args: &[&str]) -> Self {
        // The limit is for a report that never comes.
        let mut command = run(&[options, &["--timeout", "60s"]].concat(), &[program(test)]);
        command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        Self { child, stderr, at: line.trim().parse().unwrap() }
    }

    pub fn signal(&self, signal: i32) {
        // SAFETY: our child, which was not waited for yet.
        assert_eq!(unsafe { libc::kill(self.child.id() as i32, signal) }, 0);
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        assert!(self.stderr.read_line(&mut line).unwrap() > 0, "umbra has ended");
        line
    }

    /// Reads reports of a kind until one is as it must be. `ask`: what makes a further one come.
    pub fn await_report(&mut self, kind: &str, ask: impl Fn(&Self), good: impl Fn(&Value) -> bool) -> Value {
        let began = Instant::now();
        loop {
            ask(self);
            let report: Value = serde_json::from_str(&self.line()).unwrap();
            if report["report"] == kind && good(&report) {
                return report;
            }
            assert!(began.elapsed() < LIMIT, "the last is still {report}");
        }
    }

    /// Ends the guest; what else was said.
    pub fn end(mut self) -> String {
        drop(self.child.stdin.take());
        let mut rest = String::new();
        self.stderr.read_to_string(&mut rest).unwrap();
        assert_eq!(code(self.child.wait().unwrap()), 0, "{rest}");
        rest
    }
}
