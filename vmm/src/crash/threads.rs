// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What each thread of umbra was doing, as the kernel has it: vCPU threads are named `vcpu TID`, so this tells which of
//! them were in KVM_RUN (`ioctl`), waiting, or running.
//!
//! Read from `/proc/self/task`, see proc(5); what cannot be read is left out. It needs none of umbra's locks, so it also
//! tells of threads that are stuck with one.

use std::fmt::Write;
use std::fs;
use std::path::Path;

/// One line a thread: its kernel id, name, state, the system call that it is in, and where in the kernel it waits.
pub(super) fn write(out: &mut String) -> std::fmt::Result {
    writeln!(out, "threads")?;
    let Ok(tasks) = fs::read_dir("/proc/self/task") else { return writeln!(out, "  /proc cannot be read") };
    let mut paths: Vec<_> = tasks.flatten().map(|task| task.path()).collect();
    paths.sort();
    for path in paths {
        let id = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        writeln!(out, "  {id} {}", line(&path))?;
    }
    Ok(())
}

fn line(task: &Path) -> String {
    let read = |name: &str| fs::read_to_string(task.join(name)).map(|text| text.trim().to_owned());
    let name = read("comm").unwrap_or_else(|_| "?".to_owned());
    // The state follows the name, which is in parentheses and may hold any character.
    let stat = read("stat").unwrap_or_default();
    let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next()).unwrap_or('?');
    let mut line = format!("({name}) {state}");
    if let Ok(call) = read("syscall") {
        let number = call.split(' ').next().unwrap_or_default();
        let _ = match number.parse::<i64>() {
            Ok(libc::SYS_ioctl) => write!(line, ", in ioctl"),
            Ok(-1) => write!(line, ", stopped outside a system call"),
            Ok(number) => write!(line, ", in system call {number}"),
            Err(_) => write!(line, ", {number}"),
        };
    }
    if let Ok(place) = read("wchan")
        && !matches!(place.as_str(), "" | "0")
    {
        let _ = write!(line, ", waits in {place}");
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn every_thread_has_a_line_with_its_name() {
        let (wait, waits) = channel::<()>();
        let (started, start) = channel();
        let builder = std::thread::Builder::new().name("odd) name (".to_owned());
        let thread = builder.spawn(move || {
            started.send(()).unwrap();
            let _ = waits.recv();
        });
        let thread = thread.unwrap();
        start.recv().unwrap();
        let mut out = String::new();
        write(&mut out).unwrap();
        let line = out.lines().find(|line| line.contains("(odd) name ()")).unwrap_or_else(|| panic!("{out}"));
        let state = line.split("(odd) name () ").nth(1).unwrap().chars().next().unwrap();
        assert!("RSD".contains(state), "{line}");
        drop(wait);
        thread.join().unwrap();
    }
}
