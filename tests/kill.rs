// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! umbra is killed (SIGKILL) at random moments, alone or with its whole process group, and leaves nothing behind: no process,
//! no temporary file, no half-written one, no changed setting of the kernel's; and the next run works.
//!
//! `UMBRA_KILLS` says how often (40 if not set; a run that ends before it can be killed is one more, and not counted), `UMBRA_SEED` where the random numbers begin; `scripts/soak kill` sets both.
//! Each moment is drawn from the time that the same command takes when it is left alone, and a bit more, so kills fall into
//! starting, running, ending and writing what is left to write.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use common::{engine, finish, folder, guests, run, stderr, umbra};
use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use vmm::engine::EngineKind;

const LIMIT: Duration = Duration::from_secs(120);
/// The longest that is waited before the kill.
const LONGEST: Duration = Duration::from_millis(600);
/// By this each process of a round can be told, whatever it has become.
const MARK: &str = "UMBRA_KILL_ROUND";

/// `umbra run` with these words, or `umbra inject`; `OUT` is the round's folder for files.
const CASES: [&[&str]; 15] = [
    &["hello"],
    &["--check", "hello-pie"],
    &["--age", "2ms", "--heatmap", "OUT/map.svg", "touch", "--pages", "500", "--passes", "100"],
    &["--age", "1ms", "--wss=json", "--heatmap", "OUT/map.svg", "hello"],
    &["--trace", "notifier=json", "--trace-file", "OUT/trace", "torture", "1..3"],
    &[
        "--dirty-rate=10ms",
        "--dirty-log",
        "ring:128",
        "touch",
        "--pages",
        "500",
        "--write",
        "100",
        "--passes",
        "100",
    ],
    &["--dirty-rate=10ms,json", "--dirty-method", "write-protect", "threads", "--rounds", "50"],
    &[
        "--guests",
        "4",
        "--memory",
        "16M",
        "--ksm=all,scan=10000/1ms",
        "--ksm-report=json,OUT/ksm.svg",
        "torture",
        "7..8",
    ],
    &["--guests", "3", "--memory", "16M", "--check", "hello"],
    &["--ksm=all,scan=10000/1ms,copy-on-access", "--stats=json", "threads", "--rounds", "50"],
    &["--audit", "5ms", "--stats=json", "--report-dir", "OUT", "torture", "4..5"],
    &["--adopt-demo"],
    &["--deterministic", "--seed", "3", "--deterministic-trace", "OUT/trace", "threads", "--rounds", "20"],
    &[
        "inject",
        "busy-host",
        "--report=json:OUT/report.json",
        "--",
        "run",
        "--check",
        "threads",
        "--rounds",
        "20",
    ],
    &["inject", "--campaign", "12", "--seed", "1", "--jobs", "2", "--keep", "OUT/kept", "--timeout", "60s"],
];

/// Who is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    /// umbra.
    Process,
    /// umbra and whoever is in its process group; nobody else is.
    Group,
    /// umbra, the shell that started it, and who reads from it.
    Pipeline,
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Of {
    /// It was left alone.
    Itself,
    /// It was killed, or was about to be.
    Kill,
}

/// xorshift64*.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % bound
    }
}

fn number(variable: &str, otherwise: u64) -> u64 {
    match std::env::var(variable) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{variable} is no number: {text}")),
        Err(_) => otherwise,
    }
}

/// The folders of a round, all empty but for a picture that may be replaced.
struct Folders {
    /// Where umbra runs.
    work: PathBuf,
    /// `$TMPDIR`.
    temporary: PathBuf,
    /// Where it is told to write.
    out: PathBuf,
}

const OLD: &str = "a picture of before\n";

impl Folders {
    fn new(root: &Path, has_old: bool) -> Self {
        let _ = fs::remove_dir_all(root);
        let [work, temporary, out] = ["work", "tmp", "out"].map(|name| root.join(name));
        [&work, &temporary, &out].into_iter().for_each(|folder| fs::create_dir_all(folder).unwrap());
        if has_old {
            fs::write(out.join("map.svg"), OLD).unwrap();
        }
        Self { work, temporary, out }
    }

