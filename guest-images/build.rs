// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Builds each guest with one plain `rustc` call into `OUT_DIR/NAME.elf`.
//!
//! Cargo cannot do it for us: the guests are `no_std` programs without a C library, linked statically, and no
//! target for such a thing is installed on a machine that has only stable Rust and gcc. One `rustc` call a
//! guest also keeps the images the same whatever profile or RUSTFLAGS umbra itself is built with, so a
//! measurement made with a debug build of umbra and one made with a release build ran the same guest.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, thread};

/// A guest to build: the image's name, its root source file, and whether it becomes a static-pie.
struct Guest {
    name: &'static str,
    source: &'static str,
    pie: bool,
}

const GUESTS: [Guest; 13] = [
    Guest { name: "attack", source: "attack.rs", pie: false },
    Guest { name: "hello", source: "hello.rs", pie: false },
    Guest { name: "hello-pie", source: "hello.rs", pie: true },
    Guest { name: "touch", source: "touch.rs", pie: false },
    Guest { name: "compute", source: "compute.rs", pie: false },
    Guest { name: "syscalls", source: "syscalls.rs", pie: false },
    Guest { name: "threads", source: "threads.rs", pie: false },
    Guest { name: "memstress", source: "memstress.rs", pie: false },
    Guest { name: "mix", source: "mix.rs", pie: false },
    Guest { name: "race", source: "race.rs", pie: false },
    Guest { name: "torture", source: "torture.rs", pie: false },
    Guest { name: "victim", source: "victim.rs", pie: false },
    Guest { name: "watcher", source: "watcher.rs", pie: false },
];

/// Flags every guest gets; see `main` for those that depend on the environment.
const FLAGS: [&str; 24] = [
    "--edition=2024",
    "--crate-type=bin",
    "--emit=link",
    "--cap-lints=warn",
    "--check-cfg=cfg(pie)",
    "-Copt-level=2",
    "-Cpanic=abort",
    // One unit, no debug information, no build paths: the same source gives the same bytes.
    "-Ccodegen-units=1",
    "-Cdebuginfo=0",
    "-Cstrip=debuginfo",
    // A guest checks somebody else's arithmetic; let it not trip over its own unnoticed.
    "-Coverflow-checks=on",
    "-Cforce-unwind-tables=no",
    // No RELRO: the segment would be split for a dynamic loader that never comes.
    "-Crelro-level=off",
    "-Ctarget-feature=+crt-static",
    "-Clink-arg=-nostartfiles",
    "-Clink-arg=-nostdlib",
    "-Clink-arg=-Wl,--build-id=none",
    "-Clink-arg=-Wl,--gc-sections",
    "-Clink-arg=-Wl,-z,noexecstack",
    "-Clink-arg=-Wl,-z,max-page-size=4096",
    // Code, constants and data in pages of their own, so that no page of the file is mapped with two
    // protections.
    "-Clink-arg=-Wl,-z,separate-code",
    "-Clink-arg=-Wl,-z,norelro",
    "-Clink-arg=-Wl,--entry=_start",
    "-Cdefault-linker-libraries=no",
];

fn main() {
    let package = PathBuf::from(var("CARGO_MANIFEST_DIR"));
    let out = PathBuf::from(var("OUT_DIR"));
    let target = var("TARGET");
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=src/guests");
    println!("cargo:rerun-if-changed=src/usage.rs");
    println!("cargo:rerun-if-env-changed=RUSTC_LINKER");

    if var("CARGO_CFG_TARGET_ARCH") != "x86_64" || var("CARGO_CFG_TARGET_OS") != "linux" {
        fail(&format!("the guests are x86-64 Linux programs and cannot be built for {target}"));
    }
    // Every guest is a rustc of one to two seconds, so they run side by side.
    let failures: Vec<String> = thread::scope(|scope| {
        let runs: Vec<_> =
            GUESTS.iter().map(|guest| scope.spawn(|| build(guest, &package, &out, &target))).collect();
        runs.into_iter()
            .filter_map(|run| run.join().expect("the building thread does not panic").err())
            .collect()
    });
    if !failures.is_empty() {
        fail(&failures.join("\n"));
    }
}

/// Compiles and links one guest; the error is text for a person.
fn build(guest: &Guest, package: &Path, out: &Path, target: &str) -> Result<(), String> {
    let image = out.join(guest.name).with_extension("elf");
    let source = package.join("src/guests").join(guest.source);
    let mut rustc = Command::new(var("RUSTC"));
    rustc
        .args(FLAGS)
        .arg(format!("--crate-name={}", guest.name.replace('-', "_")))
        .arg(format!("--target={target}"))
        // A panic message names its source file; without this it would name the builder's home directory.
        .arg(format!("--remap-path-prefix={}=guest-images", package.display()))
        .arg(if guest.pie { "-Crelocation-model=pie" } else { "-Crelocation-model=static" })
        .arg("-o")
        .arg(&image)
        .arg(&source)
        // With crt-static rustc asks gcc for `-static -no-pie` or `-static-pie` by the relocation model.
        .current_dir(package);
    if guest.pie {
        rustc.arg("--cfg=pie");
    }
    if let Some(linker) = env::var_os("RUSTC_LINKER") {
        rustc.arg("-C").arg({
            let mut flag = std::ffi::OsString::from("linker=");
            flag.push(linker);
            flag
        });
    }
    // What the user wants for umbra (sanitizers, coverage, target-cpu, a wrapper) must not reach the guests.
    for name in ["RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER"] {
        rustc.env_remove(name);
    }
    let run =
        rustc.output().map_err(|error| format!("guest {}: cannot run {rustc:?}: {error}", guest.name))?;
    let messages = String::from_utf8_lossy(&run.stderr);
    if !run.status.success() {
        return Err(format!("guest {}: rustc failed ({}):\n{messages}\n{rustc:?}", guest.name, run.status));
    }
    for line in messages.lines().filter(|line| !line.trim().is_empty()) {
        println!("cargo:warning=guest {}: {line}", guest.name);
    }
    Ok(())
}

/// A variable that cargo sets for every build script.
fn var(name: &str) -> String {
    env::var(name).unwrap_or_else(|error| fail(&format!("{name} is not set as cargo sets it: {error}")))
}

fn fail(message: &str) -> ! {
    eprintln!("guest-images: {message}");
    std::process::exit(1);
}
