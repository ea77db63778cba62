// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What /proc says of the guest's process. It may be missing, or be that of another pid namespace (`unshare --pid` without mounting
//! a new one), where the same numbers are somebody else's: then it says nothing.

use super::tracee::Tracee;
use libc::pid_t;
use std::io;
use std::sync::OnceLock;
use std::time::Duration;

/// Whether numbers in /proc are those that this process sees.
fn is_ours() -> bool {
    static IS_OURS: OnceLock<bool> = OnceLock::new();
    *IS_OURS.get_or_init(|| {
        std::fs::read_link("/proc/self")
            .is_ok_and(|link| link.to_str().and_then(|pid| pid.parse().ok()) == Some(std::process::id()))
    })
}

/// A file of one thread's.
pub(super) fn of_thread(Tracee { pid, tid }: Tracee, file: &str) -> Option<String> {
    is_ours().then(|| std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/{file}")).ok()).flatten()
}

/// What follows the name in a thread's `stat`: the state, a letter, and numbers from the fourth field on. The name may have blanks
/// and brackets in it.
pub(super) fn behind_the_name(stat: &str) -> impl Iterator<Item = &str> {
    stat.rsplit(')').next().unwrap_or_default().split_whitespace()
}

/// Returns when no thread of process `pid`, which is being killed, is on a CPU. It is a child of this process and not waited for.
///
/// Threads of a process that is being killed leave their CPUs at once, and are zombies then. Where /proc does not say it, that is
/// given the time of many ticks.
pub(super) fn wait_until_nothing_runs(pid: pid_t) {
    const TICKS: Duration = Duration::from_millis(100);
    if !is_ours() {
        std::thread::sleep(TICKS);
        return;
    }
    loop {
        match is_running(pid) {
            Ok(false) => return,
            Ok(true) => std::thread::sleep(Duration::from_micros(50)),
            // No descriptor or no memory left: again.
            Err(error)
                if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM)) =>
            {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(_) => {
                std::thread::sleep(TICKS);
                return;
            }
        }
    }
}

/// Whether any thread of it is neither gone nor a zombie. What cannot be read is no answer.
fn is_running(pid: pid_t) -> io::Result<bool> {
    let tasks = match unless_gone(std::fs::read_dir(format!("/proc/{pid}/task")))? {
        Some(tasks) => tasks,
        None => return Ok(false),
    };
    for task in tasks {
        let Some(task) = unless_gone(task)? else { continue };
        let Some(stat) = unless_gone(std::fs::read_to_string(task.path().join("stat")))? else { continue };
        if behind_the_name(&stat).next().is_some_and(|state| !matches!(state, "Z" | "X")) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// `None`: what was to be read exists no more.
fn unless_gone<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(there) => Ok(Some(there)),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_stands_behind_whatever_name() {
        for (stat, state) in [("7 (a) S 1", "S"), ("7 (a) b (c) R 1", "R"), ("7 () Z", "Z")] {
            assert_eq!(behind_the_name(stat).next(), Some(state), "{stat}");
        }
        assert_eq!(behind_the_name("").next(), None);
    }

    #[test]
    fn only_what_is_gone_does_not_run() {
        let own = std::process::id() as pid_t;
        assert!(is_running(own).unwrap());
        let error = |errno| io::Error::from_raw_os_error(errno);
        assert!(unless_gone::<()>(Err(error(libc::ESRCH))).unwrap().is_none());
        assert_eq!(
            unless_gone::<()>(Err(error(libc::EMFILE))).unwrap_err().raw_os_error(),
            Some(libc::EMFILE)
        );
        let mut child = std::process::Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        assert!(!is_running(child.id() as pid_t).unwrap());
    }
}