    /// Checks that umbra left nothing that it should not. Where it was killed, docs/reports.md names what may stay.
    fn check(&self, what: &str, end: Of) {
        for folder in [&self.work, &self.temporary] {
            let names = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
            let may_stay = |name: &std::ffi::OsString| {
                // A campaign's folder, which is full of files that its runs read and write.
                let is_a_campaigns = name.to_string_lossy().starts_with("umbra-campaign-");
                end == Of::Kill && folder == &self.temporary && is_a_campaigns
            };
            let left: Vec<_> = names.filter(|name| !may_stay(name)).collect();
            assert!(left.is_empty(), "{what}: left behind in {}: {left:?}", folder.display());
        }
        for entry in fs::read_dir(&self.out).unwrap() {
            let path = entry.unwrap().path();
            let content = fs::read_to_string(&path).unwrap();
            let is_whole = content.starts_with("<svg") && content.trim_end().ends_with("</svg>");
            match path.file_name().unwrap().to_str().unwrap() {
                // Between two system calls, where it was about to replace another.
                name if name.starts_with(".map.svg.") && name.ends_with(".partial") => {
                    assert!(end == Of::Kill && is_whole, "{what}: {name} is left behind: {content:.80}");
                }
                "report.json" => {
                    let report: serde_json::Value = serde_json::from_str(&content)
                        .unwrap_or_else(|error| panic!("{what}: half a report, {error}: {content}"));
                    assert!(report["rules"].is_array(), "{what}: {report}");
                }
                "map.svg" if content == OLD => {}
                "map.svg" | "ksm.svg" => {
                    assert!(is_whole, "{what}: {} is half a picture: {content:.80}", path.display());
                }
                // Written as events come, so it may end anywhere.
                "trace" => {}
                name => panic!("{what}: {name} is nothing that umbra was told to write"),
            }
        }
    }
}

