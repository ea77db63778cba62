// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `umbra run --trace`: what a known guest makes its address space tell, and that the guest does not notice.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use common::{STATIC, cc, code, finish, folder, full, guests, kvm, run, stderr, umbra};
use serde_json::Value;
use std::ffi::CString;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(60);

fn objects(trace: &str) -> Vec<Value> {
    trace
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("no JSON: {line}")))
        .collect()
}

/// Whether an event is about part of `[start, end)`.
fn within(event: &Value, start: u64, end: u64) -> bool {
    event["start"].as_u64().is_some_and(|first| first < end) && event["end"].as_u64().unwrap() > start
}

#[test]
fn a_guest_runs_as_without_and_every_event_is_one_object() {
    if !guests() {
        return;
    }
    let plain = finish(&mut run(&[], &["hello"]), b"", LIMIT);
    let traced = finish(&mut run(&["--trace", "notifier=json"], &["hello"]), b"", LIMIT);
    assert_eq!(traced.stdout, plain.stdout);
    assert_eq!(code(traced.status), 0);
    let events = objects(&stderr(&traced));
    for event in &events {
        assert!(event["time_ns"].is_u64(), "{event}");
        assert_eq!(event["duration_ns"].is_u64(), event["op"] == "invalidate", "{event}");
        assert_eq!(event["blockable"].is_boolean(), event["op"] == "invalidate", "{event}");
        assert_eq!(event["pte"].is_object(), event["op"] == "change_pte", "{event}");
        if event["op"] != "release" {
            let bytes = event["end"].as_u64().unwrap() - event["start"].as_u64().unwrap();
            assert_eq!(event["pages"].as_u64().unwrap() * 4096, bytes, "{event}");
        }
    }
    // It maps and unmaps three pages.
    assert!(events.iter().any(|it| it["reason"] == "Unmap" && it["pages"] == 3 && it["tid"].is_i64()));
    let last = events.last().unwrap();
    assert!(last["op"] == "release" && last["tid"].is_null(), "{last}");
}

