// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The kernel's page sharing from outside: the files of /sys/kernel/mm/ksm (Documentation/admin-guide/mm/ksm.rst), and the CPU
//! time of its thread ksmd.

use anyhow::{Context, Result, bail};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where the kernel has these files.
pub(super) const FOLDER: &str = "/sys/kernel/mm/ksm";
/// Where it tells of its threads.
const PROC: &str = "/proc";

/// The files.
#[derive(Debug, Clone)]
pub(super) struct KsmFiles {
    folder: PathBuf,
}

impl KsmFiles {
    /// # Errors
    /// One line: there are none, since the kernel was built without CONFIG_KSM.
    pub(super) fn new(folder: &Path) -> Result<Self> {
        if !folder.join("run").exists() {
            bail!("there is no {}: this kernel has no KSM (CONFIG_KSM)", folder.display());
        }
        Ok(Self { folder: folder.to_owned() })
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// What a file says, as it must be written to it to say the same: of choices, the chosen one.
    ///
    /// # Errors
    /// It cannot be read.
    pub(super) fn setting(&self, name: &str) -> Result<String> {
        let path = self.path(name);
        let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let chosen = text.split_once('[').and_then(|(_, rest)| rest.split_once(']'));
        Ok(chosen.map_or(text.trim(), |(chosen, _)| chosen).to_owned())
    }

    /// # Errors
    /// It cannot be written, or the kernel does not take the value.
    pub(super) fn set(&self, name: &str, value: &str) -> Result<()> {
        let path = self.path(name);
        std::fs::write(&path, value).with_context(|| match value {
            "" => path.display().to_string(),
            _ => format!("cannot write {value} to {}", path.display()),
        })
    }

    /// A counter.
    ///
    /// # Errors
    /// It cannot be read.
    pub(super) fn number(&self, name: &str) -> Result<i64> {
        let text = self.setting(name)?;
        text.parse().with_context(|| format!("{} says `{text}`", self.path(name).display()))
    }

    /// Pages that need no memory of their own: those that share another's, and those that the zero page stands for.
    ///
    /// # Errors
    /// The counters cannot be read; kernels before 6.6 have no ksm_zero_pages.
    pub(super) fn saved_pages(&self) -> Result<i64> {
        Ok(self.number("pages_sharing")? + self.number("ksm_zero_pages")?)
    }

    /// Bytes of what ksmd keeps for each page that it has looked at: by what general_profit takes off for them.
    ///
    /// # Errors
    /// The counters cannot be read.
    pub(super) fn metadata_bytes(&self) -> Result<i64> {
        const PAGE: i64 = shadow_mmu::addr::PAGE_SIZE as i64;
        Ok(self.saved_pages()? * PAGE - self.number("general_profit")?)
    }
}

/// The kernel's thread.
#[derive(Debug)]
pub(super) struct KsmdThread {
    schedstat: PathBuf,
}

impl KsmdThread {
    /// # Errors
    /// It cannot be found, as in a container that does not see the kernel's threads.
    pub(super) fn find() -> Result<Self> {
        Self::find_in(Path::new(PROC))
    }

    fn find_in(proc: &Path) -> Result<Self> {
        let folders = std::fs::read_dir(proc).with_context(|| proc.display().to_string())?;
        for folder in folders.filter_map(Result::ok) {
            let path = folder.path();
            // A program may call itself so too; a thread of the kernel has no command line.
            let is_named = std::fs::read_to_string(path.join("comm")).is_ok_and(|name| name == "ksmd\n");
            if is_named && std::fs::read(path.join("cmdline")).is_ok_and(|words| words.is_empty()) {
                return Ok(Self { schedstat: path.join("schedstat") });
            }
        }
        bail!("no thread `ksmd` is in {}: its CPU time cannot be read", proc.display())
    }

    /// CPU time so far; while it runs, as of the last tick of its CPU.
    ///
    /// # Errors
    /// The kernel has no such statistics (CONFIG_SCHED_INFO).
    pub(super) fn cpu_time(&self) -> Result<Duration> {
        let read = || -> io::Result<Option<u64>> {
            let text = std::fs::read_to_string(&self.schedstat)?;
            Ok(text.split(' ').next().and_then(|word| word.parse().ok()))
        };
        let nanoseconds = read().with_context(|| self.schedstat.display().to_string())?;
        nanoseconds
            .map(Duration::from_nanos)
            .with_context(|| format!("{} does not begin with a number", self.schedstat.display()))
    }
}

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    /// A folder that is gone with this.
    #[derive(Debug)]
    pub(in super::super) struct Folder(pub(in super::super) PathBuf);

    impl Folder {
        pub(in super::super) fn new() -> Self {
            static NEXT: AtomicU32 = AtomicU32::new(0);
            let name = format!("umbra-ksm-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
            let path = std::env::temp_dir().join(name);
            std::fs::create_dir(&path).unwrap();
            Self(path)
        }

        pub(in super::super) fn file(&self, name: &str, text: &str) {
            std::fs::write(self.0.join(name), text).unwrap();
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn files_are_read_as_they_would_be_written() {
        let folder = Folder::new();
        let error = KsmFiles::new(&folder.0).unwrap_err().to_string();
        assert!(error.contains("CONFIG_KSM"), "{error}");
        folder.file("run", "0\n");
        folder.file("advisor_mode", "none [scan-time]\n");
        folder.file("pages_sharing", "10\n");
        folder.file("ksm_zero_pages", "5\n");
        folder.file("general_profit", "-100\n");
        let files = KsmFiles::new(&folder.0).unwrap();
        assert_eq!(files.setting("run").unwrap(), "0");
        assert_eq!(files.setting("advisor_mode").unwrap(), "scan-time");
        assert_eq!((files.saved_pages().unwrap(), files.metadata_bytes().unwrap()), (15, 15 * 4096 + 100));
        assert!(files.number("advisor_mode").is_err() && files.number("full_scans").is_err());
        files.set("run", "2").unwrap();
        assert_eq!(files.setting("run").unwrap(), "2");
        let error = KsmFiles { folder: "/nonexistent".into() }.set("run", "1").unwrap_err();
        assert!(format!("{error:#}").starts_with("cannot write 1 to /nonexistent/run: "), "{error:#}");
    }

    #[test]
    fn the_kernels_thread_is_told_from_a_program_of_that_name() {
        let folder = Folder::new();
        for (pid, comm, cmdline, schedstat) in
            [("1", "init\n", "init", "1 2 3\n"), ("70", "ksmd\n", "ksmd", "5 6 7\n")]
        {
            std::fs::create_dir(folder.0.join(pid)).unwrap();
            folder.file(&format!("{pid}/comm"), comm);
            folder.file(&format!("{pid}/cmdline"), cmdline);
            folder.file(&format!("{pid}/schedstat"), schedstat);
        }
        assert!(KsmdThread::find_in(&folder.0).is_err());
        folder.file("70/cmdline", "");
        let thread = KsmdThread::find_in(&folder.0).unwrap();
        assert_eq!(thread.cpu_time().unwrap(), Duration::from_nanos(5));
        folder.file("70/schedstat", "x\n");
        assert!(thread.cpu_time().is_err());
    }
}
