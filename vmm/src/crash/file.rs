// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where a report goes: `umbra-report-PID.txt`, or `umbra-report-PID-2.txt` and so on where that is taken.
//!
//! Into the folder that the operator named; else into the current one, and where that cannot be written into `$TMPDIR`, or
//! `/tmp`. The file is new, whole from the moment that it has its name, and readable for its owner only.

use crate::whole_file::WholeFile;
use std::io;
use std::path::{Path, PathBuf};

/// Reports of one process in one folder.
const MOST: u32 = 1000;
const OWNER_ONLY: u32 = 0o600;

/// The name of the `number`th report of process `pid` in `folder`; the first is 1.
pub fn report_path(folder: &Path, pid: u32, number: u32) -> PathBuf {
    match number {
        1 => folder.join(format!("umbra-report-{pid}.txt")),
        _ => folder.join(format!("umbra-report-{pid}-{number}.txt")),
    }
}

/// Writes `text` to a new file in `folder`, and returns its path. `None`: wherever it can be written.
///
/// # Errors
/// The host's: of the folder that was named, or of the last that was tried.
pub fn write(folder: Option<&Path>, text: &str) -> io::Result<PathBuf> {
    match folder {
        Some(folder) => write_in(folder, text),
        None => {
            let temporary = std::env::temp_dir();
            write_in(Path::new("."), text).or_else(|_| write_in(&temporary, text))
        }
    }
}

fn write_in(folder: &Path, text: &str) -> io::Result<PathBuf> {
    let folder = std::path::absolute(folder)?;
    let mut taken = io::Error::from(io::ErrorKind::AlreadyExists);
    for number in 1..=MOST {
        let path = report_path(&folder, std::process::id(), number);
        if path.symlink_metadata().is_ok() {
            continue;
        }
        let mut file = WholeFile::begin(&path, OWNER_ONLY)?;
        file.write(text.as_bytes())?;
        match file.finish_new() {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => taken = error,
            result => return result.map(|()| path),
        }
    }
    Err(taken)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed test may panic")]
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn reports_do_not_overwrite_each_other_and_are_the_owners() {
        let pid = std::process::id();
        let folder = std::env::temp_dir().join(format!("umbra-reports-{pid}"));
        fs::create_dir_all(&folder).unwrap();
        // Also not what a link leads to.
        let secret = folder.join("secret");
        fs::write(&secret, "mine").unwrap();
        std::os::unix::fs::symlink(&secret, report_path(&folder, pid, 2)).unwrap();
        let paths = ["first", "third"].map(|text| write(Some(&folder), text).unwrap());
        assert_eq!(paths, [1, 3].map(|number| report_path(&folder, pid, number)));
        assert_eq!(paths.each_ref().map(|path| fs::read_to_string(path).unwrap()), ["first", "third"]);
        assert_eq!(fs::read_to_string(&secret).unwrap(), "mine");
        assert!(paths.iter().all(|path| fs::metadata(path).unwrap().permissions().mode() & 0o777 == 0o600));
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 4, "and nothing else");
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn a_folder_that_was_named_is_the_only_one_tried() {
        assert!(write(Some(Path::new("/nonexistent/folder")), "text").is_err());
    }
}
