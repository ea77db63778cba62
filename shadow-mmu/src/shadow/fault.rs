// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The fault path: from "the CPU could not" to a leaf that it can use. The order of steps is at the top of the
//! [module](super); here they are in code. After `kvm_tdp_page_fault` and `kvm_faultin_pfn`.

use super::dirty::DirtyLog;
use super::entry::{self, Installed, Restored};
use super::gather::Gather;
use super::{AdBits, Core, ShadowMmu, SlotAccess, Spte, VcpuMmu};
use crate::addr::{Access, Gfn, Gpa, HvaRange, Pfn};
use crate::frame::OutOfFrames;
use crate::mm::{Brought, FaultError, FaultRequest, Pinned, PinnedPage};
use crate::sync::atomic::Ordering;
use crate::sync::{Arc, hint, thread};
use crate::table::index;

/// What a fault was about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum FaultCause {
    /// The page was not there: fresh memory, the zero page, a page of a file.
    FirstTouch,
    /// The address space had the page, and only the leaf was missing, or had less rights than there are now.
    Mapped,
    /// A write got a copy of its own.
    CopyOnWrite,
    /// The leaf had no W because a dirty log wants to hear of the write, or because the CPU sets no D, and got it without
    /// asking the address space.
    WriteProtect,
    /// The leaf was access-tracked.
    AccessTracked,
    /// The leaf was good already: another vCPU was faster, or the CPU had cached what was true before.
    Spurious,
}

impl FaultCause {
    /// Every one.
    pub const ALL: [Self; 6] = [
        Self::FirstTouch,
        Self::Mapped,
        Self::CopyOnWrite,
        Self::WriteProtect,
        Self::AccessTracked,
        Self::Spurious,
    ];
}

/// What a fault came to. In each case the access is possible now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FaultOutcome {
    /// What it was about.
    pub cause: FaultCause,
    /// How often it began again because of an invalidation.
    pub retries: u32,
}

