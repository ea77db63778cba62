// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Whether tests can run guests. (`tests/common` has the same for tests from outside.)

use super::{EngineChoice, EngineConfig, EngineKind, choice};
use crate::causes::one_line;

/// The engine that tests use, as the environment has it; `None`, and one line, where it cannot run guests. Where the environment
/// has `UMBRA_REQUIRE_KVM`, as on machines that are known to have KVM, that is a failure, as is another engine that was not
/// asked for.
pub(crate) fn guests() -> Option<EngineConfig> {
    let config = crate::cli::engine();
    let kind = choice::kind(&config);
    let required = config.choice != EngineChoice::Ptrace && std::env::var_os("UMBRA_REQUIRE_KVM").is_some();
    assert!(!required || matches!(kind, Ok(EngineKind::Kvm)), "KVM is required here: {kind:?}");
    match kind {
        Ok(kind) => Some(EngineConfig { choice: kind.into(), ..config }),
        Err(error) => {
            println!("skipped: {}", one_line(&error));
            None
        }
    }
}
