// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The command line: one file a command, and what they share.
//!
//! Exit status: the guest's own for `run` (128 + signal when one ended it); 2 for a command line that makes no sense; 125 when
//! umbra itself could not do what it was asked, as `env(1)` and container tools have it.

mod adopt_demo;
mod age;
mod bench;
mod bench_ksm;
#[cfg(feature = "inject")]
mod campaign;
mod check;
mod deterministic;
mod dirty;
mod doctor;
mod guests;
mod images;
#[cfg(feature = "inject")]
mod inject;
mod ksm;
mod observers;
pub(crate) mod parse;
mod replacement;
mod replay;
mod reports;
mod run;
mod trace;

use crate::causes::{one_line, say};
use crate::engine::{EngineChoice, EngineConfig};
use crate::inject::Waits;
use crate::reactor::heed_children;
use clap::{CommandFactory, Parser, Subcommand, ValueEnum};
use shadow_mmu::inject::Faults;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::OnceLock;

/// Exit status of umbra's own failures.
pub const FAILED: u8 = 125;
/// Environment variable that names another KVM device.
pub const KVM_DEVICE: &str = "UMBRA_KVM_DEVICE";
/// Environment variable with the engine that is used where no option says which.
pub const ENGINE: &str = "UMBRA_ENGINE";

/// Run a static Linux program on page tables that umbra writes itself: under KVM, or as a traced process.
#[derive(Debug, Parser)]
#[command(name = "umbra", version, propagate_version = true, max_term_width = 100, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  umbra run hello                         a bundled guest; `umbra images` lists them
  umbra run --stats ./my-static-program   any static x86-64 ELF, with numbers at the end
  umbra run --engine ptrace hello         the same without KVM: as a traced process
  umbra run --adopt-demo                  what a guest sees of memory that umbra takes away (KVM)
  umbra doctor                            what this host offers, and what to do about the rest
  umbra bench fault --json                what a page fault costs here
  umbra inject oom-at-5th -- run ./prog   what a program does when its fifth mmap fails

Guests run under KVM where it can be used, else by ptrace, which is said. UMBRA_ENGINE=kvm or ptrace
asks for one where no --engine does. RUST_LOG=debug shows more; UMBRA_KVM_DEVICE names another
device than /dev/kvm.";

#[derive(Debug, Subcommand)]
enum Command {
    Run(Box<run::RunArgs>),
    Images(images::ImagesArgs),
    Doctor(doctor::DoctorArgs),
    Bench(bench::BenchArgs),
    #[cfg(feature = "inject")]
    Inject(inject::InjectArgs),
}

/// How a report is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    Text,
    /// For programs.
    Json,
}

/// The KVM device to use.
pub fn kvm_device() -> PathBuf {
    std::env::var_os(KVM_DEVICE).map_or_else(|| "/dev/kvm".into(), PathBuf::from)
}

/// The engine to use: what the command line said, or else the environment.
///
/// # Panics
/// [`ENGINE`] names no engine, and no command line said another, as commands of umbra's own find out first.
pub fn engine() -> EngineConfig {
    let of_environment = || engine_of_environment().unwrap_or_else(|refusal| panic!("{refusal}"));
    let choice = CHOSEN.get().copied().unwrap_or_else(of_environment);
    EngineConfig { choice, kvm_device: kvm_device() }
}

/// The environment names no engine.
#[derive(Debug, thiserror::Error)]
#[error("{ENGINE} is `{0}`: set it to auto, kvm or ptrace, or not at all")]
struct NoEngine(String);

/// What `--engine` said, if anything; for [`engine`].
static CHOSEN: OnceLock<EngineChoice> = OnceLock::new();

/// Has [`engine`] be `choice`, where there is one, and the environment's where there is none; which is returned.
fn choose_engine(choice: Option<EngineChoice>) -> Result<EngineConfig, NoEngine> {
    match choice {
        Some(choice) => {
            let _ = CHOSEN.set(choice);
        }
        None => {
            engine_of_environment()?;
        }
    }
    Ok(engine())
}

fn engine_of_environment() -> Result<EngineChoice, NoEngine> {
    let Some(value) = std::env::var_os(ENGINE).filter(|value| !value.is_empty()) else {
        return Ok(EngineChoice::Auto);
    };
    let value = value.to_string_lossy();
    EngineChoice::from_str(&value, false).map_err(|_| NoEngine(value.into_owned()))
}

/// Runs the command that the process was started with.
pub fn main() -> ExitCode {
    // While there is one thread.
    shadow_mmu::sync::AsymmetricFence::prepare();
    heed_children();
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn"))
        .format_timestamp(None)
        .init();
    let command = parse_words(std::env::args_os().collect()).command;
    let result = match command {
        Command::Run(args) => run::run(*args, &Faults::default(), &Waits::default()),
        Command::Images(args) => images::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Bench(args) => bench::run(args),
        #[cfg(feature = "inject")]
        Command::Inject(args) => inject::run(args),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            // One line, causes and all; a broken pipe is the reader's decision and no news.
            if !is_broken_pipe(&error) {
                say(one_line(&error));
            }
            ExitCode::from(if error.is::<NoEngine>() { 2 } else { FAILED })
        }
    }
}

/// What these words say; if they make no sense, umbra ends here.
fn parse_words(args: Vec<OsString>) -> Cli {
    let mut command = Cli::command();
    // What is global, or of clap's own, is in the options after this.
    command.build();
    let Some(run) = command.find_subcommand("run") else { return Cli::parse_from(args) };
    let takes_value = |option: &str| {
        let option = run.get_arguments().find(|arg| arg.get_long() == Some(option));
        option.is_some_and(|arg| arg.get_num_args().is_some_and(|values| values.min_values() > 0))
    };
    Cli::parse_from(ksm::join(args, takes_value))
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<std::io::Error>())
        .any(|cause| cause.kind() == std::io::ErrorKind::BrokenPipe)
}