#[test]
fn reasons_and_ranges_are_those_of_the_guests_calls() {
    if !guests() {
        return;
    }
    // Each page is touched between two calls, so that there is something to take away.
    let source = r#"
        #define _GNU_SOURCE
        #include <stdio.h>
        #include <sys/mman.h>
        #include <unistd.h>
        int main() {
            volatile char *p = mmap(0, 8 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            for (int i = 0; i < 8; i++) p[i * 4096] = i;
            mprotect((void *)p, 8 * 4096, PROT_READ);
            madvise((void *)(p + 4096), 2 * 4096, MADV_DONTNEED);
            munmap((void *)(p + 3 * 4096), 5 * 4096);
            // What is at the new place goes first.
            mremap((void *)p, 2 * 4096, 2 * 4096, MREMAP_MAYMOVE | MREMAP_FIXED, (void *)(p + 2 * 4096));
            printf("%lu %d\n", (unsigned long)p, getpid());
            return 7;
        }"#;
    let program = cc(&folder("trace-calls"), "calls", source, STATIC);
    let output = finish(&mut run(&["--trace", "notifier=json"], &[program]), b"", LIMIT);
    assert_eq!(code(output.status), 7);
    let said = String::from_utf8(output.stdout.clone()).unwrap();
    let (at, pid) = said.trim().split_once(' ').unwrap();
    let (at, pid): (u64, i64) = (at.parse().unwrap(), pid.parse().unwrap());
    let pairs: Vec<_> = objects(&stderr(&output))
        .into_iter()
        .filter(|event| event["op"] == "invalidate" && within(event, at, at + 8 * 4096))
        .map(|event| {
            assert_eq!(event["tid"], pid, "{event}");
            let page = (event["start"].as_u64().unwrap() - at) / 4096;
            (event["reason"].as_str().unwrap().to_owned(), page, event["pages"].as_u64().unwrap())
        })
        .collect();
    let pair = |reason: &str, page, pages| (reason.to_owned(), page, pages);
    assert_eq!(
        pairs,
        [
            pair("ProtectionVma", 0, 8),
            pair("Clear", 1, 2),
            pair("Unmap", 3, 5),
            pair("Unmap", 2, 2),
            pair("Unmap", 0, 2)
        ]
    );
}

#[test]
fn text_has_its_columns() {
    if !guests() {
        return;
    }
    let output = finish(&mut run(&["--trace", "notifier"], &["hello"]), b"", LIMIT);
    let said = stderr(&output);
    let range_column = said.lines().next().unwrap().find('[').unwrap();
    for line in said.lines() {
        assert_eq!(&line[12..14], " s", "{line}");
        assert_eq!(line.trim_end(), line, "{line}");
        let words: Vec<_> = line.split_whitespace().collect();
        words[0].parse::<f64>().unwrap();
        if line.contains(" release ") {
            assert_eq!(words[2..], ["umbra", "release", "-", "-"], "{line}");
            continue;
        }
        assert_eq!(words[2], "tid", "{line}");
        assert_eq!(line.find('['), Some(range_column), "{line}");
        if words[4] == "invalidate" {
            assert!(["Unmap", "Clear"].contains(&words[5]) && line.ends_with(" us"), "{line}");
        } else {
            assert_eq!(words[5], "-", "{line}");
        }
    }
    let lines = |op: &str| said.lines().filter(|line| line.contains(op)).count();
    assert!(lines(" invalidate ") > 0 && lines(" change_pte ") > 0, "{said}");
    assert_eq!(lines(" invalidate_range "), 0, "it only repeats the ends:\n{said}");
}

#[test]
fn a_trace_is_whole_when_the_guest_dies_and_says_what_the_report_says() {
    if !guests() {
        return;
    }
    let source = r#"
        #include <sys/mman.h>
        int main() {
            volatile char *p = mmap(0, 5 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            p[0] = 1;
            munmap((void *)p, 5 * 4096);
            return p[0];
        }"#;
    let folder = folder("trace-death");
    let program = cc(&folder, "death", source, STATIC);
    let path = folder.join("trace");
    std::fs::write(&path, "an older trace\n").unwrap();
    let options = ["--trace", "notifier", "--trace-file", path.to_str().unwrap()];
    let output = finish(&mut run(&options, &[program]), b"", LIMIT);
    assert_eq!(code(output.status), 128 + libc::SIGSEGV);
    let (said, trace) = (stderr(&output), std::fs::read_to_string(&path).unwrap());
    assert!(!trace.contains("an older trace"));
    assert!(trace.lines().last().unwrap().contains(" release "), "{trace}");
    assert!(!said.contains(" release "), "the trace goes to the file only:\n{said}");
    // But for times, which two listeners see a little apart, the report's lines are lines of the trace.
    let what = |line: &str| line[line.find(" s  ").unwrap()..].rsplit_once("  ").unwrap().0.to_owned();
    let traced: Vec<_> = trace.lines().map(what).collect();
    let reported: Vec<_> =
        said.lines().skip_while(|line| !line.contains("last notifier events")).skip(1).collect();
    assert!(reported.iter().any(|line| line.contains("Unmap") && line.contains("5 pages")), "{said}");
    for line in reported {
        assert!(traced.contains(&what(line)), "{line}\nis not in\n{trace}");
    }
}

#[test]
fn a_guest_does_not_wait_for_its_trace() {
    if !guests() {
        return;
    }
    let mut command = run(&["--trace", "notifier=json"], &["torture", "1", "--ops", "3000"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let (mut stdout, mut trace) = (BufReader::new(child.stdout.take().unwrap()), String::new());
    let (tell, told) = mpsc::channel();
    std::thread::spawn(move || {
        let mut line = String::new();
        let _ = tell.send(stdout.read_line(&mut line).map(|_| line));
    });
    // Nobody reads the trace, and it is larger than a pipe, but the guest comes to its last line.
    let Ok(line) = told.recv_timeout(LIMIT) else {
        child.kill().unwrap();
        panic!("the guest waits for its trace");
    };
    let line = line.unwrap();
    assert!(line.starts_with("torture seed 1: 3000 ops"), "{line}");
    child.stderr.take().unwrap().read_to_string(&mut trace).unwrap();
    assert!(trace.len() > 1 << 16, "{} bytes: too few to fill a pipe", trace.len());
    assert_eq!(objects(&trace).last().unwrap()["op"], "release");
    assert_eq!(code(child.wait().unwrap()), 0);
}

#[test]
fn a_trace_that_cannot_be_written_is_told_and_the_status_is_the_guests() {
    if !guests() {
        return;
    }
    let Some(full) = full() else { return };
    let options = ["--trace", "notifier", "--trace-file", full];
    let output = finish(&mut run(&options, &["hello"]), b"", LIMIT);
    assert_eq!(code(output.status), 0);
    assert!(stderr(&output).starts_with("umbra: the trace is not complete: "), "{}", stderr(&output));
}

#[test]
fn the_demo_too_says_that_its_trace_cannot_be_written() {
    if !kvm() {
        return;
    }
    let Some(full) = full() else { return };
    for limit in ["60", "0.000001"] {
        let options = ["--adopt-demo", "--timeout", limit, "--trace", "notifier", "--trace-file", full];
        let output = finish(umbra().arg("run").args(options).env("RUST_LOG", "off"), b"", LIMIT);
        assert!(stderr(&output).contains("umbra: the trace is not complete: "), "{}", stderr(&output));
    }
}

/// A FIFO of one page, and its read end.
fn fifo(folder: &Path) -> (PathBuf, File) {
    let path = folder.join("fifo");
    let name = CString::new(path.as_os_str().as_bytes()).unwrap();
    // SAFETY: the name is a C string.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0, "{}", std::io::Error::last_os_error());
    let reader = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
    // SAFETY: a descriptor of ours.
    assert!(unsafe { libc::fcntl(reader.as_raw_fd(), libc::F_SETPIPE_SZ, 4096) } >= 4096);
    (path, reader)
}

/// Sends SIGTERM until it has ended `child`.
fn terminate(child: &mut Child) -> ExitStatus {
    let began = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if began.elapsed() > LIMIT {
            child.kill().unwrap();
            panic!("umbra does not end");
        }
        // SAFETY: our child, which was not waited for yet.
        unsafe { libc::kill(child.id() as i32, libc::SIGTERM) };
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_reader_that_stopped_does_not_keep_umbra_from_being_ended() {
    if !guests() {
        return;
    }
    let (path, reader) = fifo(&folder("trace-stopped-reader"));
    let options = ["--trace", "notifier", "--trace-file", path.to_str().unwrap()];
    let mut command = run(&options, &["torture", "1", "--ops", "3000"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut said = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut said).unwrap();
    assert!(said.starts_with("torture seed 1: 3000 ops"), "{said}");
    // Its last words; by now the FIFO is full, so the trace never ends.
    let status = terminate(&mut child);
    assert_eq!(status.signal(), Some(libc::SIGTERM), "by the signal, not at the guest's end: {status}");
    drop(reader);
}

#[test]
fn umbra_can_be_ended_while_a_fifo_has_no_reader() {
    let (path, reader) = fifo(&folder("trace-no-reader"));
    drop(reader);
    let options = ["--trace", "notifier", "--trace-file", path.to_str().unwrap()];
    let mut child = run(&options, &["hello"]).stdout(Stdio::null()).spawn().unwrap();
    // It sleeps when it opens the FIFO, and not before.
    let stat = format!("/proc/{}/stat", child.id());
    while !std::fs::read_to_string(&stat).unwrap().contains(") S ") {
        assert!(child.try_wait().unwrap().is_none(), "it ended without a reader");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(terminate(&mut child).signal(), Some(libc::SIGTERM));
}

#[test]
fn bad_options_are_explained() {
    for (options, words) in [
        (&["--trace", "nonsense"][..], &["`nonsense`", "notifier", "notifier=json"][..]),
        (&["--trace", "notifier,nonsense"], &["`nonsense`", "notifier=json"]),
        (&["--trace", "notifier,notifier"], &["twice"]),
        (&["--trace", "notifier=xml"], &["`notifier=xml`", "notifier=json"]),
        (&["--trace-file", "trace"], &["--trace <LIST>"]),
    ] {
        let output = finish(&mut run(options, &["hello"]), b"", LIMIT);
        assert_eq!(code(output.status), 2, "{options:?}");
        for word in words {
            assert!(stderr(&output).contains(word), "no `{word}` in: {}", stderr(&output));
        }
    }
    let options = ["--trace", "notifier", "--trace-file", "/nonexistent/folder/trace"];
    let output = finish(&mut run(&options, &["hello"]), b"", LIMIT);
    assert_eq!(code(output.status), 125);
    assert!(stderr(&output).contains("/nonexistent/folder/trace"), "{}", stderr(&output));
}

#[test]
fn a_pass_of_aging_is_a_line_for_each_block() {
    if !guests() {
        return;
    }
    // The only pass is the one at the end: the program's block and the stack's.
    let options = ["--age", "600m", "--trace", "notifier=json"];
    let output = finish(&mut run(&options, &["hello"]), b"", LIMIT);
    let asked = objects(&stderr(&output)).into_iter().filter(|event| event["op"] == "test_clear_young");
    let asked: Vec<_> = asked
        .map(|event| {
            let members: Vec<_> = event.as_object().unwrap().keys().cloned().collect();
            assert_eq!(members, ["end", "op", "pages", "start", "tid", "time_ns"]);
            (event["start"].as_u64().unwrap(), event["pages"].as_u64().unwrap())
        })
        .collect();
    assert_eq!(asked, [(0, 8192), (0x7fff_fe00_0000, 8192)]);
}

#[test]
fn help_names_every_field_of_the_json() {
    let output = umbra().args(["run", "--help"]).output().unwrap();
    let help = String::from_utf8(output.stdout).unwrap();
    for word in [
        "time_ns",
        "tid",
        "op",
        "reason",
        "start",
        "end",
        "pages",
        "blockable",
        "duration_ns",
        "pte",
        "lost",
        "test_clear_young",
    ] {
        assert!(help.contains(word), "no `{word}` in:\n{help}");
    }
}
