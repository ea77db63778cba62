// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The command line that runs the same again: umbra's own, with the engine and the seed, in words that a shell reads back as they are.

use crate::engine::EngineChoice;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

/// Options that say which engine and seeds; the replay has its own, for elsewhere `auto` and the environment may say another.
const REPLACED: [&str; 3] = ["--engine", "--seed", "--seeds"];

/// `argv`, the last `words` of which are the program's, with `engine` and `seed` and no others.
pub(super) fn command(argv: &[OsString], words: usize, engine: EngineChoice, seed: u64) -> String {
    let (options, program) = argv.split_at(argv.len().saturating_sub(words));
    // What ends the options stays at their end.
    let (options, end) = match options.split_last() {
        Some((last, options)) if last == "--" => (options, Some("--".to_owned())),
        _ => (options, None),
    };
    let mut kept: Vec<String> = Vec::new();
    let mut options = options.iter();
    while let Some(option) = options.next() {
        let name = option.as_bytes().split(|byte| *byte == b'=').next().unwrap_or_default();
        if REPLACED.iter().any(|replaced| replaced.as_bytes() == name) {
            if name.len() == option.len() {
                // Its value is a word of its own.
                options.next();
            }
            continue;
        }
        match option == "--deterministic" {
            true => kept.push(format!("--engine {engine} --deterministic --seed {seed}")),
            false => kept.push(quote(option)),
        }
    }
    kept.extend(end);
    kept.extend(program.iter().map(|word| quote(word)));
    kept.join(" ")
}

/// A word as a shell reads it back.
fn quote(word: &OsStr) -> String {
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"_@%+=:,./-".contains(byte);
    let bytes = word.as_bytes();
    match word.to_str() {
        Some(text) if !bytes.is_empty() && bytes.iter().all(plain) => text.to_owned(),
        Some(text) if !text.chars().any(char::is_control) => format!("'{}'", text.replace('\'', r"'\''")),
        _ => {
            let escaped = |byte: &u8| match byte {
                b'\'' | b'\\' => format!("\\{}", char::from(*byte)),
                byte if byte.is_ascii_graphic() || *byte == b' ' => char::from(*byte).to_string(),
                byte => format!("\\x{byte:02x}"),
            };
            format!("$'{}'", bytes.iter().map(escaped).collect::<String>())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStringExt;

    fn words(text: &[&str]) -> Vec<OsString> {
        text.iter().map(OsString::from).collect()
    }

    #[test]
    fn the_replay_has_every_option_but_the_seeds() {
        for (argv, program, replay) in [
            (
                &["umbra", "run", "--deterministic", "race", "exits"][..],
                2,
                "umbra run --engine ptrace --deterministic --seed 7 race exits",
            ),
            (
                &[
                    "./umbra",
                    "run",
                    "--seeds",
                    "0..9",
                    "--memory",
                    "4M",
                    "--deterministic",
                    "--quantum=steps",
                    "--",
                    "race",
                ],
                1,
                "./umbra run --memory 4M --engine ptrace --deterministic --seed 7 --quantum=steps -- race",
            ),
            (
                &[
                    "umbra",
                    "run",
                    "--engine",
                    "auto",
                    "--deterministic",
                    "--engine=auto",
                    "race",
                    "--engine",
                    "x",
                ],
                3,
                "umbra run --engine ptrace --deterministic --seed 7 race --engine x",
            ),
            (
                &["umbra", "run", "--deterministic", "--seeds=1..2", "./a b", "--seed", "it's", ""],
                4,
                r"umbra run --engine ptrace --deterministic --seed 7 './a b' --seed 'it'\''s' ''",
            ),
        ] {
            assert_eq!(command(&words(argv), program, EngineChoice::Ptrace, 7), replay);
        }
    }

    #[test]
    fn a_shell_reads_back_every_word() {
        for word in
            [&b"plain"[..], b"", b"a b", b"it's", b"$HOME;`x`", b"line\nbreak", b"\xff\x01'\\end", b"*?[a]"]
        {
            let word = OsString::from_vec(word.to_vec());
            let script = format!("printf %s {}", quote(&word));
            let output = std::process::Command::new("bash").arg("-c").arg(script).output().unwrap();
            assert_eq!(output.stdout, word.as_bytes(), "{}", quote(&word));
        }
    }
}
