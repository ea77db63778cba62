// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Settings of the host that are put back, whatever happens to this process.
//!
//! A child process that knows the old values waits for the end of a pipe whose other end only this process holds. It comes
//! when [`Settings`] is dropped, and also when this process panics, is ended by a signal, or by SIGKILL, which no handler sees.
//! The child then writes the old values and ends: in the order in which they were changed, so `run` last, since ksmd is to go on
//! with all of them. It ignores the signals of a terminal, which are sent to it too.
//!
//! Where the kernel's advisor was on, pages_to_scan was the advisor's: it changes by itself, and cannot be written while the
//! advisor is on. The advisor sets it again when it is turned on, so it is left to it.
//!
//! Between fork and its end the child calls only what may be called there (signal-safety(7)): other threads of this process
//! may have held any lock at that moment. It closes every descriptor that is not its own, so that it keeps nobody's pipe open.
//!
//! A lock on the file `run` keeps two such processes from taking each other's values for the host's. The child shares it, so it
//! is held until the old values are back.

use super::sysfs::KsmFiles;
use anyhow::{Context, Result, bail};
use std::ffi::CString;
use std::fs::File;
use std::io::{self, PipeWriter};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;

/// What is changed, and put back, in this order: the advisor first, for while it is on it owns pages_to_scan. Not max_page_sharing and
/// merge_across_nodes: they cannot be changed while anything on the host is merged.
const CHANGED: [&str; 6] =
    ["advisor_mode", "pages_to_scan", "sleep_millisecs", "smart_scan", "use_zero_pages", "run"];

