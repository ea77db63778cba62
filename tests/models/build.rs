// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Weaves the sources of shadow-mmu for the model checkers.
//!
//! For each checker a copy of the sources is made in `OUT_DIR`, in which
//! * `crate::sync`, the one place that locks, atomics and threads come from, is left out: the test target that includes the
//!   copy brings its own (`sync/shuttle.rs`, `sync/loom.rs`);
//! * unit tests are cut;
//! * every mutant of `mutants/` stands beside the text that it replaces, behind a look at which mutant is chosen. With none
//!   chosen the copy does what the original does.
//!
//! shuttle gets the whole crate; loom gets the files that need neither frame memory nor a kernel ([`LOOM_FILES`]).
//! A text that is to be replaced and is not there stops the build: the code has moved on, and what is said about it here or
//! in `mutants/` must follow.

mod mutants;
mod weave;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use weave::Changes;

/// Changes to shuttle's copy beside the mutants. A list of listeners that is freed is freed for good, and with some mutants
/// too early: so the copy knows who walks which list, and fails instead of reaching freed memory (`shuttle/quarantine.rs`).
const SHUTTLE_CHANGES: Changes = &[
    (
        "notifier/list.rs",
        "drop(unsafe { Box::from_raw(self.0) });",
        "crate::quarantine::free(unsafe { Box::from_raw(self.0) });",
    ),
    (
        "notifier/list.rs",
        "    _section: Section<'a>,",
        "    _reader: crate::quarantine::Reader,\n    _section: Section<'a>,",
    ),
    (
        "notifier/list.rs",
        "_section: section }",
        "_reader: crate::quarantine::Reader::of(listeners), _section: section }",
    ),
    // Rings of four entries, so that scenarios come around.
    SMALL_RINGS,
];

/// A change: fewer entries are kept free behind soft-full, and so rings may be smaller.
const SMALL_RINGS: (&str, &str, &str) =
    ("shadow/dirty/ring.rs", "const RESERVED: u32 = 64;", "const RESERVED: u32 = 2;");

/// The files that loom runs.
const LOOM_FILES: &[&str] = &[
    "addr.rs",
    "frame/meta.rs",
    "mm/pte.rs",
    "mm/write_logs.rs",
    "notifier/mod.rs",
    "notifier/interval.rs",
    "notifier/list.rs",
    "notifier/srcu.rs",
    "notifier/windows.rs",
    "notifier/written.rs",
    "notifier/young.rs",
    "shadow/dirty/bitmap.rs",
    "shadow/dirty/pages.rs",
    "shadow/dirty/ring.rs",
    "shadow/dirty/runs.rs",
    "shadow/entry.rs",
    "shadow/spte.rs",
];

/// A file of which loom runs a part: what the part needs, where it begins, where it is over.
const LOOM_PART: (&str, &str, &str, &str) = (
    "table.rs",
    "use crate::addr::{PAGE_SHIFT, Pfn};\nuse crate::sync::atomic::AtomicU64;\n",
    "/// Entries in a table.\n",
    "/// Which entry of a table at `level`",
);

/// What takes the place of `lib.rs` and of the module files that loom does not run.
const LOOM_MODULES: &[(&str, &str)] = &[
    (
        "lib.rs",
        "pub mod addr;\npub(crate) mod frame;\npub mod mm;\npub mod mutant;\npub mod notifier;\npub mod shadow;\npub mod table;\n",
    ),
    ("frame/mod.rs", "pub(crate) mod meta;\n"),
    ("mm/mod.rs", "mod pte;\npub(crate) mod write_logs;\npub use pte::Pte;\n"),
    (
        "shadow/mod.rs",
        "pub(crate) mod dirty;\npub(crate) mod entry;\nmod spte;\npub use spte::{AdBits, Spte};\n",
    ),
    (
        "shadow/dirty/mod.rs",
        "pub(crate) mod bitmap;\npub(crate) mod pages;\npub(crate) mod ring;\nmod runs;\n\
         #[derive(Debug)]\npub enum DirtyLogError { RingSize(u32) }\n",
    ),
];