impl ShadowMmu {
    /// Makes `access` at `gpa` possible for `vcpu`.
    ///
    /// # Errors
    /// [`FaultError`]: the access is not allowed, or there is no memory for it. Without a slot: nothing is mapped there.
    pub fn fault(&self, vcpu: &mut VcpuMmu, gpa: Gpa, access: Access) -> Result<FaultOutcome, FaultError> {
        let core = &*self.core;
        let gfn = gpa.gfn();
        core.stats.pf_taken.fetch_add(1, Ordering::Relaxed);
        let mut request: Option<FaultRequest> = None;
        let mut reclaimed = false;
        // What this fault made of the page, in whichever of its tries: a copy is made in a pair, so it is always found by the
        // next.
        let mut brought = Brought::Present;
        for attempt in 0u32.. {
            // The snapshot comes first: everything that is looked at below may be gone by the time it is used.
            let begun = core.seq.snapshot();
            let slots = self.slots();
            let slot = slots.find(gfn).ok_or(FaultError::NoMapping)?;
            if access.contains(Access::WRITE) && slot.access == SlotAccess::ReadOnly {
                return Err(FaultError::NoAccess);
            }
            {
                let windows = core.windows.read();
                if windows.is_released() {
                    return Err(FaultError::NoMapping);
                }
                // A log that was switched on after the snapshot is not in `slots`, and must not miss the write (I35).
                if begun == core.seq.snapshot()
                    && let Some(cause) = core.restore(gfn, access, slots.log_of(gfn), vcpu)
                {
                    let counter = match cause {
                        FaultCause::Spurious => &core.stats.pf_spurious,
                        _ => &core.stats.pf_fast,
                    };
                    counter.fetch_add(1, Ordering::Relaxed);
                    return Ok(FaultOutcome { cause, retries: attempt });
                }
                // Without this look a fault in a window would fetch the page again and again, and hold the locks that
                // the window's owner needs to get on (R31).
                if windows.contains(&(gfn.0..gfn.0 + 1)) {
                    drop(windows);
                    core.wait_to_retry(attempt);
                    continue;
                }
            }
            // A retry is the same fault, so it is counted as one.
            let mut asked = *request.get_or_insert_with(|| vcpu.request(slot.hva_of(gfn), access));
            asked.hva = slot.hva_of(gfn);
            asked.around = asked.around.intersect(slot.hvas());
            let pinned = match self.mm.fault(&asked) {
                Err(FaultError::OutOfMemory) if !reclaimed => {
                    reclaimed = true;
                    core.reclaim_for_fault()?;
                    continue;
                }
                result => result?,
            };
            brought = brought.max(pinned.brought());

            let rights = match slot.access {
                SlotAccess::ReadWrite => Access::all(),
                SlotAccess::ReadOnly => Access::READ | Access::EXEC,
            };
            let log = slots.log_of(gfn);
            // Where writes are seen by the fault that gives W, only the page that is written gets it.
            let ad = core.ad_bits();
            let protects = ad == AdBits::None || log.is_some_and(|log| log.protects());
            let leaf = |page: PinnedPage, access: Access| match Spte::leaf(page.pfn, page.rights & rights) {
                spte if protects && !access.contains(Access::WRITE) => spte.write_protected(),
                spte => spte,
            };
            let young = core.prefaulted_young.load(Ordering::Relaxed);
            let neighbour = |page: PinnedPage| match leaf(page, Access::READ) {
                spte if young => spte.touched(spte.rights()),
                // Where being present is being young: the first access asks nobody but the leaf.
                spte if ad == AdBits::None => spte.access_tracked(),
                spte => spte,
            };
            let required = pinned.required();
            let mut fresh: Vec<Pfn> = Vec::new();
            let installed = {
                let windows = core.windows.read();
                if windows.is_released() {
                    return Err(FaultError::NoMapping);
                }
                if windows.must_retry(begun, &core.seq, &(gfn.0..gfn.0 + 1)) {
                    drop(windows);
                    core.wait_to_retry(attempt);
                    continue;
                }
                // The record, then W: another vCPU may write by W as soon as it is there, and neither a harvest nor a report
                // that only copies waits for faults (I33). Whoever takes records, and W with them, does wait for `mmu_lock`
                // (R20).
                if access.contains(Access::WRITE)
                    && let Some(log) = log.filter(|log| log.protects())
                {
                    log.record(gfn, vcpu.ring.as_mut());
                }
                core.install(gfn, leaf(required, access).touched(access)).inspect(|installed| {
                    if *installed == Installed::New {
                        fresh.push(required.pfn);
                    }
                    for &page in pinned.around() {
                        let gfn = slot.gfn_of(page.hva);
                        if windows.contains(&(gfn.0..gfn.0 + 1)) {
                            continue;
                        }
                        // A neighbour for which there is no table, or that is stale, can wait for its own fault.
                        if core.install(gfn, neighbour(page)) == Ok(Installed::New) {
                            fresh.push(page.pfn);
                        }
                    }
                })
            };
            match installed {
                Ok(Installed::Stale) => core.drop_stale(gfn, &pinned),
                Ok(Installed::Already) => {
                    core.stats.pf_spurious.fetch_add(1, Ordering::Relaxed);
                    return Ok(FaultOutcome { cause: FaultCause::Spurious, retries: attempt });
                }
                Ok(Installed::New | Installed::Upgraded) => {
                    core.stats.pf_fixed.fetch_add(1, Ordering::Relaxed);
                    if fresh.len() > 1 {
                        core.stats.around_installed.fetch_add(fresh.len() as u64 - 1, Ordering::Relaxed);
                        // Pages of adopted mappings are not in the engine's window.
                        fresh.retain(|&pfn| core.pool.contains(pfn));
                        core.tlb.prefault(&fresh);
                    }
                    let cause = match brought {
                        Brought::New => FaultCause::FirstTouch,
                        Brought::Present => FaultCause::Mapped,
                        Brought::Copied => FaultCause::CopyOnWrite,
                    };
                    return Ok(FaultOutcome { cause, retries: attempt });
                }
                Err(OutOfFrames) => {
                    // Once: what a second look finds is what this fault made on the way to the table that it cannot get.
                    if std::mem::replace(&mut reclaimed, true) {
                        return Err(FaultError::OutOfMemory);
                    }
                    core.reclaim_for_fault()?;
                }
            }
        }
        unreachable!("the loop above has no end but its returns")
    }

