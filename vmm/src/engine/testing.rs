// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Whether tests can have an engine here: the one place where tests of this crate ask. (`tests/common` has the same for tests
//! from outside.)
//!
//! `UMBRA_ENGINE` narrows the tests to the engine that it names. An engine that cannot be had leaves its tests out, which they
//! say in one line; it is a failure where the environment names it, by `UMBRA_ENGINE` or with `UMBRA_REQUIRE_KVM` or
//! `UMBRA_REQUIRE_PTRACE`, as on machines that are known to have it.

use super::{EngineChoice, EngineConfig, EngineKind, choice};
use crate::causes::one_line;

/// What makes machines of `kind` here; `None`, and one line, where its tests have nothing to do.
///
/// # Panics
/// It cannot be had, and the environment says that it must.
pub(crate) fn config(kind: EngineKind) -> Option<EngineConfig> {
    let asked = crate::cli::engine();
    let config = EngineConfig { choice: kind.into(), ..asked };
    if ![EngineChoice::Auto, config.choice].contains(&asked.choice) {
        println!("skipped with {kind}: UMBRA_ENGINE is {}", asked.choice);
        return None;
    }
    let error = match choice::kind(&config) {
        Ok(_) => return Some(config),
        Err(error) => one_line(&error),
    };
    let variable = match kind {
        EngineKind::Kvm => "UMBRA_REQUIRE_KVM",
        EngineKind::Ptrace => "UMBRA_REQUIRE_PTRACE",
    };
    let required = asked.choice == config.choice || std::env::var_os(variable).is_some();
    assert!(!required, "{kind} is required here: {error}");
    println!("skipped with {kind}: {error}");
    None
}

/// The engines that tests of every engine use.
pub(crate) fn configs() -> Vec<EngineConfig> {
    [EngineKind::Kvm, EngineKind::Ptrace].into_iter().filter_map(config).collect()
}

/// The engine that tests of guests use: KVM, or ptrace where that cannot be had.
pub(crate) fn guests() -> Option<EngineConfig> {
    config(EngineKind::Kvm).or_else(|| config(EngineKind::Ptrace))
}
