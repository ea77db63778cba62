// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Rules about the repository itself that no lint checks.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::BTreeSet;
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

/// The files of a folder below `tests/models`, as one text.
fn of_models(folder: &str) -> String {
    let mut paths = Vec::new();
    files(&root().join("tests/models").join(folder), &mut paths);
    paths.iter().map(|path| fs::read_to_string(path).unwrap()).collect()
}

/// docs/contract.md is the one place that says how many there are.
#[test]
fn what_is_proven_is_counted_right() {
    let contract = fs::read_to_string(root().join("docs/contract.md")).unwrap();
    let proof = contract.split("\n## ").find(|section| section.starts_with("How it is proven\n")).unwrap();
    let (shuttle, loom, mutants) =
        (of_models("tests/shuttle"), of_models("tests/loom"), of_models("mutants"));
    let tests = |text: &str| text.matches("#[test]").count();
    let bounded =
        loom.matches("Preemptions::AtMost(").count() - loom.matches("Preemptions::AtMost(bound)").count();
    // One that changes several places stands there for each.
    let mutants: BTreeSet<_> =
        mutants.split("        name: \"").skip(1).map(|rest| rest.split('"').next().unwrap()).collect();
    for said in [
        format!(" {} scenarios", tests(&shuttle)),
        format!(" of {} small models", tests(&loom)),
        format!(" {} of them without any bound on preemptions", tests(&loom) - bounded),
        format!(" {bounded} with one that is stated in the test"),
        format!(" {} changes that each break one rule", mutants.len()),
    ] {
        let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(words(proof).contains(said.trim()), "docs/contract.md does not say{said}");
    }
}

/// Every call that umbra knows is in the table of docs/guest-abi.md, once, and those of which it says nothing are told apart.
#[test]
fn the_system_calls_of_the_documentation_are_those_that_there_are() {
    let text = fs::read_to_string(root().join("docs/guest-abi.md")).unwrap();
    let table = text.split_once("| area | calls |\n").unwrap().1;
    let (mut listed, mut silent) = (Vec::new(), Vec::new());
    for row in table.lines().skip(1).map_while(|line| line.strip_prefix("| ")?.strip_suffix(" |")) {
        let (area, calls) = row.split_once(" | ").unwrap();
        // What is in brackets is about them.
        let calls = calls.split('(').map(|part| part.split_once(')').map_or(part, |(_, rest)| rest));
        let words: String = calls.collect();
        let calls = words.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let calls = calls.filter(|word| !["", "and"].contains(word)).map(str::to_owned);
        let into = if area.starts_with("`ENOSYS`") { &mut silent } else { &mut listed };
        into.extend(calls);
    }
    let source = fs::read_to_string(root().join("vmm/src/guest/syscall.rs")).unwrap();
    let arm = source.split_once("nothing worth a mention.\n").unwrap().1.split("=>").next().unwrap();
    let of_arm: BTreeSet<_> =
        arm.split('|').map(|call| call.trim().strip_prefix("libc::SYS_").unwrap().to_owned()).collect();
    assert_eq!(silent.iter().cloned().collect::<BTreeSet<_>>(), of_arm);
    listed.extend(silent);
    let all: BTreeSet<_> = vmm::guest::call_names().map(str::to_owned).collect();
    assert_eq!(listed.iter().cloned().collect::<BTreeSet<_>>(), all);
    assert_eq!(listed.len(), all.len(), "a call stands twice");
    // And these are those that the code has a line for.
    let code = source.split("#[cfg(test)]").next().unwrap();
    let words = code.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let handled: BTreeSet<_> =
        words.filter_map(|word| word.strip_prefix("SYS_")).map(str::to_owned).collect();
    assert_eq!(handled, all);
}
