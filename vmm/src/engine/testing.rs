// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Whether tests can run guests. (`tests/common` has the same for tests from outside.)

use super::kvm::host_facts;
use super::{EngineChoice, EngineConfig, ptrace};

/// The engine that tests use, as the environment has it; `None`, and one line, where it cannot run guests. Where the environment
/// has `UMBRA_REQUIRE_KVM`, as on machines that are known to have KVM, that is a failure.
pub(crate) fn guests() -> Option<EngineConfig> {
    let config = crate::cli::engine();
    let no_kvm = match config.choice {
        EngineChoice::Ptrace => None,
        EngineChoice::Auto | EngineChoice::Kvm => match host_facts(&config.kvm_device).obstacle {
            None => return Some(config),
            obstacle => obstacle,
        },
    };
    if let Some(obstacle) = &no_kvm {
        assert!(std::env::var_os("UMBRA_REQUIRE_KVM").is_none(), "KVM is required here: {obstacle}");
    }
    let no_ptrace = match config.choice {
        EngineChoice::Kvm => None,
        EngineChoice::Auto | EngineChoice::Ptrace => match ptrace::probe() {
            Ok(()) => return Some(EngineConfig { choice: EngineChoice::Ptrace, ..config }),
            Err(error) => Some(error.to_string()),
        },
    };
    println!("skipped: {}", no_kvm.into_iter().chain(no_ptrace).collect::<Vec<_>>().join("; "));
    None
}
