// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Output without a heap: a line is formatted into a buffer on the stack and leaves in one `write`, so that
//! lines of several threads do not mix.

use core::fmt::{self, Write};
use core::panic::PanicInfo;

use super::sys;

/// Standard output and standard error.
pub const STDOUT: usize = 1;
pub const STDERR: usize = 2;

/// Writes one line to stdout.
macro_rules! outln {
    ($($part:tt)*) => { $crate::rt::out::line($crate::rt::out::STDOUT, format_args!($($part)*)) };
}
/// Writes one line to stderr.
macro_rules! errln {
    ($($part:tt)*) => { $crate::rt::out::line($crate::rt::out::STDERR, format_args!($($part)*)) };
}
pub(crate) use {errln, outln};

/// Writes `text` and a newline to descriptor `fd`, in one `write` if they fit into 512 bytes. A program that
/// cannot say what it found has failed: an error on stdout ends it with status 1.
pub fn line(fd: usize, text: fmt::Arguments<'_>) {
    let mut buffer = Buffer { fd, used: 0, bytes: [0; 512] };
    // It cannot fail: `write_str` returns Ok, and no Display in the guests makes errors.
    let _ = buffer.write_fmt(text);
    let _ = buffer.write_char('\n');
    buffer.flush();
}

struct Buffer {
    fd: usize,
    used: usize,
    bytes: [u8; 512],
}

impl Buffer {
    fn flush(&mut self) {
        let mut rest = &self.bytes[..self.used];
        while !rest.is_empty() {
            match sys::write(self.fd, rest) {
                Ok(written) => rest = &rest[written.min(rest.len())..],
                Err(sys::EINTR) => {}
                Err(_) if self.fd == STDOUT => sys::exit_group(1),
                Err(_) => break,
            }
        }
        self.used = 0;
    }
}

impl Write for Buffer {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for &byte in text.as_bytes() {
            if self.used == self.bytes.len() {
                self.flush();
            }
            self.bytes[self.used] = byte;
            self.used += 1;
        }
        Ok(())
    }
}

/// Text kept for later, cut off at `N` bytes: what an operation was about, in case it turns out wrong.
pub struct Text<const N: usize> {
    used: usize,
    bytes: [u8; N],
}

impl<const N: usize> Text<N> {
    /// No text.
    pub const fn new() -> Self {
        Self { used: 0, bytes: [0; N] }
    }

    /// Replaces the text.
    pub fn set(&mut self, text: fmt::Arguments<'_>) {
        self.used = 0;
        let _ = self.write_fmt(text);
    }
}

impl<const N: usize> Write for Text<N> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for &byte in text.as_bytes().iter().take(N - self.used) {
            self.bytes[self.used] = byte;
            self.used += 1;
        }
        Ok(())
    }
}

impl<const N: usize> fmt::Display for Text<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(core::str::from_utf8(&self.bytes[..self.used]).unwrap_or("(cut inside a character)"))
    }
}

/// A bug in a guest: say so and end with the status that Rust programs end with.
#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    errln!("{info}");
    sys::exit_group(101)
}

/// The unwind tables of the precompiled `core` name this function. Nothing unwinds here, so nothing calls it.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}
