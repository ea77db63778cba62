// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A file that appears as a whole or not at all, in the place of one that may be there ([`WholeFile`]).

use crate::whole_file::WholeFile;
use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::{Path, PathBuf};

/// The promise of a file.
#[derive(Debug)]
pub(super) struct Replacement {
    path: PathBuf,
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
        ensure!(path.file_name().is_some(), "{} names no file", path.display());
        let replacement = Self { path };
        // Not kept: a guest may run for days, and umbra may be killed.
        replacement.begin()?;
        Ok(replacement)
    }

    fn begin(&self) -> Result<WholeFile> {
        WholeFile::begin(&self.path, 0o666).with_context(|| {
            format!("cannot write {} (by way of another file beside it)", self.path.display())
        })
    }

    /// Puts a file with this content in its place.
    pub(super) fn write(self, content: &[u8]) -> Result<()> {
        let mut file = self.begin()?;
        let cannot = format!("cannot write {} (by way of {})", self.path.display(), file.hidden().display());
        file.write(content).and_then(|()| file.finish()).context(cannot)
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
