// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guests that try to get out, or at umbra itself (the `attack` image; one attack a run), and umbra killed over guests that do
//! not want to end. Whatever the engine: each attack is contained, umbra does not fail, and nobody is left behind.
//!
//! What there is to see of the ptrace engine's child from outside is checked there only.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

#[path = "attack/child.rs"]
mod child;
#[path = "attack/processes.rs"]
mod processes;

use common::{code, finish, folder, guests, run, stderr};
use std::path::PathBuf;
use std::process::Output;
use std::sync::LazyLock;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(300);
/// Attacks that end the guest in a way of their own, with the statuses that are right.
const ENDS: [(&str, &[i32]); 4] = [
    ("exit-thread", &[7]),
    ("blocked-fault", &[SEGV]),
    ("no-altstack", &[SEGV]),
    // Where the frame of the signal does not fit either.
    ("protection-keys", &[0, SEGV]),
];
const SEGV: i32 = 128 + libc::SIGSEGV;
/// To code in the data segment. On nested PVM the transfer is let through, and a `syscall` there costs the vCPU.
const LOSES_A_PVM_VCPU: &str = "far-data";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Engine {
    Kvm,
    Ptrace,
}

/// What runs guests here, by what a run says; `None`, and one line, where nothing does.
fn engine() -> Option<Engine> {
    if !guests() {
        return None;
    }
    let hello = finish(&mut run(&["--stats=json"], &["hello"]), b"", LIMIT);
    let said = stderr(&hello);
    assert_eq!(code(hello.status), 0, "{said}");
    // An engine that was chosen for want of another says so in a line before.
    let stats =
        said.lines().find(|line| line.starts_with('{')).unwrap_or_else(|| panic!("no numbers: {said}"));
    let stats = &said[stats.as_ptr() as usize - said.as_ptr() as usize..];
    let stats: serde_json::Value = serde_json::from_str(stats).unwrap();
    Some(if stats["engine"] == "ptrace" { Engine::Ptrace } else { Engine::Kvm })
}

/// Where reports on lost vCPUs go, which are not to lie where the tests are run.
fn reports() -> &'static str {
    static REPORTS: LazyLock<PathBuf> = LazyLock::new(|| folder("attack-reports"));
    REPORTS.to_str().unwrap()
}

fn attack(words: &[&str]) -> Output {
    let words: Vec<&str> = ["attack"].iter().chain(words).copied().collect();
    let options = ["--check", "--timeout", "250s", "--report-dir", reports()];
    let output = finish(&mut run(&options, &words), b"", LIMIT);
    let said = stderr(&output);
    assert!(!said.contains("panicked") && !said.contains("bug of umbra"), "{words:?}: {said}");
    output
}

/// Each attack's name, `raise` aside.
fn names() -> Vec<String> {
    let list = attack(&["list"]);
    assert_eq!(code(list.status), 0, "{}", stderr(&list));
    let list = String::from_utf8(list.stdout).unwrap();
    list.lines().filter(|name| *name != "raise").map(str::to_owned).collect()
}

#[test]
fn every_attack_is_contained() {
    let Some(engine) = engine() else { return };
    let is_end = |name: &str| name == "outlive" || ENDS.iter().any(|(it, _)| *it == name);
    let names: Vec<_> = names().into_iter().filter(|name| !is_end(name)).collect();
    assert!(names.len() > 20, "{names:?}");
    for name in names {
        let output = attack(&[&name]);
        let (said, printed) = (stderr(&output), String::from_utf8_lossy(&output.stdout).into_owned());
        println!("{}", printed.trim_end());
        if name == LOSES_A_PVM_VCPU && engine == Engine::Kvm && code(output.status) == 125 {
            assert!(
                said.contains("the engine (kvm) lost a vCPU: an exception that no guest can cause"),
                "{said}"
            );
            continue;
        }
        assert_eq!(code(output.status), 0, "{name}: {printed}{said}");
        assert_eq!(printed.lines().count(), 1, "{name}: {printed}");
        assert!(!printed.contains("broken"), "{name}: {printed}");
        if name == "int" && engine == Engine::Ptrace {
            assert!(printed.contains(", 0 went on"), "{printed}");
        }
    }
}

#[test]
fn attacks_that_end_the_guest_end_it_as_linux_would() {
    if engine().is_none() {
        return;
    }
    for (name, statuses) in ENDS {
        let output = attack(&[name]);
        let printed = String::from_utf8_lossy(&output.stdout);
        assert!(statuses.contains(&code(output.status)), "{name}: {printed}{}", stderr(&output));
        assert!(!printed.contains("broken"), "{name}: {printed}");
    }
}

/// Stop signals are ignored (docs/guest-abi.md).
#[test]
fn every_signal_at_itself_does_what_it_does_by_default() {
    if engine().is_none() {
        return;
    }
    let ignored = [
        libc::SIGCHLD,
        libc::SIGCONT,
        libc::SIGSTOP,
        libc::SIGTSTP,
        libc::SIGTTIN,
        libc::SIGTTOU,
        libc::SIGURG,
        libc::SIGWINCH,
    ];
    for signal in 1..=64 {
        let output = attack(&["raise", &signal.to_string()]);
        let expected = if ignored.contains(&signal) { 0 } else { 128 + signal };
        assert_eq!(code(output.status), expected, "signal {signal}: {}", stderr(&output));
    }
}
