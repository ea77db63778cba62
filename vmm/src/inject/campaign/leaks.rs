// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a process still has when every machine is gone: descriptors, threads, and mappings of KVM's or of frames.
//!
//! Frames are `umbra run --check`'s business: the pool is gone by now.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::time::{Duration, Instant};

/// How long threads that have been joined may take to leave /proc: the kernel tells who joins them before that.
const PATIENCE: Duration = Duration::from_secs(1);

/// What this process has at some moment.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Census {
    /// Descriptors, and what they are of.
    files: BTreeMap<u32, String>,
    /// By number.
    threads: BTreeSet<u32>,
    /// Mappings of anonymous files: memfds, vCPUs. How many there are of each name.
    mappings: BTreeMap<String, usize>,
}

impl Census {
    /// Looks at this process.
    ///
    /// # Errors
    /// /proc cannot be read.
    pub fn take() -> io::Result<Self> {
        let mut files = BTreeMap::new();
        for entry in fs::read_dir("/proc/self/fd")? {
            let entry = entry?;
            let number = entry.file_name().to_str().and_then(|name| name.parse().ok());
            // The descriptor that the folder is read through leads nowhere afterwards, and is the folder's now.
            if let (Some(number), Ok(of)) = (number, fs::read_link(entry.path())) {
                let of = of.to_string_lossy().into_owned();
                if !(of.starts_with("/proc/") && of.ends_with("/fd")) {
                    files.insert(number, of);
                }
            }
        }
        let threads = fs::read_dir("/proc/self/task")?
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .collect();
        let mut mappings = BTreeMap::new();
        for line in fs::read_to_string("/proc/self/maps")?.lines() {
            // Address, rights, offset, device, inode, name.
            let name = line.split_whitespace().nth(5).unwrap_or_default();
            if name.starts_with("/memfd:") || name.starts_with("anon_inode:") {
                *mappings.entry(name.to_owned()).or_default() += 1;
            }
        }
        Ok(Self { files, threads, mappings })
    }

    /// What there is in `now` that was not here, and descriptors that are gone; a line each.
    fn compare(&self, now: &Self) -> Vec<String> {
        let mut leaks = Vec::new();
        for (number, of) in &now.files {
            if self.files.get(number) != Some(of) {
                leaks.push(format!("descriptor {number} of {of}"));
            }
        }
        for (number, of) in self.files.iter().filter(|(number, _)| !now.files.contains_key(number)) {
            leaks.push(format!("descriptor {number} of {of}, which was there before, is closed"));
        }
        for thread in now.threads.difference(&self.threads) {
            let name = fs::read_to_string(format!("/proc/self/task/{thread}/comm")).unwrap_or_default();
            leaks.push(format!("thread {thread} {}", name.trim()));
        }
        for (name, count) in &now.mappings {
            let before = self.mappings.get(name).copied().unwrap_or(0);
            if *count > before {
                leaks.push(format!("{} mappings of {name}", count - before));
            }
        }
        leaks
    }

    /// What this process has that it had not at this census; a line each. Waits for threads that are about to be gone.
    ///
    /// # Errors
    /// /proc cannot be read.
    pub fn leaks(&self) -> io::Result<Vec<String>> {
        let began = Instant::now();
        loop {
            let leaks = self.compare(&Self::take()?);
            if leaks.is_empty() || began.elapsed() > PATIENCE {
                return Ok(leaks);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

    fn census() -> Census {
        Census {
            files: BTreeMap::from([(0, "/dev/null".into()), (1, "pipe:[7]".into())]),
            threads: BTreeSet::from([10]),
            mappings: BTreeMap::from([("/memfd:other".into(), 1)]),
        }
    }

    #[test]
    fn whatever_is_more_than_before_is_a_leak() {
        let before = census();
        assert!(before.compare(&before).is_empty());
        let mut now = census();
        now.files.insert(5, "anon_inode:kvm-vm".into());
        now.files.insert(1, "pipe:[8]".into());
        now.files.remove(&0);
        now.threads.insert(11);
        now.mappings.insert("/memfd:umbra-frames".into(), 2);
        now.mappings.insert("/memfd:other".into(), 2);
        let leaks = before.compare(&now);
        let expected = [
            "descriptor 1 of pipe:[8]",
            "descriptor 5 of anon_inode:kvm-vm",
            "descriptor 0 of /dev/null, which was there before, is closed",
            "thread 11 ",
            "1 mappings of /memfd:other",
            "2 mappings of /memfd:umbra-frames",
        ];
        assert_eq!(leaks, expected);
        assert!(now.compare(&now).is_empty());
    }

    /// Other tests of this process open and close things meanwhile, so only what nobody else has is looked for.
    #[test]
    fn a_census_sees_descriptors_threads_and_mappings() {
        let before = Census::take().unwrap();
        // SAFETY: the name is a C string.
        let fd = unsafe { libc::memfd_create(c"umbra-census-test".as_ptr(), libc::MFD_CLOEXEC) };
        assert!(fd >= 0, "{}", io::Error::last_os_error());
        // SAFETY: it was just opened, and is nobody else's.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        file.set_len(4096).unwrap();
        // SAFETY: a new mapping, of a file of ours, where the kernel likes.
        let mapped = unsafe {
            libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), 0)
        };
        assert_ne!(mapped, libc::MAP_FAILED, "{}", io::Error::last_os_error());
        let (release, wait) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::Builder::new().name("leaky".into()).spawn(move || wait.recv()).unwrap();
        while !before.compare(&Census::take().unwrap()).iter().any(|line| line.ends_with(" leaky")) {
            std::thread::yield_now();
        }
        let leaks = before.compare(&Census::take().unwrap());
        let descriptor = |line: &String| line.starts_with("descriptor") && line.contains("umbra-census-test");
        assert!(leaks.iter().any(descriptor), "{leaks:?}");
        assert!(leaks.iter().any(|line| line == "1 mappings of /memfd:umbra-census-test"), "{leaks:?}");
        // SAFETY: mapped above, and nothing points there.
        assert_eq!(unsafe { libc::munmap(mapped, 4096) }, 0);
        drop((release, file));
        let _ = thread.join().unwrap();
    }
}