    /// Whether the page at `gpa` could be made reachable for `access` without asking for memory: for reports.
    pub fn would_allow(&self, gpa: Gpa, access: Access) -> bool {
        let slots = self.slots();
        let Some(slot) = slots.find(gpa.gfn()) else { return false };
        let hva = slot.hva_of(gpa.gfn());
        self.mm.trapped(hva).is_none() && self.mm.vma(hva).is_some_and(|vma| vma.allows(access))
    }
}

impl Core {
    /// Tables that nobody uses are memory too.
    fn reclaim_for_fault(&self) -> Result<(), FaultError> {
        let _exclusive = self.windows.write();
        if self.reclaim_tables() == 0 { Err(FaultError::OutOfMemory) } else { Ok(()) }
    }

    fn wait_to_retry(&self, attempt: u32) {
        self.stats.pf_retried.fetch_add(1, Ordering::Relaxed);
        // A window is short, but its owner may not be running.
        if attempt < 4 { hint::spin_loop() } else { thread::yield_now() }
    }

    /// What tracking alone had taken from the leaf of `gfn` comes back, and `log` hears of a W; `None` where the primary must
    /// be asked (`fast_page_fault`). The caller holds `mmu_lock` for reading.
    fn restore(
        &self,
        gfn: Gfn,
        access: Access,
        log: Option<&Arc<DirtyLog>>,
        vcpu: &mut VcpuMmu,
    ) -> Option<FaultCause> {
        let entry = &self.tables.leaf_table(gfn.0)?[index(gfn.0, 1)];
        let restored = entry::restore(entry, access, || {
            // Before W, as in `fault`.
            if let Some(log) = log.filter(|log| log.protects()) {
                log.record(gfn, vcpu.ring.as_mut());
            }
        });
        match restored {
            Restored::No => None,
            Restored::Already => Some(FaultCause::Spurious),
            Restored::Access | Restored::AccessAndWrite => Some(FaultCause::AccessTracked),
            Restored::Write => Some(FaultCause::WriteProtect),
        }
    }

    /// Installs `new` for `gfn`, or adds its rights to the leaf that is there. The caller holds `mmu_lock` for reading and has
    /// checked sequence and windows under it.
    fn install(&self, gfn: Gfn, new: Spte) -> Result<Installed, OutOfFrames> {
        let installed = entry::install(&self.tables.leaf_table_or_new(gfn.0)?[index(gfn.0, 1)], new);
        if installed == Installed::New {
            self.stats.pages_4k.fetch_add(1, Ordering::Relaxed);
        }
        Ok(installed)
    }

    /// A present leaf must never map another frame than the primary does (I17): somebody did not notify. Reported, and
    /// mended by a zap with its flush, so that the guest at least does not go on writing there.
    fn drop_stale(&self, gfn: Gfn, pinned: &Pinned<'_>) {
        let required = pinned.required();
        log::error!(
            "guest frame {:#x} maps another frame than {:#x}, which {} now is: a notification was missed",
            gfn.0,
            required.pfn.0,
            HvaRange::page(required.hva)
        );
        self.stats.stale_leaves.fetch_add(1, Ordering::Relaxed);
        let _exclusive = self.windows.write();
        let slots = self.slots.read().clone();
        let mut gather = Gather::new(self.tlb.as_ref());
        self.zap(&slots, gfn.0..gfn.0 + 1, &mut gather);
        self.seq.removed();
        self.finish(gather);
    }
}
