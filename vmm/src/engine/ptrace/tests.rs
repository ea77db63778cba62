// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What only this engine has: a process for the guest. What is in it and what is not, what its filter refuses, and what
//! becomes of everybody when it is killed. What every engine must do is in `conformance`.

#![allow(clippy::unwrap_used, reason = "a failed test may panic")]

mod ends;
mod isolation;
mod waits;

use super::*;
use crate::engine::conformance::flush::{COUNT, wait_for_change, zapped};
use crate::engine::conformance::guest::{self, CODE, DATA, RW, SYSCALL, start};
use crate::engine::{EngineError, EngineKind, Exit, testing};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::{Duration, Instant};
use stub::{LIST, MAP_FLAGS, POOL_FD, STUB, STUB_END};

type Guest = guest::Guest<PtraceVm>;

/// mov [rdi], rdi; add rdi, rsi; dec rcx; jnz to it; syscall
const TOUCH: [u8; 14] = [0x48, 0x89, 0x3f, 0x48, 0x01, 0xf7, 0x48, 0xff, 0xc9, 0x75, 0xf5, 0x0f, 0x05, 0x90];

/// A guest with a TLB of `most` entries, or `None` where this engine is not tested.
fn guest_with_entries(code: &[u8], most: usize) -> Option<Guest> {
    testing::config(EngineKind::Ptrace)?;
    let pool = Arc::new(FramePool::new(64 << 20, FreedFrames::Keep).unwrap());
    let vm = PtraceVm::with_entries(Arc::clone(&pool), most).unwrap();
    Some(Guest::over(pool, vm, code))
}

fn guest(code: &[u8]) -> Option<Guest> {
    guest_with_entries(code, MOST_ENTRIES)
}

impl Guest {
    fn vcpu(&self) -> PtraceVcpu {
        let mut vcpu = self.vm.new_vcpu(self.root).unwrap();
        start(&mut vcpu);
        vcpu.regs_mut().rdi = DATA;
        vcpu
    }

    fn pid(&self) -> libc::pid_t {
        self.vm.service.worker.pid
    }

    fn proc(&self, file: &str) -> PathBuf {
        format!("/proc/{}/{file}", self.pid()).into()
    }

    fn signal(&self, signal: libc::c_int) {
        // SAFETY: takes numbers; the process is our child.
        assert_eq!(unsafe { libc::kill(self.pid(), signal) }, 0);
    }

    /// The states of its threads, a letter each.
    fn threads(&self) -> Vec<char> {
        let Ok(tasks) = fs::read_dir(self.proc("task")) else { return Vec::new() };
        let stats = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("stat")).ok());
        stats.filter_map(|stat| stat.rsplit(')').next()?.trim_start().chars().next()).collect()
    }

    fn is_dead(&self) -> bool {
        self.threads().iter().all(|state| matches!(state, 'Z' | 'X'))
    }

    fn mappings(&self) -> Vec<String> {
        fs::read_to_string(self.proc("maps")).unwrap().lines().map(str::to_owned).collect()
    }
}

/// The process is gone: whoever runs a vCPU of it is told so.
fn assert_lost(result: Result<Exit, EngineError>) {
    let error = result.unwrap_err().to_string();
    let told = ["was ended by signal 9", "No such process", "has ended", "failed before"];
    assert!(told.iter().any(|told| error.contains(told)), "{error}");
}
