// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The host's part of the guest's TLB: mappings of the guest's process, made and removed by system calls in it; and the flush
//! strategy over it. The protocol is that of [`SoftTlb`](shadow_mmu::shadow::SoftTlb).
//!
//! # Who makes the calls
//! A thread that traces a tracee, which is stopped while the thread is in here, has that one make them: a fault's fill, and the
//! flush for a change that the guest itself asked for. It is told by a note of the thread's own ([`set_own`]). Everybody else (aging,
//! sharing, another guest's thread) has the service do it.
//!
//! # Errors
//! Where unmapping fails the process is killed, and the flush returns when none of its threads runs: no translation is used then.

use super::PtraceVm;
use super::calls::Call;
use super::gone::{is_end, is_of_its_end};
use super::stub::{MAP_FLAGS, POOL_FD};
use super::tracee::Tracee;
use crate::inject::points::WINDOW_MADVISE;
use shadow_mmu::addr::{Access, PAGE_SHIFT, TASK_SIZE};
use shadow_mmu::shadow::{AdBits, HostMappings, Tlb, Translation, Zapped};
use std::cell::Cell;
use std::io;
use std::ops::Range;
use std::sync::Arc;

thread_local! {
    /// The tracee of this thread, stopped whenever this is looked at.
    static OWN: Cell<Option<Tracee>> = const { Cell::new(None) };
}

/// From now on this thread has `tracee` to make calls with. It must be stopped whenever the thread changes the
/// address space or the shadow map.
pub(super) fn set_own(tracee: Tracee) {
    OWN.set(Some(tracee));
}

/// `tracee` makes no calls any more.
pub(super) fn forget_own(tracee: Tracee) {
    if OWN.get() == Some(tracee) {
        OWN.set(None);
    }
}

fn munmap(bytes: Range<u64>) -> Call {
    let arguments = [bytes.start, bytes.end - bytes.start, 0, 0, 0, 0];
    Call { number: libc::SYS_munmap, arguments }
}

/// Mappings of the guest's process.
pub(super) struct ProcessMappings<'a> {
    vm: &'a PtraceVm,
}

impl<'a> ProcessMappings<'a> {
    pub(super) fn of(vm: &'a PtraceVm) -> Self {
        Self { vm }
    }

    /// Makes `calls` in the guest's process. The TLB's lock is held, so the stub's list is ours.
    fn make(&self, calls: Vec<Call>) -> io::Result<()> {
        let list = self.vm.stub.list;
        match OWN.get().filter(|own| own.pid == self.vm.service.worker.pid) {
            Some(own) => own.calls(&calls, &self.vm.pool, list).inspect_err(|error| {
                if is_end(error) {
                    // Who comes next is not told any more how.
                    self.vm.service.why(error);
                }
            }),
            None => {
                let pool = Arc::clone(&self.vm.pool);
                self.vm.service.ask(move |worker| worker.calls(&calls, &pool, list))
            }
        }
    }
}

impl HostMappings for ProcessMappings<'_> {
    type Error = io::Error;

    fn map(&mut self, translation: &Translation) -> io::Result<()> {
        let (start, bytes) = (translation.gfn.gpa().0, translation.pages << PAGE_SHIFT);
        if start.checked_add(bytes).is_none_or(|end| end > TASK_SIZE) {
            return Err(io::Error::other("a leaf of the shadow map is where no guest can have a page"));
        }
        let mut rights = libc::PROT_READ;
        if translation.rights.contains(Access::WRITE) {
            rights |= libc::PROT_WRITE;
        }
        if translation.rights.contains(Access::EXEC) {
            rights |= libc::PROT_EXEC;
        }
        let arguments = [
            start,
            bytes,
            rights as u64,
            (MAP_FLAGS | libc::MAP_POPULATE) as u64,
            POOL_FD,
            translation.pfn.offset(),
        ];
        self.make(vec![Call { number: libc::SYS_mmap, arguments }])
    }

    fn unmap(&mut self, pages: &[Range<u64>]) -> io::Result<()> {
        if let Some(errno) = self.vm.faults.fail(&WINDOW_MADVISE) {
            return Err(io::Error::from_raw_os_error(errno));
        }
        let bytes = |pages: &Range<u64>| pages.start << PAGE_SHIFT..pages.end << PAGE_SHIFT;
        self.make(pages.iter().map(bytes).map(munmap).collect())
    }

    fn unmap_all(&mut self) -> io::Result<()> {
        self.make(vec![munmap(0..TASK_SIZE)])
    }
}

/// The flush strategy of one guest.
#[derive(Debug)]
pub(super) struct PtraceTlb {
    pub(super) vm: Arc<PtraceVm>,
}

impl PtraceTlb {
    fn checked(&self, flushed: io::Result<()>) {
        if let Err(error) = flushed {
            if is_of_its_end(&error) {
                log::debug!("translations are flushed by the end of the guest's process: {error}");
                self.vm.service.end_now();
                return;
            }
            log::error!("translations cannot be flushed, and the guest is ended: {error}");
            self.vm.service.kill(format_args!("translations could not be flushed: {error}"));
        }
    }
}

impl Tlb for PtraceTlb {
    fn flush(&self, zapped: &[Zapped]) {
        self.checked(self.vm.tlb.flush(zapped, &mut ProcessMappings::of(&self.vm)));
    }

    fn flush_all(&self) {
        self.checked(self.vm.tlb.flush_all(&mut ProcessMappings::of(&self.vm)));
    }

    /// A and D are set by fills, and there is no fill while there is an entry.
    fn ad_bits(&self) -> AdBits {
        AdBits::AfterFlush
    }
}
