// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guests that are injected into, and what counts of what they say.

use super::LIMIT;
use super::common::{STATIC, cc, finish, native_images};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A guest: how to run it under umbra, and as a process.
#[derive(Debug, Clone)]
pub(crate) struct Guest {
    /// Options of `umbra run`.
    options: &'static [&'static str],
    /// The program under umbra: a bundled one by its name, or a file.
    program: OsString,
    args: Vec<OsString>,
    native: PathBuf,
    input: &'static [u8],
    /// The lines of its output that say what it computed begin like this; all if it is empty.
    answers: &'static str,
}

impl Guest {
    /// A bundled one, with words of its command line.
    pub(crate) fn bundled(images: &Path, line: &str) -> Self {
        let mut words = line.split(' ');
        let name = words.next().unwrap();
        Self {
            options: &[],
            program: name.into(),
            args: words.map(OsString::from).collect(),
            native: images.join(name),
            input: b"",
            answers: "",
        }
    }

    /// Many threads, whose stores tell when a translation outlives its page.
    pub(crate) fn threads(images: &Path) -> Self {
        Self::bundled(images, "threads --writers 2 --rounds 3 --pages 32")
    }

    /// Random memory calls, each held against a model of Linux's rules.
    pub(crate) fn torture(images: &Path) -> Self {
        Self::bundled(images, "torture 1 --ops 200 --pages 64")
    }

    /// A program whose pages are shared while it writes them.
    pub(crate) fn mix(images: &Path) -> Self {
        Self {
            options: &["--ksm=scan=100000/1ms"],
            input: b"fill mix\nmergeable\nwork 20000\nverify\nfill pairs\nwork 20000\nverify\nfill zeros\nwork 20000\nverify\nquit\n",
            answers: "verify: ",
            ..Self::bundled(images, "mix --pages 512")
        }
    }

    /// Memory of the host that is shown to a guest, and changed; the demo says itself whether all was as promised.
    pub(crate) fn adopted() -> Self {
        Self {
            options: &["--adopt-demo"],
            program: OsString::new(),
            args: Vec::new(),
            native: "/bin/true".into(),
            input: b"",
            answers: "never printed",
        }
    }

    /// A C program.
    pub(crate) fn c(folder: &Path, name: &str, source: &str, args: &[&str]) -> Self {
        let program = cc(folder, name, source, STATIC);
        Self {
            options: &[],
            program: program.clone().into(),
            args: args.iter().map(OsString::from).collect(),
            native: program,
            input: b"",
            answers: "",
        }
    }

    /// The same with options of `umbra run`.
    pub(crate) fn with_options(self, options: &'static [&'static str]) -> Self {
        Self { options, ..self }
    }

    /// The same with this to read.
    pub(crate) fn with_input(self, input: &'static [u8]) -> Self {
        Self { input, ..self }
    }

    /// The words after `umbra`.
    pub(crate) fn run(&self) -> Vec<OsString> {
        let mut words: Vec<OsString> = vec!["run".into()];
        words.extend(self.options.iter().map(OsString::from));
        words.push("--check".into());
        if !self.program.is_empty() {
            words.push(self.program.clone());
        }
        words.extend(self.args.iter().cloned());
        words
    }

    pub(crate) fn input(&self) -> &'static [u8] {
        self.input
    }

    /// What it does as a process.
    pub(crate) fn native(&self) -> Output {
        finish(Command::new(&self.native).args(&self.args), self.input, LIMIT)
    }

    /// What it computed, of all that it printed.
    pub(crate) fn answer(&self, stdout: &[u8]) -> String {
        let text = String::from_utf8_lossy(stdout);
        text.lines().filter(|line| line.starts_with(self.answers)).collect::<Vec<_>>().join("\n")
    }

    /// The name that it begins its complaints with.
    pub(crate) fn name(&self) -> &str {
        self.native.file_name().unwrap().to_str().unwrap()
    }

    /// Whether nothing is said of the audits at the end.
    pub(crate) fn is_unchecked(&self) -> bool {
        self.program.is_empty()
    }
}

/// The bundled programs as files.
pub(crate) fn images(test: &str) -> PathBuf {
    native_images(&format!("{test}-images"))
}
