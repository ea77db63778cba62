// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The ptrace engine's child, from outside: what it has, and what becomes of it and of umbra when somebody signals it.

use super::common::{code, finish, run, stderr, wait};
use super::processes::{Umbra, descendants, outlive, send, wait_for_the_guest};
use super::{Engine, LIMIT, engine, reports};
use std::fs;
use std::io::Read;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// First byte past what a guest may map; above it lies the engine's stub.
const TASK_SIZE: u64 = shadow_mmu::addr::TASK_SIZE;

/// Whether the engine in use has a child. Says so if not.
fn has_child() -> bool {
    let is_ptrace = engine() == Some(Engine::Ptrace);
    if !is_ptrace {
        println!("skipped: the engine in use has no child process");
    }
    is_ptrace
}

/// The one child of umbra.
fn child_of(umbra: &Umbra) -> u32 {
    let all = descendants(umbra.id());
    let [child] = &all[..] else { panic!("not one child: {all:?}") };
    assert_eq!(child.parent, umbra.id());
    child.pid
}

/// An umbra whose guest spins in four threads, and its child.
fn spinning(round: &str) -> (Umbra, u32) {
    let mut command = outlive();
    command.stderr(Stdio::piped());
    let mut umbra = Umbra::start(command, round);
    wait_for_the_guest(&mut umbra);
    let child = child_of(&umbra);
    (umbra, child)
}

/// The value of `field` in a status file.
fn field(status: &str, field: &str) -> String {
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {field} in {status}")).trim().to_owned()
}

#[test]
fn the_child_has_no_descriptor_but_the_pool_and_no_privileges() {
    if !has_child() {
        return;
    }
    let (umbra, child) = spinning("child-status");
    let fds: Vec<_> =
        fs::read_dir(format!("/proc/{child}/fd")).unwrap().map(|it| it.unwrap().path()).collect();
    assert_eq!(fds.len(), 1, "{fds:?}");
    let pool = fs::read_link(&fds[0]).unwrap();
    assert!(pool.to_str().unwrap().starts_with("/memfd:"), "{}", pool.display());
    let threads = |pid: u32| -> Vec<String> {
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
        tasks.map(|it| it.unwrap().file_name().into_string().unwrap()).collect()
    };
    let tracers = threads(umbra.id());
    let tasks = threads(child);
    assert!(tasks.len() >= 4, "{tasks:?}");
    for task in tasks {
        let status = fs::read_to_string(format!("/proc/{child}/task/{task}/status")).unwrap();
        assert_eq!(field(&status, "NoNewPrivs"), "1", "{status}");
        assert_eq!(field(&status, "Seccomp"), "2", "{status}");
        assert!(tracers.contains(&field(&status, "TracerPid")), "{tracers:?} {status}");
    }
    assert_eq!(fs::read(format!("/proc/{child}/environ")).unwrap(), b"", "the environment is umbra's own");
    let words = fs::read(format!("/proc/{child}/cmdline")).unwrap();
    let words = String::from_utf8_lossy(&words);
    assert!(!words.contains("outlive") && !words.contains('/'), "umbra's command line: {words:?}");
}

#[test]
fn the_child_maps_the_pool_and_the_stub_and_nothing_else() {
    if !has_child() {
        return;
    }
    let (_umbra, child) = spinning("child-maps");
    let pool = fs::read_link(format!("/proc/{child}/fd/0")).unwrap();
    let maps = fs::read_to_string(format!("/proc/{child}/maps")).unwrap();
    let (mut pools, mut stubs) = (0, 0);
    for line in maps.lines() {
        // start-end rights offset device inode path
        let mut words = line.splitn(6, ' ');
        let (range, rights) = (words.next().unwrap(), words.next().unwrap());
        let path = words.nth(3).unwrap_or_default().trim();
        let (start, end) = range.split_once('-').unwrap();
        let [start, end] = [start, end].map(|digits| u64::from_str_radix(digits, 16).unwrap());
        if path == "[vsyscall]" {
            continue;
        }
        if start >= TASK_SIZE {
            assert!(matches!(rights, "r-xs" | "r--s") && end - start == 4096 && end < 1 << 47, "{line}");
            stubs += 1;
        } else {
            assert!(end <= TASK_SIZE && path == pool.to_str().unwrap(), "{line}");
            pools += 1;
        }
    }
    assert!(stubs == 2 && pools > 0, "{maps}");
}

