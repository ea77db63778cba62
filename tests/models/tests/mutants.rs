// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! That nobody writes a mutant and no test for it.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[path = "../mutants/mod.rs"]
#[allow(dead_code, reason = "most of the table is for build.rs")]
mod mutants;

use std::fs;
use std::path::Path;

#[test]
fn every_mutant_is_looked_for() {
    let mut tests = String::new();
    for checker in ["shuttle", "loom"] {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(checker);
        for entry in fs::read_dir(folder).unwrap() {
            tests.push_str(&fs::read_to_string(entry.unwrap().path()).unwrap());
        }
    }
    let named = |name: &str| {
        tests
            .match_indices(&format!("M::{name}"))
            .any(|(at, text)| !tests[at + text.len()..].starts_with(|next: char| next.is_alphanumeric()))
    };
    let forgotten: Vec<_> = mutants::all().map(|one| one.name).filter(|name| !named(name)).collect();
    assert!(forgotten.is_empty(), "no test looks for {forgotten:?}");
}
