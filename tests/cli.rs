// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The command line, and what it says of bad input: one clear line, the documented exit status, no backtrace.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use common::{STATIC, cc, code, engine, finish, folder, full, guests, has, kvm, run, stderr, umbra, wait};
use std::fs::{File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::Duration;
use vmm::engine::EngineKind;

const LIMIT: Duration = Duration::from_secs(60);
const FAILED: i32 = 125;

/// One line from umbra that holds all of `words`, and the exit status of its own failures.
fn assert_refused(output: &Output, words: &[&str]) {
    let said = stderr(output);
    assert_eq!(code(output.status), FAILED, "{said}");
    assert_eq!(said.trim_end().lines().count(), 1, "{said}");
    assert!(said.starts_with("umbra: "), "{said}");
    for word in words {
        assert!(said.contains(word), "no `{word}` in: {said}");
    }
}

fn file(test: &str, bytes: &[u8]) -> PathBuf {
    let path = folder(test).join("program");
    std::fs::write(&path, bytes).unwrap();
    path
}

/// A good ELF file to be spoilt: the bundled `hello`.
fn hello() -> Vec<u8> {
    guest_images::find("hello").unwrap().elf.to_vec()
}

fn refused_elf(test: &str, elf: &[u8], words: &[&str]) {
    if guests() {
        assert_refused(&finish(&mut run(&[], &[file(test, elf)]), b"", LIMIT), words);
    }
}

/// Offset of program header `index` of a 64-bit ELF.
fn program_header(elf: &[u8], index: usize) -> usize {
    let table = u64::from_le_bytes(elf[32..40].try_into().unwrap()) as usize;
    table + index * 56
}

/// Offsets of the PT_LOAD headers.
fn load_headers(elf: &[u8]) -> Vec<usize> {
    let count = u16::from_le_bytes([elf[56], elf[57]]) as usize;
    (0..count).map(|n| program_header(elf, n)).filter(|&at| elf[at..at + 4] == [1, 0, 0, 0]).collect()
}

#[test]
fn no_kvm_device() {
    let mut command = run(&["--engine", "kvm"], &["hello"]);
    let output = finish(command.env("UMBRA_KVM_DEVICE", "/nonexistent/kvm"), b"", LIMIT);
    assert_refused(&output, &["cannot use KVM", "/nonexistent/kvm does not exist"]);
}

#[test]
fn a_device_that_is_not_kvm() {
    let output =
        finish(run(&["--engine", "kvm"], &["hello"]).env("UMBRA_KVM_DEVICE", "/dev/null"), b"", LIMIT);
    assert_refused(&output, &["/dev/null"]);
}

/// Without a device, `auto` takes ptrace and says so in one line; where that cannot be had either, one line says why of both.
#[test]
fn auto_without_a_device_takes_ptrace_or_says_why_neither() {
    let mut command = run(&[], &["hello"]);
    command.env("UMBRA_KVM_DEVICE", "/nonexistent/kvm").env("UMBRA_ENGINE", "auto");
    let output = finish(&mut command, b"", LIMIT);
    let said = stderr(&output);
    match vmm::engine::ptrace::probe() {
        Ok(()) => {
            assert_eq!((code(output.status), said.lines().count()), (0, 1), "{said}");
            assert!(said.contains("/nonexistent/kvm") && said.contains("page faults"), "{said}");
        }
        Err(error) => assert_refused(&output, &["/nonexistent/kvm does not exist", &error.to_string()]),
    }
}

#[test]
fn the_engine_is_the_options_or_else_the_environments() {
    let stats = |options: &[&str], environment: &str| {
        let mut command = run(&[options, &["--stats=json"]].concat(), &["hello"]);
        let output = finish(command.env("UMBRA_ENGINE", environment), b"", LIMIT);
        let line = stderr(&output).lines().find(|line| line.starts_with('{')).map(str::to_owned);
        let stats: Option<serde_json::Value> = line.map(|line| serde_json::from_str(&line).unwrap());
        (code(output.status), stats, stderr(&output))
    };
    let (status, _, said) = stats(&[], "xen");
    assert!(status == 2 && said.contains("UMBRA_ENGINE is `xen`") && said.lines().count() == 1, "{said}");
    let (status, _, said) = stats(&["--engine", "xen"], "kvm");
    assert!(status == 2 && said.contains("auto, kvm, ptrace"), "{said}");
    if kvm() {
        for (options, environment) in
            [(&[][..], "kvm"), (&["--engine", "kvm"], "ptrace"), (&["--engine=auto"], "ptrace")]
        {
            let (status, stats, said) = stats(options, environment);
            assert_eq!(status, 0, "{said}");
            let stats = stats.unwrap();
            assert_eq!(stats["engine"], "kvm", "{said}");
            assert_ne!(stats["kvm_backend"], "none", "{said}");
        }
    }
    for (options, environment) in [(&[][..], "ptrace"), (&["--engine", "ptrace"], "kvm")] {
        let (status, stats, said) = stats(options, environment);
        match vmm::engine::ptrace::probe() {
            Ok(()) => {
                let stats = stats.unwrap();
                assert_eq!((status, &stats["engine"]), (0, &"ptrace".into()), "{said}");
                assert_eq!(stats["kvm_backend"], "none", "{said}");
            }
            Err(error) => assert!(status == FAILED && said.contains(&error.to_string()), "{said}"),
        }
    }
}

#[test]
fn no_permission() {
    // SAFETY: takes nothing and touches no memory.
    if unsafe { libc::geteuid() } != 0 {
        println!("skipped: needs root to give up its rights");
        return;
    }
    // Another user, who can reach the files but may not open that one.
    let [copy, device] = ["umbra", "device"]
        .map(|name| std::env::temp_dir().join(format!("umbra-no-permission-{name}-{}", std::process::id())));
    // Not by this process: who forks here meanwhile would keep it open for writing, and such a file cannot be executed.
    let copied = Command::new("cp").arg(env!("CARGO_BIN_EXE_umbra-under-test")).arg(&copy).status().unwrap();
    assert!(copied.success());
    std::fs::write(&device, b"").unwrap();
    std::fs::set_permissions(&copy, Permissions::from_mode(0o755)).unwrap();
    std::fs::set_permissions(&device, Permissions::from_mode(0o600)).unwrap();
    let mut command = Command::new(&copy);
    command.args(["run", "--engine", "kvm", "hello"]).env("UMBRA_KVM_DEVICE", &device).uid(65534).gid(65534);
    let output = finish(&mut command, b"", LIMIT);
    std::fs::remove_file(&copy).unwrap();
    std::fs::remove_file(&device).unwrap();
    assert_refused(&output, &["no permission"]);
}

/// Who starts umbra has the status of it, whether anybody can read what it says or not.
#[test]
fn a_stderr_that_takes_nothing_changes_no_status() {
    if !guests() {
        return;
    }
    let mut lines = vec![
        "inject oom-at-5th --report -- run touch",
        "inject oom-at-5th --report=json -- run touch",
        "inject nosuch -- run hello",
        "run --check hello",
        "run --stats hello",
        "run --deterministic hello",
        "run --deterministic --seeds 1..3 hello",
        "run --foo hello",
    ];
    if engine() == EngineKind::Kvm {
        lines.push("run --adopt-demo --timeout 0.000001");
    }
    for line in lines {
        let status = |stderr: Stdio| {
            let mut command = umbra();
            command.args(line.split_whitespace()).stdout(Stdio::null()).stderr(stderr);
            code(wait(&mut command.spawn().unwrap(), LIMIT, command))
        };
        let expected = status(Stdio::null());
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        assert_eq!(status(writer.into()), expected, "{line}, and nobody reads");
        if let Some(full) = full() {
            let full = File::options().write(true).open(full).unwrap();
            assert_eq!(status(full.into()), expected, "{line}, and there is no room");
        }
    }
}

#[test]
fn no_such_program() {
    assert_refused(
        &finish(&mut run(&[], &["./no-such-file"]), b"", LIMIT),
        &["./no-such-file", "no such file"],
    );
    assert_refused(&finish(&mut run(&[], &["helo"]), b"", LIMIT), &["helo", "umbra images"]);
}

#[test]
fn not_an_elf() {
    let words = ["/program: not an ELF file", "a static x86-64 ELF program is needed"];
    refused_elf("text", b"#!/bin/sh\necho no\n", &words);
    refused_elf("empty", b"", &words);
}

#[test]
fn a_dynamic_elf() {
    if !guests() {
        return;
    }
    let folder = folder("dynamic");
    let program = cc(&folder, "dynamic", "int main() { return 0; }", &[]);
    assert_refused(
        &finish(&mut run(&[], &[program]), b"", LIMIT),
        &["/dynamic: a dynamic program", "a static x86-64 ELF program is needed", "gcc -static"],
    );
}

/// What is wrong with the program is said first, and alone: it does not depend on an engine.
#[test]
fn a_program_is_looked_at_before_an_engine_is() {
    let program = file("no-program", b"no");
    for engine in ["auto", "kvm"] {
        let mut command = run(&["--engine", engine], &[&program]);
        let output = finish(command.env("UMBRA_KVM_DEVICE", "/nonexistent/kvm"), b"", LIMIT);
        assert_refused(&output, &["/program: not an ELF file"]);
    }
}

#[test]
fn where_kvm_is_missing_umbra_says_what_the_documentation_says() {
    if !has(EngineKind::Ptrace) {
        return;
    }
    let mut command = run(&["--engine", "auto"], &["hello"]);
    let output = finish(command.env("UMBRA_KVM_DEVICE", "/nonexistent/kvm"), b"", LIMIT);
    assert_eq!(code(output.status), 0, "{}", stderr(&output));
    let said = stderr(&output).replace("/nonexistent/kvm", "/dev/kvm");
    let document = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/engines.md");
    let document = std::fs::read_to_string(document).unwrap();
    assert!(document.contains(&format!("```text\n{said}```")), "docs/engines.md does not say: {said}");
}

#[test]
fn an_answer_that_cannot_be_written_is_a_failure_that_says_so() {
    let full = || std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut commands =
        vec!["images", "images --json", "inject --list", "inject --list --json", "doctor --rounds 1 --json"];
    if kvm() {
        commands.push("run --adopt-demo --engine kvm");
    }
    for words in commands {
        let mut command = umbra();
        command.args(words.split_whitespace()).stdout(full()).stderr(Stdio::piped());
        let output = command.spawn().unwrap().wait_with_output().unwrap();
        assert_refused(&output, &["umbra: cannot write to stdout: No space left on device"]);
        // A reader that is gone knows.
        if !words.starts_with("run") {
            let (reader, writer) = std::io::pipe().unwrap();
            drop(reader);
            let mut command = umbra();
            command.args(words.split_whitespace()).stdout(writer).stderr(Stdio::piped());
            let output = command.spawn().unwrap().wait_with_output().unwrap();
            assert_eq!((code(output.status), stderr(&output).as_str()), (FAILED, ""), "{words}");
        }
    }
}

/// By its name, so that who wrote the program knows what it misses.
#[test]
fn a_call_that_is_missing_is_named_once() {
    if !guests() {
        return;
    }
    let source = "#include <sys/syscall.h>\n#include <unistd.h>\n\
                  int main() { for (int i = 0; i < 9; i++) { syscall(SYS_epoll_create1, 0); syscall(SYS_rseq, 0, 0, 0, 0); } }";
    let program = cc(&folder("missing-call"), "missing", source, STATIC);
    let output = finish(&mut run(&[], &[program]), b"", LIMIT);
    let said = stderr(&output);
    assert_eq!((code(output.status), said.lines().count()), (0, 1), "{said}");
    assert!(said.contains("system call 291 (epoll_create1), which is not implemented: ENOSYS"), "{said}");
}

#[test]
fn a_wrong_machine() {
    let mut elf = hello();
    elf[18..20].copy_from_slice(&183u16.to_le_bytes()); // EM_AARCH64
    refused_elf("machine", &elf, &["machine", "x86"]);
    let mut elf = hello();
    elf[4] = 1; // ELFCLASS32
    refused_elf("class", &elf, &["64"]);
}

#[test]
fn truncated_files() {
    let elf = hello();
    refused_elf("cut-header", &elf[..40], &[]);
    let last = *load_headers(&elf).last().unwrap();
    let offset = u64::from_le_bytes(elf[last + 8..last + 16].try_into().unwrap()) as usize;
    refused_elf("cut-segment", &elf[..offset.max(200) - 1], &[]);
}

#[test]
fn overlapping_segments() {
    let mut elf = hello();
    let loads = load_headers(&elf);
    let (first, second) = (loads[0], loads[1]);
    let address: Vec<u8> = elf[first + 16..first + 24].to_vec();
    elf[second + 16..second + 24].copy_from_slice(&address);
    refused_elf("overlap", &elf, &["segment"]);
}

#[test]
fn a_writable_and_executable_segment() {
    let mut elf = hello();
    let first = load_headers(&elf)[0];
    elf[first + 4] = 7;
    refused_elf("wx", &elf, &["writable and executable"]);
}

#[test]
fn an_entry_outside() {
    let mut elf = hello();
    elf[24..32].copy_from_slice(&0x7000_0000u64.to_le_bytes());
    refused_elf("entry", &elf, &["entry"]);
}

#[test]
fn random_bytes_in_the_headers_never_do_harm() {
    if !guests() {
        return;
    }
    let good = hello();
    let path = file("fuzz", &good);
    let mut seed = 12345u64;
    for round in 0..60 {
        let mut elf = good.clone();
        for _ in 0..1 + round % 4 {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let at = (seed >> 33) as usize % 400.min(elf.len());
            elf[at] = (seed >> 24) as u8;
        }
        std::fs::write(&path, &elf).unwrap();
        let output = finish(&mut run(&["--timeout", "2s"], &[&path]), b"", LIMIT);
        let said = stderr(&output);
        assert!(!said.contains("panicked") && !said.contains("bug of umbra"), "round {round}: {said}");
    }
}

#[test]
fn more_memory_than_the_limit() {
    if !guests() {
        return;
    }
    let folder = folder("memory");
    // What is promised too much at once is refused, what is promised and used too much ends the guest, as on Linux.
    let source = r#"
        #include <errno.h>
        #include <stdio.h>
        #include <stdlib.h>
        #include <sys/mman.h>
        int main(int argc, char **argv) {
            if (argc > 1) for (;;) { char *p = malloc(1 << 20); if (p) for (int i = 0; i < 1 << 20; i += 4096) p[i] = 1; }
            void *p = mmap(0, 1UL << 30, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            printf("%s\n", p == MAP_FAILED && errno == ENOMEM ? "ENOMEM" : "mapped");
            return 0;
        }"#;
    let program = cc(&folder, "eat", source, STATIC);
    let program = program.to_str().unwrap();
    let refused = finish(&mut run(&["--memory", "32M"], &[program]), b"", LIMIT);
    assert_eq!((code(refused.status), refused.stdout), (0, b"ENOMEM\n".to_vec()));
    let killed = finish(&mut run(&["--memory", "32M", "--check"], &[program, "all"]), b"", LIMIT);
    assert_eq!(code(killed.status), 128 + libc::SIGKILL, "{}", stderr(&killed));
    assert!(stderr(&killed).contains("out of memory"), "{}", stderr(&killed));
}

#[test]
fn a_program_that_does_not_fit_is_refused() {
    if !guests() {
        return;
    }
    let folder = folder("too-big");
    let program = cc(&folder, "big", "char big[64 << 20] = {1}; int main() { return big[0]; }", STATIC);
    let output = finish(&mut run(&["--memory", "4M"], &[program]), b"", LIMIT);
    let status = code(output.status);
    assert!(status == FAILED || status == 128 + libc::SIGKILL, "{status}: {}", stderr(&output));
}

#[test]
fn bad_options_are_explained_with_status_2() {
    for (options, word) in [
        (["--memory", "lots"], "256M"),
        (["--memory", "1K"], "1M"),
        (["--fault-around", "3K"], "power of two"),
        (["--env", "=x"], "name"),
        (["--timeout", "soon"], "seconds"),
        (["--no-such", "option"], "--no-such"),
    ] {
        let output = finish(&mut run(&options, &["hello"]), b"", LIMIT);
        assert_eq!(code(output.status), 2);
        assert!(stderr(&output).contains(word), "{}", stderr(&output));
    }
}

#[test]
fn help_teaches() {
    for args in [
        &["--help"][..],
        &["run", "--help"],
        &["images", "--help"],
        &["doctor", "--help"],
        &["bench", "--help"],
    ] {
        let output = umbra().args(args).output().unwrap();
        assert!(output.status.success());
        assert!(output.stdout.len() > 300, "{args:?}");
    }
}

#[test]
fn the_usage_of_run_names_the_program_once_and_its_arguments_after_it() {
    let usage = |text: &str| -> Vec<String> {
        let lines = text.lines().skip_while(|line| !line.starts_with("Usage:"));
        lines.take_while(|line| !line.is_empty()).map(|line| line.trim().to_owned()).collect()
    };
    let expected =
        ["Usage: umbra run [OPTIONS] <PROGRAM|IMAGE> [ARGS]...", "umbra run [OPTIONS] --adopt-demo"];
    let output = umbra().args(["run", "--help"]).output().unwrap();
    assert_eq!(usage(&String::from_utf8(output.stdout).unwrap()), expected);
    // Without a program there is nothing to run.
    let output = umbra().arg("run").output().unwrap();
    assert_eq!((code(output.status), usage(&stderr(&output))), (2, expected.map(str::to_owned).into()));
}

#[test]
fn options_behind_the_program_are_the_programs_own() {
    if !guests() {
        return;
    }
    let output = finish(&mut run(&[], &["touch", "--pages", "1", "--seed", "3"]), b"", LIMIT);
    assert_eq!(code(output.status), 0, "{}", stderr(&output));
}

#[test]
fn the_environment_is_what_env_gives() {
    if !guests() {
        return;
    }
    let source = "#include <stdio.h>\nextern char **environ;\nint main() { for (char **e = environ; *e; e++) puts(*e); }";
    let program = cc(&folder("env"), "env", source, STATIC);
    let mut command = run(&["--env", "A=1", "--env", "UMBRA_TEST"], &[program]);
    let output = finish(command.env("UMBRA_TEST", "two words").env("OTHER", "x"), b"", LIMIT);
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "A=1\nUMBRA_TEST=two words\n");
}

#[test]
fn doctor_says_what_is_there() {
    let output = umbra().args(["doctor", "--json"]).output().unwrap();
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(report["host"]["kernel"].is_string(), "{report}");
    if kvm() {
        assert!(output.status.success(), "{report}");
        assert_eq!((&report["engine"], &report["kvm"]["usable"]), (&"kvm".into(), &true.into()), "{report}");
        assert!(report["flush"]["chosen"].is_array() || report["flush"]["chosen"].is_string(), "{report}");
    }
    // It covers both, and one is enough.
    let traced = vmm::engine::ptrace::probe().is_ok();
    let hidden = |options: &[&str]| {
        let mut command = umbra();
        command.arg("doctor").args(options).env("UMBRA_KVM_DEVICE", "/nonexistent/kvm").output().unwrap()
    };
    let text = hidden(&[]);
    assert!(String::from_utf8_lossy(&text.stdout).contains("/nonexistent/kvm"));
    assert_eq!(code(text.status), i32::from(!traced));
    let report: serde_json::Value = serde_json::from_slice(&hidden(&["--json"]).stdout).unwrap();
    assert_eq!(
        (&report["kvm"]["usable"], &report["ptrace"]["usable"]),
        (&false.into(), &traced.into()),
        "{report}"
    );
    assert_eq!(report["engine"].as_str(), traced.then_some("ptrace"), "{report}");
    assert_eq!(report["ptrace"]["obstacle"].is_string(), !traced, "{report}");
}

#[test]
fn benchmarks_have_the_promised_shape() {
    if !guests() {
        return;
    }
    let output = finish(
        umbra().args(["bench", "fault", "--pages", "500", "--runs", "1", "--json"]),
        b"",
        Duration::from_secs(120),
    );
    assert_eq!(code(output.status), 0, "{}", stderr(&output));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["bench"], "fault");
    for key in ["engine", "kvm_backend", "kernel", "cpu", "cpus"] {
        assert!(!report["host"][key].is_null(), "{report}");
    }
    for row in report["rows"].as_array().unwrap() {
        assert!(row["min"].as_f64().unwrap() > 0.0 && row["unit"] == "us/page", "{row}");
        assert_eq!(row["runs"], 1);
    }
    let names: Vec<_> =
        report["rows"].as_array().unwrap().iter().map(|row| row["name"].as_str().unwrap()).collect();
    let first: &[_] = match engine() {
        EngineKind::Kvm => &["umbra", "umbra-no-fault-around", "kvm-demand-paging"],
        EngineKind::Ptrace => &["ptrace.umbra", "ptrace.umbra-no-fault-around", "native"],
    };
    assert!(names.starts_with(first), "{names:?}");
}

