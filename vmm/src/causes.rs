// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Errors with their causes, as one line for people.
//!
//! Some errors name their cause in their own words, in the middle of a sentence that says what to do, and hand it out as
//! their source too, so that programs can ask for it. `{:#}` of anyhow then prints it twice. This prints each cause once.
//!
//! And how lines reach stderr and stdout: whoever does not read stderr, or has no room for it, changes nothing else; what a command is
//! asked for goes to stdout, and is missed there.

use anyhow::Context;
use std::fmt::Display;
use std::io::Write;

/// `what: why: why that`, without causes that what stands before them says already.
pub(crate) fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if line.is_empty() {
            line = cause;
        } else if !line.contains(&cause) {
            line = format!("{line}: {cause}");
        }
    }
    line
}

/// `umbra: LINE` on stderr, if somebody takes it.
pub(crate) fn say(line: impl Display) {
    tell(format_args!("umbra: {line}\n"));
}

/// `text` as it stands on stdout: what a command was asked for.
///
/// # Errors
/// It cannot be written. Where its reader is gone the cause is `BrokenPipe`.
pub(crate) fn answer(text: impl Display) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    write!(out, "{text}").and_then(|()| out.flush()).context("cannot write to stdout")
}

/// `text` as it stands on stderr, if somebody takes it. Nothing in umbra depends on that: stderr may be closed, or a full disk.
pub(crate) fn tell(text: impl Display) {
    let _ = write!(std::io::stderr(), "{text}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;
    use shadow_mmu::frame::PoolError;
    use std::io;

    #[test]
    fn each_cause_stands_once() {
        let refused = || io::Error::from_raw_os_error(libc::EMFILE);
        let pool = PoolError::Host { what: "memfd_create", bytes: 4096, source: refused() };
        let error = anyhow::Error::from(pool).context("cannot run it");
        let line = one_line(&error);
        assert_eq!(line.matches("os error 24").count(), 1, "{line}");
        assert!(line.starts_with("cannot run it: cannot make a frame pool"), "{line}");
        assert!(
            format!("{error:#}").matches("os error 24").count() > 1,
            "there is no need for this: {error:#}"
        );

        let error = Err::<(), _>(refused()).context("cannot make a pipe").unwrap_err();
        assert_eq!(one_line(&error), "cannot make a pipe: Too many open files (os error 24)");
    }
}