/// What of the `old` settings is put back, in this order.
fn put_back<'a>(old: &'a [(&'static str, String)]) -> impl Iterator<Item = (&'static str, &'a str)> {
    let has_advisor = old.iter().any(|(name, value)| *name == "advisor_mode" && value != "none");
    let settings = old.iter().map(|(name, value)| (*name, value.as_str()));
    settings.filter(move |(name, _)| !has_advisor || *name != "pages_to_scan")
}

/// The right to change the settings; dropping it puts the old ones back, and waits until they are.
#[derive(Debug)]
pub(super) struct Settings {
    files: KsmFiles,
    old: Vec<(&'static str, String)>,
    /// `None` once the child has been told.
    alive: Option<PipeWriter>,
    child: libc::pid_t,
    lock: File,
}

impl Settings {
    /// Remembers the settings. Nothing is changed yet.
    ///
    /// # Errors
    /// One line: not root, files that this kernel does not have, somebody else is at it.
    pub(super) fn take(files: KsmFiles) -> Result<Self> {
        let mut old = Vec::with_capacity(CHANGED.len());
        for name in CHANGED {
            // A kernel that does not have one of the younger ones has nothing to be changed there.
            if files.path(name).exists() {
                old.push((name, files.setting(name)?));
            }
        }
        let path = files.path("run");
        let lock = File::options().write(true).open(&path);
        let lock = lock.with_context(|| format!("{} cannot be written, which takes root", path.display()))?;
        if let Err(error) = lock.try_lock() {
            bail!("{} is locked: another benchmark drives ksmd ({error})", path.display());
        }
        let mut restored = Vec::with_capacity(old.len());
        for (name, value) in put_back(&old) {
            let path = CString::new(files.path(name).as_os_str().as_bytes()).context("a path with a zero")?;
            restored.push((path, value.as_bytes().to_vec()));
        }
        let (end, alive) = io::pipe().context("cannot make a pipe")?;
        // SAFETY: the child calls only what is allowed there, as `wait_and_restore` says, and never returns.
        let child = unsafe { libc::fork() };
        match child {
            -1 => Err(io::Error::last_os_error()).context("cannot fork"),
            0 => wait_and_restore(end.as_raw_fd(), lock.as_raw_fd(), &restored),
            _ => Ok(Self { files, old, alive: Some(alive), child, lock }),
        }
    }

    pub(super) fn files(&self) -> &KsmFiles {
        &self.files
    }

    /// Changes a setting, if this kernel has it.
    ///
    /// # Errors
    /// The kernel does not take the value.
    ///
    /// # Panics
    /// `name` is not among those that are put back.
    pub(super) fn set(&self, name: &str, value: &str) -> Result<()> {
        assert!(CHANGED.contains(&name), "{name} would not be put back");
        match self.old.iter().any(|(old, _)| *old == name) {
            true => self.files.set(name, value),
            false => Ok(()),
        }
    }
}

impl Drop for Settings {
    fn drop(&mut self) {
        self.alive = None;
        let mut status = 0;
        // SAFETY: the child is ours and is waited for once; the status is a live int.
        while unsafe { libc::waitpid(self.child, &raw mut status, 0) } < 0
            && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted
        {}
        // Nothing is left to do, unless somebody killed the child.
        for (name, old) in put_back(&self.old) {
            let is_back = || self.files.setting(name).is_ok_and(|now| now == old);
            if !is_back() && (self.files.set(name, old).is_err() || !is_back()) {
                log::error!(
                    "{} was {old} and cannot be put back: write it yourself",
                    self.files.path(name).display()
                );
            }
        }
        // Closing it is not enough where somebody has forked meanwhile and holds a duplicate.
        let _ = self.lock.unlock();
    }
}

/// The child: everything here is a system call, on memory that was made before.
fn wait_and_restore(end: RawFd, lock: RawFd, old: &[(CString, Vec<u8>)]) -> ! {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT] {
        // SAFETY: ignoring a signal runs no code of ours.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
    let (low, high) = (end.min(lock), end.max(lock));
    for (first, last) in [(0, low - 1), (low + 1, high - 1), (high + 1, RawFd::MAX)] {
        if first <= last {
            // SAFETY: this process uses no other descriptor again.
            unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
        }
    }
    let mut byte = 0_u8;
    loop {
        // SAFETY: one byte is written, to a live byte.
        let read = unsafe { libc::read(end, (&raw mut byte).cast(), 1) };
        // Nobody writes to it, so what is no interruption is the end. Asking for errno takes no lock and no memory.
        if read >= 0 || io::Error::last_os_error().raw_os_error() != Some(libc::EINTR) {
            break;
        }
    }
    let mut status = 0;
    for (path, value) in old {
        // SAFETY: the path is a C string.
        let fd = unsafe { libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_TRUNC | libc::O_CLOEXEC) };
        // SAFETY: that many bytes are there; a bad descriptor is an error.
        if unsafe { libc::write(fd, value.as_ptr().cast(), value.len()) } != value.len() as isize {
            status = 1;
        }
        // SAFETY: it was opened above, or is none.
        unsafe { libc::close(fd) };
    }
    // SAFETY: it ends this process, without anything of its parent's.
    unsafe { libc::_exit(status) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

    use super::super::sysfs::tests::Folder;
    use super::*;
    use std::io::{BufRead, BufReader};
    use std::os::unix::process::ExitStatusExt;
    use std::path::Path;
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    const FOLDER: &str = "UMBRA_TEST_KSM_FOLDER";
    const AT_FIRST: [(&str, &str); 4] =
        [("run", "1"), ("sleep_millisecs", "20"), ("pages_to_scan", "100"), ("advisor_mode", "none")];

    fn folder() -> Folder {
        let folder = Folder::new();
        for (name, value) in AT_FIRST {
            folder.file(name, value);
        }
        folder.file("advisor_mode", "[none] scan-time\n");
        folder
    }

    fn read(folder: &Path) -> Vec<(&'static str, String)> {
        let files = KsmFiles::new(folder).unwrap();
        AT_FIRST.iter().map(|(name, _)| (*name, files.setting(name).unwrap())).collect()
    }

    fn change(folder: &Path) -> Settings {
        let settings = Settings::take(KsmFiles::new(folder).unwrap()).unwrap();
        for (name, value) in
            [("advisor_mode", "off"), ("pages_to_scan", "99999"), ("sleep_millisecs", "0"), ("run", "0")]
        {
            settings.set(name, value).unwrap();
        }
        // No such file here.
        settings.set("smart_scan", "1").unwrap();
        settings
    }

    fn is_as_at_first(folder: &Path) -> bool {
        read(folder) == AT_FIRST.map(|(name, value)| (name, value.to_owned()))
    }

    #[test]
    fn dropping_puts_everything_back() {
        let folder = folder();
        let settings = change(&folder.0);
        assert!(!is_as_at_first(&folder.0));
        let error = Settings::take(KsmFiles::new(&folder.0).unwrap()).unwrap_err();
        assert!(error.to_string().contains("another benchmark"), "{error}");
        // As a child has it that another test of this process forks.
        let _duplicate = settings.lock.try_clone().unwrap();
        drop(settings);
        assert!(is_as_at_first(&folder.0), "{:?}", read(&folder.0));
        // And the lock is free.
        drop(change(&folder.0));
    }

    #[test]
    fn what_the_advisor_owns_is_left_to_it() {
        let folder = folder();
        folder.file("advisor_mode", "none [scan-time]\n");
        let settings = change(&folder.0);
        drop(settings);
        let now = read(&folder.0);
        let advised = [("pages_to_scan", "99999"), ("advisor_mode", "scan-time")];
        let expected = [AT_FIRST[0], AT_FIRST[1], advised[0], advised[1]];
        assert_eq!(now, expected.map(|(name, value)| (name, value.to_owned())));
    }

    #[test]
    fn ksmd_runs_again_when_all_else_is_back() {
        for (advisor, expected) in [
            ("none", &["advisor_mode", "pages_to_scan", "sleep_millisecs", "run"][..]),
            ("scan-time", &["advisor_mode", "sleep_millisecs", "run"]),
        ] {
            let folder = folder();
            folder.file("advisor_mode", advisor);
            let settings = Settings::take(KsmFiles::new(&folder.0).unwrap()).unwrap();
            let order: Vec<_> = put_back(&settings.old).map(|(name, _)| name).collect();
            assert_eq!(order, expected);
        }
    }

    #[test]
    fn without_the_child_dropping_does_it() {
        let folder = folder();
        let settings = change(&folder.0);
        // SAFETY: the child is ours, and has not been waited for.
        assert_eq!(unsafe { libc::kill(settings.child, libc::SIGKILL) }, 0);
        drop(settings);
        assert!(is_as_at_first(&folder.0), "{:?}", read(&folder.0));
    }

    #[test]
    fn a_panic_puts_everything_back() {
        let folder = folder();
        let panicked = std::panic::catch_unwind(|| {
            let _settings = change(&folder.0);
            panic!("as it is meant to be");
        });
        assert!(panicked.is_err() && is_as_at_first(&folder.0));
    }

    #[test]
    #[should_panic(expected = "would not be put back")]
    fn what_is_not_put_back_is_not_changed() {
        let folder = folder();
        let _ = change(&folder.0).set("max_page_sharing", "2");
    }

    #[test]
    fn a_file_that_cannot_be_written_takes_root() {
        let folder = Folder::new();
        // Nobody can open a folder for writing, root included.
        std::fs::create_dir(folder.0.join("run")).unwrap();
        let files = KsmFiles::new(&folder.0).unwrap();
        assert!(Settings::take(files).is_err());
    }

    /// Not a test: the process that is killed by the one below.
    #[test]
    #[ignore = "run by another test"]
    fn changes_and_waits() {
        let Some(folder) = std::env::var_os(FOLDER) else { return };
        for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
            // Who started the tests may ignore it, as nohup does, which is inherited.
            // SAFETY: the default action runs no code of ours.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
        let _settings = change(Path::new(&folder));
        println!("changed");
        std::thread::sleep(Duration::from_secs(600));
    }

    #[test]
    fn any_end_of_the_process_puts_everything_back() {
        for signal in [libc::SIGKILL, libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
            let folder = folder();
            let mut child = Command::new(std::env::current_exe().unwrap())
                .args([
                    "--exact",
                    "bench::ksm::restore::tests::changes_and_waits",
                    "--ignored",
                    "--nocapture",
                ])
                .env(FOLDER, &folder.0)
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let stdout = BufReader::new(child.stdout.take().unwrap());
            assert!(stdout.lines().map_while(Result::ok).any(|line| line.ends_with("changed")));
            assert!(!is_as_at_first(&folder.0));
            let pid = child.id() as libc::pid_t;
            // SAFETY: the process is our child and has not been waited for.
            assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
            assert_eq!(child.wait().unwrap().signal(), Some(signal));
            let began = Instant::now();
            while !is_as_at_first(&folder.0) {
                assert!(began.elapsed() < Duration::from_secs(60), "signal {signal}: {:?}", read(&folder.0));
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
}
