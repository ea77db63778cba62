// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A thread that serves a VM's window through userfaultfd, one page an event: how monitors do it that back guest memory
//! themselves, and what umbra is measured against.
//!
//! KVM takes a missing page of the window as a fault of the host; the kernel parks the vCPU and sends an event; the thread
//! fills the page with zeros, which also wakes the vCPU.

use anyhow::{Context, Result, bail};
use shadow_mmu::mm::watch::uffd::{Features, Mode, Uffd, UffdEvent};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::thread::JoinHandle;
use std::time::Duration;
use vmm_sys_util::eventfd::EventFd;

const PAGE: u64 = shadow_mmu::addr::PAGE_SIZE;

/// A thread that fills pages of a range of this process's memory. It ends when this is dropped.
#[derive(Debug)]
pub struct WindowHandler {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl WindowHandler {
    /// Serves `range`, addresses of a shared file mapping, page aligned; waits for `delay` before it serves a page.
    ///
    /// # Errors
    /// The host refuses userfaultfd, as it does for users without privileges.
    pub fn start(range: Range<u64>, delay: Duration) -> Result<Self> {
        let uffd = Uffd::new(Features::empty())
            .context("userfaultfd is refused: run as root, or set vm.unprivileged_userfaultfd to 1")?;
        uffd.register(&range, Mode::Missing)
            .with_context(|| format!("UFFDIO_REGISTER of [{:#x}, {:#x})", range.start, range.end))?;
        let stop = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).context("cannot make an eventfd")?;
        let stopped = stop.try_clone().context("cannot duplicate an eventfd")?;
        let thread = std::thread::Builder::new()
            .name("userfaultfd".into())
            .spawn(move || {
                if let Err(error) = serve(&uffd, &stopped, delay) {
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

fn serve(uffd: &Uffd, stop: &EventFd, delay: Duration) -> Result<()> {
    let wait = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    loop {
        let mut fds = [wait(uffd.fd().as_raw_fd()), wait(stop.as_raw_fd())];
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
        match uffd.read().context("reading a userfaultfd")? {
            Some(UffdEvent::PageFault(address)) => {
                if !delay.is_zero() {
                    std::thread::sleep(delay);
                }
                let page = address & !(PAGE - 1);
                uffd.fill_with_zeros(page..page + PAGE).context("filling a page")?;
            }
            Some(other) => bail!("unexpected event {other:?}"),
            None => {}
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
        match WindowHandler::start(start..start + pool.bytes(), Duration::ZERO) {
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
