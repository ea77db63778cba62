// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One case as a child process: `umbra inject`, in folders of its own and a process group of its own, for a limited time.
//!
//! stdin, stdout and stderr are files, so nobody has to read along, and nothing that a guest writes can be mistaken for the
//! report, which is a file too.
//!
//! A process that has ended keeps its number, which is its group's, until it is waited for. So who is left of the group is looked for
//! and killed before that: afterwards the number may be another's.

use super::super::registry::RuleAccount;
use super::case::Case;
use super::spawn::spawn;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Between looks whether the child has ended.
const LOOK: Duration = Duration::from_millis(1);
/// Bytes of each stream that are kept.
const MOST: usize = 1 << 20;

/// What `umbra inject --report=json` says.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunReport {
    /// In the order of the plan.
    pub rules: Vec<RuleAccount>,
    /// Hits of each point, those that were never hit left out.
    pub hits: BTreeMap<String, u64>,
    /// What was done to memory, and where: the first of it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// What the process still had when every machine was gone; a line each.
    pub leaks: Vec<String>,
}

/// How a child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// With this status.
    Exited(i32),
    /// By this signal.
    Signaled(i32),
    /// Not in time; it was killed.
    TimedOut,
}

/// What was seen of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Observed {
    /// How it ended.
    pub end: End,
    /// What was written to stdout; the first MiB.
    pub stdout: String,
    /// The same for stderr.
    pub stderr: String,
    /// What became of the plan, if it said so.
    pub report: Option<RunReport>,
    /// What was left in its folders (`cwd/…`, `tmp/…`), and whether there are processes left.
    pub left: Vec<String>,
    /// Names and contents of the files that were left in its working directory; the first MiB of each.
    pub files: Vec<(String, String)>,
}

/// How cases are run.
#[derive(Debug)]
pub(super) struct Runner<'a> {
    /// umbra.
    pub(super) umbra: &'a Path,
    /// A folder that is nobody else's.
    pub(super) folder: PathBuf,
    /// How long a run may take.
    pub(super) limit: Duration,
    /// Runs are to end at once, and are not judged.
    pub(super) stop: &'a AtomicBool,
}

impl Runner<'_> {
    /// Runs `case`; `None` if it was stopped.
    ///
    /// # Errors
    /// The host's: files, or no process.
    pub(super) fn run(&self, case: &Case) -> Result<Option<Observed>> {
        let folder = &self.folder;
        let _ = fs::remove_dir_all(folder);
        let [tmp, cwd] = ["tmp", "cwd"].map(|name| folder.join(name));
        for folder in [&tmp, &cwd] {
            fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        }
        let file = |name: &str| folder.join(name);
        fs::write(file("plan.toml"), case.plan.to_toml()?).context("cannot write the plan")?;
        fs::write(file("input"), &case.program.input).context("cannot write the program's input")?;
        let mut report = std::ffi::OsString::from("--report=json:");
        report.push(file("report.json"));
        let mut command = Command::new(self.umbra);
        command
            .arg("inject")
            .arg(file("plan.toml"))
            .arg(report)
            .arg("--")
            .args(case.words())
            .current_dir(&cwd)
            .env("TMPDIR", &tmp)
            // What it logs would be read as what it says.
            .env_remove("RUST_LOG")
            .stdin(File::open(file("input")).context("cannot open the program's input")?)
            .stdout(File::create(file("stdout")).context("cannot make a file for stdout")?)
            .stderr(File::create(file("stderr")).context("cannot make a file for stderr")?)
            .process_group(0);
        let mut child =
            spawn(&mut command).with_context(|| format!("cannot start {}", self.umbra.display()))?;
        let Some((end, others)) = self.wait(&mut child)? else { return Ok(None) };
        let mut left = listing(&tmp, "tmp")?;
        left.extend(listing(&cwd, "cwd")?);
        if end != End::TimedOut {
            left.extend(others.iter().map(|process| format!("a process of its group: {process}")));
        }
        let report = fs::read(file("report.json")).ok().and_then(|text| serde_json::from_slice(&text).ok());
        let text = |name| beginning(&file(name)).with_context(|| format!("cannot read its {name}"));
        let (stdout, stderr) = (text("stdout")?, text("stderr")?);
        Ok(Some(Observed { end, stdout, stderr, report, left, files: files(&cwd)? }))
    }

    /// Waits for the end: how it ended, and who was left of its group. `None` if it was stopped.
    fn wait(&self, child: &mut Child) -> Result<Option<(End, Vec<String>)>> {
        let began = Instant::now();
        loop {
            if has_ended(child).context("cannot wait for a run")? {
                let others = members(child);
                kill_group(child);
                let status = child.wait().context("cannot wait for a run")?;
                let signal = status.signal().map(End::Signaled);
                let end = signal.unwrap_or(End::Exited(status.code().unwrap_or_default()));
                return Ok(Some((end, others)));
            }
            let is_stopped = self.stop.load(Ordering::Relaxed);
            if is_stopped || began.elapsed() > self.limit {
                kill_group(child);
                child.wait().context("cannot wait for a run")?;
                return Ok((!is_stopped).then_some((End::TimedOut, Vec::new())));
            }
            std::thread::sleep(LOOK);
        }
    }
}

/// Whether the child has ended; it is not waited for by that.
fn has_ended(child: &Child) -> io::Result<bool> {
    // SAFETY: all zeros is a value of this type.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    // SAFETY: `info` is ours to write.
    if unsafe { libc::waitid(libc::P_PID, child.id(), &mut info, flags) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: waitid filled it, or left its zeros.
    Ok(unsafe { info.si_pid() } != 0)
}

/// Who is in the child's process group and has not ended, but for the child. It was not waited for.
fn members(child: &Child) -> Vec<String> {
    let group = child.id().to_string();
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let stats = processes.filter_map(|entry| fs::read_to_string(entry.path().join("stat")).ok());
    // PID (NAME) STATE PARENT GROUP …, and a name may have anything in it.
    let is_member = |stat: &str| {
        let mut words = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace();
        let is_alive = !matches!(words.next(), Some("Z" | "X") | None);
        is_alive && words.nth(1) == Some(&group)
    };
    stats
        .filter(|stat| is_member(stat) && stat.split(' ').next() != Some(&group))
        .map(|stat| stat.split_inclusive(')').next().unwrap_or_default().to_owned())
        .collect()
}

/// Sends SIGKILL to all of the child's process group. It was not waited for.
fn kill_group(child: &Child) {
    let group = child.id() as libc::pid_t;
    // SAFETY: it takes no memory. The group is the child's, which was made its leader and has its number still.
    unsafe { libc::kill(-group, libc::SIGKILL) };
}

fn beginning(path: &Path) -> io::Result<String> {
    let bytes = fs::read(path)?;
    Ok(String::from_utf8_lossy(&bytes[..bytes.len().min(MOST)]).into_owned())
}

/// Names and contents of the files in `folder`.
fn files(folder: &Path) -> Result<Vec<(String, String)>> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot look into {}", folder.display()))?;
    let files = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_file()));
    let file = |entry: fs::DirEntry| {
        let content = beginning(&entry.path()).unwrap_or_else(|error| format!("it cannot be read: {error}"));
        (entry.file_name().to_string_lossy().into_owned(), content)
    };
    Ok(files.map(file).collect())
}

fn listing(folder: &Path, name: &str) -> Result<Vec<String>> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot look into {}", folder.display()))?;
    Ok(entries.flatten().map(|entry| format!("{name}/{}", entry.file_name().to_string_lossy())).collect())
}
