// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Holds the guests to the rules of the workspace. Cargo does not know them as targets, so neither `cargo
//! clippy` nor `cargo fmt` looks at them.
//!
//! Both tools may be missing where the toolchain was installed without them; then there is nothing to check
//! with.

use std::path::{Path, PathBuf};
use std::process::Command;

const GUESTS: [&str; 12] = [
    "attack",
    "hello",
    "touch",
    "compute",
    "syscalls",
    "memstress",
    "mix",
    "race",
    "threads",
    "torture",
    "victim",
    "watcher",
];

/// A tool of the toolchain that runs this test, if it is installed.
fn tool(name: &str) -> Option<Command> {
    let cargo = PathBuf::from(std::env::var_os("CARGO")?);
    let path = cargo.with_file_name(name);
    if !path.exists() {
        eprintln!("{name} is not installed beside {}", cargo.display());
        return None;
    }
    let mut command = Command::new(path);
    command.current_dir(env!("CARGO_MANIFEST_DIR"));
    Some(command)
}

fn source(guest: &str) -> PathBuf {
    Path::new("src/guests").join(guest).with_extension("rs")
}

#[track_caller]
fn succeeds(mut command: Command) {
    let run = command.output().expect("the tool can be started");
    let (stdout, stderr) = (String::from_utf8_lossy(&run.stdout), String::from_utf8_lossy(&run.stderr));
    assert!(run.status.success(), "{command:?}:\n{stdout}{stderr}");
}

#[test]
fn guests_keep_the_rules_for_unsafe_code() {
    for guest in GUESTS {
        let Some(mut clippy) = tool("clippy-driver") else { return };
        clippy
            .args(["--edition=2024", "--crate-type=bin", "--emit=metadata", "-Cpanic=abort"])
            .args(["--check-cfg=cfg(pie)", "--cfg=pie"])
            // Only the rules of the house: what else clippy finds depends on its version.
            .args(["-Aclippy::all", "-Dunsafe_op_in_unsafe_fn"])
            .args(["-Dclippy::undocumented_unsafe_blocks", "-Dclippy::missing_safety_doc"])
            .args(["-Dclippy::multiple_unsafe_ops_per_block", "-Dclippy::unwrap_used"])
            .args(["-Dclippy::dbg_macro", "-Dclippy::todo", "-Dclippy::unimplemented"])
            .arg("-o")
            .arg(Path::new(env!("CARGO_TARGET_TMPDIR")).join(guest).with_extension("rmeta"))
            .arg(source(guest));
        succeeds(clippy);
    }
}

#[test]
fn guests_are_formatted() {
    // It follows the `mod` lines to every other file of the guests.
    let Some(mut rustfmt) = tool("rustfmt") else { return };
    rustfmt.args(["--check", "--edition=2024"]).args(GUESTS.map(source));
    succeeds(rustfmt);
}

#[test]
fn every_source_names_its_licence() {
    let mut folders = vec![PathBuf::from(env!("CARGO_MANIFEST_DIR"))];
    let mut sources = 0;
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("the sources can be listed") {
            let path = entry.expect("the sources can be listed").path();
            if path.is_dir() && !path.ends_with("target") {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(&path).expect("the sources can be read");
                let line = "// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause\n";
                assert!(text.starts_with(line), "{}", path.display());
                sources += 1;
            }
        }
    }
    assert!(sources > 20, "only {sources} sources found");
}
