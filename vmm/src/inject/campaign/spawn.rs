// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Starts the processes of a campaign: none outlives it, and none inherits its signal mask.
//!
//! A campaign blocks the signals that end it, to read them; std hands the mask on to what it starts. And a campaign that is killed
//! cannot end its runs itself, so the kernel does (`PR_SET_PDEATHSIG`): when the *thread* that started a process is gone, so whoever
//! starts one waits for it.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::time::Duration;

/// Between tries to start a file that is being written.
const PAUSE: Duration = Duration::from_millis(5);
/// How often that is tried: for two seconds at least.
const TRIES: u32 = 400;

/// Starts `command` with no signal blocked; it is killed when the calling thread ends.
///
/// A file that was just written cannot be executed (ETXTBSY) while another thread's fork, which has not come to its exec yet, holds the
/// descriptor that it was written through. That passes, so it is tried again, for a limited time.
///
/// # Errors
/// The host's.
pub(super) fn spawn(command: &mut Command) -> io::Result<Child> {
    // SAFETY: it takes no memory and cannot fail.
    let parent = unsafe { libc::getpid() };
    // SAFETY: the closure makes system calls only: it allocates nothing and takes no lock.
    let command = unsafe { command.pre_exec(move || prepare(parent)) };
    for _ in 1..TRIES {
        match command.spawn() {
            Err(error) if error.raw_os_error() == Some(libc::ETXTBSY) => std::thread::sleep(PAUSE),
            result => return result,
        }
    }
    command.spawn()
}

/// In the child, before its exec.
fn prepare(parent: libc::pid_t) -> io::Result<()> {
    // SAFETY: it takes plain numbers.
    if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it takes no memory and cannot fail.
    if unsafe { libc::getppid() } != parent {
        // The campaign was gone before that was asked for.
        return Err(io::ErrorKind::Interrupted.into());
    }
    // SAFETY: all zeros is a set of signals.
    let mut none: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `none` is ours to write.
    unsafe { libc::sigemptyset(&mut none) };
    // SAFETY: `none` is a set; where the old mask would go is null, so it is not told.
    if unsafe { libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, File};
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    use std::os::unix::process::ExitStatusExt;
    use std::process::Stdio;
    use std::sync::mpsc::channel;

    #[test]
    fn a_child_blocks_no_signal_though_its_parent_does() {
        // SAFETY: all zeros is a set of signals.
        let mut one: libc::sigset_t = unsafe { std::mem::zeroed() };
        // SAFETY: `one` is ours to write.
        unsafe { libc::sigaddset(&mut one, libc::SIGTERM) };
        // SAFETY: `one` is a set; only this thread's mask changes, which ends with the test.
        unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &one, std::ptr::null_mut()) };
        let mut command = Command::new("cat");
        let child = spawn(command.arg("/proc/self/status").stdout(Stdio::piped())).unwrap();
        let status = String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
        let blocked = status.lines().find_map(|line| line.strip_prefix("SigBlk:")).unwrap();
        assert_eq!(blocked.trim(), "0000000000000000");
    }

    #[test]
    fn a_child_is_killed_when_who_started_it_is_gone() {
        let start = || spawn(Command::new("sleep").arg("1000")).unwrap();
        let mut child = std::thread::spawn(start).join().unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
    }

    #[test]
    fn a_file_that_is_still_being_written_is_started_when_it_is_whole() {
        let path = std::env::temp_dir().join(format!("umbra-spawn-test-{}", std::process::id()));
        fs::copy("/bin/true", &path).unwrap();
        let writer: File = File::options().append(true).mode(0o755).open(&path).unwrap();
        let busy = Command::new(&path).spawn().unwrap_err();
        assert_eq!(busy.raw_os_error(), Some(libc::ETXTBSY));
        let (tell, told) = channel();
        let closer = std::thread::spawn(move || {
            told.recv().unwrap();
            std::thread::sleep(PAUSE * 4);
            (&writer).flush().unwrap();
        });
        tell.send(()).unwrap();
        let mut child = spawn(&mut Command::new(&path)).unwrap();
        assert!(child.wait().unwrap().success());
        closer.join().unwrap();
        fs::remove_file(&path).unwrap();
    }
}
