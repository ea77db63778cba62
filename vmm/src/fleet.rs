// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guests that share one frame pool: copies of one program, a VM each, in one process.
//!
//! They share frames and umbra's stdout and stderr, and nothing else: each has its own address space, shadow map, engine and
//! threads, as programs on one host have. What one of them gives back the others get, and so does what one of them leaves
//! behind when it ends: whoever runs the event loop takes a guest out ([`Fleet::take`]) when it hears that it has ended, and
//! drops it when all is said of it.
//!
//! Guests are numbered from 0. Number 0 reads umbra's stdin; the others find theirs at its end.
//!
//! Locks: the list's lock is a leaf. It is never held while a guest is started, ended, waited for or looked at; whoever wants
//! to do that has a reference of its own. So a guest that was taken out is gone when the last such reference is.

use crate::engine::Regs;
use crate::engine::SetupError;
use crate::guest::{Files, LoadError};
use crate::vm::{Program, Vm, VmConfig};
use anyhow::{Context, Result, anyhow};
use shadow_mmu::addr::PAGE_SIZE;
use shadow_mmu::frame::{FramePool, OutOfFrames};
use shadow_mmu::mm::MmError;
use shadow_mmu::shadow::ShadowError;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vmm_sys_util::eventfd::EventFd;

/// A guest and its number.
pub type Numbered = (usize, Arc<Vm>);

/// Guests over one pool.
#[derive(Debug)]
pub struct Fleet {
    pool: Arc<FramePool>,
    /// What the first thread of each starts with.
    entries: Vec<Regs>,
    /// By number; `None` once it was taken out.
    guests: Mutex<Vec<Option<Arc<Vm>>>>,
}

impl Fleet {
    /// `count` machines as `config` has it, with `program` loaded, not running yet, over a new pool of `pool` bytes; if that is
    /// not given, of `count` times `config.memory`.
    ///
    /// # Errors
    /// Whatever keeps the program from being run, in one line that says what to do. There is no guest then.
    pub fn new(count: usize, pool: Option<u64>, mut config: VmConfig, program: &Program) -> Result<Self> {
        if count > 1 || pool.is_some() {
            let bytes = pool.unwrap_or_else(|| config.memory.saturating_mul(count as u64));
            config.pool = Some(Arc::new(FramePool::with_faults(bytes, config.freed, config.faults.clone())?));
        }
        let (mut entries, mut guests) = (Vec::new(), Vec::new());
        for number in 0..count {
            let files = match number {
                0 => Files::inherit(),
                _ => Files::inherit_output().context("cannot open /dev/null, which guests read")?,
            };
            let made = Vm::with_files(config.clone().numbered(number), program.clone(), files);
            let (vm, entry) = made.map_err(|error| explain(error, number, count, config.pool.as_deref()))?;
            entries.push(entry);
            guests.push(Some(Arc::new(vm)));
        }
        let first: Option<&Arc<Vm>> = guests.first().and_then(Option::as_ref);
        let pool = Arc::clone(first.context("there must be a guest")?.machine().pool());
        Ok(Self { pool, entries, guests: Mutex::new(guests) })
    }

    fn guests(&self) -> MutexGuard<'_, Vec<Option<Arc<Vm>>>> {
        // Nothing is done under the lock that leaves it half done.
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many guests there were at first.
    pub fn count(&self) -> usize {
        self.entries.len()
    }

    /// The pool that they share, or the only guest's own.
    pub fn pool(&self) -> &Arc<FramePool> {
        &self.pool
    }

    /// Those that were not taken out, by number.
    pub fn left(&self) -> Vec<Numbered> {
        let guests = self.guests();
        guests.iter().enumerate().filter_map(|(n, vm)| Some((n, Arc::clone(vm.as_ref()?)))).collect()
    }

    /// The guest with this number, unless it was taken out.
    pub fn guest(&self, number: usize) -> Option<Arc<Vm>> {
        self.guests().get(number)?.clone()
    }

    /// Takes the guest out: it has ended, or will not be asked for any more.
    pub fn take(&self, number: usize) -> Option<Arc<Vm>> {
        self.guests().get_mut(number)?.take()
    }

    /// Takes out the guest with this number, unless it is the last that is left.
    pub fn take_unless_last(&self, number: usize) -> Option<Arc<Vm>> {
        let mut guests = self.guests();
        if guests.iter().flatten().count() == 1 { None } else { guests.get_mut(number)?.take() }
    }

    /// What becomes readable when a guest ends: a descriptor for each, in the order of their numbers.
    ///
    /// # Errors
    /// No descriptor left.
    pub fn exited(&self) -> Result<Vec<EventFd>> {
        self.left().iter().map(|(_, vm)| vm.exited()).collect()
    }

    /// Starts the first thread of each guest.
    ///
    /// # Errors
    /// No vCPU, or no host thread, for one of them. Those that ran already have been ended.
    pub fn start(&self) -> Result<()> {
        let guests = self.left();
        for (number, vm) in &guests {
            let Err(error) = vm.start(self.entries[*number]) else { continue };
            for (_, vm) in &guests[..*number] {
                vm.kill(libc::SIGKILL);
                // How it ended tells nobody anything.
                let _ = vm.wait();
            }
            let shared = (self.count() > 1).then_some(&*self.pool);
            return Err(explain(error, *number, self.count(), shared));
        }
        Ok(())
    }

    /// Ends all guests that are left as by `signal`. Does not wait.
    pub fn kill(&self, signal: i32) {
        self.left().iter().for_each(|(_, vm)| vm.kill(signal));
    }
}

/// Why guest `number` of `count` cannot be had: where a pool that all share is too small for them, that.
fn explain(error: anyhow::Error, number: usize, count: usize, shared: Option<&FramePool>) -> anyhow::Error {
    match shared {
        Some(pool) if is_out_of_frames(&error) => {
            let mib = (pool.frame_count() as u64 * PAGE_SIZE) as f64 / f64::from(1 << 20);
            anyhow!(
                "a pool of {mib:.1} MiB is too small to start {count} guests in, it has no room for guest {number}: give \
                 more with --memory or --pool, or run fewer"
            )
        }
        Some(_) if count > 1 => error.context(format!("cannot start guest {number} of {count}")),
        _ => error,
    }
}

fn is_out_of_frames(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause.is::<OutOfFrames>()
            || matches!(cause.downcast_ref(), Some(MmError::NoMemory))
            || matches!(cause.downcast_ref(), Some(ShadowError::OutOfFrames(_)))
            || matches!(cause.downcast_ref(), Some(SetupError::Frames(_)))
            || matches!(
                cause.downcast_ref(),
                Some(
                    LoadError::TooLarge { .. }
                        | LoadError::Write { .. }
                        | LoadError::Map { source: MmError::NoMemory, .. }
                )
            )
    })
}
