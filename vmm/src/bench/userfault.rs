// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A thread that serves a VM's window through userfaultfd, one page an event: how monitors do it that back guest memory
//! themselves, and what umbra is measured against.
//!
//! KVM takes a missing page of the window as a fault of the host; the kernel parks the vCPU and sends an event; the thread
//! fills the page with zeros, which also wakes the vCPU. The five ioctls are declared here: the crate for them needs libclang.

use anyhow::{Context, Result, bail};
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::thread::JoinHandle;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{ioctl_ior_nr, ioctl_iowr_nr};

const UFFD: u32 = 0xaa;
const UFFD_API: u64 = 0xaa;
const MODE_MISSING: u64 = 1;
const EVENT_PAGEFAULT: u8 = 0x12;
const PAGE: u64 = shadow_mmu::addr::PAGE_SIZE;

#[repr(C)]
#[derive(Debug, Default)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Debug, Default)]
struct UffdioRange {
    start: u64,
    len: u64,
}

#[repr(C)]
#[derive(Debug, Default)]
struct UffdioRegister {
    range: UffdioRange,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Debug, Default)]
struct UffdioZeropage {
    range: UffdioRange,
    mode: u64,
    zeropage: i64,
}

ioctl_iowr_nr!(UFFDIO_API, UFFD, 0x3f, UffdioApi);
ioctl_iowr_nr!(UFFDIO_REGISTER, UFFD, 0x00, UffdioRegister);
ioctl_ior_nr!(UFFDIO_WAKE, UFFD, 0x02, UffdioRange);
ioctl_iowr_nr!(UFFDIO_ZEROPAGE, UFFD, 0x04, UffdioZeropage);

/// A thread that fills pages of a range of this process's memory. It ends when this is dropped.
#[derive(Debug)]
pub struct WindowHandler {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl WindowHandler {
    /// Serves `range`, addresses of a shared file mapping, page aligned.
    ///
    /// # Errors
    /// The host refuses userfaultfd, as it does for users without privileges.
    pub fn start(range: Range<u64>) -> Result<Self> {
        // SAFETY: makes a descriptor; touches no memory.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error())
                .context("userfaultfd is refused: run as root, or set vm.unprivileged_userfaultfd to 1");
        }
        // SAFETY: the kernel just made it for us and nobody else knows it.
        let uffd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        let mut api = UffdioApi { api: UFFD_API, ..UffdioApi::default() };
        // SAFETY: the ioctl reads and writes one `UffdioApi`.
        check(unsafe { ioctl_with_mut_ref(&uffd, UFFDIO_API(), &mut api) }).context("UFFDIO_API")?;
        let len = range.end - range.start;
        let mut register =
            UffdioRegister { range: UffdioRange { start: range.start, len }, mode: MODE_MISSING, ioctls: 0 };
        // SAFETY: the ioctl reads and writes one `UffdioRegister`; missing pages of the range are served below.
        check(unsafe { ioctl_with_mut_ref(&uffd, UFFDIO_REGISTER(), &mut register) })
            .with_context(|| format!("UFFDIO_REGISTER of [{:#x}, {:#x})", range.start, range.end))?;
        let stop = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).context("cannot make an eventfd")?;
        let stopped = stop.try_clone().context("cannot duplicate an eventfd")?;
        let thread = std::thread::Builder::new()
            .name("userfaultfd".into())
            .spawn(move || {
                if let Err(error) = serve(&uffd, &stopped) {
                    log::error!("the window is served no longer: {error:#}");
                }
            })
            .context("cannot start a thread")?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for WindowHandler {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn serve(uffd: &OwnedFd, stop: &EventFd) -> Result<()> {
    let wait = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    loop {
        let mut fds = [wait(uffd.as_raw_fd()), wait(stop.as_raw_fd())];
        // SAFETY: `fds` is a live array of two.
        let ready = unsafe { libc::poll(fds.as_mut_ptr(), 2, -1) };
        if ready < 0 {
            match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => continue,
                error => return Err(error).context("poll"),
            }
        }
        if fds[1].revents != 0 {
            return Ok(());
        }
        let mut message = [0u8; 32];
        // SAFETY: the kernel writes one message of 32 bytes.
        let read = unsafe { libc::read(uffd.as_raw_fd(), message.as_mut_ptr().cast(), message.len()) };
        if read != 32 {
            continue;
        }
        if message[0] != EVENT_PAGEFAULT {
            bail!("unexpected event {:#x}", message[0]);
        }
        // struct uffd_msg: the event's own part starts at byte 8 with flags, then the address.
        let mut address = [0; 8];
        address.copy_from_slice(&message[16..24]);
        let range = UffdioRange { start: u64::from_ne_bytes(address) & !(PAGE - 1), len: PAGE };
        let mut zero = UffdioZeropage { range, ..UffdioZeropage::default() };
        // SAFETY: the ioctl reads and writes one `UffdioZeropage`; the page is in the range that was registered.
        let filled = check(unsafe { ioctl_with_mut_ref(uffd, UFFDIO_ZEROPAGE(), &mut zero) });
        if let Err(error) = filled {
            // Somebody else was faster; the vCPU only has to look again.
            if error.raw_os_error() != Some(libc::EEXIST) {
                return Err(error).context("UFFDIO_ZEROPAGE");
            }
            // SAFETY: the ioctl reads one `UffdioRange`.
            check(unsafe { ioctl_with_ref(uffd, UFFDIO_WAKE(), &zero.range) }).context("UFFDIO_WAKE")?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shadow_mmu::frame::{FramePool, FreedFrames};

    #[test]
    fn a_served_page_reads_zeros_and_the_thread_ends() {
        let pool = FramePool::new(16 * PAGE, FreedFrames::Keep).unwrap();
        let window = pool.map_window().unwrap();
        let start = window.as_ptr() as u64;
        match WindowHandler::start(start..start + pool.bytes()) {
            Ok(handler) => {
                let page = (start + 3 * PAGE) as *const u8;
                // SAFETY: inside the window, which lives; the handler fills it.
                assert_eq!(unsafe { page.read_volatile() }, 0);
                drop(handler);
            }
            Err(error) => println!("skipped: {error:#}"),
        }
    }
}
