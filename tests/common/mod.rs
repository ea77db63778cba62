// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the tests share: running umbra, running natively, and telling the two apart.
#![allow(dead_code, unreachable_pub, reason = "every test takes what it needs")]

pub mod pages;

use std::fmt::Debug;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};
use vmm::engine::{EngineChoice, EngineKind, kvm};

/// What keeps `engine` from running guests here. Where the environment names it, by `UMBRA_ENGINE` or with `UMBRA_REQUIRE_KVM` or
/// `UMBRA_REQUIRE_PTRACE`, as on machines that are known to have it, an obstacle to that one is a failure.
fn obstacle(engine: EngineKind) -> Option<String> {
    let (obstacle, required) = match engine {
        EngineKind::Kvm => {
            let obstacle = kvm::facts(&vmm::cli::kvm_device()).err();
            (obstacle.map(|error| error.to_string()), "UMBRA_REQUIRE_KVM")
        }
        EngineKind::Ptrace => {
            let obstacle = vmm::engine::ptrace::probe().err();
            (obstacle.map(|error| error.to_string()), "UMBRA_REQUIRE_PTRACE")
        }
    };
    if let Some(obstacle) = &obstacle {
        let required = vmm::cli::engine().choice == engine.into() || std::env::var_os(required).is_some();
        assert!(!required, "{engine} is required here: {obstacle}");
    }
    obstacle
}

/// The engine in use: the one that `UMBRA_ENGINE` names, else KVM where its device can be used, else ptrace. KVM is not asked for
/// if it names ptrace.
pub fn engine() -> EngineKind {
    match vmm::cli::engine().choice {
        EngineChoice::Kvm => EngineKind::Kvm,
        EngineChoice::Ptrace => EngineKind::Ptrace,
        EngineChoice::Auto => obstacle(EngineKind::Kvm).map_or(EngineKind::Kvm, |_| EngineKind::Ptrace),
    }
}

/// Whether guests can be run here, by the engine in use. Prints one line if not.
pub fn guests() -> bool {
    has(engine())
}

/// Whether guests can be run here by `engine`, in use or not. Prints one line if not.
pub fn has(engine: EngineKind) -> bool {
    let obstacle = obstacle(engine);
    if let Some(obstacle) = &obstacle {
        println!("skipped with {engine}: {obstacle}");
    }
    obstacle.is_none()
}

/// What `--engine` takes of engines that run guests here. Prints one line for each other.
pub fn offered() -> Vec<&'static str> {
    let engines = [("kvm", EngineKind::Kvm), ("ptrace", EngineKind::Ptrace)];
    engines.into_iter().filter(|(_, kind)| has(*kind)).map(|(name, _)| name).collect()
}

/// Whether guests can be run here by KVM, for tests of what no other engine has. Prints one line if not.
pub fn kvm() -> bool {
    if engine() == EngineKind::Ptrace {
        println!("skipped: the engine in use is ptrace");
        return false;
    }
    guests()
}

/// The command under test, which takes the engine in use without a word.
pub fn umbra() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_umbra-under-test"));
    command.stdin(Stdio::null()).env_remove("RUST_LOG");
    if engine() == EngineKind::Ptrace {
        command.env(vmm::cli::ENGINE, "ptrace");
    }
    command
}

/// `umbra run OPTIONS PROGRAM ARGS`.
pub fn run<S: AsRef<std::ffi::OsStr>>(options: &[&str], program: &[S]) -> Command {
    let mut command = umbra();
    command.arg("run").args(options).args(program);
    command
}

/// A folder for the files of one test, empty.
pub fn folder(test: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(test);
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    folder
}

/// The bundled guests as native executables.
pub fn native_images(test: &str) -> PathBuf {
    let folder = folder(test);
    let status = umbra().args(["images", "--extract"]).arg(&folder).stdout(Stdio::null()).status().unwrap();
    assert!(status.success());
    folder
}

