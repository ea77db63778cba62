// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How one source file changes on its way into a copy. Used by `build.rs`; what is woven is in `mutants/`.

use crate::mutants::{self, Mutant, PREPARATIONS};
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// Changes to some files: file, text, what takes its place wherever it occurs.
pub(crate) type Changes = &'static [(&'static str, &'static str, &'static str)];

/// The file `name` without its unit tests, with the mutants that are in it, and with `changes`.
pub(crate) fn weave(name: &str, text: &str, changes: Changes) -> String {
    let text = without_unit_tests(name, text);
    check_sources_of_concurrency(name, &text);
    let text = change(name, &text, PREPARATIONS);
    let woven = with_mutants(name, &text, mutants::all().filter(|mutant| mutant.file == name));
    change(name, &woven, changes)
}

/// `lib.rs` as a file that can be included: without its inner documentation and without `sync`, with `mutant`.
pub(crate) fn crate_root(text: &str) -> String {
    let sync = "pub mod sync;\n";
    assert_eq!(text.matches(sync).count(), 1, "lib.rs does not say `{}` exactly once", sync.trim());
    let text = text.replace(sync, "pub mod mutant;\n");
    text.lines().filter(|line| !line.starts_with("//!")).flat_map(|line| [line, "\n"]).collect()
}

/// What `text` says from the line `from` to the text `to`.
pub(crate) fn part<'a>(name: &str, text: &'a str, from: &str, to: &str) -> &'a str {
    let part = text.find(from).map(|at| &text[at..]);
    let part = part.and_then(|part| part.find(to).map(|end| &part[..end]));
    part.unwrap_or_else(|| panic!("shadow-mmu/src/{name} has no part from `{}` to `{to}`", from.trim()))
}

fn change(name: &str, text: &str, changes: Changes) -> String {
    let changes = changes.iter().filter(|(file, ..)| *file == name);
    changes.fold(text.to_owned(), |text, (_, original, replacement)| {
        assert!(
            text.contains(original),
            "shadow-mmu/src/{name} does not say what a copy is to change:\n{original}"
        );
        text.replace(original, replacement)
    })
}

/// What does not come from `crate::sync` is invisible to the checkers.
fn check_sources_of_concurrency(name: &str, text: &str) {
    // The macro is like std's, so that a file which uses it must import ours.
    let has_macro =
        text.lines().any(|line| line.starts_with("use crate::sync::") && line.contains("thread_local"));
    let mut forbidden = vec!["std::sync", "std::thread", "std::hint"];
    forbidden.extend((!has_macro).then_some("thread_local!"));
    for line in text.lines().filter(|line| !line.trim_start().starts_with("//")) {
        let strange = forbidden.iter().find(|it| line.contains(**it));
        if let Some(strange) = strange {
            panic!("shadow-mmu/src/{name} takes {strange} from elsewhere than crate::sync:\n{line}");
        }
    }
}

/// Cuts `#[cfg(test)] mod … { … }`, also where more is asked than `test`, which rustfmt ends with the first brace in the first
/// column; and `#[cfg(test)] mod …;`, the file of which is not copied.
fn without_unit_tests(name: &str, text: &str) -> String {
    let mut kept = String::with_capacity(text.len());
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if line != "#[cfg(test)]" && !line.starts_with("#[cfg(all(test,") {
            kept.push_str(line);
            kept.push('\n');
            continue;
        }
        let head = lines.by_ref().find(|line| !line.starts_with("#["));
        let head = head.filter(|head| head.starts_with("mod ")).unwrap_or_else(|| {
            panic!(
                "shadow-mmu/src/{name}: what follows #[cfg(test)] is no module, which is all that can be cut"
            )
        });
        if head.ends_with(';') {
            continue;
        }
        assert!(lines.any(|line| line == "}"), "shadow-mmu/src/{name}: the test module has no end");
    }
    kept
}

