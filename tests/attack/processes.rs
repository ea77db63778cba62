// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Nobody outlives umbra: not a guest that spins with every signal blocked, and not one that has only begun to start.
//!
//! umbra leads a session of its own here. Whoever it starts is in that session, has umbra's mark in the environment, or was
//! seen as its descendant before. Who has left the session, has no environment and was not seen becomes a child of this
//! process when umbra ends, for this process is a subreaper. Tests take turns with their umbras ([`Umbra`]), so that it is known
//! whose orphan that is.

use super::common::{code, run, wait};
use super::{engine, reports};
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Ample: the kernel needs a moment to take a process apart.
const LIMIT: Duration = Duration::from_secs(20);
const MARK: &str = "UMBRA_ATTACK_ROUND";
const STARTS: u64 = 50;
/// Held as long as an umbra that leads a session is there.
static TURN: Mutex<()> = Mutex::new(());

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

/// Children of this process that other processes left to it. What the tests start themselves is in this process's session, but
/// for `leader`, the umbra whose turn it is. The dead ones are reaped.
fn orphans(leader: u32) -> Vec<Process> {
    let own = Process::read(std::process::id()).unwrap();
    let is_orphan = |it: &Process| it.parent == own.pid && it.session != own.session && it.pid != leader;
    let (alive, dead): (Vec<_>, Vec<_>) = all().into_iter().filter(is_orphan).partition(Process::is_alive);
    for it in dead {
        // SAFETY: a child that no `Child` stands for; its status is not asked for.
        unsafe { libc::waitpid(it.pid as i32, std::ptr::null_mut(), libc::WNOHANG) };
    }
    alive
}

/// Who is left of the session of `leader`, of the round of that mark, of those seen before, and of those left to this process.
fn left(leader: u32, mark: &str, seen: &[Process]) -> Vec<Process> {
    let wanted = format!("{MARK}={mark}");
    let is_marked = |it: &Process| {
        let environment = fs::read(format!("/proc/{}/environ", it.pid)).unwrap_or_default();
        environment.split(|&byte| byte == 0).any(|variable| variable == wanted.as_bytes())
    };
    let was_seen = |it: &Process| seen.iter().any(|old| (old.pid, old.started) == (it.pid, it.started));
    let mut all = all();
    all.retain(|it| it.is_alive() && (it.session == leader || was_seen(it) || is_marked(it)));
    let orphans = orphans(leader).into_iter().filter(|it| !all.contains(it)).collect::<Vec<_>>();
    all.extend(orphans);
    all
}

/// A process in a session of its own: umbra. However the test ends, it is killed with whoever it started, and waited for.
#[derive(Debug)]
pub(super) struct Umbra {
    pub(super) child: Child,
    mark: String,
    _turn: MutexGuard<'static, ()>,
}

impl Umbra {
    /// Starts `command` when it is this one's turn. Its mark is `round` of this process: another suite may run beside this one.
    pub(super) fn start(mut command: Command, round: &str) -> Self {
        let mark = format!("{}-{round}", std::process::id());
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: takes plain numbers.
        assert_eq!(unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) }, 0);
        let lead = || {
            // SAFETY: a plain system call, as is allowed between fork and exec.
            if unsafe { libc::setsid() } < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
        };
        // SAFETY: `lead` does nothing but that call.
        unsafe { command.pre_exec(lead) };
        let child = command.env(MARK, &mark).stdin(Stdio::null()).spawn().unwrap();
        Self { child, mark, _turn: turn }
    }

    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits until it has ended and nobody is left of it; how it ended.
    pub(super) fn check_it_leaves_nobody(&mut self, seen: &[Process], what: &str) -> i32 {
        let status = code(wait(&mut self.child, LIMIT, what));
        let since = Instant::now();
        while let left = left(self.id(), &self.mark, seen)
            && !left.is_empty()
        {
            assert!(since.elapsed() < LIMIT, "{what}: still there: {left:?}");
            std::thread::sleep(Duration::from_millis(2));
        }
        status
    }
}

impl Drop for Umbra {
    fn drop(&mut self) {
        let seen = descendants(self.id());
        let _ = self.child.kill();
        let _ = self.child.wait();
        let since = Instant::now();
        while let left = left(self.id(), &self.mark, &seen)
            && !left.is_empty()
            && since.elapsed() < LIMIT
        {
            for it in left {
                // SAFETY: takes plain numbers; a process that was there a moment ago.
                unsafe { libc::kill(it.pid as i32, libc::SIGKILL) };
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// `umbra run attack outlive`; what it prints can be read.
pub(super) fn outlive() -> Command {
    let mut command = run(&["--timeout", "250s", "--report-dir", reports()], &["attack", "outlive"]);
    command.stdout(Stdio::piped()).stderr(Stdio::null());
    command
}

/// Waits until the guest says that it spins.
pub(super) fn wait_for_the_guest(umbra: &mut Umbra) {
    let mut line = String::new();
    BufReader::new(umbra.child.stdout.take().unwrap()).read_line(&mut line).unwrap();
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
        let mut umbra = Umbra::start(outlive(), &signal.to_string());
        wait_for_the_guest(&mut umbra);
        let (pid, seen) = (umbra.id(), descendants(umbra.id()));
        assert!(
            left(pid, &umbra.mark, &seen).iter().any(|it| it.pid == pid),
            "the search finds umbra itself"
        );
        send(pid, signal);
        assert_eq!(umbra.check_it_leaves_nobody(&seen, &format!("signal {signal}")), 128 + signal);
    }
}

#[test]
fn umbra_killed_while_it_starts_leaves_nobody() {
    if engine().is_none() {
        return;
    }
    let mut umbra = Umbra::start(outlive(), "start");
    let began = Instant::now();
    wait_for_the_guest(&mut umbra);
    let start = began.elapsed().min(Duration::from_millis(300));
    drop(umbra);
    let mut random = 0x9e37_79b9_7f4a_7c15_u64 | u64::from(std::process::id());
    for round in 0..STARTS {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let delay = Duration::from_micros(random % (start.as_micros() as u64 * 5 / 4 + 1));
        let mut command = outlive();
        command.stdout(Stdio::null());
        let mut umbra = Umbra::start(command, &format!("start-{round}"));
        std::thread::sleep(delay);
        let seen = descendants(umbra.id());
        send(umbra.id(), libc::SIGKILL);
        umbra.check_it_leaves_nobody(&seen, &format!("killed after {delay:?}"));
    }
}

/// What the two tests above rely on, and what becomes of processes when a test fails.
#[test]
fn who_hides_is_found_and_killed() {
    let mut command = Command::new("sh");
    // Of another session, without an environment, never seen, and its parent gone.
    command.args(["-c", "env -i setsid sleep 1000 & while ! grep -qs sleep /proc/$!/comm; do :; done"]);
    // Nor does it keep open what this test prints to.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut umbra = Umbra::start(command, "hides");
    let leader = umbra.id();
    wait(&mut umbra.child, LIMIT, "sh");
    let left = left(leader, &umbra.mark, &[]);
    let [hidden] = &left[..] else { panic!("{left:?}") };
    assert_eq!((hidden.name.as_str(), hidden.parent), ("sleep", std::process::id()));
    assert_ne!(hidden.session, leader);
    let hidden = hidden.clone();
    drop(umbra);
    assert!(Process::read(hidden.pid).is_none_or(|it| it.started != hidden.started || !it.is_alive()));
}
