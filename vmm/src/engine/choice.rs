// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which engine runs a guest: the one that is asked for, or the best that this host has.
//!
//! `auto` takes KVM where a VM can be made and the quick probe finds a way to flush that works, ptrace otherwise, which is said on
//! stderr. It decides once a process and device: all later machines have that engine, and what it cannot do then is an error. A
//! frame pool that is too small is no reason to take another engine: it is said as it is, and decides nothing.
//!
//! `FOUND` is locked while `auto` decides, and by nobody who holds another lock.

use super::kvm::{Effort, KvmVm};
use super::ptrace::PtraceVm;
use super::{Engine, EngineKind, SetupError};
use crate::causes::{one_line, say};
use anyhow::{Context, Result, anyhow};
use clap::ValueEnum;
use shadow_mmu::frame::{FramePool, FreedFrames};
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, ValueEnum)]
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

impl From<EngineKind> for EngineChoice {
    fn from(kind: EngineKind) -> Self {
        match kind {
            EngineKind::Kvm => Self::Kvm,
            EngineKind::Ptrace => Self::Ptrace,
        }
    }
}

/// What an engine is made by.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct EngineConfig {
    /// Which.
    pub choice: EngineChoice,
    /// The KVM device.
    pub kvm_device: PathBuf,
}

/// Memory of a [`trial`].
const SMALL: u64 = 4 << 20;

/// What was asked for and could be had, and which engine that is.
static FOUND: Mutex<BTreeMap<EngineConfig, EngineKind>> = Mutex::new(BTreeMap::new());

fn found() -> MutexGuard<'static, BTreeMap<EngineConfig, EngineKind>> {
    FOUND.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A machine of the engine that `config` asks for, over `pool`.
///
/// # Errors
/// It cannot be had, in one line that says what to do; for `auto`, why neither can.
pub fn open(config: &EngineConfig, pool: Arc<FramePool>) -> Result<Arc<dyn Engine>> {
    let mut found = found();
    let choice = match found.get(config) {
        Some(&kind) => kind.into(),
        None => config.choice,
    };
    if choice != EngineChoice::Auto {
        // Nothing is left to decide.
        drop(found);
        let engine = make(choice, config, &pool)?;
        self::found().insert(config.clone(), engine.kind());
        return Ok(engine);
    }
    let engine = make(choice, config, &pool)?;
    found.insert(config.clone(), engine.kind());
    Ok(engine)
}

fn make(choice: EngineChoice, config: &EngineConfig, pool: &Arc<FramePool>) -> Result<Arc<dyn Engine>> {
    choose(
        choice,
        || Ok(kvm(config, Arc::clone(pool))? as Arc<dyn Engine>),
        || {
            let vm = PtraceVm::new(Arc::clone(pool)).context("cannot use ptrace")?;
            Ok(vm as Arc<dyn Engine>)
        },
        |notice| say(notice),
    )
}

/// The engine that machines of `config` have here. Found out by making one, the first time.
///
/// # Errors
/// Those of [`open`].
pub fn kind(config: &EngineConfig) -> Result<EngineKind> {
    let known = found().get(config).copied();
    match known {
        Some(kind) => Ok(kind),
        None => Ok(trial(config)?.kind()),
    }
}

/// A machine of the engine that `config` asks for, to ask it what it is: nothing will run on it.
///
/// # Errors
/// Those of [`open`].
pub fn trial(config: &EngineConfig) -> Result<Arc<dyn Engine>> {
    open(config, Arc::new(FramePool::new(SMALL, FreedFrames::Keep)?))
}

fn kvm(config: &EngineConfig, pool: Arc<FramePool>) -> Result<Arc<KvmVm>> {
    let vm = KvmVm::new(&config.kvm_device, pool).context("cannot use KVM")?;
    vm.probe_flush(Effort::Quick).context("cannot use this KVM")?;
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
                "{}; running by ptrace: page faults and changes of mappings cost more (UMBRA_ENGINE=ptrace says nothing)",
                without_advice(&no_kvm)
            ));
            Ok(made)
        }
        Err(error) if is_about_the_pool(&error) => Err(error),
        Err(no_ptrace) => {
            Err(anyhow!("no engine can run guests here: {}; {}", one_line(&no_kvm), one_line(&no_ptrace)))
        }
    }
}

/// What is wrong with KVM. What to do about it is for those who want KVM, and `umbra doctor` says it.
fn without_advice(no_kvm: &anyhow::Error) -> String {
    let line = one_line(no_kvm);
    let advice = no_kvm.downcast_ref().map_or("", SetupError::advice);
    line.strip_suffix(advice).unwrap_or(&line).to_owned()
}

fn is_about_the_pool(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(SetupError::Frames(_)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

    use super::super::kvm::KvmError;
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
        assert!(told[0].starts_with("cannot use KVM: no device; running by ptrace: "), "{told:?}");
        assert!(told[0].contains("page faults") && !told[0].contains('\n'), "{told:?}");
    }

    #[test]
    fn the_notice_is_one_short_line_without_advice() {
        let path: PathBuf = "/dev/kvm".into();
        for error in [
            KvmError::DeviceMissing(path.clone()),
            KvmError::DevicePermission(path.clone()),
            KvmError::Device { path, source: std::io::Error::from_raw_os_error(libc::ENOTTY) },
        ] {
            let advice = error.advice();
            assert!(!advice.is_empty());
            let error = anyhow::Error::from(SetupError::from(error)).context("cannot use KVM");
            let (_, told) = made(EngineChoice::Auto, Err(error), Ok("ptrace"));
            assert!(told.len() == 1 && told[0].contains("/dev/kvm") && told[0].len() <= 180, "{told:?}");
            assert!(!told[0].contains(advice), "{told:?}");
        }
    }

    #[test]
    fn auto_decides_once() {
        let config =
            EngineConfig { choice: EngineChoice::Auto, kvm_device: "/nonexistent/decided/kvm".into() };
        // As if KVM had been there before: that it is gone is an error, and no reason for another engine.
        found().insert(config.clone(), EngineKind::Kvm);
        assert_eq!(kind(&config).unwrap(), EngineKind::Kvm);
        let error = trial(&config).unwrap_err().to_string();
        assert_eq!(error, "cannot use KVM");
    }

    #[test]
    fn what_auto_found_is_what_it_stays_and_a_failure_decides_nothing() {
        let config = EngineConfig { choice: EngineChoice::Auto, kvm_device: "/nonexistent/new/kvm".into() };
        let Ok(engine) = trial(&config) else { return assert_eq!(found().get(&config), None) };
        assert_eq!((engine.kind(), found().get(&config)), (EngineKind::Ptrace, Some(&EngineKind::Ptrace)));
        assert_eq!(kind(&config).unwrap(), EngineKind::Ptrace);
        let asked = EngineConfig { choice: EngineChoice::Kvm, ..config };
        assert!(kind(&asked).is_err() && found().get(&asked).is_none());
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
        let full = SetupError::from(shadow_mmu::frame::OutOfFrames);
        let (engine, told) = made(EngineChoice::Auto, Err(full).context("cannot use KVM"), Ok("ptrace"));
        assert!(is_about_the_pool(&engine.unwrap_err()) && told.is_empty());
    }

    #[test]
    fn a_missing_device_is_named() {
        let config = EngineConfig { choice: EngineChoice::Kvm, kvm_device: "/nonexistent/kvm".into() };
        let error = format!("{:#}", trial(&config).unwrap_err());
        assert!(error.starts_with("cannot use KVM: /nonexistent/kvm does not exist"), "{error}");
    }
}