/// Puts each mutant beside the text that it replaces. Mutants of the same text share one place.
fn with_mutants<'a>(name: &str, text: &str, mutants: impl Iterator<Item = &'a Mutant>) -> String {
    let mut places: BTreeMap<usize, (&str, Vec<&Mutant>)> = BTreeMap::new();
    for mutant in mutants {
        let place = places.entry(place_of(mutant, text)).or_insert((mutant.original, Vec::new()));
        assert_eq!(
            place.0, mutant.original,
            "mutants: {} begins where another mutant begins; give both the same original text",
            mutant.name
        );
        place.1.push(mutant);
    }
    let mut woven = String::with_capacity(text.len());
    let mut copied = 0;
    for (at, (original, mutants)) in places {
        assert!(at >= copied, "mutants: {} overlaps another mutant of {name}", mutants[0].name);
        woven.push_str(&text[copied..at]);
        // Parentheses, so that an expression may be an operand, or have a method called on it.
        let is_expression = !original.ends_with([';', '}']);
        woven.push_str(if is_expression { "(" } else { "" });
        for mutant in &mutants {
            let chosen = format!("crate::mutant::is(crate::mutant::M::{})", mutant.name);
            let _ = write!(woven, "if {chosen} {{ {} }} else ", mutant.replacement);
        }
        let _ = write!(woven, "{{ {original} }}");
        woven.push_str(if is_expression { ")" } else { "" });
        copied = at + original.len();
    }
    woven.push_str(&text[copied..]);
    woven
}

/// Where the text of `mutant` is: the only place in `text`, or the first behind the only place of its anchor.
fn place_of(mutant: &Mutant, text: &str) -> usize {
    let only = |what: &str, part: &str| {
        let found: Vec<usize> = text.match_indices(part).map(|(at, _)| at).collect();
        match found.as_slice() {
            &[at] => at,
            _ => panic!(
                "mutants: {}: its {what} occurs {} times in shadow-mmu/src/{}, not once; the code has changed, so \
                 change the mutant:\n{part}",
                mutant.name,
                found.len(),
                mutant.file
            ),
        }
    };
    if mutant.behind.is_empty() {
        return only("original text", mutant.original);
    }
    let anchor = only("anchor", mutant.behind);
    match text[anchor..].find(mutant.original) {
        Some(at) => anchor + at,
        None => panic!(
            "mutants: {}: its original text does not occur in shadow-mmu/src/{} behind its anchor; the code has \
             changed, so change the mutant:\n{}",
            mutant.name, mutant.file, mutant.original
        ),
    }
}

/// The module that knows the mutants, and which of them is chosen.
pub(crate) fn mutant_module() -> String {
    // One that changes several places has an entry for each.
    let names: BTreeMap<&str, &Mutant> = mutants::all().map(|mutant| (mutant.name, mutant)).collect();
    let variants: String =
        names.iter().map(|(name, mutant)| format!("    /// {}\n    {name},\n", mutant.breaks)).collect();
    let all: String = names.keys().map(|name| format!("        M::{name},\n")).collect();
    format!(
        "//! Which mutant is chosen, by OS thread: both checkers run an execution on the thread that asked for it.\n\
         use std::cell::Cell;\n\
         /// The mutants; see tests/models/mutants.\n\
         #[derive(Debug, Clone, Copy, PartialEq, Eq)]\n\
         pub enum M {{\n{variants}}}\n\
         impl M {{\n    /// All of them.\n    pub const ALL: &[M] = &[\n{all}    ];\n}}\n\
         thread_local! {{ static CHOSEN: Cell<Option<M>> = const {{ Cell::new(None) }}; }}\n\
         /// Whether `mutant` is chosen.\n\
         pub fn is(mutant: M) -> bool {{ CHOSEN.get() == Some(mutant) }}\n\
         /// Chooses a mutant for this thread, or none.\n\
         pub fn choose(mutant: Option<M>) {{ CHOSEN.set(mutant); }}\n"
    )
}
