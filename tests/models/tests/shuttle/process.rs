// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest whose TLB is the crate's own ([`SoftTlb`]): a process whose mappings it keeps, and vCPUs that are threads of it.
//!
//! An access holds the lock of the process's page table, as unmapping does: that returns when no CPU is in the middle of an
//! access. What is not mapped is filled in, and what the shadow map has not either is a page fault.

use crate::addr::{Access, Gfn, Gpa, Hva, Pfn};
use crate::cpu::tagged;
use crate::machine::{Machine, READ};
use crate::mm::FaultError;
use crate::shadow::{
    FaultAroundPolicy, Filled, HostMappings, Memslot, SoftTlb, Tlb, Translation, VcpuMmu, Walker, Zapped,
};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Arc, Mutex};
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::ops::Range;

/// Faults and fills that one access may take.
const MOST_TRIES: usize = 500;

/// The process that runs a guest: its page table, by page, and what the engine knows of it.
#[derive(Debug)]
pub(crate) struct Process {
    mapped: Mutex<BTreeMap<u64, (Pfn, Access)>>,
    pub(crate) tlb: SoftTlb,
}

/// The system calls.
pub(crate) struct Calls<'a>(&'a Process);

impl HostMappings for Calls<'_> {
    type Error = Infallible;

    fn map(&mut self, translation: &Translation) -> Result<(), Infallible> {
        let mut mapped = self.0.mapped.lock();
        for n in 0..translation.pages {
            let frame = (Pfn(translation.pfn.0 + n as u32), translation.rights);
            mapped.insert(translation.gfn.0 + n, frame);
        }
        Ok(())
    }

    fn unmap(&mut self, pages: &[Range<u64>]) -> Result<(), Infallible> {
        self.0.mapped.lock().retain(|page, _| !pages.iter().any(|pages| pages.contains(page)));
        Ok(())
    }

    fn unmap_all(&mut self) -> Result<(), Infallible> {
        self.0.mapped.lock().clear();
        Ok(())
    }
}

impl Tlb for Process {
    fn flush(&self, zapped: &[Zapped]) {
        self.tlb.flush(zapped, &mut Calls(self)).unwrap();
    }
    fn flush_all(&self) {
        self.tlb.flush_all(&mut Calls(self)).unwrap();
    }
}

/// A machine whose guest runs in a process.
pub(crate) struct Guest {
    pub(crate) machine: Machine,
    pub(crate) process: Arc<Process>,
}

impl Guest {
    /// One with a slot of 16 MiB, and a TLB of eight entries.
    pub(crate) fn new() -> Self {
        Self::with_slot(Memslot { pages: 4096, ..Machine::slot() })
    }

    pub(crate) fn with_slot(slot: Memslot) -> Self {
        let machine = Machine::without_shadow();
        let process = Arc::new(Process { mapped: Mutex::default(), tlb: SoftTlb::new(8) });
        machine.make_shadow_over(process.clone(), slot);
        Self { machine, process }
    }

    pub(crate) fn vcpu(&self) -> Vcpu<'_> {
        let walker = Walker::new(Arc::clone(&self.machine.pool), self.machine.shadow().root());
        Vcpu { guest: self, walker, mmu: VcpuMmu::new(FaultAroundPolicy::Off) }
    }

    /// What is mapped is in the shadow map, with its marks (I28, I59).
    pub(crate) fn finish(self) {
        for (&gfn, &(pfn, rights)) in self.process.mapped.lock().iter() {
            let spte = self.machine.shadow().spte(Gfn(gfn));
            let covered = spte.rights().contains(rights)
                && spte.is_accessed()
                && (spte.is_dirty() || !rights.contains(Access::WRITE));
            self.machine.must(spte.is_leaf() && spte.pfn() == pfn && covered, || {
                format!("page {gfn:#x} is mapped to {pfn:?} {rights}, but the leaf is {spte:?} (I28, I59)")
            });
        }
        self.machine.finish();
    }
}

/// A vCPU, and the task that runs it.
pub(crate) struct Vcpu<'a> {
    guest: &'a Guest,
    walker: Walker,
    mmu: VcpuMmu,
}

impl Vcpu<'_> {
    pub(crate) fn access(
        &mut self,
        at: Hva,
        access: Access,
        operation: impl Fn(&AtomicU64) -> u64,
    ) -> Result<u64, FaultError> {
        let Guest { machine, process } = self.guest;
        for _ in 0..MOST_TRIES {
            if let Some(value) = try_access(machine, process, at, access, &operation) {
                return Ok(value);
            }
            let gfn = Gpa(at.0).gfn();
            if process.tlb.fill(&self.walker, gfn, access, &mut Calls(process)) == Ok(Filled::NotAllowed) {
                machine.shadow().fault(&mut self.mmu, Gpa(at.0), access)?;
            }
        }
        panic!("a vCPU faults at {at} for {access} forever");
    }

    pub(crate) fn read(&mut self, at: Hva) -> Result<u64, FaultError> {
        let value = self.access(at, READ, |word| word.load(Ordering::SeqCst))?;
        self.guest.machine.must(value == 0 || value >> 16 == at.page(), || {
            format!("a vCPU read {value:#x} at {at}, which is no value of that page (I24)")
        });
        Ok(value)
    }

    pub(crate) fn write(&mut self, at: Hva, n: u64) -> Result<(), FaultError> {
        self.access(at, Access::WRITE, |word| word.swap(tagged(at, n), Ordering::SeqCst)).map(drop)
    }
}

fn try_access(
    machine: &Machine,
    process: &Process,
    at: Hva,
    access: Access,
    operation: impl Fn(&AtomicU64) -> u64,
) -> Option<u64> {
    // Held to the end: the thread is in the middle of the access.
    let mapped = process.mapped.lock();
    let &(pfn, _) = mapped.get(&at.page()).filter(|(_, rights)| rights.contains(access))?;
    check_held(machine, pfn);
    let value = operation(&machine.pool.words(pfn)[0]);
    check_held(machine, pfn);
    Some(value)
}

fn check_held(machine: &Machine, pfn: Pfn) {
    machine.must(machine.pool.frame(pfn).ref_count() > 0, || {
        format!("a vCPU reached frame {:#x}, which is free (I21, I22)", pfn.0)
    });
}
