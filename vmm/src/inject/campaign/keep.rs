// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The folder of a failure: all that it takes to see it again, and what it looked like.
//!
//! `plan.toml`, `input` and `command` are of the smallest case, `stdout`, `stderr` and `report.json` of its last failure; the case as
//! it was drawn is in `first/`, with the same files; `native` is what the program says natively. Files that the run left in its working
//! directory, a report of a lost vCPU among them, are in `cwd/`.

use super::case::Case;
use super::run::Observed;
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};

/// The command that replays `case`, in its folder.
pub(super) fn command(umbra: &Path, case: &Case) -> String {
    let quoted = |word: String| {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_=,./:+".contains(c);
        if word.chars().all(is_plain) { word } else { format!("'{}'", word.replace('\'', r"'\''")) }
    };
    let words: Vec<_> = case.words().into_iter().map(quoted).collect();
    let umbra = quoted(umbra.to_string_lossy().into_owned());
    format!("{umbra} inject plan.toml --report -- {} < input", words.join(" "))
}

/// Writes what there is to know of a failure of run `case.number` below `keep`. Returns its folder.
///
/// # Errors
/// The host's.
pub(super) fn keep(
    keep: &Path,
    umbra: &Path,
    first: (&Case, &Observed),
    smallest: (&Case, &Observed),
    native: &str,
) -> Result<PathBuf> {
    let folder = keep.join(format!("run-{}", smallest.0.number));
    let what = || format!("cannot keep a failure in {}", folder.display());
    let original = folder.join("first");
    fs::create_dir_all(&original).with_context(what)?;
    for (folder, (case, seen)) in [(&folder, smallest), (&original, first)] {
        let report = seen.report.as_ref().map(serde_json::to_string_pretty).transpose()?.unwrap_or_default();
        let files = [
            ("plan.toml", case.plan.to_toml()?),
            ("input", case.program.input.clone()),
            ("command", command(umbra, case) + "\n"),
            ("stdout", seen.stdout.clone()),
            ("stderr", seen.stderr.clone()),
            ("report.json", report),
            ("ended", format!("{:?}\n{}\n", seen.end, seen.left.join("\n"))),
        ];
        for (name, content) in files {
            fs::write(folder.join(name), content).with_context(what)?;
        }
        if !seen.files.is_empty() {
            let cwd = folder.join("cwd");
            fs::create_dir_all(&cwd).with_context(what)?;
            seen.files
                .iter()
                .try_for_each(|(name, content)| fs::write(cwd.join(name), content))
                .with_context(what)?;
        }
    }
    fs::write(folder.join("native"), native).with_context(what)?;
    Ok(folder)
}

#[cfg(test)]
mod tests {
    use super::super::draw::Deck;
    use super::*;

    #[test]
    fn what_a_run_left_in_its_folder_is_kept() {
        let folder = std::env::temp_dir().join(format!("umbra-keep-test-{}", std::process::id()));
        let case = Deck::new(1).case(7);
        let file = ("umbra-report-1.txt".to_owned(), "lost".to_owned());
        let seen = |files| Observed {
            end: super::super::run::End::Exited(125),
            stdout: String::new(),
            stderr: String::new(),
            report: None,
            left: Vec::new(),
            files,
        };
        let (first, last) = (seen(Vec::new()), seen(vec![file]));
        let kept = keep(&folder, Path::new("umbra"), (&case, &first), (&case, &last), "").unwrap();
        assert_eq!(kept, folder.join("run-7"));
        assert_eq!(fs::read_to_string(kept.join("cwd/umbra-report-1.txt")).unwrap(), "lost");
        assert!(!kept.join("first/cwd").exists());
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn a_command_is_one_that_a_shell_takes_apart_again() {
        let mut case = Deck::new(1).case(0);
        case.program.args = vec!["a b".into(), "it's".into(), "--x=1,2".into()];
        let command = command(Path::new("/a dir/umbra"), &case);
        assert!(command.starts_with("'/a dir/umbra' inject plan.toml --report -- run --check "), "{command}");
        assert!(command.ends_with(r" 'a b' 'it'\''s' --x=1,2 < input"), "{command}");
    }
}
