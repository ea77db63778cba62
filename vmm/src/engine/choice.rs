// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which engine runs a guest: the one that is asked for, or the best that this host has.
//!
//! `auto` takes KVM where a VM can be made and the quick probe finds a way to flush that works, ptrace otherwise. That it did is
//! said on stderr, once a process. A frame pool that is too small is no reason to take another engine: it is said as it is.

use super::kvm::{Effort, HostFacts, KvmVm};
use super::ptrace::PtraceVm;
use super::{Engine, SetupError};
use anyhow::{Context, Result, anyhow};
use clap::ValueEnum;
use shadow_mmu::frame::{FramePool, FreedFrames};
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Once};

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum EngineChoice {
    /// KVM where it can be used, else ptrace, which is said.
    #[default]
    Auto,
    /// A KVM virtual machine: the CPU walks umbra's tables.
    Kvm,
    /// A traced process: needs no device and no rights.
    Ptrace,
}

impl fmt::Display for EngineChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Kvm => "kvm",
            Self::Ptrace => "ptrace",
        })
    }
}

/// What an engine is made by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineConfig {
    /// Which.
    pub choice: EngineChoice,
    /// The KVM device.
    pub kvm_device: PathBuf,
}

/// Memory of an engine that nothing will run on.
const SMALL: u64 = 4 << 20;

/// A machine of the engine that `config` asks for, over `pool`.
///
/// # Errors
/// It cannot be had, in one line that says what to do; for `auto`, why neither can.
pub fn open(config: &EngineConfig, pool: Arc<FramePool>) -> Result<Arc<dyn Engine>> {
    static TOLD: Once = Once::new();
    choose(
        config.choice,
        || Ok(kvm(config, Arc::clone(&pool))? as Arc<dyn Engine>),
        || {
            let vm =
                PtraceVm::new(Arc::clone(&pool)).map_err(SetupError::from).context("cannot use ptrace")?;
            Ok(vm as Arc<dyn Engine>)
        },
        |notice| TOLD.call_once(|| eprintln!("umbra: {notice}")),
    )
}

/// What the host is, under the engine that `config` asks for, and which that is.
///
/// # Errors
/// Those of [`open`].
pub fn facts(config: &EngineConfig) -> Result<HostFacts> {
    let pool = Arc::new(FramePool::new(SMALL, FreedFrames::Keep)?);
    Ok(open(config, pool)?.facts().clone())
}

fn kvm(config: &EngineConfig, pool: Arc<FramePool>) -> Result<Arc<KvmVm>> {
    let vm = KvmVm::new(&config.kvm_device, pool).map_err(SetupError::from).context("cannot use KVM")?;
    vm.probe_flush(Effort::Quick).map_err(SetupError::from).context("cannot use this KVM")?;
    Ok(vm)
}

/// Makes one by `kvm` or by `ptrace`; `tell` is told if it is not the one that was hoped for.
fn choose<T>(
    choice: EngineChoice,
    kvm: impl FnOnce() -> Result<T>,
    ptrace: impl FnOnce() -> Result<T>,
    tell: impl FnOnce(&str),
) -> Result<T> {
    let no_kvm = match choice {
        EngineChoice::Kvm => return kvm(),
        EngineChoice::Ptrace => return ptrace(),
        EngineChoice::Auto => match kvm() {
            Err(error) if !is_about_the_pool(&error) => error,
            made => return made,
        },
    };
    match ptrace() {
        Ok(made) => {
            tell(&format!(
                "{no_kvm:#}. The guest runs by ptrace: it computes at full speed, page faults and changes of mappings cost more, and \
                 adopted memory is not to be had (--engine ptrace asks for this and says nothing)"
            ));
            Ok(made)
        }
        Err(error) if is_about_the_pool(&error) => Err(error),
        Err(no_ptrace) => Err(anyhow!("no engine can run guests here: {no_kvm:#}; {no_ptrace:#}")),
    }
}

fn is_about_the_pool(error: &anyhow::Error) -> bool {
    error.downcast_ref().is_some_and(SetupError::is_out_of_frames)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

    use super::super::kvm;
    use super::*;
    use std::cell::RefCell;

    /// The engine that is made when `kvm` and `ptrace` come out so, and what is told.
    fn made(
        choice: EngineChoice,
        kvm: Result<&'static str>,
        ptrace: Result<&'static str>,
    ) -> (Result<&'static str>, Vec<String>) {
        let told = RefCell::default();
        let tell = |notice: &str| RefCell::<Vec<String>>::borrow_mut(&told).push(notice.to_owned());
        let made = choose(choice, || kvm, || ptrace, tell);
        (made, told.into_inner())
    }

    fn no_kvm() -> Result<&'static str> {
        Err(anyhow!("no device").context("cannot use KVM"))
    }

    #[test]
    fn what_is_asked_for_is_made_or_nothing_is() {
        for (choice, other) in [(EngineChoice::Kvm, "kvm"), (EngineChoice::Ptrace, "ptrace")] {
            let (engine, told) = made(choice, Ok("kvm"), Ok("ptrace"));
            assert_eq!((engine.unwrap(), told.len()), (other, 0));
        }
        let (engine, told) = made(EngineChoice::Kvm, no_kvm(), Ok("ptrace"));
        assert_eq!(
            (format!("{:#}", engine.unwrap_err()), told.len()),
            ("cannot use KVM: no device".into(), 0)
        );
        let (engine, _) = made(EngineChoice::Ptrace, Ok("kvm"), Err(anyhow!("no tracing")));
        assert_eq!(engine.unwrap_err().to_string(), "no tracing");
    }

    #[test]
    fn auto_takes_kvm_else_ptrace_and_says_why() {
        let (engine, told) = made(EngineChoice::Auto, Ok("kvm"), Ok("ptrace"));
        assert_eq!((engine.unwrap(), told.len()), ("kvm", 0));
        let (engine, told) = made(EngineChoice::Auto, no_kvm(), Ok("ptrace"));
        assert_eq!((engine.unwrap(), told.len()), ("ptrace", 1));
        assert!(told[0].starts_with("cannot use KVM: no device. "), "{told:?}");
        assert!(told[0].contains("page faults") && !told[0].contains('\n'), "{told:?}");
    }

    #[test]
    fn where_there_is_neither_both_reasons_are_said() {
        let (engine, told) = made(EngineChoice::Auto, no_kvm(), Err(anyhow!("no tracing")));
        let said = engine.unwrap_err().to_string();
        assert_eq!(
            (said.as_str(), told.len()),
            ("no engine can run guests here: cannot use KVM: no device; no tracing", 0)
        );
    }

    #[test]
    fn a_pool_that_is_too_small_is_said_and_no_reason_for_another_engine() {
        let full = SetupError::from(kvm::SetupError::Frames(shadow_mmu::frame::OutOfFrames));
        let (engine, told) = made(EngineChoice::Auto, Err(full).context("cannot use KVM"), Ok("ptrace"));
        assert!(is_about_the_pool(&engine.unwrap_err()) && told.is_empty());
    }

    #[test]
    fn a_missing_device_is_named() {
        let config = EngineConfig { choice: EngineChoice::Kvm, kvm_device: "/nonexistent/kvm".into() };
        let error = format!("{:#}", facts(&config).unwrap_err());
        assert!(error.starts_with("cannot use KVM: /nonexistent/kvm does not exist"), "{error}");
    }
}
