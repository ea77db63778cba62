// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Stdin by lines, for guests that are told what to do; and the bytes behind a line, for those that are given something.

use super::sys;

/// The longest line, its newline included.
const LINE: usize = 128;

/// Stdin, of which up to a line has been read ahead.
pub struct Input {
    bytes: [u8; LINE],
    /// What of `bytes` is input.
    used: usize,
    ended: bool,
}

impl Input {
    /// Stdin from where it is.
    pub const fn new() -> Self {
        Self { bytes: [0; LINE], used: 0, ended: false }
    }

    /// The length of the next line, which [`text`](Self::text) shows; `None` at the end. A last line needs no newline.
    pub fn line(&mut self) -> Result<Option<usize>, &'static str> {
        loop {
            if let Some(length) = self.bytes[..self.used].iter().position(|&byte| byte == b'\n') {
                return Ok(Some(length));
            }
            if self.ended {
                return Ok(if self.used == 0 { None } else { Some(self.used) });
            }
            if self.used == LINE {
                return Err("a command of more than 127 bytes");
            }
            match sys::read(sys::STDIN, &mut self.bytes[self.used..]) {
                Ok(0) | Err(sys::EBADF) => self.ended = true,
                Ok(read) => self.used += read,
                Err(sys::EINTR) => {}
                Err(_) => return Err("stdin cannot be read"),
            }
        }
    }

    /// The line of that length.
    pub fn text(&self, length: usize) -> &str {
        core::str::from_utf8(&self.bytes[..length]).unwrap_or("(not UTF-8)")
    }

    /// Forgets the line of that length, and its newline.
    pub fn drop_line(&mut self, length: usize) {
        self.drop_bytes((length + 1).min(self.used));
    }

    fn drop_bytes(&mut self, from: usize) {
        self.bytes.copy_within(from..self.used, 0);
        self.used -= from;
    }

    /// Fills `to` with what comes next, once the line before it has been dropped.
    pub fn exact(&mut self, to: &mut [u8]) -> Result<(), &'static str> {
        let ahead = self.used.min(to.len());
        to[..ahead].copy_from_slice(&self.bytes[..ahead]);
        self.drop_bytes(ahead);
        let mut filled = ahead;
        while filled < to.len() {
            match sys::read(sys::STDIN, &mut to[filled..]) {
                Ok(0) => return Err("stdin ended in the middle of what was to be loaded"),
                Ok(read) => filled += read,
                Err(sys::EINTR) => {}
                Err(_) => return Err("stdin cannot be read"),
            }
        }
        Ok(())
    }
}