#[test]
fn the_notifier_benchmark_needs_no_kvm_and_has_the_promised_shape() {
    let output = finish(
        umbra()
            .args(["bench", "notifier", "--window", "1ms", "--runs", "1", "--json"])
            .env("UMBRA_KVM_DEVICE", "/nonexistent/kvm"),
        b"",
        LIMIT,
    );
    assert_eq!(code(output.status), 0, "{}", stderr(&output));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["bench"], "notifier");
    let rows = report["rows"].as_array().unwrap();
    for name in ["umbra.0", "rwlock.1", "arc-swap.4", "umbra.4.threads"] {
        let row = rows.iter().find(|row| row["name"] == name).expect(name);
        assert!(
            row["median"].as_f64().unwrap() > 0.0 && row["unit"] == "ns/pair" && row["runs"] == 1,
            "{row}"
        );
    }
    assert!(rows.iter().any(|row| row["name"] == "umbra.1.threads.throughput" && row["unit"] == "pairs/s"));
    for ratio in ["rwlock.1/umbra.1", "arc-swap.4.threads/umbra.4.threads", "umbra.1.threads.speedup"] {
        assert!(report["ratios"][ratio].as_f64().unwrap() > 0.0, "{ratio}");
    }
}

#[test]
fn the_ptrace_engine_refuses_what_it_does_not_have_in_one_line() {
    if !has(EngineKind::Ptrace) {
        return;
    }
    for words in [&["--adopt-demo"][..], &["--window", "userfaultfd", "hello"]] {
        let output = finish(&mut run(&["--engine", "ptrace"], words), b"", LIMIT);
        let said = stderr(&output);
        assert_eq!((code(output.status), said.lines().count()), (125, 1), "{words:?}: {said}");
        assert!(said.starts_with("umbra: the ptrace engine ") && said.contains("--engine kvm"), "{said}");
        assert_eq!(output.stdout, b"", "{words:?}");
    }
}
