// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Rules about the repository itself that no lint checks.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Every file below `folder` but what is built or git's own.
fn files(folder: &Path, out: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if path.is_dir() {
            if !["target", ".git"].contains(&name) {
                files(&path, out);
            }
        } else {
            out.push(path);
        }
    }
}

fn with_extensions(extensions: &[&str]) -> Vec<PathBuf> {
    let mut all = Vec::new();
    files(&root(), &mut all);
    all.retain(|path| path.extension().is_some_and(|it| extensions.contains(&it.to_str().unwrap())));
    assert!(!all.is_empty(), "the repository was not found");
    all
}

#[test]
fn every_source_file_names_its_licence() {
    let mut paths = with_extensions(&["rs", "toml", "md"]);
    paths.extend([root().join(".ci/run"), root().join("scripts/npt"), root().join("scripts/soak")]);
    for path in paths {
        // Tools read these two without a comment, and a README shows it.
        if ["rustfmt.toml", "clippy.toml", "README.md"].contains(&path.file_name().unwrap().to_str().unwrap())
        {
            continue;
        }
        let text = fs::read_to_string(&path).unwrap();
        let head: Vec<_> = text.lines().take(2).collect();
        let line = "SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause";
        assert!(head.iter().any(|head| head.contains(line)), "{} lacks its SPDX line", path.display());
    }
}

#[test]
fn the_readme_has_exactly_the_two_commands() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let commands: Vec<_> =
        readme.split("```sh\n").skip(1).map(|block| block.split("```").next().unwrap().trim()).collect();
    assert_eq!(commands, ["cargo run --release -- run hello", "cargo test --workspace"]);
    let ci = fs::read_to_string(root().join(".ci/run")).unwrap();
    assert!(ci.contains(commands[1]), "CI runs what the README says");
}

#[test]
fn links_between_documents_lead_somewhere() {
    for path in with_extensions(&["md"]) {
        let text = fs::read_to_string(&path).unwrap();
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if !link.starts_with("http") && !link.starts_with('#') {
                let target = path.parent().unwrap().join(link.split('#').next().unwrap());
                assert!(target.exists(), "{}: {link} leads nowhere", path.display());
            }
        }
    }
}

/// Everything that Rust sources say.
fn sources() -> String {
    with_extensions(&["rs"]).iter().map(|path| fs::read_to_string(path).unwrap()).collect()
}

/// The words in backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

fn is_test(sources: &str, name: &str) -> bool {
    ["", "    "].iter().any(|indent| sources.contains(&format!("#[test]\n{indent}fn {name}()")))
}

/// Every point has a line in the table of docs/fault-injection.md, with tests that exist; and the table has no other.
#[test]
fn every_fault_point_has_its_line_and_its_tests() {
    let text = fs::read_to_string(root().join("docs/fault-injection.md")).unwrap();
    let table = text.split_once("| point | models | umbra promises | tests |\n").unwrap().1;
    let sources = sources();
    let mut listed = Vec::new();
    for row in table.lines().skip(1).map_while(|line| line.strip_prefix("| ")?.strip_suffix(" |")) {
        let cells: Vec<&str> = row.split(" | ").collect();
        let [point, models, promise, tests] = cells[..] else { panic!("not four cells: {row}") };
        assert!(models.len() > 10 && promise.len() > 10, "{point} lacks its model or its promise");
        assert!(quoted(tests).count() > 0, "{point} has no test");
        for test in quoted(tests) {
            assert!(is_test(&sources, test), "docs/fault-injection.md names {test}, which is no test");
        }
        listed.push(quoted(point).next().unwrap());
    }
    let points: Vec<&str> = vmm::inject::points::all().map(|point| point.name).collect();
    assert_eq!(listed, points);
}

/// Checks that the last column of each table of `document` whose last heading is "tests" names tests that exist, or, in brackets,
/// attacks. How many.
fn named_tests(document: &str, sources: &str) -> usize {
    let text = fs::read_to_string(root().join(document)).unwrap();
    let mut in_table = false;
    let mut named = 0;
    for line in text.lines() {
        let Some(row) = line.strip_prefix('|') else {
            in_table = false;
            continue;
        };
        let last = row.trim_end().trim_end_matches('|').rsplit('|').next().unwrap().trim();
        in_table |= last == "tests";
        if !in_table {
            continue;
        }
        for name in quoted(last) {
            let is_attack = sources.contains(&format!("    (\"{name}\", "));
            assert!(is_attack || is_test(sources, name), "{document} names {name}, which is no test");
            named += 1;
        }
    }
    named
}

#[test]
fn the_engines_promises_are_tied_to_tests_that_exist() {
    let named = named_tests("docs/engines.md", &sources());
    assert!(named > 30, "only {named} tests are named");
}

/// And every race is in the table.
#[test]
fn the_contract_is_tied_to_tests_that_exist() {
    let named = named_tests("docs/contract.md", &sources());
    assert!(named > 50, "only {named} tests are named");
    let text = fs::read_to_string(root().join("docs/contract.md")).unwrap();
    let races = (1..=35).map(|race| race.to_string()).chain(["10b".into(), "20b".into()]);
    for race in races {
        assert!(text.contains(&format!("| R{race} |")), "R{race} is missing");
    }
}
