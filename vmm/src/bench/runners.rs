// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Who can run one and the same bundled guest: umbra with each engine of this host, Linux itself, a translator of instructions.
//!
//! Rows of the KVM engine are named without a prefix, those of the ptrace engine begin with `ptrace.`. An engine that this host
//! does not have is named with its reason, and is no error unless it was asked for or there is no other. The translator is
//! `qemu-x86_64-static` (Debian's qemu-user-static), wherever it is in PATH.

use super::{Contestant, Host, NativeImage, Row, output, ratios, umbra};
use crate::causes::one_line;
use crate::cli::ENGINE;
use crate::engine::{EngineChoice, EngineConfig, EngineKind, choice};
use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;

/// The names of [`Runners::contestants`].
pub(super) const NATIVE: &str = "native";
pub(super) const QEMU: &str = "qemu-x86_64";
const QEMU_PROGRAM: &str = "qemu-x86_64-static";

/// The engines that a benchmark measures.
#[derive(Debug)]
pub(super) struct Engines {
    /// At least one.
    pub(super) present: Vec<EngineKind>,
    /// A line for each that this host does not have.
    pub(super) missing: Vec<String>,
    /// The host, as the first of them sees it.
    pub(super) host: Host,
}

impl Engines {
    /// Those that `config` asks for: one, or as many as there are.
    ///
    /// # Errors
    /// There is none; where several would do, the reasons of all.
    pub(super) fn of(config: &EngineConfig) -> Result<Self> {
        let wanted: &[_] = match config.choice {
            EngineChoice::Auto => &[EngineChoice::Kvm, EngineChoice::Ptrace],
            EngineChoice::Kvm => &[EngineChoice::Kvm],
            EngineChoice::Ptrace => &[EngineChoice::Ptrace],
        };
        let (mut present, mut missing, mut first) = (Vec::new(), Vec::new(), None);
        for &choice in wanted {
            match choice::trial(&EngineConfig { choice, ..config.clone() }) {
                Ok(engine) => {
                    present.push(engine.kind());
                    first.get_or_insert_with(|| Host::of(&*engine));
                }
                Err(error) => missing.push(format!("engine {choice}: {}", one_line(&error))),
            }
        }
        let Some(host) = first else {
            let missing = missing.join("; ");
            match config.choice {
                EngineChoice::Auto => bail!("no guest can be run here: {missing}"),
                EngineChoice::Kvm | EngineChoice::Ptrace => bail!(
                    "{missing}; it was asked for by --engine or {ENGINE}: without both, whatever engine works here is measured"
                ),
            }
        };
        Ok(Self { present, missing, host })
    }
}

/// What umbra's own row is called.
pub(super) fn umbra_with(engine: EngineKind) -> &'static str {
    match engine {
        EngineKind::Kvm => "umbra",
        EngineKind::Ptrace => "ptrace.umbra",
    }
}

/// One guest and all who run it.
#[derive(Debug)]
pub(super) struct Runners {
    guest: &'static str,
    native: NativeImage,
    qemu: Option<PathBuf>,
    engines: Vec<EngineKind>,
}

impl Runners {
    /// Of the bundled guest of this name.
    ///
    /// # Errors
    /// There is no such guest, or no room for its file.
    pub(super) fn new(guest: &'static str, engines: &[EngineKind]) -> Result<Self> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let qemu = std::env::split_paths(&path).map(|folder| folder.join(QEMU_PROGRAM));
        Ok(Self {
            guest,
            native: NativeImage::new(guest)?,
            qemu: qemu.into_iter().find(|path| path.is_file()),
            engines: engines.to_vec(),
        })
    }

    /// All of them, with `args` for the guest; a run gives what `read` reads in what the guest prints.
    pub(super) fn contestants<'a, T>(
        &'a self,
        args: &'a [&'a str],
        read: impl Fn(&str) -> Result<T> + Copy + 'a,
    ) -> Vec<Contestant<'a, T>> {
        let engines = self.engines.iter().map(|&engine| {
            Contestant::required(umbra_with(engine), move || {
                let mut command = umbra()?;
                command.args(["run", "--engine", &engine.to_string(), self.guest]).args(args);
                read(&output(&mut command)?)
            })
        });
        engines.chain(self.others(args, read)).collect()
    }

    /// Those that are not umbra.
    pub(super) fn others<'a, T>(
        &'a self,
        args: &'a [&'a str],
        read: impl Fn(&str) -> Result<T> + Copy + 'a,
    ) -> [Contestant<'a, T>; 2] {
        [
            Contestant::optional(NATIVE, move || read(&output(self.native.command().args(args))?)),
            Contestant::optional(QEMU, move || {
                let qemu = self.qemu.as_ref().with_context(|| {
                    format!("{QEMU_PROGRAM} is not in PATH (Debian: apt install qemu-user-static)")
                })?;
                // The file is one of ours, which the program inherits.
                read(&output(Command::new(qemu).arg(self.native.path()).args(args))?)
            }),
        ]
    }
}

/// For each of `what` (a suffix of rows' names), the medians of `pairs` of rows, one over another.
pub(super) fn ratios_of(rows: &[Row], what: &[&str], pairs: &[(&str, &str)]) -> BTreeMap<String, f64> {
    let names: Vec<_> = what
        .iter()
        .flat_map(|what| pairs.iter().map(move |(a, b)| (format!("{a}{what}"), format!("{b}{what}"))))
        .collect();
    let names: Vec<_> = names.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
    ratios(rows, &names)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

    use super::*;

    fn engines(choice: EngineChoice) -> Result<Engines> {
        Engines::of(&EngineConfig { choice, kvm_device: "/nonexistent/kvm".into() })
    }

    #[test]
    fn an_engine_that_is_missing_is_a_line_or_an_error_if_it_was_asked_for() {
        let error = one_line(&engines(EngineChoice::Kvm).unwrap_err());
        assert!(
            error.starts_with("engine kvm: ") && error.contains("/nonexistent/kvm does not exist"),
            "{error}"
        );
        assert!(error.contains("without both, whatever engine works here is measured"), "{error}");
        let Ok(engines) = engines(EngineChoice::Auto) else { return };
        assert_eq!(engines.present, [EngineKind::Ptrace]);
        assert!(engines.missing.len() == 1 && engines.missing[0].starts_with("engine kvm: "), "{engines:?}");
    }

    #[test]
    fn rows_are_compared_by_what_they_are_of() {
        let row = |name, value| Row::of(name, "s", vec![value]);
        let rows = [row("umbra.a", 2.0), row("native.a", 1.0), row("native.b", 1.0)];
        let ratios = ratios_of(&rows, &[".a", ".b"], &[("umbra", "native")]);
        assert_eq!(ratios, BTreeMap::from([("umbra.a/native.a".to_owned(), 2.0)]));
    }
}