/// Builds a C program, statically, with `flags`.
pub fn cc(folder: &Path, name: &str, source: &str, flags: &[&str]) -> PathBuf {
    let (c, program) = (folder.join(format!("{name}.c")), folder.join(name));
    fs::write(&c, source).unwrap();
    let output =
        Command::new("gcc").args(["-O1", "-w", "-o"]).arg(&program).arg(&c).args(flags).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    program
}

/// A busybox that a guest can be. Prints one line where there is none.
pub fn busybox() -> Option<&'static Path> {
    let busybox = Path::new("/bin/busybox");
    // A dynamic program names its loader right behind the headers; the name alone is in static ones too.
    let is_static = Command::new(busybox).arg("true").output().is_ok_and(|out| out.status.success())
        && fs::read(busybox).is_ok_and(|elf| !elf[..elf.len().min(4096)].windows(4).any(|at| at == b"/ld-"));
    if !is_static {
        println!("skipped: no static /bin/busybox (Debian: apt-get install busybox-static)");
    }
    is_static.then_some(busybox)
}

/// A file to which nothing can be written. Prints one line where there is none.
pub fn full() -> Option<&'static str> {
    let is_there = Path::new(FULL).exists();
    if !is_there {
        println!("skipped: no {FULL}");
    }
    is_there.then_some(FULL)
}

const FULL: &str = "/dev/full";

/// Flags of a static C program.
pub const STATIC: &[&str] = &["-static", "-pthread"];

/// Runs `command` with `input`, for at most `limit`.
pub fn finish(command: &mut Command, input: &[u8], limit: Duration) -> Output {
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let (mut stdin, mut stdout, mut stderr) =
        (child.stdin.take().unwrap(), child.stdout.take().unwrap(), child.stderr.take().unwrap());
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // A program may end without reading all.
            let _ = stdin.write_all(input);
        });
        let out = scope.spawn(move || {
            let mut bytes = Vec::new();
            stdout.read_to_end(&mut bytes).unwrap();
            bytes
        });
        let err = scope.spawn(move || {
            let mut bytes = Vec::new();
            stderr.read_to_end(&mut bytes).unwrap();
            bytes
        });
        let status = wait(&mut child, limit, command);
        Output { status, stdout: out.join().unwrap(), stderr: err.join().unwrap() }
    })
}

/// Waits for the end of `child`, for at most `limit`; then it is killed, and `what` it is has failed.
pub fn wait(child: &mut Child, limit: Duration, what: impl Debug) -> ExitStatus {
    let began = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if began.elapsed() > limit {
            child.kill().unwrap();
            let _ = child.wait();
            panic!("{what:?} did not end within {limit:?}");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// What a shell would say of it: the exit code, or 128 + signal.
pub fn code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap())
}

/// Everything that went to stderr.
pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Asserts that a guest did what the native run did: output and status.
pub fn assert_same(native: &Output, guest: &Output, what: &str) {
    assert_eq!(code(native.status), code(guest.status), "{what}: status; umbra said: {}", stderr(guest));
    assert!(
        native.stdout == guest.stdout,
        "{what}: output differs\nnative: {}\numbra:  {}\nstderr: {}",
        String::from_utf8_lossy(&native.stdout[..native.stdout.len().min(2000)]),
        String::from_utf8_lossy(&guest.stdout[..guest.stdout.len().min(2000)]),
        stderr(guest)
    );
}

/// `len` bytes of text lines, the same every time.
pub fn text(len: usize) -> Vec<u8> {
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    const WORDS: [&str; 12] =
        ["gfn", "spte", "zap", "42", "flush", "age", "retry", "walk", "7", "notifier", "dirty", "frame"];
    let mut out = Vec::with_capacity(len + 64);
    while out.len() < len {
        out.extend((next() % 1_000_000).to_string().bytes());
        for _ in 0..next() % 9 {
            out.push(b' ');
            out.extend(WORDS[(next() % 12) as usize].bytes());
        }
        out.push(b'\n');
    }
    out.truncate(len);
    out
}