/// Kills `child`, which umbra must notice, and say.
fn killed_is_a_clear_failure(mut umbra: Umbra, child: u32) {
    send(child, libc::SIGKILL);
    let status = wait(&mut umbra.child, LIMIT, "an umbra whose guest was killed");
    let mut said = String::new();
    umbra.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(code(status), 125, "{said}");
    assert!(said.contains("ended by signal 9, from outside umbra") && !said.contains("panicked"), "{said}");
    assert_eq!(descendants(umbra.id()), []);
}

#[test]
fn a_child_killed_from_outside_is_a_clear_failure() {
    if !has_child() {
        return;
    }
    let (umbra, child) = spinning("child-killed");
    killed_is_a_clear_failure(umbra, child);
}

/// The numbers in /proc are somebody else's there, and are not believed.
#[test]
fn a_child_killed_in_a_pid_namespace_without_its_own_proc_is_a_clear_failure() {
    const UNSHARE: [&str; 3] = ["--pid", "--fork", "--kill-child"];
    if !has_child() {
        return;
    }
    let mut can_be_made = Command::new("unshare");
    can_be_made.args(UNSHARE).arg("true").stderr(Stdio::null());
    if !can_be_made.status().is_ok_and(|status| status.success()) {
        println!("skipped: no pid namespace can be made here");
        return;
    }
    let inner = outlive();
    let mut command = Command::new("unshare");
    command.args(UNSHARE).arg(inner.get_program()).args(inner.get_args());
    command.envs(inner.get_envs().filter_map(|(name, value)| Some((name, value?))));
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut umbra = Umbra::start(command, "child-namespace");
    wait_for_the_guest(&mut umbra);
    let all = descendants(umbra.id());
    let [_, child] = &all[..] else { panic!("not umbra and one child: {all:?}") };
    let child = child.pid;
    killed_is_a_clear_failure(umbra, child);
}

#[test]
fn signals_to_the_child_from_outside_change_nothing() {
    if !has_child() {
        return;
    }
    let program = ["torture", "1..12"];
    let options = ["--check", "--report-dir", reports()];
    let expected = finish(&mut run(&options, &program), b"", LIMIT);
    assert_eq!(code(expected.status), 0, "{}", stderr(&expected));
    let mut command = run(&options, &program);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut umbra = Umbra::start(command, "child-signals");
    let mut sent = 0;
    let began = Instant::now();
    while umbra.child.try_wait().unwrap().is_none() {
        assert!(began.elapsed() < LIMIT, "it does not end");
        for child in descendants(umbra.id()) {
            for signal in
                [libc::SIGTERM, libc::SIGSTOP, libc::SIGUSR1, libc::SIGINT, libc::SIGTSTP, libc::SIGCONT]
            {
                // SAFETY: takes plain numbers. It may be gone already, its number is not given to another so soon.
                sent += u32::from(unsafe { libc::kill(child.pid as i32, signal) } == 0);
            }
        }
        std::thread::sleep(Duration::from_millis(3));
    }
    let (mut printed, mut said) = (Vec::new(), String::new());
    umbra.child.stdout.take().unwrap().read_to_end(&mut printed).unwrap();
    umbra.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(code(umbra.child.wait().unwrap()), 0, "{said}");
    assert_eq!(printed, expected.stdout);
    assert!(sent > 0, "the guest was over too soon");
}
