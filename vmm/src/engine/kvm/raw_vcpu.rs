// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A vCPU as KVM has it: made once, configured for ring 3 over the monitor, and used by one guest thread after another.
//!
//! # Park and reuse
//!
//! KVM cannot destroy a vCPU before its VM. So a [`RawVcpu`] whose guest thread is gone is *parked* in the VM's free list
//! and the next thread gets it. Ownership is by move: it is either in the list, under the list's lock, or in exactly one
//! `KvmVcpu`; nobody else has its file descriptor. What other threads do keep is its `Arc<RunState>`; a new lease makes
//! the kickers of the old one void. Nothing of a ring-3 program survives in a vCPU but general registers, segment bases
//! and the XSAVE components (it can write no MSR, control or debug register): [`RawVcpu::reset`] sets the latter, every
//! entry the others.

use super::error::KvmError;
use super::interrupt::KvmInterrupt;
use super::monitor::{self, VcpuPages};
use crate::engine::fpu::FpuLayout;
use crate::engine::kick::RunState;
use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_dtable, kvm_msr_entry, kvm_segment, kvm_sregs, kvm_xcrs,
};
use kvm_ioctls::{Kvm, KvmRunWrapper, SyncReg, VcpuFd, VmFd};
use shadow_mmu::addr::PAGE_SIZE;
use std::sync::Arc;

const MSR_STAR: u32 = 0xc000_0081;
const MSR_LSTAR: u32 = 0xc000_0082;
const MSR_CSTAR: u32 = 0xc000_0083;
const MSR_FMASK: u32 = 0xc000_0084;
/// Flags that `syscall` clears on the way into the stub: all that ring 3 can set, TF above all.
const FMASK: u64 = 0x0025_7fd5;

/// PE, MP, ET, NE, WP, AM, PG.
const CR0: u64 = 0x8005_0033;
/// `rdtsc` and `rdtscp` are for ring 0 only.
pub(super) const CR4_TSD: u64 = 1 << 2;
const CR4_PAE: u64 = 1 << 5;
const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXMMEXCPT: u64 = 1 << 10;
const CR4_UMIP: u64 = 1 << 11;
const CR4_FSGSBASE: u64 = 1 << 16;
const CR4_OSXSAVE: u64 = 1 << 18;
const CR4_SMEP: u64 = 1 << 20;
const CR4_SMAP: u64 = 1 << 21;
/// SCE, LME, LMA, NXE.
const EFER: u64 = 0xd01;

/// The CPU that every vCPU of a VM is.
#[derive(Debug)]
pub(super) struct CpuModel {
    cpuid: CpuId,
    cr4: u64,
    fpu: FpuLayout,
}

impl CpuModel {
    /// The host's CPU, as far as KVM passes it through.
    pub(super) fn of_host(kvm: &Kvm, xsave2: i32) -> Result<Self, KvmError> {
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(KvmError::ioctl("KVM_GET_SUPPORTED_CPUID"))?;
        let leaf7 = cpuid.as_slice().iter().find(|e| e.function == 7 && e.index == 0);
        let (ebx, ecx) = leaf7.map_or((0, 0), |e| (e.ebx, e.ecx));
        let optional = [(ebx, 0, CR4_FSGSBASE), (ebx, 7, CR4_SMEP), (ebx, 20, CR4_SMAP), (ecx, 2, CR4_UMIP)];
        let base = CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT | CR4_OSXSAVE;
        let has = optional.iter().filter(|(register, bit, _)| register >> bit & 1 != 0);
        let cr4 = has.fold(base, |cr4, (.., flag)| cr4 | flag);
        let fpu = FpuLayout::of_kvm(&cpuid, xsave2);
        Ok(Self { cpuid, cr4, fpu })
    }

    /// CPUID with the APIC id that tells this vCPU from the others.
    fn cpuid_of(&self, number: u32) -> CpuId {
        let mut cpuid = self.cpuid.clone();
        for entry in cpuid.as_mut_slice() {
            match entry.function {
                1 => entry.ebx = entry.ebx & 0x00ff_ffff | number << 24,
                0xb | 0x1f => entry.edx = number,
                0x8000_001e => entry.eax = number,
                _ => {}
            }
        }
        cpuid
    }
}

fn code_segment(selector: u16, dpl: u8) -> kvm_segment {
    kvm_segment {
        limit: u32::MAX,
        selector,
        type_: 11,
        present: 1,
        dpl,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    }
}

fn data_segment(selector: u16, dpl: u8) -> kvm_segment {
    kvm_segment {
        limit: u32::MAX,
        selector,
        type_: 3,
        present: 1,
        dpl,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    }
}

/// As on Linux: no data segment is loaded; FS and GS have a base all the same.
fn null_segment(base: u64) -> kvm_segment {
    kvm_segment { base, unusable: 1, ..Default::default() }
}

/// A KVM vCPU with what belongs to it.
#[derive(Debug)]
pub(super) struct RawVcpu {
    pub(super) fd: VcpuFd,
    pub(super) state: Arc<RunState>,
    pub(super) pages: VcpuPages,
    /// What KVM accepted for this vCPU.
    pub(super) fpu: FpuLayout,
    /// The system registers of ring 3, but for CR3 and the FS and GS bases.
    ring3: kvm_sregs,
    /// A second mapping of `kvm_run`, for `state` to set `immediate_exit` through while `fd` has the first one borrowed.
    _kick_view: KvmRunWrapper,
}

