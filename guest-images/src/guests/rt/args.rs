// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The command line: words from the initial stack, and the few kinds of option that the guests take.

use core::ffi::CStr;
use core::fmt;

use super::{out, sys};

/// The words of the command line after the program's name.
pub struct Args {
    next: *const *const i8,
    left: usize,
}

impl Args {
    /// # Safety
    /// `stack` must be the stack pointer at process entry: argc, then argc pointers to strings that stay.
    pub unsafe fn from_stack(stack: *const usize) -> Self {
        // SAFETY: argc lies at the stack pointer (System V ABI, 3.4.1).
        let argc = unsafe { *stack };
        // argv starts one word up and its first entry is the program's name. A caller of execve may leave
        // even that out.
        Self { next: stack.wrapping_add(2).cast(), left: argc.saturating_sub(1) }
    }
}

impl Iterator for Args {
    type Item = &'static str;

    fn next(&mut self) -> Option<&'static str> {
        self.left = self.left.checked_sub(1)?;
        // SAFETY: `left` counts the argv entries still ahead.
        let word = unsafe { *self.next };
        // SAFETY: each is a string that the kernel put on the stack for good.
        let word = unsafe { CStr::from_ptr(word) };
        self.next = self.next.wrapping_add(1);
        // No option and no value is spelled like this, so it ends as a usage error.
        Some(word.to_str().unwrap_or("(not UTF-8)"))
    }
}

/// Options of a guest, read word by word. Whatever is wrong ends the program with status 2 and one line on
/// stderr.
pub struct Cli {
    args: Args,
    usage: &'static str,
}

impl Cli {
    /// Options from `args` for a program whose `usage` starts with its name.
    pub const fn new(args: Args, usage: &'static str) -> Self {
        Self { args, usage }
    }

    /// The next word; `--help` is answered here.
    pub fn word(&mut self) -> Option<&'static str> {
        let word = self.args.next()?;
        if word == "--help" || word == "-h" {
            out::outln!("usage: {}", self.usage);
            sys::exit_group(0);
        }
        Some(word)
    }

    /// The value that must follow `option`.
    pub fn value(&mut self, option: &str) -> &'static str {
        match self.args.next() {
            Some(value) => value,
            None => self.refuse(format_args!("{option} needs a value")),
        }
    }

    /// The number, decimal or 0x-hexadecimal, that must follow `option`, from `low` to `high`.
    pub fn number(&mut self, option: &str, low: u64, high: u64) -> u64 {
        let text = self.value(option);
        self.parse(option, text, low, high)
    }

    /// `text` as a number from `low` to `high`; `what` names it in the complaint.
    pub fn parse(&self, what: &str, text: &str, low: u64, high: u64) -> u64 {
        let number = match text.strip_prefix("0x") {
            Some(digits) => hexadecimal(digits),
            None if text.starts_with('+') => None,
            None => text.parse().ok(),
        };
        match number {
            Some(number) if (low..=high).contains(&number) => number,
            _ => self.refuse(format_args!("{what} must be a number from {low} to {high}, not {text:?}")),
        }
    }

    /// The 64-bit value in hexadecimal, with or without 0x, that must follow `option`.
    pub fn hex(&mut self, option: &str) -> u64 {
        let text = self.value(option);
        match hexadecimal(text.strip_prefix("0x").unwrap_or(text)) {
            Some(number) => number,
            None => {
                self.refuse(format_args!("{option} must be a hexadecimal number of 64 bits, not {text:?}"))
            }
        }
    }

    /// Ends the program because of a word that means nothing to it.
    pub fn unknown(&self, word: &str) -> ! {
        self.refuse(format_args!("unknown argument {word:?}"))
    }

    /// Ends the program: one line on stderr that says what is wrong and what would be right, status 2.
    pub fn refuse(&self, problem: fmt::Arguments<'_>) -> ! {
        let name = self.usage.split(' ').next().unwrap_or(self.usage);
        out::errln!("{name}: {problem}; usage: {}", self.usage);
        sys::exit_group(2)
    }
}

/// Hexadecimal digits, of which there must be some and nothing else.
fn hexadecimal(digits: &str) -> Option<u64> {
    if digits.starts_with('+') {
        return None;
    }
    u64::from_str_radix(digits, 16).ok()
}
