// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What is right: the same programs without umbra, each once.

use super::program::Program;
use super::spawn::spawn;
use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

/// What a program writes to stdout when nothing goes wrong; its status is 0 then.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Native {
    /// Of the guest that has the input.
    pub first: String,
    /// Of each further guest, which finds its stdin empty.
    pub other: String,
}

/// Native runs so far.
#[derive(Debug)]
pub(super) struct Natives {
    folder: PathBuf,
    known: Mutex<BTreeMap<Program, Arc<str>>>,
}

impl Natives {
    /// Writes the programs to `folder`, which is there.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn new(folder: &Path) -> Result<Self> {
        for name in super::image_names() {
            let Some(image) = guest_images::find(name) else { continue };
            let path = folder.join(name);
            fs::write(&path, image.elf)
                .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o755)))
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(Self { folder: folder.to_owned(), known: Mutex::default() })
    }

    /// What `program` says natively.
    ///
    /// # Errors
    /// It cannot be run, or does not end with 0: then nothing can be said of it under umbra.
    pub(super) fn of(&self, program: &Program) -> Result<Native> {
        let first = self.stdout(program)?;
        let other = if program.input.is_empty() {
            Arc::clone(&first)
        } else {
            self.stdout(&program.without_input())?
        };
        Ok(Native { first: first.as_ref().to_owned(), other: other.as_ref().to_owned() })
    }

    fn stdout(&self, program: &Program) -> Result<Arc<str>> {
        let known = || self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(stdout) = known().get(program) {
            return Ok(Arc::clone(stdout));
        }
        let what = || format!("cannot run {} {} natively", program.image, program.args.join(" "));
        let mut command = Command::new(self.folder.join(program.image));
        command.args(&program.args).env_clear();
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let mut child = spawn(&mut command).with_context(what)?;
        if let Some(mut stdin) = child.stdin.take() {
            // It is short, so the pipe holds it. A program may end without reading it all.
            let _ = stdin.write_all(program.input.as_bytes());
        }
        let output = child.wait_with_output().with_context(what)?;
        if !output.status.success() {
            bail!("{}: it ended with {}, so there is nothing to compare with", what(), output.status);
        }
        let stdout: Arc<str> = String::from_utf8_lossy(&output.stdout).into();
        known().insert(program.clone(), Arc::clone(&stdout));
        Ok(stdout)
    }
}
