// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Nobody outlives umbra: not a guest that spins with every signal blocked, and not one that has only begun to start.
//!
//! umbra leads a session of its own here. Whoever it starts is in that session, has umbra's mark in the environment, or was
//! seen as its descendant before.

use super::common::{code, folder, run};
use super::engine;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Ample: the kernel needs a moment to take a process apart.
const LIMIT: Duration = Duration::from_secs(20);
const MARK: &str = "UMBRA_ATTACK_ROUND";
const STARTS: u64 = 50;

/// A process as /proc/PID/stat has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Process {
    pub(super) pid: u32,
    name: String,
    state: String,
    pub(super) parent: u32,
    session: u32,
    /// With the pid, this tells it from all others.
    started: u64,
}

impl Process {
    fn read(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (head, tail) = (stat.split_once('(')?.1.rsplit_once(')')?.0, stat.rsplit_once(')')?.1);
        let fields: Vec<&str> = tail.split_whitespace().collect();
        let number = |at: usize| fields.get(at)?.parse().ok();
        Some(Self {
            pid,
            name: head.to_owned(),
            state: (*fields.first()?).to_owned(),
            parent: number(1)?,
            session: number(3)?,
            started: fields.get(19)?.parse().ok()?,
        })
    }

    /// One that waits to be reaped does nothing any more.
    fn is_alive(&self) -> bool {
        !["Z", "X"].contains(&self.state.as_str())
    }
}

fn all() -> Vec<Process> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    entries.filter_map(|entry| Process::read(entry.file_name().to_str()?.parse().ok()?)).collect()
}

/// Children of `pid`, and theirs.
pub(super) fn descendants(pid: u32) -> Vec<Process> {
    let all = all();
    let mut found: Vec<Process> = all.iter().filter(|it| it.parent == pid).cloned().collect();
    let mut next = 0;
    while let Some(parent) = found.get(next).map(|it| it.pid) {
        found.extend(all.iter().filter(|it| it.parent == parent).cloned());
        next += 1;
    }
    found
}

/// Who is left of the session of `leader`, of the round of that mark, and of those seen before.
fn left(leader: u32, mark: &str, seen: &[Process]) -> Vec<Process> {
    let wanted = format!("{MARK}={mark}");
    let is_marked = |it: &Process| {
        let environment = fs::read(format!("/proc/{}/environ", it.pid)).unwrap_or_default();
        environment.split(|&byte| byte == 0).any(|variable| variable == wanted.as_bytes())
    };
    let was_seen = |it: &Process| seen.iter().any(|old| (old.pid, old.started) == (it.pid, it.started));
    let mut all = all();
    all.retain(|it| it.is_alive() && (it.session == leader || was_seen(it) || is_marked(it)));
    all
}

fn check_nobody_is_left(leader: u32, mark: &str, seen: &[Process], what: &str) {
    let since = Instant::now();
    while let left = left(leader, mark, seen)
        && !left.is_empty()
    {
        assert!(since.elapsed() < LIMIT, "{what}: still there: {left:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// `umbra run attack outlive`, in a session of its own.
pub(super) fn outlive(mark: &str) -> Command {
    let reports = folder(&format!("attack-{mark}"));
    let mut command = run(&["--report-dir", reports.to_str().unwrap()], &["attack", "outlive"]);
    command.env(MARK, mark).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let lead = || {
        // SAFETY: a plain system call, as is allowed between fork and exec.
        if unsafe { libc::setsid() } < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
    };
    // SAFETY: `lead` does nothing but that call.
    unsafe { command.pre_exec(lead) };
    command
}

/// Waits until the guest says that it spins.
pub(super) fn wait_for_the_guest(umbra: &mut Child) {
    let mut line = String::new();
    BufReader::new(umbra.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "outlive: spinning\n");
}

pub(super) fn send(pid: u32, signal: i32) {
    // SAFETY: takes plain numbers; a process of this test's, not reaped yet.
    assert_eq!(unsafe { libc::kill(pid as i32, signal) }, 0, "{}", std::io::Error::last_os_error());
}

#[test]
fn a_guest_that_blocks_everything_does_not_outlive_umbra() {
    if engine().is_none() {
        return;
    }
    for signal in [libc::SIGKILL, libc::SIGTERM, libc::SIGINT] {
        let mark = format!("{}-{signal}", std::process::id());
        let mut umbra = outlive(&mark).spawn().unwrap();
        wait_for_the_guest(&mut umbra);
        let (pid, seen) = (umbra.id(), descendants(umbra.id()));
        assert!(left(pid, &mark, &seen).iter().any(|it| it.pid == pid), "the search finds umbra itself");
        send(pid, signal);
        assert_eq!(code(umbra.wait().unwrap()), 128 + signal);
        check_nobody_is_left(pid, &mark, &seen, &format!("signal {signal}"));
    }
}

#[test]
fn umbra_killed_while_it_starts_leaves_nobody() {
    if engine().is_none() {
        return;
    }
    let began = Instant::now();
    let mut umbra = outlive("start").spawn().unwrap();
    wait_for_the_guest(&mut umbra);
    let start = began.elapsed().min(Duration::from_millis(300));
    send(umbra.id(), libc::SIGKILL);
    umbra.wait().unwrap();
    let mut random = 0x9e37_79b9_7f4a_7c15_u64 | u64::from(std::process::id());
    for round in 0..STARTS {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let delay = Duration::from_micros(random % (start.as_micros() as u64 * 5 / 4 + 1));
        let mark = format!("{}-start-{round}", std::process::id());
        let mut umbra = outlive(&mark).stdout(Stdio::null()).spawn().unwrap();
        std::thread::sleep(delay);
        let seen = descendants(umbra.id());
        send(umbra.id(), libc::SIGKILL);
        umbra.wait().unwrap();
        check_nobody_is_left(umbra.id(), &mark, &seen, &format!("killed after {delay:?}"));
    }
}
