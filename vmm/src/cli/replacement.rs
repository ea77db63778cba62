// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A file that appears as a whole or not at all: written under another name beside it, then renamed.

use anyhow::{Context, Result, ensure};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

/// The promise of a file.
#[derive(Debug)]
pub(super) struct Replacement {
    path: PathBuf,
    partial: PathBuf,
}

impl Replacement {
    /// Makes sure, as far as that can be known, that `path` can be written later. Leaves what is there alone.
    pub(super) fn prepare(path: &Path) -> Result<Self> {
        // A link goes on to lead to the file.
        let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        if let Ok(there) = fs::metadata(&path) {
            ensure!(
                there.is_file(),
                "cannot write {}: it is no regular file, so it cannot be replaced",
                path.display()
            );
        }
        let mut name = std::ffi::OsString::from(".");
        name.push(path.file_name().with_context(|| format!("{} names no file", path.display()))?);
        name.push(format!(".{}.partial", std::process::id()));
        let replacement = Self { partial: path.with_file_name(name), path };
        // Not kept: a guest may run for days, and umbra may be killed.
        replacement.create()?;
        replacement.remove_partial();
        Ok(replacement)
    }

    fn create(&self) -> Result<File> {
        File::create_new(&self.partial).with_context(|| {
            format!("cannot write {} (by way of {} beside it)", self.path.display(), self.partial.display())
        })
    }

    fn remove_partial(&self) {
        // Gone is what it should be.
        let _ = fs::remove_file(&self.partial);
    }

    /// Puts a file with this content in its place.
    pub(super) fn write(self, content: &[u8]) -> Result<()> {
        let written = self.create().and_then(|mut file| {
            file.write_all(content)
                .and_then(|()| fs::rename(&self.partial, &self.path))
                .with_context(|| format!("cannot write {}", self.path.display()))
        });
        if written.is_err() {
            self.remove_partial();
        }
        written
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed test may panic")]
    use super::*;

    fn folder(test: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("umbra-replacement-{test}-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        folder
    }

    #[test]
    fn what_was_there_stays_until_the_new_is_whole() {
        let folder = folder("whole");
        let path = folder.join("map.svg");
        fs::write(&path, "old").unwrap();
        let replacement = Replacement::prepare(&path).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
        replacement.write(b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn what_cannot_be_replaced_is_refused_at_once() {
        let said = |path: &str| format!("{:#}", Replacement::prepare(Path::new(path)).unwrap_err());
        assert!(said("/nonexistent/folder/map.svg").contains("/nonexistent/folder/map.svg"));
        assert!(said("/dev/null").contains("no regular file"));
        assert!(said("/").contains("no regular file"));
    }
}