/// Changes to loom's copy beside the mutants.
const LOOM_CHANGES: Changes = &[
    // The worker that frees old lists waits in a loop, and two threads that do are unfair to a third, which loom follows
    // without end. So old lists are leaked; callbacks have a model of their own.
    ("notifier/list.rs", "self.srcu.call(move || old.free());", "std::mem::forget(old);"),
    // This needs an `Mm`.
    ("notifier/mod.rs", "#[cfg(feature = \"mmu-notifier\")]\nmod get;\n", ""),
    ("notifier/mod.rs", "#[cfg(feature = \"mmu-notifier\")]\npub use get::{Shared, get};\n", ""),
    // Each word and each entry is an object that loom follows, and each look at one a choice.
    ("shadow/dirty/pages.rs", "const WORDS: usize = 512;", "const WORDS: usize = 2;"),
    ("shadow/dirty/ring.rs", "const RESERVED: u32 = 64;", "const RESERVED: u32 = 1;"),
    // The models are outside of the module.
    ("frame/meta.rs", "pub(super)", "pub(crate)"),
    ("shadow/dirty/bitmap.rs", "pub(super)", "pub(crate)"),
    ("shadow/dirty/pages.rs", "pub(super)", "pub(crate)"),
    ("shadow/dirty/ring.rs", "pub(super)", "pub(crate)"),
    ("shadow/dirty/runs.rs", "pub(super)", "pub(crate)"),
];

type Files = BTreeMap<String, String>;

fn main() {
    let here = PathBuf::from(var("CARGO_MANIFEST_DIR"));
    let out = PathBuf::from(var("OUT_DIR"));
    for watched in ["build.rs", "mutants", "weave.rs"] {
        println!("cargo::rerun-if-changed={}", here.join(watched).display());
    }
    let sources = read_sources(&here.join("../../shadow-mmu/src"));
    for mutant in mutants::all() {
        assert!(
            sources.contains_key(mutant.file),
            "mutants: {} names the file {}, which shadow-mmu/src does not have",
            mutant.name,
            mutant.file
        );
    }
    write_tree(&out.join("shuttle"), shuttle_copy(&sources));
    write_tree(&out.join("loom"), loom_copy(&sources));
}

fn var(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|error| panic!("cargo sets {name} for build scripts: {error}"))
}

fn shuttle_copy(sources: &Files) -> Files {
    let mut copy = Files::new();
    for (name, text) in sources {
        match name.as_str() {
            "sync.rs" => continue,
            "lib.rs" => copy.insert(name.clone(), weave::crate_root(text)),
            _ => copy.insert(name.clone(), weave::weave(name, text, SHUTTLE_CHANGES)),
        };
    }
    copy
}

fn loom_copy(sources: &Files) -> Files {
    let source = |name: &str| match sources.get(name) {
        Some(text) => text,
        None => panic!("build.rs: shadow-mmu/src has no file {name}"),
    };
    let mut copy = Files::new();
    for &name in LOOM_FILES {
        copy.insert(name.to_owned(), weave::weave(name, source(name), LOOM_CHANGES));
    }
    let (name, head, from, to) = LOOM_PART;
    copy.insert(name.to_owned(), format!("{head}{}", weave::part(name, source(name), from, to)));
    copy.extend(LOOM_MODULES.iter().map(|&(name, text)| (name.to_owned(), text.to_owned())));
    copy
}

/// Every source file, by its path below `root`.
fn read_sources(root: &Path) -> Files {
    let mut files = Files::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        // A folder is watched too: a new file is a change.
        println!("cargo::rerun-if-changed={}", folder.display());
        let fail = |error| -> ! { panic!("{}: {error}", folder.display()) };
        for entry in fs::read_dir(&folder).unwrap_or_else(|error| fail(error)) {
            let path = entry.unwrap_or_else(|error| fail(error)).path();
            if path.is_dir() {
                folders.push(path);
            } else if path.ends_with("tests.rs") {
                // Unit tests, whose module the weaver cuts.
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                println!("cargo::rerun-if-changed={}", path.display());
                let name = path.strip_prefix(root).unwrap_or(&path).to_string_lossy().into_owned();
                files.insert(name, fs::read_to_string(&path).unwrap_or_else(|error| fail(error)));
            }
        }
    }
    files
}

/// Writes the files below `folder`, with the module that knows the mutants, and touches none that is as it should be.
fn write_tree(folder: &Path, mut files: Files) {
    files.insert("mutant.rs".to_owned(), weave::mutant_module());
    for (name, text) in files {
        let path = folder.join(name);
        if fs::read_to_string(&path).is_ok_and(|now| now == text) {
            continue;
        }
        let parent = path.parent().unwrap_or(folder);
        fs::create_dir_all(parent).unwrap_or_else(|error| panic!("{}: {error}", parent.display()));
        fs::write(&path, text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
}
