// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A file that gets its name when it is whole.
//!
//! It is written without a name (`O_TMPFILE`), so that nothing is left behind whoever kills umbra, and linked to its name at the
//! end. Filesystems that have no files without names (NFS, some FUSE ones) get a hidden one beside the place, which is removed
//! unless umbra is killed meanwhile.
//!
//! To replace a file the new one needs a name before it takes the old one's: `link`, then `rename`. Killed between these two
//! system calls, umbra leaves a whole file under the hidden name.

use std::ffi::{CString, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// A file that is being written.
#[derive(Debug)]
pub(crate) struct WholeFile {
    file: File,
    path: PathBuf,
    /// A name of its own while it is written, and while it takes another's.
    hidden: PathBuf,
    is_named: bool,
}

impl WholeFile {
    /// Begins a file that is to be `path`, with these permissions less the umask's. Nothing is at `path` because of that.
    ///
    /// # Errors
    /// The host's; and `InvalidInput` where `path` names no file.
    pub(crate) fn begin(path: &Path, mode: u32) -> io::Result<Self> {
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        let folder = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let mut hidden = OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".{}.partial", std::process::id()));
        let hidden = folder.join(hidden);
        let unnamed = OpenOptions::new().write(true).mode(mode).custom_flags(libc::O_TMPFILE).open(folder);
        let (file, is_named) = match unnamed {
            Ok(file) => (file, false),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR)) => {
                let named = OpenOptions::new().write(true).create_new(true).mode(mode).open(&hidden)?;
                (named, true)
            }
            Err(error) => return Err(error),
        };
        Ok(Self { file, path: path.to_owned(), hidden, is_named })
    }

    /// The name that it has for a moment when it replaces another, and where it must, while it is written.
    pub(crate) fn hidden(&self) -> &Path {
        &self.hidden
    }

    /// Adds `content`.
    ///
    /// # Errors
    /// The host's.
    pub(crate) fn write(&mut self, content: &[u8]) -> io::Result<()> {
        self.file.write_all(content)
    }

    /// Gives it its name, which nobody has.
    ///
    /// # Errors
    /// The host's; `AlreadyExists` where somebody has it.
    pub(crate) fn finish_new(mut self) -> io::Result<()> {
        self.link(&self.path.clone())
    }

    /// Gives it its name, and takes it from who has it.
    ///
    /// # Errors
    /// The host's.
    pub(crate) fn finish(mut self) -> io::Result<()> {
        if !self.is_named {
            match self.link(&self.path.clone()) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                result => return result,
            }
            let hidden = self.hidden.clone();
            if self.link(&hidden).is_err() {
                // Left by one that was killed and had our process id, as in a container each has.
                let _ = fs::remove_file(&hidden);
                self.link(&hidden)?;
            }
            self.is_named = true;
        }
        fs::rename(&self.hidden, &self.path)?;
        self.is_named = false;
        Ok(())
    }

    fn link(&mut self, to: &Path) -> io::Result<()> {
        if self.is_named {
            // Whoever has the name keeps it; then the hidden name goes when `self` does.
            return fs::hard_link(&self.hidden, to);
        }
        let from = CString::new(format!("/proc/self/fd/{}", self.file.as_raw_fd()))?;
        let to = CString::new(to.as_os_str().as_bytes())?;
        // SAFETY: both names are C strings that live until the call returns.
        let result = unsafe {
            libc::linkat(libc::AT_FDCWD, from.as_ptr(), libc::AT_FDCWD, to.as_ptr(), libc::AT_SYMLINK_FOLLOW)
        };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

impl Drop for WholeFile {
    fn drop(&mut self) {
        if self.is_named {
            // Gone is what it should be.
            let _ = fs::remove_file(&self.hidden);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed test may panic")]
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn folder(test: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("umbra-whole-{test}-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        folder
    }

    fn names(folder: &Path) -> Vec<OsString> {
        let mut names: Vec<_> =
            fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    }

    /// The same file, as a filesystem without files without names would have it.
    fn named(path: &Path) -> WholeFile {
        let mut whole = WholeFile::begin(path, 0o600).unwrap();
        let hidden = whole.hidden.clone();
        whole.link(&hidden).unwrap();
        whole.is_named = true;
        whole
    }

    #[test]
    fn nothing_is_there_before_the_end_and_nothing_else_after_it() {
        let folder = folder("end");
        let path = folder.join("file");
        for begin in [|path: &Path| WholeFile::begin(path, 0o600).unwrap(), named] {
            let mut whole = begin(&path);
            whole.write(b"first").unwrap();
            assert!(!path.exists());
            whole.finish_new().unwrap();
            assert_eq!(fs::read(&path).unwrap(), b"first");
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);

            let mut second = begin(&path);
            second.write(b"second").unwrap();
            assert_eq!(second.finish_new().unwrap_err().kind(), io::ErrorKind::AlreadyExists);
            assert_eq!(fs::read(&path).unwrap(), b"first");

            let mut third = begin(&path);
            third.write(b"third").unwrap();
            third.finish().unwrap();
            assert_eq!(fs::read(&path).unwrap(), b"third");
            assert_eq!(names(&folder), ["file"]);
            fs::remove_file(&path).unwrap();
            drop(begin(&path));
            assert!(names(&folder).is_empty(), "one that is given up leaves nothing");
        }
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn what_a_killed_one_left_is_no_obstacle() {
        let folder = folder("left");
        let path = folder.join("file");
        fs::write(&path, "old").unwrap();
        let mut whole = WholeFile::begin(&path, 0o600).unwrap();
        fs::write(&whole.hidden, "half").unwrap();
        whole.write(b"new").unwrap();
        whole.finish().unwrap();
        assert_eq!((fs::read(&path).unwrap(), names(&folder)), (b"new".to_vec(), vec!["file".into()]));
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn who_has_no_name_or_no_folder_is_told() {
        let error = |path: &str| WholeFile::begin(Path::new(path), 0o600).unwrap_err().kind();
        assert_eq!(error("/"), io::ErrorKind::InvalidInput);
        assert_eq!(error("/nonexistent/file"), io::ErrorKind::NotFound);
    }
}
