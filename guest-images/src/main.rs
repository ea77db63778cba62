// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Runs a guest image natively: `guest-images NAME ARGS…`. Without arguments it lists the images.
//!
//! The image is put into a memfd and executed from there, in place of this process. So its exit status or
//! signal reaches the caller unchanged, and nothing is left behind, however it ends.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use guest_images::Image;

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    let result = match args.next() {
        None => list(),
        Some(name) => match name.to_str().and_then(guest_images::find) {
            Some(image) => execute(image, args),
            None => {
                eprintln!(
                    "guest-images: no image is called {name:?}; without arguments the images are listed"
                );
                return ExitCode::from(2);
            }
        },
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("guest-images: {error}");
            ExitCode::FAILURE
        }
    }
}

fn list() -> io::Result<()> {
    let mut out = io::stdout().lock();
    for image in guest_images::all() {
        writeln!(out, "{:10} {}\n{:10}   {}", image.name, image.summary, "", image.usage)?;
    }
    Ok(())
}

/// Becomes the image. It returns only if that fails.
fn execute(image: &Image, args: impl Iterator<Item = OsString>) -> io::Result<()> {
    // SAFETY: the name is a C string; the kernel copies it.
    let fd = unsafe { libc::memfd_create(c"guest-image".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(describe(io::Error::last_os_error(), "create a memfd"));
    }
    // SAFETY: memfd_create has just opened `fd`, and nobody else knows it.
    let mut file = unsafe { File::from_raw_fd(fd) };
    file.write_all(image.elf).map_err(|error| describe(error, "write the image to a memfd"))?;
    // The descriptor is closed by the exec itself, after the path through it has been followed.
    let error =
        Command::new(format!("/proc/self/fd/{}", file.as_raw_fd())).arg0(image.name).args(args).exec();
    Err(describe(error, "execute the image from a memfd (is /proc mounted, and vm.memfd_noexec below 2?)"))
}

fn describe(error: io::Error, action: &str) -> io::Error {
    io::Error::new(error.kind(), format!("cannot {action}: {error}"))
}