fn command(case: &[&str], folders: &Folders, victim: Victim, mark: &str) -> Command {
    let out = folders.out.to_str().unwrap();
    let words: Vec<String> = case.iter().map(|word| word.replace("OUT", out)).collect();
    let plain = match words.first().map(String::as_str) {
        Some("inject") => {
            let mut inject = umbra();
            inject.args(&words);
            inject
        }
        _ => run(&[], &words),
    };
    let mut command = match victim {
        Victim::Process | Victim::Group => plain,
        Victim::Pipeline => {
            let mut shell = Command::new("sh");
            shell.args(["-c", r#""$@" 2>&1 | cat >/dev/null"#, "sh"]).arg(plain.get_program());
            shell.args(plain.get_args()).env_remove("RUST_LOG");
            shell
        }
    };
    command.current_dir(&folders.work).env("TMPDIR", &folders.temporary).env(MARK, mark);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
    command
}

fn kill(child: &mut Child, victim: Victim) {
    let pid = child.id() as i32;
    let to = if victim == Victim::Process { pid } else { -pid };
    // SAFETY: takes plain numbers. Our child, or the group that it leads, which was not waited for yet.
    let result = unsafe { libc::kill(to, libc::SIGKILL) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    child.wait().unwrap();
}

/// Processes that were started by a round and are still there, in whichever group.
fn alive(mark: &str) -> Vec<String> {
    let wanted = format!("{MARK}={mark}");
    let processes = fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
    processes
        .filter(|path| {
            let environment = fs::read(path.join("environ")).unwrap_or_default();
            environment.split(|&byte| byte == 0).any(|variable| variable == wanted.as_bytes())
        })
        .map(|path| path.display().to_string())
        .collect()
}

const KSM: &str = "/sys/kernel/mm/ksm";

/// What the kernel's page sharing is set to; not what it has found, nor what an advisor of the kernel's found for pages_to_scan.
fn ksm_settings() -> BTreeMap<String, String> {
    const SETTINGS: [&str; 11] = [
        "run",
        "sleep_millisecs",
        "pages_to_scan",
        "merge_across_nodes",
        "use_zero_pages",
        "max_page_sharing",
        "stable_node_chains_prune_millisecs",
        "smart_scan",
        "advisor_mode",
        "advisor_max_cpu",
        "advisor_target_scan_time",
    ];
    let read = |name: &str| fs::read_to_string(Path::new(KSM).join(name));
    let mut settings: BTreeMap<_, _> =
        SETTINGS.iter().filter_map(|name| Some(((*name).to_owned(), read(name).ok()?))).collect();
    if settings.get("advisor_mode").is_some_and(|mode| !mode.contains("[none]")) {
        settings.remove("pages_to_scan");
    }
    settings
}

/// The same, while no benchmark drives ksmd: one that does, of another run of this suite, has a lock on `run` until it has put
/// all back.
fn ksm_settings_of_the_host() -> BTreeMap<String, String> {
    let lock = fs::File::open(Path::new(KSM).join("run")).ok();
    if let Some(lock) = &lock {
        lock.lock_shared().unwrap();
    }
    ksm_settings()
}

/// Shared memory with a name that somebody of umbra could have left: POSIX by name, System V by who made it.
fn shared_memory(pid: u32) -> Vec<String> {
    let posix = fs::read_dir("/dev/shm").into_iter().flatten().flatten();
    let posix = posix.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let mut found: Vec<_> = posix.filter(|name| name.contains("umbra")).collect();
    let system_v = fs::read_to_string("/proc/sysvipc/shm").unwrap_or_default();
    // key shmid perms size cpid …
    let made_by = |line: &&str| line.split_whitespace().nth(4) == Some(&pid.to_string());
    found.extend(system_v.lines().filter(made_by).map(str::to_owned));
    found
}

#[test]
fn umbra_killed_at_any_moment_leaves_nothing_behind_and_the_next_run_works() {
    if !guests() {
        return;
    }
    let (times, seed) = (number("UMBRA_KILLS", 40), number("UMBRA_SEED", 6));
    let root = folder("kill");
    let before = ksm_settings_of_the_host();
    let mut random = Random(seed.wrapping_mul(2).wrapping_add(1));
    let mut takes = Vec::new();
    let can_adopt = engine() == EngineKind::Kvm;
    let cases: Vec<_> = CASES.into_iter().filter(|case| can_adopt || case[0] != "--adopt-demo").collect();
    for case in &cases {
        let folders = Folders::new(&root.join("whole"), false);
        let began = Instant::now();
        let mut undisturbed = command(case, &folders, Victim::Process, "whole");
        let output = finish(&mut undisturbed, b"", LIMIT);
        assert!(output.status.success(), "{case:?}: {}", stderr(&output));
        folders.check(&format!("{case:?}, left alone"), Of::Itself);
        takes.push(began.elapsed().min(LONGEST));
    }
    let hello = finish(umbra().args(["run", "hello"]), b"", LIMIT).stdout;
    let began = Instant::now();
    let (mut kills, mut round) = (0, 0u64);
    while kills < times {
        round += 1;
        let at = random.below(cases.len() as u64) as usize;
        let victim = [Victim::Process, Victim::Group, Victim::Pipeline][random.below(3) as usize];
        let has_old = random.below(2) == 0;
        let delay = Duration::from_micros(random.below(takes[at].as_micros() as u64 * 11 / 10 + 1));
        let what = format!("seed {seed}, round {round}: {:?}, {victim:?} killed after {delay:?}", cases[at]);
        let folders = Folders::new(&root.join("round"), has_old);
        let mark = format!("{}-{round}", std::process::id());
        let mut child = command(cases[at], &folders, victim, &mark).spawn().unwrap();
        std::thread::sleep(delay);
        if child.try_wait().unwrap().is_none() {
            kill(&mut child, victim);
            kills += 1;
        }
        let since = Instant::now();
        while let left = alive(&mark)
            && !left.is_empty()
        {
            // Being killed takes the kernel a moment where nobody waits for the process.
            assert!(since.elapsed() < LIMIT, "{what}: still there: {left:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
        folders.check(&what, Of::Kill);
        assert_eq!(shared_memory(child.id()), [""; 0], "{what}");
        if ksm_settings() != before {
            assert_eq!(ksm_settings_of_the_host(), before, "{what}");
        }
        let next = finish(umbra().args(["run", "hello"]), b"", LIMIT);
        assert!(next.status.success() && next.stdout == hello, "{what}; then: {}", stderr(&next));
    }
    let took = began.elapsed().as_secs();
    let mut out = std::io::stdout().lock();
    writeln!(out, "kill: {kills} kills in {round} runs, seed {seed}, {took} s: nothing left behind").unwrap();
}