impl RawVcpu {
    /// Makes the vCPU with this number.
    pub(super) fn new(
        vm: &VmFd,
        model: &mut CpuModel,
        number: usize,
        pages: VcpuPages,
    ) -> Result<Self, KvmError> {
        let mut fd = vm.create_vcpu(number as u64).map_err(KvmError::ioctl("KVM_CREATE_VCPU"))?;
        let mut kick_view = KvmRunWrapper::mmap_from_fd(&fd, PAGE_SIZE as usize)
            .map_err(KvmError::ioctl("mapping a vCPU's shared page"))?;
        fd.set_cpuid2(&model.cpuid_of(number as u32)).map_err(KvmError::ioctl("KVM_SET_CPUID2"))?;
        set_xcr0(&fd, model)?;
        let fpu = model.fpu.clone();
        set_syscall_msrs(&fd)?;
        let ring3 = ring3_sregs(&fd, model, pages)?;
        fd.set_sync_valid_reg(SyncReg::Register);
        fd.set_sync_valid_reg(SyncReg::SystemRegister);
        // SAFETY: the pointer is into `kick_view`, which lives as long as `fd`; only a thread that has `fd` enters.
        let interrupt = unsafe { KvmInterrupt::new(&raw mut kick_view.as_mut_ref().immediate_exit) };
        Ok(Self { fd, state: Arc::new(RunState::new(interrupt)), pages, fpu, ring3, _kick_view: kick_view })
    }

    /// Makes the FPU that of a new process.
    pub(super) fn reset(&self) -> Result<(), KvmError> {
        self.fpu.set(&self.fd, &self.fpu.initial()).map_err(|source| KvmError::Host {
            what: "KVM_SET_XSAVE".to_owned(),
            addresses: None,
            source,
        })
    }

    /// The system registers to run ring 3 with.
    pub(super) fn ring3(&self, cr3: u64, fs_base: u64, gs_base: u64) -> kvm_sregs {
        kvm_sregs { cr3, fs: null_segment(fs_base), gs: null_segment(gs_base), ..self.ring3 }
    }
}

fn ring3_sregs(fd: &VcpuFd, model: &CpuModel, pages: VcpuPages) -> Result<kvm_sregs, KvmError> {
    let reset = fd.get_sregs().map_err(KvmError::ioctl("KVM_GET_SREGS"))?;
    let table = |(base, limit)| kvm_dtable { base, limit, ..Default::default() };
    Ok(kvm_sregs {
        cs: code_segment(monitor::USER_CS, 3),
        ss: data_segment(monitor::USER_SS, 3),
        ds: null_segment(0),
        es: null_segment(0),
        tr: kvm_segment {
            base: pages.tss,
            limit: monitor::TSS_LIMIT,
            selector: monitor::TSS_SELECTOR,
            type_: 11,
            present: 1,
            ..Default::default()
        },
        ldt: null_segment(0),
        gdt: table(monitor::GDT),
        idt: table(monitor::IDT),
        cr0: CR0,
        cr4: model.cr4,
        efer: EFER,
        apic_base: reset.apic_base,
        ..Default::default()
    })
}

fn set_syscall_msrs(fd: &VcpuFd) -> Result<(), KvmError> {
    let values = [
        (MSR_STAR, monitor::STAR),
        (MSR_LSTAR, monitor::SYSCALL_ENTRY),
        (MSR_CSTAR, monitor::SYSCALL_ENTRY),
        (MSR_FMASK, FMASK),
    ];
    let entries = values.map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() });
    let msrs = Msrs::from_entries(&entries)
        .map_err(|error| KvmError::host(format!("KVM_SET_MSRS ({error:?})"), None, libc::ENOMEM))?;
    let set = fd.set_msrs(&msrs).map_err(KvmError::ioctl("KVM_SET_MSRS"))?;
    match values.get(set) {
        None => Ok(()),
        Some((msr, _)) => Err(KvmError::host(format!("KVM_SET_MSRS of MSR {msr:#x}"), None, libc::EINVAL)),
    }
}

/// Sets XCR0 to all that CPUID offers; where KVM refuses that, to less. The model learns it.
fn set_xcr0(fd: &VcpuFd, model: &mut CpuModel) -> Result<(), KvmError> {
    /// All; without AVX-512, PKRU and later; without AVX.
    const LIMITS: [u64; 3] = [u64::MAX, 0b111, 0b11];
    let mut refused = None;
    for limit in LIMITS {
        let fpu = model.fpu.limited_to(limit);
        let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
        xcrs.xcrs[0].value = fpu.xcr0;
        match fd.set_xcrs(&xcrs) {
            Ok(()) => {
                model.fpu = fpu;
                return Ok(());
            }
            Err(error) => refused = Some(error.errno()),
        }
    }
    Err(KvmError::host("KVM_SET_XCRS", None, refused.unwrap_or(libc::EINVAL)))
}
